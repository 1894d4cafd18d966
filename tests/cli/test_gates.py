"""Each gate passes on a healthy run, fails on the fault it is for, and is UNKNOWN where it cannot see."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from tests.cli.runs import CASE, OUTCOME, observe, write_run
from tests.cli.runs import chunk as healthy_chunk
from tpctl.matrix.cause import first_cause
from tpctl.matrix.gates import GATES, evaluate, relative_error, slope
from tpctl.matrix.metrics import metrics
from tpctl.schemas import load_schema
from tpctl.verdict import Coverage, Verdict, worst

COMMON = [
    name
    for name, gate in GATES.items()
    if gate.__module__ != "tpctl.matrix.ppgates"  # which has tests of its own
    and name not in ("refused", "cut-repeats", "prompt-changes-output", "account-with-drops", "overlap", "memory-flat")
]


def seen(tmp_path: Path, edit=lambda reports: None, edit_tensors=lambda latents, pixels: None, **kwargs):
    reference = observe(write_run(tmp_path / "ref", ranks=1), replace(CASE, id="ref", tp=1, reference=None))
    return observe(write_run(tmp_path / "case", edit, edit_tensors), reference=reference, **kwargs)


@pytest.mark.parametrize("name", COMMON)
def test_healthy_runs_pass(tmp_path, name):
    finding = evaluate(name, seen(tmp_path))
    assert finding.verdict is Verdict.PASS, finding


def set_chunk(rank: int, index: int, **changes):
    def edit(reports):
        reports[rank]["chunks"][index].update(changes)

    return edit


def set_report(rank: int, **changes):
    def edit(reports):
        reports[rank].update(changes)

    return edit


def set_generator(rank: int, **changes):
    def edit(reports):
        reports[rank]["generator"] |= changes

    return edit


def drop(rank: int):
    def edit(reports):
        del reports[rank]

    return edit


OVERLAP = {"score": 0.31, "stage0_ms": 10.0, "stage1_ms": 9.0, "period_ms": 12.0}


def set_overlap(score: float = 0.31, d_in: int = 2, most: int = 2):
    """Rank 0's report of a pp run, its queue `d_in` as long as this at chunk 1, and `most` between two chunks."""

    def edit(reports):
        queues = {"d_in": 2, "d_out": 2, "d_in_most": most, "d_out_most": 2}
        reports[0]["generator"] = {"overlap": OVERLAP | {"score": score}, **queues}
        for chunk in reports[0]["chunks"]:
            chunk.update(d_in=d_in if chunk["chunk_index"] == 1 else 0, d_out=2)

    return edit


