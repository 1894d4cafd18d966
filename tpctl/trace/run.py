"""A run, gathered for its timeline: every rank's bars, black box and start-up, on the first rank's clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.blackbox import Commitment, Contents
from engine.config import EngineConfig, load
from engine.errors import EngineError
from engine.lifecycle import RankState
from engine.measures import Overlap, SendAfterDecode, Straggler, overlap, send_after_decode, straggler
from engine.records import RecordsError, read_records, read_stages
from tpctl.errors import RunError
from tpctl.evidence import gather
from tpctl.reports import read_reports
from tpctl.trace.bars import Bar, Kind, Lane, depths, link_bars, mesh_bars, stage0_bars
from tpctl.trace.clocks import HOME, Shift, across_link, across_mesh, one_clock
from tpctl.trace.stages import Stages, stages

STATES = [state.value for state in RankState]


@dataclass(frozen=True)
class RankLine:
    """One rank. `bars` and `commitments` are on the run's clock; `unplaced` chunk records have no times."""

    rank: int
    role: str
    host: str | None
    bars: tuple[Bar, ...] = ()
    commitments: tuple[Commitment, ...] = ()
    chunks: int = 0
    unplaced: int = 0
    alive: bool = False
    shift: Shift = HOME
    problems: tuple[str, ...] = ()

    def moved(self, shift: Shift) -> RankLine:
        return replace(
            self,
            bars=tuple(bar.shifted(shift.by_ns) for bar in self.bars),
            commitments=tuple(replace(one, t_ns=one.t_ns + shift.by_ns) for one in self.commitments),
            shift=shift,
        )


@dataclass(frozen=True)
class Run:
    """All of it. `counters` are queue depths over time, in pp. `overlap` is None where the plan or the run has none,
    `held_back` where its signature could not show, `stages` without a chunk after the warm-up, `straggler` where
    no single rank holds up all others."""

    run_dir: Path
    tp_plan: str | None
    ranks: tuple[RankLine, ...]
    counters: Mapping[str, Sequence[tuple[int, int]]]
    overlap: Overlap | None
    held_back: SendAfterDecode | None
    stages: Stages | None
    straggler: Straggler | None
    alive: bool
    problems: tuple[str, ...]

    @property
    def bars(self) -> list[Bar]:
        return [bar for line in self.ranks for bar in line.bars]


def read_run(run_dir: Path, last: int = 0) -> Run:
    """What there is of a run, alive or gone.

    Args:
        last: only so many of its last chunks; 0 is all.

    Raises:
        RunError: no rank left anything to draw.
    """
    seen, reports = gather(run_dir), read_reports(run_dir)
    config = _config(run_dir)
    rows, loops, problems = {}, {}, list(seen.problems)
    lines: list[RankLine] = []
    for one in seen.ranks:
        found, loop_ns, wrong = _rows(run_dir, one.rank, reports.get(one.rank, {}))
        rows[one.rank], loops[one.rank] = found, loop_ns
        line = _line(one.rank, reports.get(one.rank, {}), found, loop_ns, one.contents, one.alive)
        lines.append(replace(line, problems=(*one.problems, *wrong, *line.problems)))
    if not any(line.bars or line.commitments for line in lines):
        raise RunError(
            f"no rank of {run_dir} left chunk records, a report or a black box: there is nothing to draw",
            code="TP-7802",
            where=str(run_dir),
            evidence={"problems": "; ".join(p for line in lines for p in line.problems)[:400] or "none"},
            next_step=f"tpctl triage {run_dir}",
        )
    lines = _on_one_clock(lines, rows, loops)
    stage0, loop_ns = rows.get(0, ()), loops.get(0)
    counters: Mapping[str, Sequence[tuple[int, int]]] = {}
    measured = held_back = None
    if loop_ns is not None and stage0:
        leader = next((line for line in lines if line.role == "stage1+leader"), None)
        under_way = link_bars(lines[0].bars, leader.bars if leader else (), stage0, loop_ns)
        lines[0] = replace(lines[0], bars=(*lines[0].bars, *under_way))
        counters, measured, held_back = depths(stage0, loop_ns), _overlap(stage0), _held_back(stage0)
    if last:
        lines, counters = _tail(lines, counters, last)
    plan = config.plan.tp_plan if config else next((r.get("tp_plan") for r in reports.values()), None)
    slow = straggler({line.rank: rows[line.rank] for line in lines if line.role != "stage0"})
    spent = stages(stage0)
    return Run(run_dir, plan, tuple(lines), counters, measured, held_back, spent, slow, seen.alive, tuple(problems))


def _config(run_dir: Path) -> EngineConfig | None:
    for name in ("config.toml", "config0.toml"):
        with contextlib.suppress(EngineError):
            return load([("run", run_dir / name)]).config
    return None


def _rows(
    run_dir: Path, rank: int, report: Mapping[str, Any]
) -> tuple[Sequence[Mapping[str, Any]], int | None, list[str]]:
    """A rank's chunks, when its loop began where its times count from that, and what is wrong with its records."""
    ranks = run_dir / "ranks"
    wrong: list[str] = []
    loop_ns = (report.get("clock") or {}).get("loop_ns")
    for path, read in (
        (ranks / f"rank{rank}.stages.jsonl", read_stages),
        (ranks / f"rank{rank}.chunks.jsonl", _chunks),
    ):
        if path.exists():
            try:
                began_ns, rows = read(path)
                return rows, began_ns, wrong
            except RecordsError as error:
                wrong.append(error.message.replace(str(path), path.name))
    rows = [row for row in report.get("chunks") or () if isinstance(row, dict) and _identified(row)]
    return rows, loop_ns if type(loop_ns) is int else None, wrong


