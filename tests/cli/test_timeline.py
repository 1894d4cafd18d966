"""`tpctl timeline` on the run directory of a real pp bring-up: a trace that viewers take, and a picture."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from engine.blackbox import read
from engine.records import read_stages
from tests.cli.conftest import validated
from tests.cli.runs import write_run
from tests.support.traces import problems
from tpctl.trace.events import LANES
from tpctl.trace.run import read_run

CHUNKS = 6
MATRIX = f"""
[defaults]
chunks = {CHUNKS}
event = [{{ at_chunk = 0, prompt = "a lighthouse" }}]
[[case]]
id = "pp"
plan = "pp0"
gates = ["exit-codes", "calls"]
[case.config]
"sink.kinds" = ["null"]
"geometry.height" = 32
"geometry.width" = 32
"""
TID = {lane.value: number for number, lane in enumerate(LANES)}


@pytest.fixture(scope="module")
def bringup(tmp_path_factory: pytest.TempPathFactory, weights_cache: Path) -> dict:
    """What a bring-up of one pp case said, with its run directory."""
    path = tmp_path_factory.mktemp("timeline")
    (path / "m.toml").write_text(MATRIX)
    command = [sys.executable, "-m", "tpctl", "bringup", "--matrix", str(path / "m.toml"), "--run-dir"]
    command += [str(path / "run"), "--set", f"model.cache_dir={weights_cache}", "-o", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return validated(done.stdout)["data"]["cases"][0]


@pytest.fixture
def run_dir(bringup: dict, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(bringup["run_dir"], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def trace(bringup: dict) -> dict:
    return json.loads(Path(bringup["outputs"]["timeline"]).read_text())


def of(trace: dict, ph: str, **like: object) -> list[dict]:
    return [e for e in trace["traceEvents"] if e["ph"] == ph and all(e[key] == value for key, value in like.items())]


def test_bringup_leaves_both_files_with_a_pp_case(bringup, trace):
    assert sorted(bringup["outputs"]) == ["overlap", "timeline"]
    assert problems(trace) == []
    assert {e["args"]["name"] for e in of(trace, "M", name="process_name")} == {
        "rank 0 (stage0)",
        "rank 1 (stage1+leader)",
    }


def test_every_chunk_is_there_and_each_call_is_one_flow(trace):
    generated = of(trace, "X", pid=1, tid=TID["phase B"])
    assert [e["args"]["chunk_index"] for e in generated] == list(range(CHUNKS))
    assert len(of(trace, "X", pid=0, tid=TID["phase A"])) == CHUNKS
    flows: dict[int, str] = {}
    for event in (e for e in trace["traceEvents"] if e["ph"] in "stf"):
        flows[event["id"]] = flows.get(event["id"], "") + event["ph"] + str(event["pid"])
    assert flows == dict.fromkeys((e["args"]["call_id"] for e in generated), "s0t1f0")


def test_records_and_black_boxes_stand_on_one_clock(trace, bringup):
    """The record of a phase B begins after the commitment point before it and ends after the one at its end."""
    instants = {(e["pid"], e["name"], e["args"]["call_id"]): e["ts"] for e in of(trace, "i")}
    for event in of(trace, "X", pid=1, tid=TID["phase B"]):
        call_id, ends = event["args"]["call_id"], event["ts"] + event["dur"]
        assert instants[1, "enter B", call_id] <= event["ts"] < instants[1, "leave B", call_id] <= ends
    loop_ns, rows = read_stages(Path(bringup["run_dir"]) / "ranks" / "rank0.stages.jsonl")
    for row in rows:
        sent, arrived = (
            (loop_ns + row[name] * 1e6 - trace["otherData"]["first_monotonic_ns"]) / 1e3
            for name in ("tSent_ms", "tArrived_ms")
        )
        assert (
            sent <= instants[0, "send INFER", row["call_id"]] <= instants[0, "recv RESULT", row["call_id"]] <= arrived
        )
    boxes = [read(Path(bringup["run_dir"]) / "ranks" / f"rank{rank}.blackbox") for rank in (0, 1)]
    assert len(of(trace, "i")) == sum(map(len, boxes))


def test_the_queues_keep_their_bounds_and_end_empty(trace):
    for name, unit in (("d_in", "envelopes"), ("d_out", "results")):
        depths = [e["args"][unit] for e in of(trace, "C", name=name)]
        assert len(depths) == 2 * CHUNKS
        assert set(depths) <= {0, 1, 2}
        assert depths[-1] == 0


def broken(trace: dict, what: str) -> dict:
    bad = copy.deepcopy(trace)
    events = bad["traceEvents"]
    slice_ = next(e for e in events if e["ph"] == "X" and e["tid"] == TID["phase B"])
    if what == "dur":
        slice_["dur"] = -1.0
    elif what == "ts":
        slice_["ts"] = float("nan")
    elif what == "pid":
        slice_["pid"] = "1"
    elif what == "nest":
        after = [e for e in events if e["ph"] == "X" and e["tid"] == slice_["tid"] and e["pid"] == slice_["pid"]][1]
        slice_["dur"] = after["ts"] + after["dur"] / 2 - slice_["ts"]
    elif what == "order":
        events.append(events.pop(events.index(slice_)) | {"ts": 0.0})
    elif what == "flow":
        events.remove(next(e for e in events if e["ph"] == "f"))
    elif what == "bound":
        next(e for e in events if e["ph"] == "t")["tid"] = TID["phase A"]
    else:
        events.append({**slice_, "ph": "B", "ts": events[-1]["ts"]})
    return bad


@pytest.mark.parametrize("what", ["dur", "ts", "pid", "nest", "order", "flow", "bound", "balance"])
def test_the_rules_notice_what_they_are_for(what, trace):
    assert problems(broken(trace, what)), what


def test_the_command_says_what_it_wrote(cli, run_dir, tmp_path):
    done = cli("timeline", str(run_dir), "--out", "t.json", "--svg", "o.svg", "-o", "json")
    assert done.exit_code == 0, done.stdout
    answer = validated(done.stdout)
    data = answer["data"]
    named = {finding["id"] for finding in answer["findings"]}
    assert not named & {"timeline.overlap", "overlap.send-after-decode", "timeline.straggler"}  # a healthy run
    assert data["events"]["flows"] == CHUNKS
    assert [row["chunks"] for row in data["ranks"]] == [CHUNKS, CHUNKS]
    assert [row["shift_ms"] for row in data["ranks"]] == [0, 0]
    assert data["overlap"]["chunks"] == CHUNKS - 3
    assert problems(json.loads((tmp_path / "t.json").read_text())) == []
    cut = cli("timeline", str(run_dir), "--out", "l.json", "--last", "2", "-o", "json")
    assert validated(cut.stdout)["data"]["events"]["flows"] == 2
    assert problems(json.loads((tmp_path / "l.json").read_text())) == []
    table = cli("timeline", str(run_dir), "--out", "t.json").stdout
    assert max(map(len, table.splitlines()[:3])) <= 80


def test_the_picture_is_whole_small_and_on_its_own(bringup):
    path = Path(bringup["outputs"]["overlap"])
    assert path.stat().st_size < 20_000
    text = path.read_text()
    assert "prefers-color-scheme:dark" in text
    assert not any(word in text for word in ("<script", "href", "url(", "@import"))
    root = ET.fromstring(text)
    ns = "{http://www.w3.org/2000/svg}"
    assert bringup["id"] in root.find(f"{ns}title").text
    assert "OverlapScore" in root.find(f"{ns}desc").text
    words = [element.text for element in root.iter(f"{ns}text")]
    assert {"stage 0", "link", "mesh", "ms", "B: generate"} <= set(words)
    bars = [e.find(f"{ns}title").text for e in root.iter(f"{ns}rect") if e.find(f"{ns}title") is not None]
    assert {"B: generate, chunk 3", "A: prepare, chunk 3"} <= {bar.rpartition(":")[0] for bar in bars}
    width = float(root.get("width"))
    for element in root.iter(f"{ns}rect"):
        assert 0 <= float(element.get("x", 0)) <= float(element.get("x", 0)) + float(element.get("width")) <= width


def on_another_host(run_dir: Path, by_ns: int, host: str | None) -> None:
    """Rank 1's records, as a host whose monotonic clock is another would have written them."""
    ranks = run_dir / "ranks"
    (ranks / "rank1.blackbox").unlink()
    head, *rows = (json.loads(line) for line in (ranks / "rank1.chunks.jsonl").read_text().splitlines())
    moved = [{**row, "ended_ns": row["ended_ns"] + by_ns, "tB0_ns": row["tB0_ns"] + by_ns} for row in rows]
    (ranks / "rank1.chunks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (head, *moved)))
    if host is not None:
        report = json.loads((ranks / "rank1.json").read_text())
        (ranks / "rank1.json").write_text(json.dumps(report | {"host": host}))


@pytest.mark.parametrize("host", ["elsewhere", None], ids=["another host", "a clock that cannot be the same"])
def test_a_clock_of_its_own_is_found_from_what_was_sent_and_received(host, run_dir, cli):
    before = read_run(run_dir)
    on_another_host(run_dir, 5_000_000_000, host)
    after = read_run(run_dir)
    assert before.ranks[1].shift.error_ns == 0
    found = after.ranks[1].shift
    assert abs(found.by_ns + 5_000_000_000) <= found.error_ns < 1_000_000_000
    began = [{bar.call_id: bar.t0_ns for bar in run.ranks[1].bars if bar.call_id >= 0} for run in (before, after)]
    assert all(abs(began[1][call_id] - t_ns) <= found.error_ns for call_id, t_ns in began[0].items())
    said = cli("timeline", str(run_dir), "--out", "t.json")
    assert "has a clock of its own" in said.stdout
    assert problems(json.loads(Path("t.json").read_text())) == []


def test_a_damaged_black_box_is_named_and_the_rest_is_drawn(cli, run_dir):
    path = run_dir / "ranks" / "rank1.blackbox"
    raw = bytearray(path.read_bytes())
    raw[20] ^= 0xFF  # of its header
    path.write_bytes(raw)
    done = cli("timeline", str(run_dir), "-o", "json")
    assert done.exit_code == 5
    data = validated(done.stdout)
    assert data["verdict"] == "UNKNOWN"
    assert "damaged header" in data["findings"][0]["message"]
    assert data["coverage"] == {"checked": 1, "expected": 2}
    made = json.loads((run_dir / "timeline.json").read_text())
    assert problems(made) == []
    assert len(of(made, "X", pid=1, tid=TID["phase B"])) == CHUNKS
    assert of(made, "i", pid=1) == []


def test_damaged_records_are_named_and_the_report_stands_in(cli, run_dir):
    path = run_dir / "ranks" / "rank0.stages.jsonl"
    path.write_text(path.read_text().replace('{"chunk_index":2', '["chunk_index":2'))
    done = cli("timeline", str(run_dir), "-o", "json")
    assert done.exit_code == 5
    assert "rank0.stages.jsonl is damaged in line 4" in validated(done.stdout)["findings"][0]["message"]
    assert len(of(json.loads((run_dir / "timeline.json").read_text()), "X", pid=0, tid=TID["phase A"])) == CHUNKS
    path.unlink()
    assert cli("timeline", str(run_dir)).exit_code == 0  # the report has its anchor and its chunks


def test_records_without_times_are_no_timeline(cli, tmp_path):
    """Made by an engine that did not keep them: named, never guessed."""
    done = cli("timeline", str(write_run(tmp_path / "old")))
    assert done.exit_code == 7
    assert "TP-7802" in done.stderr
    assert "carry no times" in done.stderr


def test_what_cannot_be_drawn_is_refused(cli, run_dir, tmp_path):
    (tmp_path / "empty" / "ranks").mkdir(parents=True)
    for args, code, exit_code in (
        (("nowhere",), "TP-7800", 7),
        ((str(tmp_path / "empty"),), "TP-7802", 7),
        ((str(run_dir), "--out", "no/t.json"), "TP-7805", 2),
    ):
        wrong = cli("timeline", *args)
        assert (wrong.exit_code, code in wrong.stderr) == (exit_code, True), wrong.stderr
    shutil.copytree(run_dir, tmp_path / "two" / "a")
    shutil.copytree(run_dir, tmp_path / "two" / "b")
    assert "TP-7801" in cli("timeline", str(tmp_path / "two")).stderr
    path = run_dir / "ranks" / "rank0.stages.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    short = cli("timeline", str(run_dir), "--svg", "o.svg")
    assert "TP-7803" in short.stderr
    assert not Path("o.svg").exists()
