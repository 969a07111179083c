"""Pigeon's generator: a person's history and a reference picture in, a picture in between out.

    history ──▶ mask: the codes that matter ──▶ prompt tokens, the others nought ─┐
        ▲                                                                         ├─▶ language model ─▶ codes
        └ both look at each other                                                 │
        ▼                                                                         │
    reference ─▶ mask: a share of the codes is hidden ─▶ adapter ─▶ one prompt token ─┘

Pigeon (Xu et al., "Personalized Image Generation with Large Multimodal Models", arXiv 2410.14170), after its released
code (generation.md 2). In drawing, the reference's codes that are least related to the person are hidden, so the ratio
says how far the picture may move away from the reference. Training hides the most related ones instead.

Ours: history pictures enter a Janus prompt through the understanding encoder, so the mask, which looks at codes, acts
on the tokens that stand where those codes are; what is kept while drawing is the likeliest, without noise, so that the
same question has the same answer; and a reference that nobody gives is drawn from a
:class:`~couturier.components.generator.shelf.Shelf`.

Legend: U users (prompts), K history pictures, L codes a picture, T prompt tokens a picture, P prompt tokens, D width,
I items, R references a user, n pictures a user.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from couturier.components.errors import ConfigError
from couturier.components.files import read_json, write_json
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.masking import MaskGenerator, ReferenceAdapter, gather_codes, keep, log_keep
from couturier.components.generator.prompt import Prompts
from couturier.components.generator.sampler import SamplerSettings, sample_codes
from couturier.components.generator.shelf import Shelf
from couturier.components.runtime import derived_seed, global_seed
from couturier.components.together import gathered, rank


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The shape of what Pigeon adds to a generator, and how it draws."""

    ratio: float = 0.2
    """Share of a reference's codes that is hidden while drawing; 0 draws close to the reference, 1 far from it. Where
    references are offered by the shelf, they are good ones, and far from them was worse on the demo."""
    history_ratio: float = 0.2
    """Share of the history's tokens that is left out, always (the published number)."""
    references: int = 8
    """Different references a person, at most; more pictures share them."""
    heads: int = 4
    """Of the mask generator's encoder layer (the published number)."""
    dropout: float = 0.2
    """Of the mask generator (the published number)."""
    hidden: int = 256
    """Between the adapter's layers; published: 512 at width 4,096."""

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 and 0 <= self.history_ratio <= 1):
            raise ConfigError(
                f"rl.pigeon.reference.ratio is {self.ratio} and history_ratio {self.history_ratio}; both are shares, "
                "from 0 to 1."
            )
        if self.references < 1:
            raise ConfigError(f"rl.pigeon.reference.references is {self.references}; it must be at least 1.")


