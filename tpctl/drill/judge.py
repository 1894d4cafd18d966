"""Did the job die as the drill demands: fast, for the named reason, with the right blame, with nothing left behind?"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.blackbox import BlackBoxError, read_box
from tpctl.drill.ranks import Ended
from tpctl.drill.table import Drill
from tpctl.verdict import Finding, Verdict

REFEREE_KILL = -9
ENDED = "ended"  # the referee's word for: a rank ended itself, and wrote down why
TOLD = frozenset({73, 74})  # these ranks died of another one's death
BEREFT = frozenset({71, 72})  # and these too, where another one was killed


@dataclass(frozen=True)
class Seen:
    """What a drill's job left: how it ended, reports, moments (monotonic ns), the referee's record if there is one.

    `recorded_ns` is when a rank wrote down what became of the fault; `calls_after` counts what the victim entered in
    its groups after it.
    """

    drill: Drill
    run_dir: Path
    ended: Ended
    reports: Mapping[int, Mapping[str, Any]]
    injected_ns: int | None
    failed_ns: Mapping[int, int]
    around: tuple[str, ...] = ()
    referee: Mapping[str, Any] | None = None
    decided_ns: int | None = None
    clean: Path | None = None
    recorded_ns: int | None = None
    calls_after: int | None = None

    @property
    def verdict(self) -> Mapping[str, Any]:
        """The referee's verdict; empty if it gave none."""
        return (self.referee or {}).get("verdict") or {}

    @property
    def proved(self) -> Mapping[str, Any]:
        """The referee's verdict where it rests on more than a rank's own words; else empty."""
        return self.verdict if self.verdict.get("kind") not in (None, ENDED) else {}

    @property
    def first(self) -> int | None:
        """The first rank to fail: by the referee's proof, by its report, or by its death. Who was told is not it."""
        codes = self.ended.codes
        if len(self.proved.get("triggers", ())) == 1:
            return int(self.proved["triggers"][0])
        killed = {
            rank: self.ended.gone_ns[rank] for rank, code in codes.items() if code < 0 and rank not in self.ended.forced
        }
        # Beside a killed rank, those whose peer vanished are its victims, however fast they wrote their reports.
        told = TOLD | BEREFT if killed else TOLD
        own = {rank: ns for rank, ns in self.failed_ns.items() if codes.get(rank) not in told}
        moments = killed | own or dict(self.failed_ns)
        return min(moments, key=moments.__getitem__) if moments else None

    @property
    def error(self) -> Mapping[str, Any]:
        """The error of the first rank that said why; empty if none did."""
        ranks = sorted(self.failed_ns, key=lambda rank: (rank != self.first, self.failed_ns[rank]))
        return next((self.reports[rank]["error"] for rank in ranks if self.reports[rank].get("error")), {})

    def after_ms(self, moment_ns: int | None) -> float | None:
        if moment_ns is None or self.injected_ns is None:
            return None
        return round((moment_ns - self.injected_ns) / 1e6, 1)

    @property
    def first_ms(self) -> float | None:
        """To the first failure: a rank that ends itself, or the referee's verdict; or to the record of what was lived
        through."""
        others = (self.decided_ns, self.recorded_ns)
        moments = [*self.failed_ns.values(), *(moment for moment in others if moment is not None)]
        return self.after_ms(min(moments, default=None))

    @property
    def gone_ms(self) -> float | None:
        complete = len(self.ended.gone_ns) == self.drill.ranks
        return self.after_ms(max(self.ended.gone_ns.values())) if complete else None


