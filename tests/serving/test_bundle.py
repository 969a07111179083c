import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError, LineageError, UnknownUserError
from couturier.serving.bundle import Bundle, write_bundle
from couturier.serving.sampling import Sampling


@pytest.fixture(scope="module")
def bundle(made):
    return Bundle.load(made.package.scratch / "context" / "model")


def pixels(pictures):
    return np.stack([picture.rgb_HWC for picture in pictures])


def test_a_persons_history_is_their_state_at_the_end_of_the_log(bundle, made):
    latest = Windows.load(made.inputs["sequences"], "latest")
    user = latest.users[3]
    row = int(np.flatnonzero(latest.user_W == 3)[0])
    history = bundle.history_of(user)
    real = latest.favourites_WK[row] >= 0
    assert history.items == tuple(latest.favourites_WK[row][real]) and len(history.items) == 8
    assert history.weights == tuple(latest.weight_WK[row][real]) and history.user_id == user


def test_unknown_people_and_items_are_named_with_a_way_out(bundle):
    with pytest.raises(UnknownUserError, match=r"'user-77'.*Did you mean user-.*item ids instead"):
        bundle.history_of("user-77")
    with pytest.raises(ConfigError, match=r"history names 'a/b' and 1 more.*Leave unknown items out"):
        bundle.history_from(["item/01", "a/b", "c"])
    with pytest.raises(ConfigError, match="at most 200"):
        bundle.history_from(["item/01"] * 201)


def test_a_history_of_ids_gets_the_usual_weights_and_ages(bundle):
    ids = bundle.catalogue.item_ids
    history = bundle.history_from([ids[5], ids[2], ids[5], ids[9]])
    assert history.items == (5, 2, 9), "each item once, in the order given"
    people = bundle.people
    has = people.favourites_WK[:, 1] >= 0
    assert history.weights[1] == pytest.approx(float(np.median(people.weight_WK[has, 1])))
    assert history.ages_days[1] == pytest.approx(float(np.median(people.age_days_WK[has, 1])))
    assert len(bundle.history_from(ids).items) == people.favourites_WK.shape[1]


def test_the_same_request_draws_the_same_pictures_and_ids(bundle):
    history = bundle.history_of("user-03")
    sampling = Sampling(n=3, seed=11)
    first, again = (bundle.generate([history], sampling)[0] for _ in range(2))
    assert np.array_equal(pixels(first), pixels(again)) and [p.id for p in first] == [p.id for p in again]
    assert pixels(first).dtype == np.uint8 and pixels(first).shape == (3, 32, 32, 3)
    assert len({picture.id for picture in first}) == 3


@pytest.mark.parametrize("other", [{"seed": 12}, {"guidance": 3.0}, {"temperature": 0.3}])
def test_every_setting_matters(bundle, other):
    history = bundle.history_of("user-03")
    plain = bundle.generate([history], Sampling(n=3, seed=11))[0]
    changed = bundle.generate([history], Sampling(**{"n": 3, "seed": 11, **other}))[0]
    assert not np.array_equal(pixels(plain), pixels(changed))
    assert not {picture.id for picture in plain} & {picture.id for picture in changed}


def test_the_likeliest_pictures_differ_and_owe_nothing_to_chance(bundle):
    history = bundle.history_of("user-03")
    one, other = (bundle.generate([history], Sampling(n=6, seed=seed, likeliest=True))[0] for seed in (1, 2))
    assert np.array_equal(pixels(one), pixels(other)) and [p.id for p in one] == [p.id for p in other]
    assert len({picture.rgb_HWC.tobytes() for picture in one}) == 6
    drawn = bundle.generate([history], Sampling(n=6, seed=1))[0]
    assert not {picture.id for picture in one} & {picture.id for picture in drawn}


def test_new_pictures_are_none_of_the_history(bundle, made, monkeypatch):
    codes_IL = load_file(made.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
    history = bundle.history_of("user-03")
    asked = []
    search = bundle.generator.likeliest

    def listening(favourites_UK, n, **how):
        asked.append(how["without_UmL"])
        return search(favourites_UK, n, **how)

    monkeypatch.setattr(bundle.generator, "likeliest", listening)
    new = bundle.generate([history], Sampling(n=6, likeliest=True, new=True))[0]
    had_KL = asked[0][0]
    assert torch.equal(had_KL[: len(history.items)], codes_IL[list(history.items)])
    assert (had_KL[len(history.items) :] == -1).all()
    every = bundle.generate([history], Sampling(n=6, likeliest=True))
    assert asked[1] is None and not {picture.id for picture in every[0]} & {picture.id for picture in new}


def test_people_in_one_batch_do_not_disturb_each_other(bundle):
    histories = [bundle.history_of(user) for user in bundle.users[:4]]
    sampling = Sampling(n=2, seed=5)
    together = bundle.generate(histories, sampling)
    alone = [bundle.generate([history], sampling)[0] for history in histories]
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(pixels(a), pixels(b)) and [p.id for p in a] == [p.id for p in b]


def test_the_callers_thread_count_and_random_state_do_not_matter_and_stay(bundle):
    history, sampling = bundle.history_of("user-03"), Sampling(n=2, seed=1)
    before = pixels(bundle.generate([history], sampling)[0])
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.manual_seed(99)
    torch.set_num_threads(2)
    try:
        again = pixels(bundle.generate([history], sampling)[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert np.array_equal(before, again)


def test_the_nearest_item_of_a_catalogue_picture_is_itself(bundle):
    rgb = torch.from_numpy(bundle.catalogue.rgb_IHWC.copy()).permute(0, 3, 1, 2).float() / 255
    assert bundle.nearest(rgb) == list(range(len(bundle.catalogue)))


def test_scores_belong_to_items_not_to_places(bundle):
    history = bundle.history_of("user-03")
    forwards = bundle.score(history, [0, 1, 2, 3, 4])
    backwards = bundle.score(history, [4, 3, 2, 1, 0])
    assert np.isfinite(forwards).all() and len(set(forwards.tolist())) > 1
    assert np.allclose(forwards, backwards[::-1], atol=1e-5)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path, made):
    with pytest.raises(LineageError, match="no bundle"):
        Bundle.load(tmp_path)
    with pytest.raises(LineageError, match="lack 'bundle'"):
        stages = {name: made.inputs[name] for name in ("sequences", "tokenise", "judge", "rl")}
        write_bundle(tmp_path / "out", **stages, version={})
