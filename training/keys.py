"""Functions that define config keys with default, meaning, bounds and a rule for resumed runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

# Rules for config keys whose value has changed since the checkpoint was saved.

# The resumed run uses the new value of the key.
APPLIED = "applied"
# The resumed run ends with an error if the key has a new value.
COMPARED = "compared"
# The key may have any new value, because it does not affect training.
FREE = "free"


def key(on_resume: str, default: Any, meaning: str, bounds: str = "(-inf, inf)") -> Any:
    """Return the dataclass field for a config key.

    Args:
        on_resume: Rule for a changed value when a run resumes: `APPLIED`, `COMPARED` or `FREE`.
        default: Default value.
        meaning: Description that `main.py --help` prints.
        bounds: Interval of valid numbers, such as `[0, 1)`, which includes 0 and excludes 1. For a
            list, the interval applies to each number.
    """
    metadata = {"meaning": meaning, "bounds": bounds, "on_resume": on_resume}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: Callable[[], Any]) -> Any:
    """Return the dataclass field for a section whose defaults `schema()` returns."""
    return dataclasses.field(default_factory=schema)


def absent_section() -> Any:
    """Return the dataclass field for a section that may be absent, such as SAM in a recipe."""
    return dataclasses.field(default=None)


def fields_of(section: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yield the fields of a section with their values, but leave out absent sections."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.metadata or value is not None:
            yield field, value


def is_section(value: Any) -> bool:
    """Return whether a config value is a section with keys of its own."""
    return dataclasses.is_dataclass(value)


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of all keys by their dotted names, such as `optimizer.lr`."""
    values: dict[str, Any] = {}
    for field, value in fields_of(section):
        name = f"{prefix}{field.name}"
        values |= flatten(value, f"{name}.") if is_section(value) else {name: value}
    return values


def on_resume(section: Any, prefix: str = "") -> dict[str, str]:
    """Return the rule for resumed runs of each key, by its dotted name.

    The keys of `eval_dataset` are `FREE`, because evaluation does not affect training. The
    exceptions are `ignore_background` and `ignore_label`, which define the meaning of labels.
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