@dataclass(frozen=True)
class Result:
    seen: Seen
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        answers = {finding.verdict for finding in self.findings}
        if Verdict.FAIL in answers:
            return Verdict.FAIL
        return Verdict.SKIP if answers == {Verdict.SKIP} else Verdict.PASS

    def to_dict(self) -> dict[str, Any]:
        seen, drill = self.seen, self.seen.drill
        return {
            "id": drill.id,
            "title": drill.title,
            "verdict": self.verdict.value,
            "plan": drill.plan,
            "tp": drill.tp,
            "victim_rank": drill.victim_rank,
            "exit_codes": {str(rank): code for rank, code in sorted(seen.ended.codes.items())},
            "first_rank": seen.first,
            "code": seen.error.get("code"),
            "fm": seen.proved.get("fm") or seen.error.get("fm"),
            "reason": seen.proved.get("message") or seen.error.get("message"),
            "referee": seen.verdict.get("kind"),
            "blame": self.facts.get("blame"),
            "first_failure_ms": seen.first_ms,
            "gone_ms": seen.gone_ms,
            "around": list(seen.around),
            "leftovers": list(seen.ended.leftovers),
            "forced": {str(rank): why for rank, why in seen.ended.forced.items()},
            "ended_by": self.facts.get("ended_by"),
            "drift": self.facts.get("drift"),
            "run_dir": str(seen.run_dir),
            "findings": [finding.to_dict() for finding in self.findings],
        }


def observe(drill: Drill, run_dir: Path, ended: Ended, clean: Path | None) -> Seen:
    """Read what the ranks left in `run_dir`. What cannot be read counts as missing."""
    reports, failed, around = {}, {}, []
    injected = recorded = calls_after = None
    for rank in range(drill.ranks):
        with contextlib.suppress(OSError, ValueError):
            reports[rank] = json.loads((run_dir / "ranks" / f"rank{rank}.json").read_text(encoding="utf-8"))
        with contextlib.suppress(BlackBoxError, OSError):
            box = read_box(run_dir / "ranks" / f"rank{rank}.blackbox")
            if box.live.state.value == "aborted":
                failed[rank] = box.live.state_ns
            last = box.commitments[-1] if box.commitments else None
            for commitment in box.commitments:
                if commitment.action == drill.records and commitment.chunk_index == drill.at_chunk:
                    recorded = commitment.t_ns
                if commitment.action.startswith("inject ") and injected is None:
                    injected = commitment.t_ns
                    calls_after = sum(entry.t_ns > injected for entry in box.collectives)
                    around.append(f"rank {rank}: {commitment.action}, chunk {commitment.chunk_index}")
            if last is not None:
                around.append(f"rank {rank}: last {last.action} on {last.group}, chunk {last.chunk_index}")
    for rank in reports.keys() - failed.keys():
        if reports[rank].get("error") and rank in ended.gone_ns:
            failed[rank] = ended.gone_ns[rank]
    referee = decided = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        referee = json.loads((run_dir / "referee.json").read_text(encoding="utf-8"))
        decided = int(referee["times"]["decided_unix"] * 1e9) - (time.time_ns() - time.monotonic_ns())
    return Seen(
        drill,
        run_dir,
        ended,
        reports,
        injected,
        failed,
        tuple(around),
        referee,
        decided,
        clean,
        recorded,
        calls_after,
    )


