"""Several processes fit as one: the same judge within float tolerance, and a checkpoint of two goes on alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from couturier.components.errors import ConfigError
from couturier.components.files import read_json, write_json
from couturier.components.interest.distributed_fit import main
from couturier.components.interest.judge import load_judge
from couturier.components.interest.log_fit import LogFitConfig
from couturier.components.settings import settings_of
from couturier.components.together import mean_over

from .worlds.base import planted_log

ITEMS = 12
SHARED = {
    "batch": 16,
    "history": 6,
    "steps": 24,
    "eval_every": 8,
    "checkpoint_every": 8,
    "skip_seen": False,
    "features": {"words": 0, "ids": 8},
}
MODELS: dict[str, dict[str, Any]] = {
    "mqsa_ted": {"width": 8, "length": 6, "dropout": 0.0},
    "attention": {"heads": 2, "head_width": 4, "hidden": 8},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of walks round a ring, some of which stop halfway, and what the eyes see of its items."""
    folder, random = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    lists = [((random.integers(ITEMS) + np.arange(random.integers(4, 15))) % ITEMS).tolist() for _ in range(60)]
    planted_log(folder, lists, ITEMS)
    save_file(
        {"pictures_IP": torch.randn(ITEMS, 5, generator=torch.Generator().manual_seed(0))}, folder / "looks.safetensors"
    )
    for model, sizes in MODELS.items():
        write_json(folder / f"{model}.json", {**SHARED, "model": model, model: sizes})
    return folder


def arguments(given: Path, model: str, out: Path) -> list[str]:
    paths = [given / "log", given / "looks.safetensors", out, "--settings", given / f"{model}.json"]
    return [str(path) for path in paths]


def by_two(given: Path, model: str, out: Path) -> None:
    """What the documentation says to type, on this machine's own address."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += ["-m", "couturier.components.interest.distributed_fit", *arguments(given, model, out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the judge is in") == 1


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "judge" / "judge.safetensors")


@pytest.mark.parametrize("model", ["mqsa_ted", pytest.param("attention", marks=pytest.mark.slow)])
def test_two_processes_fit_as_one_and_one_goes_on_where_two_stopped(given: Path, model: str, tmp_path: Path) -> None:
    by_two(given, model, tmp_path / "two")
    main(arguments(given, model, tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=5e-4, rtol=5e-4, msg=name)
    facts = [read_json(tmp_path / name / "fit.json") for name in ("one", "two")]
    assert [each["processes"] for each in facts] == [1, 2]
    assert facts[0]["valid"] == pytest.approx(facts[1]["valid"], abs=5e-3)
    # The newest checkpoint that two processes left is from step 16 of 24.
    shutil.copytree(tmp_path / "two" / "scratch", tmp_path / "on" / "scratch")
    assert sorted(path.name for path in (tmp_path / "on" / "scratch" / "checkpoints").iterdir())[-1].endswith("16")
    main(arguments(given, model, tmp_path / "on"))
    for name, value in weights(tmp_path / "on").items():
        torch.testing.assert_close(value, two[name], atol=5e-4, rtol=5e-4, msg=name)
    assert load_judge(tmp_path / "two" / "judge").name == model


def test_settings_come_from_plain_values() -> None:
    config = settings_of(LogFitConfig, {"model": "mqsa_ted", "mqsa_ted": {"long": 5}, "pool": -1})
    assert config.mqsa_ted.long == 5 and config.pool == -1
    assert settings_of(LogFitConfig, asdict(config)) == config
    for wrong, told in (({"stpes": 3}, "stpes"), ({"mqsa_ted": 3}, "a group"), ({"steps": {}}, "one value")):
        with pytest.raises(ConfigError, match=told):
            settings_of(LogFitConfig, wrong)


def test_what_does_not_fit_together_is_said(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"pictures_IP": torch.zeros(3, 5)}, tmp_path / "few.safetensors")
    wrong = arguments(given, "mqsa_ted", tmp_path / "out")
    wrong[1] = str(tmp_path / "few.safetensors")
    with pytest.raises(SystemExit):
        main(wrong)
    assert "few.safetensors has 3 items, the log has 12" in capsys.readouterr().err


def test_a_mean_of_nothing_is_nothing() -> None:
    assert mean_over(torch.tensor(0.0), torch.tensor(0)).item() == 0
