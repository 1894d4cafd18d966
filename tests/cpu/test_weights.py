"""Every layout loads to the same shard, nothing but the shard is held, and a wrong checkpoint is told in full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.config import PRESETS, ModelDims
from engine.errors import GeometryError, WeightsError
from engine.model.sharding import param_shapes, shard_dim, shard_shape, shard_slice
from engine.model.weights import MAX_LINES, fingerprint, load_shard

DIMS = PRESETS["tiny"]


def make_state(dims: ModelDims = DIMS, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in param_shapes(dims).items()}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return make_state()


@pytest.fixture
def file(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def load(path: Path, rank: int = 0, size: int = 1, dims: ModelDims = DIMS, dtype: torch.dtype = torch.float32):
    return load_shard(path, dims, rank, size, device="cpu", dtype=dtype)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# Sharding


def test_shapes_are_those_of_the_published_1_3b_model():
    shapes = param_shapes(PRESETS["wan2.1-1.3b"])
    assert len(shapes) == 825
    assert shapes["blocks.29.ffn.2.weight"] == (1536, 8960)
    assert shapes["head.head.weight"] == (64, 1536)
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert elements == 1_418_996_800


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("blocks.0.self_attn.q.weight", 0),
        ("blocks.11.cross_attn.v.bias", 0),
        ("blocks.1.self_attn.norm_k.weight", 0),
        ("blocks.1.self_attn.o.weight", 1),
        ("blocks.1.self_attn.o.bias", None),
        ("blocks.1.ffn.0.bias", 0),
        ("blocks.1.ffn.2.weight", 1),
        ("blocks.1.ffn.2.bias", None),
        ("blocks.1.norm3.weight", None),
        ("blocks.1.modulation", None),
        ("head.head.weight", None),
        ("text_embedding.0.weight", None),
    ],
)
def test_shard_dim(name: str, dim: int | None):
    assert name in param_shapes(PRESETS["wan2.1-1.3b"])
    assert shard_dim(name) == dim


def test_slices_tile_a_dimension_and_refuse_what_does_not_divide():
    parts = [shard_slice((8, 12), 1, rank, 3) for rank in range(3)]
    assert [row for part in parts for row in range(12)[part]] == list(range(12))
    with pytest.raises(GeometryError, match="does not divide"):
        shard_slice((8, 12), 0, 0, 3)
    with pytest.raises(GeometryError, match="mesh of 2"):
        shard_slice((8, 12), 0, 2, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_put_together_are_the_checkpoint(file: Path, state: dict[str, torch.Tensor], size: int):
    shards = [load(file, rank, size)[0] for rank in range(size)]
    for name, whole in state.items():
        dim = shard_dim(name)
        for shard in shards:
            assert shard[name].shape == shard_shape(name, tuple(whole.shape), size)
            assert shard[name].is_contiguous()
        joined = shards[-1][name] if dim is None else torch.cat([shard[name] for shard in shards], dim)
        assert torch.equal(joined, whole), name


# Layouts


def test_single_file_directory_and_dtype(file: Path, state: dict[str, torch.Tensor]):
    loaded, report = load(file)
    assert_same(loaded, state)
    assert report.layout == "safetensors/wan"
    assert report.files == (str(file),)
    assert report.shard_bytes == sum(tensor.nbytes for tensor in state.values())
    assert_same(load(file.parent)[0], state)
    halves, report = load(file, dtype=torch.bfloat16)
    assert_same(halves, {name: tensor.bfloat16() for name, tensor in state.items()})
    assert report.shard_bytes == sum(tensor.nbytes for tensor in state.values()) // 2


def write_sharded(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = directory / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_with_index(tmp_path: Path, state: dict[str, torch.Tensor]):
    index = write_sharded(tmp_path, state)
    for path in (index, tmp_path):
        loaded, report = load(path)
        assert_same(loaded, state)
        assert len(report.files) == 2


def test_index_with_a_missing_file_names_it(tmp_path: Path, state: dict[str, torch.Tensor]):
    write_sharded(tmp_path, state)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="00002-of-00002") as caught:
        load(tmp_path)
    assert caught.value.evidence["missing_files"] == ["diffusion_pytorch_model-00002-of-00002.safetensors"]


def test_index_may_not_point_outside_its_directory(tmp_path: Path):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(WeightsError, match="outside its directory"):
        load(index)


def test_diffusers_layout_round_trips_through_the_real_model(tmp_path: Path):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    model = WanTransformer3DModel(
        num_attention_heads=DIMS.num_heads,
        attention_head_dim=DIMS.head_dim,
        text_dim=DIMS.text_dim,
        freq_dim=DIMS.freq_dim,
        ffn_dim=DIMS.ffn_dim,
        num_layers=DIMS.num_layers,
    )
    theirs = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    (tmp_path / "transformer").mkdir()
    save_file(theirs, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded, report = load(tmp_path)
    assert report.layout == "safetensors/diffusers"
    # Every tensor of theirs arrives exactly once, and the ones that a mix-up would swap are where they belong.
    assert len(loaded) == len(theirs)
    assert sorted(fingerprint({"": t}) for t in loaded.values()) == sorted(
        fingerprint({"": t}) for t in theirs.values()
    )
    for ours, their in {
        "blocks.1.self_attn.q.weight": "blocks.1.attn1.to_q.weight",
        "blocks.1.self_attn.o.weight": "blocks.1.attn1.to_out.0.weight",
        "blocks.0.cross_attn.k.weight": "blocks.0.attn2.to_k.weight",
        "blocks.0.cross_attn.norm_q.weight": "blocks.0.attn2.norm_q.weight",
        "blocks.0.norm3.weight": "blocks.0.norm2.weight",
        "blocks.0.norm3.bias": "blocks.0.norm2.bias",
        "blocks.0.modulation": "blocks.0.scale_shift_table",
        "blocks.0.ffn.0.bias": "blocks.0.ffn.net.0.proj.bias",
        "blocks.0.ffn.2.weight": "blocks.0.ffn.net.2.weight",
        "head.modulation": "scale_shift_table",
        "head.head.bias": "proj_out.bias",
        "time_embedding.0.bias": "condition_embedder.time_embedder.linear_1.bias",
        "time_embedding.2.bias": "condition_embedder.time_embedder.linear_2.bias",
        "text_embedding.0.bias": "condition_embedder.text_embedder.linear_1.bias",
        "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
        "time_projection.1.bias": "condition_embedder.time_proj.bias",
    }.items():
        assert torch.equal(loaded[ours], theirs[their]), ours


@pytest.mark.parametrize("key", ["generator_ema", "generator", "model", "state_dict"])
def test_training_checkpoint(tmp_path: Path, state: dict[str, torch.Tensor], key: str):
    path = tmp_path / "self_forcing.pt"
    nested = {"model." + name.replace("blocks.", "blocks._fsdp_wrapped_module."): t for name, t in state.items()}
    torch.save({"step": 600, key: nested}, path)
    loaded, report = load(path)
    assert_same(loaded, state)
    assert report.layout == f"pt:{key}/wan"
    part = load(path, 1, 2)[0]
    assert torch.equal(part["blocks.0.ffn.2.weight"], state["blocks.0.ffn.2.weight"][:, DIMS.ffn_dim // 2 :])


def test_training_checkpoint_prefers_the_averaged_weights(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save({"generator": make_state(seed=1), "generator_ema": state}, tmp_path / "both.pt")
    loaded, report = load(tmp_path / "both.pt")
    assert_same(loaded, state)
    assert report.layout == "pt:generator_ema/wan"


class Code:
    """Pickles to a call of `eval`; a loader that runs it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path):
    torch.save({"generator": Code(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError) as caught:
        load(tmp_path / "evil.pt")
    assert caught.value.code == "TP-4005"
    assert not (tmp_path / "ran").exists()


# Errors


def test_one_error_lists_everything_that_is_wrong(tmp_path: Path, state: dict[str, torch.Tensor]):
    del state["blocks.0.ffn.0.weight"], state["head.modulation"]
    state["img_emb.proj.0.weight"] = torch.zeros(3)
    state["blocks.1.norm3.bias"] = torch.zeros(DIMS.dim + 1)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="2 tensors missing, 1 unexpected, 1 misshaped") as caught:
        load(tmp_path / "m.safetensors")
    evidence = caught.value.evidence
    assert evidence["missing"] == ["blocks.0.ffn.0.weight", "head.modulation"]
    assert evidence["unexpected"] == ["img_emb.proj.0.weight"]
    assert evidence["misshaped"] == {"blocks.1.norm3.bias": {"expected": [64], "found": [65]}}
    for name in ("blocks.0.ffn.0.weight", "head.modulation", "img_emb.proj.0.weight", "blocks.1.norm3.bias"):
        assert name in caught.value.message
    assert caught.value.exit_code == 77


def test_the_message_is_capped_and_the_evidence_is_not(file: Path):
    with pytest.raises(WeightsError, match="another model") as caught:
        load(file, dims=PRESETS["bench"])
    evidence = caught.value.evidence
    wrong = len(evidence["missing"]) + len(evidence["unexpected"]) + len(evidence["misshaped"])
    assert len(caught.value.message.splitlines()) == MAX_LINES + 1
    assert caught.value.message.endswith(f"and {wrong - MAX_LINES + 1} more")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_damaged_files(tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, damage: str):
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "noise": b"\x07noise" * 1000}[damage])
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert caught.value.code == "TP-4005"
    assert str(path) in caught.value.message
    assert str(path.stat().st_size) in caught.value.message


