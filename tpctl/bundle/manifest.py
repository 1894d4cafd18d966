"""What a bundle holds, item by item, and what it should hold and does not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from tpctl import __version__
from tpctl.verdict import Coverage, Verdict

NAME = "manifest.json"
SCHEMA, SCHEMA_VERSION = "tpctl.bundle-manifest", 1


class Status(StrEnum):
    """`truncated` keeps the end of a file, or nothing of one that the bundle had no room for; `redacted` lacks words
    that must not leave the host. A shortened home path alone is no redaction."""

    collected = "collected"
    missing = "missing"
    truncated = "truncated"
    unreadable = "unreadable"
    redacted = "redacted"


@dataclass(frozen=True)
class Item:
    """One file of a bundle, or one that is not in it. `raw` is None where nothing is kept. Sizes in bytes.

    `expected` is False for what a healthy job need not have; its absence costs no coverage.
    """

    name: str
    status: Status
    raw: bytes | None = None
    expected: bool = True
    original_bytes: int | None = None
    modified_at: float | None = None
    replaced: Mapping[str, int] = field(default_factory=dict)
    why: str | None = None

    @property
    def covered(self) -> bool:
        return self.raw is not None

    def without_room(self, limit_bytes: int) -> Item:
        """The same where the bundle is full."""
        why = f"no room: a bundle holds {limit_bytes >> 20} MiB"
        return replace(self, status=Status.truncated, raw=None, original_bytes=len(self.raw or b""), why=why)

    def to_dict(self) -> dict[str, Any]:
        kept = self.raw
        return {
            "name": self.name,
            "status": self.status.value,
            "expected": self.expected,
            "size_bytes": len(kept) if kept is not None else 0,
            "sha256": hashlib.sha256(kept).hexdigest() if kept is not None else None,
            "original_bytes": self.original_bytes,
            "modified_at": self.modified_at,
            "replaced": dict(sorted(self.replaced.items())),
            "why": self.why,
        }


@dataclass(frozen=True)
class Manifest:
    """`runs` names each run in the bundle, with the life of each rank as the kernel told it when it was made."""

    kind: str
    target: str
    host: str
    made_at: str
    prompts: bool
    runs: Sequence[Mapping[str, Any]]
    items: Sequence[Item]

    @property
    def coverage(self) -> Coverage:
        expected = [item for item in self.items if item.expected]
        return Coverage(sum(item.covered for item in expected), len(expected))

    @property
    def verdict(self) -> Verdict:
        covered = self.coverage
        return Verdict.PASS if covered.checked == covered.expected else Verdict.UNCHECKED

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "tool_version": __version__,
            "kind": self.kind,
            "target": self.target,
            "host": self.host,
            "made_at": self.made_at,
            "prompts": self.prompts,
            "runs": [dict(run) for run in self.runs],
            "verdict": self.verdict.value,
            "coverage": {"checked": self.coverage.checked, "expected": self.coverage.expected},
            "items": [item.to_dict() for item in sorted(self.items, key=lambda item: item.name)],
        }
