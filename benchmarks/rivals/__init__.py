"""The same faults under the launchers that everybody has, and under ours.

The rivals run the same small loop (`loop.py`): plain processes, torchrun, and torchrun with
TORCH_DISTRIBUTED_DEBUG=DETAIL, all with gloo's defaults, whose timeout is half an hour: a job that is still there
`CUT_S` after the injection is cut, and its time is a lower bound. Ours is the engine's drill of the same fault
(`tpctl drill`) and, where a part of ours can notice the fault, that same loop with `Group` and the referee.
Repeats stop at the first cut. `python -m benchmarks.rivals RESULTS.json` prints the table as Markdown.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Pairs, Row, order
from benchmarks.rivals import arms, drills
from benchmarks.rivals.arms import DETAIL, GUARDED, PLAIN, TITLES, TORCHRUN, Ending
from benchmarks.rivals.blame import judge
from benchmarks.rivals.faults import FAULTS, Fault

CUT_S = 20.0
REPEATS = 5
HEALTHY_CHUNKS = 150
HEALTHY_TURNS = 5
DRILL = "drill"
RIVALS = (PLAIN, TORCHRUN, DETAIL)


@dataclass(frozen=True)
class Run:
    """One ending. `ending` is failed, cut or silent (it ended well, as if nothing were wrong). Times in milliseconds
    from the injection: to the end of the first rank, of the last rank, and of the launcher."""

    ending: str
    first_ms: float | None
    ranks_gone_ms: float | None
    gone_ms: float | None
    blamed: str
    right: bool | None


@dataclass(frozen=True)
class FaultRow(Row):
    """A row with every single ending behind it. `own` is the arm that `ours` is from."""

    fault: str = ""
    arm: str = ""
    own: str = ""
    runs: tuple[dict[str, Any], ...] = ()
    own_runs: tuple[dict[str, Any], ...] = ()


def run(quick: bool) -> list[Row]:
    """All faults under all arms; `quick` takes one fault, once, and cuts early."""
    faults = [fault for fault in FAULTS if fault.id == "kill-worker"] if quick else list(FAULTS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        drilled = drills.run(faults, root / "drills")
        for fault in faults:
            mine = [of_drill(answer) for answer in drilled.get(fault.id, [])]
            found: dict[str, list[Run]] = {DRILL: mine} if mine else {}
            for arm in (*RIVALS, *((GUARDED,) if fault.fm else ())):
                found[arm] = endings(arm, fault, root, 1 if quick else REPEATS)
            rows += rows_of(fault, found)
        rows += healthy(root, 1 if quick else HEALTHY_TURNS)
    return rows


def endings(arm: str, fault: Fault, root: Path, repeats: int) -> list[Run]:
    runs: list[Run] = []
    for number in range(repeats):
        ending = arms.run(arm, fault, root / f"{fault.id}-{arm}-{number}", cut_s=CUT_S)
        runs.append(of_ending(arm, fault, ending))
        if ending.cut:
            break
    return runs


def of_ending(arm: str, fault: Fault, ending: Ending) -> Run:
    how = "cut" if ending.cut else "failed" if ending.failed else "silent"
    blame = judge(arm, fault, ending)
    if how != "failed":
        return Run(how, None, None, None, blame.words, blame.right)
    gone = sorted(ending.rank_gone_ns.values())
    return Run(
        how,
        ending.after_ms(gone[0]) if gone else None,
        ending.after_ms(gone[-1]) if gone else None,
        ending.after_ms(ending.gone_ns),
        blame.words,
        blame.right,
    )


def of_drill(answer: dict[str, Any]) -> Run:
    """The drill's own verdict says whether the blame is right: it demands the planted rank or the true difference."""
    right = answer["blame"] is not None and answer["verdict"] == "PASS"
    first_ms, gone_ms = answer["first_failure_ms"], answer["gone_ms"]
    return Run("failed", first_ms, gone_ms, gone_ms, str(answer["blame"]), right)


def rows_of(fault: Fault, found: dict[str, list[Run]]) -> list[Row]:
    """One row a rival: ours is the drill, or the loop with our parts where there is no drill."""
    own = DRILL if DRILL in found else GUARDED
    ours_ms = median_ms(found[own])
    rows: list[Row] = []
    for arm, runs in found.items():
        if arm == own:
            continue
        rival_ms = median_ms(runs)
        rows.append(
            FaultRow(
                name=fault.title,
                ours=ours_ms or 0.0,
                rival_name=TITLES[arm],
                rival=CUT_S * 1e3 if rival_ms is None else rival_ms,
                unit="ms",
                ratio=(ours_ms or 0.0) / (CUT_S * 1e3 if rival_ms is None else rival_ms),
                meaning="last rank gone, ours / rival" + (" (at most: the rival never ended)" if not rival_ms else ""),
                samples=len(runs),
                note=words_of(runs),
                fault=fault.id,
                arm=arm,
                own=own,
                runs=tuple(vars(item) for item in runs),
                own_runs=tuple(vars(item) for item in found[own]),
            )
        )
    return rows


def median_ms(runs: Sequence[Run]) -> float | None:
    times = [item.ranks_gone_ms for item in runs if item.ranks_gone_ms is not None]
    return statistics.median(times) if len(times) == len(runs) and times else None


def words_of(runs: Sequence[Run]) -> str:
    """One sentence: how it ended, and how often the blame was right."""
    if any(item.ending == "cut" for item in runs):
        return f"hangs; cut after {CUT_S:g} s"
    if all(item.ending == "silent" for item in runs):
        return "never noticed: exit code 0"
    right, wrong, none = (sum(item.right is value for item in runs) for value in (True, False, None))
    return f"blame right {right}, wrong {wrong}, none {none} of {len(runs)}; {runs[-1].blamed}"


def healthy(root: Path, turns: int) -> list[Row]:
    """The loop with nothing broken: what each way costs a chunk (18 collectives)."""
    names = (TORCHRUN, DETAIL, GUARDED)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for name in order(names, turn):
            ending = arms.run(name, None, root / f"healthy-{name}-{turn}", cut_s=60, chunks=HEALTHY_CHUNKS)
            if ending.failed or ending.cut or 0 not in ending.results:
                raise RuntimeError(f"the healthy loop failed under {name}: {ending.log[-2000:]}")
            times[name].append(ending.results[0]["chunk_ms"] / 1e3)
    pairs = Pairs(times)
    return [
        pairs.row("a healthy chunk, DETAIL", DETAIL, TORCHRUN, rival_name="the same loop under torchrun"),
        pairs.row("a healthy chunk, Group and referee", GUARDED, TORCHRUN, rival_name="the same loop under torchrun"),
    ]
