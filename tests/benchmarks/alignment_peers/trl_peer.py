"""TRL's GRPOTrainer on a folder's model, run in TRL's own environment; knows nothing of this repository.

    python trl_peer.py --model FOLDER --prompts prompts.json --steps 40 --group 8 --length 16 --lr 0.001 --seed 0
        --wanted 8 --threads 2 --out result.json

The reward of a completion is the share of its tokens whose id is below ``--wanted``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl  # type: ignore[import-not-found]
from datasets import Dataset  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Wall and CPU time at the end of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.seen.append((time.perf_counter(), time.process_time()))


def main() -> None:
    """Train, and write what was seen."""
    parser = argparse.ArgumentParser()
    for name in ("model", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("steps", "group", "length", "seed", "wanted", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))
    rewards: list[float] = []

    def wanted_share(completion_ids: list[list[int]], **rest: Any) -> list[float]:
        shares = [sum(token < given.wanted for token in ids) / given.length for ids in completion_ids]
        if any(len(ids) != given.length for ids in completion_ids):
            raise SystemExit("a completion ended early; the two sides would not draw as many tokens")
        rewards.append(sum(shares) / len(shares))
        return shares

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(prompts) * given.group,
            gradient_accumulation_steps=1,
            num_generations=given.group,
            max_completion_length=given.length,
            temperature=1.0,
            beta=0.0,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=given.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_steps=given.steps,
            num_train_epochs=given.steps,
            seed=given.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_steps=given.steps,
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(given.model),
            processing_class=AutoTokenizer.from_pretrained(given.model),
            reward_funcs=wanted_share,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            callbacks=[clock],
        )
        trainer.train()
    facts = {"trl": trl.__version__, "rewards": rewards, "wall_s": [], "cpu_s": []}
    for before, after in zip(clock.seen[:-1], clock.seen[1:], strict=True):
        facts["wall_s"].append(after[0] - before[0])
        facts["cpu_s"].append(after[1] - before[1])
    given.out.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
