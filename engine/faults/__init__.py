"""Drill hooks: every fault that a drill plants, and how its guard is switched off. The only place of both.

Nothing here runs unless the configuration names a drill. The victim breaks by wrapping one method of one of its own
parts (`FAULTS`); without its guard, every rank swaps the guarding function for one that finds nothing (`UNGUARD`).
So the main path has no test flags, and no guard has an off switch in a job that is no drill. The moment of the break
is a commitment point, `inject <id>`, in the victim's black box.
"""

from engine.faults.acts import DRIFT, DRIFT_HEAD, DRIFT_LAYER
from engine.faults.hooks import before_handshake, differ, plant
from engine.faults.places import CALL
from engine.faults.scene import Parts, mark
from engine.faults.table import AUDITED, FAULTS
from engine.faults.unguard import UNGUARD

__all__ = [
    "AUDITED",
    "CALL",
    "DRIFT",
    "DRIFT_HEAD",
    "DRIFT_LAYER",
    "FAULTS",
    "UNGUARD",
    "Parts",
    "before_handshake",
    "differ",
    "mark",
    "plant",
]
