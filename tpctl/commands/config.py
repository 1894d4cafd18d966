"""`tpctl config init|show|check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from engine.config import CHOICES, SINK_KINDS, EngineConfig
from tpctl import options
from tpctl.errors import CliError
from tpctl.output import Column, Envelope, Output, Table
from tpctl.verdict import Finding, Verdict

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Write, show and check the configuration."
)

NOTES: dict[str, str] = {
    "model": "The transformer. The tiny preset makes its own weights from weights_seed.",
    "geometry": "Pixels (multiples of 16) and latent frames.",
    "schedule": "Denoising, KV-cache bias, and whether the cache is recomputed from context frames.",
    "plan": "Which plan, on how many mesh ranks.",
    "pipeline": "Plans pp0 and pp1: depths of the queues, the comms thread, what a hard cut does with work in flight.",
    "comm": "Limits of the wire, and deadlines of the process groups in seconds.",
    "liveness": "watchdog_s must be at least three heartbeats.",
    "tripwires": "Cadence of each check in chunks; 0 is off.",
    "drill": "A fault to plant. For drills only (tpctl drill): leave `id` empty.",
    "run": "How much to make, and of what.",
    "log": "Each rank's log: the least level, the size of a file, how many are kept.",
    "source": "Video-to-video: a file, how much of it becomes noise (0 to 1), and what follows its last frame.",
    "sink": f"kinds: any of {', '.join(SINK_KINDS)}. on_slow: what happens when more than queue_chunks chunks wait.",
}


def commented_toml() -> str:
    """Every key with its default, commented, so that a file states only what was changed on purpose."""
    lines = ["# tpctl configuration. Remove the # of a line to change its value.", ""]
    for section, values in EngineConfig().to_dict().items():
        lines += [f"# {NOTES[section]}", f"[{section}]"]
        for key, value in values.items():
            choices = CHOICES.get(f"{section}.{key}")
            # JSON's texts, numbers, booleans and lists of those are TOML too.
            note = f"  # {', '.join(choices)}" if choices else ""
            lines.append(f"# {key} = {json.dumps(value)}{note}")
        lines.append("")
    return "\n".join(lines)


@options.command(app, epilog="Examples: tpctl config init | tpctl config init prod.toml | tpctl config init --force")
def init(
    out: Output,
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path(options.PROJECT_FILE),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write a commented configuration file with every key and its default."""
    if path.exists() and not force:
        raise CliError(
            f"{path} exists and is left as it is", code="TP-7003", next_step=f"tpctl config init {path} --force"
        )
    path.write_text(commented_toml(), encoding="utf-8")
    step = f"tpctl config check --config {path}"
    out.emit(
        Envelope("tpctl.config-init", Verdict.PASS, {"path": str(path)}, next=(step,)),
        text=[f"wrote {path}", f"next: {step}"],
    )


@options.command(
    app, epilog="Examples: tpctl config show | tpctl config show --origin | tpctl config show --set plan.tp=2"
)
def show(
    out: Output,
    given: options.Given,
    origin: Annotated[bool, typer.Option("--origin", help="Name the source of each value.")] = False,
) -> None:
    """Show every value in force, and with --origin where it came from."""
    loaded = given.resolve()
    rows = [
        {"key": f"{section}.{key}", "value": value, "origin": loaded.origins[f"{section}.{key}"]}
        for section, values in loaded.config.to_dict().items()
        for key, value in values.items()
    ]
    columns = [Column("key", "key"), Column("value", "shown"), Column("origin", "origin", narrow=origin)]
    shown = [{**row, "shown": json.dumps(row["value"], ensure_ascii=False)} for row in rows]
    out.emit(
        Envelope("tpctl.config-show", Verdict.PASS, {"parity_key": loaded.config.parity_key(), "values": rows}),
        [Table(columns, shown)],
    )


@options.command(app, epilog="Examples: tpctl config check | tpctl config check --config prod.toml --set plan.tp=2")
def check(
    out: Output,
    given: options.Given,
) -> None:
    """Check the configuration as a launch would: types, choices, geometry, and whether tp divides the model."""
    loaded = given.resolve()
    cfg = loaded.config
    sources = sorted({source for source in loaded.origins.values() if source != "default"})
    facts = (
        f"{cfg.model.preset}, {cfg.geometry.height}x{cfg.geometry.width}, {cfg.plan.tp_plan} on {cfg.plan.tp} rank(s), "
        f"{cfg.run.chunks} chunks"
    )
    finding = Finding("config", Verdict.PASS, facts, value=cfg.parity_key())
    data = {"parity_key": cfg.parity_key(), "sources": sources, "world_size": cfg.world_size}
    out.emit(
        Envelope("tpctl.config-check", Verdict.PASS, data, (finding,), next=("tpctl bringup",)),
        text=[f"PASS  {facts}", *(f"  from {source}" for source in sources)],
    )