def set_memory(rank: int, per_chunk: int, chunks: int = 400, step: int = 1):
    """Many chunks in both reports, level but for the noise of an allocator; this rank's rises, in steps of `step`."""

    def edit(reports):
        dice = random.Random(rank)
        for number, report in reports.items():
            report["chunks"] = [
                healthy_chunk(
                    index,
                    rss_bytes=(400 << 20)
                    + dice.choice((0, 0, 0, 3_538_944, 7_077_888))
                    + max(0, 80 - index) * 250_000
                    + (number == rank) * per_chunk * (index // step) * step,
                )
                for index in range(chunks)
            ]

    return edit


@pytest.mark.parametrize(
    ("edit", "verdict"),
    [
        (set_memory(0, 0), Verdict.PASS),
        (set_memory(1, 1_200), Verdict.PASS),
        (set_memory(0, 6_000), Verdict.FAIL),
        (set_memory(1, 6_000), Verdict.FAIL),
        (set_memory(1, 6_000, step=64), Verdict.FAIL),
        (set_memory(1, 0, chunks=250), Verdict.UNKNOWN),
        (drop(1), Verdict.UNKNOWN),
        (lambda reports: None, Verdict.UNKNOWN),
    ],
    ids=["flat", "records", "leak-0", "leak-1", "leak-in-steps", "short", "no-report", "no-figures"],
)
def test_memory_that_grows_from_chunk_to_chunk(tmp_path, edit, verdict):
    finding = evaluate("memory-flat", seen(tmp_path, edit))
    assert finding.verdict is verdict, finding
    if verdict is Verdict.FAIL:
        assert finding.value == pytest.approx(6_000, rel=0.2)


def test_a_jump_is_no_slope():
    level = [(index, 1000 + 10**6 * (index > 300)) for index in range(400)]
    assert slope(level) == 0.0
    assert slope([(index, 7 * index) for index in range(0, 400, 3)]) == 7.0


DROPS = {"accepted": 3, "emitted": 2, "dropped": 1, "abandoned": 0}
ACCOUNT = {"accepted": 3, "emitted": 2, "dropped": 0, "abandoned": 0}


@pytest.mark.parametrize(
    ("name", "edit", "verdict"),
    [
        ("account-with-drops", set_report(0, account=DROPS), Verdict.PASS),
        ("account-with-drops", set_report(0, account=DROPS | {"dropped": 0}), Verdict.FAIL),
        ("account-with-drops", set_report(0, account=DROPS | {"dropped": 0, "emitted": 3}), Verdict.FAIL),
        ("account-with-drops", set_report(0, account=None), Verdict.UNKNOWN),
        ("overlap", set_overlap(), Verdict.PASS),
        ("overlap", set_overlap(score=0.29), Verdict.FAIL),
        ("overlap", set_overlap(d_in=3), Verdict.FAIL),
        ("overlap", set_overlap(most=3), Verdict.FAIL),
        ("overlap", set_report(0, generator={"overlap": None}), Verdict.UNKNOWN),
        ("exit-codes", set_report(1, exit_code=70), Verdict.FAIL),
        ("exit-codes", set_report(1, exit_code=None), Verdict.UNKNOWN),
        ("exit-codes", drop(1), Verdict.UNKNOWN),
        ("calls", set_chunk(1, 2, observed_generator_calls=4), Verdict.FAIL),
        ("calls", set_chunk(1, 2, observed_generator_calls=4, expected_generator_calls=4), Verdict.FAIL),
        ("calls", lambda reports: reports[1]["chunks"].pop(), Verdict.FAIL),
        ("calls", drop(1), Verdict.UNKNOWN),
        ("digests", set_chunk(1, 0, input_digest_i64=99), Verdict.FAIL),
        ("digests", set_chunk(0, 2, output_digest_i64=99), Verdict.FAIL),
        ("digests", set_chunk(1, 0, input_digest_i64=None), Verdict.UNKNOWN),
        ("digests", drop(1), Verdict.UNKNOWN),
        ("imports", set_report(1, imported={"transformers": True, "diffusers": False}), Verdict.FAIL),
        ("imports", drop(1), Verdict.UNKNOWN),
        ("imports", lambda reports: reports[1].pop("imported"), Verdict.UNKNOWN),
        ("graphs", set_generator(1, graphs=2), Verdict.FAIL),
        ("graphs", set_generator(1, graphs=0), Verdict.FAIL),
        ("graphs", set_generator(1, graph_breaks=3), Verdict.FAIL),
        ("graphs", set_generator(0, graphs_in_stream=1), Verdict.FAIL),
        ("graphs", lambda reports: reports[1]["generator"].pop("graphs"), Verdict.UNKNOWN),
        ("graphs", drop(1), Verdict.UNKNOWN),
        ("outputs", set_report(0, outputs={"mp4": "/nowhere/x.mp4"}), Verdict.FAIL),
        ("outputs", set_report(0, outputs=None), Verdict.UNKNOWN),
        ("account", set_report(0, account=ACCOUNT), Verdict.FAIL),
        ("account", set_report(0, account=ACCOUNT | {"abandoned": 1}), Verdict.FAIL),
        ("account", set_report(0, account=None), Verdict.UNKNOWN),
        ("frames", set_chunk(0, 2, cache_epoch=1), Verdict.FAIL),
    ],
)
def test_faults_in_reports(tmp_path, name, edit, verdict):
    finding = evaluate(name, seen(tmp_path, edit))
    assert finding.verdict is verdict, finding


def nudge(latents, pixels):
    latents["chunk_00001"] = latents["chunk_00001"] * np.float32(1.001)
    pixels["chunk_00002"] = (pixels["chunk_00002"].astype(np.int16) + 2).clip(0, 255).astype(np.uint8)


def poison(latents, pixels):
    latents["chunk_00001"][0, 0] = np.nan


def shorten(latents, pixels):
    del latents["chunk_00002"], pixels["chunk_00002"]


def lose(latents, pixels):
    latents.clear()


@pytest.mark.parametrize(
    ("name", "edit", "verdict"),
    [
        ("latents-equal", nudge, Verdict.FAIL),
        ("latents-equal", poison, Verdict.FAIL),
        ("latents-equal", shorten, Verdict.FAIL),
        ("latents-equal", lose, Verdict.UNKNOWN),
        ("pixels-equal", nudge, Verdict.FAIL),
        ("pixels-equal", lose, Verdict.UNKNOWN),
        ("frames", shorten, Verdict.FAIL),
        ("frames", lose, Verdict.UNKNOWN),
    ],
)
def test_faults_in_tensors(tmp_path, name, edit, verdict):
    assert evaluate(name, seen(tmp_path, edit_tensors=edit)).verdict is verdict


def test_a_failed_reference_makes_equality_unknown(tmp_path):
    run = write_run(tmp_path / "case")
    assert evaluate("latents-equal", observe(run, reference=None)).verdict is Verdict.UNKNOWN
    alone = observe(run, replace(CASE, reference=None))
    assert evaluate("latents-equal", alone).verdict is Verdict.SKIP


def test_pixel_difference_does_not_wrap_around(tmp_path):
    def black(latents, pixels):
        pixels["chunk_00000"][:] = 0

    def white(latents, pixels):
        pixels["chunk_00000"][:] = 255

    reference = observe(write_run(tmp_path / "ref", edit_tensors=black))
    finding = evaluate("pixels-equal", observe(write_run(tmp_path / "case", edit_tensors=white), reference=reference))
    assert finding.value == 255


def test_launch_faults(tmp_path):
    healthy = seen(tmp_path)
    late = replace(healthy, outcome=replace(OUTCOME, timed_out=True))
    assert evaluate("exit-codes", late).verdict is Verdict.FAIL
    assert evaluate("exit-codes", replace(healthy, outcome=replace(OUTCOME, returncode=1))).verdict is Verdict.FAIL
    left = replace(healthy, outcome=replace(OUTCOME, leftovers=("123 python",)))
    assert evaluate("leftovers", left).verdict is Verdict.FAIL
    assert evaluate("leftovers", replace(healthy, outcome=None)).verdict is Verdict.UNKNOWN


def test_cut_repeats(tmp_path):
    cut = set_chunk(0, 2, init_cache=True, cache_epoch=1)

    def repeat(latents, pixels):
        for arrays in (latents, pixels):
            arrays["chunk_00002"] = arrays["chunk_00000"].copy()

    assert evaluate("cut-repeats", observe(write_run(tmp_path / "a", cut, repeat))).verdict is Verdict.PASS
    assert evaluate("frames", observe(tmp_path / "a")).verdict is Verdict.PASS
    assert evaluate("cut-repeats", observe(write_run(tmp_path / "b", cut))).verdict is Verdict.FAIL
    assert evaluate("cut-repeats", observe(write_run(tmp_path / "c"))).verdict is Verdict.UNKNOWN


def test_prompt_changes_output(tmp_path):
    name = "prompt-changes-output"
    case = replace(CASE, events=({"at_chunk": 0, "prompt": "a"}, {"at_chunk": 1, "prompt": "b"}))
    other = observe(write_run(tmp_path / "other"))

    def changed(latents, pixels):
        latents["chunk_00001"] *= 2

    def drifted(latents, pixels):
        changed(latents, pixels)
        latents["chunk_00000"] *= 2

    for edit, verdict in ((changed, Verdict.PASS), (drifted, Verdict.FAIL), (lambda a, b: None, Verdict.FAIL)):
        run = write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", edit_tensors=edit)
        assert evaluate(name, observe(run, case, other=other)).verdict is verdict
    assert evaluate(name, observe(tmp_path / "other", case)).verdict is Verdict.UNKNOWN


def test_relative_error():
    a = np.array([1.0, 2.0])
    assert relative_error(a, a) == 0
    assert relative_error(np.array([1.0, 2.2]), a) == pytest.approx(0.1)
    assert relative_error(a, a * 0) == float("inf")
    assert relative_error(a * np.nan, a) == float("inf")


def test_metrics_come_from_the_reports(tmp_path):
    found = seen(tmp_path)
    figures = metrics(found, [evaluate(name, found) for name in COMMON])
    assert figures["period_p50_ms"] == pytest.approx(101.5)
    assert figures["calls_expected"] == figures["calls_observed"] == 14
    assert figures["worker_peak_bytes"] == 2 << 20
    assert figures["leader_peak_bytes"] == 3 << 20
    assert figures["worker_spares_bytes"] == 1 << 20
    assert figures["worker_ready_s"] == 3.0
    assert figures["frames"] == 33
    assert figures["fps"] == pytest.approx(24 / 0.203)
    assert figures["latents_error"] == 0


def test_reports_follow_the_published_schema(tmp_path):
    reports = observe(write_run(tmp_path / "run")).reports
    for report in reports.values():
        jsonschema.Draft202012Validator(load_schema("rank-report")).validate(report)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "tpctl.rank-report", "schema_version": 2, "rank": 1}'])
