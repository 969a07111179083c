"""The second family: a diffusion transformer that denoises all codes of the next picture at once.

    favourites ─▶ understanding features ─▶ condition tokens ──────────┐ (cross-attention)
                                                                       ▼
    noise x [L, D] ─▶ DiT: which code at each place? ─▶ expected code vectors ─▶ flow step ─┐ × steps ─▶ nearest codes
          ▲                                                                                 │
          └─────────────────────────────────────────────────────────────────────────────────┘

The transformer is diffusers'; what is denoised, and how it is learned, stands in
:mod:`couturier.components.generator.denoiser`. A sample is quantised to codes, so that decoding, rewards, evaluation
and serving are those of the other family.

Legend: U users, n pictures a user, N = U * n, L codes a picture, K codebook entries, D code width, I items,
F understanding features, W width, P preference pairs, E user tokens, M noise levels.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import JanusVisionModel

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.files import read_json, write_json
from couturier.components.generator.codec import Codec, PatchVQ
from couturier.components.generator.denoiser import Condition, Denoiser
from couturier.components.generator.gallery import rows_of
from couturier.components.generator.janus import to_tower
from couturier.components.generator.janus_codec import JanusCodec
from couturier.components.generator.preference import DecoupledAttention, PairReader
from couturier.components.generator.sampler import SamplerSettings
from couturier.components.generator.types import DiffusionConfig, PreferenceConfig
from couturier.components.runtime import global_seed, seeded
from couturier.components.together import rank


class DiffusionGenerator(Denoiser):
    """A denoiser of code vectors, conditioned on a person's history and, after PPD, on their preference pairs.

    Build one with :meth:`fresh` or :meth:`load`; :meth:`personalise` adds the user embedding of PPD.

    Args:
        features_IF: understanding features of the catalogue.
        codebook_KD: the codec's code vectors, standardised.
        codes: L.
        popular_I: catalogue rows by falling popularity; what a person has not taken of these is what they passed over.
        codes_IL, known_M: codes of the catalogue, and an item of each row of them that it begins with.
    """

    popular_I: Tensor

    def __init__(
        self,
        config: DiffusionConfig,
        features_IF: Tensor,
        codebook_KD: Tensor,
        popular_I: Tensor,
        *,
        codes: int,
        codes_IL: Tensor | None = None,
        known_M: Tensor | None = None,
    ) -> None:
        super().__init__(config, features_IF, codebook_KD, codes=codes, codes_IL=codes_IL, known_M=known_M)
        self.register_buffer("popular_I", popular_I, persistent=False)
        self.pairs: PairReader | None = None
        self.preference: PreferenceConfig | None = None

    @classmethod
    def fresh(
        cls,
        config: DiffusionConfig,
        catalogue: Catalogue,
        *,
        eyes: JanusVisionModel,
        codec: Codec,
        codes_IL: Tensor,
        seed: int,
    ) -> DiffusionGenerator:
        """New weights for this catalogue and codec.

        Args:
            eyes: the understanding tower; its features of the catalogue are computed once and kept.
            codes_IL: codes of the catalogue's pictures.
        """
        codebook_KD = code_vectors(codec)
        seen = codebook_KD[codes_IL].flatten(0, 1)
        standard = (codebook_KD - seen.mean(0)) / seen.std(0).clamp_min(1e-4)
        purchases = catalogue.items["purchases"].to_numpy().astype(np.float64)
        popular_I = torch.from_numpy(np.argsort(-purchases, kind="stable").copy())
        weight_I = torch.from_numpy(purchases) + 1
        item_M, weight_M = rows_of(codes_IL, weight_I, config.known)
        known = {"codes_IL": codes_IL, "known_M": item_M} if config.known else {}
        with global_seed(seed, "diffusion"):
            made = cls(config, understand(eyes, catalogue), standard, popular_I, codes=codes_IL.shape[1], **known)
        made.set_prior(codes_IL, weight_I)
        if made.gallery is not None:
            made.gallery.set_shares(weight_M)
        return made

    @property
    def codebook_size(self) -> int:
        return len(self.codebook_KD)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """All of it before PPD; after :meth:`personalise`, what PPD added and, if so wished, the rest."""
        return [p for p in self.parameters() if p.requires_grad]

    def personalise(self, config: PreferenceConfig, *, seed: int, whole: bool = False) -> DiffusionGenerator:
        """Add the reader of preference pairs and the decoupled cross-attention. The first output is that of the model
        without them. Unless the ``whole`` model is to learn, the rest is frozen from here on."""
        self.requires_grad_(whole)
        with global_seed(seed, "preference"):
            self.pairs, self.preference = PairReader(self.features_IF.shape[1], config), config
            for block in self.dit.transformer_blocks:
                block.attn2.set_processor(DecoupledAttention(block.attn2.inner_dim, config.width))
        return self

    @torch.no_grad()
    def nats(self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U, n]``, an estimate over evenly spaced levels. A picture's noise comes from its codes, so
        that the same picture after two histories differs by the histories alone; so does where its levels begin, so
        that the mean over pictures misses none."""
        u, n, _ = codes_UnL.shape
        keep_U = torch.full((u,), not unconditional)
        condition = self.condition(favourites_UK, keep_U=keep_U, users_UEW=self.users_of(favourites_UK)).repeat(n)
        codes_NL, levels = codes_UnL.flatten(0, 1), self.config.nats_levels
        randoms = [seeded(0, "diffusion nats", row.tobytes().hex()) for row in codes_NL.cpu().numpy()]
        begin_N = torch.cat([torch.rand(1, generator=random) for random in randoms]).to(self.codebook_KD)
        noise_NMLD = torch.stack([torch.randn(levels, *self.shape_LD, generator=random) for random in randoms])
        noise_NMLD, total_N = noise_NMLD.to(self.codebook_KD), torch.zeros_like(begin_N)
        for level in range(levels):
            noise_NLD, time_N = noise_NMLD[:, level], (level + begin_N) / levels
            total_N = total_N + self.error_nats(codes_NL, noise_NLD, time_N.clamp_min(1e-3), condition) / levels
        return total_N.view(u, n)

    def nll(self, favourites_UK: np.ndarray | Tensor, codes_UL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U]``; see :meth:`nats`."""
        return self.nats(favourites_UK, codes_UL[:, None], unconditional=unconditional)[:, 0]

    def likeliest(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        beams: int = 0,
        guidance: float = 1.0,
        without_UmL: Tensor | None = None,
    ) -> Tensor:
        """There are none that could be found.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a diffusion model does not write codes one by one, so its likeliest pictures cannot be searched for. Ask "
            "for random draws (likeliest=false, evaluate.beams=0), or train with sft.generator.family=janus."
        )

    @torch.no_grad()
    def sample(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        seeds: list[int],
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        spread: bool = True,
        users_UEW: Tensor | None = None,
    ) -> Tensor:
        """Draw ``n`` pictures a user: codes int64 ``[U, n, L]``.

        Args:
            favourites_UK: item indices of each history, -1 for none.
            seeds: one a user; their noise depends on that seed alone, whatever else is in the batch.
            guidance: mixes log-probabilities with those of nobody in particular, as the any-to-any sampler does.
            temperature, top_k, top_p: of the codes that each step expects; 0 expects the likeliest alone.
            spread: a user's pictures start from noises that repel each other; each alone is as before.
            users_UEW: user embeddings (:meth:`embed_users`); left out, they are read from the histories
                (:meth:`users_of`) if the model has learned to use any.
        """
        settings = SamplerSettings(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, spread=spread)
        users = len(favourites_UK)
        if len(seeds) != users:
            raise ConfigError(f"{len(seeds)} seeds were given for {users} users; give one a user.")
        if n < 1:
            raise ConfigError(f"n is {n}; ask for at least one picture.")
        known = self.users_of(favourites_UK) if users_UEW is None else users_UEW
        keep = torch.ones(users, dtype=torch.bool)
        own = self.condition(favourites_UK, keep_U=keep if guidance else ~keep, users_UEW=known).repeat(n)
        condition = own
        if guidance not in (0, 1):
            free = self.condition(favourites_UK, keep_U=~keep, users_UEW=known).repeat(n)
            condition = own.beside(free)
        x_NLD = torch.cat([self._start(seed, n, spread=spread) for seed in seeds])
        path = torch.linspace(1, 0, self.config.steps + 1, device=x_NLD.device)
        level_SL1 = self.noise_level(path)
        for step, time in enumerate(path[:-1].tolist()):
            clean_NLD = self._expected(x_NLD, time, condition, settings)
            # Euler along the straight path: the share of the noise that is left shrinks from one level to the next.
            x_NLD = clean_NLD + (x_NLD - clean_NLD) * (level_SL1[step + 1] / level_SL1[step].clamp_min(1e-6))
        return self.quantise(x_NLD).view(users, n, -1)

    @torch.no_grad()
    def expected_items(self, favourites_UK: np.ndarray | Tensor) -> Tensor:
        """How likely each catalogue item's picture is, before anything is drawn, ``[U, I]``, each row summing to 1: by
        the gallery and what the person likes of it; without a gallery, by rank among what sells (Zipf's law)."""
        if self.gallery is None:
            rank_I = torch.empty_like(self.popular_I)
            rank_I[self.popular_I] = torch.arange(len(rank_I))
            return (1.0 / (rank_I + 1)).expand(len(favourites_UK), -1)
        liked_UH = self.condition(favourites_UK).liked_NH
        assert liked_UH is not None
        p_UH = (liked_UH + self.gallery.shares_H).softmax(-1)
        # Items of one row share what it has; those of no row share what is new.
        count_H = torch.bincount(self.gallery.row_I, minlength=p_UH.shape[1]).clamp_min(1)
        p_UI = (p_UH / count_H)[:, self.gallery.row_I]
        return p_UI / p_UI.sum(1, keepdim=True)

    def quantise(self, x_NLD: Tensor) -> Tensor:
        """The nearest code at each place, int64 ``[N, L]``."""
        e_KD = self.codebook_KD
        return (e_KD.square().sum(1) - 2 * x_NLD @ e_KD.T).argmin(-1)

    def _start(self, seed: int, n: int, *, spread: bool) -> Tensor:
        """Noise ``[n, L, D]`` of one user. Spread, it is centred on nought over the n and scaled back to unit variance:
        each picture's noise is standard normal still, and any two correlate by -1 / (n - 1)."""
        noise = torch.randn(n, *self.shape_LD, generator=torch.Generator().manual_seed(seed))
        if spread and n > 1:
            noise = (noise - noise.mean(0)) * (n / (n - 1)) ** 0.5
        return noise.to(self.codebook_KD.device)

    def _expected(self, x_NLD: Tensor, time: float, condition: Condition, settings: SamplerSettings) -> Tensor:
        """The clean vectors that a step heads for, under guidance and the settings."""
        rows = len(condition.tokens_NSW)
        x = x_NLD if rows == len(x_NLD) else torch.cat([x_NLD, x_NLD])
        logits = self.logits(x, x.new_full((rows,), time), condition)
        if rows != len(x_NLD):
            own, free = logits.chunk(2)
            logits = free + settings.guidance * (own - free)
        return likely(logits, settings) @ self.codebook_KD

    def users_of(self, favourites_UK: np.ndarray | Tensor) -> Tensor | None:
        """User embeddings ``[U, E, W]`` from histories alone: favourites against what sells and they never took."""
        if self.preference is None:
            return None
        return self.embed_users(*self.pairs_of(favourites_UK))

    def pairs_of(self, favourites_UK: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of items, int64 ``[U, P]`` twice (-1: none): the first favourites, and the most popular items that are
        not in the history at all."""
        assert self.preference is not None
        count = self.preference.pairs
        items = torch.from_numpy(np.array(favourites_UK, np.int64))
        good = F.pad(items, (0, max(0, count - items.shape[1])), value=-1)[:, :count]
        # Among this many of the most popular, enough are not in any history of this length.
        popular = self.popular_I[: items.shape[1] + count]
        taken = (popular[None, :, None] == items[:, None]).any(-1)
        order = taken.to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        bad = popular[order].masked_fill(taken.gather(1, order), -1)
        bad = F.pad(bad, (0, count - bad.shape[1]), value=-1)
        none = (good < 0) | (bad < 0)
        return good.masked_fill(none, -1), bad.masked_fill(none, -1)

    def embed_users(self, preferred_UP: Tensor, other_UP: Tensor) -> Tensor:
        """User embeddings ``[U, E, W]`` from pairs of catalogue items, -1 for none. Between two embeddings a and b,
        ``torch.lerp(a, b, share)`` is a person in between.

        Raises:
            ConfigError: the model has no reader of pairs.
        """
        if self.pairs is None:
            raise ConfigError(
                "this generator reads no preference pairs: PPD has not trained it. Retrain with --set rl.method=ppd."
            )
        real = (preferred_UP >= 0) & (other_UP >= 0)
        return self.pairs(self.features_IF[preferred_UP.clamp_min(0)], self.features_IF[other_UP.clamp_min(0)], real)

    def save(self, folder: Path) -> None:
        """Weights and tables in safetensors, the configs in ``generator.json``, written by the first process."""
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        tables = {"features_IF": self.features_IF, "codebook_KD": self.codebook_KD, "popular_I": self.popular_I}
        if self.gallery is not None:
            tables |= {"codes_IL": self.gallery.codes_IL, "known_M": self.gallery.item_M}
        save_file({k: v.contiguous() for k, v in tables.items()}, folder / "features.safetensors")
        facts = {"kind": "diffusion", "codes_per_picture": self.codes_per_picture, "config": asdict(self.config)}
        facts["preference"] = None if self.preference is None else asdict(self.preference)
        write_json(folder / "generator.json", facts)

    @classmethod
    def load(cls, folder: Path) -> DiffusionGenerator:
        """The generator saved in ``folder``, in evaluation mode.

        Raises:
            LineageError: the folder holds none.
        """
        path = folder / "generator.json"
        if not path.exists() or (facts := read_json(path))["kind"] != "diffusion":
            raise LineageError(f"{folder} holds no diffusion generator. Run `couturier retrain` to train one.")
        tables = load_file(folder / "features.safetensors")
        with global_seed(0, "load"):
            made = cls(DiffusionConfig(**facts["config"]), **tables, codes=facts["codes_per_picture"])
        if facts["preference"] is not None:
            made.personalise(PreferenceConfig(**facts["preference"]), seed=0)
        made.load_state_dict(load_file(folder / "model.safetensors"))
        return made.eval()


def likely(logits_NLK: Tensor, settings: SamplerSettings) -> Tensor:
    """Probabilities of codes after temperature, top-k and top-p."""
    if settings.temperature == 0:
        return F.one_hot(logits_NLK.argmax(-1), logits_NLK.shape[-1]).to(logits_NLK.dtype)
    logits = logits_NLK / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        floor = logits.topk(settings.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    p = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= settings.top_p
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(beyond, 0))
        p = p / p.sum(-1, keepdim=True)
    return p


def code_vectors(codec: Codec) -> Tensor:
    """The vector that each code of a codec stands for, ``[K, D]``.

    Raises:
        ConfigError: the codec is of a kind that has none.
    """
    if isinstance(codec, PatchVQ):
        return codec.codebook_KD.clone()
    if isinstance(codec, JanusCodec):
        return F.normalize(codec.vq.quantize.embedding.weight.detach().float(), dim=-1)
    raise ConfigError(f"a {type(codec).__name__} has no code vectors to denoise; use the tiny codec or a Janus one.")


@torch.no_grad()
def understand(eyes: JanusVisionModel, catalogue: Catalogue, batch: int = 256) -> Tensor:
    """Understanding features of every catalogue picture, the mean over its patches, ``[I, F]``."""
    eyes = eyes.eval()
    size = cast(int, eyes.config.image_size)
    parts = [
        eyes(to_tower(catalogue.rgb_IHWC[i : i + batch], size)).last_hidden_state.mean(1)
        for i in range(0, len(catalogue), batch)
    ]
    return torch.cat(parts)
