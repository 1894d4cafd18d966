"""Runs `tpctl` the way a shell does, or in process by Typer's own runner."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from tpctl.app import app
from tpctl.schemas import load_schema


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`cli("config", "check")` in an empty directory, with no user file and no TPCTL_* variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))
    runner = CliRunner()

    def invoke(*args: str, env: Mapping[str, str] | None = None) -> Result:
        return runner.invoke(app, list(args), env=dict(env or {}), prog_name="tpctl")

    return invoke


def validated(text: str) -> dict[str, Any]:
    """The JSON on stdout, checked against the published schema that it names."""
    data: dict[str, Any] = json.loads(text)
    schema = load_schema(data["schema"].removeprefix("tpctl."))
    jsonschema.Draft202012Validator(schema).validate(data)
    return data