def test_a_damaged_or_newer_report_is_no_report(tmp_path, text):
    run = write_run(tmp_path / "run")
    (run / "ranks" / "rank1.json").write_text(text)
    assert evaluate("exit-codes", observe(run)).verdict is Verdict.UNKNOWN


def error(exit_code: int, message: str) -> dict:
    return {
        "type": "E",
        "code": "TP-6001",
        "fm": "FM-30",
        "exit_code": exit_code,
        "message": message,
        "next": "tpctl env",
    }


def test_the_first_cause_is_not_a_victim(tmp_path):
    def edit(reports):
        reports[0].update(exit_code=74, error=error(74, "transport failed"), state="aborted")
        reports[1].update(exit_code=70, error=error(70, "input digest differs"), state="aborted")

    run = write_run(tmp_path / "run", edit)
    log = run / "logs" / "case_x" / "attempt_0" / "1"
    log.mkdir(parents=True)
    (log / "stderr.log").write_text("".join(f"line {i}\n" for i in range(30)))
    cause = first_cause(observe(run, outcome=replace(OUTCOME, returncode=1)))
    assert (cause.rank, cause.exit_code, cause.message) == (1, 70, "input digest differs")
    assert cause.log == str(log / "stderr.log")
    assert len(cause.tail) == 10
    assert cause.tail[-1] == "line 29"
    assert len(cause.lines()) < 16


