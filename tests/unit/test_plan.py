"""The plan's own rules: call counts, resets, names."""

import itertools

import pytest

from engine.errors import CallCountError, PreflightError
from engine.plan import TP_PLANS, V0, V1, ChunkPlan, canonical_plan, expected_generator_calls


def plan(**changes) -> ChunkPlan:
    values = {
        "chunk_index": 2, "cache_epoch": 0, "control_epoch": 0, "current_start_frame": 6, "height": 64, "width": 96,
        "init_cache": False, "reset_kv_cache": False, "reset_crossattn_cache": False,
        "conditioning_embeds_updated": False, "kv_cache_attention_bias": 0.3, "do_kv_recompute": True,
        "denoising_step_list": (1000, 500), "num_denoise_steps": 2, "expected_calls": 3, "base_seed": 42,
    }  # fmt: skip
    return ChunkPlan(**{**values, **changes})


@pytest.mark.parametrize(
    ("recompute", "steps", "clean"), list(itertools.product([True, False], [1, 2, 4], [True, False]))
)
def test_the_formula_of_the_contract(recompute, steps, clean):
    calls = expected_generator_calls(recompute, steps, clean)
    assert calls == (1 if recompute else 0) + steps + (1 if clean else 0)
    good = plan(
        do_kv_recompute=recompute,
        denoising_step_list=tuple(range(1000, 1000 - steps, -1)),
        num_denoise_steps=steps,
        clean_pass=clean,
        expected_calls=calls,
    )
    good.check()
    assert good.computed_calls() == calls


@pytest.mark.parametrize("off", [-1, 1])
def test_expected_calls_off_by_one(off):
    with pytest.raises(CallCountError) as caught:
        plan(expected_calls=3 + off).check(call_id=9)
    assert caught.value.evidence == {"expected": 3 + off, "computed": 3}
    assert caught.value.ids == {"call_id": 9, "chunk_index": 2, "cache_epoch": 0}
    assert (caught.value.fm, caught.value.exit_code) == ("FM-02", 70)


@pytest.mark.parametrize(("steps", "count"), [((1000, 500), 1), ((1000, 500), 3), ((), 0)])
def test_steps_against_list(steps, count):
    with pytest.raises(CallCountError) as caught:
        plan(denoising_step_list=steps, num_denoise_steps=count, expected_calls=len(steps) + 1).check()
    assert caught.value.code == "TP-6102"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_cache_attention_bias": 0.0}, "kv_cache_attention_bias"),
        ({"kv_cache_attention_bias": 1.01}, "kv_cache_attention_bias"),
        ({"kv_cache_attention_bias": float("nan")}, "kv_cache_attention_bias"),
        ({"init_cache": True, "reset_kv_cache": True, "reset_crossattn_cache": True}, "current_start_frame 0"),
        (
            {"init_cache": True, "current_start_frame": 0, "do_kv_recompute": False, "expected_calls": 2},
            "both reset bits",
        ),
        ({"current_start_frame": 0}, "recompute needs context"),
        ({"conditioning_embeds_updated": True}, "reset_crossattn_cache"),
        ({"current_start_frame": -3}, "negative"),
        ({"cache_epoch": -1}, "negative"),
    ],
)
def test_contradictions(changes, words):
    with pytest.raises(PreflightError, match=words) as caught:
        plan(**changes).check()
    assert caught.value.fm == "FM-01"


def test_plan_names():
    assert canonical_plan("v1.1c") == V1
    assert canonical_plan("v0") == V0
    assert [canonical_plan(name) for name in TP_PLANS] == list(TP_PLANS)
    assert TP_PLANS == ("v0_full_pipeline", "v1.1a", "v1.1b", "v1_generator_only")
