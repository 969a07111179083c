"""The packaged service as a client sees it: the real bento, booted once for the session."""

import http.client
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from couturier.components.generator.words import TitleConfig
from couturier.serving.bundle import Bundle
from couturier.serving.client import ServiceError
from couturier.serving.pictures import png_bytes
from couturier.serving.sampling import Sampling
from couturier.serving.titles import Titles


@pytest.fixture(scope="module")
def client(served):
    return served.client


@pytest.fixture(scope="module")
def bundle(made):
    return Bundle.load(made.package.scratch / "context" / "model")


def refusal(client, name, form=None, *, body=None, headers=None):
    with pytest.raises(ServiceError) as caught:
        client.request("POST", f"/{name}", body if body is not None else json.dumps(form).encode(), headers)
    assert "Traceback" not in str(caught.value) and ".py" not in str(caught.value)
    return caught.value.status, str(caught.value)


def pngs(answer):
    return [picture["png"] for picture in answer["pictures"]]


def events(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_the_same_bytes_over_http_and_in_process(client, bundle):
    answer = client.generate(user_id="user-05", n=3, seed=42, guidance=2.0, temperature=0.8)
    sampling = Sampling(n=3, seed=42, guidance=2.0, temperature=0.8)
    here = bundle.generate([bundle.history_of("user-05")], sampling)[0]
    assert pngs(answer) == [png_bytes(picture.rgb_HWC) for picture in here]
    assert [picture["id"] for picture in answer["pictures"]] == [picture.id for picture in here]
    titles = bundle.catalogue.items["title"].to_list()
    assert [p["nearest"]["title"] for p in answer["pictures"]] == [titles[p.nearest] for p in here]
    assert answer["attribution"] == bundle.catalogue.attribution


def test_the_likeliest_pictures_over_http(client, bundle):
    answer = client.generate(user_id="user-05", n=3, likeliest=True)
    here = bundle.generate([bundle.history_of("user-05")], Sampling(n=3, likeliest=True))[0]
    assert pngs(answer) == [png_bytes(picture.rgb_HWC) for picture in here]


def test_titles_are_the_items_own_unless_asked_for(client, bundle):
    answer = client.generate(user_id="user-05", n=2, seed=42)
    assert [(p["title"], p["titled_by"]) for p in answer["pictures"]] == [
        (p["nearest"]["title"], "item") for p in answer["pictures"]
    ]
    asked = client.generate(user_id="user-05", n=2, seed=42, titles=True)
    history = bundle.history_of("user-05")
    titling = Titles(bundle, TitleConfig(writer="phrases"))
    here = titling.of(history, bundle.generate([history], Sampling(n=2, seed=42))[0])
    assert [(p["title"], p["titled_by"]) for p in asked["pictures"]] == [(title.text, title.by) for title in here]
    assert pngs(asked) == pngs(answer)


def test_a_history_of_ids_draws_too(client, bundle):
    ids = bundle.catalogue.item_ids[:4]
    answer = client.generate(history=ids, n=2, seed=3)
    here = bundle.generate([bundle.history_from(ids)], Sampling(n=2, seed=3))[0]
    assert pngs(answer) == [png_bytes(picture.rgb_HWC) for picture in here]


def test_one_png_holds_all_pictures(client):
    form = {"user_id": "user-05", "n": 4, "seed": 9}
    sheet = np.asarray(Image.open(io.BytesIO(client.generate_png(**form))))
    first = np.asarray(Image.open(io.BytesIO(pngs(client.generate(**form))[0])))
    assert sheet.shape == (4 * (2 * 34 + 2), 4 * (2 * 34 + 2), 3)
    assert np.array_equal(sheet[8 : 8 + 128 : 4, 8 : 8 + 128 : 4], first)


def test_requests_at_the_same_time_do_not_disturb_each_other(client):
    forms = [{"user_id": f"user-{i % 6:02d}", "n": 1 + i % 3, "seed": i % 4} for i in range(18)]
    alone = [pngs(client.generate(**form)) for form in forms]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda form: pngs(client.generate(**form)), forms))
    assert together == alone


