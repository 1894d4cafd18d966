"""A handful of drills for real, with and without their guard; the rest is what `tpctl drill` runs."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from engine import faults
from engine.config import EngineConfig, from_dict
from engine.errors import ConfigError
from tests.cli.conftest import cli, validated
from tpctl.drill import table, twohosts
from tpctl.drill.judge import Result, judge
from tpctl.drill.ranks import Nursery
from tpctl.drill.runner import DrillRunner
from tpctl.matrix.runner import make_assets
from tpctl.schemas import load_schema
from tpctl.verdict import Verdict

assert cli
DRILLS = {drill.id: drill for drill in table.load()}
ENGINE = Path(faults.__file__).parent


@pytest.fixture(scope="module")
def base(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    config = from_dict({"model": {"cache_dir": str(weights_cache)}})
    make_assets(config, tmp_path_factory.mktemp("assets"))
    return config


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery") / "nursery.log") as nursery:
        yield nursery


def unhurried(drill: table.Drill) -> table.Drill:
    """The same demands, on a machine that has other things to do too."""
    within_ms, gone_ms = max(drill.within_ms, 3000), max(drill.gone_ms, 6000)
    return dataclasses.replace(drill, within_ms=within_ms, gone_ms=gone_ms)


def explain(result: Result) -> str:
    return "\n".join(f"{finding.id}: {finding.message}; wanted {finding.limit}" for finding in result.findings)


@pytest.mark.parametrize(
    "name",
    [
        "OM-01",
        "OM-03.worker",
        "OM-05",
        "OM-06",
        "OM-11",
        "OM-11.middle",
        "OM-13.header",
        "OM-15.phase-b",
        "OM-18.back",
        "C-02",
        "C-03.middle",
        "OM-28",
    ],
)
def test_drill(name: str, nursery: Nursery, base: EngineConfig, tmp_path: Path) -> None:
    result = DrillRunner(nursery, base, tmp_path).run(DRILLS[name])
    assert result.verdict is Verdict.PASS, explain(result)


@pytest.mark.parametrize(("name", "kind"), [("OM-14.last", "lost"), ("OM-11", "ended"), ("OM-15.lock", "late")])
def test_the_referees_record_answers_by_its_schema(
    name: str, kind: str, nursery: Nursery, base: EngineConfig, tmp_path: Path
) -> None:
    result = DrillRunner(nursery, base, tmp_path).run(DRILLS[name])
    record = json.loads((tmp_path / name / "referee.json").read_text())
    jsonschema.Draft202012Validator(load_schema("referee")).validate(record)
    assert record["verdict"]["kind"] == kind
    assert result.verdict is Verdict.PASS, explain(result)


@pytest.mark.parametrize("name", ["OM-12", "OM-18.back", "OM-19", "OM-20", "OM-26", "OM-28", "C-02"])
def test_without_its_guard_a_drill_fails(name: str, nursery: Nursery, base: EngineConfig, tmp_path: Path) -> None:
    result = DrillRunner(nursery, base, tmp_path).run(DRILLS[name], without_guard=True)
    assert result.verdict is Verdict.PASS, explain(result)


def test_a_stale_result_that_is_emitted_does_not_pass(nursery: Nursery, base: EngineConfig, tmp_path: Path) -> None:
    """OM-09 without its guard ends as if nothing had been; every demand on what was emitted tells the difference."""
    result = DrillRunner(nursery, base, tmp_path).run(DRILLS["OM-09"], without_guard=True)
    assert result.verdict is Verdict.PASS, explain(result)
    assert result.to_dict()["ended_by"] == "silent"
    failed = {finding.id for finding in judge(result.seen).findings if finding.verdict is Verdict.FAIL}
    assert failed == {"recorded", "emitted", "pixels"}


def test_a_fault_needs_a_rank_that_holds_what_it_breaks(nursery: Nursery, base: EngineConfig, tmp_path: Path) -> None:
    wrong = dataclasses.replace(DRILLS["OM-14.pp-leader"], victim_rank=0)
    result = DrillRunner(nursery, base, tmp_path).run(wrong)
    assert result.verdict is Verdict.FAIL
    assert result.seen.ended.codes[0] == 77
    assert "breaks a generator, and rank 0 has none" in result.to_dict()["reason"]


def test_a_wrong_expectation_is_not_passed(nursery: Nursery, base: EngineConfig, tmp_path: Path) -> None:
    """The judge itself can fail: other code, other words, the wrong rank blamed."""
    wrong = dataclasses.replace(DRILLS["OM-06"], code=("TP-0000",), says=("never said",), victim_rank=0, victim=(0,))
    result = DrillRunner(nursery, base, tmp_path).run(wrong)
    failed = {finding.id for finding in result.findings if finding.verdict is Verdict.FAIL}
    assert {"exit code", "reason", "words"} <= failed


def test_every_fault_has_a_drill_and_a_way_to_lose_its_guard() -> None:
    planted = {drill.fault for drill in DRILLS.values() if drill.hosts == 1}
    assert planted == set(faults.FAULTS) == set(faults.UNGUARD)


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda path: str(path.relative_to(ENGINE)))
def test_only_comm_calls_the_backend(path: Path) -> None:
    """OM-06's static half: no collective outside the group wrapper's room."""
    if path.relative_to(ENGINE).parts[0] == "comm":
        return
    assert not list(backend_uses(path.read_text(encoding="utf-8")))


def backend_uses(source: str) -> Iterator[str]:
    """Imports and calls of torch.distributed, beyond its exception types and the launcher's module name in text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch.distributed"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name.startswith("torch.distributed"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("torch.distributed.", "dist(")):
            yield ast.unparse(node.func)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import broadcast",
        "import torch\ntorch.distributed.broadcast(x, 0)",
        "from engine.comm.group import dist\ndist().broadcast(x, 0)",
    ],
)
def test_the_static_check_finds_an_ad_hoc_collective(source: str) -> None:
    assert list(backend_uses(source))


