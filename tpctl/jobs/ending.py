"""Ending a job from outside: give the order, watch it being carried out, and account for what became of the work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from tpctl.errors import JobError, RefusedError
from tpctl.jobs import place
from tpctl.jobs.blocker import blockers
from tpctl.jobs.hosts import require_rank_zero
from tpctl.jobs.observe import Seen, observe
from tpctl.jobs.order import Kind, OnDeadline, Order, read_answer, read_order
from tpctl.jobs.place import JobDir
from tpctl.jobs.reason import exit_codes
from tpctl.jobs.record import JobRecord
from tpctl.launch.local import tagged
from tpctl.reports import read_reports

POLL_S = 0.1
# From the deadline to the end of an abort: the launcher's grace, and the time the kernel needs to bury the killed.
ABORT_S = 20.0
# For the supervisor to hear of it, and to hear from rank 0.
TAKE_BACK_S = 10.0
IN_FLIGHT = "in flight"
# Of the deadline: for what is in flight, for closing the outputs, for every rank to leave. A phase that takes longer
# is late, and its blockers are named; the deadline alone ends it.
SHARES = {IN_FLIGHT: 0.7, "draining": 0.15, "shutdown": 0.15}
PHASES = ("draining", "shutdown", "exited", "aborted")


@dataclass(frozen=True)
class Receipt:
    """What became of a job's work. `ending` is None while it is not over; times in seconds since the order.

    A chunk without a fate is `in_flight` until the job is over, and abandoned then.
    `balanced` holds accepted = emitted + dropped + abandoned in rank 0's own report, and that its black box counted
    the same; None where no rank 0 ever opened an account. `drops` has the dropped ones by reason, and `held_up_by`
    what kept rank 0 when it had to leave; None where it was killed, and could not say.
    """

    job: str
    job_id: str
    ending: str | None
    why: str | None
    deadline_s: float
    on_deadline: str
    wall_s: float
    phases: list[dict[str, Any]]
    account: dict[str, int] | None
    drops: dict[str, int] | None
    balanced: bool | None
    abandoned_chunks: list[int]
    exit_codes: dict[str, int]
    blockers: list[dict[str, Any]]
    held_up_by: str | None
    leftovers: list[str]
    taken_back: bool = False
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def order_drain(job: JobDir, deadline_s: float, on_deadline: OnDeadline) -> tuple[Order, bool]:
    """The drain in force, and whether it was there already: a second one attaches to the first.

    Raises:
        HostsError: rank 0, which leads the drain, is on another host.
    """
    require_rank_zero(JobRecord.read(job.record))
    found = read_order(job.order)
    if found is not None and found.kind is Kind.DRAIN:
        return found, True
    order = Order.make(Kind.DRAIN, "asked by its operator", deadline_s=deadline_s, on_deadline=on_deadline)
    order.write(job.order)
    return order, False


def order_take_back(job: JobDir, limit_s: float = TAKE_BACK_S) -> None:
    """Take the drain of a job back: the stream goes on.

    Raises:
        RefusedError: no drain is under way, or it cannot be taken back any more; the reason is named.
    """
    seen, found = observe(job), read_order(job.order)
    refused: str | None = "its supervisor did not answer"
    if seen.over or not seen.supervisor_alive:
        refused = f"it is over: {seen.record.ending or 'lost'}" if seen.over else "its supervisor is gone"
    elif found is not None and found.kind is Kind.ABORT:
        refused = "it is being aborted"
    else:
        drain = found.id if found is not None and found.kind is Kind.DRAIN else None
        order = Order.make(Kind.TAKE_BACK, "asked by its operator", instead=drain)
        order.write(job.order)
        nap, end = threading.Event(), time.monotonic() + limit_s
        while time.monotonic() < end and observe(job).supervisor_alive:
            answer = read_answer(job.answer)
            if answer is not None and answer.id == order.id:
                refused = answer.refused
                break
            nap.wait(POLL_S)
    if refused is not None:
        raise RefusedError(
            f"the drain of '{job.name}' cannot be taken back: {refused}",
            code="TP-7851",
            next_step=f"tpctl status {job.name}",
        )


def taken_back(job: JobDir, order: Order, seen: Seen) -> bool:
    """Whether this drain was in force, and is no more."""
    now = read_order(job.order)
    return seen.record.draining is None and (now is None or now.id != order.id)


def order_abort(job: JobDir) -> Order:
    """Abort; where no supervisor is left to do it, here and now."""
    order = Order.make(Kind.ABORT, "asked by its operator")
    order.write(job.order)
    seen = observe(job)
    if not seen.supervisor_alive:
        bury(job, seen)
    return order


def bury(job: JobDir, seen: Seen) -> None:
    """End and remove what a job without a supervisor left behind; its files stay."""
    if seen.same_boot and seen.record.attempt is not None:
        for pid in tagged(seen.record.attempt.tag):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    job.socket.unlink(missing_ok=True)


def follow(job: JobDir, limit_s: float, enough: Callable[[Seen], bool] = lambda seen: False) -> Seen:
    """Watch until nothing of the job lives any more, it is `enough`, or `limit_s` has passed. Returns the last look."""
    nap, end = threading.Event(), time.monotonic() + limit_s
    while True:
        seen = observe(job)
        if seen.over or enough(seen) or time.monotonic() >= end:
            return seen
        nap.wait(POLL_S)


def receipt(job: JobDir, order: Order | None, seen: Seen) -> Receipt:
    """What can be said now. Reads the files of the last attempt."""
    record, over = seen.record, seen.over
    reports = read_reports(seen.run_dir) if seen.run_dir else {}
    account, balanced = _account(reports.get(0), seen)
    phases = _phases(reports.get(0), order, seen)
    abandoned = _abandoned(reports.get(0), account) if over else []
    if account is not None and not over:
        account = {**account, "in_flight": account["abandoned"]}
        del account["abandoned"]
    attempt = record.attempt
    answer = read_answer(job.answer)
    back = order is not None and not over and order.kind is Kind.DRAIN and taken_back(job, order, seen)
    said = answer.why if answer is not None and order is not None and answer.id == order.id else None
    return Receipt(
        job=record.name,
        job_id=record.job_id,
        ending=(record.ending or "lost") if over else None,
        why=(attempt.reason if attempt else None) or record.draining or said,
        deadline_s=order.deadline_s if order else 0.0,
        on_deadline=order.on_deadline.value if order else OnDeadline.abort.value,
        wall_s=phases[-1]["t_s"] if over and phases else order.age_s() if order else 0.0,
        phases=phases,
        account=account,
        drops=(reports.get(0) or {}).get("drops"),
        balanced=balanced,
        abandoned_chunks=abandoned,
        exit_codes={str(rank): code for rank, code in exit_codes(seen.run_dir).items()} if seen.run_dir else {},
        blockers=[] if over or back else [one.to_dict() for one in blockers(seen.ranks, seen.now_ns)],
        held_up_by=(((reports.get(0) or {}).get("error") or {}).get("evidence") or {}).get("blocked_by"),
        leftovers=leftovers(job, seen) if over else [],
        taken_back=back,
    )


def leftovers(job: JobDir, seen: Seen) -> list[str]:
    """What a job that is over must not leave: processes of it, its socket, its lock."""
    found = []
    if seen.same_boot and seen.record.attempt is not None:
        found += [f"process {pid}" for pid in tagged(seen.record.attempt.tag)]
    if job.socket.exists():
        found.append(f"socket {job.socket}")
    held = place.lock(job)
    if held is None:
        found.append(f"lock {job.lock}")
    else:
        os.close(held)
    return found


def _account(report: dict[str, Any] | None, seen: Seen) -> tuple[dict[str, int] | None, bool | None]:
    """Rank 0's own account; of a rank 0 that was killed, what its black box counted, the rest abandoned."""
    leader = next((rank for rank in seen.ranks if rank.rank == 0), None)
    if leader is None:
        return None, None
    stream = leader.stream
    counted = {"accepted": stream.accepted, "emitted": stream.emitted, "dropped": stream.dropped}
    counted["abandoned"] = stream.accepted - stream.emitted - stream.dropped
    own: dict[str, int] | None = (report or {}).get("account")
    if own is None:
        return counted, counted["abandoned"] >= 0
    balanced = own["accepted"] == own["emitted"] + own["dropped"] + own["abandoned"]
    return own, balanced and own == counted


