"""The files of the web page that `export.py --to web` writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from extras.sharing import web
from predict import Segmenter
from tests.support.artifacts import CLASSES
from tests.support.web import folder, images, runtime  # noqa: F401


def test_web_export_contains_page_runtime_and_network(folder: Path, runtime: Path) -> None:
    demo = folder / "demo"
    names = {path.name for path in demo.iterdir()}
    assert names >= {"index.html", "page.js", "page.css", "model.onnx", "network.json", "examples"}
    for name, expected in web.SHA256.items():
        content = (demo / name.replace(".mjs", ".js")).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected
    about = json.loads((demo / "network.json").read_text())
    assert about["size"] == 64 and [c["name"] for c in about["classes"]] == CLASSES
    assert Segmenter(demo / "model.onnx").size == 64  # predict.py can read the file too
