"""Where values come from: files, the environment, flags. The only code that reads TOML or `TPCTL_*`.

A value comes from a flag, else the environment (`TPCTL_SECTION_KEY`), else the project file, else the user file, else
its default. `load` returns the configuration and the origin of each value. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.job import SECTIONS, EngineConfig, dotted_keys, from_dict
from engine.config.values import convert, parse_text, unknown
from engine.errors import ConfigError


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where each dotted key got its value."""

    config: EngineConfig
    origins: Mapping[str, str]


def load(
    files: Sequence[tuple[str, Path]] = (),
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge files (weakest first), `TPCTL_*` variables and dotted overrides; validate once.

    Args:
        files: (origin name, path) pairs; a missing file is an error.
        environ: the environment to read, or none.
        overrides: dotted key to value, from flags; text is parsed by the key's type.
    """
    data: dict[str, dict[str, Any]] = {}
    origins = dict.fromkeys(dotted_keys(), "default")
    known = dotted_keys()

    def put(dotted: str, value: Any, origin: str) -> None:
        section, key = dotted.split(".", 1)
        data.setdefault(section, {})[key] = value
        origins[dotted] = origin

    for origin, path in files:
        for section, values in read_toml(path).items():
            if section not in SECTIONS:
                raise unknown(section, SECTIONS, str(path))
            if not isinstance(values, Mapping):
                raise ConfigError(f"{path}: [{section}] must be a table", code="TP-1003", where=str(path))
            for key, value in values.items():
                dotted = f"{section}.{key}"
                if dotted not in known:
                    raise unknown(dotted, [k for k in known if k.startswith(section + ".")], str(path))
                put(dotted, convert(value, known[dotted], dotted, str(path)), f"{origin}: {path}")
    by_variable = {"TPCTL_" + dotted.replace(".", "_").upper(): dotted for dotted in known}
    for variable, text in sorted((environ or {}).items()):
        if variable in by_variable:
            dotted = by_variable[variable]
            put(dotted, parse_text(text, known[dotted], dotted, variable), f"environment: {variable}")
    for dotted, value in (overrides or {}).items():
        if dotted not in known:
            raise unknown(dotted, known, "flag")
        parsed = parse_text(value, known[dotted], dotted, "flag") if isinstance(value, str) else value
        put(dotted, convert(parsed, known[dotted], dotted, "flag"), "flag")
    return Loaded(from_dict(data), origins)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", code="TP-1004", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", code="TP-1005", where=str(path)) from error
