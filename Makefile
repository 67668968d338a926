# make demo   set up, then train on generated data (about 4 minutes once installed)
# make test   set up, then run the linter and the tests
# Both create .venv on their first call and again only when a requirements file has changed.

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt
FITTING := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

.PHONY: demo test install

demo: .venv/.train
	$(PY) -m dataset.synthetic demo/data
	$(PY) main.py yamls/demo.yaml

test: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest

install: .venv/.train

.venv/.python:
	@for python in $(PYTHON) python3.11 python3.12 python3.10 python3; do \
	  if $$python -c '$(FITTING)' 2>/dev/null; then $$python -m venv .venv && touch $@; exit; fi; \
	done; \
	echo 'error: found no Python 3.10, 3.11 or 3.12 with venv; install one or name it: make PYTHON=PATH' >&2; exit 1

# mmcv-full has no wheel. Its build must see the torch it will run with (no build isolation), must not
# see a GPU (it would want a CUDA toolkit that matches torch's, for operators DeepLabV3+ never calls), and
# comes after OpenCV, else it asks for a second copy of that. pip keeps the wheel it builds.
.venv/.train: requirements.txt constraints.txt | .venv/.python
	@echo 'Installing requirements.txt (6 GB) into .venv'
	@grep -v '^mmcv-full' requirements.txt > .venv/requirements.txt
	@$(PIP) pip 'setuptools<80' wheel ninja psutil
	@$(PIP) -r .venv/requirements.txt
	@$(PY) -c 'import mmcv.ops' 2>/dev/null || { \
	  command -v c++ >/dev/null || { echo 'error: no C++ compiler; install one (Debian: apt-get install g++) and call make again' >&2; exit 1; }; \
	  $(PY) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	    { echo 'error: no Python headers; install them (Debian: apt-get install python3-dev) and call make again' >&2; exit 1; }; \
	  echo 'Building mmcv-full (about 10 minutes on 2 cores, the first time)'; \
	  export CUDA_VISIBLE_DEVICES= FORCE_CUDA=0 MMCV_WITH_OPS=1; \
	  $(PIP) --no-build-isolation $$(grep -o '^mmcv-full==[^ ]*' requirements.txt) && \
	  { $(PY) -c 'import mmcv.ops' 2>/dev/null || $(PIP) --no-build-isolation --no-deps --force-reinstall --no-cache-dir \
	      $$(grep -o '^mmcv-full==[^ ]*' requirements.txt); }; }
	@$(PY) -c 'import mmcv.ops' && $(PY) -m pip check
	@touch $@

.venv/.test: requirements-test.txt .venv/.train
	@$(PIP) -r requirements-test.txt && $(PY) -m pip check
	@touch $@
