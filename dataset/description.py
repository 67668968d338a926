"""A parser for data set descriptions, which specify file paths and the meaning of mask values.

    root: /data/yard
    train: {images: photos/train, masks: "labels/{stem}_mask.png"}
    val: {fraction: 0.15}
    classes:
      road: {labels: [1, 2], color: [128, 64, 128]}
      vehicle: {labels: [7, 8]}
    ignore: [0, 255]
    exclude: [photos/test]

This module imports no slow packages, so that errors in a description are reported quickly.
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
from errors import ConfigError, one_line
from segmentation.classes import ClassInfo, distinct_colors

KEYS = ("root", "train", "val", "classes", "ignore", "exclude")
SPLITS = ("train", "val")
MAX_VALUE = 2**16 - 1  # Largest value in a 16-bit mask.
EXAMPLE = 'train: {images: photos/train, masks: "labels/{stem}_mask.png"}'


class Source(NamedTuple):
    """The location of a split's images and masks; see `dataset.matching`.

    Attributes:
        images: Folder of the images, or a template of their paths.
        masks: Folder of the masks, or a template of their paths.
        list: Text file that lists the split's images, or the split's images and masks.
        segments: JSON file in COCO's panoptic format that gives the category of each mask segment.
    """

    images: str | None = None
    masks: str | None = None
    list: str | None = None
    segments: str | None = None


@dataclass(frozen=True)
class Description:
    """A validated data set description.

    Attributes:
        root: Folder that the description's paths are relative to, or None if it is not specified.
        sources: Location of each split.
        fraction: Fraction of `train` to use for validation, or 0 if `val` has its own files.
        classes: Names and colours, in the order of the class indices.
        values: Label of each mask value: 0 for an ignored value, k for class k - 1. A colour is
            encoded as the integer `red + 256 * green + 65536 * blue`.
        in_colors: Whether the mask values are colours.
        exclude: Folders, files or templates to leave out of the data set.
        built_in: Meaning of the labels in the built-in ADE20K layout, or None for other layouts.
            ADE20K's masks contain labels directly, so `values` is None and `classes` is empty.
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
        """The meaning of the loader's labels; by default, 0 is ignored and k is class k - 1."""
        return self.built_in or Labels(len(self.classes))


def read_description(path: str) -> dict[str, Any]:
    """Read a description from a file and make its root absolute.

    A relative root is resolved against the folder of the file.

    Args:
        path: Path of the YAML file.

    Raises:
        ConfigError: The file is missing, is not valid YAML, or is not a mapping.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the description {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = one_line(error)
        raise ConfigError(f"cannot parse the description {path} as YAML: {reason}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"the description {path} must be a mapping with the keys {', '.join(KEYS)}"
        )
    if isinstance(raw.get("root"), str):
        folder = os.path.dirname(os.path.abspath(path))
        raw["root"] = os.path.normpath(os.path.join(folder, os.path.expanduser(raw["root"])))
    return raw


def is_description(path: str) -> bool:
    """Return whether a path names a description file rather than a data set.

    Args:
        path: Path that the user passed to a command.
    """
    return path.lower().endswith((".yaml", ".yml"))


def open_description(path: str, root: str | None = None) -> tuple[str, Description | None]:
    """Return a data set's folder, and its description if there is one.

    Args:
        path: Path of a data set or of a description file.
        root: Folder of the described data set, or None to use the description's own root.

    Raises:
        ConfigError: The description is invalid or does not specify the data set's folder.
    """
    if not is_description(path):
        return path, None
    description = parse_description(read_description(path), path)
    folder = root or description.root
    if not folder:
        raise ConfigError(f"{path}: root is missing; set it to the data set's folder")
    return folder, description


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys and reads keys like `no` and `12:30` as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)  # Resolve YAML merge keys such as `<<: *anchor`.
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.style is None:
                key.tag = "tag:yaml.org,2002:str"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"duplicate key {twice[0]} in the mapping at line {line}")
        return super().construct_mapping(node, deep)


def parse_description(raw: Mapping[str, Any], where: str = "data") -> Description:
    """Validate a description that was read from YAML.

    Args:
        raw: Keys and values of the description.
        where: Name of the description, for error messages.

    Raises:
        ConfigError: The description is invalid. The message names the key.
    """
    _refuse_unknown(raw, KEYS, where)
    root = raw.get("root")
    if root is not None and not isinstance(root, str):
        raise ConfigError(f"{where}: root: got {root!r}; expected the path of a folder")
    sources, fraction = _parse_splits(raw, where)
    classes, values, in_colors = _parse_classes(raw, where)
    if in_colors and any(source.segments for source in sources.values()):
        raise ConfigError(
            f"{where}: classes: the labels are colours, but panoptic masks need category "
            "numbers; list these numbers under labels"
        )
    exclude = _as_list(raw.get("exclude"))
    for pattern in exclude:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(
                f"{where}: exclude: got {pattern!r}; expected paths of files or folders"
            )
    return Description(root, sources, fraction, classes, values, in_colors, tuple(exclude))


def _refuse_unknown(raw: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    unknown = [str(key) for key in raw if key not in known]
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]}; the known keys are {', '.join(known)}"
        )


def _parse_splits(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Source], float]:
    """Return each split's location, and the fraction of `train` used as `val` (0 for none)."""
    sources, fraction = {}, 0.0
    # The description file of a shard data set does not list splits.
    for split in SPLITS if "train" in raw or "val" in raw else ():
        given = raw.get(split)
        if not isinstance(given, Mapping):
            example = "val: {fraction: 0.15}" if split == "val" else EXAMPLE
            raise ConfigError(f"{where}: {split} is missing; add it, as in {example}")
        if split == "val" and "fraction" in given:
            fraction = given["fraction"]
            is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            if len(given) > 1 or not is_number or not 0 < fraction < 1:
                raise ConfigError(
                    f"{where}: val: fraction must be a number between 0 and 1, and cannot be "
                    "combined with other keys"
                )
            sources[split] = sources["train"]
            continue
        _refuse_unknown(given, Source._fields, f"{where}: {split}")
        for key, value in given.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{where}: {split}.{key}: got {value!r}; expected a path")
        source = Source(**given)
        if source.list is None and (source.images is None or source.masks is None):
            missing = "images" if source.images is None else "masks"
            raise ConfigError(f"{where}: {split}.{missing} is missing; add it, as in {EXAMPLE}")
        sources[split] = source
    return sources, fraction


