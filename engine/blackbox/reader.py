"""Reading black boxes: of a job that is gone, and of one that runs."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from engine.blackbox.layout import (
    COLLECTIVE,
    COMMIT,
    CRC,
    DOING_BITS,
    DOINGS,
    FILE,
    GROUP,
    GROUP_BYTES,
    GROUP_OFFSET,
    HEADER_BYTES,
    LIVE,
    LIVE_OFFSET,
    MAGIC,
    STATES,
    STREAM,
    STREAM_OFFSET,
    VERSION,
    BlackBoxError,
)
from engine.lifecycle import Doing, RankState

# A running rank may write while we copy; a file that is still inconsistent after so many copies is damaged.
TRIES = 5


@dataclass(frozen=True)
class Commitment:
    """One commitment point. `seq` counts from 1 over the life of the rank; `t_ns` is this host's monotonic clock."""

    seq: int
    t_ns: int
    action: str
    group: str
    call_id: int
    chunk_index: int
    cache_epoch: int


@dataclass(frozen=True)
class Collective:
    """One collective as it was entered.

    `place` counts from 1 in its group, so ranks can be compared place by place. `hash_u64` covers group, members,
    operation, shape and dtype; `what` is the readable part of it, cut to 40 bytes. `file` and `line` are the caller.
    """

    seq: int
    t_ns: int
    place: int
    call_id: int
    chunk_index: int
    cache_epoch: int
    hash_u64: int
    group: str
    op: str
    what: str
    file: str
    line: int

    @property
    def site(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Live:
    """Where a rank is now. `inside` is the seq of the collective it waits in, 0 for none; `counts` by group slot."""

    state: RankState
    state_ns: int
    inside: int
    commits: int
    collectives: int
    groups: int
    phase: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """The account of the stream so far, when the last chunk was emitted (0: never; this host's monotonic clock), and
    what rank 0's loop is at since when."""

    accepted: int
    emitted: int
    dropped: int
    emit_ns: int
    period_ns: int
    doing: Doing = Doing.NOTHING
    doing_ns: int = 0
    resumed_ns: int = 0


@dataclass(frozen=True)
class Members:
    """A group as the rank knows it: its global ranks in ascending order. Broadcasts come from the leader."""

    name: str
    leader: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """All of a black box. `inside` is the collective the rank waits in, or waited in when it died."""

    rank: int
    pid: int
    live: Live
    groups: tuple[Members, ...]
    commitments: tuple[Commitment, ...]
    collectives: tuple[Collective, ...]

    @property
    def inside(self) -> Collective | None:
        return next((entry for entry in self.collectives if entry.seq == self.live.inside), None)


def read(path: Path) -> list[Commitment]:
    """The commitment points of a black box, oldest first.

    Raises:
        BlackBoxError: not a black box, another version, cut short or damaged.
    """
    return list(read_box(path).commitments)


def read_box(path: Path) -> Contents:
    """Everything in a black box, each ring oldest first.

    A record that its writer had no time to finish is left out; damage anywhere else is refused.

    Raises:
        BlackBoxError: not a black box, another version, cut short or damaged.
    """
    with Box(path) as box:
        for attempt in range(TRIES):
            try:
                return box.contents()
            except BlackBoxError:
                if attempt == TRIES - 1:
                    raise
    raise AssertionError


class Box:
    """A black box held open for reading. Cheap to ask again: a few `pread` calls, no mapping that could be cut away.

    Raises:
        BlackBoxError: there is none, or it is not one that this version reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BlackBoxError(f"{path} cannot be opened: {error.strerror}", where=str(path)) from error
        try:
            self._check()
        except BlackBoxError:
            os.close(self._fd)
            raise

    def _check(self) -> None:
        raw = os.pread(self._fd, FILE.size + CRC.size, 0)
        if len(raw) < FILE.size + CRC.size or raw[:8] != MAGIC:
            raise self._refuse("is not a black box")
        _, version, self.slots, self.rank, self.pid, self.start_ticks, self.made_ns = FILE.unpack_from(raw)
        if version != VERSION:
            raise self._refuse(f"has black box version {version}; this tool reads {VERSION}")
        if not _whole(raw):
            raise self._refuse("has a damaged header")
        self._collectives_offset = HEADER_BYTES + self.slots * COMMIT.size
        size, need = os.fstat(self._fd).st_size, self._collectives_offset + self.slots * COLLECTIVE.size
        if size != need:
            raise self._refuse(f"is cut short: {size} bytes for {self.slots} slots, which take {need}")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def peek(self) -> bytes:
        """The live words, packed: equal bytes mean that the rank has not moved."""
        return self._pread(LIVE.size, LIVE_OFFSET)

    def live(self) -> Live:
        """The live words. `inside` is read before `counts`: what a deadlock proof needs (see `engine.referee.judge`).

        Raises:
            BlackBoxError: they make no sense.
        """
        first, second = self._pread(LIVE.size, LIVE_OFFSET), self._pread(LIVE.size, LIVE_OFFSET)
        inside = LIVE.unpack(first)[2]
        state, state_ns, _, commits, collectives, groups, phase, *counts = LIVE.unpack(second)
        if state >= len(STATES) or groups > len(counts) or inside > collectives:
            raise self._refuse("has damaged live words")
        return Live(STATES[state], state_ns, inside, commits, collectives, groups, _text(phase), tuple(counts[:groups]))

    def stream(self) -> Stream:
        """What rank 0 says of the stream; zeros on every other rank.

        Raises:
            BlackBoxError: it makes no sense.
        """
        words = STREAM.unpack(self._pread(STREAM.size, STREAM_OFFSET))
        accepted, emitted, dropped, emit_ns, period_ns, _, doing_word, resumed_ns = words
        doing_ns, doing = doing_word >> DOING_BITS, doing_word & (1 << DOING_BITS) - 1
        if doing >= len(DOINGS):
            raise self._refuse("has damaged stream words")
        return Stream(accepted, emitted, dropped, emit_ns, period_ns, DOINGS[doing], doing_ns, resumed_ns)

    def last_commitment(self) -> Commitment | None:
        """The newest commitment point; None before the first, or while it is being written over."""
        upto = self.live().commits
        records, _ = self._ring(max(0, upto - 1), upto, HEADER_BYTES, COMMIT.size)
        return _commitment(records[-1]) if records else None

    def groups(self, count: int) -> tuple[Members, ...]:
        found = []
        for slot in range(count):
            raw = self._pread(GROUP.size + CRC.size, GROUP_OFFSET + slot * GROUP_BYTES)
            if not _whole(raw):
                raise self._refuse(f"has a damaged group in slot {slot}")
            name, leader, bits = GROUP.unpack_from(raw)
            mask = int.from_bytes(bits, "little")
            found.append(
                Members(_text(name), leader, tuple(rank for rank in range(mask.bit_length()) if mask >> rank & 1))
            )
        return tuple(found)

    def collectives(self, after: int, upto: int) -> list[bytes]:
        """Collectives with `after < seq <= upto` that the ring still holds whole, oldest first, still packed."""
        return self._ring(after, upto, self._collectives_offset, COLLECTIVE.size)[0]

    def contents(self) -> Contents:
        """Everything. A writer at work may make one copy inconsistent: see `read_box`."""
        live = self.live()
        commits, torn = self._ring(0, live.commits, HEADER_BYTES, COMMIT.size)
        collectives, torn_too = self._ring(0, live.collectives, self._collectives_offset, COLLECTIVE.size)
        # Only a slot that was being written over meanwhile, or when the writer died, may be torn: one of the oldest.
        now = self.live()
        damaged = [seq for seq in torn if seq > now.commits + 1 - self.slots]
        damaged += [seq for seq in torn_too if seq > now.collectives + 1 - self.slots]
        if damaged:
            raise self._refuse(f"has {len(damaged)} damaged records")
        return Contents(
            self.rank,
            self.pid,
            live,
            self.groups(live.groups),
            tuple(_commitment(raw) for raw in commits),
            tuple(unpack_collective(raw) for raw in collectives),
        )

    def _ring(self, after: int, upto: int, offset: int, size: int) -> tuple[list[bytes], list[int]]:
        """Whole records, and the seqs of torn ones. What a busy writer has put in their place since is in neither."""
        records, torn = [], []
        first = max(after, upto - self.slots) + 1
        for seq in range(first, upto + 1):
            slot = (seq - 1) % self.slots
            if seq == first or slot == 0:  # one copy for each stretch without a wrap
                stretch = self._pread(min(upto - seq + 1, self.slots - slot) * size, offset + slot * size)
                base = seq
            raw = stretch[(seq - base) * size : (seq - base + 1) * size]
            found = int.from_bytes(raw[:8], "little") if _whole(raw) else None
            if found == seq:
                records.append(raw)
            elif found is None or found < seq or (found - seq) % self.slots:
                torn.append(seq)
        return records, torn

    def _pread(self, size: int, offset: int) -> bytes:
        raw = os.pread(self._fd, size, offset)
        if len(raw) != size:
            raise self._refuse("was cut short while it was read")
        return raw

    def _refuse(self, what: str) -> BlackBoxError:
        return BlackBoxError(f"{self.path} {what}", where=str(self.path))


def _whole(raw: bytes) -> bool:
    return zlib.crc32(raw[: -CRC.size]) == int.from_bytes(raw[-CRC.size :], "little")


def _commitment(raw: bytes) -> Commitment:
    seq, t_ns, call_id, chunk_index, cache_epoch, action, group, _ = COMMIT.unpack(raw)
    return Commitment(seq, t_ns, _text(action), _text(group), call_id, chunk_index, cache_epoch)


def unpack_collective(raw: bytes) -> Collective:
    seq, t_ns, place, call_id, chunk, epoch, hash_u64, group, op, what, line, file, _ = COLLECTIVE.unpack(raw)
    return Collective(
        seq, t_ns, place, call_id, chunk, epoch, hash_u64, _text(group), _text(op), _text(what), _text(file), line
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
