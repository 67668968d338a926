"""`make demo` generates data, trains on it and draws pictures of the predictions."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.paths import ROOT


def test_make_demo_trains_and_draws_a_picture(tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if not entry.name.startswith((".venv", "demo", ".git")):
            (tmp_path / entry.name).symlink_to(entry)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".train").touch()  # `make` takes this file as a finished installation.
    settings = "mild.max_duration=4ba eval_interval=4ba train_dataset.batch_size=4 precision=fp32"
    settings += " model.name=torchvision:lraspp_mobilenet_v3_large"
    process = subprocess.run(
        ["make", "demo", f"DEMO={settings}"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(r"^mIoU: [\d.]+ before, [\d.]+ now$", process.stdout, re.M), process.stdout
    (picture,) = Path(tmp_path, "demo/checkpoints/pictures").glob("ep0-ba4*.png")
    with Image.open(picture) as image:
        assert image.width > 300 and image.convert("L").getextrema() == (0, 255)
    assert "predict.py demo/checkpoints/latest-rank0.pt IMAGE" in process.stdout
    assert Path(tmp_path, "demo/checkpoints/latest-rank0.pt").exists()
