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
from tpctl.paritytable import compare, findings, judge, severity_of
from tpctl.schemas import load_schema
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
    snapshot.save(data, path)
    return str(path)


def as_version_1(path: Path, base: dict, name: str) -> str:
    """What the first version of the tool would have written on this host."""
    old = {key: value for key, value in copy.deepcopy(base).items() if key not in ("collected", "seal")}
    old["host"]["name"], old["schema_version"] = name, 1
    old["environment"] = {key: v for key, v in old["environment"].items() if key in snapshot.VARIABLES_1}
    path.write_text(tomli_w.dumps(old))
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
        ("schema = 'tpctl.snapshot'\nschema_version = 0\n", "TP-7204"),
        ("schema = 'tpctl.snapshot'\nschema_version = 1\n", "TP-7203"),
        ("schema = 'tpctl.snapshot'\nschema_version = 2\nhost = 3\n", "TP-7203"),
        ("not toml", "TP-7203"),
        ("", "TP-7204"),
    ],
)
def test_foreign_snapshots(cli, tmp_path, taken, text, code):
    (tmp_path / "bad.toml").write_text(text)
    result = cli("parity-check", "here.toml", "bad.toml")
    assert result.exit_code == 2
    assert code in result.stderr
    assert "TP-7202" in cli("parity-check", "none.toml", "here.toml").stderr


def test_cut_or_altered_snapshots_are_refused_never_compared(cli, tmp_path, taken):
    whole = (tmp_path / "here.toml").read_text()
    cuts = [whole.index(f"[{section}]") for section in ("python", "versions", "gpu", "config", "seal")]
    # Two files that were cut at the same place agree on all that is left of them.
    for text in [*(whole[:cut] for cut in cuts), whole[:-30], whole.replace(taken["python"]["minor"], "3.99")]:
        for name in ("a.toml", "b.toml"):
            (tmp_path / name).write_text(text)
        result = cli("parity-check", "a.toml", "b.toml")
        assert result.exit_code == 2, text[-200:]
        assert "TP-7203" in result.stderr
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "large.toml").write_text("# " + "x" * snapshot.MAX_BYTES)
    for name, code in (("binary", "TP-7203"), ("folder", "TP-7202"), ("large", "TP-7203")):
        assert code in cli("parity-check", "here.toml", f"{name}.toml").stderr
    assert "TP-7206" in cli("parity-check", "here.toml", "./here.toml").stderr


def test_an_older_snapshot_is_read_and_what_it_could_not_see_stays_open(cli, tmp_path, taken):
    taken["environment"].pop("MKL_CBWR", None)
    new = put(tmp_path / "new.toml", taken, "new", environment__MKL_CBWR="AVX2", environment__NCCL_ALGO="Ring")
    old = as_version_1(tmp_path / "old.toml", taken, "old")
    result = cli("parity-check", new, old, "-o", "json")
    data = validated(result.stdout)
    rows = {row["key"]: row for row in data["data"]["rows"]}
    assert rows["environment.MKL_CBWR"]["values"] == {"new": "AVX2", "old": "(missing)"}
    assert rows["environment.MKL_CBWR"]["verdict"] == "UNKNOWN"
    assert rows["environment.MKL_CBWR"]["coverage"] == {"checked": 1, "expected": 2}
    # It would have seen this one: so it was not set there.
    assert rows["environment.NCCL_ALGO"]["values"]["old"] == "(unset)"
    assert rows["environment.NCCL_ALGO"]["verdict"] == data["verdict"] == "FAIL"
    same = put(tmp_path / "same.toml", taken, "same")
    equal = validated(cli("parity-check", same, old, "-o", "json").stdout)
    assert equal["data"]["states"] == {"same": "host same, schema 2", "old": "host old, schema 1"}


def test_hosts_without_a_configuration_have_not_been_compared(cli, tmp_path, taken):
    del taken["config"]
    a, b = put(tmp_path / "a.toml", taken, "a"), put(tmp_path / "b.toml", taken, "b")
    result = cli("parity-check", a, b, "-o", "json")
    data = validated(result.stdout)
    assert (result.exit_code, data["verdict"]) == (5, "UNKNOWN")
    assert "holds no configuration" in data["findings"][0]["message"]


def test_words_of_severity_in_table_and_json(cli, tmp_path, taken):
    paths = [put(tmp_path / f"{n}.toml", taken, n) for n in "abc"]
    paths.append(put(tmp_path / "d.toml", taken, "d", versions__torch="1.0", host__kernel="x"))
    table = cli("parity-check", *paths).stdout
    lines = {line.split()[3]: line for line in table.splitlines() if " match  " in line}
    assert lines["versions.torch"].startswith("FAIL     must match    versions.torch")
    assert "(3 of 4)" in lines["versions.torch"]
    assert lines["versions.torch"].endswith("d: 1.0")
    assert lines["host.kernel"].startswith("WARN     should match  host.kernel")
    assert "differ: 1 must match, 1 should match, 1 information" in table
    data = validated(cli("parity-check", *paths, "-o", "json").stdout)["data"]
    assert data["differing"] == {"must match": 1, "should match": 1, "information": 1}
    assert {row["severity"] for row in data["rows"]} == {"must match", "should match", "information"}


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
    assert severity_of("versions.torch") == "must match"
    assert severity_of("versions.av") == "should match"
    assert severity_of("host.name") == "information"
    assert severity_of("environment.NCCL_ALGO") == "must match"
    assert severity_of("environment.NCCL_DEBUG") == "information"


def test_a_proven_difference_outranks_a_missing_value():
    rows = compare({"a": {"config.x": 1}, "b": {"config.x": 2}, "c": {"config.y": 1}})
    assert [row.verdict for row in rows] == [Verdict.FAIL, Verdict.UNKNOWN]
    assert (rows[0].majority, rows[0].minority) == (None, ())
    assert (rows[0].coverage.checked, rows[0].coverage.expected) == (2, 3)
    assert "culprit" not in findings(rows)[0].message
    assert "differs:" not in findings(rows)[0].message


def test_a_library_that_only_some_have_loaded_is_information_unless_all_need_it():
    key, core = "library.libgomp.so.1", "library.libtorch_cpu.so"
    (some,) = compare({"a": {key: "build id 1"}, "b": {}})
    assert (some.severity, some.verdict, some.values["b"]) == ("information", Verdict.PASS, "(not loaded)")
    (other,) = compare({"a": {key: "build id 1"}, "b": {key: "build id 2"}, "c": {}})
    assert (other.severity, other.verdict) == ("must match", Verdict.FAIL)
    (needed,) = compare({"a": {core: "build id 1"}, "b": {}})
    assert (needed.severity, needed.verdict) == ("must match", Verdict.FAIL)


def test_many_ranks_are_told_by_their_spans():
    tables = {f"rank{rank}": {"config.x": int(rank in (3, 500))} for rank in range(512)}
    (row,) = compare(tables)
    assert (row.majority, row.minority) == ("0", ("rank3", "rank500"))
    message = findings([row])[0].message
    assert "rank4..rank499" in message
    assert "differs: rank3, rank500" in message
    assert len(message) < 200


def test_a_source_that_did_not_answer_is_unchecked():
    rows = compare({"rank0": {"config.x": 1}})
    verdict, coverage = judge(rows, 1, 2)
    assert verdict is Verdict.UNCHECKED
    assert (coverage.checked, coverage.expected) == (1, 2)
    assert findings(rows) == ()
