"""Train the judge's eyes: the picture encoder learns to read the catalogue's attributes off degraded pictures.

Letters: I items, A views, P picture width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue
from couturier.components.interest.encoder import (
    AttributeHeads,
    EncoderConfig,
    TileEncoder,
    attribute_targets,
    embedded_views,
    encoder_step,
    pictures_of,
)
from couturier.components.interest.loop import one_cycle
from couturier.components.lineage.checkpoints import (
    Checkpoints,
    load_module,
    load_optimiser,
    module_tensors,
    optimiser_tensors,
)
from couturier.components.lineage.stages import Progress
from couturier.components.runtime import global_seed, seeded


class EyesFit:
    """Fits a ``TileEncoder`` on a catalogue; goes on where a killed fit stopped, to the same bits."""

    def __init__(
        self,
        catalogue: Catalogue,
        config: EncoderConfig,
        *,
        seed: int,
        checkpoints: Checkpoints,
        checkpoint_every: int,
        log: Callable[[Mapping[str, float], int], None],
    ) -> None:
        self.config, self.seed, self.log = config, seed, log
        self.checkpoints, self.checkpoint_every = checkpoints, checkpoint_every
        self.rgb_I3HW = pictures_of(catalogue)
        self.targets = attribute_targets(catalogue, config)
        with global_seed(seed, "judge", "encoder"):
            self.encoder = TileEncoder(config)
            self.heads = AttributeHeads(config.width, self.targets)
        trained = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.step, self.curves = 0, list[tuple[int, str, float]]()
        self._resume()

    def run(self, progress: Progress) -> TileEncoder:
        """Train to the end; the encoder, frozen.

        Raises:
            TrainingError: a loss that is no number.
        """
        while self.step < self.config.steps:
            one_cycle(self.optimiser, self.step, self.config.steps, self.config.learning_rate)
            random = seeded(self.seed, "judge", "eyes", str(self.step))
            loss = encoder_step(self.encoder.train(), self.heads, self.rgb_I3HW, self.targets, random)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            value = float(loss.detach())
            if self.step % 10 == 0:
                self.curves.append((self.step, "encoder_loss", value))
                self.log({"encoder_loss": value}, self.step)
            self.step += 1
            if self.step % self.checkpoint_every == 0 or self.step == self.config.steps:
                self._save()
            progress.advance(note=f"eyes {value:.2f}")
        return self.encoder.eval().requires_grad_(False)

    def views(self, count: int) -> Tensor:
        """What the eyes see of each item, clean (view 0) and degraded: ``[I, A, P]``."""
        return embedded_views(self.encoder, self.rgb_I3HW, count, seeded(self.seed, "judge", "views"))

    def accuracy(self, pictures_IP: Tensor) -> dict[str, float]:
        """Share of clean pictures whose attribute is read right, by attribute."""
        seen = self.heads.accuracy(pictures_IP, self.targets)
        return {f"reads {name.removeprefix('attribute ')}": value for name, value in seen.items()}

    def _save(self) -> None:
        tensors, facts = optimiser_tensors("optimiser", self.optimiser)
        tensors |= module_tensors("encoder", self.encoder) | module_tensors("heads", self.heads)
        self.checkpoints.save(self.step, tensors, {"optimiser": facts, "curves": self.curves})

    def _resume(self) -> None:
        saved = self.checkpoints.newest()
        if saved is None:
            return
        self.step, self.curves = saved.step, [tuple(row) for row in saved.facts["curves"]]
        load_module("encoder", self.encoder, saved.tensors)
        load_module("heads", self.heads, saved.tensors)
        load_optimiser("optimiser", self.optimiser, saved.tensors, saved.facts["optimiser"])
