"""Tests of predict.py."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from mmcv.image import rescale_size

import predict
from errors import ModelError, WeightsError
from predict import Segmenter
from tests.support.predict import image, segmenter, variant  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


def test_network_input_sizes_match_mmsegmentation(segmenter: Segmenter):
    rng = np.random.default_rng(0)
    plain = variant(segmenter, size=512)
    tta = variant(segmenter, size=512, scales=predict.TTA_SCALES)
    for height, width in rng.integers(20, 4000, (200, 2)).tolist():
        expected = rescale_size((width, height), (2048, 512))
        assert plain.network_sizes(height, width) == (expected[::-1],)
        # mmsegmentation rounds the scaled limits first, which can move a side by a pixel.
        for scale, size in zip(predict.TTA_SCALES, tta.network_sizes(height, width)):
            expected = rescale_size((width, height), (int(2048 * scale), int(512 * scale)))
            assert np.abs(np.subtract(size, expected[::-1])).max() <= 1
    assert variant(segmenter, size=0).network_sizes(30, 40) == ((30, 40),)


def test_batched_prediction_matches_single_images(segmenter: Segmenter, image: np.ndarray):
    double = cv2.resize(image, (120, 90))
    together = segmenter.predict([image, double])
    alone = [segmenter(image), segmenter(double)]
    for a, b in zip(together, alone):
        assert a.shape == b.shape and (a.numpy() == b).mean() > 0.999


def test_invalid_onnx_file_is_rejected(tmp_path: Path):
    (tmp_path / "other.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match=r"other\.onnx: onnxruntime cannot read the file"):
        Segmenter(tmp_path / "other.onnx")


def test_onnx_file_without_classes_or_onnxruntime_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "other.onnx"
    with pytest.raises(WeightsError, match="--amp does not work with ONNX files"):
        Segmenter(path, amp=True)
    value = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1, 3, 4, 4])
    node = onnx.helper.make_node("Identity", ["image"], ["logits"])
    result = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.UINT8, [1, 3, 4, 4])
    graph = onnx.helper.make_graph([node], "other", [value], [result])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    with pytest.raises(WeightsError, match=r"other\.onnx: the file contains no class names; use a"):
        Segmenter(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(WeightsError, match="ONNX files need onnxruntime; run pip install onnxrunt"):
        Segmenter(path)


def test_device_without_data_is_rejected():
    with pytest.raises(ModelError, match="device meta: this device holds no data; use a device"):
        predict.find_device("meta")
