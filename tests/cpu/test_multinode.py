"""Two launchers, one rank each, meeting at one endpoint: what two hosts do, on one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomli_w
from safetensors.numpy import load_file

from engine.config import EngineConfig, from_dict
from tests.support.ranks import free_port, run_ranks
from tpctl.launch.local import LaunchSpec, run


def make_config(cache: Path, tp: int) -> EngineConfig:
    return from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {"height": 32, "width": 32},
            "plan": {"tp": tp},
            "run": {"chunks": 2, "record_latents": True},
            "sink": {"kinds": ["null"]},
        }
    )


def test_two_launchers_make_one_job(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, 2)
    reference = run_ranks(tmp_path / "reference", make_config(weights_cache, 1))
    assert reference.exit_codes == {0: 0}, reference.stderr
    job = tmp_path / "job"
    job.mkdir()
    (job / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    endpoint = f"localhost:{free_port()}"

    def launch(node_rank: int) -> int:
        node_dir = tmp_path / f"node{node_rank}"
        node_dir.mkdir()
        spec = LaunchSpec(
            nproc=1,
            run_dir=node_dir,
            arguments=["--config", str(job / "config.toml"), "--run-dir", str(job)],
            deadline_s=120,
            nnodes=2,
            node_rank=node_rank,
            rdzv_endpoint=endpoint,
            rdzv_id="two-hosts",
        )
        return run(spec).returncode

    with ThreadPoolExecutor(2) as hosts:
        assert list(hosts.map(launch, (0, 1))) == [0, 0]
    ours, theirs = load_file(job / "latents.safetensors"), load_file(reference.run_dir / "latents.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, latents in theirs.items():
        assert abs(ours[key] - latents).max() <= 1e-4 * abs(latents).max()
