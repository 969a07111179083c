"""The bookkeeping around the story that ``retrain.py`` tells: Prefect tasks, MLflow runs, times, memory, the record.

Run.stage ─▶ Prefect task, cache key = manifest id ─▶ tracked() ─▶ ArtifactStore ─▶ the stage's own code
                    │ known to Prefect, and whole in the store: not run again
                    └ known to Prefect, but gone from the store: made again (the store is the truth)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import psutil
from prefect import task
from prefect.cache_policies import NO_CACHE
from rich.console import Console

from couturier.components import runtime
from couturier.components.console import ConsoleProgress, seconds, stderr_console
from couturier.components.errors import CouturierError
from couturier.components.lineage.provenance import code_commit, config_hash, whoami
from couturier.components.lineage.stages import Artifact, ArtifactStore, Stage, StageContext
from couturier.components.lineage.tracking import FlowRun, open_run, step_run, tracked
from couturier.components.lineage.workspace import Workspace
from couturier.flows import locks, records
from couturier.flows.recipes import Recipe

T = TypeVar("T")
# What the machine is for; all the rest of a run is orchestration, tracking, contracts, versions and packaging.
LEARNING = ("tokenise", "judge", "sft", "rl", "evaluate")
_SAMPLE_EVERY_S = 0.5


@dataclass
class Timing:
    """What a stage cost in this run, and whether an earlier run had made it."""

    s: float
    reused: bool
    id: str | None = None


@dataclass
class Run:
    """One retraining under way."""

    workspace: Workspace
    recipe: Recipe
    flow_run: FlowRun
    who: str
    console: Console
    record: dict[str, Any]
    memory: Memory
    timings: dict[str, Timing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = ArtifactStore(self.workspace)
        self.progress = ConsoleProgress(self.console)
        self.began = time.monotonic()

    @property
    def run_id(self) -> str:
        return self.flow_run.run_id

    def stage(
        self,
        name: str,
        run: Callable[[StageContext], None],
        config: Any,
        *,
        external: Mapping[str, str] | None = None,
        **inputs: Artifact,
    ) -> Artifact:
        """A finished stage as a Prefect task; made only if neither Prefect nor the artifact store has it."""
        stage = Stage(
            name=name,
            run=run,
            config=config,
            inputs={key: artifact.id for key, artifact in inputs.items()},
            external=external or {},
        )
        made: list[Artifact] = []

        @task(
            name=name,
            task_run_name=stage.id,
            cache_key_fn=lambda context, parameters: parameters["artifact_id"],
            refresh_cache=not self.store.has(stage.id),
            persist_result=True,
            result_serializer="json",
        )
        def materialise(artifact_id: str) -> dict[str, Any]:
            made.append(tracked(self.store, stage, parent_run_id=self.run_id, progress=self.progress))
            return {"id": artifact_id, "seconds": made[0].seconds}

        began = time.monotonic()
        materialise(stage.id)
        # Prefect knew the id: the store has it too, or the task would have run; only the trace is left to write.
        artifact = made[0] if made else tracked(self.store, stage, parent_run_id=self.run_id)
        self._note(name, Timing(s=time.monotonic() - began, reused=artifact.reused, id=artifact.id), artifact.facts)
        return artifact

    def step(self, name: str, work: Callable[[], T], facts: Callable[[T], tuple[bool, Mapping[str, Any]]]) -> T:
        """Work that is no stage, as a Prefect task. ``facts`` says of its result whether it was reused, and figures."""

        @task(name=name, cache_policy=NO_CACHE, persist_result=False)
        def done() -> list[T]:
            return [work()]

        began = time.monotonic()
        result = done()[0]
        reused, figures = facts(result)
        if not reused:
            with step_run(self.workspace, parent_run_id=self.run_id, name=name) as tracker:
                tracker.facts(dict(figures))
        self._note(name, Timing(s=time.monotonic() - began, reused=reused), figures)
        return result

    def learns_from(self, md5: str) -> None:
        """Put the data version on record at once, so that its arrival starts no second run (``triggers.py``)."""
        self.record["data_md5"] = md5
        records.save(self.workspace, self.record)
        self.flow_run.tags({"data_md5": md5})

    def times(self, wall_s: float) -> dict[str, Any]:
        """``wall_s``, ``overhead_share`` and ``peak_rss_bytes``, as they stand."""
        learning = sum(timing.s for name, timing in self.timings.items() if name in LEARNING and not timing.reused)
        return {
            "wall_s": round(wall_s, 2),
            "learning_s": round(learning, 2),
            "overhead_share": round(1 - learning / max(wall_s, learning, 1e-9), 4),
            "peak_rss_bytes": self.memory.peak_bytes,
        }

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the record; its JSON form is what ``couturier retrain --json`` prints."""
        self.record |= {
            "status": records.FINISHED,
            "finished_at": now(),
            "stages": {
                name: {"s": round(timing.s, 3), "reused": timing.reused, **({"id": timing.id} if timing.id else {})}
                for name, timing in self.timings.items()
            },
            **self.times(time.monotonic() - self.began),
            **facts,
        }
        records.save(self.workspace, self.record)
        figures = {key: float(self.record[key]) for key in ("wall_s", "overhead_share", "peak_rss_bytes")}
        self.flow_run.metrics(figures, step=0)
        return self.record

    def _note(self, name: str, timing: Timing, facts: Mapping[str, Any]) -> None:
        self.timings[name] = timing
        said = "reused" if timing.reused else seconds(timing.s)
        self.console.print(f"  [green]✓[/green] {name:<10} {said:>12}   [dim]{brief(facts)}[/dim]")


