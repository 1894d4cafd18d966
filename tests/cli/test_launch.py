"""The launcher, with real torchrun and real processes: how it ends, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.config import dotted_keys
from tests.cli.runs import CASE
from tpctl.launch import local
from tpctl.launch.environment import rank_environment
from tpctl.matrix.cause import first_cause
from tpctl.matrix.gates import evaluate
from tpctl.matrix.observation import Observation
from tpctl.reports import read_reports
from tpctl.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]


def launch(how: str, tmp_path: Path, monkeypatch, nproc: int = 2, deadline_s: float = 90.0, **kwargs) -> local.Outcome:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = local.LaunchSpec(nproc, tmp_path, (how, str(tmp_path)), deadline_s, module="tests.cli.launched")
    return local.run(spec, **kwargs)


def survivors(tmp_path: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(tmp_path) in words and process.pid != os.getpid():
            found.append(words)
    return found


def test_ranks_run_in_the_fixed_environment_and_end(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    ticks: list[float] = []
    outcome = launch("fine", tmp_path, monkeypatch, tick=ticks.append)
    assert (outcome.returncode, outcome.timed_out, outcome.leftovers) == (0, False, ())
    assert [(tmp_path / f"alive{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert ticks == sorted(ticks)
    assert ticks


def test_a_killed_rank_is_the_first_cause_and_its_log_is_named(tmp_path, monkeypatch):
    outcome = launch("die", tmp_path, monkeypatch)
    assert outcome.returncode != 0
    seen = Observation(replace(CASE, reference=None), tmp_path, outcome, read_reports(tmp_path))
    cause = first_cause(seen)
    assert (cause.rank, cause.exit_code) == (1, -9)
    assert "rank 1 is about to die" in cause.tail
    assert evaluate("exit-codes", seen).verdict is Verdict.FAIL
    assert survivors(tmp_path) == []


def test_the_deadline_ends_ranks_that_ignore_sigterm(tmp_path, monkeypatch):
    def both_alive() -> bool:
        return all((tmp_path / f"alive{rank}").exists() for rank in range(2))

    alive: list[bool] = []
    outcome = launch("hang", tmp_path, monkeypatch, deadline_s=25, tick=lambda s: alive.append(both_alive()))
    assert outcome.timed_out
    assert any(alive)
    assert outcome.immortal == ()
    assert survivors(tmp_path) == []
    assert outcome.wall_s < 25 + local.GRACE_S + local.REAP_S


def test_an_orphan_is_found_reported_and_killed(tmp_path, monkeypatch):
    outcome = launch("orphan", tmp_path, monkeypatch, nproc=1)
    assert outcome.returncode == 0
    assert len(outcome.leftovers) == 1
    assert outcome.immortal == ()
    pid = int(outcome.leftovers[0].split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    seen = Observation(CASE, tmp_path, outcome)
    assert evaluate("leftovers", seen).verdict is Verdict.FAIL


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt_when_alive(elapsed_s: float) -> None:
        if (tmp_path / "alive0").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch("hang", tmp_path, monkeypatch, tick=interrupt_when_alive)
    assert survivors(tmp_path) == []


def test_multi_node_arguments_pass_through(tmp_path):
    spec = local.LaunchSpec(4, tmp_path, ("--config", "c"), 1.0, nnodes=2, node_rank=1, rdzv_endpoint="host-a:29500")
    command = spec.command()
    for word in ("--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--rdzv-endpoint=host-a:29500"):
        assert word in command
    assert command[-4:] == ["-m", "engine.worker", "--config", "c"]


def test_configuration_variables_do_not_reach_ranks():
    name = "TPCTL_RUN_CHUNKS"
    assert "run.chunks" in dotted_keys()
    found = rank_environment({name: "9", "NCCL_DEBUG": "INFO"})
    assert name not in found
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["HF_HUB_OFFLINE"] == "1"


def gone(path: Path, within_s: float) -> list[str]:
    """What still names the path after so long; there is no event to wait for of processes that are not ours."""
    end, nap = time.monotonic() + within_s, threading.Event()
    while (left := survivors(path)) and time.monotonic() < end:
        nap.wait(0.05)
    return left


# Ends itself before its referee has loaded, as a killed test run does: the referee never sees who started it.
HASTY = """
import os, signal, sys
from pathlib import Path
from tpctl.launch.referee import watching
here = Path(sys.argv[1])
with (here / "log").open("wb") as log, watching(here, here / "verdict.json", ["--ranks", "0,1"], log, {}):
    print("started", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_referee_ends_whose_launcher_was_killed_before_it_looked(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HASTY, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "started\n"
    assert gone(tmp_path, 30) == []
