"""Runs training stages in children that it may kill: loaded once, forked for every run, one JSON line in, one out.

    {"name": "grpo-3", "method": "grpo", "place": "checkpoint", "at": 2}      SIGKILL at the second half-written one
    {"name": "grpo-3", "method": "grpo", "after_s": 0.31}                     SIGKILL after so many seconds
    {"name": "grpo-3", "method": "grpo"}                                      to the end

A fork starts in milliseconds where a new interpreter needs seconds, so that many kills fit into a test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from couturier.components.alignment import align, sft
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.dpo import DpoConfig
from couturier.components.alignment.scene import Scene
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.lineage import checkpoints

planted = importlib.import_module("alignment.conftest")
CONFIG: align.Config = planted.CONFIG
_SHORT = dataclasses.replace(CONFIG, distil=DistilConfig(steps=3, prompts=4, targets=2), checkpoint_every=2)
CONFIGS: dict[str, Any] = {
    "sft": sft.Config(
        threads=1,
        generator=GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=planted.HISTORY),
        grounding_steps=6,
        steps=8,
        batch=8,
        targets=2,
        valid_every=4,
        valid_windows=6,
        checkpoint_every=3,
    ),
    "grpo": dataclasses.replace(
        _SHORT, grpo=dataclasses.replace(CONFIG.grpo, steps=6, prompts=4, group=4, updates=2, lr=1e-3)
    ),
    "dpo": dataclasses.replace(
        _SHORT, method="dpo", dpo=DpoConfig(rounds=2, steps=3, batch=4, share=0.5, candidates=4, lr=1e-3)
    ),
}


def run_stage(root: Path, method: str, name: str) -> None:
    """The whole stage, then what it made, in ``digest.json``."""
    inputs = {"sequences": "sequences", "tokenise": "tokenise"} if method == "sft" else planted.INPUTS
    ctx = planted.context(root, name, CONFIGS[method], inputs)
    (sft.run if method == "sft" else align.run)(ctx)
    files = ("model/model.safetensors", "curves.parquet")
    digests = {file: hashlib.sha256((ctx.out / file).read_bytes()).hexdigest() for file in files}
    (ctx.out / "digest.json").write_text(json.dumps({"digests": digests, "facts": ctx.facts}, sort_keys=True))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trap(place: str, at: int) -> None:
    """Let this process die at the ``at``-th time it comes to that place."""
    left = [at]

    def arrives() -> bool:
        left[0] -= 1
        return left[0] == 0

    def before(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if arrives():
                die()
            return original(*args, **kwargs)

        setattr(owner, name, replaced)

    if place == "rollout":
        before(JanusGenerator, "embed_codes")
    elif place == "scoring":
        before(Scene, "wanted")
    elif place == "update":
        before(torch.optim.AdamW, "step")
    elif place == "backward":
        before(torch.Tensor, "backward")
    elif place == "rename":
        before(Path, "rename")
    elif place == "checkpoint":
        original = checkpoints.save_file

        def torn(tensors: Any, path: Path) -> None:
            original(tensors, path)
            if arrives():
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
                die()

        checkpoints.save_file = torn  # type: ignore[assignment]
    else:
        raise ValueError(f"unknown place {place!r}")


def child(root: Path, order: dict[str, Any]) -> int:
    """Fork, run, perhaps kill; the child's exit status (-9 when it was killed)."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        if "place" in order:
            trap(order["place"], order["at"])
        try:
            run_stage(root, order["method"], order["name"])
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a forked child must not go on as its parent
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    if "after_s" in order:
        time.sleep(order["after_s"])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        status = child(root, order)
        sys.stdout.write(json.dumps({"status": status, "seconds": time.monotonic() - began}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
