"""The supervisor of one job: starts its ranks, again if it was told to, and sees them buried. One process, one thread;
where metrics are served, threads that only read.

    python -m tpctl.jobs.supervise --job DIR --lock FD --ready FD

It never imports torch and never forks a process that did. It reads orders from the job's directory a few times a
second; SIGTERM and SIGINT are the order to drain, and a second one the order to abort. If it is killed, rank 0 notices
and drains.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from engine.config import EngineConfig, load
from engine.control import NOT_ASKED
from engine.errors import EngineError
from engine.lifecycle import RankExit, RankState
from engine.process import Process
from tpctl.errors import JobError
from tpctl.jobs.blocker import blockers
from tpctl.jobs.hosts import drained_elsewhere
from tpctl.jobs.line import Line
from tpctl.jobs.observe import RankSeen, observe_ranks
from tpctl.jobs.order import Answer, Kind, OnDeadline, Order, read_order
from tpctl.jobs.place import JobDir
from tpctl.jobs.reason import exit_codes, first_reason
from tpctl.jobs.record import Attempt, JobRecord
from tpctl.launch import local
from tpctl.reports import read_reports

POLL_S = 0.1
# Started anew, a job with one of these would end the same way.
HOPELESS = frozenset({RankExit.BAD_CONFIG, RankExit.PARITY})
BACKOFF_S, BACKOFF_CAP_S = 1.0, 60.0
# Between the two signals that mean abort; sent at once they may be taken for one.
APART_S = 0.05
TAKE_BACK_S = 2.0  # for rank 0 to say whether it can
BEFORE_THE_STREAM = (RankState.STARTING, RankState.JOINING, RankState.LOADING, RankState.WARMING)


class EndNow(Exception):
    """Ends a launch from within its tick. `ending` is what the job's record says then."""

    def __init__(self, ending: str, why: str) -> None:
        super().__init__(why)
        self.ending = ending


