"""Functions that segment the frames of videos and cameras one by one."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from errors import DataError
from extras.prediction_files import COMMENT, encode_index
from extras.prediction_pipeline import Segmenter
from extras.video import Camera, Video, VideoWriter
from files import write_file
from segmentation.drawing import VideoOverlay


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
    done, problem = _segment(
        segmenter, lambda: Video(path, options.every), path.name, target, options, (DataError,)
    )
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
    if threading.current_thread() is threading.main_thread():
        # On Ctrl-C, Composer's handler would end the process before the video is saved.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    target, stops = Path(options.out, "camera"), (DataError, KeyboardInterrupt)
    done, problem = _segment(
        segmenter,
        lambda: Camera(options.photos[0], options.every),
        "camera",
        target,
        options,
        stops,
    )
    is_error = isinstance(problem, DataError)
    if is_error:
        tqdm.write(f"error: camera: {problem}", sys.stderr)
    print(f"{done} frames segmented into {options.out}/")
    return 1 if is_error else 0


def _segment(
    segmenter: Segmenter,
    open_video: Callable[[], Video],
    name: str,
    target: Path,
    options: argparse.Namespace,
    stops: tuple[type[BaseException], ...],
) -> tuple[int, BaseException | None]:
    """Segment a video's frames and write the outputs until an exception in `stops` is raised.

    Returns:
        The number of frames, and the exception, or None if the video was read to its end.
    """
    done, problem, draw = 0, None, None
    try:
        video = open_video()
        frames = tqdm(video, name, video.length, leave=False, unit="frame")
        with VideoWriter(Path(f"{target}.mp4"), video.rate, COMMENT) as writer:
            try:
                for number, time, image in frames:
                    prediction = segmenter(image)
                    if "overlay" in options.write:
                        draw = draw or VideoOverlay(segmenter.classes, *image.shape[:2])
                        writer.write(draw(image, prediction), time)
                    if "index" in options.write:
                        write_file(target / f"{number:06}.png", encode_index(prediction))
                    done += 1
            except stops as error:  # Keep the frames that were written before the problem.
                problem = error
    except stops as error:
        problem = error
    return done, problem