def _parse_classes(
    raw: Mapping[str, Any], where: str
) -> tuple[tuple[ClassInfo, ...], dict[int, int], bool]:
    """Return the classes, the label of each mask value, and whether the values are colours."""
    given = raw.get("classes")
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{where}: classes is missing; add it, as in classes: {{road: {{labels: [1]}}}}"
        )
    if not 2 <= len(given) < IGNORED:
        raise ConfigError(
            f"{where}: classes: the number of classes is {len(given)}; list between 2 and "
            f"{IGNORED - 1}"
        )
    colors, found = [], []
    for label, (name, entry) in enumerate(given.items(), 1):
        if isinstance(name, bool) or name is None:
            raise ConfigError(f"{where}: classes: the name {name!r} is not text; put it in quotes")
        key = f"{where}: classes.{name}"
        entry = entry if isinstance(entry, Mapping) else {"labels": entry}
        _refuse_unknown(entry, ("labels", "color"), key)
        labels = _as_list(entry.get("labels"))
        if not labels:
            raise ConfigError(f"{key}: labels is empty; list mask values, as in labels: [3]")
        found += [(value, label, str(name)) for value in labels]
        color = entry.get("color", labels[0] if _is_color(labels[0]) else None)
        if color is not None and not _is_color(color):
            raise ConfigError(
                f"{key}: color: got {color!r}; expected [red, green, blue], each from 0 to 255"
            )
        colors.append(color)
    found += [(value, 0, "ignore") for value in _as_list(raw.get("ignore"))]
    values: dict[int, int] = {}
    names: dict[int, str] = {}
    for value, label, name in found:
        number = _number(value, f"{where}: {name}")
        if number in values:
            if names[number] == name:
                raise ConfigError(
                    f"{where}: {name} lists {value} twice; list it once, or add brackets for a "
                    "colour, as in labels: [[128, 64, 128]]"
                )
            raise ConfigError(
                f"{where}: {names[number]} and {name} both have label {value}; remove it from one "
                "of them"
            )
        values[number], names[number] = label, name
    kinds = {_is_color(value) for value, _, _ in found}
    if len(kinds) > 1:
        raise ConfigError(
            f"{where}: some labels are numbers and some are colours; use the same kind for all"
        )
    classes = tuple(
        ClassInfo(str(name), tuple(color) if color is not None else other)
        for name, color, other in zip(given, colors, distinct_colors(len(colors)))
    )
    return classes, values, kinds == {True}


def _as_list(labels: Any) -> list[Any]:
    """Return a key's values as a list. A single value may be written without brackets."""
    if labels is None:
        return []
    return list(labels) if isinstance(labels, list | tuple) else [labels]


def _is_color(value: Any) -> bool:
    """Return whether a value is a list [red, green, blue] of integers from 0 to 255."""
    is_triple = isinstance(value, list | tuple) and len(value) == 3
    return is_triple and all(type(part) is int and 0 <= part <= 255 for part in value)


def _number(value: Any, where: str) -> int:
    if _is_color(value):
        return pack(*value)
    if type(value) is not int or not 0 <= value <= MAX_VALUE:
        raise ConfigError(
            f"{where}: got {value!r}; expected a mask value from 0 to {MAX_VALUE} or a colour "
            "[red, green, blue]"
        )
    return value


def pack(red: int, green: int, blue: int) -> int:
    """Encode a colour as the integer red + 256 * green + 65536 * blue.

    Args:
        red: Red component, 0 to 255.
        green: Green component, 0 to 255.
        blue: Blue component, 0 to 255.
    """
    return red | green << 8 | blue << 16


def unpack(value: int) -> tuple[int, int, int]:
    """Decode a colour that `pack` encoded.

    Args:
        value: The encoded colour.
    """
    return value & 255, value >> 8 & 255, value >> 16


def describe_labels(classes: Iterable[ClassInfo]) -> dict[str, Any]:
    """Return a description for shards, whose masks contain the loader's labels.

    Args:
        classes: Names and colours, in the order of the class indices.
    """
    entries = {c.name: {"labels": [k], "color": list(c.color)} for k, c in enumerate(classes, 1)}
    return {"classes": entries, "ignore": [0]}


def as_yaml(raw: Mapping[str, Any]) -> str:
    """Return a description as YAML that is easy to read, with one class per line.

    Args:
        raw: Keys and values of the description.
    """

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
    """Return the description of ADE20K's layout, whose masks contain labels directly.

    Args:
        labels: Meaning of the labels, or None for ADE20K's own labels.
    """
    sources = {
        split: Source(f"images/{name}", f"annotations/{name}") for split, name in FOLDERS.items()
    }
    return Description(None, sources, 0.0, (), None, False, built_in=labels or Labels())