def judge(seen: Seen) -> Result:
    """With its guard: every demand of the table is one finding."""
    drill, error = seen.drill, seen.error
    findings = [find("injected", seen.injected_ns is not None, "the fault was planted", None, None)]
    for rank, code in sorted(seen.ended.codes.items()):
        allowed = set(drill.victim if rank == drill.victim_rank else drill.others)
        if rank in (seen.referee or {}).get("killed", ()):
            allowed.add(REFEREE_KILL)
        findings.append(find("exit code", code in allowed, f"rank {rank} ended with {code}", code, sorted(allowed)))
    if drill.kind and seen.ended.referee is not None:
        named = seen.verdict.get("kind") in drill.kind and seen.verdict.get("fm") == drill.fm
        said = f"the referee: {seen.verdict.get('kind')} {seen.verdict.get('fm')}"
        findings.append(find("reason", named, said, seen.verdict.get("kind"), drill.kind))
    elif drill.code:
        named = error.get("code") in drill.code and (drill.fm is None or error.get("fm") == drill.fm)
        findings.append(find("reason", named, f"{error.get('code')} {error.get('fm')}", error.get("code"), drill.code))
    text = str(seen.proved.get("message") or error.get("message"))
    for said in drill.says:
        word = said.format(victim=drill.victim_rank)
        findings.append(find("words", word in text, f"the error names '{word}'", text, word))
    right, blame = _blame(seen)
    findings.append(find("blame", right, blame, None, drill.blame))
    if drill.calls_after >= 0:
        said = f"{seen.calls_after} calls on a group after the fault"
        findings.append(
            find("calls after", seen.calls_after == drill.calls_after, said, seen.calls_after, drill.calls_after)
        )
    if drill.lives:
        findings += _lived(seen)
    elif drill.blame == "drain":
        findings.append(find("in time", not seen.ended.timed_out, "the drain ended", seen.gone_ms, None))
    else:
        for name, value, limit in (
            ("first failure", seen.first_ms, drill.within_ms),
            ("all gone", seen.gone_ms, drill.gone_ms),
        ):
            findings.append(find(name, value is not None and value <= limit, f"{name} after {value} ms", value, limit))
    left = list(seen.ended.leftovers)
    findings.append(find("leftovers", not left and not seen.ended.timed_out, f"left: {left or 'nothing'}", left, []))
    findings += _orderly(seen)
    return Result(seen, tuple(findings), {"blame": blame})


def judge_without_guard(seen: Seen) -> Result:
    """Without its guard the drill must fail, in the way the table says."""
    drill = seen.drill
    how, drift = _ending(seen)
    findings = [
        find("injected", seen.injected_ns is not None, "the fault was planted", None, None),
        find("proof", how == drill.proof, f"without its guard: {how}", how, drill.proof),
    ]
    if drill.proof_code and how == "late":
        code = seen.error.get("code")
        findings.append(find("next net", code in drill.proof_code, f"caught by {code}", code, drill.proof_code))
    if drill.drift and how == "silent":
        drifted = drift is not None and not drift <= 1e-3
        findings.append(find("drift", drifted, f"{drill.compares} off by {drift} of the largest value", drift, 1e-3))
    left = list(seen.ended.leftovers)
    findings.append(find("leftovers", not left, f"left: {left or 'nothing'}", left, []))
    return Result(seen, tuple(findings), {"ended_by": how, "drift": drift, "blame": None})


def _ending(seen: Seen) -> tuple[str, float | None]:
    drill = seen.drill
    if any(finding.verdict is Verdict.FAIL for finding in _orderly(seen)):
        return "loss", None
    if seen.ended.timed_out or seen.ended.forced:
        return "hang", None
    if all(code == 0 for code in seen.ended.codes.values()):
        return "silent", _drift(seen) if drill.drift else None
    expected = judge(seen)
    return ("guarded" if expected.verdict is Verdict.PASS else "late"), None


def _orderly(seen: Seen) -> list[Finding]:
    """The account balances on rank 0 wherever it could still write, and no file stands half-written."""
    drill, found = seen.drill, []
    if drill.blame == "drain" or drill.proof == "loss" or drill.lives:
        account = (seen.reports.get(0) or {}).get("account") or {}
        made = {key: account.get(key, 0) for key in ("accepted", "emitted", "dropped", "abandoned")}
        balanced = made["accepted"] > 0 and made["accepted"] == sum(made.values()) - made["accepted"]
        found.append(find("account", balanced, f"account: {made}", made, "balanced"))
        halves = [
            path.name
            for path in seen.run_dir.iterdir()
            if path.name.endswith(".partial") or path.name.startswith("frames.")
        ]
        found.append(find("files", not halves, f"half-written files: {halves or 'none'}", halves, []))
    return found


