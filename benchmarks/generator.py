"""One generator call on one thread against diffusers' WanTransformer3DModel: same weights, tokens and text.

Before anything is timed the two outputs are compared, so that both are known to do the same work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import bench_model
from benchmarks.measure import Row, in_turns

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4


def run(quick: bool) -> list[Row]:
    import torch

    from engine.comm.group import Group, Phase, PhaseGate

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as directory:
            rival = bench_model.diffusers_model()
            rival.save_pretrained(directory)
            ours = bench_model.load(Path(directory), Group.solo(gate=PhaseGate(Phase.B)))
            warm = bench_model.load(Path(directory), Group.solo(gate=PhaseGate(Phase.B)))
            latents_BFCHW, text_BLD = bench_model.inputs()
            reference = _diffusers_call(rival, latents_BFCHW, text_BLD)
            difference = (ours.cold(latents_BFCHW, text_BLD) - reference()).abs().max().item()
            if not difference < TOLERANCE:
                raise RuntimeError(f"the outputs differ by {difference:.1e}; timing them would compare nothing")
            start = bench_model.FRAMES * bench_model.HISTORY_CHUNKS
            for frame in range(0, start, bench_model.FRAMES):
                warm.call(latents_BFCHW, text_BLD, frame)
            times = in_turns(
                {
                    "diffusers": lambda: _timed(reference),
                    "cold": lambda: _timed(lambda: ours.cold(latents_BFCHW, text_BLD)),
                    # Right after a cold call: the same tokens again, the text in its cache, as in a later denoise step.
                    "step": lambda: _timed(lambda: ours.call(latents_BFCHW, text_BLD, 0)),
                    "warm": lambda: _timed(lambda: warm.call(latents_BFCHW, text_BLD, start)),
                },
                5 if quick else 15,
            )
    finally:
        torch.set_num_threads(threads)
    rival_name = "diffusers WanTransformer3DModel"
    note = f"outputs agree to {difference:.0e}"
    history = f"window of {start} past + {bench_model.FRAMES} new frames"
    return [
        times.row("generator call, cold caches", "cold", "diffusers", rival_name=rival_name, target=1.0, note=note),
        times.row("generator call, text cached", "step", "diffusers", rival_name=rival_name),
        times.row("generator call, warm window", "warm", "step", rival_name="the same call, no past", note=history),
    ]


def _diffusers_call(model: Any, latents_BFCHW: torch.Tensor, text_BLD: torch.Tensor) -> Callable[[], torch.Tensor]:
    """diffusers wants channels before frames."""
    import torch

    hidden_BCFHW = latents_BFCHW.transpose(1, 2).contiguous()
    timestep_B = torch.tensor([bench_model.TIMESTEP])

    def call() -> torch.Tensor:
        output: torch.Tensor = model(hidden_BCFHW, timestep_B, text_BLD, return_dict=False)[0]
        return output.transpose(1, 2)

    return call


def _timed(call: Callable[[], Any]) -> None:
    call()
