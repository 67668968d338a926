"""A test that cuts the link between two nodes and compares the run with an undisturbed run.

    python -m benchmarks.cut_link                # needs root and takes 10 minutes

The test cuts the link for 10 s, for 30 s and permanently. Two network namespaces, connected by a
virtual cable, act as the nodes. Each node runs torchrun with one process. The process trains
DeepLabV3+ with a four-block ResNet on generated 32-pixel images, on the CPU with gloo. After the
first checkpoint, all packets on the cable are lost, and neither node is notified.

If the link is restored, the run must end with the same weights, averaged weights and optimizer
state as the undisturbed run. Each training step must also use the same samples as in the
undisturbed run. The test cuts the link permanently twice, with different settings. With
`--nnodes=2`, both nodes must report the lost connection within 60 s. With `--nnodes=1:2`, the test
also kills the second node. The first node must then continue alone within 90 s, with the same
samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Table, make_parser, write_json
from tests.support.resumed_runs import largest_difference, make_config

ROOT = Path(__file__).resolve().parent.parent
PORT = 7501
# How long torchrun waits for a lost node to return, in seconds.
JOIN = 120
# Interval between torchrun's heartbeats, in seconds. A node that misses three heartbeats is
# considered lost.
HEARTBEAT = 5

# A MAC address that belongs to neither node, so that packets sent to it are lost.
NOBODY = "02:00:00:00:00:09"


class Outcome(NamedTuple):
    """The result of a training run on two nodes.

    Attributes:
        statuses: Exit status of torchrun on each node.
        lost: Seconds from the cut until both nodes have reported each other as lost.
        back: Seconds from the cut until the next checkpoint.
        ended: Seconds from the cut until the processes on both nodes have exited.
        outputs: Combined stdout and stderr of torchrun on each node.
        samples: For each step, the digests of the images used in the last attempt at that step.
    """

    statuses: list[int]
    lost: float | None
    back: float | None
    ended: float
    outputs: list[str]
    samples: dict[int, set[str]]


def ip(*arguments: str) -> None:
    """Run the `ip` command from iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Nodes:
    """Two network namespaces connected by a virtual cable, which act as two machines."""

    def __init__(self) -> None:
        self.names = [f"node-{os.getpid()}-{i}" for i in range(2)]
        self.cables = [f"c{os.getpid()}-{i}" for i in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self) -> Nodes:
        for name in self.names:
            ip("netns", "add", name)
        ends = [("name", self.cables[i], "netns", self.names[i]) for i in range(2)]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            # Kill the training processes that are still running on this node.
            self.kill(self.names.index(name))
            ip("netns", "delete", name)

    def cut(self) -> None:
        """Cut the link by making each node send its packets to an address that does not exist."""
        for i, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            to = (self.addresses[1 - i], "lladdr", NOBODY, "dev", cable)
            ip("-n", name, "neighbor", "replace", *to, "nud", "permanent")

    def mend(self) -> None:
        """Restore the link."""
        for i, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            ip("-n", name, "neighbor", "delete", self.addresses[1 - i], "dev", cable)

    def kill(self, i: int) -> None:
        """Kill all processes on a node."""
        inside = subprocess.run(["ip", "netns", "pids", self.names[i]], capture_output=True)
        for process in inside.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def start(self, i: int, nodes: str, settings: str, output: str) -> subprocess.Popen[bytes]:
        """Start torchrun on a node and write its output to a file."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.cables[i],
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command = ["ip", "netns", "exec", self.names[i]]
        command += [str(Path(sys.executable).with_name("torchrun")), f"--nnodes={nodes}"]
        command += ["--nproc-per-node=1", "--max-restarts=3", f"--local-addr={self.addresses[i]}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.addresses[0]}:{PORT}"]
        command += [f"--rdzv-conf=is_host={1 - i},join_timeout={JOIN},last_call_timeout=5"]
        command[-1] += f",keep_alive_interval={HEARTBEAT}"
        command += ["-m", "benchmarks.cut_link", "--settings", settings]
        with open(output, "wb") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def run(
    folder: str, cut: float | None, config: dict[str, Any], alone: bool = False, **settings: Any
) -> Outcome:
    """Train on two nodes and cut the link after the first checkpoint.

    Args:
        folder: Folder for the checkpoints and outputs of the run.
        cut: Duration of the cut in seconds; 0 for no cut, None for a permanent cut.
        config: Content of the YAML config.
        alone: Whether to kill the second node when the link is cut, so that the first node must
            continue alone.
        **settings: New values for the constants INTERVAL and ATTEMPTS in training/watch.py.
    """
    os.makedirs(folder)
    config = {**config, "save_folder": f"{folder}/saved", "autoresume": True}
    Path(f"{folder}/settings").write_text(json.dumps({"config": config, "watch": settings}))
    outputs = [f"{folder}/{i}.out" for i in range(2)]
    back = lost = None
    with Nodes() as nodes:
        number = "1:2" if alone else "2"
        processes = [nodes.start(i, number, f"{folder}/settings", outputs[i]) for i in range(2)]

        def ended() -> bool:
            # After a permanent cut, wait only for the first node. The second node's torchrun cannot
            # reach the rendezvous server, so it exits only after the TCP timeout of 15 minutes.
            first = processes[:1] if cut is None else processes
            return all(process.poll() is not None for process in first)

        wait_for(lambda: ended() or _checkpoints(folder))
        start, before = time.monotonic(), _checkpoints(folder)
        if cut != 0:
            nodes.cut()
            if alone:
                nodes.kill(1)
            time.sleep(1)  # Give the nodes time to finish writing a checkpoint.
            before = _checkpoints(folder)
        if cut:
            time.sleep(cut - 1)
            nodes.mend()
        elif cut is None:
            left = [Path(output) for output in outputs[: 2 - alone]]
            wait_for(lambda: ended() or all("error: " in path.read_text() for path in left))
            lost = time.monotonic() - start
        wait_for(lambda: ended() or _checkpoints(folder) - before)
        if _checkpoints(folder) - before:
            back = time.monotonic() - start
        wait_for(ended)
        seconds = time.monotonic() - start
    texts = [Path(output).read_text() for output in outputs]
    statuses = [process.wait() for process in processes]
    return Outcome(statuses, lost, back, seconds, texts, samples(folder))


def wait_for(reached: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until the condition `reached` is true.

    Raises:
        RuntimeError: The condition is still false after the given number of seconds.
    """
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise RuntimeError(
                f"the training runs did not reach the expected state within {seconds:.0f} s"
            )
        time.sleep(0.1)


