"""`tpctl wait JOB --for STATE`: until it is there, cannot come any more, or the time is up."""

from __future__ import annotations

import threading
import time
from typing import Annotated

import typer

from tpctl import options
from tpctl.exitcodes import ExitCode
from tpctl.jobs import place
from tpctl.jobs.health import FAILED, OVER, JobState
from tpctl.jobs.view import look
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)
POLL_S = 0.1


@options.command(
    app,
    epilog="Examples: tpctl wait JOB --for running | tpctl wait JOB --for drained --timeout 60 | "
    "tpctl wait JOB --for running --fail-on wedged --fail-on restarting",
)
def wait(
    out: Output,
    name: options.JobArgument,
    wanted: Annotated[list[JobState], typer.Option("--for", help="The state to wait for; repeatable: any of them.")],
    fail_on: Annotated[
        list[JobState] | None, typer.Option("--fail-on", help="Give up on this state too; repeatable.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds at most.")] = 120.0,
) -> None:
    """Wait until a job is in a state. Returns at once where it is over, or failed, and another was wanted."""
    job, began, nap = place.find(name), time.monotonic(), threading.Event()
    goal, bad = frozenset(wanted), FAILED | frozenset(fail_on or ())
    while True:
        found = look(job)
        state, waited_s = found.health.state, time.monotonic() - began
        if state in goal or state in bad or state in OVER or waited_s >= timeout:
            break
        nap.wait(min(POLL_S, timeout - waited_s))
    why = found.health.findings[-1].message
    if state in goal:
        code, verdict, words = ExitCode.PASS, Verdict.PASS, f"{name} is {state.value}: {why}"
    elif state in bad or state in OVER:
        code, verdict, words = ExitCode.CHECK_FAILED, Verdict.FAIL, f"{name} is {state.value} instead: {why}"
    else:
        code, verdict, words = (
            ExitCode.DEADLINE,
            Verdict.FAIL,
            f"{name} is still {state.value} after {waited_s:.1f} s: {why}",
        )
    step = f"tpctl status {name}"
    data = {"name": name, "state": state.value, "wanted": [one.value for one in wanted], "waited_s": waited_s}
    finding = Finding("job.wait", verdict, words, state.value, next=step)
    out.emit(Envelope("tpctl.wait", verdict, data, (finding,), next=(step,), run_id=name), text=[words])
    raise typer.Exit(int(code))
