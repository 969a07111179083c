"""The judges by name, and the doors to them: save, load, histories from windows, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError, DataError, LineageError
from couturier.components.files import read_json, write_json, written_beside
from couturier.components.interest.attention_judge import AttentionConfig, AttentionJudge
from couturier.components.interest.encoder import EncoderConfig, TileEncoder
from couturier.components.interest.types import HistoryBatch

JUDGES: dict[str, type[AttentionJudge]] = {"attention": AttentionJudge}
WEIGHTS, SETTINGS = "judge.safetensors", "judge.json"


def judge_class(name: str) -> type[AttentionJudge]:
    """The class of a judge.

    Raises:
        ConfigError: no judge of that name.
    """
    if name not in JUDGES:
        raise ConfigError(f"judge.model is {name!r}; choose one of {', '.join(sorted(JUDGES))}.")
    return JUDGES[name]


def save_judge(judge: AttentionJudge, folder: Path, *, model: str, vocabulary: Sequence[str]) -> None:
    """``judge.safetensors`` (weights, catalogue features, calibration) and ``judge.json`` (what the weights mean)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in judge.state_dict().items()}
    with written_beside(folder / WEIGHTS) as beside:
        save_file(tensors, beside)
    settings = {"model": model, "attention": asdict(judge.config), "encoder": asdict(judge.encoder.config)}
    shapes = {name: list(tensors[name].shape) for name in ("pictures_IP", "word_ids", "word_offsets")}
    write_json(folder / SETTINGS, {**settings, "shapes": shapes, "vocabulary": list(vocabulary)})


def load_judge(folder: Path) -> AttentionJudge:
    """A fitted judge, frozen, in evaluation mode.

    Raises:
        LineageError: the folder holds no judge.
    """
    if not (folder / SETTINGS).exists():
        raise LineageError(f"no judge in {folder}: {SETTINGS} is missing. Run `couturier retrain` to fit one.")
    settings, tensors = read_json(folder / SETTINGS), load_file(folder / WEIGHTS)
    judge = judge_class(settings["model"])(
        AttentionConfig(**settings["attention"]),
        TileEncoder(EncoderConfig(**settings["encoder"])),
        tensors["pictures_IP"],
        tensors["word_ids"],
        tensors["word_offsets"],
        len(settings["vocabulary"]),
    )
    judge.load_state_dict(tensors)
    return judge.requires_grad_(False).eval()


def history_items(windows: Windows, rows: np.ndarray, *, catalogue: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Favourites of some windows: ``(items_N int64, age_days_N, weight_N, offsets int64 [U + 1])``; -1 is left out.

    Raises:
        DataError: an item index beyond the catalogue.
    """
    favourites_UK = windows.favourites_WK[rows]
    real_UK = favourites_UK >= 0
    if favourites_UK.size and favourites_UK.max() >= catalogue:
        raise DataError(
            f"a history names item {favourites_UK.max()}, but the catalogue has {catalogue} items. Cut the windows "
            "again for this catalogue, or leave unknown items out (-1)."
        )
    offsets = np.concatenate([[0], real_UK.sum(1).cumsum()]).astype(np.int64)
    return (
        torch.from_numpy(favourites_UK[real_UK].astype(np.int64)),
        torch.from_numpy(windows.age_days_WK[rows][real_UK]),
        torch.from_numpy(windows.weight_WK[rows][real_UK]),
        torch.from_numpy(offsets),
    )


def history_batch(windows: Windows, rows: np.ndarray, item_features_ID: Tensor) -> HistoryBatch:
    """The histories of some windows as a judge reads them; ``item_features_ID`` from ``Judge.embed_items``."""
    items_N, age_N, weight_N, offsets = history_items(windows, rows, catalogue=item_features_ID.shape[0])
    return HistoryBatch(features_ND=item_features_ID[items_N], age_days_N=age_N, weight_N=weight_N, offsets=offsets)
