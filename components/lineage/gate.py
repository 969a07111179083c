"""The promotion gate: is the candidate better than the champion, on the same people, beyond what chance explains?

Both sides answered for the same users, windows and seeds. Per user, the difference of the windows' means; over users,
a paired bootstrap with 95 % intervals: of two equal generators at most 1 in 40 takes the other's place. Proof is
needed in both directions::

    promote   every rule is proven kept: the primary metric's interval lies above its margin, each guard's above its own
    reject    a rule is proven broken: worse than the champion, a guard or a slice of people worse than allowed
    hold      neither is proven

Slices (how much is known of a person, each demographics column) are tested for harm, with Holm's correction (Holm
1979, Scandinavian Journal of Statistics 6) over all of them, so that many slices do not find harm by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from couturier.components.errors import DataError, LineageError
from couturier.components.evaluation.statistics import bootstrap

Decision = Literal["promote", "hold", "reject"]
_SEVERITY: tuple[Decision, ...] = ("promote", "hold", "reject")
_KEYS = ("user_id", "window")
_NONE = "(none given)"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a version must show."""

    metric: str = "basket_precision"
    """The primary metric."""
    margin: float = 0.0
    """The lower end of candidate − champion must lie above this. Below 0 it is a non-inferiority margin."""
    max_loss_validity: float = 0.02
    """The most validity a candidate may lose, as a share of the champion's; the interval must exclude more."""
    max_loss_diversity: float = 0.15
    """As above, for diversity among the pictures of one person."""
    max_loss_novelty: float = 0.15
    """As above, for the share of pictures that are not in the history."""
    min_validity: float = 0.95
    """Pixel validity that every version needs, the first one too."""
    draws: int = 2000
    """Bootstrap draws."""
    seed: int = 0
    """Of the bootstrap."""
    min_users: int = 50
    """With fewer users nothing is promoted."""
    slice_users: int = 30
    """Smaller slices are not tested."""
    slice_alpha: float = 0.05
    """Chance of one false alarm over all slices together."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule: what was seen, and what it says for itself."""

    name: str
    decision: Decision
    sentence: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One group of people: mean difference of the primary metric, and the p-value of a loss, alone and corrected."""

    column: str
    value: str
    users: int
    mean: float
    p_alone: float
    p_loss: float
    harmed: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says, why, and on what figures. ``candidate`` and ``champion`` are artifact ids of the models."""

    decision: Decision
    reasons: tuple[str, ...]
    figures: dict[str, Any]
    candidate: str
    champion: str | None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Verdict:
        return cls(
            decision=value["decision"],
            reasons=tuple(value["reasons"]),
            figures=dict(value["figures"]),
            candidate=value["candidate"],
            champion=value["champion"],
        )


def decide(
    candidate_frame: pl.DataFrame,
    champion_frame: pl.DataFrame | None,
    *,
    config: Config,
    candidate: str,
    champion: str | None,
    users: pl.DataFrame | None = None,
) -> Verdict:
    """The verdict on a candidate.

    Args:
        candidate_frame: long form (row, user_id, window, metric, value) with rows ``grpo`` and ``wrong_user``.
        champion_frame: the same with row ``champion``, on the same users and windows; None for a first version.
        candidate, champion: artifact ids of the two models.
        users: ``user_id`` and one column a slicing; numbers are cut into thirds.

    Raises:
        LineageError: both sides are the same model.
        DataError: the sides do not cover the same windows, or a row or metric is missing.
    """
    require_two(candidate, champion)
    if (champion is None) != (champion_frame is None):
        raise LineageError("the gate needs the champion's id and its figures together, or neither.")
    own = _per_user(candidate_frame, "grpo", config)
    checks = _absolute(own, _per_user(candidate_frame, "wrong_user", config, only=(config.metric,)), config)
    slices: list[Slice] = []
    if champion_frame is not None:
        _require_same_windows(candidate_frame, champion_frame)
        theirs = _per_user(champion_frame, "champion", config)
        checks += _relative(own, theirs, config)
        slices = _slices(_difference(own, theirs, config.metric), users, config)
        checks += [_harm(piece, config) for piece in slices if piece.harmed]
    return _verdict(checks, slices, len(own), config=config, candidate=candidate, champion=champion)


