"""A generator call cut over two ranks: compiled whole, as written, and compiled with a graph break a collective.

The last is what a compiler makes of a collective that it cannot see through; ours is an operator in the graph. Before
anything is timed the outputs are compared, and the graphs counted.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bench_model
from benchmarks.measure import Pairs, Row, order
from benchmarks.pair import run_pair

RIVALS = ("compiled", "written", "broken")
HOW = ("compiled", "broken")
TOLERANCE = 1e-3


def run(quick: bool) -> list[Row]:
    from engine.seeded import make_generator

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "bench.safetensors"
        make_generator(checkpoint, bench_model.DIMS, 0)
        os.environ |= {
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{directory}/kernels"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        options = {"checkpoint": str(checkpoint), "turns": 6 if quick else 20}
        answer = run_pair(_measure, options, deadline_s=600)
    pairs = Pairs(answer["times"])
    said, broken = (f"{graphs} graphs, {breaks} breaks" for graphs, breaks in map(answer["counts"].get, HOW))
    return [
        pairs.row(
            "generator call, tp=2, compiled", "compiled", "written", rival_name="as written", target=1.0, note=said
        ),
        pairs.row(
            "generator call, tp=2, compiled",
            "compiled",
            "broken",
            rival_name="a graph break a collective",
            target=1.0,
            note=broken,
        ),
    ]


def _measure(rank: int, pg: Any, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from engine.comm.group import Group, Phase, PhaseGate, Rank
    from engine.model.compiled import AsWritten, Compiled

    def mesh() -> Group:
        return Group("mesh_pg", (Rank(0), Rank(1)), Rank(rank), pg, PhaseGate(Phase.B))

    checkpoint, layers = Path(options["checkpoint"]), bench_model.DIMS.num_layers
    latents_BFCHW, text_BLD = bench_model.inputs()
    with torch.inference_mode():
        arms = {name: bench_model.load(checkpoint, mesh()) for name in RIVALS}
        hidden: Any = arms["broken"].dit.mesh
        hidden.all_reduce = torch.compiler.disable(hidden.all_reduce)
        outputs, counts = {}, {}
        for name, model in arms.items():  # one after another: the compiler counts the breaks of a whole process
            model.dit.run = AsWritten() if name == "written" else Compiled("inductor", model.dit.mesh, layers)
            outputs[name] = model.cold(latents_BFCHW, text_BLD)
            counts[name] = model.dit.run.graphs, len(model.dit.run.breaks)
        difference = max((outputs[name] - outputs["written"]).abs().max().item() for name in RIVALS)
        if not difference < TOLERANCE:
            raise RuntimeError(f"the outputs differ by {difference:.1e}; timing them would compare nothing")
        if counts["compiled"] != (1, 0):
            raise RuntimeError(f"{counts['compiled']} graphs and breaks: this is not the healthy form")
        calls: dict[str, Callable[[], Any]] = {
            name: (lambda model=model: model.call(latents_BFCHW, text_BLD, 0)) for name, model in arms.items()
        }
        barrier = mesh()
        times: dict[str, list[float]] = {name: [] for name in RIVALS}
        for turn in range(1 + options["turns"]):
            for name in order(RIVALS, turn):
                barrier.barrier()
                started = time.perf_counter()
                calls[name]()
                barrier.barrier()
                if turn:
                    times[name].append(time.perf_counter() - started)
    return {"times": times, "counts": counts}
