"""All checklists and runbooks for real; and for each item, what its drill breaks turns it red.

One run of all checklists serves the whole module: the drills that it ran are the evidence, here and for the runbooks.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from engine.config import EngineConfig, from_dict
from tests.cli.conftest import validated
from tpctl.app import app
from tpctl.books import record
from tpctl.books.cause import CAUSED, FULL, Causes
from tpctl.books.checklist import Item, load_all
from tpctl.books.execute import BRINGUP, CASES, Commands, Ran
from tpctl.books.perform import judge as judge_block
from tpctl.books.rehearse import OUTPUT, given
from tpctl.books.runbook import ANY, Block, Runbook
from tpctl.books.runbook import load_all as load_runbooks
from tpctl.books.walk import judge as judge_item
from tpctl.commands.drill import envelope_of
from tpctl.drill import table
from tpctl.drill.judge import Result, judge
from tpctl.drill.ranks import Nursery
from tpctl.drill.runner import DrillRunner
from tpctl.exitcodes import for_verdict
from tpctl.failuremodes import LINK_LOST
from tpctl.matrix.cases import builtin
from tpctl.matrix.gates import evaluate
from tpctl.matrix.metrics import metrics
from tpctl.matrix.observation import Observation
from tpctl.matrix.runner import make_assets
from tpctl.output import plain
from tpctl.reports import read_reports
from tpctl.schemas import load_schema
from tpctl.verdict import Verdict

pytestmark = pytest.mark.timeout(600)
DRILLS = {drill.id: drill for drill in table.load()}
ITEMS = [(one.id, item) for one in load_all() for item in one.items]
COMMAND_S = 60.0
# Guard-off runs that hang only wait: so many of them at a time. Each nursery costs its imports.
NURSERIES = 2
TIMES = {"first failure", "all gone"}


@dataclass(frozen=True)
class Done:
    """`tpctl checklist run --all`: its answer, and where it wrote its records and ran its drills."""

    answer: dict[str, Any]
    directory: Path
    environment: dict[str, str]

    @property
    def drills(self) -> Path:
        return self.directory / "drills"


@pytest.fixture(scope="module")
def base(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    config = from_dict({"model": {"cache_dir": str(weights_cache)}})
    make_assets(config, tmp_path_factory.mktemp("assets"))
    return config


@dataclass(frozen=True)
class Grounds:
    """All that is judged here."""

    done: Done
    unguarded: dict[str, Result]
    rehearsed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def grounds(base: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> Grounds:
    """Made side by side where most of it waits; but the checklists' bring-up, which measures, has the host to itself:
    the causes are there long before the drills that come before it.
    """
    root = tmp_path_factory.mktemp("books")
    with ThreadPoolExecutor() as pool:
        walked = pool.submit(walk_all, root, base)
        for n, names in enumerate((FULL, CAUSED - set(FULL))):
            Causes(root / f"caused{n}").cause(names, base)
        done = walked.result()
    for made in list(root.glob("caused*/*/ranks")):
        made.parent.rename(done.drills / made.parent.name)
    with ThreadPoolExecutor() as pool:
        rehearsed = pool.submit(rehearse_all, done)
        shares = [pool.submit(run_unguarded, base, root / str(share), share) for share in range(NURSERIES)]
        results = {name: result for share in shares for name, result in share.result().items()}
        return Grounds(done, results, rehearsed.result())


@pytest.fixture(scope="module")
def done(grounds: Grounds) -> Done:
    return grounds.done


@pytest.fixture(scope="module")
def unguarded(grounds: Grounds) -> dict[str, Result]:
    assert {name for name, result in grounds.unguarded.items() if result.verdict is not Verdict.PASS} == set()
    return grounds.unguarded


def walk_all(root: Path, base: EngineConfig) -> Done:
    environment = {"TPCTL_MODEL_CACHE_DIR": base.model.cache_dir, "XDG_CONFIG_HOME": str(root / "xdg")}
    line = [sys.executable, "-m", "tpctl", "checklist", "run", "--all", "--yes", "--record", str(root / "record")]
    ran = subprocess.run(
        [*line, "-o", "json"],
        cwd=root,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.stdout, ran.stderr[-3000:]
    return Done(validated(ran.stdout), root / "record", environment)


def rehearse_all(done: Done) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tpctl", "runbook", "test", "--drills", str(done.drills), "-o", "json"]
    return subprocess.run(
        line,
        cwd=done.directory,
        env={**os.environ, **done.environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


def run_unguarded(base: EngineConfig, root: Path, share: int) -> dict[str, Result]:
    """A share of the drills that items name and look at, or compare with, each with its guard off."""
    names = {
        item.drill
        for _, item in ITEMS
        if item.drill in DRILLS and (item.argv[1] == "kv-audit" or "{" not in item.command)
    }
    # Longest first: a hang is a hang after the runner's own deadline.
    ordered = sorted(names, key=lambda name: (DRILLS[name].proof != "hang", name))
    root.mkdir()
    with Nursery(root / "nursery.log") as nursery:
        runner = DrillRunner(nursery, base, root)
        return {name: runner.run(DRILLS[name], without_guard=True) for name in ordered[share::NURSERIES]}


def test_all_checklists_pass(done: Done) -> None:
    """A time that a drill took on a crowded machine is no reason to fail here: the drills' own gates look at it."""
    assert len(done.answer["data"]["checklists"]) == 12
    bad = []
    for one in done.answer["data"]["checklists"]:
        for item in one["items"]:
            path = done.directory / one["id"] / f"{item['id']}.stdout"
            stdout = path.read_text() if path.exists() else ""
            if item["verdict"] != "PASS" and not only_late(stdout):
                bad.append((one["id"], item["id"], item["message"]))
    assert bad == []


