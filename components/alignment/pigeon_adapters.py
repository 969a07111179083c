"""A Pigeon generator that learns through low-rank adapters: the policy's and, frozen, the reference policy's.

Two named LoRA adapters (Hu et al., arXiv 2106.09685, through peft) over one frozen model, on the query and value
projections as in Pigeon's released code (generation.md 2.5, 2.6). What is saved is an ordinary model, with the policy's
adapter added to its weights.

Legend: D width, I items, L codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from couturier.components.errors import ConfigError, MissingExtraError
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.pigeon import PigeonGenerator, ReferenceConfig
from couturier.components.generator.published import given
from couturier.components.generator.shelf import Shelf
from couturier.components.runtime import global_seed
from couturier.components.together import in_shares

POLICY, REFERENCE = "policy", "reference"
_TARGETS = r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Of both adapters."""

    rank: int = 8
    """The published number."""
    alpha: int = 16
    """The published number: an adapter adds ``alpha / rank * B A``."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rl.pigeon.lora.rank is {self.rank}; it must be at least 1.")


class AdaptedGenerator(PigeonGenerator):
    """Learns through the policy's adapter, the mask generator and the reference adapter; all else is frozen.

    Published adapters drop 5 % of their inputs. Not here: torch draws that from a global generator, and a run killed
    at any instant could not go on to the same bits.

    Args:
        base: taken over; its projections are wrapped in place.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: the base has adapters already, or is kept in shares.
    """

    def __init__(
        self,
        base: JanusGenerator,
        codes_IL: Tensor,
        shelf: Shelf,
        config: ReferenceConfig,
        lora: LoraSettings,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(base, codes_IL, shelf, config, seed=seed)
        if any(in_shares(value) for value in base.parameters()):
            raise ConfigError("rl.method=pigeon needs each process to hold the whole model. Set rl.strategy=ddp.")
        if base.source.lora_rank:
            raise ConfigError(
                "rl.method=pigeon lays its own adapters over a whole model, and sft saved adapters alone. Set "
                "sft.generator.lora_save=merged."
            )
        try:
            from peft import LoraConfig, LoraModel
            from peft.tuners.lora import Linear
        except ModuleNotFoundError as error:
            raise MissingExtraError("peft", extra="train", needed_for="rl.method=pigeon") from error
        self.model.requires_grad_(False)
        self.shelf.requires_grad_(False)
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_TARGETS, lora_dropout=0.0)
        with global_seed(seed, "adapters"):
            both = LoraModel(self.model, {POLICY: settings, REFERENCE: settings}, POLICY)
            both.inject_adapter(self.model, REFERENCE)
        self._layers: dict[str, Linear] = {
            name: module for name, module in self.model.named_modules() if isinstance(module, Linear)
        }
        self.copy_policy()
        self.use(POLICY)

    def use(self, adapter: str) -> None:
        """Read and draw with this adapter; only the policy's ever learns."""
        for layer in self._layers.values():
            layer.set_adapter(adapter)
        for layer in self._layers.values():
            for name in (POLICY, REFERENCE):
                for side in (layer.lora_A[name], layer.lora_B[name]):
                    side.requires_grad_(name == POLICY)

    @torch.no_grad()
    def copy_policy(self) -> None:
        """The reference policy becomes what the policy is now."""
        for layer in self._layers.values():
            for sides in (layer.lora_A, layer.lora_B):
                sides[REFERENCE].load_state_dict(sides[POLICY].state_dict())

    def learn(self, *, masks: bool) -> None:
        """Whether the mask generator and the reference adapter learn beside the policy's adapter."""
        for part in (self.masks, self.adapter):
            part.requires_grad_(masks)

    def given(self) -> frozenset[str]:
        """The frozen model: every run takes it from the fine-tuned one."""
        return given(self, "model.")

    def parameters_to_train(self) -> list[nn.Parameter]:
        """Of the policy's adapter, the mask generator and the reference adapter."""
        low_rank = [
            value
            for layer in self._layers.values()
            for side in (layer.lora_A[POLICY], layer.lora_B[POLICY])
            for value in side.parameters()
        ]
        return [*low_rank, *self.masks.parameters(), *self.adapter.parameters()]

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The model's weights with the policy's adapter added, by their published names."""
        state = {key: value for key, value in self.model.state_dict().items() if ".lora_" not in key}
        for name, layer in self._layers.items():
            own = f"{name}.base_layer.weight"
            state[f"{name}.weight"] = state.pop(own) + layer.get_delta_weight(POLICY)
        return {key.replace(".base_layer.", "."): value for key, value in state.items()}