@pytest.mark.parametrize("make", ["nothing", "empty directory", "wrong suffix"])
def test_nothing_to_load_says_what_is_expected(tmp_path: Path, make: str):
    path = tmp_path / "checkpoint"
    if make == "empty directory":
        path.mkdir()
    if make == "wrong suffix":
        path = tmp_path / "checkpoint.onnx"
        path.write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors"):
        load(path)


def test_a_torch_file_without_tensors_is_refused(tmp_path: Path):
    torch.save({"optimizer": {"lr": 0.1}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="generator_ema"):
        load(tmp_path / "other.pt")


def test_a_name_twice_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]):
    state["blocks.0._orig_mod.modulation"] = state["blocks.0.modulation"] + 1
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="twice"):
        load(tmp_path / "m.safetensors")


# Fingerprint


def test_fingerprint_sees_names_types_shapes_and_single_bits():
    tensor = torch.arange(6, dtype=torch.float32)
    base = fingerprint({"a": tensor, "b": tensor + 1})
    assert base == fingerprint({"b": tensor + 1, "a": tensor.clone()})
    flipped = tensor.clone()
    flipped.view(torch.int32)[3] ^= 1
    others = [
        {"a": flipped, "b": tensor + 1},
        {"a": tensor + 1, "b": tensor},
        {"c": tensor, "b": tensor + 1},
        {"a": tensor.view(2, 3), "b": tensor + 1},
        {"a": tensor.view(torch.int32), "b": tensor + 1},
    ]
    values = {fingerprint(other) for other in others}
    assert len(values) == len(others)
    assert base not in values
    # Strides are not part of a tensor's value.
    square = tensor.view(2, 3)
    assert fingerprint({"a": square.t().contiguous().t()}) == fingerprint({"a": square})


