"""What Triton and Inductor need of a machine, because they compile kernels while training."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def missing_build_tools(gpu: bool) -> str | None:
    """Return what Triton (on a GPU) or Inductor's C++ (on a CPU) lacks here, or None.

    Args:
        gpu: Triton compiles C for a GPU's launches, Inductor C++ for a CPU.

    Returns:
        A phrase for a person, with what to install.
    """
    if gpu:
        compiler = _program("CC", ("gcc", "clang"))
    else:
        compiler = _program("CXX", ("g++", "clang++"))
    lacks, packages = [], []
    if compiler is None:
        lacks.append("a C compiler (gcc or clang)" if gpu else "a C++ compiler (g++ or clang++)")
        packages.append("gcc" if gpu else "g++")
    # Triton asks for this scheme too, because Debian's own one names another folder.
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not headers.is_file():
        lacks.append(f"Python's headers ({headers})")
        packages.append("python3-dev")
    if not lacks:
        return None
    return f"{' and '.join(lacks)}; install them (Debian: apt-get install {' '.join(packages)})"


def _program(variable: str, names: Sequence[str]) -> str | None:
    """Return the path of the program that a variable names, or else of the first one there is."""
    if variable in os.environ:
        names = shlex.split(os.environ[variable])[:1]
    return next(filter(None, map(shutil.which, names)), None)
