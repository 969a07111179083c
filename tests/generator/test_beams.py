"""Beam search against the definition, by teacher-forced passes without any cache; with marks, guidance, other steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from couturier.components.errors import ConfigError
from couturier.components.generator import blocks
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.language import LanguageGenerator
from couturier.components.runtime import threads
from couturier.kernels import dispatch, llama_layer


def searched(generator: LanguageGenerator, history_K: np.ndarray, beams: int, guidance: float = 1.0) -> Tensor:
    """Beams ``[b, L]`` of one person, each beginning read anew."""
    with_history = generator.prompts.build(history_K[None])
    without = with_history.unconditional(generator.prompts.pad_id)
    length = generator.codes_per_picture
    codes_bL, nats_b = torch.zeros(1, length, dtype=torch.long), torch.zeros(1)
    for t in range(length):
        logits_bK = generator.logits(with_history, codes_bL[None])[0, :, t]
        if guidance != 1:
            free_bK = generator.logits(without, codes_bL[None])[0, :, t]
            logits_bK = free_bK + guidance * (logits_bK - free_bK)
        longer_bK = nats_b[:, None] - logits_bK.log_softmax(-1)
        nats_b, at_b = longer_bK.flatten().topk(min(beams, longer_bK.numel()), largest=False)
        codes_bL = codes_bL[at_b // longer_bK.shape[1]]
        codes_bL[:, t] = at_b % longer_bK.shape[1]
    return codes_bL


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_search_is_the_one_without_a_cache(
    generator: JanusGenerator, histories: np.ndarray, guidance: float
) -> None:
    with dispatch.use("torch"):
        found = generator.likeliest(histories, 6, beams=30, guidance=guidance)
    for codes_nL, history_K in zip(found, histories, strict=True):
        assert torch.equal(codes_nL, searched(generator, history_K, 30, guidance)[:6])


@pytest.mark.skipif(llama_layer.library(16) is None, reason="no C compiler")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_compiled_steps_find_the_same(
    generator: JanusGenerator, histories: np.ndarray, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_COMPILE_FROM", 0)
    lengths: list[int] = []
    follow = llama_layer.Steps.follow

    def counted(self: llama_layer.Steps, from_Rn: Tensor, tokens: int) -> None:
        lengths.append(tokens)
        follow(self, from_Rn, tokens)

    monkeypatch.setattr(llama_layer.Steps, "follow", counted)
    found = generator.likeliest(histories, 6, beams=30, guidance=guidance)
    assert lengths == [0, 1, 2]
    for codes_nL, history_K in zip(found, histories, strict=True):
        assert torch.equal(codes_nL, searched(generator, history_K, 30, guidance)[:6])


def test_all_differ_and_the_likeliest_is_first(generator: JanusGenerator, histories: np.ndarray) -> None:
    found = generator.likeliest(histories, 8)
    nats = generator.nats(histories, found)
    assert all(len(one.unique(dim=0)) == 8 for one in found)
    assert (nats.diff(dim=1) > -1e-4).all()
    drawn = generator.nats(histories, generator.sample(histories, 200, seeds=[1, 2, 3]))
    assert (nats[:, 0] <= drawn.min(1).values + 1e-4).all()


def test_with_room_for_all_beginnings_nothing_is_missed(generator: JanusGenerator, histories: np.ndarray) -> None:
    """Codebook 24: with 24 * 24 beams the likeliest picture of all those that begin with any two codes is found."""
    best = generator.likeliest(histories[:1], 1, beams=576)
    prompts = generator.prompts.build(histories[:1])
    begins = torch.cartesian_prod(*[torch.arange(24)] * 3)
    whole = torch.cat([begins, torch.zeros(len(begins), 1, dtype=torch.long)], 1)
    lp = torch.cat([generator.logits(prompts, part[None])[0].log_softmax(-1) for part in whole.split(2000)])
    begun = lp[:, :3].gather(-1, begins[..., None]).sum((1, 2))
    assert torch.isclose(-generator.nats(histories[:1], best)[0, 0], (begun[:, None] + lp[:, 3]).max(), atol=1e-4)


def test_nobody_else_in_the_batch_matters_nor_how_many_threads(
    generator: JanusGenerator, histories: np.ndarray
) -> None:
    with threads(2):
        together = generator.likeliest(histories.repeat(20, 0), 4)
    with threads(1):
        for place, history_K in enumerate(histories):
            alone = generator.likeliest(history_K[None], 4)[0]
            assert all(torch.equal(alone, one) for one in together[place * 20 : place * 20 + 20])


def test_what_was_had_is_passed_over_and_the_next_takes_its_place(
    generator: JanusGenerator, histories: np.ndarray
) -> None:
    whole = generator.likeliest(histories, 8, beams=40)
    had = torch.stack([whole[:, 0], whole[:, 3], torch.full_like(whole[:, 0], -1)], 1)
    rest = generator.likeliest(histories, 6, beams=40, without_UmL=had)
    assert torch.equal(rest, whole[:, [1, 2, 4, 5, 6, 7]])


def test_more_pictures_than_beams_is_said(generator: JanusGenerator, histories: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="beams is 3 for 4 pictures"):
        generator.likeliest(histories, 4, beams=3)
    with pytest.raises(ConfigError, match="n is 0"):
        generator.likeliest(histories, 0)
    with pytest.raises(ConfigError, match="1 of the history that are passed over; keep at least 5"):
        generator.likeliest(histories, 4, beams=4, without_UmL=torch.zeros(3, 1, 4, dtype=torch.long))
