"""Compiled draws beside the sampler's own in PyTorch's calls, and their distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from couturier.components.generator.sampler import SamplerSettings, _draw, _Points
from couturier.kernels import compiled, dispatch, systematic_draw

pytestmark = pytest.mark.skipif(systematic_draw.library() is None, reason="no C compiler")


def drawn(logits_TBUnK: Tensor, uniforms_UnL: Tensor, settings: SamplerSettings, backend: dispatch.Wish) -> Tensor:
    """Codes ``[U, n, L]`` of a few steps in turn."""
    points = _Points(uniforms_UnL, spread=settings.spread)
    with dispatch.use(backend):
        return torch.stack([_draw(logits, points, settings) for logits in logits_TBUnK], -1)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize(("branches", "guidance"), [(1, 1.0), (2, 5.0), (2, 0.3)])
def test_the_same_codes_as_with_pytorch(branches: int, guidance: float, spread: bool) -> None:
    """Samples that agree for some steps, a window onto a wider tensor, codes that cannot come."""
    random = torch.Generator().manual_seed(branches)
    users, n, codes, steps = 5, 7, 112, 6
    logits = 3 * torch.randn(steps, branches, users, n + 2, codes, generator=random)
    logits[0] = logits[0, :, :, :1]
    logits[0, ..., 2:] = -200.0
    logits[3, ..., ::2] = -torch.inf
    uniforms_UnL = torch.rand(users, n, steps, generator=random)
    settings = SamplerSettings(guidance=guidance, temperature=0.7, spread=spread)
    if branches == 2:
        logits[3] = logits[3].clamp_min(-1e4)
    found = [drawn(logits[:, :, :, :n], uniforms_UnL, settings, backend) for backend in ("auto", "torch")]
    assert torch.equal(*found)
    assert int(found[0][..., 0].max()) <= 1
    assert bool((found[0][..., 3] % 2 == 1).all())


def test_each_code_comes_as_often_as_it_should() -> None:
    random = torch.Generator().manual_seed(0)
    logits_K = torch.randn(64, generator=random)
    n = 20_000
    fresh_Un = torch.rand(1, n, generator=random).double()
    codes_Un, _ = systematic_draw.draw(logits_K.expand(1, 1, n, -1), fresh_Un, None)
    share_K = codes_Un[0].bincount(minlength=64) / n
    chance_K = logits_K.softmax(0)
    assert float((n * (share_K - chance_K).square() / chance_K).sum()) < 104  # chi squared of 63, .999


def test_samples_alike_are_spread_evenly() -> None:
    alike_Unn = torch.ones(1, 8, 8, dtype=torch.bool)
    logits = torch.zeros(1, 1, 8, 16)
    codes_Un, left = systematic_draw.draw(logits, torch.full((1, 8), 0.99, dtype=torch.float64), alike_Unn)
    assert sorted(codes_Un[0].tolist()) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert left == 8
    assert torch.equal(alike_Unn[0], torch.eye(8, dtype=torch.bool))


def test_what_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 8, 8, 256)
    assert systematic_draw.covers(logits)
    assert not systematic_draw.covers(logits[..., :250])
    assert not systematic_draw.covers(logits[:, :1, :1])
    assert not systematic_draw.covers(logits.bfloat16())
    assert not systematic_draw.covers(logits.to("meta"))
    with dispatch.use("torch"):
        assert not systematic_draw.covers(logits)
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    monkeypatch.setattr(systematic_draw, "library", systematic_draw.library.__wrapped__)
    assert not systematic_draw.covers(logits)
    with pytest.raises(RuntimeError, match="covers"):
        systematic_draw.draw(logits, torch.zeros(8, 8, dtype=torch.float64), None)
