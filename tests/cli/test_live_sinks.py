"""A job with a slow sink, from outside: its receipt names the sink, and its account says what was lost."""

from __future__ import annotations

import dataclasses
import os
import tomllib

from engine.config import EngineConfig
from tests.cli.conftest import validated
from tests.cli.jobs import sets, state, until
from tpctl.commands.drain import judge
from tpctl.exitcodes import ExitCode
from tpctl.jobs import place, start
from tpctl.jobs.ending import Receipt
from tpctl.verdict import Verdict

__all__ = ["state"]


def test_a_drain_that_a_sink_holds_up_names_it(cli, state, tmp_path):
    options = sets(f"sink.directory={tmp_path}", "sink.queue_chunks=1", "geometry.height=64", "geometry.width=64")
    up = ["up", "--name", "slow", "--no-referee", "--on-slow-sink", "drop-oldest", *options, "--set", "sink.kinds=pipe"]
    os.mkfifo(tmp_path / "frames.rgb", 0o600)  # as an attempt before this one left it, and its reader with it
    stalled = os.open(tmp_path / "frames.rgb", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert cli(*up).exit_code == 0
        until(cli, "slow", lambda data: data["account"].get("dropped", 0) >= 2, "two chunks dropped")
        done = cli("drain", "slow", "--deadline", "2", "-o", "json")
    finally:
        os.close(stalled)
    assert done.exit_code == 6, done.stdout
    receipt = validated(done.stdout)["data"]
    account, drops = receipt["account"], receipt["drops"]
    assert receipt["held_up_by"].startswith("sink pipe: writing chunk")
    assert account["accepted"] == account["emitted"] + account["dropped"] + account["abandoned"]
    assert drops == {"stale": 0, "slow_sink": account["dropped"]}
    assert receipt["balanced"]
    assert receipt["abandoned_chunks"] == [account["emitted"], account["accepted"] - 1]
    assert receipt["leftovers"] == []


def test_the_options_of_up_are_those_of_the_configuration(cli, state, tmp_path, weights_cache):
    (tmp_path / "film.mp4").touch()
    said = ["--source", "film.mp4", "--noise-scale", "0.6", "--on-slow-sink", "fail"]
    planned = validated(cli("up", "--name", "clip", *said, "--dry-run", "-o", "json").stdout)["data"]
    config = EngineConfig().replace(
        model__cache_dir=str(weights_cache),
        run__chunks=0,
        source__video="film.mp4",
        source__noise_scale=0.6,
        sink__on_slow="fail",
    )
    assert planned["parity_key"] == config.parity_key()
    for wrong, code in (
        (("--source", "nowhere.mp4"), "TP-5152"),
        (("--source", "film.mp4", "--noise-scale", "0"), "TP-5150"),
        (("--source", "film.mp4", "--noise-scale", "0.2"), "TP-5150"),
        (("--on-slow-sink", "drop"), "--on-slow-sink"),
    ):
        refused = cli("up", "--name", "wrong", *wrong)
        assert refused.exit_code == 2, wrong
        assert code in refused.stderr
    assert list(state.iterdir()) == []


def test_a_frozen_job_reads_its_source_from_anywhere(cli, state, tmp_path):
    (tmp_path / "film.mp4").touch()
    job = place.make("clip")
    start.freeze(job, EngineConfig().replace(source__video="film.mp4"), "no", 0)
    assert tomllib.loads(job.config.read_text())["source"]["video"] == str(tmp_path / "film.mp4")


def test_what_a_slow_sink_cost_is_a_loss():
    def receipt(**changes):
        fields = dict.fromkeys(item.name for item in dataclasses.fields(Receipt))
        return Receipt(
            **(fields | {"ending": "drained", "balanced": True, "leftovers": [], "abandoned_chunks": []} | changes)
        )

    assert judge(receipt(drops={"stale": 3, "slow_sink": 0})) == (ExitCode.PASS, Verdict.PASS)
    assert judge(receipt(drops={"stale": 0, "slow_sink": 1})) == (ExitCode.DRAINED_WITH_LOSS, Verdict.WARN)
    assert judge(receipt()) == (ExitCode.PASS, Verdict.PASS)
