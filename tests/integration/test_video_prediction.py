"""predict.py on videos and camera streams, including damaged videos and interruptions."""

from __future__ import annotations

import shutil
import signal
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec.codec import UnknownCodecError

from errors import DataError
from extras.video import Video
from predict import Segmenter, main
from tests.support.artifacts import random_weights
from tests.support.run_helpers import file_limit
from tests.support.video import SIZE, camera, clip, opencv_frames, scenes, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


def write_broken_videos(folder: Path, clip: Path) -> dict[str, str]:
    """Write files that are not valid videos; return the expected error of each by name."""
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
    (folder / "header.mkv").rename(
        folder / "header.mp4"
    )  # PyAV detects the format from the content
    (folder / "half.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    invalid = "Invalid data found when processing input"
    return {
        "junk": invalid,
        "empty": invalid,
        "sound": "the file contains no video stream; choose a different file",
        "header": "the video has no frames",
        "half": invalid,
        "gone": "No such file or directory",
    }


def test_file_that_is_not_a_video_is_skipped_with_reason(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = write_broken_videos(tmp_path, clip)
    files = [f"{tmp_path}/{name}.mp4" for name in reasons]
    assert main([random_weights(), *files, str(clip), "--out", f"{tmp_path}/out"]) == 1
    output = capsys.readouterr()
    for name, line in reasons.items():
        assert f"skipped {tmp_path}/{name}.mp4: {line}\n" in output.err
    assert "1 of 7 images and videos segmented" in output.out and "6 skipped" in output.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.mp4"]


def test_truncated_video_is_segmented_up_to_its_last_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "clip.mp4", [0, 1, 2])
    frames = list(Video(tmp_path / "clip.mp4"))

    def decode(video: Video) -> object:
        yield from frames[:2]
        raise DataError("the video is cut short after 2 frames: Input/output error")

    monkeypatch.setattr(Video, "__iter__", decode)
    assert main([random_weights(), f"{tmp_path}/clip.mp4", "--out", f"{tmp_path}/out"]) == 1
    output = capsys.readouterr()
    assert f"{tmp_path}/clip.mp4: the video is cut short after 2 frames" in output.err
    assert "0 of 1 images and videos segmented" in output.out and "1 cut short" in output.out
    assert len(opencv_frames(tmp_path / "out/clip.mp4")) == 2


def test_camera_is_segmented_until_it_ends_or_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with camera(scenes(6), 10) as address:
        arguments = [random_weights(), address, "--write", "overlay,index", "--out", str(tmp_path)]
        assert main(arguments) == 1
        output, indices = capsys.readouterr(), len(list((tmp_path / "camera").iterdir()))
        assert "error: camera: the video is cut short after 6 frames" in output.err
        assert f"{indices} frames segmented into {tmp_path}/" in output.out
        assert len(opencv_frames(tmp_path / "camera.mp4")) == indices > 1
        with pytest.raises(SystemExit):
            main([*arguments[:2], address])
        assert "a camera cannot be combined with other inputs" in capsys.readouterr().err

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


def test_prediction_on_full_disk_leaves_no_partial_video(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [random_weights(), str(clip), "--out", f"{tmp_path}/out"]
    for limit in (10, 3000):  # disk full at the header, and in the middle of the video
        with file_limit(limit):
            assert main(arguments) == 1
        error = f"error: {tmp_path}/out/clip.mp4: File too large"
        assert error in capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []
    for _ in range(2):  # The second call overwrites the video of the first.
        assert main(arguments) == 0
    shutil.copy(clip, tmp_path / "out/clip.mp4")
    assert main(arguments) == 2
    assert (
        "out/clip.mp4 already exists and was not written by predict.py" in capsys.readouterr().err
    )


def test_ctrl_c_completes_the_video_of_a_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its own handler, Ctrl-C would end the process through Composer's signal handler."""
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


def test_invalid_video_output_gives_one_line_errors(
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
    assert "--every: 0 is not an integer between 1 and" in capsys.readouterr().err

    def no_codec(*_: object, **__: object) -> None:
        raise UnknownCodecError("libx264")

    with monkeypatch.context() as patch:
        patch.setattr("av.container.OutputContainer.add_stream", no_codec, raising=True)
        assert main(arguments) == 2
    assert "no H.264 encoder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: videos need PyAV; run make install WITH=video or pip install av\n"
    )
