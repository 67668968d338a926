"""Commands answer --help and report wrong flags and config keys before slow imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import main as main_module
from tests.support.paths import ROOT

COMMANDS = ["main", "data", "evaluate", "predict", "export"]

# A program that runs the command lines in its JSON argument one after another, and prints the exit
# status, output and slow imports of each.
ANSWERS = """
import contextlib, io, json, runpy, sys

answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, output, status = arguments, io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    slow = {"torch", "numpy", "cv2", "PIL", "composer", "streaming", "mmcv"} & set(sys.modules)
    answers.append((status, output.getvalue(), sorted(slow)))
print(json.dumps(answers))
"""


def test_help_and_flag_errors_are_printed_before_slow_imports() -> None:
    lines = [[f"{name}.py", "--help"] for name in COMMANDS]
    wrong = [["predict.py"], ["export.py", "model", "--to", "bmp"], ["data.py", "x", "--workers=0"]]
    process = subprocess.run(
        [sys.executable, "-c", ANSWERS, json.dumps(lines + wrong)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(process.stdout)
    for line, (status, output, slow) in zip(lines + wrong, answers, strict=True):
        assert not slow, line
        assert status in ((0, None) if "--help" in line else (2,)), (line, output)
        assert output.startswith("usage: "), line


def test_unknown_config_key_is_reported_before_slow_imports(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    # python -X importtime writes a line to stderr for each imported module.
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", str(path), "optimiser.lr=1"],
        cwd=Path(main_module.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2, process.stderr
    lines = process.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import")}
    assert "training.schema" in imported
    assert not imported & {"torch", "composer", "numpy"}
    printed = [line for line in lines if not line.startswith("import")]
    assert printed == ["error: unknown key optimiser; did you mean optimizer?"]
    assert process.stdout == ""
