"""The entry of `tpctl`. Keep this module light: it decides how fast `tpctl --help` is."""

from __future__ import annotations

from typing import Annotated

import typer

from tpctl.lazy import COMMANDS, LazyGroup, stub

app = typer.Typer(
    name="tpctl",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tpctl import __version__

        typer.echo(f"tpctl {__version__}")
        raise typer.Exit()


@app.callback(epilog="Start here: tpctl bringup. What an exit code means: tpctl help exit-codes.")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Bring up, check and operate a causal video transformer that is served in lockstep over several processes."""


for _name, _module, _line in COMMANDS:
    app.command(_name, help=_line)(stub)


def main() -> None:
    """Console script. Leaves by SystemExit with a code of `tpctl help exit-codes`."""
    app(prog_name="tpctl")


if __name__ == "__main__":
    main()
