"""The surface of the command line: what is there, how fast, and that each example in a help page works."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cli.conftest import validated
from tpctl.exitcodes import ExitCode, worst_code
from tpctl.lazy import COMMANDS
from tpctl.schemas import load_schema, names

BARE = """
import typer
app = typer.Typer()
@app.command()
def hello(name: str = "you"):
    \"\"\"Say hello.\"\"\"
    print(name)
app()
"""


def test_help_names_every_command(cli):
    page = cli("--help")
    assert page.exit_code == 0
    for name, _, _ in COMMANDS:
        assert f"\n  {name} " in page.stdout


@pytest.mark.parametrize("args", [["--help"], ["bringup", "--list"], ["config", "check"], ["parity-check", "--help"]])
def test_no_command_imports_torch(args, tmp_path):
    code = (
        "import sys\nfrom tpctl.app import app\n"
        f"try:\n    app({args!r}, prog_name='tpctl')\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'diffusers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path.cwd(), check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_help_loads_no_command_module():
    code = (
        "import sys\nfrom tpctl.app import app\n"
        "try:\n    app(['--help'], prog_name='tpctl')\nexcept SystemExit:\n    pass\n"
        "assert not [m for m in sys.modules if m.startswith(('tpctl.commands.', 'rich', 'engine.config'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_is_at_most_half_slower_than_a_bare_typer_program(tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text(BARE)
    commands = {"ours": [sys.executable, "-m", "tpctl", "--help"], "bare": [sys.executable, str(bare), "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(7):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=60)
            times[name].append(time.perf_counter() - started)
    ratio = min(times["ours"]) / min(times["bare"])
    assert ratio <= 1.5, {name: statistics.median(values) for name, values in times.items()}


def test_version(cli):
    assert cli("--version").stdout.startswith("tpctl 0.")


def test_unknown_command_and_option_are_usage_errors(cli):
    wrong = cli("brinup")
    assert wrong.exit_code == 2
    assert "bringup" in wrong.stderr
    assert cli("env", "--nope").exit_code == 2
    assert cli("env", "-o", "xml").exit_code == 2


def test_exit_codes_table_is_the_enum(cli):
    data = validated(cli("help", "exit-codes", "-o", "json").stdout)
    assert {row["code"] for row in data["data"]["rows"]} == {int(code) for code in ExitCode}
    table = cli("help", "exit-codes").stdout
    assert "130  interrupted" in table


def test_worst_exit_code_wins():
    assert worst_code([ExitCode.PASS, ExitCode.WARNINGS, ExitCode.INCOMPLETE]) is ExitCode.INCOMPLETE
    assert worst_code([ExitCode.CHECK_FAILED, ExitCode.DEADLINE]) is ExitCode.CHECK_FAILED
    assert worst_code([]) is ExitCode.INCOMPLETE


def test_help_of_an_unknown_topic(cli):
    assert cli("help", "exit").exit_code == 2
    assert validated(cli("help", "-o", "json").stdout)["data"]["topic"] is None


def test_every_schema_is_a_schema(cli):
    listed = validated(cli("schema", "-o", "json").stdout)["data"]["schemas"]
    assert [row["name"] for row in listed] == names()
    assert {"bringup", "env", "error", "parity-check", "snapshot"} <= set(names())
    for name in names():
        jsonschema.Draft202012Validator.check_schema(load_schema(name))
        printed = json.loads(cli("schema", name).stdout)
        assert printed == load_schema(name)


def test_schema_by_a_wrong_name_suggests(cli):
    wrong = cli("schema", "bringupp")
    assert wrong.exit_code == 2
    assert "did you mean 'bringup'" in wrong.stderr


def _examples(command: list[str], cli) -> list[str]:
    """The examples of a help page, unwrapped. `|` stands between them."""
    page = cli(*command, "--help").stdout
    _, found, tail = page.partition("Examples:")
    assert found, f"{command} has no examples"
    return [" ".join(part.split()) for part in tail.split("|")]


@pytest.mark.parametrize(
    "command",
    [
        ["env"],
        ["schema"],
        ["help"],
        ["plan"],
        ["config", "init"],
        ["config", "show"],
        ["config", "check"],
        ["parity-check"],
    ],
)
def test_examples_that_need_no_engine_run(command, cli, tmp_path):
    (tmp_path / "prod.toml").write_text("[run]\nchunks = 5\n")
    for name in ("host-a.toml", "host-b.toml"):
        assert cli("env", "--save", name).exit_code == 0
    ran = 0
    for example in _examples(command, cli):
        words = shlex.split(example)
        assert words[:1] == ["tpctl"], example
        if "RUN" in example:
            continue  # needs the run directory of a bring-up
        if "init" in words and "--force" not in words:
            (tmp_path / words[-1]).unlink(missing_ok=True)
        result = cli(*words[1:])
        assert result.exit_code == 0, (example, result.stderr)
        ran += 1
    assert ran


def test_bringup_examples_parse(cli):
    for example in _examples(["bringup"], cli):
        words = [word for word in shlex.split(example)[1:] if word not in ("--baseline", "runs/LAST")]
        assert cli(*words, "--list").exit_code == 0, example


def test_up_examples_parse(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / "st"))
    for example in _examples(["up"], cli):
        words = [word for word in shlex.split(example)[1:] if word != "--dry-run"]
        assert cli(*words, "--dry-run").exit_code == 0, example


def test_ps_examples_run_and_those_of_other_job_commands_name_a_job(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / "st"))
    for example in [*_examples(["ps"], cli), *_examples(["top"], cli)]:
        assert cli(*shlex.split(example)[1:]).exit_code == (7 if "JOB" in example else 0), example
    for command in (
        *("status", "metrics", "wait", "prompt", "cut", "set", "drain", "abort", "restart", "timeline", "logs"),
    ):
        for example in _examples([command], cli):
            code = 7 if "JOB" in example or "RUN" in example else 0  # parsed, and there is no job JOB
            assert cli(*shlex.split(example)[1:]).exit_code == code, example


@pytest.mark.parametrize("args", [["env"], ["config", "show"], ["config", "check"], ["help", "exit-codes"], ["schema"]])
def test_yaml_says_what_json_says(args, cli):
    as_json = validated(cli(*args, "-o", "json").stdout)
    assert yaml.safe_load(cli(*args, "-o", "yaml").stdout) == as_json


def test_jsonl_ends_with_the_envelope(cli):
    lines = cli("parity-check", "-o", "jsonl").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["kind"] for row in rows] == ["row"] * (len(rows) - 1) + ["envelope"]
    assert len(rows) - 1 == len(rows[-1]["data"]["rows"])


def test_quiet_silences_talk_but_not_errors(cli, tmp_path):
    assert "saved" in cli("env", "--save", "a.toml").stderr
    assert cli("env", "-q", "--save", "b.toml").stderr == ""
    assert "TP-1008" in cli("config", "check", "-q", "--set", "run.chunk=3").stderr


def test_a_bug_has_its_own_exit_code_and_no_traceback(cli, monkeypatch):
    from tpctl import snapshot

    def broken(*args: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(snapshot, "take", broken)
    plain = cli("env", "-o", "json")
    assert plain.exit_code == 1
    assert "Traceback" not in plain.stderr
    assert "--debug" in plain.stderr
    assert validated(plain.stdout)["data"]["error"]["code"] == "TP-7000"
    assert "Traceback" in cli("env", "--debug").stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tpctl drill OM-21.m", {"OM-21.magic", "OM-21.meta"}),
        ("tpctl status ni", {"night", "nine"}),
        ("tpctl drain nig", {"night"}),
        ("tpctl bringup --case pp0-r1", {"pp0-r1"}),
        ("tpctl schema drill", {"drill", "drill-list"}),
        ("tpctl config check --set plan.t", {"plan.tp=", "plan.tp_plan="}),
        ("tpctl tri", {"triage"}),
    ],
)
def test_a_shell_completes_ids_without_torch(typed, offered, tmp_path):
    for name in ("night", "nine", "other"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    environ = os.environ | {
        "_TPCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
        "TPCTL_STATE_DIR": str(tmp_path),
    }
    program = "import sys; sys.modules['torch'] = None; from tpctl.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("words", [["schema", "bringup"], ["status", "no-such-job", "-o", "json"]])
def test_a_reader_that_leaves_gets_no_traceback(words, tmp_path):
    """`tpctl ... | head`: the pipe is closed before all is written, of an answer or of an error."""
    reading, writing = os.pipe()
    os.close(reading)
    environ = os.environ | {"TPCTL_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tpctl", *words],
        env=environ,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1
