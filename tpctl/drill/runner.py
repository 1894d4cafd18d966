"""Runs drills, each in a directory of its own: the job that is broken, and the clean job it is compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, from_dict
from tpctl.drill import twohosts
from tpctl.drill.judge import Result, judge, judge_without_guard, observe
from tpctl.drill.ranks import Ended, Nursery
from tpctl.drill.table import Drill
from tpctl.errors import MatrixError

TIMELINE = """\
[[event]]
at_chunk = 0
prompt = "a red fox in the snow"
[[event]]
at_chunk = 2
prompt = "the same fox at night"
"""
# A hang is a hang after this; the deadlines that would end it are far behind it then.
HANG_DEADLINE_S = 8.0
FAR_S = 600.0


@dataclass
class DrillRunner:
    """`base` is the configuration that every drill changes; `root` gets one directory a drill."""

    nursery: Nursery
    base: EngineConfig
    root: Path
    cleans: dict[str, Path] = field(default_factory=dict)

    def run(self, drill: Drill, *, without_guard: bool = False) -> Result:
        """One drill, judged. Without its guard it has no referee either, and must fail."""
        directory = self.root / drill.id
        if drill.hosts > 1:
            return self._over_hosts(drill, directory, without_guard=without_guard)
        clean = self.clean_run(drill) if drill.lives or (without_guard and drill.drift) else None
        hang = without_guard and drill.proof == "hang"
        path, config = self.write_config(drill, directory, without_guard=without_guard, far=hang)
        budget_s = max(config.liveness.watchdog_s, config.liveness.phase_budget_s)
        ended = self.nursery.run(
            directory,
            path,
            drill.ranks,
            HANG_DEADLINE_S if hang else drill.deadline_s,
            supervise_s=budget_s if hang else 0.0,
            referee=drill.referee and not without_guard,
        )
        seen = observe(drill, directory, ended, clean)
        return judge_without_guard(seen) if without_guard else judge(seen)

    def _over_hosts(self, drill: Drill, directory: Path, *, without_guard: bool) -> Result:
        """A job over two hosts whose link is cut. Skipped, with the reason, where there can be no namespaces."""
        if (reason := twohosts.why_not()) is not None:
            return twohosts.skipped(observe(drill, directory, Ended(), None), reason)
        path, _ = self.write_config(drill, directory, far=without_guard, broken=False)
        deadline_s = HANG_DEADLINE_S if without_guard else drill.deadline_s
        over = twohosts.run(directory, path, deadline_s, at_chunk=drill.at_chunk, guarded=not without_guard)
        seen = observe(drill, directory, over.ended, None)
        seen = replace(seen, injected_ns=over.cut_ns, referee=twohosts.record_of(directory, 0))
        return judge_without_guard(seen) if without_guard else twohosts.judge_over(seen, over)

    def clean_run(self, drill: Drill) -> Path:
        """A run of the same configuration with nothing broken, made once for all drills that share it.

        Raises:
            MatrixError: it did not end well, so that nothing can be compared with it.
        """
        key = json.dumps([drill.plan, drill.tp, drill.cut_chunk, dict(drill.config)], sort_keys=True)
        if key not in self.cleans:
            directory = self.root / f"clean{len(self.cleans)}"
            path, _ = self.write_config(drill, directory, broken=False)
            ended = self.nursery.run(directory, path, drill.ranks, drill.deadline_s, supervise_s=0.0, referee=True)
            if any(ended.codes.values()) or ended.timed_out:
                raise MatrixError(f"the clean run for {drill.id} failed: {ended.codes}", code="TP-7311")
            self.cleans[key] = directory
        return self.cleans[key]

    def write_config(
        self, drill: Drill, directory: Path, *, without_guard: bool = False, far: bool = False, broken: bool = True
    ) -> tuple[Path, EngineConfig]:
        """`config.toml` and the timeline of one drill. `far` moves every deadline away, so that a hang shows itself."""
        import tomli_w

        directory.mkdir(parents=True)
        data: dict[str, dict[str, Any]] = self.base.to_dict()
        data["plan"] = {"tp_plan": drill.plan, "tp": drill.tp}
        data["run"]["timeline"] = str(directory / "timeline.toml")
        data["sink"]["directory"] = str(directory)
        if not broken and drill.cut_chunk >= 0:
            data["pipeline"]["cut"] = "finish"  # every chunk, so that any can be compared
        if broken:
            data["drill"] = {
                "id": drill.fault,
                "victim_rank": drill.victim_rank,
                "at_chunk": drill.at_chunk,
                "without_guard": without_guard,
                "differs": drill.differs,
            }
        for dotted, value in drill.config.items():
            section, key = dotted.split(".", 1)
            data[section][key] = value
        if far:
            data["liveness"] |= {"watchdog_s": FAR_S, "phase_budget_s": FAR_S}
        cut = f"[[event]]\nat_chunk = {drill.cut_chunk}\ncut = true\n" if drill.cut_chunk >= 0 else ""
        (directory / "timeline.toml").write_text(TIMELINE + cut, encoding="utf-8")
        config = from_dict(data, drill.id)
        path = directory / "config.toml"
        path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
        return path, config
