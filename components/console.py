"""What people see while they wait: a progress line with rate and time left, tables, and errors of one sentence.

Everything here goes to stderr, so that stdout stays free for the one JSON object that ``--json`` promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

PATIENCE_S = 2.0  # a stage that is done sooner draws no bar
LINE_EVERY_S = 10.0  # where no bar can be drawn (a log file), a line this often


def stderr_console() -> Console:
    """A console on stderr that does not guess at links and numbers in what we print."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass
class _Work:
    """One ``start``: how far it is, and when it began."""

    description: str
    total: int
    done: int
    unit: str
    first: int
    clock: Callable[[], float]
    note: str = ""

    def __post_init__(self) -> None:
        self.began = self.said = self.clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.began

    @property
    def rate(self) -> float:
        """Units a second since ``start``; what a resumed loop had done before does not count."""
        return (self.done - self.first) / max(self.seconds, 1e-9)

    @property
    def left_s(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class ConsoleProgress:
    """``stages.Progress`` on a terminal (a bar) or in a log (a line every ten seconds).

    Nothing is drawn in the first two seconds, so that short stages leave no trace. ``start`` while another piece of
    work is shown ends that one first.

    Example:
        >>> import io
        >>> out = io.StringIO()
        >>> progress = ConsoleProgress(Console(file=out))
        >>> progress.start("sft", 3, unit="step"); progress.advance(); progress.stop()
        >>> out.getvalue()
        ''
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or stderr_console()
        self.clock = clock
        self._work: _Work | None = None
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def start(self, description: str, total: int, *, done: int = 0, unit: str = "it") -> None:
        self.stop()
        self._work = _Work(description=description, total=total, done=done, unit=unit, first=done, clock=self.clock)

    def advance(self, n: int = 1, *, note: str = "") -> None:
        work = self._work
        if work is None:
            return
        work.done += n
        work.note = note or work.note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=work.done, rate=_rate(work), note=work.note)
        elif self.console.is_terminal:
            if work.seconds > PATIENCE_S:
                self._draw(work)
        elif self.clock() - work.said > LINE_EVERY_S:
            work.said = self.clock()
            self.console.print(_line(work), markup=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._work = None

    def _draw(self, work: _Work) -> None:
        self._bar = Bar(
            TextColumn("  {task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(
            work.description, total=work.total, completed=work.done, rate=_rate(work), note=work.note
        )


def seconds(value: float) -> str:
    """A duration for people.

    Example:
        >>> seconds(3.21), seconds(75), seconds(7380)
        ('3.2 s', '1 min 15 s', '2 h 03 min')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(value: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size(1_300_000_000), size(512)
        ('1.3 GB', '512 B')
    """
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns stand left, figures stand right. Cells are text, not markup."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number < left else "right", overflow="fold", no_wrap=number == 0)
    for row in rows:
        made.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return made


def _rate(work: _Work) -> str:
    return f"{work.rate:.1f} {work.unit}/s" if work.rate >= 1 else f"{1 / max(work.rate, 1e-9):.1f} s/{work.unit}"


def _line(work: _Work) -> str:
    left = work.left_s
    parts = [f"  {work.description}: {work.done}/{work.total}", _rate(work)]
    parts.append(f"{seconds(left)} left" if left is not None else "time left unknown")
    return ", ".join([*parts, work.note] if work.note else parts)
