"""A check for the compilers that Triton and Inductor need to build kernels during training."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sysconfig
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
    variable, compilers = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("g++", "clang++"))
    # If the environment variable is set, it names the compiler.
    programs = shlex.split(os.environ[variable])[:1] if variable in os.environ else compilers
    lacks, packages = [], []
    if not any(map(shutil.which, programs)):
        lacks.append(f"a {'C' if gpu else 'C++'} compiler ({' or '.join(compilers)})")
        packages.append(compilers[0])
    # Look for Python's headers where Triton does, in the scheme posix_prefix. Debian's default
    # scheme points to a different folder.
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not headers.is_file():
        lacks.append(f"Python's headers ({headers})")
        packages.append("python3-dev")
    if not lacks:
        return None
    return f"{' and '.join(lacks)}; install them (Debian: apt-get install {' '.join(packages)})"
