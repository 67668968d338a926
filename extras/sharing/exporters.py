"""Exporters that write a network to a file that runs without this project's code."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpointing.weights import Weights
from files import write_file
from networks.base import Network
from networks.deeplab import DeepLabV3
from segmentation.classes import ClassInfo

# ONNX operator set that onnxruntime has supported since version 1.12 (2022).
OPSET = 17


@dataclass(frozen=True)
class Source:
    """The model and the other data that an export needs.

    Attributes:
        name: Name of the run, or of the weights file if the run is unknown.
        weights: Weights as read from the file.
        network: Network that contains these weights.
        classes: Name and colour of each class.
        image: (H, W, 3) uint8 RGB image for the comparison.
    """

    name: str
    weights: Weights
    network: DeepLabV3 | Network
    classes: list[ClassInfo]
    image: np.ndarray

    @property
    def input_size(self) -> int:
        """The length of an image's shorter side as it enters the network, in pixels."""
        return self.weights.eval_size or 512  # predict.py has the same default.

    @property
    def normalisation(self) -> dict[str, str]:
        """The metadata for normalising RGB values, which range from 0 to 255."""
        return {"mean": json.dumps(self.network.mean), "std": json.dumps(self.network.std)}


class Deployed(nn.Module):
    """A network that includes the normalisation of its input and the upsampling of its logits.

    Args:
        network: The network.
        upsample: Whether to upsample the logits to the size of the image.

    Shape:
        Input: image (N, 3, H, W), uint8 RGB.

        Output: float32 logits (N, C, H, W). Without `upsample`, the logits keep the network's own
            resolution (N, C, h, w). A `Network` that pads its input always returns (N, C, H, W).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: DeepLabV3 | Network, upsample: bool = True) -> None:
        super().__init__()
        if isinstance(network, Network):
            network.always_pads = True
        self.network = network
        self.upsample = upsample
        self.register_buffer("mean", torch.tensor(network.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of an image.

        Args:
            image: (N, 3, H, W) uint8 RGB.
        """
        logits = self.network((image.float() - self.mean) / self.std)
        if not self.upsample:
            return logits
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def compare(
    model: Deployed, exported: Callable[[Tensor], Tensor], image: np.ndarray, size: int
) -> tuple[float, float]:
    """Compare an exported file with the original PyTorch model.

    Both models run on the image at two sizes that differ from the exporter's example input. At the
    second size, the batch also contains the mirrored image.

    Args:
        model: PyTorch model.
        exported: Function that runs the exported file on images.
        image: (H, W, 3) uint8 RGB.
        size: Length of the image's shorter side, in pixels.

    Returns:
        The share of pixels with the same class, and the largest difference between logits. If the
            largest logit exceeds 1, the difference is relative to it.
    """
    same, pixels, difference, largest = 0, 0, 0.0, 1.0
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    for shorter, count in ((size, 1), (size * 5 // 8 + 3, 2)):
        factor = shorter / min(image.shape[:2])
        sides = [max(round(side * factor), 1) for side in image.shape[:2]]
        resized = F.interpolate(tensor, sides, mode="bilinear", antialias=True).round().byte()
        batch = torch.cat([resized, resized.flip(3)][:count])
        with torch.no_grad():
            expected, found = model(batch), exported(batch)
        if found.shape != expected.shape or not found.isfinite().all():
            return 0.0, float("inf")
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        pixels += expected[:, 0].numel()
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return same / pixels, difference / largest


def export(
    model: Deployed,
    kind: str,
    path: str | os.PathLike[str],
    metadata: dict[str, str],
    half: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Export a model to a file.

    Args:
        model: The model, in evaluation mode and on the CPU.
        kind: Format of the file: `"onnx"`, `"torchscript"` or `"pt2"`.
        path: Path of the file.
        metadata: Metadata to store in the file.
        half: Whether an ONNX file stores the weights as float16. The exported file still computes
            in float32.

    Returns:
        A function that maps images to logits, loaded from the exported file.

    Raises:
        OutputError: The disk is full.
    """
    example = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    onnx = functools.partial(_export_onnx, half=half)
    exporters = {"onnx": onnx, "torchscript": _export_torchscript, "pt2": _export_pt2}
    loaders = {"onnx": _load_onnx, "torchscript": torch.jit.load, "pt2": _load_pt2}
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns about possible differences. Silence it, because export.py compares the
        # exported model with the PyTorch model.
        warnings.simplefilter("ignore")
        # Export to memory, because torch's own file writers kill the process when the disk is full.
        with _variable_sizes():
            data = exporters[kind](model, example, metadata)
        write_file(path, data)
        return loaders[kind](os.fspath(path))


def _export_onnx(model: Deployed, example: Tensor, metadata: dict[str, str], half: bool) -> bytes:
    import onnx

    data = io.BytesIO()
    any_size = {0: "batch", 2: "height", 3: "width"}
    grid = any_size if model.upsample else {0: "batch", 2: "rows", 3: "columns"}
    # Use the older exporter. The new one, called dynamo, needs onnxscript, and its files are
    # neither smaller nor faster.
    with _ResizingByMatrices():
        torch.onnx.export(
            model,
            (example,),
            # The function accepts open files, although its type annotation omits them.
            data,  # pyrefly: ignore[bad-argument-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": any_size, "logits": grid},
        )
    exported = onnx.load_model_from_string(data.getvalue())
    onnx.helper.set_model_props(exported, metadata)
    if half:
        _store_as_half(exported.graph)
    return exported.SerializeToString()


@contextlib.contextmanager
def _variable_sizes() -> Iterator[None]:
    """Make the rotary position embeddings of timm's DINOv3 adapt to the size of each image.

    timm converts sizes with `float`, which would fix the example's size in the exported graph.
    """
    module: Any = sys.modules.get("timm.layers.pos_embed_sincos", types.SimpleNamespace())
    module.float = lambda size: size if isinstance(size, Tensor) else torch.sym_float(size)
    try:
        yield
    finally:
        del module.float


class _ResizingByMatrices(TorchFunctionMode):
    """A context that computes antialiased bicubic resizes as matrix products.

    Vision transformers resize their position embeddings in this way, but torch's exporter does not
    support the operation. Matrix products work in every ONNX runtime and for every image size.
    """

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_ours = kwargs.get("mode") == "bicubic" and kwargs.get("antialias")
        size = kwargs.get("size")
        if func is F.interpolate and is_ours and isinstance(size, Sequence):
            image = args[0]
            rows, columns = (_bicubic_weights(*sides) for sides in zip(image.shape[2:], size))
            return rows @ image @ columns.T
        return func(*args, **kwargs)


def _bicubic_weights(old: int, new: int) -> Tensor:
    """Return the weights (new, old) of an antialiased bicubic resize of one side, as in torch.

    The filter is Pillow's: a cubic convolution with a = -0.5, widened when the side shrinks. It was
    published by Keys in "Cubic Convolution Interpolation for Digital Image Processing" (1981).
    """
    scale = torch.as_tensor(old / new)
    centres = (torch.arange(new) + 0.5) * scale
    offsets = torch.arange(old) + 0.5 - centres[:, None]
    x = (offsets / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def _store_as_half(graph: Any) -> None:
    """Store the large tensors of an ONNX graph as float16, each with a cast back to float32.

    onnxruntime computes the casts once, when it loads the file. Small tensors, such as biases and
    the normalisation, stay float32.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) < 1024:
            continue
        name, stored = tensor.name, f"{tensor.name}.half"
        with np.errstate(over="ignore"):  # If a weight overflows, `compare` rejects the file.
            weights = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(weights, stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _load_onnx(path: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _export_torchscript(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    traced = cast(torch.jit.ScriptModule, torch.jit.trace(model, example, check_trace=False))
    return traced.save_to_buffer(_extra_files=metadata)


def _export_pt2(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    dynamic = torch.export.Dim.DYNAMIC  # pyrefly: ignore[missing-attribute]
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    data = io.BytesIO()
    torch.export.save(program, data, extra_files=metadata)
    return data.getvalue()


def _load_pt2(path: str) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()
