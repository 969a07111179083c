"""Fit a judge on a log with several processes, on one machine or many: what ``torchrun`` runs.

    torchrun --nproc-per-node 2 -m couturier.components.interest.distributed_fit \\
        LOG looks.safetensors OUT --settings settings.json

``LOG`` is what ``log.write_log`` wrote (``couturier compare`` keeps one in its artifact ``comparison-log``, with
``looks.safetensors`` beside it: ``pictures_IP``, a row an item). ``settings.json`` holds the fields of ``LogFitConfig``
that differ from their defaults, groups within groups: ``{"model": "sasrec", "sasrec": {"width": 64}, "steps": 2000}``.
``OUT`` gets ``judge/`` (``judge.load_judge`` opens it), ``fit.json`` and the checkpoints; the same command goes on from
them, with as many processes as one likes. On several machines ``OUT`` must be a folder that all of them see.

Every process reads the same batch and takes its share, so the fit is the one of a single process, within the rounding
of sums taken in another order; see ``together`` for what that leaves out. Run without ``torchrun`` it is that process.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, CouturierError, DataError
from couturier.components.files import read_json, write_json
from couturier.components.interest.fit import content_of
from couturier.components.interest.items import Content
from couturier.components.interest.judge import save_judge
from couturier.components.interest.log import Log
from couturier.components.interest.log_fit import LogFit, LogFitConfig, fit_log
from couturier.components.settings import settings_of
from couturier.components.together import processes, rank, world

_VOCABULARY = 2048


def run(log: Log, content: Content, config: LogFitConfig, out: Path) -> LogFit:
    """Fit within ``processes``; the first process writes ``out``.

    Raises:
        ConfigError: a batch that the processes cannot share equally.
    """
    if config.batch % world():
        raise ConfigError(
            f"batch is {config.batch}, which {world()} processes cannot share equally; make it a multiple of {world()}."
        )
    fitted = fit_log(log, content, config, scratch=out / "scratch")
    if rank() == 0:
        save_judge(fitted.judge, out / "judge", vocabulary=[""] * content.vocabulary)
        facts = {
            "model": config.model,
            "processes": world(),
            "valid": fitted.valid,
            "best_step": fitted.best_step,
            "fit_s": round(fitted.fit_s, 3),
            "samples_a_s": round(fitted.examples / max(fitted.fit_s, 1e-9), 1),
        }
        write_json(out / "fit.json", facts)
    return fitted


def content_from(looks: Path, sequences: Path | None) -> Content:
    """What the eyes saw of each item, and its words where a ``sequences`` artifact is given.

    Raises:
        DataError: a file without ``pictures_IP``, or for another number of items.
    """
    vectors = load_file(looks).get("pictures_IP")
    if vectors is None:
        raise DataError(f"{looks.name} has no pictures_IP, a row of floats an item.")
    if sequences is None:
        return Content.of_vectors(vectors)
    catalogue = Catalogue.load(sequences)
    if len(catalogue) != len(vectors):
        raise DataError(f"{looks.name} has {len(vectors)} items, the catalogue has {len(catalogue)}.")
    return content_of(catalogue, _VOCABULARY, vectors, None)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description="Fit a judge on a log, with as many processes as torchrun starts.")
    parser.add_argument("log", type=Path, help="folder of log.parquet and log.json")
    parser.add_argument("looks", type=Path, help="safetensors file with pictures_IP, a row an item")
    parser.add_argument("out", type=Path, help="folder for the judge, fit.json and checkpoints")
    parser.add_argument("--sequences", type=Path, help="folder of the catalogue, for its words")
    parser.add_argument("--settings", type=Path, help="JSON file of LogFitConfig fields that differ from the defaults")
    given = parser.parse_args(arguments)
    try:
        with processes():
            log = Log(given.log)
            content = content_from(given.looks, given.sequences)
            config = settings_of(LogFitConfig, read_json(given.settings) if given.settings else {})
            if len(content.pictures_IP) != log.items:
                raise DataError(f"{given.looks.name} has {len(content.pictures_IP)} items, the log has {log.items}.")
            if given.sequences is None:
                counts_I = torch.from_numpy(log.counts(config.holdout)).float()
                content = dataclasses.replace(content, counts_I=counts_I)
            fitted = run(log, content, config, given.out)
            if rank() == 0:
                told = f"{config.model}: valid {fitted.valid:.4f} at step {fitted.best_step}"
                sys.stdout.write(f"{told}; the judge is in {given.out / 'judge'}\n")
    except CouturierError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
