"""The denoiser of the diffusion family: which code stands at each place of a noisy picture?

It works on the codec's code vectors, standardised over the catalogue, along the straight path of rectified flow
x = (1 - s) * vectors + s * noise (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747). Since the data are
code vectors, it names codes: its estimate of the clean picture is the expected code vector, and it learns by
cross-entropy (CDCD, Dieleman et al., arXiv 2211.15089). That every place's own noisy vector speaks for codes by its
Gaussian density, and that the transformer adds only what the other places and the person say, is ours. So is reading
one token a history picture (the mean over its patches).

Nearly all of a picture is decided while the noise is much stronger than the signal (a thousand tiles lie far apart in
hundreds of dimensions), so steps and training are shifted towards noise by the root of the number of dimensions, as
Stable Diffusion 3 does for larger pictures (Esser et al., arXiv 2403.03206, section 5.3.2).

How places go together a tiny model hardly learns: after its ten minutes pictures were mush. So it begins with the rows
of codes that the catalogue's pictures have, by what sells (:mod:`couturier.components.generator.gallery`). The person
raises some of them, once for all noise levels through their taste, and at each level through what the transformer
asks; it also still names codes place by place, which is what draws a picture that is no row.

Without such rows, places need not all stand at the same level of noise: later ones follow earlier ones by ``stagger``
(levels of their own for parts of a sample: Diffusion Forcing, Chen et al., arXiv 2407.01392), which spares the joint
decision over all of them. Every level's likelihood integral then runs along that path. The order and the form are ours.

Legend: U users, n pictures a user, N = U * n, L codes a picture, K codebook entries, D code width, I items,
F understanding features, S condition tokens, W width, E user tokens, g edge of the grid of codes, Q, H: gallery.py,
O what the transformer puts out of each place (K, and Q where there is a gallery).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.components.generator.gallery import Gallery
from couturier.components.generator.types import DiffusionConfig

_ROWS = 0.25  # weight of a row's nats beside those of a code
_LEAST = 1e-8  # probability of a code that nothing speaks for
_EDGE = 1e-3  # of the noise levels: no training at exactly no noise or nothing but noise


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the denoiser knows of each row: tokens_NSW, mask_NS True where a token counts, users_NEW or None, and what
    it likes of its gallery whatever the noise, liked_NH or None."""

    tokens_NSW: Tensor
    mask_NS: Tensor
    users_NEW: Tensor | None = None
    liked_NH: Tensor | None = None

    def repeat(self, n: int) -> Condition:
        """Every row ``n`` times, one after the other."""
        return self._each(lambda x: x.repeat_interleave(n, 0))

    def beside(self, other: Condition) -> Condition:
        """This one's rows, then the other's."""
        return self._with(lambda mine, others: torch.cat([mine, others]), other)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return self._with(lambda mine, _: change(mine), self)

    def _with(self, join: Callable[[Tensor, Tensor], Tensor], other: Condition) -> Condition:
        def both(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            return None if mine is None or others is None else join(mine, others)

        return Condition(
            tokens_NSW=join(self.tokens_NSW, other.tokens_NSW),
            mask_NS=join(self.mask_NS, other.mask_NS),
            users_NEW=both(self.users_NEW, other.users_NEW),
            liked_NH=both(self.liked_NH, other.liked_NH),
        )


class Denoiser(nn.Module):
    """A diffusion transformer of diffusers over code vectors, conditioned on a person's history.

    Args:
        features_IF: understanding features of the catalogue.
        codebook_KD: the codec's code vectors, standardised.
        codes: L.
        codes_IL: codes of the catalogue's pictures, and
        known_M: an item of each row of codes that it begins with (:mod:`~couturier.components.generator.gallery`); left
            out, it begins with none.
    """

    features_IF: Tensor
    codebook_KD: Tensor

    def __init__(
        self,
        config: DiffusionConfig,
        features_IF: Tensor,
        codebook_KD: Tensor,
        *,
        codes: int,
        codes_IL: Tensor | None = None,
        known_M: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.codes_per_picture = config, codes
        self.edge = int(codes**0.5)
        if self.edge**2 != codes:
            raise ConfigError(f"the codec makes {codes} codes a picture; the denoiser needs a square grid of them.")
        self.register_buffer("features_IF", features_IF, persistent=False)
        self.register_buffer("codebook_KD", codebook_KD, persistent=False)
        (k, d), w = codebook_KD.shape, config.width
        self.gallery: Gallery | None = None
        if codes_IL is not None and known_M is not None:
            self.gallery = Gallery(
                codes_IL, known_M, features_IF, codebook_KD, width=config.liking, history=config.history
            )
        liking = 0 if self.gallery is None else config.liking
        self.dit = PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=w // config.heads,
            in_channels=d + w,
            out_channels=k + liking,
            num_layers=config.layers,
            cross_attention_dim=w,
            sample_size=self.edge,
            patch_size=1,
        )
        self.prior_LK = nn.Parameter(torch.zeros(codes, k))
        self.code_KW = nn.Parameter(torch.randn(k, w))
        self.bind_LW = nn.Parameter(torch.randn(codes, w))
        self.shift = config.shift or (codes * d / (1 + config.stagger)) ** 0.5 / 4.5
        self._first_weights()
        self.look = nn.Sequential(nn.LayerNorm(features_IF.shape[1]), nn.Linear(features_IF.shape[1], w))
        self.place_SW = nn.Parameter(torch.randn(config.history, w) * 0.1)
        self.always_W = nn.Parameter(torch.randn(w))
        if self.gallery is not None:
            self.taste = nn.TransformerEncoderLayer(
                w, config.heads, 2 * w, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.ask = nn.Linear(w, config.liking)
            nn.init.zeros_(self.ask.weight)
            nn.init.zeros_(self.ask.bias)

    @torch.no_grad()
    def _first_weights(self) -> None:
        """Every code equally likely, and every residual branch at full strength: as PixArt draws them, gates of about
        a tenth cost a tiny model hundreds of steps."""
        nn.init.zeros_(self.dit.proj_out.weight)
        nn.init.zeros_(self.dit.proj_out.bias)
        self.dit.scale_shift_table.zero_()
        for block in self.dit.transformer_blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[[2, 5]] = 1.0

    @property
    def shape_LD(self) -> tuple[int, int]:
        """Of one picture's noise."""
        return self.codes_per_picture, self.codebook_KD.shape[1]

    @torch.no_grad()
    def set_prior(self, codes_IL: Tensor, weight_I: Tensor) -> None:
        """Begin with how often each code stands at each place, in pictures weighted by ``weight_I``: the denoiser is
        then the best one that looks at every place alone, and learns what places say of each other."""
        count_LK = torch.full_like(self.prior_LK, 0.01)
        share_I = (weight_I / weight_I.mean()).to(count_LK.dtype)
        for place, codes_I in enumerate(codes_IL.T):
            count_LK[place].index_add_(0, codes_I, share_I)
        self.prior_LK.copy_((count_LK / count_LK.sum(1, keepdim=True)).log())

    def condition(
        self, favourites_UK: np.ndarray | Tensor, *, keep_U: Tensor | None = None, users_UEW: Tensor | None = None
    ) -> Condition:
        """What is known of each user, histories int ``[U, K]`` (-1: nothing). Where ``keep_U`` is False, nothing is.

        Raises:
            ConfigError: an item index outside the catalogue.
        """
        items = torch.from_numpy(np.array(favourites_UK, np.int64))[:, : self.config.history]
        if items.numel() and int(items.max()) >= len(self.features_IF):
            raise ConfigError(
                f"item index {int(items.max())} is outside the catalogue of {len(self.features_IF)} items."
            )
        items = items.to(self.features_IF.device)
        real = items >= 0
        if keep_U is not None:
            real = real & keep_U[:, None].to(real.device)
            users_UEW = None if users_UEW is None else users_UEW * keep_U[:, None, None].to(users_UEW.dtype)
        shown = self.look(self.features_IF[items.clamp_min(0)]) + self.place_SW[: items.shape[1]]
        always = self.always_W.expand(len(items), 1, -1)
        tokens_USW = torch.cat([always, shown], 1)
        mask_US = torch.cat([real.new_ones(len(items), 1), real], 1)
        liked_UH = None
        if self.gallery is not None:
            query_UQ = self.ask(self.taste(tokens_USW, src_key_padding_mask=~mask_US)[:, 0])
            liked_UH = self.gallery.liking(query_UQ) + self.gallery.again(items, real)
        return Condition(tokens_NSW=tokens_USW, mask_NS=mask_US, users_NEW=users_UEW, liked_NH=liked_UH)

    def logits(self, x_NLD: Tensor, time_N: Tensor, condition: Condition) -> Tensor:
        """Log-probabilities, up to a constant, of each code at each place, ``[N, L, K]``.

        Args:
            x_NLD: noisy code vectors;  time_N: in (0, 1], the share of the way back to noise.
        """
        return self._read(x_NLD, time_N, condition)[0]

    def _read(self, x_NLD: Tensor, time_N: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Of codes at each place as :meth:`logits`, and of the gallery's explanations ``[N, H]`` if there is one."""
        level_NL1 = self.noise_level(time_N)
        alone_NLK = self._own_evidence(x_NLD, level_NL1) + self.prior_LK
        if self.gallery is None or condition.liked_NH is None:
            return self._transform(x_NLD, alone_NLK.softmax(-1), time_N, condition) + alone_NLK, None
        # Against whole rows, what is new must count at its true probability.
        alone_NLK = alone_NLK - self.prior_LK.logsumexp(-1, keepdim=True)
        fit_NH = self.gallery.fit(x_NLD, level_NL1, alone_NLK)
        out_NLO = self._transform(x_NLD, self.gallery.codes(fit_NH.softmax(-1), alone_NLK), time_N, condition)
        out_NLK, query_NLQ = out_NLO.split([len(self.codebook_KD), self.config.liking], -1)
        rows_NH = fit_NH + condition.liked_NH + self.gallery.liking(query_NLQ.mean(1))
        codes_NLK = self.gallery.codes(rows_NH.softmax(-1), alone_NLK)
        return out_NLK + codes_NLK.clamp_min(_LEAST).log(), rows_NH

    def _transform(self, x_NLD: Tensor, guess_NLK: Tensor, time_N: Tensor, condition: Condition) -> Tensor:
        """What the transformer says of each place, from the noisy vectors and a first guess at the codes."""
        guess_NLW = guess_NLK @ self.code_KW * self.bind_LW
        users = condition.users_NEW
        out_NOgg = self.dit(
            torch.cat([x_NLD, guess_NLW], -1).transpose(1, 2).unflatten(2, (self.edge, self.edge)),
            encoder_hidden_states=condition.tokens_NSW,
            timestep=time_N * 1000,
            encoder_attention_mask=condition.mask_NS,
            cross_attention_kwargs=None if users is None else {"ip_hidden_states": users},
            return_dict=False,
        )[0]
        return out_NOgg.flatten(2).transpose(1, 2)

    def times_of_places(self, time_N: Tensor) -> Tensor:
        """Where each place is on its own way from clean (0) to noise (1), ``[N, L, 1]``: earlier places are clean
        sooner."""
        stagger, last = self.config.stagger, max(1, self.codes_per_picture - 1)
        lead_L = stagger * (1 - torch.arange(self.codes_per_picture, device=time_N.device) / last)
        return (time_N[:, None] * (1 + stagger) - lead_L).clamp(0, 1)[..., None]

    def noise_level(self, time_N: Tensor) -> Tensor:
        """Share of noise s of each place ``[N, L, 1]``: ``shift * t / (1 + (shift - 1) * t)`` of its own time t."""
        t, shift = self.times_of_places(time_N), self.shift
        return shift * t / (1 + (shift - 1) * t)

    def _own_evidence(self, x_NLD: Tensor, s_NL1: Tensor) -> Tensor:
        """Log density of a noisy vector under each code, less what all codes share: ``[N, L, K]``."""
        signal = 1 - s_NL1
        cross = x_NLD @ self.codebook_KD.T * signal
        return (cross - 0.5 * signal.square() * self.codebook_KD.square().sum(1)) / s_NL1.square().clamp_min(1e-4)

    def denoise(self, x_NLD: Tensor, time_N: Tensor, condition: Condition) -> Tensor:
        """The expected clean vectors ``[N, L, D]``."""
        return self.logits(x_NLD, time_N, condition).softmax(-1) @ self.codebook_KD

    def loss(
        self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, keep_U: Tensor, random: torch.Generator
    ) -> tuple[Tensor, int]:
        """Cross-entropy in nats a code, mean over noise levels (a denoising loss), and how many tokens were read.

        With a gallery, also that of the whole row: at the same level, and where there is nothing but noise. The last
        costs next to nothing and tells most of the person, so all ``n`` pictures of a person count there, while one of
        them, whichever comes, goes through the transformer.

        Args:
            keep_U: False where the condition is dropped, for guidance.
            random: noise and levels come from it.
        """
        each, n = self.condition(favourites_UK, keep_U=keep_U), codes_UnL.shape[1]
        loss, codes_NL = each.tokens_NSW.new_zeros(()), codes_UnL.flatten(0, 1)
        if self.gallery is not None and each.liked_NH is not None:
            nothing_NH = (each.liked_NH + self.gallery.shares_H).repeat_interleave(n, 0)
            loss = _ROWS * F.cross_entropy(nothing_NH, self.gallery.find(codes_NL))
            some_U = torch.randint(n, (len(codes_UnL),), generator=random)
            n, codes_NL = 1, codes_UnL[torch.arange(len(codes_UnL)), some_U]
        noise_NLD, time_N = self.noise_for(codes_NL, random)
        x_NLD, condition = self.add_noise(self.codebook_KD[codes_NL], noise_NLD, time_N), each.repeat(n)
        logits_NLK, rows_NH = self._read(x_NLD, time_N, condition)
        each_NL = F.cross_entropy(logits_NLK.transpose(1, 2), codes_NL, reduction="none")
        # What is clean teaches nothing, and what is nothing but noise is not asked for yet.
        t_NL = self.times_of_places(time_N)[..., 0]
        moving_NL = ((t_NL > 0) & (t_NL < 1)).float()
        loss = loss + (each_NL * moving_NL).sum() / moving_NL.sum().clamp_min(1)
        if self.gallery is not None and rows_NH is not None:
            # Places of one row say the same of the person sixteen times over; the row says it once, and sharply.
            loss = loss + _ROWS * F.cross_entropy(rows_NH, self.gallery.find(codes_NL))
        return loss, codes_NL.numel() + condition.mask_NS.numel()

    def noise_for(self, codes_NL: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise ``[N, L, D]`` and levels ``[N]`` (:func:`times`) for a batch of pictures."""
        device = self.codebook_KD.device
        return self._noise(codes_NL, random).to(device), times(len(codes_NL), random).to(device)

    def _noise(self, codes_NL: Tensor, random: torch.Generator) -> Tensor:
        return torch.randn(*codes_NL.shape, self.codebook_KD.shape[1], generator=random)

    def add_noise(self, clean_NLD: Tensor, noise_NLD: Tensor, time_N: Tensor) -> Tensor:
        """A point of the path between pictures and noise."""
        s = self.noise_level(time_N)
        return (1 - s) * clean_NLD + s * noise_NLD

    def error_nats(self, codes_NL: Tensor, noise_NLD: Tensor, time_N: Tensor, condition: Condition) -> Tensor:
        """One-sample estimate ``[N]`` of how many nats each picture costs, from the error at one level of noise.

        -log P(x) is half the integral of the squared error of the best denoiser over the signal-to-noise ratio r, for
        discrete x without remainder (pointwise in Kong et al., arXiv 2302.03792, after Guo et al. 2005); those of any
        other denoiser lie above. The gradient over the ratio of each place is the error of that place, so places may
        go one after the other. With r = ((1 - t) / (shift * t))^2, dr = 2 r / (t (1 - t)) dt.
        """
        x_NLD = self.add_noise(self.codebook_KD[codes_NL], noise_NLD, time_N)
        missed_NL = (self.denoise(x_NLD, time_N, condition) - self.codebook_KD[codes_NL]).square().sum(-1)
        t_NL = self.times_of_places(time_N)[..., 0]
        moving_NL = (t_NL > _EDGE) & (t_NL < 1 - _EDGE)
        t_NL = t_NL.clamp(_EDGE, 1 - _EDGE)
        ratio_NL = ((1 - t_NL) / (self.shift * t_NL)).square()
        each_NL = ratio_NL * missed_NL / (t_NL * (1 - t_NL)) * moving_NL
        return each_NL.sum(1) * (1 + self.config.stagger)

    def error_of(self, codes_NL: Tensor, noise_NLD: Tensor, time_N: Tensor, condition: Condition) -> Tensor:
        """What the denoiser is trained on, in nats ``[N]``, whole pictures at one level of noise: with a gallery, how
        surprised it is by the row; else :meth:`error_nats`, whose one sample at one level is far noisier."""
        if self.gallery is None:
            return self.error_nats(codes_NL, noise_NLD, time_N, condition)
        x_NLD = self.add_noise(self.codebook_KD[codes_NL], noise_NLD, time_N)
        rows_NH = self._read(x_NLD, time_N, condition)[1]
        assert rows_NH is not None
        return F.cross_entropy(rows_NH, self.gallery.find(codes_NL), reduction="none")


def times(count: int, random: torch.Generator) -> Tensor:
    """Noise levels for a batch, one in every ``1 / count`` of the way and in random order, so that every batch covers
    all levels (Kingma et al., arXiv 2107.00630, appendix I.1); ``[count]`` in (0, 1).

    Example:
        >>> found = times(4, torch.Generator().manual_seed(0))
        >>> (found.sort().values * 4).long().tolist()
        [0, 1, 2, 3]
    """
    spots = (torch.randperm(count, generator=random) + torch.rand(1, generator=random)) / count
    return spots.clamp(_EDGE, 1 - _EDGE)
