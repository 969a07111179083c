"""A GRPO step of ours beside one of TRL's GRPOTrainer: the same small Llama, prompts, group, tokens, reward and rate.

Text only, since TRL makes no pictures. Our side is the sampler, the packed log-probabilities, ``advantages`` and
``policy_loss`` that pictures are trained with; only the embedding and the head are those of words. Both sides make one
update a batch, without a KL term, and draw independent samples. The end-of-sequence token lies beyond the model's
vocabulary, so that every completion has all its tokens.

Legend: U prompts, n samples a prompt (the group), L tokens a sample, P prompt tokens, S = L - 1, D width.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from couturier.components.alignment.grpo import policy_loss
from couturier.components.alignment.rewards import advantages
from couturier.components.generator.decoding import Decoder, Prefix
from couturier.components.generator.packed import packed_hidden
from couturier.components.generator.sampler import SamplerSettings, sample_tokens
from couturier.components.runtime import global_seed, seeded, threads

from ..peers.environments import PeerUnavailable, cache_folder, environment

# A prompt and a completion are as long as the demo's history and picture.
VOCABULARY, PROMPTS, PROMPT_TOKENS, GROUP, LENGTH, WANTED, LR = 64, 8, 40, 8, 16, 8, 1e-3
WARM_UP = 3
_LIMIT_S = 900


def write_model(folder: Path, seed: int) -> list[str]:
    """A fresh Llama (width 128, 4 layers) and its tokenizer; the prompts, in words."""
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<eos>": VOCABULARY, "<pad>": VOCABULARY + 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=VOCABULARY,
        pad_token_id=None,
    )
    with global_seed(seed, "alignment", "llama"):
        LlamaForCausalLM(config).save_pretrained(folder)
    ids = torch.randint(VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=seeded(seed, "alignment", "prompts"))
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


class Ours:
    """Our step on the model of a folder."""

    def __init__(self, folder: Path, prompts: list[str], seed: int) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder)
        self.ids_UP = torch.tensor([[int(word[1:]) for word in prompt.split()] for prompt in prompts])
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        self.random = seeded(seed, "alignment", "rollouts")
        self.mask_UP = torch.ones_like(self.ids_UP, dtype=torch.bool)
        self.position_UP = torch.arange(PROMPT_TOKENS).expand(len(self.ids_UP), -1)

    def step(self) -> float:
        """Draw, reward, update; the mean reward."""
        tokens_UnL = self.sample()
        reward_Un = (tokens_UnL < WANTED).float().mean(-1)
        lp_UnL = self.log_prob(tokens_UnL)
        loss_UnL, _ = policy_loss(lp_UnL, lp_UnL.detach(), lp_UnL.detach(), advantages(reward_Un), kl=0.0)
        self.optimiser.zero_grad(set_to_none=True)
        loss_UnL.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return float(reward_Un.mean())

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Tokens ``[U, n, L]``."""
        embed = self.model.model.embed_tokens
        decoder = Decoder(lm=self.model.model, head=self.model.lm_head, embed=embed)
        prefix = Prefix(x_NPD=embed(self.ids_UP), mask_NP=self.mask_UP, position_NP=self.position_UP)
        seeds = torch.randint(2**62, (len(self.ids_UP),), generator=self.random).tolist()
        row_BU = torch.arange(len(self.ids_UP))[None]
        how = SamplerSettings(spread=False)
        return sample_tokens(decoder, prefix, row_BU, GROUP, length=LENGTH, seeds=seeds, settings=how)

    def log_prob(self, tokens_UnL: Tensor) -> Tensor:
        """Log-probability of every token ``[U, n, L]``: a prompt once, its samples behind it."""
        embed, mask_UP, position_UP = self.model.model.embed_tokens, self.mask_UP, self.position_UP
        own_UnSD = embed(tokens_UnL[:, :, :-1])
        last_UD, rest_UnSD = packed_hidden(self.model.model, embed(self.ids_UP), own_UnSD, mask_UP, position_UP)
        first_UnD = last_UD[:, None].expand(-1, GROUP, -1)
        logits = self.model.lm_head(torch.cat([first_UnD[:, :, None], rest_UnSD], 2))
        return -F.cross_entropy(logits.flatten(0, 2), tokens_UnL.flatten(), reduction="none").view(tokens_UnL.shape)


