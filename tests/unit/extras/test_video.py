"""Tests of extras/video.py."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from errors import DataError
from extras.video import Camera, Video
from segmentation.classes import ClassInfo
from segmentation.drawing import VideoOverlay
from tests.support.video import SIZE, camera, clip, opencv_frames, scenes, write  # noqa: F401


def test_video_frames_match_opencv(clip: Path) -> None:
    video = Video(clip)
    frames = list(video)
    assert (video.rate, video.length) == (5, 7)
    assert [float(frame.time) for frame in frames] == pytest.approx([i / 5 for i in range(7)])
    for frame, expected in zip(frames, opencv_frames(clip), strict=True):
        assert np.abs(frame.image.astype(int) - expected).mean() < 2
    every = list(Video(clip, every=3))
    assert [frame.number for frame in every] == [0, 3, 6]
    assert Video(clip, every=3).length == 3
    assert all(np.array_equal(one.image, frames[one.number].image) for one in every)


def test_written_video_can_be_read_again(tmp_path: Path) -> None:
    times = [0, 0.1, 0.5, 0.5, 2]  # uneven intervals and a repeated time
    pictures = write(tmp_path / "out.mp4", times)
    frames = list(Video(tmp_path / "out.mp4"))
    assert [float(frame.time) for frame in frames] == pytest.approx(times, abs=1e-4)
    for frame, picture, opencv in zip(
        frames, pictures, opencv_frames(tmp_path / "out.mp4"), strict=True
    ):
        assert np.abs(frame.image.astype(int) - picture).mean() < 4
        assert np.abs(opencv.astype(int) - picture).mean() < 12  # OpenCV decodes BT.709 as BT.601
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize("name", ["late.ts", "late.mkv"])
def test_frame_times_start_at_0_even_if_the_stream_starts_later(tmp_path: Path, name: str) -> None:
    write(tmp_path / "part.mp4", [0, 0.1, 0.5])
    with av.open(f"{tmp_path}/part.mp4") as part, av.open(f"{tmp_path}/{name}", "w") as late:
        stream = late.add_stream_from_template(part.streams.video[0])
        for packet in part.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (t + 5000 * 90_000 for t in (packet.pts, packet.dts))
                packet.stream = stream
                late.mux(packet)
    times = [float(frame.time) for frame in Video(tmp_path / name)]
    assert times == pytest.approx([0, 0.1, 0.5], abs=2e-3)  # Matroska rounds to milliseconds


def test_video_rotation_is_applied(tmp_path: Path) -> None:
    (picture,) = write(tmp_path / "upright.mp4", [0])
    # The track matrix (ISO/IEC 14496-12: a, b, u, c, d, v, x, y, w) is a clockwise quarter turn.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE[0] << 16, 0, 1 << 30)
    content = bytearray((tmp_path / "upright.mp4").read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + len(matrix)] = matrix
    (tmp_path / "turned.mp4").write_bytes(content)
    (frame,) = Video(tmp_path / "turned.mp4")
    clockwise = cv2.rotate(picture, cv2.ROTATE_90_CLOCKWISE)
    assert np.abs(frame.image.astype(int) - clockwise).mean() < 4


def test_video_colours_and_legend_do_not_change_between_frames() -> None:
    classes = [
        ClassInfo(name, color)
        for name, color in zip("abc", [(200, 0, 0), (0, 200, 0), (0, 0, 200)])
    ]
    draw = VideoOverlay(classes, 321, 401)
    grey = np.full((321, 401, 3), 90, np.uint8)
    first, second = np.zeros((321, 401), int), np.full((321, 401), 2)
    second[:10] = 1
    pages = [draw(grey, mask) for mask in (first, second, first)]
    assert len({page.shape for page in pages}) == 1
    assert all(side % 2 == 0 for side in pages[0].shape[:2])
    assert np.array_equal(pages[0][:321, :401], pages[2][:321, :401])
    legends = [page[:, 401:] for page in pages]
    assert np.array_equal(legends[1], legends[2])  # the legend keeps classes that disappear
    changed = np.flatnonzero((legends[0] != legends[1]).any((1, 2)))
    kept = np.flatnonzero((legends[0] != 255).any((1, 2)))
    assert changed.min() > kept.max()  # new classes are appended


def test_camera_returns_its_newest_frame() -> None:
    numbers, times = [], []
    ends = pytest.raises(
        DataError, match="the video is cut short after 40 frames: Input/output error"
    )
    with camera(scenes(40), 20) as address, ends:
        for frame in Camera(address):
            time.sleep(0.25)  # five frames arrive in this time
            numbers.append(frame.number)
            times.append(float(frame.time))
    assert len(numbers) < 20 and min(np.diff(numbers)) > 0 and max(np.diff(numbers)) > 2
    assert numbers[-1] >= 38  # the decoder may hold back one frame
    assert min(np.diff(times)) > 0.2 and times[-1] > 1
