"""Videos and cameras: their frames as photos, and pictures as a video that browsers play (H.264).

PyAV, that is FFmpeg's libraries, reads and writes them. OpenCV's package, although it is here, has
no encoder for H.264, does not say why it cannot read a file, and shows all frames equally long.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from errors import DataError, UserError, one_line
from files import output_file

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv"}
CAMERA_SECONDS = 10  # that a camera may take to answer, and for a frame
NO_FRAMES = "there are no frames in it"
TICK = Fraction(1, 90_000)  # of a written video's clock, in seconds


class Frame(NamedTuple):
    """A frame of a video."""

    number: int  # in the video, from 0
    time: Fraction  # seconds since the video began
    photo: np.ndarray  # (H, W, 3) uint8 RGB, upright


def load_pyav() -> ModuleType:
    """Import PyAV.

    Raises:
        UserError: It is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: make install WITH=video, or pip install av") from None
    return av


class Video:
    """The frames of a file's first video; sound is left aside.

    Args:
        path: The file.
        every: Take every n-th frame.

    Attributes:
        rate: How many of the frames taken are shown in a second, on average.
        length: How many there are, by what the file says; None where it does not.

    Raises:
        DataError: It cannot be read.
    """

    def __init__(self, path: Path | str, every: int = 1):
        self._av, self.every = load_pyav(), every
        try:
            self._container = self._open(str(path))
        except (self._av.FFmpegError, OSError) as error:
            raise DataError(self._explain(error)) from None
        if not self._container.streams.video:
            raise DataError("there is no video in it")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise DataError("FFmpeg has no decoder for it")
        self._stream.thread_type = "AUTO"
        wide = self._stream.sample_aspect_ratio or 1  # of a pixel that is not square
        self._size = {"width": round(self._stream.width * wide), "height": self._stream.height}
        rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.rate = rate / every
        # Of a part of a broadcast, for one, the clock has gone for hours.
        start = self._container.start_time
        self._start = None if start is None else Fraction(start, 1_000_000)
        seconds = Fraction(self._container.duration or 0, 1_000_000)
        frames = self._stream.frames or round(seconds * rate)
        self.length = -(-frames // every) if frames > 0 else None

    def _open(self, path: str) -> Any:
        return self._av.open(path)

    def __iter__(self) -> Iterator[Frame]:
        """Decode the video.

        Raises:
            DataError: It has no frames, or breaks off.
        """
        count = 0
        try:
            for number, frame in enumerate(self._container.decode(self._stream)):
                count = number + 1
                if number % self.every:
                    continue
                photo = frame.reformat(format="rgb24", **self._size).to_ndarray()
                photo = np.rot90(photo, frame.rotation // 90)  # as the telephone was held
                time = number / self.rate / self.every
                if frame.pts is not None:
                    time = frame.pts * frame.time_base
                    self._start = time if self._start is None else self._start
                    time -= self._start
                yield Frame(number, time, np.ascontiguousarray(photo))
        except (self._av.FFmpegError, OSError) as error:
            place = f"it breaks off after {count} frames: " if count else ""
            raise DataError(f"{place}{self._explain(error)}") from None
        finally:
            self._container.close()
        if not count:
            raise DataError(NO_FRAMES)

    def _explain(self, error: Exception) -> str:
        return NO_FRAMES if isinstance(error, self._av.error.EOFError) else _reason(error)


class Camera(Video):
    """A camera's frames: the newest whenever one is asked for, those in between are left out.

    Their times are those of the clock, from the call on.

    Args:
        address: /dev/video0, or rtsp://..., http://... and what else FFmpeg reads.
        every: Take none but every n-th frame.

    Raises:
        DataError: It does not answer, or shows no video.
    """

    def __init__(self, address: str, every: int = 1):
        super().__init__(address, every)
        self.length = None

    def _open(self, path: str) -> Any:
        kind = "v4l2" if path.startswith("/dev/") else None
        return self._av.open(path, format=kind, timeout=CAMERA_SECONDS)

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the camera ends.

        Raises:
            DataError: It has no frames, or breaks off.
        """
        newest: queue.Queue[Frame | Exception | None] = queue.Queue(1)
        frames, stop = super().__iter__(), threading.Event()

        def read() -> None:
            last = None
            try:
                for frame in frames:
                    with contextlib.suppress(queue.Empty):
                        newest.get_nowait()
                    newest.put(frame)
                    if stop.is_set():
                        return
            except Exception as error:  # raised where frames are asked for
                last = error
            newest.put(last)

        threading.Thread(target=read, daemon=True).start()
        began = time.monotonic()
        try:
            while (frame := newest.get()) is not None:
                if isinstance(frame, Exception):
                    raise frame
                yield frame._replace(time=Fraction(time.monotonic() - began))
        finally:
            stop.set()


def read_comment(path: Path) -> str:
    """Return the comment of a video file; "" if there is none, or it is not a video."""
    av = load_pyav()
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except (av.FFmpegError, OSError):
        return ""


class VideoWriter:
    """A context that writes pictures of one size as a video, from the first picture on.

    The file appears when the context ends without an exception and a picture was written.

    Args:
        path: The file, an MP4.
        rate: Pictures per second, on average.
        comment: A note in the file, which `read_comment` returns.

    Raises:
        UserError: It cannot be written.
        OutputError: The disk is full.
    """

    def __init__(self, path: Path, rate: Fraction, comment: str = ""):
        self._av, self._path, self._rate, self._comment = load_pyav(), path, rate, comment
        self._context = contextlib.ExitStack()  # the unfinished file, open
        self._file: Any = None
        self._container: Any = None
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._context:
            if error is not None:  # output_file removes the unfinished file
                self._abandon()
                raise error
            if self._container is not None:
                try:
                    self._write(None)
                    with self._explain():
                        self._container.close()  # writes the index
                except BaseException:
                    self._abandon()
                    raise

    def _abandon(self) -> None:
        if self._container is not None:
            with contextlib.suppress(Exception):
                self._container.close()

    def write(self, picture: np.ndarray, time: Fraction) -> None:
        """Add a picture that is shown from a time on.

        Args:
            picture: (H, W, 3) uint8 RGB, with even sides.
            time: Seconds.

        Raises:
            UserError: It cannot be written.
            OutputError: The disk is full.
        """
        if self._stream is None:
            self._stream = self._begin(*picture.shape[:2])
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        self._last = max(round(time / TICK), self._last + 1)  # two cannot be at once
        frame.pts, frame.time_base = self._last, TICK
        self._write(frame)

    def _begin(self, height: int, width: int) -> Any:
        unfinished = self._context.enter_context(output_file(self._path))
        self._file = self._context.enter_context(_File(unfinished, "x+b"))
        with self._explain():
            self._container = self._av.open(self._file, "w", format="mp4")
            rate = self._rate.limit_denominator(1001)
            try:
                self._container.metadata["comment"] = self._comment
                stream = self._container.add_stream("libx264", rate=rate, options={"crf": "20"})
            except self._av.codec.codec.UnknownCodecError:
                raise UserError("this PyAV has no encoder for H.264 (libx264); pip's has") from None
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = TICK
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # of 16 to 235
        return stream

    def _write(self, frame: Any) -> None:
        with self._explain():
            for packet in self._stream.encode(frame):
                self._container.mux(packet)

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        """Raise what went wrong with the file, which FFmpeg may report as something else."""
        try:
            yield
        except self._av.FFmpegError as error:
            if self._file.error is None:
                raise UserError(f"cannot write {self._path}: {_reason(error)}") from None
        if self._file.error is not None:
            raise self._file.error


class _File(io.FileIO):
    """A file that remembers the first error of writing, which FFmpeg does not always pass on."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            # A file that is about to be full takes a part, and raises for the rest.
            view, done = memoryview(data), 0
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        return done


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
