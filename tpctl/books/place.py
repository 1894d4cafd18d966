"""Where checklists and runbooks lie: in a checkout at the top, in an installed package beside this module."""

from __future__ import annotations

import difflib
from pathlib import Path

from tpctl.errors import CliError
from tpctl.failuremodes import RUNBOOK_DIR as RUNBOOKS

# A link to the top-level directory in a checkout; in a wheel, a copy of it.
CHECKLISTS = Path(__file__).resolve().parent / "checklists"
__all__ = ["CHECKLISTS", "RUNBOOKS", "BookError", "ids", "pick"]


class BookError(CliError):
    """A checklist, runbook or record that does not exist or contradicts itself. TP-81xx."""

    code = "TP-8101"
    next_step = "tpctl checklist list"


def ids(folder: Path, suffix: str) -> list[str]:
    """The ids in a folder: its files' stems. None at all is a broken installation, and said so."""
    found = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    if not found:
        raise BookError(f"{folder} holds no *{suffix}: the package is not whole", code="TP-8102", next_step="tpctl env")
    return found


def pick(kind: str, known: list[str], wanted: str) -> str:
    """`wanted`, if it is known.

    Raises:
        BookError: it is not; the nearest one is named.
    """
    if wanted in known:
        return wanted
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    command = kind.partition(" ")[0]
    raise BookError(f"there is no {kind} '{wanted}'{hint}", code="TP-8103", next_step=f"tpctl {command} --help")
