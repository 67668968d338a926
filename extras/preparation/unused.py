"""A search for images and masks that are in a data set's folder but in no split."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from dataset.description import SPLITS
from dataset.paths import IMAGE_SUFFIXES, MASK_SUFFIXES, Finding, Template, exclusion, list_files
from dataset.source import DataSource

# Extensions of image files that this project cannot read.
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jp2", ".j2k", ".jfif", ".jxl", ".ppm", ".pgm"}
UNREAD_SUFFIXES |= {".pnm", ".tga", ".dng", ".npy", ".npz", ".mat", ".exr", ".hdr"}
# Extensions of files that often accompany images.
SIDECARS = {".yaml", ".yml", ".json", ".txt", ".csv", ".xml", ".md", ".html", ".lst", ""}
# Maximum number of files that a message names after the first one.
NAMED = 3


class Unused(NamedTuple):
    """The files that no split uses, by group.

    Attributes:
        images: Unused images.
        masks: Unused masks, including types that the layout does not match.
        either: Unused files outside the layout's folders that may be either images or masks.
        unlisted: Files that are missing from the list of images for their folder.
        orphans: Masks that match the layout but have no image.
        others: Other types of files in the folders of images and masks.
    """

    images: list[str]
    masks: list[str]
    either: list[str]
    unlisted: list[str]
    orphans: list[str]
    others: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """The number of files in each group."""
        return {name: len(files) for name, files in self._asdict().items()}

    def findings(self) -> list[Finding]:
        """List the unused files as findings that do not prevent training."""
        findings = [Finding(path, "its image is missing", False) for path in self.orphans]
        reasons = {
            False: "is in neither training nor validation, so it is left out",
            True: "is left out, because its format is not supported",
        }
        groups = {"images": self.images, "masks": self.masks, "images or masks": self.either}
        for noun, files in groups.items():
            for is_unread, reason in reasons.items():
                paths = [f for f in files if (_suffix(f) in UNREAD_SUFFIXES) == is_unread]
                findings += _summed_up(paths, reason, noun)
        findings += _summed_up(self.unlisted, "is not in a list, so it is left out", "files")
        by_suffix: dict[str, list[str]] = defaultdict(list)
        for path in self.others:
            by_suffix[_suffix(path)].append(path)
        for suffix, paths in by_suffix.items():
            reason = f"is left out, because the format {suffix} is not supported"
            findings += _summed_up(paths, reason, "files")
        return findings


def _summed_up(paths: list[str], reason: str, noun: str) -> list[Finding]:
    """Return a list with one finding that sums up the files, or an empty list."""
    if not paths:
        return []
    if len(paths) > 1:
        names = ", ".join(os.path.basename(path) for path in paths[1 : 1 + NAMED])
        more = ", …" if len(paths) > 1 + NAMED else ""
        reason = f"{reason} (one of {len(paths):,} {noun}; next {names}{more})"
    return [Finding(paths[0], reason, False)]


def find_unused(source: DataSource, own: Iterable[str] = ()) -> Unused:
    """Find images and masks that are in a data set's folder but in no split.

    Files that the description excludes do not count.

    Args:
        source: A split of the data set.
        own: Paths of files that the command itself writes, which do not count.
    """
    root, splits = source.root, [source.of_split(split) for split in SPLITS]
    layouts = [source.description.sources[split] for split in SPLITS]
    listings = [split.listing() for split in splits]
    real_folder = functools.cache(os.path.realpath)

    def real(path: str) -> str:
        """Resolve links to folders, but not links to files."""
        folder, name = os.path.split(path)
        return f"{real_folder(folder)}/{name}"

    used = {real(file) for listing in listings for sample in listing.samples for file in sample[1:]}
    orphans = {file for listing in listings for file in listing.orphans if real(file) not in used}
    reported = {real(finding.path) for listing in listings for finding in listing.findings}
    skipped = used | reported | {real(file) for file in (*orphans, *own)}
    is_excluded = exclusion(source.description.exclude, root)
    files = [os.path.join(root, file) for file in list_files(root)]
    files = [file for file in files if real(file) not in skipped]
    if is_excluded:
        files = [file for file in files if not is_excluded(file)]
    if files:  # Skip files that a split already uses through a symbolic link.
        links = {os.path.realpath(file) for file in used if os.path.islink(file)}
        files = [file for file in files if os.path.realpath(file) not in links]

    # The folders in the layout show whether a file is an image or a mask.
    image_folders = [_folder(layout.images, root) for layout in layouts]
    mask_folders = [_folder(layout.masks, root) for layout in layouts]
    unused = Unused([], [], [], [], sorted(orphans), [])
    for file in files:
        suffix, place = _suffix(file), real(file)
        of_image = [place.startswith(folder) for folder in image_folders]
        of_mask = [place.startswith(folder) for folder in mask_folders]
        if suffix not in IMAGE_SUFFIXES | MASK_SUFFIXES | UNREAD_SUFFIXES:
            if any(of_image + of_mask) and suffix not in SIDECARS:
                unused.others.append(file)
        elif any(
            layout.list is not None and (image or mask or layout.images is None)
            for image, mask, layout in zip(of_image, of_mask, layouts)
        ):
            unused.unlisted.append(file)
        elif any(of_mask) and not any(of_image):
            unused.masks.append(file)
        elif (any(of_image) and not any(of_mask)) or suffix not in MASK_SUFFIXES:
            unused.images.append(file)
        else:
            unused.either.append(file)
    return unused


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _folder(text: str | None, root: str) -> str:
    """Return a template's folder with a trailing slash, or NUL if the template is None."""
    if text is None:
        return "\0"
    folder = Template(text, root, (), "").folder
    return os.path.join(os.path.realpath(folder), "")
