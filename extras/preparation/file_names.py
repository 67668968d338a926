"""Paths of images and masks, taken apart into what names a split, a sample and a kind."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.paths import MASK_SUFFIXES

WORDS = {
    "train": ("training", "train", "trn", "tr"),
    "val": ("validation", "valid", "val", "dev", "eval"),
    "test": ("testing", "test", "tst", "ts"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
MARK = "\0"  # stands for the split's word
# A hash, a number, a word (of camel case, too), a split's word in `trainannot` or `imagestrain`, or
# any other character.
TOKEN = re.compile(
    r"\0|(?<![A-Za-z0-9])(?=[a-f]*\d)[0-9a-f]{6,}(?![A-Za-z0-9])|\d+"
    r"|(?<![A-Za-z])(?i:train|val|test)(?=(?i:annot|mask|label|image|img|gt))"
    r"|(?<![A-Za-z])(?i:images|masks|labels)(?=(?i:train|val|test))"
    r"|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|."
)
SPLIT_IN_NAME = re.compile(
    rf"(?<![A-Za-z])({'|'.join(w for w in SPLIT_OF if len(w) > 2)})(?![A-Za-z])", re.I
)
MOST_VALUES = 1000  # values of a mask that is still one
SAMPLED = 150  # files whose partners are looked for


class Picture(NamedTuple):
    """A picture file, its path taken apart; `dirs` and `stem` hold MARK for the split's word."""

    path: Path
    dirs: tuple[str, ...]
    split: str
    stem: str
    suffix: str


class Side(NamedTuple):
    """The images or the masks of a layout: `before/{dir}/after/{head}{stem}{tail}{suffix}`.

    If all files have one name, such as `label.png`, that is `head`, and folders tell them apart.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    deep: bool  # whether there are folders between `before` and `after`
    head: str
    tail: str
    suffix: str  # "" is any
    has_stem: bool = True

    def template(self, word: str) -> str:
        """Return the template of a split's paths, given the split's word."""
        suffix = self.suffix
        if not suffix and (self.tail.endswith("*") or re.search(r"\.\w+$", self.tail)):
            suffix = ".*"  # a tail such as `.rf` would be taken for the extension
        middle = ["{dir}"] if self.deep else []
        name = f"{self.head}{{stem}}{self.tail}{suffix}"
        if not self.has_stem:
            middle, name = ["{name}"], f"{self.head}{suffix}"
        return "/".join([*self.before, *middle, *self.after, name]).replace(MARK, word)

    def words(self) -> list[str]:
        """Return the words of the fixed text in lower case."""
        text = "/".join([*self.before, *self.after, self.head, self.tail])
        return [word.lower() for word in TOKEN.findall(text)]

    def version(self) -> int:
        """Return the highest number after a `v` in the fixed text, 0 without one."""
        text = "/".join([*self.before, *self.after, self.head, self.tail])
        return max(map(int, re.findall(r"(?<![A-Za-z])[vV](?:er|ersion)?_?(\d+)", text)), default=0)


Pair = tuple[Picture, Picture]


class Layout(NamedTuple):
    """A way to pair images and masks.

    Attributes:
        images: The images' paths.
        masks: The masks' paths.
        pairs: Images and masks of the splits in `words`.
        words: The words of each split in the paths of images and of masks. Without splits the only
            key is `train`.
        covered: Number of pairs, those of a test split included.
        alone: Number of images that fit but have no mask.
        twice: Number of files that fit but have the name of another one.
    """

    images: Side
    masks: Side
    pairs: list[Pair]
    words: dict[str, tuple[str, str]]
    covered: int
    alone: int
    twice: int


class Look(NamedTuple):
    """A summary of the pixels of a file."""

    is_mask: bool
    is_grey: bool
    values: int
    error: str = ""


@functools.lru_cache(100_000)
def look_at(path: Path) -> Look:
    """Tell whether a picture's pixels look like labels: few values, in areas."""
    try:
        with Image.open(path) as image:
            is_grey = image.mode in ("L", "LA", "P", "1", "I;16", "I")
            pixels = np.array(image)
    except Exception as error:  # Pillow's plugins raise what they like
        return Look(False, False, 0, " ".join(str(error).split()) or type(error).__name__)
    if pixels.ndim == 3:  # grey and alpha, or colours
        colors = pixels[..., :1] if pixels.shape[2] == 2 else pixels[..., :3]
        pixels = colors.astype(np.int32) @ np.array([1, 256, 65536], np.int32)[: colors.shape[2]]
    same = (pixels[:, 1:] == pixels[:, :-1]).mean() if pixels.shape[1] > 1 else 1.0
    values = len(np.unique(pixels))
    is_mask = values <= 64 or (values <= MOST_VALUES and same > 0.75)
    return Look(is_mask and path.suffix.lower() in MASK_SUFFIXES, is_grey, values)


