"""What the tripwires of phase B cost a chunk, at a production-size envelope on two ranks.

Timed is everything that `Stage1.step` does for them: the plan's own check, the progress check, the meeting before the
first generator call (planned calls, position, input digest, shard fingerprint), the finite check of each call, and the
meeting after the last (calls, ledger, finite, output digest, cache). The generator itself is left out: what is added is
what is measured, not the difference of two long times. The inputs differ in nothing but their cadence, and take turns:

- `production`: input digest, KV digest and fingerprint every 64 chunks, no output digest;
- `bring-up`: input and output digest every chunk, the rest every 64;
- `least`: every cadence 0. Calls, position, finite and ledger are compared nevertheless: they have no off switch;
- `bare`: two all_gathers of the same size and nothing else, which is the floor of any two meetings.

A turn is a window of 64 chunks, so each cadence comes due once in it. The period is that of the tiny bring-up. Wall
time holds the wait for the other rank, which on a busy machine is most of it; a rank's processor time stands beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.envelope import DTYPE, FRAMES, LATENT, STEPS
from benchmarks.envelope import _tensors as make_tensors
from benchmarks.measure import Pairs, Row, order
from benchmarks.pair import run_pair

WINDOW = 64
LIMIT_MS = 0.5
LIMIT_OF_PERIOD = 0.02
CADENCES = {
    "production": {"input_digest_every": 64, "output_digest_every": 0, "kv_digest_every": 64, "fingerprint_every": 64},
    "bring-up": {"input_digest_every": 1, "output_digest_every": 1, "kv_digest_every": 64, "fingerprint_every": 64},
    "least": {"input_digest_every": 0, "output_digest_every": 0, "kv_digest_every": 0, "fingerprint_every": 0},
}
BARE = "bare"
CASE = "v1.1c-tp2"
ROOT = Path(__file__).parents[1]


def run(quick: bool) -> list[Row]:
    from engine.assets import generator_checkpoint
    from engine.config import from_dict

    with tempfile.TemporaryDirectory() as cache:
        base = from_dict({"model": {"cache_dir": cache}, "plan": {"tp": 2}})
        generator_checkpoint(base)  # made once, before two ranks want it
        answer = run_pair(_measure, {"config": base.to_dict(), "turns": 10 if quick else 60}, deadline_s=300)
    times = Pairs(answer["times"])
    period_ms = bringup_period_ms()
    dearest = "the dearest chunk of a window took " + ", ".join(
        f"{ms:.2f} ms ({name})" for name, ms in answer["dearest_ms"].items() if name != BARE
    )
    size = f"{answer['bytes'] / 1e6:.1f} MB of inputs"
    rows = [
        _against(f"tripwires, {name}: a chunk", times, name, LIMIT_MS, "the limit", target, note)
        for name, target, note in (
            ("production", 1.0, f"{size}; {dearest}"),
            ("bring-up", None, "no target: the cadence of bring-up"),
        )
    ]
    rows += [
        _against(
            f"tripwires, {name}: of a chunk's period",
            times,
            name,
            period_ms,
            f"the period of tiny bring-up, {CASE}",
            target,
        )
        for name, target in (("production", LIMIT_OF_PERIOD), ("bring-up", None))
    ]
    processor = Pairs(answer["cpu_times"])
    rows += [
        _against(f"tripwires, {name}: processor time of a chunk", processor, name, LIMIT_MS, "the limit, of wall", None)
        for name in ("production", "least", BARE)
    ]
    return [
        *rows,
        times.row("tripwires, production", "production", "least", rival_name="all cadences 0"),
        times.row("tripwires, all cadences 0", "least", BARE, rival_name="two bare all_gathers"),
    ]


def _against(
    name: str, times: Pairs, ours: str, against_ms: float, rival: str, target: float | None, note: str = ""
) -> Row:
    ratios = [seconds * 1e3 / against_ms for seconds in times.times[ours]]
    return Row(
        name=name,
        ours=times.median(ours) * 1e3,
        rival_name=rival,
        rival=against_ms,
        unit="ms",
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        samples=len(ratios),
        note=note,
    )


def bringup_period_ms() -> float:
    """The chunk period of one case of the bring-up, on this machine, now.

    Raises:
        RuntimeError: the case failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "tpctl", "bringup", "--case", CASE, "-o", "json"]
        command += ["--run-dir", str(Path(directory) / "run")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    try:
        cases = json.loads(done.stdout)["data"]["cases"]
        (period_ms,) = [case["metrics"]["period_p50_ms"] for case in cases if case["id"] == CASE]
    except (ValueError, KeyError) as error:
        raise RuntimeError(f"tpctl bringup --case {CASE} gave no period: {done.stderr[-1000:]}") from error
    return float(period_ms)


def _measure(rank: int, pg: Any, options: dict[str, Any]) -> dict[str, Any]:
    """On each rank: windows of chunks, the arms in turns."""
    import torch

    from engine.blackbox import BlackBox
    from engine.comm.group import Group, PhaseGate, Rank
    from engine.config import from_dict

    with tempfile.TemporaryDirectory() as directory:
        box = BlackBox(Path(directory) / "box", rank)
        mesh = Group("mesh_pg", (Rank(0), Rank(1)), Rank(rank), pg, PhaseGate(blackbox=box))
        base = options["config"]
        arms = {
            name: _guarded(from_dict(base | {"tripwires": cadence}), mesh, box) for name, cadence in CADENCES.items()
        }
        words = torch.zeros(13, dtype=torch.int64)

        def bare(_: int) -> None:
            for _meeting in range(2):
                torch.distributed.all_gather([torch.empty_like(words) for _ in range(2)], words, group=pg)

        arms[BARE] = bare
        times: dict[str, list[float]] = {name: [] for name in arms}
        cpu_times: dict[str, list[float]] = {name: [] for name in arms}
        dearest: dict[str, list[float]] = {name: [] for name in arms}
        warm_up = 2
        for turn in range(warm_up + options["turns"]):
            for name in order(list(arms), turn):
                torch.distributed.barrier(group=pg)
                chunks_s = []
                cpu_s = time.process_time()
                for chunk in range((turn + 1) * WINDOW, (turn + 2) * WINDOW):  # chunk 0 has no context
                    started = time.perf_counter()
                    arms[name](chunk)
                    chunks_s.append(time.perf_counter() - started)
                if turn >= warm_up:
                    times[name].append(statistics.fmean(chunks_s))
                    cpu_times[name].append((time.process_time() - cpu_s) / WINDOW)
                    dearest[name].append(max(chunks_s) * 1e3)
        box.close()
    size = sum(tensor.nbytes for tensor in make_tensors().values())
    return {
        "times": times,
        "cpu_times": cpu_times,
        "dearest_ms": {name: statistics.median(found) for name, found in dearest.items()},
        "bytes": size,
    }


def _guarded(config: Any, mesh: Any, box: Any) -> Callable[[int], None]:
    """The tripwires of one chunk, around a generator that is not run."""
    import torch

    from engine.comm.group import Phase
    from engine.model.loader import build_generator
    from engine.plan import V1, ChunkPlan, expected_generator_calls
    from engine.stage1 import Stage1
    from engine.wire.envelope import Envelope

    generator = build_generator(config, mesh, "sdpa", "cpu")
    stage1: Any = Stage1(generator.dit, generator.kv, generator.cross, mesh, config, box)
    tensors = make_tensors()
    latents_BFCHW = torch.zeros(1, FRAMES, *LATENT, dtype=getattr(torch, DTYPE))
    timestep_F = torch.zeros(FRAMES, dtype=torch.int64)
    calls = expected_generator_calls(True, len(STEPS))
    stage1.dit = lambda *_, **__: latents_BFCHW  # what is counted and checked around each call stays

    def chunk(number: int) -> None:
        plan = ChunkPlan(
            chunk_index=number,
            cache_epoch=0,
            control_epoch=0,
            current_start_frame=FRAMES * number,
            height=LATENT[1] * 8,
            width=LATENT[2] * 8,
            init_cache=False,
            reset_kv_cache=False,
            reset_crossattn_cache=False,
            conditioning_embeds_updated=False,
            kv_cache_attention_bias=0.3,
            do_kv_recompute=True,
            denoising_step_list=STEPS,
            num_denoise_steps=len(STEPS),
            expected_calls=calls,
            base_seed=42,
        )
        mesh.gate.phase, mesh.gate.ids = Phase.B, plan.ids(number)
        stage1._next_start_frame = plan.current_start_frame
        plan.check(number)
        stage1._check_progress(plan)
        envelope = Envelope(V1, plan, None, tensors)
        stage1._agree_on_inputs(envelope)
        stage1._calls, stage1._finite = 0, []
        for _ in range(calls):
            stage1._call(latents_BFCHW, timestep_F, envelope, start_frame=0)
        stage1._agree_on_results(plan, latents_BFCHW)
        mesh.gate.phase = Phase.LINK

    return chunk