def test_scores_come_ranked(client, bundle):
    ids = bundle.catalogue.item_ids[3:9]
    answer = client.score(user_id="user-02", item_ids=[*ids, ids[0]])
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5, 6], (
        "an item that is asked for twice is ranked once"
    )
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    here = bundle.score(bundle.history_of("user-02"), bundle.indices(ids, "item_ids"))
    assert {item["item_id"]: item["score"] for item in answer["items"]} == dict(zip(ids, here.tolist(), strict=True))
    assert client.score(history=ids, item_ids=ids)["items"][0]["rank"] == 1


def test_version_says_where_it_came_from(client, made):
    version = client.version()
    assert version["bento"] == made.package.facts["tag"] and version["bundle"] == "couturier-0123456789abcdef"
    assert version["registered"] == {"model": "couturier", "version": 7, "run_id": "abc", "alias": "champion"}
    assert version["git_commit"] and {"data_md5", "config", "manifests"} <= version.keys()
    assert json.loads(client.request("GET", "/version")[1]) == version


def test_probes_answer(client):
    assert client.ready()
    assert client.request("GET", "/livez")[0] == client.request("GET", "/healthz")[0] == 200


def test_unknown_people_are_a_404_with_a_sentence(client):
    for name, form in (("generate", {}), ("score", {"item_ids": ["item/01"]}), ("history", {})):
        status, sentence = refusal(client, name, {"user_id": "nobody", **form})
        assert status == 404 and "'nobody' is not among the 24 people" in sentence


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"user_id": "user-01", "n": 0}, "n is 0."),
        ({"user_id": "user-01", "n": 65}, "n is 65."),
        ({"user_id": "user-01", "n": "4"}, "n is '4'."),
        ({"user_id": "user-01", "n": 2.5}, "n is 2.5."),
        ({"user_id": "user-01", "guidance": -1}, "guidance is -1."),
        ({"user_id": "user-01", "seed": 2**53}, "seed is 9007199254740992."),
        ({"user_id": "user-01", "picture_url": "http://localhost/"}, "picture_url is not a field"),
        ({}, "either user_id or history"),
        ({"history": []}, "history is []."),
        ({"history": ["item/01", "no such item"]}, "history names 'no such item'"),
        ([], "the body is []"),
    ],
)
def test_what_cannot_be_drawn_is_a_400_that_says_why(client, form, said):
    status, sentence = refusal(client, "generate", form)
    assert status == 400 and said in sentence


def test_a_body_that_is_no_json_is_a_400(client):
    status, sentence = refusal(client, "generate", body=b"{user_id: 1}")
    assert status == 400 and "Invalid JSON" in sentence


@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "..%2f..%2fetc", "file:///etc/passwd"])
def test_ids_that_look_like_paths_are_only_unknown_ids(client, path):
    assert refusal(client, "generate", {"user_id": path})[0] == 404
    assert refusal(client, "generate", {"history": [path]})[0] == 400
    for target in (f"/{path}", "/../service.py", "/service.py", "/studio.html/../service.py", "//etc/passwd"):
        with pytest.raises(ServiceError) as caught:
            client.request("GET", target)
        assert caught.value.status == 404


@pytest.mark.parametrize("name", ["generate", "generate.png", "score", "feedback", "history", "people", "version"])
def test_no_question_reads_a_pickle(client, name):
    headers = {"Content-Type": "application/vnd.bentoml+pickle"}
    assert refusal(client, name, body=b"cos\nsystem\n(S'true'\ntR.", headers=headers)[0] == 415
    assert refusal(client, name, body=b"x=1", headers={"Content-Type": "application/x-www-form-urlencoded"})[0] == 415


