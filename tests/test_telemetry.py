from __future__ import annotations

import os

import pytest

from couturier.components.telemetry import SWITCHES, quiet_environment


def test_every_switch_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    quiet_environment()
    assert {name: os.environ[name] for name in SWITCHES} == SWITCHES


def test_a_choice_that_somebody_made_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    quiet_environment()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
