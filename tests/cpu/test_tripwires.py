"""Comparison over ranks: two name the difference, three name the odd one out."""

from __future__ import annotations

import pytest
import torch

from engine.errors import CallCountError, TripwireError
from engine.tripwires import (
    LIFECYCLE,
    ShardGuard,
    compare,
    compare_lifecycle,
    device_word,
    digest,
    finite,
    raise_first,
)


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


def test_the_device_word_sees_bytes_and_their_order() -> None:
    flat = torch.arange(64, dtype=torch.float32)
    word = device_word(flat)
    assert word == device_word(flat.clone())
    for place in (0, 31, 63):
        altered = flat.clone()
        altered.view(torch.uint8)[4 * place] ^= 1
        assert device_word(altered) != word
    swapped = flat.clone()
    swapped[3], swapped[40] = flat[40], flat[3]
    assert device_word(swapped) != word


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_finite_sees_each_kind_of_bad_value_wherever_it_is(dtype: torch.dtype, place: int) -> None:
    values = torch.linspace(-3, 3, 1001).to(dtype)
    assert finite(values).item()
    for bad in ("nan", "inf", "-inf"):
        altered = values.clone()
        altered[place] = float(bad)
        assert not finite(altered).item()


def test_each_lifecycle_field_is_compared_by_name() -> None:
    rows = [[value, value] for value in range(len(LIFECYCLE))]
    assert not any(compare_lifecycle(rows, [0, 1]))
    rows[LIFECYCLE.index("local_end_index")][1] = 99
    (finding,) = [found for found in compare_lifecycle(rows, [0, 1]) if found]
    assert (finding.field, finding.fm) == ("local_end_index", "FM-32")


def test_the_shard_guard_names_the_group_that_changed() -> None:
    parameters = {"head.weight": torch.ones(4), "blocks.0.q": torch.ones(4), "blocks.1.q": torch.ones(4)}
    guard = ShardGuard(parameters)
    assert guard.check() == -1
    parameters["blocks.1.q"][2] += 1e-6
    assert guard.names[guard.check()] == "blocks.1"
    assert ShardGuard(parameters).word != guard.word
