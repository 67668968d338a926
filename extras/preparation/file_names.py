"""A parser that finds the split and the sample name in the paths of images and masks."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from dataset.paths import MASK_SUFFIXES
from errors import one_line

WORDS = {
    "train": ("training", "train", "trn", "tr"),
    "val": ("validation", "valid", "val", "dev", "eval"),
    "test": ("testing", "test", "tst", "ts"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
# Placeholder in a path for the name of a split, such as `train`.
MARK = "\0"
# Splits a name into tokens: hashes, numbers, words, and the parts of camel-case names. Names like
# `trainannot` and `imagestrain` are split into two words. Any other character is its own token.
TOKEN = re.compile(
    r"\0|(?<![A-Za-z0-9])(?=[a-f]*\d)[0-9a-f]{6,}(?![A-Za-z0-9])|\d+"
    r"|(?<![A-Za-z])(?i:train|val|test)(?=(?i:annot|mask|label|image|img|gt))"
    r"|(?<![A-Za-z])(?i:images|masks|labels)(?=(?i:train|val|test))"
    r"|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|."
)
SPLIT_IN_NAME = re.compile(
    rf"(?<![A-Za-z])({'|'.join(w for w in SPLIT_OF if len(w) > 2)})(?![A-Za-z])", re.I
)
# A file with more distinct values than this is not a mask.
MOST_VALUES = 1000
# Maximum number of files in the sample from which path patterns are guessed.
SAMPLED = 150


class Picture(NamedTuple):
    """An image or mask file with its parsed path.

    In `dirs` and `stem`, MARK replaces the word that names the split.
    """

    path: Path
    dirs: tuple[str, ...]
    split: str
    stem: str
    suffix: str


class Side(NamedTuple):
    """The path pattern of a layout's images or masks.

    The pattern is `before/{dir}/after/{head}{stem}{tail}{suffix}`.

    If all files have the same name, such as `label.png`, then `head` is that name, and the files
    differ only in their folders.

    Attributes:
        before: First folders of the path.
        after: Last folders of the path.
        deep: Whether more folders may come between `before` and `after`.
        head: Fixed start of the file name.
        tail: Fixed end of the file name, before the extension.
        suffix: File extension, or "" to match every extension.
        has_stem: Whether the file name contains the name of the sample.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    deep: bool
    head: str
    tail: str
    suffix: str
    has_stem: bool = True

    def template(self, word: str) -> str:
        """Return the path template for a split.

        Args:
            word: Word that names the split.
        """
        suffix = self.suffix
        if not suffix and (self.tail.endswith("*") or re.search(r"\.\w+$", self.tail)):
            # Without `.*`, the template would mistake a tail such as `.rf` for the extension.
            suffix = ".*"
        middle = ["{dir}"] if self.deep else []
        name = f"{self.head}{{stem}}{self.tail}{suffix}"
        if not self.has_stem:
            middle, name = ["{name}"], f"{self.head}{suffix}"
        return "/".join([*self.before, *middle, *self.after, name]).replace(MARK, word)

    def words(self) -> list[str]:
        """Return the words in the fixed text of the pattern, in lower case."""
        text = "/".join([*self.before, *self.after, self.head, self.tail])
        return [word.lower() for word in TOKEN.findall(text)]

    def version(self) -> int:
        """Return the highest version number in the fixed text, such as 2 for `v2`, or else 0."""
        text = "/".join([*self.before, *self.after, self.head, self.tail])
        return max(map(int, re.findall(r"(?<![A-Za-z])[vV](?:er|ersion)?_?(\d+)", text)), default=0)


class Layout(NamedTuple):
    """A way to pair images and masks by their paths.

    Attributes:
        images: Path pattern of the images.
        masks: Path pattern of the masks.
        pairs: Image and mask pairs in the splits of `words`.
        words: Words that name each split in the image paths and in the mask paths, indexed by
            split. If there are no splits, the only key is `train`.
        covered: Number of pairs, including the pairs of a test split.
        alone: Number of images that match the pattern but have no mask.
        twice: Number of files that match a pattern but have a duplicate name.
    """

    images: Side
    masks: Side
    pairs: list[tuple[Picture, Picture]]
    words: dict[str, tuple[str, str]]
    covered: int
    alone: int
    twice: int


