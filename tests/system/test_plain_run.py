"""What a plain training run imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from extras.preparation.synthetic import make
from tests.support.paths import ROOT

LIMIT = 45
# Runs yamls/deeplabv3.yaml on small images, and prints the project's modules that it imported.
PROGRAM = """
import json, sys
import main
keys = dict(path=sys.argv[1], base_size=32, final_size=32, batch_size=4, num_workers=0)
words = [f"{s}.{k}={v}" for s in ("train_dataset", "eval_dataset") for k, v in keys.items()]
words += ["max_duration=1ep", "model.backbone_arch=resnet50", "model.backbone_weights=null"]
status = main.run(["yamls/deeplabv3.yaml", *words, *sys.argv[2:]])
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print(json.dumps([status, files]), file=sys.stderr)
"""


def imported(data: Path, *words: str) -> set[str]:
    """Return the modules of the project, without packages, that a run imports."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(data), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    status, files = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done.stderr
    paths = [Path(file).relative_to(ROOT) for file in files if Path(file).is_relative_to(ROOT)]
    inside = [path for path in paths if not path.parts[0].startswith(".")]
    return {".".join(path.with_suffix("").parts) for path in inside if path.stem != "__init__"}


def test_a_plain_run_imports_few_modules(tmp_path: Path) -> None:
    make(tmp_path, training=4, validation=2, size=32)
    modules = imported(tmp_path)
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
