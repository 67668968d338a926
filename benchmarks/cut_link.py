"""Cut the link between two nodes that train together, and see what becomes of the run.

    python -m benchmarks.cut_link                # for 10 s, for 30 s, for good; 6 minutes, as root
    python -m benchmarks.cut_link --seconds 30   # and for good

Two network namespaces with a cable between them stand for the nodes. Each begins `launch/run.sh`
with one process, of DeepLabV3+ with a ResNet of four blocks on generated photos of 32 pixels, on
the CPU with gloo. Once there is a checkpoint, packets go astray on the cable, unnoticed by either
end. Where the run ends, its weights, averages and optimizer's state are compared with those of one
that nothing disturbed.
"""

from __future__ import annotations

import argparse
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

from benchmarks.kill_resume import largest_difference, make_config

ROOT = Path(__file__).resolve().parent.parent
PORT = 7501
NOBODY = "02:00:00:00:00:09"  # an Ethernet address that neither end has


class Outcome(NamedTuple):
    """What became of a run."""

    statuses: list[int]  # of run.sh on each node
    back: float | None  # seconds from the cut to the next checkpoint
    ended: float  # seconds from the cut to the end of both nodes
    outputs: list[str]

    def lines(self, beginning: str) -> list[list[str]]:
        """Return the lines of each node's output that begin so."""
        return [
            [line for line in output.splitlines() if line.startswith(beginning)]
            for output in self.outputs
        ]


def ip(*arguments: str) -> None:
    """Run iproute2's command."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Nodes:
    """Two network namespaces, with a cable between them."""

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
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for process in inside.stdout.split():  # if this ends early
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", name)  # and its end of the cable

    def cut(self) -> None:
        """Have each node send to nobody what it sends to the other."""
        for i, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            to = (self.addresses[1 - i], "lladdr", NOBODY, "dev", cable)
            ip("-n", name, "neighbor", "replace", *to, "nud", "permanent")

    def mend(self) -> None:
        """Have them find each other again."""
        for i, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            ip("-n", name, "neighbor", "delete", self.addresses[1 - i], "dev", cable)

    def start(self, i: int, settings: str, output: str) -> subprocess.Popen[bytes]:
        """Begin a node's run.sh."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.cables[i],
        }
        where = ["--master_addr", self.addresses[0], "--master_port", str(PORT)]
        command = ["ip", "netns", "exec", self.names[i], str(ROOT / "launch/run.sh")]
        command += ["--nproc", "1", "--world_size", "2", "--node_rank", str(i), *where]
        command += ["--module_mode", "benchmarks.cut_link", "--node", settings]
        with open(output, "wb") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def run(folder: str, cut: float | None, config: dict[str, Any], **settings: Any) -> Outcome:
    """Have two nodes train.

    Args:
        folder: Where checkpoints and outputs go.
        cut: Seconds for which the link is cut; 0 not at all, None for good.
        config: What the YAML says.
        **settings: Of training/watch.py: INTERVAL and ATTEMPTS, if not its own.
    """
    os.makedirs(folder)
    config = {**config, "save_folder": f"{folder}/saved", "autoresume": True}
    Path(f"{folder}/settings").write_text(json.dumps({"config": config, "watch": settings}))
    outputs = [f"{folder}/{i}.out" for i in range(2)]
    back = None
    with Nodes() as nodes:
        processes = [nodes.start(i, f"{folder}/settings", outputs[i]) for i in range(2)]

        def ended() -> bool:
            return all(process.poll() is not None for process in processes)

        wait_for(lambda: ended() or _checkpoints(folder))
        start, before = time.monotonic(), _checkpoints(folder)
        if cut != 0:
            nodes.cut()
            time.sleep(1)  # for a checkpoint that is being written
            before = _checkpoints(folder)
        if cut:
            time.sleep(cut - 1)
            nodes.mend()
        wait_for(lambda: ended() or _checkpoints(folder) - before)
        if _checkpoints(folder) - before:
            back = time.monotonic() - start
        wait_for(ended)
        seconds = time.monotonic() - start
    texts = [Path(output).read_text() for output in outputs]
    return Outcome([process.returncode for process in processes], back, seconds, texts)


def wait_for(reached: Callable[[], Any], seconds: float = 300) -> None:
    """Return when something is reached; a RuntimeError when it is not in time."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise RuntimeError(f"not reached within {seconds:.0f} s")
        time.sleep(0.1)


def _checkpoints(folder: str) -> set[str]:
    return {path.name for path in Path(folder, "saved").glob("ep*-rank0.pt")}


def node(settings: str) -> int:
    """Train on a node, as `run` says."""
    from composer.core import Callback

    from benchmarks.forked import shrink
    from main import run as run_main
    from training import watch

    class Pace(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            time.sleep(0.2)

    shrink()
    said = json.loads(Path(settings).read_text())
    for name, value in said["watch"].items():
        setattr(watch, name, value)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(said["config"], file)  # which is YAML
        file.flush()
        return run_main([file.name], callbacks=[Pace()])


@contextmanager
def made_config() -> Iterator[tuple[str, dict[str, Any]]]:
    """Make a folder, and the config of a run of 40 steps on photos in it."""
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
    """Print the table; 1 if a run neither came back the same nor ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", nargs="*", type=float, default=[10, 30], help="(10 30)")
    parser.add_argument("--node", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node:
        return node(arguments.node)
    print("| link cut for | statuses | retries | back after | ended after | difference |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = False
    with made_config() as (folder, config):
        undisturbed = run(f"{folder}/0", 0, config)
        assert undisturbed.statuses == [0, 0], undisturbed.outputs
        for cut in [*arguments.seconds, None]:
            outcome = run(f"{folder}/{cut}", cut, config)
            difference = None
            if cut:
                difference = largest_difference(f"{folder}/{cut}/saved", f"{folder}/0/saved")
            failed |= outcome.ended > 60 if cut is None else difference != 0
            retries = [
                sum("; again" in line for line in lines) for lines in outcome.lines("run.sh")
            ]
            row = [f"{cut:g} s" if cut else "good", outcome.statuses, retries]
            row += [
                f"{outcome.back:.1f} s" if outcome.back else "",
                f"{outcome.ended:.1f} s",
                difference,
            ]
            print("|", " | ".join(map(str, row)), "|", flush=True)
            for i, lines in enumerate(
                zip(*map(outcome.lines, ("error: ", "run.sh: ")), strict=True)
            ):
                print("", *(f"node {i}: {line}" for line in lines[0] + lines[1]), sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
