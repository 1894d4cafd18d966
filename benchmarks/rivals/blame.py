"""What an ending says about its cause, and whether that is true.

torchrun names a rank ("Root Cause"). DETAIL names the operation of each rank. The referee names a rank or, of two that
differ, what each did. A word about the wrong rank or operation is wrong, however much else is right. A rank that only
says its peer closed the connection names nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.rivals.arms import GUARDED, PLAIN, Ending
from benchmarks.rivals.faults import Fault

ROOT_CAUSE = re.compile(r"Root Cause.*?\n\s*rank\s*: (\d+)", re.DOTALL)
CLAIM = re.compile(r"Rank (\d+) is running collective: CollectiveFingerPrint\(SequenceNumber=\d+,? ?OpType=(\w+)")


@dataclass(frozen=True)
class Blame:
    """`right` is None where nothing was blamed."""

    words: str
    right: bool | None


def judge(arm: str, fault: Fault, ending: Ending) -> Blame:
    if arm == GUARDED and ending.referee is not None:
        verdict = ending.referee["verdict"]
        named = verdict["triggers"] in ([], [fault.victim])
        return Blame(f"{verdict['fm']} {verdict['message']}", named and verdict["fm"] == fault.fm)
    if not ending.failed:
        return Blame("nothing", None)
    claims = {(int(rank), op) for rank, op in CLAIM.findall(ending.log)}
    if claims and fault.ops is not None:
        false = sorted((rank, op) for rank, op in claims if op != fault.ops[rank != fault.victim])
        if false:
            return Blame("; ".join(f"rank {rank} runs {op}: untrue" for rank, op in false), False)
        return Blame("what each rank ran", True)
    root = ROOT_CAUSE.search(ending.log)
    if arm == PLAIN or root is None:
        return Blame("nobody: a peer closed the connection", None)
    return Blame(f"rank {root[1]}", int(root[1]) == fault.victim)
