"""Chunk records: one line of JSON a chunk in `RUN/ranks/rank{r}.chunks.jsonl`, kept by every mesh rank as it works.

The first line is a header: which job, which rank of how many, how many layers, which fields. A line goes to the kernel
whole and at once, so `kill -9` loses nothing but the line in work. Recording never harms the job: a full disk ends the
recording, not the rank, and the rank says so. Free of torch, for tools that read while the job runs or after it.

Rank 0 of a pp plan has no cache, and so no history of one; it keeps stage records in `rank0.stages.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError

SCHEMA, SCHEMA_VERSION = "tpctl.chunk-records", 1
STAGES_SCHEMA = "tpctl.stage-records"
# Names the set and the meaning of the fields: records under different names are never compared.
ALGORITHM = "lifecycle-1"
# Equal on every rank of a mesh, or a cache has left the plan (contract, section 8).
IDENTITY = ("cache_epoch", "chunk_index", "call_id")
FIELDS = (
    "call_id",
    "control_epoch",
    "current_start_frame",
    "start_frame",
    "do_kv_recompute",
    "num_denoise_steps",
    "kv_cache_attention_bias",
    "init_cache",
    "reset_crossattn_cache",
    "expected_generator_calls",
    "observed_generator_calls",
    "input_digest_i64",
    "output_digest_i64",
)
LAYER_FIELDS = ("global_end_index", "local_end_index")
NUMBERS = (*IDENTITY, "current_start_frame", "start_frame", "expected_generator_calls", "observed_generator_calls")


class RecordsError(EngineError):
    """A record file that is no such thing, damaged, or of another version."""

    code = "TP-6211"
    next_step = "tpctl kv-audit RUN_DIR"


@dataclass(frozen=True)
class Header:
    """The first line. `job` is the same on all ranks of one launch and on no other."""

    job: str
    rank: int
    world_size: int
    layers: int
    algorithm: str = ALGORITHM


class RecordFile:
    """The writing side. `warn` is told once if recording had to stop; nothing is ever raised to the rank."""

    def __init__(self, path: Path, head: Mapping[str, Any], warn: Callable[[str], None], what: str) -> None:
        self._path = path
        self._warn = warn
        self._what = what
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._stop(error, "from the start")
        self._write(head, "from the start")

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one chunk."""
        self._write(row, f"from chunk {row['chunk_index']} on")

    def _write(self, row: Mapping[str, Any], since: str) -> None:
        if self._fd is None:
            return
        raw = (json.dumps(row, separators=(",", ":")) + "\n").encode()
        try:
            while raw:
                raw = raw[os.write(self._fd, raw) :]
        except OSError as error:
            self._stop(error, since)

    def _stop(self, error: OSError, since: str) -> None:
        """For good: a file with a gap would be worse than one that ends."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
        self._warn(f"no {self._what} {since}: {self._path.name}: {error.strerror}")


class ChunkRecords(RecordFile):
    """A mesh rank's."""

    def __init__(self, path: Path, header: Header, warn: Callable[[str], None]) -> None:
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(header)}
        super().__init__(path, head, warn, "chunk records")

    def append(
        self, record: Mapping[str, Any], global_end_index: Sequence[int], local_end_index: Sequence[int]
    ) -> None:
        """Add one chunk. The indices are in tokens, one for each layer."""
        self.add({**record, "global_end_index": list(global_end_index), "local_end_index": list(local_end_index)})


class StageRecords(RecordFile):
    """Of rank 0 in pp: when each chunk passed its stages, in milliseconds since `loop_ns` of the monotonic clock."""

    def __init__(self, path: Path, rank: int, loop_ns: int, warn: Callable[[str], None]) -> None:
        head = {"schema": STAGES_SCHEMA, "schema_version": SCHEMA_VERSION, "rank": rank, "loop_ns": loop_ns}
        super().__init__(path, head, warn, "stage records")


