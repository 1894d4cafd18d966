"""The frame header: 13 little-endian int64 words, and the identifier rules of a link (contract, sections 4 and 5).

    word  0 magic          4 chunk_index     8 schema version   12 meta checksum
          1 wire version   5 cache_epoch     9 meta bytes
          2 action         6 control_epoch  10 tensor count
          3 call_id        7 schema         11 payload bytes

The checksum is the CRC-32 of words 0..11 followed by the meta, so a flipped bit in either is found; a frame without
meta is checked as soon as its header is read. Payload bytes are not in it: the input digest covers them.
This module is free of torch: `tpctl` reads headers with it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType

from engine.config import EngineConfig
from engine.errors import FrameError
from engine.wire.problem import Problem

MAGIC = int.from_bytes(b"TPCTLFRM", "little")
WIRE_VERSION = 1
HEADER_WORDS = 13
HEADER_BYTES = HEADER_WORDS * 8

_WORDS = struct.Struct(f"<{HEADER_WORDS}q")
_SEALED_BYTES = HEADER_BYTES - 8
_INT64_MAX = (1 << 63) - 1


class Action(IntEnum):
    """What the receiver does with the frame."""

    NOOP = 0
    INFER = 1
    SHUTDOWN = 2
    ERROR = 3
    RESULT = 4


class Schema(IntEnum):
    """What meta and tensors mean."""

    NONE = 0
    TP_ENVELOPE = 1
    PP_ENVELOPE = 2
    PP_RESULT = 3
    ERROR = 4


SCHEMAS_OF: Mapping[Action, frozenset[Schema]] = MappingProxyType(
    {
        Action.NOOP: frozenset({Schema.NONE}),
        Action.INFER: frozenset({Schema.TP_ENVELOPE, Schema.PP_ENVELOPE}),
        Action.SHUTDOWN: frozenset({Schema.NONE}),
        Action.ERROR: frozenset({Schema.ERROR}),
        Action.RESULT: frozenset({Schema.PP_RESULT}),
    }
)

# What a mesh rank accepts from its leader, with the one version it speaks of each schema.
MESH_ACCEPT = frozenset({Action.NOOP, Action.INFER, Action.SHUTDOWN, Action.ERROR})
MESH_SCHEMAS: Mapping[Schema, int] = MappingProxyType({Schema.NONE: 0, Schema.TP_ENVELOPE: 1, Schema.ERROR: 1})

# The pp link: what the mesh leader accepts from Stage 0, and Stage 0 from the leader.
LEADER_ACCEPT = MESH_ACCEPT
LEADER_SCHEMAS: Mapping[Schema, int] = MappingProxyType({Schema.NONE: 0, Schema.PP_ENVELOPE: 1, Schema.ERROR: 1})
STAGE0_ACCEPT = frozenset({Action.RESULT})
STAGE0_SCHEMAS: Mapping[Schema, int] = MappingProxyType({Schema.PP_RESULT: 1})


@dataclass(frozen=True)
class Limits:
    """Bounds checked by both sides before anything is allocated. Bytes and counts."""

    max_meta_bytes: int = 1 << 20
    max_tensors: int = 64
    max_payload_bytes: int = 2 << 30

    @classmethod
    def of(cls, config: EngineConfig) -> Limits:
        return cls(config.comm.max_meta_bytes, config.comm.max_tensors, config.comm.max_payload_bytes)


@dataclass(frozen=True)
class Header:
    """The words of one header, without magic and wire version, which are constants."""

    action: Action
    call_id: int
    chunk_index: int
    cache_epoch: int
    control_epoch: int
    schema: Schema
    schema_version: int
    meta_bytes: int
    tensor_count: int
    payload_bytes: int
    meta_checksum: int

    def pack(self) -> bytes:
        """The 104 bytes on the wire."""
        return _WORDS.pack(
            MAGIC,
            WIRE_VERSION,
            self.action,
            self.call_id,
            self.chunk_index,
            self.cache_epoch,
            self.control_epoch,
            self.schema,
            self.schema_version,
            self.meta_bytes,
            self.tensor_count,
            self.payload_bytes,
            self.meta_checksum,
        )

    def checksum(self, meta: bytes) -> int:
        """CRC-32 over the first 12 words and the meta."""
        return zlib.crc32(meta, zlib.crc32(self.pack()[:_SEALED_BYTES]))

    def seal(self, meta: bytes) -> Header:
        """A copy whose `meta_bytes` and `meta_checksum` belong to this meta."""
        sized = self if self.meta_bytes == len(meta) else replace(self, meta_bytes=len(meta))
        return replace(sized, meta_checksum=sized.checksum(meta))

    def ids(self) -> dict[str, int]:
        """The identifiers, for errors and records."""
        return {"call_id": self.call_id, "chunk_index": self.chunk_index, "cache_epoch": self.cache_epoch}


@dataclass
class LinkState:
    """The identifiers last seen on one direction of a link, and what may follow them.

    Both ends keep one. `parse_header` and `prepare` only look; the owner of the link calls `advance` once a frame has
    been sent, or has been received whole and accepted.
    """

    last_call_id: int = -1
    last_chunk_index: int = -1
    cache_epoch: int = 0
    control_epoch: int = 0

    def problem(self, header: Header) -> Problem | None:
        """What is wrong with the identifiers, in the receiver's order, or None."""
        if header.call_id <= self.last_call_id:
            what = "is repeated" if header.call_id == self.last_call_id else "steps back"
            return Problem("call_id", f"{header.call_id} {what}; the last was {self.last_call_id}", "06")
        allowed = self._chunks_after(header.action)
        if header.chunk_index not in allowed:
            return Problem(
                "chunk_index",
                f"{header.chunk_index} with {header.action.name}; expected {' or '.join(map(str, allowed))}",
                "07",
            )
        if header.cache_epoch < self.cache_epoch:
            return Problem("cache_epoch", f"{header.cache_epoch} is stale; now {self.cache_epoch}", "08", "FM-10")
        # A cut raises the epoch by one, and only a frame that carries (or answers) a chunk can cut.
        last = self.cache_epoch + int(header.action in (Action.INFER, Action.RESULT))
        if header.cache_epoch > last:
            return Problem("cache_epoch", f"{header.cache_epoch} jumps ahead; at most {last}", "08", "FM-10")
        if header.control_epoch < self.control_epoch:
            return Problem("control_epoch", f"{header.control_epoch} steps back; now {self.control_epoch}", "09")
        return None

    def cut_problem(self, header: Header, init_cache: bool) -> Problem | None:
        """The epoch against `init_cache`, known once the meta is read: +1 exactly at a hard cut.

        The first chunk initialises the cache of the epoch a link starts in, and warm-up may do so as often as it
        likes; after that each `init_cache` is a cut.
        """
        if header.cache_epoch > self.cache_epoch and not init_cache:
            return Problem("cache_epoch", f"{header.cache_epoch} is new, but init_cache is false", "08", "FM-10")
        if header.cache_epoch == self.cache_epoch and init_cache and self.last_chunk_index >= 0:
            return Problem(
                "cache_epoch", f"init_cache is true, but the epoch is still {header.cache_epoch}", "08", "FM-10"
            )
        return None

    def advance(self, header: Header) -> None:
        """Take the identifiers of a frame that was sent, or accepted.

        Raises:
            FrameError: they may not follow the ones held; the state is unchanged.
        """
        problem = self.problem(header)
        if problem is not None:
            raise problem.refusal(header.ids())
        self.last_call_id = header.call_id
        self.last_chunk_index = max(self.last_chunk_index, header.chunk_index)
        self.cache_epoch = header.cache_epoch
        self.control_epoch = header.control_epoch

    def _chunks_after(self, action: Action) -> tuple[int, ...]:
        if action not in (Action.INFER, Action.RESULT):
            return (-1,)
        if self.last_chunk_index < 0:
            return (-1, 0)  # warm-up goes before the first chunk
        return (self.last_chunk_index + 1,)


