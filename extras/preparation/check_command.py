"""A data set check that decodes every file and counts every label before training.

    python data.py PATH                          # folders in ADE20K's layout, or MDS shards
    python data.py my.yaml                       # folders as described in the file
    python data.py FOLDER --suggest              # write a description of the folder
    python data.py s3://bucket/ade20k /tmp/mds   # shards in a store, kept in a local folder
    python data.py PATH --num-classes 11 --picture sheet.png

The report shows the image sizes, the classes and the loader's speed on this machine. The report
lists problems, which prevent training, and oddities, which do not. The exit status is 0 if training
would work, 1 if it would fail, and 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
from composer.core import DataSpec
from torch import Tensor
from torch.utils.data import DataLoader

from command_lines import parse_data
from dataset.description import SPLITS, ade20k, is_description, open_description
from dataset.labels import Labels
from dataset.sampler import EpochSampler
from dataset.shard_classes import shard_description
from dataset.source import DataSource, ShardOptions
from dataset.workers import available_cores
from errors import DataError, UserError
from extras.preparation.check_report import as_text
from extras.preparation.suggest import suggest
from extras.preparation.unused import find_unused
from extras.preparation.verify import Tally, check
from files import check_outputs, check_writable, is_remote, write_file, write_image
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from segmentation.classes import ClassInfo, rename_classes
from segmentation.drawing import sample_sheet

log = logging.getLogger(__name__)

SPEED_SECONDS, SPEED_BATCH = 5, 16

BuildDataspec = Callable[..., DataSpec]  # Type of `data.build_ade20k_dataspec`.


def measure_loader(
    build_dataspec: BuildDataspec, source: DataSource, samples: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Measure the speed of the training loader on this machine, and return its first batch.

    Args:
        build_dataspec: The function `data.build_ade20k_dataspec`.
        source: The training split of the data set.
        samples: Number of samples in the split.

    Returns:
        The measurements, and the first batch as the model receives it. The images are (N, H, W, 3)
        uint8 with augmented colours. The class indices are (N, H, W), with -1 for ignored pixels.
    """
    spec = build_dataspec(source.path, batch_size=min(SPEED_BATCH, samples), source=source)
    loader = spec.dataloader
    assert isinstance(loader, DataLoader)
    rate, _, first = loader_rate(loader, SPEED_SECONDS)
    figures = {
        "images_per_second": round(rate, 1),
        "workers": loader.num_workers,
        "batches": [[list(image.shape), list(target.shape)] for image, target in first],
    }
    cast(EpochSampler, loader.sampler).set_epoch(0)  # The colour distortion depends on the epoch.
    images, targets = spec.microbatch_transforms(first[0])
    images = images.permute(0, 2, 3, 1).numpy() * IMAGENET_CHANNEL_STD + IMAGENET_CHANNEL_MEAN
    return figures, (images.round().clip(0, 255).astype(np.uint8), targets.numpy())


def loader_rate(
    loader: DataLoader, seconds: float, last: float = math.inf
) -> tuple[float, int, list[tuple[Tensor, Tensor]]]:
    """Measure how fast a training loader is with no model to slow it down.

    Args:
        loader: The training loader.
        seconds: Duration of the measurement.
        last: Index of the batch after which the measurement stops, even if time is left.

    Returns:
        Images per second, the index of the last batch, and the first three batches.
    """
    # Do not count batches that the workers may have prepared before the clock started.
    warm = 1 + 2 * loader.num_workers
    first: list[tuple[Tensor, Tensor]] = []
    seen, number, began = 0, 0, 0.0
    with contextlib.closing(batches(loader)) as given:
        for number, batch in enumerate(given):
            if len(first) < 3:
                first.append(batch)
            seen += len(batch[0]) if began else 0
            if seen and (time.perf_counter() - began > seconds or number >= last):
                break
            if number == warm:
                began = time.perf_counter()
    return seen / (time.perf_counter() - began), number, first


