"""How several processes hold one generator: each a copy, or each a share of every layer (FSDP2).

    "ddp"    every process holds the whole model; gradients are averaged (:mod:`couturier.components.together`)
    "fsdp"   every process holds its share of each layer's weights, gradients and moments; a layer is put together for
             as long as it works (``torch.distributed.fsdp.fully_shard``; Zhao et al., arXiv 2304.11277)

Only the layers of the language model are shared out: they are nearly all of a large one, and everything outside them
(embeddings, aligners, the head) may then be called by any method as if there were one process. Checkpoints and saved
models hold whole tensors whatever the strategy, so any number of processes goes on from them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.components.generator.language import LanguageGenerator
from couturier.components.together import agree, as_kept, in_shares, rank, whole, world

STRATEGIES = ("ddp", "fsdp")


def spread(generator: nn.Module, strategy: str) -> None:
    """All processes take the first one's weights; then, if the strategy says so, each keeps its share of the layers.

    Call it before the optimiser is made: afterwards parameters are other objects.

    Raises:
        ConfigError: no such strategy, or a generator without a language model.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    agree([*generator.parameters(), *generator.buffers()])
    if strategy == "ddp" or world() == 1:
        return
    if not isinstance(generator, LanguageGenerator):
        raise ConfigError(
            f"strategy is 'fsdp', which shares out a language model's layers; a {type(generator).__name__} has none. "
            "Use 'ddp'."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(generator.parameters()).device.type
    mesh = init_device_mesh(kind, (world(),))
    for layer in generator.layers:
        fully_shard(layer, mesh=mesh)


def clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale gradients so that their norm over all parameters, whole or shared out, is at most ``limit``.

    Returns the norm before; the same on every process.
    """
    if not any(in_shares(value) for value in parameters):
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    groups = [[p for p in parameters if in_shares(p) is kept] for kept in (True, False)]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.stack([whole(part) for part in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return float(norm)


def whole_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor put together, on the first process; the others get nothing. All processes must ask at once."""
    found = {}
    for name, value in tensors.items():
        put = whole(value)
        if rank() == 0:
            found[name] = put
    return found


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` without what a generator has from a published base and never learns."""
    given = module.given() if isinstance(module, LanguageGenerator) else frozenset()
    return {name: value for name, value in module.state_dict().items() if name not in given}


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` from whole tensors of :func:`learned_state`, into a module that may be shared out."""
    own = module.state_dict()
    given = {name: value for name, value in own.items() if name not in tensors}
    learned = {key: as_kept(value, own[key]) if key in own else value for key, value in tensors.items()}
    if given and not (isinstance(module, LanguageGenerator) and module.given() >= given.keys()):
        given = {}
    module.load_state_dict(learned | given)


def frozen_copy(policy: LanguageGenerator) -> LanguageGenerator:
    """The policy as it is now, to be compared with later: it learns nothing, and what the policy never learns is not
    copied but the same memory."""
    if not any(in_shares(value) for value in policy.parameters()):
        fixed = {id(value): value for value in policy.parameters() if not value.requires_grad}
        return copy.deepcopy(policy, fixed).requires_grad_(False).eval()
    twin = policy.blank().requires_grad_(False).eval()
    spread(twin, "fsdp")
    load_whole(twin, {name: whole(value) for name, value in policy.state_dict().items()})
    return twin
