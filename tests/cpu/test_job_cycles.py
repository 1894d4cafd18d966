"""The census of job cycles finds what a job would leave behind, of each kind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from benchmarks.job_cycles import SHM, Census


@pytest.mark.skipif(not os.access(SHM, os.W_OK), reason="there is no shared memory here")
def test_a_census_names_what_was_left_of_each_kind(tmp_path: Path) -> None:
    before = Census.of(tmp_path)
    shared = SHM / f"tpctl-test-{uuid.uuid4().hex}"
    command = [sys.executable, "-c", "print('here', flush=True); input()"]
    left = subprocess.Popen(
        command,
        env=os.environ | {"TPCTL_STATE_DIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert left.stdout is not None
        assert left.stdout.readline() == "here\n"
        shared.write_bytes(b"x")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "control.sock"))
            found = Census.of(tmp_path).more_than(before)
    finally:
        left.communicate("\n", timeout=60)
        shared.unlink()
    assert found["processes"][0].startswith(f"{left.pid} ")
    assert found["sockets"] == found["files"] == [str(tmp_path / "control.sock")]
    assert shared.name in found["shared_memory"]
    (tmp_path / "control.sock").unlink()
    after = Census.of(tmp_path)
    assert after.processes == before.processes
    assert after.files == before.files
