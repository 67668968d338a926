"""Compare the images per second of predict.py and evaluate.py with those of other programs.

    python -m benchmarks.predict                # two minutes on two cores
    python -m benchmarks.predict --images 64 --rounds 5 --json result.json

All programs run the same network, SegFormer-B0 with random weights and 150 classes, in fp32 on the
same images. A second network returns stored scores at almost no cost, so its rows show the speed of
reading, upsampling, drawing and writing alone. The other programs are:

- mmsegmentation: `inference_segmentor`, and `show_result` to draw and write the picture.
- transformers: the `image-segmentation` pipeline, which returns one mask per class and neither
  draws nor writes a picture.
- plain loop: Pillow, `F.interpolate`, `argmax`, and a picture of blended colours.

predict.py also draws outlines, class names and a legend. evaluate.py reads masks and scores the
predictions instead of drawing them. The times do not include loading the network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.dataloader import make_data
from checkpointing.weights import save_weights
from data import open_dataset
from dataset.description import ade20k
from dataset.labels import Labels
from dataset.source import DataSource
from evaluate import evaluate_paper
from extras.prediction_pipeline import segment_images
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from networks.mmseg_operators import import_mmseg
from predict import Segmenter

CLASSES = 150
PALETTE = np.random.default_rng(0).integers(0, 256, (CLASSES, 3), dtype=np.uint8)
# Maps each network's title to the function in this module that builds the network.
NETWORKS = {"SegFormer-B0": "segformer", "no cost": "no_cost"}

Contender = Callable[[Sequence[Path], Path], None]


def segformer(num_classes: int) -> Any:
    """Build transformers' SegFormer-B0 with the same random weights each time."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig()
    config.num_labels = num_classes
    return SegformerForSemanticSegmentation(config)


class StoredScores(nn.Module):
    """A network that returns the same smooth scores for every image, at a quarter of its size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        coarse = torch.randn(1, num_classes, 6, 8, generator=torch.Generator().manual_seed(0))
        self.coarse = nn.Parameter(3 * coarse, requires_grad=False)
        self.scores: Tensor | None = None

    def forward(self, pixel_values: Tensor) -> Any:
        """Return the scores of images (N, 3, H, W) in transformers' format."""
        from transformers.modeling_outputs import SemanticSegmenterOutput

        height, width = pixel_values.shape[2] // 4, pixel_values.shape[3] // 4
        if self.scores is None or self.scores.shape[2:] != (height, width):
            self.scores = F.interpolate(self.coarse, (height, width), mode="bicubic")
        logits: Any = self.scores.expand(len(pixel_values), -1, -1, -1)
        return SemanticSegmenterOutput(logits=logits)


def no_cost(num_classes: int) -> nn.Module:
    """Build a network that returns stored scores at almost no cost."""
    return StoredScores(num_classes)


def predict_py(segmenter: Segmenter) -> Contender:
    """Return a function that runs the pipeline of predict.py."""

    def run(paths: Sequence[Path], out: Path) -> None:
        files = [(path, out / path.stem) for path in paths]
        assert not any(segment_images(segmenter, files, ["overlay"]))

    return run


def evaluate_py(segmenter: Segmenter, root: Path, workers: int) -> Contender:
    """Return a function that runs evaluate.py's evaluation on the given number of images."""
    source = DataSource(str(root), "val", ade20k(Labels(CLASSES)))
    index = torch.from_numpy(source.labels.index())

    def run(paths: Sequence[Path], out: Path) -> None:
        dataset: Any = open_dataset(source)
        dataset.samples = dataset.samples[: len(paths)]
        with contextlib.redirect_stderr(io.StringIO()):  # Hide the progress bar.
            evaluate_paper(segmenter, dataset, index, 8, workers)

    return run


def mmsegmentation(network: nn.Module, size: tuple[int, int]) -> Contender:
    """Return a function that runs mmsegmentation's inference and drawing with the given network."""
    import_mmseg()
    import mmcv
    from mmseg.apis import inference_segmentor
    from mmseg.models.segmentors import EncoderDecoder
    from mmseg.models.segmentors.base import BaseSegmentor

    class Segmentor(EncoderDecoder):
        def __init__(self) -> None:
            BaseSegmentor.__init__(self)
            self.network, self.align_corners, self.out_channels = network, False, CLASSES
            self.test_cfg = mmcv.Config({"mode": "whole"})
            self.CLASSES, self.PALETTE = [str(k) for k in range(CLASSES)], PALETTE

        def encode_decode(self, img: Tensor, img_metas: Any) -> Tensor:
            logits = self.network(img).logits
            return F.interpolate(logits, img.shape[2:], mode="bilinear", align_corners=False)

    norm = {"mean": IMAGENET_CHANNEL_MEAN, "std": IMAGENET_CHANNEL_STD, "to_rgb": True}
    steps = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", **norm},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    scale = {"img_scale": (4 * min(size), min(size)), "flip": False, "transforms": steps}
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "MultiScaleFlipAug", **scale}]
    segmentor: Any = Segmentor().eval()
    segmentor.cfg = mmcv.Config({"data": {"test": {"pipeline": pipeline}}})

    def run(paths: Sequence[Path], out: Path) -> None:
        for path in paths:
            result = inference_segmentor(segmentor, str(path))
            segmentor.show_result(str(path), result, out_file=str(out / f"{path.stem}.jpg"))

    return run


