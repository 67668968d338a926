"""Score a checkpoint on a validation set.

    python evaluate.py runs/first                       # best checkpoint, its own validation set
    python evaluate.py weights.safetensors --path ade20k --tta --csv classes.csv --json scores.json
    composer evaluate.py runs/first/latest-rank0.pt     # on every GPU

The protocol `paper` matches mmsegmentation's evaluation on ADE20K, so its scores are comparable
with published tables. Images keep their aspect ratio. An image's shorter side becomes
`eval_dataset.final_size` pixels (512 in mmsegmentation), unless the longer side would exceed four
times this size. Predictions are scored at the resolution of the mask. The protocol `square` matches
the evaluation during training: image and mask are resized to squares of side
`eval_dataset.final_size`. In both protocols, every labelled pixel of every image is counted once,
in a single confusion matrix.
"""

from __future__ import annotations

from command_lines import parse_evaluate, start

if __name__ == "__main__":
    start(parse_evaluate)  # Answer --help and reject bad options before the slow imports.

import argparse
import functools
import json
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from composer.utils import dist, get_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import build_ade20k_dataspec, open_dataset
from errors import UserError, exit_status
from extras.evaluation_data import class_order, data_source
from files import check_outputs, check_writable, write_file, write_image
from predict import Segmenter, segmenter_from
from segmentation.classes import label_warning
from segmentation.metrics import (
    as_percent,
    class_table,
    confused_pairs,
    confusion_matrix,
    confusion_matrix_of_predictions,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    table_as_csv,
)
from training.distributed import full_shared_memory
from training.error_analysis import ErrorAnalysis, draw_confusion, image_name, scores_as_csv

log = logging.getLogger(__name__)

# Maximum number of images held back while collecting batches of equally sized images.
PENDING = 128


def evaluate_paper(
    segmenter: Segmenter,
    dataset: Any,
    index: Tensor,
    batch_size: int,
    num_workers: int = 0,
    analysis: ErrorAnalysis | None = None,
) -> Tensor:
    """Return the confusion matrix of this rank's images, scored at the resolution of their masks.

    Args:
        segmenter: Model to evaluate.
        dataset: Data set whose samples are pairs of an image and its mask, both Pillow images of
            the same size.
        index: Table (256,) that maps each label to its class index, or to -1 if it is ignored.
        batch_size: Maximum number of images per batch. All images in a batch have the same size at
            the network's input.
        num_workers: Number of processes that read and decode images.
        analysis: Error analysis that receives each image with its mask and prediction, or None.

    Returns:
        (C, C) int64 pixel counts of this rank, with a row for each class in the mask and a column
            for each predicted class.
    """
    num_classes = len(segmenter.classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=segmenter.device)
    index = index.to(segmenter.device)
    rank = dist.get_global_rank()
    numbers = range(rank, len(dataset), dist.get_world_size())
    share = Subset(dataset, numbers)
    loader = DataLoader(share, batch_size=None, collate_fn=_as_tensors, num_workers=num_workers)
    progress = tqdm(total=len(share), unit="image", disable=rank != 0)
    samples = ((number, *pair) for number, pair in zip(numbers, loader))
    for group in group_by(samples, batch_size, lambda s: segmenter.network_sizes(*s[2].shape)):
        predictions = segmenter.predict([image.numpy() for _, image, _ in group])
        for prediction, (number, image, labels) in zip(predictions, group):
            target = index[labels.to(segmenter.device).long()]
            counts = confusion_matrix_of_predictions(prediction, target, num_classes)
            matrix += counts
            if analysis is not None:
                analysis.add(number, image.numpy, target, prediction, counts)
        progress.update(len(group))
    progress.close()
    return matrix


def _as_tensors(pair: Sequence[Any]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.array(pair[0])), torch.from_numpy(np.array(pair[1]))


