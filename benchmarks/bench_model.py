"""The generator at the size that is measured: preset `bench`, 3 latent frames of 12 x 20 tokens, 720 in all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import PRESETS

if TYPE_CHECKING:
    import torch

    from engine.comm.group import Group

DIMS = PRESETS["bench"]
FRAMES = 3
LATENT_HW = (24, 40)
TOKENS_PER_FRAME = (LATENT_HW[0] // 2) * (LATENT_HW[1] // 2)
HISTORY_CHUNKS = 2
TIMESTEP = 750


class BenchModel:
    """A DiT shard with its caches, and one call to it.

    Args:
        state: parameters by original name in shard shape.
        mesh: the ranks that share the model.
    """

    def __init__(self, state: dict[str, Any], mesh: Group) -> None:
        import torch

        from engine.model.dit import DiT
        from engine.model.kv_cache import CrossAttnCache, KVCache

        with torch.device("meta"):
            self.dit = DiT(DIMS, mesh, backend="sdpa", frames_per_block=FRAMES)
        self.dit.load_state_dict(state, strict=True, assign=True)
        self.dit.requires_grad_(False).eval()
        shape: dict[str, Any] = {
            "num_layers": DIMS.num_layers,
            "heads": DIMS.num_heads // mesh.size,
            "head_dim": DIMS.head_dim,
            "dtype": torch.float32,
            "device": "cpu",
        }
        window = FRAMES * (HISTORY_CHUNKS + 1)
        self.kv = KVCache(**shape, tokens_per_frame=TOKENS_PER_FRAME, window_frames=window, sink_frames=0)
        self.cross = CrossAttnCache(**shape, text_len=DIMS.text_len)

    def cold(self, latents_BFCHW: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        """A call with both caches empty: it does all the work that a model without caches does."""
        self.kv.reset()
        self.cross.reset()
        return self.call(latents_BFCHW, text_BLD, 0)

    def call(self, latents_BFCHW: torch.Tensor, text_BLD: torch.Tensor, start_frame: int) -> torch.Tensor:
        import torch

        timestep_F = torch.full((FRAMES,), TIMESTEP)
        flow_BFCHW: torch.Tensor = self.dit(
            latents_BFCHW, timestep_F, text_BLD, kv=self.kv, cross=self.cross, start_frame=start_frame
        )
        return flow_BFCHW


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [1, F, C, h, w] and text embeddings [1, L, D] of full length."""
    import torch

    generator = torch.Generator().manual_seed(0)
    latents_BFCHW = torch.randn(1, FRAMES, DIMS.in_dim, *LATENT_HW, generator=generator)
    text_BLD = torch.randn(1, DIMS.text_len, DIMS.text_dim, generator=generator)
    return latents_BFCHW, text_BLD


def diffusers_model() -> Any:
    """diffusers' transformer of the same sizes, with seeded weights."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=DIMS.num_heads,
        attention_head_dim=DIMS.head_dim,
        in_channels=DIMS.in_dim,
        out_channels=DIMS.out_dim,
        text_dim=DIMS.text_dim,
        freq_dim=DIMS.freq_dim,
        ffn_dim=DIMS.ffn_dim,
        num_layers=DIMS.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=DIMS.eps,
    )
    return model.requires_grad_(False).eval()


def load(checkpoint: Path, mesh: Group) -> BenchModel:
    """This rank's shard of a checkpoint in any layout that the engine reads."""
    import torch

    from engine.model.weights import load_shard

    state, _ = load_shard(checkpoint, DIMS, int(mesh.group_rank), mesh.size, device="cpu", dtype=torch.float32)
    return BenchModel(state, mesh)
