"""Look at a folder of photos and masks, and write the description that it seems to have.

    python data.py FOLDER --suggest          # writes FOLDER's name + .yaml, and a picture

What is told apart: photos and masks by their pixels, splits by a word such as `train` or `val` in
folders, names or lists. What is found is certain; what is made of it is a guess, and marked as one.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml
from PIL import Image

from dataset.decoding import decode_colors, decode_mask, decode_photo
from dataset.description import MAX_VALUE, Description, unpack
from dataset.folders import IMAGE_SUFFIXES, MASK_SUFFIXES, visible_files
from dataset.masks import Masks
from dataset.matching import list_described
from dataset.workers import in_processes
from errors import DataError
from files import write_image
from segmentation.drawing import sample_sheet

WORDS = {
    "train": ("training", "train", "trn"),
    "val": ("validation", "valid", "val", "dev", "testing", "test"),
}
SPLIT = {word: split for split, words in WORDS.items() for word in words}
LOOKED_AT = 3  # files of a kind, to tell photos from masks
MOST_VALUES = 1000
RARE = 0.2  # share of the pixels below which a 0, black or white is taken for no class
WHITE, VOC_BORDER = 0xFFFFFF, 0xC0E0E0
CHUNK = 64


class File(NamedTuple):
    """A picture, its path taken apart: `dirs/{head}{core}{tail}.suffix`."""

    path: Path
    dirs: tuple[str, ...]  # with {} for the split
    split: str | None  # the word, as it is written
    head: str
    core: str
    tail: str
    suffix: str


class Kind(NamedTuple):
    """What files that hold the same sort of thing have in common."""

    folder: tuple[str, ...]
    head: str
    tail: str
    suffix: str

    def template(self, word: str | None, deep: bool) -> str:
        """Return the paths of a split's files."""
        parts = [part.replace("{}", word or "") for part in self.folder]
        stem = f"{self.head.replace('{}', word or '')}{{stem}}{self.tail}{self.suffix}"
        return "/".join([*filter(None, parts), ("{dir}/" if deep else "") + stem])


def take_apart(root: Path, path: Path, affixes: set[str]) -> File:
    """Take a path apart; heads and tails are those of `affixes`."""
    dirs, stem, split = list(path.relative_to(root).parts[:-1]), path.stem, None
    for place, part in enumerate(dirs):
        if part.lower() in SPLIT and split is None:
            split, dirs[place] = part, "{}"
    head, tail = _affixes(stem)
    of_split = split is None and head.rstrip("_-.").lower() in SPLIT
    head, tail = head if of_split or head in affixes else "", tail if tail in affixes else ""
    core = stem[len(head) : len(stem) - len(tail)]
    if of_split:
        split = head.rstrip("_-.")
        head = "{}" + head[len(split) :]
    return File(path, tuple(dirs), split, head, core, tail, path.suffix)


def _affixes(stem: str) -> tuple[str, str]:
    """Return the word that a name begins with, and the words that it ends with."""
    tail = re.search(r"([_\-.][A-Za-z][A-Za-z0-9]*)+$", stem)
    head = re.match(r"[A-Za-z]+[_\-.]", stem)
    found = tail[0] if tail and tail.start() > 0 else ""
    return head[0] if head and len(head[0]) < len(stem) - len(found) else "", found


def common_affixes(stems: Iterable[str]) -> set[str]:
    """Return the heads and tails that at least a tenth of the names have."""
    stems = list(stems)
    counts = Counter(affix for stem in stems for affix in set(_affixes(stem)))
    return {affix for affix, count in counts.items() if affix and count >= max(2, len(stems) / 10)}


