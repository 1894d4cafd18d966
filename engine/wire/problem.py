"""One finding of a wire check, and the two errors it can become.

Sender and receiver run the same checks. A problem found by `prepare` is a `PreflightError` TP-21nn; the same problem
found by the receiver is a `FrameError` TP-22nn.

    02 not JSON        03 magic          04 wire version   05 action         06 call_id       07 chunk_index
    08 cache_epoch     09 control_epoch  10 schema         11 schema version 12 limits        13 checksum
    14 meta encoding   15 tensor specs   16 missing        17 not expected   18 shape         19 dtype
    20 device, layout  21 tp_plan        22 meta value     23 step list      24 contradiction 25 payload size
    27 unprepared      28 stale frame    30 noise_scale    31 pp_disable_vace 32 result meta
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import FrameError, PreflightError


@dataclass(frozen=True)
class Problem:
    """`field` names the header word, meta key path or tensor; `code` is the two digits of the table above."""

    field: str
    message: str
    code: str
    fm: str | None = None
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def preflight(self, ids: Mapping[str, int] | None = None) -> PreflightError:
        """The sender's error: nothing was sent."""
        return PreflightError(
            f"{self.field}: {self.message}; nothing was sent",
            code=f"TP-21{self.code}",
            fm=self.fm,
            ids=ids,
            evidence={"field": self.field, **self.evidence},
        )

    def refusal(self, ids: Mapping[str, int] | None = None) -> FrameError:
        """The receiver's error: nothing was used."""
        return FrameError(
            f"{self.field}: {self.message}; the frame is refused",
            field=self.field,
            code=f"TP-22{self.code}",
            fm=self.fm,
            ids=ids,
            evidence=self.evidence,
        )