def run_ours(folder: Path, prompts: list[str], *, seed: int, steps: int, cores: int) -> dict[str, Any]:
    """As TRL's side writes it: ``rewards``, ``wall_s`` and ``cpu_s`` of each step but the first."""
    found: dict[str, Any] = {"rewards": [], "wall_s": [], "cpu_s": []}
    with threads(cores):
        ours = Ours(folder, prompts, seed)
        for step in range(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            found["rewards"].append(ours.step())
            if step:
                found["wall_s"].append(time.perf_counter() - wall)
                found["cpu_s"].append(time.process_time() - cpu)
    return found


def run_trl(python: Path, folder: Path, prompts: list[str], *, seed: int, steps: int, cores: int) -> dict[str, Any]:
    """TRL's side, in a process of its own.

    Raises:
        PeerUnavailable: it failed; the last line of its errors is in the message.
    """
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    words = {
        "model": folder,
        "prompts": folder / "prompts.json",
        "out": folder / "result.json",
        "steps": steps,
        "group": GROUP,
        "length": LENGTH,
        "lr": LR,
        "seed": seed,
        "wanted": WANTED,
        "threads": cores,
    }
    script = Path(__file__).with_name("trl_peer.py")
    command = [str(python), str(script), *(str(w) for name, value in words.items() for w in (f"--{name}", value))]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {name: str(cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeerUnavailable(f"trl: failed: {last[:300]}")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def ratio(
    say: Callable[[str], None], *, seeds: tuple[int, ...] = (0, 1, 2), steps: int = 40, cores: int = 2, install: bool
) -> dict[str, Any]:
    """``{ratio, ours, other, unit, …}``: seconds a step of both sides, in turns, and their reward curves. A figure is
    the median over the steps after the warm-up and over seeds.

    Raises:
        PeerUnavailable: TRL's environment is not there and may not be made, or it failed.
    """
    python = environment("trl", cache_folder(), install=install)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "other": []}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            prompts = write_model(Path(folder), seed)
            how: dict[str, Any] = {"seed": seed, "steps": steps, "cores": cores}
            runs["other"].append(run_trl(python, Path(folder), prompts, **how))
            runs["ours"].append(run_ours(Path(folder), prompts, **how))
        say(
            f"  seed {seed}: "
            + ", ".join(f"{name} {_median(all_[-1:], 'wall_s'):.3f} s" for name, all_ in runs.items())
        )
    found = {
        "ratio": _median(runs["other"], "wall_s") / _median(runs["ours"], "wall_s"),
        "ours": _median(runs["ours"], "wall_s"),
        "other": _median(runs["other"], "wall_s"),
        "unit": "seconds a step",
        "ratio_cpu": _median(runs["other"], "cpu_s") / _median(runs["ours"], "cpu_s"),
        "trl": runs["other"][0]["trl"],
        "threads": cores,
        "shape": f"{PROMPTS} prompts of {PROMPT_TOKENS} x {GROUP} of {LENGTH} tokens, Llama of 4 layers, width 128",
    }
    return found | curves(runs)


def curves(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Reward curves of both sides in tenths of the run, mean over seeds, and the largest gap in standard errors of the
    difference (spread over seeds, pooled over the tenths)."""
    tenths = {
        name: torch.tensor([one["rewards"] for one in all_], dtype=torch.float64).unflatten(1, (10, -1)).mean(2)
        for name, all_ in runs.items()
    }
    gap_T = tenths["ours"].mean(0) - tenths["other"].mean(0)
    spread = torch.stack([one.var(0, correction=1) for one in tenths.values()]).sum(0).mean() / len(runs["ours"])
    return {
        "rewards_ours": [round(float(x), 4) for x in tenths["ours"].mean(0)],
        "rewards_other": [round(float(x), 4) for x in tenths["other"].mean(0)],
        "largest_gap": round(float(gap_T.abs().max()), 4),
        "largest_gap_in_standard_errors": round(float(gap_T.abs().max()) / math.sqrt(float(spread) + 1e-12), 2),
        "seeds": len(runs["ours"]),
        "steps": len(runs["ours"][0]["rewards"]),
    }


def _median(runs: list[dict[str, Any]], figure: str) -> float:
    return statistics.median(value for one in runs for value in one[figure][WARM_UP - 1 :])
