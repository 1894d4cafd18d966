"""The streaming VAE against diffusers' own AutoencoderKLWan, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.assets import vae_dir
from engine.codecs.vae import WEIGHTS_FILE, StreamingVAE
from engine.config import EngineConfig
from engine.errors import CodecError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vae_dir(EngineConfig().replace(model__cache_dir=str(tmp_path_factory.mktemp("cache"))))


@pytest.fixture
def vae(directory: Path) -> StreamingVAE:
    return StreamingVAE.load(directory, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(directory: Path):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(directory).eval()


def noise(count: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, count, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode_whole(theirs, latents_BFCHW: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(theirs.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(theirs.config.latents_std).view(1, -1, 1, 1, 1)
    return theirs.decode(latents_BFCHW.transpose(1, 2) * std + mean, return_dict=False)[0].transpose(1, 2)


@pytest.mark.parametrize("cuts", [[7], [3, 3, 1], [1] * 7, [1, 2, 4], [2, 5]])
def test_every_way_to_cut_the_stream_gives_the_bits_of_the_whole(vae: StreamingVAE, theirs, cuts: list[int]):
    latents = noise(7)
    whole = decode_whole(theirs, latents)
    parts = [vae.decode(part) for part in latents.split(cuts, dim=1)]
    assert parts[0].shape[1] == 4 * cuts[0] - 3
    assert all(part.shape[1] == 4 * cut for part, cut in zip(parts[1:], cuts[1:], strict=True))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert vae.decoded_latents == 7


def test_a_batch_streams_too(vae: StreamingVAE, theirs):
    latents = noise(4, batch=2)
    parts = torch.cat([vae.decode(latents[:, :1]), vae.decode(latents[:, 1:])], dim=1)
    assert torch.equal(parts, decode_whole(theirs, latents))


def test_the_cache_matters_and_a_hard_cut_empties_it(vae: StreamingVAE):
    first = vae.decode(noise(3))
    assert first.shape == (1, 9, 3, 32, 48)
    second = vae.decode(noise(3))
    assert second.shape[1] == 12
    assert not torch.equal(second[:, -9:], first)
    vae.reset()
    assert torch.equal(vae.decode(noise(3)), first)


def test_pixels_fill_their_range_and_depend_on_the_latents(vae: StreamingVAE):
    frames = vae.decode(noise(4))
    assert frames.dtype == torch.float32
    assert frames.abs().max() <= 1
    assert 0.3 < float(frames.std()) < 0.7
    assert float((frames.abs() == 1).float().mean()) < 0.15
    vae.reset()
    assert float((vae.decode(noise(4, seed=1)) - frames).std()) > 0.3


def test_encode_frame_is_theirs_normalised(vae: StreamingVAE, theirs):
    frame = noise(1)[:, :, :3].repeat_interleave(8, 3).repeat_interleave(8, 4).clamp(-1, 1)
    with torch.no_grad():
        mode = theirs.encode(frame.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean = torch.tensor(theirs.config.latents_mean).view(1, 1, -1, 1, 1)
    std = torch.tensor(theirs.config.latents_std).view(1, 1, -1, 1, 1)
    found = vae.encode_frame(frame)
    assert found.shape == (1, 1, 16, 4, 6)
    assert torch.equal(found, (mode - mean) / std)
    # Normalised: the statistics of the latent space are gone, and what is left has the size of the generator's input.
    assert float(found.mean().abs()) < 0.3
    assert 0.3 < float(found.std()) < 2


def test_encode_frame_leaves_the_stream_alone(vae: StreamingVAE, theirs):
    latents = noise(6)
    first = vae.decode(latents[:, :3])
    alone = vae.encode_frame(first[:, -1:])
    second = vae.decode(latents[:, 3:])
    assert torch.equal(torch.cat([first, second], dim=1), decode_whole(theirs, latents))
    # And it keeps no state of its own: the same frame, later, is the same latent.
    assert torch.equal(vae.encode_frame(first[:, -1:]), alone)


def test_encode_clip_is_theirs(vae: StreamingVAE, theirs):
    clip = vae.decode(noise(3))
    with torch.no_grad():
        mode = theirs.encode(clip.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean = torch.tensor(theirs.config.latents_mean).view(1, 1, -1, 1, 1)
    std = torch.tensor(theirs.config.latents_std).view(1, 1, -1, 1, 1)
    found = vae.encode(clip)
    assert found.shape == (1, 3, 16, 4, 6)
    assert torch.equal(found, (mode - mean) / std)
    with pytest.raises(CodecError, match="1 \\+ 4n"):
        vae.encode(clip[:, :8])


def held(vae: StreamingVAE) -> int:
    """Bytes of every tensor that can be reached from the object."""
    import gc

    seen: set[int] = set()
    total, queue = 0, [vae]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type) or type(item).__name__ in {"module", "function"}:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.untyped_storage().nbytes() if not item.is_meta else 0
            continue
        queue.extend(gc.get_referents(item))
    return total


def test_a_half_holds_its_half_alone(directory: Path, theirs):
    def size(*parts: str) -> int:
        return sum(t.nbytes for n, t in theirs.state_dict().items() if n.split(".")[0] in parts)

    place = {"device": "cpu", "dtype": torch.float32}
    decoder = StreamingVAE.load(directory, encoder=False, **place)
    encoder = StreamingVAE.load(directory, decoder=False, **place)
    slack = 1024
    assert size("decoder", "post_quant_conv") <= held(decoder) <= size("decoder", "post_quant_conv") + slack
    assert size("encoder", "quant_conv") <= held(encoder) <= size("encoder", "quant_conv") + slack
    frames = decoder.decode(noise(1))
    assert torch.equal(frames, decode_whole(theirs, noise(1)))
    assert encoder.encode_frame(frames).shape == (1, 1, 16, 4, 6)
    with pytest.raises(CodecError, match="without its encoder"):
        decoder.encode_frame(frames)
    with pytest.raises(CodecError, match="without its decoder"):
        encoder.decode(noise(1))


def test_bfloat16_streams_bit_identically(directory: Path):
    def load() -> StreamingVAE:
        return StreamingVAE.load(directory, device="cpu", dtype=torch.bfloat16)

    whole, parts = load(), load()
    latents = noise(4)
    expected = whole.decode(latents)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(torch.cat([parts.decode(part) for part in latents.split(1, dim=1)], dim=1), expected)


@pytest.mark.parametrize("shape", [(1, 3, 8, 4, 6), (3, 16, 4, 6), (1, 0, 16, 4, 6)])
def test_wrong_shapes_are_refused_and_leave_the_stream(vae: StreamingVAE, shape: tuple[int, ...]):
    first = vae.decode(noise(1))
    with pytest.raises(CodecError, match="latents must be"):
        vae.decode(torch.zeros(shape))
    assert vae.decoded_latents == 1
    with pytest.raises(CodecError, match="one frame"):
        vae.encode_frame(torch.cat([first, first], dim=1))


def test_missing_files_are_named(tmp_path: Path, directory: Path):
    with pytest.raises(CodecError, match=r"config\.json and diffusion_pytorch_model\.safetensors missing"):
        StreamingVAE.load(tmp_path, device="cpu", dtype=torch.float32)
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(CodecError) as caught:
        StreamingVAE.load(tmp_path, device="cpu", dtype=torch.float32)
    assert caught.value.evidence["missing_files"] == [WEIGHTS_FILE]


def test_damage_and_other_models_are_told_apart(tmp_path: Path, directory: Path):
    def load() -> None:
        StreamingVAE.load(tmp_path, device="cpu", dtype=torch.float32)

    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"base_dim": 16}))
    with pytest.raises(CodecError, match=r"does not fit its config\.json"):
        load()
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 2}))
    with pytest.raises(CodecError, match=r"Wan2\.2"):
        load()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CodecError, match="not JSON"):
        load()
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[:-1000])
    with pytest.raises(CodecError, match="truncated or corrupt"):
        load()


def test_loading_says_nothing(directory: Path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch; from pathlib import Path; from engine.codecs.vae import StreamingVAE\n"
            "StreamingVAE.load(Path(sys.argv[1]), device='cpu', dtype=torch.float32)",
            str(directory),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == ""
    assert done.stderr == ""
