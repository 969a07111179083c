"""What ``python -m couturier.kernels.verify`` runs: for each operator its inputs, its definition, what people write
without it, and what it must at least move and compute.

Legend: U users, N behaviours, R rows (candidates), C candidates a user, L longest history, H width, T tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from couturier.kernels import dispatch, shared_prefix
from couturier.kernels.attention_stats import attention_stats
from couturier.kernels.attention_stats.reference import apart, attention_map
from couturier.kernels.causal_attention import causal_attention
from couturier.kernels.hash_sampling import hash_sampling, random_planes, signatures
from couturier.kernels.linear_attention import linear_attention, slopes_tnl
from couturier.kernels.linear_attention.reference import quadratic
from couturier.kernels.target_attention import dot_attention, mlp_attention
from couturier.kernels.topk_search import topk_search

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator on one set of inputs."""

    op: str
    shape: str
    """For people to read."""
    leaves: list[Tensor]
    """What gradients flow to; empty: no gradient."""
    call: Call
    """The public function, whatever backend it chooses."""
    reference: Call
    """Its definition."""
    naive: Call
    """What people write without it: padded, or all pairs."""
    bytes_moved: int
    """Every input read once and every output written once, forward."""
    flops: int
    """Forward."""
    peers: dict[str, Call] = field(default_factory=dict)
    """Libraries that compute the same or stand in its place."""


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Seeded inputs. The same seed makes the same numbers for every device and dtype."""

    device: str
    dtype: torch.dtype
    rounded: torch.dtype
    """Numbers are rounded to this first, so that a float64 reference starts from what the kernel sees."""
    large: bool
    """Sizes for timing, not for checking."""
    seed: int = 0

    def normal(self, *shape: int, salt: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that want a gradient."""
        g = torch.Generator().manual_seed(1000 * self.seed + salt)
        x = (scale * torch.randn(shape, generator=g)).to(self.rounded)
        return x.to(self.device, self.dtype).requires_grad_()

    def offsets(self, users: int, most: int) -> Tensor:
        """Lists as histories are: many short, few long (one has ``most`` behaviours), some empty."""
        g = torch.Generator().manual_seed(self.seed)
        lengths = (most * torch.rand(users, generator=g) ** 4).long()
        lengths[0] = most
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(self.device)


def cases(make: Maker) -> list[Case]:
    """All operators."""
    lists = [_mlp(make), _dot(make), _topk(make), _hash(make), _causal(make)]
    return [*lists, _linear(make), _stats(make), _prefix(make)]