def transformers(network: nn.Module, size: tuple[int, int], device: torch.device) -> Contender:
    """Return a function that runs transformers' pipeline with the given network."""
    from transformers import SegformerImageProcessor, pipeline

    model = segformer(CLASSES)
    model.forward = network.forward
    processor = SegformerImageProcessor(size={"height": size[0], "width": size[1]})
    segment: Any = pipeline(
        "image-segmentation", model=model, image_processor=processor, device=device
    )

    def run(paths: Sequence[Path], out: Path) -> None:
        for path in paths:
            segment(str(path))

    return run


def plain_loop(network: nn.Module, device: torch.device) -> Contender:
    """Return a function that segments images in a plain loop, as a user would write it."""
    mean = torch.tensor(IMAGENET_CHANNEL_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_CHANNEL_STD, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def run(paths: Sequence[Path], out: Path) -> None:
        for path in paths:
            image = np.array(Image.open(path).convert("RGB"))
            batch = torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float()
            logits = network((batch - mean) / std).logits
            logits = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
            classes = logits.argmax(1)[0].cpu().numpy()
            picture = (0.5 * image + 0.5 * PALETTE[classes]).astype(np.uint8)
            Image.fromarray(picture).save(out / f"{path.stem}.jpg")

    return run


def build_contenders(build: str, root: Path, args: argparse.Namespace) -> dict[str, Contender]:
    """Return all programs. Each one uses its own network, built by the function named `build`."""
    name, weights = f"benchmarks.predict:{build}", root / f"{build}.safetensors"
    network = globals()[build](CLASSES).eval()
    save_weights(weights, network.state_dict(), {"model": {"name": name, "num_classes": CLASSES}})
    size, workers = (args.size, args.size * 4 // 3), max(torch.get_num_threads() - 1, 1)
    segmenter = Segmenter(weights, network=name, size=args.size, device=args.device)
    device = segmenter.device
    network.to(device)
    return {
        "predict.py": predict_py(segmenter),
        "evaluate.py": evaluate_py(segmenter, root, workers),
        "mmsegmentation": mmsegmentation(network, size),
        "transformers": transformers(network, size, device),
        "plain loop": plain_loop(network, device),
    }


def images_per_second(run: Contender, paths: Sequence[Path], out: Path) -> float:
    """Return the throughput of one pass over the images."""
    start = time.perf_counter()
    run(paths, out)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(paths) / (time.perf_counter() - start)


@harness.quiet()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the measurements that the command line selects, and print them as a table."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--images", type=int, default=6, help="images per pass (default: 6)")
    parser.add_argument("--rounds", type=int, default=3, help="passes per program (default: 3)")
    parser.add_argument("--size", type=int, default=512, help="height of the images (default: 512)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args(argv)
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder), Path(folder, "out")
        out.mkdir()
        make_data(root, args.images, "val", (args.size, args.size * 4 // 3))
        paths = sorted((root / "images/validation").iterdir())
        columns = ("network", "program", "images/s (median)", "least", "most", "predict.py / it")
        table = harness.Table(*columns)
        for label, build in NETWORKS.items():
            contenders = build_contenders(build, root, args)
            # Process one image first, so that libraries are loaded and kernels are chosen before
            # the measurement.
            for run in contenders.values():
                run(paths[:1], out)
            measures = {
                name: partial(images_per_second, run, paths, out)
                for name, run in contenders.items()
            }
            rates[label] = harness.in_turn(measures, args.rounds)
            ours = statistics.median(rates[label]["predict.py"])
            for name, found in rates[label].items():
                median = statistics.median(found)
                numbers = (f"{n:.2f}" for n in (median, min(found), max(found), ours / median))
                table.add(label, name, *numbers)
    result = table.result() | {"arguments": vars(args), "images_per_second": rates}
    harness.write_json(args, result)
    return result


if __name__ == "__main__":
    main()
