"""`tpctl render`: manifests against the schema of what a cluster takes, and a batch script that really runs a job."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from engine.process import Process
from tests.cli.conftest import validated
from tests.cli.jobs import DEADLINE_S, TINY, in_state, nap, until
from tests.cli.test_surface import _examples
from tests.support.ranks import free_port
from tpctl.bundle import archive
from tpctl.launch.local import tagged

SCHEMA = json.loads((Path(__file__).parent / "leaderworkerset.schema.json").read_text())
TWO = ("--nodes", "2", "--set", "plan.tp=4", "--set", "liveness.drain_deadline_s=45")


def manifest(cli, *more: str) -> tuple[dict, dict]:
    """Config map and workload, both valid."""
    done = cli("render", "kubernetes", "--name", "night", "--image", "tpctl:0.1", *more)
    assert done.exit_code == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    for document in documents:
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
    config_map, workload = documents
    return config_map, workload


def pods(workload: dict) -> dict[str, dict]:
    template = workload["spec"]["leaderWorkerTemplate"]
    return {role: template[f"{role}Template"]["spec"] for role in ("leader", "worker")}


def test_a_manifest_drains_before_its_pods_end(cli):
    config_map, workload = manifest(cli, *TWO)
    assert workload["spec"]["leaderWorkerTemplate"]["size"] == 2
    config = tomllib.loads(config_map["data"]["config.toml"])
    assert (config["plan"]["tp"], config["run"]["chunks"]) == (4, 0)
    for role, pod in pods(workload).items():
        (container,) = pod["containers"]
        assert container["command"][:3] == ["tpctl", "up", "--foreground"]  # process 1, no shell in between
        assert pod["terminationGracePeriodSeconds"] > config["liveness"]["drain_deadline_s"] + 20
        assert container["args"][-1] == "$(LWS_LEADER_ADDRESS):29400"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["exec"]["command"] == ["tpctl", "status", "night"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} == {"config", "state", "shm"}
        assert ("lifecycle" in container) is (role == "leader")
    leader = pods(workload)["leader"]["containers"][0]
    assert leader["lifecycle"]["preStop"]["exec"]["command"] == ["tpctl", "drain", "night", "--deadline", "45"]


def test_what_is_written_can_be_typed(cli, tmp_path, monkeypatch):
    """Every command of a manifest is one that this tpctl understands."""
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / "st"))
    config_map, workload = manifest(cli, *TWO)
    (tmp_path / "config.toml").write_text(config_map["data"]["config.toml"])
    container = pods(workload)["leader"]["containers"][0]
    meant = {"/etc/tpctl/config.toml": "config.toml", "$(NODE_RANK)": "1", "$(LWS_LEADER_ADDRESS):29400": "h:29400"}
    words = [meant.get(word, word) for word in [*container["command"], *container["args"]]]
    assert cli(*words[1:], "--dry-run").exit_code == 0
    for command in (container["startupProbe"]["exec"], container["lifecycle"]["preStop"]["exec"]):
        assert cli(*command["command"][1:]).exit_code == 7  # understood, and there is no such job


def test_equal_input_gives_equal_text(cli, tmp_path, monkeypatch):
    for target in (("kubernetes", "--image", "i"), ("slurm",)):
        words = ("render", *target, "--name", "night", *TWO)
        first = cli(*words).stdout
        monkeypatch.setenv("HF_TOKEN", "s3same-0pen-now")
        monkeypatch.setenv("NCCL_DEBUG", "INFO")
        assert cli(*words).stdout == first
        assert "s3same" not in first
        data = validated(cli(*words, "-o", "json").stdout)["data"]
        assert data["text"] == first
        assert (data["ranks_per_node"], data["grace_s"]) == (2, 75)
        assert cli(*words, "--out", f"{target[0]}.out").exit_code == 0
        assert Path(f"{target[0]}.out").read_text() == first
        again = cli(*words, "--out", f"{target[0]}.out")
        assert "TP-8069" in again.stderr


def test_one_node_a_timeline_and_a_variable(cli, tmp_path):
    (tmp_path / "t.toml").write_text('[[event]]\nat_chunk = 0\nprompt = "a \\"quoted\\" $(fox)"\n')
    config_map, workload = manifest(
        cli, "--set", "run.timeline=t.toml", "--set", "model.device=cpu", "--env", "OMP_PLACES=$(x) 'y'", "--claim", "c"
    )
    assert config_map["data"]["timeline.toml"] == (tmp_path / "t.toml").read_text()
    assert tomllib.loads(config_map["data"]["config.toml"])["run"]["timeline"] == "/etc/tpctl/timeline.toml"
    container = pods(workload)["leader"]["containers"][0]
    assert container["args"] == []
    assert "resources" not in container
    assert {"name": "OMP_PLACES", "value": "$$(x) 'y'"} in container["env"]
    assert {"name": "state", "persistentVolumeClaim": {"claimName": "c"}} in pods(workload)["leader"]["volumes"]


def test_the_schema_refuses_what_is_misspelt(cli):
    _, workload = manifest(cli, *TWO)
    workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["terminationGracePeriod"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(workload)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--name Night", "TP-8061"),
        ("--name x_y", "TP-8061"),
        ("--name 1a", "TP-8061"),
        (f"--name {'a' * 41}", "TP-8061"),
        ("--name 'a b'", "TP-8061"),
        ("--nodes 5", "TP-8051"),
        ("--nodes 3", "TP-8052"),
        ("--grace 40", "TP-8062"),
        ("--env X", "TP-8063"),
        ("--env HF_TOKEN=x", "TP-8064"),
        ("--env TPCTL_RUN_CHUNKS=3", "TP-8064"),
        ("--command ' '", "TP-8065"),
        ("--set liveness.drain_deadline_s=0", "TP-10"),
    ],
)
def test_what_no_cluster_could_run_is_refused(words, code, cli):
    for target in (["slurm"], ["kubernetes", "--image", "i"]):
        done = cli("render", *target, "--name", "night", "--set", "plan.tp=4", *shlex.split(words))
        assert done.exit_code == 2, done.stdout
        assert code in done.stderr
        assert done.stdout == ""


def test_options_of_one_kind_are_checked_too(cli):
    for words, code in (
        (("slurm", "--time", "soon"), "TP-8066"),
        (("slurm", "--partition", "a b"), "TP-8067"),
        (("kubernetes", "--image", "a b"), "TP-8068"),
        (("kubernetes", "--image", "i", "--shm", "much"), "TP-8068"),
        (("kubernetes", "--image", "i", "--namespace", "N"), "TP-8068"),
    ):
        assert code in cli("render", *words, "--name", "night").stderr


def test_a_drain_deadline_that_nobody_stated_is_a_warning(cli):
    told = cli("render", "slurm", "--name", "night", "--strict")
    assert told.exit_code == 4
    assert "no drain deadline is stated" in told.stderr
    assert cli("render", "slurm", "--name", "night", "--strict", *TWO).exit_code == 0


def test_examples_run(cli):
    for command in (["render", "slurm"], ["render", "kubernetes"]):
        for example in _examples(command, cli):
            assert cli(*shlex.split(example)[1:]).exit_code == 0, example


# The batch script, run -------------------------------------------------------------------------------------------

SRUN = """#!{python}
import os, subprocess, sys
count = next(int(word.split("=")[1]) for word in sys.argv if word.startswith("--ntasks="))
words = sys.argv[[word.startswith("--") for word in sys.argv[1:]].index(False) + 1:]
tasks = [subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(n)}}) for n in range(count)]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames nodes[0-1]" ] || exit 9\necho localhost\necho other\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_script_is_sound_bash(cli, tmp_path):
    script = cli("render", "slurm", "--name", "night", "--command", "/opt/my tools/it's/tpctl", *TWO).stdout
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False, timeout=60)
    assert checked.returncode == 0, checked.stderr
    heads = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=2", "#SBATCH --signal=B:TERM@75"} <= set(heads)
    if shellcheck := shutil.which("shellcheck"):
        found = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 0, found.stdout


