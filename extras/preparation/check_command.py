"""The check of a data set before training: every file is decoded, every label is counted.

    python data.py PATH                          # folders in ADE20K's layout, or MDS shards
    python data.py my.yaml                       # folders as described in the file
    python data.py FOLDER --suggest              # write a description of the folder
    python data.py s3://bucket/ade20k /tmp/mds   # shards in a store, kept in a local folder
    python data.py PATH --num-classes 11 --picture sheet.png

The report shows the sizes, the classes and the speed of the loader on this machine. It lists
oddities that do not stop training, and problems that do. The exit status is 0 if training would
work, 1 if it would fail, and 2 for wrong arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from composer.core import DataSpec
from tabulate import tabulate
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
from extras.preparation.suggest import suggest
from extras.preparation.unused import find_unused
from extras.preparation.verify import Tally, check
from files import check_outputs, check_writable, is_remote, write_file, write_image
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from segmentation.classes import ClassInfo, name_classes, rename_classes
from segmentation.drawing import sample_sheet

log = logging.getLogger(__name__)

SPEED_SECONDS, SPEED_BATCH = 5, 16
SHOWN = 20  # Number of similar findings to print.
TITLE = 60  # Maximum number of characters in the title of a row.

BuildDataspec = Callable[..., DataSpec]  # The type of `data.build_ade20k_dataspec`.


def measure_loader(
    build_dataspec: BuildDataspec, source: DataSource, samples: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Measure the speed of the training loader on this machine, and return a batch.

    Args:
        build_dataspec: The function `data.build_ade20k_dataspec`.
        source: The training split of the data set.
        samples: Number of samples in the split.

    Returns:
        The measurements, and the first batch as the model gets it. The images are (N, H, W, 3)
        uint8 with distorted colours. The class indices are (N, H, W), -1 for ignored pixels.
    """
    spec = build_dataspec(source.path, batch_size=min(SPEED_BATCH, samples), source=source)
    loader, shapes, seen, began = spec.dataloader, [], 0, 0.0
    assert isinstance(loader, DataLoader)
    # Batches that were already in progress when the clock started.
    warm = 1 + 2 * loader.num_workers
    with contextlib.closing(batches(loader)) as given:
        for number, (image, target) in enumerate(given):
            if number == 0:
                first = spec.microbatch_transforms((image, target))
            if number < 3:
                shapes.append([list(image.shape), list(target.shape)])
            seen += len(image) if began else 0
            if number == warm:
                began = time.perf_counter()
            if began and seen and time.perf_counter() - began > SPEED_SECONDS:
                break
    rate = seen / (time.perf_counter() - began)
    figures = {
        "images_per_second": round(rate, 1),
        "workers": loader.num_workers,
        "batches": shapes,
    }
    photos = first[0].permute(0, 2, 3, 1).numpy() * IMAGENET_CHANNEL_STD + IMAGENET_CHANNEL_MEAN
    return figures, (photos.round().clip(0, 255).astype(np.uint8), first[1].numpy())


