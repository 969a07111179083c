"""What a policy should draw for somebody, where that can be written down, and its imitation before RL begins.

A reward over pictures that stand for catalogue items has a closed-form optimum: of all policies that stay near a
reference, the best is the reference times exp(reward / beta), normalised (Rafailov et al., DPO, arXiv 2305.18290,
equation 4). Over a catalogue that can be computed, so the policy need not find it by trial: it is fine-tuned on the
codes of items drawn from it, as in reward-ranked fine-tuning (RAFT, Dong et al., arXiv 2304.06767), with real tiles in
the place of ranked samples. RL goes on from there with what such a table cannot say: real baskets, the group, pixels.

Which reward, and that favourites and new items get a fixed share each, is ours.

Legend: U windows, I items, T targets a window, L codes a picture, K codebook entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """What is imitated, and for how long."""

    steps: int = 200
    """0 leaves the imitation out."""
    prompts: int = 32
    """Windows a step."""
    targets: int = 6
    """Items a window; they share the prompt's computation."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    condition_dropout: float = 0.1
    """Share of prompts without a history, so that guidance stays possible."""
    sharpness: float = 10.0
    """1 / beta among favourites: how much of their probability goes to the best ones."""
    sharpness_new: float = 5.0
    """1 / beta among all other items, about which a history says less."""
    contrast: float = 0.25
    """Share of an item's base rate, in log odds, taken off its prospect: what anybody would take says little."""
    contrast_new: float = 0.5
    """The same for items that are no favourites. With little taken off, a wrong person's new pictures, popular and
    among this person's favourites, meet this person's basket more often than the right ones do."""
    copies: float = 0.42
    """Probability given to items of the history. Imitation is never perfect, so the policy will copy somewhat more."""


def wanted(prospect_UI: Tensor, base_I: Tensor, history_UI: Tensor, config: DistilConfig) -> Tensor:
    """The distribution to imitate, ``[U, I]``: softmax(sharpness * (prospect - contrast * base)) within the history,
    the same with ``sharpness_new`` and ``contrast_new`` within the rest, and ``copies`` of the probability for the
    history. A window without a history gives it all to the rest.

    Args:
        prospect_UI: log odds that an item is in the next basket;  base_I: the same of a person not known at all.
        history_UI: bool, the items of the history.

    Example:
        >>> prospect, history = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[True, False, False]])
        >>> wanted(prospect, torch.zeros(3), history, DistilConfig(sharpness_new=1.0, copies=0.4))
        tensor([[0.4000, 0.1614, 0.4386]])
    """
    nothing = torch.finfo(prospect_UI.dtype).min
    old_UI = config.sharpness * (prospect_UI - config.contrast * base_I)
    new_UI = config.sharpness_new * (prospect_UI - config.contrast_new * base_I)
    old_UI = old_UI.masked_fill(~history_UI, nothing).softmax(-1)
    new_UI = new_UI.masked_fill(history_UI, nothing).softmax(-1)
    copies_U1 = config.copies * history_UI.any(-1, keepdim=True).float()
    return copies_U1 * old_UI + (1 - copies_U1) * new_UI


def draw_evenly(p_UI: Tensor, count: int, random: torch.Generator) -> Tensor:
    """``count`` items a window ``[U, T]``, at evenly spaced points of its cumulative distribution: an item of
    probability p comes up count * p times, rounded down or up (systematic sampling, Madow 1949)."""
    return evenly(p_UI, count, torch.rand(len(p_UI), 1, generator=random, dtype=torch.float64))


def evenly(p_UI: Tensor, count: int, offset_U1: Tensor) -> Tensor:
    """As :func:`draw_evenly`, from one number in [0, 1) a window."""
    cumulative_UI = p_UI.double().cumsum(-1)
    points_UT = (offset_U1 + torch.arange(count)) / count * cumulative_UI[:, -1:]
    return torch.searchsorted(cumulative_UI, points_UT, right=True).clamp_max(p_UI.shape[1] - 1)


def prefixes(codes_IL: Tensor) -> Tensor:
    """``[L, I]``: at every place, items with the same number have the same codes before it.

    Example:
        >>> prefixes(torch.tensor([[5, 1], [5, 2], [6, 1]]))
        tensor([[0, 0, 0],
                [0, 0, 1]])
    """
    ids_LI = torch.zeros(codes_IL.shape[1], codes_IL.shape[0], dtype=torch.long)
    for t in range(1, len(ids_LI)):
        pairs = torch.stack([ids_LI[t - 1], codes_IL[:, t - 1]], 1)
        ids_LI[t] = pairs.unique(dim=0, return_inverse=True)[1]
    return ids_LI


def imitation_loss(
    logits_UTLK: Tensor,
    items_UT: Tensor,
    p_UI: Tensor,
    codes_IL: Tensor,
    prefix_LI: Tensor,
) -> Tensor:
    """Cross-entropy, in nats a code, between a distribution over items and the model, along the codes of drawn items.

    After the codes that a drawn item begins with, the next code's target is not that item's alone but that of every
    item with the same beginning, by its probability. The expectation is that of fitting the drawn items' codes, but
    where items part, which of them was drawn no longer adds noise to the gradient (Rao and Blackwell).

    Args:
        logits_UTLK: of each code of the drawn items, teacher-forced.
        items_UT: drawn from ``p_UI``.
        prefix_LI: of :func:`prefixes`.
    """
    u, targets = items_UT.shape
    items_UT, p_UI, codes_IL, prefix_LI = (one.to(logits_UTLK.device) for one in (items_UT, p_UI, codes_IL, prefix_LI))
    lp_UTLK = logits_UTLK.float().log_softmax(-1)
    total = lp_UTLK.new_zeros(())
    for t, prefix_I in enumerate(prefix_LI):
        same_UTI = prefix_I[items_UT][..., None] == prefix_I
        weight_UTI = p_UI[:, None] * same_UTI
        lp_UTI = lp_UTLK[:, :, t].gather(-1, codes_IL[:, t].expand(u, targets, -1))
        total = total - (weight_UTI * lp_UTI).sum(-1).div(weight_UTI.sum(-1)).mean()
    return total / len(prefix_LI)
