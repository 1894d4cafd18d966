"""Starting a job: its directory, its frozen configuration, its supervisor in a session of its own."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.process import boot_id
from engine.timeline import Timeline
from tpctl.errors import JobError, LaunchError
from tpctl.jobs import place
from tpctl.jobs.hosts import Hosts
from tpctl.jobs.observe import Seen, observe
from tpctl.jobs.place import JobDir
from tpctl.jobs.record import JobRecord
from tpctl.remains import tail

# How long a supervisor may take to say that it has the job: it loads no heavy library.
READY_S = 30.0
ALONE = Hosts()
PATHS = ("model.checkpoint", "model.text_encoder", "model.vae", "model.cache_dir", "source.video", "sink.directory")


def claim(name: str | None, tp_plan: str, yes: bool) -> tuple[JobDir, int]:
    """A new directory for the job, and its lock.

    Raises:
        JobError: the name is taken: by a job that lives, or by one that ended (unless `yes`, which removes it).
    """
    while True:
        wanted = place.free_name(tp_plan.split("_", maxsplit=1)[0]) if name is None else name
        try:
            job = place.make(wanted)
        except FileExistsError:
            if name is None:
                continue  # somebody else was faster
            clear(place.find(wanted), yes)
            continue
        held = place.lock(job)
        if held is None:  # a rival took it in between
            raise _running(job)
        return job, held


def clear(job: JobDir, yes: bool) -> None:
    """Make a taken name free again, if nobody lives behind it and `yes` says that its files may go.

    Raises:
        JobError: it lives, its ranks do, or nobody said `yes`.
    """
    held = place.lock(job)
    if held is None:
        raise _running(job)
    try:
        ending = "never started: it has no record"
        seen = None
        with contextlib.suppress(JobError):
            seen = observe(job)
        if seen is not None and any(rank.alive for rank in seen.ranks):
            raise _ranks_left(job, seen)
        if seen is not None:
            ending = seen.record.ending or "died: its supervisor is gone, and it left no ending"
        if not yes:
            raise JobError(
                f"there is a job '{job.name}' already, which is over ({ending}); its files are kept in {job.path}",
                code="TP-7617",
                next_step=f"the same command with --yes, which removes them, or another --name than {job.name}",
            )
        place.remove(job)
    finally:
        os.close(held)


def _running(job: JobDir) -> JobError:
    return JobError(
        f"job '{job.name}' runs already", code="TP-7618", where=str(job.path), next_step=f"tpctl status {job.name}"
    )


def freeze(
    job: JobDir,
    config: EngineConfig,
    restart: str,
    max_restarts: int,
    metrics_port: int | None = None,
    hosts: Hosts = ALONE,
) -> JobRecord:
    """Write the configuration as it is now, with every path absolute, and the job's first record.

    Over several hosts all ranks must have the same configuration, and this directory is another on each: there the
    timeline stays where it is.
    """
    import tomli_w

    if config.source.video and not Path(config.source.video).is_file():
        raise ConfigError(
            f"there is no file {config.source.video}",
            code="TP-5152",
            where="source.video",
            next_step=f"ls -l {Path(config.source.video).parent}",
        )
    data = config.to_dict()
    for dotted in PATHS:
        section, key = dotted.split(".")
        if data[section][key]:
            data[section][key] = str(Path(data[section][key]).absolute())
    if config.run.timeline:
        Timeline.load(Path(config.run.timeline))
        shutil.copyfile(config.run.timeline, job.timeline)
        kept = job.timeline if hosts.nnodes == 1 else Path(config.run.timeline).absolute()
        data["run"]["timeline"] = str(kept)
    job.config.write_text(tomli_w.dumps(data), encoding="utf-8")
    record = JobRecord(
        name=job.name,
        job_id=uuid.uuid4().hex,
        host=socket.gethostname(),
        boot=boot_id(),
        created_at=time.time(),
        world_size=config.world_size,
        tp_plan=config.plan.tp_plan,
        parity_key=config.parity_key(),
        restart=restart,
        max_restarts=max_restarts,
        metrics_port=metrics_port,
        nnodes=hosts.nnodes,
        node_rank=hosts.node_rank,
        rdzv=hosts.rdzv,
    )
    record.write(job.record)
    return record


def start(job: JobDir, held: int, referee: bool = True) -> int:
    """Start the supervisor in a session of its own; returns its process id once it has the job.

    Raises:
        LaunchError: it did not come up; its log's last lines are the evidence.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "tpctl.jobs.supervise", "--job", str(job.path)]
    command += ["--lock", str(held), "--ready", str(writer), *([] if referee else ["--no-referee"])]
    descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            pass_fds=(held, writer),
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
        os.close(writer)
        os.close(held)
    try:
        readable, _, _ = select.select([reader], [], [], READY_S)
        if readable and os.read(reader, 16):
            process.returncode = 0  # it is on its own from here on: nobody waits for it in this process
            return process.pid
    finally:
        os.close(reader)
    process.kill()
    process.wait()
    raise LaunchError(
        f"the supervisor of job '{job.name}' did not come up; log: {job.log}",
        code="TP-7107",
        evidence={"last_lines": " / ".join(tail(job.log)[-3:])},
        next_step="tpctl config check",
    )


def unbounded(config: EngineConfig, origin: str, chunks: int | None) -> EngineConfig:
    """A job runs until it is drained, unless somebody said how many chunks it is to make.

    Raises:
        ConfigError: a stream without an end cannot keep its latents.
    """
    wanted = chunks if chunks is not None else 0 if origin == "default" else config.run.chunks
    try:
        return config.replace(run__chunks=wanted)
    except ConfigError as error:
        error.next_step = "tpctl up --chunks 8"
        raise


def revive(job: JobDir) -> int:
    """Make a job that is over ready for another start, with all it left; returns its lock, which is now held.

    Raises:
        JobError: it lives, or ranks of it do.
    """
    held = place.lock(job)
    if held is None:
        raise _running(job)
    try:
        seen = observe(job)
        if not seen.over:
            raise _ranks_left(job, seen)
        job.order.unlink(missing_ok=True)
        record = replace(
            seen.record,
            job_id=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=boot_id(),
            supervisor=None,
            first_attempt=len(seen.record.attempts),
            backoff_until=None,
            draining=None,
            ending=None,
            ended_at=None,
        )
        record.write(job.record)
    except BaseException:
        os.close(held)
        raise
    return held


def _ranks_left(job: JobDir, seen: Seen) -> JobError:
    return JobError(
        f"the supervisor of job '{job.name}' is gone, but ranks of it still run",
        code="TP-7616",
        evidence={"pids": [rank.process.pid for rank in seen.ranks if rank.alive]},
        next_step=f"tpctl abort {job.name} --yes",
    )
