"""Small videos, a simulated network camera, and the frames that OpenCV reads."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from extras.video import VideoWriter

SIZE = (48, 64)  # height and width


def scenes(number: int) -> list[np.ndarray]:
    """Return images of smooth colours, which compression hardly changes."""
    rng = np.random.default_rng(0)
    small = rng.integers(30, 220, (number, 2, 3, 3), dtype=np.uint8)
    return [cv2.resize(one, SIZE[::-1], interpolation=cv2.INTER_LINEAR) for one in small]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of seven frames at 5 per second, written by OpenCV."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, SIZE[::-1])
    for scene in scenes(7):
        writer.write(scene[..., ::-1])
    writer.release()
    return path


def opencv_frames(path: Path) -> list[np.ndarray]:
    """Return the frames that OpenCV reads from a video."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return frames


def write(path: Path, times: list[float]) -> list[np.ndarray]:
    """Write a video whose frames start at these times in seconds; return the frames."""
    pictures = scenes(len(times))
    with VideoWriter(path, Fraction(5)) as writer:
        for picture, time in zip(pictures, times):
            writer.write(picture, Fraction(time))
    return pictures


@contextlib.contextmanager
def camera(pictures: list[np.ndarray], rate: float) -> Iterator[str]:
    """Serve the images as a network camera at `rate` images per second; yield its address."""

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
                except OSError:  # the reader has disconnected
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
