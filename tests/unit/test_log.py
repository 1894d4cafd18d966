"""A rank's log: its lines, its bound on the disk, and that it never harms the rank."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import jsonschema
import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.log import Level, Log, log_path, older
from tpctl.logs.sources import RankLog
from tpctl.schemas import load_schema

IDS = {"call_id": 7, "chunk_index": 3, "cache_epoch": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "ranks").mkdir()
    return log_path(tmp_path, 0)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_carries_the_ids_of_the_frame_in_work(path):
    journal = Log(path, 0, lambda: IDS, Level.debug)
    journal.role = "stage0"
    journal.info("state", "from now on running", state="running")
    journal.debug("chunk", "done", ids={"call_id": 8, "chunk_index": 4, "cache_epoch": 1})
    journal.failed({"code": "TP-1", "fm": None, "exit_code": 70, "next": "x", "message": "m" * 9000, "ids": {}})
    head, state, chunk, error = lines(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {key: state[key] for key in IDS} == IDS
    assert (chunk["call_id"], chunk["seq"], chunk["level"]) == (8, 2, "debug")
    assert (len(error["message"]), error["data"]["exit_code"], error["call_id"]) == (4096, 70, 7)
    assert (head["rank"], head["after_seq"]) == (0, 0)
    validator = jsonschema.Draft202012Validator(load_schema("log"))
    for line in (head, state, chunk, error):
        validator.validate(line)


def test_what_is_below_the_level_is_not_written(path):
    journal = Log(path, 0, level=Level.warning)
    journal.info("state", "unheard")
    journal.warning("warning", "heard")
    assert [line.get("message") for line in lines(path)] == [None, "heard"]


def test_files_are_set_aside_at_their_size_and_the_oldest_goes(path):
    journal = Log(path, 0, max_bytes=2048, keep=2)
    reader, seen = RankLog(path.parents[1], 0), []
    for number in range(200):
        journal.info("tick", "x" * 50, number=number)
        if number % 3 == 0:  # a reader that looks now and then misses nothing
            seen += reader.poll()
    seen += reader.poll()
    assert [entry.data["number"] for entry in seen] == list(range(200))
    assert reader.problems == []
    files = sorted(path.parent.iterdir())
    assert files == sorted([path, older(path, 1), older(path, 2)])
    assert all(0 < file.stat().st_size <= 2048 for file in files)
    assert lines(path)[0]["after_seq"] == lines(older(path, 1))[-1]["seq"]
    late = RankLog(path.parents[1], 0)  # what was rotated away is not there, and what there is comes in order
    numbers = [entry.data["number"] for entry in late.poll()]
    assert numbers == list(range(numbers[0], 200))
    assert numbers[0] > 0


def test_a_reader_that_slept_over_a_rotation_says_what_is_gone(path):
    journal = Log(path, 0, max_bytes=2048, keep=1)
    reader = RankLog(path.parents[1], 0)
    journal.info("tick", "first")
    assert len(reader.poll()) == 1
    for _ in range(100):
        journal.info("tick", "x" * 50)
    entries = reader.poll()
    assert entries[-1].seq == 101
    assert f"events 2 to {entries[0].seq - 1} are gone" in reader.problems[0]


def test_a_disk_that_refuses_ends_the_log_and_not_the_rank(path, capsys):
    journal = Log(path.parent / "none" / "rank0.log.jsonl", 0)
    journal.error("error", "unheard")
    assert "no log from here on" in capsys.readouterr().err
    full = Log(path, 0, lambda: IDS)
    full._fd = -1  # what a write is refused with does not matter
    full.info("state", "lost")
    full.info("state", "not tried again")
    assert capsys.readouterr().err.count("no log from here on") == 1


def test_threads_share_one_order(path):
    journal = Log(path, 0)
    threads = [threading.Thread(target=lambda: [journal.info("tick", "x") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [line["seq"] for line in lines(path)[1:]] == list(range(1, 801))


def test_a_line_that_gets_no_turn_is_counted(path, monkeypatch):
    monkeypatch.setattr("engine.log.TURN_S", 0.0)
    journal = Log(path, 0)
    with journal._turn:
        journal.info("state", "lost")
    journal.info("state", "kept")
    assert lines(path)[1]["data"] == {"lost": 1}
    assert lines(path)[1]["message"] == "kept"


def test_a_rank_that_starts_anew_in_its_place_begins_anew(path):
    old = Log(path, 0, max_bytes=2048, keep=2)
    for _ in range(100):
        old.info("tick", "x" * 50)
    Log(path, 0, max_bytes=2048, keep=2)
    assert list(path.parent.iterdir()) == [path]
    assert lines(path)[0]["after_seq"] == 0


@pytest.mark.parametrize(
    "changes", [{"log__level": "loud"}, {"log__max_bytes": 100}, {"log__keep": -1}], ids=["level", "size", "keep"]
)
def test_the_configuration_is_checked(changes):
    with pytest.raises(ConfigError, match="log"):
        EngineConfig().replace(**changes)
