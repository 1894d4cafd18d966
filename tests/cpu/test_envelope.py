"""Which plan carries what, the names on both wires, and the refusals by name of sender and receiver."""

import dataclasses
import json

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import CallCountError, FrameError, PreflightError
from engine.plan import V0, V1, V11A, V11B
from engine.wire.dialect import PP, TP
from engine.wire.envelope import Shapes, envelope_from_meta, envelope_meta
from tests.cpu.wire_cases import PLANS, SHAPES, change, forge, make, ramp, receive, send

COMMON = {
    "tp_plan", "tp_envelope_version", "height", "width", "current_start_frame", "init_cache", "tp_reset_kv_cache",
    "tp_reset_crossattn_cache", "conditioning_embeds_updated", "kv_cache_attention_bias", "tp_do_kv_recompute",
    "tp_num_denoise_steps", "tp_expected_generator_calls", "base_seed", "noise_scale", "tp_clean_pass",
}  # fmt: skip


@pytest.mark.parametrize(
    ("tp_plan", "keys", "extra"),
    [
        (V0, ["denoising_step_list"], {"prompt"}),
        (V11A, ["conditioning_embeds", "denoising_step_list"], set()),
        (
            V11B,
            ["conditioning_embeds", "context_frames_override", "denoising_step_list", "latents", "renoise"],
            set(),
        ),
        (V1, ["conditioning_embeds", "context_frames_override", "denoising_step_list", "latents", "renoise"], set()),
    ],
)
def test_each_plan_carries_exactly_its_names(tp_plan, keys, extra):
    meta = json.loads(send(make(tp_plan)).meta)
    assert set(meta["envelope"]) == COMMON | extra
    assert [row[0] for row in meta["tensor_specs"]] == keys


@pytest.mark.parametrize("tp_plan", PLANS)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("steps", [(1000,), (1000, 750, 500, 250)])
def test_round_trip_of_every_plan(tp_plan, recompute, steps):
    envelope = make(tp_plan, steps=steps, recompute=recompute)
    frame = send(envelope)
    back = receive(frame.header_bytes, frame.meta, frame.payload, tp_plan)
    assert (back.tp_plan, back.plan, back.prompt) == (envelope.tp_plan, envelope.plan, envelope.prompt)
    assert set(back.tensors) == set(envelope.tensors)
    for name, tensor in envelope.tensors.items():
        if tensor is None:
            assert back.tensors[name] is None
        else:
            assert back.tensors[name].dtype == tensor.dtype
            assert torch.equal(back.tensors[name], tensor)


def test_context_is_an_explicit_null_without_recompute_and_the_anchor_alone_under_v11b():
    meta = json.loads(send(make(V1, recompute=False)).meta)
    assert meta["envelope"]["context_frames_override"] is None
    rows = {row[0]: row[2] for row in json.loads(send(make(V11B)).meta)["tensor_specs"]}
    assert rows["context_frames_override"] == [1, 1, 2, 2, 2]
    early = send(make(V1, current_start_frame=2))
    rows = {row[0]: row[2] for row in json.loads(early.meta)["tensor_specs"]}
    assert rows["context_frames_override"] == [1, 2, 2, 2, 2]  # min(K, current_start_frame)


@pytest.mark.parametrize("tp_plan", PLANS)
def test_every_tensor_of_a_plan_is_required(tp_plan):
    envelope = make(tp_plan)
    for name in envelope.tensors:
        for gone in (..., None):
            with pytest.raises(PreflightError) as caught:
                send(change(envelope, **{name: gone}))
            assert caught.value.fm == "FM-06"
            # a null where recompute is planned shows in the meta, under the wire's name
            assert caught.value.evidence["field"].removesuffix("_override") == name


@pytest.mark.parametrize("held", [..., ramp(1, 3, 2, 2, 2)])
def test_without_recompute_the_context_is_an_explicit_null_and_nothing_else(held):
    with pytest.raises(PreflightError, match="context_frames_override: must be an explicit null") as caught:
        send(change(make(V1, recompute=False), context_frames=held))
    assert caught.value.code == "TP-2116"


@pytest.mark.parametrize(
    ("envelope", "field"),
    [
        (change(make(V1), video=ramp(1, 3)), "video"),
        (change(make(V0), video=ramp(1, 3)), "video"),
        (change(make(V0), latents=ramp(1, 3, 2, 2, 2)), "latents"),
        (change(make(V11A), context_frames=None), "context_frames_override"),
        (change(make(V1, steps=(1000,)), renoise=ramp(1, 1, 3, 2, 2, 2)), "renoise"),
        (change(make(V1, steps=(1000,)), renoise=None), "renoise"),
    ],
)
def test_what_a_plan_does_not_carry_is_refused_as_strictly(envelope, field):
    with pytest.raises(PreflightError) as caught:
        send(envelope)
    assert (caught.value.code, caught.value.evidence["field"]) == ("TP-2117", field)


