"""`tpctl --help` against a Typer program that has one command and nothing else."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Row, in_turns

BARE = """
import typer

app = typer.Typer({options})


@app.command()
def hello(name: str = "world") -> None:
    \"\"\"Greet somebody.\"\"\"
    print(f"Hello {{name}}")


app()
"""
DEADLINE_S = 60.0


def run(quick: bool) -> list[Row]:
    """Whole processes, from start to exit."""
    script = Path(sys.executable).with_name("tpctl")
    ours = [sys.executable, str(script)] if script.exists() else [sys.executable, "-m", "tpctl"]
    with tempfile.TemporaryDirectory() as directory:
        programs = {"bare": "", "plain": "rich_markup_mode=None, pretty_exceptions_enable=False"}
        commands = {"ours": [*ours, "--help"]}
        for name, options in programs.items():
            path = Path(directory) / f"{name}.py"
            path.write_text(BARE.format(options=options))
            commands[name] = [sys.executable, str(path), "--help"]
        times = in_turns(
            {name: functools.partial(_show_help, command) for name, command in commands.items()},
            8 if quick else 25,
            warm_up=2,
        )
    return [
        times.row("tpctl --help", "ours", "bare", rival_name="bare Typer program", target=1.5),
        times.row(
            "tpctl --help (both without rich)",
            "ours",
            "plain",
            rival_name="bare Typer program, plain help",
            note="the bare program set to the same plain help page as tpctl",
        ),
    ]


def _show_help(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    if "--help" not in result.stdout:
        raise RuntimeError(f"{command} printed no help")