class PigeonGenerator(JanusGenerator):
    """A Janus that can draw after a reference picture; without one in its prompts it is the Janus it was.

    Args:
        base: whose model, prompt builder and features are taken over, not copied.
        codes_IL: codes of every catalogue item.
        shelf: where references come from when none are given.
    """

    codes_IL: Tensor

    def __init__(
        self, base: JanusGenerator, codes_IL: Tensor, shelf: Shelf, config: ReferenceConfig, *, seed: int = 0
    ) -> None:
        super().__init__(base.model, base.prompts, base.features_ITF, codes=base.codes_per_picture, source=base.source)
        self.register_buffer("codes_IL", codes_IL, persistent=False)
        self.reference, self.shelf = config, shelf
        width = base.model.model.language_model.config.hidden_size
        with global_seed(seed, "pigeon"):
            self.masks = MaskGenerator(width, codes_IL.shape[1], heads=config.heads, dropout=config.dropout)
            self.adapter = ReferenceAdapter(width, codes_IL.shape[1], config.hidden)

    def embed_prompt(self, prompts: Prompts, keep_UP: Tensor | None = None) -> Tensor:
        """``[U, P, D]``; prompts that show a reference are embedded as for drawing."""
        if prompts.reference_UR.shape[1] == 0:
            return super().embed_prompt(prompts, keep_UP)
        return self.embed_masked(prompts)

    def embed_masked(
        self, prompts: Prompts, *, hide_related: bool = False, random: torch.Generator | None = None
    ) -> Tensor:
        """``[U, P, D]`` of prompts that show a reference, with what the masks keep of it and of the history.

        Args:
            hide_related: hide the reference's codes that are most related to the person (training) rather than the
                least related ones (drawing).
            random: for Gumbel noise and dropout; None: neither.
        """
        told_U = prompts.reference_UR[:, 0] >= 0
        if not bool(told_U.any()):
            return super().embed_prompt(prompts)
        keep_UP, vector_UD = self._mask(prompts.rows(told_U), hide_related, random)
        every_UP = keep_UP.new_ones(prompts.ids_UP.shape)
        every_UP[told_U] = keep_UP
        x_UPD = super().embed_prompt(prompts, every_UP).clone()
        x_UPD[told_U, self.prompts.reference_place] = vector_UD.to(x_UPD.dtype)
        return x_UPD

    def _mask(self, prompts: Prompts, hide_related: bool, random: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Values that multiply the prompt's tokens ``[U, P]``, and the reference's vector ``[U, D]``."""
        items_UK, nth_UP = self._shown(prompts)
        own_UKLD = self.embed_codes(self.codes_IL[items_UK.clamp_min(0)])
        reference_ULD = self.embed_codes(self.codes_IL[prompts.reference_UR[:, 0]])
        a_UKL, a_UL = self.masks(own_UKLD, reference_ULD, items_UK >= 0, random)

        length, tokens = a_UL.shape[1], self.prompts.picture_tokens
        code_UN = (items_UK >= 0).repeat_interleave(length, 1)
        log_p_UN = log_keep(a_UKL.flatten(1), code_UN, hide_related=False)
        log_p_UN = gather_codes(log_p_UN.exp().view(a_UKL.shape), tokens).flatten(1).log()
        ratio_U = prompts.reference_UR[:, 1].double() / 1000
        history_U = torch.full_like(ratio_U, self.reference.history_ratio)
        own_UN = keep(log_p_UN, (items_UK >= 0).repeat_interleave(tokens, 1), history_U, random)
        keep_UP = own_UN.gather(1, nth_UP.clamp_min(0)).where(nth_UP >= 0, 1.0)

        real_UL = torch.ones_like(a_UL, dtype=torch.bool)
        survive_UL = keep(log_keep(a_UL, real_UL, hide_related=hide_related), real_UL, ratio_U, random)
        return keep_UP, self.adapter(reference_ULD, survive_UL)

    def _shown(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Items whose pictures each prompt shows ``[U, K]`` (-1: none), and at each place which picture token it holds
        ``[U, P]`` (-1: none)."""
        tokens = self.prompts.picture_tokens
        places_UP = prompts.item_UP >= 0
        nth_UP = (places_UP.long().cumsum(1) - 1).masked_fill(~places_UP, -1)
        # As many pictures as any prompt may show: a row then does not depend on how long others are.
        items_UN = prompts.item_UP.new_full((len(nth_UP), self.prompts.history * tokens), -1)
        row, place = places_UP.nonzero(as_tuple=True)
        items_UN[row, nth_UP[row, place]] = prompts.item_UP[row, place]
        return items_UN[:, ::tokens], nth_UP

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
        compile: bool = False,
        references_UR: Tensor | None = None,
        ratio: float | None = None,
    ) -> Tensor:
        """Draw ``n`` pictures a user after references: codes int64 ``[U, n, L]``; see :meth:`JanusGenerator.sample`.

        Args:
            references_UR: catalogue items, used in turn; None: offered by the shelf, by each user's seed.
            ratio: share of the references that is hidden; None: as configured.
        """
        settings = SamplerSettings(
            guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, spread=spread, compile=compile
        )
        if references_UR is None:
            starts = [derived_seed(seed, "references") for seed in seeds]
            references_UR = self.shelf.offer(favourites_UK, max(1, min(n, self.reference.references)), starts)
        users, each = references_UR.shape
        prompts = self.prompts.build(
            np.asarray(favourites_UK).repeat(each, 0),
            references_U=references_UR.flatten(),
            hidden=self.reference.ratio if ratio is None else ratio,
        )
        own = [derived_seed(seed, "reference", str(nth)) for seed in seeds for nth in range(each)]
        with gathered(self):
            codes_VmL = sample_codes(self, prompts, -(-n // each), seeds=own, settings=settings).cpu()
        # Reference by reference, so that fewer pictures than asked of the last round leave out the last references.
        return codes_VmL.unflatten(0, (users, each)).transpose(1, 2).flatten(1, 2)[:, :n].contiguous()

    def likeliest(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        beams: int = 0,
        guidance: float = 1.0,
        without_UmL: Tensor | None = None,
    ) -> Tensor:
        """There are none: what is likely depends on a reference that is drawn for each picture.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "Pigeon draws each picture after a reference of its own, so there are no likeliest pictures to search for. "
            "Ask for random draws (likeliest=false, evaluate.beams=0), or align with another rl.method."
        )

    def save(self, folder: Path) -> None:
        """An ordinary Janus folder, and beside it what Pigeon adds."""
        super().save(folder)
        if rank() > 0:
            return
        parts = {"masks": self.masks, "adapter": self.adapter, "shelf": self.shelf}
        state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        state |= {"codes_IL": self.codes_IL, "features_IF": self.shelf.features_IF}
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "pigeon.safetensors")
        shelf = {"places": self.shelf.places, "copies": self.shelf.copies}
        write_json(folder / "pigeon.json", {"reference": asdict(self.reference), "shelf": shelf})

    @classmethod
    def read(cls, folder: Path, base: JanusGenerator) -> PigeonGenerator:
        """What :meth:`save` wrote, around the model of the same folder, in evaluation mode."""
        facts, state = read_json(folder / "pigeon.json"), load_file(folder / "pigeon.safetensors")
        shelf = Shelf(state["features_IF"], state["shelf.base_I"], **facts["shelf"])
        shelf.features_IF = state["features_IF"]
        made = cls(base, state["codes_IL"], shelf, ReferenceConfig(**facts["reference"]))
        for name, part in {"masks": made.masks, "adapter": made.adapter, "shelf": made.shelf}.items():
            part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        return made.requires_grad_(False).eval()
