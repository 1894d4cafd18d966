"""The writing side of a black box, and how its records are packed."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic_ns
from zlib import crc32

from engine.blackbox.layout import (
    ACCEPTED,
    COLLECTIVE,
    COLLECTIVES,
    COMMIT,
    COMMITS,
    COUNTS,
    CRC,
    DOING,
    DOING_BITS,
    DOINGS,
    DROPPED,
    EMIT_NS,
    EMITTED,
    ENTRY,
    FILE,
    GROUP,
    GROUP_BYTES,
    GROUP_OFFSET,
    GROUP_SLOTS,
    GROUPS,
    HEADER_BYTES,
    INSIDE,
    LIVE_OFFSET,
    MAGIC,
    MAX_RANK,
    PERIOD_NS,
    PHASE,
    RESUMED_NS,
    SIGNATURE,
    SITE,
    STATE,
    STATE_NS,
    STATES,
    VERSION,
    WORDS_BYTES,
    BlackBoxError,
)
from engine.lifecycle import Doing, RankState
from engine.process import start_ticks

# Looked up once: these stand on the path of every collective.
COLLECTIVE_BYTES = COLLECTIVE.size
pack_entry = ENTRY.pack
pack_crc = CRC.pack
FATES = {"accepted": ACCEPTED, "emitted": EMITTED, "dropped": DROPPED}


class BlackBox:
    """The writing side. One per rank; each ring keeps `slots` records.

    Raises:
        BlackBoxError: there is no room for the file. It is reserved whole, so that recording cannot fail later.
    """

    def __init__(self, path: Path, rank: int, slots: int = 1024) -> None:
        self._slots = slots
        self._commits = 0
        self._collectives = 0
        self._resumed = False
        self._collectives_offset = HEADER_BYTES + slots * COMMIT.size
        self._names: dict[str, bytes] = {}
        self.ids: Mapping[str, int] = {}  # of the last commitment point that had any
        self._groups: dict[tuple[str, tuple[int, ...]], int] = {}
        # In pp two threads commit. Re-entrant: a signal that comes inside may be the end, which commits too.
        self._commit_lock = threading.RLock()
        size = self._collectives_offset + slots * COLLECTIVE.size
        # Made aside and moved in whole: a reader sees the old file or the new one, never half of either.
        temporary = path.with_name(path.name + ".new")
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
            head = FILE.pack(MAGIC, VERSION, slots, rank, os.getpid(), start_ticks(os.getpid()), monotonic_ns())
            self._map[: FILE.size + CRC.size] = head + pack_crc(crc32(head))
            self._words = memoryview(self._map)[LIVE_OFFSET : LIVE_OFFSET + WORDS_BYTES].cast("Q")
            self.enter_state(RankState.STARTING)
            temporary.replace(path)
        except OSError as error:
            raise BlackBoxError(
                f"rank {rank} cannot make its black box {path}: {error.strerror}",
                code="TP-6202",
                where=str(path),
                evidence={"bytes": size},
                next_step="df -h",
            ) from error

    def commit(self, action: str, group: str, ids: Mapping[str, int]) -> None:
        """Record a commitment point, from any thread. `action` and `group` keep their first 16 bytes."""
        with self._commit_lock:
            if ids:
                self.ids = ids
            seq = self._commits + 1
            body = COMMIT.pack(
                seq,
                monotonic_ns(),
                ids.get("call_id", -1),
                ids.get("chunk_index", -1),
                ids.get("cache_epoch", -1),
                self._name(action),
                self._name(group),
                0,
            )[: -CRC.size]
            offset = HEADER_BYTES + (self._commits % self._slots) * COMMIT.size
            self._map[offset : offset + COMMIT.size] = body + pack_crc(crc32(body))
            self._commits = self._words[COMMITS] = seq

    def open_group(self, name: str, members: Sequence[int]) -> int:
        """Make a group known; returns the slot that `enter` counts its collectives in. `members[0]` leads.

        Raises:
            BlackBoxError: too many groups, or a rank beyond what the file can name.
        """
        key = (name, tuple(members))
        slot = self._groups.get(key)
        if slot is not None:
            return slot
        slot = len(self._groups)
        if slot == GROUP_SLOTS or max(members) > MAX_RANK:
            raise BlackBoxError(f"no room in the black box for group {name} of {len(members)} ranks", code="TP-6203")
        self._groups[key] = slot
        bits = sum(1 << member for member in members).to_bytes(512, "little")
        body = GROUP.pack(self._name(name), members[0], bits)
        offset = GROUP_OFFSET + slot * GROUP_BYTES
        self._map[offset : offset + len(body) + CRC.size] = body + pack_crc(crc32(body))
        self._words[GROUPS] = slot + 1
        return slot

    def enter(self, slot: int, signature: bytes, site: bytes, ids: Mapping[str, int], *, inside: bool = True) -> int:
        """Record that a collective is entered, and that this rank is inside it; returns the record's number.

        Args:
            slot: of `open_group`.
            signature, site: what `pack_signature` and `pack_site` made.
            inside: whether the rank waits in it, rather than going on.
        """
        words = self._words
        seq = self._collectives + 1
        place = words[COUNTS + slot] + 1
        get = ids.get
        entry = pack_entry(
            seq, monotonic_ns(), place, get("call_id", -1), get("chunk_index", -1), get("cache_epoch", -1)
        )
        body = entry + signature + site
        offset = self._collectives_offset + (self._collectives % self._slots) * COLLECTIVE_BYTES
        self._map[offset : offset + COLLECTIVE_BYTES] = body + pack_crc(crc32(body))
        self._collectives = words[COLLECTIVES] = seq
        words[COUNTS + slot] = place
        if inside:
            words[INSIDE] = seq
        return seq

    def wait_in(self, seq: int) -> None:
        """From now on the rank waits in a collective that it entered earlier, and enters no other until it came."""
        self._words[INSIDE] = seq

    def leave(self) -> None:
        """The collective came back."""
        self._words[INSIDE] = 0

    def enter_state(self, state: RankState) -> None:
        self._words[STATE] = STATES.index(state)
        self._words[STATE_NS] = monotonic_ns()

    def enter_phase(self, phase: str) -> None:
        """Keeps the first 16 bytes."""
        offset = LIVE_OFFSET + 8 * PHASE
        self._map[offset : offset + 16] = self._name(phase).ljust(16, b"\0")

    def enter_doing(self, doing: Doing) -> None:
        """What this rank's loop is at from now on."""
        self._words[DOING] = monotonic_ns() << DOING_BITS | DOINGS.index(doing)

    def resume(self) -> None:
        """A pause is over: it belongs to no chunk's period."""
        self._resumed = True
        self._words[RESUMED_NS] = monotonic_ns()

    def count(self, fate: str) -> None:
        """One more chunk accepted, emitted or dropped; of an emitted one also when, and how long after the last."""
        if fate == "emitted":
            now_ns, last_ns = monotonic_ns(), self._words[EMIT_NS]
            if not self._resumed:
                self._words[PERIOD_NS] = now_ns - last_ns if last_ns else 0
            self._resumed = False
            self._words[EMIT_NS] = now_ns
        self._words[FATES[fate]] += 1

    def close(self) -> None:
        self._words.release()
        self._map.flush()
        self._map.close()

    def _name(self, text: str) -> bytes:
        found = self._names.get(text)
        if found is None:
            found = self._names[text] = text.encode()[:16]
        return found


def pack_signature(hash_u64: int, group: str, op: str, what: str) -> bytes:
    """The part of a collective's record that stays the same; `what` is dtype and shape, and keeps 40 bytes."""
    return SIGNATURE.pack(hash_u64, group.encode()[:16], op.encode()[:16], what.encode()[:40])


def pack_site(file: str, line: int) -> bytes:
    """Where a collective is called; `file` keeps its last 56 bytes."""
    return SITE.pack(line, file.encode()[-56:])
