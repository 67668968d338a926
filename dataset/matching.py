"""The image and mask pairs of a split, matched by templates or by lists.

A mask belongs to an image if the placeholders of their templates have the same values; see
`dataset.paths`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

from dataset.description import Description, Source, ade20k
from dataset.paths import (
    FOLDERS,
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Exclusion,
    Files,
    Finding,
    Sample,
    Samples,
    Template,
    exclusion,
    find_root,
)
from errors import ConfigError, DataError

log = logging.getLogger(__name__)


class Listing(NamedTuple):
    """A split's images and masks, and problems with their file names.

    Attributes:
        samples: Images with a mask, sorted by name.
        findings: Problems with file names.
        orphans: Masks that belong to no image of the split.
        images: Number of images, with or without a mask.
    """

    samples: Samples
    findings: list[Finding]
    orphans: list[str]
    images: int


class _Pairs(NamedTuple):
    """A source's images and masks before they are divided among the splits.

    Attributes:
        images: Path of each image relative to `folders[0]`, indexed by name including folders.
        masks: Path of each mask relative to `folders[1]`, indexed by the name of its image.
        findings: Problems, each paired with the name of the affected image or with None.
        orphans: Masks without an image.
        folders: Common prefix of all image paths, and common prefix of all mask paths.
    """

    images: dict[str, str]
    masks: dict[str, str]
    findings: list[tuple[str | None, Finding]]
    orphans: list[str]
    folders: tuple[str, str] = ("", "")

    def report(
        self, path: str | Path, reason: str, image: str | None = None, fatal: bool = True
    ) -> None:
        """Record a problem with a file. It affects one image or, by default, the whole split."""
        self.findings.append((image, Finding(str(path), reason, fatal)))


def list_splits(description: Description, split: str, root: str) -> dict[str, Listing]:
    """Pair a split's images and masks, and find problems with their file names.

    Args:
        description: Description of the data set.
        split: 'train' or 'val'.
        root: Folder that the layout's paths are relative to.

    Returns:
        A listing for each split. If `val` is a fraction of `train`, both splits are included.
        Otherwise, only the requested split is included.

    Raises:
        ConfigError: The description does not specify where the images and masks are.
    """
    if split not in description.sources:
        raise ConfigError(
            "the description has no train or val section; add both to locate images and masks"
        )
    source = description.sources[split]
    find = _listed_pairs if source.images is None else _matched
    pairs = find(source, split, root, exclusion(description.exclude, root))
    # In ADE20K's own layout, sort the samples by their complete file names, including the prefix.
    keep_prefix = description.built_in is not None
    shares: dict[str, Set[str]] = {split: pairs.images.keys()}
    if description.fraction:
        shares = _share(list(pairs.images), description.fraction)
    where = str(Path(root, source.list or source.images or ""))
    listings = {}
    for name, names in shares.items():
        findings = [finding for image, finding in pairs.findings if image is None or image in names]
        if description.fraction and len(names) == 1 < len(pairs.images):
            findings += _moved(pairs, names, name, description.fraction)
        if not names and not any(finding.fatal for finding in findings):
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            reason = f"contains no images for {name}; add files with {suffixes}"
            findings.append(Finding(where, reason, True))
        chosen = [image for image in pairs.masks if image in names]
        samples = _sorted(pairs, chosen, f"ADE_{name}_", keep_prefix)
        # If training and validation share a mask folder, a mask without an image may belong to the
        # other split, so do not report it. If `val` is a fraction of `train`, report such masks
        # only once, for the training split.
        others = [layout.masks for layout in description.sources.values() if layout != source]
        is_shared = source.masks in others
        if description.fraction:
            is_shared = name == "val"
        listings[name] = Listing(samples, findings, [] if is_shared else pairs.orphans, len(names))
    return listings


def _sorted(pairs: _Pairs, names: list[str], prefix: str, keep_prefix: bool) -> Samples:
    """Return the samples sorted by name, with ADE20K's prefix removed from the names.

    With `keep_prefix`, the names are sorted before the prefix is removed.
    """
    names.sort()
    if not keep_prefix and any(name.startswith(prefix) for name in names):
        names.sort(key=lambda name: (name.removeprefix(prefix), pairs.images[name]))
    uids = [name.removeprefix(prefix) for name in names]
    images = [pairs.images[name] for name in names]
    masks = [pairs.masks[name] for name in names]
    return Samples(uids, images, masks, pairs.folders)


def _share(names: list[str], fraction: float) -> dict[str, Set[str]]:
    """Assign each image name to training or validation, based on the name's hash.

    If there are at least two names, each split gets at least one.
    """
    place = {name: _place(name) for name in names}
    val = {name for name in names if place[name] < fraction}
    if len(names) > 1 and not val:
        val = {min(names, key=place.__getitem__)}
    elif len(names) > 1 and len(val) == len(names):
        val.remove(max(names, key=place.__getitem__))
    return {"train": set(names) - val, "val": val}


def _moved(pairs: _Pairs, names: Set[str], split: str, fraction: float) -> list[Finding]:
    """Report an image that was moved to this split because the split would otherwise be empty."""
    (name,) = names
    if (_place(name) < fraction) == (split == "val"):
        return []
    reason = (
        f"was moved to {split}, because fraction {fraction} of {len(pairs.images)} images left "
        f"{split} empty; it may move back when images are added"
    )
    return [Finding(pairs.folders[0] + pairs.images[name], reason, False)]


def find_samples(description: Description, split: str, root: str) -> tuple[Samples, list[Finding]]:
    """Return a split's image and mask pairs, sorted by name, and problems with the file names.

    Args:
        description: Description of the data set.
        split: 'train' or 'val'.
        root: Folder that the layout's paths are relative to.
    """
    listing = list_splits(description, split, root)[split]
    return listing.samples, listing.findings + _orphaned(listing.orphans)


def _orphaned(orphans: list[str]) -> list[Finding]:
    if not orphans:
        return []
    others = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
    return [Finding(orphans[0], f"its image is missing{others}", False)]


def require(listing: Listing) -> Samples:
    """Return a listing's samples, and log a warning for each non-fatal problem.

    Args:
        listing: Samples of a split, and problems with their file names.

    Raises:
        DataError: The split has no images, or an image has no mask.
    """
    fatal = [finding for finding in listing.findings if finding.fatal]
    if fatal:
        others = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise DataError(f"{fatal[0].path}: {fatal[0].reason}{others}")
    for finding in listing.findings + _orphaned(listing.orphans):
        log.warning("%s: %s", finding.path, finding.reason)
    return listing.samples


def _place(name: str) -> float:
    """Hash an image's name to a number in [0, 1)."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _matched(source: Source, split: str, root: str, is_excluded: Exclusion) -> _Pairs:
    """Pair images and masks by their templates; if the source has a list, skip unlisted images."""
    assert source.images is not None
    if source.masks is None:
        raise ConfigError(
            f"{split}.masks is missing; set it to the folder with the masks of {source.images}"
        )
    pairs = _Pairs({}, {}, [], [])
    image_template = Template(source.images, root, IMAGE_SUFFIXES, f"{split}.images")
    mask_template = Template(source.masks, root, MASK_SUFFIXES, f"{split}.masks")
    found = _find_images(image_template, mask_template, is_excluded, pairs)
    images = found.paths
    if source.list is not None:
        images = _listed(source.list, root, found, pairs)
    pairs = pairs._replace(images=images, folders=(found.folder, ""))
    if not mask_template.folder.is_dir():
        pairs.report(mask_template.folder, "folder is missing")
        return pairs
    # If the mask template contains `{dir}` or `{name}`, a mask must match the image's folder and
    # name. Otherwise only the name must match.
    with_folders = bool(mask_template.fields & {"dir", "name"})
    files = mask_template.files(is_excluded, with_folders)
    pairs = pairs._replace(folders=(found.folder, files.folder))
    if with_folders and not files.same and images.keys() == files.paths.keys():
        # Usually, each image has a mask of the same name, so the slower loop below is not needed.
        return pairs._replace(masks=files.paths)
    keys = list(images) if with_folders else [name.rpartition("/")[2] for name in images]
    # Maps the name of each mask to the first image that uses this mask.
    used = dict(zip(reversed(keys), reversed(images)))
    for name, key in zip(images, keys):
        if key not in files.paths:
            reason = f"its mask is missing; expected {source.masks}"
        elif used[key] != name:
            reason = f"has the same mask as {found.path(used[key])}; rename one of them"
        else:
            pairs.masks[name] = files.paths[key]
            continue
        pairs.report(found.path(name), reason, name)
    pairs.findings.extend((used.get(key), finding) for key, finding in files.findings())
    if source.list is None and images:
        alone = sorted(files.paths.keys() - used.keys())
        pairs.orphans.extend(map(files.path, alone))
    return pairs


