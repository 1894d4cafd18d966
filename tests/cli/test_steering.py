"""A running job is steered: each receipt names the chunk at which the change applied, and the ranks' records agree."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import validated
from tests.cli.jobs import data_of, sets, state, until

__all__ = ["state"]
FENCES = ("call_id", "cache_epoch", "control_epoch", "do_kv_recompute", "output_digest_i64")


V0 = ("plan.tp_plan=v0", "plan.tp=2")
# Without recompute, chunks are in flight at any time: so also when a cut comes.
PP0 = ("plan.tp_plan=pp0", "schedule.recompute=false")


@pytest.mark.parametrize("plan", [V0, PP0], ids=["v0", "pp0-in-flight"])
def test_prompt_cut_and_set_apply_at_the_chunk_that_their_receipts_name(cli, state, plan):
    assert cli("up", "--name", "live", *sets(*plan)).exit_code == 0
    until(cli, "live", lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
    said = data_of(cli, "prompt", "live", "a fox at night", "--id", "p1")
    assert said["state"] == "shown"
    again = data_of(cli, "prompt", "live", "a bear", "--id", "p1")
    assert again["chunk_index"] == said["chunk_index"]
    biased = data_of(cli, "set", "live", "bias=0.5")
    assert data_of(cli, "set", "live", "bias=0.5")["chunk_index"] > biased["chunk_index"]  # and changes nothing
    cut = data_of(cli, "cut", "live")
    other = data_of(cli, "set", "live", f"recompute={'true' if plan is PP0 else 'false'}")
    at = [receipt["chunk_index"] for receipt in (said, biased, cut, other)]
    assert at == sorted(set(at))
    wrong = cli("set", "live", "bias=2")
    assert wrong.exit_code == 3
    assert "TP-7621" in wrong.stderr
    assert "bias must be in (0, 1]" in wrong.stderr

    done = cli("drain", "live", "-o", "json")
    assert done.exit_code == 0, done.stdout  # what the operator's own cut made stale is no loss
    receipt = validated(done.stdout)["data"]
    assert receipt["balanced"]
    ranks = state / "live" / "attempts" / "0" / "ranks"
    paths = sorted(ranks.glob("rank*.chunks.jsonl"))
    assert [path.name[4] for path in paths] == (["1"] if plan is PP0 else ["0", "1"])  # of the mesh
    for path in paths:
        rows = [row for row in map(json.loads, path.read_text().splitlines()) if "call_id" in row]
        assert [row["chunk_index"] for row in rows] == list(range(len(rows)))
        applied(rows, said, biased, cut, other)
    if plan is PP0:
        dropped(json.loads((ranks / "rank0.json").read_text()), rows, cut["chunk_index"])
    gone = cli("cut", "live")
    assert gone.exit_code == 7
    assert "TP-7602" in gone.stderr


def applied(rows, said, biased, cut, other):
    """Every chunk of a rank has the epochs and the control that the receipts say, from the chunk they name on."""
    for row in rows:
        before = {id(change): row["chunk_index"] < change["chunk_index"] for change in (said, biased, cut, other)}
        assert row["control_epoch"] == sum(not before[id(change)] for change in (said, biased, other)), row
        assert row["cache_epoch"] == (0 if before[id(cut)] else 1), row
        assert row["kv_cache_attention_bias"] == (0.3 if before[id(biased)] else 0.5), row
        begins = row["chunk_index"] in (0, cut["chunk_index"])
        assert row["init_cache"] == begins, row
        assert (row["current_start_frame"] == 0) == begins, row
        assert row["reset_crossattn_cache"] == (begins or row["chunk_index"] == said["chunk_index"]), row


def dropped(report, rows, cut_at):
    """What flew when the cut came: made by the mesh, one answer each, and neither decoded nor emitted."""
    account = report["account"]
    assert account["dropped"] >= 1
    assert account["abandoned"] == 0
    assert account["accepted"] == len(rows) == account["emitted"] + account["dropped"]
    emitted = [chunk["chunk_index"] for chunk in report["chunks"]]
    lost = sorted({row["chunk_index"] for row in rows} - set(emitted))
    assert lost == list(range(cut_at - account["dropped"], cut_at))
    assert emitted == sorted(emitted)
    by_index = {row["chunk_index"]: row for row in rows}
    for chunk in report["chunks"]:  # both sides took each chunk for the same
        mine, theirs = ({key: each[key] for key in FENCES} for each in (chunk, by_index[chunk["chunk_index"]]))
        assert mine == theirs


@pytest.mark.parametrize(
    ("pair", "code"), [("bais=1", "TP-7623"), ("bias=high", "TP-7624"), ("recompute=1", "TP-7624")]
)
def test_a_value_that_cannot_be_set_is_refused_before_it_is_sent(pair, code, cli, state):
    wrong = cli("set", "nobody", pair)
    assert wrong.exit_code == 2
    assert code in wrong.stderr
