"""Export a checkpoint for deployment, with everything inside that a program needs to use it.

    python export.py runs/first --to onnx                           # its best, as first.onnx
    python export.py runs/first/latest-rank0.pt --weights-only      # latest-rank0.safetensors

| format        | loaded with                          | needs                         |
|---------------|--------------------------------------|-------------------------------|
| `onnx`        | `onnxruntime`                        | neither PyTorch nor this code |
| `torchscript` | `torch.jit.load`                     | PyTorch                       |
| `pt2`         | `torch.export.load`                  | PyTorch                       |
| `safetensors` | `checkpointing.weights.load_weights` | this code; to train on        |

The first three take `image`, (N, 3, H, W) uint8 RGB of any N, H and W, and give `logits`,
(N, C, H, W) float32; normalisation and upsampling are inside. All have metadata: `classes`, a JSON
list of names and colours; `config`, the run's; `size`, at which it was validated; `mean` and `std`,
of the normalisation. Each is compared with the PyTorch model on a photo before the export counts as
done.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpointing.weights import load_weights, save_weights, to_metadata
from dataset.decoding import read_photo
from errors import one_line
from model import DeepLabV3, build_network
from predict import add_network_option
from segmentation.classes import load_classes
from segmentation.network import Network
from transforms import resize_image

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2", "safetensors": ".safetensors"}
OPSET = 17  # of 2022; every onnxruntime since 1.12 reads it
MIN_AGREEMENT, MAX_DIFFERENCE = 0.999, 1e-3


class Deployed(nn.Module):
    """A network with its normalisation before and its upsampling after.

    Shape:
        image (N, 3, H, W) uint8 RGB -> logits (N, C, H, W) float32
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: DeepLabV3 | Network) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(network.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of the image's size."""
        logits = self.network((image.float() - self.mean) / self.std)
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def export(
    model: Deployed, kind: str, path: Path, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    """Write a model in one of the formats.

    Args:
        model: In evaluation mode, on the CPU.
        kind: `"onnx"`, `"torchscript"` or `"pt2"`.
        path: Where to.
        metadata: What the file says of itself.

    Returns:
        The file's own function from image to logits, loaded from it again.
    """
    example = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    exporters = {"onnx": _export_onnx, "torchscript": _export_torchscript, "pt2": _export_pt2}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracers warn of what the comparison then settles
        return exporters[kind](model, example, path, metadata)


def _export_onnx(
    model: nn.Module, example: Tensor, path: Path, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    any_size = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        model,
        (example,),
        str(path),
        dynamo=False,  # the other exporter needs onnxscript, and gives no smaller or faster file
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": any_size, "logits": any_size},
    )
    written = onnx.load(path)
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _export_torchscript(
    model: nn.Module, example: Tensor, path: Path, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    traced = cast(torch.jit.ScriptModule, torch.jit.trace(model, example, check_trace=False))
    traced.save(str(path), _extra_files=metadata)
    return torch.jit.load(str(path))


def _export_pt2(
    model: nn.Module, example: Tensor, path: Path, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    torch.export.save(program, str(path), extra_files=metadata)
    return torch.export.load(str(path)).module()


def compare(
    model: Deployed, exported: Callable[[Tensor], Tensor], photo: np.ndarray, size: int
) -> tuple[float, float]:
    """How an exported file differs from the model it was made of.

    It sees the photo in two sizes, neither of them the example's, and in one of them twice in a
    batch, the second time mirrored.

    Args:
        model: The PyTorch model.
        exported: The file's function.
        photo: (H, W, 3) uint8 RGB.
        size: Length of the photo's shorter side, in pixels.

    Returns:
        The share of pixels with the same class, and the largest difference of a logit, relative to
        the largest logit where that is above 1.
    """
    same, pixels, difference, largest = 0, 0, 0.0, 1.0
    for shorter, count in ((size, 1), (size * 5 // 8 + 3, 2)):
        factor = shorter / min(photo.shape[:2])
        height, width = (max(round(side * factor), 1) for side in photo.shape[:2])
        image = torch.from_numpy(resize_image(photo, (height, width)).copy()).permute(2, 0, 1)
        batch = torch.stack([image, image.flip(2)][:count])
        with torch.no_grad():
            expected, found = model(batch), exported(batch)
        if found.shape != expected.shape:
            return 0.0, float("inf")
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        pixels += expected[:, 0].numel()
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return same / pixels, difference / largest


def main(arguments: list[str]) -> int:
    """Run the command line; return 1 if the file is not as the model, 2 if that cannot be used."""
    options = _parse(arguments)
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if options.to == "onnx" and missing:
        print(f"error: --to onnx needs more: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    model = Path(options.model)
    name = model.resolve().name if model.is_dir() else model.stem
    path = Path(options.out or f"{name}{SUFFIXES[options.to]}")
    try:
        weights = load_weights(options.model, options.weights)
        classes = weights.classes
        if options.classes or classes is None:
            classes = load_classes(options.classes, weights.num_classes)
        network = build_network(weights, options.model, options.network)
        photo = read_photo(options.photo or _sample_photo())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"{{}}: {weights.num_classes} classes, {weights.which} weights, {{:.0f}} MB"
    config = weights.config
    if config is None and isinstance(network, Network):  # which the user named
        model = {"name": network.name, "arguments": network.arguments}
        config = {"model": model | {"num_classes": weights.num_classes}}
    # In the metadata of every format, of RGB values from 0 to 255.
    said = {"mean": json.dumps(network.mean), "std": json.dumps(network.std)}
    if options.to == "safetensors":
        save_weights(path, weights.state, config, classes, weights.which, said)
        print(size.format(path, os.path.getsize(path) / 1e6))
        return 0
    model = Deployed(network).eval()
    metadata = to_metadata(config, classes, weights.which) | said
    try:
        exported = export(model, options.to, path, metadata)
        agreement, difference = compare(model, exported, photo, options.size)
    except Exception as error:  # an exporter's own, of any kind
        if isinstance(network, DeepLabV3):
            raise
        path.unlink(missing_ok=True)
        reason = f"{network.name} cannot be exported as {options.to}: {one_line(error)[:300]}"
        print(f"error: {reason}", file=sys.stderr)
        return 1
    print(size.format(path, os.path.getsize(path) / 1e6))
    good = agreement >= MIN_AGREEMENT and difference <= MAX_DIFFERENCE
    verdict = "as" if good else "NOT as"
    print(
        f"{verdict} in PyTorch: {agreement:.4%} of the pixels have the same class, "
        f"logits differ by {difference:.1e} at most"
    )
    return 0 if good else 1


def _sample_photo() -> str:
    """Return a photo to compare on where none is given: one that matplotlib brings."""
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a checkpoint for deployment.")
    parser.add_argument("model", help="run's folder, checkpoint (.pt) or weights (.safetensors)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to", choices=SUFFIXES, help="format")
    kind.add_argument(
        "--weights-only",
        dest="to",
        action="store_const",
        const="safetensors",
        help="as --to safetensors: the weights and the run's config",
    )
    parser.add_argument("--out", metavar="FILE", help="default: the checkpoint's name, here")
    parser.add_argument("--photo", help="photo to compare on; default: one that matplotlib brings")
    parser.add_argument("--size", type=int, default=512, help="its shorter side; default: 512")
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one a line, or CSV with colours"
    )
    parser.add_argument(
        "--weights", choices=("ema", "training"), default="ema", help="default: ema"
    )
    add_network_option(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
