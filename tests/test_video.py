"""Videos in and out, compared with what OpenCV reads and writes."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import signal
import struct
import sys
import threading
import time
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from artifacts import random_weights
from av.codec.codec import UnknownCodecError
from run_helpers import file_limit

from errors import DataError
from extras.video import Camera, Video, VideoWriter
from predict import Segmenter, main
from segmentation.classes import ClassInfo
from segmentation.drawing import VideoOverlay, tint

SIZE = (48, 64)  # height and width


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(random_weights())


def scenes(number: int) -> list[np.ndarray]:
    """Photos of smooth colours, which compression leaves about as they are."""
    rng = np.random.default_rng(0)
    small = rng.integers(30, 220, (number, 2, 3, 3), dtype=np.uint8)
    return [cv2.resize(one, SIZE[::-1], interpolation=cv2.INTER_LINEAR) for one in small]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven frames at 5 a second, written by OpenCV."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, SIZE[::-1])
    for scene in scenes(7):
        writer.write(scene[..., ::-1])
    writer.release()
    return path


def opencv_frames(path: Path) -> list[np.ndarray]:
    """What OpenCV reads."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return frames


def write(path: Path, times: list[float]) -> list[np.ndarray]:
    """Write a video of scenes that begin at these seconds; return them."""
    pictures = scenes(len(times))
    with VideoWriter(path, Fraction(5)) as writer:
        for picture, time in zip(pictures, times):
            writer.write(picture, Fraction(time))
    return pictures


def test_frames_are_what_opencv_reads(clip: Path) -> None:
    video = Video(clip)
    frames = list(video)
    assert (video.rate, video.length) == (5, 7)
    assert [float(frame.time) for frame in frames] == pytest.approx([i / 5 for i in range(7)])
    for frame, expected in zip(frames, opencv_frames(clip), strict=True):
        assert np.abs(frame.photo.astype(int) - expected).mean() < 2
    every = list(Video(clip, every=3))
    assert [frame.number for frame in every] == [0, 3, 6]
    assert Video(clip, every=3).length == 3
    assert all(np.array_equal(one.photo, frames[one.number].photo) for one in every)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    times = [0, 0.1, 0.5, 0.5, 2]  # unevenly, and two at once
    pictures = write(tmp_path / "out.mp4", times)
    frames = list(Video(tmp_path / "out.mp4"))
    assert [float(frame.time) for frame in frames] == pytest.approx(times, abs=1e-4)
    for frame, picture, opencv in zip(
        frames, pictures, opencv_frames(tmp_path / "out.mp4"), strict=True
    ):
        assert np.abs(frame.photo.astype(int) - picture).mean() < 4
        assert np.abs(opencv.astype(int) - picture).mean() < 12  # it takes BT.709 for BT.601
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize("name", ["late.ts", "late.mkv"])
def test_a_clock_that_has_long_gone(tmp_path: Path, name: str) -> None:
    write(tmp_path / "part.mp4", [0, 0.1, 0.5])
    with av.open(f"{tmp_path}/part.mp4") as part, av.open(f"{tmp_path}/{name}", "w") as late:
        stream = late.add_stream_from_template(part.streams.video[0])
        for packet in part.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (t + 5000 * 90_000 for t in (packet.pts, packet.dts))
                packet.stream = stream
                late.mux(packet)
    times = [float(frame.time) for frame in Video(tmp_path / name)]
    assert times == pytest.approx([0, 0.1, 0.5], abs=2e-3)  # Matroska's are milliseconds


def test_a_video_is_turned_as_the_telephone_was_held(tmp_path: Path) -> None:
    (picture,) = write(tmp_path / "upright.mp4", [0])
    # The track's matrix (ISO/IEC 14496-12: a, b, u, c, d, v, x, y, w): a quarter turn clockwise.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE[0] << 16, 0, 1 << 30)
    content = bytearray((tmp_path / "upright.mp4").read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + len(matrix)] = matrix
    (tmp_path / "turned.mp4").write_bytes(content)
    (frame,) = Video(tmp_path / "turned.mp4")
    clockwise = cv2.rotate(picture, cv2.ROTATE_90_CLOCKWISE)
    assert np.abs(frame.photo.astype(int) - clockwise).mean() < 4