class Memory:
    """The most memory that this process and its children held together, sampled twice a second."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            held = sum(_rss(process) for process in (own, *own.children(recursive=True)))
            self.peak_bytes = max(self.peak_bytes, held)
            if self._end.wait(_SAMPLE_EVERY_S):
                return


@contextmanager
def running(recipe: Recipe, workspace: Workspace, *, who: str | None, settings: list[str]) -> Iterator[Run]:
    """Hold the workspace, open the MLflow run, and record how it ends, whatever ends it."""
    console = stderr_console()
    with ExitStack() as stack:
        killed = stack.enter_context(locks.only_one(workspace))
        if killed:
            console.print(
                f"  The last run (process {killed}) was killed; this one goes on where it stopped.", style="yellow"
            )
        stack.enter_context(runtime.threads(recipe.threads))
        memory = stack.enter_context(Memory())
        flow_run = stack.enter_context(
            open_run(
                workspace,
                name=f"retrain-{recipe.name}",
                recipe=recipe.name,
                params={"recipe": recipe.name, "settings": " ".join(settings), "config_hash": config_hash(recipe)},
                who=who,
            )
        )
        record = {
            "run_id": flow_run.run_id,
            "status": records.RUNNING,
            "pid": os.getpid(),
            "started_at": now(),
            "recipe": recipe.name,
            "settings": settings,
            "who": who or whoami(),
            "commit": code_commit(),
            "config_hash": config_hash(recipe),
            "workspace": str(workspace.root),
        }
        records.save(workspace, record)
        run = Run(workspace, recipe, flow_run, who or whoami(), console, record, memory)
        try:
            yield run
        except KeyboardInterrupt:
            records.save(workspace, {**run.record, "status": records.STOPPED, "finished_at": now()})
            raise
        except (CouturierError, OSError, ValueError, RuntimeError) as error:
            failed = {"status": records.FAILED, "finished_at": now(), "error": f"{type(error).__name__}: {error}"}
            records.save(workspace, {**run.record, **failed})
            raise


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def brief(facts: Mapping[str, Any], most: int = 5) -> str:
    """The first few plain figures of a stage, in one line.

    Example:
        >>> brief({"items": 1038, "nll": 6.29512, "by": {"a": 1}})
        'items 1,038 · nll 6.295'
    """
    said = []
    for name, value in facts.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        if len(text) <= 40:
            said.append(f"{name} {text}")
    return " · ".join(said[:most])


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
