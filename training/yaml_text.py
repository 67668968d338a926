"""Names in a YAML keep the text that was written, such as 007, 12:30, 1e5 or no.

YAML reads these as numbers, times and booleans. Where the schema wants text, `quote_text` puts
quotes around them before YAML reads the file. Numbers that YAML reads in a surprising way, such as
017 for 15, are refused elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args, get_type_hints

import yaml

from errors import ConfigError
from training.schema import Config

# Arguments of loggers whose values are names.
NAMES = {"name", "project", "group", "entity", "tags", "notes", "run_name", "experiment_name"}
# Keys below which every mapping has names for keys: of classes, mostly.
NAMED = ("data", "model.class_weights")
SURPRISING = re.compile(r"[-+]?0[\d_]*[1-9][\d_]*|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")


def quote_text(text: str, place: str = "") -> str:
    """Return a YAML with quotes around the plain scalars that have to stay text.

    Args:
        text: The YAML. Broken YAML is returned as it is, for its reader to complain about.
        place: Dotted name of the key whose value the YAML is; empty: it is the whole config.

    Raises:
        ConfigError: A number has a leading zero, or is written with colons.
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
        if text[start:end] == node.value:  # a plain scalar of several lines is text already
            quoted = node.value.replace("'", "''")
            text = f"{text[:start]}'{quoted}'{text[end:]}"
    return text


def _collect(
    node: yaml.Node, hint: Any, place: str, scalars: dict[int, yaml.ScalarNode], seen: set[int]
) -> None:
    """Collect the plain scalars below a node that have to be text, by where they end."""
    if id(node) in seen:  # an alias
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
                f"{place}: YAML reads {node.value} as another number; write it without leading "
                "zeros or colons, or quote it if it is text"
            )


def _is_text(hint: Any) -> bool:
    """Whether a key takes text, and neither numbers nor booleans."""
    kinds = {hint, *get_args(hint)} if hint is not None else set()
    return str in kinds and not kinds & {int, float, bool}


def _hint_of(place: str) -> Any:
    """Return the type of a key, or None where the schema has none."""
    hint: Any = Config
    for name in filter(None, place.split(".")):
        if hint is not str:
            hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
            hint = hints.get(name, str if name in NAMES else None)
    return hint