def parse_header(
    raw: bytes,
    link: LinkState,
    limits: Limits,
    *,
    accept: frozenset[Action] = MESH_ACCEPT,
    schemas: Mapping[Schema, int] = MESH_SCHEMAS,
) -> Header:
    """Read and judge a header, in the order of contract section 4. Nothing is allocated; `link` is not advanced.

    Args:
        raw: the 104 bytes received.
        link: what this end last accepted.
        limits: bounds of the sizes that the header announces.
        accept: actions that may come this way.
        schemas: each schema spoken here with its version.

    Raises:
        FrameError: the first word that is wrong, named in `field`.
    """
    if len(raw) != HEADER_BYTES:
        raise Problem("header", f"{len(raw)} bytes, expected {HEADER_BYTES}", "01").refusal()
    magic, version, *words = _WORDS.unpack(raw)
    if magic != MAGIC:
        raise Problem("magic", f"{magic:#018x} is not {MAGIC:#018x}: no frame of this protocol", "03").refusal()
    if version != WIRE_VERSION:
        raise Problem("wire_version", f"{version} is unknown; this build speaks {WIRE_VERSION}", "04").refusal()
    try:
        action = Action(words[0])
    except ValueError:
        raise Problem("action", f"{words[0]} is unknown", "05").refusal() from None
    ids = {"call_id": words[1], "chunk_index": words[2], "cache_epoch": words[3]}
    if action not in accept:
        raise Problem("action", f"{action.name} is not accepted on this link", "05").refusal(ids)
    # The schema word may be unknown: the link's rules come first and do not look at it.
    call_id, chunk_index, cache_epoch, control_epoch, schema_word, *rest = words[1:]
    header = Header(action, call_id, chunk_index, cache_epoch, control_epoch, Schema.NONE, *rest)
    problem = link.problem(header)
    if problem is not None:
        raise problem.refusal(ids)
    try:
        schema = Schema(schema_word)
    except ValueError:
        raise Problem("schema", f"{schema_word} is unknown", "10").refusal(ids) from None
    header = replace(header, schema=schema)
    problem = _schema_problem(header, schemas) or size_problem(header, limits)
    if problem is not None:
        raise problem.refusal(ids)
    if not header.meta_bytes and header.meta_checksum != header.checksum(b""):
        raise checksum_refusal(header, b"")
    return header


