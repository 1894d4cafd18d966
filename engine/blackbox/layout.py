"""The layout of a black box file, and its error."""

from __future__ import annotations

import struct

from engine.errors import EngineError
from engine.lifecycle import Doing, RankState

MAGIC = b"TPCTLBB1"
VERSION = 2
FILE = struct.Struct("<8sIIiIQQ")  # magic, version, slots, rank, pid, start of pid in clock ticks, made at (ns)
CRC = struct.Struct("<I")
LIVE_OFFSET = 64
STATE, STATE_NS, INSIDE, COMMITS, COLLECTIVES, GROUPS, PHASE, COUNTS = 0, 1, 2, 3, 4, 5, 6, 8
GROUP_SLOTS = 8
# Words after the live ones: the account of the stream, on the rank that keeps it. Zeros: nothing yet.
ACCEPTED, EMITTED, DROPPED, EMIT_NS, PERIOD_NS = 16, 17, 18, 19, 20
# What its loop is at and since when, in one word, so that a reader never sees half; and when a pause ended last.
DOING, RESUMED_NS = 22, 23
DOING_BITS = 4
STREAM_OFFSET = LIVE_OFFSET + 8 * ACCEPTED
STREAM = struct.Struct("<8Q")
WORDS_BYTES = 192  # live and stream words; the rest is reserved
LIVE = struct.Struct(f"<6Q16s{GROUP_SLOTS}Q")
GROUP_OFFSET = 256
GROUP_BYTES = 640
GROUP = struct.Struct("<16sI512s")  # name, leader, members as bits
MAX_RANK = 512 * 8 - 1
HEADER_BYTES = 8192
COMMIT = struct.Struct("<QQqqq16s16sI")  # seq, t_ns, call_id, chunk_index, cache_epoch, action, group, crc
# seq, t_ns, place, call_id, chunk_index, cache_epoch | hash, group, op, what | line, site | crc
COLLECTIVE = struct.Struct("<QQQqqqQ16s16s40sI56sI")
# Where a packed collective keeps what is compared: its place, its hash, its group.
COLLECTIVE_KEY = (slice(16, 24), slice(48, 56), slice(56, 72))
ENTRY = struct.Struct("<QQQqqq")
SIGNATURE = struct.Struct("<Q16s16s40s")
SITE = struct.Struct("<I56s")
STATES = tuple(RankState)
DOINGS = tuple(Doing)


class BlackBoxError(EngineError):
    """A black box that cannot be made or read: no room, corrupt, truncated, foreign or of another version."""

    code = "TP-6201"
    next_step = "tpctl triage RUN_DIR"
