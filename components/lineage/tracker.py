"""What a stage says while it works, in one MLflow run that survives a kill.

::

    stage ── metrics ──▶ metrics.jsonl (this machine, at once) ──▶ buffer ── 500 figures or 10 s ──▶ MLflow

A killed stage goes on from a checkpoint and says some steps again, to the same bits. The file tells which steps were
said: what had not reached MLflow is logged first, what is said a second time is dropped, so a curve has every step
once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from couturier.components.errors import ConfigError
from couturier.components.files import read_json, write_json
from couturier.components.lineage.stages import FACTS, MANIFEST, Artifact
from couturier.components.lineage.tags import clean_name, flatten, tag_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

BATCH = 500
EVERY_S = 10.0
SYSTEM_METRICS_EVERY_S = 5.0
COSTS = ("seconds", "processor_s", "peak_rss_bytes")
"""What a manifest says its stage cost."""
# Beyond this a folder stays where it is and MLflow gets a note of where that is.
COPY_LIMIT_BYTES = 512 * 1024 * 1024
_SMALL_FILES = (".json", ".html", ".png", ".md", ".txt", ".svg")
_PER_REQUEST = 100


class RunTracker:
    """A :class:`~couturier.components.lineage.stages.Tracker` that writes to one MLflow run.

    Args:
        client: of the database the run is in.
        run_id: an existing run.
        pending: the folder that remembers what was said until the run is complete; None: nothing is remembered.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, pending: Path | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._said = None if pending is None else pending / "metrics.jsonl"
        self._buffer: list[Metric] = []
        self._flushed_at = time.monotonic()
        self._said_up_to: dict[str, int] = {}
        if self._said is not None and self._said.exists():
            self._say_again(self._said)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings; nested mappings are flattened with dots."""
        from mlflow.entities import Param

        rows = [Param(clean_name(name), tag_text(value, 6000)) for name, value in flatten(values, joint=".")]
        for first in range(0, len(rows), _PER_REQUEST):
            self._client.log_batch(self.run_id, params=rows[first : first + _PER_REQUEST])

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(clean_name(name), tag_text(value, 8000)) for name, value in values.items()]
        for first in range(0, len(rows), _PER_REQUEST):
            self._client.log_batch(self.run_id, tags=rows[first : first + _PER_REQUEST])

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Keep figures of one step; they reach MLflow in batches."""
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 1_000_000
        rows = []
        for name, value in values.items():
            key = clean_name(name)
            if step > self._said_up_to.get(key, -1):
                rows.append(Metric(key, float(value), now_ms, int(step)))
        if not rows:
            return
        if self._said is not None:
            with self._said.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([m.key, m.value, m.timestamp, m.step]) + "\n" for m in rows)
        self._buffer += rows
        if len(self._buffer) >= BATCH or time.monotonic() - self._flushed_at > EVERY_S:
            self._flush_or_wait()

    def facts(self, values: Mapping[str, Any]) -> None:
        """Log final figures: numbers as metrics under ``facts/``, the rest as tags. ``[mean, low, high]`` lists (how
        reports write intervals) become three metrics."""
        numbers, words = {}, {}
        for name, value in flatten({"facts": values}, joint="/", intervals=True):
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers[name] = float(value)
            else:
                words[name] = value
        self.metrics(numbers, step=0)
        self.tags(words)
        self.flush()

    def picture(self, name: str, rgb_HWC: Any) -> None:
        """Log one picture as ``pictures/<name>.png``: uint8, or float 0..1; an array or a CPU tensor."""
        picture = np.asarray(rgb_HWC)
        if picture.dtype != np.uint8:
            picture = (np.clip(picture.astype(np.float32), 0.0, 1.0) * 255.0).round().astype(np.uint8)
        path = "/".join(part for part in clean_name(name).split("/") if part.strip("."))
        self._client.log_image(self.run_id, picture, artifact_file=f"pictures/{path}.png")

    def file(self, path: Path, folder: str = "") -> None:
        """Log a file or a whole folder as artifacts under ``folder``."""
        if path.is_dir():
            self._folder(path, folder or path.name)
        else:
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def checkpoints(self, folder: Path) -> None:
        """Log the newest whole checkpoint of a training loop, if there is one."""
        for newest in sorted(folder.glob("**/step-*"))[-1:]:
            self._folder(newest, f"checkpoints/{newest.name}")

    def artifact(self, artifact: Artifact) -> None:
        """Log a finished stage: its facts, its folders (models, docs), its small files and its manifest. The tables
        stay in the artifact store."""
        self.facts(artifact.facts)
        manifest = read_json(artifact.path / MANIFEST)
        self.metrics({name: manifest[name] for name in COSTS if name in manifest}, step=0)
        if (rate := hourly_cost()) is not None:
            self.metrics({"cost": manifest["seconds"] / 3600 * rate}, step=0)
        for path in sorted(artifact.path.iterdir()):
            if path.is_dir():
                self._folder(path, path.name)
            elif path.suffix in _SMALL_FILES or path.name in (MANIFEST, FACTS, "curves.parquet"):
                self.file(path)

    def flush(self) -> None:
        """Send everything kept to MLflow.

        Raises:
            mlflow.exceptions.MlflowException: the database refused it.
        """
        while self._buffer:
            self._client.log_batch(self.run_id, metrics=self._buffer[:1000])
            del self._buffer[:1000]
        self._flushed_at = time.monotonic()

    def _flush_or_wait(self) -> None:
        """A database busy for a moment must not end hours of training: keep the figures and try with the next ones.
        They are in the file as well, and ``flush`` at the end does raise."""
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except MlflowException as error:
            self._flushed_at = time.monotonic()
            log.warning("MLflow did not take %d figures (%s); they are kept and sent later", len(self._buffer), error)

    def _say_again(self, said: Path) -> None:
        """After a kill: send what had been said and had not arrived, and remember what need not be said again."""
        from mlflow.entities import Metric

        rows = []
        for line in said.read_text(encoding="utf-8").splitlines():
            try:
                key, value, timestamp, step = json.loads(line)
            except ValueError:
                log.warning("%s ends in a torn line: skipped", said)
                continue
            rows.append(Metric(key, value, timestamp, step))
        arrived: dict[str, int] = {}
        for key in {row.key for row in rows}:
            history = self._client.get_metric_history(self.run_id, key)
            arrived[key] = max((metric.step for metric in history), default=-1)
        for row in rows:
            self._said_up_to[row.key] = max(row.step, self._said_up_to.get(row.key, -1))
            if row.step > arrived[row.key]:
                self._buffer.append(row)
        self.flush()

    def _folder(self, path: Path, name: str) -> None:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if size <= COPY_LIMIT_BYTES:
            self._client.log_artifacts(self.run_id, str(path), name)
        else:
            note = {"folder": str(path), "bytes": size, "why": "larger than the limit for copies"}
            self._client.log_dict(self.run_id, note, f"{name}.where.json")


class Pending:
    """What is known of a stage's run until it is complete: its run id and everything that was said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_id(self) -> str | None:
        try:
            return str(read_json(self.folder / "run.json")["run_id"])
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return None

    def begin(self, run_id: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(self.folder / "run.json", {"run_id": run_id})

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def system_metrics(uri: str, run_id: str, *, enabled: bool = True) -> Iterator[None]:
    """Sample processor, memory, disk, network and GPU (when there is one) into ``system/...`` metrics every 5 s; on a
    run that goes on, after the last step there is."""
    if not enabled:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=SYSTEM_METRICS_EVERY_S, resume_logging=True, tracking_uri=uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def hourly_cost() -> float | None:
    """What an hour of this machine costs, from ``COUTURIER_COST_PER_HOUR``, in whatever currency; None when unset.

    Raises:
        ConfigError: it is set to something that is no cost.
    """
    said = os.environ.get("COUTURIER_COST_PER_HOUR", "")
    if not said:
        return None
    try:
        rate = float(said)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < float("inf"):
        raise ConfigError(
            f"COUTURIER_COST_PER_HOUR is {said!r}; it must be what an hour here costs, a number such as 2.5. "
            "Unset it to log no cost."
        )
    return rate