def test_a_victim_alone_is_the_cause(tmp_path):
    run = write_run(tmp_path / "run", set_report(0, error=error(74, "transport failed")))
    assert first_cause(observe(run, outcome=replace(OUTCOME, returncode=1))).rank == 0


@pytest.mark.parametrize("victim", [71, 72, 73, 74])
def test_a_killed_rank_outranks_its_victims(tmp_path, victim):
    def edit(reports):
        reports[0].update(exit_code=victim, error=error(victim, "waited in vain"))
        del reports[1]

    run = write_run(tmp_path / "run", edit)
    (run / "launcher.log").write_text(
        "Failures:\n[1]:\n  time      : now\n  rank      : 0 (local_rank: 0)\n  exitcode  : 74 (pid: 5)\n"
        "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 6)\n"
    )
    cause = first_cause(observe(run, outcome=replace(OUTCOME, returncode=1)))
    assert (cause.rank, cause.exit_code) == (1, -9)
    assert "signal 9" in cause.message


def test_a_healthy_run_has_no_cause(tmp_path):
    assert first_cause(observe(write_run(tmp_path / "run"))) is None


def test_verdicts_combine():
    assert worst([]) is Verdict.UNCHECKED
    assert worst([Verdict.SKIP]) is Verdict.UNCHECKED
    assert worst([Verdict.PASS, Verdict.SKIP]) is Verdict.PASS
    assert worst([Verdict.PASS, Verdict.UNKNOWN, Verdict.WARN]) is Verdict.UNKNOWN
    assert worst([Verdict.FAIL, Verdict.UNKNOWN]) is Verdict.FAIL
    assert Coverage.of([Verdict.PASS, Verdict.SKIP, Verdict.UNKNOWN, Verdict.FAIL]) == Coverage(2, 3)