def require_two(candidate: str, champion: str | None) -> None:
    """Refuse to compare a model with itself: whatever came out would be noise that looks like a result.

    Raises:
        LineageError: both ids are the same.
    """
    if champion == candidate:
        raise LineageError(
            f"the gate was asked to compare {candidate} with itself: candidate and champion are the same model. "
            "Train a new one (change the data, a setting or the code), then promote that."
        )


def _absolute(own: pl.DataFrame, wrong: pl.DataFrame, config: Config) -> list[Check]:
    """What any version must show, champion or not: it reads the history, and it draws pictures."""
    users = len(own)
    decision: Decision = "promote" if users >= config.min_users else "hold"
    said = f"{users} users were judged; at least {config.min_users} are needed"
    checks = [Check(name="users", decision=decision, sentence=said, mean=users, low=users, high=users)]

    mean, low, high = _interval(_difference(own, wrong, config.metric)["difference"].to_numpy(), config)
    decision = "promote" if low > 0 else "reject" if high <= 0 else "hold"
    said = f"{config.metric} with a person's own history exceeds that with a wrong one by {_words(mean, low, high)}"
    checks.append(Check(name="own history", decision=decision, sentence=said, mean=mean, low=low, high=high))

    mean, low, high = _interval(own["validity"].to_numpy(), config)
    decision = "promote" if mean >= config.min_validity else "reject" if high < config.min_validity else "hold"
    said = f"validity is {_words(mean, low, high)}; at least {config.min_validity:g} is needed"
    return [*checks, Check(name="validity", decision=decision, sentence=said, mean=mean, low=low, high=high)]


def _relative(own: pl.DataFrame, theirs: pl.DataFrame, config: Config) -> list[Check]:
    """Against the champion: better where it counts, and not worse than allowed elsewhere."""
    differences = _difference(own, theirs, config.metric)["difference"].to_numpy()
    mean, low, high = _interval(differences, config)
    decision: Decision = "promote" if low > config.margin else "reject" if high < min(config.margin, 0.0) else "hold"
    needed = f"more than {config.margin:g} is needed"
    said = f"{config.metric} differs from the champion's by {_words(mean, low, high)}; {needed}"
    if not differences.any():
        said = f"{config.metric} does not differ from the champion's for a single user: these may be one model twice"
    checks = [Check(name=config.metric, decision=decision, sentence=said, mean=mean, low=low, high=high)]
    allowed = {
        "validity": config.max_loss_validity,
        "diversity": config.max_loss_diversity,
        "novelty": config.max_loss_novelty,
    }
    for metric, share in allowed.items():
        bound = -share * _mean(theirs, metric)
        mean, low, high = _interval(_difference(own, theirs, metric)["difference"].to_numpy(), config)
        decision = "promote" if low > bound else "reject" if high < bound else "hold"
        said = f"{metric} differs from the champion's by {_words(mean, low, high)}; a loss of {-bound:.4f} is allowed"
        checks.append(Check(name=f"{metric} kept", decision=decision, sentence=said, mean=mean, low=low, high=high))
    return checks


