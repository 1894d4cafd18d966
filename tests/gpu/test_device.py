"""On a CUDA device: digests, payloads and a whole stream agree with the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from engine.config import from_dict
from engine.tripwires import device_word, digest
from engine.wire.frame import PayloadBuffer
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_device_word_is_that_of_the_cpu() -> None:
    flat = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert device_word(flat.cuda()) == device_word(flat)
    altered = flat.clone()
    altered.view(torch.uint8)[777] ^= 1
    assert digest({"x": altered.cuda()}) != digest({"x": flat.cuda()})


def test_a_payload_lies_on_the_device() -> None:
    buffer = PayloadBuffer(device="cuda")
    view = buffer.view(1024)
    assert view.device.type == "cuda"
    assert buffer.view(512).data_ptr() == view.data_ptr()


def test_a_stream_on_the_device_equals_that_on_the_cpu(weights_cache: Path, tmp_path: Path) -> None:
    streams = {}
    for device in ("cpu", "cuda"):
        config = from_dict(
            {
                "model": {"cache_dir": str(weights_cache), "device": device, "attention_backend": "sdpa"},
                "run": {"chunks": 3, "record_latents": True},
                "sink": {"kinds": ["null"]},
            }
        )
        outcome = run_ranks(tmp_path / device, config)
        assert outcome.exit_codes == {0: 0}, outcome.stderr
        streams[device] = load_file(outcome.run_dir / "latents.safetensors")
    for key, latents in streams["cpu"].items():
        assert abs(streams["cuda"][key] - latents).max() <= 1e-3 * abs(latents).max()
