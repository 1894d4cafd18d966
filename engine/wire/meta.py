"""Meta as canonical JSON: plain data in, one byte string out, and the only text that reads back as itself.

Sorted keys, no spaces, no NaN, UTF-8 without escapes for letters. The reader encodes what it decoded and compares
bytes, which refuses duplicate keys, other spellings of a number, and whatever else JSON leaves open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError, PeerError
from engine.wire.header import Header, checksum_refusal
from engine.wire.problem import Problem

MAX_DEPTH = 8
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
_MESSAGE_CHARS = 4096

_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False, check_circular=False
)


def find_problem(value: Any, root: str = "") -> Problem | None:
    """The first thing in `value` that is not plain JSON, with its key path (`envelope.a.b[2]`), or None."""
    found = _find(value, 0)
    if found is None:
        return None
    steps, message = found
    return Problem((root + "".join(reversed(steps))).lstrip("."), message, "02", "FM-04")


def _find(value: Any, depth: int) -> tuple[list[str], str] | None:
    """The offender's path, innermost step first (it is only built when there is an offender), and what is wrong."""
    kind = type(value)
    if kind is bool or value is None:
        return None
    if kind is int:
        return None if _INT64_MIN <= value <= _INT64_MAX else ([], "a whole number beyond 64 bits")
    if kind is str:
        return None if value.isascii() or _is_utf8(value) else ([], "text that is not UTF-8")
    if kind is float:
        return None if math.isfinite(value) else ([], f"{value} has no JSON form")
    if kind not in (dict, list, tuple):
        return [], f"a {kind.__module__}.{kind.__qualname__} cannot travel as meta"
    if depth >= MAX_DEPTH:
        return [], f"nested deeper than {MAX_DEPTH}"
    pairs = value.items() if kind is dict else enumerate(value)
    for key, item in pairs:
        if kind is dict and (type(key) is not str or not key.isascii()):
            return [], f"the key {key!r} is not plain text"
        inner = type(item)
        if inner is bool or item is None:
            continue
        found = _find(item, depth + 1)
        if found is not None:
            found[0].append(f".{key}" if kind is dict else f"[{key}]")
            return found
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def encode_meta(meta: dict[str, Any], ids: Mapping[str, int] | None = None) -> bytes:
    """Canonical bytes of plain data.

    Raises:
        PreflightError: anything that is not plain JSON, by its key path (FM-04).
    """
    problem = find_problem(meta)
    if problem is not None:
        raise problem.preflight(ids)
    return encode_plain(meta)


def encode_plain(meta: dict[str, Any]) -> bytes:
    """Canonical bytes of data in which `find_problem` found nothing."""
    return _ENCODER.encode(meta).encode()


def parse_meta(header: Header, raw: bytes) -> dict[str, Any]:
    """The meta of a frame, once it is proved to be the one that was sent, in its only spelling.

    Raises:
        FrameError: wrong length or checksum, no UTF-8, no JSON object, not canonical.
    """
    ids = header.ids()
    if len(raw) != header.meta_bytes:
        raise Problem("meta_bytes", f"{len(raw)} received, {header.meta_bytes} announced", "14").refusal(ids)
    if header.checksum(raw) != header.meta_checksum:
        raise checksum_refusal(header, raw)
    try:
        meta = json.loads(raw.decode())
        problem = find_problem(meta)
        canonical = problem is None and _ENCODER.encode(meta).encode() == raw
    except (ValueError, RecursionError) as error:
        raise Problem("meta", f"not canonical JSON: {type(error).__name__}", "14").refusal(ids) from error
    if problem is not None:
        raise problem.refusal(ids)
    if not canonical or type(meta) is not dict:
        raise Problem("meta", "not a JSON object in canonical form", "14").refusal(ids)
    return meta


def error_meta(error: BaseException, ids: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The meta of an ERROR frame: `code`, `message`, `ids`. It takes any exception: saying ERROR must not fail."""
    code = error.code if isinstance(error, EngineError) else EngineError.code
    text = error.message if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
    known = {**(error.ids if isinstance(error, EngineError) else {}), **(ids or {})}
    return {
        "code": code,
        "message": text[:_MESSAGE_CHARS].encode(errors="replace").decode(),
        "ids": {
            str(key): value for key, value in known.items() if type(value) is int and _INT64_MIN <= value <= _INT64_MAX
        },
    }


def error_meta_problem(meta: Mapping[str, Any]) -> Problem | None:
    """An ERROR frame's meta holds exactly a code, a message and ids."""
    if set(meta) != {"code", "message", "ids"}:
        return Problem("meta", "ERROR carries code, message and ids, and nothing else", "22")
    ids = meta["ids"]
    if type(meta["code"]) is not str or type(meta["message"]) is not str or type(ids) is not dict:
        return Problem("meta", "ERROR carries a text code, a text message and a table of ids", "22")
    wrong = next((key for key, value in ids.items() if type(value) is not int), None)
    return None if wrong is None else Problem(f"ids.{wrong}", "not a whole number", "22")


def peer_error(header: Header, meta: Mapping[str, Any]) -> PeerError:
    """What the peer said before it left, as the error to die of (exit 73).

    Raises:
        FrameError: the meta is not that of an ERROR frame.
    """
    problem = error_meta_problem(meta)
    if problem is not None:
        raise problem.refusal(header.ids())
    return PeerError(
        f"the peer failed with {meta['code']}: {meta['message']}",
        ids=meta["ids"] or header.ids(),
        evidence={"peer_code": meta["code"], "peer_message": meta["message"]},
    )
