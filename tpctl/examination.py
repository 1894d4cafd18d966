"""A run examined: what was gathered of it and judged, with the files, stacks and steps that go with the verdict."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.referee.snapshot import Life
from tpctl.acts import last_acts
from tpctl.bundle import archive
from tpctl.bundle.archive import Bundle
from tpctl.evidence import LAUNCHER_LOG, RankSeen, Seen, find_runs, gather
from tpctl.failuremodes import FAILURE_MODES, has_runbook
from tpctl.remains import tail
from tpctl.stacks import flight_records, live_stacks
from tpctl.triage import Triage, judge
from tpctl.verdict import Verdict

# A live job is looked at twice, this far apart: what is proved is still so the second time.
SECOND_LOOK_S = 0.06
# What an error says to type next where it knows nothing better.
VAGUE = ("tpctl triage", "tpctl env", "the first cause")


@dataclass(frozen=True)
class Case:
    """One run directory, judged. `bundle` is the archive that it lies in; what is shown must outlive the copy."""

    seen: Seen
    found: Triage
    notes: tuple[str, ...] = ()
    stacks: tuple[dict[str, Any], ...] = ()
    flight: tuple[dict[str, Any], ...] = ()
    bundle: Path | None = None

    @property
    def run(self) -> Path:
        """What to call the run."""
        return self.bundle or self.seen.run_dir

    def inside(self, path: Path) -> str:
        """A file of the run: its path, or its name in the bundle."""
        return str(path) if self.bundle is None else str(path.relative_to(self.seen.run_dir.parents[1]))

    @property
    def speaks(self) -> int | None:
        """The rank whose log to read."""
        one = self.found.triggers or ((self.found.speaker,) if self.found.speaker is not None else ())
        return one[0] if len(one) == 1 else None

    @property
    def log(self) -> Path | None:
        rank = self.seen.of(self.speaks) if self.speaks is not None else None
        if rank is not None:
            return rank.log
        launcher = self.seen.run_dir / LAUNCHER_LOG
        return launcher if self.found.verdict is not Verdict.PASS and launcher.is_file() else None

    @property
    def problems(self) -> list[str]:
        return [*self.seen.problems, *(problem for rank in self.seen.ranks for problem in rank.problems)]

    def next(self) -> list[str]:
        """What to type, best first."""
        run, found = shlex.quote(str(self.run)), self.found
        if found.verdict is Verdict.PASS:
            return []
        if found.kind == "running":
            return [f"tpctl triage {run}"]
        steps = []
        rank = self.seen.of(found.speaker) if found.speaker is not None else None
        told = (rank.report.error or {}).get("next") if rank is not None and rank.report is not None else None
        if told and not told.startswith(VAGUE):
            steps.append(str(told))
        mode = FAILURE_MODES.get(found.fm or "")
        if mode is not None and mode.next and not steps:
            steps.append(mode.next.format(run=run))
        if found.runbook and has_runbook(found.runbook):
            steps.append(f"tpctl runbook show {found.runbook}")
        if not steps and self.log is not None:
            log = shlex.quote(self.inside(self.log))
            steps.append(f"tail -n 50 {log}" if self.bundle is None else f"tar -xOf {run} {log} | tail -n 50")
        return list(dict.fromkeys(steps)) or ["tpctl bringup --level 1"]

    def to_dict(self) -> dict[str, Any]:
        found = self.found
        return {
            "run": str(self.run),
            "job": self.seen.job,
            "alive": self.seen.alive,
            "verdict": found.verdict.value,
            "kind": found.kind,
            "sentence": found.sentence,
            "blame": found.blame,
            "triggers": list(found.triggers),
            "parties": list(found.parties),
            "victims": list(found.victims),
            "fm": found.fm,
            "words": found.words,
            "code": found.code,
            "runbook": found.runbook,
            "source": found.source,
            "coverage": {"checked": found.coverage.checked, "expected": found.coverage.expected},
            "ranks": [rank_row(rank, found) for rank in self.seen.ranks],
            "acts": [act.to_dict() for act in last_acts(self.seen)],
            "problems": self.problems,
            "notes": list(self.notes),
            "stacks": list(self.stacks),
            "flight_recorder": list(self.flight),
            "log": self.inside(self.log) if self.log else None,
            "tail": list(tail(self.log)),
            "next": self.next(),
        }


def examine(directory: Path) -> Case:
    """Gather and judge one run. A job that lives is judged twice; what it was only for a moment is not proved."""
    seen = gather(directory)
    found = judge(seen)
    if seen.alive:
        threading.Event().wait(SECOND_LOOK_S)
        again = gather(directory)
        later = judge(again)
        moved = (later.kind, later.triggers, later.fm) != (found.kind, found.triggers, found.fm)
        seen, found = again, later
        if moved and seen.alive:
            found = Triage(Verdict.UNKNOWN, "running", "the job still runs, and moved while it was looked at")
    if found.verdict is Verdict.PASS:
        return Case(seen, found)
    stacks, no_stacks = live_stacks(seen)
    flight, no_flight = flight_records(seen)
    notes = [*no_stacks, *no_flight]
    if seen.alive:
        alive = ", ".join(str(rank.rank) for rank in seen.ranks if rank.alive)
        notes.insert(0, f"the job still lives (rank {alive}): this is its state now")
    return Case(seen, found, tuple(notes), tuple(stacks), tuple(flight))


def alive(run_dir: Path) -> Iterator[Case]:
    """The runs of a directory, as they are now."""
    yield from map(examine, find_runs(run_dir))


@contextlib.contextmanager
def bundled(path: Path) -> Iterator[Iterator[Case]]:
    """The runs of a bundle, as they were when it was made. Their files are there while the body runs."""
    bundle = archive.read(path)
    with archive.extracted(bundle) as root:
        yield (from_bundle(bundle, root, run) for run in bundle.manifest["runs"])


def from_bundle(bundle: Bundle, root: Path, run: Mapping[str, Any]) -> Case:
    """One run of it. This host knows nothing of its processes: the manifest tells how they lived."""
    words = {life.value for life in Life}
    lives = {int(rank): Life(life) for rank, life in run["lives"].items() if life in words}
    seen = gather(root / "runs" / str(run["label"]), lives)
    seen = replace(seen, problems=(*seen.problems, *bundle.problems))
    found = judge(seen)
    made = f"as of {bundle.manifest.get('made_at')}, when the bundle was made"
    return Case(seen, found, (made,) if found.verdict is not Verdict.PASS else (), bundle=bundle.path)


def rank_row(rank: RankSeen, found: Triage) -> dict[str, Any]:
    box = rank.contents
    commit = box.commitments[-1] if box and box.commitments else None
    entry = (box.inside or (box.collectives[-1] if box.collectives else None)) if box else None
    inside = bool(box and box.inside)
    acts = [act for act in (commit, entry) if act is not None]
    call_id = max((act.call_id for act in acts), default=-1)
    chunk = max((act.chunk_index for act in acts), default=-1)
    state = box.live.state.value if box else rank.report.state if rank.report else None
    return {
        "rank": rank.rank,
        "role": found.role(rank.rank),
        "state": state,
        "life": rank.life.value if rank.life else None,
        "exit_code": rank.exit_code,
        "error": str((rank.report.error or {}).get("code")) if rank.report and rank.report.error else None,
        "commitment": commit.action if commit else None,
        "call_id": call_id if call_id >= 0 else None,
        "chunk_index": chunk if chunk >= 0 else None,
        "inside": inside,
        "op": entry.op if entry else None,
        "what": entry.what if entry else None,
        "group": entry.group if entry else None,
        "place": entry.place if entry else None,
        "site": entry.site if entry else None,
        "problems": list(rank.problems),
    }
