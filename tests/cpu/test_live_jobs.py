"""Live sinks on real ranks: what `kill -9` leaves, and what a reader that is too slow costs, under each policy."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.blackbox import Box, Stream
from engine.config import EngineConfig, from_dict
from engine.sinks.base import open_sinks
from tests.cpu.test_live_sinks import listed, play
from tests.support.ranks import Job, start_ranks


def make_config(cache: Path, *kinds: str, **dotted: Any) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 48, "width": 64},  # four chunks are more than a pipe holds
        "schedule": {"denoising_step_list": [1000], "recompute": False},
        "run": {"chunks": 10_000},
        "sink": {"kinds": list(kinds), "queue_chunks": 1},
    }
    return from_dict(base).replace(**dotted)


def stream(job: Job) -> Stream:
    with Box(job.run_dir / "ranks" / "rank0.blackbox") as box:
        return box.stream()


def emitted(job: Job, chunks: int) -> None:
    box = job.run_dir / "ranks" / "rank0.blackbox"
    job.wait_for(lambda: box.exists() and stream(job).emitted >= chunks, f"{chunks} chunks")


@contextmanager
def stalled_reader(job: Job) -> Iterator[int]:
    """A reading end that takes nothing until its test does."""
    path = job.run_dir / "frames.rgb"
    job.wait_for(path.exists, "the pipe is there")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_kill_9_of_rank_0_leaves_a_stream_that_plays(weights_cache: Path, tmp_path: Path) -> None:
    """And the next attempt in the same directory goes on where it ended. Nobody reads the pipe, which ends nothing."""
    out = tmp_path / "out"
    out.mkdir()
    config = make_config(weights_cache, "segments", "preview", "pipe", "mp4", sink__directory=str(out))
    with start_ranks(tmp_path / "killed", config) as job:
        emitted(job, 3)
        job.processes[0].kill()
        job.end(10)
        seen = stream(job)
    first = sorted(path.name for path in (out / "segments").glob("*.ts"))
    assert seen.emitted <= len(first) <= seen.emitted + 1  # one may have been written, and not counted yet
    assert [len(play(out / "segments" / name)) for name in first] == [9] + [12] * (len(first) - 1)
    assert len(listed(out / "segments")) in (len(first), len(first) - 1)
    assert not (out / "video.mp4").exists()  # it takes its name only when it is whole
    assert (out / "frames.rgb").exists()
    sinks = open_sinks(config.sink, out, height=48, width=64)  # of the next attempt
    sinks.write(np.zeros((9, 48, 64, 3), np.uint8), 0, "p")
    assert set(sinks.close()) == {"segments", "preview", "mp4"}
    assert [entry.split()[-1] for entry in listed(out / "segments") if entry != "|"] == [
        f"{number:08d}.ts" for number in range(len(first) + 1)
    ]
    assert listed(out / "segments")[-2] == "|"
    assert not (out / "frames.rgb").exists()


def test_a_stalled_reader_drops_the_oldest_and_a_drain_names_it(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, "pipe", sink__on_slow="drop-oldest", liveness__drain_deadline_s=2.0)
    with start_ranks(tmp_path / "run", config) as job, stalled_reader(job):
        job.wait_for(lambda: stream(job).dropped >= 3, "three chunks were dropped")
        job.processes[0].send_signal(signal.SIGTERM)
        outcome = job.end(60)
        seen = stream(job)
    assert outcome.exit_codes == {0: 72}, outcome.stderr
    report = outcome.reports[0]
    account, drops, error = report["account"], report["drops"], report["error"]
    assert account["accepted"] == account["emitted"] + account["dropped"] + account["abandoned"]
    assert account["dropped"] == drops["slow_sink"] == seen.dropped >= 3
    assert account["abandoned"] == 2  # the one in the pipe, and the one in the queue
    assert report["abandoned_chunks"] == [account["emitted"], account["accepted"] - 1]  # all in between were dropped
    assert error["message"].startswith("rank 0 spent more than 2 s in the drain; sink pipe: writing chunk")
    assert error["evidence"]["blocked_by"].endswith("1 more chunk(s) wait")
    assert job.reached(0, "sink pipe", -1)


def test_a_slow_reader_ends_the_job_if_it_must_not_be_slow_and_loses_nothing(
    weights_cache: Path, tmp_path: Path
) -> None:
    """In pp, whose loop has work in flight: it is received, decoded and written before the job ends with its reason."""
    config = make_config(weights_cache, "pipe", "raw", plan__tp_plan="pp0", sink__on_slow="fail")
    with start_ranks(tmp_path / "run", config) as job, stalled_reader(job) as descriptor:
        job.wait_for(lambda: "TP-5110" in job.stderr()[0], "the sink is too slow")
        os.set_blocking(descriptor, True)
        got = 0
        while part := os.read(descriptor, 1 << 20):
            got += len(part)
        outcome = job.end(60)
    assert outcome.exit_codes == {0: 70, 1: 0}, outcome.stderr
    report = outcome.reports[0]
    account = report["account"]
    assert account["accepted"] == account["emitted"] >= 4
    assert (account["dropped"], account["abandoned"]) == (0, 0)
    assert report["error"]["code"] == "TP-5110"
    assert "sink pipe: writing chunk" in report["error"]["message"]
    unread = report["sinks"]["pipe"]["chunks_unread"]
    assert got == (9 * (unread == 0) + 12 * (account["emitted"] - max(1, unread))) * 48 * 64 * 3
    assert Path(report["outputs"]["raw"]).stat().st_size > 0
