"""The description of a data set: where its photos and masks are, and what the masks hold.

    root: /data/yard
    train: {images: photos/train, masks: "labels/{stem}_mask.png"}
    val: {fraction: 0.15}
    classes:
      road: {labels: [1, 2], color: [128, 64, 128]}
      vehicle: {labels: [7, 8]}
    ignore: [0, 255]
    exclude: [photos/test]

Nothing slow is imported here: a wrong description is answered with the rest of the config.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dataset.labels import IGNORED, Labels
from dataset.paths import FOLDERS
from errors import ConfigError
from segmentation.classes import ClassInfo, distinct_colors

KEYS = ("root", "train", "val", "classes", "ignore", "exclude")
SPLITS = ("train", "val")
MAX_VALUE = 2**16 - 1  # of a 16-bit mask
EXAMPLE = 'train: {images: photos/train, masks: "labels/{stem}_mask.png"}'


class Source(NamedTuple):
    """Where a split is: see `dataset.matching`.

    Attributes:
        images: Folder of the photos, or a template of their paths.
        masks: Folder of the masks, or a template of their paths.
        list: File that names the photos of the split, or photos and masks.
        segments: JSON of COCO's panoptic format: which segment of which mask is of which category.
    """

    images: str | None = None
    masks: str | None = None
    list: str | None = None
    segments: str | None = None


@dataclass(frozen=True)
class Description:
    """What a description says, checked.

    Attributes:
        root: Folder that its paths are below, or None where the description leaves it open.
        sources: Where each split is.
        fraction: Share of `train` that is `val`, or 0 where that is a split of its own.
        classes: Names and colours, in the order of the class indices.
        values: The label that each value of a mask becomes: 0 where it is ignored, k for class
            k - 1. Of masks in colours a value is `red + 256 * green + 65536 * blue`.
        in_colors: Whether masks are read by their colours.
        exclude: Folders or templates of files that are left out on purpose.
        built_in: The meaning of the labels in ADE20K's layout, which is built in. Its masks hold
            labels as they stand, so `values` is None and `classes` is empty.
    """

    root: str | None
    sources: Mapping[str, Source]
    fraction: float
    classes: tuple[ClassInfo, ...]
    values: Mapping[int, int] | None
    in_colors: bool
    exclude: tuple[str, ...] = ()
    built_in: Labels | None = None

    @property
    def labels(self) -> Labels:
        """The meaning of the loader's labels: 0 is ignored, k is class k - 1, if not built in."""
        return self.built_in or Labels(len(self.classes))


def read_description(path: str) -> dict[str, Any]:
    """Read a description's file; its root is then absolute, seen from the file's folder.

    Raises:
        ConfigError: The file is missing, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = yaml.load(text, _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the description {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the description {path} is not YAML: {reason}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"the description {path} is not a mapping of {', '.join(KEYS)}")
    if isinstance(raw.get("root"), str):
        folder = os.path.dirname(os.path.abspath(path))
        raw["root"] = os.path.normpath(os.path.join(folder, os.path.expanduser(raw["root"])))
    return raw


def is_description(path: str) -> bool:
    """Whether a command is given a description's file rather than a data set."""
    return path.lower().endswith((".yaml", ".yml"))


def open_description(path: str, root: str | None = None) -> tuple[str, Description | None]:
    """Return the data set that a command is given, and its description if it has one.

    Args:
        path: A data set, or a description's file.
        root: Where the described data set is, if not where the description says.

    Raises:
        ConfigError: The description is wrong, or does not say where the data set is.
    """
    if not is_description(path):
        return path, None
    description = parse_description(read_description(path), path)
    if not (root or description.root):
        raise ConfigError(f"{path} has no root; say where the data set is")
    return root or description.root or "", description


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key twice, and keeps the text of keys such as no, 007 and 12:30."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)  # resolve merge keys, as in `<<: *anchor`
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.style is None:
                key.tag = "tag:yaml.org,2002:str"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is there twice, line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


def parse_description(raw: Mapping[str, Any], where: str = "data") -> Description:
    """Check a description as YAML holds it.

    Args:
        raw: Its keys and values.
        where: What to call it in an error.

    Raises:
        ConfigError: Names what is wrong.
    """
    _refuse_unknown(raw, KEYS, where)
    root = raw.get("root")
    if root is not None and not isinstance(root, str):
        raise ConfigError(f"{where}: root: {root!r} is not a folder")
    sources, fraction = _parse_splits(raw, where)
    classes, values, in_colors = _parse_classes(raw, where)
    if in_colors and any(source.segments for source in sources.values()):
        raise ConfigError(f"{where}: with segments, labels are categories, not colours")
    exclude = _as_list(raw.get("exclude"))
    for pattern in exclude:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{where}: exclude: {pattern!r} is not a path; list folders or files")
    return Description(root, sources, fraction, classes, values, in_colors, tuple(exclude))


def _refuse_unknown(raw: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    unknown = [str(key) for key in raw if key not in known]
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]}; known: {', '.join(known)}")


