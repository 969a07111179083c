"""How attention and representation pull one table: conflict and domination of their gradients.

Diagnostics of Feng et al., "DARE" (ICLR 2025, arXiv 2410.02604), as their released analysis computes them on the rows
of the category table; here a row of the table is a column of the map from content, which is the same for one-hot
content. Its retrieval diagnostic is ``correlation.retrieval_quality``.

Letters: H width of the table, D features (rows of the table).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.judges.dare import DareJudge
from couturier.components.interest.types import TrainBatch


@dataclass(frozen=True, kw_only=True)
class GradientPaths:
    """The gradient that one shared table gets from attention, and the one that it gets from representation."""

    attention_HD: Tensor
    representation_HD: Tensor

    @property
    def touched_D(self) -> Tensor:
        """Bool: rows that both paths pull."""
        return (self.attention_HD != 0).any(0) & (self.representation_HD != 0).any(0)

    @property
    def cosine_D(self) -> Tensor:
        """Cosine of the two gradients of each row; 0 for a row that a path leaves alone."""
        return F.cosine_similarity(self.attention_HD, self.representation_HD, dim=0, eps=1e-30) * self.touched_D

    def conflict(self) -> float:
        """Share of the touched rows whose two gradients point away from each other."""
        touched = self.cosine_D[self.touched_D]
        return float((touched < 0).float().mean()) if touched.numel() else 0.0

    def domination(self) -> float:
        """Median, over the touched rows, of the norm from representation over the norm from attention."""
        touched_D = self.touched_D
        if not bool(touched_D.any()):
            return 1.0
        return float((self.representation_HD.norm(dim=0) / self.attention_HD.norm(dim=0))[touched_D].median())


def untied(judge: DareJudge) -> DareJudge:
    """A copy of a TWIN (``tied=True``) with two tables of equal content: the same scores, the two gradients apart.

    Raises:
        ConfigError: the judge has two tables already.
    """
    if not judge.config.tied:
        raise ConfigError("judge.dare.tied is False: two tables share no gradient; fit with tied=True to measure one.")
    out = copy.deepcopy(judge)
    out.config = out.settings = replace(judge.config, tied=False)
    out.attention = copy.deepcopy(out.representation)
    out.attention_times = copy.deepcopy(out.representation_times)
    return out


def gradient_paths(judge: DareJudge, batch: TrainBatch) -> GradientPaths:
    """The two gradients of a tied judge's table on a batch; they add up to its whole gradient.

    Raises:
        ConfigError: the judge is not tied.
    """
    apart = untied(judge).requires_grad_(True)
    loss, _ = apart.loss(batch, torch.Generator())
    attention, representation = torch.autograd.grad(
        loss, [apart.attention.weight, apart.representation.weight], allow_unused=True, materialize_grads=True
    )
    return GradientPaths(attention_HD=attention, representation_HD=representation)
