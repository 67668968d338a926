"""A generator that writes a description for a folder of images and masks.

    python data.py FOLDER --suggest          # writes FOLDER.yaml and the picture FOLDER.png

`find_layout` pairs images and masks, and `find_classes` reads the masks. Comments in the
description mark guesses, list omitted files, and tell the user what to complete.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml
from PIL import Image

from dataset.description import Description, parse_description
from dataset.mask_decoder import Masks
from dataset.matching import find_samples
from dataset.paths import IMAGE_SUFFIXES, MASK_SUFFIXES, Sample, visible_files
from errors import ConfigError, DataError
from extras.preparation.check_report import count
from extras.preparation.class_names import class_lines, quoted
from extras.preparation.file_names import SPLIT_OF, Layout, look_at, without_numbers
from extras.preparation.find_classes import count_values, list_some
from extras.preparation.find_layout import explain_failure, search_layouts
from extras.preparation.verify import read_pair
from segmentation.drawing import sample_sheet

# Maximum number of samples in the picture.
SHOWN = 6


class Suggestion(NamedTuple):
    """The text of a tested description, and a picture of up to six samples."""

    text: str
    picture: Image.Image


def suggest(folder: str, workers: int) -> Suggestion:
    """Generate a description for the data set in a folder.

    The function checks that the description is valid, that it finds as many pairs as the search
    did, and that its samples can be drawn.

    Args:
        folder: Folder of the data set.
        workers: Number of processes that read masks.

    Raises:
        DataError: No image has a mask, a mask cannot be read or has no labels, or an image cannot
            be drawn.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"folder {folder} does not exist; check the path")
    suffixes = IMAGE_SUFFIXES | MASK_SUFFIXES
    paths = [path for _, path in visible_files(root) if path.suffix.lower() in suffixes]
    layouts = search_layouts(root, paths)
    if not layouts:
        raise DataError(f"{folder}: {explain_failure(root, paths)}")
    layout, *others = layouts

    # Write the lines of the description: first the splits, then the classes.
    splits, number = split_lines(root, layout)
    values = count_values([str(mask.path) for _, mask in layout.pairs], workers)
    lines = [f"root: {quoted(str(root.resolve()))}", *splits, *class_lines(root, values)]

    # Test the description: parse it, and pair the files that it describes.
    try:
        description = parse_description(yaml.safe_load("\n".join(lines)))
    except (ConfigError, yaml.YAMLError) as error:
        raise DataError(
            f"{folder}: the suggested description is not valid ({error}); write one yourself"
        ) from error
    samples, problems = pair_described(description, folder)
    if len(samples) != number:
        raise DataError(
            f"{folder}: {number} images have masks, but the pattern {splits[0]} matches "
            f"{len(samples)} images; rename images whose names are similar or contain braces"
        )
    edges = [path for paths in values.edges.values() for path in paths[:1]]
    picture = draw(description, samples, folder, edges[:2])

    # Add explanatory comments for the user at the top of the file.
    used = {path for sample in samples for path in sample[1:]}
    header = [
        f"# {number} images with masks, found by data.py --suggest. Guesses are marked.",
        f"#   composer main.py yamls/own.yaml data={root.resolve().name}.yaml",
        *_describe_unused(root, [path for path in paths if str(path) not in used]),
        *_describe_others(others),
        *(f"# To do before training: {problem}" for problem in problems),
        "",
    ]
    return Suggestion("\n".join([*header, *lines]) + "\n", picture)


def split_lines(root: Path, layout: Layout) -> tuple[list[str], int]:
    """Return the description's lines for `train` and `val`, and their total number of pairs.

    Args:
        root: Folder of the data set.
        layout: Layout of the images and masks.
    """

    def line(split: str, words: tuple[str, str], more: str = "", test: str = "") -> str:
        images, masks = layout.images.template(words[0]), layout.masks.template(words[1])
        note = f" # A guess: {test} serves as val" if test else ""
        return f"{split}: {{images: {quoted(images)}, masks: {quoted(masks)}{more}}}{note}"

    words, number = layout.words, len(layout.pairs)
    train = line("train", words["train"])
    if "val" in words:
        name = words["val"][0]
        test = name if SPLIT_OF[name.lower()] == "test" else ""
        return [train, line("val", words["val"], test=test)], number
    lists = _find_lists(root, {image.path.stem for image, _ in layout.pairs})
    if len(lists) < 2:
        return [train, "val: {fraction: 0.15} # A guess: no split was found"], number
    lines = []
    for split in ("train", "val"):
        file, _, is_test = lists[split]
        more = f", list: {quoted(file)}"
        lines.append(line(split, words["train"], more, file if is_test else ""))
    return lines, sum(len(stems) for _, stems, _ in lists.values())


