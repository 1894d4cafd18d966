"""A healthy job that takes its time is never ended: many watchdogs long, at every place where a rank may be slow.

Time is scaled: each wait is 5 watchdogs long.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.blackbox import BlackBoxError, Collective, read_box
from engine.config import EngineConfig, from_dict
from engine.lifecycle import Doing
from engine.process import boot_id
from tests.cpu.test_video_source import film
from tests.support.ranks import Job, start_ranks
from tests.support.refereed import referee
from tpctl.jobs.health import Health, JobState, judge
from tpctl.jobs.observe import Seen, observe_ranks
from tpctl.jobs.record import Attempt, JobRecord

# A watchdog that a crowded machine does not trip: a beat may come a second late.
HEARTBEAT_S = 0.2
WATCHDOG_S = 1.5
WAIT_S = 5 * WATCHDOG_S

SLOW = """
import os, sys, threading
from engine import sinks, stage0, stage1, warmup, worker
rank = int(os.environ["RANK"])
waited = []
def once(owner, name, where, place, when=None):
    method = getattr(owner, name)
    def slow(*arguments, **named):
        if rank == where and place not in waited and (when is None or when(*arguments)):
            waited.append(place)
            threading.Event().wait({wait_s})
            print("waited in", place, file=sys.stderr, flush=True)
        return method(*arguments, **named)
    setattr(owner, name, slow)
{places}
os._exit(worker.main(sys.argv[1:]))
"""
LOAD = 'once(worker, "build_generator", {rank}, "load")'
COMPILE = 'once(warmup, "compile_alone", {rank}, "compile")'
WARM_UP = 'once(warmup, "in_lockstep", {rank}, "warm-up")'
PREPARE = 'once(stage0.Stage0, "step", 0, "phase A")'
SINK = """
from engine.sinks import null
once(null.NullSink, "write", 0, "the sink", lambda sink, pixels, chunk, prompt: chunk == 1)
"""


def slow_at(*places: str) -> tuple[str, str]:
    return "-c", SLOW.format(wait_s=WAIT_S, places="\n".join(places))


def make_config(cache: Path, **dotted: object) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "schedule": {"denoising_step_list": [1000, 500]},
        "plan": {"tp": 2},
        "run": {"chunks": 3},
        "sink": {"kinds": ["null"]},
        "liveness": {"heartbeat_s": HEARTBEAT_S, "watchdog_s": WATCHDOG_S, "phase_budget_s": 5.0},
    }
    return from_dict(base).replace(**dotted)


@pytest.mark.slow
def test_slow_loading_and_compiling_end_nobody(weights_cache: Path, tmp_path: Path) -> None:
    """One rank loads, then the other compiles, 5 watchdogs longer than its peer: those have budgets of their own."""
    entry = slow_at(LOAD.format(rank=0), COMPILE.format(rank=1))
    with (
        referee(tmp_path / "run") as beside,
        start_ranks(tmp_path / "run", make_config(weights_cache), entry=entry) as job,
    ):
        for state in (JobState.loading, JobState.compiling):
            job.wait_for(lambda which=state: judged(job, make_config(weights_cache)).state is which, state.value)
        outcome = job.end(90)
        assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
        assert beside.leave() == 0
    assert "waited in load" in outcome.stderr[0]
    assert "waited in compile" in outcome.stderr[1]
    times = {rank: report["times"] for rank, report in outcome.reports.items()}
    assert times[1]["load_s"] - times[1]["loaded_s"] > WAIT_S  # for its peer's load
    assert times[0]["ready_s"] - times[0]["load_s"] > WAIT_S  # and the peer while it compiled
    assert beside.record is None


def judged(job: Job, config: EngineConfig) -> Health:
    """The job's state, as `tpctl status` would judge these ranks under a supervisor."""
    record = JobRecord("slow", "id", "host", boot_id(), 0.0, config.world_size, config.plan.tp_plan, "key")
    record = replace(record, attempts=(Attempt(0, "tag", 0.0),))
    ranks = tuple(observe_ranks(job.run_dir))
    return judge(Seen(record, job.run_dir, True, True, ranks, (), time.monotonic_ns()), config)


@pytest.mark.slow
def test_an_idle_stream_and_a_slow_sink_end_nobody(weights_cache: Path, tmp_path: Path) -> None:
    """Rank 0 prepares its first chunk, then a sink writes another, for 5 watchdogs each: heartbeats fill the time.

    Meanwhile the job counts as starved, and what the mesh waits for is named. Chunk 2 waits in the queue for chunk 1 to
    be written, and chunk 3 for a place in the queue, before chunk 4 goes out.
    """
    entry = slow_at(PREPARE, SINK)
    config = make_config(weights_cache, run__chunks=5, sink__queue_chunks=1)
    with (
        referee(tmp_path / "run") as beside,
        start_ranks(tmp_path / "run", config, entry=entry) as job,
    ):
        for doing in (Doing.PREPARE, Doing.SINK):
            job.wait_for(
                lambda whom=doing: judged(job, config.replace(liveness__phase_budget_s=2.0)).starved_by is whom,
                f"starved by {doing}",
            )
        outcome = job.end(90)
        assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
        assert beside.leave() == 0
    assert "waited in phase A" in outcome.stderr[0]
    assert "waited in the sink" in outcome.stderr[0]
    assert outcome.reports[0]["account"] == {"accepted": 5, "emitted": 5, "dropped": 0, "abandoned": 0}
    calls = [chunk["call_id"] for chunk in outcome.reports[1]["chunks"]]
    # Most of the beats that fit into each wait were sent, and each took a call id.
    enough = WAIT_S / HEARTBEAT_S / 4
    assert calls[0] > enough
    assert calls[4] - calls[3] > enough
    assert calls[3] - calls[0] < 3 * enough
    assert beside.record is None