def _slices(differences: pl.DataFrame, users: pl.DataFrame | None, config: Config) -> list[Slice]:
    """Every slice with enough people, with a one-sided t test of a loss and Holm's correction over all of them."""
    if users is None:
        return []
    from scipy.stats import ttest_1samp

    joined = differences.join(users.with_columns(pl.col("user_id").cast(pl.String)), on="user_id", how="left")
    found: list[tuple[str, str, np.ndarray]] = []
    for column in sorted(name for name in users.columns if name != "user_id"):
        for (value,), piece in sorted(joined.with_columns(_groups(joined[column])).group_by(column), key=str):
            if piece.height >= config.slice_users:
                found.append((column, str(value), piece["difference"].to_numpy()))
    p_values = [
        float(ttest_1samp(values, 0.0, alternative="less").pvalue) if values.std() > 0 else float(values.mean() >= 0)
        for _, _, values in found
    ]
    return [
        Slice(
            column=column,
            value=value,
            users=len(values),
            mean=float(values.mean()),
            p_alone=alone,
            p_loss=corrected,
            harmed=corrected < config.slice_alpha,
        )
        for (column, value, values), alone, corrected in zip(found, p_values, holm(p_values), strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down corrected p-values, in the order given.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = highest
    return corrected


def _groups(column: pl.Series) -> pl.Series:
    """A slicing: words as they are; numbers cut into thirds."""
    if not column.dtype.is_numeric():
        return column.cast(pl.String).fill_null(_NONE)
    low, high = column.quantile(1 / 3), column.quantile(2 / 3)
    if low is None or high is None:
        return column.cast(pl.String).fill_null(_NONE)
    names = [_NONE if v is None else "low" if v <= low else "middle" if v <= high else "high" for v in column]
    return pl.Series(column.name, names, dtype=pl.String)


def _harm(piece: Slice, config: Config) -> Check:
    said = (
        f"{config.metric} falls by {-piece.mean:.4f} for {piece.column} = {piece.value} ({piece.users} users, "
        f"corrected p = {piece.p_loss:.2g})"
    )
    return Check(
        name=f"{piece.column}={piece.value}",
        decision="reject",
        sentence=said,
        mean=piece.mean,
        low=piece.mean,
        high=piece.mean,
    )


def _verdict(
    checks: Sequence[Check],
    slices: Sequence[Slice],
    users: int,
    *,
    config: Config,
    candidate: str,
    champion: str | None,
) -> Verdict:
    decision = max((check.decision for check in checks), key=_SEVERITY.index)
    # The rules that decided come first; those that were kept are said as well.
    ordered = sorted(checks, key=lambda check: -_SEVERITY.index(check.decision))
    words = {"promote": "", "hold": "not proven: ", "reject": "broken: "}
    reasons = [f"{words[check.decision]}{check.sentence}" for check in ordered]
    if champion is None:
        reasons.append("there is no champion yet to compare with")
    return Verdict(
        decision=decision,
        reasons=tuple(reasons),
        figures={
            "users": users,
            "checks": [asdict(check) for check in checks],
            "slices": [asdict(piece) for piece in slices],
        },
        candidate=candidate,
        champion=champion,
    )


def _per_user(frame: pl.DataFrame, row: str, config: Config, *, only: Sequence[str] = ()) -> pl.DataFrame:
    """One line a user, sorted: the mean over windows of every metric that the gate reads."""
    missing = {"row", "metric", "value", *_KEYS} - set(frame.columns)
    if missing:
        raise DataError(f"the gate's figures lack the columns {sorted(missing)}; they have {frame.columns}.")
    wanted = list(only) or [config.metric, *(m for m in ("validity", "diversity", "novelty") if m != config.metric)]
    lines = frame.filter((pl.col("row") == row) & pl.col("metric").is_in(wanted) & pl.col("value").is_finite())
    absent = sorted(set(wanted) - set(lines["metric"]))
    if absent:
        rows = ", ".join(sorted(set(frame["row"])))
        raise DataError(f"the gate finds no {', '.join(absent)} for row {row!r}; the figures have the rows {rows}.")
    means = lines.group_by("user_id", "metric").agg(pl.col("value").mean())
    table = means.pivot("metric", index="user_id", values="value").with_columns(pl.col("user_id").cast(pl.String))
    return table.sort("user_id")


def _require_same_windows(candidate: pl.DataFrame, champion: pl.DataFrame) -> None:
    keys = [
        frame.filter(pl.col("row") == row).select(pl.col(name).cast(pl.String) for name in _KEYS).unique()
        for frame, row in ((candidate, "grpo"), (champion, "champion"))
    ]
    alone = [keys[0].join(keys[1], on=_KEYS, how="anti").height, keys[1].join(keys[0], on=_KEYS, how="anti").height]
    if any(alone):
        raise DataError(
            f"candidate and champion were not asked the same: {alone[0]} windows have only the candidate's pictures, "
            f"{alone[1]} only the champion's. Run the duel again on the candidate's windows."
        )


def _difference(own: pl.DataFrame, theirs: pl.DataFrame, metric: str) -> pl.DataFrame:
    """``own − theirs`` for every user that has both, sorted by user."""
    pairs = own.select("user_id", metric).join(theirs.select("user_id", pl.col(metric).alias("other")), on="user_id")
    return pairs.select("user_id", (pl.col(metric) - pl.col("other")).alias("difference")).drop_nulls().sort("user_id")


def _mean(frame: pl.DataFrame, metric: str) -> float:
    return float(frame[metric].drop_nulls().to_numpy().mean())


def _interval(values: np.ndarray, config: Config) -> tuple[float, float, float]:
    """Mean and bootstrap interval over users, computed as for the report."""
    interval = bootstrap(values, seed=config.seed, draws=config.draws)
    return interval.mean, interval.low, interval.high


def _words(mean: float, low: float, high: float) -> str:
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"
