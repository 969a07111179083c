"""The judges by name, and the doors to them: make, save, load, histories from windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError, DataError, LineageError
from couturier.components.files import read_json, write_json, written_beside
from couturier.components.interest.base import ContentJudge, JudgeConfig
from couturier.components.interest.encoder import EncoderConfig, TileEncoder
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.attention import AttentionConfig, AttentionJudge
from couturier.components.interest.judges.aw_moe import AwMoeConfig, AwMoeJudge
from couturier.components.interest.judges.dare import DareConfig, DareJudge
from couturier.components.interest.judges.din import DinConfig, DinJudge
from couturier.components.interest.judges.dmf import DmfConfig, DmfJudge
from couturier.components.interest.judges.hcn import HcnConfig, HcnJudge
from couturier.components.interest.judges.hypercuboid import HypercuboidConfig, HypercuboidJudge
from couturier.components.interest.judges.mqsa_ted import MqsaTedConfig, MqsaTedJudge
from couturier.components.interest.judges.multimodal import MultimodalConfig, MultimodalJudge
from couturier.components.interest.judges.muse import MuseConfig, MuseJudge
from couturier.components.interest.judges.profile import ProfileConfig, ProfileJudge
from couturier.components.interest.judges.sasrec import SasrecConfig, SasrecJudge
from couturier.components.interest.judges.sdim import SdimConfig, SdimJudge
from couturier.components.interest.judges.tin import TinConfig, TinJudge
from couturier.components.interest.types import HistoryBatch


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """The settings of every judge, each under its own name; only those of the judge in use count."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sasrec: SasrecConfig = field(default_factory=SasrecConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mqsa_ted: MqsaTedConfig = field(default_factory=MqsaTedConfig)
    dmf: DmfConfig = field(default_factory=DmfConfig)
    multimodal: MultimodalConfig = field(default_factory=MultimodalConfig)
    muse: MuseConfig = field(default_factory=MuseConfig)
    dare: DareConfig = field(default_factory=DareConfig)
    hcn: HcnConfig = field(default_factory=HcnConfig)
    tin: TinConfig = field(default_factory=TinConfig)
    aw_moe: AwMoeConfig = field(default_factory=AwMoeConfig)
    hypercuboid: HypercuboidConfig = field(default_factory=HypercuboidConfig)
    din: DinConfig = field(default_factory=DinConfig)
    sdim: SdimConfig = field(default_factory=SdimConfig)

    def settings_of(self, name: str) -> JudgeConfig:
        """The settings of a judge.

        Raises:
            ConfigError: no judge of that name.
        """
        judge_class(name)
        settings: JudgeConfig = vars(self)[name]
        return settings


JUDGES: dict[str, type[ContentJudge]] = {
    judge.name: judge
    for judge in (
        AttentionJudge,
        SasrecJudge,
        ProfileJudge,
        MqsaTedJudge,
        DmfJudge,
        MultimodalJudge,
        MuseJudge,
        TinJudge,
        DareJudge,
        HcnJudge,
        AwMoeJudge,
        HypercuboidJudge,
        DinJudge,
        SdimJudge,
    )
}
WEIGHTS, SETTINGS = "judge.safetensors", "judge.json"


def judge_class(name: str) -> type[ContentJudge]:
    """The class of a judge.

    Raises:
        ConfigError: no judge of that name.
    """
    if name not in JUDGES:
        raise ConfigError(f"judge.model is {name!r}; choose one of {', '.join(sorted(JUDGES))}.")
    return JUDGES[name]


def make_judge(name: str, config: JudgeConfig, features: FeatureConfig, content: Content) -> ContentJudge:
    """A new judge of that name; seed torch around it (``runtime.global_seed``)."""
    return judge_class(name)(config, features, content)


def save_judge(judge: ContentJudge, folder: Path, *, vocabulary: Sequence[str]) -> None:
    """``judge.safetensors`` (weights, catalogue features, calibration) and ``judge.json`` (what the weights mean)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in judge.state_dict().items()}
    with written_beside(folder / WEIGHTS) as beside:
        save_file(tensors, beside)
    eyes = judge.items.encoder
    settings = {
        "model": judge.name,
        "config": asdict(judge.settings),
        "features": asdict(judge.items.config),
        "eyes": asdict(eyes.config) if eyes else None,
        "vocabulary": list(vocabulary),
    }
    write_json(folder / SETTINGS, settings)


def load_judge(folder: Path) -> ContentJudge:
    """A fitted judge, frozen, in evaluation mode.

    Raises:
        LineageError: the folder holds no judge.
    """
    if not (folder / SETTINGS).exists():
        raise LineageError(f"no judge in {folder}: {SETTINGS} is missing. Run `couturier retrain` to fit one.")
    settings, tensors = read_json(folder / SETTINGS), load_file(folder / WEIGHTS)
    of = judge_class(settings["model"])
    content = Content(
        pictures_IP=tensors["items.pictures_IP"],
        word_ids=tensors["items.word_ids"],
        word_offsets=tensors["items.word_offsets"],
        vocabulary=len(settings["vocabulary"]),
        counts_I=torch.ones(len(tensors["items.pictures_IP"])),
        eyes=TileEncoder(EncoderConfig(**settings["eyes"])) if settings["eyes"] else None,
    )
    judge = of(of.Config(**settings["config"]), FeatureConfig(**settings["features"]), content)
    judge.load_state_dict(tensors)
    return judge.requires_grad_(False).eval()


def vocabulary_of_judge(folder: Path) -> list[str]:
    """The words that a saved judge knows, in the order of their ids."""
    return [str(word) for word in read_json(folder / SETTINGS)["vocabulary"]]


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
    return HistoryBatch(
        features_ND=item_features_ID[items_N], age_days_N=age_N, weight_N=weight_N, offsets=offsets, items_N=items_N
    )
