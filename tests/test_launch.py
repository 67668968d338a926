"""The files for schedulers: what they run is what test_several_processes.py's two nodes run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("run.sh", "slurm.sbatch")
# What each scheduler sets on the second of two nodes with eight GPUs each.
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
SLURM |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "4321"}
KUBEFLOW = {"MASTER_ADDR": "n1", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "n1\nn2", "SKYPILOT_NODE_RANK": "1"}
SKYPILOT |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
STUBS = {
    "composer": 'echo "$MASTER_ADDR:$MASTER_PORT composer $*"; exit ${STATUS:-0}',
    "srun": 'echo "srun $1"; shift; exec "$@"',
    "scontrol": '[ "$1 $2" = "show hostnames" ] && printf "n1\\nn2\\n" || echo "scontrol $*"',
}


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment whose composer and Slurm only say how they are called."""
    (tmp_path / "bin").mkdir()
    for name, script in STUBS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    # So that the scripts find what they activate, and run.sh.
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    (tmp_path / "launch").symlink_to(LAUNCH)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}


def call(command: list[str], stubs: dict[str, str], **environment: str) -> tuple[list[str], int]:
    """The lines that a command prints, and its status."""
    done = subprocess.run(
        command, env={**stubs, **environment}, cwd=stubs["HOME"], capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines(), done.returncode


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name: str) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "make install WITH=dev"
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    done = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm(stubs: dict[str, str]) -> None:
    command = ["bash", "launch/slurm.sbatch", "yamls/deeplabv3.yaml", "run_name=a b"]
    lines, status = call(command, stubs, **SLURM)
    assert lines == [
        "srun --wait=60",
        "n1:14321 composer --world_size 16 --node_rank 1 main.py yamls/deeplabv3.yaml "
        "run_name=a b autoresume=true",
    ]
    assert status == 0
    lines, status = call(command, stubs, **SLURM, STATUS="75")
    assert (lines[2:], status) == (["scontrol requeue 4321"], 75)
    lines, status = call(command, stubs, **SLURM, STATUS="1")
    assert (lines[2:], status) == ([], 1)


def test_slurm_options_leave_time_for_a_checkpoint() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH ")
    )
    assert options["signal"] == "TERM@120"  # to the processes of the job's steps, with no B:
    assert options["nodes"] == "2"
    assert options["ntasks-per-node"] == "1"  # composer starts one process a GPU
    assert "requeue" in options
    assert options["open-mode"] == "append"


def test_kubernetes(stubs: dict[str, str]) -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"]
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] == "OnFailure"
        pod: dict[str, Any] = replica["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 60
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # which the operator looks for
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    lines, status = call(container["command"] + container["args"], stubs, **KUBEFLOW)
    assert lines == [
        "n1:23456 composer --nproc 8 --world_size 16 --node_rank 1 main.py yamls/deeplabv3.yaml "
        "autoresume=true run_name=deeplabv3 save_folder=s3://my-bucket/runs/{run_name}"
    ]
    assert status == 0


def test_skypilot(stubs: dict[str, str]) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "setup", "run"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    lines, status = call(["bash", "-c", task["run"]], stubs, **SKYPILOT)
    assert lines == [
        "n1:7501 composer --world_size 16 --node_rank 1 main.py yamls/deeplabv3.yaml "
        "autoresume=true run_name=deeplabv3 save_folder=s3://my-bucket/runs/{run_name}"
    ]
    assert status == 0


TRAINING = """
import pathlib, signal, sys, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
pathlib.Path("began").touch()
while not told:
    time.sleep(0.05)
time.sleep(0.5)
sys.exit(75)
"""


def test_the_launcher_waits_while_training_saves(stubs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(TRAINING)
    composer = tmp_path / "bin/composer"
    composer.write_text(f"#!/usr/bin/env bash\n{sys.executable} training.py; exit $?\n")
    process = subprocess.Popen([LAUNCH / "run.sh"], env=stubs, cwd=tmp_path)
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
