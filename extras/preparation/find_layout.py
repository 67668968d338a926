"""A search that matches the images and masks in a folder by their names and pixels.

The search tries every interpretation of the names. An interpretation says which folder or word
names the split, which folders belong to the name of a sample, and which words at the start and end
of a file name only state its type. The layout that pairs the most images wins, and its path
patterns become the templates of a description.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path

from dataset.paths import IMAGE_SUFFIXES, MASK_SUFFIXES
from extras.preparation.file_names import (
    MARK,
    SAMPLED,
    SPLIT_OF,
    Layout,
    Picture,
    Side,
    is_lossy_mask,
    look_at,
    sample_pictures,
    split_of,
    stem_cores,
    take_apart,
    without_numbers,
)

HASH = re.compile(r"(?<![A-Za-z0-9])(?=[0-9]*[a-f])(?=[a-f]*\d)[0-9a-f]{6,}(?![A-Za-z0-9])")
# If a mask's path contains one of these words, the mask probably does not encode classes.
NOT_SEMANTIC = {"instance", "instances", "inst", "object", "objects", "panoptic", "depth"}
NOT_SEMANTIC |= {"boundary", "boundaries", "contour", "contours", "edge", "edges", "confidence"}
# If a file's path contains one of these words, the file is probably outdated.
OUTDATED = {"old", "backup", "bak", "copy", "deprecated", "draft", "obsolete"}

# The name of each lossy format, and why it cannot be used for masks.
JPEG = "JPEGs", "JPEG changes the values near every border, so that labels are lost"
LOSSY = {".jpg": JPEG, ".jpeg": JPEG, ".webp": ("WebPs", "masks must be PNG, TIFF, BMP or GIF")}

# Maximum number of layouts to test on all files.
CANDIDATES = 60
# Number of files whose pixels are read to tell images from masks.
LOOKED_AT = 7


# Functions that propose path patterns.


def _propose(pictures: list[Picture], mask_suffixes: set[str]) -> list[tuple[Side, Side]]:
    """Return pairs of path patterns that match a sample of the names, most likely first."""
    by_core: dict[str, list[Picture]] = defaultdict(list)
    for image in sample_pictures(pictures):
        if image.suffix.lower() in IMAGE_SUFFIXES:
            for core in stem_cores(image.stem):
                by_core[core].append(image)
    # Group the masks by folder, extension and name without numbers. In each group, keep the few
    # masks whose names share the longest part with an image name.
    kinds: dict[tuple, list[tuple[float, Picture]]] = defaultdict(list)
    for mask in pictures:
        if mask.suffix.lower() in mask_suffixes:
            core = next(
                (core for core in stem_cores(mask.stem) if _others(by_core, core, mask)), ""
            )
            kind = (mask.dirs, without_numbers(mask.stem), mask.suffix)
            kinds[kind].append((len(core) / max(1, len(mask.stem)), mask))
    most = max(4, 4 * SAMPLED // max(1, len(kinds)))
    masks = [
        mask
        for kind in kinds.values()
        for _, mask in sorted(kind, key=lambda scored: scored[0], reverse=True)[:most]
    ]
    votes: Counter[tuple[Side, Side]] = Counter()
    for mask in masks[:: len(masks) // (8 * SAMPLED) + 1]:
        # Compare each image-mask pair only once, using the longest part that the two names share.
        patterns, seen = set(), set()
        for core in stem_cores(mask.stem):
            images = _others(by_core, core, mask)
            for image in images[:: len(images) // 8 + 1]:
                if image.path not in seen:
                    seen.add(image.path)
                    patterns |= _patterns(image, mask, core)
        votes.update(patterns)
    votes.update(_fixed_names(pictures))
    return [sides for sides, _ in votes.most_common(CANDIDATES)]


def _others(by_core: dict[str, list[Picture]], core: str, mask: Picture) -> list[Picture]:
    """Return the other files in a mask's split whose names contain `core`."""
    split = split_of(mask)
    return [i for i in by_core.get(core, ()) if i.path != mask.path and split_of(i) == split]