def is_mask(path: Path) -> bool:
    """Whether a picture's pixels look like labels: few values, in areas, nothing lost."""
    if path.suffix.lower() not in MASK_SUFFIXES:
        return False
    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except Exception:  # Pillow's plugins raise what they like, and what cannot be read is neither
        return False
    if pixels.ndim == 3:  # of grey and alpha, or of colours
        colors = pixels[..., :1] if pixels.shape[2] == 2 else pixels[..., :3]
        pixels = colors.astype(np.int32) @ np.array([1, 256, 65536], np.int32)[: colors.shape[2]]
    same = (pixels[:, 1:] == pixels[:, :-1]).mean() if pixels.shape[1] > 1 else 1.0
    values = len(np.unique(pixels))
    return values <= 64 or (values <= MOST_VALUES and same > 0.75)


def find_kinds(files: list[File]) -> tuple[dict[Kind, list[File]], dict[Kind, list[File]]]:
    """Group files that hold the same; return the photos and the masks."""
    groups: dict[tuple, list[File]] = defaultdict(list)
    for file in files:
        end = file.dirs.index("{}") + 1 if "{}" in file.dirs else 1
        anchor = file.dirs[: max(end, 2) if file.dirs[:1] == ("{}",) else end]
        groups[anchor, file.head, file.tail, file.suffix].append(file)
    photos: dict[Kind, list[File]] = {}
    masks: dict[Kind, list[File]] = {}
    for (_, head, tail, suffix), group in groups.items():
        by_folder: dict[tuple[str, ...], list[File]] = defaultdict(list)
        for file in group:
            by_folder[file.dirs].append(file)
        both: dict[bool, list[File]] = {True: [], False: []}
        for members in by_folder.values():
            looked_at = members[:: max(1, len(members) // LOOKED_AT)][:LOOKED_AT]
            votes = [is_mask(file.path) for file in looked_at]
            both[sum(votes) * 2 > len(votes)] += members
        for of_mask, members in both.items():
            if members:
                kind = Kind(_common([file.dirs for file in members]), head, tail, suffix)
                (masks if of_mask else photos)[kind] = members
    return _of_any_suffix(photos), _of_any_suffix(masks)


def _of_any_suffix(kinds: dict[Kind, list[File]]) -> dict[Kind, list[File]]:
    """Return the kinds, and what those that differ in their extension alone are together."""
    found: dict[Kind, list[File]] = defaultdict(list)
    for kind, files in kinds.items():
        found[kind._replace(suffix="")] += files
    for kind, files in list(found.items()):
        if len({(file.dirs, file.split, file.core) for file in files}) < len(files):
            del found[kind]  # as of photos that are there twice
    return {**kinds, **found}


def _common(folders: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Return what all folders begin with."""
    first, last = min(folders), max(folders)
    same = (place for place, (a, b) in enumerate(zip(first, last)) if a != b)
    return first[: next(same, min(len(first), len(last)))]


def pair(
    photos: dict[Kind, list[File]], masks: dict[Kind, list[File]]
) -> tuple[Kind, Kind, list[tuple[File, File]]] | None:
    """Return the kinds of photos and masks of which most belong together, and those that do."""
    best: tuple[Kind, Kind, list[tuple[File, File]]] | None = None
    for mask_kind, mask_files in masks.items():
        by_name = {_key(file, mask_kind): file for file in mask_files}
        for photo_kind, photo_files in photos.items():
            found = [
                (file, by_name[_key(file, photo_kind)])
                for file in photo_files
                if _key(file, photo_kind) in by_name
            ]
            # Of several masks of the same photos, grey ones hold labels rather than colours.
            better = best is None or (len(found), _is_grey(mask_files)) > (
                len(best[2]),
                _is_grey([mask for _, mask in best[2]]),
            )
            if found and better and photo_kind != mask_kind:
                best = photo_kind, mask_kind, found
    return best


def _key(file: File, kind: Kind) -> tuple:
    split = SPLIT[file.split.lower()] if file.split else None
    return split, file.dirs[len(kind.folder) :], file.core


def _is_grey(files: list[File]) -> bool:
    try:
        return bool(files) and Image.open(files[0].path).mode in ("L", "P", "1", "I;16", "I")
    except OSError:
        return False


def count_values(paths: list[str], in_colors: bool) -> dict[int, int]:
    """Count the pixels of every value in masks."""
    total: Counter[int] = Counter()
    for path in paths:
        data = Path(path).read_bytes()
        try:
            mask = decode_colors(data) if in_colors else decode_mask(data, MAX_VALUE)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        values, counts = np.unique(mask, return_counts=True)
        total.update(dict(zip(values.tolist(), counts.tolist())))
    return total


def quoted(text: str) -> str:
    """Return a text as YAML reads it back; JSON's escapes it takes apart beyond 16 bits."""
    return yaml.safe_dump(text, default_style='"', width=10**6, allow_unicode=True).strip()


def find_splits(
    root: Path, photo_kind: Kind, mask_kind: Kind, pairs: list[tuple[File, File]]
) -> list[str]:
    """Return the description's lines for `train` and `val`."""
    deep = any(len(photo.dirs) > len(photo_kind.folder) for photo, _ in pairs)
    words: dict[str, str] = {}
    for word, _ in Counter(p.split for p, _ in pairs if p.split is not None).most_common():
        kept = words.setdefault(SPLIT[word.lower()], word)
        if SPLIT[word.lower()] == "val" and "test" in kept.lower() and "test" not in word.lower():
            words["val"] = word

    def line(split: str, word: str | None, more: str = "") -> str:
        images, masks = (kind.template(word, deep) for kind in (photo_kind, mask_kind))
        return f"{split}: {{images: {quoted(images)}, masks: {quoted(masks)}{more}}}"

    if set(words) == {"train", "val"}:
        return [line(split, words[split]) for split in ("train", "val")]
    lists = _find_lists(root, {photo.path.stem for photo, _ in pairs})
    if set(lists) == {"train", "val"}:
        return [line(s, None, f", list: {quoted(lists[s])}") for s in ("train", "val")]
    word = next(iter(words.values()), None)
    guess = "val: {fraction: 0.15} # A guess: no split was found"
    return [line("train", word), guess]


def _find_lists(root: Path, stems: set[str]) -> dict[str, str]:
    """Find the text files that name photos of a split."""
    found = {}
    for name, path in visible_files(root):
        words = re.split(r"[^a-z]+", Path(name).name.lower())
        split = next((SPLIT[word] for word in words if word in SPLIT), None)
        if split is None or path.suffix.lower() not in (".txt", ".lst"):
            continue
        lines = [line.split() for line in path.read_text(errors="replace").splitlines() if line]
        known = [line for line in lines if line and Path(line[0]).stem in stems]
        is_list = lines and len(known) > 0.8 * len(lines) and max(map(len, lines)) == 1
        if is_list and (split not in found or "test" not in Path(name).name.lower()):
            found[split] = path.relative_to(root).as_posix()
    return found


def find_names(root: Path, values: Iterable[int]) -> dict[int, str]:
    """Find a table of colours and names, as `class_dict.csv` or `label_colors.txt` are."""
    for _, path in visible_files(root):
        if path.suffix.lower() not in (".csv", ".txt"):
            continue
        found = {}
        for line in path.read_text(errors="replace").splitlines()[:1000]:
            parts = [
                part for part in re.split(r"[,;\t]+|\s+(?=\d)|(?<=\d)\s+", line.strip()) if part
            ]
            numbers = [int(part) for part in parts if part.isdigit() and int(part) < 256]
            names = [part.strip() for part in parts if not part.isdigit()]
            if len(numbers) == 3 and len(names) == 1:
                found[numbers[0] | numbers[1] << 8 | numbers[2] << 16] = names[0]
        if len(found.keys() & set(values)) > len(set(values)) / 2:
            return found
    return {}


def find_classes(root: Path, counts: dict[int, int], in_colors: bool) -> list[str]:
    """Return the description's lines for `classes` and `ignore`."""
    total, lines, ignored = sum(counts.values()), ["classes:"], []
    names = find_names(root, counts) if in_colors else {}
    empty = {0, VOC_BORDER} if in_colors else {0, 255}
    empty |= {WHITE} if in_colors and 0 not in counts else set()
    rare = [v for v in sorted(counts) if v in empty and counts[v] < RARE * total]
    if len(counts) - len(rare) < 2:
        rare = []
    for value in sorted(counts):
        label = json.dumps(list(unpack(value))) if in_colors else str(value)
        share = f"{counts[value] / total:.3%} of the pixels"
        if value in rare:
            ignored.append((label, share))
            continue
        name = names.get(value) or f"class_{label.strip('[]').replace(', ', '_')}"
        name = name if re.fullmatch(r"[A-Za-z][\w ]*", name) else quoted(name)
        lines.append(f"  {name}: {{labels: [{label}]}} # {share}")
    values = ", ".join(label for label, _ in ignored)
    note = f" # A guess: {', '.join(f'{label} has {share}' for label, share in ignored)}"
    return [*lines, f"ignore: [{values}]{note * bool(ignored)}"]


def suggest(folder: str, workers: int) -> str:
    """Return the description of a folder's data set, as the text of a YAML.

    Raises:
        DataError: There are no photos with masks, or masks hold too many values to be labels.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder {folder}")
    suffixes = IMAGE_SUFFIXES | MASK_SUFFIXES
    paths = [path for _, path in visible_files(root) if path.suffix.lower() in suffixes]
    # With whole names first: what they begin and end with may be as good as any other part.
    every = set(), common_affixes(path.stem for path in paths)
    kinds = [find_kinds([take_apart(root, path, few) for path in paths]) for few in every]
    found = max((pair(*of) for of in kinds), key=lambda found: len(found[2]) if found else 0)
    if found is None:
        counts = " and ".join(
            f"{sum(len(files) for kind, files in of.items() if kind.suffix)} {what}"
            for of, what in zip(kinds[1], ("photos", "masks"))
        )
        raise DataError(f"{folder}: {counts}, but no mask has a name that belongs to a photo's")
    photo_kind, mask_kind, pairs = found
    in_colors = not _is_grey([mask for _, mask in pairs])
    names = [str(mask.path) for _, mask in pairs]
    tasks = {
        first: (count_values, names[first : first + CHUNK], in_colors)
        for first in range(0, len(names), CHUNK)
    }
    pixels: Counter[int] = Counter()
    for _, part in in_processes(tasks, workers):
        pixels.update(part)
    if not 2 <= len(pixels) <= MOST_VALUES:
        what = "colours" if in_colors else "values"
        raise DataError(f"{names[0]} and the other masks hold {len(pixels)} {what}: no labels")
    lines = [
        f"# {len(pairs)} photos with masks, found by data.py --suggest. Names are yours to give;",
        "# the rest was read off the files, but for what is marked as a guess.",
        f"#   composer main.py yamls/own.yaml data={root.resolve().name}.yaml",
        "",
        f"root: {quoted(str(root.resolve()))}",
        *find_splits(root, photo_kind, mask_kind, pairs),
        *find_classes(root, pixels, in_colors),
    ]
    return "\n".join(lines) + "\n"


def draw(description: Description, root: str, picture: str) -> None:
    """Draw six training photos, each again under the colours of its classes.

    Raises:
        DataError: One of them cannot be read, or differs from its mask in size.
    """
    samples = list_described(description, "train", root)
    masks = Masks.of(description, "train", root)
    index, photos, targets = masks.labels.index(), [], []
    for place in np.linspace(0, len(samples) - 1, min(6, len(samples))).astype(int):
        _, image_path, mask_path = samples[place]
        labels = masks.decode(Path(mask_path).read_bytes(), mask_path)
        try:
            photo = decode_photo(Path(image_path).read_bytes(), labels.shape)
        except ValueError as error:
            raise DataError(f"{image_path}: {error}") from error
        target = index[labels]
        photos.append(cv2.resize(photo, (320, 320), interpolation=cv2.INTER_AREA))
        targets.append(
            cv2.resize(target.astype(np.int16), (320, 320), interpolation=cv2.INTER_NEAREST)
        )
    write_image(picture, sample_sheet(np.stack(photos), np.stack(targets), description.classes))