def test_a_script_runs_a_job_on_two_nodes_and_drains_it_on_the_signal(cli, tmp_path, monkeypatch, weights_cache):
    """`srun` and `scontrol` are stand-ins that start both nodes on this host; the job and its drain are real."""
    place = tmp_path / "a place with blanks"
    program(place / "bin" / "srun", SRUN.format(python=sys.executable))
    program(place / "bin" / "scontrol", SCONTROL)
    program(place / "my tools" / "tpctl", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tpctl "$@"\n')
    sets = [word for pair in (*TINY, "plan.tp=2", f"model.cache_dir={weights_cache}") for word in ("--set", pair)]
    words = ["--nodes", "2", "--command", str(place / "my tools" / "tpctl"), "--port", str(free_port())]
    script = cli("render", "slurm", "--name", "night", *words, *sets)
    assert script.exit_code == 0, script.stderr
    (tmp_path / "night.sh").write_text(script.stdout)
    (tmp_path / "t").mkdir()
    environ = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SLURM_JOB_NODELIST": "nodes[0-1]",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(place),
        "TMPDIR": str(tmp_path / "t"),
        "HOME": str(tmp_path),
    }
    with (tmp_path / "out").open("wb") as out:
        batch = subprocess.Popen(
            ["bash", "night.sh"], env=environ, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    nodes = [tmp_path / "t" / "tpctl-7" / f"node-{number}" for number in (0, 1)]
    try:
        monkeypatch.setenv("TPCTL_STATE_DIR", str(nodes[0]))
        record = nodes[0] / "jobs" / "night" / "job.json"
        while not record.exists():
            assert batch.poll() is None, (tmp_path / "out").read_text()
            nap.wait(0.1)
        until(cli, "night", lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
        batch.send_signal(signal.SIGTERM)
        assert batch.wait(DEADLINE_S) == 0, (tmp_path / "out").read_text()
        ended = until(cli, "night", in_state("drained", "failed", "aborted", "lost"), "the drain")
        assert ended["state"] == "drained"
        for number in (0, 1):
            bundle = archive.read(place / f"night-7-node{number}.tar.gz")
            assert json.loads(bundle.files["job/status.json"])["state"] == "drained"
            assert f"runs/0/ranks/rank{number}.json" in bundle.files
    finally:
        for node in nodes:
            path = node / "jobs" / "night" / "job.json"
            data = json.loads(path.read_text()) if path.exists() else {"supervisor": None, "attempts": []}
            if data["supervisor"]:
                Process.from_dict(data["supervisor"]).send(signal.SIGKILL)
            for attempt in data["attempts"]:
                for pid in tagged(attempt["tag"]):
                    os.kill(pid, signal.SIGKILL)
        if batch.poll() is None:
            os.killpg(batch.pid, signal.SIGKILL)
        batch.wait(DEADLINE_S)