def _patterns(image: Picture, mask: Picture, core: str) -> set[tuple[Side, Side]]:
    """Return path patterns for an image and its mask, given the part that their names share."""
    core = core.strip("_-. ") or core
    ends = []
    for stem in (image.stem, mask.stem):
        head, _, tail = stem.partition(core)
        ends.append((HASH.sub("*", head), HASH.sub("*", tail)))
    # Folders that both paths have in common may belong to the sample's name. Try the name without
    # these folders, and with each sequence of consecutive common folders.
    runs = [(len(image.dirs), len(mask.dirs), 0)]
    for a, b, size in SequenceMatcher(None, image.dirs, mask.dirs, False).get_matching_blocks():
        same = [MARK not in part for part in image.dirs[a : a + size]]
        for first in range(size):
            if same[first] and (first == 0 or not same[first - 1]):
                length = (same[first:] + [False]).index(False)
                runs.append((a + first, b + first, length))
    patterns = set()
    for a, b, size in runs:
        places = ((image.dirs, a, *ends[0]), (mask.dirs, b, *ends[1]))
        for suffixes in ((image.suffix, mask.suffix), ("", mask.suffix), ("", "")):
            sides = [
                Side(dirs[:at], dirs[at + size :], size > 0, head, tail, suffix)
                for (dirs, at, head, tail), suffix in zip(places, suffixes)
            ]
            if sides[0] != sides[1]:
                patterns.add((sides[0], sides[1]))
                # In some data sets, `x.jpg.png` is the mask of `x.jpg`.
                if sides[1].tail == image.suffix and not sides[0].suffix:
                    patterns.add((sides[0], sides[1]._replace(tail=".*")))
    return patterns


def _fixed_names(pictures: list[Picture]) -> Counter[tuple[Side, Side]]:
    """Return patterns for data sets with one folder per image and fixed file names."""
    folders: dict[tuple[str, ...], list[Picture]] = defaultdict(list)
    for picture in pictures:
        folders[picture.dirs].append(picture)
    votes: Counter[tuple[Side, Side]] = Counter()
    for dirs, members in folders.items():
        start = 1 + max((place for place, part in enumerate(dirs) if MARK in part), default=-1)
        if start < len(dirs) and len(members) <= 8 and len(folders) > 1:
            sides = [
                Side(dirs[:start], (), True, p.stem, "", p.suffix, has_stem=False) for p in members
            ]
            votes.update((image, mask) for image in sides for mask in sides if image != mask)
    return votes


Key = tuple[str, tuple[str, ...], str]
Groups = dict[tuple[tuple[str, ...], str], list[Picture]]


def _fitting(side: Side, groups: Groups, suffixes: set[str]) -> tuple[dict[Key, Picture], int]:
    """Index the files that match a pattern by split, folders and name; count the duplicates."""
    named: dict[Key, Picture] = {}
    twice = 0
    ends = (re.escape(end).replace(r"\*", "[^/]*") for end in (side.head, side.tail))
    regex = re.compile("(.+?)".join(ends))
    for (dirs, suffix), pictures in groups.items():
        middle = dirs[len(side.before) : len(dirs) - len(side.after)]
        if dirs != (*side.before, *middle, *side.after) or (middle and not side.deep):
            continue
        if any(MARK in part for part in middle) or suffix.lower() not in suffixes:
            continue
        if side.suffix not in ("", suffix):
            continue
        for picture in pictures:
            if side.has_stem:
                match = regex.fullmatch(picture.stem)
                core = match[1] if match else ""
            else:
                core = "/" if picture.stem == side.head and middle else ""
            if core and MARK not in core:
                key = (split_of(picture), middle, core)
                twice += key in named
                named.setdefault(key, picture)
    return named, twice


