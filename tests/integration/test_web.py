"""The page that `export.py --to web` writes, in a real browser: it answers as predict.py does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from extras.sharing import web
from predict import Segmenter
from tests.support.artifacts import CLASSES
from tests.support.web import folder, photos, runtime  # noqa: F401


def test_what_the_folder_holds(folder: Path, runtime: Path) -> None:
    demo = folder / "demo"
    names = {path.name for path in demo.iterdir()}
    assert names >= {"index.html", "page.js", "page.css", "model.onnx", "network.json", "examples"}
    for name, expected in web.SHA256.items():
        content = (demo / name.replace(".mjs", ".js")).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected
    about = json.loads((demo / "network.json").read_text())
    assert about["size"] == 64 and [c["name"] for c in about["classes"]] == CLASSES
    assert Segmenter(demo / "model.onnx").size == 64  # predict.py takes it too
