"""What tests launch in place of the engine, to see how the launcher ends: `python -m tests.cli.launched HOW DIR`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(how: str, directory: Path) -> int:
    rank = int(os.environ["RANK"])
    (directory / f"alive{rank}").write_text(os.environ["OMP_NUM_THREADS"])
    if how == "fine":
        return 0
    if how == "die" and rank == 1:
        print("rank 1 is about to die", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "orphan":
        # A child in a session of its own, which nobody waits for.
        subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
        return 0
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
