"""`tpctl up`: start a job, supervised, in the background or in the foreground."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tpctl import options
from tpctl.exitcodes import ExitCode
from tpctl.jobs import place, start
from tpctl.jobs.hosts import Hosts
from tpctl.jobs.record import JobRecord
from tpctl.jobs.supervise import Supervisor, say
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Restart(StrEnum):
    no = "no"
    on_failure = "on-failure"


class OnSlowSink(StrEnum):
    block = "block"
    drop_oldest = "drop-oldest"
    fail = "fail"


@options.command(
    app,
    epilog="Examples: tpctl up --name preview | tpctl up --name night --restart on-failure --set plan.tp=2 | "
    "tpctl up --source VIDEO --noise-scale 0.7 | tpctl up --set sink.kinds=segments,pipe --on-slow-sink drop-oldest | "
    "tpctl up --name clip --chunks 8 --foreground | tpctl up --name live --metrics-port 0 | tpctl up --dry-run | "
    "tpctl up --name two --nnodes 2 --node-rank 1 --rdzv HOST:29400 --set plan.tp=2",
)
def up(
    out: Output,
    given: options.Given,
    name: Annotated[str | None, typer.Option("--name", help="The job's name; one is made if there is none.")] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and log to stderr: for containers and systemd.")
    ] = False,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=0, help="How many chunks; 0, or nothing said: until drained.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="Video-to-video: the file to work on.", metavar="FILE")
    ] = None,
    noise_scale: Annotated[
        float | None, typer.Option("--noise-scale", help="With a source: how much of it becomes noise, in (0, 1].")
    ] = None,
    on_slow_sink: Annotated[
        OnSlowSink | None, typer.Option("--on-slow-sink", help="A sink slower than the stream; block if not given.")
    ] = None,
    restart: Annotated[Restart, typer.Option("--restart", help="Start again after a failure, with back-off.")] = (
        Restart.no
    ),
    max_restarts: Annotated[int, typer.Option("--max-restarts", min=1, help="With --restart: how often.")] = 5,
    no_referee: Annotated[
        bool, typer.Option("--no-referee", help="No referee beside the ranks; their own budgets remain.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", min=0, max=65535, help="Serve metrics on 127.0.0.1, for every user of it; 0: a free port."
        ),
    ] = None,
    nnodes: Annotated[
        int, typer.Option("--nnodes", min=1, help="Hosts; each runs this command with the same name and configuration.")
    ] = 1,
    node_rank: Annotated[
        int, typer.Option("--node-rank", min=0, help="Which of them this is; 0 holds rank 0 and control.")
    ] = 0,
    rdzv: Annotated[
        str | None, typer.Option("--rdzv", help="Where hosts meet: a free port of node rank 0.", metavar="HOST:PORT")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what a dead job of this name left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be started, and start nothing.")] = False,
) -> None:
    """Start a job. It runs on after this command, until it is drained, aborted or has made its chunks."""
    said = {"source.video": source, "source.noise_scale": noise_scale, "sink.on_slow": on_slow_sink}
    loaded = given.also({key: str(value) for key, value in said.items() if value is not None}).resolve()
    cfg = start.unbounded(loaded.config, loaded.origins["run.chunks"], chunks)
    hosts = Hosts(nnodes, node_rank, rdzv)
    hosts.check(name, cfg.world_size, restart is not Restart.no)
    plan = {
        "nnodes": nnodes,
        "node_rank": node_rank,
        "rdzv": rdzv,
        "world_size": cfg.world_size,
        "tp_plan": cfg.plan.tp_plan,
        "chunks": cfg.run.chunks,
        "restart": restart.value,
        "parity_key": cfg.parity_key(),
    }
    if metrics_port is not None:
        from tpctl.jobs import metrics

        metrics.check_port(metrics_port)
    if dry_run:
        wanted = place.free_name(cfg.plan.tp_plan.split("_", maxsplit=1)[0]) if name is None else name
        place.check_name(wanted)
        job = place.JobDir(place.jobs_root() / wanted)
        place.check_socket(job)
        data = {**plan, "name": job.name, "directory": str(job.path), "job_id": None, "pid": None, "dry_run": True}
        data["metrics_url"] = None
        words = f"would start {job.name}: {cfg.world_size} rank(s) of plan {cfg.plan.tp_plan}, in {job.path}"
        out.emit(Envelope("tpctl.up", Verdict.SKIP, data, (Finding("job.up", Verdict.SKIP, words),)), text=[words])
        return
    job, held = start.claim(name, cfg.plan.tp_plan, yes)
    try:
        record = start.freeze(
            job, cfg, restart.value, max_restarts if restart is Restart.on_failure else 0, metrics_port, hosts
        )
    except BaseException:
        os.close(held)
        place.remove(job)  # nothing was started: nothing stays
        raise
    if foreground:
        supervisor = Supervisor(job, say, not no_referee)
        supervisor.start()
        pid, ending = os.getpid(), supervisor.run().ending
        os.close(held)
    else:
        pid, ending = start.start(job, held, not no_referee), None
    good = ending in (None, "drained", "finished")
    words = f"job {job.name} is over: {ending}" if ending else f"job {job.name} is started, supervised by {pid}"
    step = f"tpctl status {job.name}" if ending else f"tpctl wait {job.name} --for running"
    data = {**plan, "name": job.name, "directory": str(job.path), "job_id": record.job_id, "pid": pid, "dry_run": False}
    data["metrics_url"] = JobRecord.read(job.record).metrics_url
    finding = Finding("job.up", Verdict.PASS if good else Verdict.FAIL, words, ending, next=step)
    out.emit(
        Envelope("tpctl.up", finding.verdict, data, (finding,), next=(step,), run_id=job.name),
        text=[words, f"next: {step}"],
    )
    raise typer.Exit(int(ExitCode.PASS if good else ExitCode.CHECK_FAILED))
