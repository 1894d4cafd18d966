"""Phase B: the generator, in lockstep over the mesh. Knows nothing of prompts, text encoders or pixels."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from engine import tripwires
from engine.blackbox import BlackBox
from engine.comm.group import Group, Phase
from engine.config import EngineConfig
from engine.errors import CallCountError, TripwireError
from engine.evidence import Evidence
from engine.model.dit import DiT
from engine.model.kv_cache import CrossAttnCache, KVCache
from engine.model.scheduler import FlowMatchScheduler
from engine.plan import V1, ChunkPlan, due
from engine.wire.envelope import CARRIES, Envelope

# Shape legend: B batch (1), F latent frames of a chunk, K context frames, C latent channels, H W latent size.


@dataclass(frozen=True)
class MeshResult:
    """What phase B made of one chunk. `latents_out_BFCHW` is clean; the digests are 0 where their tripwire is off; the
    cache's indices are in tokens, one for each layer; `graphs` counts what was compiled up to now. It began at
    `began_ns` of this host's monotonic clock, and of its time spent `t_wait_ms` in collectives (None on a device, where
    a collective is only enqueued)."""

    latents_out_BFCHW: torch.Tensor
    start_frame: int
    observed_generator_calls: int
    input_digest_i64: int
    output_digest_i64: int
    t_b_ms: float
    t_wait_ms: float | None
    graphs: int
    global_end_index: tuple[int, ...]
    local_end_index: tuple[int, ...]
    began_ns: int


class Stage1:
    """One mesh rank's generator with its caches."""

    def __init__(
        self, dit: DiT, kv: KVCache, cross: CrossAttnCache, mesh: Group, config: EngineConfig, blackbox: BlackBox
    ) -> None:
        self.dit = dit
        self.blocks = dit.run
        self.kv = kv
        self.cross = cross
        self.mesh = mesh
        self.config = config
        self.scheduler = FlowMatchScheduler(config.schedule.shift)
        self.guard = tripwires.ShardGuard(dict(dit.named_parameters()))
        self.evidence: Evidence | None = None
        self._blackbox = blackbox
        self._next_start_frame = 0
        self._calls = 0
        self._finite: list[torch.Tensor] = []

    @torch.inference_mode()
    def step(self, envelope: Envelope, call_id: int) -> MeshResult:
        """Run one chunk: check, reset, recompute, denoise, check again.

        Args:
            envelope: complete, i.e. with every tensor that the plan of v1.1c carries.
            call_id: of the frame that brought it.

        Raises:
            CallCountError, TripwireError, PreflightError: before a generator call, or before the result leaves.
        """
        plan = envelope.plan
        gate = self.mesh.gate
        gate.phase, gate.ids = Phase.B, plan.ids(call_id)
        self._blackbox.commit("enter B", self.mesh.name, gate.ids)
        began_ns, waited_ns = time.monotonic_ns(), self.mesh.waited_ns
        if self.evidence is not None:
            self.evidence.begin(envelope, call_id)
        plan.check(call_id)
        self._check_progress(plan)
        input_digest = self._agree_on_inputs(envelope)
        self._apply_resets(plan)
        self._calls = 0
        self._finite = []
        start_frame = plan.start_frame(self.config.geometry.context_frames, self.kv.end_frame)
        if plan.do_kv_recompute:
            self._recompute(envelope)
        latents_BFCHW = self._denoise(envelope, start_frame)
        if self.evidence is not None:
            self.evidence.end()
        output_digest = self._agree_on_results(plan, latents_BFCHW)
        self._next_start_frame = plan.current_start_frame + self.config.geometry.frames_per_chunk
        gate.phase = Phase.LINK
        self._blackbox.commit("leave B", self.mesh.name, gate.ids)
        t_b_ms = (time.monotonic_ns() - began_ns) / 1e6
        on_cpu = latents_BFCHW.device.type == "cpu"
        indices = tuple(self.kv.global_end_index), tuple(self.kv.local_end_index)
        return MeshResult(
            latents_BFCHW,
            start_frame,
            self._calls,
            input_digest,
            output_digest,
            t_b_ms,
            (self.mesh.waited_ns - waited_ns) / 1e6 if on_cpu else None,
            self.blocks.graphs,
            *indices,
            began_ns,
        )

    def _check_progress(self, plan: ChunkPlan) -> None:
        """`current_start_frame` follows from the last chunk on this rank, or is 0 at a hard cut."""
        expected = 0 if plan.init_cache else self._next_start_frame
        if plan.current_start_frame != expected:
            raise TripwireError(
                f"rank {self.mesh.rank}: current_start_frame is {plan.current_start_frame}, expected {expected}",
                fm="FM-10",
                ids=self.mesh.gate.ids,
                evidence={"expected": expected, "got": plan.current_start_frame, "rank": self.mesh.rank},
            )

    def _agree_on_inputs(self, envelope: Envelope) -> int:
        """One tiny collective, always run: planned calls, position, the digest of all inputs, and the shard's state.

        The last two at their cadence, else 0; a shard that still equals its baseline reads -1.
        """
        plan, cadence, ranks = envelope.plan, self.config.tripwires, self.mesh.members
        digest = 0
        if due(cadence.input_digest_every, plan.chunk_index):
            digest = tripwires.digest(envelope.tensors, (plan,))
        changed = -1
        if due(cadence.fingerprint_every, plan.chunk_index) or (cadence.fingerprint_every and plan.init_cache):
            changed = self.guard.check()
        rows = self.gather([plan.computed_calls(), plan.current_start_frame, digest, changed])
        inputs = tripwires.compare("input digest", "meta and tensors", rows[2], ranks, "FM-30")
        tripwires.raise_first(
            [
                tripwires.compare("call count", "planned generator calls", rows[0], ranks, "FM-02"),
                tripwires.compare("position", "current_start_frame", rows[1], ranks, "FM-10"),
                *(self._which_input(envelope) if inputs is not None else ()),
                inputs,
            ],
            self.mesh.gate.ids,
        )
        self._check_shards(rows[3])
        return digest

    def _which_input(self, envelope: Envelope) -> list[tripwires.Finding | None]:
        """The digests differ, as every rank knows now: so all of them tell each part apart, in one more collective."""
        plan, tensors, names = envelope.plan, envelope.tensors, CARRIES[V1]
        rows = self.gather([tripwires.digest({}, (plan,)), *(tripwires.digest({n: tensors.get(n)}) for n in names)])
        return [
            tripwires.compare("input digest", name, row, self.mesh.members, "FM-30")
            for name, row in zip(("the plan", *names), rows, strict=True)
        ]

    def check_baselines(self) -> None:
        """Once, after loading: shards differ, so their baselines must. One collective.

        Raises:
            TripwireError: two ranks hold the same shard.
        """
        (words,) = self.gather([self.guard.word])
        for number, word in enumerate(words):
            if word in words[:number]:
                first = words.index(word)
                raise TripwireError(
                    f"ranks {self.mesh.members[first]} and {self.mesh.members[number]} loaded the same shard",
                    fm="FM-31",
                    evidence={"by_rank": dict(zip(map(str, self.mesh.members), words, strict=True))},
                )

    def _check_shards(self, changed: list[int]) -> None:
        bad = {int(rank): self.guard.names[n] for rank, n in zip(self.mesh.members, changed, strict=True) if n >= 0}
        if bad:
            where = ", ".join(f"rank {rank} in {name}" for rank, name in bad.items())
            raise TripwireError(
                f"shard fingerprint: weights changed since they were loaded: {where}",
                fm="FM-31",
                ids=self.mesh.gate.ids,
                evidence={"by_rank": {str(rank): name for rank, name in bad.items()}, "minority": list(bad)},
            )

    def _apply_resets(self, plan: ChunkPlan) -> None:
        if plan.reset_kv_cache:
            self.kv.reset()
        if plan.reset_crossattn_cache:
            self.cross.reset()

    def _recompute(self, envelope: Envelope) -> None:
        """Rewrite the cache at positions 0..K-1 from the context frames, at timestep 0, without bias."""
        context_BKCHW = _tensor(envelope, "context_frames")
        timestep_K = torch.zeros(context_BKCHW.shape[1], dtype=torch.int64, device=context_BKCHW.device)
        self._call(context_BKCHW, timestep_K, envelope, start_frame=0, recompute=True)

    def _denoise(self, envelope: Envelope, start_frame: int) -> torch.Tensor:
        plan = envelope.plan
        x_BFCHW = _tensor(envelope, "latents")
        frames = x_BFCHW.shape[1]
        steps = plan.denoising_step_list
        for number, step in enumerate(steps):
            timestep_F = torch.full((frames,), step, dtype=torch.int64, device=x_BFCHW.device)
            flow_BFCHW = self._call(
                x_BFCHW, timestep_F, envelope, start_frame=start_frame, bias=plan.kv_cache_attention_bias
            )
            x0_BFCHW = self.scheduler.to_x0(x_BFCHW, flow_BFCHW, step)
            if number + 1 < len(steps):
                noise_BFCHW = _tensor(envelope, "renoise")[number]
                x_BFCHW = self.scheduler.renoise(x0_BFCHW, noise_BFCHW, steps[number + 1])
        if plan.clean_pass:
            zeros_F = torch.zeros(frames, dtype=torch.int64, device=x_BFCHW.device)
            self._call(x0_BFCHW, zeros_F, envelope, start_frame=start_frame)
        return x0_BFCHW

    def _call(
        self,
        x_BFCHW: torch.Tensor,
        timestep_F: torch.Tensor,
        envelope: Envelope,
        *,
        start_frame: int,
        bias: float = 1.0,
        recompute: bool = False,
    ) -> torch.Tensor:
        """One generator call, counted."""
        if self._calls >= envelope.plan.expected_calls:
            raise CallCountError(
                f"rank {self.mesh.rank} was about to make generator call {self._calls + 1} of "
                f"{envelope.plan.expected_calls} planned",
                ids=self.mesh.gate.ids,
            )
        self._calls += 1
        flow_BFCHW: torch.Tensor = self.dit(
            x_BFCHW,
            timestep_F,
            _tensor(envelope, "conditioning_embeds"),
            kv=self.kv,
            cross=self.cross,
            start_frame=start_frame,
            bias=bias,
            recompute=recompute,
        )
        if self.evidence is not None:
            self.evidence.call(self.kv, self.cross)
        self._finite.append(tripwires.finite(flow_BFCHW))  # read once a chunk: a device is not waited for here
        return flow_BFCHW

    def _agree_on_results(self, plan: ChunkPlan, latents_BFCHW: torch.Tensor) -> int:
        """One tiny collective, always run: calls made, finite, the ledger, the output's digest, graphs, the cache.

        The output digest and the KV lifecycle digest at their cadence, else 0.
        """
        ids, ranks, cadence = self.mesh.gate.ids, self.mesh.members, self.config.tripwires
        digest = 0
        if due(cadence.output_digest_every, plan.chunk_index):
            digest = tripwires.digest({"latents_out": latents_BFCHW})
        cache = [0] * len(tripwires.LIFECYCLE)
        if due(cadence.kv_digest_every, plan.chunk_index):
            cache = tripwires.lifecycle(plan, ids["call_id"], self.kv.global_end_index[0], self.kv.local_end_index[0])
        finite = torch.stack([*self._finite, tripwires.finite(latents_BFCHW)]).tolist()
        first_bad = finite.index(False) + 1 if False in finite else 0
        graphs = self.blocks.graphs
        rows = self.gather([self._calls, first_bad, self.mesh.ledger.value(), digest, graphs, *cache])
        tripwires.raise_first(
            [
                tripwires.compare("call count", "generator calls made", rows[0], ranks, "FM-02"),
                tripwires.compare("collective ledger", "group, op, shape, dtype", rows[2], ranks, "FM-03"),
                tripwires.compare("compiled graphs", "graphs", rows[4], ranks, "FM-50"),
                *tripwires.compare_lifecycle(rows[5:], ranks),
            ],
            ids,
        )
        if self._calls != plan.expected_calls:
            raise CallCountError(
                f"rank {self.mesh.rank} made {self._calls} generator calls, {plan.expected_calls} were planned", ids=ids
            )
        # Before the output digest: NaN differs from NaN in its bits, and "not finite" says more than "differs".
        self._check_finite(plan, rows[1])
        tripwires.raise_first([tripwires.compare("output digest", "latents_out", rows[3], ranks, "FM-30")], ids)
        return digest

    def _check_finite(self, plan: ChunkPlan, first_bad: list[int]) -> None:
        """`first_bad` by rank: the first generator call (from 1) whose result is not finite, the calls of the chunk + 1
        for the chunk's own result, or 0. Whoever had one first is where it began: the next call spreads it."""
        bad = {int(rank): call for rank, call in zip(self.mesh.members, first_bad, strict=True) if call}
        if not bad:
            return
        first = min(bad.values())
        began = [rank for rank, call in bad.items() if call == first]
        where = f"generator call {first} of {self._calls}" if first <= self._calls else "the result"
        raise TripwireError(
            f"NaN or Inf in latents_out of chunk {plan.chunk_index}: first in {where}, "
            f"on rank {', '.join(map(str, began))}",
            fm="FM-31",
            ids=self.mesh.gate.ids,
            evidence={"by_rank": {str(rank): call for rank, call in bad.items()}, "minority": began, "call": first},
        )

    def gather(self, values: list[int]) -> list[list[int]]:
        """One int64 all_gather on the CPU: a list over ranks for each value."""
        parts = self.mesh.all_gather(torch.tensor(values, dtype=torch.int64))
        return torch.stack(parts).T.tolist()


def _tensor(envelope: Envelope, name: str) -> torch.Tensor:
    """A tensor that phase B cannot do without; there is no fallback.

    Raises:
        TripwireError: the envelope was not completed.
    """
    tensor = envelope.tensors.get(name)
    if tensor is None:
        raise TripwireError(
            f"phase B of chunk {envelope.plan.chunk_index} needs '{name}', which the envelope lacks",
            fm="FM-06",
            ids=envelope.plan.ids(),
        )
    return tensor
