"""What breaks for want of memory: the kernel itself refuses more of it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from engine.faults.scene import Scene

ROOM_BYTES = 64 << 20  # for what a rank needs to say why it leaves
ASKED_BYTES = 1 << 30


def exhaust(scene: Scene) -> None:
    """No address space beyond what is in use and a little room; then a tensor that does not fit into it."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + ROOM_BYTES, hard))
    torch.empty(ASKED_BYTES, dtype=torch.uint8)
