"""Segment images, videos or a camera stream with a checkpoint, weights or an ONNX model.

    python predict.py runs/first/latest-rank0.pt street.jpg holiday/ "*.png" --out predictions
    python predict.py model.onnx street.jpg --write overlay,index
    python predict.py runs/first drive.mp4 --every 2
    python predict.py runs/first /dev/video0                # or rtsp://..., until Ctrl-C

An overlay shows the image tinted with the colours of the predicted classes, plus a legend. An index
is a PNG of the same size as the image, and contains the class index of every pixel. The index has 8
bits per pixel, or 16 if the model has more than 256 classes. predict.py overwrites its own earlier
outputs but no other files.

In Python:

    from predict import Segmenter
    segmenter = Segmenter("runs/first/latest-rank0.pt")
    prediction = segmenter("street.jpg")                  # (H, W) class indices
    segmenter.overlay("street.jpg", prediction).show()    # a Pillow image
"""

from __future__ import annotations

from command_lines import CAMERA, parse_predict, start

if __name__ == "__main__":
    start(parse_predict)  # Answer --help and reject bad options before the slow imports.

import argparse
import collections
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpointing.weights import Weights, from_metadata, load_weights
from dataset.decoding import ImageInput, read_image
from errors import ClassError, ModelError, UserError, WeightsError, exit_status, one_line
from extras.prediction_files import check_predictions, find_images, is_video
from extras.prediction_pipeline import segment_images
from extras.video import load_pyav
from extras.video_prediction import segment_camera, segment_video
from files import explain_output
from segmentation.classes import rename_classes
from segmentation.drawing import draw_overlay
from segmentation.views import highest_class, window_starts
from transforms import resize_image

if TYPE_CHECKING:
    from networks.base import Network
    from networks.deeplab import DeepLabV3

log = logging.getLogger(__name__)

