"""Which photos a description's split has, and the mask of each, by templates or lists.

A template is a path below the root in which `{stem}` stands for a name, `{dir}/` for any folders
(or none), `{name}` for both, `**/` for folders and `*` for a part of a name that do not matter. A
folder stands for all the files in it and below, and a path without extension has any. A mask
belongs to the photo whose values fit what its template asks for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dataset.description import Description, Source
from dataset.folders import IMAGE_SUFFIXES, MASK_SUFFIXES, Sample, visible_files
from errors import ConfigError, DataError

log = logging.getLogger(__name__)

_TOKEN = re.compile(r"(\{\w*\}/?|\*\*/|\*)")


class Problem(NamedTuple):
    """Something about the names of files."""

    path: str
    reason: str
    fatal: bool  # training would fail


class Template:
    """A template, or a folder.

    Args:
        text: The template.
        root: What it is below.
        suffixes: Extensions of the files, where the template has none.
        where: What to call it in an error.

    Attributes:
        folder: The folder that all files which fit are in.
        fields: Those of `stem`, `dir` and `name` that it asks for.

    Raises:
        ConfigError: It asks for something else.
    """

    def __init__(self, text: str, root: str, suffixes: Iterable[str], where: str) -> None:
        tokens = _TOKEN.split(os.path.normpath(text).removeprefix("./"))
        if len(tokens) == 1:
            tokens = _TOKEN.split(f"{tokens[0]}/{{name}}")
        fixed, slash, rest = tokens[0].rpartition("/")
        self.text, self.folder = text, Path(root, fixed + slash)
        self.fields: set[str] = set()
        parts = [re.escape(rest)]
        for place, token in enumerate(tokens[1:], 1):
            parts.append(self._pattern(token, where) if place % 2 else re.escape(token))
        pattern = "".join(parts)
        any_suffix = r"\.[^/]*"  # of `.*`
        if pattern.endswith(any_suffix) or not re.search(r"\.\w+$", tokens[-1]):
            ends = "|".join(map(re.escape, sorted(suffixes)))
            pattern = f"{pattern.removesuffix(any_suffix)}(?i:{ends})"
        self.regex = re.compile(pattern)

    def _pattern(self, token: str, where: str) -> str:
        if token == "**/":
            return "(?:.+/)?"
        if token == "*":
            return "[^/]*"
        field = token.strip("{}/")
        if field not in ("stem", "dir", "name"):
            raise ConfigError(f"{where}: {{{field}}} is none of {{stem}}, {{dir}} and {{name}}")
        slash = "/" if token.endswith("/") else ""
        if field in self.fields:
            return "(?:(?P=dir)/)?" if field == "dir" and slash else f"(?P={field}){slash}"
        self.fields.add(field)
        if field == "dir" and slash:
            return "(?:(?P<dir>.+?)/)?"
        return f"(?P<{field}>{'[^/]+?' if field == 'stem' else '.+?'}){slash}"

    def match(self, path: str) -> tuple[str, str] | None:
        """Return the folders and the name of a file, given its path below `folder`, or None."""
        found = self.regex.fullmatch(path)
        if found is None:
            return None
        given = found.groupdict()
        if given.get("name") is not None:
            folder, _, stem = given["name"].rpartition("/")
            return folder, stem
        folder = given.get("dir")
        if folder is None and "dir" not in self.fields:
            folder = path.rpartition("/")[0]
        return folder or "", given.get("stem") or Path(path).stem

    def has(self, path: Path) -> bool:
        """Whether a file, given by its path, fits."""
        if not path.is_relative_to(self.folder):
            return False
        return self.match(path.relative_to(self.folder).as_posix()) is not None

    def files(self) -> Iterator[tuple[Path, tuple[str, str]]]:
        """Yield the files that fit, each with its folders and its name."""
        for _, path in visible_files(self.folder):
            fields = self.match(path.relative_to(self.folder).as_posix())
            if fields is not None:
                yield path, fields


def find_samples(
    description: Description, split: str, root: str
) -> tuple[list[Sample], list[Problem]]:
    """Pair a split's photos and masks, sorted by name, and find what is wrong with their names."""
    if split not in description.sources:
        raise ConfigError("the description does not say where photos and masks are: add train, val")
    source, problems = description.sources[split], []
    if source.images is None:
        samples = _listed_pairs(source, split, root, problems)
    else:
        samples = _matched(source, split, root, problems, bool(description.fraction))
    if description.fraction:
        is_val = split == "val"
        samples = [s for s in samples if (_place(s.uid) < description.fraction) == is_val]
    prefix = f"ADE_{split}_"
    samples = sorted(s._replace(uid=s.uid.removeprefix(prefix)) for s in samples)
    if not samples and not any(problem.fatal for problem in problems):
        what = source.list or source.images or ""
        reason = f"holds no photos of {split} ({', '.join(sorted(IMAGE_SUFFIXES))})"
        problems.append(Problem(str(Path(root, what)), reason, True))
    return samples, problems


def list_described(description: Description, split: str, root: str) -> list[Sample]:
    """As `dataset.folders.list_samples`, by a description.

    Raises:
        DataError: There are no photos, or photos without a mask.
    """
    samples, problems = find_samples(description, split, root)
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        others = f" (and {len(fatal) - 1} more such)" if len(fatal) > 1 else ""
        raise DataError(f"{fatal[0].path}: {fatal[0].reason}{others}")
    for problem in problems:
        log.warning("%s: %s", problem.path, problem.reason)
    return samples