def batches(loader: DataLoader) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches of a training loader, epoch after epoch.

    When the generator is closed, the worker processes end.

    Args:
        loader: The training loader.
    """
    sampler = cast(EpochSampler, loader.sampler)
    try:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from loader
    finally:
        # End the workers now. The garbage collector would take 5 s for each worker.
        loader._iterator = None


def summarise(tally: Tally, labels: Labels, classes: list[ClassInfo]) -> dict[str, Any]:
    """Return a split's counts, sizes and class shares, ready for JSON.

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
        "photos": tally.photos,
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


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text.

    Args:
        report: The report from `validate`.
    """
    lines = [f"{report['path']}: {report['format']}, {report['num_classes']} classes", ""]
    if any(split["good_pairs"] for split in report["splits"].values()):
        lines += [*_size_table(report["splits"]), "", *_class_table(report["splits"]), ""]
    if loader := report["loader"]:
        image, target = loader["batches"][0]
        lines += [
            f"loader: {loader['images_per_second']:.0f} images/s with {loader['workers']} worker "
            f"processes, batches of images {image} and masks {target}",
            "",
        ]
    for title, key in (("odd, but no problem for training", "oddities"), ("PROBLEMS", "problems")):
        if found := report[key]:
            lines += [f"{title} ({len(found)})", *_first_of_each_kind(found), ""]
    return "\n".join([*lines, _verdict(report)])


def _verdict(report: dict[str, Any]) -> str:
    """Return the last line of the report."""
    if report["problems"]:
        return "training would fail; fix the problems above"
    classes = report["splits"]["train"]["classes"]
    missing = [entry["name"] for entry in classes if not entry["photos"]]
    if len(missing) == len(classes):
        return "training would work but learn nothing: no training mask has a labelled pixel"
    unused, both = report["unused"], report["in_both_splits"]
    doubts = [f"{name} has no image" for name, s in report["splits"].items() if not s["good_pairs"]]
    if images := unused.get("images"):
        doubts.append(f"{count(images, 'image')} {'is' if images == 1 else 'are'} left out")
    if either := unused.get("either"):
        what = "an image that is" if either == 1 else "images that are"
        doubts.append(f"{count(either, 'file')} may be {what} left out")
    if both:
        doubts.append(f"{count(both, 'image')} {'is' if both == 1 else 'are'} in both splits")
    if missing:
        doubts.append(f"no training mask has {name_classes(missing)}")
    if not doubts:
        return "training would work; no problems found"
    line = f"training would work, but {'; '.join(doubts)}"
    if not missing:
        return line
    occurring = len(classes) - len(missing)
    if report["described"]:  # The user has listed every label.
        return line
    if occurring == 1 and classes[0]["label"] == 1:
        line += "; use --no-ignore-background to make label 0 a class"
    elif occurring > 1 and all(entry["photos"] for entry in classes[:occurring]):
        line += f"; use --num-classes {occurring} if there are no other classes"
    return line


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "2 images".

    Args:
        number: The number.
        noun: The noun in the singular.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _first_of_each_kind(findings: list[dict[str, str]]) -> Iterator[str]:
    """Yield the first findings of each type; similar findings differ only in names and numbers."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for finding in findings:
        kind = re.sub(r"\S*/\S*|\d[\d.,]*", "", finding["reason"])
        kinds.setdefault(kind, []).append(finding)
    for alike in kinds.values():
        yield from (f"  {f['path']}: {f['reason']}" for f in alike[:SHOWN])
        if len(alike) > SHOWN:
            yield f"  … and {len(alike) - SHOWN:,} more like these; --json lists all"


