"""What somebody may have meant who typed a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like this one; None if none is alike. A lower `cutoff` finds what is less alike."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def hint(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a refusal, `; did you mean '...'?`, or nothing."""
    near = nearest(name, known, cutoff)
    return f"; did you mean '{near}'?" if near else ""
