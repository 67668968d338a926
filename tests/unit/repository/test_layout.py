"""Tests of the layout of tests/: each module has a unit test file."""

from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("training", "checkpointing", "dataset", "networks", "segmentation", "extras")


def modules_without_tests(root: Path) -> list[str]:
    """Return the modules below a folder that have no test file in its tests/unit."""
    modules = [*root.glob("*.py"), *(m for p in PACKAGES for m in (root / p).rglob("*.py"))]
    paths = [module.relative_to(root) for module in modules if module.name != "__init__.py"]
    unit = root / "tests" / "unit"
    return sorted(str(p) for p in paths if not (unit / p.parent / f"test_{p.name}").is_file())


def test_every_module_has_a_unit_test_file() -> None:
    assert modules_without_tests(ROOT) == []


def test_module_without_tests_is_found(tmp_path: Path) -> None:
    for name in ("main.py", "extras/a/b.py", "tests/unit/test_main.py", "extras/a/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert modules_without_tests(tmp_path) == ["extras/a/b.py"]
