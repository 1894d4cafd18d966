"""How close the pipeline comes to what its stages allow: pp0, two ranks, a core each, both stages of similar length.

Whole jobs under torchrun, the four regimes in turns. No rival but arithmetic: the bound of a run is the longer of its
two stages, where the next envelope waits for an anchor from pixels with what that costs on top, and every figure of it
comes from the records of that very run (`engine.measures`). The stages are real: the bench generator with five steps
takes about as long as the VAE takes for the same chunk.

A stage that the link slows down would raise its own bound. So regime R1 is also run by one process on one core, whose
phases nobody disturbs: the longer of them is the other bound, and their sum what overlap is worth.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.job import run_job
from benchmarks.measure import Pairs, Row, order
from engine.config import EngineConfig, from_dict
from engine.measures import Overlap, overlap
from engine.plan import PP0, V1

ARMS: dict[str, dict[str, Any]] = {
    "R1": {"schedule__recompute": False},
    "R0a decode-all-first": {"pipeline__anchor_first": False},
    "R0a anchor-first": {},
    "R0": {"schedule__anchor": "latent"},
}
TARGETS = {"R1": 1.08, "R0a anchor-first": 1.10}
STEPS = (1000, 800, 600, 400, 200)
ALONE = "R1, one process"
WARM_UP = 4  # until the window is full and the first anchors from pixels are made


def run(quick: bool) -> list[Row]:
    turns, chunks = (1, 10) if quick else (3, 16)
    found: dict[str, list[Overlap]] = {arm: [] for arm in ARMS}
    alone: list[tuple[float, float]] = []  # of one process: its longer phase, and its period
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(turns):
            for arm in order([*ARMS, ALONE], turn):
                run_dir = Path(directory) / f"{turn}-{arm.replace(' ', '-')}"
                if arm == ALONE:
                    alone.append(_alone(run_dir, chunks))
                else:
                    found[arm].append(_job(run_dir, arm, chunks))
    coupled, decoupled = found["R0a decode-all-first"], found["R0a anchor-first"]
    periods = [run.period_ms for run in found["R1"]]
    return [
        *(_against_bound(arm, runs) for arm, runs in found.items()),
        *(_score(arm, runs) for arm, runs in found.items()),
        _row(
            "R0a anchor-first, period",
            [run.period_ms for run in decoupled],
            "decode-all-first",
            [run.period_ms for run in coupled],
            target=0.95,
        ),
        _row("R1, period", periods, "the longer phase of one process", [phase for phase, _ in alone]),
        _row("R1, period", periods, "the period of one process", [period for _, period in alone]),
    ]


def _job(run_dir: Path, arm: str, chunks: int) -> Overlap:
    found = overlap(run_job(run_dir, config(arm, chunks), "benchmarks.pinned")[0]["chunks"], WARM_UP)
    if found is None:
        raise RuntimeError(f"{arm}: {chunks} chunks are too few")
    return found


def _alone(run_dir: Path, chunks: int) -> tuple[float, float]:
    wanted = config("R1", chunks).replace(plan__tp_plan=V1)
    rows = run_job(run_dir, wanted, "benchmarks.pinned")[0]["chunks"][WARM_UP:]
    phases = (statistics.median(row["t_a_ms"] + row["t_c_ms"] for row in rows), _median(rows, "t_b_ms"))
    return max(phases), _median(rows, "period_ms")


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def config(arm: str, chunks: int) -> EngineConfig:
    return from_dict(
        {
            "model": {"preset": "bench"},
            "geometry": {"height": 64, "width": 96},
            "schedule": {"denoising_step_list": list(STEPS)},
            "plan": {"tp_plan": PP0, "tp": 1},
            "run": {"chunks": chunks},
            "sink": {"kinds": ["null"]},
        }
    ).replace(**ARMS[arm])


def _against_bound(arm: str, runs: list[Overlap]) -> Row:
    stage0, stage1, anchor = (
        statistics.median(getattr(run, name) for run in runs) for name in ("stage0_ms", "stage1_ms", "anchor_ms")
    )
    waits = f" + anchor {anchor:.0f}" if anchor else ""
    return _row(
        f"{arm}, period",
        [run.period_ms for run in runs],
        "max(stage 0, stage 1 + anchor)" if anchor else "max(stage 0, stage 1)",
        [run.bound_ms for run in runs],
        target=TARGETS.get(arm),
        note=f"stage 0 {stage0:.0f} ms, stage 1 {stage1:.0f} ms{waits}; "
        f"the mesh waits {statistics.median(run.mesh_idle_ms for run in runs):.0f} ms a chunk",
    )


def _score(arm: str, runs: list[Overlap]) -> Row:
    return _row(
        f"{arm}, time hidden",
        [run.hidden_ms for run in runs],
        "the shorter stage",
        [min(run.stage0_ms, run.stage1_ms) for run in runs],
        note=f"OverlapScore {statistics.median(run.score for run in runs):.2f}",
    )


def _row(
    name: str, ours: list[float], rival_name: str, rivals: list[float], *, target: float | None = None, note: str = ""
) -> Row:
    """Two lists of milliseconds, turn by turn."""
    turns = Pairs({"ours": [ms / 1e3 for ms in ours], "rival": [ms / 1e3 for ms in rivals]})
    return turns.row(name, "ours", "rival", rival_name=rival_name, target=target, note=note)
