"""What a referee tells those of other hosts: its ranks at one look, as a small JSON object; and its verdict.

Nothing that is read from the store is trusted: only JSON, of bounded size, field by field of the expected type. What
does not fit is refused whole, and its host counts as not seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from engine.blackbox import Collective, Members
from engine.lifecycle import RankState
from engine.referee.judge import Kind, Verdict
from engine.referee.snapshot import Ending, Life, Seat

VERSION = 1
MAX_BYTES = 1 << 18
MAX_MESSAGE = 4000
MAX_RANKS = 4096
MAX_EVIDENCE = 4096
I64 = 1 << 63
T = TypeVar("T")
ENTRY = ("seq", "t_ns", "place", "call_id", "chunk_index", "cache_epoch")
WORDS = ("group", "op", "what", "file")


@dataclass(frozen=True)
class Summary:
    """A host's ranks at its look number `look`. Times are that host's monotonic clock.

    `seen` says which look of each other host (by slot) was known before this look was taken: it orders looks of
    different hosts without comparing clocks. `leaving` means that no other summary will follow.
    """

    host: str
    look: int
    t_ns: int
    seats: tuple[Seat, ...] = ()
    seen: Mapping[int, int] | None = None
    leaving: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(seat.rank for seat in self.seats)

    @property
    def over(self) -> bool:
        """Nothing of it can change any more."""
        return bool(self.seats) and all(seat.life is Life.GONE for seat in self.seats)


def encode(summary: Summary) -> bytes:
    groups: dict[Members, int] = {}
    seats = [_seat_to_json(seat, groups) for seat in summary.seats]
    return _dump(
        {
            "v": VERSION,
            "host": summary.host[:255],
            "look": summary.look,
            "t_ns": summary.t_ns,
            "seen": {str(slot): look for slot, look in (summary.seen or {}).items()},
            "leaving": summary.leaving,
            "groups": [[group.name, group.leader, list(group.ranks)] for group in groups],
            "seats": seats,
        }
    )


def decode(raw: bytes) -> Summary:
    """Raises ValueError, saying what is wrong, for anything but a summary of this version."""
    data = _load(raw)
    groups = [
        Members(_text(name, 16), _int(leader, 0), tuple(_ints(ranks)))
        for name, leader, ranks in _triples(_field(data, "groups", list))
    ]
    seats = tuple(_seat_of_json(each, groups) for each in _field(data, "seats", list)[:MAX_RANKS])
    if len({seat.rank for seat in seats}) != len(seats):
        raise ValueError("a rank twice")
    seen = {int(slot): _int(look, 0) for slot, look in _field(data, "seen", dict).items()}
    return Summary(
        _text(_field(data, "host", str), 255),
        _int(data.get("look"), 0),
        _int(data.get("t_ns"), 0),
        seats,
        seen,
        _field(data, "leaving", bool),
    )


def encode_verdict(verdict: Verdict, host: str) -> bytes:
    return _dump(
        {
            "v": VERSION,
            "host": host[:255],
            "kind": verdict.kind.value,
            "fm": verdict.fm,
            "triggers": list(verdict.triggers),
            "victims": list(verdict.victims),
            "message": printable(verdict.message),
        }
    )


def decode_verdict(raw: bytes, now_ns: int) -> tuple[Verdict, str]:
    """The verdict, provable since it was read, and the host that gave it. Raises ValueError like `decode`."""
    data = _load(raw)
    fm = data.get("fm")
    verdict = Verdict(
        Kind(_field(data, "kind", str)),
        _text(fm, 16) if fm is not None else None,
        tuple(_ints(data.get("triggers"))),
        tuple(_ints(data.get("victims"))),
        _line(data.get("message"), MAX_MESSAGE),
        now_ns,
    )
    return verdict, _text(data.get("host"), 255)


def to_clock(seat: Seat, offset_ns: int) -> Seat:
    """The seat with its times on another clock. 0 means never, on any clock."""

    def moved(t_ns: int) -> int:
        return t_ns + offset_ns if t_ns else 0

    last = replace(seat.last, t_ns=moved(seat.last.t_ns)) if seat.last is not None else None
    return replace(
        seat,
        changed_ns=moved(seat.changed_ns),
        state_ns=moved(seat.state_ns),
        ending_ns=moved(seat.ending_ns),
        last=last,
        inside=last if seat.inside is not None else None,
    )


def _seat_to_json(seat: Seat, groups: dict[Members, int]) -> dict[str, Any]:
    last = seat.last
    return {
        "rank": seat.rank,
        "pid": seat.pid,
        "life": seat.life.value,
        "changed_ns": seat.changed_ns,
        "wait_status": seat.wait_status,
        "state": seat.state.value,
        "state_ns": seat.state_ns,
        "phase": seat.phase,
        "ending": _ending_to_json(seat.ending),
        "ending_ns": seat.ending_ns,
        "groups": [groups.setdefault(group, len(groups)) for group in seat.groups.values()],
        "counts": dict(seat.counts),
        # Stage 0 may wait in a message that it made room for earlier: of that, other hosts hear nothing.
        "inside": seat.inside is not None and last is not None and seat.inside.seq == last.seq,
        "last": None
        if last is None
        else [getattr(last, name) for name in (*ENTRY, "line")]
        + [f"{last.hash_u64:016x}"]
        + [getattr(last, name) for name in WORDS],
    }


def _seat_of_json(data: Any, groups: list[Members]) -> Seat:
    if type(data) is not dict:
        raise ValueError("a seat that is no object")
    own = [groups[_int(index, 0, len(groups) - 1)] for index in _field(data, "groups", list)]
    names = {group.name for group in own}
    counts = {_text(name, 16): _int(count, 0) for name, count in _field(data, "counts", dict).items()}
    if counts.keys() - names:
        raise ValueError("counts of a group that it does not know")
    last = _entry_of_json(data.get("last"))
    status = data.get("wait_status")
    return Seat(
        _int(data.get("rank"), 0, MAX_RANKS),
        _int(data.get("pid"), 0),
        Life(_field(data, "life", str)),
        _int(data.get("changed_ns"), 0),
        _int(status, 0, 0xFFFF) if status is not None else None,
        RankState(_field(data, "state", str)),
        _int(data.get("state_ns"), 0),
        _text(data.get("phase"), 16),
        _ending_of_json(data.get("ending")),
        _int(data.get("ending_ns"), 0),
        last if _field(data, "inside", bool) else None,
        last,
        {group.name: group for group in own},
        counts,
    )


def _entry_of_json(data: Any) -> Collective | None:
    if data is None:
        return None
    if type(data) is not list or len(data) != len(ENTRY) + 2 + len(WORDS):
        raise ValueError("a collective of the wrong length")
    numbers = [_int(value) for value in data[: len(ENTRY)]]
    line, hash_hex = _int(data[len(ENTRY)], 0), _text(data[len(ENTRY) + 1], 16)
    group, op, what, file = (_text(value, 64) for value in data[len(ENTRY) + 2 :])
    if min(numbers[:3]) < 0:
        raise ValueError("a collective before the first")
    seq, t_ns, place, call_id, chunk, epoch = numbers
    return Collective(seq, t_ns, place, call_id, chunk, epoch, int(hash_hex, 16), group, op, what, file, line)


def _ending_to_json(ending: Ending | None) -> dict[str, Any] | None:
    if ending is None:
        return None
    error = ending.error
    if error is None:
        return {"exit_code": ending.exit_code, "error": None}
    evidence = error.get("evidence") or {}
    kept = {key: evidence[key] for key in ("minority", "differences") if key in evidence}
    if len(json.dumps(kept, default=str)) > MAX_EVIDENCE:
        kept = {}
    fm = error.get("fm")
    return {
        "exit_code": ending.exit_code,
        "error": {
            "code": str(error.get("code", ""))[:16],
            "fm": str(fm)[:16] if fm is not None else None,
            "message": printable(str(error.get("message", ""))),
            "evidence": kept,
        },
    }


def _ending_of_json(data: Any) -> Ending | None:
    if data is None:
        return None
    if type(data) is not dict:
        raise ValueError("an ending that is no object")
    code, error = _int(data.get("exit_code"), -64, 255), data.get("error")
    if error is None:
        return Ending(code)
    if type(error) is not dict:
        raise ValueError("an error that is no object")
    fm, evidence = error.get("fm"), error.get("evidence")
    return Ending(
        code,
        {
            "code": _text(error.get("code"), 16),
            "fm": _text(fm, 16) if fm is not None else None,
            "message": _line(error.get("message"), MAX_MESSAGE),
            "evidence": _evidence(evidence),
        },
    )


def _evidence(data: Any) -> dict[str, Any]:
    """What the judge uses of it: a minority, or the differing values by field and rank."""
    if type(data) is not dict:
        raise ValueError("evidence that is no object")
    kept: dict[str, Any] = {}
    if "minority" in data:
        kept["minority"] = _ints(data["minority"])
    if "differences" in data:
        rows = data["differences"]
        if type(rows) is not dict or not all(type(row) is dict for row in rows.values()):
            raise ValueError("differences that are no table")
        kept["differences"] = {
            key: {str(int(rank)): str(value) for rank, value in row.items()} for key, row in rows.items()
        }
    return kept


def _dump(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False, default=str).encode()


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{len(raw)} bytes, more than {MAX_BYTES}")
    try:
        data = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if type(data) is not dict:
        raise ValueError("no object")
    if data.get("v") != VERSION:
        raise ValueError(f"version {str(data.get('v'))[:16]}; this referee reads {VERSION}")
    return data


def _field(data: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = data.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} is no {kind.__name__}")
    return value


def printable(text: str) -> str:
    """One printable line of bounded length."""
    return "".join(char if char.isprintable() else " " for char in text[:MAX_MESSAGE])


def _int(value: Any, low: int = -I64, high: int = I64 - 1) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError("a number out of range")
    return value


def _ints(value: Any) -> list[int]:
    if type(value) is not list or len(value) > MAX_RANKS:
        raise ValueError("no list of ranks")
    return [_int(each, 0, MAX_RANKS) for each in value]


def _text(value: Any, limit: int) -> str:
    if type(value) is not str or len(value) > limit:
        raise ValueError("no text, or one too long")
    return value


def _line(value: Any, limit: int) -> str:
    """One line of text: it goes to a log."""
    text = _text(value, limit)
    if not text.isprintable():
        raise ValueError("a message that is not one printable line")
    return text


def _triples(value: list[Any]) -> Iterable[tuple[Any, Any, Any]]:
    for each in value:
        if type(each) is not list or len(each) != 3:
            raise ValueError("a group of the wrong length")
        yield each[0], each[1], each[2]
