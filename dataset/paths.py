"""Paths of images and masks: file listings and path templates.

A template is a path relative to the data set's root. A template may contain these placeholders:

- `{stem}` matches a file's base name or a part of it.
- `{dir}/` matches any number of folders, including none.
- `{name}` matches any number of folders and a file's base name.
- `**/` matches any number of folders, which are not part of the sample's name.
- `*` matches a part of a file name, which is not part of the sample's name.

A folder's path matches all files in the folder and its subfolders. A path without an extension
matches any image or mask extension.

This module imports only the standard library, so that a bad config is reported quickly.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from errors import ConfigError

log = logging.getLogger(__name__)

_TOKEN = re.compile(r"(\{\w*\}/?|\*\*/|\*)")
ADE20K = "ADEChallengeData2016"  # Top-level folder in ADE20K's archive.
FOLDERS = {"train": "training", "val": "validation"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MASK_SUFFIXES = {".png", ".bmp", ".gif", ".tif", ".tiff"}


class Sample(NamedTuple):
    """The name of a sample, and the paths of its image and mask."""

    uid: str
    image_path: str
    mask_path: str


class Finding(NamedTuple):
    """A problem with a file.

    Attributes:
        path: Path of the file.
        reason: Description of the problem.
        fatal: Whether training would fail because of the problem.
    """

    path: str
    reason: str
    fatal: bool


def find_root(path: str | Path) -> Path:
    """Return `path` if it contains the folder `images`, and its ADE20K subfolder otherwise.

    Args:
        path: Folder of a data set in ADE20K's layout.
    """
    return Path(path) if Path(path, "images").is_dir() else Path(path, ADE20K)


def list_files(folder: str | Path) -> list[str]:
    """List all files in a folder and below it, except hidden files.

    Links to folders are followed. To prevent cycles, links are skipped if they point into `folder`,
    to one of its parents, or to a folder already visited.

    Args:
        folder: Folder to list.

    Returns:
        Sorted paths relative to `folder`. A folder's files come before its subfolders.
    """
    base, top = os.path.join(folder, ""), os.path.realpath(folder)
    files, seen, real = [], {top}, {base: top}

    def is_new(place: str, name: str) -> bool:
        """Return whether a subfolder should be listed, and record that it has been seen."""
        path, target = os.path.join(place, name), os.path.join(real[place], name)
        if os.path.islink(path):
            target = os.path.realpath(path)
            if os.path.commonpath([top, target]) in (top, target):
                return False
        if target in seen:
            return False
        real[path] = target
        seen.add(target)
        return True

    for place, folders, names in os.walk(base, onerror=_report_unlisted, followlinks=True):
        below = os.path.join(place.removeprefix(base), "")
        files += [below + name for name in sorted(names) if name[0] != "."]
        inner = sorted(name for name in folders if name[0] != ".")
        folders[:] = [name for name in inner if is_new(place, name)]
    return files


def _report_unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        message = "%s: cannot list this folder, so its files are left out: %s"
        log.warning(message, error.filename, error.strerror)


def visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each listed file's relative path without its extension, and its full path.

    Args:
        folder: Folder to list; see `list_files`.
    """
    for name in list_files(folder):
        path = Path(folder, name)
        yield path.relative_to(folder).with_suffix("").as_posix(), path


