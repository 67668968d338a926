"""A run that is started with Composer's `composer` launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def test_composer_launcher_trains_on_two_ranks(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["model"] = {"name": "tests.support.lone_network:build", "num_classes": 12}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**tiny, "save_folder": str(tmp_path / "saved")}))
    process = subprocess.run(
        [
            Path(sys.executable).parent / "composer",
            "-n",
            "2",
            "main.py",
            config,
            "max_duration=2ba",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "saved" / "ep0-ba2-rank0.pt").is_file()
    assert re.search(r"^batch: +4 images, 2 per process", process.stdout, re.M), process.stdout
