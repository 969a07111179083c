import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from couturier.serving.feedback import Drawn, FeedbackFullError, FeedbackLog

EVENT = {"user_id": "u", "item_id": "i", "kind": "like", "value": 1.0}


def rows(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_an_event_is_one_line_with_the_servers_time(tmp_path):
    row = FeedbackLog(tmp_path / "new" / "folder").append(EVENT)
    assert rows(tmp_path / "new" / "folder") == [row]
    assert EVENT.items() <= row.items() and len(row["event_id"]) == 32
    assert abs(datetime.fromisoformat(row["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_many_writers_lose_and_tear_nothing(tmp_path):
    logs = [FeedbackLog(tmp_path) for _ in range(4)]  # each with a lock of its own, as if in four processes
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: logs[i % 4].append({**EVENT, "value": float(i)}), range(200)))
    assert sorted(row["value"] for row in rows(tmp_path)) == [float(i) for i in range(200)]
    assert len({row["event_id"] for row in written}) == 200


def test_a_full_file_refuses_and_keeps_what_it_has(tmp_path):
    log = FeedbackLog(tmp_path, max_file_bytes=400)
    kept = [log.append(EVENT), log.append(EVENT)]
    with pytest.raises(FeedbackFullError, match="of at most 400"):
        log.append(EVENT)
    assert rows(tmp_path) == kept


def test_a_line_that_a_kill_left_open_does_not_swallow_the_next(tmp_path):
    log = FeedbackLog(tmp_path)
    first = log.append(EVENT)
    path = next(tmp_path.glob("*.jsonl"))
    with path.open("ab") as file:
        file.write(b'{"user_id": "torn')
    second = log.append(EVENT)
    lines = path.read_text().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[2])] == [first, second] and lines[1] == '{"user_id": "torn'


def test_a_short_write_is_taken_back(tmp_path, monkeypatch):
    log = FeedbackLog(tmp_path)
    first = log.append(EVENT)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:10]))
    with pytest.raises(FeedbackFullError, match="only 10 of"):
        log.append(EVENT)
    monkeypatch.undo()
    assert rows(tmp_path) == [first]


def test_drawn_pictures_are_remembered_up_to_a_limit():
    drawn = Drawn(limit=2)
    for name in "abc":
        drawn.remember(name, {"name": name})
    assert drawn.recipe("a") is None and drawn.recipe("c") == {"name": "c"}
    drawn.remember("b", {"name": "again"})
    drawn.remember("d", {})
    assert drawn.recipe("c") is None and drawn.recipe("b") == {"name": "again"}, "the oldest goes first"
