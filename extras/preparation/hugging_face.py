"""A converter that turns a Hugging Face data set into a data set for training."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.decoding import decode_mask
from dataset.description import MAX_VALUE
from errors import DataError, one_line
from extras.preparation.converters import SPLITS, Converted, read_names, write_mask
from files import write_file

# Label names that Hugging Face data sets use for ignored pixels.
IGNORE_NAMES = {"ignore", "ignored", "void", "unlabeled", "unlabelled"}
MASK_COLUMNS = ("mask", "label", "annotation", "segmentation", "semantic", "target")


def convert_hugging_face(options: argparse.Namespace, out: Path) -> Converted:
    """Convert a Hugging Face data set from the hub or from a local folder.

    Args:
        options: Command-line options.
        out: Folder of the new data set.

    Raises:
        DataError: The data set cannot be loaded, or its columns or names are ambiguous.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hf:// needs the datasets package; run make install WITH=datasets"
        ) from error
    name = options.source.removeprefix("hf://")
    try:
        is_saved = any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))
        found = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
    except Exception as error:  # The datasets library raises many types of exceptions.
        raise DataError(f"{options.source}: {one_line(error)}") from error
    found = found if isinstance(found, dict) else {"train": found}
    names, notes = _names(name, options.names), []
    pixels: Counter[int] = Counter()
    # Count the rows of each new split, because several source splits may end up in the same one.
    written: Counter[str] = Counter()
    for key, rows in found.items():
        split = str(key)
        if split not in SPLITS or (split == "test" and len(found) > 2):
            notes.append(f"split {split} is left out")
            continue
        image_column, mask_column = _columns(rows, datasets.Image, options)
        for column in (image_column, mask_column):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        table: Any = rows
        for place, row in enumerate(tqdm(table, unit=" images", desc=split, disable=None)):
            image, encoded = _content(row[image_column]), _content(row[mask_column])
            try:
                mask = decode_mask(encoded, MAX_VALUE)
            except ValueError as error:
                raise DataError(f"{options.source}: {split}, row {place}: {error}") from error
            name = f"{SPLITS[split]}/{written[SPLITS[split]]:08}"
            written[SPLITS[split]] += 1
            suffix = ".png" if image.startswith(b"\x89PNG") else ".jpg"
            write_file(out / "photos" / f"{name}{suffix}", image)
            write_mask(mask, out / "masks" / f"{name}.png")
            values, counts = np.unique(mask, return_counts=True)
            pixels.update(dict(zip(values.tolist(), counts.tolist())))
    ignored = {value for value, label in names.items() if label.strip().lower() in IGNORE_NAMES}
    ignored |= options.ignore
    total = sum(pixels.values())
    for value in sorted(ignored & pixels.keys()):
        notes.append(f"value {value} is ignored ({pixels[value] / total:.2%} of the pixels)")
    if 255 in pixels and 255 not in ignored | names.keys():
        share = pixels[255] / total
        notes.append(
            f"value 255 is a class ({share:.2%} of the pixels); to ignore it, add --ignore 255"
        )
    known = sorted((pixels.keys() | names.keys()) - ignored)
    values = {names.get(value, f"class_{value}"): value for value in known}
    if len(values) < len(known):
        raise DataError(
            f"{options.source}: two mask values have the same class name; use --names to set "
            "unique names"
        )
    return Converted(values, notes, sorted(ignored))


def _columns(rows: Any, kind: type, options: argparse.Namespace) -> tuple[str, str]:
    """Return the names of the image column and the mask column."""
    if options.columns:
        image, _, mask = options.columns.partition(",")
        return image, mask
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    masks = [name for name in columns if any(word in name.lower() for word in MASK_COLUMNS)]
    images = [name for name in columns if name not in masks]
    if len(images) != 1 or len(masks) != 1:
        listed = ", ".join(columns) or "none"
        raise DataError(
            f"{options.source}: cannot choose among the image columns ({listed}); name two with "
            "--columns IMAGE,MASK"
        )
    return images[0], masks[0]


def _content(cell: dict[str, Any]) -> bytes:
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def _names(name: str, file: str | None) -> dict[int, str]:
    """Return the name of each mask value, from a file of names or from id2label.json.

    Hugging Face data sets store their class names in id2label.json.
    """
    path = file or os.path.join(name, "id2label.json")
    if not file and not os.path.exists(name):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = hf_hub_download(name, "id2label.json", repo_type="dataset")
        except Exception as error:  # The Hugging Face client may raise any network exception.
            is_missing = isinstance(error, EntryNotFoundError)
            if is_missing and not isinstance(error, LocalEntryNotFoundError):
                return {}  # The data set has no class names, so its classes are numbered.
            raise DataError(
                f"{name}: cannot download the class names in id2label.json "
                f"({one_line(error)[:160]}); try again, or use --names"
            ) from error
    return read_names(path) if file or os.path.isfile(path) else {}
