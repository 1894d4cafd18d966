"""The black box: a rank's last commitment points, in a memory-mapped ring that survives `kill -9`.

A *commitment point* is any act after which a peer blocks until this rank delivers the rest. `commit` records one; the
file is readable while the job lives and after it died. A record is written body first and sequence number last, so a
reader never takes a torn record for a whole one.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError

MAGIC = b"TPCTLBB1"
_FILE = struct.Struct("<8sIIiI")  # magic, version, slots, rank, pid
_BODY = struct.Struct("<Qqqq16s16s")  # t_ns, call_id, chunk_index, cache_epoch, action, group
_SEQ = struct.Struct("<Q")
_HEADER_BYTES = 64
_SLOT_BYTES = _SEQ.size + _BODY.size
VERSION = 1


class BlackBoxError(EngineError):
    """A black box that cannot be read: corrupt, truncated or foreign."""

    code = "TP-6201"
    next_step = "tpctl triage RUN_DIR"


@dataclass(frozen=True)
class Commitment:
    """One record. `seq` counts from 1 over the life of the rank; `t_ns` is this host's monotonic clock."""

    seq: int
    t_ns: int
    action: str
    group: str
    call_id: int
    chunk_index: int
    cache_epoch: int


class BlackBox:
    """The writing side. One per rank; `slots` records are kept."""

    def __init__(self, path: Path, rank: int, slots: int = 1024) -> None:
        self._slots = slots
        self._seq = 0
        self._names: dict[str, bytes] = {}
        size = _HEADER_BYTES + slots * _SLOT_BYTES
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        _FILE.pack_into(self._map, 0, MAGIC, VERSION, slots, rank, os.getpid())

    def commit(self, action: str, group: str, ids: Mapping[str, int]) -> None:
        """Record a commitment point. `action` and `group` keep their first 16 bytes."""
        seq = self._seq + 1
        offset = _HEADER_BYTES + (self._seq % self._slots) * _SLOT_BYTES
        _BODY.pack_into(
            self._map,
            offset + _SEQ.size,
            time.monotonic_ns(),
            ids.get("call_id", -1),
            ids.get("chunk_index", -1),
            ids.get("cache_epoch", -1),
            self._name(action),
            self._name(group),
        )
        _SEQ.pack_into(self._map, offset, seq)
        self._seq = seq

    def close(self) -> None:
        self._map.flush()
        self._map.close()

    def _name(self, text: str) -> bytes:
        found = self._names.get(text)
        if found is None:
            found = self._names[text] = text.encode()[:16]
        return found


def read(path: Path) -> list[Commitment]:
    """The records of a black box, oldest first.

    Raises:
        BlackBoxError: not a black box, another version, or cut short.
    """
    raw = path.read_bytes()
    if len(raw) < _HEADER_BYTES or raw[:8] != MAGIC:
        raise BlackBoxError(f"{path} is not a black box", where=str(path))
    _, version, slots, _, _ = _FILE.unpack_from(raw)
    if version != VERSION:
        raise BlackBoxError(f"{path} has black box version {version}; this tool reads {VERSION}", where=str(path))
    if len(raw) != _HEADER_BYTES + slots * _SLOT_BYTES:
        raise BlackBoxError(f"{path} is cut short: {len(raw)} bytes for {slots} slots", where=str(path))
    records = []
    for slot in range(slots):
        offset = _HEADER_BYTES + slot * _SLOT_BYTES
        (seq,) = _SEQ.unpack_from(raw, offset)
        if seq == 0:
            continue
        t_ns, call_id, chunk_index, cache_epoch, action, group = _BODY.unpack_from(raw, offset + _SEQ.size)
        records.append(Commitment(seq, t_ns, _text(action), _text(group), call_id, chunk_index, cache_epoch))
    return sorted(records, key=lambda record: record.seq)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