def _blame(seen: Seen) -> tuple[bool, str]:
    """Is the planted rank, or the true difference, the one that is named?"""
    drill, first, evidence = seen.drill, seen.first, dict(seen.error.get("evidence") or {})
    if drill.blame == "drain":
        return True, "asked to end"
    if drill.lives:
        return not seen.verdict and first is None, "nobody" if first is None else f"rank {first}"
    if drill.blame == "link":
        return not seen.proved.get("triggers"), "the link"
    if drill.blame == "everyone":
        codes = {rank: (report.get("error") or {}).get("code") for rank, report in seen.reports.items()}
        return len(codes) == drill.ranks and len(set(codes.values())) == 1, f"all ranks alike: {set(codes.values())}"
    if drill.blame == "receiver":
        right = first is not None and first != drill.victim_rank
        return right, f"rank {first} refused what rank {drill.victim_rank} sent"
    if drill.blame == "rank" and seen.proved:
        named = list(seen.proved.get("triggers", ()))
        return named == [drill.victim_rank], f"{', '.join(f'rank {rank}' for rank in named) or 'no rank'}"
    if drill.blame == "rank":
        stopped = [rank for rank, why in seen.ended.forced.items() if why == "stopped"]
        alone = stopped[0] if stopped else first
        return alone == drill.victim_rank, f"rank {alone}"
    table: Mapping[str, Any] = evidence.get("by_rank") or next(iter((evidence.get("differences") or {}).values()), {})
    if not table and seen.proved:
        between = list(seen.proved.get("triggers") or seen.proved.get("victims", ()))
        right = drill.victim_rank in between and len(between) <= 2
        return right, f"difference between {', '.join(f'rank {rank}' for rank in between)}"
    minority = [int(rank) for rank in evidence.get("minority") or ()]
    if not minority and f"the odd one out is rank {drill.victim_rank}" in str(seen.error.get("message")):
        minority = [drill.victim_rank]
    words = ", ".join(f"rank {rank}" for rank in table)
    if len(table) > 2 or minority:
        return minority == [drill.victim_rank], f"odd one out: {minority} of {words}"
    return str(drill.victim_rank) in table, f"difference between {words}"


def _lived(seen: Seen) -> list[Finding]:
    """The stream went on as if nothing had been: what was emitted is what a clean run emits, and all of it."""
    drill, emitted = seen.drill, _emitted(seen)
    count = int(drill.config["run.chunks"])
    lost = [chunk for chunk in range(count) if chunk not in emitted]
    right = drill.at_chunk in lost if drill.drops else not lost
    drift, dropped = _drift(seen), ((seen.reports.get(0) or {}).get("account") or {}).get("dropped")
    late = seen.first_ms
    return [
        find("in time", not seen.ended.timed_out, "the stream came to its end", seen.gone_ms, None),
        find(
            "recorded",
            late is not None and late <= drill.within_ms,
            f"'{drill.records}' after {late} ms",
            late,
            drill.within_ms,
        ),
        find("emitted", right, f"not emitted: chunks {lost or 'none'}", lost, [drill.at_chunk] if drill.drops else []),
        find("counted", dropped == len(lost), f"{dropped} dropped", dropped, len(lost)),
        find("pixels", drift == 0, f"pixels off by {drift} of the largest value", drift, 0),
    ]


def _emitted(seen: Seen) -> set[int]:
    return {int(chunk["chunk_index"]) for chunk in (seen.reports.get(0) or {}).get("chunks", ())}


def _drift(seen: Seen) -> float | None:
    """Largest difference of any value from the clean run, relative to the largest; NaN and another size read infinite.

    Chunks that were not emitted are left out.
    """
    name = f"{seen.drill.compares}.safetensors"
    if seen.clean is None or not (seen.run_dir / name).exists():
        return None
    import numpy as np
    from safetensors.numpy import load_file

    ours, theirs = (load_file(path / name) for path in (seen.run_dir, seen.clean))
    worst = 0.0
    for key, values in ours.items():
        mine, clean = (array.astype(np.float64) for array in (values, theirs[key]))
        ratio = float(np.abs(mine - clean).max() / np.abs(clean).max()) if mine.shape == clean.shape else math.inf
        worst = max(worst, math.inf if math.isnan(ratio) else ratio)
    return worst


def find(name: str, good: bool, message: str, value: Any, limit: Any) -> Finding:
    """One demand: met or not."""
    return Finding(name, Verdict.PASS if good else Verdict.FAIL, message, value, limit)
