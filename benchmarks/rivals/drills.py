"""Ours: `tpctl drill` of the same faults, all in one call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rivals.arms import ROOT
from benchmarks.rivals.faults import Fault

DEADLINE_S = 420.0


def run(faults: list[Fault], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """What `tpctl drill -o json` says of each fault's drill and of its variants (other victims), by fault.

    Raises:
        RuntimeError: it said nothing.
    """
    ids = [fault.drill for fault in faults if fault.drill]
    if not ids:
        return {}
    command = [sys.executable, "-m", "tpctl", "drill", *ids, "-o", "json", "--run-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    try:
        drills = json.loads(done.stdout)["data"]["drills"]
    except (ValueError, KeyError) as error:
        raise RuntimeError(f"tpctl drill said nothing: {done.stderr[-2000:]}") from error
    return {
        fault.id: [drill for drill in drills if f"{drill['id']}.".startswith(f"{fault.drill}.")]
        for fault in faults
        if fault.drill
    }
