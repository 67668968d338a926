"""Tests of extras/video_prediction.py."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from extras.video import Video
from predict import Segmenter, main
from segmentation.drawing import tint
from tests.support.artifacts import random_weights
from tests.support.video import clip, scenes, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(random_weights())


def test_predict_command_segments_videos_and_images(
    clip: Path, tmp_path: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "in/b.mp4").write_bytes(clip.read_bytes())
    cv2.imwrite(f"{tmp_path}/in/c.png", scenes(1)[0])
    arguments = [random_weights(), f"{tmp_path}/in", "--out", f"{tmp_path}/out"]
    assert main([*arguments, "--write", "overlay,index", "--every", "2"]) == 0
    output = capsys.readouterr()
    assert f"3 of 3 images and videos segmented into {tmp_path}/out/\n" in output.out
    assert "frame/s" in output.err and "<" in output.err  # "<" precedes the remaining time
    for name in ("a", "b"):
        written = list(Video(tmp_path / f"out/{name}.mp4"))
        assert [float(f.time) for f in written] == pytest.approx([0, 0.4, 0.8, 1.2], abs=1e-4)
        indices = sorted((tmp_path / "out" / name).iterdir())
        assert [path.name for path in indices] == [f"{i:06}.png" for i in (0, 2, 4, 6)]
        for frame, index, drawn in zip(Video(clip, 2), indices, written, strict=True):
            prediction = segmenter(frame.image)
            assert np.array_equal(cv2.imread(str(index), cv2.IMREAD_UNCHANGED), prediction)
            larger = [array.repeat(5, 0).repeat(5, 1) for array in (frame.image, prediction)]
            expected = tint(larger[0], larger[1], segmenter.classes)
            height, width = expected.shape[:2]
            assert np.abs(drawn.image[:height, :width].astype(int) - expected).mean() < 6
