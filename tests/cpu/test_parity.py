"""Parity: pure comparison, and the real exchange between processes is in test_worker."""

from __future__ import annotations

import re
from pathlib import Path

import engine.comm.parity as parity
from engine.comm.group import Group
from engine.config import EngineConfig, dotted_keys


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
