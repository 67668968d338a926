"""A function that quotes names in YAML, so that values like `007`, `12:30` and `no` remain text.

YAML reads such values as numbers, times or booleans. If the schema expects text, `quote_text` adds
quotes before YAML parses the file. `quote_text` rejects numbers that YAML would misread, such as
017, which YAML reads as 15.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args, get_type_hints

import yaml

from errors import ConfigError
from training.schema import Config

# Logger arguments that are names, and so must stay text even if they look like numbers.
NAMES = {"name", "project", "group", "entity", "tags", "notes", "run_name", "experiment_name"}
# Config sections in which every key is a name, usually of a class.
NAMED = ("data", "model.class_weights")
SURPRISING = re.compile(r"[-+]?0[\d_]*[1-9][\d_]*|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")


def quote_text(text: str, place: str = "") -> str:
    """Return YAML text with quotes added around the plain scalars that must remain text.

    Args:
        text: YAML text. Invalid YAML is returned unchanged, so that the parser reports the error.
        place: Dotted name of the key that has this text as its value, or an empty string if the
            text is a complete config.

    Raises:
        ConfigError: A number has a leading zero or contains colons.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    scalars: dict[int, yaml.ScalarNode] = {}
    if root is not None:
        _collect(root, _hint_of(place), place, scalars, set())
    for end, node in sorted(scalars.items(), reverse=True):
        start = end - len(node.value)
        if text[start:end] == node.value:  # Skip multi-line scalars, which are always text.
            quoted = node.value.replace("'", "''")
            text = f"{text[:start]}'{quoted}'{text[end:]}"
    return text


def _collect(
    node: yaml.Node, hint: Any, place: str, scalars: dict[int, yaml.ScalarNode], seen: set[int]
) -> None:
    """Collect the plain scalars in a node that must stay text, in a dict keyed by end position."""
    if id(node) in seen:  # An alias refers to a node that was already visited.
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        for key, value in node.value:
            name = str(key.value)
            if place.startswith(NAMED):
                _collect(key, str, place, scalars, seen)
            inherited = str if hint is str or name in NAMES else None
            inner = f"{place}.{name}" if place else name
            _collect(value, hints.get(name, inherited), inner, scalars, seen)
    elif isinstance(node, yaml.SequenceNode):
        inner = str if hint is str or str in get_args(hint) else None
        for value in node.value:
            _collect(value, inner, place, scalars, seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.value != "<<":
        if _is_text(hint):
            if node.tag != "tag:yaml.org,2002:null":
                scalars[node.end_mark.index] = node
        elif SURPRISING.fullmatch(node.value):
            raise ConfigError(
                f"{place}: YAML reads {node.value} as a different number; write it without leading "
                "zeros or colons, or quote it if it is text"
            )


def _is_text(hint: Any) -> bool:
    """Return whether a key accepts text but neither numbers nor booleans."""
    kinds = {hint, *get_args(hint)} if hint is not None else set()
    return str in kinds and not kinds & {int, float, bool}


def _hint_of(place: str) -> Any:
    """Return the type of a key, or None if the schema does not define it."""
    hint: Any = Config
    for name in filter(None, place.split(".")):
        if hint is not str:
            hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
            hint = hints.get(name, str if name in NAMES else None)
    return hint
