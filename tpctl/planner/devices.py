"""Devices by name: memory, its bandwidth, dense half-precision arithmetic, and the link between two of them.

Figures of the vendors' data sheets, in GB, GB/s and TFLOP/s; what a device reaches in practice is less, and
`Pace.efficiency` says how much less the estimate assumes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """`link_gb_s` is one direction of what joins two of them. None: not known, and nothing is estimated from it."""

    name: str
    memory_gb: float
    bandwidth_gb_s: float | None = None
    tflops: float | None = None
    link_gb_s: float | None = None


NVLINK4, NVLINK3, PCIE5, PCIE4 = 450.0, 300.0, 64.0, 32.0
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h200", 141, 4800, 989, NVLINK4),
        Device("h100", 80, 3350, 989, NVLINK4),
        Device("a100-80gb", 80, 2039, 312, NVLINK3),
        Device("l40s", 48, 864, 362, PCIE4),
        Device("rtx-pro-6000", 96, 1792, 504, PCIE5),
    )
}


def this_host() -> Device:
    """The memory of this machine, for a run on its processors; its speed is not known without `--measure`."""
    import psutil

    return Device("cpu", psutil.virtual_memory().total / 1e9)


def measured_host() -> Device:
    """This machine on one thread, as a rank has it: a matrix product and a copy, timed for a moment.

    Raises:
        RuntimeError: the probe did not answer.
    """
    import json
    import os
    import subprocess
    import sys

    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the probe of this host failed: {done.stderr.strip()[-200:]}")
    figures = json.loads(done.stdout)
    here = this_host()
    return Device("cpu", here.memory_gb, figures["gb_s"], figures["tflops"], figures["gb_s"] / 4)


_PROBE = """
import json, time
import numpy as np

def best(work, least_s=0.3):
    work()
    times, end = [], time.perf_counter() + least_s
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)

side = 768
a = np.ones((side, side), np.float32)
flat = np.ones(1 << 24, np.float32)
other = np.empty_like(flat)
print(json.dumps({
    "tflops": 2 * side**3 / best(lambda: a @ a) / 1e12,
    "gb_s": 2 * flat.nbytes / best(lambda: np.copyto(other, flat)) / 1e9,
}))
"""