def test_a_prompt_is_required_under_v0_and_forbidden_elsewhere():
    with pytest.raises(PreflightError) as caught:
        send(dataclasses.replace(make(V0), prompt=None))
    assert (caught.value.evidence["field"], caught.value.fm) == ("prompt", "FM-06")
    for tp_plan in (V11A, V11B, V1):
        with pytest.raises(PreflightError) as caught:
            send(dataclasses.replace(make(tp_plan), prompt="a fox"))
        assert (caught.value.evidence["field"], caught.value.code) == ("prompt", "TP-2117")


@pytest.mark.parametrize(
    ("changes", "field", "fm"),
    [
        ({"latents": ramp(1, 3, 2, 2, 4)}, "latents", None),
        ({"latents": ramp(1, 3, 2, 2, 2).bool()}, "latents", "FM-07"),
        ({"latents": ramp(1, 3, 2, 2, 2).float()}, "latents", "FM-07"),
        ({"denoising_step_list": torch.tensor([1000, 500], dtype=torch.int32)}, "denoising_step_list", "FM-07"),
        ({"denoising_step_list": torch.tensor([1000, 400])}, "denoising_step_list", "FM-01"),
        ({"conditioning_embeds": ramp(1, 3, 5).to("meta")}, "conditioning_embeds", None),
        ({"conditioning_embeds": ramp(1, 3, 5).to_sparse()}, "conditioning_embeds", None),
        ({"conditioning_embeds": [1.0]}, "conditioning_embeds", None),
    ],
)
def test_a_wrong_tensor_is_named(changes, field, fm):
    with pytest.raises(PreflightError) as caught:
        send(change(make(V1), **changes))
    assert (caught.value.evidence["field"], caught.value.fm) == (field, fm)


def test_an_unsupported_dtype_is_refused_by_tensor_and_dtype():
    with pytest.raises(PreflightError, match=r"latents: unsupported dtype torch\.bool"):
        send(change(make(V1), latents=torch.zeros(1, 3, 2, 2, 2, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("attribute", "value", "path"),
    [
        ("base_seed", torch.tensor(3), "envelope.base_seed"),
        ("kv_cache_attention_bias", float("nan"), "envelope.kv_cache_attention_bias"),
        ("noise_scale", {"deep": [0, {"x": torch.ones(1)}]}, "envelope.noise_scale.deep[1].x"),
        ("noise_scale", torch.device("cpu"), "envelope.noise_scale"),
        ("init_cache", len, "envelope.init_cache"),
        ("base_seed", 1 << 63, "envelope.base_seed"),
    ],
)
def test_what_is_not_plain_json_is_refused_with_its_key_path(attribute, value, path):
    with pytest.raises(PreflightError) as caught:
        send(make(V1, **{attribute: value}))
    assert (caught.value.evidence["field"], caught.value.fm, caught.value.code) == (path, "FM-04", "TP-2102")


def test_a_prompt_that_is_not_utf8_is_refused():
    with pytest.raises(PreflightError) as caught:
        send(dataclasses.replace(make(V0), prompt="a \ud800 fox"))
    assert caught.value.evidence["field"] == "envelope.prompt"


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_a_truth_value_is_true_or_false(value):
    with pytest.raises(PreflightError, match="tp_reset_kv_cache: must be true or false"):
        send(make(V1, reset_kv_cache=value))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, True, "0.5"])
def test_a_noise_scale_is_a_share(scale):
    with pytest.raises(PreflightError, match="noise_scale") as caught:
        send(make(V1, noise_scale=scale))
    assert caught.value.evidence["field"] == "noise_scale"


def test_video_to_video_travels_and_its_steps_begin_no_noisier_than_its_latents():
    sent = make(V1, noise_scale=1)
    frame = send(sent)
    assert receive(frame.header_bytes, frame.meta, frame.payload).plan == sent.plan
    with pytest.raises(PreflightError, match="begin noisier than noise_scale"):
        send(make(V1, noise_scale=0.5))


@pytest.mark.parametrize("off", [-1, 1])
def test_call_counts_are_judged_by_the_plan(off):
    with pytest.raises(CallCountError, match="expected_generator_calls") as caught:
        send(make(V1, expected_calls=3 + off))
    assert (caught.value.fm, caught.value.ids["call_id"]) == ("FM-02", 7)
    with pytest.raises(CallCountError, match="num_denoise_steps"):
        send(make(V1, num_denoise_steps=2 + off))


