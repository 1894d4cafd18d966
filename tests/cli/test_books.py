"""`tpctl checklist`, `runbook` and `crosswalk` at the command line, and in a built wheel."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cli.conftest import validated
from tpctl.books import checklist
from tpctl.books.crosswalk import load
from tpctl.books.execute import Commands, execute
from tpctl.books.place import BookError
from tpctl.books.walk import keep, walk
from tpctl.drill import table
from tpctl.verdict import Verdict

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "args",
    [
        ["checklist", "list"],
        ["checklist", "show", "p0"],
        ["runbook", "list"],
        ["runbook", "show", "rank-lost"],
        ["runbook", "show", "cards/groups"],
        ["crosswalk"],
        ["crosswalk", "break-it"],
        ["crosswalk", "-o", "wide"],
    ],
)
def test_what_only_reads_answers_by_its_schema_and_fits_80_columns(args, cli):
    if "-o" not in args:
        assert validated(cli(*args, "-o", "json").stdout)["verdict"] == "PASS"
    shown = cli(*args)
    assert shown.exit_code == 0
    fits = [
        line for line in shown.stdout.splitlines() if len(line) > 80 and not line.startswith(("```", "tpctl ", "  $"))
    ]
    assert (args[0] == "runbook" and args[1] == "list") or fits == []


@pytest.mark.parametrize(
    "command", [["checklist", "list"], ["checklist", "show"], ["runbook", "list"], ["runbook", "show"], ["crosswalk"]]
)
def test_examples_run(command, cli):
    _, found, tail = cli(*command, "--help").stdout.partition("Examples:")
    assert found
    for example in tail.split("|"):
        assert cli(*shlex.split(" ".join(example.split()))[1:]).exit_code == 0, example


@pytest.mark.parametrize(
    "command", [["checklist", "run"], ["checklist", "verify"], ["runbook", "run"], ["runbook", "test"]]
)
def test_examples_that_run_the_engine_parse(command, cli):
    _, found, tail = cli(*command, "--help").stdout.partition("Examples:")
    assert found
    for example in tail.split("|"):
        words = shlex.split(" ".join(example.split()))[1:]
        assert cli(*words, "--help").exit_code == 0, example


def test_names_that_do_not_exist_are_usage_errors(cli):
    for args in (["checklist", "show", "p1"], ["runbook", "show", "x"], ["crosswalk", "p1"], ["checklist", "run"]):
        wrong = cli(*args)
        assert wrong.exit_code == 2, args
        assert "TP-810" in wrong.stderr
    assert cli("runbook", "run", "rank-lost", "--section", "Nothing").exit_code == 2


def test_the_standard_drills_are_the_four_of_the_crosswalk(cli):
    rows = validated(cli("drill", "standard", "--list", "-o", "json").stdout)["data"]["drills"]
    named = {row["id"].split(".")[0] for row in rows}
    assert (
        named == set(table.STANDARD) == {drill for row in load() if row.section == "break-it" for drill in row.drills}
    )
    assert table.STANDARD_PROOF in [row["id"] for row in rows if row["proof"] == "hang"]


def test_a_person_is_asked_or_says_yes_before(cli):
    refused = cli("checklist", "run", "p0")
    assert refused.exit_code == 2
    assert "TP-8109" in refused.stderr
    assert "--yes" in refused.stderr


def one_item(
    command: str, path: str | None = None, value: object = None, budget_s: float = 60.0
) -> checklist.Checklist:
    """A checklist of five items with the same command."""
    text = checklist.load("deadlocks").text.decode()
    data = tomllib.loads(text)
    one = checklist.parse("deadlocks", text.encode())
    item = checklist.Item(
        **{
            **{key: data["item"][0][key] for key in ("id", "text", "why", "tripwire", "drill", "on_fail")},
            "command": command,
            "expect": checklist.Expect(path=path, value=value),
        }
    )
    items = tuple(checklist.Item(**{**vars(item), "id": f"item-{n}"}) for n in range(5))
    return checklist.Checklist(**{**vars(one), "items": items, "budget_s": budget_s})


def test_an_answer_is_asked_for_once_and_its_record_holds(cli, tmp_path):
    walked = walk(one_item("tpctl config check -o json", "/verdict", "PASS"), commands := Commands())
    assert walked.verdict is Verdict.PASS
    assert len(commands.done) == 1
    path, sealed = keep(walked, tmp_path / "record") if (tmp_path / "record").mkdir() is None else (None, None)
    good = cli("checklist", "verify", str(path), "--sha256", sealed["sha256"], "-o", "json")
    assert (good.exit_code, validated(good.stdout)["data"]["whole"]) == (0, True)
    path.write_text(path.read_text().replace('verdict = "PASS"', 'verdict = "FAIL"', 1))
    bad = cli("checklist", "verify", str(path), "-o", "json")
    assert (bad.exit_code, validated(bad.stdout)["verdict"]) == (3, "FAIL")
    other = cli("checklist", "verify", str(path), "--sha256", "0" * 64)
    assert other.exit_code == 3


def test_who_does_not_confirm_makes_an_item_red():
    one = one_item("tpctl config check -o json", "/verdict", "PASS")
    asked = []
    walked = walk(one, Commands(), confirm=lambda item, answer: asked.append(item.id) or item.id != "item-3")
    assert len(asked) == 5
    assert [answer.verdict for answer in walked.answers].count(Verdict.FAIL) == 1
    assert walked.answers[3].message == "not confirmed"
    assert walked.answers[3].to_dict()["confirmed"] is False


def test_a_spent_budget_leaves_items_unchecked_and_never_passes():
    walked = walk(one_item("tpctl config check -o json", "/verdict", "PASS", budget_s=1e-6), Commands())
    assert {answer.verdict for answer in walked.answers} <= {Verdict.UNCHECKED, Verdict.UNKNOWN}
    assert walked.verdict is not Verdict.PASS
    assert walked.coverage.checked == 0


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    """The deadline is the only thing that ends it; what it started goes with it."""
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ran = execute([sys.executable, "-c", parent], 6.0, {}, None)
    assert ran.late
    try:
        child_fd = os.pidfd_open(int(pid_file.read_text()))
    except ProcessLookupError:
        return  # gone already
    try:
        assert select.select([child_fd], [], [], 20)[0], "the grandchild lives on"
    finally:
        os.close(child_fd)


def test_a_program_that_is_not_there_answers_127():
    assert execute(["no-such-program-here"], 5.0, {}, None).code == 127


def test_a_scratch_directory_is_new_each_time_and_gone_afterwards():
    commands = Commands()
    made = [Path(shlex.split(commands.fill("tpctl bundle JOB --out {scratch}/b.tar.gz", 5.0))[-1]) for _ in range(2)]
    assert made[0] != made[1]
    assert all(path.parent.is_dir() and not path.exists() for path in made)
    del commands
    assert not any(path.parent.exists() for path in made)


def test_a_placeholder_that_nobody_gave_is_named():
    with pytest.raises(BookError, match=r"needs a value for \{job\}"):
        Commands().run("tpctl status {job}", 5.0)


def test_a_runbook_runs_block_by_block_and_changes_nothing_unasked(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / "st"))
    done = cli("runbook", "run", "parity-mismatch", "--job", "x", "--section", "Mitigation", "-o", "json")
    assert done.exit_code == 7  # there is no such job
    done = cli(
        "runbook", "run", "parity-mismatch", "--section", "Mitigation", "--section", "Diagnosis", "-q", "-o", "json"
    )
    rows = {row["block"]: row for row in validated(done.stdout)["data"]["blocks"]}
    assert rows["origin"]["verdict"] == rows["launch"]["verdict"] == "PASS"
    assert rows["keys"]["verdict"] == "UNCHECKED"  # nobody said which run
    assert rows["again"]["verdict"] == "UNCHECKED"
    assert done.exit_code == 5
    (tmp_path / "config.toml").write_text("")
    changing = cli("runbook", "run", "drift", "--block", "cut", "--run", str(tmp_path), "-q", "-o", "json")
    assert validated(changing.stdout)["data"]["blocks"][0]["verdict"] == "UNCHECKED"


@pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="this setuptools reads no such pyproject.toml"
)
def test_a_wheel_holds_checklists_and_runbooks_and_finds_them(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tpctl", "engine", "checklists", "runbooks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            str(tmp_path),
            ".",
        ],
        cwd=source,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import tpctl.app as t; print(t.__file__, file=sys.stderr); "
    )
    code += "t.main()"
    for args, key, number in (
        (["checklist", "list"], "checklists", 12),
        (["runbook", "list"], "runbooks", 20),
        (["crosswalk"], "rows", 37),
    ):
        ran = subprocess.run(
            [sys.executable, "-I", "-c", code, str(tmp_path / "site"), *args, "-o", "json"],
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert str(tmp_path / "site") in ran.stderr, ran.stderr
        assert len(json.loads(ran.stdout)["data"][key]) == number
