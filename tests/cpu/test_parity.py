"""Parity: pure comparison, and the real exchange between processes is in test_worker."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import engine.comm.parity as parity
from benchmarks.parity_scale import CASES, Measured, observation, ours, rival, simulate
from engine.comm.group import Group
from engine.config import EngineConfig, dotted_keys
from engine.errors import ParityError

EQUAL, ONE, EVERY = CASES
HASH = 48  # bytes of the first exchange: sha256, length, protocol


def test_a_group_of_one_always_agrees() -> None:
    parity.check(Group.solo(), {"a": "1"}, "anything")


def test_every_configuration_key_is_in_the_parity_set() -> None:
    seen = parity.launch_observation(EngineConfig())
    assert {f"config.{key}" for key in dotted_keys()} <= set(seen)
    assert seen["library.torch"] != "(missing)"


def test_differences_name_missing_keys() -> None:
    table = parity.differences({0: {"a": "1", "b": "2"}, 1: {"a": "1"}, 2: {"a": "1", "b": "2"}})
    assert table == {"b": {0: "2", 1: "(missing)", 2: "2"}}
    assert parity.minority(table["b"]) == [1]
    assert parity.minority({0: "x", 1: "y"}) == []
    assert parity.minority({0: "x", 1: "x", 2: "y", 3: "y"}) == []


def test_the_code_identity_follows_the_sources() -> None:
    assert re.fullmatch(r"[0-9a-f]{16}", parity.code_identity())
    assert parity.code_identity() == parity.code_identity()
    assert Path(parity.__file__).parent.parent.name == "engine"


def run(size: int, case: str, **how: object) -> Measured:
    return simulate(size, CASES[case], {"ours": ours}, **how)["ours"]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, 64, 512])
def test_equal_ranks_exchange_one_hash_whatever_the_size_of_what_they_compare(size: int) -> None:
    large = observation() | {f"config.more.{index}": "x" * 100 for index in range(300)}
    for base in (None, large):
        found = run(size, EQUAL, base=base)
        assert found.errors == {}
        for traffic in found.traffic.values():
            assert traffic.ops == ["all_gather"]
            assert (traffic.sent, traffic.received) == (HASH, HASH * (size - 1))


@pytest.mark.parametrize("size", [8, 64, 512])
def test_a_difference_costs_the_usual_values_once_and_then_only_what_differs(size: int) -> None:
    found = run(size, ONE)
    own = sum(len(key) + len(value) + len('"": "", ') for key, value in observation().items())
    for rank, traffic in found.traffic.items():
        assert traffic.ops == ["all_gather", "all_reduce", "all_gather", "all_reduce"], rank
        shared = (HASH + 8) * (size - 1)
        assert traffic.received - shared < 2 * (1.3 * own + 100), rank  # each byte of a sum travels twice
    messages = {str(error) for error in found.errors.values()}
    assert len(messages) == 1
    assert f"the odd one out is rank {size - 1}" in messages.pop()


def test_three_threads_cost_what_a_thread_for_each_rank_costs() -> None:
    for case in CASES:
        few, all_of_them = run(8, case), run(8, case, everybody=True)
        assert set(all_of_them.traffic) == set(range(8))
        for rank, traffic in all_of_them.traffic.items():
            assert traffic == few.traffic[rank if rank in few.traffic else 1]
        assert {str(error) for error in few.errors.values()} == {str(error) for error in all_of_them.errors.values()}


def test_the_rival_pays_for_the_whole_observation_every_time() -> None:
    found = simulate(64, CASES[EQUAL], {"ours": ours, "rival": rival})
    assert found["rival"].traffic[1].received > 50 * found["ours"].traffic[1].received


@pytest.mark.parametrize("case", [ONE, EVERY])
def test_the_leader_may_be_the_odd_one_at_no_other_cost(case: str) -> None:
    found, mirrored = run(64, case, odd=0), run(64, case)
    assert set(found.errors) == {0, 1, 63}
    for error in found.errors.values():
        assert isinstance(error, ParityError)
        assert error.evidence["minority"] == [0]
        assert "the odd one out is rank 0" in str(error)
    assert found.traffic[1] == mirrored.traffic[1]
    everybody = run(8, case, odd=0, everybody=True)
    assert {str(error) for error in everybody.errors.values()} == {str(e) for e in run(8, case, odd=0).errors.values()}


def test_a_difference_in_everything_at_512_ranks_stays_bounded_and_readable() -> None:
    large = observation() | {f"config.more.{index:03}": "x" * 5000 for index in range(300)}
    found = run(512, EVERY, base=large)
    shared, usual = (HASH + 8) * 511, 2 * 400 * 150  # 300 long values travel shortened
    assert max(traffic.received for traffic in found.traffic.values()) < shared + usual + 2 * 2 * parity.DETAIL_BYTES
    error = found.errors[1]
    assert isinstance(error, ParityError)
    assert len(str(error)) < 1500
    assert len(str(error.evidence)) < 50_000
    assert error.evidence["ranks"] == 512
    assert all("511" in row for row in error.evidence["differences"].values())


def test_ranks_that_all_differ_send_no_more_than_their_share() -> None:
    def body(group: Group, seen: Mapping[str, str]) -> None:
        own = {key: f"{value} of rank {group.rank}" for key, value in seen.items()}
        parity.check(group, own | {f"more.{index:03}": f"{group.rank}" for index in range(300)}, "values")

    found = simulate(16, CASES[EQUAL], {"ours": body}, everybody=True)["ours"]
    assert len({str(error) for error in found.errors.values()}) == 1
    bound = (HASH + 8) * 15 + 2 * 30_000 + 2 * 16 * 1.2 * parity.DETAIL_BYTES
    assert max(traffic.received for traffic in found.traffic.values()) < bound
    evidence = found.errors[3].evidence  # type: ignore[attr-defined]
    assert evidence["minority"] == []
    assert all(len(row) == 16 for row in evidence["differences"].values())


def test_a_long_value_that_differs_at_its_end_is_named_and_travels_short() -> None:
    prompt = "word " * 20_000
    base = observation() | {"config.run.prompt": prompt}
    how: Callable[[dict[str, str]], dict[str, str]] = lambda seen: seen | {"config.run.prompt": prompt + "!"}  # noqa: E731
    found = simulate(8, how, {"ours": ours}, base=base)["ours"]
    row = found.errors[0].evidence["differences"]  # type: ignore[attr-defined]
    assert set(row) == {"config.run.prompt"}
    assert len(set(row["config.run.prompt"].values())) == 2
    assert "100001 characters" in row["config.run.prompt"]["7"]
    assert max(traffic.received for traffic in found.traffic.values()) < 10_000


def test_what_had_no_room_is_said_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "DETAIL_BYTES", 40)
    usual = {"a": "1", "b": "1", "c": "1", "d": "1"}
    seen = (usual, dict.fromkeys(usual, "2" * 20), usual | {"d": "3"})
    sent = [parity._detail(usual, one) for one in seen]
    assert sent[0] == b""
    assert parity._by_rank(usual, {rank: json.loads(one) if one else {} for rank, one in enumerate(sent)}) == {
        0: {"a": "1", "d": "1"},
        1: {"a": "2" * 20, "d": parity.NOT_SENT},
        2: {"a": "1", "d": "3"},
    }


def test_a_key_that_one_rank_lacks_or_has_alone_is_a_difference() -> None:
    def change(seen: Mapping[str, str]) -> dict[str, str]:
        return {key: value for key, value in seen.items() if key != "python"} | {"extra": "1"}

    error = simulate(8, change, {"ours": ours})["ours"].errors[0]
    table = error.evidence["differences"]  # type: ignore[attr-defined]
    assert set(table) == {"extra", "python"}
    assert table["python"]["7"] == "(missing)"
    assert table["extra"]["0"] == "(missing)"


def test_another_protocol_is_refused_before_anything_else_is_entered() -> None:
    def body(group: Group, seen: Mapping[str, str]) -> None:
        if group.rank == 7:
            group.all_gather(torch.tensor([1, 2, 3, 4, 100, 99]))
        else:
            parity.check(group, seen, "values")

    found = simulate(8, CASES[EQUAL], {"ours": body})["ours"]
    assert set(found.errors) == {0, 1}
    assert "protocol" in str(found.errors[0])
    assert all(traffic.ops == ["all_gather"] for traffic in found.traffic.values())
