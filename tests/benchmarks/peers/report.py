"""The comparison as Markdown tables, a plot and the ``quality`` part of the JSON line.

Each form of each data set is a table, best first. ``vs best peer`` is the paired difference over users to the best row
that is not ours, with its 95 % interval: better where the lower end is above zero, worse where the upper is below.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from couturier.components.evaluation.statistics import Interval
from couturier.components.files import write_json

from . import evaluator
from .runner import Row, aim
from .split import Split

OURS = "ours/"
_HEADS = {"hit@10": "Hit@10", "ndcg@10": "NDCG@10", "mrr@10": "MRR@10", "gauc": "gAUC", "auc": "AUC"}


def facts(options: argparse.Namespace, splits: list[Split], wall_s: float) -> dict[str, Any]:
    """What the figures were measured on and with."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, no GPU",
        "commit": done.stdout.strip() or "none",
        "seeds": "0" if options.quick else ", ".join(str(seed) for seed in range(options.seeds)),
        "budget": 1 if options.quick else options.budget,
        "quick": options.quick,
        "threads": options.threads,
        "splits": {split.name: split.hash for split in splits},
        "wall_s": wall_s,
    }


def best_peer(rows: list[Row]) -> Row | None:
    """The best row that is not ours, by the form's own metric."""
    peers = [row for row in rows if not row.title.startswith(OURS)]
    return max(peers, key=main_figure, default=None)


def main_figure(row: Row) -> float:
    return float(row.metrics.values[_aim(row)].mean())


def _aim(row: Row) -> str:
    return aim(row.form.rpartition("/")[2])


def by_form(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each form, best first."""
    forms: dict[str, list[Row]] = {}
    for row in rows:
        forms.setdefault(row.form, []).append(row)
    return {form: sorted(found, key=main_figure, reverse=True) for form, found in forms.items()}


def tables(rows: list[Row], ratios: dict[str, Any], about: dict[str, Any]) -> str:
    """All of it as Markdown."""
    lines = [
        f"# Judges and peers, {about['date']}",
        "",
        f"{about['machine']}; {about['threads']} threads; commit {about['commit']}; seeds {about['seeds']}; "
        f"up to {about['budget']} settings tried for each model; splits "
        + ", ".join(f"{name} {digest}" for name, digest in about["splits"].items())
        + (". **Quick run: one setting, few epochs, no result to quote.**" if about["quick"] else "."),
        "",
        "Means over users with 95 % bootstrap intervals; seeds are averaged for each user first. Seconds are the "
        "processor's, all threads together, since the machine may have had other work.",
    ]
    for form, found in by_form(rows).items():
        lines += ["", f"## {form}", "", *_table(found)]
    if ratios:
        lines += ["", "## Speed, both sides in this run", "", "| what | ours | other | ratio |", "|---|---|---|---|"]
        for name, one in ratios.items():
            lines.append(f"| {name}: {one['unit']} | {one['ours']:.4g} | {one['other']:.4g} | {one['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    metrics = list(rows[0].metrics.values)
    extra = [name for name in ("auc", "logloss") if any(name in row.figures for row in rows)]
    heads = [*(_HEADS[name] for name in metrics), *(_HEADS.get(name, name) for name in extra)]
    heads += ["vs best peer", "fit CPU s", "predict CPU s", "peak MB", "tried", "seeds"]
    best = best_peer(rows)
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        found = evaluator.intervals(row.metrics)
        cells = [_cell(found[name]) for name in metrics]
        cells += [f"{row.figures[name]:.4f}" if name in row.figures else "" for name in extra]
        cells.append(_against(row, best))
        cells += [f"{row.cost[name]:.1f}" for name in ("cpu_fit_s", "cpu_predict_s")]
        cells.append(f"{row.cost['peak_bytes'] / 1e6:.0f}")
        lines.append(f"| {row.title} | " + " | ".join([*cells, str(row.tried), str(row.seeds)]) + " |")
    return lines


def _cell(value: Interval) -> str:
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"


def _against(row: Row, best: Row | None) -> str:
    if best is None or row is best:
        return ""
    gap = evaluator.difference(row.metrics, best.metrics, _aim(row))
    return f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def quality(rows: list[Row]) -> dict[str, Any]:
    """For each form: every model's means, the best of ours, the best peer, and the paired difference of the two."""
    out: dict[str, Any] = {}
    for form, found in by_form(rows).items():
        models = {
            row.title: {name: round(float(values.mean()), 5) for name, values in row.metrics.values.items()}
            | {name: round(value, 5) for name, value in row.figures.items()}
            for row in found
        }
        out[form] = {"models": models}
        ours = next((row for row in found if row.title.startswith(OURS)), None)
        peer = best_peer(found)
        if ours and peer:
            gap = evaluator.difference(ours.metrics, peer.metrics, _aim(ours))
            out[form] |= {
                "best_ours": ours.title,
                "best_peer": peer.title,
                "difference": [round(value, 5) for value in gap.as_list()],
            }
    return out


def write(rows: list[Row], ratios: dict[str, Any], about: dict[str, Any], folder: Path) -> list[Path]:
    """``judges.md``, ``judges.json`` and ``judges.png`` (``judges-quick.*`` for a quick run) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "judges-quick" if about["quick"] else "judges"
    text, picture, numbers = (folder / f"{stem}.{kind}" for kind in ("md", "png", "json"))
    _plot(rows, about, picture)
    shown = f"\n![{stem}]({picture.name})\n" if picture.is_file() else ""
    text.write_text(tables(rows, ratios, about) + shown, encoding="utf-8")
    write_json(numbers, {"about": about, "ratios": ratios, "quality": quality(rows)})
    return [path for path in (text, picture, numbers) if path.is_file()]


def _plot(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """One panel a form with something to compare: each model's main figure and interval, ours in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    forms = {form: found for form, found in by_form(rows).items() if len(found) > 1}
    if not forms:
        return
    tall, wide = max(len(found) for found in forms.values()), min(3, len(forms))
    lines = -(-len(forms) // wide)
    size = (4.2 * wide, lines * (1.4 + 0.26 * tall))
    figure, axes = pyplot.subplots(lines, wide, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(forms) :]:
        axis.axis("off")
    for axis, (form, found) in zip(axes.flat[: len(forms)], forms.items(), strict=True):
        found = found[::-1]
        name = _aim(found[0])
        values = [evaluator.intervals(row.metrics)[name] for row in found]
        means = np.array([value.mean for value in values])
        spread = np.array([[value.mean - value.low for value in values], [value.high - value.mean for value in values]])
        colours = ["#c0392b" if row.title.startswith(OURS) else "#7f8c8d" for row in found]
        axis.errorbar(means, range(len(found)), xerr=spread, fmt="none", ecolor=colours, elinewidth=1.5)
        axis.scatter(means, range(len(found)), c=colours, s=22, zorder=3)
        axis.set_yticks(range(len(found)), [row.title for row in found], fontsize=8)
        axis.set_title(form, fontsize=9)
        axis.set_xlabel(_HEADS[name], fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(
        f"{about['date']}, {about['machine']}, commit {about['commit']}, seeds {about['seeds']}", fontsize=8
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
