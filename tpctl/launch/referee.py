"""The referee beside a launch: started first, ended last, and never a reason for the launch to fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from engine.process import Process
from tpctl.launch.environment import rank_environment

VERDICT = "referee.json"
# It leaves within one look when told to; after a verdict it first sees the ranks buried.
LEAVE_S = 5.0


@contextlib.contextmanager
def watching(
    ranks_dir: Path, verdict: Path, which: Sequence[str], log: IO[bytes], environ: Mapping[str, str]
) -> Iterator[None]:
    """A referee for this host's ranks while the body runs. A verdict of an earlier run is removed first.

    Args:
        ranks_dir: the ranks' run directory.
        verdict: the file that a verdict is written to.
        which: the referee's arguments that say which ranks are this host's, and where other hosts are met.
        environ: what it gets on top of a rank's environment.
    """
    verdict.unlink(missing_ok=True)
    command = [sys.executable, "-m", "engine.referee", "--run-dir", str(ranks_dir), "--record", str(verdict), *which]
    command += ["--parent", str(Process.of(os.getpid()))]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=rank_environment() | dict(environ),
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"no referee: {error}\n".encode())
        yield
        return
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
