"""Is a job well? Health means that frames advance: the state of a job, judged from one look at it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from engine.config import EngineConfig
from engine.lifecycle import Doing, RankState
from tpctl.jobs.observe import RankSeen, Seen
from tpctl.verdict import Coverage, Finding, Verdict, worst

# A stream stalls when no frame came for this many of its own periods, and for no less than this many seconds.
STALL_PERIODS, STALL_LEAST_S = 5.0, 3.0


class JobState(StrEnum):
    """`idle`: nothing to do, and heartbeats say so. `starved`: the mesh is well and waits for rank 0. `lost`: its
    supervisor was killed and nobody wrote an ending."""

    starting = "starting"
    loading = "loading"
    compiling = "compiling"
    running = "running"
    idle = "idle"
    starved = "starved"
    wedged = "wedged"
    draining = "draining"
    restarting = "restarting"
    drained = "drained"
    finished = "finished"
    failed = "failed"
    aborted = "aborted"
    lost = "lost"


OVER = frozenset({JobState.drained, JobState.finished, JobState.failed, JobState.aborted, JobState.lost})
FAILED = frozenset({JobState.failed, JobState.aborted, JobState.lost})
# Whether frames advance cannot be said yet: not a failure, and not health.
NOT_YET = frozenset({JobState.starting, JobState.loading, JobState.compiling, JobState.restarting})
# Who keeps the mesh waiting while rank 0 is at this.
STARVES = {
    Doing.SOURCE: "its source",
    Doing.PREPARE: "stage 0, phase A",
    Doing.DECODE: "stage 0, phase C",
    Doing.SINK: "its sink",
}
BY_RANK = {
    RankState.STARTING: JobState.loading,
    RankState.JOINING: JobState.loading,
    RankState.LOADING: JobState.loading,
    RankState.WARMING: JobState.compiling,
}


@dataclass(frozen=True)
class Health:
    """`frame_age_s` is None before the first frame."""

    state: JobState
    verdict: Verdict
    findings: tuple[Finding, ...]
    coverage: Coverage
    frame_age_s: float | None
    period_s: float | None
    account: dict[str, int] = field(default_factory=dict)
    starved_by: Doing | None = None


def judge(seen: Seen, config: EngineConfig) -> Health:
    """The state, and why it is well or not."""
    stream = seen.ranks[0].stream if seen.ranks and seen.ranks[0].rank == 0 else None
    age_s = (seen.now_ns - stream.emit_ns) / 1e9 if stream and stream.emit_ns and seen.same_boot else None
    period_s = stream.period_ns / 1e9 if stream and stream.period_ns else None
    findings: list[Finding] = [Finding("job.evidence", Verdict.UNKNOWN, problem) for problem in seen.problems]
    state, why = _state(seen, config, age_s, period_s)
    findings.append(Finding("job.advances", _verdict(state), why, value=age_s, next=_next(state, seen)))
    starved_by = stream.doing if state is JobState.starved and stream is not None else None
    checked = len(seen.ranks)
    expected = max(len(seen.record.ranks_here) if seen.record.attempts else 0, checked)
    account = {}
    if stream is not None:
        open_ = stream.accepted - stream.emitted - stream.dropped
        account = {
            "accepted": stream.accepted,
            "emitted": stream.emitted,
            "dropped": stream.dropped,
            "abandoned" if state in OVER else "in_flight": open_,
        }
    verdict = worst(finding.verdict for finding in findings)
    return Health(state, verdict, tuple(findings), Coverage(checked, expected), age_s, period_s, account, starved_by)


def _verdict(state: JobState) -> Verdict:
    if state in FAILED or state is JobState.wedged:
        return Verdict.FAIL
    if state in NOT_YET:
        return Verdict.UNCHECKED
    return Verdict.WARN if state is JobState.starved else Verdict.PASS


def _next(state: JobState, seen: Seen) -> str | None:
    if state is JobState.wedged:
        return f"tpctl drain {seen.record.name}"
    if state is JobState.starved:
        return f"tpctl wait {seen.record.name} --for running"
    if state is JobState.idle:
        return f"tpctl set {seen.record.name} paused=false"
    if state in FAILED:
        return f"tpctl triage {seen.run_dir}" if seen.run_dir else None
    return f"tpctl wait {seen.record.name} --for running" if state in NOT_YET else None


def _state(seen: Seen, config: EngineConfig, age_s: float | None, period_s: float | None) -> tuple[JobState, str]:
    record = seen.record
    alive = [rank for rank in seen.ranks if rank.alive]
    if record.ending is not None and not seen.supervisor_alive:
        attempt = record.attempt
        why = f": {attempt.reason}" if attempt is not None and attempt.reason else ""
        return JobState(record.ending), f"the job is over: {record.ending}{why}"
    if not seen.supervisor_alive:
        left = f"; ranks {_list(alive)} still run, and end by themselves" if alive else ""
        return JobState.lost, f"the supervisor is gone, and left no ending{left}"
    if record.backoff_until is not None:
        reason = record.attempt.reason if record.attempt else None
        return JobState.restarting, f"waits to start again after: {reason}"
    attempt = record.attempt
    if attempt is None or attempt.ended_at is not None or not seen.ranks:
        return JobState.starting, "the ranks are being started"
    states = {rank.state for rank in seen.ranks}
    for early, state in BY_RANK.items():
        if early in states:
            late = [rank for rank in seen.ranks if rank.state is early]
            return state, f"rank {_list(late)}: {early.value}"
    here = len(record.ranks_here)
    if len(seen.ranks) < here:
        return JobState.loading, f"{len(seen.ranks)} of {here} ranks are there"
    return _streaming(seen, config, age_s, period_s) if record.node_rank == 0 else _following(seen, config)


def _streaming(seen: Seen, config: EngineConfig, age_s: float | None, period_s: float | None) -> tuple[JobState, str]:
    """All ranks are past their start-up."""
    leader = seen.ranks[0]
    if ill := _ill(seen):
        return JobState.wedged, ill
    if leader.stream.doing is Doing.PAUSED and leader.state is RankState.RUNNING:
        return _paused(seen, config)
    waited_s = (seen.now_ns - leader.live.state_ns) / 1e9 if age_s is None else age_s
    if leader.stream.resumed_ns:
        waited_s = min(waited_s, (seen.now_ns - leader.stream.resumed_ns) / 1e9)
    limit_s = stall_limit_s(config, period_s)
    if waited_s > limit_s and _starved(seen):
        whom = STARVES[leader.stream.doing]
        at_s = (seen.now_ns - leader.stream.doing_ns) / 1e9
        return (
            JobState.starved,
            f"the mesh waits for {whom}: no frame for {waited_s:.1f} s, and rank 0 is at it since {at_s:.1f} s",
        )
    if waited_s > limit_s:
        return JobState.wedged, f"no frame for {waited_s:.1f} s, where {limit_s:.1f} s is the most{_where(seen.ranks)}"
    if seen.record.draining is not None:
        return JobState.draining, f"{seen.record.draining}; rank 0: {leader.state.value}"
    if leader.state is not RankState.RUNNING:
        return JobState.draining, f"rank 0: {leader.state.value}"
    return JobState.running, "the first chunk is being made" if age_s is None else f"last frame {age_s:.1f} s ago"


def _paused(seen: Seen, config: EngineConfig) -> tuple[JobState, str]:
    """An operator holds the stream. Its ranks are well while they hear heartbeats."""
    leader = seen.ranks[0]
    said_s = (seen.now_ns - leader.last.t_ns) / 1e9 if leader.last is not None else None
    if said_s is None or said_s > config.liveness.watchdog_s:
        silence = "never" if said_s is None else f"{said_s:.1f} s ago"
        return JobState.wedged, f"paused, but rank 0 sent its last heartbeat {silence}{_where(seen.ranks)}"
    if seen.record.draining is not None:
        return JobState.draining, f"{seen.record.draining}; rank 0 was paused"
    paused_s = (seen.now_ns - leader.stream.doing_ns) / 1e9
    return JobState.idle, f"paused for {paused_s:.1f} s; last heartbeat {said_s:.1f} s ago"


def _starved(seen: Seen) -> bool:
    """Rank 0 is at something of its own, and no other rank is in phase B: it is not the mesh that is late."""
    leader = seen.ranks[0]
    busy = [rank for rank in seen.ranks if rank.live.phase == "B"]
    return leader.stream.doing in STARVES and not busy


def _following(seen: Seen, config: EngineConfig) -> tuple[JobState, str]:
    """On a host without rank 0 nobody counts frames: its ranks act, or they do not."""
    if ill := _ill(seen):
        return JobState.wedged, ill
    acts_ns = [rank.last.t_ns if rank.last is not None else rank.live.state_ns for rank in seen.ranks]
    age_s, limit_s = (seen.now_ns - max(acts_ns)) / 1e9, stall_limit_s(config, None)
    if age_s > limit_s:
        return JobState.wedged, f"no act for {age_s:.1f} s, where {limit_s:.1f} s is the most{_where(seen.ranks)}"
    acts = f"the last act of this host's ranks was {age_s:.1f} s ago; frames are counted where rank 0 is"
    if seen.record.draining is not None:
        return JobState.draining, f"{seen.record.draining}; {acts}"
    if any(rank.state is not RankState.RUNNING for rank in seen.ranks):
        return JobState.draining, acts
    return JobState.running, acts


def _ill(seen: Seen) -> str | None:
    """Why a stream cannot advance, seen at a glance."""
    stopped = [rank for rank in seen.ranks if rank.letter in ("T", "t")]
    if stopped:
        return f"rank {_list(stopped)} is stopped by a signal"
    dead = [rank for rank in seen.ranks if not rank.alive]
    if dead and seen.ranks[0].state is RankState.RUNNING:
        return f"rank {_list(dead)} is gone"
    return None


def stall_limit_s(config: EngineConfig, period_s: float | None) -> float:
    """How long no frame may come before a stream counts as wedged; before the first period is known, phase B's own
    budget."""
    if period_s is None:
        return config.liveness.phase_budget_s
    return max(STALL_LEAST_S, STALL_PERIODS * period_s)


def _where(ranks: tuple[RankSeen, ...]) -> str:
    """What each rank waits in."""
    words = [f"rank {rank.rank} after '{rank.last.action}'" for rank in ranks if rank.last is not None]
    return "; " + ", ".join(words) if words else ""


def _list(ranks: list[RankSeen]) -> str:
    return ", ".join(str(rank.rank) for rank in ranks)
