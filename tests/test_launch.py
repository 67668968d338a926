"""The files for schedulers: what they run is what test_several_processes.py's two nodes run."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
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
    (tmp_path / "bin/python").symlink_to(sys.executable)
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
        # Which begins again after a status of 128 or more, and so not after a wrong config.
        assert replica["restartPolicy"] == "ExitCode"
        pod: dict[str, Any] = replica["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 60
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # which the operator looks for
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    environment = KUBEFLOW | {entry["name"]: entry["value"] for entry in container["env"]}
    command = container["command"] + container["args"]
    for ended, expected in (("75", 143), ("2", 2), ("1", 1)):
        assert call(command, stubs, **environment, STATUS=ended)[1] == expected
    lines, status = call(command, stubs, **environment)
    assert lines == [
        "n1:23456 composer --nproc 8 --world_size 16 --node_rank 1 main.py yamls/deeplabv3.yaml "
        "autoresume=true run_name=deeplabv3 save_folder=s3://my-bucket/runs/{run_name}"
    ]
    assert status == 0


def test_skypilot(stubs: dict[str, str]) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "setup", "run"}
    # And not after errors, of which a person has to mend the cause.
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    lines, status = call(["bash", "-c", task["run"]], stubs, **SKYPILOT)
    assert lines == [
        "n1:7501 composer --world_size 16 --node_rank 1 main.py yamls/deeplabv3.yaml "
        "autoresume=true run_name=deeplabv3 save_folder=s3://my-bucket/runs/{run_name}"
    ]
    assert status == 0


TRAINING = """
import os, pathlib, signal, sys, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
parent = os.getppid()
pathlib.Path(os.environ["RUN_START_FILE"]).write_text("0 1")
with open("launchers", "a") as file:
    file.write(f"{parent} ")
pathlib.Path("began").touch()
while not told and os.getppid() == parent:
    time.sleep(0.05)
time.sleep(0.5)
pathlib.Path("saved").touch()
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
    assert (tmp_path / "saved").exists()
    assert len((tmp_path / "launchers").read_text().split()) == 1  # the scheduler begins it anew


@pytest.mark.parametrize("how", ["ctrl-c", "close", signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_no_training_is_left_behind(
    stubs: dict[str, str], tmp_path: Path, how: str | signal.Signals
) -> None:
    """A terminal's Ctrl-C and its end reach the launcher alone: composer is in the background."""
    (tmp_path / "training.py").write_text(TRAINING)
    composer = tmp_path / "bin/composer"
    composer.write_text(f"#!/usr/bin/env bash\n{sys.executable} training.py; exit $?\n")
    terminal, launchers = os.openpty()
    process = subprocess.Popen(
        [LAUNCH / "run.sh"],
        env=stubs,
        cwd=tmp_path,
        stdin=launchers,
        stdout=launchers,
        stderr=launchers,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(launchers)
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    if isinstance(how, signal.Signals):
        process.send_signal(how)
    elif how == "ctrl-c":
        os.write(terminal, b"\x03")
    else:
        os.close(terminal)
    assert process.wait(30) == 75
    assert (tmp_path / "saved").exists()
    (parent,) = (tmp_path / "launchers").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(parent), 0)
    if how != "close":
        os.close(terminal)


def test_a_second_ctrl_c_kills(stubs: dict[str, str], tmp_path: Path) -> None:
    """Of training that does not listen, for it is still loading."""
    composer = tmp_path / "bin/composer"
    composer.write_text(
        "#!/usr/bin/env bash\necho $$ > began.part && mv began.part began\nsleep 60\n"
    )
    process = subprocess.Popen([LAUNCH / "run.sh"], env=stubs, cwd=tmp_path)
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 75
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "began").read_text()), 0)


def test_a_killed_launcher_is_begun_again_when_training_has_saved(
    stubs: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "training.py").write_text(TRAINING)
    composer = tmp_path / "bin/composer"
    end = "[ -e saved ] && exit 0"
    composer.write_text(
        f"#!/usr/bin/env bash\n[ -e began ] && {{ {end}; exit 3; }}\n"
        f"{sys.executable} training.py; exit $?\n"
    )
    process = subprocess.Popen([LAUNCH / "run.sh"], env=stubs, cwd=tmp_path)
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    os.kill(int((tmp_path / "launchers").read_text()), signal.SIGKILL)
    assert process.wait(30) == 0


# Composer's end, try by try: its status, and what main.py writes if it began.
TRIES = """#!/usr/bin/env bash
read -r status start < plan
sed -i 1d plan
if [ "$start" ]; then echo "$start" > "$RUN_START_FILE"; fi
echo "$*"
if [ "$status" = KILL ]; then kill -KILL $$; fi
exit "$status"
"""


