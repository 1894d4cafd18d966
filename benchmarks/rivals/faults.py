"""The faults: what each is in the loop, which drill of the engine is the same, and what would be the truth about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`plant` is the loop's name for it. `drill` of the engine plants the same.

    `ops` is what the victim and its peer really did at the place where they part, as DETAIL names operations. `fm` is
    the failure mode that the referee should name; where it is empty, the loop has no part of ours that could notice.
    """

    id: str
    title: str
    plant: str
    victim: int = 1
    drill: str = ""
    ops: tuple[str, str] | None = None
    fm: str = ""


FAULTS = (
    Fault("extra", "one step more on one rank", "extra", 1, "OM-03.worker-list", ("ALLREDUCE", "BROADCAST"), "FM-03"),
    Fault("conditional", "a collective behind a flag", "conditional", 1, "OM-05", ("ALLGATHER", "ALLREDUCE"), "FM-03"),
    Fault("ad-hoc", "an ad-hoc broadcast in a block", "ad-hoc", 1, "", ("BROADCAST", "ALLREDUCE"), "FM-03"),
    Fault("wrong-group", "a collective on the wrong group", "wrong-group", 1, "OM-06", None, "FM-22"),
    Fault("kill-leader", "rank 0 killed in mid-work", "kill", 0, "OM-13.phase-b", None, "FM-40"),
    Fault("kill-worker", "a worker killed in mid-work", "kill", 1, "OM-14", None, "FM-40"),
    Fault("freeze", "a worker stopped in mid-work", "freeze", 1, "OM-15.phase-b", None, "FM-41"),
    Fault("freeze-receive", "a worker stopped before it receives", "freeze-receive", 1, "OM-15.receive", None, "FM-41"),
    Fault("input", "an input altered on one rank", "input", 1, "OM-11"),
    Fault("weight", "a weight altered on one rank", "weight", 1, "OM-12"),
    Fault("dtype", "a tensor of the same size, another dtype", "dtype", 1, "", ("ALLREDUCE", "ALLREDUCE"), "FM-03"),
    Fault("nan", "NaN on one rank", "nan", 1, "OM-25"),
)