class RecordReader:
    """Reads a record file as it grows: each `poll` gives the chunks that came since.

    A last line without its end is left for the next poll; `torn` tells whether one waits.

    Raises (from `poll`):
        RecordsError: not a record file, another version, or a line that makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header | None = None
        self._offset = 0
        self._lines = 0
        self._rest = b""

    @property
    def torn(self) -> bool:
        return bool(self._rest)

    def poll(self) -> list[dict[str, Any]]:
        try:
            if not self.path.is_file() and self.path.exists():
                raise self._refuse("is not a plain file")  # reading a device might never end
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                raw = stream.read()
        except OSError as error:
            raise RecordsError(f"{self.path} cannot be read: {error.strerror}", where=str(self.path)) from error
        self._offset += len(raw)
        *lines, self._rest = (self._rest + raw).split(b"\n")
        rows = []
        for line in lines:
            self._lines += 1
            data = self._parse(line)
            if self.header is None:
                self.header = self._head(data)
            else:
                rows.append(self._row(data, self.header))
        return rows

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            data = json.loads(line)
        except ValueError as error:
            raise self._refuse(f"is damaged in line {self._lines}: no JSON") from error
        if not isinstance(data, dict):
            raise self._refuse(f"is damaged in line {self._lines}: no object")
        return data

    def _head(self, data: dict[str, Any]) -> Header:
        if data.get("schema") != SCHEMA:
            raise self._refuse("is not a file of chunk records")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise self._refuse(
                f"has version {data.get('schema_version')!r} of the chunk records; this tool reads {SCHEMA_VERSION}"
            )
        job, algorithm = data.get("job"), data.get("algorithm")
        counts = [data.get(name) for name in ("rank", "world_size", "layers")]
        rank, world_size, layers = (number if type(number) is int else -1 for number in counts)
        if not isinstance(job, str) or not isinstance(algorithm, str) or not 0 <= rank < world_size or layers < 1:
            raise self._refuse("has a damaged header")
        return Header(job, rank, world_size, layers, algorithm)

    def _row(self, data: dict[str, Any], header: Header) -> dict[str, Any]:
        for name in NUMBERS:
            if type(data.get(name)) is not int:
                raise self._refuse(f"is damaged in line {self._lines}: {name} is {data.get(name)!r}")
        for name in LAYER_FIELDS:
            values = data.get(name)
            if not isinstance(values, list) or len(values) != header.layers or any(type(v) is not int for v in values):
                raise self._refuse(
                    f"is damaged in line {self._lines}: {name} must hold one number for each of {header.layers} layers"
                )
        return data

    def _refuse(self, what: str) -> RecordsError:
        return RecordsError(f"{self.path} {what}", where=str(self.path))


@dataclass(frozen=True)
class Records:
    """A whole file, read once."""

    header: Header
    chunks: tuple[dict[str, Any], ...]
    torn: bool


def read_records(path: Path) -> Records:
    """Read a record file of a job that is gone, or what there is of one that runs.

    Raises:
        RecordsError: not a record file, without even a header, another version, or damaged.
    """
    reader = RecordReader(path)
    rows = reader.poll()
    if reader.header is None:
        raise RecordsError(f"{path} is cut short: not even its header is whole", where=str(path))
    return Records(reader.header, tuple(rows), reader.torn)


def read_stages(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Stage records, of a job that is gone or what there is of one that runs: `loop_ns`, and the chunks in order.

    Raises:
        RecordsError: no such file, another version, or damaged.
    """
    *lines, _ = _read(path).split(b"\n")  # a last line without its end is still being written, or was cut off
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordsError(f"{path} is damaged in line {number}: no JSON", where=str(path)) from error
        if not isinstance(row, dict) or (number > 1 and any(type(row.get(name)) is not int for name in IDENTITY)):
            raise RecordsError(f"{path} is damaged in line {number}: no record of a chunk", where=str(path))
        rows.append(row)
    head = rows[0] if rows else {}
    if head.get("schema") != STAGES_SCHEMA or type(head.get("loop_ns")) is not int:
        raise RecordsError(f"{path} is not a file of stage records", where=str(path))
    if head.get("schema_version") != SCHEMA_VERSION:
        raise RecordsError(
            f"{path} has version {head.get('schema_version')!r} of the stage records; this tool reads {SCHEMA_VERSION}",
            where=str(path),
        )
    return head["loop_ns"], rows[1:]


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise RecordsError(f"{path} is not a plain file", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise RecordsError(f"{path} cannot be read: {error.strerror}", where=str(path)) from error
