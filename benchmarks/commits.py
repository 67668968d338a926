"""Access to the files of a commit, for benchmarks that compare a commit with the working tree."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def unpack(commit: str, folder: str | Path) -> None:
    """Write the files of a commit into a folder.

    Args:
        commit: Any name that git has for the commit.
        folder: Folder for the files.

    Raises:
        SystemExit: The commit does not exist.
    """
    command = ["git", "archive", f"{commit}^{{tree}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"error: {commit}: no commit of {ROOT}: {''.join(reason)}")
    subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)


@contextlib.contextmanager
def files_of(commit: str | None) -> Iterator[str]:
    """Import modules from a commit instead of the working tree, and yield a name for the source.

    Args:
        commit: The commit, or None for the working tree.
    """
    if commit is None:
        yield "the working tree"
        return
    before = list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        unpack(commit, folder)
        sys.path[:] = [folder, *(path for path in before if Path(path).resolve() != ROOT)]
        try:
            yield commit
        finally:
            sys.path[:] = before


def imported(*names: str) -> Any:
    """Import the first module that exists, because modules have moved over time.

    Args:
        *names: Names of the module, the newest first.
    """
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Raise if a module that `name` imports is missing.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    raise SystemExit(f"error: none of these modules is there: {', '.join(names)}")