def only_late(stdout: str) -> bool:
    rows = json.loads(stdout)["data"].get("drills", []) if stdout else []
    failed = {finding["id"] for row in rows for finding in row["findings"] if finding["verdict"] == "FAIL"}
    return bool(failed) and failed <= TIMES


def test_the_records_are_sealed_and_name_who_ran_them(done: Done) -> None:
    for one in done.answer["data"]["checklists"]:
        data = record.read(Path(one["record"]))
        assert record.broken(data) is None
        jsonschema.Draft202012Validator(load_schema("checklist-record")).validate(data)
        assert data["sha256"] == one["sha256"]
        assert data["who"]["uid"] == os.geteuid()
        assert len(data["item"]) == len(one["items"])
        for item in data["item"]:
            stdout = (done.directory / one["id"] / f"{item['id']}.stdout").read_bytes()
            assert item["stdout_sha256"] == record.digest(stdout)


def test_the_standard_drills_answer_for_all_four_and_for_one_hang(done: Done) -> None:
    rows = validated(stdout_of(done, "tpctl drill standard -o json"))["data"]["drills"]
    assert {row["id"].split(".")[0] for row in rows} == set(table.STANDARD)
    assert [(row["id"], row["ended_by"]) for row in rows if row["ended_by"]] == [(table.STANDARD_PROOF, "hang")]


@pytest.mark.parametrize(("name", "item"), ITEMS, ids=[f"{name}-{item.id}" for name, item in ITEMS])
def test_its_drill_turns_an_item_red(
    name: str, item: Item, done: Done, unguarded: dict[str, Result], tmp_path: Path
) -> None:
    if item.drill.startswith("--"):
        ran = Commands(environment=done.environment, cwd=tmp_path).run(f"{item.command} {item.drill}", COMMAND_S)
    elif item.command == BRINGUP:
        ran = planted_case(item, done, unguarded)
    elif "{" in item.command:
        # The digest stops a job before its records part: what an audit finds later is seen with the digest off.
        audit = item.argv[1] == "kv-audit"
        broken = str(unguarded[item.drill].seen.run_dir if audit else done.drills / item.drill)
        assert Path(broken).is_dir(), "the drill whose run is judged must be one that the checklists run, or a cause"
        ran = Commands({"run": broken, "pp": broken}, environment=done.environment, cwd=tmp_path).run(
            item.command, COMMAND_S
        )
    else:
        ran = rejudged(item, unguarded[item.drill])
    assert not ran.late
    assert judge_item(item, ran).verdict is Verdict.FAIL, (ran.command, ran.code, ran.stdout[:500])


def rejudged(item: Item, proof: Result) -> Ran:
    """What the item's command answers where its guard does not work."""
    envelope = envelope_of([Result(proof.seen, judge(proof.seen).findings)], proof.seen.run_dir, False)
    return Ran(item.command, int(for_verdict(envelope.verdict)), json.dumps(envelope.to_dict()), "", 0.0)


