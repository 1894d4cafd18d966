"""`tpctl plan`: before a launch, will it fit, will it divide, what will bind, how fast."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from tpctl import options
from tpctl.errors import CliError
from tpctl.exitcodes import for_verdict
from tpctl.nearest import hint
from tpctl.output import Column, Envelope, Output, Table
from tpctl.planner.devices import DEVICES, Device, measured_host, this_host
from tpctl.planner.estimate import GB, HEADROOM, Estimate, Pace, estimates
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)
COLUMNS = (
    Column("plan", "plan"),
    Column("tp", "tp", right=True),
    Column("ranks", "ranks", narrow=False, right=True),
    Column("fits", "fits"),
    Column("rank 0 GB", "rank0_gb", right=True),
    Column("worker GB", "worker_gb", right=True),
    Column("calls", "calls", narrow=False, right=True),
    Column("call ms", "call_ms", right=True),
    Column("sums ms", "sums_ms", narrow=False, right=True),
    Column("stage 0 ms", "stage0_ms", narrow=False, right=True),
    Column("period ms", "period_ms", right=True),
    Column("fps", "fps", right=True),
    Column("binds", "binds"),
    Column("MB a chunk", "link_mb", narrow=False, right=True),
)


@options.command(
    app,
    epilog="Examples: tpctl plan | tpctl plan --set model.preset=wan2.1-14b --device h200 --most 5 | "
    "tpctl plan --measure -o json",
)
def plan(
    out: Output,
    given: options.Given,
    device: Annotated[
        str, typer.Option("--device", help=f"cpu, or one of {', '.join(DEVICES)}.", metavar="NAME")
    ] = "cpu",
    most: Annotated[int, typer.Option("--most", min=1, max=64, help="The largest mesh to look at.")] = 4,
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1.0, help="Part of a device's arithmetic that is reached.")
    ] = Pace.efficiency,
    measure: Annotated[bool, typer.Option("--measure", help="Time this host for a moment, for its speed.")] = False,
) -> None:
    """Estimate every plan at every mesh size: memory by role, what binds, period. An estimate; bringup measures."""
    config = given.resolve().config
    chosen = find(device, measure)
    pace = Pace(efficiency)
    found = list(estimates(config, chosen, most, pace))
    own = next((row for row in found if (row.plan, row.tp) == (config.plan.tp_plan, config.plan.tp)), None)
    findings = judge(config.plan.tp_plan, config.plan.tp, own, chosen)
    verdict = worst(finding.verdict for finding in findings)
    data = {
        "preset": config.model.preset,
        "dtype": config.model.dtype,
        "device": {**asdict(chosen), "headroom": HEADROOM},
        "efficiency": efficiency,
        "configured": {"plan": config.plan.tp_plan, "tp": config.plan.tp},
        "plans": [asdict(row) for row in found],
    }
    coverage = Coverage.of(finding.verdict for finding in findings)
    step = "tpctl bringup --level 1" if verdict is Verdict.PASS else "tpctl plan -o wide"
    out.emit(
        Envelope("tpctl.plan", verdict, data, findings, coverage, (step,)),
        [Table(COLUMNS, [shown(row) for row in found])],
        [f"{finding.verdict}  {finding.message}" for finding in findings],
    )
    raise typer.Exit(int(for_verdict(verdict, strict=False)))


def find(name: str, measure: bool) -> Device:
    """The device by name.

    Raises:
        CliError: there is none of this name.
    """
    if name == "cpu":
        return measured_host() if measure else this_host()
    if name not in DEVICES:
        near = hint(name, ["cpu", *DEVICES])
        raise CliError(
            f"there is no device '{name}'{near or '.'} Known: cpu, {', '.join(DEVICES)}", next_step="tpctl plan"
        )
    return DEVICES[name]


def judge(plan_name: str, tp: int, own: Estimate | None, device: Device) -> tuple[Finding, ...]:
    """Of the configured plan: does it fit; and is there a speed to speak of."""
    what = f"{plan_name}, tp={tp}, on {device.name}"
    if own is None or own.rank0_bytes is None:
        return (Finding("plan.fits", Verdict.UNCHECKED, f"{what}: beyond --most"),)
    largest = max(own.rank0_bytes, own.worker_bytes or 0) / GB
    room = device.memory_gb * HEADROOM
    words = f"{what}: the largest rank needs about {largest:.1f} GB of {room:.0f} GB"
    fits = Finding("plan.fits", Verdict.PASS if own.fits else Verdict.FAIL, words, largest, room)
    if own.period_ms is None:
        return fits, Finding("plan.speed", Verdict.SKIP, _why_no_speed(own, device))
    words = f"about {own.period_ms:.0f} ms a chunk, {own.fps:.1f} fps, bound by {own.binds}"
    return fits, Finding("plan.speed", Verdict.PASS, words, own.period_ms)


def _why_no_speed(own: Estimate, device: Device) -> str:
    if own.call_ms is None:
        return f"no figures of the speed of {device.name}: tpctl plan --measure, or --device NAME"
    return (
        f"about {own.call_ms:.1f} ms a call; a chunk's time cannot be told: no figures of the small VAE of this preset"
    )


def shown(row: Estimate) -> dict[str, Any]:
    if not row.divides:
        return {"plan": row.plan, "tp": row.tp, "ranks": row.ranks, "fits": "does not divide"}
    figures = {
        key: None if value is None else f"{value:.1f}" for key, value in asdict(row).items() if key[-3:] == "_ms"
    }
    return {
        **asdict(row),
        **figures,
        "fits": "yes" if row.fits else "no",
        "rank0_gb": _gb(row.rank0_bytes),
        "worker_gb": _gb(row.worker_bytes),
        "fps": None if row.fps is None else f"{row.fps:.1f}",
        "link_mb": None if row.link_mb is None else f"{row.link_mb:.2f}",
    }


def _gb(size: int | None) -> str | None:
    return None if size is None else f"{size / GB:.1f}"
