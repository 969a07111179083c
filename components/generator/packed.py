"""One pass over prompts with several pictures (or answers) behind each, for training and scoring.

    prompt │ picture 1 │ picture 2 │ … │ picture n        one row a user: the prompt is computed once,
       ▲──────┘ ▲──────────┘ ▲──────────────┘             every picture looks at it and at itself

Any language model takes such a row with a mask over all of it, most of which is False. A plain Llama in float32 on a
CPU goes another way: all layers in one compiled call (:mod:`couturier.kernels.llama_layer.training`) where they are
nothing but small matrices; else layer by layer through its own modules (so that adapters and hooks work as ever), where
norms and rotations keep less for the gradient. Either skips the attention that the mask forbids and, of the last layer,
what predicts nothing. All three give the same up to rounding.

Legend: U users, n pictures a user, S tokens a picture, P prompt tokens, T = P + n S, D width, H heads, d head width,
Q tokens that still count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaModel

from couturier.components.shares import how_many, shared_out
from couturier.components.together import world
from couturier.kernels.llama_layer import training
from couturier.kernels.shared_prefix import packed_attention

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Numbers that go through layers from which on a batch is worth asking a compiler, once a process; and weights a layer
# beyond which they leave the cores' caches, where the library's products are as fast.
_COMPILE_FROM, _COMPILE_UP_TO = 1 << 18, 1 << 22


def packed_hidden(
    lm: nn.Module, prompt_UPD: Tensor, own_UnSD: Tensor, mask_UP: Tensor, position_UP: Tensor
) -> tuple[Tensor, Tensor]:
    """Last hidden states of each prompt's last token ``[U, D]`` and of every picture's tokens ``[U, n, S, D]``.

    Args:
        lm: a language model in Llama's form, from transformers.
        prompt_UPD: embedded prompts, left-padded;  own_UnSD: embedded pictures.
        mask_UP: True where a prompt token counts;  position_UP: their places. A picture's go on from the last.
    """
    (n, own), device = own_UnSD.shape[1:3], prompt_UPD.device
    x_UTD = torch.cat([prompt_UPD, own_UnSD.flatten(1, 2)], 1)
    after = position_UP[:, -1:] + 1 + torch.arange(own, device=device).repeat(n)
    position_UT = torch.cat([position_UP, after], 1)
    if _is_plain(lm, x_UTD) and own:
        llama = cast(LlamaModel, lm)
        weights_L, shares = _weights(llama, x_UTD), _shares(llama, x_UTD)
        if weights_L:
            hidden = _compiled_layers(llama, weights_L, n, x_UTD, mask_UP, position_UT)
        elif shares > 1:
            weights = [weight for weight in llama.parameters() if weight.requires_grad]
            hidden = shared_out(partial(_plain_layers, llama, n), [x_UTD, mask_UP, position_UT], weights, shares)
        else:
            hidden = _plain_layers(llama, n, x_UTD, mask_UP, position_UT)
    else:
        keep = packed_mask(mask_UP, n, own)
        low = torch.finfo(x_UTD.dtype).min
        bias = torch.zeros(keep.shape, dtype=x_UTD.dtype, device=device).masked_fill(~keep, low)
        hidden = lm(
            inputs_embeds=x_UTD, attention_mask=bias[:, None], position_ids=position_UT, use_cache=False
        ).last_hidden_state[:, prompt_UPD.shape[1] - 1 :]
    return hidden[:, 0], hidden[:, 1:].unflatten(1, (n, own))


def packed_mask(prompt_mask_UP: Tensor, n: int, own: int) -> Tensor:
    """Who may look at whom, bool ``[U, T, T]``: the prompt causally, each picture at the prompt and causally at itself.
    Padding sees itself only, so that no row of the softmax is empty."""
    u, p = prompt_mask_UP.shape
    size, device = p + n * own, prompt_mask_UP.device
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    block = torch.cat([torch.full((p,), -1, device=device), torch.arange(n, device=device).repeat_interleave(own)])
    same_or_prompt = (block[:, None] == block[None]) | (block[None] == -1)
    real = torch.cat([prompt_mask_UP, prompt_mask_UP.new_ones(u, n * own)], 1)
    return ((causal & same_or_prompt)[None] & real[:, None]) | torch.eye(size, dtype=torch.bool, device=device)[None]


def _is_plain(lm: nn.Module, x_UTD: Tensor) -> bool:
    """Whether the short way does all that the model's own forward would."""
    return (
        type(lm) is LlamaModel
        and x_UTD.device.type == "cpu"
        and x_UTD.dtype == lm.norm.weight.dtype == torch.float32
        and world() == 1
        and not torch.is_autocast_enabled("cpu")
        and not lm.is_activation_checkpointing
        and not lm.config.attention_dropout
    )


def _shares(lm: LlamaModel, x_UTD: Tensor) -> int:
    """How many to split a batch into: only with a gradient, and where nothing but matrices is there to be called, since
    an adapter may draw random numbers and a hook expect to be called once."""
    if not torch.is_grad_enabled() or any(type(part) is not nn.Linear for part in _projections(lm)):
        return 1
    return how_many(lm.layers[0], len(x_UTD), x_UTD.shape[0] * x_UTD.shape[1])


