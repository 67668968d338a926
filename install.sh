#!/usr/bin/env bash
# ./install.sh [GROUP ...]
#
# Sets up .venv from uv.lock, with dependency groups of pyproject.toml beside what a run needs, such as wandb or onnx.
# TORCH=2.7.0 takes that torch, in .venv-2.7.0; PYTHON=PATH that Python; VENV=FOLDER another place.
set -euo pipefail
cd "$(dirname "$0")"
unset VIRTUAL_ENV # uv would warn about it
venv=${VENV:-.venv${TORCH:+-$TORCH}}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

fail() {
  echo "error: $1" >&2
  exit 1
}

# step WHAT COMMAND...: a line with what is done, how long that is expected to take, and how long it took
step() {
  local began=$SECONDS
  printf '%s ... ' "$1"
  "${@:2}" >"$log" 2>&1 || {
    echo failed
    explain
  }
  echo "$((SECONDS - began)) s"
}

explain() {
  if grep -qi 'no space left' "$log"; then
    fail "the disk is full: $venv and uv's cache ($("$uv" cache dir)) take 8 GB together, twice that on two disks"
  elif grep -q 'Python\.h' "$log"; then
    fail "$python has no headers; install them (Debian: apt-get install python3-dev) and call again"
  elif ! { command -v c++ && command -v cc; } >/dev/null && grep -qE 'c\+\+|g\+\+|cc' "$log"; then
    fail 'no C++ compiler; install one (Debian: apt-get install g++) and call again'
  elif grep -qiE 'dns error|connection|timed out|failed to (fetch|download)|temporary failure' "$log"; then
    grep -iE -m 1 'dns error|connection|timed out|failed to (fetch|download)|temporary failure' "$log" >&2
    fail 'a download failed; call again, what has come is kept'
  elif [ ! -x "$uv" ]; then
    fail 'no Python here can install uv; install uv, or venv (Debian: apt-get install python3-venv), and call again'
  fi
  tail -n 20 "$log" >&2
  fail 'the lines above say why'
}

# Old versions of uv do not know the settings in pyproject.toml; its required-version has them say so.
works() { "$1" cache dir >/dev/null 2>&1; }

bring_uv() {
  local python
  for python in python3 python3.12 python3.11 python3.10; do
    # pip says so where it cannot reach the index; venv where it lacks ensurepip
    if $python -m venv --clear .uv && .uv/bin/python -m pip install -q "$(grep -o 'uv==[0-9.]*' pyproject.toml)"; then
      return
    fi
  done
  return 1
}

uv=$(command -v uv || true)
if [ -z "$uv" ] || ! works "$uv"; then
  uv=.uv/bin/uv
  works $uv || step 'uv, which installs the rest (5 s)' bring_uv
fi

# The path of a Python that fits and has the headers, which mmcv-full's build wants, as do Triton and Inductor later.
# It is asked for its own path, because uv does not see through the shims of pyenv.
fitting() {
  "$1" -c '
import os, sys, sysconfig
assert (3, 10) <= sys.version_info[:2] <= (3, 12)
'"${2:-}"'
print(sys.executable)' 2>/dev/null
}
with_headers='os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))'
find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3.10 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0-2].*/bin/python; do
    if python=$(fitting "$candidate" "${1:-}"); then return; fi
  done
  return 1
}
bring_python() {
  "$uv" python install --no-bin 3.12 && python=$("$uv" python find --managed-python 3.12)
}

if [ -n "${PYTHON:-}" ]; then
  python=$(fitting "$PYTHON") || fail "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12"
elif python=$(fitting "$venv/bin/python"); then
  : # the one of the last call
elif ! find_python "$with_headers"; then
  step_began=$SECONDS
  printf 'Python 3.12, since this machine has none of 3.10 to 3.12 with headers (10 s) ... '
  if bring_python >"$log" 2>&1; then
    echo "$((SECONDS - step_began)) s"
  elif find_python; then
    echo "not to be had; trying $python, without headers"
  else
    echo failed
    fail 'uv could not bring a Python; install 3.10, 3.11 or 3.12 with headers, or name one: make PYTHON=PATH'
  fi
fi

# What was asked for in an earlier call stays.
groups=()
if [ -n "${TORCH:-}" ]; then groups+=(--no-default-groups --group "torch-$TORCH"); fi
asked=$({ printf '%s\n' "$@" && cat "$venv/.groups" 2>/dev/null; } | sort -u || true)
for group in $asked; do groups+=(--group "$group"); done

sync() {
  UV_PROJECT_ENVIRONMENT=$venv "$uv" sync --frozen --python "$python" "${groups[@]}" "$@"
}
would() { sync --dry-run "${@:2}" 2>&1 | grep -q "Would $1"; }

# From uv's cache where it can: of an index that says nothing of how long a file may be kept, uv takes the source for new
# each time, and forgets what it has built from it for other versions.
build() { sync --offline 2>/dev/null || sync; }

# Reading torch's headers is most of what mmcv-full's 73 files cost. GCC is given them read, which halves the build;
# where it finds that the two do not fit, it reads the headers.
build_mmcv() {
  local headers=$PWD/$venv/.headers flags built=1
  if "${CXX:-c++}" --version | grep -q 'Free Software'; then
    flags=$("$venv/bin/python" -c '
import pathlib, sysconfig
torch = pathlib.Path(sysconfig.get_path("platlib"), "torch")
include = torch / "include"
print("-I", include, "-I", include / "torch/csrc/api/include", "-I", sysconfig.get_path("include"))
if "GLIBCXX_USE_CXX11_ABI" in (torch / "utils/cpp_extension.py").read_text():  # torch 2.7 defines it
    print("-D_GLIBCXX_USE_CXX11_ABI=1")')
    mkdir -p "$headers"
    echo '#include <torch/types.h>' >"$headers/torch.h"
    # shellcheck disable=SC2086 # several words
    "${CXX:-c++}" -O0 -g0 -fPIC -std=c++17 $flags -x c++-header "$headers/torch.h" -o "$headers/torch.h.gch" &&
      CPPFLAGS="-include $headers/torch.h" build && built=0
    rm -rf "$headers"
  fi
  [ $built = 0 ] || build
}
# Under PYTHONDONTWRITEBYTECODE every start would compile all its imports. An environment that pip made may hold an
# mmcv-full that was built against another torch.
usable() {
  sync ${PYTHONDONTWRITEBYTECODE:+--compile-bytecode} || return
  "$venv/bin/python" -c 'import mmcv.ops' || sync --reinstall-package mmcv-full --no-cache
}

if would download --inexact --no-install-package mmcv-full; then
  step "Packages, into $venv (up to 3 GB to download, then 1 minute)" sync --inexact --no-install-package mmcv-full
elif would install --inexact --no-install-package mmcv-full; then
  step "Packages, into $venv (1 minute)" sync --inexact --no-install-package mmcv-full
fi
if would download; then
  step 'mmcv-full, built from source, once for each torch and Python (2 minutes on 2 cores)' build_mmcv
fi
step 'All in place, and tried (20 s)' usable
echo "$asked" >"$venv/.groups"
