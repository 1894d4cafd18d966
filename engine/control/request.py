"""The words of a request and of its answer: what may be said, and in which form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError
from engine.timeline import Event

VERSION = 1
MAX_LINE_BYTES = 64 * 1024
MAX_PROMPT = 4096
MAX_DEPTH = 8  # of a request; more is never needed, and the parser recurses
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
STEERS = ("prompt", "cut", "bias", "recompute", "paused")
OPS = ("steer", "receipt", "take-back", "metrics")
NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class ControlError(EngineError):
    """A request that is refused; the stream goes on."""

    code = "TP-6501"
    next_step = "tpctl set --help"


def parse(line: bytes) -> dict[str, Any]:
    """One JSON object. Raises ControlError."""
    depth = deepest = 0
    for byte in line.translate(None, NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ControlError(f"the request nests deeper than {MAX_DEPTH}", code="TP-6503")
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ControlError("the request is no JSON in UTF-8", code="TP-6503") from error
    if not isinstance(data, dict):
        raise ControlError("the request is no JSON object", code="TP-6503")
    return data


def event_of(data: Mapping[str, Any], can_recompute: bool) -> Event:
    """What a `steer` changes. Raises ControlError."""
    said = {key: data[key] for key in STEERS if key in data}
    if not said or said == {"cut": False}:
        raise ControlError(f"nothing to change: give any of {', '.join(STEERS)}", code="TP-6503")
    prompt, bias = said.get("prompt"), said.get("bias")
    if "prompt" in said and (not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT):
        raise ControlError(f"prompt must be text of 1 to {MAX_PROMPT} characters", code="TP-6503")
    if isinstance(prompt, str) and any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt):
        raise ControlError("prompt has half a surrogate pair, which is no text", code="TP-6503")
    if "bias" in said and (isinstance(bias, bool) or not isinstance(bias, int | float) or not 0 < bias <= 1):
        raise ControlError(f"bias must be in (0, 1], is {short(bias)}", code="TP-6503")
    for key in ("cut", "recompute", "paused"):
        if key in said and not isinstance(said[key], bool):
            raise ControlError(f"{key} must be true or false, is {short(said[key])}", code="TP-6503")
    if said.get("recompute") and not can_recompute:
        raise ControlError("the window of this job is too short for a recompute", code="TP-6506")
    return Event(0, prompt, said.get("cut", False), float(bias) if bias is not None else None, said.get("recompute"))


def refusal(code: str, message: str, name: str | None = None) -> dict[str, Any]:
    """The answer to a request that is refused."""
    return {"v": VERSION, "id": name, "ok": False, "code": code, "message": message}


def only(data: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raises ControlError: another key than these."""
    unknown = sorted(set(data) - set(keys))
    if unknown:
        raise ControlError(f"unknown key {short(unknown[0])}", code="TP-6503")


def short(value: Any) -> str:
    """Of what a client wrote, for a message."""
    return repr(value)[:40].encode("ascii", "backslashreplace").decode()


def _no_constant(name: str) -> None:
    raise ValueError(name)
