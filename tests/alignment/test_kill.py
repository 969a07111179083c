"""``kill -9`` at any moment of SFT, GRPO or DPO: the run that follows ends on the bits of one left alone.

Some are killed at a named place (in the middle of a rollout, in scoring, between gradient and update, with a
checkpoint half written or not yet renamed), some after a random time. A killed run is really killed: it is a process.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PLACES = ("rollout", "scoring", "backward", "update", "checkpoint", "rename")
METHODS = ("sft", "grpo", "dpo")


class Server:
    """The process that runs, and kills, its children."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole: dict[str, tuple[str, float]] = {}
        command = [sys.executable, str(Path(__file__).with_name("kill_server.py")), str(root)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, **order: Any) -> tuple[int, float]:
        """Exit status and seconds of one child."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        return said["status"], said["seconds"]

    def left_alone(self, method: str) -> tuple[str, float]:
        """What a run that nobody disturbs makes, and how long it takes."""
        if method not in self.whole:
            status, seconds = self.run(method=method, name=f"kill-{method}-whole")
            assert status == 0
            self.whole[method] = (self.digest(f"kill-{method}-whole"), seconds)
        return self.whole[method]

    def digest(self, name: str) -> str:
        return (self.root / name / "digest.json").read_text()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(started: Path) -> Iterator[Server]:
    made = Server(started)
    yield made
    made.end()


def killed_and_resumed(server: Server, method: str, name: str, orders: list[dict[str, Any]]) -> int:
    """Kill a run as often as is ordered, let it end, compare; how many kills struck."""
    expected, _ = server.left_alone(method)
    struck = 0
    for order in orders:
        status, _ = server.run(method=method, name=name, **order)
        assert status in (-9, 0), status
        struck += status == -9
    status, _ = server.run(method=method, name=name)
    assert status == 0
    assert server.digest(name) == expected
    return struck


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["rollout", "scoring", "update", "checkpoint"])
def test_kill_at_a_named_place(server: Server, method: str, place: str) -> None:
    if method == "sft" and place in ("rollout", "scoring"):
        place = {"rollout": "backward", "scoring": "rename"}[place]
    at = {"rollout": 12, "scoring": 5, "update": 5, "checkpoint": 2, "backward": 4, "rename": 3}[place]
    assert killed_and_resumed(server, method, f"kill-{method}-{place}", [{"place": place, "at": at}]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_kill_anywhere(server: Server, number: int) -> None:
    """Two kills a run: one at a random moment, the next, of what goes on from there, at a random visit to a place."""
    method = METHODS[number % 3]
    _, seconds = server.left_alone(method)
    chance = random.Random(number)
    place = chance.choice(PLACES)
    orders: list[dict[str, Any]] = [
        {"after_s": chance.uniform(0.02, 0.95) * seconds},
        {"place": place, "at": chance.randint(1, 6)},
    ]
    killed_and_resumed(server, method, f"kill-anywhere-{number}", orders)
