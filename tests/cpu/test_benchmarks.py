"""The instruments of benchmarks/: turns, ratios and verdicts; ranks that fail are named; the program runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import Pairs, Row, in_turns
from benchmarks.pair import run_pair

ROOT = Path(__file__).parents[2]


def answer_sum(rank: int, pg: Any, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    total = torch.tensor([rank + options["offset"]])
    torch.distributed.all_reduce(total, group=pg)
    return {"rank": rank, "sum": int(total), "threads": torch.get_num_threads()}


def fail_on_one(rank: int, pg: Any, options: dict[str, Any]) -> None:
    if rank == 1:
        raise ValueError("broken on purpose")


def die_on_one(rank: int, pg: Any, options: dict[str, Any]) -> None:
    if rank == 1:
        os._exit(9)


def test_rivals_take_turns_and_the_order_is_reversed_every_second_time() -> None:
    calls: list[str] = []

    def call(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds

    pairs = in_turns({"a": lambda: call("a", 2.0), "b": lambda: call("b", 1.0)}, turns=3, warm_up=1)
    assert "".join(calls) == "abbaabba"
    assert pairs.times == {"a": [2.0] * 3, "b": [1.0] * 3}


def test_the_ratio_is_the_median_over_pairs_so_drift_cancels() -> None:
    # The machine slows down threefold in mid-run; the medians of the two sides alone would say 3.
    pairs = Pairs({"ours": [1.2, 3.6, 3.6], "rival": [1.0, 1.0, 3.0]})
    row = pairs.row("x", "ours", "rival", rival_name="r", target=1.25)
    assert math.isclose(row.ratio, 1.2)
    assert math.isclose(row.low or 0, 1.2)
    assert math.isclose(row.high or 0, 3.6)
    assert math.isclose(row.ours, 3600)
    assert row.met is True
    speed_up = pairs.row("x", "ours", "rival", rival_name="r", inverse=True, target=1.5)
    assert math.isclose(speed_up.ratio, 1 / 1.2)
    assert speed_up.met is False
    assert speed_up.to_dict()["met"] is False


def test_without_a_target_there_is_no_verdict() -> None:
    assert Row("x", 1, "r", 1, "ms", 1.0).met is None


def test_two_real_ranks_answer_through_a_collective() -> None:
    assert run_pair(answer_sum, {"offset": 10}, deadline_s=60) == {"rank": 0, "sum": 21, "threads": 1}


@pytest.mark.parametrize(
    ("body", "reason"), [(fail_on_one, "rank 1 failed(.|\n)*broken on purpose"), (die_on_one, "rank 1 died")]
)
def test_a_rank_that_fails_is_named_and_nobody_waits_for_it(body: Any, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        run_pair(body, {}, deadline_s=60)


def test_the_program_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "help_time", "--quick", "--output", str(tmp_path / "r.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "tpctl --help" in result.stdout
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["schema"], data["quick"], data["failures"]) == ("tpctl.benchmarks", True, {})
    row = data["rows"][0]
    assert (row["benchmark"], row["target"], row["met"]) == ("help_time", 1.5, row["ratio"] <= 1.5)
    assert row["low"] <= row["ratio"] <= row["high"]


def test_an_unknown_benchmark_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "benchmarks", "envelop"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "envelop; known: help_time, envelope" in result.stderr