def _abandoned(report: dict[str, Any] | None, account: dict[str, int] | None) -> list[int]:
    """Which chunks: as rank 0 said, or the newest that it had accepted when it was killed."""
    if account is None:
        return []
    said: list[int] | None = (report or {}).get("abandoned_chunks")
    return said if said is not None else list(range(account["accepted"] - account["abandoned"], account["accepted"]))


def _phases(report: dict[str, Any] | None, order: Order | None, seen: Seen) -> list[dict[str, Any]]:
    """When rank 0 entered each phase of the ending, and how long it was in it; what it is in now, it is in still."""
    leader = next((rank for rank in seen.ranks if rank.rank == 0), None)
    if order is None or leader is None:
        return []
    born_s = leader.process.start_ticks / os.sysconf("SC_CLK_TCK") - order.asked_ns / 1e9
    times = (report or {}).get("times") or {}
    moments = {name: born_s + times[f"{name}_s"] for name in PHASES if f"{name}_s" in times}
    if not moments and leader.state.value in PHASES:
        moments = {leader.state.value: (leader.live.state_ns - order.asked_ns) / 1e9}
    entered = [(IN_FLIGHT, 0.0), *moments.items()]
    ends = [*(t_s for _, t_s in entered[1:]), None if seen.over else order.age_s()]
    return [_phase(name, t_s, end_s, order) for (name, t_s), end_s in zip(entered, ends, strict=True)]


def _phase(name: str, t_s: float, end_s: float | None, order: Order) -> dict[str, Any]:
    took_s = max(0.0, end_s - t_s) if end_s is not None else None
    budget_s = budgets(order.deadline_s).get(name)
    late = budget_s is not None and took_s is not None and took_s > budget_s
    return {
        "name": name,
        "t_s": round(t_s, 3),
        "took_s": round(took_s, 3) if took_s is not None else None,
        "budget_s": budget_s,
        "late": late,
    }


def budgets(deadline_s: float) -> dict[str, float]:
    """Seconds of the deadline for each phase of a drain."""
    return {name: round(share * deadline_s, 3) for name, share in SHARES.items()}


def require_running(job: JobDir) -> Seen:
    """Raises JobError for a job that has its ending, unless that came by the drain that is asked for again."""
    seen = observe(job)
    if seen.over and seen.record.ending is not None and read_order(job.order) is None:
        raise JobError(
            f"job '{job.name}' is over already: {seen.record.ending}",
            code="TP-7619",
            next_step=f"tpctl status {job.name}",
        )
    return seen
