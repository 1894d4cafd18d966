"""The deep KV audit: every rank's cache samples against those of a replay on one process.

The replay is the reference, so one rank alone can be judged, and a deviation names the rank whose heads have it. What
follows a deviation is its consequence: the ranks that deviate first are told from those that only follow.

Shape legend: C generator calls, N layers, X keys and values (2), H heads of a rank, K measures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import load
from engine.records import RecordsError, read_records
from engine.sealed import SealedError, chunks_in, frame_path, frames_dir, samples_dir
from tpctl.kvmeasure import MEASURES, NAMES, TOLERANCE, Deviation, measure
from tpctl.kvreplay import Replayed, config_path, frames_job, replay, require_frames
from tpctl.kvsamples import Samples, read_samples
from tpctl.output import Column, Output, Table
from tpctl.reports import read_reports
from tpctl.verdict import Finding, Verdict

if TYPE_CHECKING:
    from tpctl.kvsamples import Array

ANSWER = {Verdict.PASS: "consistent", Verdict.FAIL: "diverged"}
KEPT = 20  # problems kept in full; the rest is counted


@dataclass
class RankAudit:
    """One rank: how many (chunk, call, layer, head) were compared, and what came of it."""

    rank: int
    compared: int = 0
    expected: int = 0
    deviating: int = 0
    largest: float = 0.0
    heads: range = range(0)
    first: Deviation | None = None
    problems: list[str] = field(default_factory=list)

    def verdict(self, origin: Iterable[int]) -> str:
        """`diverged` first, `affected` after others did, `consistent` in full, or `indeterminate`."""
        if self.first is not None:
            return "diverged" if self.rank in origin else "affected"
        return "consistent" if self.compared == self.expected > 0 and not self.problems else "indeterminate"

    def to_dict(self, origin: Iterable[int]) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "heads": [self.heads.start, self.heads.stop - 1],
            "verdict": self.verdict(origin),
            "compared": self.compared,
            "expected": self.expected,
            "deviating": self.deviating,
            "largest": self.largest,
            "first": self.first.to_dict() if self.first else None,
            "problems": self.problems[:KEPT],
        }


@dataclass
class DeepAudit:
    """All ranks of a run against the replay. `calls` are the planned generator calls of each known chunk."""

    tolerance: float
    ranks: list[RankAudit]
    calls: Mapping[int, int]
    reference: Replayed = field(default_factory=Replayed)
    problems: list[str] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)
    largest: Deviation | None = None

    @property
    def compared(self) -> int:
        return sum(rank.compared for rank in self.ranks)

    @property
    def expected(self) -> int:
        return sum(rank.expected for rank in self.ranks)

    @property
    def first(self) -> list[Deviation]:
        """Every head that deviates at the first place where any does, of each rank."""
        place = min((found.place for found in self.deviations), default=None)
        return [found for found in self.deviations if found.place == place]

    @property
    def origin(self) -> tuple[int, ...]:
        return tuple(sorted({found.rank for found in self.first}))

    @property
    def late(self) -> bool:
        return self.reference.timed_out

    @property
    def verdict(self) -> Verdict:
        if self.deviations:
            return Verdict.FAIL
        whole = self.compared == self.expected > 0 and not self.problems
        return Verdict.PASS if whole and not any(rank.problems for rank in self.ranks) else Verdict.UNKNOWN

    def findings(self, run_dir: Path) -> list[Finding]:
        """The first deviation, then whatever leaves something open."""
        found = []
        if self.first:
            first, ranks = self.first[0], ", ".join(map(str, self.origin))
            heads = sorted({deviation.head for deviation in self.first})
            also = f"; {len(heads)} heads deviate there: {', '.join(map(str, heads))}" if len(heads) > 1 else ""
            found.append(
                Finding(
                    "kv.content",
                    Verdict.FAIL,
                    f"first content divergence: {first.sentence()}{also}",
                    value=first.deviation,
                    limit=self.tolerance,
                    where=f"rank {ranks}",
                    next=f"tpctl triage {run_dir}",
                )
            )
        for where, problems in (
            ("the replay", self.problems),
            *((f"rank {one.rank}", one.problems) for one in self.ranks),
        ):
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                evidence = {"problems": problems[:KEPT]}
                said = f"{where}: {problems[0]}{more}"
                found.append(Finding("kv.deep", Verdict.UNKNOWN, said, where=where, evidence=evidence))
        if self.compared < self.expected or not self.expected:
            said = f"{self.compared} of {self.expected} (chunk, call, layer, head) compared with the replay"
            found.append(Finding("kv.deep.coverage", Verdict.UNKNOWN, said, self.compared, self.expected))
        return found

    def to_dict(self) -> dict[str, Any]:
        first = self.first
        return {
            "answer": ANSWER.get(self.verdict, "indeterminate"),
            "tolerance": self.tolerance,
            "replay": {
                "chunks": len(self.reference.chunks),
                "skipped": len(self.reference.skipped),
                "wall_s": self.reference.wall_s,
                **{name: self.reference.facts.get(name) for name in ("device", "dtype", "attention_backend")},
            },
            "coverage": {"checked": self.compared, "expected": self.expected},
            "first": first[0].to_dict() if first else None,
            "heads": [deviation.to_dict() for deviation in first],
            "origin": list(self.origin),
            "largest": self.largest.to_dict() if self.largest else None,
            "ranks": [one.to_dict(self.origin) for one in self.ranks],
            "problems": self.problems[:KEPT],
        }


def table(deep: DeepAudit) -> Table:
    """Rank by rank, for people."""
    rows = [
        row | {"of": f"{row['compared']} of {row['expected']}", "problem": next(iter(row["problems"]), None)}
        for row in deep.to_dict()["ranks"]
    ]
    headings = (
        "rank",
        "heads",
        "verdict",
        ("compared", "of"),
        "deviating",
        ("largest deviation", "largest"),
        "problem",
    )
    return Table([Column(*((name, name) if isinstance(name, str) else name)) for name in headings], rows, "deep")


def dig(run_dir: Path, job: str | None, tolerance: float, deadline_s: float, out: Output) -> DeepAudit:
    """Replay a run and compare; leaves nothing behind, in the run or elsewhere.

    Args:
        tolerance: 0 takes the one of the run's dtype.
        deadline_s: seconds for the replay; 0 is no limit.

    Raises:
        EvidenceError: nothing was recorded.
        ConfigError: the run's configuration cannot be read.
    """
    require_frames(run_dir)
    config = load([("run", config_path(run_dir))]).config
    job = job or frames_job(run_dir)
    with tempfile.TemporaryDirectory(prefix="tpctl-replay-") as name:
        replayed = replay(run_dir, Path(name), job, deadline_s, out)
        return audit(
            run_dir,
            Path(name),
            replayed,
            job=job,
            ranks=range(config.world_size - config.plan.tp, config.world_size),
            layers=config.dims.num_layers,
            heads=config.dims.num_heads,
            calls=planned_calls(run_dir),
            fingerprints={
                rank: report["generator"]["replicated_fingerprint"]
                for rank, report in read_reports(run_dir).items()
                if report.get("generator", {}).get("replicated_fingerprint")
            },
            tolerance=tolerance or TOLERANCE[config.model.dtype],
        )


def planned_calls(run_dir: Path) -> dict[int, int]:
    """Generator calls of each chunk, by whichever rank's records can be read; damage is the plain audit's to name."""
    calls: dict[int, int] = {}
    for path in sorted((run_dir / "ranks").glob("rank*.chunks.jsonl")):
        try:
            rows = read_records(path).chunks
        except RecordsError:
            continue
        for row in rows:
            calls.setdefault(row["chunk_index"], row["expected_generator_calls"])
    return calls


def audit(
    run_dir: Path,
    replay_dir: Path,
    replayed: Replayed,
    *,
    job: str | None,
    ranks: Sequence[int],
    layers: int,
    heads: int,
    calls: Mapping[int, int],
    fingerprints: Mapping[int, str],
    tolerance: float,
) -> DeepAudit:
    """Compare all samples of all ranks with the replay's.

    Args:
        ranks: of the mesh, in its order; they share the heads evenly.
        layers, heads: of the whole model.
        calls: planned generator calls of each chunk that anybody recorded.
        fingerprints: by rank, of the weights that all ranks hold alike; another model is no reference.
        tolerance: relative to the mean magnitude of a head's cached values.
    """
    known = dict(calls)
    for chunk_index in {*chunks_in(frames_dir(run_dir), ".frame"), *replayed.chunks}:
        known.setdefault(chunk_index, replayed.chunks.get(chunk_index, {}).get("calls", max(calls.values(), default=1)))
    own = heads // len(ranks)
    audits = [RankAudit(rank, heads=range(place * own, (place + 1) * own)) for place, rank in enumerate(ranks)]
    found = DeepAudit(tolerance, audits, known, replayed)
    for one in found.ranks:
        one.expected = sum(known.values()) * layers * own
    if replayed.problem:
        found.problems.append(replayed.problem)
    reference = replayed.facts.get("replicated_fingerprint")
    strangers = sorted(rank for rank, word in fingerprints.items() if word != reference)
    if strangers and reference is not None:
        found.problems.append(
            f"the replay's weights are not those of rank {', '.join(map(str, strangers))}: it is no reference"
        )
        return found
    for chunk_index in sorted(known):
        try:
            reference_samples = read_samples(replay_dir, chunk_index, job)
        except SealedError as error:
            reason = _why_not(replayed, run_dir, chunk_index, error)
            found.problems.append(f"chunk {chunk_index} was not replayed: {reason}")
            continue
        for one in found.ranks:
            _audit_rank(found, one, run_dir, job, reference_samples, layers)
    return found


def _why_not(replayed: Replayed, run_dir: Path, chunk_index: int, error: SealedError) -> str:
    """Why there is no reference for a chunk."""
    if chunk_index in replayed.chunks:
        return error.message
    there = frame_path(run_dir, chunk_index).exists()
    return replayed.skipped.get(chunk_index, "the replay did not get to it" if there else "its frame is missing")


def _audit_rank(
    found: DeepAudit, one: RankAudit, run_dir: Path, job: str | None, reference: Samples, layers: int
) -> None:
    """One chunk of one rank."""
    chunk_index = reference.chunk_index
    try:
        taken = read_samples(samples_dir(run_dir, one.rank), chunk_index, job, one.rank)
    except SealedError as error:
        one.problems.append(f"chunk {chunk_index}: {error.message}")
        return
    problem = _mismatch(taken, reference, one.heads, layers)
    if problem:
        one.problems.append(f"chunk {chunk_index}: {problem}")
        return
    one.compared += taken.calls * layers * len(one.heads)
    _judge(found, one, taken, measure(taken, reference))


def _mismatch(taken: Samples, reference: Samples, heads: range, layers: int) -> str | None:
    """Why two samples are not of the same thing; None if they are."""
    if taken.key() != reference.key():
        return f"(chunk, epoch, call id) is {taken.key()}, the replay's {reference.key()}"
    if taken.heads != heads or taken.total_heads != reference.total_heads or taken.layers != layers:
        return f"holds heads {taken.heads} of {taken.total_heads} in {taken.layers} layers: another model or mesh"
    if taken.sums_CNXHWM.shape[4] != reference.sums_CNXHWM.shape[4] or taken.calls != reference.calls:
        return f"holds {taken.calls} calls, the replay {reference.calls}"
    return None


def _judge(found: DeepAudit, one: RankAudit, taken: Samples, measured: Mapping[str, Array]) -> None:
    """Take the largest deviation, count what is beyond the tolerance, and keep the heads at the first such place."""
    import numpy as np

    beyond_CNH = np.zeros((taken.calls, taken.layers, len(one.heads)), dtype=bool)
    here: list[Deviation] = []
    for cache, values_CNXHK in measured.items():
        worst_CNH = values_CNXHK.max((2, 4))
        top = _deviation(one, taken, cache, values_CNXHK, np.unravel_index(int(worst_CNH.argmax()), worst_CNH.shape))
        one.largest = max(one.largest, top.deviation)
        if found.largest is None or top.deviation > found.largest.deviation:
            found.largest = top
        over_CNH = worst_CNH > found.tolerance
        beyond_CNH |= over_CNH
        if over_CNH.any():
            call = int(over_CNH.any((1, 2)).argmax())
            # The text cache is filled before any layer runs: all of its layers stand at one place.
            layers = range(taken.layers) if cache == "text" else [int(over_CNH[call].any(1).argmax())]
            here += [
                _deviation(one, taken, cache, values_CNXHK, (call, layer, int(head)))
                for layer in layers
                for head in np.flatnonzero(over_CNH[call, layer])
            ]
    one.deviating += int(beyond_CNH.sum())
    if here and one.first is None:
        one.first = min(here, key=lambda deviation: (deviation.place, deviation.layer, deviation.head))
        found.deviations += [deviation for deviation in here if deviation.place == one.first.place]


def _deviation(one: RankAudit, taken: Samples, cache: str, values_CNXHK: Array, where: Sequence[Any]) -> Deviation:
    """The deviation of one head, by the tensor and the measure that show it most."""
    call, layer, head = (int(number) for number in where)
    values_XK = values_CNXHK[call, layer, :, head]
    tensor, measured = divmod(int(values_XK.argmax()), values_XK.shape[1])
    return Deviation(
        chunk_index=taken.chunk_index,
        cache_epoch=taken.cache_epoch,
        call_id=taken.call_id,
        call=call + 1,
        calls=taken.calls,
        cache=cache,
        layer=layer,
        head=one.heads.start + head,
        rank=one.rank,
        tensor=NAMES[tensor],
        measure=MEASURES[measured],
        deviation=float(values_XK.max()),
    )
