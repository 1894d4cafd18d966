"""What other tools know of a rank: py-spy's stacks of one that lives, PyTorch's flight recorder of one that is gone.

Neither is needed, and where one is not there, a note says so. Dumps of the flight recorder are pickles unless they
were asked for as JSON; a pickle is code, and is never opened here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tpctl.evidence import Seen
from tpctl.remains import printable, read_json

STACK_S = 10.0
MAX_LINES = 60
# Where ranks were told to put their dumps; without it, only the run directory is looked at.
DUMP_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP_NAME = "nccl_trace_rank_"


def live_stacks(seen: Seen) -> tuple[list[dict[str, Any]], list[str]]:
    """Stacks by rank, and notes on what is not there. Ranks are not paused for it."""
    alive = [rank for rank in seen.ranks if rank.alive and rank.contents]
    if not alive:
        return [], []
    tool = shutil.which("py-spy")
    if tool is None:
        return [], ["no stacks of the live ranks: py-spy is not on the PATH (pip install py-spy)"]
    stacks, notes = [], []
    for rank in alive:
        pid = rank.contents.pid if rank.contents else 0
        command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=STACK_S, check=False, errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            notes.append(f"no stack of rank {rank.rank}: {type(error).__name__}")
            continue
        lines = [printable(line) for line in done.stdout.splitlines() if line.strip()]
        if done.returncode or not lines:
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            notes.append(f"no stack of rank {rank.rank}: py-spy: {printable(why)}")
        else:
            stacks.append({"rank": rank.rank, "pid": pid, "lines": lines[:MAX_LINES]})
    return stacks, notes


def flight_records(seen: Seen) -> tuple[list[dict[str, Any]], list[str]]:
    """The last entry of each JSON dump, and notes on the others."""
    prefixes = {str(seen.run_dir / DUMP_NAME), *(os.environ[name] for name in DUMP_VARIABLES if os.environ.get(name))}
    found, notes = [], []
    for rank in seen.ranks:
        for path in (Path(f"{prefix}{rank.rank}{end}") for prefix in sorted(prefixes) for end in ("", ".json")):
            if not path.is_file():
                continue
            data, problem = read_json(path)
            entries = data.get("entries") if data else None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                why = "it is no JSON; a pickle is not opened" if problem else "it is no dump of the flight recorder"
                notes.append(f"flight recorder: {path.name} is not read: {why}")
                continue
            last = entries[-1] if entries else {}
            words = [str(last[key]) for key in ("profiling_name", "collective_seq_id", "state") if key in last]
            record = {"rank": rank.rank, "file": str(path), "entries": len(entries), "last": printable(" ".join(words))}
            found.append(record)
    if not found and not notes:
        notes.append("no dumps of PyTorch's flight recorder (gloo makes none)")
    return found, notes
