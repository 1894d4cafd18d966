"""What moving Stage 0 off the workers is worth: memory and start-up of a v1.1c worker.

Real jobs of two ranks under torchrun; every figure is from the rank reports. The rivals are the same rank under
`v0_full_pipeline`, and a bare process that has only imported torch and joined a gloo group of two.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.job import DEADLINE_S, run_job
from benchmarks.measure import Row, order
from engine.config import EngineConfig, from_dict
from engine.plan import V0, V1

OWN = "until its own weights are loaded, waiting for nobody"
READY = "the job's: every rank waits for rank 0, which loads Stage 0 in both plans"
WORKER = 1  # the rank looked at; rank 0 holds Stage 0 in both plans

BARE = """
import datetime, sys
import torch
import torch.distributed as dist
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2,
                        timeout=datetime.timedelta(seconds=60))
dist.barrier()
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class Facts:
    """Of one worker: peak in bytes, start-up in seconds. `own_s` leaves out waiting for other ranks."""

    peak_bytes: int
    ready_s: float
    own_s: float
    model_bytes: int


def run(quick: bool) -> list[Row]:
    rounds = 1 if quick else 3
    plans = (V0, V1)
    facts: dict[str, list[Facts]] = {plan: [] for plan in plans}
    bare: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for turn in range(rounds):
            for plan in order(plans, turn):
                facts[plan].append(_worker(root / f"{plan}-{turn}", _config(plan, "tiny")))
            bare.append(_bare(root / f"store-{turn}"))
        large = _worker(root / "large", _config(V1, "bench"))
    ours, v0 = facts[V1], facts[V0]
    rows = [
        _against_v0("peak memory", "MB", [f.peak_bytes / 1e6 for f in ours], [f.peak_bytes / 1e6 for f in v0]),
        _against_v0("own start-up", "s", [f.own_s for f in ours], [f.own_s for f in v0], OWN),
        _against_v0("time to ready", "s", [f.ready_s for f in ours], [f.ready_s for f in v0], READY),
    ]
    floor = statistics.median(bare)
    typical = sorted(ours, key=lambda f: f.peak_bytes)[len(ours) // 2]
    return [*rows, _against_floor("tiny", typical, floor), _against_floor("bench", large, floor)]


def _against_v0(what: str, unit: str, ours: list[float], rivals: list[float], note: str = "") -> Row:
    ratios = [a / b for a, b in zip(ours, rivals, strict=True)]
    return Row(
        name=f"v1.1c worker, {what}",
        ours=statistics.median(ours),
        rival_name="v0 worker",
        rival=statistics.median(rivals),
        unit=unit,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=1.0,
        samples=len(ratios),
        note=note,
    )


def _against_floor(preset: str, facts: Facts, bare_bytes: float) -> Row:
    rival = bare_bytes + facts.model_bytes
    return Row(
        name=f"v1.1c worker memory, {preset}",
        ours=facts.peak_bytes / 1e6,
        rival_name="bare torch + shard + cache",
        rival=rival / 1e6,
        unit="MB",
        ratio=facts.peak_bytes / rival,
        target=1.10,
        note=f"bare {bare_bytes / 1e6:.0f} MB, shard and caches {facts.model_bytes / 1e6:.1f} MB",
    )


def _config(plan: str, preset: str) -> EngineConfig:
    return from_dict(
        {
            "model": {"preset": preset},
            "plan": {"tp_plan": plan, "tp": 2},
            "schedule": {"denoising_step_list": [1000, 500]},
            "run": {"chunks": 2},
            "sink": {"kinds": ["null"]},
        }
    )


def _worker(run_dir: Path, config: EngineConfig) -> Facts:
    """Run one job to its end and read the worker's report."""
    report = run_job(run_dir, config)[WORKER]
    if any(report["imported"].values()) != (config.plan.tp_plan == V0):
        raise RuntimeError(f"rank {WORKER} of {config.plan.tp_plan} imported {report['imported']}")
    generator, times = report["generator"], report["times"]
    return Facts(
        peak_bytes=report["memory"]["peak_rss_bytes"],
        ready_s=times["ready_s"],
        own_s=times["loaded_s"],
        model_bytes=generator["shard_bytes"] + generator["kv_cache_bytes"],
    )


def _bare(store: Path) -> int:
    """Peak bytes of the second of two bare ranks."""
    command = [sys.executable, "-c", BARE, str(store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    return int(outputs[WORKER])