class Look(NamedTuple):
    """A summary of a file's pixels."""

    is_mask: bool
    is_grey: bool
    values: int
    error: str = ""


@functools.lru_cache(100_000)
def look_at(path: Path) -> Look:
    """Summarise the pixels of a file. Large areas with few distinct values suggest a mask.

    Args:
        path: Path of the file.
    """
    try:
        with Image.open(path) as image:
            is_grey = image.mode in ("L", "LA", "P", "1", "I;16", "I")
            pixels = np.array(image)
    except Exception as error:  # Pillow's plugins can raise any type of exception.
        return Look(False, False, 0, read_error(error))
    # Pack the channels of each pixel into one number, without alpha. If there are two channels, the
    # second is alpha.
    if pixels.ndim == 3:
        colors = pixels[..., :1] if pixels.shape[2] == 2 else pixels[..., :3]
        pixels = colors.astype(np.int32) @ np.array([1, 256, 65536], np.int32)[: colors.shape[2]]
    same = (pixels[:, 1:] == pixels[:, :-1]).mean() if pixels.shape[1] > 1 else 1.0
    values = len(np.unique(pixels))
    is_mask = values <= 64 or (values <= MOST_VALUES and same > 0.75)
    return Look(is_mask and path.suffix.lower() in MASK_SUFFIXES, is_grey, values)


def read_error(error: Exception) -> str:
    """Return a one-line reason why a file cannot be read as an image.

    Args:
        error: Exception that Pillow or a decoder raised.
    """
    is_unknown = isinstance(error, UnidentifiedImageError)
    return "unknown image format" if is_unknown else one_line(error)


def is_lossy_mask(path: Path) -> bool:
    """Return whether a file looks like a mask that lossy compression has altered.

    Most pixels of such a mask are close to one of a few colours and differ little from their
    neighbours.

    Args:
        path: Path of the file.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    except Exception:  # Pillow's plugins can raise any type of exception.
        return False
    coarse = (pixels + 8) // 16 @ np.array([1, 17, 289])
    counts = np.sort(np.unique(coarse, return_counts=True)[1])[::-1]
    near = np.abs(np.diff(pixels, axis=1)).max(2) <= 8
    return bool(counts[:24].sum() > 0.85 * coarse.size and near.mean() > 0.7)


def take_apart(root: Path, path: Path, splits_in: Sequence[str]) -> Picture:
    """Parse a path into its folders, split and file name.

    Args:
        root: Folder of the data set.
        path: Path of the file.
        splits_in: Parts of the path to search for a split's name: `folders`, `names` or both.
            Folders are searched before names.
    """
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
    """Return the parts of a file name that an image and its mask may have in common.

    Parts with digits come first, because a number usually identifies a file. Longer parts come
    before shorter parts.

    Args:
        stem: File name without its extension.
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
    """Return the split named in a file's path, or an empty string if there is none.

    Args:
        picture: The parsed file.
    """
    return SPLIT_OF[picture.split.lower()] if picture.split else ""


def without_numbers(name: str) -> str:
    """Replace each number or hash in a name with 0, so that similar names compare equal.

    Args:
        name: Name or path to simplify.
    """
    return re.sub(r"[0-9a-f]*\d[0-9a-f]*", "0", name)


def sample_pictures(pictures: list[Picture]) -> list[Picture]:
    """Return a sample of files: one for each kind of path, and others at regular intervals.

    Args:
        pictures: All files.
    """
    kinds: dict[tuple, Picture] = {}
    for picture in pictures:
        path = "/".join([*picture.dirs, picture.stem])
        kinds.setdefault((without_numbers(path), picture.suffix), picture)
    chosen = list(kinds.values())
    chosen = chosen[:: len(chosen) // SAMPLED + 1]
    return list({p.path: p for p in [*chosen, *pictures[:: len(pictures) // SAMPLED + 1]]}.values())
