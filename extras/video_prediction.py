"""Functions that segment the frames of videos and cameras one by one."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from errors import DataError
from extras.prediction_files import COMMENT, save_index
from extras.video import Camera, Frame, Video, VideoWriter
from segmentation.classes import ClassInfo
from segmentation.drawing import VideoOverlay


class Segmenter(Protocol):
    """The parts of `predict.Segmenter` that this module uses."""

    classes: list[ClassInfo]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the class indices (H, W) of an image (H, W, 3)."""
        ...


def segment_video(
    segmenter: Segmenter, path: Path, target: Path, options: argparse.Namespace
) -> str:
    """Segment a video; write an overlay video and a folder with each frame's class indices.

    Args:
        segmenter: Function that segments an image.
        path: Path of the video.
        target: Path of the outputs without an extension.
        options: Parsed command line of predict.py.

    Returns:
        An empty string, or "cut short" or "skipped" if the video cannot be read to its end.
    """
    done, problem = 0, None
    try:
        video = Video(path, options.every)
        frames = tqdm(video, path.name, video.length, leave=False, unit="frame")
        with VideoWriter(Path(f"{target}.mp4"), video.rate, COMMENT) as writer:
            try:
                for _ in _segment_frames(segmenter, frames, writer, target, options.write):
                    done += 1
            except DataError as error:  # Keep the frames before the damaged one.
                problem = error
    except DataError as error:
        problem = error
    if problem is None:
        return ""
    tqdm.write(f"{'' if done else 'skipped '}{path}: {problem}", sys.stderr)
    return "cut short" if done else "skipped"


def segment_camera(segmenter: Segmenter, options: argparse.Namespace) -> int:
    """Segment the frames of a camera until the camera stops or the user presses Ctrl-C.

    Args:
        segmenter: Function that segments an image.
        options: Parsed command line of predict.py.

    Returns:
        The exit status.
    """
    target, done, problem = Path(options.out, "camera"), 0, None
    if threading.current_thread() is threading.main_thread():
        # On Ctrl-C, Composer's handler would end the process before the video is saved.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        camera = Camera(options.photos[0], options.every)
        frames = tqdm(camera, "camera", leave=False, unit="frame")
        with VideoWriter(Path(f"{target}.mp4"), camera.rate, COMMENT) as writer:
            try:
                for _ in _segment_frames(segmenter, frames, writer, target, options.write):
                    done += 1
            except KeyboardInterrupt:
                pass
            except DataError as error:
                problem = error
    except KeyboardInterrupt:
        pass
    except DataError as error:
        problem = error
    if problem is not None:
        tqdm.write(f"error: camera: {problem}", sys.stderr)
    print(f"{done} frames segmented into {options.out}/")
    return 0 if problem is None else 1


def _segment_frames(
    segmenter: Segmenter,
    frames: Iterable[Frame],
    writer: VideoWriter,
    target: Path,
    kinds: Sequence[str],
) -> Iterator[None]:
    """Segment frames, write the overlay video and the class indices; yield after each frame."""
    draw = None
    for number, time, image in frames:
        prediction = segmenter(image)
        if "overlay" in kinds:
            draw = draw or VideoOverlay(segmenter.classes, *image.shape[:2])
            writer.write(draw(image, prediction), time)
        if "index" in kinds:
            save_index(prediction, target / f"{number:06}.png")
        yield
