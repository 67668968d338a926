"""Functions that define a config key: default, meaning, bounds and rule for resumed runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from copy import copy
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
    return dataclasses.field(default_factory=functools.partial(copy, default), metadata=metadata)


def fields_of(section: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yield the fields of a section with their values, skipping absent sections.

    A recipe may omit a section; for example, `mild` has no SAM.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.metadata or value is not None:
            yield field, value


def keys_of(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield every key's dotted name (such as `optimizer.lr`), its field and its value."""
    for field, value in fields_of(section):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{name}.")
        else:
            yield name, field, value


def flatten(section: Any) -> dict[str, Any]:
    """Return a dict of all values, keyed by dotted name."""
    return {name: value for name, _, value in keys_of(section)}