def _parse_splits(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Source], float]:
    """Return where each split is, and the share of `train` that is `val`, or 0."""
    sources, fraction = {}, 0.0
    for split in SPLITS if "train" in raw or "val" in raw else ():  # shards' have neither
        given = raw.get(split)
        if not isinstance(given, Mapping):
            example = "val: {fraction: 0.15}" if split == "val" else EXAMPLE
            raise ConfigError(f"{where}: {split} is missing; as in {example}")
        if split == "val" and "fraction" in given:
            fraction = given["fraction"]
            is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            if len(given) > 1 or not is_number or not 0 < fraction < 1:
                raise ConfigError(f"{where}: val: fraction stands alone, a number between 0 and 1")
            sources[split] = sources["train"]
            continue
        _refuse_unknown(given, Source._fields, f"{where}: {split}")
        for key, value in given.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{where}: {split}.{key}: {value!r} is not a path")
        source = Source(**given)
        if source.list is None and (source.images is None or source.masks is None):
            missing = "images" if source.images is None else "masks"
            raise ConfigError(f"{where}: {split}.{missing} is missing; as in {EXAMPLE}")
        sources[split] = source
    return sources, fraction


def _parse_classes(
    raw: Mapping[str, Any], where: str
) -> tuple[tuple[ClassInfo, ...], dict[int, int], bool]:
    """Return the classes, the label of each value of a mask, and whether values are colours."""
    given = raw.get("classes")
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: classes is missing; as in classes: {{road: {{labels: [1]}}}}")
    if not 2 <= len(given) < IGNORED:
        raise ConfigError(f"{where}: classes: {len(given)} names are not 2 to {IGNORED - 1}")
    ignored = raw.get("ignore")
    ignored = [] if ignored is None else _as_list(ignored)
    kinds, colors, found = set(), [], []
    for label, (name, entry) in enumerate(given.items(), 1):
        if isinstance(name, bool) or name is None:
            raise ConfigError(f"{where}: classes: {name!r} is no name; put it in quotes")
        key = f"{where}: classes.{name}"
        entry = entry if isinstance(entry, Mapping) else {"labels": entry}
        _refuse_unknown(entry, ("labels", "color"), key)
        labels = _as_list(entry.get("labels"))
        if not labels:
            raise ConfigError(f"{key}: labels is empty; give the mask's values, as in labels: [3]")
        found += [(value, label, str(name)) for value in labels]
        color = entry.get("color", labels[0] if _is_color(labels[0]) else None)
        if color is not None and not _is_color(color):
            raise ConfigError(f"{key}: color: {color!r} is not [red, green, blue], 0 to 255 each")
        colors.append(color)
    found += [(value, 0, "ignore") for value in ignored]
    values: dict[int, int] = {}
    names: dict[int, str] = {}
    for value, label, name in found:
        kinds.add(_is_color(value))
        number = _number(value, f"{where}: {name}")
        if number in values:
            if names[number] == name:
                raise ConfigError(
                    f"{where}: {name} lists {value} twice; a colour is a list of its own, as in "
                    "labels: [[128, 64, 128]]"
                )
            raise ConfigError(f"{where}: label {value} is in both {names[number]} and {name}")
        values[number], names[number] = label, name
    if len(kinds) > 1:
        raise ConfigError(
            f"{where}: some labels are numbers and some are colours; masks are read by one of them"
        )
    others = iter(distinct_colors(len(colors)))
    classes = tuple(
        ClassInfo(str(name), tuple(color) if color is not None else other)
        for name, color, other in zip(given, colors, others)
    )
    return classes, values, kinds == {True}


def _as_list(labels: Any) -> list[Any]:
    """Return the values that a key lists; a single value may stand without brackets."""
    if labels is None:
        return []
    return list(labels) if isinstance(labels, list | tuple) else [labels]


def _is_color(value: Any) -> bool:
    """Whether a value is [red, green, blue]."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(type(part) is int and 0 <= part <= 255 for part in value)


def _number(value: Any, where: str) -> int:
    if _is_color(value):
        return pack(*value)
    if type(value) is not int or not 0 <= value <= MAX_VALUE:
        raise ConfigError(
            f"{where}: {value!r} is neither a mask's value, 0 to {MAX_VALUE}, nor a colour, "
            "[red, green, blue]"
        )
    return value


def pack(red: int, green: int, blue: int) -> int:
    """Return the number that stands for a colour."""
    return red | green << 8 | blue << 16


def unpack(value: int) -> tuple[int, int, int]:
    """Return the colour that `pack` made a number of."""
    return value & 255, value >> 8 & 255, value >> 16


def describe_labels(classes: Iterable[ClassInfo]) -> dict[str, Any]:
    """Return the description of masks that hold the loader's labels, as those of shards do."""
    entries = {c.name: {"labels": [k], "color": list(c.color)} for k, c in enumerate(classes, 1)}
    return {"classes": entries, "ignore": [0]}


def as_yaml(raw: Mapping[str, Any]) -> str:
    """Return a description as a file that a person reads: a class a line."""

    def inline(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)

    lines = []
    for key, value in raw.items():
        if key == "classes":
            lines.append("classes:")
            lines += [f"  {inline({str(n): entry}).strip()[1:-1]}" for n, entry in value.items()]
        else:
            lines.append(inline({key: value}).strip()[1:-1])
    return "\n".join(lines) + "\n"


def ade20k(labels: Labels | None = None) -> Description:
    """Return the description of ADE20K's layout, with masks that hold labels as they stand."""
    sources = {
        split: Source(f"images/{name}", f"annotations/{name}") for split, name in FOLDERS.items()
    }
    return Description(None, sources, 0.0, (), None, False, built_in=labels or Labels())
