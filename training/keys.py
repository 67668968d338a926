"""A key of the YAML: its default, its meaning, its bounds, and what a resumed run does with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

# What a resumed run does with a key whose value differs from the one in the checkpoint's record.
APPLIED = "applied"  # it trains on with the new value
COMPARED = "compared"  # it is refused
FREE = "free"  # it may differ: the key does not enter the training


def key(on_resume: str, default: Any, meaning: str, bounds: str = "(-inf, inf)") -> Any:
    """Return a config key.

    Args:
        on_resume: `APPLIED`, `COMPARED` or `FREE`.
        default: Its default.
        meaning: The line that `main.py --help` prints for it.
        bounds: Interval that a number, or each number of a list, has to be in; `[0, 1)` includes 0
            and excludes 1.
    """
    metadata = {"meaning": meaning, "bounds": bounds, "on_resume": on_resume}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: Callable[[], Any]) -> Any:
    """Return a section of keys, with the defaults that `schema()` gives."""
    return dataclasses.field(default_factory=schema)


def absent_section() -> Any:
    """Return a section that only some of its parents have, such as SAM in a recipe."""
    return dataclasses.field(default=None)


def fields_of(section: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yield the keys and sections of a section with their values, without absent sections."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.metadata or value is not None:
            yield field, value


def is_section(value: Any) -> bool:
    """Return whether a value is a section of keys, rather than a value of a key."""
    return dataclasses.is_dataclass(value)


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of all keys by their dotted names, as in `optimizer.lr`."""
    values: dict[str, Any] = {}
    for field, value in fields_of(section):
        name = f"{prefix}{field.name}"
        values |= flatten(value, f"{name}.") if is_section(value) else {name: value}
    return values


def on_resume(section: Any, prefix: str = "") -> dict[str, str]:
    """Return for each key by its dotted name what a resumed run does with another value.

    Evaluation trains nothing, so all keys of `eval_dataset` are free but those that say what the
    labels mean.
    """
    kinds: dict[str, str] = {}
    for field, value in fields_of(section):
        name = f"{prefix}{field.name}"
        if is_section(value):
            kinds |= on_resume(value, f"{name}.")
        elif prefix == "eval_dataset." and field.name not in ("ignore_background", "ignore_label"):
            kinds[name] = FREE
        else:
            kinds[name] = field.metadata["on_resume"]
    return kinds
