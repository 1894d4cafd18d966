"""Matrix files, baselines and JUnit."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from engine.config import EngineConfig, from_dict
from engine.errors import GeometryError
from engine.plan import PP_PLANS
from tests.cli.conftest import validated
from tests.cli.runs import CASE, OUTCOME, observe, write_run
from tpctl.commands.bringup import envelope_of, exit_code, with_baseline
from tpctl.drill.table import load
from tpctl.errors import MatrixError
from tpctl.exitcodes import ExitCode
from tpctl.matrix import baseline, report
from tpctl.matrix.cases import Matrix, builtin, load_matrix
from tpctl.matrix.cause import first_cause
from tpctl.matrix.gates import GATES, evaluate
from tpctl.matrix.metrics import metrics
from tpctl.matrix.runner import CaseResult, Runner
from tpctl.output import cell, plain_table
from tpctl.schemas import load_schema
from tpctl.verdict import Finding, Verdict

LEVEL2 = [
    "ref",
    "v0-tp2",
    "v1.1a-tp2",
    "v1.1b-tp2",
    "v1.1c-tp2",
    "graphs-tp2",
    "compiled-tp2",
    "v1.1c-tp3-refused",
    "v1.1c-recompute-off",
    "prompt-change",
    "hard-cut",
    "pp0-r1",
    "pp0-r0a",
    "pp0-r0a-decode-first",
    "pp0-r0",
    "pp1-tp1-r0a",
    "pp1-tp2-r0a",
    "pp-hardcut-inflight",
]


class Silent:
    def start(self, case): ...
    def tick(self, case, elapsed_s): ...
    def done(self, result): ...


def test_level_2_has_every_case_of_the_issue():
    cases = builtin(2).cases
    assert [case.id for case in cases if case.kind != "drill" and not case.id.startswith("ref-")] == LEVEL2
    assert [case.id for case in cases if case.kind == "drill"] == [drill.id for drill in load() if not drill.repeats]


def test_level_3_plants_each_fault_at_every_place():
    drills = [case for case in builtin(3).cases if case.kind == "drill"]
    assert [case.id for case in drills] == [drill.id for drill in load()]
    assert any(case.id == "OM-11.middle" and case.tp == 4 for case in drills)


def test_what_drills_a_matrix_wants_is_checked(tmp_path):
    path = tmp_path / "matrix.toml"
    path.write_text('drills = "some"\n[[case]]\nid = "ref"\ngates = ["frames"]\n')
    with pytest.raises(MatrixError, match="drills must be one of none, each, everywhere, is 'some'"):
        load_matrix(path)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_builtin_cases_are_sound(level, tmp_path):
    matrix = builtin(level)
    runner = Runner(EngineConfig(), tmp_path, Silent())
    by_id = {case.id: case for case in matrix.cases}
    for case in matrix.cases:
        if case.expect == "refused":
            with pytest.raises(GeometryError):
                from_dict(runner.configuration(case))
            continue
        if case.kind == "drill":
            continue
        config = from_dict(runner.configuration(case))
        assert config.world_size == case.ranks
        if "memory-flat" in case.gates:
            assert not config.run.record_latents  # a soak keeps no chunk, and is compared with itself
            continue
        assert config.run.record_latents
        if case.tp > 1 and case.kind == "run":
            # A reference is one process of the same timeline, chunks and configuration, and never a compiled one.
            ref, written = by_id[case.reference], {k: v for k, v in case.config.items() if k != "model.compile"}
            assert (ref.tp, ref.chunks, ref.events, ref.config) == (1, case.chunks, case.events, written)
            assert {"latents-equal", "pixels-equal", "calls", "digests", "leftovers"} <= set(case.gates)
            assert ("imports" in case.gates) == (case.plan in ("v1_generator_only", *PP_PLANS))
        if case.plan in PP_PLANS and case.tp == 1 and case.reference:
            assert "identical" in case.gates
    assert any(case.tp == 4 for case in builtin(3).cases)


def test_every_gate_is_used_by_a_builtin_matrix():
    used = {gate for level in (1, 2, 3) for case in builtin(level).cases for gate in case.gates}
    assert used == set(GATES)


def test_a_case_brings_what_it_needs():
    assert [case.id for case in builtin(2).select(["prompt-change"]).cases] == [
        "ref",
        "ref-prompt-change",
        "prompt-change",
    ]


def test_a_pattern_stands_for_all_it_matches_and_must_match_something():
    assert [case.id for case in builtin(3).select(["O-03.r0*"]).cases] == [
        "O-03.r1",  # decode-first is measured against it
        "O-03.r0a-decode-first",
        "O-03.r0",
        "O-03.r0a",
    ]
    with pytest.raises(MatrixError, match="there is no case 'P-\\*'"):
        builtin(3).select(["P-*"])


def test_the_next_command_names_the_matrix_that_has_the_case(tmp_path):
    path = tmp_path / "own cases.toml"
    path.write_text('[[case]]\nid = "a"\ngates = ["calls"]\n')
    matrices = (builtin(2), builtin(3).select(["O-03.r1"]), load_matrix(path))
    assert [matrix.flag for matrix in matrices] == ["", " --level 3", f" --matrix '{path}'"]
    chosen = matrices[1]
    results = [Runner(EngineConfig(), tmp_path, Silent()).not_run(case, "no reason") for case in chosen.cases]
    assert envelope_of(chosen, results, tmp_path, {}).next == ("tpctl bringup --level 3 --case O-03.r1 -o wide",)


GOOD = '[[case]]\nid = "a"\ngates = ["calls"]\n'


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "TP-7303", "no [[case]]"),
        (GOOD + 'plan_name = "x"\n', "TP-7301", "unknown key 'plan_name'; did you mean 'plan'"),
        ('[[case]]\nid = "a"\n', "TP-7308", "proves nothing"),
        ('[[case]]\nid = "a"\ngates = ["call"]\n', "TP-7308", "did you mean 'calls'"),
        (GOOD + 'plan = "v2"\n', "TP-7307", "unknown plan"),
        (GOOD + "tp = 0\n", "TP-7306", "a whole number from 1"),
        (GOOD + 'expect = "maybe"\n', "TP-7306", "one of pass, refused"),
        (GOOD + 'reference = "b"\n', "TP-7305", "does not stand before it"),
        (GOOD + GOOD, "TP-7304", "twice"),
        ('[[case]]\nid = "../a"\ngates = ["calls"]\n', "TP-7301", "short name"),
        (GOOD + 'config = { "schedule.recompte" = 1 }\n', "TP-7309", "did you mean 'schedule.recompute'"),
        (GOOD + "event = [{ at_chunk = 1 }]\n", "TP-1023", "at_chunk = 0"),
        ("[[case]\n", "TP-1005", "not valid TOML"),
    ],
)
def test_bad_matrix_files(cli, tmp_path, text, code, words):
    (tmp_path / "m.toml").write_text(text)
    result = cli("bringup", "--matrix", "m.toml")
    assert result.exit_code == 2
    assert code in result.stderr
    assert words in result.stderr
    assert not (tmp_path / "runs").exists()


def test_unknown_case_suggests(cli):
    result = cli("bringup", "--case", "v1.1c-tp")
    assert result.exit_code == 2
    assert "did you mean 'v1.1c-tp2'" in result.stderr


def test_list_follows_its_schema(cli):
    data = validated(cli("bringup", "--list", "-o", "json").stdout)["data"]
    assert [row["id"] for row in data["cases"]] == [case.id for case in builtin(2).cases]


def test_a_refused_case_runs_nothing_and_passes(cli, tmp_path):
    result = cli("bringup", "--case", "v1.1c-tp3-refused", "-o", "json", "--run-dir", "run")
    data = validated(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert data["verdict"] == "PASS"
    finding = data["data"]["cases"][0]["findings"][0]
    assert "1, 2, 4" in finding["message"]
    assert not (tmp_path / "run" / "v1.1c-tp3-refused" / "ranks").exists()
    assert validated((tmp_path / "run" / "result.json").read_text()) == data
    again = cli("bringup", "--case", "v1.1c-tp3-refused", "--run-dir", "run")
    assert again.exit_code == 2
    assert "TP-7005" in again.stderr


def test_what_must_be_refused_but_is_not_fails(cli, tmp_path):
    (tmp_path / "m.toml").write_text('[[case]]\nid = "a"\ntp = 2\nexpect = "refused"\ngates = ["refused"]\n')
    result = cli("bringup", "--matrix", "m.toml", "-o", "json")
    assert result.exit_code == 3
    assert validated(result.stdout)["verdict"] == "FAIL"


def test_a_used_run_directory_is_not_mixed(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    result = cli("bringup", "--run-dir", "run")
    assert result.exit_code == 2
    assert "TP-7005" in result.stderr


def results(tmp_path: Path) -> list[CaseResult]:
    """A healthy reference, and a case whose rank 1 made one call too few."""

    def lose_a_call(reports):
        reports[1]["chunks"][1]["observed_generator_calls"] = 4
        reports[1].update(
            exit_code=70,
            error={
                "type": "CallCountError",
                "code": "TP-6101",
                "fm": "FM-02",
                "exit_code": 70,
                "message": "4 of 5 calls",
                "next": "tpctl env",
            },
        )

    ref = observe(write_run(tmp_path / "ref", ranks=1), replace(CASE, id="ref", tp=1, reference=None))
    bad = observe(write_run(tmp_path / "case", lose_a_call), outcome=replace(OUTCOME, returncode=1), reference=ref)
    made = []
    for seen in (ref, bad):
        names = ("exit-codes", "latents-equal", "calls", "digests", "cut-repeats")[: 4 if seen is ref else 5]
        found = tuple(evaluate(name, seen) for name in names)
        made.append(CaseResult(seen.case, seen.run_dir, found, metrics(seen, found), first_cause(seen)))
    return made


def test_the_result_says_who_and_why_in_few_lines(tmp_path):
    made = results(tmp_path)
    assert [result.verdict for result in made] == [Verdict.PASS, Verdict.FAIL]
    lines = report.explain(made)
    text = "\n".join(lines)
    assert "first cause: rank 1, exit code 70: TP-6101: 4 of 5 calls" in text
    assert "UNKNOWN   cut-repeats" in text
    assert "latents-equal" not in text
    assert len(lines) < 12
    envelope = envelope_of(
        Matrix("m", "m.toml", (CASE,)), made, tmp_path, {"cpu": "c", "torch": "t", "commit": "x"}
    ).to_dict()
    jsonschema.Draft202012Validator(load_schema("bringup")).validate(envelope)
    assert envelope["verdict"] == "FAIL"
    assert envelope["coverage"]["checked"] < envelope["coverage"]["expected"]
    assert envelope["next"]


def test_the_table_fits_80_columns(tmp_path):
    table = report.table(results(tmp_path))
    narrow = [column for column in table.columns if column.narrow]
    cells = [[cell(row.get(column.key)) for column in narrow] for row in table.rows]
    cells[0][0], cells[1][-1] = "v1.1c-recompute-off", ""
    lines = plain_table([column.heading for column in narrow], cells, [column.right for column in narrow])
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_junit_counts_failures_and_errors(tmp_path):
    report.write_junit(results(tmp_path), tmp_path / "junit.xml", "bring-up")
    suites = {suite.get("name"): suite for suite in ET.parse(tmp_path / "junit.xml").getroot()}
    assert (suites["ref"].get("failures"), suites["ref"].get("errors")) == ("0", "0")
    assert (suites["case"].get("failures"), suites["case"].get("errors")) == ("2", "1")
    failure = suites["case"].find("./testcase[@name='calls']/failure")
    assert "rank 1" in failure.text


def test_baseline_round_trip_and_ratio(tmp_path):
    made = results(tmp_path)
    path = baseline.save(str(tmp_path / "base.json"), [result.to_dict() for result in made])
    data = json.loads(path.read_text())
    jsonschema.Draft202012Validator(load_schema("baseline")).validate(data)
    base = baseline.read(str(path))
    same = with_baseline(made[0], base, baseline.key())
    assert same.verdict is Verdict.PASS
    assert len(same.findings) == len(made[0].findings) + 3
    slow = replace(made[0], metrics={**made[0].metrics, "period_p50_ms": made[0].metrics["period_p50_ms"] * 1.3})
    assert with_baseline(slow, base, baseline.key()).verdict is Verdict.WARN
    other = with_baseline(slow, base, baseline.key() | {"cpu": "another"})
    assert other.verdict is Verdict.UNCHECKED


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "x"}', '{"schema": "tpctl.baseline", "schema_version": 9}'])
def test_foreign_baselines(cli, tmp_path, text):
    (tmp_path / "b.json").write_text(text)
    assert cli("bringup", "--baseline", "b.json").exit_code == 2
    assert cli("bringup", "--baseline", "none.json").exit_code == 2


def test_baseline_names_live_in_the_user_directory(cli, tmp_path):
    assert baseline.location("nightly").parent.name == "baselines"
    assert baseline.location("./x.json") == Path("x.json")


def test_port_in_use_is_refused_before_anything_starts(cli, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        result = cli("bringup", "--rdzv-endpoint", f"localhost:{taken.getsockname()[1]}")
    assert result.exit_code == 3
    assert "TP-7104" in result.stderr
    assert not (tmp_path / "runs").exists()
    assert "TP-7103" in cli("bringup", "--rdzv-endpoint", "here").stderr


def test_finding_of_an_unexpected_shape_is_unknown(tmp_path):
    seen = observe(write_run(tmp_path / "run", lambda reports: reports[1].update(chunks=None)))
    finding = evaluate("calls", seen)
    assert isinstance(finding, Finding)
    assert finding.verdict is Verdict.UNKNOWN


def test_load_matrix_merges_defaults(tmp_path):
    (tmp_path / "m.toml").write_text(
        '[defaults]\ngates = ["calls"]\nconfig = { "sink.fps" = 8 }\n'
        '[[case]]\nid = "a"\nconfig = { "run.chunks" = 2 }\n[[case]]\nid = "b"\nplan = "v1.1c"\ngates = ["frames"]\n'
    )
    a, b = load_matrix(tmp_path / "m.toml").cases
    assert a.config == {"sink.fps": 8, "run.chunks": 2}
    assert (a.gates, b.gates, b.plan) == (("calls",), ("frames",), "v1_generator_only")


def test_exit_code_of_a_bringup(tmp_path):
    healthy, failed = results(tmp_path)
    late = replace(failed, timed_out=True)
    warned = replace(healthy, findings=(*healthy.findings, Finding("baseline.x", Verdict.WARN, "slower")))
    assert exit_code([healthy], strict=True) is ExitCode.PASS
    assert exit_code([healthy, warned], strict=False) is ExitCode.PASS
    assert exit_code([healthy, warned], strict=True) is ExitCode.WARNINGS
    assert exit_code([healthy, late], strict=False) is ExitCode.DEADLINE
    assert exit_code([failed, late], strict=False) is ExitCode.CHECK_FAILED
    assert exit_code([], strict=False) is ExitCode.INCOMPLETE


@pytest.mark.parametrize(("flags", "second"), [((), "FAIL"), (("--fail-fast",), "UNCHECKED")])
def test_all_cases_run_unless_fail_fast(cli, tmp_path, flags, second):
    accepted = 'tp = 2\nexpect = "refused"\ngates = ["refused"]\n'
    (tmp_path / "m.toml").write_text(f'[[case]]\nid = "a"\n{accepted}[[case]]\nid = "b"\n{accepted}')
    result = cli("bringup", "--matrix", "m.toml", "-o", "jsonl", *flags)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 3
    assert [case["verdict"] for case in lines[-1]["data"]["cases"]] == ["FAIL", second]
    assert [line["kind"] for line in lines[:-1]] == ["case"] * (1 if flags else 2)
    table = cli("bringup", "--matrix", "m.toml", *flags)
    assert "was accepted" in table.stdout