def run_tries(
    stubs: dict[str, str], *tries: str, **environment: str
) -> tuple[list[str], list[str], int]:
    """What run.sh's tries print, what it says about each, and its status."""
    folder = Path(stubs["HOME"])
    (folder / "bin/composer").write_text(TRIES)
    (folder / "plan").write_text("\n".join(tries))
    done = subprocess.run(
        ["launch/run.sh", "main.py", "autoresume=true"],
        env={**stubs, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (folder / "plan").read_text().split() == []
    said = [line for line in done.stderr.splitlines() if line.startswith("run.sh: ")]
    return done.stdout.splitlines(), said, done.returncode


def test_what_was_lost_or_killed_is_begun_again(stubs: dict[str, str]) -> None:
    # Composer's status for a rank that SIGKILL ended is -9, so 247; its own death is 137.
    output, said, status = run_tries(stubs, "75 0", "247 10", "KILL 20", "0 30")
    assert status == 0
    assert output == ["main.py autoresume=true"] * 4
    again = "retry 1 of 3 without a newer checkpoint"
    assert said == [
        f"run.sh: exit status 75, begun at batch 0; again, {again}",
        f"run.sh: exit status 247 (SIGKILL), begun at batch 10; again, {again}",
        f"run.sh: exit status 137 (SIGKILL), begun at batch 20; again, {again}",
    ]


@pytest.mark.parametrize("status", [1, 2])
def test_what_a_person_has_to_mend_is_not_begun_again(stubs: dict[str, str], status: int) -> None:
    assert run_tries(stubs, f"{status} 0")[1:] == ([], status)


def test_retries_end_without_a_newer_checkpoint(stubs: dict[str, str]) -> None:
    # Those that came to batch 10 do not count the one before; one that did not begin does.
    tries = ["75 0", "75 10", "137 10", "137"]
    _, said, status = run_tries(stubs, *tries, RUN_RETRIES="2")
    assert status == 1
    assert [line.partition("; ")[2] for line in said] == [
        "again, retry 1 of 2 without a newer checkpoint",
        "again, retry 1 of 2 without a newer checkpoint",
        "again, retry 2 of 2 without a newer checkpoint",
        "given up after 2 retries without a newer checkpoint",
    ]
    assert run_tries(stubs, "75 0", RUN_RETRIES="0")[2] == 1


@pytest.fixture
def port() -> int:
    """One where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_nodes_come_together_before_they_begin_again(stubs: dict[str, str], port: int) -> None:
    def node(number: int) -> tuple[list[str], list[str], int]:
        home = Path(stubs["HOME"], str(number))
        shutil.copytree(Path(stubs["HOME"], "bin"), home / "bin")
        (home / "launch").symlink_to(LAUNCH)
        time.sleep(number)  # in this order
        own = {
            **stubs,
            "HOME": str(home),
            "PATH": stubs["PATH"].replace("/bin:", f"/{number}/bin:", 1),
        }
        return run_tries(own, f"75 8 3 {number} 127.0.0.1 {port}", "0 8")

    with ThreadPoolExecutor(3) as threads:
        ends = list(threads.map(node, (0, 1, 2)))
    again = (
        "run.sh: exit status 75, begun at batch 8; again, retry 1 of 3 without a newer checkpoint"
    )
    assert ends == [(["main.py autoresume=true"] * 2, [again], 0)] * 3


def test_nodes_that_do_not_come_together_are_left_to_the_scheduler(
    stubs: dict[str, str], port: int
) -> None:
    for number, amiss in (
        (0, "node 1, 2 did not call"),
        (1, f"node 0 at 127.0.0.1:{port}: [Errno 111] Connection refused"),
    ):
        said, status = run_tries(stubs, f"75 8 3 {number} 127.0.0.1 {port}", RUN_REJOIN="1")[1:]
        assert said[1:] == [f"run.sh: the nodes are not together within 1 s: {amiss}"]
        assert status == 75
    with socket.create_server(("", port)):
        said, status = run_tries(stubs, f"75 8 3 0 127.0.0.1 {port}", RUN_REJOIN="1")[1:]
    assert f"within 1 s: port {port}: [Errno 98]" in said[1] and status == 75
    # Nor did these, at first.
    assert run_tries(stubs, "75")[1:] == ([], 75)


def test_node_0_is_not_deceived_by_strangers(port: int) -> None:
    spec = importlib.util.spec_from_file_location("together", LAUNCH / "together.py")
    assert spec and spec.loader
    together = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(together)
    with ThreadPoolExecutor(1) as threads:
        gathered = threads.submit(together.gather, 2, port, time.monotonic() + 20)
        for text in (b"", b"GET / HTTP/1.1", b"0", b"2", b"1"):
            while True:
                try:
                    peer = socket.create_connection(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            peer.sendall(text)
            peer.shutdown(socket.SHUT_WR)
            if text == b"1":
                assert gathered.result(20) is None
                assert peer.recv(10) == b"go"
            peer.close()
    # One that takes the connection but does not say to go is not node 0.
    with socket.create_server(("127.0.0.1", port)):
        assert together.call(1, "127.0.0.1", port, time.monotonic() + 1)
