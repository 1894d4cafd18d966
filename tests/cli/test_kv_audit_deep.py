"""`tpctl kv-audit --deep` on real ranks: healthy, with a planted drift of content, and on damaged evidence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig, from_dict
from engine.errors import ConfigError
from engine.faults import CALL, DRIFT, DRIFT_HEAD, DRIFT_LAYER, differ
from engine.sealed import Kind, frame_path, read_sealed, samples_dir, samples_path, write_sealed
from tests.cli.conftest import validated
from tests.support.ranks import run_ranks
from tpctl.kvdeep import audit, planned_calls
from tpctl.kvmeasure import TOLERANCE
from tpctl.kvreplay import Replayed, frames_job, replay
from tpctl.output import Output
from tpctl.verdict import Verdict

CHUNKS, LAYERS, HEADS = 3, 2, 4
CALLS = (4, 5, 5)
CELLS = sum(CALLS) * LAYERS * HEADS


def make_config(cache: Path, **dotted: object) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "plan": {"tp": 2},
        "run": {"chunks": CHUNKS, "record_frames": True},
        "sink": {"kinds": ["null"]},
    }
    return from_dict(base).replace(**dotted)


def made(run_dir: Path, config: EngineConfig) -> Path:
    outcome = run_ranks(run_dir, config)
    assert set(outcome.exit_codes.values()) == {0}, outcome.stderr
    assert not any(report["warnings"] for report in outcome.reports.values())
    return outcome.run_dir


@pytest.fixture(scope="module")
def real(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("deep") / "run", make_config(weights_cache))


@pytest.fixture
def copy(real: Path, tmp_path: Path) -> Path:
    shutil.copytree(real, tmp_path / "run")
    return tmp_path / "run"


def drifting(cache: Path, victim: int, chunk: int, **dotted: object) -> EngineConfig:
    return make_config(cache, drill__id="KV-DRIFT", drill__victim_rank=victim, drill__at_chunk=chunk, **dotted)


def test_a_healthy_run_is_consistent_and_every_cell_was_compared(cli, real: Path) -> None:
    before = sorted(real.rglob("*"))
    result = cli("kv-audit", str(real), "--deep", "-o", "json")
    data = validated(result.stdout)
    assert (result.exit_code, data["verdict"]) == (0, "PASS"), data["findings"]
    deep = data["data"]["deep"]
    assert (deep["answer"], deep["coverage"]) == ("consistent", {"checked": CELLS, "expected": CELLS})
    assert data["coverage"] == {"checked": CELLS + 2 * CHUNKS, "expected": CELLS + 2 * CHUNKS}
    assert [(rank["heads"], rank["verdict"], rank["deviating"]) for rank in deep["ranks"]] == [
        ([0, 1], "consistent", 0),
        ([2, 3], "consistent", 0),
    ]
    # Two ranks do round differently than one: it was compared, and the limit lies far above it.
    assert 0 < deep["largest"]["deviation"] < TOLERANCE["float32"] / 10
    assert "replayed chunk 2: 5 calls" in result.stderr
    assert sorted(real.rglob("*")) == before  # an audit leaves nothing in a run


@pytest.fixture(scope="module")
def drifted(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("drift") / "run", drifting(weights_cache, 1, 1))


@pytest.mark.parametrize(("victim", "chunk"), [(1, 1), (0, 2)])
def test_a_drift_of_content_is_named_by_layer_head_call_and_rank(
    victim: int, chunk: int, cli, drifted: Path, weights_cache: Path, tmp_path: Path
) -> None:
    run = drifted if victim == 1 else made(tmp_path / "run", drifting(weights_cache, victim, chunk))
    plain = cli("kv-audit", str(run), "-o", "json")
    # The proof that `--deep` is needed: indices, digests, plans and results are equal on all ranks.
    assert (plain.exit_code, validated(plain.stdout)["data"]["answer"]) == (0, "consistent")
    result = cli("kv-audit", str(run), "--deep", "-o", "json")
    data = validated(result.stdout)
    deep = data["data"]["deep"]
    assert (result.exit_code, data["data"]["answer"], deep["answer"]) == (3, "diverged", "diverged")
    assert [
        {key: found[key] for key in ("chunk_index", "call", "cache", "layer", "head", "rank", "tensor")}
        for found in deep["heads"]
    ] == [
        {
            "chunk_index": chunk,
            "call": CALL,
            "cache": "self",
            "layer": DRIFT_LAYER,
            "head": victim * HEADS // 2 + DRIFT_HEAD,
            "rank": victim,
            "tensor": "key",
        }
    ]
    assert deep["origin"] == [victim]
    assert deep["ranks"][victim]["verdict"] == "diverged"
    assert deep["ranks"][1 - victim]["verdict"] in ("affected", "consistent")
    assert deep["coverage"] == {"checked": CELLS, "expected": CELLS}
    first = deep["first"]
    assert DRIFT / 10 < first["deviation"] < DRIFT * 100
    finding = next(finding for finding in data["findings"] if finding["id"] == "kv.content")
    assert finding["where"] == f"rank {victim}"
    assert f"generator call {CALL} of 5, layer {DRIFT_LAYER}, head {first['head']}" in finding["message"]


def test_for_people_a_table_and_a_sentence(cli, drifted: Path) -> None:
    shown = cli("kv-audit", str(drifted), "--deep")
    assert shown.exit_code == 3
    assert f"first content divergence: chunk 1, generator call {CALL} of 5, layer {DRIFT_LAYER}, head 3" in shown.stdout
    assert "1     2, 3   diverged" in shown.stdout
    assert "replayed chunk 0" in shown.stderr


def test_it_is_the_limit_that_decides(cli, drifted: Path) -> None:
    assert cli("kv-audit", str(drifted), "--deep", "--tolerance", "100").exit_code == 0


@pytest.mark.parametrize(
    ("change", "cells", "ranks"),
    [
        ({"plan__tp_plan": "v1.1a", "plan__tp": 1, "model__dtype": "bfloat16"}, CELLS, [0]),
        ({"plan__tp_plan": "pp1"}, CELLS, [1, 2]),
        ({"schedule__recompute": False, "schedule__clean_pass": True}, 3 * 5 * LAYERS * HEADS, [0, 1]),
    ],
)
def test_other_plans_regimes_and_dtypes(
    change: dict[str, object], cells: int, ranks: list[int], cli, weights_cache: Path, tmp_path: Path
) -> None:
    run = made(tmp_path / "run", make_config(weights_cache, **change))
    result = cli("kv-audit", str(run), "--deep", "-o", "json")
    data = validated(result.stdout)
    assert result.exit_code == 0, data["findings"]
    assert data["data"]["deep"]["coverage"] == {"checked": cells, "expected": cells}
    assert [rank["rank"] for rank in data["data"]["deep"]["ranks"]] == ranks


def test_without_recorded_frames_it_says_how_to_get_them(cli, copy: Path) -> None:
    shutil.rmtree(copy / "frames")
    result = cli("kv-audit", str(copy), "--deep", "-o", "json")
    assert result.exit_code == 5
    assert "--set run.record_frames=true" in result.stderr
    assert validated(result.stdout)["data"]["error"]["code"] == "TP-7511"


def test_without_a_configuration_it_says_so(cli, copy: Path) -> None:
    for path in copy.glob("config*.toml"):
        path.unlink()
    result = cli("kv-audit", str(copy), "--deep")
    assert result.exit_code == 5
    assert "TP-7512" in result.stderr


def rewrite(path: Path, kind: Kind, **seal: object) -> None:
    import dataclasses

    found, body = read_sealed(path, kind)
    write_sealed(path, dataclasses.replace(found, **seal), body)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 16
    path.write_bytes(raw)


def own_samples(run: Path, chunk: int = 1, rank: int = 1) -> Path:
    return samples_path(samples_dir(run, rank), chunk)


def of_rank_0(run: Path) -> None:
    shutil.copy(own_samples(run, rank=0), own_samples(run))


def relabelled(run: Path) -> None:
    """Rank 0's samples, sealed as rank 1's: the heads they say they hold are not rank 1's."""
    of_rank_0(run)
    rewrite(own_samples(run), Kind.SAMPLES, rank=1)


