"""The planner's counts against the engine itself: parameters, caches, arithmetic, collectives, bytes on the wire."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.comm.group import Group
from engine.config import EngineConfig, from_dict
from engine.model.dit import DiT
from engine.model.kv_cache import CrossAttnCache, KVCache
from tests.cli.conftest import cli, validated
from tpctl.planner.devices import DEVICES, Device
from tpctl.planner.estimate import Pace, estimate, estimates
from tpctl.planner.sizes import sizes, tokens_per_frame

assert cli
BIG = from_dict(
    {
        "model": {"preset": "wan2.1-14b", "dtype": "bfloat16"},
        "geometry": {"height": 320, "width": 576},
        "plan": {"tp": 2},
    }
)


def caches(config: EngineConfig, tp: int) -> tuple[KVCache, CrossAttnCache]:
    dims, geometry = config.dims, config.geometry
    shared = {
        "num_layers": dims.num_layers,
        "heads": dims.num_heads // tp,
        "head_dim": dims.head_dim,
        "dtype": getattr(torch, config.model.dtype),
        "device": "meta",
    }
    kv = KVCache(
        tokens_per_frame=tokens_per_frame(config),
        window_frames=geometry.window_frames,
        sink_frames=geometry.sink_frames,
        **shared,
    )
    return kv, CrossAttnCache(text_len=dims.text_len, **shared)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("config", [EngineConfig(), BIG], ids=["tiny", "14b"])
def test_weights_and_caches_are_counted_to_the_byte(config: EngineConfig, tp: int) -> None:
    found = sizes(config, tp)
    torch.set_default_dtype(getattr(torch, config.model.dtype))
    try:
        with torch.device("meta"):
            dit = DiT(config.dims, Group("mesh_pg", tuple(range(tp)), 0, None))
    finally:
        torch.set_default_dtype(torch.float32)
    kv, cross = caches(config, tp)
    assert found.weights_bytes == sum(parameter.nbytes for parameter in dit.parameters())
    assert (found.kv_bytes, found.text_kv_bytes) == (kv.nbytes, cross.nbytes)
    assert found.sums == (dit.collectives_per_call() if tp > 1 else 0)


def test_arithmetic_of_a_call_is_what_torch_counts() -> None:
    """Over a full window, with the text cached; patches, time and head are not in our count, and are small."""
    config = from_dict({"model": {"preset": "bench"}})
    dims, geometry = config.dims, config.geometry
    with torch.device("meta"):
        dit = DiT(dims, Group("mesh_pg", (0,), 0, None))
    kv, cross = caches(config, 1)
    shape = (1, geometry.frames_per_chunk, dims.in_dim, geometry.height // 8, geometry.width // 8)
    inputs = torch.zeros(shape, device="meta")
    timestep = torch.full((geometry.frames_per_chunk,), 500, device="meta")
    text = torch.zeros(1, dims.text_len, dims.text_dim, device="meta")
    counter = FlopCounterMode(display=False)
    for start in range(0, 3 * geometry.frames_per_chunk, geometry.frames_per_chunk):
        counter = FlopCounterMode(display=False)
        with counter, torch.inference_mode():
            dit(inputs, timestep, text, kv=kv, cross=cross, start_frame=start)
    assert sizes(config, 1).call_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_published_speeds_of_the_14b_model_are_about_met() -> None:
    """19.5 fps at tp=2, 27 at tp=4, on H200 at 320x576: an estimate within a third ranks plans rightly."""
    for tp, published in ((2, 19.5), (4, 27.0)):
        found = estimate(BIG, "v1_generator_only", tp, DEVICES["h200"], Pace())
        assert found.fps is not None
        assert published / 1.34 < found.fps < published * 1.34


def test_degrees_that_do_not_divide_are_said_and_what_does_not_fit_is_not_passed() -> None:
    rows = {(row.plan, row.tp): row for row in estimates(BIG, Device("small", 24), 5, Pace())}
    assert not rows["v1_generator_only", 3].divides
    assert not rows["pp1", 5].divides
    assert rows["v1_generator_only", 3].fits is None
    assert rows["v0_full_pipeline", 1].fits is False
    assert rows["pp1", 4].fits is True
    assert rows["pp1", 4].period_ms is None  # no figures of that device's speed
    assert ("pp0", 2) not in rows


def test_rank_0_out_of_the_mesh_hides_the_shorter_stage() -> None:
    inside = estimate(BIG, "v1_generator_only", 2, DEVICES["h200"], Pace())
    outside = estimate(BIG, "pp1", 2, DEVICES["h200"], Pace())
    assert outside.period_ms < inside.period_ms
    assert outside.rank0_bytes < inside.rank0_bytes


def test_a_compiler_helps_where_handing_over_operations_binds() -> None:
    small = {"model": {"preset": "wan2.1-1.3b", "dtype": "bfloat16"}}
    written, compiled = (
        estimate(from_dict({**small, "model": {**small["model"], "compile": how}}), "pp0", 1, DEVICES["h200"], Pace())
        for how in ("off", "inductor")
    )
    assert written.binds == "launches"
    assert written.call_ms == pytest.approx(2.7 * compiled.call_ms, rel=0.05)


def test_the_command_judges_the_configured_plan(cli) -> None:
    passed = cli("plan", "-o", "json")
    data = validated(passed.stdout)
    assert (passed.exit_code, data["verdict"]) == (0, "PASS")
    assert data["findings"][1]["verdict"] == "SKIP"  # this host's speed is not known unless measured
    assert len({(row["plan"], row["tp"]) for row in data["data"]["plans"]}) == len(data["data"]["plans"]) == 21

    big = ("--set", "model.preset=wan2.1-14b", "--set", "model.dtype=bfloat16", "--device", "l40s")
    refused = cli("plan", *big, "-o", "json")
    assert refused.exit_code == 3
    assert validated(refused.stdout)["verdict"] == "FAIL"
    beyond = cli("plan", "--set", "plan.tp=4", "--most", "2", "-o", "json")
    assert beyond.exit_code == 5
    assert validated(beyond.stdout)["verdict"] == "UNCHECKED"
    unknown = cli("plan", "--device", "h201")
    assert unknown.exit_code == 2
    assert "did you mean 'h200'?" in unknown.stderr


def test_this_host_is_measured_when_asked(cli) -> None:
    device = validated(cli("plan", "--measure", "-o", "json").stdout)["data"]["device"]
    assert device["tflops"] > 0
    assert device["bandwidth_gb_s"] > 0
