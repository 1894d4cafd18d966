"""Jobs of a test: a state directory of their own, and ways to wait for what they become."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.process import Process
from tests.cli.conftest import validated
from tpctl.jobs import place
from tpctl.launch.local import tagged

DEADLINE_S = 120.0
TINY = ("sink.kinds=null", "geometry.height=32", "geometry.width=32", "schedule.denoising_step_list=1000")
nap = threading.Event()


@pytest.fixture
def state(tmp_path, monkeypatch, weights_cache):
    """A state directory of this test's own; whatever still runs in it afterwards is ended."""
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / "st"))
    monkeypatch.setenv("TPCTL_MODEL_CACHE_DIR", str(weights_cache))
    yield tmp_path / "st" / "jobs"
    for record in (tmp_path / "st" / "jobs").glob("*/job.json"):
        try:
            data = json.loads(record.read_text())
            _ = data["supervisor"], data["attempts"]
        except (ValueError, TypeError, KeyError):
            continue  # a record that its test spoiled
        if data["supervisor"]:
            Process.from_dict(data["supervisor"]).send(signal.SIGKILL)
        for attempt in data["attempts"]:
            for pid in tagged(attempt["tag"]):
                os.kill(pid, signal.SIGKILL)


def sets(*more: str) -> list[str]:
    return [word for pair in (*TINY, *more) for word in ("--set", pair)]


def data_of(cli, *args: str) -> dict:
    return validated(cli(*args, "-o", "json").stdout)["data"]


def until(cli, name: str, condition: Callable[[dict], bool], what: str) -> dict:
    """Poll `status` until the condition holds; there is no event to wait for across processes."""
    end = time.monotonic() + DEADLINE_S
    while True:
        data = data_of(cli, "status", name)
        if condition(data):
            return data
        assert time.monotonic() < end, (what, data, (place.find(name).log).read_text())
        nap.wait(0.1)


def in_state(*states: str) -> Callable[[dict], bool]:
    return lambda data: data["state"] in states


def tag_of(state: Path, name: str) -> str:
    return json.loads((state / name / "job.json").read_text())["attempts"][-1]["tag"]
