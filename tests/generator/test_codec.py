"""The codec: shapes, training that reconstructs, codes read off their own pixels alone, resume to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.generator.codec import PatchVQ, PatchVQConfig, load_codec, pictures, psnr_db
from couturier.components.generator.tokenise import Config, load_eyes, one_cycle, run
from couturier.components.lineage.stages import Silent, StageContext
from couturier.components.lineage.workspace import Workspace

TINY = Config(
    threads=1,
    codec=PatchVQConfig(size=16, codebook=64, width=16, code_width=8, blocks=1),
    steps=150,
    batch=16,
    eyes_width=32,
    eyes_layers=1,
    eyes_steps=300,
    eyes_batch=40,
    eyes_lr=3e-3,
    checkpoint_every=40,
)


class Killed(Exception):
    """Raised in the middle of the loop."""


class KillAt(Silent):
    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, n: int = 1, *, note: str = "") -> None:
        self.left -= n
        if self.left < 0:
            raise Killed


def context(root: Path, catalogue: Catalogue, progress: Silent | None = None) -> StageContext:
    catalogue.save(root / "sequences")
    (root / "out").mkdir(parents=True, exist_ok=True)
    return StageContext(
        inputs={"sequences": root / "sequences"},
        config=TINY,
        out=root / "out",
        scratch=root / "scratch",
        workspace=Workspace(project=root, root=root / "ws"),
        progress=progress or Silent(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> tuple[Path, dict]:
    ctx = context(tmp_path_factory.mktemp("tokenise"), catalogue)
    run(ctx)
    return ctx.out, ctx.facts


def test_training_reconstructs_every_picture(trained: tuple[Path, dict]) -> None:
    facts = trained[1]
    assert facts["psnr_db"] > 20
    assert facts["retrieval_top1"] == 1.0
    assert facts["distinct_code_rows"] == 40
    assert facts["eyes_attribute_accuracy"] > 0.9


def test_saved_parts_load_and_agree_with_the_codes(trained: tuple[Path, dict], catalogue: Catalogue) -> None:
    codec = load_codec(trained[0] / "codec")
    codes = load_file(trained[0] / "codes.safetensors")["codes_IL"]
    assert (codec.codebook_size, codec.codes_per_picture, codec.picture_size) == (64, 4, 16)
    assert torch.equal(codec.encode(pictures(catalogue, 16)), codes)
    assert codec.decode(codes).shape == (40, 3, 16, 16)
    assert load_eyes(trained[0] / "eyes").config.image_size == 16


@pytest.mark.parametrize("step", [25, 90, 149])
def test_kill_and_resume_gives_the_same_bits(
    trained: tuple[Path, dict], catalogue: Catalogue, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Killed):
        run(context(tmp_path, catalogue, KillAt(step)))
    again = context(tmp_path, catalogue)
    run(again)
    for part in ("codec/codec.safetensors", "eyes/eyes.safetensors", "codes.safetensors"):
        a, b = load_file(trained[0] / part), load_file(again.out / part)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_code_is_read_off_its_own_pixels_alone() -> None:
    codec = PatchVQ(PatchVQConfig(size=16, codebook=64, width=16, code_width=8, blocks=1)).eval()
    rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = rgb.clone()
    other[:, :, :8, :8] = 1 - other[:, :, :8, :8]
    a, b = codec.latents(rgb), codec.latents(other)
    assert torch.equal(a[:, 1:], b[:, 1:])
    assert not torch.equal(a[:, :1], b[:, :1])


def test_psnr_of_known_errors() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr_db(a, b).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_the_learning_rate_rises_then_falls() -> None:
    factors = [one_cycle(step, 100) for step in range(100)]
    assert factors.index(max(factors)) == 5
    assert all(a >= b for a, b in zip(factors[5:], factors[6:], strict=False))
    assert 0 < factors[-1] < 0.02


def test_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"codec\.size is 20"):
        PatchVQ(PatchVQConfig(size=20))
    with pytest.raises(LineageError, match=r"no codec\.json"):
        load_codec(tmp_path)