def _find_images(images: Template, masks: Template, is_excluded: Exclusion, pairs: _Pairs) -> Files:
    """Return the images that match the template."""
    if not images.folder.is_dir():
        pairs.report(images.folder, "folder is missing")
        return Files({}, [], os.path.join(images.folder, ""))
    left_out = [is_excluded] if is_excluded else []
    # A template with an extension may also match files that are not images.
    if images.has_suffix:
        ends = tuple(IMAGE_SUFFIXES)
        left_out.append(lambda path: not path.lower().endswith(ends))
    if masks.text != images.text:
        folders = os.path.abspath(images.folder), os.path.abspath(masks.folder)
        # If the image and mask folders overlap, do not mistake masks for images.
        if os.path.commonpath(folders) in folders:
            left_out.append(masks.matches)
    files = images.files((lambda path: any(f(path) for f in left_out)) if left_out else None)
    pairs.findings.extend(files.findings())
    return files


def _lines(file: str, root: str, pairs: _Pairs) -> Iterator[tuple[str, str]]:
    """Yield the location (for error messages) and the text of each line in a list file."""
    path = Path(root, file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        pairs.report(path, f"cannot read the list: {reason}")
        return
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            yield f"{path}:{number}", line.strip()


def _listed(file: str, root: str, images: Files, pairs: _Pairs) -> dict[str, str]:
    """Return the images named in a list file.

    A line may contain a path relative to the root or to the image folder, or a file name. The
    extension may be omitted.
    """
    known: dict[str, set[str]] = {}
    for uid, below in images.paths.items():
        path, stem = images.path(uid), uid.rpartition("/")[2]
        names = {uid, stem, os.path.relpath(path, root), below, os.path.basename(path)}
        for name in names | {os.path.splitext(name)[0] for name in names - {uid, stem}}:
            known.setdefault(name, set()).add(uid)
    chosen: dict[str, str] = {}
    folder = Path(images.folder)
    for where, line in _lines(file, root, pairs):
        matches = known.get(os.path.normpath(line).lstrip("/"), set())
        if len(matches) != 1:
            number = f"{len(matches)} images" if matches else "no image"
            pairs.report(where, f"{folder} has {number} named {line}; correct the list")
            continue
        (uid,) = matches
        if uid in chosen:
            pairs.report(where, f"{line} is listed twice", uid, fatal=False)
        chosen[uid] = images.paths[uid]
    return chosen


def _listed_pairs(source: Source, split: str, root: str, is_excluded: Exclusion) -> _Pairs:
    """Return the image and mask pairs listed in a file with two columns."""
    assert source.list is not None
    pairs = _Pairs({}, {}, [], [])
    masks: dict[str, str] = {}
    for where, line in _lines(source.list, root, pairs):
        columns = [part.strip() for part in re.split(r"[\t,;]", line)]
        columns = columns if len(columns) > 1 else line.split()
        if len(columns) != 2:
            pairs.report(where, f"got {len(columns)} columns; expected an image and its mask")
            continue
        paths = [_existing(root, source.list, column) for column in columns]
        if is_excluded and any(path and is_excluded(path) for path in paths):
            continue
        for path, column in zip(paths, columns):
            if path is None:
                pairs.report(where, f"file {column} is missing")
        if None not in paths:
            if paths[0] in masks:
                pairs.report(where, f"{columns[0]} is listed twice", fatal=False)
            masks[str(paths[0])] = str(paths[1])
    stems = [Path(path).stem for path in masks]
    is_short = len(set(stems)) == len(stems)
    for stem, (path, mask) in zip(stems, masks.items()):
        name = stem if is_short else os.path.splitext(os.path.relpath(path, root))[0]
        pairs.images[name], pairs.masks[name] = path, mask
    return pairs


def _existing(root: str, file: str, name: str) -> str | None:
    """Find a listed file in the root or in the list's folder, and return its path or None."""
    places = [Path(root, name), Path(root, name.lstrip("/")), Path(root, file).parent / name]
    return next((str(place) for place in places if place.is_file()), None)


def list_samples(datadir: str, split: str) -> list[Sample]:
    """List the images of a split and their masks, sorted by name.

    Args:
        datadir: Folder with `images/{training,validation}` and `annotations/{training,validation}`,
            or the parent of ADE20K's folder `ADEChallengeData2016`. Subfolders are included, and
            files of other types are ignored.
        split: 'train' or 'val'.

    Returns:
        The samples. Each `uid` is the image's path without its extension and without ADE20K's
        prefix, such as `ADE_train_`.

    Raises:
        DataError: The split has no images, or an image has no mask.
    """
    if split not in FOLDERS:
        raise DataError(f"unknown split {split!r}; use {' or '.join(FOLDERS)}")
    return list(require(list_splits(ade20k(), split, str(find_root(datadir)))[split]))
