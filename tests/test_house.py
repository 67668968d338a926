"""The house: what the root holds, and that imports go one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("extras", "training", "checkpointing", "dataset", "networks", "segmentation")
COMMANDS = {"main", "model", "data", "transforms", "download_ade20k"}
COMMANDS |= {"convert_ade20k", "convert_dataset", "evaluate", "predict", "export"}
SHARED = {"errors", "files", "command_lines"}  # modules of the root that every package may import
# What each package may import besides those; the root may import everything.
BELOW = {
    "extras": {"training", "checkpointing", "dataset", "networks", "segmentation"},
    "training": {"checkpointing", "dataset", "networks", "segmentation"},
    "checkpointing": {"networks", "segmentation"},
    "dataset": {"networks", "segmentation"},
    "networks": {"segmentation"},
    "segmentation": set(),
    "files": set(),
    "command_lines": {"dataset"},
    "errors": set(),
}


def modules() -> dict[str, Path]:
    """All modules of the root and the packages, by their dotted names."""
    files = [*ROOT.glob("*.py"), *(f for name in PACKAGES for f in (ROOT / name).rglob("*.py"))]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports(source: str, known: set[str]) -> set[str]:
    """Which of the known modules a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found & known


def against_the_direction(name: str, used: set[str]) -> list[str]:
    """The imports that a module may not have."""
    home = name.partition(".")[0]
    if home in COMMANDS:
        return []
    shared = SHARED if home in PACKAGES else {"errors"}
    allowed = {home} | shared | BELOW[home]
    return sorted(other for other in used if other.partition(".")[0] not in allowed)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, if there is one: what is left when leaves are taken away."""
    left = dict(graph)
    while leaves := [name for name, used in left.items() if not used & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)


def test_the_root_holds_the_commands_and_nothing_else() -> None:
    assert {file.stem for file in ROOT.glob("*.py")} == COMMANDS | SHARED
    for name in PACKAGES:
        source = (ROOT / name / "__init__.py").read_text()
        (only,) = ast.parse(source).body
        assert isinstance(only, ast.Expr), f"{name}/__init__.py holds more than a docstring"


def test_imports_go_one_way() -> None:
    files = modules()
    graph = {name: imports(file.read_text(), set(files)) - {name} for name, file in files.items()}
    assert len(graph) > 30 and sum(map(len, graph.values())) > 50
    wrong = {name: against_the_direction(name, used) for name, used in graph.items()}
    assert not {name: used for name, used in wrong.items() if used}
    assert not circle(graph)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("segmentation.losses", "from dataset.labels import PADDING"),
        ("dataset.counts", "def f():\n    import data"),
        ("dataset.labels", "from checkpointing import weights"),
        ("checkpointing.saver", "from training.config import Config"),
        ("errors", "import segmentation.losses"),
        ("files", "from segmentation.drawing import beside"),
        ("errors", "from files import write_file"),
    ],
)
def test_an_import_that_is_turned_round_is_found(name: str, source: str) -> None:
    assert against_the_direction(name, imports(source, set(modules())))


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
