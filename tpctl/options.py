"""Options that several commands share, and the configuration they resolve to.

A command asks for a bundle of them by the type of a parameter, `out: Output` or `given: Given`, and `@command(app)`
puts the options themselves in its place: every command has the same ones, spelt the same.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from engine.config import Loaded, dotted_keys, load
from engine.errors import ConfigError
from tpctl import complete
from tpctl.nearest import hint, nearest
from tpctl.output import Format, Output

OutputOption = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No talk on stderr, only errors.")]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="No colour and no animation.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings end with exit code 4.")]
ConfigOption = Annotated[
    Path | None, typer.Option("-c", "--config", help="Configuration file, in place of ./tpctl.toml.", metavar="FILE")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Set one value; repeatable.", metavar="SECTION.KEY=VALUE", autocompletion=complete.config_keys
    ),
]
JobArgument = Annotated[
    str, typer.Argument(help="A job's name; tpctl ps lists them.", metavar="JOB", autocompletion=complete.jobs)
]
OneJobArgument = Annotated[
    str | None, typer.Argument(help="A job's name; tpctl ps lists them.", metavar="JOB", autocompletion=complete.jobs)
]

PROJECT_FILE = "tpctl.toml"


def user_file() -> Path:
    """The user's configuration file, whether it exists or not."""
    import platformdirs

    return Path(platformdirs.user_config_dir("tpctl")) / "config.toml"


def config_files(config: Path | None) -> list[tuple[str, Path]]:
    """(origin, path) pairs, weakest first: the user file, then `--config` or the project file."""
    files: list[tuple[str, Path]] = []
    if user_file().is_file():
        files.append(("user file", user_file()))
    if config is not None:
        files.append(("file", config))
    elif Path(PROJECT_FILE).is_file():
        files.append(("project file", Path(PROJECT_FILE)))
    return files


def parse_sets(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`section.key=value` texts as a mapping; the value's type is the configuration's business.

    Raises:
        ConfigError: a pair without `=` or with an unknown key (the nearest one is named).
    """
    overrides = {}
    known = dotted_keys()
    for pair in pairs or ():
        dotted, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"--set needs SECTION.KEY=VALUE, got {pair!r}",
                code="TP-1030",
                next_step=f"tpctl config check --set {pair}=VALUE",
            )
        if dotted not in known:
            raise ConfigError(
                f"--set: unknown key '{dotted}'{hint(dotted, known)}",
                code="TP-1008",
                evidence={"key": dotted, "nearest": nearest(dotted, known)},
                next_step="tpctl config show",
            )
        overrides[dotted] = value
    return overrides


def resolve(config: Path | None, sets: Sequence[str] | None) -> Loaded:
    """The configuration of this invocation: flag > environment > project file > user file > default."""
    return load(config_files(config), os.environ, parse_sets(sets))


@dataclass(frozen=True)
class Given:
    """What the command line says of the configuration."""

    config: Path | None
    sets: list[str] | None

    def also(self, overrides: Mapping[str, str]) -> Given:
        """With values that options of a command's own set, by dotted key."""
        return replace(self, sets=[*(self.sets or ()), *(f"{key}={value}" for key, value in overrides.items())])

    def resolve(self) -> Loaded:
        """The configuration of this invocation.

        Raises:
            ConfigError: a file or a value that is wrong; the key, the value and its origin are named.
        """
        return resolve(self.config, self.sets)


@dataclass(frozen=True)
class Bundle:
    """Options (name, annotation, default) and what makes one value of theirs."""

    make: Callable[..., Any]
    options: tuple[tuple[str, Any, Any], ...]


BUNDLES: dict[type, Bundle] = {
    Given: Bundle(Given, (("config", ConfigOption, None), ("sets", SetOption, None))),
    Output: Bundle(
        Output.open,
        (
            ("format", OutputOption, Format.table),
            ("quiet", QuietOption, False),
            ("no_color", NoColorOption, False),
            ("debug", DebugOption, False),
        ),
    ),
}
Command = TypeVar("Command", bound=Callable[..., None])


def command(app: typer.Typer, name: str | None = None, *, epilog: str) -> Callable[[Command], Command]:
    """`app.command`, where a parameter whose type is in `BUNDLES` becomes those options, last on the help page."""

    def register(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        bundles = {name: BUNDLES[hint] for name, hint in hints.items() if isinstance(hint, type) and hint in BUNDLES}
        own = [p.replace(annotation=hints[p.name]) for p in parameters if p.name not in bundles]
        ordered = [bundle for bundle in BUNDLES.values() if bundle in bundles.values()]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for bundle in ordered
            for name, annotation, default in bundle.options
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            taken = {
                name: bundle.make(**{option: values.pop(option) for option, _, _ in bundle.options})
                for name, bundle in bundles.items()
            }
            function(**values, **taken)

        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*keywords, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*keywords, *shared]}
        app.command(name, epilog=epilog)(run)
        return function

    return register
