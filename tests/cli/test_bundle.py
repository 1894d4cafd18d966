"""`tpctl bundle` of one real job as it runs, hangs, is dead and half deleted; and what the bundles say afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import time
from pathlib import Path

import jsonschema
import pytest

from tests.cli.conftest import validated
from tests.cli.jobs import DEADLINE_S, data_of, nap, sets, state, tag_of, until
from tests.cli.test_surface import _examples
from tpctl.bundle import archive
from tpctl.jobs import place
from tpctl.launch.local import tagged
from tpctl.schemas import load_schema

__all__ = ["state"]

PROMPT = "a very private lighthouse"
SECRET = "s3same-0pen-now"


def bundled(cli, job: str, name: str, *more: str) -> tuple[int, dict, archive.Bundle]:
    """Exit code, the command's data, and the bundle as it is read back."""
    done = cli("bundle", job, "--out", f"{name}.tar.gz", "-o", "json", *more)
    data = validated(done.stdout)["data"]
    found = archive.read(Path(f"{name}.tar.gz"))
    jsonschema.Draft202012Validator(load_schema("bundle-manifest")).validate(found.manifest)
    assert found.problems == ()
    assert found.manifest["items"] == data["items"]
    assert SECRET.encode() not in b"".join(found.files.values())
    return done.exit_code, data, found


def by_status(data: dict, status: str) -> set[str]:
    return {item["name"] for item in data["items"] if item["status"] == status and item["expected"]}


def triaged(cli, name: str) -> tuple[int, dict]:
    done = cli("triage", f"{name}.tar.gz", "-o", "json")
    return done.exit_code, validated(done.stdout)["data"]["runs"][0]


