"""A run that Composer's own launcher starts, as the README's command does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def test_composer_starts_a_run_of_two_processes(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["model"] = {"name": "tests.support.lone_network:build", "num_classes": 12}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**tiny, "save_folder": str(tmp_path / "saved")}))
    done = subprocess.run(
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
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / "ep0-ba2-rank0.pt").is_file()
    assert re.search(r"^batch: +4 images, 2 per process", done.stdout, re.M), done.stdout
