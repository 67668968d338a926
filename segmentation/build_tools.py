"""A check for the compilers that Triton and Inductor need to build kernels during training."""

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
    """Describe the build tools that are missing for Triton (GPU) or Inductor (CPU), or return None.

    Triton compiles C code that launches GPU kernels. Inductor compiles C++ code for the CPU.

    Args:
        gpu: Whether to check for Triton on a GPU instead of Inductor on a CPU.

    Returns:
        A phrase for an error message, with the packages to install, or None.
    """
    if gpu:
        compiler = _program("CC", ("gcc", "clang"))
    else:
        compiler = _program("CXX", ("g++", "clang++"))
    lacks, packages = [], []
    if compiler is None:
        lacks.append("a C compiler (gcc or clang)" if gpu else "a C++ compiler (g++ or clang++)")
        packages.append("gcc" if gpu else "g++")
    # Look for Python's headers where Triton does, in the scheme posix_prefix. Debian's default
    # scheme points to a different folder.
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not headers.is_file():
        lacks.append(f"Python's headers ({headers})")
        packages.append("python3-dev")
    if not lacks:
        return None
    return f"{' and '.join(lacks)}; install them (Debian: apt-get install {' '.join(packages)})"


def _program(variable: str, names: Sequence[str]) -> str | None:
    """Find the program that an environment variable names, or the first installed one."""
    if variable in os.environ:
        names = shlex.split(os.environ[variable])[:1]
    return next(filter(None, map(shutil.which, names)), None)