def _table(title: str, splits: dict[str, Any], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table with one column per split."""
    align = ("left", *("right" for _ in splits))
    rows = [(title[:TITLE], *cells) for title, *cells in rows]
    table = tabulate(rows, (title, *splits), "plain", disable_numparse=True, colalign=align)
    return table.splitlines()


def _size_table(splits: dict[str, Any]) -> list[str]:
    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return title, *(cell(split | split["size"]) for split in splits.values())

    rows = [
        row("images", lambda s: f"{s['photos']:,}"),
        row("masks", lambda s: f"{s['masks']:,}"),
        row("good pairs", lambda s: f"{s['good_pairs']:,}"),
        row("mean size", lambda s: f"{s['width_mean']:.0f}x{s['height_mean']:.0f}"),
        row("shortest, longest side", lambda s: f"{s['shortest_side']}, {s['longest_side']}"),
        row("megapixels, mean", lambda s: f"{s['megapixels_mean']:.3f}"),
        row("megapixels, 90th percentile", lambda s: f"{s['megapixels_90_percent_below']:.3f}"),
        row("megapixels, largest", lambda s: f"{s['megapixels_largest']:.3f}"),
        row("pixels without a class", lambda s: f"{s['unlabelled']:.1%}"),
    ]
    return _table("", splits, rows)


def _class_table(splits: dict[str, Any]) -> list[str]:
    """Return a table of class shares: up to 20 classes, or the ten largest and five smallest."""
    by_split = [split["classes"] for split in splits.values()]
    rows: list[tuple[str, ...]] = [
        (
            f"label {entries[0]['label']} ({entries[0]['name']})",
            *(f"{entry['share']:.3%}" for entry in entries),
        )
        for entries in sorted(zip(*by_split), key=lambda entries: -entries[0]["share"])
    ]
    if len(rows) > 20:
        rows[10:-5] = [(f"… {len(rows) - 15} more; --json lists all", *("" for _ in splits))]
    lines = _table("class, share of labelled pixels", splits, rows)
    for name, split in splits.items():
        never = [entry["name"] for entry in split["classes"] if not entry["photos"]]
        lines.append(f"never in {name}: {', '.join(never) or 'none, every class occurs'}")
    return lines


def validate(
    build_dataspec: BuildDataspec,
    source: DataSource,
    class_names: str | None = None,
    workers: int | None = None,
    picture: str | None = None,
    own: Sequence[str] = (),
) -> dict[str, Any]:
    """Check a data set.

    Args:
        build_dataspec: Function that builds the data whose loader is measured.
        source: The training split of the data set.
        class_names: Names of the classes; see `classes.load_classes`.
        workers: Number of processes. If None, one process per core.
        picture: Path of the picture with samples to draw, or None.
        own: Pictures that earlier commands drew. They are not part of the data set.

    Returns:
        The report, as `--json` prints it. Its `problems` are empty if training would work.

    Raises:
        DataError: The path does not exist.
    """
    description, labels = source.description, source.labels
    is_described = description.built_in is None
    described = description.classes if is_described else None
    classes = rename_classes(class_names, labels.num_classes, described, "the description")
    if "://" not in source.path and not Path(source.path).is_dir():
        raise DataError(f"folder {source.path} does not exist; check the path")
    # The picture must not overwrite an image or a mask of the data set.
    if picture:
        check_outputs([picture], [] if source.shards else _sample_files(source))
        check_writable(picture)
    tallies = check(source, workers)
    findings = [finding for tally in tallies.values() for finding in sorted(tally.findings)]
    unused = None
    if source.shards is None:
        unused = find_unused(source, [*own, *([picture] if picture else [])])
        findings += unused.findings()
    both = tallies["train"].images.keys() & tallies["val"].images.keys()
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
    """Return the images and masks of a data set in folders."""
    listings = [source.of_split(split).listing() for split in SPLITS]
    return [file for listing in listings for sample in listing.samples for file in sample[1:]]


def find_source(path: str, second: str | None, labels: Labels) -> DataSource:
    """Return the data set that a command line names.

    Args:
        path: Folder in ADE20K's layout, a description file, or folder or URL of MDS shards.
        second: Root of a described data set, or local folder for shards.
        labels: Meaning of the labels if no description exists.

    Raises:
        DataError: The local folder for shards is missing, or the store does not answer.
        ConfigError: The description is not valid.
    """
    if is_description(path):
        path, description = open_description(path, second)
        second = None
    elif is_remote(path) and second is None:
        raise DataError(f"{path}: give a local folder for the shards as the second argument")
    else:
        description = shard_description(path)
    is_streaming = is_remote(path) or second is not None or any(Path(path).glob("*/index.json"))
    shards = ShardOptions(second) if is_streaming else None
    return DataSource(path, "train", description or ade20k(labels), shards)


def write_suggestion(folder: str, file: str | None, workers: int | None) -> int:
    """Write the description of a folder, and a picture beside it; return the exit status.

    Args:
        folder: Folder of the data set.
        file: Path of the description. If None, a file in the working folder is written.
        workers: Number of processes. If None, one process per core.

    Raises:
        DataError: The description cannot be made, or a file with that name exists.
    """
    path = Path(file or f"{Path(folder).resolve().name}.yaml")
    if not is_description(str(path)):
        raise DataError(f"{path}: the second argument must be a .yaml file to write")
    for written in (path, path.with_suffix(".png")):
        if written.exists():
            raise DataError(f"{written} already exists; give another file as the second argument")
        check_writable(written)
    text, sheet = suggest(folder, workers or available_cores())
    write_image(path.with_suffix(".png"), sheet)
    try:
        write_file(path, text)
    # Leave no file behind, so that the user can give the same command again.
    except BaseException:
        path.with_suffix(".png").unlink()
        raise
    print(f"{text}\nwrote {path}, and a picture of samples to {path.with_suffix('.png')}")
    return 0


def main(arguments: list[str], build_dataspec: BuildDataspec) -> int:
    """Check a data set as the command line says.

    Args:
        arguments: Command-line arguments of data.py.
        build_dataspec: The function `data.build_ade20k_dataspec`.

    Returns:
        The exit status.
    """
    options = parse_data(arguments)
    # Composer's own handler of Ctrl-C ends the process at once.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    labels = Labels(options.num_classes, options.ignore_background, options.ignore_label)
    try:
        if options.suggest:
            return write_suggestion(options.path, options.local, options.workers)
        source = find_source(options.path, options.local, labels)
        drawn = []
        # `--suggest` writes a picture beside the description.
        if is_description(options.path):
            drawn = [str(Path(options.path).with_suffix(".png"))]
        report = validate(
            build_dataspec, source, options.class_names, options.workers, options.picture, drawn
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 1 if report["problems"] else 0
