"""`tpctl kv-audit` on records of real ranks, and on copies of them in which one thing was altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig, from_dict
from tests.cli.conftest import validated
from tests.support.ranks import run_ranks, start_ranks

CHUNKS = 3


def make_config(cache: Path, **dotted: object) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "plan": {"tp": 2},
        "run": {"chunks": CHUNKS},
        "sink": {"kinds": ["null"]},
    }
    return from_dict(base).replace(**dotted)


@pytest.fixture(scope="module")
def real(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = run_ranks(tmp_path_factory.mktemp("audit") / "run", make_config(weights_cache))
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    return outcome.run_dir


@pytest.fixture
def copy(real: Path, tmp_path: Path) -> Path:
    shutil.copytree(real, tmp_path / "run")
    return tmp_path / "run"


def records(run: Path, rank: int = 1) -> Path:
    return run / "ranks" / f"rank{rank}.chunks.jsonl"


def edit(path: Path, line: int, change: Callable[[dict], None]) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[line])
    change(row)
    lines[line] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")


def add_third_rank(run: Path) -> None:
    for rank in (0, 1):
        edit(records(run, rank), 0, lambda head: head.update(world_size=3))
    shutil.copy(records(run, 0), records(run, 2))
    edit(records(run, 2), 0, lambda head: head.update(rank=2))
    report = json.loads((run / "ranks" / "rank1.json").read_text()) | {"rank": 2}
    (run / "ranks" / "rank2.json").write_text(json.dumps(report))


def test_a_healthy_run_is_consistent(cli, real: Path) -> None:
    result = cli("kv-audit", str(real), "-o", "json")
    data = validated(result.stdout)
    assert (result.exit_code, data["verdict"], data["data"]["answer"]) == (0, "PASS", "consistent"), data
    assert data["coverage"] == {"checked": 2 * CHUNKS, "expected": 2 * CHUNKS}
    assert data["data"]["keys"] == CHUNKS
    assert len(data["data"]["job"]) == 32


def test_an_altered_index_is_named_by_chunk_layer_and_field(cli, copy: Path) -> None:
    edit(records(copy), 2, lambda row: row["local_end_index"].__setitem__(1, 99))
    edit(records(copy), 3, lambda row: row.update(start_frame=77))
    result = cli("kv-audit", str(copy), "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 3
    first = data["data"]["first"]
    assert (first["chunk_index"], first["layer"], first["field"]) == (1, 1, "local_end_index")
    assert first["by_rank"]["1"] == 99
    assert first["odd"] == []  # two ranks: the difference, no culprit
    assert data["data"]["differences"] == 2


def test_three_ranks_convict_the_odd_one(cli, copy: Path) -> None:
    add_third_rank(copy)
    edit(records(copy, 0), 1, lambda row: row["global_end_index"].__setitem__(0, 5))
    first = validated(cli("kv-audit", str(copy), "-o", "json").stdout)["data"]["first"]
    assert (first["chunk_index"], first["layer"], first["odd"]) == (0, 0, [0])
    assert "the odd one out: rank 0" in first["sentence"]


def test_an_altered_epoch_is_a_difference_of_the_key_itself(cli, copy: Path) -> None:
    edit(records(copy), 2, lambda row: row.update(cache_epoch=4))
    result = cli("kv-audit", str(copy), "-o", "json")
    first = validated(result.stdout)["data"]["first"]
    assert result.exit_code == 3
    assert (first["chunk_index"], first["field"], first["by_rank"]) == (1, "cache_epoch", {"0": 0, "1": 4})


def foreign_job(run: Path) -> None:
    edit(records(run), 0, lambda head: head.update(job="another"))


def other_version(run: Path) -> None:
    edit(records(run), 0, lambda head: head.update(schema_version=9))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: records(run).unlink(), "rank 1 has no chunk records"),
        (lambda run: records(run).write_bytes(records(run).read_bytes()[:-30]), "the last line of rank 1 is torn"),
        (lambda run: records(run).write_text("\n".join(records(run).read_text().split("\n")[:3]) + "\n"), "reports 3"),
        (lambda run: records(run).write_bytes(b"\x00\xff\n"), "is damaged in line 1"),
        (lambda run: records(run).write_bytes(b""), "rank 1 reports 3 chunks, 0 are recorded"),
        (lambda run: shutil.copy(records(run, 0), records(run)), "says it is of rank 0"),
        (lambda run: (run / "ranks" / "rank1.json").unlink(), "rank 1 left no report of its end"),
        (foreign_job, "of another"),
        (other_version, "version 9"),
    ],
)
def test_what_is_missing_leaves_it_open(damage: Callable[[Path], object], sentence: str, cli, copy: Path) -> None:
    damage(copy)
    result = cli("kv-audit", str(copy), "-o", "json")
    data = validated(result.stdout)
    assert (result.exit_code, data["data"]["answer"]) == (5, "indeterminate"), data["findings"]
    assert any(sentence in finding["message"] for finding in data["findings"]), data["findings"]


def test_no_run_at_all(cli, tmp_path: Path) -> None:
    assert cli("kv-audit", "none").exit_code == 7
    (tmp_path / "empty").mkdir()
    assert "no run directory" in cli("kv-audit", "empty").stderr
    (tmp_path / "empty" / "ranks").mkdir()
    assert cli("kv-audit", "empty").exit_code == 5


def test_live_follows_a_job_to_its_end_while_its_disk_is_full_on_one_rank(
    cli, weights_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "ranks").mkdir(parents=True)
    records(run).symlink_to("/dev/full")
    with start_ranks(run, make_config(weights_cache, run__chunks=30)) as job:
        job.wait_for(lambda: job.reached(0, "leave B", 1), "chunk 1")
        result = cli("kv-audit", str(run), "--live", "--timeout", "2", "-o", "json")
        outcome = job.end(60)
    # Recording failed on rank 1, the job did not; and the audit is honest about it.
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert any("No space left" in text for text in outcome.reports[1]["warnings"])
    assert result.exit_code in (5, 6)
    assert validated(result.stdout)["data"]["answer"] == "indeterminate"


def test_two_live_audits_at_once_agree_and_end_with_the_job(cli, weights_cache: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    with start_ranks(tmp_path / "run", make_config(weights_cache, run__chunks=10)) as job:
        job.wait_for(lambda: job.reached(0, "leave B", 0), "chunk 0")
        command = [sys.executable, "-m", "tpctl", "kv-audit", str(tmp_path / "run"), "--live", "-o", "json"]
        audits = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outcome = job.end(90)
        said = [validated(audit.communicate(timeout=60)[0]) for audit in audits]
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert [one["data"]["answer"] for one in said] == ["consistent"] * 2, said
    assert [one["coverage"] for one in said] == [{"checked": 20, "expected": 20}] * 2
