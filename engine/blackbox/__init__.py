"""The black box: what a rank did last, in a memory-mapped file that survives `kill -9`.

Two rings and a few live words. The first ring keeps *commitment points*: acts after which a peer blocks until this
rank delivers the rest. The second keeps every *collective*, recorded when it is entered: which group, which place in
that group's sequence, which operation on what, from which line. The live words say where the rank is now: its state,
its phase, how many collectives it entered in each group, and which one it is inside.

Each record carries a CRC over itself, so a reader never takes a torn one for a whole one. Live words are aligned and
written by single stores. A record is written before the words that announce it. The layout is for one host: native
64-bit words, little-endian.
"""

from engine.blackbox.layout import COLLECTIVE_KEY, BlackBoxError
from engine.blackbox.reader import (
    Box,
    Collective,
    Commitment,
    Contents,
    Live,
    Members,
    Stream,
    read,
    read_box,
    unpack_collective,
)
from engine.blackbox.writer import BlackBox, pack_signature, pack_site

__all__ = [
    "COLLECTIVE_KEY",
    "BlackBox",
    "BlackBoxError",
    "Box",
    "Collective",
    "Commitment",
    "Contents",
    "Live",
    "Members",
    "Stream",
    "pack_signature",
    "pack_site",
    "read",
    "read_box",
    "unpack_collective",
]