def checksum_refusal(header: Header, meta: bytes) -> FrameError:
    """The error for a header or meta that was altered on its way."""
    return Problem(
        "meta_checksum",
        f"{header.meta_checksum:#010x} in the header, {header.checksum(meta):#010x} over header and meta",
        "13",
    ).refusal(header.ids())


def size_problem(header: Header, limits: Limits) -> Problem | None:
    """Announced sizes against the limits, and against what the action may carry."""
    for field, value, most in (
        ("meta_bytes", header.meta_bytes, limits.max_meta_bytes),
        ("tensor_count", header.tensor_count, limits.max_tensors),
        ("payload_bytes", header.payload_bytes, limits.max_payload_bytes),
        ("meta_checksum", header.meta_checksum, 0xFFFFFFFF),
        ("control_epoch", header.control_epoch, _INT64_MAX),
    ):
        if not 0 <= value <= most:
            return Problem(field, f"{value} is outside 0..{most}", "12")
    if (header.meta_bytes > 0) != (header.schema is not Schema.NONE):
        return Problem("meta_bytes", f"{header.meta_bytes} with schema {header.schema.name}", "12")
    if (header.tensor_count > 0) != (header.payload_bytes > 0):
        return Problem("payload_bytes", f"{header.payload_bytes} for {header.tensor_count} tensors", "12")
    if header.tensor_count and header.action not in (Action.INFER, Action.RESULT):
        return Problem("tensor_count", f"{header.action.name} carries no tensors, not {header.tensor_count}", "12")
    if header.action is Action.INFER and not header.tensor_count:
        return Problem("tensor_count", "INFER without tensors", "12")
    return None


def _schema_problem(header: Header, schemas: Mapping[Schema, int]) -> Problem | None:
    if header.schema not in SCHEMAS_OF[header.action] or header.schema not in schemas:
        return Problem("schema", f"{header.schema.name} is not accepted with {header.action.name} here", "10")
    if header.schema_version != schemas[header.schema]:
        return Problem(
            "schema_version",
            f"{header.schema.name} version {header.schema_version}; this build speaks {schemas[header.schema]}",
            "11",
        )
    return None
