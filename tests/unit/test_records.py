"""Chunk records: whole lines come back, a torn one waits, everything else is refused; a full disk harms nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.records import ChunkRecords, Header, RecordReader, RecordsError, read_records

HEAD = Header("job-a", 1, 2, 2)


def row(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "chunk_index": index,
        "call_id": index + 1,
        "cache_epoch": 0,
        "current_start_frame": 3 * index,
        "start_frame": 0,
        "expected_generator_calls": 4,
        "observed_generator_calls": 4,
        **changes,
    }


def written(path: Path, chunks: int = 3) -> Path:
    warnings: list[str] = []
    records = ChunkRecords(path, HEAD, warnings.append)
    for index in range(chunks):
        records.append(row(index), (12, 12), (12, 12))
    assert not warnings
    return path


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    records = read_records(written(tmp_path / "r"))
    assert records.header == HEAD
    assert [chunk["chunk_index"] for chunk in records.chunks] == [0, 1, 2]
    assert records.chunks[2]["global_end_index"] == [12, 12]
    assert not records.torn


def test_a_torn_last_line_is_left_out_and_reported_and_read_when_it_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    reader = RecordReader(path)
    assert [chunk["chunk_index"] for chunk in reader.poll()] == [0, 1]
    assert reader.torn
    with path.open("ab") as stream:
        stream.write(whole[-20:])
    assert [chunk["chunk_index"] for chunk in reader.poll()] == [2]
    assert not reader.torn


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda lines: ["hello"], "line 1: no JSON"),
        (lambda lines: ["[1]"], "line 1: no object"),
        (lambda lines: [json.dumps({"schema": "other"}), *lines[1:]], "is not a file of chunk records"),
        (lambda lines: [lines[0].replace('"schema_version":1', '"schema_version":9')], "version 9"),
        (lambda lines: [lines[0].replace('"rank":1', '"rank":2')], "damaged header"),
        (lambda lines: [lines[0], lines[1][:30], lines[2]], "line 2: no JSON"),
        (lambda lines: [lines[0], lines[1].replace("[12,12]", "[12]")], "one number for each of 2 layers"),
        (lambda lines: [lines[0], lines[1].replace('"cache_epoch":0', '"cache_epoch":"0"')], "cache_epoch is '0'"),
    ],
)
def test_what_is_no_record_file_is_refused(edit: Any, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(RecordsError, match="r ") as caught:
        read_records(path)
    assert sentence in caught.value.message


def test_an_empty_file_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"")
    with pytest.raises(RecordsError, match="not even its header"):
        read_records(tmp_path / "r")
    with pytest.raises(RecordsError, match="No such file"):
        read_records(tmp_path / "none")


def test_a_full_disk_stops_the_recording_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "r").symlink_to("/dev/full")
    warnings: list[str] = []
    records = ChunkRecords(tmp_path / "r", HEAD, warnings.append)
    records.append(row(0), (12, 12), (12, 12))
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    with pytest.raises(RecordsError, match="not a plain file"):
        read_records(tmp_path / "r")


def test_no_directory_harms_nobody_either(tmp_path: Path) -> None:
    warnings: list[str] = []
    ChunkRecords(tmp_path / "no" / "r", HEAD, warnings.append).append(row(0), (1, 1), (1, 1))
    assert len(warnings) == 1
    assert "from the start" in warnings[0]


def test_lines_survive_kill_9(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from engine.records import *\n"
        "from tests.unit.test_records import HEAD, row\n"
        "records = ChunkRecords(Path(sys.argv[1]), HEAD, print); records.append(row(0), (1, 1), (1, 1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "r")], timeout=30, check=False, cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert [chunk["chunk_index"] for chunk in read_records(tmp_path / "r").chunks] == [0]
