"""Check a whole data set before training on it: every file decoded, every label counted.

    python data.py PATH                          # folders in ADE20K's layout, or MDS shards
    python data.py my.yaml                       # folders as that describes them
    python data.py FOLDER --suggest              # write the description of what is there
    python data.py s3://bucket/ade20k /tmp/mds   # shards in a store, kept in a local folder
    python data.py PATH --num-classes 11 --picture sheet.png

The report has the sizes and classes, how fast the loader is here, what is odd but can be trained
on, and what training would fail on. Exit status: 0 fine, 1 training would fail, 2 wrong arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from composer.core import DataSpec
from torch import Tensor
from torch.utils.data import DataLoader

from command_lines import parse_data
from dataset.checks import Tally, check
from dataset.colors import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from dataset.description import (
    Description,
    is_description,
    open_description,
    parse_description,
    read_description,
)
from dataset.folders import FOLDERS, list_samples
from dataset.labels import Labels
from dataset.matching import list_described
from dataset.sampler import EpochSampler
from dataset.shards import DESCRIPTION, fetch_beside
from dataset.suggest import suggest
from errors import DataError, UserError
from files import check_outputs, check_writable, write_file, write_image
from segmentation.classes import ClassInfo, name_classes, rename_classes
from segmentation.drawing import sample_sheet

log = logging.getLogger(__name__)

SPEED_SECONDS, SPEED_BATCH = 5, 16
SHOWN = 20  # findings of one kind

BuildDataspec = Callable[..., DataSpec]  # `data.build_ade20k_dataspec`


def measure_loader(
    build_dataspec: BuildDataspec,
    path: str,
    local: str | None,
    is_streaming: bool,
    labels: Labels,
    samples: int,
    description: Description | None = None,
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """How many training images a second the loader gives here, and a batch of them.

    Returns:
        The figures, and the first batch as the model gets it: photos (N, H, W, 3) uint8 with
        colours distorted, and class indices (N, H, W), -1 where ignored.
    """
    spec = build_dataspec(
        path,
        is_streaming,
        local,
        batch_size=min(SPEED_BATCH, samples),
        num_classes=labels.num_classes,
        ignore_background=labels.ignore_background,
        ignore_label=labels.ignore_label,
        description=description,
    )
    loader, shapes, seen, began = spec.dataloader, [], 0, 0.0
    assert isinstance(loader, DataLoader)
    warm = 1 + 2 * loader.num_workers  # batches that were under way before the clock started
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
    """Give a training loader's batches, epoch after epoch; closed, it ends the workers."""
    sampler = cast(EpochSampler, loader.sampler)
    try:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from loader
    finally:
        loader._iterator = None  # ends its workers; left to the garbage collector it takes 5 s each


def summarise(tally: Tally, labels: Labels, classes: list[ClassInfo]) -> dict[str, Any]:
    """Return a split's counts, sizes and class shares, ready for JSON."""
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
    """Return the report as it is printed."""
    lines = [f"{report['path']}: {report['format']}, {report['num_classes']} classes", ""]
    if any(split["good_pairs"] for split in report["splits"].values()):
        lines += [*_size_table(report["splits"]), "", *_class_table(report["splits"]), ""]
    if loader := report["loader"]:
        image, target = loader["batches"][0]
        lines += [
            f"loader: {loader['images_per_second']:.0f} images/s with {loader['workers']} worker "
            f"processes, batches of photos {image} and masks {target}",
            "",
        ]
    for title, key in (("odd, but training works", "oddities"), ("PROBLEMS", "problems")):
        if found := report[key]:
            lines += [f"{title} ({len(found)})", *_first_of_each_kind(found), ""]
    return "\n".join([*lines, _verdict(report)])


