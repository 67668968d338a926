"""Readers for videos and cameras, and a writer for H.264 videos that browsers can play.

PyAV, a Python interface to FFmpeg's libraries, reads and writes the files. OpenCV is installed as
well, but it has no H.264 encoder, does not say why it cannot read a file, and gives all frames the
same duration.
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
# Maximum number of seconds to wait for a camera to start, and for each frame.
CAMERA_SECONDS = 10
NO_FRAMES = "the video has no frames"
# Time base of written videos, in seconds: every timestamp is a multiple of it.
TICK = Fraction(1, 90_000)


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        number: Index of the frame in the video, starting at 0.
        time: Seconds since the start of the video.
        image: Upright RGB image, uint8 (H, W, 3).
    """

    number: int
    time: Fraction
    image: np.ndarray


def load_pyav() -> ModuleType:
    """Import PyAV.

    Returns:
        The module `av`.

    Raises:
        UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV; run make install WITH=video or pip install av") from None
    return av


class Video:
    """The frames of the first video stream in a file, without sound.

    Args:
        path: Path of the file.
        every: Interval between frames to read: 1 reads all frames, n reads every n-th frame.
        **options: Options for PyAV's `av.open`.

    Attributes:
        rate: Average number of frames that are read per second of video.
        length: Number of frames to read, or None if the file does not state its length.

    Raises:
        DataError: The file cannot be read as a video.
    """

    def __init__(self, path: Path | str, every: int = 1, **options: Any):
        self._av, self.every = load_pyav(), every
        try:
            self._container = self._av.open(str(path), **options)
        except (self._av.FFmpegError, OSError) as error:
            raise DataError(self._explain(error)) from None
        if not self._container.streams.video:
            raise DataError("the file contains no video stream; choose a different file")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise DataError("FFmpeg has no decoder for this video; convert it to H.264")
        self._stream.thread_type = "AUTO"
        wide = self._stream.sample_aspect_ratio or 1  # A video's pixels need not be square.
        self._size = {"width": round(self._stream.width * wide), "height": self._stream.height}
        rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.rate = rate / every
        # Timestamps may start hours after zero, for example in a clip from a broadcast.
        start = self._container.start_time
        self._start = None if start is None else Fraction(start, 1_000_000)
        seconds = Fraction(self._container.duration or 0, 1_000_000)
        frames = self._stream.frames or round(seconds * rate)
        self.length = -(-frames // every) if frames > 0 else None

    def __iter__(self) -> Iterator[Frame]:
        """Decode the video.

        Yields:
            Every n-th frame.

        Raises:
            DataError: The video has no frames or is cut short.
        """
        count = 0
        try:
            for number, frame in enumerate(self._container.decode(self._stream)):
                count = number + 1
                if number % self.every:
                    continue
                image = frame.reformat(format="rgb24", **self._size).to_ndarray()
                # Many cameras store frames sideways and record the rotation, so turn them upright.
                image = np.rot90(image, frame.rotation // 90)
                time = number / self.rate / self.every
                if frame.pts is not None:
                    time = frame.pts * frame.time_base
                    self._start = time if self._start is None else self._start
                    time -= self._start
                yield Frame(number, time, np.ascontiguousarray(image))
        except (self._av.FFmpegError, OSError) as error:
            place = f"the video is cut short after {count} frames: " if count else ""
            raise DataError(f"{place}{self._explain(error)}") from None
        finally:
            self._container.close()
        if not count:
            raise DataError(NO_FRAMES)

    def _explain(self, error: Exception) -> str:
        return NO_FRAMES if isinstance(error, self._av.error.EOFError) else _reason(error)


class Camera(Video):
    """A reader that yields the newest frame of a camera and drops older frames.

    Frame times are measured from the start of the iteration.

    Args:
        address: A device such as /dev/video0, or an rtsp://, http:// or other URL that FFmpeg
            reads.
        every: Interval between frames to read: 1 reads all frames, n at most every n-th frame.

    Raises:
        DataError: The camera does not respond or sends no video.
    """

    def __init__(self, address: str, every: int = 1):
        kind = "v4l2" if address.startswith("/dev/") else None
        super().__init__(address, every, format=kind, timeout=CAMERA_SECONDS)
        self.length = None

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the camera stops.

        Raises:
            DataError: The camera sends no frames, or the connection is lost.
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
            except Exception as error:
                # Pass the exception to the thread that uses the frames, which raises it.
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
    """Return the comment in a video file, or "" if the file has no comment or is not a video.

    Args:
        path: Path of the file.
    """
    av = load_pyav()
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except (av.FFmpegError, OSError):
        return ""


class VideoWriter:
    """A context manager that writes pictures of equal size to a video.

    The file is created only if the context ends without an exception and at least one picture was
    written.

    Args:
        path: Path of the MP4 file.
        rate: Average number of pictures per second.
        comment: Comment to store in the file; see `read_comment`.

    Raises:
        UserError: The video cannot be written.
        OutputError: The disk is full.
    """

    def __init__(self, path: Path, rate: Fraction, comment: str = ""):
        self._av, self._path, self._rate, self._comment = load_pyav(), path, rate, comment
        self._context = contextlib.ExitStack()  # Closes the unfinished file.
        self._file: Any = None
        self._container: Any = None
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._context:
            if error is not None:  # On an error, `output_file` removes the unfinished file.
                raise error
            if self._container is not None:
                self._write(None)
                with self._explain():
                    self._container.close()  # This writes the video's index.

    def _abandon(self) -> None:
        """Close the container if an error has left it open."""
        with contextlib.suppress(Exception):
            self._container.close()

    def write(self, picture: np.ndarray, time: Fraction) -> None:
        """Add a picture to the video.

        Args:
            picture: (H, W, 3) uint8 RGB, with even height and width.
            time: Time at which the picture appears, in seconds.

        Raises:
            UserError: The video cannot be written.
            OutputError: The disk is full.
        """
        if self._stream is None:
            self._stream = self._begin(*picture.shape[:2])
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        # Each frame's timestamp must be later than the previous frame's.
        self._last = max(round(time / TICK), self._last + 1)
        frame.pts, frame.time_base = self._last, TICK
        self._write(frame)

    def _begin(self, height: int, width: int) -> Any:
        unfinished = self._context.enter_context(output_file(self._path))
        self._file = self._context.enter_context(_File(unfinished, "x+b"))
        with self._explain():
            self._container = self._av.open(self._file, "w", format="mp4")
            self._context.callback(self._abandon)
            rate = self._rate.limit_denominator(1001)
            try:
                self._container.metadata["comment"] = self._comment
                stream = self._container.add_stream("libx264", rate=rate, options={"crf": "20"})
            except self._av.codec.codec.UnknownCodecError:
                raise UserError(
                    "this PyAV has no H.264 encoder (libx264); install PyAV with pip"
                ) from None
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = TICK
        # In FFmpeg, 1 stands for the colour space BT.709.
        context.colorspace = context.color_primaries = context.color_trc = 1
        # In FFmpeg, 1 means limited range: pixel values from 16 to 235.
        context.color_range = 1
        return stream

    def _write(self, frame: Any) -> None:
        with self._explain():
            for packet in self._stream.encode(frame):
                self._container.mux(packet)

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        """Raise the file's own write error, because FFmpeg may report a different one."""
        try:
            yield
        except self._av.FFmpegError as error:
            if self._file.error is None:
                raise UserError(f"cannot write {self._path}: {_reason(error)}") from None
        if self._file.error is not None:
            raise self._file.error


class _File(io.FileIO):
    """A file that remembers its first write error, because FFmpeg does not always report it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            # On a nearly full disk, one call writes only part of the data, and the next call
            # reports the error, so write in a loop.
            view, done = memoryview(data), 0
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        return done


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