def _checkpoints(folder: str) -> set[str]:
    return {path.name for path in Path(folder, "saved").glob("ep*-rank0.pt")}


def samples(folder: str) -> dict[int, set[str]]:
    """Return the digests of each step's images, taken from the last attempt at the step."""
    attempts: dict[int, dict[int, set[str]]] = {}
    for line in Path(folder, "samples").read_text().splitlines():
        step, attempt, *digests = line.split()
        attempts.setdefault(int(step), {}).setdefault(int(attempt), set()).update(digests)
    return {step: found[max(found)] for step, found in attempts.items()}


def recorder(path: Path) -> Any:
    """Return a callback that logs each step's number, attempt and image digests to a file."""
    from composer.core import Callback

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    class Recorder(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            images = [image.numpy().tobytes() for image in state.batch[0]]
            digests = [hashlib.sha1(image).hexdigest() for image in images]
            with open(path, "a") as file:
                print(state.timestamp.batch.value, attempt, *digests, file=file)

        def batch_end(self, state: Any, logger: Any) -> None:
            time.sleep(0.2)  # Slow down the run, so that the link is cut before the run ends.

    return Recorder()


def node(settings: str) -> int:
    """Train on one node with the settings file written by `run`."""
    from command_lines import start
    from main import run as run_main
    from tests.support.forked import shrink
    from training import watch

    start()
    shrink()
    said = json.loads(Path(settings).read_text())
    for name, value in said["watch"].items():
        setattr(watch, name, value)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(said["config"], file)  # JSON is valid YAML.
        file.flush()
        return run_main([file.name], callbacks=[recorder(Path(settings).with_name("samples"))])


@contextmanager
def made_config() -> Iterator[tuple[str, dict[str, Any]]]:
    """Generate images in a temporary folder; yield the folder and the config of a 40-step run."""
    from extras.preparation.synthetic import make

    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/folders", training=16, validation=4, size=48)
        config = make_config(folder, "mild", "folders", workers=0)
        config["mild"]["max_duration"] = "40ba"
        config |= {
            "save_interval": "4ba",
            "save_num_checkpoints_to_keep": -1,
            "eval_interval": "20ba",
        }
        yield folder, config


def main() -> int:
    """Print the result table, and return 1 if a run failed a test."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", nargs="*", type=float, default=[10, 30], help="cuts (10 30)")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.settings:
        return node(arguments.settings)
    columns = "link cut for", "statuses", "lost after", "back after", "ended", "difference"
    table = Table(*columns, "samples")
    failed = False
    with made_config() as (folder, config):
        undisturbed = run(f"{folder}/0", 0, config)
        assert undisturbed.statuses == [0, 0], undisturbed.outputs
        cuts = [(cut, False) for cut in [*arguments.seconds, None]]
        for number, (cut, alone) in enumerate([*cuts, (None, True)], 1):
            outcome = run(f"{folder}/{number}", cut, config, alone)
            difference, same = None, outcome.samples == undisturbed.samples
            if cut:
                difference = largest_difference(f"{folder}/{number}/saved", f"{folder}/0/saved")
            if cut or alone:
                failed |= not same or bool(difference)
                failed |= outcome.back is None or outcome.back > (90 if alone else 200)
            else:
                failed |= outcome.lost is None or outcome.lost > 60
            name = f"{cut:g} s" if cut else "for good, one killed" if alone else "for good"
            times = [f"{t:.1f} s" if t else "" for t in outcome[1:4]]
            table.add(name, outcome.statuses, *times, difference, "same" if same else "other")
    write_json(arguments, table.result())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