def test_command_line(
    clip: Path, tmp_path: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "in/b.mp4").write_bytes(clip.read_bytes())
    cv2.imwrite(f"{tmp_path}/in/c.png", scenes(1)[0])
    arguments = [random_weights(), f"{tmp_path}/in", "--out", f"{tmp_path}/out"]
    assert main([*arguments, "--write", "overlay,index", "--every", "2"]) == 0
    output = capsys.readouterr()
    assert f"3 of 3 photos and videos segmented into {tmp_path}/out/\n" in output.out
    assert "frame/s" in output.err and "<" in output.err  # the time left
    for name in ("a", "b"):
        written = list(Video(tmp_path / f"out/{name}.mp4"))
        assert [float(f.time) for f in written] == pytest.approx([0, 0.4, 0.8, 1.2], abs=1e-4)
        indices = sorted((tmp_path / "out" / name).iterdir())
        assert [path.name for path in indices] == [f"{i:06}.png" for i in (0, 2, 4, 6)]
        for frame, index, drawn in zip(Video(clip, 2), indices, written, strict=True):
            prediction = segmenter(frame.photo)
            assert np.array_equal(cv2.imread(str(index), cv2.IMREAD_UNCHANGED), prediction)
            larger = [array.repeat(5, 0).repeat(5, 1) for array in (frame.photo, prediction)]
            expected = tint(larger[0], larger[1], segmenter.classes)
            height, width = expected.shape[:2]
            assert np.abs(drawn.photo[:height, :width].astype(int) - expected).mean() < 6


def test_colours_and_legend_are_steady() -> None:
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
    assert np.array_equal(legends[1], legends[2])  # a class stays when it is not to be seen
    changed = np.flatnonzero((legends[0] != legends[1]).any((1, 2)))
    kept = np.flatnonzero((legends[0] != 255).any((1, 2)))
    assert changed.min() > kept.max()  # and new ones come below


def test_a_long_legend_says_how_many_are_left_out() -> None:
    classes = [ClassInfo(f"class {i}", (i, i, i)) for i in range(100)]
    mask = np.arange(320 * 320).reshape(320, 320) % 100
    page = VideoOverlay(classes, 320, 320)(np.zeros((320, 320, 3), np.uint8), mask)
    assert page.shape[0] == 320


