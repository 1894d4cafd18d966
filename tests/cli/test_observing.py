"""A running job is watched: its metrics by command and over HTTP, its rules and dashboard, its states, its load."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.conftest import validated
from tests.cli.jobs import data_of, in_state, sets, state, until
from tpctl.commands.metrics import File, read_file

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
    assert 0 <= emitted - counted <= 1  # one may be out, and not recorded yet
    assert all(value > 50e6 for value in values(served, "tpctl_rank_resident_memory_bytes").values())
    said = validated(cli("metrics", "seen", "-o", "json").stdout)
    assert {family["name"] for family in said["data"]["families"]} >= {"tpctl_stage_seconds", "tpctl_build_info"}

    held = data_of(cli, "set", "seen", "paused=true")
    assert held["state"] == "held"
    idle = until(cli, "seen", in_state("idle"), "the pause")
    assert idle["verdict"] == "PASS"
    assert idle["account"]["emitted"] + idle["account"]["dropped"] == held["chunk_index"] == idle["account"]["accepted"]
    assert idle["ranks"][0]["phase"] == "paused"
    assert values(cli("metrics", "seen").stdout, "tpctl_job_state")["idle",] == 1
    assert data_of(cli, "set", "seen", "paused=false")["state"] == "shown"
    assert data_of(cli, "status", "seen")["state"] == "running"
    assert cli("drain", "seen").exit_code == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(up["metrics_url"], timeout=30)
    over = cli("metrics", "seen")
    assert over.exit_code == 5
    assert values(over.stdout, "tpctl_control_up")[()] == 0
    assert values(over.stdout, "tpctl_job_state")["drained",] == 1


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
