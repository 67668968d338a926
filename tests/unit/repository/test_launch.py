"""Tests of launch/: schedulers start torchrun with the options that test_cut_link.py tests."""

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
from torch.distributed.run import get_args_parser

from tests.support.paths import ROOT

LAUNCH = ROOT / "launch"
# The variables that each scheduler sets on the second of two nodes with eight GPUs each.
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "4321"}
SLURM |= {"SLURM_GPUS_ON_NODE": "8"}
KUBEFLOW = {"MASTER_ADDR": "n1", "MASTER_PORT": "14321", "WORLD_SIZE": "2", "RANK": "1"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "n1\nn2", "SKYPILOT_NODE_RANK": "1"}
SKYPILOT |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
TORCHRUN = """
printf "%s\\n" "$@" > arguments
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" > settings
trap 'touch saved; exit 1' TERM
touch began
if [ "$FOREVER" ]; then while true; do sleep 0.1; done; fi
exit "${STATUS:-0}"
"""
STUBS = {
    "torchrun": TORCHRUN,
    "srun": 'echo $$ > step; shift; exec "$@"',
    "scancel": 'echo "scancel $*"; kill -TERM "$(cat step)"',
    "scontrol": '[ "$1 $2" = "show hostnames" ] && printf "n1\\nn2\\n" || echo "scontrol $*"',
}


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which torchrun and Slurm only record their arguments."""
    (tmp_path / "bin").mkdir()
    for name, script in STUBS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)  # skypilot.yaml activates this environment
    (tmp_path / ".venv/bin/activate").write_text("")
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}


def call(command: list[str], stubs: dict[str, str], **environment: str) -> tuple[list[str], int]:
    """Return the lines that a command prints, and its exit status."""
    completed = subprocess.run(
        command, env={**stubs, **environment}, cwd=stubs["HOME"], capture_output=True, text=True
    )
    assert completed.stderr == ""
    return completed.stdout.splitlines(), completed.returncode


def check_torchrun(stubs: dict[str, str], job: str, port: int) -> list[str]:
    """Check torchrun's arguments with its own parser; return the arguments of main.py."""
    folder = Path(stubs["HOME"])
    options = get_args_parser().parse_args((folder / "arguments").read_text().splitlines())
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 10)
    assert (options.rdzv_backend, options.rdzv_id) == ("c10d", job)
    assert options.rdzv_endpoint == f"n1:{port}"
    assert options.training_script == "main.py"
    assert (folder / "settings").read_text() == "110 1\n"
    assert "autoresume=true" in options.training_script_args
    return options.training_script_args


def test_slurm_script_passes_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "make install WITH=dev"
    completed = subprocess.run(
        [shellcheck, LAUNCH / "slurm.sbatch"], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout


def test_slurm_script_starts_torchrun(stubs: dict[str, str]) -> None:
    script = str(LAUNCH / "slurm.sbatch")
    command = ["bash", script, "yamls/deeplabv3.yaml", "run_name=a b"]
    assert call(command, stubs, **SLURM) == ([], 0)
    arguments = check_torchrun(stubs, "4321", 14321)
    assert arguments == ["yamls/deeplabv3.yaml", "run_name=a b", "autoresume=true"]
    # The job fails if torchrun has used up its restarts, or if the config is wrong.
    assert call(command, stubs, **SLURM, STATUS="1") == ([], 1)


def test_slurm_script_saves_a_checkpoint_and_requeues_the_job(stubs: dict[str, str]) -> None:
    folder = Path(stubs["HOME"])
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch"],
        env={**stubs, **SLURM, "FOREVER": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (folder / "began").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert output.splitlines() == ["scancel --signal=TERM 4321", "scontrol requeue 4321"]
    assert (folder / "saved").exists() and process.returncode != 0


def test_slurm_options_leave_time_for_a_checkpoint() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    # The prefix B: sends the signal to the batch script only. torchrun starts the processes.
    for option in ("signal=B:TERM@120", "nodes=2", "ntasks-per-node=1", "requeue"):
        assert f"#SBATCH --{option}" in lines


def test_kubernetes_job_starts_torchrun(stubs: dict[str, str]) -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    assert job["spec"]["runPolicy"] == {"backoffLimit": 3}  # limits retries of a wrong config
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"]
    assert sum(replica["replicas"] for replica in replicas.values()) == 2
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] == "OnFailure"
        pod: dict[str, Any] = replica["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 110  # longer than torchrun's shutdown timeout
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the training operator needs this name
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    environment = KUBEFLOW | {entry["name"]: entry["value"] for entry in container["env"]}
    command = container["command"] + container["args"]
    for name, value in environment.items():  # Kubernetes substitutes variables like this
        command = [argument.replace(f"$({name})", value) for argument in command]
    assert call(command, stubs, **environment) == ([], 0)
    arguments = check_torchrun(stubs, "deeplabv3", 14321)
    assert arguments[0] == "yamls/deeplabv3.yaml"
    assert arguments[-1] == "save_folder=s3://my-bucket/runs/{run_name}"


def test_skypilot_task_starts_torchrun(stubs: dict[str, str]) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
    assert call(["bash", "-c", task["run"]], stubs, **SKYPILOT, **task["envs"]) == ([], 0)
    arguments = check_torchrun(stubs, "deeplabv3", 7501)
    assert arguments[0] == "yamls/deeplabv3.yaml"
    assert arguments[-1] == "save_folder=s3://my-bucket/runs/{run_name}"
