"""attention_stats beside what people write for it: transformers' attention maps, kept and then summed up.

    OMP_NUM_THREADS=1 python tests/benchmarks/attention_stats.py --json

Two comparisons, float32, one thread, medians of the process's CPU time over rounds that take turns. *Maps*: WAAD, span
and FAI of random q and k, by the kernel and from the whole map. *Model*: the same of the middle layers of a Llama of
four, by a pass with hooks and the kernel, and by a pass with ``output_attentions=True``; with the peak of memory that
each adds in a process of its own. The ratios are the result, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama import LlamaConfig, LlamaModel

from couturier.components.alignment.credit import middle_layers, queries_and_keys
from couturier.kernels.attention_stats import attention_stats
from couturier.kernels.attention_stats.reference import attention_map
from couturier.kernels.timing import interleaved_ms, provenance

HEADS, WIDTH, LAYERS = 8, 64, 4
TOKENS = 2048
LENGTHS = (256, 1024, 2048)
IN_MODEL = 1024
SEED = 0

Call = Callable[[], object]


def of_maps(map_BHTT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """WAAD, span and FAI as the definition reads."""
    token = torch.arange(map_BHTT.shape[-1])
    apart_TT = token[:, None] - token
    read_TT = ((apart_TT >= 10) & (apart_TT <= 50)).float()
    waad, span = (map_BHTT * apart_TT.clamp(0, 10)).sum(-1), (map_BHTT * apart_TT.clamp_min(0)).sum(-1)
    return waad, span, (map_BHTT * read_TT).sum(2) / read_TT.sum(0).clamp_min(1)


def calls(length: int) -> dict[str, Call]:
    """From q and k ``[B, H, T, d]`` with ``B T = 2048``."""
    g = torch.Generator().manual_seed(SEED)
    q, k = (torch.randn(TOKENS // length, HEADS, length, WIDTH, generator=g) for _ in "qk")
    return {
        f"ours {length}": lambda: attention_stats(q, k),
        f"maps {length}": lambda: of_maps(attention_map(q, k, None, None, WIDTH**-0.5)),
    }


def model_calls(length: int) -> dict[str, Call]:
    """From a Llama that reads 2048 tokens in sequences of that length."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=HEADS * WIDTH, intermediate_size=3 * HEADS * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    torch.manual_seed(SEED)
    fused, eager = LlamaModel(config).eval(), LlamaModel(config).eval()
    eager.load_state_dict(fused.state_dict())
    eager.set_attn_implementation("eager")
    ids, layers = torch.randint(0, 1000, (TOKENS // length, length)), middle_layers(LAYERS, 5)

    @torch.no_grad()
    def ours() -> object:
        return [attention_stats(q, k) for q, k in queries_and_keys(fused, layers, lambda: fused(ids, use_cache=False))]

    @torch.no_grad()
    def maps() -> object:
        kept = eager(ids, use_cache=False, output_attentions=True).attentions
        return [of_maps(kept[layer]) for layer in layers]

    @torch.no_grad()
    def forward() -> object:
        return fused(ids, use_cache=False)

    return {"ours": ours, "maps": maps, "the pass alone": forward}


def added_mb(name: str) -> float:
    """What one call adds to the peak of resident memory of a fresh process, in MB."""
    command = [sys.executable, __file__, "--alone", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def alone(name: str) -> float:
    """In the process of its own: :func:`added_mb`. The memory is looked at every other millisecond."""
    torch.set_num_threads(1)
    call, done, seen = model_calls(IN_MODEL)[name], threading.Event(), [resident_mb()]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(seen) - seen[0]


def resident_mb() -> float:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20


def ratio(rounds: int = 7) -> dict[str, Any]:
    """Maps over ours at length 1024: ``{ratio, ours, other, unit}``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ms = interleaved_ms(calls(1024), rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    ours, other = ms["ours 1024"], ms["maps 1024"]
    return {"ratio": other / ours, "ours": ours, "other": other, "unit": "ms, L = 1024"}


def measure(rounds: int) -> dict[str, Any]:
    """All lengths: milliseconds, ratios, memory."""
    torch.set_num_threads(1)
    ms: dict[str, float] = {}
    for length in LENGTHS:
        ms |= interleaved_ms(calls(length), rounds=rounds)
    model = interleaved_ms(model_calls(IN_MODEL), rounds=rounds)
    return {
        "attention_stats_vs_maps": ms["maps 1024"] / ms["ours 1024"],
        "ms": ms,
        "model_ms": model,
        "model_added_mb": {name: added_mb(name) for name in model},
        "vs_maps": {length: ms[f"maps {length}"] / ms[f"ours {length}"] for length in LENGTHS},
        "model_vs_maps": model["maps"] / model["ours"],
        "shape": f"B T = {TOKENS}, H = {HEADS}, d = {WIDTH}, {LAYERS} layers, float32, one thread",
        "seed": SEED,
        "rounds": rounds,
        **provenance(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    if args.alone:
        sys.stdout.write(f"{alone(args.alone)}\n")
        return
    found = measure(args.rounds)
    for length in LENGTHS:
        sys.stdout.write(
            f"L = {length:5}: ours {found['ms'][f'ours {length}']:7.1f} ms, the map takes "
            f"{found['vs_maps'][length]:4.1f} times as long\n"
        )
    for name, ms in found["model_ms"].items():
        sys.stdout.write(f"in a model, {name:14}: {ms:7.1f} ms, {found['model_added_mb'][name]:5.0f} MB more\n")
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