class Template:
    """A matcher for the paths that a template or a folder describes.

    Args:
        text: Template or folder, relative to `root`.
        root: Folder that the template's paths are relative to.
        suffixes: Extensions to accept if the template has none.
        where: Name of the template in error messages.

    Attributes:
        folder: Deepest folder that contains every matching file.
        fields: Names of the placeholders that the template uses: `stem`, `dir` or `name`.
        has_suffix: Whether the template includes a file extension.

    Raises:
        ConfigError: The template uses an unknown placeholder.
    """

    def __init__(self, text: str, root: str, suffixes: Iterable[str], where: str) -> None:
        tokens = _TOKEN.split(os.path.normpath(text).removeprefix("./"))
        if len(tokens) == 1:
            tokens = _TOKEN.split(f"{tokens[0]}/{{name}}")
        self.is_simple = len(tokens) == 3
        fixed, slash, rest = tokens[0].rpartition("/")
        self.text, self.folder = text, Path(root, fixed + slash)
        self._prefix = os.path.join(self.folder, "")
        self.fields: set[str] = set()
        parts = [re.escape(rest)]
        for place, token in enumerate(tokens[1:], 1):
            parts.append(self._pattern(token, where) if place % 2 else re.escape(token))
        pattern = "".join(parts)
        any_suffix = r"\.[^/]*"  # In a template, `.*` stands for this regular expression.
        self.has_suffix = bool(re.search(r"\.\w+$", tokens[-1]))
        if pattern.endswith(any_suffix) or not self.has_suffix:
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
            raise ConfigError(
                f"{where}: unknown placeholder {{{field}}}; use {{stem}}, {{dir}} or {{name}}"
            )
        slash = "/" if token.endswith("/") else ""
        if field in self.fields:
            return "(?:(?P=dir)/)?" if field == "dir" and slash else f"(?P={field}){slash}"
        self.fields.add(field)
        if field == "dir" and slash:
            return "(?:(?P<dir>.+?)/)?"
        # If a template has only one placeholder, a path can match it in only one way, so a lazy
        # quantifier is not needed.
        lazy = "" if self.is_simple else "?"
        return f"(?P<{field}>{'[^/]+' if field == 'stem' else '.+'}{lazy}){slash}"

    def _name(self, match: re.Match[str]) -> str:
        """Return a matching file's name, including its folders."""
        if "name" in self.fields:
            return match["name"]
        values = match.groupdict()
        folder = values.get("dir") or ""
        if "dir" not in self.fields:
            folder = match.string.rpartition("/")[0]
        stem = values.get("stem") or Path(match.string).stem
        return f"{folder}/{stem}" if folder else stem

    def matches(self, path: str) -> bool:
        """Return whether a file matches the template.

        Args:
            path: Full path of the file.
        """
        below = path.removeprefix(self._prefix)
        return below != path and self.regex.fullmatch(below) is not None

    def files(self, is_excluded: Exclusion = None, with_folders: bool = True) -> Files:
        """List the matching files, indexed by name.

        Args:
            is_excluded: Function that takes a full path and returns whether to skip the file, or
                None to skip nothing.
            with_folders: Whether each name includes the file's folders.
        """
        folder, same = self._prefix, []
        paths: dict[str, str] = {}
        # Keep the work per file small, because a data set may have several hundred thousand files.
        for path in list_files(folder):
            match = self.regex.fullmatch(path)
            if match is None or (is_excluded and is_excluded(folder + path)):
                continue
            name = self._name(match)
            if not with_folders:
                name = name.rpartition("/")[2]
            if paths.setdefault(name, path) != path:
                same.append((name, path))
        return Files(paths, same, folder)


class Files(NamedTuple):
    """Files indexed by name, and files with a duplicate name.

    Attributes:
        paths: Path of each file relative to `folder`, indexed by name.
        same: Name and relative path of each file whose name an earlier file already has.
        folder: Common prefix of all paths, with a trailing slash.
    """

    paths: dict[str, str]
    same: list[tuple[str, str]]
    folder: str

    def path(self, name: str) -> str:
        """Return the full path of a file.

        Args:
            name: Name of the file.
        """
        return self.folder + self.paths[name]

    def findings(self) -> list[tuple[str, Finding]]:
        """Return the name of each file with a duplicate name, and a description of the problem."""
        found = []
        for name, path in self.same:
            reason = f"has the same name as {self.path(name)}; rename one of them"
            found.append((name, Finding(self.folder + path, reason, True)))
        return found


Exclusion = Callable[[str], bool] | None


def exclusion(exclude: Collection[str], root: str) -> Exclusion:
    """Return a function that tells whether a path is excluded, or None if nothing is excluded.

    Args:
        exclude: Folders, files or templates to leave out.
        root: Folder that the excluded paths are relative to.
    """
    if not exclude:
        return None
    files = {os.path.normpath(os.path.join(root, text)) for text in exclude}
    suffixes = IMAGE_SUFFIXES | MASK_SUFFIXES
    templates = [Template(text, root, suffixes, "exclude") for text in exclude]
    return lambda path: path in files or any(template.matches(path) for template in templates)


class Samples(Sequence[Sample]):
    """A sequence of samples that shares its memory with forked loader processes.

    All names are stored in one array. A list of strings would be copied into every process, because
    Python updates the reference counts inside the strings.

    Args:
        uids: Name of each sample.
        images: Path of each image relative to `folders[0]`.
        masks: Path of each mask relative to `folders[1]`.
        folders: Common prefix of all image paths, and common prefix of all mask paths.
    """

    def __init__(
        self,
        uids: Sequence[str] = (),
        images: Sequence[str] = (),
        masks: Sequence[str] = (),
        folders: tuple[str, str] = ("", ""),
    ) -> None:
        # Import NumPy lazily, because even commands that only print --help import this module.
        import numpy as np

        self._folders, self._length = folders, len(uids)
        text = "\0".join([*uids, *images, *masks, ""])
        self._text = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        # Positions of the NUL bytes that end the names, preceded by -1.
        self._ends = np.append(-1, np.flatnonzero(self._text == 0))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        uid, image, mask = (self._name(place + column * len(self)) for column in range(3))
        return Sample(uid, self._folders[0] + image, self._folders[1] + mask)

    def _name(self, place: int) -> str:
        name = self._text[self._ends[place] + 1 : self._ends[place + 1]]
        return name.tobytes().decode(errors="surrogateescape")
