"""One data set in many folder layouts and mask formats, each with its description."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from PIL import Image

from dataset.matching import list_samples
from dataset.paths import find_root

NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"]
NAMES += ["pedestrian", "bicyclist", "plane"]
# The colour of each label; some colours differ by only one in one channel.
COLORS = np.array(
    [[0, 0, 0], [128, 64, 128], [128, 64, 129], [255, 255, 255], [0, 0, 142], [0, 1, 142]]
    + [[200, i, 255 - i] for i in range(250)],
    np.uint8,
)


def simple_classes(count: int) -> dict[str, Any]:
    """Return the `classes` and `ignore` keys of a description in which label k is class k - 1."""
    return {"classes": {NAMES[k]: {"labels": [k + 1]} for k in range(count)}, "ignore": [0]}


def splits(source: Path) -> Iterator[tuple[str, str, Path, np.ndarray]]:
    """Yield the split, name, image path and labels of every sample in ADE20K's layout."""
    for split in ("train", "val"):
        for uid, image, mask in list_samples(str(source), split):
            yield split, uid, Path(image), np.array(Image.open(mask))


def put(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, target)


def save(mask: np.ndarray, target: Path) -> None:
    """Write a mask as a PNG file with the bit depth of the array."""
    target.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(target), mask)


def save_palette(mask: np.ndarray, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(COLORS.ravel().tolist())
    image.save(target)


def folders(source: Path, root: Path, classes: int) -> dict[str, Any]:
    """Write images to `photos/{split}` and masks of the same names to `labels/{split}`."""
    for split, uid, image, mask in splits(source):
        put(image, root / f"photos/{split}/{uid}.jpg")
        save(mask, root / f"labels/{split}/{uid}.png")
    return {
        split: {"images": f"photos/{split}", "masks": f"labels/{split}"}
        for split in ("train", "val")
    } | simple_classes(classes)


def templates(source: Path, root: Path, classes: int) -> dict[str, Any]:
    """Write each image next to its mask, as `NAME_rgb.jpg` and `NAME_mask.png`."""
    for split, uid, image, mask in splits(source):
        put(image, root / f"{split}/{uid}_rgb.jpg")
        save(mask, root / f"{split}/{uid}_mask.png")
    return {
        split: {"images": f"{split}/{{stem}}_rgb.jpg", "masks": f"{split}/{{stem}}_mask.png"}
        for split in ("train", "val")
    } | simple_classes(classes)


def lists(source: Path, root: Path, classes: int) -> dict[str, Any]:
    """Write all images into one folder, and a list of image names for each split."""
    names: dict[str, list[str]] = {"train": [], "val": []}
    for split, uid, image, mask in splits(source):
        # Both splits number their images from 1, so the names of val get a letter in front.
        name = uid if split == "train" else f"v{uid}"
        put(image, root / f"JPEGImages/{name}.jpg")
        save(mask, root / f"Segmentation/{name}.png")
        names[split].append(name)
    (root / "split").mkdir()
    described = {}
    for split, listed in names.items():
        (root / f"split/{split}.txt").write_text("\n".join(listed) + "\n")
        described[split] = {
            "images": "JPEGImages" if split == "train" else "JPEGImages/v{stem}.jpg",
            "masks": "Segmentation" if split == "train" else "Segmentation/v{stem}.png",
            "list": f"split/{split}.txt",
        }
    return described | simple_classes(classes)


def colors(source: Path, root: Path, classes: int) -> dict[str, Any]:
    """Write RGB masks with one colour per class."""
    for split, uid, image, mask in splits(source):
        put(image, root / f"images/{split}/{uid}.jpg")
        save(COLORS[mask][..., ::-1], root / f"masks/{split}/{uid}.png")
    return {
        split: {"images": f"images/{split}", "masks": f"masks/{split}"}
        for split in ("train", "val")
    } | {
        "classes": {NAMES[k]: {"labels": [COLORS[k + 1].tolist()]} for k in range(classes)},
        "ignore": [COLORS[0].tolist()],
    }


def palette(source: Path, root: Path, classes: int) -> dict[str, Any]:
    """Write palette PNGs whose indices are the labels, with the split in the file name."""
    for split, uid, image, mask in splits(source):
        put(image, root / f"data/{split}-{uid}.jpg")
        save_palette(mask, root / f"data/{split}-{uid}.png")
    return {
        split: {"images": f"data/{split}-{{stem}}.jpg", "masks": f"data/{split}-{{stem}}.png"}
        for split in ("train", "val")
    } | simple_classes(classes)


def merged(source: Path, root: Path, classes: int) -> dict[str, Any]:
    """Write 16-bit masks with two labels per class, and with several ignored labels."""
    for split, uid, image, mask in splits(source):
        put(image, root / f"{split}/photos/{uid}.jpg")
        odd = (np.indices(mask.shape).sum(0) % 2).astype(np.uint16)
        save(
            (mask.astype(np.uint16) * 300 + odd).astype(np.uint16), root / f"{split}/ids/{uid}.png"
        )
    labels = {NAMES[k]: {"labels": [300 * (k + 1), 300 * (k + 1) + 1]} for k in range(classes)}
    return {
        split: {"images": f"{split}/photos", "masks": f"{split}/ids"} for split in ("train", "val")
    } | {"classes": labels, "ignore": [0, 1]}


LAYOUTS: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {
    function.__name__: function for function in (folders, templates, lists, colors, palette, merged)
}


def lay_out(source: str | Path, root: Path, layout: str, classes: int) -> Path:
    """Copy a data set from ADE20K's layout to another layout, with a description.

    Args:
        source: The data set in ADE20K's layout.
        root: Folder to write to.
        layout: One of `LAYOUTS`.
        classes: Number of classes.

    Returns:
        The path of the description file.
    """
    described = LAYOUTS[layout](find_root(source).parent, root, classes)
    file = root / f"{layout}.yaml"
    file.write_text(yaml.safe_dump({"root": ".", **described}, sort_keys=False))
    return file