def of_another_chunk(run: Path) -> None:
    shutil.copy(own_samples(run, chunk=0), own_samples(run))


def no_tensors(run: Path) -> None:
    seal, _ = read_sealed(own_samples(run), Kind.SAMPLES)
    write_sealed(own_samples(run), seal, b"\x07\x00\x00\x00\x00\x00\x00\x00garbage")


def other_weights(run: Path) -> None:
    for path in run.glob("config*.toml"):
        path.write_text(path.read_text().replace("weights_seed = 0", "weights_seed = 1"))


@pytest.fixture(scope="module")
def replayed(real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Replayed]:
    out_dir = tmp_path_factory.mktemp("replayed")
    return out_dir, replay(real, out_dir, None, 120.0, Output(quiet=True))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: own_samples(run).unlink(), "cannot be read: No such file"),
        (lambda run: flip(own_samples(run)), "was altered since it was written"),
        (lambda run: os.truncate(own_samples(run), 900), "were written"),
        (lambda run: own_samples(run).write_bytes(b"?" * 999), "no recording of this engine"),
        (lambda run: rewrite(own_samples(run), Kind.SAMPLES, job="f" * 32), "is of another job"),
        (of_rank_0, "says it is of rank 0, chunk 1"),
        (of_another_chunk, "says it is of rank 1, chunk 0"),
        (relabelled, "another model or mesh"),
        (no_tensors, "holds no tensors"),
    ],
)
def test_damaged_samples_leave_it_open(
    damage: Callable[[Path], object], sentence: str, copy: Path, replayed: tuple[Path, Replayed]
) -> None:
    job = frames_job(copy)
    how = {"job": job, "ranks": (0, 1), "layers": LAYERS, "heads": HEADS, "fingerprints": {}, "tolerance": 1e-4}
    assert audit(copy, *replayed, calls=planned_calls(copy), **how).verdict is Verdict.PASS
    damage(copy)
    found = audit(copy, *replayed, calls=planned_calls(copy), **how)
    assert (found.verdict, found.deviations) == (Verdict.UNKNOWN, [])
    assert (found.compared, found.expected) == (CELLS - 5 * LAYERS * HEADS // 2, CELLS)
    assert [one.verdict(()) for one in found.ranks] == ["consistent", "indeterminate"]
    assert any(sentence in finding.message for finding in found.findings(copy)), found.findings(copy)


LOST_FROM_1 = 10 * LAYERS * HEADS


@pytest.mark.parametrize(
    ("damage", "lost", "sentence"),
    [
        (lambda run: own_samples(run).unlink(), 5 * LAYERS * HEADS // 2, "rank 1: chunk 1"),
        (lambda run: frame_path(run, 1).unlink(), LOST_FROM_1, "chunk 1 was not replayed: its frame is missing"),
        (lambda run: flip(frame_path(run, 1)), LOST_FROM_1, "was altered since it was written"),
        (other_weights, CELLS, "weights are not those of rank 0, 1"),
    ],
)
def test_damaged_evidence_is_indeterminate_with_its_coverage(
    damage: Callable[[Path], object], lost: int, sentence: str, cli, copy: Path
) -> None:
    damage(copy)
    result = cli("kv-audit", str(copy), "--deep", "-o", "json")
    data = validated(result.stdout)
    deep = data["data"]["deep"]
    assert (result.exit_code, data["data"]["answer"], deep["answer"]) == (5, "indeterminate", "indeterminate"), deep
    assert deep["coverage"] == {"checked": CELLS - lost, "expected": CELLS}
    assert any(sentence in finding["message"] for finding in data["findings"]), data["findings"]


def test_a_divergence_stands_even_where_evidence_is_missing(cli, drifted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(drifted, run)
    own_samples(run, chunk=0, rank=0).unlink()
    result = cli("kv-audit", str(run), "--deep", "-o", "json")
    deep = validated(result.stdout)["data"]["deep"]
    assert (result.exit_code, deep["answer"], deep["origin"]) == (3, "diverged", [1])
    assert deep["coverage"]["checked"] < deep["coverage"]["expected"]


def test_two_deep_audits_at_once_agree(real: Path) -> None:
    command = [sys.executable, "-m", "tpctl", "kv-audit", str(real), "--deep", "-o", "json"]
    audits = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [validated(audit.communicate(timeout=120)[0]) for audit in audits]
    assert [one["data"]["deep"]["answer"] for one in said] == ["consistent"] * 2
    assert [audit.returncode for audit in audits] == [0, 0]


def test_a_replay_past_its_deadline_is_ended_and_proves_nothing(cli, real: Path) -> None:
    result = cli("kv-audit", str(real), "--deep", "--replay-timeout", "0.05", "-o", "json")
    data = validated(result.stdout)
    assert (result.exit_code, data["data"]["answer"]) == (6, "indeterminate")
    assert data["data"]["deep"]["coverage"]["checked"] == 0
    assert any("was ended after 0.05 s" in finding["message"] for finding in data["findings"])


def processes_of(directory: Path) -> list[str]:
    """Those that name the directory on their command line, other than this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # it has just gone
        if str(directory).encode() in words and int(path.parent.name) != os.getpid():
            found.append(words.decode(errors="replace"))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_audit_leaves_no_process(number: int, code: int, real: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tpctl", "kv-audit", str(real), "--deep"]
    audit = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (logs := list(tmp_path.glob("tpctl-replay-*/stderr.log"))) and time.monotonic() < deadline:
        threading.Event().wait(0.01)  # another process' file: there is no event to wait for
    assert logs
    audit.send_signal(number)
    assert audit.wait(30) == code
    assert code != 130 or list(tmp_path.iterdir()) == []
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not left


def test_a_rank_that_cannot_keep_samples_serves_on_and_is_not_passed(cli, weights_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "ranks").mkdir(parents=True)
    samples_dir(run, 1).write_text("in the way")
    outcome = run_ranks(run, make_config(weights_cache, run__chunks=1))
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert [len(report["warnings"]) for report in outcome.reports.values()] == [0, 1]
    assert outcome.reports[1]["warnings"][0].startswith("no cache samples from the start")
    deep = validated(cli("kv-audit", str(run), "--deep", "-o", "json").stdout)["data"]["deep"]
    assert [rank["verdict"] for rank in deep["ranks"]] == ["consistent", "indeterminate"]
    assert deep["answer"] == "indeterminate"


def test_a_drift_has_no_guard_to_switch_off(weights_cache: Path) -> None:
    with pytest.raises(ConfigError, match="no guard to switch off"):
        differ(drifting(weights_cache, 1, 1, drill__without_guard=True), 0)


def test_nothing_is_kept_unless_asked_for(cli, weights_cache: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "run", make_config(weights_cache, run__record_frames=False, run__chunks=1))
    assert not (run / "frames").exists()
    assert not list((run / "ranks").glob("*.kv"))
    assert cli("kv-audit", str(run), "--deep").exit_code == 5
