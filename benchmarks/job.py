"""One real job under torchrun, from its configuration to the reports of its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w

from engine.config import EngineConfig

DEADLINE_S = 240.0


def run_job(run_dir: Path, config: EngineConfig, module: str = "engine.worker") -> dict[int, dict[str, Any]]:
    """Run one job to its end in a new directory; returns the report of each rank.

    Raises:
        RuntimeError: the job failed or took longer than `DEADLINE_S`, or a rank did not drain. Nothing outlives it.
    """
    run_dir.mkdir()
    path = run_dir / "config.toml"
    path.write_text(tomli_w.dumps(config.to_dict()))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    _run([sys.executable, "-m", "engine.assets", "--config", str(path)], environment)
    launch = f"--nnodes=1 --nproc-per-node={config.world_size} --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    launch += f" --max-restarts=0 --monitor-interval=0.1 --log-dir={run_dir / 'logs'} --redirects=3"
    worker = ["-m", module, "--config", str(path), "--run-dir", str(run_dir)]
    _run([sys.executable, "-m", "torch.distributed.run", *launch.split(), *worker], environment)
    reports = {
        rank: json.loads((run_dir / "ranks" / f"rank{rank}.json").read_text()) for rank in range(config.world_size)
    }
    for rank, report in reports.items():
        if report["exit_code"] != 0:
            raise RuntimeError(f"rank {rank} of {config.plan.tp_plan} ended with {report['exit_code']}")
    return reports


def _run(command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command[:4])} ... did not end within {DEADLINE_S:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {process.returncode}:\n{output[-4000:]}")