def broken(folder: Path, clip: Path) -> dict[str, str]:
    """Files that are no videos, and what is said of them."""
    (folder / "junk.mp4").write_bytes(b"junk" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    with wave.open(f"{folder}/sound.mp4", "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with av.open(f"{folder}/header.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    (folder / "header.mkv").rename(folder / "header.mp4")  # its content tells what it is
    (folder / "half.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    said = "Invalid data found when processing input"
    return {
        "junk": said,
        "empty": said,
        "sound": "there is no video in it",
        "header": "there are no frames in it",
        "half": said,
        "gone": "No such file or directory",
    }


def test_what_is_no_video_is_skipped_with_a_line(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = broken(tmp_path, clip)
    files = [f"{tmp_path}/{name}.mp4" for name in said]
    assert main([random_weights(), *files, str(clip), "--out", f"{tmp_path}/out"]) == 1
    output = capsys.readouterr()
    for name, line in said.items():
        assert f"skipped {tmp_path}/{name}.mp4: {line}\n" in output.err
    assert "1 of 7 photos and videos segmented" in output.out and "6 skipped" in output.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.mp4"]


def test_a_video_that_breaks_off_is_written_up_to_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "clip.mp4", [0, 1, 2])
    frames = list(Video(tmp_path / "clip.mp4"))

    def decode(video: Video) -> object:
        yield from frames[:2]
        raise DataError("it breaks off after 2 frames: Input/output error")

    monkeypatch.setattr(Video, "__iter__", decode)
    assert main([random_weights(), f"{tmp_path}/clip.mp4", "--out", f"{tmp_path}/out"]) == 1
    output = capsys.readouterr()
    assert f"{tmp_path}/clip.mp4: it breaks off after 2 frames" in output.err
    assert "0 of 1 photos and videos segmented" in output.out and "1 cut short" in output.out
    assert len(opencv_frames(tmp_path / "out/clip.mp4")) == 2


@contextlib.contextmanager
def camera(pictures: list[np.ndarray], rate: float) -> Iterator[str]:
    """The address of one as in networks: JPEGs of its pictures by HTTP, so many a second."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for picture in pictures:
                data = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}"
                try:
                    self.wfile.write(f"{head}\r\n\r\n".encode() + data + b"\r\n")
                except OSError:  # it was turned off
                    return
                time.sleep(1 / rate)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/video"
        finally:
            server.shutdown()


def test_a_camera_shows_its_newest_frame() -> None:
    numbers, times = [], []
    ends = pytest.raises(DataError, match="it breaks off after 40 frames: Input/output error")
    with camera(scenes(40), 20) as address, ends:
        for frame in Camera(address):
            time.sleep(0.25)  # five frames
            numbers.append(frame.number)
            times.append(float(frame.time))
    assert len(numbers) < 20 and min(np.diff(numbers)) > 0 and max(np.diff(numbers)) > 2
    assert numbers[-1] >= 38  # the decoder may keep one
    assert min(np.diff(times)) > 0.2 and times[-1] > 1


def test_a_camera_until_it_ends_or_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with camera(scenes(6), 10) as address:
        arguments = [random_weights(), address, "--write", "overlay,index", "--out", str(tmp_path)]
        assert main(arguments) == 1
        output, indices = capsys.readouterr(), len(list((tmp_path / "camera").iterdir()))
        assert "error: camera: it breaks off after 6 frames" in output.err
        assert f"{indices} frames segmented into {tmp_path}/" in output.out
        assert len(opencv_frames(tmp_path / "camera.mp4")) == indices > 1
        with pytest.raises(SystemExit):
            main([*arguments[:2], address])
        assert "a camera is segmented alone" in capsys.readouterr().err

        seen: list[int] = []

        def interrupt(*_: object) -> np.ndarray:
            seen.append(0)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return np.zeros(SIZE, np.uint8)

        monkeypatch.setattr(Segmenter, "__call__", interrupt)
        assert main([*arguments[:2], "--out", f"{tmp_path}/stopped"]) == 0
    assert f"2 frames segmented into {tmp_path}/stopped/" in capsys.readouterr().out
    assert len(opencv_frames(tmp_path / "stopped/camera.mp4")) == 2
    for place, reason in (("/dev/video99", "No such file"), (address, "Connection refused")):
        assert main([random_weights(), place, "--out", str(tmp_path)]) == 1
        assert f"error: camera: {reason}" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_video(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [random_weights(), str(clip), "--out", f"{tmp_path}/out"]
    for limit in (10, 3000):  # at the header and in the middle
        with file_limit(limit):
            assert main(arguments) == 1
        error = f"error: {tmp_path}/out/clip.mp4: File too large"
        assert error in capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []
    for _ in range(2):  # the second call replaces the first one's video
        assert main(arguments) == 0
    shutil.copy(clip, tmp_path / "out/clip.mp4")
    assert main(arguments) == 2
    assert "out/clip.mp4 would be overwritten" in capsys.readouterr().err


def test_ctrl_c_completes_a_cameras_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's handler of the signal ends the process."""
    calls = []

    def segment(*_: object) -> np.ndarray:
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return np.zeros(SIZE, np.uint8)

    monkeypatch.setattr(Segmenter, "__call__", segment)
    before = signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    try:
        with camera(scenes(9), 10) as address:
            assert main([random_weights(), address, "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(opencv_frames(tmp_path / "camera.mp4")) == 2


def test_what_cannot_be_done_is_one_line(
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [random_weights(), str(clip), "--out", f"{tmp_path}/out"]
    before = clip.read_bytes()
    assert main([random_weights(), str(clip), "--out", str(clip.parent)]) == 2
    assert f"error: {clip} would be overwritten" in capsys.readouterr().err
    assert clip.read_bytes() == before
    (tmp_path / "file").touch()
    assert main([*arguments[:2], "--out", f"{tmp_path}/file"]) == 2
    assert "File exists" in capsys.readouterr().err
    (tmp_path / "taken/clip.mp4").mkdir(parents=True)
    assert main([*arguments[:2], "--out", f"{tmp_path}/taken"]) == 2
    assert f"error: cannot write {tmp_path}/taken/clip.mp4: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--every", "0"])
    assert "--every: 0 is not 1 or more" in capsys.readouterr().err

    def no_codec(*_: object, **__: object) -> None:
        raise UnknownCodecError("libx264")

    with monkeypatch.context() as patch:
        patch.setattr("av.container.OutputContainer.add_stream", no_codec, raising=True)
        assert main(arguments) == 2
    assert "no encoder for H.264" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: videos need PyAV: make install WITH=video, or pip install av\n"
    )
