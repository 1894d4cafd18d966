"""`tpctl config`: precedence, origins, and the way out of each mistake."""

from __future__ import annotations

import tomllib

import pytest

from engine.config import dotted_keys, from_dict
from tests.cli.conftest import validated


def origins(result) -> dict[str, tuple[object, str]]:
    rows = validated(result.stdout)["data"]["values"]
    return {row["key"]: (row["value"], row["origin"]) for row in rows}


def test_precedence_flag_environment_project_user_default(cli, tmp_path):
    user = tmp_path / "xdg-config" / "tpctl" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("[run]\nchunks = 11\n[schedule]\nbase_seed = 12\nshift = 3.0\n[sink]\nfps = 8\n")
    (tmp_path / "tpctl.toml").write_text("[run]\nchunks = 21\n[schedule]\nbase_seed = 22\nshift = 4.0\n")
    found = origins(
        cli(
            "config",
            "show",
            "-o",
            "json",
            "--set",
            "run.chunks=41",
            env={"TPCTL_RUN_CHUNKS": "31", "TPCTL_SCHEDULE_BASE_SEED": "32"},
        )
    )
    assert found["run.chunks"] == (41, "flag")
    assert found["schedule.base_seed"] == (32, "environment: TPCTL_SCHEDULE_BASE_SEED")
    assert found["schedule.shift"] == (4.0, "project file: tpctl.toml")
    assert found["sink.fps"] == (8, f"user file: {user}")
    assert found["geometry.height"][1] == "default"
    assert set(found) == set(dotted_keys())


def test_config_option_replaces_the_project_file(cli, tmp_path):
    (tmp_path / "tpctl.toml").write_text("[run]\nchunks = 21\n")
    (tmp_path / "other.toml").write_text("[sink]\nfps = 9\n")
    found = origins(cli("config", "show", "-o", "json", "--config", "other.toml"))
    assert found["run.chunks"][1] == "default"
    assert found["sink.fps"] == (9, "file: other.toml")


def test_origin_is_a_column_on_request(cli):
    assert "default" not in cli("config", "show").stdout
    assert "default" in cli("config", "show", "--origin").stdout


def test_init_writes_every_key_and_refuses_to_overwrite(cli, tmp_path):
    assert validated(cli("config", "init", "-o", "json").stdout)["data"]["path"] == "tpctl.toml"
    text = (tmp_path / "tpctl.toml").read_text()
    uncommented = "\n".join(
        line.removeprefix("# ") if " = " in line else line for line in text.splitlines() if "=" in line or "[" in line
    )
    stated = tomllib.loads(uncommented)
    assert {f"{section}.{key}" for section, values in stated.items() for key in values} == set(dotted_keys())
    assert from_dict(stated) == from_dict({})
    (tmp_path / "tpctl.toml").write_text("[run]\nchunks = 3\n")
    refused = cli("config", "init")
    assert refused.exit_code == 2
    assert "TP-7003" in refused.stderr
    assert "--force" in refused.stderr
    assert (tmp_path / "tpctl.toml").read_text() == "[run]\nchunks = 3\n"
    assert cli("config", "init", "--force").exit_code == 0
    assert (tmp_path / "tpctl.toml").read_text() == text


def test_check_passes(cli):
    result = cli("config", "check")
    assert result.exit_code == 0
    assert result.stdout.startswith("PASS")
    assert validated(cli("config", "check", "-o", "json", "--set", "plan.tp=2").stdout)["data"]["world_size"] == 2


@pytest.mark.parametrize(
    ("pair", "code", "words"),
    [
        ("geometry.heigth=64", "TP-1008", "did you mean 'geometry.height'"),
        ("geometry.height=100", "TP-1101", "multiple of 16"),
        ("plan.tp=3", "TP-1103", "Valid degrees: 1, 2, 4"),
        ("plan.tp_plan=v1.1d", "TP-1007", "did you mean"),
        ("run.chunks=many", "TP-1006", "a whole number"),
        ("run.chunks", "TP-1030", "SECTION.KEY=VALUE"),
        ("geometry.window_frames=4", "TP-1102", "at least 6"),
        ("liveness.watchdog_s=3", "TP-1011", "3 heartbeats"),
    ],
)
def test_check_names_the_mistake_and_the_next_command(cli, pair, code, words):
    result = cli("config", "check", "--set", pair, "-o", "json")
    assert result.exit_code == 2
    assert code in result.stderr
    assert words in result.stderr
    assert "  next: " in result.stderr
    assert "Traceback" not in result.stderr
    assert validated(result.stdout)["data"]["error"]["code"] == code


def test_unknown_key_in_a_file_names_the_file_and_the_nearest(cli, tmp_path):
    (tmp_path / "tpctl.toml").write_text("[schedule]\nrecomput = false\n")
    result = cli("config", "check")
    assert result.exit_code == 2
    assert "tpctl.toml" in result.stderr
    assert "did you mean 'schedule.recompute'" in result.stderr


@pytest.mark.parametrize("text", ["[run\nchunks = 1", "run = 3\n", "[run]\nchunks = '4'\n"])
def test_broken_files(cli, tmp_path, text):
    (tmp_path / "tpctl.toml").write_text(text)
    result = cli("config", "check")
    assert result.exit_code == 2
    assert "tpctl.toml" in result.stderr


def test_missing_config_file(cli):
    assert "cannot read" in cli("config", "check", "--config", "none.toml").stderr