def _weights(lm: LlamaModel, x_UTD: Tensor) -> list[training.Weights]:
    """The layers as matrices, where these are all there is and the compiled way pays; else nothing. It splits users
    over threads, so there should be one for each."""
    size = sum(weight.numel() for weight in lm.layers[0].parameters())
    if (
        x_UTD.numel() * len(lm.layers) < _COMPILE_FROM
        or size > _COMPILE_UP_TO
        or len(x_UTD) < torch.get_num_threads()
        or lm.config.hidden_act not in ("silu", "swish")
        or not all(map(_is_bare, _projections(lm)))
    ):
        return []
    found = []
    for layer in cast("Iterable[LlamaDecoderLayer]", lm.layers):
        attention, mlp = layer.self_attn, layer.mlp
        found.append(
            training.Weights(
                norm=layer.input_layernorm.weight,
                mlp_norm=layer.post_attention_layernorm.weight,
                q=attention.q_proj.weight,
                k=attention.k_proj.weight,
                v=attention.v_proj.weight,
                out=attention.o_proj.weight,
                gate=mlp.gate_proj.weight,
                up=mlp.up_proj.weight,
                down=mlp.down_proj.weight,
            )
        )
    head = cast("LlamaDecoderLayer", lm.layers[0]).self_attn.head_dim
    return found if all(training.covers(weights, head=head) for weights in found) else []


def _is_bare(part: nn.Module) -> bool:
    """Whether a projection is its matrix and nobody listens."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return type(part) is nn.Linear and part.bias is None and not any(hooks)


def _compiled_layers(
    lm: LlamaModel,
    weights_L: list[training.Weights],
    n: int,
    x_UTD: Tensor,
    mask_UP: Tensor,
    position_UT: Tensor,
) -> Tensor:
    """As :func:`_plain_layers`, in one compiled call."""
    cos_UTd, sin_UTd = lm.rotary_emb(x_UTD, position_UT)
    setting = training.Setting(
        samples=n,
        heads=int(lm.config.num_attention_heads),
        kv_heads=int(lm.config.num_key_value_heads or lm.config.num_attention_heads),
        skip=mask_UP.shape[1] - 1,
        eps=float(cast("LlamaDecoderLayer", lm.layers[0]).input_layernorm.variance_epsilon),
    )
    x_UQD = training.layers(x_UTD, weights_L, mask_UP, cos_UTd, sin_UTd, setting)
    return rms_norm(x_UQD, lm.norm.weight, lm.norm.variance_epsilon)


def _projections(lm: LlamaModel) -> Iterator[nn.Module]:
    for layer in cast("Iterable[LlamaDecoderLayer]", lm.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _plain_layers(lm: LlamaModel, n: int, x_UTD: Tensor, mask_UP: Tensor, position_UT: Tensor) -> Tensor:
    """All layers and the last norm; of the prompt only the last token's ``[U, 1 + n S, D]``."""
    cos_UTd, sin_UTd = lm.rotary_emb(x_UTD, position_UT)
    half = sin_UTd.shape[-1] // 2
    # Half-split rotation needs the swapped first half with a minus; here the minus is in the sine.
    signed_UTd = torch.cat([-sin_UTd[..., :half], sin_UTd[..., half:]], -1)
    cos, sin, d = cos_UTd[:, :, None], signed_UTd[:, :, None], 2 * half
    last = len(lm.layers) - 1
    for i, layer in enumerate(cast("Iterable[LlamaDecoderLayer]", lm.layers)):
        attention, mlp = layer.self_attn, layer.mlp
        y_UTD = rms_norm(x_UTD, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        q, k, v = (
            part(y_UTD).unflatten(-1, (-1, d)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (torch.addcmul(part * cos, part.roll(half, -1), sin) for part in (q, k))
        if i == last:
            skip = mask_UP.shape[1] - 1
            q, x_UTD = q[:, skip:], x_UTD[:, skip:]
        mixed_UQHd = packed_attention(q, k, v, mask_UP, samples=n)
        x_UTD = _plus(x_UTD, mixed_UQHd.flatten(2), attention.o_proj)
        y_UTD = rms_norm(x_UTD, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon)
        x_UTD = _plus(x_UTD, mlp.act_fn(mlp.gate_proj(y_UTD)) * mlp.up_proj(y_UTD), mlp.down_proj)
    return rms_norm(x_UTD, lm.norm.weight, lm.norm.variance_epsilon)


def _plus(x_UTD: Tensor, y_UTX: Tensor, part: nn.Module) -> Tensor:
    """``x + part(y)``, in one product where it can be."""
    if type(part) is not nn.Linear or part.bias is not None or part._forward_hooks:
        return x_UTD + cast(Tensor, part(y_UTX))
    return torch.addmm(x_UTD.flatten(0, 1), y_UTX.flatten(0, 1), part.weight.t()).view(*y_UTX.shape[:2], -1)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, ``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467); half
    the time of torch's own on a CPU when there is a gradient.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
        tensor([0.8485, 1.1314])
    """
    return cast(Tensor, _RmsNorm.apply(x, weight_D, eps))


class _RmsNorm(torch.autograd.Function):
    """Keeps the unit vectors and their scale, from which the gradient takes five passes over the data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (length.square_() / x.shape[-1] + eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight_D)
        return unit * weight_D

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight_D = ctx.saved_tensors
        along = grad * unit
        back = torch.addcmul(grad * weight_D, unit, (along @ weight_D)[..., None], value=-1 / unit.shape[-1])
        return back.mul_(scale), along.flatten(0, -2).sum(0), None
