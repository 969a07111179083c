"""Stage ``judge``: fit a user-interest model on what people took next, against what is as popular but was not taken.

    pictures ─▶ eyes (attribute heads) ─▶ embeddings of the catalogue, clean and degraded ┐
    train windows ─▶ history, positives, popularity-matched negatives ────────────────────┴▶ judge ─▶ valid GAUC stops

Every step draws from a generator of its own, seeded by its number, so a resumed run sees what the whole one saw.

Letters: W windows, U windows of a step, C candidates, I items, K history slots, A views, P picture width, D features.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import ConfigError, TrainingError
from couturier.components.interest.attention_judge import AttentionConfig, AttentionJudge, AttentionState
from couturier.components.interest.encoder import (
    AttributeHeads,
    EncoderConfig,
    TileEncoder,
    attribute_targets,
    embedded_views,
    encoder_step,
    pictures_of,
    vocabulary_of,
    word_bags,
)
from couturier.components.interest.judge import history_batch, judge_class, save_judge
from couturier.components.interest.metrics import Baskets, Popularity, negatives, trial, user_auc
from couturier.components.interest.proof import prove, scores_of
from couturier.components.lineage.checkpoints import (
    Checkpoints,
    load_module,
    load_optimiser,
    module_tensors,
    optimiser_tensors,
)
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import global_seed, seeded, seeded_numpy, threads


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a judge is fitted."""

    seed: int = 0
    threads: int = 2
    model: str = "attention"
    """A name in ``JUDGES``."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    vocabulary: int = 2048
    """The most frequent words of the catalogue that get an embedding."""
    views: int = 4
    """A, looks at each picture that candidates are drawn from in training: one clean, the others degraded."""
    steps: int = 250
    batch: int = 128
    """Windows a step."""
    positives: int = 4
    negatives: int = 8
    """Candidates of a window in a step: out of its next basket, and popularity-matched ones that are not in it."""
    learning_rate: float = 3e-3
    """Peak of a one-cycle schedule (AdamW)."""
    weight_decay: float = 0.05
    drop_words: float = 0.6
    """Share of windows whose candidates come without words, as drawn pictures do."""
    drop_items: float = 0.15
    """Share of history items left out in a step."""
    drop_history: float = 0.03
    """Share of windows whose whole history is left out, from which the judge learns what to say of strangers."""
    bce: float = 0.25
    """Weight of binary cross-entropy beside the Bradley-Terry loss over (taken, not taken) pairs."""
    eval_every: int = 50
    eval_negatives: int = 64
    """Negatives of a window in the metrics."""
    patience: int = 6
    """Looks at the validation windows without a better GAUC before the fit stops."""
    checkpoint_every: int = 200
    calibration_users: int = 512

    def __post_init__(self) -> None:
        judge_class(self.model)
        names = ("batch", "positives", "negatives", "eval_every", "eval_negatives", "checkpoint_every", "views")
        for name in (*names, "patience", "calibration_users"):
            if vars(self)[name] < 1:
                raise ConfigError(f"judge.{name} is {vars(self)[name]}; it must be at least 1.")


def run(ctx: StageContext) -> None:
    """``sequences`` → ``judge/``, ``curves.parquet``; facts: the GAUCs on test windows, picture-only."""
    config: Config = ctx.config
    with threads(config.threads):
        fitter = _Fitter(ctx, config)
        fitter.fit()
        judge = fitter.best_judge()
        fitter.calibrate(judge)
        ctx.facts.update(fitter.facts(judge))
    save_judge(judge, ctx.out / "judge", model=config.model, vocabulary=fitter.vocabulary)
    schema = {"step": pl.Int64, "name": pl.String, "value": pl.Float64}
    pl.DataFrame(fitter.curves, schema=schema, orient="row").write_parquet(ctx.out / "curves.parquet")
    ctx.tracker.file(ctx.out / "curves.parquet")


class _Fitter:
    """The loop and its whole state: steps 0 to ``encoder.steps`` train the eyes, those after it the judge."""

    def __init__(self, ctx: StageContext, config: Config) -> None:
        self.ctx, self.config = ctx, config
        folder = ctx.inputs["sequences"]
        self.catalogue = Catalogue.load(folder)
        self.windows = {split: Windows.load(folder, split) for split in ("train", "valid", "test")}
        items = len(self.catalogue)
        self.popularity = Popularity(self.windows["train"], items)
        self.baskets = Baskets(self.windows["train"], items)
        self.usable = np.flatnonzero(np.diff(self.windows["train"].basket_offsets) > 0)
        self.rgb_I3HW = pictures_of(self.catalogue)
        self.targets = attribute_targets(self.catalogue, config.encoder)
        texts = [" ".join(filter(None, row)) for row in self.catalogue.items.select("title", "text").rows()]
        self.vocabulary = vocabulary_of(texts, limit=config.vocabulary)
        self.word_ids, self.word_offsets = word_bags(texts, self.vocabulary)
        with global_seed(config.seed, "judge", "encoder"):
            self.encoder = TileEncoder(config.encoder)
            self.heads = AttributeHeads(config.encoder.width, self.targets)
        self.judge: AttentionJudge | None = None
        self.optimiser = self._optimiser([*self.encoder.parameters(), *self.heads.parameters()], decay=0.01)
        self.checkpoints = Checkpoints(ctx.scratch / "checkpoints")
        self.curves: list[tuple[int, str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.step, self.best_gauc, self.best_step, self.stopped = 0, -1.0, 0, False
        shown = seeded_numpy(config.seed, "judge", "trial", "valid")
        self.valid_trial = trial(self.windows["valid"], self.popularity, items, config.eval_negatives, shown)
        self._resume()

    @property
    def last(self) -> int:
        return self.config.encoder.steps + self.config.steps

    def fit(self) -> None:
        """Train the eyes, then the judge, until the last step or until validation says enough."""
        progress = self.ctx.progress
        if self.step == 0:
            self.ctx.tracker.params(asdict(self.config))
        progress.start("judge", self.last, done=self.step, unit="steps")
        while self.step < self.last and not self.stopped:
            note = self._encoder_step() if self.step < self.config.encoder.steps else self._judge_step()
            self.step += 1
            if self.step % self.config.checkpoint_every == 0 and self.step < self.last:
                self._save()
            progress.advance(note=note)
        if self.judge is None:
            self._open_judge()
        progress.stop()

    def _encoder_step(self) -> str:
        config = self.config.encoder
        self._rate(self.step, config.steps, config.learning_rate)
        random = seeded(self.config.seed, "judge", "eyes", str(self.step))
        loss = encoder_step(self.encoder.train(), self.heads, self.rgb_I3HW, self.targets, random)
        self._descend(loss)
        if self.step % 10 == 0:
            self._log({"encoder_loss": float(loss.detach())})
        return f"eyes {float(loss.detach()):.2f}"

    def _judge_step(self) -> str:
        config = self.config
        if self.judge is None:
            self._open_judge()
        done = self.step - config.encoder.steps
        self._rate(done, config.steps, config.learning_rate)
        loss = self._loss(self.step)
        self._descend(loss)
        if done % 10 == 0:
            self._log({"loss": float(loss.detach())})
        if (done + 1) % config.eval_every == 0 or self.step + 1 == self.last:
            self._validate()
        return f"loss {float(loss.detach()):.3f} valid GAUC {max(0.0, self.best_gauc):.3f}"

    def _open_judge(self) -> None:
        """Freeze the eyes, look at the catalogue, and start a judge on what they see."""
        config = self.config
        self.encoder.eval().requires_grad_(False)
        random = seeded(config.seed, "judge", "views")
        self.views_IAP = embedded_views(self.encoder, self.rgb_I3HW, config.views, random)
        seen = self.heads.accuracy(self.views_IAP[:, 0], self.targets)
        self.accuracy = {f"reads {name.removeprefix('attribute ')}": value for name, value in seen.items()}
        with global_seed(config.seed, "judge", "model"):
            self.judge = judge_class(config.model)(
                config.attention,
                self.encoder,
                self.views_IAP[:, 0].contiguous(),
                self.word_ids,
                self.word_offsets,
                len(self.vocabulary),
            )
        trained = [value for value in self.judge.parameters() if value.requires_grad]
        self.optimiser = self._optimiser(trained, decay=config.weight_decay)

    def _loss(self, step: int) -> Tensor:
        """Bradley-Terry over all (taken, not taken) pairs of a window, and a little binary cross-entropy."""
        config, judge, train = self.config, self._judge(), self.windows["train"]
        random, noise = seeded_numpy(config.seed, "judge", str(step)), seeded(config.seed, "judge", str(step))
        rows = self.usable[random.integers(len(self.usable), size=config.batch)]
        start_U1, size_U1 = train.basket_offsets[rows, None], np.diff(train.basket_offsets)[rows, None]
        place = start_U1 + np.floor(random.random((len(rows), config.positives)) * size_U1).astype(np.int64)
        bad = negatives(self.popularity, self.baskets, rows, config.negatives, random)
        items_UC = torch.from_numpy(np.concatenate([train.basket[place], bad], axis=1).astype(np.int64))
        items_ID = judge.embed_items()
        logits_UC = judge._score(
            self._dropped_state(rows, items_ID, noise), self._candidates(items_UC, items_ID, noise)
        )
        good_UP, bad_UN = logits_UC[:, : config.positives], logits_UC[:, config.positives :]
        real_UN = items_UC[:, config.positives :] >= 0
        pairs = F.softplus(bad_UN[:, None] - good_UP[:, :, None]) * real_UN[:, None]
        ranking = pairs.sum() / (real_UN.sum() * config.positives).clamp_min(1)
        level = F.softplus(-good_UP).mean() + (F.softplus(bad_UN) * real_UN).sum() / real_UN.sum().clamp_min(1)
        loss: Tensor = ranking + config.bce * level
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"judge: the loss is {float(loss.detach())} at step {step}, on training windows {rows.tolist()}. "
                f"Lower judge.learning_rate (now {config.learning_rate}) and run again: the last checkpoint is kept."
            )
        return loss

    def _dropped_state(self, rows: np.ndarray, items_ID: Tensor, noise: torch.Generator) -> AttentionState:
        """Histories with some items, and now and then all of them, left out."""
        config = self.config
        features_UTD, age_UT, weight_UT, real_UT = history_batch(self.windows["train"], rows, items_ID).padded()
        kept_UT = torch.rand(real_UT.shape, generator=noise) >= config.drop_items
        kept_U1 = torch.rand((len(rows), 1), generator=noise) >= config.drop_history
        real_UT = real_UT & kept_UT & kept_U1
        return self._judge().encode_padded(features_UTD, age_UT, weight_UT * real_UT, real_UT)

    def _candidates(self, items_UC: Tensor, items_ID: Tensor, noise: torch.Generator) -> Tensor:
        """Features ``[U, C, D]`` of candidates, each through a random look, some users' without words."""
        index = items_UC.clamp_min(0)
        look = torch.randint(self.config.views, items_UC.shape, generator=noise)
        width = self.config.encoder.width
        worded_U11 = torch.rand((len(items_UC), 1, 1), generator=noise) >= self.config.drop_words
        return torch.cat([self.views_IAP[index, look], items_ID[index][..., width:] * worded_U11], dim=-1)

    def _validate(self) -> None:
        judge, valid = self._judge(), self.windows["valid"]
        found = user_auc(scores_of(judge, valid, self.valid_trial), self.valid_trial, valid.user_W).gauc
        self._log({"valid_gauc": found})
        if math.isnan(found) or found > self.best_gauc:
            self.best_gauc, self.best_step = (self.best_gauc if math.isnan(found) else found), self.step + 1
            self.best = {name: value.clone() for name, value in module_tensors("best", judge).items()}
        elif self.step + 1 - self.best_step >= self.config.patience * self.config.eval_every:
            self.stopped = True

    def best_judge(self) -> AttentionJudge:
        """The judge of the best look at the validation windows, frozen."""
        judge = self._judge()
        if self.best:
            load_module("best", judge, self.best)
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def calibrate(self, judge: AttentionJudge) -> None:
        """Set the judge's unit: mean and SD over pairs of a train window and a random catalogue picture."""
        train, random = self.windows["train"], seeded_numpy(self.config.seed, "judge", "calibration")
        rows = random.integers(len(train), size=self.config.calibration_users)
        items_WC = random.integers(len(self.catalogue), size=(len(rows), 32))
        state = judge.encode(history_batch(train, rows, judge.embed_items()))
        judge.calibrate(judge.score(state, judge.embed_items(words=False)[torch.from_numpy(items_WC)]))

    def facts(self, judge: AttentionJudge) -> dict[str, float | int]:
        """What the judge is worth on test windows, what its eyes read, and when it stopped."""
        config, test = self.config, self.windows["test"]
        out = prove(judge, test, self.popularity, negatives_a_window=config.eval_negatives, seed=config.seed)
        seen = {name: round(value, 4) for name, value in self.accuracy.items()}
        return out | seen | {"best_step": self.best_step, "valid_gauc": round(self.best_gauc, 5)}

    def _judge(self) -> AttentionJudge:
        assert self.judge is not None, "the judge opens when the eyes are done"
        return self.judge

    def _optimiser(self, parameters: list[torch.nn.Parameter], *, decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=decay, fused=True)

    def _rate(self, done: int, total: int, peak: float) -> None:
        """One cycle: up over the first tenth, then down a cosine."""
        rise = max(1, total // 10)
        share = (done - rise) / max(1, total - rise)
        rate = peak * ((done + 1) / rise if done < rise else 0.5 * (1 + math.cos(math.pi * share)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def _descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def _log(self, values: dict[str, float]) -> None:
        self.curves += [(self.step, name, value) for name, value in values.items() if not math.isnan(value)]
        self.ctx.tracker.metrics(values, step=self.step)

    def _save(self) -> None:
        tensors, facts = optimiser_tensors("optimiser", self.optimiser)
        tensors |= module_tensors("encoder", self.encoder) | module_tensors("heads", self.heads)
        if self.judge is not None:
            tensors |= module_tensors("judge", self.judge) | self.best
        best = {"gauc": self.best_gauc, "step": self.best_step, "stopped": self.stopped}
        self.checkpoints.save(
            self.step,
            tensors,
            {"optimiser": facts, "curves": self.curves, "best": best, "judging": self.judge is not None},
        )

    def _resume(self) -> None:
        saved = self.checkpoints.newest()
        if saved is None:
            return
        self.step, self.curves = saved.step, [tuple(row) for row in saved.facts["curves"]]
        load_module("encoder", self.encoder, saved.tensors)
        load_module("heads", self.heads, saved.tensors)
        if saved.facts["judging"]:
            self._open_judge()
            load_module("judge", self._judge(), saved.tensors)
            self.best = {name: value for name, value in saved.tensors.items() if name.startswith("best.")}
        load_optimiser("optimiser", self.optimiser, saved.tensors, saved.facts["optimiser"])
        best = saved.facts["best"]
        self.best_gauc, self.best_step, self.stopped = best["gauc"], best["step"], best["stopped"]