def test_a_guard_is_off_in_drills_only() -> None:
    with pytest.raises(ConfigError, match=r"drill\.id names no drill"):
        from_dict({"drill": {"without_guard": True}})
    with pytest.raises(ConfigError, match="there is no drill 'OM-99'"):
        faults.differ(from_dict({"drill": {"id": "OM-99"}}), 0)
    assert faults.differ(EngineConfig(), 0) == EngineConfig()


def test_only_the_victim_differs() -> None:
    config = from_dict({"plan": {"tp": 2}, "drill": {"id": "OM-04", "victim_rank": 1, "differs": "run.chunks=9"}})
    assert faults.differ(config, 0) == config
    assert faults.differ(config, 1).run.chunks == 9


def test_list_and_selection(cli) -> None:
    listed = validated(cli("drill", "--list", "-o", "json").stdout)["data"]["drills"]
    assert [row["id"] for row in listed] == list(DRILLS)
    variants = validated(cli("drill", "OM-21", "--list", "-o", "json").stdout)["data"]["drills"]
    assert {row["id"].split(".")[0] for row in variants} == {"OM-21"}
    assert len(variants) > 5
    wrong = cli("drill", "OM-12x", "--list")
    assert wrong.exit_code == 2
    assert "did you mean 'OM-12'" in wrong.stderr


def test_a_drill_answers_by_its_schema(cli, base: EngineConfig) -> None:
    done = cli("drill", "OM-17", "-q", "-o", "json", "--set", f"model.cache_dir={base.model.cache_dir}")
    data = validated(done.stdout)
    assert done.exit_code == 0
    row = data["data"]["drills"][0]
    assert (row["first_rank"], row["code"], row["leftovers"]) == (1, "TP-6001", [])
    assert row["first_failure_ms"] <= 1000


def test_a_cut_link_ends_both_hosts_and_is_named_by_both(nursery: Nursery, base: EngineConfig, tmp_path: Path) -> None:
    """Skipped with its reason where there are no network namespaces; without guard and referee the job lives on."""
    result = DrillRunner(nursery, base, tmp_path).run(DRILLS["OM-27"])
    if twohosts.why_not() is not None:
        assert result.verdict is Verdict.SKIP
        pytest.skip(result.findings[0].message)
    assert result.verdict is Verdict.PASS, explain(result)
    assert all("the link is lost" in twohosts.record_of(tmp_path / "OM-27", n)["verdict"]["message"] for n in (0, 1))
    assert result.to_dict()["fm"] == "FM-40"


@pytest.mark.skipif(twohosts.why_not() is not None, reason="no network namespaces")
def test_launchers_leave_without_each_other_where_the_link_stays_cut(
    nursery: Nursery, base: EngineConfig, tmp_path: Path
) -> None:
    """torch's own launcher would wait a minute for the store of the other host."""
    config, _ = DrillRunner(nursery, base, tmp_path).write_config(DRILLS["OM-27"], tmp_path / "cut", broken=False)
    over = twohosts.run(tmp_path / "cut", config, 20.0, at_chunk=2, guarded=True, heal=False)
    assert not over.ended.timed_out
    assert all(outcome["returncode"] and not outcome["immortal"] for outcome in over.outcomes.values())
    assert "the link is lost, or that host" in (tmp_path / "cut" / "host1" / "launcher.log").read_text()


def test_no_namespaces_is_a_skip_that_says_why(
    nursery: Nursery, base: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = DrillRunner(nursery, base, tmp_path).run(DRILLS["OM-27"])
    assert result.verdict is Verdict.SKIP
    assert "unshare and ip not installed" in result.findings[0].message