class Supervisor:
    """Runs a job whose directory, record and frozen configuration exist.

    Args:
        say: told each event in one line.
    """

    def __init__(self, job: JobDir, say: Callable[[str], None], referee: bool = True) -> None:
        self.job = job
        self.say = say
        self.referee = referee
        self.config: EngineConfig = load([("job", job.config)]).config
        self.record = JobRecord.read(job.record)
        self._signals = 0
        self._ordered = ""  # id of the last order that was carried out
        self._drain: Order | None = None
        self._delivered = False
        self._late = False  # its deadline has passed, and what was to be done then is done

    def start(self) -> None:
        """Take the signals and enter the record. From here on the job is ours.

        Raises:
            JobError: its metrics cannot be served where that was asked for.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._count_signal)
        port = self.record.metrics_port
        if port is not None:
            from tpctl.jobs import metrics  # its library, where it is wanted

            port = metrics.serve(self.job, port)
        self._keep(supervisor=Process.of(os.getpid()), metrics_port=port)

    def run(self) -> JobRecord:
        """Every attempt, to the job's end. Returns the record as it was left."""
        ending = "failed"
        try:
            while True:
                ending = self._attempt(len(self.record.attempts))
                if ending != "failed" or not self._try_again():
                    break
        except EndNow as end:  # in the back-off
            ending = end.ending
            self.say(str(end))
        except Exception as error:
            self.say(f"the supervisor itself failed: {error!r}")
            raise
        finally:
            self.job.socket.unlink(missing_ok=True)
            self._keep(ending=ending, ended_at=time.time(), backoff_until=None)
            self.say(f"the job is over: {ending}")
        return self.record

    def _attempt(self, number: int) -> str:
        run_dir = self.job.run_dir(number)
        run_dir.mkdir(mode=0o700, parents=True)
        (run_dir / "config.toml").write_text(tomli_w.dumps(self.config.to_dict()), encoding="utf-8")
        attempt = Attempt(number, local.make_tag(), time.time())
        self._keep(attempts=(*self.record.attempts, attempt), backoff_until=None)
        record = self.record
        ranks = f"{len(record.ranks_here)} rank(s)" + (f" of {record.world_size}" if record.nnodes > 1 else "")
        self.say(f"attempt {number}: {ranks} of plan {self.config.plan.tp_plan} in {run_dir}")
        me = str(Process.of(os.getpid()))
        spec = local.LaunchSpec(
            nproc=len(record.ranks_here),
            run_dir=run_dir,
            arguments=(
                *("--config", str(run_dir / "config.toml"), "--run-dir", str(run_dir)),
                *("--supervisor", me, "--control", str(self.job.socket)),
            ),
            deadline_s=float("inf"),
            nnodes=record.nnodes,
            node_rank=record.node_rank,
            rdzv_endpoint=record.rdzv or "localhost:0",
            # Other hosts may have made other numbers of attempts.
            rdzv_id=f"{self.job.name}-{number}" if record.nnodes == 1 else self.job.name,
            referee=self.referee,
            tag=attempt.tag,
        )
        self._delivered = False
        try:
            outcome = local.run(spec, lambda elapsed_s: self._tick(), self._launched)
        except EndNow as end:
            self.say(str(end))
            left = tuple(map(str, local.tagged(attempt.tag)))
            self._close_attempt(None, str(end), left)
            return end.ending
        except EngineError as error:  # the launcher could not be started
            self._close_attempt(None, error.message, ())
            return "failed"
        if outcome.returncode == 0:
            elsewhere = drained_elsewhere(record, self.config.run.chunks, read_reports(run_dir))
            ending = "drained" if self._drain is not None or elsewhere else "finished"
            self._close_attempt(0, None, outcome.immortal)
            return ending
        reason = first_reason(run_dir) or f"the launcher ended with {outcome.returncode}"
        self._close_attempt(outcome.returncode, reason, outcome.immortal)
        self.say(f"attempt {number} failed: {reason}")
        return "failed" if self._drain is None else "aborted"

    def _close_attempt(self, returncode: int | None, reason: str | None, leftovers: tuple[str, ...]) -> None:
        *earlier, last = self.record.attempts
        done = replace(last, ended_at=time.time(), returncode=returncode, reason=reason, leftovers=leftovers)
        self._keep(attempts=(*earlier, done))

    def _try_again(self) -> bool:
        """Whether another attempt follows; waits out its back-off first."""
        record = self.record
        number = len(record.attempts) - record.first_attempt
        if record.restart != "on-failure" or self._drain is not None:
            return False
        hopeless = HOPELESS & set(exit_codes(self.job.run_dir(len(record.attempts) - 1)).values())
        if hopeless:
            self.say(f"no restart: a rank ended with {min(hopeless)}, and would again")
            return False
        if number > record.max_restarts:
            self.say(f"no restart: {record.max_restarts} were allowed")
            return False
        pause_s = min(BACKOFF_CAP_S, BACKOFF_S * 2 ** (number - 1))
        self._keep(backoff_until=time.time() + pause_s)
        self.say(f"restart {number} of {record.max_restarts} in {pause_s:g} s")
        end = time.monotonic() + pause_s
        while time.monotonic() < end:
            self._nap.wait(min(POLL_S, max(0.0, end - time.monotonic())))
            self._tick()
        return True

    def _launched(self, pid: int) -> None:
        *earlier, last = self.record.attempts
        self._keep(attempts=(*earlier, replace(last, launcher=Process.of(pid))))

    # Orders --------------------------------------------------------------------------------------------------------

    def _count_signal(self, number: int, _: object) -> None:
        self._signals += 1

    def _tick(self) -> None:
        """A few times a second, while ranks run and in back-offs. Raises EndNow to end them."""
        order = self._next_order()
        if order is not None and order.kind is Kind.ABORT:
            self._abort(f"abort: {order.why}")
        if order is not None and order.kind is Kind.TAKE_BACK:
            self._answer(order.id, self._take_back(order.instead))
        if order is not None and order.kind is Kind.DRAIN and self._drain is None:
            self._drain = order
            self._keep(draining=order.why)
            self.say(f"drain: {order.why}; {order.deadline_s:g} s at most")
        if self._drain is not None:
            self._advance(self._drain)

    def _next_order(self) -> Order | None:
        if self._signals > 1:
            return Order.make(Kind.ABORT, "a second signal", by="signal")
        if self._signals and self._drain is None:
            asked = Order.make(Kind.DRAIN, "a signal", by="signal", deadline_s=self.config.liveness.drain_deadline_s)
            asked.write(self.job.order)  # whoever asks for a drain from now on attaches to this one
            self._ordered = asked.id
            return asked
        order = read_order(self.job.order)
        if order is None or order.id == self._ordered:
            return None
        self._ordered = order.id
        return order

    def _advance(self, drain: Order) -> None:
        ranks = self._ranks()
        first = ranks[0] if ranks else None
        if first is None or (first.alive and first.state in BEFORE_THE_STREAM):
            raise EndNow("drained", "drained before the stream ran: nothing was accepted")
        if not self._delivered and self.record.node_rank == 0:
            self._delivered = first.process.send(signal.SIGTERM)
        if not drain.overdue() or self._late:
            return
        self._late = True
        whom = "; ".join(map(str, blockers(ranks, time.monotonic_ns())))
        why = f"the drain took longer than {drain.deadline_s:g} s; blocked by {whom or 'nobody that lives'}"
        if drain.on_deadline is OnDeadline.abort:
            self._abort(why)
        if drain.on_deadline is OnDeadline.resume:
            self._answer(drain.id, self._take_back(), why)

    def _take_back(self, unread: str | None = None) -> str | None:
        """Let the stream go on. Returns why not, where that cannot be. A drain that was never read is gone already."""
        if self._drain is None:
            return NOT_ASKED if unread is None else None
        end = time.monotonic() + TAKE_BACK_S
        while self._delivered:
            try:
                with Line(self.job, TAKE_BACK_S) as line:
                    line.ask({"id": uuid.uuid4().hex, "op": "take-back"})
                break
            except JobError as error:
                # The signal that asks for the drain is sent, and may not be heard yet.
                if NOT_ASKED not in error.message or time.monotonic() > end:
                    return error.message
                self._nap.wait(APART_S)
        return None

    def _answer(self, order_id: str, refused: str | None, why: str | None = None) -> None:
        """Say what came of it. A drain that was taken back is forgotten, one that goes on stays in force."""
        Answer(order_id, refused, why).write(self.job.answer)
        if refused is None:
            self.say(f"the drain is taken back{': ' + why if why else ''}")
            self._drain, self._delivered, self._late, self._signals = None, False, False, 0
            self.job.order.unlink(missing_ok=True)
            self._keep(draining=None)
        else:
            self.say(f"the drain goes on: {refused}")
            if self._drain is not None:
                self._drain.write(self.job.order)

    def _abort(self, why: str) -> None:
        """Rank 0 gets the chance to write down what it leaves behind; then everything is ended."""
        for rank in self._ranks()[:1]:
            if rank.process.send(signal.SIGTERM):
                self._nap.wait(APART_S)
                rank.process.send(signal.SIGTERM)
                self._nap.wait(APART_S)
        raise EndNow("aborted", why)

    def _ranks(self) -> list[RankSeen]:
        attempt = self.record.attempt
        return observe_ranks(self.job.run_dir(attempt.number)) if attempt and attempt.ended_at is None else []

    def _keep(self, **changes: object) -> None:
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]
        self.record.write(self.job.record)

    _nap = threading.Event()


def say(line: str) -> None:
    """One line on stderr, with the time: in the background that is the job's supervisor.log."""
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(f"{stamp} supervisor: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The background process of `tpctl up`. Exit code 0 unless the job failed."""
    parser = argparse.ArgumentParser(prog="tpctl.jobs.supervise", description="Supervises a job; started by tpctl up.")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--lock", type=int, required=True, help="held open while this process lives")
    parser.add_argument("--ready", type=int, required=True, help="told once the job is in our hands")
    parser.add_argument("--no-referee", action="store_true")
    arguments = parser.parse_args(argv)
    for descriptor in (arguments.lock, arguments.ready):
        os.set_inheritable(descriptor, False)  # no rank may hold the lock of a job whose supervisor is gone
    supervisor = Supervisor(JobDir(arguments.job), say, not arguments.no_referee)
    supervisor.start()
    os.write(arguments.ready, b"ready\n")
    os.close(arguments.ready)
    return 0 if supervisor.run().ending in ("drained", "finished") else 3


if __name__ == "__main__":
    sys.exit(main())
