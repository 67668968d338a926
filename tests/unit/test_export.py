"""Tests of export.py."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import export
from export import main
from tests.support.artifacts import random_weights

pytestmark = pytest.mark.usefixtures("small_network")


def test_missing_onnx_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert main([random_weights(), "--to", "onnx"]) == 2
    error = "error: --to onnx needs more packages; run pip install onnx onnxruntime\n"
    assert capsys.readouterr().err == error


def test_sample_image_is_available():
    image = np.array(Image.open(export._sample_image()))
    assert image.ndim == 3 and image.std() > 10


@pytest.mark.parametrize("extra", [[], ["--photo", "gone.jpg"], ["--classes", "gone.txt"]])
def test_missing_input_gives_a_one_line_error(extra: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([random_weights() if extra else "gone.pt", "--to", "onnx", *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "gone." in error and error.count("\n") == 1