def _size(*tensors: Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _reference(call: Call) -> Call:
    def run() -> Tensor:
        with dispatch.use("reference"):
            return call()

    return run


def _padded(keys: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``[U, L, H]`` and True where a behaviour is, ``[U, L]``."""
    lengths = offsets.diff()
    place = torch.arange(int(lengths.max()), device=keys.device)
    real = place < lengths[:, None]
    index = torch.where(real, offsets[:-1, None] + place, 0)
    return keys[index] * real[..., None], real


def _softmax(scores: Tensor, real: Tensor) -> Tensor:
    """Over the last axis, zeros for empty lists."""
    return torch.softmax(scores.masked_fill(~real, -torch.inf), -1).nan_to_num()


def _mlp(make: Maker) -> Case:
    users, most, width = (256, 200, 64) if make.large else (9, 70, 16)
    offsets = make.offsets(users, most)
    n = int(offsets[-1])
    queries, keys = make.normal(users, width, salt=1), make.normal(n, width, salt=2)
    sizes = [(80, 4 * width), (40, 80), (1, 40)]
    weights = [make.normal(*size, salt=3 + i, scale=size[1] ** -0.5) for i, size in enumerate(sizes)]

    def call() -> Tensor:
        return mlp_attention(queries, keys, offsets, [(weight, None) for weight in weights])

    def naive() -> Tensor:
        box, real = _padded(keys, offsets)
        q = queries[:, None].expand_as(box)
        x = torch.cat([q, box, q - box, q * box], -1)
        for weight in weights[:2]:
            x = torch.sigmoid(x @ weight.t())
        scores = (x @ weights[2].t())[..., 0] * width**-0.5
        return (_softmax(scores, real)[:, None] @ box)[:, 0]

    return Case(
        op="target_attention (DIN)",
        shape=f"{users} users, {n} behaviours, longest {most}, H {width}, {queries.dtype}".replace("torch.", ""),
        leaves=[queries, keys, *weights],
        call=call,
        reference=_reference(call),
        naive=naive,
        bytes_moved=_size(queries, keys, *weights, queries),
        flops=2 * n * (2 * width * 80 + 80 * 40 + 40),
    )


def _dot(make: Maker) -> Case:
    users, most, width = (256, 200, 64) if make.large else (9, 70, 16)
    offsets = make.offsets(users, most)
    n, each = int(offsets[-1]), 8
    queries, keys = make.normal(users, each, width, salt=1), make.normal(n, width, salt=2)

    def call() -> Tensor:
        return dot_attention(queries, keys, offsets)

    def naive() -> Tensor:
        box, real = _padded(keys, offsets)
        return _softmax(queries @ box.transpose(1, 2) * width**-0.5, real[:, None]) @ box

    def sdpa() -> Tensor:
        box, real = _padded(keys, offsets)
        return scaled_dot_product_attention(queries, box, box, attn_mask=real[:, None])

    return Case(
        op="target_attention (dot)",
        shape=f"{users} users x {each} candidates, {n} behaviours, H {width}, {keys.dtype}".replace("torch.", ""),
        leaves=[queries, keys],
        call=call,
        reference=_reference(call),
        naive=naive,
        peers={"SDPA, padded": sdpa},
        bytes_moved=_size(queries, keys, queries),
        flops=4 * n * each * width,
    )


def _topk(make: Maker) -> Case:
    users, most, width, k = (16, 10_000, 64, 50) if make.large else (5, 60, 16, 4)
    offsets = make.offsets(users, most)
    n, each = int(offsets[-1]), 8
    queries, keys = make.normal(users, each, width, salt=1).detach(), make.normal(n, width, salt=2).detach()

    def call() -> Tensor:
        return topk_search(queries, keys, offsets, k)[1].nan_to_num(neginf=0.0)

    def naive() -> Tensor:
        box, real = _padded(keys, offsets)
        scores = cosine_similarity(queries[:, :, None].float(), box[:, None].float(), dim=-1)
        return scores.masked_fill(~real[:, None], -torch.inf).topk(min(k, box.shape[1])).values.nan_to_num(neginf=0.0)

    return Case(
        op="topk_search",
        shape=f"{users} users x {each} candidates, {n} behaviours, H {width}, k {k}, {keys.dtype}".replace(
            "torch.", ""
        ),
        leaves=[],
        call=call,
        reference=_reference(call),
        naive=naive,
        bytes_moved=_size(queries, keys) + users * each * k * 12,
        flops=2 * n * each * width,
    )


def _hash(make: Maker) -> Case:
    users, most, width = (64, 4_000, 64) if make.large else (5, 60, 16)
    offsets = make.offsets(users, most)
    n, each = int(offsets[-1]), 8
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    planes = random_planes(width).to(make.device, wide)
    groups = planes.shape[1]
    candidates, keys = make.normal(users, each, width, salt=1).detach(), make.normal(n, width, salt=2)

    def call() -> Tensor:
        return hash_sampling(candidates, keys, offsets, planes)

    def naive() -> Tensor:
        box, real = _padded(keys, offsets)
        longest = box.shape[1]
        of_keys = signatures(box.detach().flatten(0, 1), planes).view(users, 1, longest, groups)
        of_candidates = signatures(candidates.flatten(0, 1), planes).view(users, each, 1, groups)
        meet = (of_keys == of_candidates) & real[:, None, :, None]
        sums = torch.einsum("uclg,ule->ucge", meet.float(), box.float())
        return torch.nn.functional.normalize(sums, dim=-1).mean(2)

    return Case(
        op="hash_sampling",
        shape=f"{users} users x {each} candidates, {n} behaviours, H {width}, 16 x 3 bits, {keys.dtype}".replace(
            "torch.", ""
        ),
        leaves=[keys],
        call=call,
        reference=_reference(call),
        naive=naive,
        bytes_moved=_size(candidates, keys, planes) + users * each * width * 4,
        flops=2 * (n + users * each) * planes.numel() + n * groups * width,
    )


def _causal(make: Maker) -> Case:
    # The small one is large enough to be compiled.
    users, most, heads, width = (256, 200, 1, 64) if make.large else (64, 70, 2, 32)
    offsets = make.offsets(users, most)
    n, lengths = int(offsets[-1]), offsets.diff()
    q, k, v = (make.normal(n, heads, width, salt=i) for i in range(3))

    def call() -> Tensor:
        return causal_attention(q, k, v, offsets)

    def padded(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        boxes = [_padded(one.flatten(1), offsets)[0].unflatten(-1, (heads, width)).transpose(1, 2) for one in (q, k, v)]
        return attend(*boxes).transpose(1, 2)[_padded(q.flatten(1), offsets)[1]]

    def plain(q_UALE: Tensor, k_UALE: Tensor, v_UALE: Tensor) -> Tensor:
        ahead = torch.ones(most, most, dtype=torch.bool, device=q.device).triu(1)
        scores = q_UALE @ k_UALE.transpose(-1, -2) * width**-0.5
        return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v_UALE

    return Case(
        op="causal_attention",
        shape=f"{users} users, {n} rows, longest {most}, A {heads}, E {width}, {q.dtype}".replace("torch.", ""),
        leaves=[q, k, v],
        call=call,
        reference=_reference(call),
        naive=lambda: padded(plain),
        peers={"SDPA, padded": lambda: padded(partial(scaled_dot_product_attention, is_causal=True))},
        bytes_moved=_size(q, k, v, v),
        flops=2 * heads * width * int((lengths * (lengths + 1)).sum()),
    )


def _linear(make: Maker) -> Case:
    batch, length, heads, width = (8, 1024, 4, 32) if make.large else (2, 100, 3, 16)
    if make.large and make.device != "cpu":
        batch, length, heads, width = 4, 8192, 32, 128
    q, k, v = (make.normal(batch, length, heads, width, salt=i) for i in range(3))
    slopes = slopes_tnl(heads).to(make.device)
    wide = torch.promote_types(make.dtype, torch.float32)

    def call() -> Tensor:
        return linear_attention(q, k, v, slopes)[0]

    def naive() -> Tensor:
        return quadratic(q, k, v, slopes.to(wide))

    def softmax() -> Tensor:
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)

    peers = {"SDPA, causal softmax": softmax}
    if make.device != "cpu" and importlib.util.find_spec("fla"):
        gla = importlib.import_module("fla.ops.simple_gla")
        peers["flash-linear-attention"] = lambda: gla.chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0)[0]
    return Case(
        op="linear_attention",
        shape=f"B {batch}, T {length}, H {heads}, D {width}, {q.dtype}".replace("torch.", ""),
        leaves=[q, k, v],
        call=call,
        reference=_reference(call),
        naive=naive,
        peers=peers,
        bytes_moved=_size(q, k, v, v),
        flops=batch * length * heads * (4 * 32 * width + 4 * width * width),
    )


def _stats(make: Maker) -> Case:
    batch, heads, length, width = (2, 8, 1024, 64) if make.large else (2, 3, 70, 16)
    if make.large and make.device != "cpu":
        batch, heads, length, width = 1, 32, 8192, 128
    q, k = (make.normal(batch, heads, length, width, salt=i).detach() for i in range(2))

    def call() -> Tensor:
        found = attention_stats(q, k)
        return torch.stack([found.waad_BHR, found.span_BHR / 10, 100 * found.influence_BHS])

    def naive() -> Tensor:
        every, far = attention_map(q, k, None, None, width**-0.5), apart(q, k)
        read = (far >= 10) & (far <= 50)
        waad, span = (every * far.clamp(0, 10)).sum(-1), (every * far.clamp_min(0)).sum(-1) / 10
        return torch.stack([waad, span, 100 * (every * read).sum(2) / read.sum(0).clamp_min(1)])

    return Case(
        op="attention_stats",
        shape=f"B {batch}, T {length}, H {heads}, d {width}, {q.dtype}".replace("torch.", ""),
        leaves=[],
        call=call,
        reference=_reference(call),
        naive=naive,
        bytes_moved=_size(q, k) + 12 * batch * heads * length,
        flops=batch * heads * length * (length + 2 * 40) * width,
    )


def _prefix(make: Maker) -> Case:
    users, n, heads, prompt, own, width = (8, 8, 4, 256, 8, 32) if make.large else (2, 3, 2, 9, 4, 16)
    q = make.normal(users, n, heads, width, salt=1)
    k, v = (make.normal(users, heads, prompt + own * n, width, salt=salt) for salt in (2, 3))
    mask = torch.arange(prompt, device=make.device) >= torch.arange(users, device=make.device)[:, None]
    bias = shared_prefix.visible(mask, samples=n, tokens=own, dtype=make.dtype)
    seen = torch.cat([mask, mask.new_ones(users, own)], 1)

    def call() -> Tensor:
        return shared_prefix.shared_prefix_attention(q, k, v, bias)

    def parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return shared_prefix.apart(k, prompt=prompt, samples=n), shared_prefix.apart(v, prompt=prompt, samples=n)

    def plain() -> Tensor:
        (pk, sk), (pv, sv) = parts()
        return shared_prefix.reference(q, pk, pv, mask, sk, sv)

    def sdpa() -> Tensor:
        copied, theirs = (
            torch.cat([one[:, None].expand(-1, n, -1, -1, -1), two], 3).flatten(0, 1) for one, two in parts()
        )
        of_sample = seen[:, None].expand(-1, n, -1).flatten(0, 1)[:, None, None]
        out = scaled_dot_product_attention(q.flatten(0, 1)[:, :, None], copied, theirs, attn_mask=of_sample)
        return out[:, :, 0].view(users, n, heads, width)

    return Case(
        op="shared_prefix",
        shape=f"{users} users x {n} samples, H {heads}, prompt {prompt}, own {own}, d {width}, {q.dtype}".replace(
            "torch.", ""
        ),
        leaves=[q, k, v],
        call=call,
        reference=plain,
        naive=plain,
        peers={"SDPA, prompt copied": sdpa},
        bytes_moved=_size(q, k, v, q),
        flops=4 * users * n * heads * (prompt + own) * width,
    )
