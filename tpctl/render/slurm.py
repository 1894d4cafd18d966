"""An sbatch script: one supervisor a node, a drain before the time limit, and each node's evidence in a bundle.

The scheduler signals a whole step at once, ranks and launchers too, which would be an abort. So the signal goes to the
batch script alone (`--signal=B:`), which asks for the drain on the first node.
"""

from __future__ import annotations

import re
from shlex import quote

from tpctl.errors import RenderError
from tpctl.render.spec import Spec

TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})")
PARTITION = re.compile(r"[A-Za-z0-9_.,-]+")


def render(spec: Spec, time_limit: str | None = None, partition: str | None = None) -> str:
    """Raises RenderError: a time limit or a partition that sbatch would not take."""
    if time_limit is not None and not TIME.fullmatch(time_limit):
        raise RenderError(
            f"--time must be as sbatch takes it, got {time_limit!r}", code="TP-8066", next_step="--time 1-00:00:00"
        )
    if partition is not None and not PARTITION.fullmatch(partition):
        raise RenderError(f"--partition must be a name, got {partition!r}", code="TP-8067", next_step="sinfo")
    plan, threads = spec.config.plan, spec.config.comm.threads_per_rank
    wanted = {
        "job-name": spec.name,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        # One more for the supervisor, the launcher and the referee.
        "cpus-per-task": spec.ranks_per_node * threads + 1,
        "gpus-per-node": spec.gpus_per_node or None,
        "time": time_limit,
        "partition": partition,
        "output": f"{spec.name}-%j.log",
        "signal": f"B:TERM@{spec.grace_s}",
        "export": "NONE",
    }
    lines = [
        "#!/usr/bin/env bash",
        f"# {spec.name}: {spec.config.world_size} rank(s) of plan {plan.tp_plan} on {spec.nodes} node(s).",
        "# End it without loss: scancel --batch --signal=TERM JOB_ID",
        *(f"#SBATCH --{key}={value}" for key, value in wanted.items() if value is not None),
        "set -euo pipefail",
        "",
        "# Only what stands here is taken along.",
        "export SLURM_EXPORT_ENV=ALL",
        *(f"export {name}={quote(value)}" for name, value in spec.environment.items()),
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f'export RENDEZVOUS="${{hosts[0]}}:{spec.port}"',
        "# A node's own disk: control sockets and black boxes do not belong on a shared one.",
        'export JOB_STATE="${TMPDIR:-/tmp}/tpctl-$SLURM_JOB_ID"',
        "",
        "read -r -d '' node << 'END_OF_NODE' || true",
        *_node(spec),
        "END_OF_NODE",
        "",
        "asked=",
        "drain() {",
        "  asked=yes",
        f'  TPCTL_STATE_DIR="$JOB_STATE/node-0" {quote(spec.command)} drain {spec.name} >&2 || true',
        "}",
        "trap drain TERM INT",
        "",
        f'srun --nodes={spec.nodes} --ntasks={spec.nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c "$node" &',
        "step=$!",
        "while true; do",
        "  status=0",
        '  wait "$step" || status=$?',
        "  # A signal ends the wait, not the step.",
        '  if [ -z "$asked" ]; then break; fi',
        "  asked=",
        "done",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def _node(spec: Spec) -> list[str]:
    """What runs on each node."""
    tpctl = quote(spec.command)
    several = f' --nnodes {spec.nodes} --node-rank "$SLURM_NODEID" --rdzv "$RENDEZVOUS"' if spec.nodes > 1 else ""
    return [
        "set -u",
        "umask 077",
        'export TPCTL_STATE_DIR="$JOB_STATE/node-$SLURM_NODEID"',
        'mkdir -p "$TPCTL_STATE_DIR"',
        "cat > \"$TPCTL_STATE_DIR/config.toml\" << 'END_OF_CONFIG'",
        *spec.toml().splitlines(),
        "END_OF_CONFIG",
        f'{tpctl} up --foreground --name {spec.name} --config "$TPCTL_STATE_DIR/config.toml"{several}',
        "status=$?",
        f'kept="${{SLURM_SUBMIT_DIR:-.}}/{spec.name}-$SLURM_JOB_ID-node$SLURM_NODEID.tar.gz"',
        f'{tpctl} bundle {spec.name} --out "$kept" -q > /dev/null || echo "the bundle $kept is not whole" >&2',
        'exit "$status"',
    ]
