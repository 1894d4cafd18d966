"""`tpctl bringup` with the real engine: a case that holds, cases that fail in their own way, an interrupt."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from urllib.parse import unquote

import jsonschema
import pytest

from tests.cli.conftest import validated
from tests.cli.test_html import fetched
from tests.cli.test_launch import gone, survivors
from tpctl.schemas import load_schema

ROOT = Path(__file__).resolve().parents[2]
PROMPT = 'event = [{ at_chunk = 0, prompt = "a lighthouse" }]\n'
GATES = (
    'gates = ["exit-codes", "latents-equal", "pixels-equal", "frames", "calls", "digests", "outputs", "account", '
    '"leftovers"]\n'
)


def start(tmp_path: Path, *args: str, matrix: str = "", **variables: str) -> subprocess.Popen[str]:
    (tmp_path / "m.toml").write_text(matrix)
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(tmp_path / "xdg"), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "tpctl", "bringup", "--run-dir", "run", "-o", "json", *args],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_generator_only_workers_hold(tmp_path):
    matrix = f"""
[defaults]
chunks = 2
{PROMPT}{GATES}
[[case]]
id = "ref"
[[case]]
id = "c"
plan = "v1.1c"
tp = 2
reference = "ref"
"""
    process = start(tmp_path, "--matrix", "m.toml", "--junit", "j.xml", "--html", "r.html", matrix=matrix)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    data = validated(out)
    assert data["verdict"] == "PASS"
    assert data["coverage"]["checked"] == data["coverage"]["expected"] == 15
    case = data["data"]["cases"][1]
    assert case["metrics"]["calls_expected"] == 9
    assert case["metrics"]["worker_peak_bytes"] < case["metrics"]["leader_peak_bytes"]
    assert case["metrics"]["ranks"]["1"]["role"] == "stage1"
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text()) == data
    assert "<testsuite " in (tmp_path / "j.xml").read_text()
    page = (tmp_path / "r.html").read_text()
    assert "2 PASS" in page
    assert not fetched(page)
    linked = [unquote(url) for url in re.findall(r'href="([^#"]+)"', page)]
    assert "run/c/ranks/rank1.json" in linked
    assert all((tmp_path / url).is_file() for url in linked)
    for path in sorted(run.glob("*/ranks/rank*.json")):
        jsonschema.Draft202012Validator(load_schema("rank-report")).validate(json.loads(path.read_text()))
    assert "[2/2] PASS" in err
    assert survivors(tmp_path) == []


@pytest.mark.slow
def test_failures_name_their_cause_and_the_other_cases_still_run(tmp_path):
    (tmp_path / "blocked").write_text("a file where a directory should be")
    matrix = f"""
[defaults]
chunks = 1
{PROMPT}
[[case]]
id = "sink"
gates = ["exit-codes", "outputs"]
config = {{ "sink.directory" = "{tmp_path / "blocked" / "out"}" }}
[[case]]
id = "late"
gates = ["exit-codes", "leftovers"]
deadline_s = 0.5
[[case]]
id = "weights"
gates = ["exit-codes"]
config = {{ "model.checkpoint" = "{tmp_path / "nothing.safetensors"}" }}
"""
    process = start(tmp_path, "--matrix", "m.toml", matrix=matrix)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 3, err
    cases = {case["id"]: case for case in validated(out)["data"]["cases"]}
    assert cases["sink"]["verdict"] == cases["late"]["verdict"] == cases["weights"]["verdict"] == "FAIL"
    assert cases["sink"]["cause"]["rank"] == 0
    assert cases["sink"]["cause"]["code"].startswith("TP-51")
    assert "deadline" in cases["late"]["cause"]["message"]
    assert cases["weights"]["cause"]["code"].startswith(("TP-40", "TP-10"))
    assert (tmp_path / cases["weights"]["cause"]["log"]).is_file()
    assert survivors(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_130_and_leaves_nothing(tmp_path, signum):
    matrix = f'[[case]]\nid = "ref"\nchunks = 500\n{PROMPT}gates = ["calls"]\n[[case]]\nid = "b"\ngates = ["calls"]\n'
    process = start(tmp_path, "--matrix", "m.toml", matrix=matrix)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "ref" / "ranks").exists():
            assert time.monotonic() < end, "the rank never started"
            assert process.poll() is None, process.communicate()
            os.sched_yield()
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130, err
    data = validated(out)
    assert data["verdict"] == "UNCHECKED"
    assert data["coverage"]["checked"] == 0
    assert survivors(tmp_path) == []


@pytest.mark.slow
def test_a_bring_up_that_is_killed_leaves_nothing_behind(tmp_path):
    matrix = f"""
[defaults]
chunks = 100000
config = {{ "sink.kinds" = ["null"] }}
{PROMPT}{GATES}
[[case]]
id = "long"
plan = "v0"
tp = 2
"""
    process = start(tmp_path, "--matrix", "m.toml", "--run-dir", str(tmp_path / "run"), matrix=matrix)
    records, nap = tmp_path / "run" / "long" / "ranks" / "rank0.chunks.jsonl", Event()
    end = time.monotonic() + 120
    while not records.exists() or records.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no chunk"
        nap.wait(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert gone(tmp_path, 60) == []
    account = json.loads((records.parent / "rank0.json").read_text())["account"]
    assert account["accepted"] == account["emitted"] >= 2


@pytest.mark.slow
def test_what_a_host_lacks_is_skipped_where_the_case_says_so_and_only_there(tmp_path, weights_cache):
    """No C++ compiler. A skipped case answers for nothing, so alone it is no PASS."""
    case = 'gates = ["calls"]\nchunks = 1\nconfig = { "model.compile" = "inductor" }\n'
    matrix = f'[[case]]\nid = "may"\nskip_on = "TP-1032"\n{case}[[case]]\nid = "must"\n{case}'
    lacking = {"CXX": str(tmp_path / "none"), "TPCTL_MODEL_CACHE_DIR": str(weights_cache)}
    for cases, code, verdicts in (
        (("may", "must"), 3, {"may": "SKIP", "must": "FAIL"}),
        (("may",), 5, {"may": "SKIP"}),
    ):
        place = tmp_path / str(code)
        place.mkdir()
        chosen = [word for name in cases for word in ("--case", name)]
        process = start(place, "--matrix", "m.toml", *chosen, matrix=matrix, **lacking)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        rows = {row["id"]: row for row in validated(out)["data"]["cases"]}
        assert {name: row["verdict"] for name, row in rows.items()} == verdicts
        assert "No working C++ compiler" in rows["may"]["findings"][0]["message"]
