"""A pipeline whose threads read, draw and encode images while the network predicts."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.decoding import read_image
from dataset.workers import available_cores
from extras.prediction_files import COMMENT, encode_index
from files import encode_image, write_file
from segmentation.classes import ClassInfo

# Maximum number of images in a batch on a GPU. All images of a batch have the same size.
BATCH = 8
# Reading pauses while the decoded images in the pipeline take up more bytes than this.
MAX_BYTES = 2**28
# Maximum width and height of a JPEG, in pixels.
JPEG_SIDE = 65_500


class Segmenter(Protocol):
    """The members of `predict.Segmenter` that extras/ uses without importing predict.py."""

    device: Any
    config: Mapping[str, Any] | None
    classes: list[ClassInfo]
    recorded_classes: list[ClassInfo] | None
    names_given: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the class indices (H, W) of an image (H, W, 3)."""

    def network_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Return the sizes at which the network processes an image."""

    def predict(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Segment images with equal `network_sizes` and return their class indices (H, W)."""

    def overlay(self, image: np.ndarray, prediction: np.ndarray) -> Image.Image:
        """Draw the colours of the predicted classes over an image."""


@dataclass
class _Job:
    """The state of an image in the pipeline.

    Attributes:
        path: File of the image.
        target: Path of the output files, without an extension.
        image: The decoded image, or None before reading starts and after the image is segmented.
        outputs: The encoded files and a note for the user, or None before the image is segmented.
        problem: Reason why the file was skipped, or an empty string.
        nbytes: Size of the decoded image, in bytes.
    """

    path: Path
    target: Path
    image: Future[np.ndarray] | None = None
    outputs: Future[tuple[dict[str, bytes], str]] | None = None
    problem: str = ""
    nbytes: int = 0


def segment_images(
    segmenter: Segmenter, files: Sequence[tuple[Path, Path]], kinds: Sequence[str]
) -> Iterator[str]:
    """Segment images and write the outputs, in the order of `files`.

    Args:
        segmenter: Model that segments the images.
        files: Path of each image, and the path of its outputs without an extension.
        kinds: Outputs to write: `"overlay"`, `"index"` or both.

    Yields:
        For each image, an empty string, or a short description of what went wrong.

    Raises:
        OutputError: The disk is full.
        UserError: An output cannot be written.
    """
    workers = min(max(available_cores(), 2), 16)
    batch = BATCH if segmenter.device.type == "cuda" else 1
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = iter(files)
        jobs: deque[_Job] = deque()  # Images in the pipeline, in the same order as `files`.
        while True:
            _read_ahead(jobs, waiting, pool, workers + batch)
            if not jobs:
                return
            if jobs[0].outputs is None and not jobs[0].problem:
                _segment_batch(segmenter, jobs, pool, batch, kinds)
            # Let the network segment the next images while threads encode the earlier outputs.
            is_done = jobs[0].problem or (jobs[0].outputs and jobs[0].outputs.done())
            unsegmented = next((job for job in jobs if not job.outputs and not job.problem), None)
            if not is_done and unsegmented and len(jobs) < 2 * (workers + batch):
                _segment_batch(segmenter, jobs, pool, batch, kinds)
                continue
            yield _finish(jobs.popleft())
    finally:
        # After an error or Ctrl-C, wait only for the running tasks. They write no files.
        pool.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    jobs: deque[_Job], files: Iterator[tuple[Path, Path]], pool: ThreadPoolExecutor, count: int
) -> None:
    """Queue images to be read in the background until the pipeline is full."""
    while not jobs or (
        sum(job.outputs is None for job in jobs) < count
        and len(jobs) < 3 * count
        and _held_bytes(jobs) < MAX_BYTES
    ):
        file = next(files, None)
        if file is None:
            return
        job = _Job(*file)
        job.image = pool.submit(_read, job)
        jobs.append(job)


def _read(job: _Job) -> np.ndarray:
    """Read an image and record its size."""
    image = read_image(job.path)
    job.nbytes = image.nbytes
    return image


def _held_bytes(jobs: Collection[_Job]) -> int:
    """Return the total size of all images in bytes.

    An image that has not been read yet is assumed to be as large as the largest one.
    """
    largest = max((job.nbytes for job in jobs), default=0)
    return sum(0 if job.problem else job.nbytes or largest for job in jobs)


def _segment_batch(
    segmenter: Segmenter,
    jobs: Sequence[_Job],
    pool: ThreadPoolExecutor,
    count: int,
    kinds: Sequence[str],
) -> None:
    """Segment a batch: the first waiting image, and any decoded images of the same size."""
    chosen: list[tuple[_Job, np.ndarray]] = []
    sizes = None
    for job in jobs:
        if job.outputs or job.problem or job.image is None:
            continue
        if chosen and not job.image.done():
            break
        try:
            image = job.image.result()
        except (ValueError, OSError) as error:
            job.problem = f"{getattr(error, 'strerror', None) or error}"
            continue
        found = segmenter.network_sizes(*image.shape[:2])
        if chosen and found != sizes:
            continue
        sizes = found
        chosen.append((job, image))
        if len(chosen) == count:
            break
    if not chosen:
        return
    dtype = np.uint8 if len(segmenter.classes) <= 256 else np.uint16
    predictions = segmenter.predict([image for _, image in chosen])
    for (job, image), prediction in zip(chosen, predictions, strict=True):
        indices = prediction.cpu().numpy().astype(dtype)
        job.image = None
        job.outputs = pool.submit(_encode, segmenter, image, indices, kinds)


def _encode(
    segmenter: Segmenter, image: np.ndarray, prediction: np.ndarray, kinds: Sequence[str]
) -> tuple[dict[str, bytes], str]:
    """Return an image's encoded outputs, indexed by extension, and a note for the user."""
    outputs = {}
    if "index" in kinds:
        outputs[".png"] = encode_index(prediction)
    if "overlay" in kinds:
        picture = segmenter.overlay(image, prediction)
        if max(picture.size) > JPEG_SIDE:
            size = (
                f"{picture.width} x {picture.height} pixels, but a JPEG is limited to {JPEG_SIDE:,}"
            )
            return outputs, f"its overlay would have {size} per side; use --write index"
        options = {"quality": 92, "subsampling": 0, "comment": COMMENT}
        outputs[".jpg"] = encode_image(".jpg", picture, **options)
    return outputs, ""


def _finish(job: _Job) -> str:
    """Write an image's outputs. Return "" or a short description of what went wrong."""
    if job.problem:
        tqdm.write(f"skipped {job.path}: {job.problem}", sys.stderr)
        return "skipped"
    assert job.outputs is not None
    outputs, note = job.outputs.result()
    for suffix, content in outputs.items():
        write_file(f"{os.fspath(job.target)}{suffix}", content)
    if note:
        tqdm.write(f"{job.path}: {note}", sys.stderr)
        return "without overlay"
    return ""
