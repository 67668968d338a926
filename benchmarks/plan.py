"""Compare the time, memory and checkpoint size that `main.py --plan` predicts with an actual run.

    python -m benchmarks.plan                        # runs the demo, a few minutes on a CPU
    python -m benchmarks.plan yamls/camvid.yaml max_duration=2ep

The plan and the actual run use separate processes. The benchmark compares the peak memory on the
GPU or, without a GPU, the peak resident memory of the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Table, make_parser, write_json
from checkpointing.stores import LATEST

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "yamls/demo.yaml"
# A program that runs main.py and writes the peak memory, in bytes, to a file.
PROGRAM = """
import resource
import sys
import torch
import main
status = main.run(sys.argv[2:])
if torch.cuda.is_available():
    from extras.planning.measure import peak_memory
    most = peak_memory()
else:
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open(sys.argv[1], "w").write(str(most))
sys.exit(status)
"""


def measure(config: str, overrides: list[str], saved: Path) -> dict[str, tuple[float, float]]:
    """Return the planned and measured values: seconds, GiB of memory and MB per checkpoint.

    Args:
        config: Path of the YAML file.
        overrides: Config keys to change, as key=value.
        saved: Folder in which the run saves its checkpoints.
    """
    command = [sys.executable, "main.py", config, *overrides]
    done = subprocess.run([*command, "--plan", "--json"], cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    plan = json.loads(done.stdout)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "memory")
        began = time.perf_counter()
        arguments = [sys.executable, "-c", PROGRAM, str(told), config, *overrides]
        subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        taken = time.perf_counter() - began
        memory = float(told.read_text())
    size = (saved / LATEST).stat().st_size
    return {
        "duration, s": (3600 * plan["hours"], taken),
        "memory, GiB": (plan["memory"]["step"] / 2**30, memory / 2**30),
        "checkpoint, MB": (plan["checkpoint"]["bytes"] / 1e6, size / 1e6),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the measurements that the command line selects, and print them as a table."""
    parser = make_parser(__doc__)
    parser.add_argument("config", nargs="?", default=str(DEMO), help="config (default: demo)")
    parser.add_argument("overrides", nargs="*", help="config keys to change, as key=value")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        overrides = list(args.overrides)
        if args.config == str(DEMO):
            from extras.preparation.synthetic import make

            make(f"{folder}/data")
            overrides += [f"{name}_dataset.path={folder}/data" for name in ("train", "eval")]
        saved = Path(folder, "checkpoints")
        found = measure(args.config, [*overrides, f"save_folder={saved}"], saved)
    table = Table("", "planned", "measured", "planned / measured")
    for name, (planned, taken) in found.items():
        table.add(name, *(f"{value:.2f}" for value in (planned, taken, planned / taken)))
    write_json(args, table.result())


if __name__ == "__main__":
    main()
