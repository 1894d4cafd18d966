"""Every error the engine raises, in one tree.

    EngineError
    ├── ConfigError            77  TP-10xx  bad configuration, found before anything starts
    │   └── GeometryError      77  TP-11xx  sizes that cannot be served (multiples, divisibility, windows)
    ├── WireError              70  TP-20xx  a frame that must not be sent, or must not be accepted
    │   ├── PreflightError     70  TP-21xx  raised by `prepare`: not one byte was sent
    │   └── FrameError         70  TP-22xx  raised by the receiver, before anything is allocated or used
    ├── CommError              74  TP-30xx  the transport broke, or somebody misused a group
    │   ├── GroupError         70  TP-31xx  a collective on a group that the caller or the phase may not use
    │   ├── JoinError          75  TP-32xx  a rank that never joined
    │   ├── ParityError        75  TP-33xx  ranks differ in configuration, versions, backends or shapes
    │   └── PeerError          73  TP-34xx  the peer said ERROR
    ├── WeightsError           77  TP-40xx  a checkpoint that is missing, truncated or of another model
    ├── CodecError             70  TP-50xx  text encoder or VAE
    ├── SinkError              70  TP-51xx  the output cannot be written
    ├── SourceError            70  TP-515x  the input video cannot be read; 77 if that is found at start-up
    ├── ShortageError          70  TP-66xx  a rank asked for memory in vain
    └── TripwireError          70  TP-60xx  a check of the contract failed (section 9)
        └── CallCountError     70  TP-61xx  planned, expected and observed generator calls differ (FM-02)

Each error carries a stable `code`, the failure mode `fm` when one is known, the `exit_code` of the rank that dies of
it (contract, section 9), the `ids` of the frame it concerns, its `evidence`, and `next_step`: what to type next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class EngineError(Exception):
    """Base of all engine errors. `message` is one true sentence; everything else is structured."""

    exit_code = 70
    code = "TP-1000"
    fm: str | None = None
    next_step = "tpctl env"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        fm: str | None = None,
        where: str | None = None,
        ids: Mapping[str, int] | None = None,
        evidence: Mapping[str, Any] | None = None,
        next_step: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.ids = dict(ids or {})
        self.evidence = dict(evidence or {})
        if code is not None:
            self.code = code
        if fm is not None:
            self.fm = fm
        if next_step is not None:
            self.next_step = next_step
        if exit_code is not None:
            self.exit_code = exit_code

    def to_record(self) -> dict[str, Any]:
        """The error as plain data, for rank reports and JSON output."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "fm": self.fm,
            "exit_code": self.exit_code,
            "message": self.message,
            "where": self.where,
            "ids": self.ids,
            "evidence": {key: _plain(value) for key, value in self.evidence.items()},
            "next": self.next_step,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return str(value)


class ConfigError(EngineError):
    exit_code = 77
    code = "TP-1001"
    next_step = "tpctl config check"


class GeometryError(ConfigError):
    code = "TP-1101"


class WireError(EngineError):
    code = "TP-2001"


class PreflightError(WireError):
    """Raised by `prepare`. Nothing was sent; peers still wait for a header."""

    code = "TP-2101"


class FrameError(WireError):
    """Raised by the receiver. `field` names the header word, meta key or tensor that is wrong."""

    code = "TP-2201"

    def __init__(self, message: str, *, field: str, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.field = field
        self.evidence.setdefault("field", field)


class CommError(EngineError):
    exit_code = 74
    code = "TP-3001"


class GroupError(CommError):
    exit_code = 70
    code = "TP-3101"
    fm = "FM-22"


class JoinError(CommError):
    exit_code = 75
    code = "TP-3201"
    fm = "FM-40"


class ParityError(CommError):
    exit_code = 75
    code = "TP-3301"
    fm = "FM-03"
    next_step = "tpctl parity-check"


class PeerError(CommError):
    exit_code = 73
    code = "TP-3401"


class WeightsError(EngineError):
    exit_code = 77
    code = "TP-4001"
    next_step = "tpctl config check"


class CodecError(EngineError):
    code = "TP-5001"


class SinkError(EngineError):
    code = "TP-5101"


class SourceError(EngineError):
    code = "TP-5153"


class ShortageError(EngineError):
    code = "TP-6601"
    next_step = "tpctl plan"


class TripwireError(EngineError):
    code = "TP-6001"


class CallCountError(TripwireError):
    code = "TP-6101"
    fm = "FM-02"
