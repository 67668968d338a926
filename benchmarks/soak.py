"""A soak test that injects faults into runs and compares the results to undisturbed runs.

    python -m benchmarks.soak --minutes 20      # print a Markdown table of the faults
    python -m benchmarks.soak --memory          # track memory and open files over 2,000 steps

torchrun starts two processes, which train on shards from an S3 server (SeaweedFS). The processes
save their checkpoints on the same server. The cache holds only four shards, so the loader keeps
downloading from the server.

The test runs each recipe in turn and injects faults at random batches. Every type of fault is
injected once before any type is repeated. torchrun restarts lost processes. If torchrun itself
exits too early, the benchmark starts it again with the same command. At the end, the test compares
the weights, the averaged weights and the optimizer state with those of an undisturbed run.

To simulate a full disk, the test fills a small tmpfs. The test needs root to mount the tmpfs. To
simulate a clock that is set back, the test compiles set_back.c, which requires a C compiler.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks import soak_memory
from benchmarks.harness import Table, machine, make_parser, write_json
from benchmarks.soak_run import EVERY, Run, make_config
from tests.support.faulty_store import FAULTS, FaultyStore
from tests.support.resumed_runs import RECIPES, largest_difference
from tests.support.s3_server import BUCKET, S3Server, s3_server

STEPS = 500
# Number of faults that the test injects into each training run.
STRIKES = 4

# Size in MB of the tmpfs that the test fills to simulate a full disk.
DISK = 64
DEATHS = ("SIGKILL of a process", "SIGKILL of the launcher", "SIGKILL of a loader", "SIGTERM")
FULL, BACK, SHARED = "disk full", "clock 10 min back", "another run in the cache"
STORE = tuple(f"store {fault}" for fault in FAULTS)


class World:
    """The environment of the runs: an S3 store behind a proxy, a small disk and a clock.

    Args:
        folder: Folder for the mounted disk, the data and the logs of the runs.
        server: S3 server for the data and the checkpoints.
        stack: Exit stack that receives the cleanup functions of the environment.

    Attributes:
        kinds: Types of faults that can be injected on this machine.
        missing: Messages that explain why the other types cannot be injected.
        environment: Environment variables to set for each run.
    """

    def __init__(self, folder: Path, server: S3Server, stack: ExitStack):
        self.folder, self.server, self.stack = folder, server, stack
        self.store = FaultyStore(server.ports["s3"])
        stack.callback(self.store.close)
        self.kinds = [*DEATHS, *STORE, SHARED]
        self.missing: list[str] = []
        self.disk, self.clock = folder / "disk", folder / "clock"
        self.environment = {"S3_ENDPOINT_URL": self.store.url, "OMP_NUM_THREADS": "1"}
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "none", str(self.disk)]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            stack.callback(subprocess.run, ["umount", "--lazy", str(self.disk)])
            self.kinds.append(FULL)
        else:
            self.missing.append(f"{FULL}: mounting a tmpfs takes root")
        (self.disk / "tmp").mkdir()
        self.environment["TMPDIR"] = str(self.disk / "tmp")
        shim, source = folder / "set_back.so", Path(__file__).with_name("set_back.c")
        self._set_clock(0)
        build = ["cc", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"]
        if shutil.which("cc") and subprocess.run(build).returncode == 0:
            self.environment |= {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(self.clock)}
            self.kinds.append(BACK)
        else:
            self.missing.append(f"{BACK}: there is no C compiler, cc")
        self._make_data()

    def _make_data(self) -> None:
        from convert_ade20k import main as convert
        from extras.preparation.synthetic import make

        make(str(self.folder / "images"), training=240, validation=16, size=64)
        self.data = f"s3://{BUCKET}/shards"
        arguments = ["--path", str(self.folder / "images"), "--out", self.data]
        if convert([*arguments, "--size-limit", "40kb"]):
            raise RuntimeError("convert_ade20k.py could not write the shards; see its error above")

    def _set_clock(self, seconds: int) -> None:
        """Set the number of seconds by which the clock of the runs is shifted."""
        with open(self.clock, "r+b" if self.clock.exists() else "wb") as file:
            # Overwrite the file in place, because training processes have mapped it into memory.
            file.write(struct.pack("=q", seconds))

    def run(self, name: str, recipe: str, ranks: int | None = 2, steps: int = STEPS) -> Run:
        """Start a training run with the given recipe."""
        config = make_config(self.data, str(self.disk), recipe, name, steps)
        run = Run(self.folder / name, config, self.environment, ranks)
        self.stack.callback(run.end)
        return run

    def checkpoint(self, name: str) -> str:
        """Download a run's newest checkpoint, and return the folder that contains it."""
        client = self.server.client
        pointer = client.get_object(Bucket=BUCKET, Key=f"runs/{name}/latest-rank0.pt.symlink")
        key = pointer["Body"].read().decode()
        client.download_file(BUCKET, key, str(self.folder / name / "latest-rank0.pt"))
        return str(self.folder / name)

    @contextmanager
    def fault(self, kind: str) -> Iterator[None]:
        """Inject a store, disk or clock fault for the duration of a `with` block."""
        with ExitStack() as recovery:
            if kind in STORE:
                recovery.enter_context(self.store.having(kind.removeprefix("store ")))
            elif kind == FULL:
                ballast = self.disk / "ballast"
                recovery.callback(ballast.unlink)
                with suppress(OSError), open(ballast, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            else:
                recovery.callback(self._set_clock, 0)
                self._set_clock(-600)
            yield


def kill(kind: str, run: Run, rng: random.Random) -> bool:
    """Send a signal to one process of a run, and wait until the current attempt has ended.

    Returns:
        True if the signal ended the attempt, False if the run finished first.
    """
    before = len(run.endings)
    run.until(lambda: len(run.processes()[1]) > 1)
    if run.is_done:
        return False
    ranks, loaders = run.processes()
    # Send SIGTERM to the launcher, as cluster schedulers do.
    victims = (rng.choice(ranks), run.launcher, rng.choice(loaders), run.launcher)
    process = victims[DEATHS.index(kind)]
    process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
    return run.until(lambda: len(run.endings) > before)


def share(world: World, run: Run, name: str) -> bool:
    """Start a second run that shares the cache, and kill it after 50 batches.

    Returns:
        True if the second run reached 50 batches, False if the first run finished before that.

    Raises:
        RuntimeError: The second run exited before it was killed.
    """
    other = world.run(name, "baseline", ranks=None)
    try:
        met = run.until(lambda: other.batch() > 50 or other.process.poll() is not None)
        if met and other.process.poll() is not None:
            raise RuntimeError(
                f"the second run exited with status {other.process.poll()} before it was killed"
            )
        return met
    finally:
        other.end()


def strike(world: World, run: Run, kind: str, rng: random.Random, other: str) -> tuple | None:
    """Inject a fault into a run.

    Args:
        world: Environment of the run.
        run: Run that the fault is injected into.
        kind: Type of fault, from `World.kinds`.
        rng: Random number generator that chooses the process to kill or the fault's duration.
        other: Name for the second run, which is only started for the shared-cache fault.

    Returns:
        Cells of a table row, or None if the run ended before the fault took effect.
    """
    began, batch, ended = time.monotonic(), run.newest, len(run.endings)
    run.watch()
    if kind in DEATHS:
        met = kill(kind, run, rng)
    elif kind == SHARED:
        met = share(world, run, other)
    else:
        longest = 40 if kind in STORE[:2] else 15
        with world.fault(kind):
            run.wait(rng.uniform(5, longest))
        met = True
    lasted, reached = time.monotonic() - began, run.newest
    run.reach(reached + 1)
    if not met:
        return None
    endings = "; ".join(run.endings[ended:]) or "continued"
    return batch, kind, f"{lasted:.0f} s", endings, f"{run.gap:.0f} s"


class Soak:
    """A test that injects faults into a series of runs and prints a table of the faults.

    Args:
        world: Environment of the runs.
        rng: Random number generator that chooses the faults and their times.
    """

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng
        # Types of faults that are still to be injected, in random order.
        self.deck: list[str] = []
        self.worst = 0.0

    def __call__(self, minutes: float) -> float:
        """Inject faults for the given number of minutes; return the largest tensor difference."""
        references = {recipe: self.undisturbed(recipe) for recipe in RECIPES}
        self.table = Table("time", "recipe", "batch", "fault", "duration", "outcome", "longest gap")
        self.began = time.monotonic()
        for number, recipe in enumerate(itertools.cycle(RECIPES)):
            if time.monotonic() - self.began > 60 * minutes:
                return self.worst
            self.struck(f"{recipe}-{number}", recipe, references[recipe])
        return self.worst

    def undisturbed(self, recipe: str) -> str:
        """Train without faults, and return the folder that contains the last checkpoint."""
        run = self.world.run(recipe, recipe)
        run.finish()
        if run.endings:
            raise RuntimeError(f"a run failed, although no faults were injected: {run.endings}")
        return self.world.checkpoint(recipe)

    def struck(self, name: str, recipe: str, reference: str) -> None:
        """Inject faults at random batches of a run, and compare its result with the reference."""
        run, hand = self.world.run(name, recipe), self.deal()
        for batch in sorted(self.rng.sample(range(20, STEPS // 2), STRIKES)):
            if not run.reach(batch):
                break
            at = time.monotonic()
            cells = strike(self.world, run, hand[0], self.rng, f"{name}-other")
            if cells:
                del hand[0]
                self.print(at, recipe, *cells)
        self.deck += hand
        run.finish()
        difference = largest_difference(self.world.checkpoint(name), reference)
        self.worst = max(self.worst, difference)
        left = f"; LEFT OVER: {found}" if (found := run.left_over()) else ""
        end = f"{run.attempt} attempts; difference {difference}{left}"
        self.print(time.monotonic(), recipe, run.newest, "the end", "", end, "")

    def deal(self) -> list[str]:
        """Choose a run's faults at random, but put the slowest, the shared-cache fault, first."""
        while len(self.deck) < STRIKES:
            self.deck = [*self.rng.sample(self.world.kinds, len(self.world.kinds)), *self.deck]
        hand = [self.deck.pop() for _ in range(STRIKES)]
        return sorted(hand, key=lambda kind: kind != SHARED)

    def print(self, at: float, recipe: str, *cells: object) -> None:
        """Print a table row that starts with the elapsed time and the recipe."""
        minutes, seconds = divmod(round(at - self.began), 60)
        self.table.add(f"{minutes}:{seconds:02}", recipe, *cells)


def memory(world: World, arguments: argparse.Namespace) -> int:
    """Print and plot the memory use and open files of an undisturbed run; return 1 if they grow."""
    run = world.run("undisturbed", "hot", steps=soak_memory.STEPS + EVERY)
    samples = soak_memory.follow(run)
    text, growth = soak_memory.table(samples)
    print(text)
    soak_memory.draw(samples, world.folder / "memory.png")
    write_json(arguments, {"samples": samples, "machine": machine()})
    return int(growth > soak_memory.TOLERANCE or bool(run.endings))


def main(argv: list[str] | None = None) -> int:
    """Print the table of faults; return 1 if a run differs from its reference."""
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="minutes of faults (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (0)")
    parser.add_argument("--memory", action="store_true", help="track memory without faults")
    parser.add_argument("--keep", help="new folder for the logs and the figure; default: temporary")
    arguments = parser.parse_args(argv)
    if arguments.keep and os.path.exists(arguments.keep):
        parser.error(f"--keep {arguments.keep}: this folder already exists; choose a new one")
    # On SIGTERM, shut down Python normally, so that the exit stack stops all runs and unmounts the
    # disk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        folder = arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
        os.makedirs(folder, exist_ok=True)
        world = World(Path(folder).resolve(), stack.enter_context(s3_server()), stack)
        if arguments.memory:
            return memory(world, arguments)
        for missing in world.missing:
            print(f"left out: {missing}")
        soak = Soak(world, random.Random(arguments.seed))
        worst = soak(arguments.minutes)
        write_json(arguments, soak.table.result())
        return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
