"""docs/own_data.ipynb runs from its first cell to its last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.support.paths import ROOT

NOTEBOOK = ROOT / "docs" / "own_data.ipynb"


def test_notebook_is_committed_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) == 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_notebook_runs_and_draws_its_figures(tmp_path: Path) -> None:
    """Run it in a copy of the project with few images, two batches and a small network."""
    names = [
        "dataset",
        "extras",
        "networks",
        "segmentation",
        "training",
        "checkpointing",
        "yamls",
        "docs",
    ]
    for name in names:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setup = notebook.cells[1]
    assert 'IMAGES, DURATION = 128, "6ep"' in setup.source
    setup.source = setup.source.replace('128, "6ep"', '24, "2ba"')
    training = notebook.cells[5]
    assert "model.backbone_weights=null" in training.source
    network = "model.name=torchvision:lraspp_mobilenet_v3_large"
    training.source = training.source.replace("run_name=yard", f"run_name=yard {network}")
    resources = {"metadata": {"path": str(tmp_path / "docs")}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()

    outputs = [list(cell.get("outputs", [])) for cell in notebook.cells]
    pictures = [
        sum("image/png" in o.get("data", {}) for o in cell_outputs) for cell_outputs in outputs
    ]
    assert pictures == [0, 0, 0, 1, 0, 0, 2, 0, 1, 0]
    text = ["".join(o.get("text", "") for o in cell_outputs) for cell_outputs in outputs]
    assert "wrote demo/yard.yaml" in text[3]
    assert "mIoU: " in text[5] and "report: " in text[5]
    assert not any("error" in part or "Traceback" in part for part in text), text
    assert 0 <= json.loads((tmp_path / "demo/yard.json").read_text())["mIoU"] <= 100
