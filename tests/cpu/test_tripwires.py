"""Comparison over ranks: two name the difference, three name the odd one out."""

from __future__ import annotations

import pytest
import torch

from engine.errors import CallCountError, TripwireError
from engine.tripwires import compare, digest, raise_first


def test_equal_values_find_nothing() -> None:
    assert compare("call count", "planned", [4, 4, 4], [0, 1, 2], "FM-02") is None


def test_two_ranks_give_a_difference_and_no_culprit() -> None:
    finding = compare("input digest", "meta and tensors", [1, 2], [0, 1], "FM-30")
    assert finding is not None
    assert finding.minority == ()
    assert "rank 0 = 1, rank 1 = 2" in finding.sentence()


def test_three_ranks_name_the_odd_one() -> None:
    finding = compare("input digest", "meta and tensors", [1, 2, 1], [1, 2, 3], "FM-30")
    assert finding is not None
    assert finding.minority == (2,)


def test_the_first_finding_decides_the_error() -> None:
    calls = compare("call count", "planned", [4, 5], [0, 1], "FM-02")
    drift = compare("input digest", "x", [1, 2], [0, 1], "FM-30")
    with pytest.raises(CallCountError) as caught:
        raise_first([None, calls, drift], {"call_id": 3})
    assert caught.value.fm == "FM-02"
    assert len(caught.value.evidence["all"]) == 2
    with pytest.raises(TripwireError) as other:
        raise_first([drift], {})
    assert not isinstance(other.value, CallCountError)
    raise_first([None, None], {})


@pytest.mark.parametrize("change", ["byte", "shape", "dtype", "key", "null", "scalar"])
def test_the_digest_sees_every_byte_and_the_frame_around_it(change: str) -> None:
    tensor = torch.arange(8, dtype=torch.int32)
    base = digest({"a": tensor, "b": None}, (1, "x"))
    assert base == digest({"b": None, "a": tensor.clone()}, (1, "x"))
    altered = tensor.clone()
    altered[7] += 1
    others = {
        "byte": digest({"a": altered, "b": None}, (1, "x")),
        "shape": digest({"a": tensor.reshape(2, 4), "b": None}, (1, "x")),
        "dtype": digest({"a": tensor.view(torch.float32), "b": None}, (1, "x")),
        "key": digest({"c": tensor, "b": None}, (1, "x")),
        "null": digest({"a": tensor}, (1, "x")),
        "scalar": digest({"a": tensor, "b": None}, (1, "y")),
    }
    assert others[change] != base
