"""A command group that imports a command's module only when that command is really called.

The help page of `tpctl` needs a name and a line for each command, nothing more. So the group is built from stubs, and
`resolve_command`, which runs when a command is called or completed, swaps the stub for the module's own command.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

# name, module, the line on the help page. The order is the order of the help page.
COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("bringup", "tpctl.commands.bringup", "Run a bring-up matrix on real processes; gate each case; report."),
    ("drill", "tpctl.commands.drill", "Break a real job on purpose; check that it dies fast, for the named reason."),
    ("up", "tpctl.commands.up", "Start a job, supervised, in the background or in the foreground."),
    ("ps", "tpctl.commands.ps", "List the jobs of this user on this host, and whether each is well."),
    ("status", "tpctl.commands.status", "Do a job's frames advance, and where is each of its ranks."),
    (
        "metrics",
        "tpctl.commands.metrics",
        "A job's metrics in Prometheus' text format; rules and a dashboard for them.",
    ),
    ("top", "tpctl.commands.top", "Jobs and ranks, live: does each advance, and where is it."),
    ("logs", "tpctl.commands.logs", "What all ranks of a run said, in one order; follow a job until it ends."),
    ("wait", "tpctl.commands.wait", "Wait until a job is in a state; return at once where it cannot come."),
    ("prompt", "tpctl.commands.prompt", "Give a running job another prompt; the receipt names its chunk."),
    ("cut", "tpctl.commands.cut", "Begin a running job's stream anew, with empty caches."),
    ("set", "tpctl.commands.set", "Change a running job's bias or recompute; pause it, and let it go on."),
    ("drain", "tpctl.commands.drain", "End a job without loss: finish what is in flight, account for all of it."),
    ("abort", "tpctl.commands.abort", "End a job now, and say what was lost."),
    ("restart", "tpctl.commands.restart", "Drain a job and start it again, as it was configured."),
    ("plan", "tpctl.commands.plan", "Before a launch: will it fit, will it divide, what will bind, how fast."),
    ("parity-check", "tpctl.commands.parity", "Compare configuration, environment and versions over ranks or hosts."),
    ("kv-audit", "tpctl.commands.kvaudit", "Compare the cache history of all ranks, live or from records."),
    ("triage", "tpctl.commands.triage", "Who began it: the first divergence of a run, apart from its victims."),
    ("timeline", "tpctl.commands.timeline", "When everything happened: a trace for Perfetto, and the overlap drawn."),
    ("bundle", "tpctl.commands.bundle", "Pack what a job or a run left into one support archive; compare two."),
    ("render", "tpctl.commands.render", "Write a batch script or a manifest for a cluster."),
    ("checklist", "tpctl.commands.checklist", "Operator checklists: list, show one on a page, run its items."),
    ("runbook", "tpctl.commands.runbook", "On-call runbooks: list, show, run block by block, test."),
    ("crosswalk", "tpctl.commands.crosswalk", "Where each question of the v1.1 review is answered here."),
    ("env", "tpctl.commands.env", "Snapshot of this host: hardware, versions, thread settings."),
    ("config", "tpctl.commands.config", "Write, show and check the configuration."),
    ("schema", "tpctl.commands.schema", "Print the JSON Schema of a command's output."),
    ("help", "tpctl.commands.help", "Topics that belong to no single command, such as exit-codes."),
)
MODULES = {name: module for name, module, _ in COMMANDS}


class LazyGroup(TyperGroup):
    """Loads commands on demand, and turns what escapes from them into a message and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in MODULES:
            command = typer.main.get_command(importlib.import_module(MODULES[name]).app)
        return name, command, rest

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except Exception as error:  # the last stop: all that escapes becomes a message and a code
            if not kwargs.get("standalone_mode", True):
                raise
            from tpctl.errors import report

            try:
                sys.exit(report(error))
            except BrokenPipeError:  # whoever read us has seen enough, as `| head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)


def stub() -> None:
    """Stands on the help page for a command whose module is not loaded yet."""
