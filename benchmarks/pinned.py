"""`python -m benchmarks.pinned`: engine.worker on one core alone, the core of its local rank."""

from __future__ import annotations

import os
import runpy


def pin() -> None:
    """Before anything is imported that starts a thread: they inherit it."""
    cores = sorted(os.sched_getaffinity(0))
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks > len(cores):
        raise SystemExit(f"{ranks} ranks cannot have a core each: there are {len(cores)}")
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"])]})


if __name__ == "__main__":
    pin()
    runpy.run_module("engine.worker", run_name="__main__", alter_sys=True)
