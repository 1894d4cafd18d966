"""Two launchers, one rank each, meeting at one endpoint: what two hosts do, on one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.numpy import load_file

from engine.config import EngineConfig, from_dict
from tests.support.ranks import free_port, run_ranks
from tpctl.launch.local import LaunchSpec, Outcome, run

FAR_S = 600.0  # no deadline of the ranks comes into it
GONE_S = 90.0  # with the start of two launchers on one machine; far below what the ranks would wait


def make_config(cache: Path, tp: int, **drill: Any) -> EngineConfig:
    far = {"watchdog_s": FAR_S, "phase_budget_s": FAR_S} if drill else {}
    return from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {"height": 32, "width": 32},
            "plan": {"tp": tp},
            "run": {"chunks": 4 if drill else 2, "record_latents": True},
            "sink": {"kinds": ["null"]},
            "liveness": far,
            "drill": drill,
        }
    )


def launch_both(tmp_path: Path, config: EngineConfig, *, referee: bool = True) -> list[Outcome]:
    """One job of two launchers; each host has a directory of its own, and the job one that both see."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    endpoint = f"localhost:{free_port()}"

    def launch(node_rank: int) -> Outcome:
        spec = LaunchSpec(
            nproc=1,
            run_dir=tmp_path / f"node{node_rank}",
            ranks_dir=job,
            arguments=["--config", str(job / "config.toml"), "--run-dir", str(job)],
            deadline_s=GONE_S,
            nnodes=2,
            node_rank=node_rank,
            rdzv_endpoint=endpoint,
            rdzv_id="two-hosts",
            referee=referee,
        )
        return run(spec)

    with ThreadPoolExecutor(2) as hosts:
        return list(hosts.map(launch, (0, 1)))


def test_two_launchers_make_one_job(weights_cache: Path, tmp_path: Path) -> None:
    reference = run_ranks(tmp_path / "reference", make_config(weights_cache, 1))
    assert reference.exit_codes == {0: 0}, reference.stderr
    outcomes = launch_both(tmp_path, make_config(weights_cache, 2))
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    assert not [node for node in (0, 1) if (tmp_path / f"node{node}" / "referee.json").exists()]
    ours, theirs = load_file(tmp_path / "job/latents.safetensors"), load_file(reference.run_dir / "latents.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, latents in theirs.items():
        assert abs(ours[key] - latents).max() <= 1e-4 * abs(latents).max()


FAULTS = {
    "frozen": ({"id": "OM-15.phase-b", "victim_rank": 1}, "frozen", "FM-41", [1]),
    "killed": ({"id": "OM-14", "victim_rank": 0}, "lost", "FM-40", [0]),
    # With two ranks there is a difference, and no culprit.
    "mismatch": (
        {"id": "OM-05", "victim_rank": 1, "differs": "drill.debug_collective=true", "without_guard": True},
        "mismatch",
        "FM-03",
        [],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_referees_of_both_hosts_name_one_cause(name: str, weights_cache: Path, tmp_path: Path) -> None:
    drill, kind, fm, triggers = FAULTS[name]
    outcomes = launch_both(tmp_path, make_config(weights_cache, 2, **drill))
    logs = [(tmp_path / f"node{node}" / "launcher.log").read_text()[-3000:] for node in (0, 1)]
    assert not any(outcome.timed_out for outcome in outcomes), logs
    assert all(outcome.returncode for outcome in outcomes), logs
    first, second = (json.loads((tmp_path / f"node{node}" / "referee.json").read_text())["verdict"] for node in (0, 1))
    assert first == second
    assert (first["kind"], first["fm"], first["triggers"]) == (kind, fm, triggers), first
    assert not any(outcome.leftovers or outcome.immortal for outcome in outcomes)