def is_lossy_mask(path: Path) -> bool:
    """Tell whether a picture looks like a mask that lossy compression has changed.

    Nearly all pixels are close to one of a few values, and so are their neighbours.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    except Exception:  # Pillow's plugins raise what they like
        return False
    coarse = (pixels + 8) // 16 @ np.array([1, 17, 289])
    counts = np.sort(np.unique(coarse, return_counts=True)[1])[::-1]
    near = np.abs(np.diff(pixels, axis=1)).max(2) <= 8
    return bool(counts[:24].sum() > 0.85 * coarse.size and near.mean() > 0.7)


def take_apart(root: Path, path: Path, splits_in: Sequence[str]) -> Picture:
    """Take a path apart; look for the split's word in `folders`, and else in `names`."""
    dirs, stem, split = list(path.relative_to(root).parts[:-1]), path.stem, ""
    if "folders" in splits_in:
        whole = [place for place, part in enumerate(dirs) if part.lower() in SPLIT_OF]
        for place in whole or range(len(dirs)):
            tokens = TOKEN.findall(dirs[place])
            found = [token for token in tokens if token.lower() in SPLIT_OF]
            if found:
                split = found[0]
                tokens[tokens.index(split)] = MARK
                dirs[place] = "".join(tokens)
                break
    if "names" in splits_in and not split:
        match = SPLIT_IN_NAME.search(stem)
        if match:
            split, stem = match[0], f"{stem[: match.start()]}{MARK}{stem[match.end() :]}"
    return Picture(path, tuple(dirs), split, stem, path.suffix)


def stem_cores(stem: str) -> list[str]:
    """Return the parts of a name that an image and its mask may have in common.

    Those with digits come first, as numbers tell files apart; the longest are first among equals.
    """
    starts = [match.start() for match in TOKEN.finditer(stem)]
    ends = [*starts[1:], len(stem)]
    cores = {stem[start:end] for start in starts[:8] for end in ends[-8:] if start < end}
    return sorted(
        (core for core in cores if MARK not in core),
        key=lambda core: (any(map(str.isdigit, core)), len(core)),
        reverse=True,
    )


def split_of(picture: Picture) -> str:
    """Return the split that a picture's path names, or an empty string."""
    return SPLIT_OF[picture.split.lower()] if picture.split else ""


def without_numbers(name: str) -> str:
    """Return a name with each number or hash as 0: equal for names of one kind."""
    return re.sub(r"[0-9a-f]*\d[0-9a-f]*", "0", name)


def sample_pictures(pictures: list[Picture]) -> list[Picture]:
    """Return files of every kind of path, and others evenly."""
    kinds: dict[tuple, Picture] = {}
    for picture in pictures:
        path = "/".join([*picture.dirs, picture.stem])
        kinds.setdefault((without_numbers(path), picture.suffix), picture)
    chosen = list(kinds.values())
    chosen = chosen[:: len(chosen) // SAMPLED + 1]
    return list({p.path: p for p in [*chosen, *pictures[:: len(pictures) // SAMPLED + 1]]}.values())
