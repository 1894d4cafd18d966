"""The state of a job, judged from what was seen of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.blackbox import Commitment, Live, Stream
from engine.config import EngineConfig
from engine.lifecycle import Doing, RankState
from engine.process import Process
from tpctl.jobs.health import JobState, judge, stall_limit_s
from tpctl.jobs.hosts import drained_elsewhere
from tpctl.jobs.observe import RankSeen, Seen
from tpctl.jobs.record import Attempt, JobRecord
from tpctl.verdict import Verdict

CONFIG = EngineConfig()
NOW_NS = 1_000_000_000_000
S = 1_000_000_000


def rank(
    number=0,
    state=RankState.RUNNING,
    phase="link",
    letter="S",
    emitted=5,
    age_s=0.1,
    period_s=0.2,
    doing=Doing.MESH,
    beat_s=1.0,
    resumed_s=None,
):
    live = Live(state, NOW_NS - S, 0, 9, 9, 0, phase, ())
    emit_ns = NOW_NS - int(age_s * S) if emitted and number == 0 else 0
    resumed_ns = NOW_NS - int(resumed_s * S) if resumed_s is not None else 0
    stream = Stream(emitted + 1, emitted, 0, emit_ns, int(period_s * S), doing, NOW_NS - 2 * S, resumed_ns)
    if number:
        stream = Stream(0, 0, 0, 0, 0)
    last = Commitment(1, NOW_NS - int(beat_s * S), "enter B", "mesh_pg", 7, 5, 0)
    return RankSeen(number, Process(100 + number, 1), letter, live, stream, last, 1 << 20)


def seen(*ranks, supervisor_alive=True, **changes):
    record = JobRecord("one", "id", "host", "boot", 0.0, max(1, len(ranks)), "v0_full_pipeline", "key")
    record = replace(record, attempts=(Attempt(0, "tag", 0.0),), **changes)
    return Seen(record, None, True, supervisor_alive, tuple(ranks), (), NOW_NS)


CASES = [
    (seen(), "starting", Verdict.UNCHECKED),
    (seen(rank(state=RankState.LOADING, emitted=0)), "loading", Verdict.UNCHECKED),
    (seen(rank(), rank(1, state=RankState.WARMING)), "compiling", Verdict.UNCHECKED),
    (seen(rank(state=RankState.WARMING), rank(1, state=RankState.LOADING)), "loading", Verdict.UNCHECKED),
    (seen(rank()), "running", Verdict.PASS),
    (seen(rank(emitted=0)), "running", Verdict.PASS),
    (seen(rank(age_s=3.5)), "wedged", Verdict.FAIL),
    (seen(rank(age_s=60, doing=Doing.PAUSED), rank(1)), "idle", Verdict.PASS),
    (seen(rank(age_s=60, doing=Doing.PAUSED, beat_s=15.5)), "wedged", Verdict.FAIL),
    (seen(rank(age_s=60, doing=Doing.PAUSED, letter="T")), "wedged", Verdict.FAIL),
    (seen(rank(age_s=60, doing=Doing.PAUSED), draining="asked"), "draining", Verdict.PASS),
    (seen(rank(age_s=60, doing=Doing.PAUSED, beat_s=20), draining="asked"), "wedged", Verdict.FAIL),
    (seen(rank(age_s=60, resumed_s=1)), "running", Verdict.PASS),
    (seen(rank(age_s=60, resumed_s=4)), "wedged", Verdict.FAIL),
    (seen(rank(age_s=9, doing=Doing.SOURCE), rank(1)), "starved", Verdict.WARN),
    (seen(rank(age_s=9, doing=Doing.SINK), rank(1, phase="B")), "wedged", Verdict.FAIL),
    (seen(rank(age_s=9, doing=Doing.SINK), rank(1, letter="T")), "wedged", Verdict.FAIL),
    (seen(rank(age_s=2, doing=Doing.SINK), rank(1)), "running", Verdict.PASS),
    (seen(rank(letter="T")), "wedged", Verdict.FAIL),
    (seen(rank(), rank(1, letter="")), "wedged", Verdict.FAIL),
    (seen(rank(), draining="asked"), "draining", Verdict.PASS),
    (seen(rank(state=RankState.SHUTDOWN)), "draining", Verdict.PASS),
    (seen(rank(age_s=3.5), draining="asked"), "wedged", Verdict.FAIL),
    (seen(rank(letter=""), backoff_until=1.0), "restarting", Verdict.UNCHECKED),
    (seen(rank(), supervisor_alive=False), "lost", Verdict.FAIL),
    (seen(rank(letter=""), supervisor_alive=False, ending="drained"), "drained", Verdict.PASS),
    (seen(rank(letter=""), supervisor_alive=False, ending="failed"), "failed", Verdict.FAIL),
]


@pytest.mark.parametrize(("what", "state", "verdict"), CASES, ids=[f"{n}-{case[1]}" for n, case in enumerate(CASES)])
def test_the_state(what, state, verdict):
    found = judge(what, CONFIG)
    assert (found.state.value, found.verdict) == (state, verdict)


def test_every_state_but_the_endings_that_share_a_path_has_a_case():
    assert {state for _, state, _ in CASES} == {state.value for state in JobState} - {"finished", "aborted"}


@pytest.mark.parametrize(
    ("doing", "words"),
    [
        (Doing.SOURCE, "its source"),
        (Doing.PREPARE, "stage 0, phase A"),
        (Doing.DECODE, "stage 0, phase C"),
        (Doing.SINK, "its sink"),
    ],
)
def test_a_starved_job_names_what_the_mesh_waits_for(doing, words):
    found = judge(seen(rank(age_s=9, doing=doing), rank(1)), CONFIG)
    assert (found.state, found.starved_by) == (JobState.starved, doing)
    assert (
        f"the mesh waits for {words}: no frame for 9.0 s, and rank 0 is at it since 2.0 s" in found.findings[-1].message
    )


def second(one, **changes):
    """The second of two hosts, which runs rank 1 alone."""
    found = seen(one, **changes)
    return replace(found, record=replace(found.record, world_size=2, nnodes=2, node_rank=1, rdzv="h:29400"))


@pytest.mark.parametrize(
    ("what", "state", "verdict"),
    [
        (second(rank(1)), "running", Verdict.PASS),
        (second(rank(1), draining="a signal"), "draining", Verdict.PASS),
        (second(rank(1, state=RankState.SHUTDOWN)), "draining", Verdict.PASS),
        (second(rank(1, letter="T")), "wedged", Verdict.FAIL),
        (second(rank(1, letter="")), "wedged", Verdict.FAIL),
        (second(rank(1, state=RankState.LOADING)), "loading", Verdict.UNCHECKED),
        (replace(second(rank(1)), now_ns=NOW_NS + 61 * S), "wedged", Verdict.FAIL),
    ],
)
def test_a_host_without_rank_0_is_judged_by_the_acts_of_its_ranks(what, state, verdict):
    found = judge(what, CONFIG)
    assert (found.state.value, found.verdict, found.account) == (state, verdict, {})
    assert (found.coverage.checked, found.coverage.expected) == (1, 1)


@pytest.mark.parametrize(
    ("node_rank", "chunks", "made", "drained"),
    [(1, 0, 5, True), (1, 6, 4, True), (1, 6, 5, False), (1, 6, None, True), (0, 0, 5, False), (0, 6, 4, False)],
)
def test_a_host_that_follows_knows_a_drain_from_the_end_of_the_stream(node_rank, chunks, made, drained):
    record = replace(second(rank(1)).record, node_rank=node_rank)
    report = {"chunks": [] if made is None else [{"chunk_index": 0}, {"chunk_index": made}]}
    assert drained_elsewhere(record, chunks, {1: report}) is drained


def test_evidence_that_cannot_be_read_is_never_health():
    found = judge(replace(seen(rank()), problems=("a black box is damaged",)), CONFIG)
    assert found.state is JobState.running
    assert found.verdict is Verdict.UNKNOWN


def test_a_missing_rank_shows_in_the_coverage():
    found = judge(replace(seen(rank()), record=replace(seen(rank()).record, world_size=2)), CONFIG)
    assert found.state is JobState.loading
    assert (found.coverage.checked, found.coverage.expected) == (1, 2)


def test_chunks_without_a_fate_are_in_flight_and_afterwards_abandoned():
    assert judge(seen(rank()), CONFIG).account == {"accepted": 6, "emitted": 5, "dropped": 0, "in_flight": 1}
    over = seen(rank(letter=""), supervisor_alive=False, ending="aborted")
    assert judge(over, CONFIG).account["abandoned"] == 1


def test_a_wedged_job_says_where_each_rank_waits():
    found = judge(seen(rank(age_s=9), rank(1)), CONFIG)
    assert "rank 0 after 'enter B', rank 1 after 'enter B'" in found.findings[-1].message


def test_the_stall_limit_follows_the_stream_and_has_a_floor():
    assert stall_limit_s(CONFIG, None) == CONFIG.liveness.phase_budget_s
    assert stall_limit_s(CONFIG, 0.01) == 3.0
    assert stall_limit_s(CONFIG, 2.0) == 10.0


def test_times_of_another_boot_say_nothing():
    found = judge(replace(seen(rank(age_s=9), supervisor_alive=False), same_boot=False), CONFIG)
    assert (found.state, found.frame_age_s) == (JobState.lost, None)
