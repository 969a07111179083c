from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from couturier.components.console import ConsoleProgress, seconds, size, table


@dataclass
class Clock:
    """Time that passes when told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_short_piece_of_work_leaves_no_trace(clock: Clock) -> None:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out), clock=clock)
    progress.start("sft", 10, unit="step")
    for _ in range(10):
        clock.now += 0.1
        progress.advance()
    progress.stop()
    assert out.getvalue() == ""


def test_a_log_gets_a_line_every_ten_seconds_with_rate_and_time_left(clock: Clock) -> None:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=200), clock=clock)
    progress.start("sft", 100, unit="step")
    for _ in range(50):
        clock.now += 1.0
        progress.advance(2, note="nll 6.3")
    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 5
    assert "sft: 22/100, 2.0 step/s, 39.0 s left, nll 6.3" in lines[0]


def test_what_a_resumed_loop_had_done_does_not_count_as_speed(clock: Clock) -> None:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=200), clock=clock)
    progress.start("rl", 1000, done=900, unit="step")
    clock.now += 20.0
    progress.advance(10)
    assert "910/1000, 2.0 s/step, 3 min 00 s left" in out.getvalue()


def test_a_terminal_gets_a_bar_after_two_seconds(clock: Clock) -> None:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, force_terminal=True, width=120), clock=clock)
    progress.start("judge", 10)
    progress.advance()
    assert out.getvalue() == ""
    clock.now += 3.0
    progress.advance()
    progress.stop()
    assert "judge" in out.getvalue()
    assert "2/10" in out.getvalue()


def test_advance_without_a_start_is_nothing() -> None:
    progress = ConsoleProgress(Console(file=io.StringIO()))
    progress.advance()
    progress.stop()


def test_a_cell_with_brackets_is_text_not_markup() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(table("", ("name", "value"), [("grpo", "0.1 [0.05, 0.15]"), ("x", None)]))
    assert "0.1 [0.05, 0.15]" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "said"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3600, "1 h 00 min")]
)
def test_seconds(value: float, said: str) -> None:
    assert seconds(value) == said


@pytest.mark.parametrize(("value", "said"), [(0, "0 B"), (1500, "2 kB"), (2_500_000_000, "2.5 GB")])
def test_size(value: float, said: str) -> None:
    assert size(value) == said