def batches(loader: DataLoader) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches of a training loader, epoch after epoch.

    Closing the generator stops the worker processes.

    Args:
        loader: The training loader.
    """
    sampler = cast(EpochSampler, loader.sampler)
    try:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from loader
    finally:
        # Stop the workers explicitly, because garbage collection would wait 5 s per worker.
        loader._iterator = None


def summarise(tally: Tally, labels: Labels, classes: list[ClassInfo]) -> dict[str, Any]:
    """Summarise the counts, image sizes and class shares of a split for the JSON report.

    Args:
        tally: Counts of the split.
        labels: Meaning of the labels.
        classes: Names of the classes.
    """
    sides = np.array(tally.sizes or [(0, 0)])
    area = sides.prod(1) / 1e6
    is_class = labels.classes()
    labelled, every = max(tally.pixels[is_class].sum(), 1), max(tally.pixels.sum(), 1)
    return {
        "photos": tally.images,
        "masks": tally.masks,
        "good_pairs": len(tally.sizes),
        "size": {
            "width_mean": round(float(sides[:, 0].mean()), 1),
            "height_mean": round(float(sides[:, 1].mean()), 1),
            "shortest_side": int(sides.min()),
            "longest_side": int(sides.max()),
            "megapixels_mean": round(float(area.mean()), 4),
            "megapixels_90_percent_below": round(float(np.quantile(area, 0.9)), 4),
            "megapixels_largest": round(float(area.max()), 4),
        },
        "unlabelled": round(float(1 - tally.pixels[is_class].sum() / every), 6),
        "classes": [
            {
                "label": int(label),
                "name": classes[label - labels.first].name,
                "share": round(float(tally.pixels[label] / labelled), 8),
                "photos": int(tally.present[label]),
            }
            for label in np.flatnonzero(is_class)
        ],
    }


def validate(
    build_dataspec: BuildDataspec, source: DataSource, options: argparse.Namespace
) -> dict[str, Any]:
    """Check a data set and return the report.

    Args:
        build_dataspec: Function that builds the training loader to measure.
        source: The training split of the data set.
        options: Command-line options.

    Returns:
        The report that `--json` prints. Its list `problems` is empty if training would work.

    Raises:
        DataError: The path does not exist.
    """
    description, labels = source.description, source.labels
    is_described = description.built_in is None
    described = description.classes if is_described else None
    classes = rename_classes(options.class_names, labels.num_classes, described, "the description")
    if "://" not in source.path and not Path(source.path).is_dir():
        raise DataError(f"folder {source.path} does not exist; check the path")
    picture = options.picture
    # The picture must not overwrite an image or a mask of the data set.
    if picture:
        check_outputs([picture], [] if source.shards else _sample_files(source))
        check_writable(picture)
    tallies = check(source, options.workers)
    findings = [finding for tally in tallies.values() for finding in sorted(tally.findings)]
    unused = None
    if source.shards is None:
        # Skip the pictures that this command and earlier runs with `--suggest` have written.
        drawn = [picture] if picture else []
        if is_description(options.path):
            drawn.append(str(Path(options.path).with_suffix(".png")))
        unused = find_unused(source, drawn)
        findings += unused.findings()
    both = tallies["train"].names_by_hash.keys() & tallies["val"].names_by_hash.keys()
    loader = None
    if any(finding.fatal for finding in tallies["train"].findings):
        skipped = "the loader is not measured"
        if picture:
            skipped += ", and no picture is drawn"
        log.warning("%s, because training would fail; see PROBLEMS", skipped)
    else:
        loader, batch = measure_loader(build_dataspec, source, len(tallies["train"].sizes))
        if picture:
            write_image(picture, sample_sheet(*batch, classes))
    layout = "folders as described" if is_described else "folders in ADE20K's layout"
    return {
        "path": source.path,
        "format": "MDS shards" if source.shards else layout,
        "described": is_described,
        "num_classes": labels.num_classes,
        "splits": {name: summarise(tally, labels, classes) for name, tally in tallies.items()},
        "unused": unused.counts if unused else {},
        "in_both_splits": len(both),
        "loader": loader,
        "oddities": [{"path": f.path, "reason": f.reason} for f in findings if not f.fatal],
        "problems": [{"path": f.path, "reason": f.reason} for f in findings if f.fatal],
    }


def _sample_files(source: DataSource) -> list[str]:
    """Return the paths of all images and masks of a data set that is stored in folders."""
    listings = [source.of_split(split).listing() for split in SPLITS]
    return [file for listing in listings for sample in listing.samples for file in sample[1:]]


def find_source(path: str, second: str | None, labels: Labels) -> DataSource:
    """Return the data set that the command-line arguments describe.

    Args:
        path: Folder in ADE20K's layout, description file, or folder or URL of MDS shards.
        second: Root of a described data set, cache folder for shards, or None.
        labels: Meaning of the labels if no description exists.

    Raises:
        DataError: The local folder for shards is missing, or the store does not answer.
        ConfigError: The description is invalid.
    """
    if is_description(path):
        path, description = open_description(path, second)
        second = None
    elif is_remote(path) and second is None:
        raise DataError(f"{path}: pass a local cache folder for the shards as the second argument")
    else:
        description = shard_description(path)
    is_streaming = is_remote(path) or second is not None or any(Path(path).glob("*/index.json"))
    shards = ShardOptions(second) if is_streaming else None
    return DataSource(path, "train", description or ade20k(labels), shards)


def write_suggestion(folder: str, file: str | None, workers: int | None) -> int:
    """Describe a data set in a new YAML file, and draw samples next to it. Return the exit status.

    Args:
        folder: Folder of the data set.
        file: Path of the description; by default, a file in the working directory.
        workers: Number of processes; by default, one per core.

    Raises:
        DataError: The description cannot be created, or an output file already exists.
    """
    path = Path(file or f"{Path(folder).resolve().name}.yaml")
    picture = path.with_suffix(".png")
    if not is_description(str(path)):
        raise DataError(f"{path}: the second argument must be the path of a new .yaml file")
    for written in (path, picture):
        if written.exists():
            raise DataError(
                f"{written} already exists; pass a different file as the second argument"
            )
        check_writable(written)
    text, sheet = suggest(folder, workers or available_cores())
    write_image(picture, sheet)
    try:
        write_file(path, text)
    # If the description cannot be written, delete the picture, so that the user can try again.
    except BaseException:
        picture.unlink()
        raise
    print(f"{text}\nwrote {path}, and a picture of samples to {picture}")
    return 0


def main(arguments: list[str], build_dataspec: BuildDataspec) -> int:
    """Run the data set check that the command line requests.

    Args:
        arguments: Command-line arguments of data.py.
        build_dataspec: The function `data.build_ade20k_dataspec`.

    Returns:
        The exit status.
    """
    options = parse_data(arguments)
    # Replace Composer's Ctrl-C handler, which ends the process immediately.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    labels = Labels(options.num_classes, options.ignore_background, options.ignore_label)
    try:
        if options.suggest:
            return write_suggestion(options.path, options.local, options.workers)
        source = find_source(options.path, options.local, labels)
        report = validate(build_dataspec, source, options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 1 if report["problems"] else 0