# Scales of mmsegmentation's test-time augmentation. Each scale is used with and without a
# horizontal flip.
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class Segmenter:
    """A model that predicts the class of every pixel of an image.

    Images are resized as in mmsegmentation's evaluation on ADE20K. The aspect ratio is kept, and
    the shorter side becomes `size` pixels, unless the longer side would exceed four times this
    size. The class scores are resized back to the image's resolution, and each pixel gets the class
    with the highest score.

    Args:
        path: Path of a Composer checkpoint, a state dict, a safetensors file, or an ONNX file
            written by `export.py`.
        classes: Class names, a file that lists them, or None for the names stored with the model.
            If the model has no names, the defaults of `segmentation.classes.load_classes` are used.
        size: Length of the shorter image side in pixels, or 0 for no resizing. The default is the
            size of the run's validation images, or 512 if that size is unknown.
        tta: Whether to use test-time augmentation, which averages the probabilities over six scales
            (0.5 to 1.75), each with and without a flip.
        slide: Whether to process overlapping square windows instead of the complete image. The side
            of a window is `size` (512 if `size` is 0), and neighbouring windows overlap by a third.
        weights: Weights to use if the file contains both: `"ema"` or `"training"`.
        network: Name of the network. The name is needed if the file does not contain it, or to
            allow a user's own function to run.
        device: Name of the torch device, or None to use a GPU if there is one.
        amp: Whether to run the network in bf16 by autocast.

    Attributes:
        classes: Name and colour of each class.
        recorded_classes: Class names and colours stored in the file, or None.
        names_given: Whether the names in `classes` come from the user.
        config: Config of the run, if the file contains it.

    Raises:
        WeightsError: The file cannot be read, or it belongs to a different network.
        ModelError: The network cannot be built, or the device does not exist.
        ClassError: The class names cannot be read or do not match the model, or the model has more
            than 65,536 classes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        classes: str | Sequence[str] | None = None,
        size: int | None = None,
        tta: bool = False,
        slide: bool = False,
        weights: str = "ema",
        device: str | None = None,
        amp: bool = False,
        network: str | None = None,
    ) -> None:
        self.device, path = find_device(device), os.fspath(path)
        if path.endswith(".onnx"):
            if amp:
                raise WeightsError(
                    f"{path}: --amp does not work with ONNX files, whose precision is fixed; leave "
                    "out --amp"
                )
            self.network, found = _onnx_network(path)
            num_classes = len(found.classes or ())
        else:
            # Import the networks lazily, because the import takes seconds and ONNX files do not
            # need it.
            from checkpointing.rebuild import build_network, complete

            found = complete(load_weights(path, weights), path, network)
            built = build_network(found, path, network)
            self.network = _torch_network(built, self.device, amp)
            num_classes = found.num_classes
        self.config, self.which = found.config, found.which
        self.names_given = classes is not None
        self.recorded_classes = found.classes
        self.classes = rename_classes(classes, num_classes, found.classes, path)
        if len(self.classes) > 2**16:
            raise ClassError(
                f"{path}: the model has {len(self.classes)} classes, but an index PNG supports "
                "at most 65,536"
            )
        self.size = (found.eval_size or 512) if size is None else size
        self.scales = TTA_SCALES if tta else (1.0,)
        self.flips = (False, True) if tta else (False,)
        self.window = max(self.size or 512, 64) // 8 * 8 if slide else 0

    def __call__(self, image: ImageInput) -> np.ndarray:
        """Segment an image.

        Args:
            image: Path, Pillow image, or (H, W, 3) uint8 RGB array.

        Returns:
            (H, W) class indices: uint8, or uint16 if there are more than 256 classes.

        Raises:
            ValueError: The file is not an image.
        """
        dtype = np.uint8 if len(self.classes) <= 256 else np.uint16
        return self.predict([read_image(image)])[0].cpu().numpy().astype(dtype)

    def overlay(self, image: ImageInput, prediction: np.ndarray | None = None) -> Image.Image:
        """Draw the colours of the predicted classes over an image, and add a legend.

        Args:
            image: Path, Pillow image, or (H, W, 3) uint8 RGB array.
            prediction: (H, W) class indices, or None to segment the image first.
        """
        image = read_image(image)
        prediction = self(image) if prediction is None else prediction
        return draw_overlay(image, prediction, self.classes)

    def network_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Return the height and width, for each scale, at which the network processes an image."""
        sizes = []
        for scale in self.scales:
            factor = scale
            # Compute the same size as mmcv.rescale_size, including its rounding.
            if self.size:
                factor *= min(4 * self.size / max(height, width), self.size / min(height, width))
            rows, columns = (max(int(side * factor + 0.5), 1) for side in (height, width))
            # Round the size to a multiple of 8. The windows then align with the grid of the logits,
            # so overlapping logits can be added without resampling.
            if self.window:
                rows, columns = (max(round(side / 8), 1) * 8 for side in (rows, columns))
            sizes.append((rows, columns))
        return tuple(sizes)

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Segment a batch of images for which `network_sizes` returns the same sizes.

        Args:
            images: (H, W, 3) uint8 RGB images, possibly with different H and W.

        Returns:
            The (H, W) int64 class indices of each image, on the segmenter's device.
        """
        views = []
        for size in self.network_sizes(*images[0].shape[:2]):
            resized = [resize_image(image, size) for image in images]
            batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self.device)
            for flip in self.flips:
                logits = self._logits(batch.flip(3) if flip else batch)
                views.append((logits.flip(3) if flip else logits, size))
        return [
            highest_class([(logits[i], size) for logits, size in views], image.shape[:2])
            for i, image in enumerate(images)
        ]

    def _logits(self, batch: Tensor) -> Tensor:
        """Return the logits of uint8 images (N, 3, H, W), averaged where windows overlap."""
        height, width = batch.shape[2:]
        window = self.window
        if not window or (height <= window and width <= window):
            return self.network(batch)
        total, count = None, None
        for top in window_starts(height, window):
            for left in window_starts(width, window):
                part = batch[:, :, top : top + window, left : left + window]
                logits = self.network(part)
                # Resample the logits to stride 8 if they are coarser, or if the window size is not
                # a multiple of the logits' size.
                if logits.shape[2] * 8 < part.shape[2] or part.shape[2] % logits.shape[2]:
                    grid = (part.shape[2] // 8, part.shape[3] // 8)
                    logits = F.interpolate(logits, grid, mode="bilinear", align_corners=False)
                stride = part.shape[2] // logits.shape[2]
                if total is None or count is None:
                    total = logits.new_zeros(*logits.shape[:2], height // stride, width // stride)
                    count = torch.zeros_like(total[:1, :1])
                rows = slice(top // stride, top // stride + logits.shape[2])
                columns = slice(left // stride, left // stride + logits.shape[3])
                total[:, :, rows, columns] += logits
                count[:, :, rows, columns] += 1
        assert total is not None and count is not None
        return total / count


def find_device(name: str | None) -> torch.device:
    """Return the torch device with this name. If the name is None, return a GPU if there is one.

    Raises:
        ModelError: The device does not exist.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise RuntimeError("this device holds no data; use a device such as cpu or cuda")
        torch.empty(1, device=device)
    # Each device backend raises its own types of errors.
    except Exception as error:
        raise ModelError(f"device {name}: {one_line(error).partition('. ')[0]}") from None
    return device


