"""Importing main has no side effects, and a plain run imports few modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from extras.preparation.synthetic import make
from tests.support.paths import ROOT

LIMIT = 45
# A program that imports main and trains with yamls/deeplabv3.yaml on small images.
PROGRAM = """
import json, logging, os, sys
logging.basicConfig()
import cv2, composer, streaming  # These change the environment.
before, words = dict(os.environ), sys.argv[1:]
sys.argv = ["x", "no-such.yaml"]
import main
changed = sorted(key for key in os.environ if os.environ[key] != before.get(key))
logging.warning("retrying")
from tests.support.forked import shrink
shrink()
status = main.run(words)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print(json.dumps([status, changed, files]), file=sys.stderr)
"""


class Outcome(NamedTuple):
    """A process's environment variables that `import main` changed, its modules and its stderr."""

    changed: list[str]
    modules: set[str]
    stderr: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run main.py with the default config in a new process; return its outcome."""
    data = tmp_path_factory.mktemp("data")
    make(data, training=4, validation=2, size=32)
    keys = dict(path=data, base_size=32, final_size=32, batch_size=4, num_workers=0)
    words = [f"{s}.{k}={v}" for s in ("train_dataset", "eval_dataset") for k, v in keys.items()]
    words += ["max_duration=1ep", "model.backbone_arch=resnet50", "model.backbone_weights=null"]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, "yamls/deeplabv3.yaml", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    status, changed, files = json.loads(process.stderr.splitlines()[-1])
    assert status == 0, process.stderr
    paths = [Path(file).relative_to(ROOT) for file in files if Path(file).is_relative_to(ROOT)]
    inside = [path for path in paths if not path.parts[0].startswith((".", "tests"))]
    names = {".".join(path.with_suffix("").parts) for path in inside if path.stem != "__init__"}
    return Outcome(changed, names, process.stderr)


def test_importing_main_does_not_change_environment_variables(outcome: Outcome) -> None:
    assert outcome.changed == []


def test_warnings_are_shown_after_importing_mmcv(outcome: Outcome) -> None:
    """Importing mmcv raises the level of the root logger's handlers, which would hide warnings."""
    assert "WARNING:root:retrying" in outcome.stderr


def test_plain_run_imports_few_modules(outcome: Outcome) -> None:
    modules = outcome.modules
    assert len(modules) <= LIMIT, sorted(modules)
    assert {"main", "model", "data", "transforms", "training.seeding"} <= modules
    optional = {
        *("training.ema", "training.sam", "training.mixup", "training.freeze", "training.watch"),
        *("training.class_weights", "dataset.counts", "dataset.shards", "dataset.panoptic"),
        *("segmentation.losses_triton", "checkpointing.partial_load", "checkpointing.resume"),
        *("checkpointing.saver", "checkpointing.remote_store", "training.report"),
        "training.error_analysis",
        *(f"networks.{name}" for name in ("mmseg", "torchvision", "smp", "hf", "timm")),
    }
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in optional)
    assert not modules & optional
    assert not [name for name in modules if name.startswith("extras.")]
