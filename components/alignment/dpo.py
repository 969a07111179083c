"""Direct preference optimisation on the model's own ranked pictures, over several rounds (OneRec's iterative
preference alignment, arXiv 2502.18965; DPO: Rafailov et al., arXiv 2305.18290).

    round: windows ─▶ candidates of the present policy ─▶ reward ─▶ (best, worst) of each window, and how likely
                                                                     both were under the policy of this moment
    step:  imitation loss of a batch  +  weight * DPO loss of the few pairs that belong to it

In OneRec only one sample in a hundred gets pairs, for most of the gain at a fraction of the cost of drawing
candidates; ``share`` is that setting, and ``tests/benchmarks/alignment.py`` repeats the experiment. What is ours: the
imitated distribution stands where OneRec has its next-token loss, and a pair whose rewards hardly differ is left out.

Legend: U windows, n candidates, L codes a picture, P pairs of a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.alignment.imitation import Imitator
from couturier.components.alignment.loop import Step
from couturier.components.alignment.rewards import score
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.watch import Watch
from couturier.components.errors import ConfigError
from couturier.components.together import mean_over, share


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """How preferences are made and learned."""

    rounds: int = 2
    """Each begins with new candidates of the policy as it then is."""
    steps: int = 20
    """Updates a round."""
    batch: int = 32
    """Windows a step that are imitated."""
    share: float = 0.25
    """Of a step's windows that get a pair too. OneRec: 0.01."""
    candidates: int = 16
    """Drawn for every window with a pair."""
    temperature: float = 1.0
    beta: float = 0.1
    """How strongly the policy is held to where the round began."""
    weight: float = 1.0
    """Of the DPO loss beside the imitation loss."""
    margin: float = 0.1
    """Least difference of reward between best and worst; below it the pair says nothing and is left out."""
    lr: float = 3e-4
    warm_up_steps: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"rl.dpo.share is {self.share}; it is a share of windows, above 0 and at most 1.")
        for name, least in (("rounds", 1), ("steps", 0), ("batch", 1), ("candidates", 2)):
            if vars(self)[name] < least:
                raise ConfigError(f"rl.dpo.{name} is {vars(self)[name]}; it must be at least {least}.")

    @property
    def pairs(self) -> int:
        """Of a step that has any."""
        return max(1, round(self.share * self.batch))

    @property
    def every(self) -> int:
        """Steps between two that have pairs: more than 1 only where a step would have less than one pair."""
        return max(1, round(self.pairs / (self.share * self.batch)))


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))`` of each pair.

    Args:
        chosen, rejected: log-probability of the whole picture (summed over its codes) under the policy, any shape.
        ref_chosen, ref_rejected: the same under the reference, without gradient.

    Example:
        >>> round(float(dpo_loss(*torch.tensor([-1.0, -2.0, -1.0, -2.0]), beta=0.1)), 4)
        0.6931
    """
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def best_and_worst(reward_Un: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Places ``[U, 2]`` of the best and the worst candidate, and whether they differ by ``margin``, bool ``[U]``.

    Example:
        >>> best_and_worst(torch.tensor([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5]]), 0.1)
        (tensor([[1, 0],
                [0, 0]]), tensor([ True, False]))
    """
    high, low = reward_Un.max(1), reward_Un.min(1)
    return torch.stack([high.indices, low.indices], 1), high.values - low.values >= margin