def _torch_network(
    network: DeepLabV3 | Network, device: torch.device, amp: bool
) -> Callable[[Tensor], Tensor]:
    """Move a network to a device; return a function that maps uint8 images to logits."""
    # torch's type stubs omit `memory_format` from the overloads of `to`.
    network.to(device, memory_format=network.memory_format)  # pyrefly: ignore[no-matching-overload]
    mean = torch.tensor(network.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(network.std, device=device).view(1, 3, 1, 1)

    def run(images: Tensor) -> Tensor:
        image = (images.to(torch.float32, memory_format=torch.channels_last) - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            try:
                return network(image)
            except (RuntimeError, ValueError, AssertionError) as error:
                if network.name == "deeplabv3":
                    raise
                height, width = image.shape[2:]
                raise ModelError(
                    f"{network.name} fails on images of {width} x {height} pixels "
                    f"({one_line(error)}); use --slide --size N to process squares of N pixels"
                ) from error

    return run


def _onnx_network(path: str) -> tuple[Callable[[Tensor], Tensor], Weights]:
    """Open an ONNX file; return a function that maps images to logits, and the file's metadata."""
    try:
        import onnxruntime
    except ImportError as error:
        raise WeightsError(
            f"{path}: ONNX files need onnxruntime; run pip install onnxruntime"
        ) from error

    try:
        session = onnxruntime.InferenceSession(
            path, providers=onnxruntime.get_available_providers()
        )
        metadata = session.get_modelmeta().custom_metadata_map
    # The exceptions of onnxruntime have no common base class.
    except Exception as error:
        raise WeightsError(f"{path}: onnxruntime cannot read the file: {error}") from error
    if "classes" not in metadata:
        raise WeightsError(
            f"{path}: the file contains no class names; use a file written by export.py"
        )

    def run(images: Tensor) -> Tensor:
        logits = session.run(None, {"image": images.cpu().numpy()})[0]
        return torch.from_numpy(logits).to(images.device)

    return run, from_metadata(metadata, {})


def main(arguments: list[str]) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 for success, 1 if a file was skipped or the disk is full, or 2 if the
            model or an option is unusable.
    """
    options = parse_predict(arguments)
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    is_camera = bool(CAMERA.fullmatch(options.photos[0]))
    images = [] if is_camera else find_images(options.photos)
    has_videos = any(is_video(path) for path, _ in images)
    out, counts = Path(options.out), collections.Counter()
    try:
        if has_videos or is_camera:
            load_pyav()
        check_predictions(images, options, is_camera)
        segmenter = segmenter_from(options)
        with explain_output(out):
            out.mkdir(parents=True, exist_ok=True)
        if is_camera:
            return segment_camera(segmenter, options)
        files = [(path, out / name) for path, name in images]
        with tqdm(total=len(files), unit="file", disable=len(files) < 2) as progress:
            for outcome in _segment_files(segmenter, files, options):
                counts[outcome] += 1
                progress.update()
    except (UserError, OSError) as error:
        tqdm.write(f"error: {one_line(error)}", sys.stderr)
        return exit_status(error)
    done, what = counts.pop("", 0), "images and videos" if has_videos else "images"
    notes = "".join(f", {count} {how}" for how, count in counts.items())
    print(f"{done} of {len(images)} {what} segmented into {out}/{notes}")
    return 1 if counts or not images else 0


def _segment_files(
    segmenter: Segmenter, files: Sequence[tuple[Path, Path]], options: argparse.Namespace
) -> Iterator[str]:
    """Segment images and videos in order; for each file, yield "" or the error message."""
    for are_videos, group in itertools.groupby(files, lambda file: is_video(file[0])):
        if are_videos:
            for path, target in group:
                yield segment_video(segmenter, path, target, options)
        else:
            yield from segment_images(segmenter, list(group), options.write)


def segmenter_from(options: argparse.Namespace, amp: bool = False) -> Segmenter:
    """Build a Segmenter from the parsed options of predict.py or evaluate.py."""
    names = ("classes", "size", "tta", "slide", "weights", "device", "network")
    return Segmenter(options.model, amp=amp, **{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
