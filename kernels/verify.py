"""Checks and times every operator of ``kernels/`` on this machine, and writes one table.

    python -m couturier.kernels.verify                 what this machine has: a GPU, or the CPU form
    python -m couturier.kernels.verify --out table.md  also as a file
    python -m couturier.kernels.verify --json          the last line is one JSON object

Each operator is compared with its definition in float64 (forward and every gradient), run twice (a moving bit is a
race), and timed beside what people write without it, SDPA, ``torch.compile`` of the PyTorch path and, where installed,
flash-linear-attention. Two ceilings of the machine (copy, matrix product) give the floor: the time that moving the
bytes or computing the products must take. Exit status 1 if a result is beyond its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.timing import cuda_ms, forward_backward, interleaved_ms, provenance
from couturier.kernels.verify_cases import Case, Maker, cases

# |x - reference| / |reference|
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NO_GPU = (
    "No GPU here: this is the CPU form (PyTorch path against the definition, one thread); the Triton path did not run."
)


def error(got: Tensor, wanted: Tensor) -> float:
    """``|got - wanted| / |wanted|``; NaN if anything is NaN.

    Example:
        >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    wanted = wanted.detach().double().cpu()
    return float((got.detach().double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def _outputs(call: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a fixed weighting of it."""
    out = call()
    if not leaves:
        return [out]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weight)]


def check(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every operator at small sizes against float64."""
    make = Maker(device=device, dtype=dtype, rounded=dtype, large=False)
    exact = Maker(device="cpu", dtype=torch.float64, rounded=dtype, large=False)
    return [check_case(case, wanted, dtype) for case, wanted in zip(cases(make), cases(exact), strict=True)]


def check_case(case: Case, wanted: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of one operator against the reference of the same case in float64; whether two runs agree to the bit."""
    got, again = _outputs(case.call, case.leaves), _outputs(case.call, case.leaves)
    reference = _outputs(wanted.reference, wanted.leaves)
    errors = [error(one, want) for one, want in zip(got, reference, strict=True)]
    return {
        "op": case.op,
        "dtype": str(dtype).removeprefix("torch."),
        "error_forward": errors[0],
        "error_gradients": max(errors[1:]) if errors[1:] else None,
        "limit": LIMITS[dtype],
        "passed": all(one < LIMITS[dtype] for one in errors),
        "repeats": all(torch.equal(one, two) for one, two in zip(got, again, strict=True)),
    }


def ceilings(device: str) -> dict[str, float]:
    """What the machine can do at most: bytes a second of a copy (read + written), FLOP a second of a product."""
    on_gpu = device != "cpu"
    source = torch.ones(1 << (29 if on_gpu else 24), device=device)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    left = torch.randn(n, n, device=device).to(dtype)
    ms = _times({"copy": lambda: target.copy_(source), "product": lambda: left @ left}, device, rounds=9)
    return {
        "copy_bytes_per_s": 2e3 * source.numel() * source.element_size() / ms["copy"],
        "product_flop_per_s": 2e3 * n**3 / ms["product"],
    }


def _times(calls: dict[str, Callable[[], object]], device: str, *, rounds: int) -> dict[str, float]:
    if device == "cpu":
        return interleaved_ms(calls, rounds=rounds)
    return {name: cuda_ms(call) for name, call in calls.items()}


def _compiled(case: Case) -> Callable[[], Tensor]:
    compiled = torch.compile(case.call)

    def run() -> Tensor:
        with dispatch.use("torch"):
            return compiled()

    return run


def time_case(case: Case, device: str, ceiling: dict[str, float], *, rounds: int) -> dict[str, Any]:
    """Milliseconds of an operator, of what stands in its place, and the share of the floor that it reaches."""
    calls: dict[str, Callable[[], Tensor]] = {"ours": case.call, "naive": case.naive, **case.peers}
    if device != "cpu":
        calls["torch.compile"] = _compiled(case)
    timed: dict[str, float] = {}
    failed: dict[str, str] = {}
    every: dict[str, list[Callable[[], object]]] = {name: [call] for name, call in calls.items()}
    if case.leaves:
        every = {name: [call, forward_backward(call, case.leaves)] for name, call in calls.items()}
    for name, variants in list(every.items()):
        try:
            for call in variants:
                call()
        # Out of memory, or a peer that cannot do this: its absence is part of the table.
        except (RuntimeError, TypeError, ValueError, AssertionError) as why:
            if name == "ours":
                raise
            failed[name] = f"{type(why).__name__}: {why}".splitlines()[0][:120]
            del every[name]
    for variant, word in enumerate(("forward", "both")):
        some = {f"{name} {word}": variants[variant] for name, variants in every.items() if len(variants) > variant}
        timed |= _times(some, device, rounds=rounds)
    floor = 1e3 * max(case.bytes_moved / ceiling["copy_bytes_per_s"], case.flops / ceiling["product_flop_per_s"])
    whole = "both" if case.leaves else "forward"
    peers = {name: timed[f"{name} {whole}"] for name in every if name not in ("ours", "naive")}
    return {
        "op": case.op,
        "shape": case.shape,
        "forward_ms": timed["ours forward"],
        "both_ms": timed.get("ours both"),
        "naive_ms": timed.get(f"naive {whole}"),
        "vs_naive": timed[f"naive {whole}"] / timed[f"ours {whole}"] if "naive" in every else None,
        "peers_vs_ours": {name: ms / timed[f"ours {whole}"] for name, ms in peers.items()},
        "failed": failed,
        "floor_ms": floor,
        "fraction_of_floor": floor / timed["ours forward"],
    }


def verify(*, rounds: int = 5, ops: Sequence[str] = ()) -> dict[str, Any]:
    """Run everything on what this machine has.

    Args:
        rounds: of timing, on the CPU.
        ops: only operators whose name contains one of these; all if empty.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    # By name, so that a GPU without triton says so and does not pass with another path.
    forced = dispatch.use("triton") if device == "cuda" else contextlib.nullcontext()
    try:
        with forced:
            return _verify(device, rounds, ops)
    finally:
        torch.set_num_threads(threads)


def _verify(device: str, rounds: int, ops: Sequence[str]) -> dict[str, Any]:
    checks = [one for dtype in LIMITS for one in check(device, dtype) if _named(one["op"], ops)]
    ceiling = ceilings(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    large = cases(Maker(device=device, dtype=dtype, rounded=dtype, large=True))
    timings = [time_case(case, device, ceiling, rounds=rounds) for case in large if _named(case.op, ops)]
    return {
        "device": device,
        "note": "" if device != "cpu" else NO_GPU,
        "passed": all(one["passed"] for one in checks),
        "ceilings": ceiling,
        "checks": checks,
        "timings": timings,
        **provenance(),
    }


def _named(op: str, ops: Sequence[str]) -> bool:
    return not ops or any(name in op for name in ops)


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Kernels, checked and timed",
        "",
        f"`python -m couturier.kernels.verify`, {found['date']}, {found['machine']}, torch {found['torch']}, "
        f"commit {found['commit']}. {found['note']}".rstrip(),
        "",
        f"Ceilings measured in the same run: copy {found['ceilings']['copy_bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"matrix product {found['ceilings']['product_flop_per_s'] / 1e9:,.0f} GFLOP/s.",
        "",
        "| operator | dtype | error forward | error gradients | limit | passed | two runs agree to the bit |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["checks"]:
        gradients = "none" if one["error_gradients"] is None else f"{one['error_gradients']:.1e}"
        lines.append(
            f"| {one['op']} | {one['dtype']} | {one['error_forward']:.1e} | {gradients} | {one['limit']:.0e} | "
            f"{'yes' if one['passed'] else '**no**'} | {'yes' if one['repeats'] else 'no'} |"
        )
    lines += [
        "",
        "Times in ms; a ratio above 1 says how many times as long the other takes, forward and backward where there is "
        "a backward. Floor: the least time for the bytes and products of the forward.",
        "",
        "| operator | shape | forward | forward and backward | naive, ratio | others, ratio | share of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["timings"]:
        both = "" if one["both_ms"] is None else f"{one['both_ms']:.2f}"
        naive = "out of memory" if one["vs_naive"] is None else f"{one['vs_naive']:.1f}"
        others = [f"{name} {ratio:.1f}" for name, ratio in one["peers_vs_ours"].items()]
        others += [f"{name} failed" for name in one["failed"] if name != "naive"]
        lines.append(
            f"| {one['op']} | {one['shape']} | {one['forward_ms']:.2f} | {both} | {naive} | {', '.join(others)} | "
            f"{one['fraction_of_floor']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m couturier.kernels.verify",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    parser.add_argument("--op", action="append", default=[], help="only operators whose name contains this; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing on the CPU (default 5)")
    args = parser.parse_args(words)
    names = [case.op for case in cases(Maker(device="cpu", dtype=torch.float32, rounded=torch.float32, large=False))]
    if not any(_named(name, args.op) for name in names):
        parser.error(f"no operator is called {' or '.join(args.op)}; there are {', '.join(names)}")
    found = verify(rounds=args.rounds, ops=args.op)
    text = table(found)
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