@pytest.fixture
def job(cli, state, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    monkeypatch.setenv("HOME", str(state.parent.parent))
    started = cli("up", "--name", "fox", "--no-referee", *sets("plan.tp=2", f"run.prompt={PROMPT}"))
    assert started.exit_code == 0, started.stderr
    until(cli, "fox", lambda data: (data["emitted"] or 0) >= 2, "two chunks")
    with (state / "fox" / "supervisor.log").open("a") as log:
        log.write(f"somebody wrote {SECRET} here\nand said {PROMPT}\n")
    return state / "fox"


def test_a_job_is_bundled_whatever_its_state_and_triage_reads_it_anywhere(cli, job, state, tmp_path):
    code, data, running = bundled(cli, "fox", "running")
    assert (code, by_status(data, "missing"), by_status(data, "unreadable")) == (0, set(), set()), data["items"]
    assert {"proc/0/rank0.json", "proc/0/rank1.json", "runs/0/ranks/rank1.blackbox"} <= set(running.files)
    assert "library.libtorch_cpu.so" in json.loads(running.files["proc/0/rank1.json"])
    decoded = json.loads(running.files["decoded/0/rank1.json"])
    assert decoded["state"] == "running"
    assert decoded["commitments"][-1]["action"]
    assert json.loads(running.files["job/status.json"])["state"] == "running"
    assert PROMPT.encode() in running.files["runs/0/config.toml"]
    assert b"[secret]" in running.files["job/supervisor.log"]
    assert "job/supervisor.log" in {item["name"] for item in data["items"] if item["status"] == "redacted"}
    assert str(tmp_path).encode() not in b"".join(
        raw for name, raw in running.files.items() if not name.endswith(".blackbox")
    )
    assert stat.S_IMODE(Path("running.tar.gz").stat().st_mode) == 0o600
    assert "the job still" in triaged(cli, "running")[1]["sentence"] or triaged(cli, "running")[1]["kind"] == "running"

    code, _, silent = bundled(cli, "fox", "silent", "--without-prompts")
    assert code == 0
    assert PROMPT.encode() not in b"".join(silent.files.values())
    assert archive.read(Path("silent.tar.gz")).manifest["prompts"] is False

    pids = [rank["pid"] for rank in data_of(cli, "status", "fox")["ranks"]]
    os.kill(pids[1], signal.SIGSTOP)
    assert cli("wait", "fox", "--for", "wedged", "--timeout", "30").exit_code == 0
    code, _, wedged = bundled(cli, "fox", "wedged")
    assert code == 0
    assert wedged.manifest["runs"] == [{"label": "0", "lives": {"0": "alive", "1": "stopped"}}]

    os.kill(data_of(cli, "status", "fox")["supervisor_pid"], signal.SIGKILL)
    for pid in tagged(tag_of(state, "fox")):
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + DEADLINE_S
    while tagged(tag_of(state, "fox")):
        assert time.monotonic() < end
        nap.wait(0.05)
    code, data, _ = bundled(cli, "fox", "dead")
    assert code == 0, by_status(data, "missing")
    # The processes are gone by now; the bundle of the hang still tells of the hang.
    code, run = triaged(cli, "wedged")
    assert (code, run["triggers"], run["fm"], run["victims"]) == (3, [1], "FM-41", [0]), run["sentence"]
    assert run["run"] == "wedged.tar.gz"
    assert "tpctl-bundle-" not in json.dumps(run)
    assert triaged(cli, "dead")[1]["fm"] != "FM-41"

    same = cli("bundle", "diff", "dead.tar.gz", "dead.tar.gz", "-o", "json")
    assert (same.exit_code, validated(same.stdout)["data"]["rows"]) == (0, [])
    differ = cli("bundle", "diff", "wedged.tar.gz", "dead.tar.gz", "-o", "json")
    rows = {row["key"]: row for row in validated(differ.stdout)["data"]["rows"]}
    assert differ.exit_code == 3
    assert (rows["status.state"]["a"], rows["status.state"]["b"]) == ("wedged", "lost")
    assert "config" not in {row["topic"] for row in rows.values()}
    assert "wedged" in cli("bundle", "diff", "wedged.tar.gz", "dead.tar.gz").stdout

    place.find("fox").record.unlink()
    (job / "attempts/0/ranks/rank1.json").unlink()
    (job / "attempts/0/ranks/rank0.blackbox").write_bytes(b"no box")
    (job / "config.toml").write_text("[")
    code, data, halved = bundled(cli, "fox", "halved", "--without-prompts")
    assert code == 5
    assert by_status(data, "missing") == {"job/job.json", "runs/0/ranks/rank1.json"}
    assert {"job/config.toml", "job/status.json", "decoded/0/rank0.json"} <= by_status(data, "unreadable")
    assert all(item["why"] for item in data["items"] if item["status"] in ("missing", "unreadable", "truncated"))
    assert halved.files["runs/0/ranks/rank0.blackbox"] == b"no box"
    assert triaged(cli, "halved")[0] == 5
    unclear = cli("bundle", "diff", "dead.tar.gz", "halved.tar.gz", "-o", "json")
    assert unclear.exit_code == 3
    assert "topic" in cli("bundle", "diff", "dead.tar.gz", "halved.tar.gz").stdout

    code, data, small = bundled(cli, "fox", "small", "--max-mib", "1")
    assert sum(map(len, small.files.values())) <= 1 << 20
    shutil.rmtree(job / "attempts")
    code, data, _ = bundled(cli, "fox", "bare")
    assert code == 5
    assert "runs" in by_status(data, "missing")


def test_a_full_bundle_says_what_it_had_no_room_for(cli, tmp_path):
    run = tmp_path / "run"
    (run / "ranks").mkdir(parents=True)
    for name in ("a.log", "b.log"):
        (run / name).write_text("x" * (900 << 10) + "\n")
    code, data, found = bundled(cli, str(run), "full", "--max-mib", "1")
    assert code == 5
    (left,) = (item for item in data["items"] if item["name"] == "runs/run/b.log")
    assert (left["status"], left["sha256"]) == ("truncated", None)
    assert "no room" in left["why"]
    assert len(found.files["runs/run/a.log"]) == (900 << 10) + 1


def test_unknown_targets_and_archives_that_are_none(cli, state, tmp_path):
    assert cli("bundle", "nobody").exit_code == 7
    assert cli("bundle", "no/such/dir").exit_code == 7
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    wrong = cli("bundle", "diff", "x.tar.gz", "x.tar.gz")
    assert wrong.exit_code == 2
    assert "TP-8010" in wrong.stderr
    assert cli("bundle").exit_code == 2
    assert "diff" in cli("bundle", "--help").stdout
    for example in _examples(["bundle", "create"], cli):
        assert cli(*example.split()[1:]).exit_code == 7, example  # parsed, and there is no job JOB
    for example in _examples(["bundle", "diff"], cli):
        assert "TP-8010" in cli(*example.split()[1:]).stderr, example
    assert list(tmp_path.glob("*bundle*")) == []


def test_the_table_of_a_bundle_fits_80_columns(cli, tmp_path):
    run = tmp_path / "run"
    (run / "ranks").mkdir(parents=True)
    (run / "launcher.log").write_text("x\n")
    shown = cli("bundle", str(run), "--out", "a.tar.gz").stdout.splitlines()
    assert max(len(line) for line in shown if not line.startswith("lacks")) <= 80, shown