def group_by(
    items: Iterable[Any], count: int, kind: Callable[[Any], Hashable]
) -> Iterator[list[Any]]:
    """Group items by kind into lists of up to `count`, and hold back at most `PENDING` items."""
    waiting: dict[Any, list[Any]] = {}
    for item in items:
        group = waiting.setdefault(kind(item), [])
        group.append(item)
        if len(group) == count:
            yield waiting.pop(kind(item))
        elif sum(map(len, waiting.values())) > PENDING:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


def evaluate_square(segmenter: Segmenter, spec: Any) -> Tensor:
    """Return the confusion matrix of this rank's images, scored as during training.

    Args:
        segmenter: Model to evaluate.
        spec: DataSpec that `data.build_ade20k_dataspec` builds for `split="val"`.

    Returns:
        The confusion matrix; see `evaluate_paper`.
    """
    num_classes = len(segmenter.classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=segmenter.device)
    rank = dist.get_global_rank()
    # The sampler repeats some samples, so that all ranks get the same number of samples. Skip the
    # repetitions.
    left = len(range(rank, len(spec.dataloader.dataset), dist.get_world_size()))
    with torch.inference_mode():
        for image, labels in tqdm(spec.dataloader, unit="batch", disable=rank != 0):
            image, labels = image[:left].to(segmenter.device), labels[:left].to(segmenter.device)
            left -= len(image)
            if len(image):
                target = spec.microbatch_transforms((image, labels))[1]
                matrix += confusion_matrix(segmenter.network(image), target, num_classes)
    return matrix


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Score a checkpoint according to the command-line options.

    Args:
        options: Parsed command line; see `command_lines.parse_evaluate`.

    Returns:
        The result that `--json` writes, with scores in percent. A score is None if no labelled
            pixel contributes to it.
    """
    segmenter = segmenter_from(options, amp=options.amp)
    source, arguments = data_source(options, segmenter)
    order = class_order(options, segmenter, source)
    if options.protocol == "square":
        spec = build_ade20k_dataspec(**arguments, source=source)
        assert isinstance(spec.dataloader, DataLoader)
        dataset = cast(Sized, spec.dataloader.dataset)
        matrix = evaluate_square(segmenter, spec)
    else:
        dataset = open_dataset(source)
        index = torch.from_numpy(source.labels.index())
        # If the data and the model order their classes differently, translate the labels.
        if order is not None:
            index = torch.where(index < 0, index, torch.tensor(order)[index.clamp(0)])
        workers = arguments["num_workers"]
        analysis = None
        if options.per_image or options.worst:
            name = functools.partial(image_name, dataset)
            analysis = ErrorAnalysis(segmenter.classes, name, options.worst or 0)
        matrix = evaluate_paper(segmenter, dataset, index, options.batch_size, workers, analysis)
        if analysis is not None:
            _write_analysis(analysis, options)
    dist.all_reduce(matrix)
    matrix = matrix.cpu()
    if order is not None and options.protocol == "square":
        # The rows are in the class order of the data, but the columns are in that of the model.
        # Reorder the rows to match.
        matrix[order] = matrix.clone()
    if options.confusion and dist.get_global_rank() == 0:
        write_image(options.confusion, draw_confusion(matrix.numpy(), segmenter.classes))
    warning = label_warning((matrix.sum(1) > 0).tolist(), segmenter.classes, "validation mask")
    if warning and dist.get_global_rank() == 0:
        log.warning("%s: %s", source.path, warning)
    columns, rows = class_table(matrix, segmenter.classes)
    return {
        "mIoU": as_percent(mean_iou(matrix)),
        "mean_accuracy": as_percent(mean_accuracy(matrix)),
        "pixel_accuracy": as_percent(pixel_accuracy(matrix)),
        "photos": len(dataset),
        "checkpoint": options.model,
        "weights": segmenter.which,
        "data": source.path,
        "protocol": options.protocol,
        "tta": options.tta,
        "slide": options.slide,
        "size": segmenter.size,
        "classes": [dict(zip(columns, row)) for row in rows],
        "confused": [
            {
                "class": segmenter.classes[true].name,
                "predicted": segmenter.classes[predicted].name,
                "pixels": pixels,
                "share": share,
            }
            for true, predicted, pixels, share in confused_pairs(matrix, 10)
        ],
    }


def _write_analysis(analysis: ErrorAnalysis, options: argparse.Namespace) -> None:
    """Write the scores of each image, and draw the images with the lowest scores."""
    scores = analysis.gather()
    if options.per_image and dist.get_global_rank() == 0:
        write_file(options.per_image, scores_as_csv(scores, analysis.classes))
    if options.worst:
        analysis.draw(scores, Path(options.out))


def report(result: dict[str, Any], with_pairs: bool = False) -> str:
    """Return the result as text, with a table of the classes and the three overall scores.

    Args:
        result: Result of `evaluate`.
        with_pairs: Whether to list the most frequently confused pairs of classes.
    """

    def percent(value: float | None, width: int = 7) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.2f}"

    width = max(len(row["class"]) for row in result["classes"])
    lines = [f"{'class':{width}}     IoU  accuracy  share of pixels"]
    total = sum(row["pixels"] for row in result["classes"]) or 1
    for row in result["classes"]:
        share = 100 * row["pixels"] / total
        iou, accuracy = percent(row["IoU"]), percent(row["accuracy"])
        lines.append(f"{row['class']:{width}} {iou}   {accuracy}   {share:13.2f}")
    how = ", ".join(
        [f"protocol {result['protocol']}", f"{result['weights']} weights"]
        + [f"shorter side {result['size'] or 'unchanged'}"] * (result["protocol"] == "paper")
        + [name for name in ("tta", "slide") if result[name]]
    )
    lines += [
        "",
        f"{result['photos']} images of {result['data']}, {how}",
        f"mIoU {percent(result['mIoU'], 0)}   "
        f"mean accuracy {percent(result['mean_accuracy'], 0)}   "
        f"pixel accuracy {percent(result['pixel_accuracy'], 0)}",
    ]
    if with_pairs:
        lines += ["", "confused most, by pixels:"]
        for pair in result["confused"]:
            share = f"{pair['pixels']:,} pixels, {pair['share']:.1f}% of {pair['class']}"
            lines.append(f"  {pair['class']} predicted as {pair['predicted']}: {share}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 for success, 1 for a full disk, or 2 for unusable input."""
    options = parse_evaluate(arguments)
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    if dist.get_world_size() > 1:
        allows_tf32 = torch.backends.cuda.matmul.allow_tf32
        dist.initialize_dist(get_device("cpu" if options.device == "cpu" else None))
        # Composer's get_device() enables TF32. Restore the previous setting, so that the scores
        # match those of a single process.
        torch.backends.cuda.matmul.allow_tf32 = allows_tf32
        if torch.cuda.is_available() and options.device is None:
            options.device = f"cuda:{dist.get_local_rank()}"
    try:
        # Check the output paths first, so that a long evaluation does not fail when it writes its
        # results.
        outputs = [options.csv, options.json, options.per_image, options.confusion]
        outputs = [path for path in outputs if path]
        inputs = (options.model, options.data, options.config, options.classes)
        check_outputs(outputs, [path for path in inputs if path])
        for path in outputs:
            check_writable(path)
        result = evaluate(options)
        if dist.get_global_rank() == 0:
            print(report(result, with_pairs=bool(options.confusion)))
            if options.csv:
                rows = [list(row.values()) for row in result["classes"]]
                write_file(options.csv, table_as_csv(list(result["classes"][0]), rows))
            if options.json:
                write_file(options.json, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except (UserError, OSError) as error:
        if dist.get_local_rank() == 0:
            print(f"error: {full_shared_memory(error) or error}", file=sys.stderr)
        return exit_status(error)
    except RuntimeError as error:
        full = full_shared_memory(error)
        if full is None:
            raise
        print(f"error: {full}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