def _place(name: str) -> float:
    """Return where in 0..1 a photo's name is hashed to."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _matched(
    source: Source, split: str, root: str, problems: list[Problem], shares: bool
) -> list[Sample]:
    """Pair photos and masks by their templates, those of a list where there is one."""
    assert source.images is not None
    images = Template(source.images, root, IMAGE_SUFFIXES, f"{split}.images")
    masks = None
    if source.masks is not None:
        masks = Template(source.masks, root, MASK_SUFFIXES, f"{split}.masks")
    photos = _photos(images, masks, problems)
    if source.list is not None:
        photos = _listed(source.list, root, images, photos, problems)
    if masks is None:
        raise ConfigError(f"{split}.masks is missing: where are the masks of {source.images}?")
    whole = bool(masks.fields & {"dir", "name"})
    found: dict[tuple[str, str], str] = {}
    if not masks.folder.is_dir():
        problems.append(Problem(str(masks.folder), "folder is missing", True))
        return []
    for path, fields in masks.files():
        key = fields if whole else ("", fields[1])
        if key in found:
            problems.append(Problem(str(path), f"same name as {found[key]}", True))
        found.setdefault(key, str(path))
    samples, used = [], dict[tuple[str, str], str]()
    for uid, (path, fields) in photos.items():
        key = fields if whole else ("", fields[1])
        if key not in found:
            reason = f"its mask is missing, {source.masks}"
            problems.append(Problem(path, reason, True))
        elif key in used:
            problems.append(Problem(path, f"has the same mask as {used[key]}", True))
        else:
            samples.append(Sample(uid, path, found[key]))
        used[key] = path
    alone = [] if source.list or shares else sorted(found.keys() - used.keys())
    if alone:
        others = f" (as {len(alone) - 1} more)" if len(alone) > 1 else ""
        problems.append(Problem(found[alone[0]], f"its photo is missing{others}", False))
    return samples


def _photos(
    images: Template, masks: Template | None, problems: list[Problem]
) -> dict[str, tuple[str, tuple[str, str]]]:
    """Return the photos that fit, by name: path, and folders and name that the template finds."""
    if not images.folder.is_dir():
        problems.append(Problem(str(images.folder), "folder is missing", True))
        return {}
    photos: dict[str, tuple[str, tuple[str, str]]] = {}
    for path, fields in images.files():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if masks is not None and masks.text != images.text and masks.has(path):
            continue  # a mask beside its photo
        uid = "/".join(filter(None, fields))
        if uid in photos:
            problems.append(Problem(str(path), f"same name as {photos[uid][0]}", True))
        photos.setdefault(uid, (str(path), fields))
    return photos


def _lines(file: str, root: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Yield the lines of a list, each with what to call it."""
    path = Path(root, file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        problems.append(Problem(str(path), f"the list cannot be read: {reason}", True))
        return
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            yield f"{path}:{number}", line.strip()


def _listed(
    file: str,
    root: str,
    images: Template,
    photos: dict[str, tuple[str, tuple[str, str]]],
    problems: list[Problem],
) -> dict[str, tuple[str, tuple[str, str]]]:
    """Return the photos that a list names: by path, by path below their folder, or by name."""
    known: dict[str, set[str]] = {}
    for uid, (path, fields) in photos.items():
        below = os.path.relpath(path, images.folder)
        names = {uid, fields[1], os.path.relpath(path, root), below, os.path.basename(path)}
        for name in names | {os.path.splitext(name)[0] for name in names - {uid, fields[1]}}:
            known.setdefault(name, set()).add(uid)
    chosen = {}
    for where, line in _lines(file, root, problems):
        found = known.get(os.path.normpath(line).lstrip("/"), set())
        if len(found) != 1:
            reason = f"{line} is the name of {len(found) or 'no'} photo{'s' * bool(found)}"
            problems.append(Problem(where, f"{reason} in {images.folder}", True))
        for uid in found if len(found) == 1 else ():
            if uid in chosen:
                problems.append(Problem(where, f"{line} is listed twice", False))
            chosen[uid] = photos[uid]
    return chosen


def _listed_pairs(source: Source, split: str, root: str, problems: list[Problem]) -> list[Sample]:
    """Return the photos and masks that a list has side by side, in two columns."""
    assert source.list is not None
    pairs: dict[str, str] = {}
    for where, line in _lines(source.list, root, problems):
        columns = [part.strip() for part in re.split(r"[\t,;]", line)]
        columns = columns if len(columns) > 1 else line.split()
        if len(columns) != 2:
            reason = f"{len(columns)} columns; without images, a line is a photo and its mask"
            problems.append(Problem(where, reason, True))
            continue
        paths = [_existing(root, source.list, column) for column in columns]
        for path, column in zip(paths, columns):
            if path is None:
                problems.append(Problem(where, f"there is no file {column}", True))
        if None not in paths:
            if paths[0] in pairs:
                problems.append(Problem(where, f"{columns[0]} is listed twice", False))
            pairs[str(paths[0])] = str(paths[1])
    stems = [Path(path).stem for path in pairs]
    short = len(set(stems)) == len(stems)
    return [
        Sample(stem if short else os.path.splitext(os.path.relpath(path, root))[0], path, mask)
        for stem, (path, mask) in zip(stems, pairs.items())
    ]


def _existing(root: str, file: str, name: str) -> str | None:
    """Find what a list means: a path below the root, or below the list's own folder."""
    places = [Path(root, name), Path(root, name.lstrip("/")), Path(root, file).parent / name]
    return next((str(place) for place in places if place.is_file()), None)
