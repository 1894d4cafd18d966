"""Triage names the planted rank, or the true difference, and the failure mode of every drill, and never another rank.

A selection of drills runs here. `TPCTL_DRILLS_DIR=runs/X` has it judge every drill that `tpctl drill` left there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from engine.config import from_dict
from tests.drills.test_drills import explain, unhurried
from tpctl.drill import table
from tpctl.drill.judge import Result
from tpctl.drill.ranks import Nursery
from tpctl.drill.runner import DrillRunner
from tpctl.drill.table import Drill
from tpctl.evidence import gather
from tpctl.matrix.runner import make_assets
from tpctl.triage import Triage, judge
from tpctl.verdict import Verdict

DRILLS = {drill.id: drill for drill in table.load()}
READY = os.environ.get("TPCTL_DRILLS_DIR")
CHOSEN = [
    "OM-01",
    "OM-03.worker.middle",
    "OM-04",
    "OM-05.last",
    "OM-06.first",
    "OM-10",
    "OM-11",
    "OM-11.middle",
    "OM-12",
    "OM-13.header",
    "OM-13.idle-alone",
    "OM-14.last",
    "OM-14-alone",
    "OM-15.phase-b.middle",
    "OM-15.receive-alone",
    "OM-15.sleep",
    "OM-16.first",
    "OM-17",
    "OM-18.back",
    "OM-21.meta",
    "OM-24.once",
    "OM-24.twice",
    "OM-25.last",
    "OM-26",
    "OM-28.first",
]
# Rank 0 out of the mesh: these are judged as drills too, by the run that triage then reads.
PP_CHOSEN = [
    "OM-07",
    "OM-07.silent",
    "OM-07.wire",
    "OM-08.pp-follower",
    "OM-09",
    "OM-10.pp",
    "OM-13.pp-header",
    "OM-14.pp-leader",
    "OM-15.pp-idle",
    "OM-19",
    "OM-20",
    "OM-22",
    "OM-23",
    "OM-28.pp-leader",
]
CHOSEN += PP_CHOSEN
# Where the table of drills has none, by the drill's number. A damaged frame and a full disk are no named failure mode.
FM = {"OM-01": "FM-04", "OM-13": "FM-40", "OM-14": "FM-40", "OM-15": "FM-41", "OM-18": "FM-10"}
# Here the stream came to its end, and nothing is wrong.
DRAINED = {"OM-24.once", *(drill.id for drill in table.load() if drill.lives)}


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """How each drill that `root` ran was judged."""
    return {}


@pytest.fixture(scope="module")
def root(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory, results: dict[str, Result]) -> Path:
    """The run directory of each drill, in one directory."""
    if READY:
        return Path(READY)
    config = from_dict({"model": {"cache_dir": str(weights_cache)}})
    root = tmp_path_factory.mktemp("triage-drills")
    make_assets(config, root)
    with Nursery(root / "nursery.log") as nursery:
        runner = DrillRunner(nursery, config, root)
        for name in CHOSEN:
            results[name] = runner.run(unhurried(DRILLS[name]))
    return root


@pytest.mark.skipif(READY is not None, reason="judged where they ran")
@pytest.mark.parametrize("name", PP_CHOSEN)
def test_a_pp_drill_passes(name: str, root: Path, results: dict[str, Result]) -> None:
    assert results[name].verdict is Verdict.PASS, explain(results[name])


def expected_fm(drill: Drill) -> str | None:
    return drill.fm or FM.get(drill.id[:5])


def right(drill: Drill, found: Triage) -> bool:
    """The planted rank and no other; with two ranks that differ, the two of them."""
    convicted = found.triggers == (drill.victim_rank,)
    if drill.blame in ("drain", "nobody"):
        return found.blame == "nobody"
    if drill.blame == "receiver":
        return found.parties == (0, 1)
    if drill.blame == "difference" and drill.tp == 2:
        return convicted or (found.triggers, found.parties) == ((), (0, 1))
    return convicted


@pytest.mark.parametrize("name", DRILLS if READY else CHOSEN)
def test_triage_names_rank_and_failure_mode(name: str, root: Path) -> None:
    drill = DRILLS[name]
    found = judge(gather(root / name))
    assert right(drill, found), (found.triggers, found.parties, found.sentence)
    assert found.fm == expected_fm(drill), found.sentence
    assert found.verdict is (Verdict.PASS if name in DRAINED else Verdict.FAIL)
    assert not {*found.triggers, *found.parties} & set(found.victims)
    if found.triggers and drill.fault not in ("OM-01", "OM-02", "OM-03.plus-one", "OM-03.minus-one", "OM-03.list"):
        others = set(range(drill.ranks)) - set(found.triggers)
        assert set(found.victims) == others or all(gather(root / name).of(rank).ended == 0 for rank in others)
    assert found.coverage.checked == found.coverage.expected == drill.ranks
    if name not in {*DRAINED, "OM-24.twice"}:
        assert found.runbook


def test_stage_0_hears_from_its_leader_what_was_asked_for_in_vain(root: Path) -> None:
    error = json.loads((root / "OM-28.pp-leader" / "ranks" / "rank0.json").read_text())["error"]
    assert "TP-6601: rank 1 asked for 1073741824 bytes in vain, in chunk 2" in error["message"]


@pytest.mark.parametrize("name", DRILLS if READY else CHOSEN)
@pytest.mark.parametrize("log", [True, False])
def test_without_the_referees_record_no_other_rank_is_convicted(
    name: str, log: bool, root: Path, tmp_path: Path
) -> None:
    """With its log, it is known that the referee ended ranks; without, only the ranks' own files tell."""
    run = Path(shutil.copytree(root / name, tmp_path / name))
    (run / "referee.json").unlink(missing_ok=True)
    if not log:
        (run / "referee.log").unlink(missing_ok=True)
    drill, found = DRILLS[name], judge(gather(run))
    assert set(found.triggers) <= {drill.victim_rank}, found.sentence
    if name not in DRAINED:
        assert found.verdict is not Verdict.PASS
