"""Compare training results between the working tree and a commit, bit by bit.

    python -m benchmarks.numbers HEAD~1        # takes 4 minutes on 2 cores

Each recipe trains ResNet-50 for ten steps on generated images of 64 pixels, in fp32, on one thread
and with the same seed. The benchmark trains once with main.py from the working tree and once with
main.py from the commit. Then each version's evaluate.py scores that version's checkpoint with both
protocols. If a code change should not affect the results, then the losses, the checkpoint's
tensors and the scores must be identical.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Table, make_parser, write_json
from extras.preparation.synthetic import make
from tests.support import resumed_runs
from tests.support.resumed_runs import RECIPES, tensors

ROOT = Path(__file__).resolve().parent.parent
PROTOCOLS = ("paper", "square")


class Numbers(NamedTuple):
    """The results of a training run.

    Attributes:
        losses: fp32 loss of each training step.
        state: Digest of all tensors in the checkpoint.
        scores: mIoU in percent for each evaluation protocol.
    """

    losses: list[float]
    state: str
    scores: list[float]


def unpack(commit: str, folder: str | Path) -> None:
    """Extract the files of a commit into a folder.

    Args:
        commit: Commit hash, branch, tag or any other name that git resolves to a commit.
        folder: Existing folder that the files are written to.

    Raises:
        SystemExit: Git cannot find the commit.
    """
    command = ["git", "archive", f"{commit}^{{tree}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"error: {commit}: not a commit in {ROOT}: {''.join(reason)}")
    subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)


def make_config(
    data: str, folder: str, recipe: str, size: int = 64, steps: int = 10
) -> dict[str, Any]:
    """Return the config of a training run that saves one checkpoint when it ends."""
    config = resumed_runs.make_config(data, recipe, "folders", workers=0)
    for section in ("train_dataset", "eval_dataset"):
        config[section] |= {"base_size": size, "final_size": size}
    for parent in (config, *(config[name] for name in RECIPES[1:])):
        parent["max_duration"] = f"{steps}ba"
    return config | {"save_folder": folder, "save_interval": f"{steps}ba"}


def run(root: Path, data: str, recipe: str) -> Numbers:
    """Train and score one recipe with the code in the folder `root`."""

    def python(*arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(arguments)} in {root}:\n{done.stderr[-2000:]}")

    import torch

    with tempfile.TemporaryDirectory() as folder:
        config, checkpoint = Path(folder, "run.yaml"), f"{folder}/latest-rank0.pt"
        config.write_text(json.dumps(make_config(data, folder, recipe)))  # JSON is valid YAML.
        python("main.py", str(config))
        state = torch.load(checkpoint, "cpu", weights_only=False)["state"]
        digest = hashlib.sha1()
        for name, tensor in sorted(tensors(folder).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        scores = []
        for protocol in PROTOCOLS:
            result = Path(folder, "scores.json")
            python("evaluate.py", checkpoint, "--protocol", protocol, "--json", str(result))
            scores.append(json.loads(result.read_text())["mIoU"])
    losses = np.array(state["callbacks"]["Curves"]["train"])[:, 1].tolist()
    return Numbers(losses, digest.hexdigest(), scores)


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison table, and return 1 if any result differs."""
    parser = make_parser(__doc__)
    parser.add_argument("commit", help="commit to compare with")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    options = parser.parse_args(arguments)
    columns = "recipe", "losses of steps 1, 5, 10", "state", "mIoU paper, square", "the commit's"
    table = Table(*columns)
    differs = False
    with tempfile.TemporaryDirectory() as folder:
        before, data = Path(folder, "before"), f"{folder}/data"
        before.mkdir()
        unpack(options.commit, before)
        make(f"{data}/folders", training=24, validation=6, size=64)
        for recipe in options.recipes:
            ours, theirs = (run(root, data, recipe) for root in (ROOT, before))
            parts = [
                name for name in Numbers._fields if getattr(ours, name) != getattr(theirs, name)
            ]
            differs |= bool(parts)
            losses = ", ".join(f"{ours.losses[step]:.9g}" for step in (0, 4, 9))
            scores = ", ".join(f"{score:.4f}" for score in ours.scores)
            verdict = f"DIFFER in {', '.join(parts)}" if parts else "identical"
            table.add(recipe, losses, ours.state[:10], scores, verdict)
    write_json(options, table.result())
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