def _try(sides: tuple[Side, Side], groups: Groups, mask_suffixes: set[str]) -> Layout | None:
    """Pair the files that match two patterns; return None if no files match."""
    masks, masks_twice = _fitting(sides[1], groups, mask_suffixes)
    paths = {mask.path for mask in masks.values()}
    images, images_twice = _fitting(sides[0], groups, IMAGE_SUFFIXES)
    images = {key: image for key, image in images.items() if image.path not in paths}
    pairs = [(image, masks[key]) for key, image in images.items() if key in masks]
    if not pairs:
        return None
    # A template has only one word for each split, such as `train` or `training`, so use the most
    # frequent one.
    words: dict[str, tuple[str, str]] = {}
    for pair, _ in Counter((a.split, b.split) for a, b in pairs).most_common():
        words.setdefault(SPLIT_OF[pair[0].lower()] if pair[0] else "", pair)
    if "train" in words and words.keys() & {"val", "test"}:
        words.pop("", None)
    else:
        words = {"train": next(iter(words.values()))}
    covered = sum((a.split, b.split) in words.values() for a, b in pairs)
    # If the data set has a validation split, do not use its test split for validation.
    if "test" in words:
        words.setdefault("val", words.pop("test"))
    used = [(a, b) for a, b in pairs if (a.split, b.split) in words.values()]
    shown = {word for word, _ in words.values()}
    alone = sum(image.split in shown for key, image in images.items() if key not in masks)
    return _tightened(Layout(*sides, used, words, covered, alone, masks_twice + images_twice))


def _tightened(layout: Layout) -> Layout:
    """Replace `{dir}` in the pattern by the folders that all pairs have in common."""
    if not layout.images.deep:
        return layout
    image = layout.images
    middles = [a.dirs[len(image.before) : len(a.dirs) - len(image.after)] for a, _ in layout.pairs]
    lengths = [len(middle) for middle in middles]
    # If the file name does not contain the sample's name, one folder must remain variable, so that
    # the pattern can match it with the placeholder `{name}`.
    most = min(lengths) if image.has_stem else min(lengths) - 1
    first, last = min(middles), max(middles)
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    images, masks = (
        side._replace(before=side.before + first[:shared], deep=max(lengths) > shared)
        for side in (layout.images, layout.masks)
    )
    return layout._replace(images=images, masks=masks)


