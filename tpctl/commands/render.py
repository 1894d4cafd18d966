"""`tpctl render slurm|kubernetes`: a batch script, or a LeaderWorkerSet manifest, for a job of this configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tpctl import options
from tpctl.errors import RenderError
from tpctl.exitcodes import for_verdict
from tpctl.jobs import start
from tpctl.output import Envelope, Format, Output
from tpctl.render import kubernetes as manifest
from tpctl.render import slurm as batch
from tpctl.render.spec import Spec
from tpctl.verdict import Finding, Verdict

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Write a batch script or a manifest that starts the job of this configuration on a cluster.",
)


@dataclass(frozen=True)
class Asked:
    """What both kinds are asked for."""

    name: str
    nodes: int
    command: str
    port: int
    grace: int | None
    env: list[str] | None
    to: Path | None
    strict: bool


NameOption = Annotated[str, typer.Option("--name", help="The job's name: a DNS label.")]
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Over how many nodes its ranks are shared.")]
CommandOption = Annotated[str, typer.Option("--command", help="tpctl as the nodes know it.", metavar="PATH")]
PortOption = Annotated[int, typer.Option("--port", min=1, max=65535, help="Where the nodes meet, on the first.")]
GraceOption = Annotated[
    int | None, typer.Option("--grace", min=1, help="Seconds for the ending; drain and abort if not given.")
]
EnvOption = Annotated[
    list[str] | None, typer.Option("--env", help="A variable of the ranks; repeatable.", metavar="NAME=VALUE")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write it there, and not to stdout.", metavar="FILE")]
options.BUNDLES[Asked] = options.Bundle(
    Asked,
    (
        ("name", NameOption, inspect.Parameter.empty),
        ("nodes", NodesOption, 1),
        ("command", CommandOption, "tpctl"),
        ("port", PortOption, 29400),
        ("grace", GraceOption, None),
        ("env", EnvOption, None),
        ("to", OutOption, None),
        ("strict", options.StrictOption, False),
    ),
)


def spec_of(given: options.Given, asked: Asked) -> tuple[Spec, tuple[Finding, ...]]:
    """What to render, and what an operator should know of it. Raises what a configuration or an option lacks."""
    loaded = given.resolve()
    config = start.unbounded(loaded.config, loaded.origins["run.chunks"], None)
    spec = Spec.of(asked.name, asked.nodes, config, asked.command, asked.port, asked.grace, asked.env or ())
    findings: tuple[Finding, ...] = ()
    if loaded.origins["liveness.drain_deadline_s"] == "default":
        seconds = config.liveness.drain_deadline_s
        words = f"no drain deadline is stated; it is the default of {seconds:g} s, on which the grace depends"
        step = f"--set liveness.drain_deadline_s={seconds:g}"
        findings = (Finding("render.drain-deadline", Verdict.WARN, words, seconds, next=step),)
    return spec, findings


def deliver(out: Output, asked: Asked, target: str, spec: Spec, text: str, findings: tuple[Finding, ...]) -> None:
    """The text bare on stdout or into a file, or inside the envelope where a machine reads."""
    to = asked.to
    if to is not None:
        try:
            with to.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except FileExistsError as error:
            raise RenderError(
                f"{to} exists, and is left as it is", code="TP-8069", next_step="another --out FILE"
            ) from error
    verdict = Verdict.WARN if findings else Verdict.PASS
    data: dict[str, Any] = {
        "target": target,
        "name": spec.name,
        "nodes": spec.nodes,
        "ranks_per_node": spec.ranks_per_node,
        "drain_deadline_s": spec.config.liveness.drain_deadline_s,
        "grace_s": spec.grace_s,
        "parity_key": spec.config.parity_key(),
        "path": str(to) if to is not None else None,
        "text": text,
    }
    verb = "sbatch" if target == "slurm" else "kubectl apply -f"
    step = f"{verb} {to or 'FILE'}"
    for finding in findings:
        out.say(f"{finding.verdict}  {finding.message}")
    if out.format in (Format.table, Format.wide):
        out.say(f"next: {step}")
        print(f"wrote {to}" if to is not None else text, end="\n" if to is not None else "")
    else:
        out.emit(Envelope("tpctl.render", verdict, data, findings, next=(step,), run_id=spec.name))
    raise typer.Exit(int(for_verdict(verdict, asked.strict)))


@options.command(
    app,
    epilog="Examples: tpctl render slurm --name night | "
    "tpctl render slurm --name night --nodes 2 --set plan.tp=2 --time 8:00:00",
)
def slurm(
    out: Output,
    given: options.Given,
    asked: Asked,
    time: Annotated[str | None, typer.Option("--time", help="Time limit, as sbatch takes it.")] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Where to run.")] = None,
) -> None:
    """An sbatch script: a supervisor on each node, a drain before the time limit, a bundle of each node at the end."""
    spec, findings = spec_of(given, asked)
    deliver(out, asked, "slurm", spec, batch.render(spec, time, partition), findings)


@options.command(
    app,
    epilog="Examples: tpctl render kubernetes --name night --image tpctl:0.1 | "
    "tpctl render kubernetes --name night --image tpctl:0.1 --nodes 2 --set plan.tp=2",
)
def kubernetes(
    out: Output,
    given: options.Given,
    asked: Asked,
    image: Annotated[str, typer.Option("--image", help="An image with tpctl in it.")],
    namespace: Annotated[str | None, typer.Option("--namespace", help="Where to run.")] = None,
    shm: Annotated[str, typer.Option("--shm", help="Shared memory of each pod.")] = "1Gi",
    gpu_resource: Annotated[str, typer.Option("--gpu-resource", help="What a GPU is called there.")] = "nvidia.com/gpu",
    claim: Annotated[str | None, typer.Option("--claim", help="A volume claim that keeps the state.")] = None,
) -> None:
    """A LeaderWorkerSet manifest: probes by tpctl status, a drain before the pods end, a grace that is longer."""
    spec, findings = spec_of(given, asked)
    text = manifest.render(spec, image, namespace, shm, gpu_resource, claim)
    deliver(out, asked, "kubernetes", spec, text, findings)
