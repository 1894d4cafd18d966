"""A running job is watched: its metrics by command and over HTTP, its rules and dashboard, its states, its load."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.control_load import fire
from engine.config import EngineConfig
from engine.report import RankReport
from tests.cli.conftest import validated
from tests.cli.jobs import data_of, in_state, sets, state, until
from tpctl.commands.metrics import File, read_file
from tpctl.jobs import place, start
from tpctl.jobs.ending import order_drain
from tpctl.jobs.order import OnDeadline
from tpctl.jobs.place import JobDir
from tpctl.jobs.record import Attempt

__all__ = ["state"]

NAME = re.compile(r"\btpctl_[a-z0-9_]+")
OWN = {"tpctl"}  # the scrape job's own name


def names_of(text: str) -> set[str]:
    """Every sample's name in an exposition, as the reference parser reads it."""
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def values(text: str, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def wanted() -> set[str]:
    rules = yaml.safe_load(read_file(File.alert_rules))
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads(read_file(File.dashboard))
    expressions += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [board["templating"]["list"][1]["query"]["query"]]
    assert len(expressions) > 25
    return {name for expression in expressions for name in NAME.findall(expression)}


def test_a_job_is_watched(cli, state):
    """One job for all of it: metrics, idle, and the end."""
    up = data_of(cli, "up", "--name", "seen", "--metrics-port", "0", *sets("plan.tp_plan=pp0"))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", up["metrics_url"])
    until(cli, "seen", lambda data: (data["emitted"] or 0) >= 5, "five chunks")
    assert data_of(cli, "status", "seen")["metrics_url"] == up["metrics_url"]
    assert cli("cut", "seen").exit_code == 0
    with urllib.request.urlopen(up["metrics_url"], timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        served = answer.read().decode()
    assert names_of(served) == names_of(cli("metrics", "seen").stdout)
    missing = wanted() - names_of(served)
    assert not missing
    assert values(served, "tpctl_job_state")["running",] == 1
    assert sum(values(served, "tpctl_job_state").values()) == 1
    assert values(served, "tpctl_cache_epoch")[()] == 1
    assert values(served, "tpctl_control_up")[()] == 1
    assert values(served, "tpctl_control_requests_total")["steer", "accepted"] == 1
    counted, digests = (
        values(served, "tpctl_chunk_period_seconds_count")[()],
        values(served, "tpctl_digest_checks_total"),
    )
    assert digests["input",] == digests["output",] == counted >= 5
    assert digests["kv",] == 1
    assert digests["fingerprint",] == 2  # at the first chunk, and at the cut
    emitted = values(served, "tpctl_chunks_total")["emitted",]
    # One may be out and not recorded yet; others may be recorded and still wait for the sinks' thread.
    assert -3 <= emitted - counted <= 1
    assert all(value > 50e6 for value in values(served, "tpctl_rank_resident_memory_bytes").values())
    said = validated(cli("metrics", "seen", "-o", "json").stdout)
    assert {family["name"] for family in said["data"]["families"]} >= {"tpctl_stage_seconds", "tpctl_build_info"}

    clocks_that_jump_move_no_state(cli, state / "seen")
    fired = fire(state / "seen" / "control.sock", 300, 1.0)
    assert (fired.sent, fired.answered, fired.lost) == (300, 300, 0)

    held = data_of(cli, "set", "seen", "paused=true")
    assert held["state"] == "held"
    idle = until(cli, "seen", in_state("idle"), "the pause")
    assert idle["verdict"] == "PASS"
    assert idle["account"]["emitted"] + idle["account"]["dropped"] == held["chunk_index"] == idle["account"]["accepted"]
    assert idle["ranks"][0]["phase"] == "paused"
    assert values(cli("metrics", "seen").stdout, "tpctl_job_state")["idle",] == 1
    assert data_of(cli, "set", "seen", "paused=false")["state"] == "shown"
    assert data_of(cli, "status", "seen")["state"] == "running"
    a_drain_that_its_launcher_holds_up(cli, state / "seen")
    assert cli("drain", "seen").exit_code == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(up["metrics_url"], timeout=30)
    over = cli("metrics", "seen")
    assert over.exit_code == 5
    assert values(over.stdout, "tpctl_control_up")[()] == 0
    assert values(over.stdout, "tpctl_job_state")["drained",] == 1


def clocks_that_jump_move_no_state(cli, job: Path) -> None:
    """The wall clock was set: what it stamped lies decades ahead or behind."""
    record = json.loads((job / "job.json").read_text())
    record["created_at"] += 1e9
    record["attempts"][0]["started_at"] -= 1e9
    (job / "job.json").write_text(json.dumps(record))
    for path in [path for path in job.rglob("*") if path.is_file()]:
        os.utime(path, (0, 0))
    found = data_of(cli, "status", "seen")
    assert (found["state"], found["verdict"]) == ("running", "PASS")
    assert 0 <= found["frame_age_s"] < 60
    assert 0 < found["age_s"] < 300
    assert 0 <= values(cli("metrics", "seen").stdout, "tpctl_last_frame_age_seconds")[()] < 60


def a_drain_that_its_launcher_holds_up(cli, job: Path) -> None:
    """The ranks leave, and the launcher does not say so: the job is still draining."""
    launcher = json.loads((job / "job.json").read_text())["attempts"][0]["launcher"]["pid"]
    os.kill(launcher, signal.SIGSTOP)
    try:
        order_drain(JobDir(job), 30.0, OnDeadline.abort)
        until(cli, "seen", in_state("draining"), "the drain")
    finally:
        os.kill(launcher, signal.SIGCONT)


def test_a_tripwire_of_any_attempt_is_counted_and_an_unheard_job_says_so(cli, state):
    job = place.make("past")
    record = start.freeze(job, EngineConfig(), "on-failure", 5)
    attempts = []
    for number, fm in enumerate(("FM-30", "FM-30", None)):
        ranks = job.run_dir(number) / "ranks"
        ranks.mkdir(parents=True)
        error = {"fm": fm, "code": "TP-3001", "message": "a digest differs"}
        RankReport(ranks / "rank1.json", 1, exit_code=70 if fm else 73, error=error).write()
        attempts.append(Attempt(number, "tag", 0.0, ended_at=1.0))
    replace(record, attempts=tuple(attempts), ending="failed").write(job.record)
    told = cli("metrics", "past")
    assert told.exit_code == 5
    tripped = {fm: count for (fm,), count in values(told.stdout, "tpctl_tripwires_total").items() if count}
    assert tripped == {"FM-30": 2}
    assert values(told.stdout, "tpctl_job_restarts_total")[()] == 2
    assert values(told.stdout, "tpctl_control_up")[()] == 0
    said = validated(cli("metrics", "past", "-o", "json").stdout)
    assert (said["verdict"], said["coverage"]) == ("UNKNOWN", {"checked": 1, "expected": 2})


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_rules_the_panels_and_the_scrape_configuration(tmp_path):
    (tmp_path / "alerts.yml").write_text(read_file(File.alert_rules))
    (tmp_path / "scrape.yml").write_text(read_file(File.scrape_config))
    panels = json.loads(read_file(File.dashboard))["panels"]
    shown = [
        {"record": f"shown:{panel['id']}:{target['refId']}", "expr": target["expr"].replace("$instance", "here")}
        for panel in panels
        for target in panel["targets"]
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": shown}]}))
    for what, name in (("rules", "alerts.yml"), ("rules", "panels.yml"), ("config", "scrape.yml")):
        done = subprocess.run(
            ["promtool", "check", what, tmp_path / name], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


# What Prometheus is to see, one value a minute, and the labels of each alert that must then fire at a minute.
RUNNING = {'tpctl_job_state{state="running"}': "1x120", 'tpctl_chunks_total{fate="emitted"}': "0+240x120"}
RANKS = {'tpctl_ranks{which="expected"}': "2x120", 'tpctl_ranks{which="alive"}': "2x120"}
WELL = {**RUNNING, **RANKS, "tpctl_control_up": "1x120", "up": "1x120", 'tpctl_drops_total{reason="stale"}': "0x120"}
SLOW = {
    'tpctl_chunk_period_seconds_bucket{le="0.2"}': "0+100x60 6000+80x60",
    'tpctl_chunk_period_seconds_bucket{le="5"}': "0+100x60 6000+100x60",
    'tpctl_chunk_period_seconds_bucket{le="+Inf"}': "0+100x60 6000+100x60",
    "tpctl_chunk_period_seconds_sum": "0+10x60 600+40x60",
    "tpctl_chunk_period_seconds_count": "0+100x60 6000+100x60",
}
EVEN = {name: values.split()[0].replace("x60", "x120") for name, values in SLOW.items()}
ALERTS = [
    ("TpctlFramesNotAdvancing", {'tpctl_job_state{state="wedged"}': "1x120"}, 5, {"state": "wedged"}),
    ("TpctlFramesNotAdvancing", {'tpctl_chunks_total{fate="emitted"}': "100x120"}, 5, {"fate": "emitted"}),
    ("TpctlJobUnreachable", {"up": "0x120"}, 5, {}),
    ("TpctlJobUnreachable", {"tpctl_control_up": "0x120"}, 5, {}),
    ("TpctlStarved", {'tpctl_job_starved_by{by="sink"}': "1x120"}, 5, {"by": "sink"}),
    ("TpctlDrops", {'tpctl_drops_total{reason="stale"}': "0+1x120"}, 15, {"reason": "stale"}),
    ("TpctlPeriodSlow", SLOW, 75, {}),
    ("TpctlMemoryGrows", {'tpctl_rank_resident_memory_bytes{rank="1"}': "1e9+1e8x120"}, 70, {"rank": "1"}),
    ("TpctlRestarts", {"tpctl_job_restarts_total": "0x20 1x100"}, 22, {}),
    ("TpctlTripwire", {'tpctl_tripwires_total{fm="FM-30"}': "0x20 2x100"}, 22, {"fm": "FM-30"}),
    ("TpctlRankMissing", {'tpctl_ranks{which="alive"}': "1x120"}, 5, {}),
]


def alert_test(series: dict[str, str], minute: int, fires: dict[str, dict[str, str]]) -> dict[str, Any]:
    """One test of promtool: each alert that is not to fire is looked at, too."""
    where = 'instance="here:1", job="tpctl"'
    rules = yaml.safe_load(read_file(File.alert_rules))["groups"][0]["rules"]
    labelled = {
        name.replace("}", f", {where}}}") if "{" in name else f"{name}{{{where}}}": values
        for name, values in {**WELL, **EVEN, **series}.items()
    }
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in labelled.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{minute}m",
                "alertname": rule["alert"],
                "exp_alerts": [
                    {"exp_labels": {**rule["labels"], "instance": "here:1", "job": "tpctl", **fires[rule["alert"]]}}
                ]
                if rule["alert"] in fires
                else [],
            }
            for rule in rules
        ],
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_each_alert_fires_for_what_it_is_about_and_none_for_a_job_that_is_well(tmp_path):
    rules = yaml.safe_load(read_file(File.alert_rules))
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # promtool would compare their text as well
    assert {alert for alert, *_ in ALERTS} == {rule["alert"] for rule in rules["groups"][0]["rules"]}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    tests = [alert_test(series, minute, {alert: labels}) for alert, series, minute, labels in ALERTS]
    tests.append(alert_test({}, 100, {}))
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests.yml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_are_whole():
    rules = yaml.safe_load(read_file(File.alert_rules))["groups"][0]["rules"]
    for rule in rules:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule)
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["next"].startswith("tpctl ")
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 7
    scrape = yaml.safe_load(read_file(File.scrape_config))
    assert scrape["scrape_configs"][0]["job_name"] == "tpctl"
    panels = json.loads(read_file(File.dashboard))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_a_port_that_is_taken_is_named_before_anything_is_started(cli, state):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = cli("up", "--name", "one", "--metrics-port", str(taken.getsockname()[1]), *sets())
    assert wrong.exit_code == 2
    assert "TP-7856" in wrong.stderr
    assert not state.exists()


@pytest.mark.parametrize("args", [[], ["JOB", "--dashboard"], ["--dashboard", "--alert-rules"]])
def test_a_job_or_one_file_is_named(args, cli, state):
    wrong = cli("metrics", *args)
    assert wrong.exit_code == 2
    assert "TP-7857" in wrong.stderr


@pytest.mark.parametrize("file", list(File))
def test_a_file_is_printed_as_it_stands(file, cli):
    assert cli("metrics", f"--{file.value}").stdout == read_file(file)
    said = validated(cli("metrics", f"--{file.value}", "-o", "json").stdout)["data"]
    assert (said["file"], said["text"]) == (file.value, read_file(file))
