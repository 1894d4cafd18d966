"""A running job is steered: each receipt names the chunk at which the change applied, and the ranks' records agree."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import validated
from tests.cli.jobs import data_of, sets, state, until

__all__ = ["state"]


@pytest.mark.parametrize("plan", [("plan.tp_plan=v0", "plan.tp=2"), ("plan.tp_plan=pp0",)], ids=["v0", "pp0"])
def test_prompt_cut_and_set_apply_at_the_chunk_that_their_receipts_name(cli, state, plan):
    assert cli("up", "--name", "live", *sets(*plan)).exit_code == 0
    until(cli, "live", lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
    said = data_of(cli, "prompt", "live", "a fox at night", "--id", "p1")
    assert said["state"] == "shown"
    again = data_of(cli, "prompt", "live", "a bear", "--id", "p1")
    assert again["chunk_index"] == said["chunk_index"]
    biased = data_of(cli, "set", "live", "bias=0.5")
    assert biased["chunk_index"] > said["chunk_index"]
    cut = data_of(cli, "cut", "live")
    assert cut["chunk_index"] > biased["chunk_index"]
    wrong = cli("set", "live", "bias=2")
    assert wrong.exit_code == 3
    assert "TP-7621" in wrong.stderr
    assert "bias must be in (0, 1]" in wrong.stderr

    done = cli("drain", "live", "-o", "json")
    assert done.exit_code == 0, done.stdout
    assert validated(done.stdout)["data"]["balanced"]
    ranks = state / "live" / "attempts" / "0" / "ranks"
    paths = sorted(ranks.glob("rank*.chunks.jsonl"))
    assert paths
    for path in paths:
        chunks = {row["chunk_index"]: row for row in map(json.loads, path.read_text().splitlines()) if "call_id" in row}
        at = said["chunk_index"]
        assert chunks[at]["control_epoch"] == chunks[at - 1]["control_epoch"] + 1
        assert chunks[biased["chunk_index"]]["kv_cache_attention_bias"] == 0.5
        assert chunks[biased["chunk_index"] - 1]["kv_cache_attention_bias"] == 0.3
        at = cut["chunk_index"]
        assert (chunks[at - 1]["cache_epoch"], chunks[at]["cache_epoch"]) == (0, 1)
        assert chunks[at]["current_start_frame"] == 0
    gone = cli("cut", "live")
    assert gone.exit_code == 7
    assert "TP-7602" in gone.stderr


@pytest.mark.parametrize(
    ("pair", "code"), [("bais=1", "TP-7623"), ("bias=high", "TP-7624"), ("recompute=1", "TP-7624")]
)
def test_a_value_that_cannot_be_set_is_refused_before_it_is_sent(pair, code, cli, state):
    wrong = cli("set", "nobody", pair)
    assert wrong.exit_code == 2
    assert code in wrong.stderr