def _holds_copies(layout: Layout) -> bool:
    """Return whether several folders have the same images, as in a data set with versions."""
    if not layout.images.deep:
        return False
    by_name: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for image, _ in layout.pairs:
        by_name[image.split, image.stem].append(image.path)
    again = [paths for paths in by_name.values() if len(paths) > 1]
    if 2 * len(again) <= len(by_name):
        return False
    sample = again[:: len(again) // 5 + 1]
    return all(len({path.read_bytes() for path in paths[:2]}) == 1 for paths in sample)


# Functions that choose the best layout.


def _rank(layout: Layout, most: int) -> tuple:
    """Return the criteria that rank a layout, most important first."""
    images, masks = layout.images, layout.masks
    looks = [look_at(path) for path in _sample(layout, "masks")]
    colored = [not look_at(image.path).is_grey for image, _ in layout.pairs[:LOOKED_AT]]
    many = 2 * layout.covered >= most
    # In a file name, "train" may be a class (the vehicle) rather than a split. Therefore, require
    # nearly all file names to contain the name of a split.
    in_names = any(MARK in side.head + side.tail for side in (images, masks))
    are_splits = layout.covered >= (0.8 if in_names else 0.5) * most
    return (
        layout.twice == 0,
        many and not NOT_SEMANTIC & set(masks.words()),
        are_splits and len(layout.words) > 1,
        layout.covered,
        -layout.alone,
        # Prefer masks that store labels, which are grey, to masks that store colours.
        all(look.is_grey for look in looks),
        not OUTDATED & {*images.words(), *masks.words()},
        sum(colored),
        masks.version() + images.version(),
        -sum(look.values for look in looks),
        bool(images.suffix) + bool(masks.suffix),
        not images.deep,
        -"".join([*images[3:5], *masks[3:5]]).count("*"),
        -sum(map(len, [*images[3:5], *masks[3:5]])),
    )


def _sample(layout: Layout, kind: str) -> list[Path]:
    """Return the paths of a few of a layout's images or masks, taken at regular intervals."""
    pairs = layout.pairs[:: len(layout.pairs) // LOOKED_AT + 1]
    return [image.path if kind == "images" else mask.path for image, mask in pairs]


def _layouts(root: Path, paths: list[Path], mask_suffixes: set[str]) -> list[Layout]:
    """Return all layouts that pair at least one image, judged by names alone."""
    layouts, seen = [], set()
    for splits_in in (("folders", "names"), ("folders",), ()):
        pictures = [take_apart(root, path, splits_in) for path in paths]
        marks = tuple((p.dirs, p.stem) for p in pictures)
        if marks in seen:
            continue
        seen.add(marks)
        groups: Groups = defaultdict(list)
        for picture in pictures:
            groups[picture.dirs, picture.suffix].append(picture)
        found = [_try(s, groups, mask_suffixes) for s in _propose(pictures, mask_suffixes)]
        layouts += [layout for layout in found if layout]
        if any(2 * len(x.pairs) == len(paths) and len(x.words) > 1 for x in layouts):
            break  # Stop searching once a layout uses every file and identifies the splits.
    return layouts


def _has_masks(layout: Layout) -> bool:
    """Return whether the pixels of a layout's files look like images and masks."""
    masks = [look for look in map(look_at, _sample(layout, "masks")) if not look.error]
    images = [look_at(path) for path in _sample(layout, "images")]
    are_masks = 2 * sum(look.is_mask for look in masks) > len(masks)
    return are_masks and 2 * sum(look.is_mask for look in images) <= len(images)


def search_layouts(root: Path, paths: list[Path]) -> list[Layout]:
    """Return the layout that pairs the most images, and any layouts that tie with it.

    The list is empty if no mask matches an image.

    Args:
        root: Folder of the data set.
        paths: Paths of all images and masks.
    """
    layouts = [x for x in _layouts(root, paths, MASK_SUFFIXES) if _has_masks(x)]
    # A single pair in a folder with other files is probably a coincidence, so reject such layouts.
    layouts = [x for x in layouts if x.covered > 1 or len(paths) <= 2]
    layouts = [x for x in layouts if not _holds_copies(x)]
    if not layouts:
        return []
    most = max(layout.covered for layout in layouts)
    best, *others = sorted(layouts, key=lambda layout: _rank(layout, most), reverse=True)
    # Keep alternatives that assign different masks to the same images.
    chosen = {image.path: mask.path for image, mask in best.pairs}
    by_mask: dict[Path, Layout] = {}
    for layout in others:
        differ = [b.path for a, b in layout.pairs if chosen.get(a.path, b.path) != b.path]
        if differ and layout.covered >= best.covered:
            by_mask.setdefault(min(differ), layout)
    return [best, *by_mask.values()]


def explain_failure(root: Path, paths: list[Path]) -> str:
    """Return the likely reason why no mask matches an image.

    Args:
        root: Folder of the data set.
        paths: Paths of all images and masks.
    """
    for layout in sorted(_layouts(root, paths, IMAGE_SUFFIXES | MASK_SUFFIXES), key=_not_covered):
        first = min(mask.path for _, mask in layout.pairs)
        masks = f"{len(layout.pairs)} masks"
        sample = _sample(layout, "masks")
        errors = [look_at(path).error for path in sample]
        images_fit = not all(look_at(path).error for path in _sample(layout, "images"))
        if all(errors) and images_fit:
            return (
                f"{masks} cannot be decoded, first {first.relative_to(root)} ({errors[0]}); copy "
                "or export them again"
            )
        kind, reason = LOSSY.get(first.suffix.lower(), ("", ""))
        if kind and all(is_lossy_mask(path) for path in sample):
            return (
                f"{masks} are {kind}, first {first.relative_to(root)}; {reason}; export them "
                "again as PNG"
            )
    looks = [look_at(path) for path in paths]
    broken = [path for path, look in zip(paths, looks) if look.error]
    count = sum(look.is_mask for look in looks)
    reason = (
        f"found {len(paths) - count - len(broken)} images and {count} masks, but no mask name "
        "matches an image name"
    )
    if broken:
        reason += f"; {len(broken)} files cannot be decoded, first {broken[0].relative_to(root)}"
    return reason


def _not_covered(layout: Layout) -> tuple:
    """Return a sort key for layouts: first the number of pairs, then words in the mask paths.

    A path that contains a word such as `label` probably belongs to a mask.
    """
    hints = {"mask", "masks", "label", "labels", "annotation", "annotations", "seg", "gt"}
    hints |= {"segmentation", "groundtruth", "truth", "lbl", "annot", "labelled", "matte"}
    return (-layout.covered, not hints & set(layout.masks.words()))
