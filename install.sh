#!/usr/bin/env bash
# ./install.sh [GROUP ...]
#
# Set up .venv from uv.lock. Each GROUP is an additional dependency group of pyproject.toml, such as wandb or onnx.
# TORCH=2.7.0 installs torch 2.7.0 into .venv-2.7.0. PYTHON=PATH chooses the Python, and VENV=FOLDER another folder.
set -euo pipefail
cd "$(dirname "$0")"
unset VIRTUAL_ENV # uv would warn about this variable.
venv=${VENV:-.venv${TORCH:+-$TORCH}}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

fail() {
  echo "error: $1" >&2
  exit 1
}

# Print the progress of uv's downloads from its log, for example "1204 of 2950 MB".
downloaded() {
  awk '
    function mib(text) {
      return text * (text ~ /GiB/ ? 1024 : text ~ /KiB/ ? 1 / 1024 : 1)
    }
    $1 == "Downloading" { sub(/\(/, "", $3); size[$2] = mib($3); all += size[$2] }
    $1 == "Downloaded" { done += size[$2] }
    END { if (all >= 1) printf "%d of %d MB", done, all }' "$log"
}

# step DESCRIPTION COMMAND...: run a command, and print one line with its duration. The line shows the progress of
# downloads. Without a terminal, a new line shows it every 20 seconds.
step() {
  local began=$SECONDS shown=$SECONDS pid progress
  printf '%s ... ' "$1"
  "${@:2}" >"$log" 2>&1 &
  pid=$!
  while sleep 0.5 && kill -0 $pid 2>/dev/null; do
    progress=$(downloaded)
    if [ -z "$progress" ]; then continue; fi
    if [ -t 1 ]; then
      printf '\r%s ... %s, %s s \033[K' "$1" "$progress" $((SECONDS - began))
    elif [ $((SECONDS - shown)) -ge 20 ]; then
      shown=$SECONDS
      printf '\n  %s, %s s ' "$progress" $((SECONDS - began))
    fi
  done
  wait $pid || {
    echo failed
    explain
  }
  if [ -t 1 ]; then printf '\r%s ... \033[K' "$1"; fi
  echo "$((SECONDS - began)) s"
}

explain() {
  if grep -qi 'no space left' "$log"; then
    fail "the disk is full: $venv and uv's cache ($("$uv" cache dir)) take 8 GB together, twice that on two disks"
  elif grep -qiE 'dns error|connection|timed out|failed to (fetch|download)|temporary failure' "$log"; then
    grep -iE -m 1 'dns error|connection|timed out|failed to (fetch|download)|temporary failure' "$log" >&2
    fail 'a download failed; run the command again, it keeps what is already downloaded'
  elif [ ! -x "$uv" ]; then
    fail 'no Python here can install uv; install uv, or venv (Debian: apt-get install python3-venv), and try again'
  fi
  tail -n 20 "$log" >&2
  fail 'the lines above say why'
}

# An old uv does not know the settings in pyproject.toml, so required-version in that file makes it fail.
works() { "$1" cache dir >/dev/null 2>&1; }

bring_uv() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
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

# Print the path of a Python if its version is supported. Python prints its own path, because uv cannot resolve the
# shims of pyenv.
fitting() {
  "$1" -c '
import sys
assert (3, 11) <= sys.version_info[:2] <= (3, 13)
print(sys.executable)' 2>/dev/null
}
find_python() {
  local candidate
  for candidate in python3 python python3.13 python3.12 python3.11 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-3].*/bin/python; do
    if python=$(fitting "$candidate"); then return; fi
  done
  return 1
}

if [ -n "${PYTHON:-}" ]; then
  python=$(fitting "$PYTHON") || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
elif python=$(fitting "$venv/bin/python"); then
  : # Use the Python of the last call.
elif ! find_python; then
  step 'Python 3.13, because this machine has none of 3.11 to 3.13 (10 s)' "$uv" python install --no-bin 3.13
  python=$("$uv" python find --managed-python 3.13)
fi

# Groups that earlier calls installed stay installed.
groups=()
if [ -n "${TORCH:-}" ]; then groups+=(--no-default-groups --group "torch-$TORCH"); fi
asked=$({ printf '%s\n' "$@" && cat "$venv/.groups" 2>/dev/null; } | sort -u || true)
for group in $asked; do groups+=(--group "$group"); done

sync() {
  UV_PROJECT_ENVIRONMENT=$venv "$uv" sync --frozen --python "$python" "${groups[@]}"
}
# The first import compiles bytecode, so later starts are fast, even with PYTHONDONTWRITEBYTECODE.
try_imports() {
  env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c 'import composer, mmcv.runner, streaming, torchvision'
}

step "Packages, into $venv (the first time about 3 GB to download)" sync
step 'First import (20 s)' try_imports
echo "$asked" >"$venv/.groups"