class Dpo:
    """A phase of the loop: all rounds."""

    name = "dpo"
    fresh = True
    log_every = 1
    weight_decay = 0.0
    advice = "lower rl.dpo.lr"

    def __init__(self, scene: Scene, config: DpoConfig, imitator: Imitator, watch: Watch, *, look_every: int) -> None:
        self.scene, self.config, self.imitator, self.watch = scene, config, imitator, watch
        self.steps, self.look_every = config.rounds * config.steps, look_every
        self.pairs: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Candidates are drawn at the first step of each round."""

    def take(self, at: int) -> Step:
        """One update; the first of a round draws its candidates."""
        config, scene = self.config, self.scene
        within = at % config.steps
        drawn: dict[str, float] = {}
        pictures = 0
        if within == 0:
            drawn, pictures = self._draw()
        made = self.imitator.loss(config.batch)
        loss, values, tokens = made.loss, {"distil_nats": made.nats, **drawn}, made.tokens
        if within % config.every == 0:
            size = config.pairs
            first = within // config.every * size
            own = torch.arange(size)[share(size)] + first
            preference, more, read = self._preference(own)
            loss, values, tokens = loss + config.weight * preference, values | more, tokens + read
        return Step(
            loss=loss,
            rate=config.lr * min(1.0, (at + 1) / max(1, config.warm_up_steps)),
            windows=made.windows,
            values=values,
            note=f"{made.nats:.2f} nats",
            tokens=tokens,
            drawn=pictures * scene.codes_IL.shape[1],
            pictures=pictures,
        )

    def _draw(self) -> tuple[dict[str, float], int]:
        """Pairs of a round from the policy of this moment, which is the reference that they are held to."""
        config, scene = self.config, self.scene
        count = config.pairs * -(-config.steps // config.every)
        rows, _ = scene.sampler.draw(count)
        seeds = torch.randint(2**62, (count,), generator=scene.random).tolist()
        # Every process draws all pairs: which of them a step reads is decided later.
        policy = scene.janus.eval()
        parts, rewards, seen = [], [], []
        for start in range(0, count, config.batch):
            some = slice(start, start + config.batch)
            codes_UnL = policy.sample(
                scene.history(rows[some]), config.candidates, seeds=seeds[some], temperature=config.temperature
            )
            rollout = scene.rollout(rows[some], codes_UnL)
            reward_Un, terms = score(rollout, scene.weights)
            parts.append(codes_UnL)
            rewards.append(reward_Un)
            seen.append(scene.describe(rollout, reward_Un, terms))
        codes_PnL, reward_Pn = torch.cat(parts), torch.cat(rewards)
        place_P2, telling_P = best_and_worst(reward_Pn, config.margin)
        pair_P2L = codes_PnL.gather(1, place_P2[..., None].expand(-1, -1, codes_PnL.shape[-1]))
        with torch.no_grad():
            reference = [
                policy.log_prob(
                    policy.prompts.build(scene.history(rows[i : i + config.batch])), pair_P2L[i : i + config.batch]
                ).sum(-1)
                for i in range(0, count, config.batch)
            ]
        self.pairs = {
            "rows": torch.from_numpy(rows),
            "codes_P2L": pair_P2L,
            "reference_P2": torch.cat(reference),
            "telling_P": telling_P,
        }
        mean = {name: sum(each[name] for each in seen) / len(seen) for name in seen[0]}
        gap = (reward_Pn.amax(1) - reward_Pn.amin(1)).mean()
        values = {**mean, "pair_gap": float(gap), "pairs_kept": float(telling_P.float().mean())}
        return values, count * config.candidates

    def _preference(self, some: Tensor) -> tuple[Tensor, dict[str, float], int]:
        """DPO loss of some pairs of the round, its figures, and the tokens read."""
        policy, pairs = self.scene.janus, self.pairs
        codes_P2L, kept_P = pairs["codes_P2L"][some], pairs["telling_P"][some].float()
        prompts = policy.prompts.build(self.scene.history(pairs["rows"][some].numpy()))
        lp_P2 = policy.log_prob(prompts, codes_P2L).sum(-1)
        reference_P2 = pairs["reference_P2"][some]
        each_P = dpo_loss(lp_P2[:, 0], lp_P2[:, 1], reference_P2[:, 0], reference_P2[:, 1], self.config.beta)
        gain_P2 = (lp_P2 - reference_P2).detach()
        loss = mean_over((each_P * kept_P).sum(), kept_P.sum())
        count = kept_P.sum().clamp_min(1)
        values = {
            "dpo": float((each_P.detach() * kept_P).sum() / count),
            "dpo_margin": float(((gain_P2[:, 0] - gain_P2[:, 1]) * kept_P).sum() / count),
            "dpo_chosen_gain": float((gain_P2[:, 0] * kept_P).sum() / count),
        }
        return loss, values, prompts.ids_UP.numel() + codes_P2L.numel()

    def look(self) -> dict[str, float]:
        """What an encoder outside the reward sees."""
        return self.watch.look(self.scene.janus.eval())

    def state(self) -> dict[str, Tensor]:
        """The pairs of the round."""
        return self.pairs

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.pairs = dict(state)
