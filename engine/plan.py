"""ChunkPlan: every decision of a chunk that could differ between ranks, and its rules (contract, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import CallCountError, PreflightError

V0 = "v0_full_pipeline"
V11A = "v1.1a"
V11B = "v1.1b"
V1 = "v1_generator_only"
PP0 = "pp0"
PP1 = "pp1"

TP_PLANS = (V0, V11A, V11B, V1)
PP_PLANS = (PP0, PP1)  # Stage 0 alone on rank 0, the mesh on the ranks after it
PLANS = TP_PLANS + PP_PLANS
TIMESTEPS = 1000  # of the schedule: pure noise
ALIASES = {"v0": V0, "v1.1c": V1}


def canonical_plan(name: str) -> str:
    """`v1.1c` is `v1_generator_only`; all other names are their own."""
    return ALIASES.get(name, name)


def due(every: int, chunk_index: int) -> bool:
    """Whether a check with this cadence, in chunks, comes in this chunk; 0 is off."""
    return every > 0 and chunk_index >= 0 and chunk_index % every == 0


def expected_generator_calls(do_kv_recompute: bool, num_denoise_steps: int, clean_pass: bool = False) -> int:
    """Generator calls of one chunk: the recompute call, one a step, and the optional clean pass at t = 0."""
    return int(do_kv_recompute) + num_denoise_steps + int(clean_pass)


def steps_within(steps: tuple[int, ...], noise_scale: float | None) -> tuple[int, ...]:
    """The denoise steps of a chunk. Video-to-video begins at the step nearest below the noise of its latents."""
    if noise_scale is None:
        return steps
    return tuple(step for step in steps if step <= round(TIMESTEPS * noise_scale, 6))


@dataclass(frozen=True)
class ChunkPlan:
    """What the mesh will do for one chunk. Made by Stage 0, carried by the envelope, recomputed by every mesh rank.

    `chunk_index` counts chunks since start; `current_start_frame` is the first latent frame of the chunk within its
    cache epoch. `expected_calls` is what Stage 0 promises; `check` compares it with what the other fields imply.
    """

    chunk_index: int
    cache_epoch: int
    control_epoch: int
    current_start_frame: int
    height: int
    width: int
    init_cache: bool
    reset_kv_cache: bool
    reset_crossattn_cache: bool
    conditioning_embeds_updated: bool
    kv_cache_attention_bias: float
    do_kv_recompute: bool
    denoising_step_list: tuple[int, ...]
    num_denoise_steps: int
    expected_calls: int
    base_seed: int
    noise_scale: float | None = None
    clean_pass: bool = False

    def computed_calls(self) -> int:
        return expected_generator_calls(self.do_kv_recompute, len(self.denoising_step_list), self.clean_pass)

    def start_frame(self, context_frames: int, cache_end_frame: int) -> int:
        """The first position of the chunk in the generator.

        With recompute: right after the context, min(current_start_frame, K). Without: where the cache ends, which is
        `current_start_frame` unless an earlier chunk of this epoch was recomputed. Then the cache's timeline is
        shorter than the stream's, and it goes on without a gap that the model would see as a jump in time.
        """
        return min(self.current_start_frame, context_frames) if self.do_kv_recompute else cache_end_frame

    def ids(self, call_id: int = -1) -> dict[str, int]:
        return {"call_id": call_id, "chunk_index": self.chunk_index, "cache_epoch": self.cache_epoch}

    def check(self, call_id: int = -1) -> None:
        """Raise if the plan contradicts itself. Run by Stage 0 in preflight and by every mesh rank before Phase B.

        Raises:
            CallCountError: steps against list, or expected against computed calls.
            PreflightError: any other contradiction.
        """
        ids = self.ids(call_id)
        if self.num_denoise_steps != len(self.denoising_step_list) or not self.denoising_step_list:
            raise CallCountError(
                f"num_denoise_steps is {self.num_denoise_steps}, but the step list has "
                f"{len(self.denoising_step_list)} entries: {list(self.denoising_step_list)}",
                code="TP-6102",
                ids=ids,
                evidence={"num_denoise_steps": self.num_denoise_steps, "steps": self.denoising_step_list},
            )
        if self.expected_calls != self.computed_calls():
            raise CallCountError(
                f"expected_generator_calls is {self.expected_calls}, but the plan computes {self.computed_calls()} "
                f"(recompute {int(self.do_kv_recompute)} + steps {self.num_denoise_steps}"
                f" + clean pass {int(self.clean_pass)})",
                ids=ids,
                evidence={"expected": self.expected_calls, "computed": self.computed_calls()},
            )
        problems = []
        if not 0.0 < self.kv_cache_attention_bias <= 1.0:
            problems.append(f"kv_cache_attention_bias must be in (0, 1], is {self.kv_cache_attention_bias}")
        if self.init_cache and self.current_start_frame != 0:
            problems.append(f"init_cache needs current_start_frame 0, is {self.current_start_frame}")
        if self.init_cache and not (self.reset_kv_cache and self.reset_crossattn_cache):
            problems.append("init_cache needs both reset bits")
        if self.do_kv_recompute and self.current_start_frame == 0:
            problems.append("recompute needs context, and the first chunk of an epoch has none")
        if self.conditioning_embeds_updated and not self.reset_crossattn_cache:
            problems.append("changed conditioning needs reset_crossattn_cache")
        if self.noise_scale is not None and not 0.0 < self.noise_scale <= 1.0:
            problems.append(f"noise_scale must be in (0, 1], is {self.noise_scale}")
        elif steps_within(self.denoising_step_list, self.noise_scale) != self.denoising_step_list:
            problems.append(f"the steps {list(self.denoising_step_list)} begin noisier than noise_scale")
        if self.current_start_frame < 0 or self.cache_epoch < 0 or self.control_epoch < 0:
            problems.append("frames and epochs must not be negative")
        if problems:
            raise PreflightError("the plan contradicts itself: " + "; ".join(problems), fm="FM-01", ids=ids)