def altered(drop=(), specs=None, **envelope):
    frame = send(make(V1))
    meta = json.loads(frame.meta)
    meta["envelope"].update(envelope)
    for key in drop:
        del meta["envelope"][key]
    if specs is not None:
        meta["tensor_specs"] = specs(meta["tensor_specs"])
    header, raw = forge(frame, meta, tensor_count=len(meta["tensor_specs"]))
    return header, raw, frame.payload


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tp_plan": V11B}, "tp_plan"),
        ({"tp_plan": "v9"}, "tp_plan"),
        ({"tp_plan": None}, "tp_plan"),
        ({"tp_envelope_version": 2}, "tp_envelope_version"),
        ({"tp_envelope_version": True}, "tp_envelope_version"),
        ({"height": 32}, "height"),
        ({"height": "16"}, "height"),
        ({"current_start_frame": -1}, "current_start_frame"),
        ({"current_start_frame": 1 << 40, "tp_num_denoise_steps": 1 << 40}, "tp_num_denoise_steps"),
        ({"init_cache": 0}, "init_cache"),
        ({"init_cache": True}, "cache_epoch"),
        ({"noise_scale": 1.5}, "noise_scale"),
        ({"noise_scale": 0.5}, "plan"),
        ({"video": None}, "video"),
        ({"prompt": "a fox"}, "prompt"),
        ({"tp_do_kv_recompute": False}, "context_frames_override"),
        ({"context_frames_override": None}, "context_frames_override"),
        ({"kv_cache_attention_bias": 0.0}, "plan"),
        ({"drop": ["base_seed"]}, "base_seed"),
        ({"drop": ["tp_clean_pass"]}, "tp_clean_pass"),
    ],
)
def test_the_receiver_refuses_the_same_by_name_with_a_checksum_that_holds(changes, field):
    with pytest.raises(FrameError) as caught:
        receive(*altered(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "changes", [{"tp_num_denoise_steps": 3}, {"tp_expected_generator_calls": 2}, {"tp_clean_pass": True}]
)
def test_the_receiver_recomputes_the_calls(changes):
    with pytest.raises(CallCountError) as caught:
        receive(*altered(**changes))
    assert caught.value.fm == "FM-02"


@pytest.mark.parametrize(
    ("specs", "field"),
    [
        (lambda rows: [r for r in rows if r[0] != "denoising_step_list"], "payload_bytes"),
        (lambda rows: rows[::-1], "tensor_specs[1]"),
        (lambda rows: [rows[0], *rows], "tensor_specs[1]"),
        (lambda rows: [[*r[:3], "bool"] for r in rows], "tensor_specs[0]"),
        (lambda rows: [*rows[:4], ["renoise2", *rows[4][1:]]], "renoise"),
        (lambda rows: [*rows[:4], [rows[4][0], 1, *rows[4][2:]]], "renoise"),
        (lambda rows: [[r[0], 1, *r[2:]] if r[0] == "latents" else r for r in rows], "latents"),
        (lambda rows: [[*r[:2], [1, 5, 3], r[3]] if "cond" in r[0] else r for r in rows], "conditioning_embeds"),
        (lambda rows: [[*r[:3], "float16"] if "cond" in r[0] else r for r in rows], "conditioning_embeds"),
        (lambda rows: [[*r[:2], [-1, 3, 5], r[3]] if "cond" in r[0] else r for r in rows], "tensor_specs[0]"),
        (lambda rows: [[*r[:2], [1.0], r[3]] for r in rows], "tensor_specs[0]"),
        (lambda rows: [[*r[:2], [1 << 62, 1 << 62], r[3]] for r in rows], "tensor_specs[0]"),
        (lambda rows: [r[:3] for r in rows], "tensor_specs[0]"),
        (lambda rows: [7, *rows[1:]], "tensor_specs[0]"),
    ],
)
def test_the_receiver_judges_the_specs(specs, field):
    with pytest.raises(FrameError) as caught:
        receive(*altered(specs=specs))
    assert caught.value.field == field


def test_pp_names_are_the_other_half_of_the_same_table():
    envelope = make(V1, recompute=False)
    meta = envelope_meta(envelope, PP)
    assert meta["pp_envelope_version"] == 1
    assert meta["pp_disable_vace"] is True
    assert "tp_plan" not in meta
    assert {key.removeprefix("tp_") for key in envelope_meta(envelope, TP)} - {"plan", "envelope_version"} - {
        "context_frames_override"
    } == set(meta) - {"pp_envelope_version", "pp_disable_vace", "context_frames"}


def test_the_plan_reads_the_step_list_from_its_tensor():
    envelope = make(V11A)
    tensors = {"denoising_step_list": torch.tensor([900, 100]), "conditioning_embeds": ramp(1, 3, 5)}
    back = envelope_from_meta(envelope_meta(envelope, TP), tensors, TP, V11A, chunk_index=3, cache_epoch=1)
    assert back.plan.denoising_step_list == (900, 100)


def test_shapes_follow_from_the_configuration():
    shapes = Shapes.of(EngineConfig())
    assert shapes == Shapes(3, 3, 16, 8, 12, 32, 32, "float32")
    wanted = SHAPES.expected(V1, num_steps=4, do_kv_recompute=True, current_start_frame=9)
    assert wanted["renoise"] == ((3, 1, 3, 2, 2, 2), "bfloat16")
    assert wanted["denoising_step_list"] == ((4,), "int64")
