"""Tests of predict.py."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.image import rescale_size
from PIL import Image

import predict
from errors import WeightsError
from predict import Segmenter, main
from tests.support.artifacts import random_network, random_weights
from tests.support.predict import photo, segmenter, variant  # noqa: F401


def test_it_is_the_network(segmenter: Segmenter, photo: np.ndarray):
    """Step by step: resize, normalise, network, to the size it saw, to the photo's, argmax."""
    height, width = segmenter.network_sizes(45, 60)[0]
    assert (height, width) == (32, 43)
    image = torch.from_numpy(photo).permute(2, 0, 1)[None]
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network = random_network()
    network.upsample = True
    with torch.no_grad():
        logits = network((image - mean[:, None, None]) / std[:, None, None])
    logits = F.interpolate(logits, (45, 60), mode="bilinear")
    # Resizing in parts may round a pixel of the photo the other way.
    assert (logits.argmax(1)[0].numpy() == segmenter(photo)).mean() > 0.99


def test_sizes_are_mmsegmentations(segmenter: Segmenter):
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


def test_photos_of_like_size_together(segmenter: Segmenter, photo: np.ndarray):
    double = cv2.resize(photo, (120, 90))
    together = segmenter.predict([photo, double])
    alone = [segmenter(photo), segmenter(double)]
    for a, b in zip(together, alone):
        assert a.shape == b.shape and (a.numpy() == b).mean() > 0.999


def test_command_line(
    tmp_path: Path,
    photo: np.ndarray,
    segmenter: Segmenter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    Image.fromarray(photo).save("in/deep/good.png")
    assert main([random_weights(), "in", "--write", "overlay,index"]) == 0
    assert "1 of 1 images segmented into predictions/" in capsys.readouterr().out
    index = np.array(Image.open("predictions/deep/good.png"))
    assert np.array_equal(index, segmenter(photo))
    assert Image.open("predictions/deep/good.jpg").height == segmenter.overlay(photo).height

    Path("in/bad.jpg").write_bytes(b"\xff\xd8\xff junk")
    assert main([random_weights(), "in", "gone.jpg", "--out", "out"]) == 1
    output = capsys.readouterr()
    assert "skipped in/bad.jpg: " in output.err and "skipped gone.jpg: " in output.err
    assert "1 of 3 images segmented into out/, 2 skipped" in output.out
    assert sorted(path.name for path in Path("out").rglob("*.*")) == ["good.jpg"]

    assert main(["gone.pt", "in"]) == 2
    assert capsys.readouterr().err == "error: gone.pt: no such file\n"
    with pytest.raises(SystemExit):
        main([random_weights(), "in", "--write", "video"])


def test_refuses_other_onnx_files(tmp_path: Path):
    (tmp_path / "other.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match=r"other\.onnx: onnxruntime cannot read the file"):
        Segmenter(tmp_path / "other.onnx")
