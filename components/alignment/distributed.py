"""Fine-tune or align a generator with several processes, on one machine or many: what ``torchrun`` runs.

    torchrun --nproc-per-node 2 -m couturier.components.alignment.distributed --stage sft \\
        --input sequences=DIR --input tokenise=DIR --out OUT --set steps=400 --set batch=96

    torchrun --nproc-per-node 8 -m couturier.components.alignment.distributed --stage rl --strategy fsdp \\
        --input sequences=DIR --input tokenise=DIR --input judge=DIR --input sft=DIR --out OUT --settings rl.json

The stage is the one that ``couturier retrain`` runs, on the same inputs: finished artifacts (folders under
``.couturier/artifacts``), or folders of the same layout. ``--settings`` is a JSON file of the stage's settings that
differ from their defaults, groups within groups, or an artifact's ``manifest.json``, whose settings it takes; ``--set
grpo.steps=40`` replaces one. A whole recipe's part is printed by ``python -m couturier.flows.recipes NAME --part sft``.

``OUT`` gets what the stage's artifact would hold (``model/``, ``curves.parquet``), ``facts.json``, and the checkpoints
in ``scratch/``. Killed, the same command goes on from them, with as many processes as one likes and either strategy. On
several machines ``OUT`` must be a folder that all of them see.

Every process draws the same batch and works on its share, so batches must be multiples of the number of processes, and
the run is that of one process within the rounding of sums taken in another order. That holds for language models; a
diffusion model draws the noise of each share by itself. Without ``torchrun`` it is one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from couturier.components.alignment import align, sft
from couturier.components.alignment.sharding import STRATEGIES
from couturier.components.errors import ConfigError, CouturierError, DataError
from couturier.components.files import read_json, write_json
from couturier.components.lineage.stages import StageContext
from couturier.components.lineage.workspace import Workspace
from couturier.components.settings import settings_of, with_lines
from couturier.components.together import processes, rank, world

STAGES: dict[str, tuple[Callable[[StageContext], None], type[Any], tuple[str, ...]]] = {
    "sft": (sft.run, sft.Config, ("sequences", "tokenise")),
    "rl": (align.run, align.Config, ("sequences", "tokenise", "judge", "sft")),
}
"""What runs each stage, its settings and its inputs."""


def run(stage: str, inputs: Mapping[str, Path], settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Run a stage within ``processes``; the first process writes ``out``. Returns the stage's facts.

    Raises:
        ConfigError: an unknown stage or setting, or a batch that the processes cannot share.
        DataError: an input that is missing or no folder.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage is {stage!r}; choose one of {', '.join(STAGES)}.")
    work, config, wanted = STAGES[stage]
    for name in wanted:
        if name not in inputs:
            raise DataError(f"stage {stage} needs the input {name!r}; give --input {name}=DIR, a finished artifact.")
        if not inputs[name].is_dir():
            raise DataError(f"--input {name}={inputs[name]} is no folder; give a finished artifact of {name}.")
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "scratch"
    scratch.mkdir(exist_ok=True)
    context = StageContext(
        inputs={name: inputs[name] for name in wanted},
        config=settings_of(config, settings),
        out=out,
        scratch=scratch,
        workspace=Workspace(project=out, root=scratch),
    )
    work(context)
    facts = {**context.facts, "processes": world()}
    if rank() == 0:
        write_json(out / "facts.json", facts)
    return facts


def read_settings(path: Path) -> dict[str, Any]:
    """A stage's settings out of a JSON file, or out of an artifact's manifest.

    Raises:
        DataError: no such file.
    """
    if not path.is_file():
        raise DataError(f"--settings {path} is no file; give a JSON file of settings or an artifact's manifest.json.")
    found = read_json(path)
    return dict(found["config"]) if "stage" in found and "config" in found else dict(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m couturier.components.alignment.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=sorted(STAGES), required=True, help="fine-tuning (sft) or alignment (rl)")
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=DIR", help="an input of the stage; once for each"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, figures and checkpoints")
    parser.add_argument("--settings", type=Path, help="JSON file of settings, or the manifest.json of an artifact")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="replace one setting")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="ddp: every process holds the whole model; fsdp: its share of each layer"
    )
    given = parser.parse_args(arguments)
    try:
        inputs = {name: Path(folder) for name, _, folder in (each.partition("=") for each in given.input)}
        settings = with_lines(read_settings(given.settings) if given.settings else {}, given.set)
        if given.strategy:
            settings["strategy"] = given.strategy
        with processes():
            facts = run(given.stage, inputs, settings, given.out)
            if rank() == 0:
                told = ", ".join(f"{key} {value:g}" for key, value in facts.items() if isinstance(value, int | float))
                sys.stdout.write(f"{told}\nthe model is in {given.out / 'model'}\n")
    except CouturierError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
