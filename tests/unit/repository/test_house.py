"""Tests of the project's structure: files in the root, import directions, and lengths."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

FRONT = {"main", "model", "data", "transforms"}
COMMANDS = {"convert_ade20k", "convert_dataset", "download_ade20k", "evaluate", "export", "predict"}
# Layers from top to bottom. A module may import its own package and lower layers only.
LAYERS = (
    FRONT | COMMANDS,
    {"extras"},
    {"training"},
    {"command_lines"},
    {"checkpointing", "dataset"},
    {"networks"},
    {"segmentation"},
    {"files"},
    {"errors"},
)
PACKAGES = {"extras", "training", "checkpointing", "dataset", "networks", "segmentation"}
SHARED = {"command_lines", "files", "errors"}
# The only front functions that may import extras: for `--plan`, and for `data.py PATH`.
MAY_IMPORT_EXTRAS = {"main.run_plan", "data.check_dataloader"}

MAX_LINES = 400  # lines of a module
MAX_BODY = 60  # lines of a function, without its signature and docstring
# Exceptions to the limits, each with its reason.
LARGE_MODULES = {
    "segmentation.losses_triton",  # two kernels, each with its own pass
}
LONG_FUNCTIONS = {
    # A Triton kernel must be one function, because its values live in registers.
    "segmentation.losses_triton._forward_kernel",
    "segmentation.losses_triton._backward_kernel",
}


class Import(NamedTuple):
    """One import in the source of a module."""

    name: str
    function: str  # the outermost function around the import, or empty


def parse_modules(root: Path) -> dict[str, ast.Module]:
    """Return the syntax tree of each module in the root and the packages, by dotted name."""
    files = [*root.glob("*.py"), *(f for name in PACKAGES for f in (root / name).rglob("*.py"))]
    trees = {}
    for file in files:
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        trees[name] = ast.parse(file.read_text())
    return trees


def names_of(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that a node imports, by statement or by a call with a literal name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        home = package.split(".")[: -node.level + 1 or None] if node.level else []
        module = ".".join([*home, *([node.module] if node.module else [])])
        yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
    elif isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func)
        (first, *_), name = node.args, ""
        if isinstance(first, ast.JoinedStr):  # f"networks.{kind}" is an import of the package
            first, name = first.values[0], "."
        if called.endswith(("import_module", "__import__")) and isinstance(first, ast.Constant):
            yield str(first.value).removesuffix(name)


def find_imports(module: str, tree: ast.Module, known: set[str]) -> set[Import]:
    """Return a module's imports of known modules and packages, inside functions too."""
    package = module.removesuffix(".__init__")
    package = package if package != module else module.rpartition(".")[0]
    known = known | PACKAGES
    imports = set()

    def visit(node: ast.AST, function: str) -> None:
        imports.update(Import(name, function) for name in names_of(node, package) if name in known)
        if not function and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return imports


def layer_of(module: str) -> int:
    home = module.partition(".")[0]
    return next(level for level, names in enumerate(LAYERS) if home in names)


def is_allowed(module: str, used: Import) -> bool:
    home, other = module.partition(".")[0], used.name.partition(".")[0]
    if other == "extras" and home in FRONT:
        return f"{module}.{used.function}" in MAY_IMPORT_EXTRAS
    return home == other or home in LAYERS[0] or layer_of(other) > layer_of(home)


def find_import_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that are part of import cycles or lie between two cycles."""
    left = dict(graph)
    while left:
        imported = set().union(*left.values())
        ends = [name for name, used in left.items() if name not in imported or not used & set(left)]
        if not ends:
            break
        for name in ends:
            del left[name]
    return sorted(left)


def libraries_loaded_with(module: str, trees: dict[str, ast.Module]) -> set[str]:
    """Return the libraries that importing a module of the project loads directly or indirectly."""
    libraries, seen, waiting = set(), set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in trees:
            libraries.add(name.partition(".")[0])
        elif name not in seen:
            seen.add(name)
            for statement in trees[name].body:
                waiting.extend(names_of(statement, name.rpartition(".")[0]))
    return libraries


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from a function's first statement to its last, without the docstring."""
    statements = function.body[1:] if ast.get_docstring(function, False) else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def find_long_code(root: Path) -> set[str]:
    """Return the modules and functions that are longer than the limits."""
    long = set()
    for name, tree in parse_modules(root).items():
        source = (root / f"{name.replace('.', '/')}.py").read_text()
        if len(source.splitlines()) > MAX_LINES:
            long.add(name)
        for node in ast.walk(tree):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and body_lines(node) > MAX_BODY:
                long.add(f"{name}.{node.name}")
    return long


def find_faults(root: Path) -> list[str]:
    """Return a line for each violation of the rules."""
    trees = parse_modules(root)
    faults = [
        f"{name}: not a command; it belongs into a package"
        for name in trees.keys() - LAYERS[0] - SHARED
        if "." not in name
    ]
    for name, tree in trees.items():
        if name.endswith("__init__") and [type(node) for node in tree.body] != [ast.Expr]:
            faults.append(f"{name}: holds more than a docstring")
    graph = {}
    for name, tree in trees.items():
        if name.partition(".")[0] not in set().union(*LAYERS):
            continue
        imports = find_imports(name, tree, set(trees))
        faults += [
            f"{name}: must not import {used.name}" for used in imports if not is_allowed(name, used)
        ]
        graph[name] = {used.name for used in imports} - {name}
    if cycle := find_import_cycle(graph):
        faults.append(f"{' and '.join(cycle)}: import each other")
    return sorted(faults)


