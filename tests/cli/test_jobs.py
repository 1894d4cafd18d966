"""Jobs on real ranks: started, seen, drained by a signal, started again after a failure, and judged when dead."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import validated
from tests.cli.jobs import DEADLINE_S, data_of, in_state, nap, sets, state, tag_of, until
from tpctl.jobs import place
from tpctl.launch.local import tagged

__all__ = ["state"]


def test_a_job_is_started_seen_and_drained_by_a_signal(cli, state):
    started = validated(cli("up", "--name", "one", *sets("plan.tp_plan=pp0"), "-o", "json").stdout)["data"]
    assert started["world_size"] == 2
    assert started["chunks"] == 0
    running = until(cli, "one", lambda data: (data["emitted"] or 0) >= 3, "three chunks")
    assert running["state"] == "running"
    assert running["verdict"] == "PASS"
    assert [rank["state"] for rank in running["ranks"]] == ["running", "running"]
    assert running["frame_age_s"] >= 0
    assert running["ranks"][1]["commitment"]

    for path in (state / "one", state / "one" / "attempts" / "0"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    again = cli("up", "--name", "one", "--yes", *sets())
    assert again.exit_code == 2
    assert "TP-7618" in again.stderr
    listed = data_of(cli, "ps")["jobs"]
    assert [(job["name"], job["state"]) for job in listed] == [("one", "running")]

    os.kill(started["pid"], signal.SIGTERM)
    over = until(cli, "one", in_state("drained", "failed", "aborted", "lost"), "the drain")
    assert over["state"] == "drained"
    assert over["account"]["accepted"] == over["account"]["emitted"] >= 3
    assert over["account"]["abandoned"] == 0
    assert tagged(tag_of(state, "one")) == []
    assert data_of(cli, "ps")["jobs"] == []
    assert [job["state"] for job in data_of(cli, "ps", "--all")["jobs"]] == ["drained"]

    taken = cli("up", "--name", "one", *sets())
    assert taken.exit_code == 2
    assert "TP-7617" in taken.stderr
    assert (state / "one" / "attempts" / "0" / "ranks" / "rank0.json").exists()


def test_in_the_foreground_it_ends_with_the_stream(state, tmp_path, cli):
    timeline = tmp_path / "timeline.toml"
    timeline.write_text('[[event]]\nat_chunk = 0\nprompt = "a lighthouse in fog"\n')
    command = [sys.executable, "-m", "tpctl", "up", "--name", "clip", "--foreground", "--chunks", "2", "-o", "json"]
    command += sets("plan.tp_plan=v0", "plan.tp=2", f"run.timeline={timeline}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "supervisor: attempt 0: 2 rank(s)" in done.stderr
    validated(done.stdout)
    timeline.unlink()  # the job has its own copy
    assert "lighthouse" in (state / "clip" / "timeline.toml").read_text()
    over = data_of(cli, "status", "clip")
    assert over["state"] == "finished"
    assert over["account"] == {"accepted": 2, "emitted": 2, "dropped": 0, "abandoned": 0}


def test_a_failed_attempt_is_followed_by_another_and_keeps_its_evidence(cli, state):
    assert cli("up", "--name", "night", "--restart", "on-failure", *sets("plan.tp=2")).exit_code == 0
    first = until(cli, "night", lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
    os.kill(first["ranks"][1]["pid"], signal.SIGKILL)
    until(cli, "night", lambda data: data["restarts"] == 1, "the restart")
    second = until(cli, "night", lambda data: data["state"] == "running" and data["emitted"], "chunks again")
    assert [attempt["number"] for attempt in second["attempts"]] == [0, 1]
    assert "rank 1" in second["attempts"][0]["reason"]
    assert second["attempts"][1]["reason"] is None
    assert (state / "night" / "attempts" / "0" / "ranks" / "rank1.blackbox").exists()
    os.kill(second["supervisor_pid"], signal.SIGTERM)
    assert until(cli, "night", in_state("drained", "failed", "lost"), "the drain")["state"] == "drained"


def test_without_its_supervisor_a_job_ends_itself_and_status_tells_the_truth(cli, state):
    started = data_of(cli, "up", "--name", "orphan", *sets("plan.tp_plan=pp1", "plan.tp=2"))
    until(cli, "orphan", lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
    os.kill(started["pid"], signal.SIGKILL)
    lost = until(cli, "orphan", in_state("lost"), "the loss")
    assert lost["verdict"] == "FAIL"
    assert cli("status", "orphan").exit_code == 3
    end = time.monotonic() + 30  # the watchdog's default, and more than a drain takes
    while tagged(tag_of(state, "orphan")):
        assert time.monotonic() < end, "ranks outlived their supervisor"
        nap.wait(0.1)
    account = data_of(cli, "status", "orphan")["account"]
    assert account["accepted"] == account["emitted"]
    refused = cli("up", "--name", "orphan", *sets())
    assert "TP-7617" in refused.stderr
    assert "left no ending" in refused.stderr
    again = cli("up", "--name", "orphan", "--yes", *sets())
    assert again.exit_code == 0, again.stderr
    os.kill(data_of(cli, "status", "orphan")["supervisor_pid"], signal.SIGTERM)
    until(cli, "orphan", in_state("drained"), "the end of its heir")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "x" * 64, "two words"])
def test_a_name_that_cannot_be_one(name, cli, state):
    wrong = cli("up", "--name", name, *sets())
    assert wrong.exit_code == 2
    assert "TP-7611" in wrong.stderr or "TP-7613" in wrong.stderr
    assert place.names() == []


def test_a_path_too_long_for_a_socket_is_named(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / ("d" * 100)))
    for more in ([], ["--dry-run"]):
        wrong = cli("up", "--name", "one", *more)
        assert wrong.exit_code == 2
        assert "TP-7613" in wrong.stderr
        assert "107" in wrong.stderr
    assert place.names() == []


def test_a_dry_run_starts_nothing(cli, state):
    said = data_of(cli, "up", "--dry-run", "--chunks", "8")
    assert said["dry_run"]
    assert said["chunks"] == 8
    assert not state.exists()


def test_an_unknown_job_is_refused_with_the_nearest(cli, state):
    place.make("preview")
    wrong = cli("status", "previw")
    assert wrong.exit_code == 7
    assert "did you mean 'preview'" in wrong.stderr


def test_a_directory_that_others_can_read_is_refused(cli, state):
    place.make("open").path.chmod(0o755)
    assert "TP-7612" in cli("status", "open").stderr


@pytest.mark.parametrize(
    ("text", "code"),
    [("{", "TP-7614"), ('{"schema": "tpctl.job", "schema_version": 2}', "TP-7615"), ("[]", "TP-7614")],
)
def test_a_record_that_cannot_be_read_is_unknown_not_well(text, code, cli, state):
    place.make("odd").record.write_text(text)
    assert code in cli("status", "odd").stderr
    listed = cli("ps", "-o", "json")
    assert listed.exit_code == 5
    assert validated(listed.stdout)["data"]["jobs"][0]["state"] == "unknown"


def test_a_stream_without_end_cannot_keep_its_latents(cli, state):
    wrong = cli("up", "--name", "one", "--set", "run.record_latents=true")
    assert wrong.exit_code == 2
    assert "until drained" in wrong.stderr
    assert place.names() == []