def _find_lists(root: Path, stems: set[str]) -> dict[str, tuple[str, set[str], bool]]:
    """Find the text files that list the images of each split.

    Returns:
        For each split, the path of its list, the names in it, and whether it lists test images.
    """
    lists: dict[str, tuple[str, set[str], bool]] = {}
    for name, path in visible_files(root):
        words = re.split(r"[^a-z]+", Path(name).name.lower())
        split = next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)
        if split is None or path.suffix.lower() not in (".txt", ".lst"):
            continue
        entries = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        named = {Path(entry.strip()).stem for entry in entries} & stems
        is_list = len(named) > 0.8 * len(entries) and not any(len(e.split()) > 1 for e in entries)
        key = "val" if split == "test" else split
        if is_list and (key not in lists or lists[key][2]):
            lists[key] = path.relative_to(root).as_posix(), named, split == "test"
    return lists


def pair_described(description: Description, root: str) -> tuple[list[Sample], list[str]]:
    """Return the samples of both splits, and problems that would prevent training.

    Args:
        description: Description of the data set.
        root: Folder of the data set.
    """
    samples: dict[str, Sample] = {}
    problems: list[str] = []
    for split in ("train", "val"):
        listed, findings = find_samples(description, split, root)
        samples.update({sample.image_path: sample for sample in listed})
        problems += [f"{path}: {reason}" for path, reason, is_fatal in findings if is_fatal]
    texts = list(dict.fromkeys(problems))
    if len(texts) > 3:
        texts[3:] = [f"{len(texts) - 3} more files like these"]
    return list(samples.values()), texts


def _describe_unused(root: Path, paths: list[Path]) -> list[str]:
    """Return comment lines that count the unused images and masks and name some of them."""
    kinds: dict[str, list[str]] = {"image": [], "mask": [], "damaged file": []}
    # Group files in the same folder whose names differ only in their numbers.
    alike: dict[tuple, list[Path]] = defaultdict(list)
    for path in paths:
        alike[path.parent, without_numbers(path.stem), path.suffix].append(path)
    for files in alike.values():
        looks = [look_at(path) for path in files[:: len(files) // 3 + 1]]
        if all(look.error for look in looks):
            kind = "damaged file"
        else:
            kind = "mask" if 2 * sum(look.is_mask for look in looks) > len(looks) else "image"
        kinds[kind] += [path.relative_to(root).as_posix() for path in files]
    named = {kind: names for kind, names in kinds.items() if names}
    if not named:
        return []
    counts = " and ".join(count(len(names), kind) for kind, names in named.items())
    verb = "is" if len(paths) == 1 else "are"
    folders = sorted({str(Path(name).parent) for names in named.values() for name in names})
    more = f" They are in {list_some(folders)}." if len(paths) > 1 and folders != ["."] else ""
    first = " and ".join(names[0] for names in named.values())
    return [f"# {counts} {verb} left out, such as {first}.{more}"]


def _describe_others(layouts: list[Layout]) -> list[str]:
    """Return comment lines about other layouts that pair as many images as the chosen one."""
    return [
        f"# A guess: {x.masks.template(x.words['train'][1])} would match as many images "
        f"({x.images.template(x.words['train'][0])})."
        for x in layouts[:3]
    ]


def draw(
    description: Description, samples: list[Sample], root: str, masks_to_show: list[str]
) -> Image.Image:
    """Draw up to six images, each next to an overlay of its mask.

    Args:
        description: Description of the data set.
        samples: Images and masks to choose from.
        root: Folder of the data set.
        masks_to_show: Paths of masks that must be in the picture.

    Raises:
        DataError: A file cannot be read, or an image and its mask differ in size.
    """
    masks = Masks.of(description, "train", root)
    wanted = [sample for sample in samples if sample.mask_path in masks_to_show]
    places = np.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).astype(int)
    evenly = [samples[place] for place in places if samples[place] not in wanted]
    index, images, targets = masks.labels.index(), [], []
    for sample in [*wanted, *evenly][:SHOWN]:
        _, _, image, labels = read_pair(sample, masks)
        images.append(cv2.resize(image, (320, 320), interpolation=cv2.INTER_AREA))
        target = index[labels].astype(np.int16)
        targets.append(cv2.resize(target, (320, 320), interpolation=cv2.INTER_NEAREST))
    return sample_sheet(np.stack(images), np.stack(targets), description.classes)