def test_project_follows_the_import_rules() -> None:
    assert not find_faults(ROOT)


def test_predict_and_export_start_without_composer_and_streaming() -> None:
    """Both take 4 s to import."""
    trees = parse_modules(ROOT)
    assert "composer" in libraries_loaded_with("main", trees)
    for command in ("predict", "export"):
        assert not libraries_loaded_with(command, trees) & {"composer", "streaming"}


def test_modules_and_functions_respect_the_length_limits() -> None:
    assert find_long_code(ROOT) == LARGE_MODULES | LONG_FUNCTIONS


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Create a project that follows the rules, with a module `room` in each package."""
    for name in LAYERS[0] | SHARED:
        (tmp_path / f"{name}.py").write_text('"""A module."""\n')
    for name in (*PACKAGES, "extras/planning"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('"""A package."""\n')
        (tmp_path / name / "room.py").write_text('"""A module."""\n')
    (tmp_path / "main.py").write_text("def run_plan():\n    import extras.planning.room\n")
    (tmp_path / "training" / "room.py").write_text("import dataset.room, networks, errors\n")
    assert not find_faults(tmp_path)
    return tmp_path


WRONG_IMPORTS = [
    pytest.param("segmentation/room.py", "import networks.room", id="import from a higher layer"),
    pytest.param("networks/room.py", "import networks, dataset", id="package of a higher layer"),
    pytest.param(
        "dataset/room.py", "from checkpointing import room", id="module of the same layer"
    ),
    pytest.param(
        "checkpointing/room.py", "from dataset.room import x", id="name from the same layer"
    ),
    pytest.param(
        "checkpointing/room.py", "def f():\n    import training.room", id="import inside a function"
    ),
    pytest.param("training/room.py", "from extras.planning import room", id="core to extras"),
    pytest.param(
        "dataset/room.py",
        "def run():\n    import extras.room",
        id="core to extras, inside a function",
    ),
    pytest.param("extras/planning/room.py", "import main", id="extras to a command"),
    pytest.param("training/room.py", "class A:\n    from data import x", id="core to the front"),
    pytest.param("main.py", "import extras.room", id="front to extras"),
    pytest.param(
        "main.py", "def f():\n    import extras.room", id="front to extras, wrong function"
    ),
    pytest.param("data.py", "if x:\n    from extras import room", id="front to extras, inside if"),
    pytest.param("errors.py", "import files", id="errors to files"),
    pytest.param("files.py", "from segmentation.room import x", id="files to a package"),
    pytest.param("command_lines.py", "import training.room", id="command_lines to training"),
    pytest.param("dataset/room.py", "from ..checkpointing import room", id="relative import"),
    pytest.param(
        "training/room.py",
        "importlib.import_module('extras.room')",
        id="import_module with a string",
    ),
    pytest.param(
        "networks/room.py", "import_module(f'dataset.{x}')", id="import_module with an f-string"
    ),
    pytest.param(
        "segmentation/room.py",
        "if TYPE_CHECKING:\n    from networks.room import x",
        id="import for type checking only",
    ),
    pytest.param("segmentation/__init__.py", "import torch", id="code in __init__.py"),
    pytest.param("helpers.py", "x = 1", id="unknown module in the root"),
]


@pytest.mark.parametrize(("file", "source"), WRONG_IMPORTS)
def test_forbidden_import_or_file_is_found(project: Path, file: str, source: str) -> None:
    (project / file).write_text(f'"""A module."""\n{source}\n')
    module = file.removesuffix(".py").replace("/", ".")
    assert any(fault.startswith(f"{module}: ") for fault in find_faults(project))


def test_import_cycle_is_found(project: Path) -> None:
    (project / "dataset" / "room.py").write_text("def f():\n    import dataset.other\n")
    (project / "dataset" / "other.py").write_text("from dataset import room\n")
    assert find_faults(project) == ["dataset.other and dataset.room: import each other"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("x = 1\n" * 400, set(), id="400 lines"),
        pytest.param("x = 1\n" * 401, {"dataset.room"}, id="401 lines"),
        pytest.param("def f():\n" + "    x = 1\n" * 60, set(), id="body of 60 lines"),
        pytest.param(
            "class A:\n    async def f():\n" + "        x = 1\n" * 61,
            {"dataset.room.f"},
            id="method of 61 lines",
        ),
        pytest.param(
            "def f():\n    '''" + "line\n" * 80 + "'''\n" + "    x = 1\n" * 60,
            set(),
            id="long docstring",
        ),
    ],
)
def test_long_module_or_function_is_found(project: Path, source: str, expected: set[str]) -> None:
    (project / "dataset" / "room.py").write_text(source)
    assert find_long_code(project) == expected