def _verdict(report: dict[str, Any]) -> str:
    """Return the report's last line."""
    if report["problems"]:
        return "training would fail"
    classes = report["splits"]["train"]["classes"]
    missing = [entry["name"] for entry in classes if not entry["photos"]]
    if not missing:
        return "no problem: this can be trained on"
    if len(missing) == len(classes):
        return "this can be read, but nothing is learnt: no training mask has a labelled pixel"
    line = f"this can be trained on, but no training mask has {name_classes(missing)}"
    occurring = len(classes) - len(missing)
    if report["described"]:  # the user has listed every label
        return line
    if occurring == 1 and classes[0]["label"] == 1:
        line += "; --no-ignore-background makes label 0 a class"
    elif occurring > 1 and all(entry["photos"] for entry in classes[:occurring]):
        line += f"; --num-classes {occurring} if there are no more"
    return line


def _first_of_each_kind(findings: list[dict[str, str]]) -> Iterator[str]:
    """List findings, of those that differ in names and numbers only the first."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for finding in findings:
        kind = re.sub(r"\S*/\S*|\d[\d.,]*", "", finding["reason"])
        kinds.setdefault(kind, []).append(finding)
    for alike in kinds.values():
        yield from (f"  {f['path']}: {f['reason']}" for f in alike[:SHOWN])
        if len(alike) > SHOWN:
            yield f"  … and {len(alike) - SHOWN:,} more like these; --json has all"


def _row(title: str, cells: Iterable[str]) -> str:
    return f"{title:<32.32}" + "".join(f"{cell:>16}" for cell in cells)


def _size_table(splits: dict[str, Any]) -> list[str]:
    sizes = [split["size"] for split in splits.values()]
    return [
        _row("", splits),
        _row("photos", (f"{split['photos']:,}" for split in splits.values())),
        _row("masks", (f"{split['masks']:,}" for split in splits.values())),
        _row("good pairs", (f"{split['good_pairs']:,}" for split in splits.values())),
        _row("mean size", (f"{s['width_mean']:.0f}x{s['height_mean']:.0f}" for s in sizes)),
        _row(
            "shortest side, longest", (f"{s['shortest_side']}, {s['longest_side']}" for s in sizes)
        ),
        _row("megapixels, mean", (f"{s['megapixels_mean']:.3f}" for s in sizes)),
        _row("  90% are below", (f"{s['megapixels_90_percent_below']:.3f}" for s in sizes)),
        _row("  largest", (f"{s['megapixels_largest']:.3f}" for s in sizes)),
        _row("pixels without a class", (f"{split['unlabelled']:.1%}" for split in splits.values())),
    ]


def _class_table(splits: dict[str, Any]) -> list[str]:
    """Shares of the classes: all of up to 20, otherwise the ten largest and five smallest."""
    by_split = [split["classes"] for split in splits.values()]
    rows = [
        _row(
            f"  label {entries[0]['label']} ({entries[0]['name']})",
            (f"{entry['share']:.3%}" for entry in entries),
        )
        for entries in sorted(zip(*by_split), key=lambda entries: -entries[0]["share"])
    ]
    if len(rows) > 20:
        rows[10:-5] = [f"  … {len(rows) - 15} more, --json has all …"]
    lines = [_row("class, share of labelled pixels", splits), *rows]
    for name, split in splits.items():
        never = [entry["name"] for entry in split["classes"] if not entry["photos"]]
        lines.append(f"never in {name}: {', '.join(never) or 'none, every class occurs'}")
    return lines


def validate(
    build_dataspec: BuildDataspec,
    path: str,
    local: str | None = None,
    labels: Labels | None = None,
    class_names: str | None = None,
    workers: int | None = None,
    picture: str | None = None,
    description: Description | None = None,
) -> dict[str, Any]:
    """Check a data set.

    Args:
        build_dataspec: Builds the data whose loader is measured.
        path: Folder in ADE20K's layout, root of a described one, or folder or URL of MDS shards.
        local: Where shards of a URL are kept.
        labels: What the masks hold; None: ADE20K's.
        class_names: See `classes.load_classes`.
        workers: How many processes check; None: one a core.
        picture: File to draw a sheet of samples in.
        description: Of a data set in another layout, or of what shards were written from. It has
            the names of the classes as well.

    Returns:
        The report, as `--json` prints it. `problems` is empty where training would work.

    Raises:
        DataError: There is no data set at `path` at all.
    """
    labels = labels or Labels()
    if description is not None:
        labels = description.labels
    described = None if description is None else description.classes
    classes = rename_classes(class_names, labels.num_classes, described, "the description")
    workers = workers or len(os.sched_getaffinity(0))
    is_streaming = "://" in path or local is not None or bool(list(Path(path).glob("*/index.json")))
    if "://" in path and local is None:
        raise DataError(f"{path} needs a second argument, the local folder to keep shards in")
    if "://" not in path and not Path(path).is_dir():
        raise DataError(f"there is no folder {path}")
    if picture:  # may not be an image or a mask of the data set
        check_outputs([picture], [] if is_streaming else _sample_files(path, description))
        check_writable(picture)
    tallies = check(path, local, is_streaming, labels, workers, description)
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    loader = None
    if any(finding.fatal for finding in tallies["train"].findings):
        log.warning(
            "the loader is not measured%s: see PROBLEMS", " nor a picture drawn" * bool(picture)
        )
    else:
        pairs = len(tallies["train"].sizes)
        loader, batch = measure_loader(
            build_dataspec, path, local, is_streaming, labels, pairs, description
        )
        if picture:
            write_image(picture, sample_sheet(*batch, classes))
    layout = "folders in ADE20K's layout" if description is None else "folders as described"
    return {
        "path": path,
        "format": "MDS shards" if is_streaming else layout,
        "described": description is not None,
        "num_classes": labels.num_classes,
        "splits": {name: summarise(tally, labels, classes) for name, tally in tallies.items()},
        "loader": loader,
        "oddities": [{"path": f.path, "reason": f.reason} for f in findings if not f.fatal],
        "problems": [{"path": f.path, "reason": f.reason} for f in findings if f.fatal],
    }


def _sample_files(path: str, description: Description | None) -> list[str]:
    """Return the images and masks of a data set, of the splits that can be listed."""
    files = []
    for split in FOLDERS:
        with suppress(DataError):  # `check` reports it
            if description is None:
                samples = list_samples(path, split)
            else:
                samples = list_described(description, split, path)
            files += [file for sample in samples for file in sample[1:]]
    return files


def find_description(path: str, root: str | None) -> tuple[str, Description | None]:
    """As `open_description`; shards have their description beside them."""
    if not is_description(path):
        with tempfile.TemporaryDirectory() as folder:
            beside = fetch_beside(path, DESCRIPTION, folder)
            if beside is not None:
                raw = read_description(beside)
                return path, parse_description(raw, f"{path}/{DESCRIPTION}")
    return open_description(path, root)


def write_suggestion(folder: str, file: str | None, workers: int | None) -> int:
    """Write a folder's description, by default in the working folder, and a picture beside it."""
    path = Path(file or f"{Path(folder).resolve().name}.yaml")
    if not is_description(str(path)):
        raise DataError(f"{path}: the second argument is the description to write, a .yaml")
    for written in (path, path.with_suffix(".png")):
        if written.exists():
            raise DataError(f"{written} exists: name another file as second argument")
        check_writable(written)
    text, sheet = suggest(folder, workers or len(os.sched_getaffinity(0)))
    write_image(path.with_suffix(".png"), sheet)
    try:
        write_file(path, text)
    except BaseException:  # leave nothing behind, so that the same command can be given again
        path.with_suffix(".png").unlink()
        raise
    print(f"{text}\nwritten to {path}, and samples drawn in {path.with_suffix('.png')}")
    return 0


def main(arguments: list[str], build_dataspec: BuildDataspec) -> int:
    """Check a data set as the command line says; return the exit status."""
    options = parse_data(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer's just ends the process
    labels = Labels(options.num_classes, options.ignore_background, options.ignore_label)
    try:
        if options.suggest:
            return write_suggestion(options.path, options.local, options.workers)
        path, description = find_description(options.path, options.local)
        report = validate(
            build_dataspec,
            path,
            options.local if path == options.path else None,
            labels,
            options.class_names,
            options.workers,
            options.picture,
            description,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 1 if report["problems"] else 0
