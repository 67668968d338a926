"""Tests of the documentation: pages are up to date; links, keys, options and commands exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT
from training.keys import fields_of, flatten
from training.schema import Config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {path.name for path in ROOT.glob("*.py")}


def configuration_page() -> str:
    """Return docs/configuration.md, generated from the schema."""
    lines = [
        "# Configuration",
        "",
        "    python main.py --help      # the same list on the command line",
        "",
        "This page lists all keys of a run's YAML file. You can override each key on the command",
        "line, for example with `optimizer.lr=0.01`.",
        "[Checkpoints and resume](resume.md) says which keys you may change when you resume.",
    ]

    def table(section: Any, prefix: str) -> None:
        heading = prefix.rstrip(".") or "Top level"
        lines.extend(["", f"## {heading}", "", "| key | default | meaning |", "|---|---|---|"])
        sections = []
        for field, default in fields_of(section):
            if dataclasses.is_dataclass(default):
                sections.append((default, f"{prefix}{field.name}."))
                continue
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            shown = "" if default in (None, [], {}) else f"`{shown}`"
            meaning = field.metadata["meaning"].replace("|", "\\|")
            lines.append(f"| `{prefix}{field.name}` | {shown} | {meaning} |")
        for part in sections:
            table(*part)

    table(Config(), "")
    return "\n".join(lines) + "\n"


def test_configuration_page_matches_the_schema() -> None:
    """Regenerate with: python -c "from tests.unit.repository import test_docs as t; t.write()"."""
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page()


def write() -> None:
    """Write docs/configuration.md."""
    (ROOT / "docs/configuration.md").write_text(configuration_page())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_point_to_existing_targets(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target for target in targets if "://" not in target and not target.startswith("#")]
    missing = [name for name in local if not (page.parent / name.partition("#")[0]).exists()]
    assert not missing
    for name in local:
        path, _, anchor = name.partition("#")
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", (page.parent / path).read_text())
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
            assert anchor in slugs, name


def commands_of(page: Path) -> list[list[str]]:
    """Return the commands in a page's code blocks, as lists of words."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", page.read_text())
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_documented_commands_and_options_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    keys = flatten(Config())
    sections = {name.rpartition(".")[0] for name in keys} | {
        f"loggers.{name}" for name in ("wandb", "file", "console", "progress_bar")
    }
    for words in commands_of(page):
        if words[0] == "make":
            for target in words[1:]:
                assert "=" in target or re.search(rf"(?m)^{target}:", makefile), words
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        for number, word in enumerate(words):
            if word in COMMANDS:
                source = "".join((ROOT / name).read_text() for name in ("command_lines.py", word))
                options = [w for w in words[number + 1 :] if re.match(r"--[a-z]", w)]
                plan = (ROOT / "extras/planning/plan.py").read_text()
                source += plan if word == "main.py" else ""
                for option in options:
                    assert f'"{option}"' in source or option == "--help", (words, option)
            if word == "main.py":
                for override in words[number + 2 :]:
                    key = override.partition("=")[0]
                    if "=" in override and not key.startswith("--"):
                        assert key in keys or key in sections, (words, key)


def exists(dotted: str) -> bool:
    """Return whether a dotted name is a module of the project, or is defined in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:count])
        if module.is_dir() or module.with_suffix(".py").is_file():
            break
    else:
        return False
    if count == len(parts):
        return True
    path = module.with_suffix(".py")
    source = path.read_text() if path.is_file() else ""
    pattern = rf"(?m)^ *(?:(?:class|def) )?{parts[count]}\b|^from .* import .*\b{parts[count]}\b"
    return re.search(pattern, source) is not None


def test_dotted_names_in_backticks_exist() -> None:
    """YAML keys, modules and their attributes in pages, docstrings and comments must exist."""
    keys = {*flatten(Config())}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    files = [path for path in PAGES if path.name != "changelog.md"]  # it lists removed names
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    files += [ROOT / name for name in listed.stdout.split() if not name.startswith("tests/")]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"extras", "benchmarks"}
    modules = {path.stem for path in ROOT.glob("*.py")}
    missing = []
    for path in files:
        for code in re.findall(
            r"`([A-Za-z_]+(?:\.[A-Za-z_0-9]+)+)(?:[:=(][^`]*)?`", path.read_text()
        ):
            first = code.partition(".")[0]
            is_key = code in keys or any(key.startswith(f"{code}.") for key in keys)
            if code.endswith((".py", ".yaml", ".onnx")):  # skip file names
                continue
            if first in sections | packages | modules and not is_key and not exists(code):
                missing.append((path.name, code))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_yaml_blocks_can_be_parsed(page: Path) -> None:
    for block in re.findall(r"(?ms)^```yaml\n(.*?)^```", page.read_text()):
        yaml.safe_load(block)


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert not [name for name in pages if f"docs/{name}" not in readme]