def planted_case(item: Item, done: Done, unguarded: dict[str, Result]) -> Ran:
    """The bring-up's answer, where one case left what the drill left."""
    answer = json.loads(stdout_of(done, BRINGUP))
    wanted = next((step for step in (item.expect.path or "").split("/") if step.startswith("id=")), "id=v1.1c-tp2")
    row = next(row for row in answer["data"]["cases"] if row["id"] == wanted.removeprefix("id="))
    seen = planted(item.drill, row, done.drills, unguarded)
    assert seen.reports, "what was planted must have left something to judge"
    findings = [evaluate(finding["id"], seen) for finding in row["findings"] if finding["id"] in gates_of(row)]
    row["findings"] = [plain(finding.to_dict()) for finding in findings]
    row["metrics"] = plain(metrics(seen, findings))
    answer["verdict"] = "FAIL" if any(finding.verdict is Verdict.FAIL for finding in findings) else "PASS"
    return Ran(item.command, 0, json.dumps(answer), "", 0.0)


def gates_of(row: dict[str, Any]) -> set[str]:
    return set(builtin(2).select([row["id"]]).cases[-1].gates)


def planted(drill: str, row: dict[str, Any], drills: Path, unguarded: dict[str, Result]) -> Observation:
    case = builtin(2).select([row["id"]]).cases[-1]
    if drill in CAUSED:
        caused = drills / drill
        return Observation(case, caused, reports=read_reports(caused))
    seen = unguarded[drill].seen
    case = replace(case, chunks=4, reference="clean")
    clean = Observation(case, seen.clean) if seen.clean is not None else None
    return Observation(case, seen.run_dir, reports=read_reports(seen.run_dir), reference=clean)


def stdout_of(done: Done, command: str) -> str:
    for path in done.directory.glob("*.toml"):
        for item in tomllib.loads(path.read_text())["item"]:
            if item["command"] == command:
                return (done.directory / path.stem / f"{item['id']}.stdout").read_text()
    raise AssertionError(f"no item ran {command}")


DIAGNOSES = [
    (one, block)
    for one in load_runbooks()
    if one.causes
    for block in one.blocks
    if block.section == "Diagnosis" and block.expect.path
]


@pytest.mark.parametrize(("one", "block"), DIAGNOSES, ids=[f"{one.id}-{block.name}" for one, block in DIAGNOSES])
@pytest.mark.parametrize("placeholder", ["run", "pp"])
def test_of_a_healthy_run_a_diagnosis_says_nothing_of_the_kind(
    placeholder: str, one: Runbook, block: Block, done: Done
) -> None:
    """What a page shows of the failure that was caused, it does not show of a run that is well."""
    bringup = json.loads(stdout_of(done, BRINGUP))["data"]["run_dir"]
    healthy = done.directory.parent / bringup / CASES[placeholder]
    commands = Commands(given(None, healthy))
    ran = here(f"{OUTPUT.sub('', commands.fill(block.command, COMMAND_S))} -o json")
    assert ran.document is not None, ran.stderr
    shows = replace(block, expect=replace(block.expect, exit=ANY))
    assert judge_block(one.id, shows, ran, as_json=True).verdict is Verdict.FAIL, ran.stdout[:500]


def here(line: str) -> Ran:
    """A command's answer, in this process: for those that load no torch."""
    ran = CliRunner().invoke(app, shlex.split(line)[1:], prog_name="tpctl")
    return Ran(line, ran.exit_code, ran.stdout, ran.stderr, 0.0)


def test_all_runbooks_rehearse(grounds: Grounds) -> None:
    """Every block; and each diagnosis points to the failure that was really caused."""
    ran = grounds.rehearsed
    answer = validated(ran.stdout)
    bad = [row for row in answer["data"]["blocks"] if row["verdict"] not in ("PASS", "SKIP")]
    assert bad == [], ran.stderr[-3000:]
    shown = {row["runbook"] for row in answer["data"]["blocks"] if row["block"] == "who" and row["verdict"] == "PASS"}
    needed = {one.id for one in load_runbooks() if one.causes and one.id != LINK_LOST}  # no links without namespaces
    assert shown - {LINK_LOST} == needed
