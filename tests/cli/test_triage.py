"""`tpctl triage` on real runs: healthy, killed, alive and stopped; and on copies of them that were damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig, from_dict
from tests.cli.conftest import validated
from tests.cli.test_surface import _examples
from tests.support.ranks import run_ranks, start_ranks
from tpctl.commands import triage as command
from tpctl.evidence import gather
from tpctl.examination import examine
from tpctl.output import cell, plain_table
from tpctl.verdict import Verdict


def make_config(cache: Path, chunks: int) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "plan": {"tp": 2},
        "run": {"chunks": chunks},
        "sink": {"kinds": ["null"]},
    }
    return from_dict(base)


@pytest.fixture(scope="module")
def healthy(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = run_ranks(tmp_path_factory.mktemp("triage") / "healthy", make_config(weights_cache, 2))
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    return outcome.run_dir


@pytest.fixture(scope="module")
def killed(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looked at while it lived, while rank 1 was stopped, and left behind with rank 1 killed."""
    run = tmp_path_factory.mktemp("triage") / "killed"
    with start_ranks(run, make_config(weights_cache, 10_000)) as job:
        job.wait_for(lambda: job.reached(1, "leave B", 1), "chunk 1 on rank 1")
        alive = examine(run)
        assert (alive.found.verdict, alive.found.kind) == (Verdict.UNKNOWN, "running")
        assert "the job still lives (rank 0, 1)" in alive.notes[0]
        assert len(alive.stacks) == (2 if shutil.which("py-spy") else 0)
        job.processes[1].send_signal(signal.SIGSTOP)
        job.wait_for(lambda: gather(run).ranks[1].life == "stopped", "the stop")
        stopped = examine(run).found
        assert (stopped.verdict, stopped.triggers, stopped.fm) == (Verdict.FAIL, (1,), "FM-41")
        os.kill(job.processes[1].pid, signal.SIGKILL)
        outcome = job.end(60)
    assert outcome.exit_codes == {0: 74, 1: -9}, outcome.stderr
    return run


@pytest.fixture
def copy(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "run"))


def test_a_healthy_run_passes(cli, healthy: Path) -> None:
    result = cli("triage", str(healthy), "-o", "json")
    data = validated(result.stdout)
    (run,) = data["data"]["runs"]
    assert (result.exit_code, data["verdict"], run["kind"], run["blame"]) == (0, "PASS", "drained", "nobody"), run
    assert data["coverage"] == {"checked": 2, "expected": 2}
    assert (data["next"], run["problems"]) == ([], [])
    assert [row["commitment"] for row in run["ranks"]] == ["send SHUTDOWN", "recv SHUTDOWN"]


def test_the_killed_rank_is_named_and_its_peer_is_a_victim(cli, killed: Path) -> None:
    result = cli("triage", str(killed), "-o", "json")
    (run,) = validated(result.stdout)["data"]["runs"]
    assert result.exit_code == 3
    assert (run["triggers"], run["victims"], run["fm"], run["runbook"]) == ([1], [0], "FM-40", "rank-lost")
    assert [row["role"] for row in run["ranks"]] == ["victim", "trigger"]
    assert run["ranks"][1]["site"].startswith("engine/")
    assert run["ranks"][0]["exit_code"] == 74
    assert [act["after"] for act in run["acts"]] == sorted(act["after"] for act in run["acts"])
    assert run["next"]


def test_the_tables_fit_a_terminal_of_80_columns(killed: Path) -> None:
    case = examine(killed)
    for table in (command.table_of_ranks(case), command.table_of_runs([case])):
        narrow = [column for column in table.columns if column.narrow]
        cells = [[cell(row.get(column.key)) for column in narrow] for row in table.rows]
        lines = plain_table([column.heading for column in narrow], cells, [column.right for column in narrow])
        assert max(len(line) for line in lines) <= 80, lines


