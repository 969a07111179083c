"""How much of "will it be taken" lies in which kind of behaviour, and when: measured in data and in what was learned.

The semantic-temporal correlation of Zhou et al., "Temporal Interest Network" (arXiv 2308.08487), as their released
code computes it: mutual information between "the behaviour at position p was of category a" and the label, for
candidates of category c; against it, what an attention model learned for the same (c, a, p).

Letters: S samples, C target categories, A behaviour categories (A = C), P positions (the newest first), E width,
R searches, T history length, K found.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from couturier.components.errors import DataError


def measured_correlation(
    target_S: np.ndarray, label_S: np.ndarray, behaviour_SP: np.ndarray, *, categories: int
) -> np.ndarray:
    """Mutual information ``[C, A, P]`` in bits, float64; 0 for a category that no sample is about.

    Args:
        target_S: category of each sample's candidate.
        label_S: whether it was taken, bool.
        behaviour_SP: category of the behaviour at each position, the newest first; -1 where the history ends.
        categories: C.

    Raises:
        DataError: lengths that do not agree, or a category that there is not.

    Example:
        >>> target, label = np.zeros(4, dtype=int), np.array([True, True, False, False])
        >>> behaviour = np.array([[0, 1], [0, 0], [1, 1], [1, 0]])
        >>> measured_correlation(target, label, behaviour, categories=2)[0].round(2)
        array([[1., 0.],
               [1., 0.]])
    """
    samples, length = behaviour_SP.shape
    if target_S.shape != (samples,) or label_S.shape != (samples,):
        raise DataError(
            f"{samples} histories, but targets {target_S.shape} and labels {label_S.shape}; wanted as many."
        )
    for name, value, lowest in (("target_S", target_S, 0), ("behaviour_SP", behaviour_SP, -1)):
        if value.size and (value.min() < lowest or value.max() >= categories):
            raise DataError(f"{name} goes from {value.min()} to {value.max()}; wanted {lowest} to {categories - 1}.")
    taken_S = label_S.astype(bool)
    total_CL = np.stack([np.bincount(target_S[taken_S == on], minlength=categories) for on in (False, True)], axis=1)
    real_SP = behaviour_SP >= 0
    cell_SP = (target_S[:, None] * categories + behaviour_SP) * length + np.arange(length)
    shape = (categories, categories, length)
    there_CAPL = np.stack(
        [
            np.bincount(cell_SP[real_SP & (taken_S == on)[:, None]], minlength=int(np.prod(shape))).reshape(shape)
            for on in (False, True)
        ],
        axis=-1,
    )
    total_C11L = total_CL[:, None, None]
    joint = (
        np.stack([there_CAPL, total_C11L - there_CAPL], axis=-2) / np.maximum(total_C11L.sum(-1), 1)[..., None, None]
    )
    independent = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    found: np.ndarray = (joint * np.log2(ratio)).sum((-2, -1))
    return found


def learned_correlation(categories_CE: Tensor, times_PE: Tensor, now_E: Tensor) -> Tensor:
    """What target attention with time embeddings makes of (c, a, p): ``[C, A, P]``, each target's between 0 and 1.

    ``softmax over (a, p) of the z-scored <c_a + p_p, c_c + p_0>``, times ``|(c_a + p_p) * (c_c + p_0)|``, min-max
    scaled: how much attention goes there, times how strong what it finds is.

    Args:
        categories_CE: embedding of each category.
        times_PE: embedding of each position from the newest on; zeros for a model without time.
        now_E: the candidate's time embedding, ``p_0``.
    """
    key_APE, query_CE = categories_CE[:, None] + times_PE, categories_CE + now_E
    dot_CX = torch.einsum("ape,ce->cap", key_APE, query_CE).flatten(1)
    spread_C1 = dot_CX.std(1, correction=0, keepdim=True)
    weight_CX = ((dot_CX - dot_CX.mean(1, keepdim=True)) / spread_C1.clamp_min(1e-12)).softmax(1)
    strength_CX = (key_APE[None] * query_CE[:, None, None]).norm(dim=-1).flatten(1)
    both_CX = weight_CX * strength_CX
    low_C1, high_C1 = both_CX.amin(1, keepdim=True), both_CX.amax(1, keepdim=True)
    return ((both_CX - low_C1) / (high_C1 - low_C1).clamp_min(1e-12)).view(len(categories_CE), *key_APE.shape[:2])


def retrieval_quality(found_RK: Tensor, information_RT: Tensor) -> Tensor:
    """How much of the information that K behaviours can hold a search found, ``[R]`` between 0 and 1.

    A diagnostic of Feng et al., "DARE" (arXiv 2410.02604): the mutual information of the behaviours found over that of
    the best K. A history in which nothing informs counts as 1.

    Args:
        found_RK: int64 places in the history, -1 for none.
        information_RT: how much each behaviour of the history says of that candidate, 0 where padded.

    Example:
        >>> information = torch.tensor([[0.0, 2.0, 1.0, 5.0]])
        >>> retrieval_quality(torch.tensor([[3, 0]]), information).tolist()
        [0.7142857313156128]
    """
    count = min(found_RK.shape[1], information_RT.shape[1])
    best_R = information_RT.topk(count, dim=1).values.sum(1)
    got_R = (information_RT.gather(1, found_RK.clamp_min(0)) * (found_RK >= 0)).sum(1)
    return torch.where(best_R > 0, got_R / best_R.clamp_min(torch.finfo(best_R.dtype).tiny), torch.ones_like(best_R))