def read_a_gate_first() -> None:
    """A plant: a source whose bytes are not there yet. The pipe beside it gives them when somebody opens it."""
    from engine.sources.video import VideoSource

    take = VideoSource.take

    def late(source: VideoSource, count: int) -> Any:
        if not source._given:
            source.path.with_suffix(".gate").read_bytes()
        return take(source, count)

    VideoSource.take = late  # type: ignore[method-assign]


@pytest.mark.parametrize(("plan", "tp"), [("v1_generator_only", 2), ("pp0", 1)])
def test_a_stream_that_waits_for_its_source_says_so(plan: str, tp: int, weights_cache: Path, tmp_path: Path) -> None:
    video = film(tmp_path / "a.mp4", 30)
    gate = video.with_suffix(".gate")
    os.mkfifo(gate)
    config = make_config(weights_cache, plan__tp_plan=plan, plan__tp=tp, source__video=str(video), run__chunks=2)
    plants = {0: "tests.cpu.test_endurance:read_a_gate_first"}
    with start_ranks(tmp_path / "run", config, plants=plants) as job:
        impatient = config.replace(liveness__phase_budget_s=0.5)
        job.wait_for(lambda: judged(job, impatient).starved_by is Doing.SOURCE, "starved by its source", 30)
        assert "the mesh waits for its source" in judged(job, impatient).findings[-1].message
        gate.write_bytes(b"")
        outcome = job.end()
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr


@pytest.mark.parametrize(
    ("place", "liveness", "exit_code", "says"),
    [
        (LOAD.format(rank=0), {"liveness__load_budget_s": 1.0}, 75, "rank 0 did not reach 'load' within 1 s"),
        (WARM_UP.format(rank=1), {"liveness__warmup_budget_s": 1.0}, 72, "more than 1 s in the warm-up"),
    ],
    ids=["load", "warm-up"],
)
def test_a_rank_that_is_slower_than_its_budget_is_not_waited_for(
    place: str, liveness: dict[str, float], exit_code: int, says: str, weights_cache: Path, tmp_path: Path
) -> None:
    """The proof that the waits above are real, and that only their budgets allow them."""
    config = make_config(weights_cache, **liveness)
    with start_ranks(tmp_path / "run", config, entry=slow_at(place)) as job:
        assert job.processes[1].wait(60) == exit_code
        outcome = job.end(0.1)
    assert says in outcome.stderr[1]


def deadlock(cache: Path) -> EngineConfig:
    """One rank makes one collective more, behind a flag; no guard, no deadline that is near."""
    return make_config(
        cache,
        liveness__watchdog_s=600.0,
        liveness__phase_budget_s=600.0,
        comm__dist_timeout_s=600.0,
        drill__id="OM-05",
        drill__victim_rank=1,
        drill__at_chunk=1,
        drill__without_guard=True,
        drill__differs="drill.debug_collective=true",
    )


def inside(job: Job, rank: int) -> Collective | None:
    """The collective that this rank is in, if it is in one."""
    try:
        return read_box(job.run_dir / "ranks" / f"rank{rank}.blackbox").inside
    except (BlackBoxError, OSError):
        return None


def stuck(job: Job) -> bool:
    """Rank 1 is in the planted collective, rank 0 in another one."""
    planned, planted = inside(job, 0), inside(job, 1)
    return (
        planned is not None
        and planned.file.endswith("stage1.py")
        and planted is not None
        and planted.file.endswith("faults/acts.py")
    )


def seconds_to_end(job: Job, deadline_s: float) -> float:
    started = time.monotonic()
    for process in job.processes.values():
        process.send_signal(signal.SIGTERM)
    for process in job.processes.values():
        process.wait(max(0.1, started + deadline_s - time.monotonic()))
    return time.monotonic() - started


def test_a_deadlocked_job_is_gone_after_its_drain_deadline(weights_cache: Path, tmp_path: Path) -> None:
    """SIGTERM asks for a drain, which a deadlock cannot give: the drain's own deadline ends it, not half an hour."""
    config = deadlock(weights_cache).replace(liveness__drain_deadline_s=1.0)
    with start_ranks(tmp_path / "run", config) as job:
        job.wait_for(lambda: stuck(job), "both ranks are in different collectives")
        took_s = seconds_to_end(job, 30)
        outcome = job.end(0.1)
    print(f"deadlocked, SIGTERM: gone after {took_s:.3f} s, {outcome.exit_codes}")  # shown by -rP
    assert took_s < 5
    assert all(outcome.exit_codes.values()), outcome.exit_codes