def test_every_example_runs(cli, healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(healthy.parent)
    examples = _examples(["triage"], cli)
    assert len(examples) == 4
    assert cli("bundle", healthy.name, "--out", "healthy.tar.gz").exit_code == 0
    meant = {"RUN": healthy.name, "BUNDLE": "healthy.tar.gz"}
    for example in examples:
        words = [meant.get(word, word) for word in example.split()]
        assert cli(*words[1:]).exit_code == 0, example


def test_many_runs_are_triaged_at_once(cli, healthy: Path, killed: Path, tmp_path: Path) -> None:
    for name, source in (("good", healthy), ("bad", killed), ("worse", killed)):
        shutil.copytree(source, tmp_path / "root" / name)
    result = cli("triage", "root", "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 3
    assert {Path(run["run"]).name: run["triggers"] for run in data["data"]["runs"]} == {
        "bad": [1],
        "good": [],
        "worse": [1],
    }
    assert [step.split("/")[-1] for step in data["next"]] == ["bad", "worse"]
    table = cli("triage", "root").stdout
    assert "3 runs: 1 PASS, 2 FAIL" in table
    shutil.rmtree(tmp_path / "root" / "worse")
    assert "role" in cli("triage", "root").stdout  # one failed: its ranks are shown too


def test_what_is_no_run_is_refused_with_a_next_command(cli, healthy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle.tar.gz").write_bytes(b"x")
    (tmp_path / "bundle.zip").write_bytes(b"x")
    for name, code, words in (
        ("none", "TP-7501", "ls runs"),
        ("empty", "TP-7504", "ls runs"),
        ("bundle.tar.gz", "TP-7503", "tar -xf bundle.tar.gz"),
        ("bundle.zip", "TP-7503", "unzip bundle.zip"),
    ):
        result = cli("triage", name)
        assert result.exit_code == 7
        assert code in result.stderr
        assert words in result.stderr


def rank_file(run: Path, end: str, rank: int = 1) -> Path:
    return run / "ranks" / f"rank{rank}.{end}"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_box(run: Path) -> None:
    shutil.copy(rank_file(run, "blackbox", 0), rank_file(run, "blackbox"))


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: rank_file(run, "json").unlink(), "its report is missing"),
        (lambda run: rank_file(run, "blackbox").unlink(), "rank 1 has no black box"),
        (lambda run: rank_file(run, "chunks.jsonl").unlink(), "rank 1 has no chunk records"),
        (lambda run: [path.unlink() for path in run.glob("ranks/rank1.*")], "rank 1 left nothing"),
        (lambda run: rank_file(run, "json").write_text("{"), "rank1.json is damaged: no JSON"),
        (lambda run: rank_file(run, "json").write_text("[" * 100_000), "rank1.json is damaged: no JSON"),
        (lambda run: rank_file(run, "json").write_text("[]"), "rank1.json is damaged: no object"),
        (lambda run: edit(rank_file(run, "json"), schema="x"), "is no tpctl.rank-report file"),
        (lambda run: edit(rank_file(run, "json"), schema_version=2), "version 2"),
        (lambda run: edit(rank_file(run, "json"), rank=5), "says it is of rank 5"),
        (lambda run: edit(rank_file(run, "json"), exit_code="0"), "exit_code is '0'"),
        (lambda run: edit(rank_file(run, "json"), error=[1]), "error is no object"),
        (lambda run: edit(rank_file(run, "json"), pid=1), "different processes"),
        (lambda run: make_fifo(rank_file(run, "json")), "is not a plain file"),
        (lambda run: make_fifo(rank_file(run, "blackbox")), "is not a plain file"),
        (lambda run: os.truncate(rank_file(run, "blackbox"), 9000), "is cut short"),
        (lambda run: rank_file(run, "blackbox").write_bytes(b"\0" * 9000), "is not a black box"),
        (other_box, "says it is of rank 0"),
        (lambda run: rank_file(run, "chunks.jsonl").write_bytes(b"\xff\n"), "its header is no JSON"),
        (lambda run: os.truncate(rank_file(run, "chunks.jsonl"), 300), "is torn"),
        (
            lambda run: rank_file(run, "chunks.jsonl").write_text(
                rank_file(run, "chunks.jsonl").read_text().replace('"job":"', '"job":"x')
            ),
            "is of another job",
        ),
        (lambda run: (run / "referee.json").write_text("{"), "referee.json is damaged"),
        (
            lambda run: (run / "referee.json").write_text('{"schema": "tpctl.referee", "schema_version": 2}'),
            "version 2 of tpctl.referee",
        ),
        (
            lambda run: (run / "referee.log").write_text("referee: frozen [FM-41]: rank 1 is stopped\n"),
            "referee.json is missing",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_never_a_pass(
    damage: Callable[[Path], object], sentence: str, cli, copy: Path
) -> None:
    damage(copy)
    result = cli("triage", str(copy), "-o", "json")
    data = validated(result.stdout)
    assert (result.exit_code, data["verdict"]) == (5, "UNKNOWN"), data["findings"]
    assert any(sentence in finding["message"] for finding in data["findings"]), data["findings"]
    assert data["data"]["runs"][0]["blame"] == "nobody"


def test_ranks_of_a_larger_job_before_this_one_are_left_out(cli, copy: Path) -> None:
    for end in ("json", "blackbox"):
        shutil.copy(rank_file(copy, end), rank_file(copy, end, 3))
    data = validated(cli("triage", str(copy), "-o", "json").stdout)
    assert data["verdict"] == "UNKNOWN"
    assert "rank 3 is not of this run, which has 2" in data["findings"][1]["message"]
    assert [row["rank"] for row in data["data"]["runs"][0]["ranks"]] == [0, 1]


def test_a_file_cannot_command_the_terminal(cli, copy: Path) -> None:
    error = {"code": "TP-6001", "message": "\x1b[2J\x07gone", "fm": "FM-31", "exit_code": 70}
    edit(rank_file(copy, "json"), exit_code=70, error=error)
    result = cli("triage", str(copy))
    assert result.exit_code == 3
    assert "gone" in result.stdout
    assert "\x1b" not in result.stdout


def test_random_damage_neither_crashes_nor_convicts_the_wrong_rank(killed: Path, tmp_path: Path) -> None:
    """Flipped bytes, cut files and swapped ranks, from a fixed seed."""
    dice = random.Random(3)
    for number in range(60):
        run = Path(shutil.copytree(killed, tmp_path / str(number)))
        files = [path for path in sorted(run.glob("ranks/*")) if path.is_file()]
        for path in dice.sample(files, dice.randint(1, 3)):
            raw = bytearray(path.read_bytes())
            how = dice.choice(("flip", "cut", "remove"))
            if how == "remove":
                path.unlink()
            elif how == "cut":
                path.write_bytes(raw[: dice.randrange(len(raw))])
            else:
                for _ in range(dice.choice((1, 8, 400))):
                    raw[dice.randrange(len(raw))] = dice.randrange(256)
                path.write_bytes(raw)
        case = examine(run)
        assert case.found.verdict is not Verdict.PASS, number
        assert set(case.found.triggers) <= {1}, (number, case.found)
        json.dumps(case.to_dict())
        shutil.rmtree(run)


def test_flight_recorder_dumps_are_read_as_json_only(cli, killed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    entry = {"profiling_name": "nccl:all_reduce", "collective_seq_id": 7, "state": "started"}
    (run / "nccl_trace_rank_0.json").write_text(json.dumps({"version": "2.9", "entries": [entry]}))
    (run / "nccl_trace_rank_1").write_bytes(b"\x80\x04cos\nsystem\n")
    (found,) = validated(cli("triage", str(run), "-o", "json").stdout)["data"]["runs"]
    assert [record["last"] for record in found["flight_recorder"]] == ["nccl:all_reduce 7 started"]
    assert any("a pickle is not opened" in note for note in found["notes"])


def test_stacks_come_from_py_spy_where_it_is(
    weights_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of that name stands on the PATH: it is asked once for each live rank, and never to pause it."""
    tool = tmp_path / "bin" / "py-spy"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "Process $4: $2"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with start_ranks(tmp_path / "run", make_config(weights_cache, 10_000)) as job:
        for rank in (0, 1):
            job.wait_for(rank_file(tmp_path / "run", "blackbox", rank).exists, "the black boxes")
        case = examine(tmp_path / "run")
        pids = {rank: process.pid for rank, process in job.processes.items()}
    assert {stack["rank"]: stack["lines"] for stack in case.stacks} == {
        rank: [f"Process {pid}: --nonblocking"] for rank, pid in pids.items()
    }