def _chunks(path: Path) -> tuple[int | None, Sequence[Mapping[str, Any]]]:
    return None, read_records(path).chunks


def _identified(row: Mapping[str, Any]) -> bool:
    return all(type(row.get(name)) is int for name in ("call_id", "chunk_index", "cache_epoch"))


def _line(
    rank: int,
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    loop_ns: int | None,
    box: Contents | None,
    alive: bool,
) -> RankLine:
    role = str(report.get("role") or "unknown")
    bars, unplaced = _startup(rank, report), 0
    for row in rows:
        made = mesh_bars(rank, row, role) if loop_ns is None else stage0_bars(rank, row, loop_ns)
        unplaced += made is None
        bars += made or []
    commitments = box.commitments if box is not None else ()
    now_ns = time.monotonic_ns() if alive else max((one.t_ns for one in commitments), default=0)
    bars += _unfinished(rank, commitments, now_ns)
    problems = [f"{unplaced} chunk records of rank {rank} carry no times"] if unplaced else []
    return RankLine(
        rank, role, report.get("host"), tuple(bars), commitments, len(rows), unplaced, alive, problems=tuple(problems)
    )


def _startup(rank: int, report: Mapping[str, Any]) -> list[Bar]:
    """The states that the rank went through, each until the next was reached."""
    clock, times = report.get("clock") or {}, report.get("times") or {}
    if not all(isinstance(clock.get(name), int | float) for name in ("monotonic_ns", "age_s")):
        return []
    born_ns = clock["monotonic_ns"] - round(clock["age_s"] * 1e9)
    reached = [(RankState.STARTING.value, 0.0)]
    reached += [(state, times[f"{state}_s"]) for state in STATES if isinstance(times.get(f"{state}_s"), float)]
    moments = [born_ns + round(t_s * 1e9) for _, t_s in reached]
    return [
        Bar(rank, Lane.state, Kind.state, t0, t1, name=state)
        for (state, _), t0, t1 in zip(reached, moments, moments[1:], strict=False)
        if t1 > t0
    ]


def _unfinished(rank: int, commitments: Sequence[Commitment], now_ns: int) -> list[Bar]:
    """Phase B that was entered and not left."""
    last = next((one for one in reversed(commitments) if one.action in ("enter B", "leave B")), None)
    if last is None or last.action != "enter B":
        return []
    ids = last.call_id, last.chunk_index, last.cache_epoch
    return [Bar(rank, Lane.b, Kind.generate, last.t_ns, max(now_ns, last.t_ns + 1), *ids, open=True)]


def _on_one_clock(
    lines: Sequence[RankLine], rows: Mapping[int, Sequence[Mapping[str, Any]]], loops: Mapping[int, int | None]
) -> list[RankLine]:
    """Rank 0's, which the others are bound to by what they did together."""
    first, home = lines[0], HOME  # whom mesh ranks of other hosts are placed by, and its own shift
    loop_ns = loops[first.rank]
    leader = next((line for line in lines if line.role == "stage1+leader"), None)
    if leader is not None:
        stage0 = rows[first.rank]
        if loop_ns is None:
            home = HOME if leader.host == first.host else Shift(0, None)
        elif leader.host != first.host or not one_clock(stage0, loop_ns, leader.bars):
            home = across_link(stage0, loop_ns, leader.bars)
        first = leader.moved(home)
    placed = []
    for line in lines:
        if line.rank == lines[0].rank or (line.host == lines[0].host and home == HOME):
            placed.append(line)
        elif line.host == first.host:
            placed.append(line.moved(home))
        else:
            placed.append(line.moved(across_mesh(first.bars, line.bars)))
    return placed


def _overlap(rows: Sequence[Mapping[str, Any]]) -> Overlap | None:
    with contextlib.suppress(KeyError, TypeError):
        return overlap(rows)
    return None


def _held_back(rows: Sequence[Mapping[str, Any]]) -> SendAfterDecode | None:
    with contextlib.suppress(KeyError, TypeError):
        return send_after_decode(rows)
    return None


def _tail(
    lines: Sequence[RankLine], counters: Mapping[str, Sequence[tuple[int, int]]], last: int
) -> tuple[list[RankLine], Mapping[str, Sequence[tuple[int, int]]]]:
    """The last chunks alone, and what happened since the first of them began."""
    newest = max((bar.chunk_index for line in lines for bar in line.bars), default=-1)
    kept = {bar.chunk_index for line in lines for bar in line.bars if bar.chunk_index > newest - last} - {-1}
    since_ns = min((bar.t0_ns for line in lines for bar in line.bars if bar.chunk_index in kept), default=0)
    cut = [
        replace(
            line,
            bars=tuple(bar for bar in line.bars if bar.chunk_index in kept),
            commitments=tuple(one for one in line.commitments if one.t_ns >= since_ns),
        )
        for line in lines
    ]
    return cut, {name: [step for step in steps if step[0] >= since_ns] for name, steps in counters.items()}
