"""A generator call cut over two ranks against the same call on one, each rank with one thread.

Two is the ideal; what this machine allows is measured beside it: two whole models at work at the same time, each on
its own, with no communication at all, against one alone. Shared caches, memory and neighbours show there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bench_model
from benchmarks.measure import Pairs, Row, order
from benchmarks.pair import run_pair

RIVALS = ("tp1", "tp2", "both")
TOLERANCE = 1e-3


def run(quick: bool) -> list[Row]:
    from engine.seeded import make_generator

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "bench.safetensors"
        make_generator(checkpoint, bench_model.DIMS, 0)
        options = {"checkpoint": str(checkpoint), "turns": 6 if quick else 20}
        answer = run_pair(_measure, options, deadline_s=400)
    pairs = Pairs(answer["times"])
    limits = [2 / ratio for ratio in pairs.ratios("both", "tp1")]
    limit = sorted(limits)[len(limits) // 2]
    note = f"{answer['collectives']} collectives a call; two calls side by side get {limit:.2f} here"
    return [
        pairs.row(
            "generator call, tp=2", "tp2", "tp1", rival_name="tp=1, one rank", inverse=True, target=1.7, note=note
        ),
        Row(
            name="limit of this machine for two ranks",
            ours=pairs.median("both") * 1e3,
            rival_name="one call alone",
            rival=pairs.median("tp1") * 1e3,
            unit="ms",
            ratio=limit,
            meaning="2 x rival / ours",
            low=min(limits),
            high=max(limits),
            at_most=False,
            samples=len(limits),
            note="two independent calls at once, no communication",
        ),
    ]


def _measure(rank: int, pg: Any, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from engine.comm.group import Group, Phase, PhaseGate, Rank

    mesh = Group("mesh_pg", (Rank(0), Rank(1)), Rank(rank), pg, PhaseGate(Phase.B))
    checkpoint = Path(options["checkpoint"])
    latents_BFCHW, text_BLD = bench_model.inputs()
    with torch.inference_mode():
        cut = bench_model.load(checkpoint, mesh)
        whole = bench_model.load(checkpoint, Group.solo(gate=PhaseGate(Phase.B)))
        difference = (cut.cold(latents_BFCHW, text_BLD) - whole.cold(latents_BFCHW, text_BLD)).abs().max().item()
        if not difference < TOLERANCE:
            raise RuntimeError(f"tp=2 and tp=1 differ by {difference:.1e}; timing them would compare nothing")
        before = mesh.ledger.count
        cut.call(latents_BFCHW, text_BLD, 0)
        collectives = mesh.ledger.count - before

        def nothing() -> None:
            """The other rank's part while rank 0 works alone."""

        def work_whole() -> None:
            whole.call(latents_BFCHW, text_BLD, 0)

        calls: dict[str, Callable[[], Any]] = {
            "tp1": work_whole if rank == 0 else nothing,
            "tp2": lambda: cut.call(latents_BFCHW, text_BLD, 0),
            "both": work_whole,
        }
        times: dict[str, list[float]] = {name: [] for name in RIVALS}
        for turn in range(1 + options["turns"]):
            for name in order(RIVALS, turn):
                mesh.barrier()
                started = time.perf_counter()
                calls[name]()
                mesh.barrier()  # the slower rank counts; blocked, it takes no core from the other
                if turn:
                    times[name].append(time.perf_counter() - started)
    return {"times": times, "collectives": collectives}
