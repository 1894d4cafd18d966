"""`tpctl parity-check RUN_DIR` on real jobs: alive, ended, ending while they are read; and with planted differences."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from engine.config import EngineConfig, from_dict
from engine.process import start_ticks
from tests.cli.conftest import validated
from tests.support.ranks import Job, start_ranks
from tpctl import liverank

# A rank whose start-up check is blind: what differs then is left for the check from outside.
BLIND = """
import sys
from engine.comm import parity
parity.check = lambda *_: None
from engine import worker
sys.exit(worker.main())
"""


def make_config(cache: Path, **dotted: object) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "plan": {"tp": 2},
        "run": {"chunks": 400},
        "sink": {"kinds": ["null"]},
    }
    return from_dict(base).replace(**dotted)


def reported(job: Job) -> bool:
    return all((job.run_dir / "ranks" / f"rank{rank}.json").exists() for rank in job.processes)


def check(cli: Any, run_dir: Path) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    result = cli("parity-check", str(run_dir), "-o", "json")
    data = validated(result.stdout)
    return result.exit_code, data, {row["key"]: row for row in data["data"]["rows"]}


def test_a_healthy_job_passes_while_it_lives_and_after(cli, weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    with start_ranks(tmp_path / "run", config) as job:
        job.wait_for(lambda: reported(job), "both ranks run")
        code, data, rows = check(cli, job.run_dir)
        assert (code, data["verdict"], data["data"]["mode"]) == (0, "PASS", "live"), data["findings"]
        assert data["data"]["states"] == {"rank0": "live", "rank1": "live"}
        assert {"config.plan.tp", "versions.torch", "code.engine_sha256", "effective.threads"} <= rows.keys()
        assert {"library.libtorch_cpu.so", "process.cpus_usable", "limit.nofile"} <= rows.keys()
        assert rows["environment.OMP_NUM_THREADS"]["values"] == {"rank0": "1", "rank1": "1"}
        # A stopped rank is read like any other: nobody asks it.
        os.kill(job.processes[1].pid, signal.SIGSTOP)
        assert check(cli, job.run_dir)[0] == 0
        os.kill(job.processes[1].pid, signal.SIGCONT)
        # The file on disk is not what the ranks run with any more.
        edited = config.replace(run__chunks=7)
        (job.run_dir / "config.toml").write_text(tomli_w.dumps(edited.to_dict()))
        _, data, _ = check(cli, job.run_dir)
        assert [f["id"] for f in data["findings"]] == ["parity.config-file"]
        assert "config.run.chunks" in data["findings"][0]["message"]
        (job.run_dir / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
        # One rank dies: what it was is not compared, and that is said in one finding.
        os.kill(job.processes[0].pid, signal.SIGSTOP)  # it would follow at once
        os.kill(job.processes[1].pid, signal.SIGKILL)
        job.processes[1].wait(10)
        code, data, rows = check(cli, job.run_dir)
        assert (code, data["verdict"], data["data"]["mode"]) == (5, "UNKNOWN", "partly live")
        assert [(f["id"], f["where"]) for f in data["findings"]] == [("parity.coverage", "rank 1")]
        assert rows["process.cpus_usable"]["coverage"] == {"checked": 1, "expected": 2}
        assert data["coverage"]["checked"] < data["coverage"]["expected"]
        os.kill(job.processes[0].pid, signal.SIGCONT)
        job.end(30)
    code, data, rows = check(cli, tmp_path / "run")
    assert data["data"]["mode"] == "ended"
    assert "process.cpus_usable" not in rows
    assert rows["config.plan.tp"]["verdict"] == "PASS"


def test_planted_differences_of_one_rank_are_named(cli, weights_cache: Path, tmp_path: Path) -> None:
    # Other instructions round otherwise: with this tripwire the job would end itself before it can be looked at.
    config = make_config(weights_cache, plan__tp=4, tripwires__output_digest_every=0)
    planted = {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "LD_PRELOAD": "libm.so.6", "SECRET": "s3cret"}
    ours = {"DNNL_MAX_CPU_ISA": ""}
    environ = {rank: ours | (planted if rank == 2 else {}) for rank in range(4)}
    with start_ranks(tmp_path / "run", config, environ=environ, entry=("-c", BLIND)) as job:
        job.wait_for(lambda: reported(job), "all ranks run")
        os.sched_setaffinity(job.processes[3].pid, {0})
        table = cli("parity-check", str(job.run_dir)).stdout
        code, data, rows = check(cli, job.run_dir)
        assert [process.poll() for process in job.processes.values()] == [None] * 4, job.stderr()
    assert (code, data["verdict"]) == (3, "FAIL")
    assert data["data"]["states"] == {f"rank{rank}": "live" for rank in range(4)}, data["findings"]
    found = {finding["id"]: finding for finding in data["findings"]}
    aten = found["parity.environment.ATEN_CPU_CAPABILITY"]
    assert (aten["verdict"], aten["severity"]) == ("FAIL", "must match")
    assert "rank2=default; differs: rank2" in aten["message"]
    preload = rows["environment.LD_PRELOAD"]
    assert (preload["verdict"], preload["severity"], preload["minority"]) == ("WARN", "should match", ["rank2"])
    assert (preload["majority"], preload["values"]["rank2"]) == ("(unset)", "libm.so.6")
    assert rows["reported.environment.OMP_NUM_THREADS"]["verdict"] == "FAIL"
    assert rows["environment.OMP_NUM_THREADS"]["minority"] == ["rank2"]
    if len(os.sched_getaffinity(0)) > 1:
        assert rows["process.cpus_usable"]["minority"] == ["rank3"]
        assert rows["process.cpus"]["severity"] == "information"
    assert data["data"]["mode"] == "live"
    assert "s3cret" not in json.dumps(data) + table
    assert "(3 of 4)" in table


def test_a_rank_that_ends_while_it_is_read_is_gone_not_half_read(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ticks = start_ticks(child.pid)
        assert liverank.read(child.pid, ticks)["process.threads"] == 1
        with pytest.raises(liverank.GoneError):
            liverank.read(child.pid, ticks + 1)  # the same number, another process
        libraries = liverank._libraries

        def end_meanwhile(text: str) -> dict[str, Any]:
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie still has its files in /proc
            return libraries(text)

        monkeypatch.setattr(liverank, "_libraries", end_meanwhile)
        with pytest.raises(liverank.GoneError):
            liverank.read(child.pid, ticks)
    finally:
        child.kill()
        child.wait(10)
        assert child.stdin is not None
        child.stdin.close()
    with pytest.raises(liverank.GoneError):
        liverank.read(child.pid, ticks)


def test_a_library_replaced_on_disk_is_told_from_the_loaded_one(tmp_path: Path) -> None:
    import shutil

    source = next(
        Path(line.split()[5]) for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line
    )
    copy = tmp_path / "libgloo.so"
    shutil.copy(source, copy)
    code = f"import ctypes; ctypes.CDLL({str(copy)!r}); print('loaded', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "loaded\n"
        ticks = start_ticks(child.pid)
        before = liverank.read(child.pid, ticks)
        assert before["library.libgloo.so"].startswith(("build id ", f"{copy.stat().st_size} bytes"))
        assert before["path.libgloo.so"] == str(copy)
        copy.unlink()
        shutil.copy(source, copy)
        assert liverank.read(child.pid, ticks)["library.libgloo.so"].startswith("replaced on disk")
    finally:
        child.kill()
        child.communicate(timeout=10)


def write(run: Path, rank: int, **changes: Any) -> None:
    (run / "ranks").mkdir(parents=True, exist_ok=True)
    base = {"schema": "tpctl.rank-report", "schema_version": 1, "rank": rank, "exit_code": 0, "tp_plan": "v1"}
    said = {
        "parity": {"config.a": "1", "library.torch": "2"},
        "effective": {"threads": "1"},
        "host": socket.gethostname(),
    }
    (run / "ranks" / f"rank{rank}.json").write_text(json.dumps(base | said | {"host": socket.gethostname()} | changes))


def finished(run: Path) -> None:
    run.mkdir()
    (run / "config.toml").write_text(tomli_w.dumps(EngineConfig().replace(plan__tp=4).to_dict()))
    for rank in range(4):
        write(run, rank)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: (run / "ranks" / "rank1.json").write_text("{"), "rank1.json is damaged"),
        (lambda run: (run / "ranks" / "rank1.json").write_text("[]"), "rank1.json is damaged"),
        (lambda run: write(run, 1, schema_version=9), "rank1.json is damaged, of another version"),
        (lambda run: (run / "ranks" / "rank2.json").unlink(), "rank 2 left neither"),
        (lambda run: (run / "config.toml").unlink(), "how many ranks there should be is not known"),
        (lambda run: (run / "config.toml").write_text("?"), "how many ranks there should be is not known"),
        (lambda run: write(run, 1, parity={}), "does not say its configuration"),
        (lambda run: write(run, 1, parity=3, effective=[]), "does not say its configuration"),
        (lambda run: write(run, 1, host="elsewhere", exit_code=None), "rank 1 runs on elsewhere"),
        (lambda run: (run / "ranks" / "rank1.blackbox").write_bytes(b"?" * 100), "is not a black box"),
    ],
)
def test_damaged_runs_stay_open(damage: Any, sentence: str, cli, tmp_path: Path) -> None:
    finished(tmp_path / "run")
    assert check(cli, tmp_path / "run")[0] == 0
    damage(tmp_path / "run")
    code, data, _ = check(cli, tmp_path / "run")
    assert (code, data["verdict"]) == (5, "UNKNOWN")
    assert any(sentence in finding["message"] for finding in data["findings"]), data["findings"]


def test_an_ended_run_names_the_rank_that_had_another_version(cli, tmp_path: Path) -> None:
    finished(tmp_path / "run")
    write(tmp_path / "run", 1, parity={"config.a": "1", "library.torch": "3"})
    code, data, rows = check(cli, tmp_path / "run")
    assert (code, data["data"]["mode"]) == (3, "ended")
    assert rows["versions.torch"]["minority"] == ["rank1"]


def test_no_run_directory_is_a_clear_error(cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "TP-7207" in cli("parity-check", "empty").stderr
    (tmp_path / "empty" / "ranks").mkdir()
    (tmp_path / "empty" / "ranks" / "rank0.json").write_text("no json")
    result = cli("parity-check", "empty")
    assert result.exit_code == 2
    assert "holds no readable rank report" in result.stderr