def test_shards_have_fingerprints_of_their_own(file: Path):
    values = [load(file, rank, 4)[1].fingerprint for rank in range(4)]
    assert len(set(values)) == 4
    assert load(file, 2, 4)[1].fingerprint == values[2]


# Memory

PROBE = """
import json, sys
from pathlib import Path
import torch
from engine.config import ModelDims
from engine.model import checkpoint_files
from engine.model.weights import load_shard

checkpoint_files.REMAP_BYTES = 16 << 20

def peak():
    # Not ru_maxrss: that survives exec and would show the parent's peak.
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

small, big, dims_small, dims_big = sys.argv[1:]
load_shard(Path(small), ModelDims(**json.loads(dims_small)), 0, 4, device="cpu", dtype=torch.float32)
before = peak()
state, report = load_shard(Path(big), ModelDims(**json.loads(dims_big)), 1, 4, device="cpu", dtype=torch.float32)
print(json.dumps({"growth": peak() - before, "shard": report.shard_bytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see a peak")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_peak_memory_stays_near_the_shard(tmp_path: Path, suffix: str):
    small = {"dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 1, "text_dim": 32, "freq_dim": 64}
    big = {"dim": 768, "ffn_dim": 3072, "num_heads": 8, "num_layers": 5, "text_dim": 64, "freq_dim": 64}
    paths = []
    for dims in (small, big):
        paths.append(tmp_path / f"{dims['dim']}{suffix}")
        state = make_state(ModelDims(**dims))
        torch.save({"generator": state}, paths[-1]) if suffix == ".pt" else save_file(state, paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, paths), json.dumps(small), json.dumps(big)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(done.stdout)
    whole = paths[1].stat().st_size
    assert whole > 200_000_000
    assert seen["shard"] < 0.33 * whole
    largest = 4 * 768 * 3072 + 4 * 6 * 768 * 768
    # A .pt is mapped anew every REMAP_BYTES, which the probe makes small.
    slack = largest if suffix == ".safetensors" else largest + (16 << 20)
    assert seen["growth"] < 1.1 * seen["shard"] + slack
