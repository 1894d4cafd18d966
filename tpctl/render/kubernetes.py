"""A LeaderWorkerSet (leaderworkerset.x-k8s.io/v1) and the ConfigMap of its configuration.

One pod a node. The supervisor is the container's first process and takes its signals: the leader's preStop hook drains
the job, the other pods follow, and the grace is longer than the drain with the abort after it. State lies in a volume
by the pod's uid: pods that come after it leave its evidence alone.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tpctl.errors import RenderError
from tpctl.render.spec import Spec

IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([EPTGMK]i?)?")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
RESOURCE = re.compile(r"[a-z0-9.-]+/[a-z0-9.-]+")
CONFIG, STATE = "/etc/tpctl", "/state"
WORKER_INDEX = "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"
PERIOD_S = 10


def render(
    spec: Spec,
    image: str,
    namespace: str | None = None,
    shared_memory: str = "1Gi",
    gpu_resource: str = "nvidia.com/gpu",
    claim: str | None = None,
) -> str:
    """Two YAML documents. `claim` names a PersistentVolumeClaim for the state, which otherwise ends with its pod.

    Raises:
        RenderError: a name or a size that the cluster would refuse.
    """
    for option, value, rule in (
        ("--image", image, IMAGE),
        ("--namespace", namespace, LABEL),
        ("--shm", shared_memory, QUANTITY),
        ("--gpu-resource", gpu_resource, RESOURCE),
        ("--claim", claim, LABEL),
    ):
        if value is not None and not rule.fullmatch(value):
            raise RenderError(
                f"{option}: a cluster would refuse {value!r}", code="TP-8068", evidence={"option": option}
            )
    labels = {"app.kubernetes.io/name": "tpctl", "app.kubernetes.io/instance": spec.name}
    place = {"namespace": namespace} if namespace is not None else {}
    changes, timeline = {}, spec.config.run.timeline
    files: dict[str, str] = {}
    if timeline:
        files["timeline.toml"] = Path(timeline).read_text(encoding="utf-8")
        changes["run__timeline"] = f"{CONFIG}/timeline.toml"
    files = {"config.toml": spec.toml(**changes), **files}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{spec.name}-config", **place, "labels": labels},
        "data": files,
    }
    template: dict[str, Any] = {
        "size": spec.nodes,
        # A rank that is lost ends the job: all of it begins anew, or none.
        "restartPolicy": "RecreateGroupOnPodRestart",
    }
    for role in ("leader", "worker"):
        pod = _pod(spec, role, image, shared_memory, gpu_resource, claim)
        # Another configuration is another pod.
        meta = {"labels": labels, "annotations": {"tpctl/parity-key": spec.config.parity_key()}}
        template[f"{role}Template"] = {"metadata": meta, "spec": pod}
    workload = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": spec.name, **place, "labels": labels},
        "spec": {
            "replicas": 1,
            # The leader is ready when the stream runs, which needs the workers.
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": template,
        },
    }
    return _dump([config_map, workload])


def _pod(spec: Spec, role: str, image: str, shared_memory: str, gpu_resource: str, claim: str | None) -> dict[str, Any]:
    tpctl, live = _literal(spec.command), spec.config.liveness
    several = ["--nnodes", str(spec.nodes), "--node-rank", "$(NODE_RANK)"]
    several += ["--rdzv", f"$(LWS_LEADER_ADDRESS):{spec.port}"]
    status = {"exec": {"command": [tpctl, "status", spec.name]}, "periodSeconds": PERIOD_S, "timeoutSeconds": PERIOD_S}
    start_s = spec.config.comm.join_timeout_s + live.load_budget_s + live.warmup_budget_s
    container: dict[str, Any] = {
        "name": "tpctl",
        "image": image,
        # No shell in between: the supervisor is process 1, and the signals are its own.
        "command": [tpctl, "up", "--foreground", "--name", spec.name, "--config", f"{CONFIG}/config.toml"],
        "args": several if spec.nodes > 1 else [],
        "env": [
            {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
            {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": WORKER_INDEX}}},
            {"name": "TPCTL_STATE_DIR", "value": STATE},
            *({"name": name, "value": _literal(value)} for name, value in spec.environment.items()),
        ],
        "startupProbe": status | {"failureThreshold": math.ceil(start_s / PERIOD_S)},
        "readinessProbe": status | {"failureThreshold": 1},
        "livenessProbe": status | {"failureThreshold": 3},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "state", "mountPath": STATE, "subPathExpr": "$(POD_UID)"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if spec.nodes > 1:
        container["ports"] = [{"name": "rendezvous", "containerPort": spec.port, "protocol": "TCP"}]
    if spec.gpus_per_node:
        container["resources"] = {"limits": {gpu_resource: spec.gpus_per_node}}
    if role == "leader":
        drain = [tpctl, "drain", spec.name, "--deadline", f"{live.drain_deadline_s:g}"]
        container["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    state: dict[str, Any] = {"emptyDir": {}} if claim is None else {"persistentVolumeClaim": {"claimName": claim}}
    return {
        "terminationGracePeriodSeconds": spec.grace_s,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": f"{spec.name}-config"}},
            {"name": "state", **state},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
        ],
    }


def _literal(value: str) -> str:
    """The cluster would put another variable in the place of $(NAME)."""
    return value.replace("$(", "$$(")


def _dump(documents: list[dict[str, Any]]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Texts of several lines as they are, and every value where it is used: no anchors."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, data: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, explicit_start=True, width=4096))
