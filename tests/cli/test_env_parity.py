"""`tpctl env` and `tpctl parity-check`: snapshots, foreign files, and who differs in what."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import tomli_w

from tests.cli.conftest import validated
from tpctl import snapshot
from tpctl.commands.schema import load_schema
from tpctl.paritytable import compare, findings, judge, severity_of
from tpctl.verdict import Verdict


@pytest.fixture
def taken(cli, tmp_path) -> dict:
    assert cli("env", "--save", "here.toml").exit_code == 0
    return snapshot.read(tmp_path / "here.toml")


def put(path: Path, base: dict, name: str, **changes: object) -> str:
    data = copy.deepcopy(base)
    data["host"]["name"] = name
    for dotted, value in changes.items():
        section, key = dotted.split("__", 1)
        data[section][key] = value
    path.write_text(tomli_w.dumps(data))
    return str(path)


def test_snapshot_file_follows_its_schema(taken):
    jsonschema.Draft202012Validator(load_schema("snapshot")).validate(taken)
    assert taken["versions"]["torch"] != "not installed"
    assert len(taken["code"]["engine_sha256"]) == 64


def test_environment_is_by_allow_list(cli):
    secrets = {"AWS_SECRET_ACCESS_KEY": "s3cret", "TPCTL_TOKEN": "s3cret"}
    result = cli("env", "-o", "json", env=secrets | {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO"})
    assert "s3cret" not in result.stdout
    data = validated(result.stdout)["data"]
    assert data["environment"]["NCCL_DEBUG"] == "INFO"
    assert data["threads"]["omp"] == "3"


def test_a_bad_configuration_is_recorded_not_fatal(cli):
    result = cli("env", "-o", "json", "--set", "plan.tp=3")
    data = validated(result.stdout)
    assert result.exit_code == 0
    assert data["verdict"] == "WARN"
    assert data["data"]["config_error"]["code"] == "TP-1103"


def test_unwritable_snapshot(cli):
    result = cli("env", "--save", "no/such/dir.toml")
    assert result.exit_code == 2
    assert "no/such/dir.toml" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("schema = 'other'\n", "TP-7204"),
        ("a = 1\n", "TP-7204"),
        ("schema = 'tpctl.snapshot'\nschema_version = 99\n", "TP-7205"),
        ("schema = 'tpctl.snapshot'\nschema_version = 'x'\n", "TP-7204"),
        ("not toml", "TP-7203"),
    ],
)
def test_foreign_snapshots(cli, tmp_path, taken, text, code):
    (tmp_path / "bad.toml").write_text(text)
    result = cli("parity-check", "here.toml", "bad.toml")
    assert result.exit_code == 2
    assert code in result.stderr
    assert "TP-7202" in cli("parity-check", "none.toml", "here.toml").stderr


def test_equal_hosts_pass_with_full_coverage(cli, tmp_path, taken):
    a, b = put(tmp_path / "a.toml", taken, "a"), put(tmp_path / "b.toml", taken, "b")
    result = cli("parity-check", a, b, "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 0
    assert data["verdict"] == "PASS"
    assert data["coverage"]["checked"] == data["coverage"]["expected"] > 100


def test_a_must_difference_fails_and_names_the_minority(cli, tmp_path, taken):
    paths = [put(tmp_path / f"{n}.toml", taken, n) for n in "ab"]
    paths.append(put(tmp_path / "c.toml", taken, "c", versions__torch="1.0", host__kernel="Linux 0"))
    result = cli("parity-check", *paths, "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 3
    bad = {finding["id"]: finding for finding in data["findings"]}
    assert set(bad) == {"parity.versions.torch", "parity.host.kernel"}
    assert "differs: c" in bad["parity.versions.torch"]["message"]
    assert bad["parity.versions.torch"]["verdict"] == "FAIL"
    assert bad["parity.host.kernel"]["verdict"] == "WARN"
    table = cli("parity-check", *paths).stdout
    assert "versions.torch" in table
    assert "versions.numpy" not in table
    assert "versions.numpy" in cli("parity-check", *paths, "-o", "wide").stdout


def test_two_hosts_name_the_difference_not_a_culprit(cli, tmp_path, taken):
    a = put(tmp_path / "a.toml", taken, "a")
    b = put(tmp_path / "b.toml", taken, "b", versions__torch="1.0")
    row = next(
        row
        for row in validated(cli("parity-check", a, b, "-o", "json").stdout)["data"]["rows"]
        if row["key"] == "versions.torch"
    )
    assert row["majority"] is None
    assert row["minority"] == []


def test_should_differences_warn_and_strict_makes_them_count(cli, tmp_path, taken):
    a = put(tmp_path / "a.toml", taken, "a")
    b = put(tmp_path / "b.toml", taken, "b", host__cpu="other")
    assert cli("parity-check", a, b).exit_code == 0
    assert cli("parity-check", a, b, "--strict").exit_code == 4


def test_a_missing_value_is_unknown_not_equal(cli, tmp_path, taken):
    del taken["versions"]["numpy"]
    a = put(tmp_path / "a.toml", taken, "a")
    result = cli("parity-check", a, "here.toml", "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 5
    assert data["verdict"] == "UNKNOWN"
    assert data["coverage"]["checked"] < data["coverage"]["expected"]


def test_one_snapshot_is_incomplete(cli, taken):
    assert cli("parity-check", "here.toml").exit_code == 5


def test_launch_probes_real_processes(cli):
    result = cli("parity-check", "--set", "plan.tp=2", "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert data["data"]["sources"] == ["rank0", "rank1"]
    keys = {row["key"] for row in data["data"]["rows"]}
    assert {"config.parity_key", "code.engine_sha256", "versions.torch"} <= keys


def test_run_directory_compares_effective_values(cli, tmp_path):
    ranks = tmp_path / "run" / "ranks"
    ranks.mkdir(parents=True)
    for rank, backend in enumerate(("sdpa", "sdpa", "flex")):
        report = {"schema": "tpctl.rank-report", "schema_version": 1, "rank": rank, "tp_plan": "v1.1a"}
        (ranks / f"rank{rank}.json").write_text(json.dumps(report | {"effective": {"attention_backend": backend}}))
    result = cli("parity-check", "run", "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 3
    assert data["findings"][0]["id"] == "parity.effective.attention_backend"
    assert "differs: rank2" in data["findings"][0]["message"]
    assert cli("parity-check", str(tmp_path)).exit_code == 2


def test_severity_takes_the_longest_prefix():
    assert severity_of("versions.torch") == "must"
    assert severity_of("versions.av") == "should"
    assert severity_of("host.name") == "info"


def test_a_source_that_did_not_answer_is_unchecked():
    rows = compare({"rank0": {"config.x": 1}})
    verdict, coverage = judge(rows, 1, 2)
    assert verdict is Verdict.UNCHECKED
    assert (coverage.checked, coverage.expected) == (1, 2)
    assert findings(rows) == ()
