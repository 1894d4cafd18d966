"""`python -m benchmarks.job_cycles [--cycles 200] [--seconds 600]`: jobs started and drained, and what they leave.

A cycle is `up`, two chunks or more, `drain`. After each the receipt must balance and nothing may have been lost, and
what the machine holds for these jobs must be what it held before: processes, unix sockets, shared memory, temporary
files, and files of the state directory once the job's own are removed. Everything a job makes is told by the private
directories that it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.control_load import JOB, TINY, _rest, tpctl

CYCLES = 200
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Census:
    """What there is for jobs below one directory, by name."""

    processes: frozenset[str]
    sockets: frozenset[str]
    shared_memory: frozenset[str]
    files: frozenset[str]

    @classmethod
    def of(cls, directory: Path) -> Census:
        """Processes that have the directory in their environment, this one aside; sockets and files below it; and
        all shared memory of the machine."""
        marked = frozenset(
            f"{path.name} {_command(path)}"
            for path in Path("/proc").iterdir()
            if path.name.isdecimal() and int(path.name) != os.getpid() and str(directory) in _environment(path)
        )
        bound = Path("/proc/net/unix").read_text().splitlines()
        sockets = frozenset(line.split()[-1] for line in bound if str(directory) in line)
        shared = frozenset(path.name for path in SHM.iterdir()) if SHM.is_dir() else frozenset()
        return cls(marked, sockets, shared, frozenset(str(path) for path in directory.rglob("*")))

    def more_than(self, before: Census) -> dict[str, list[str]]:
        """What was not there before, by kind."""
        grown = {kind: sorted(getattr(self, kind) - getattr(before, kind)) for kind in self.__dataclass_fields__}
        return {kind: names for kind, names in grown.items() if names}


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_bytes().decode(errors="replace")
    except OSError:  # it ended, or is somebody else's
        return ""


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return ""


def cycle(directory: Path) -> float:
    """One job, from its start to its end; its files are removed. Returns the seconds that it took.

    Raises:
        RuntimeError: it did not drain with a balanced account and without loss.
    """
    began = time.monotonic()
    tpctl(directory, "up", "--name", JOB, "--yes", *(word for pair in TINY for word in ("--set", pair)))
    try:
        tpctl(directory, "wait", JOB, "--for", "running")
        _rest(directory / "jobs" / JOB, 2)
        receipt = tpctl(directory, "drain", JOB)
    except BaseException:
        tpctl(directory, "abort", JOB, "--yes", check=False)
        raise
    took_s = time.monotonic() - began
    account = receipt["account"]
    if not receipt["balanced"] or account["abandoned"] or receipt["leftovers"] or receipt["ending"] != "drained":
        raise RuntimeError(f"the receipt is not clean: {receipt}")
    return took_s


def soak(cycles: int, seconds: float = float("inf")) -> dict[str, object]:
    """Run cycles, as many as fit into `seconds`. `left` has what is there in the end and was not after the first."""
    with tempfile.TemporaryDirectory(prefix="tpctl-") as name:
        directory = Path(name)
        (directory / "tmp").mkdir()
        os.environ["TMPDIR"] = str(directory / "tmp")
        took_s = []
        first: Census | None = None
        end = time.monotonic() + seconds
        for number in range(cycles):
            took_s.append(cycle(directory))
            tpctl_remove(directory)
            first = first or Census.of(directory)
            left = Census.of(directory).more_than(first)
            print(f"{number + 1}: {took_s[-1]:.1f} s{f', left: {left}' if left else ''}", file=sys.stderr, flush=True)
            if time.monotonic() > end:
                break
        alone = Census.of(directory)
        return {
            "cycles": len(took_s),
            "left": left,
            "processes": sorted(alone.processes),
            "sockets": sorted(alone.sockets),
            "median_s": statistics.median(took_s),
            "after_the_first": {kind: len(names) for kind, names in asdict(first).items()} if first else {},
        }


def tpctl_remove(directory: Path) -> None:
    """The job's own directory: what an operator's `up --yes` of the same name removes."""
    from tpctl.jobs.place import JobDir, remove

    remove(JobDir(directory / "jobs" / JOB))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job_cycles", description="Jobs leave nothing behind.")
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no cycle begins after so many")
    options = parser.parse_args(arguments)
    found = soak(max(1, options.cycles), options.seconds)
    print(json.dumps(found, indent=1))
    return 1 if found["left"] or found["processes"] or found["sockets"] else 0


if __name__ == "__main__":
    sys.exit(main())