def test_a_large_body_is_refused_stated_or_not(client):
    large = json.dumps({"user_id": "x" * 70_000}).encode()
    assert refusal(client, "generate", body=large)[0] == 413
    connection = http.client.HTTPConnection(client.host, client.port, timeout=30)
    connection.request("POST", "/generate", iter([large]), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_answers_are_closed_to_other_origins_and_names(client):
    connection = http.client.HTTPConnection(client.host, client.port, timeout=30)
    connection.request("GET", "/version", headers={"Origin": "http://evil.example"})
    answer = connection.getresponse()
    answer.read()
    assert answer.getheader("access-control-allow-origin") is None
    assert "default-src 'none'" in (answer.getheader("content-security-policy") or "")
    connection.request("OPTIONS", "/generate", headers={"Origin": "http://evil.example"})
    assert connection.getresponse().status >= 400
    connection.close()
    with pytest.raises(ServiceError) as caught:
        client.request("GET", "/version", headers={"Host": "evil.example"})
    assert caught.value.status == 421


def test_feedback_on_a_drawn_picture_is_kept_once_with_its_recipe(client, feedback_folder):
    picture = client.generate(user_id="user-07", n=2, seed=77)["pictures"][1]
    before = events(feedback_folder)
    answer = client.feedback(user_id="user-07", generation_id=picture["id"], kind="dislike", value=-1.0)
    (row,) = events(feedback_folder)[len(before) :]
    assert row["event_id"] == answer["event_id"] and row["timestamp"] == answer["timestamp"]
    assert (row["user_id"], row["kind"], row["value"]) == ("user-07", "dislike", -1.0)
    assert row["item_id"] == answer["item_id"] == picture["nearest"]["item_id"]
    recipe = row["generation"]
    assert (recipe["id"], recipe["place"], recipe["seed"], recipe["n"]) == (picture["id"], 1, 77, 2)
    redrawn = client.generate(history=recipe["history"], n=recipe["n"], seed=recipe["seed"])["pictures"][
        recipe["place"]
    ]
    assert redrawn["png"] == picture["png"], "an event says how to draw its picture again"


def test_feedback_at_the_same_time_loses_nothing(client, feedback_folder):
    before = len(events(feedback_folder))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.feedback(user_id=f"u{i}", item_id="item/03", kind="view"), range(24)))
    rows = events(feedback_folder)[before:]
    assert sorted(row["user_id"] for row in rows) == sorted(f"u{i}" for i in range(24))
    assert len({row["event_id"] for row in rows}) == 24


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"item_id": "no such item", "kind": "like"}, 400),
        ({"item_id": "item/01", "kind": "adore"}, 400),
        ({"item_id": "item/01", "kind": "like", "value": 1e9}, 400),
        ({"item_id": "item/01", "kind": "like", "timestamp": "2020-01-01T00:00:00Z"}, 400),
        ({"generation_id": "gen-unknown-0", "kind": "like"}, 404),
        ({"kind": "like"}, 400),
    ],
)
def test_feedback_that_breaks_the_contract_is_not_kept(client, feedback_folder, form, status):
    before = events(feedback_folder)
    assert refusal(client, "feedback", {"user_id": "user-01", **form})[0] == status
    assert events(feedback_folder) == before


def test_nobody_can_rate_a_picture_that_was_drawn_for_someone_else(client):
    picture = client.generate(user_id="user-09", n=1, seed=123)["pictures"][0]
    status, sentence = refusal(
        client, "feedback", {"user_id": "user-10", "generation_id": picture["id"], "kind": "like"}
    )
    assert status == 404 and "'user-10'" in sentence


def test_the_page_brings_all_it_needs(client):
    html = client.request("GET", "/")[1].decode()
    assert html == client.request("GET", "/studio")[1].decode()
    assert "http://" not in html and "https://" not in html and "onclick" not in html and "<script>" not in html
    script, style = client.request("GET", "/studio.js")[1].decode(), client.request("GET", "/studio.css")[1].decode()
    assert "innerHTML" not in script and "http" not in script.replace("HTTP", "") and "url(" not in style
    people = client.post("people", {"prefix": "user-0", "limit": 3})
    assert people == {"total": 10, "users": ["user-00", "user-01", "user-02"]}
    history = client.post("history", {"user_id": "user-00"})
    assert len(history["items"]) == 8 and history["attribution"] == "Tiles drawn for the tests, CC0."
