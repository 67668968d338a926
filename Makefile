# make demo       set up, then train on generated data (3 to 5 minutes once installed)
# make gpu-check  set up, then check the results and the speed of your GPU (5 minutes)
# make test       set up, then run the linters and all tests (7 to 10 minutes)
# make check      set up, then run the linters and the unit tests (about 1 minute)
# make install    only set up; WITH="wandb onnx" also installs these groups of pyproject.toml
# make lock       update uv.lock and requirements.txt after you change pyproject.toml
# make image      build the Docker image, and write IMAGE=registry/name into the files that use it
#
# TORCH=2.7.0 installs torch 2.7.0, for GPUs older than Turing, into .venv-2.7.0. PYTHON=PATH chooses the Python.

VENV := .venv$(if $(TORCH),-$(TORCH))
PY := $(VENV)/bin/python
LOCK := pyproject.toml uv.lock install.sh
# Three processes keep two cores busy, because some tests wait.
# Keep the order of the files. By default, xdist sorts them by their number of tests, so slow files with few tests run last.
PARALLEL := --dist=loadfile --no-loadscope-reorder
export VENV TORCH PYTHON
# Some images set this variable. Each of the many processes that the tests start would then compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo gpu-check test check lint quick install lock image

demo: $(VENV)/.train
	@$(PY) -m extras.preparation.synthetic demo/data
	@$(PY) main.py yamls/demo.yaml $(DEMO)
	@echo
	@echo 'Next, segment an image of yours, or describe a folder of yours for training:'
	@echo '  $(PY) predict.py demo/checkpoints/latest-rank0.pt IMAGE'
	@echo '  $(PY) data.py FOLDER --suggest'

gpu-check: $(VENV)/.train
	@$(PY) -m benchmarks.gpu_check

test: lint
	$(PY) -m pytest $(PARALLEL) --numprocesses=3

check: $(VENV)/.test
	@$(MAKE) --no-print-directory -j2 --output-sync lint quick

lint: $(VENV)/.test
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/pre-commit run --all-files

quick: $(VENV)/.test
	@$(PY) -m pytest $(PARALLEL) --numprocesses=2 -p no:hypothesispytest -q tests/unit

install: $(LOCK)
	@./install.sh $(WITH)

# uv writes the absolute path of wheels/ into uv.lock, but `uv sync --frozen` does not read it. A fixed path keeps the file the same.
# requirements.txt omits torch, which the user's image provides, and the markers of the platforms that we support.
PLATFORMS := sys_platform == 'darwin' or sys_platform == 'linux'
lock: $(VENV)/.test
	$(VENV)/bin/uv lock
	sed -i.bak 's|index = "file://[^"]*/wheels"|index = "file:///wheels"|' uv.lock && rm uv.lock.bak
	{ echo "# Written by make lock: what uv.lock pins beside torch and torchvision, for pip install --no-deps."; \
	    echo "--find-links wheels"; \
	    $(VENV)/bin/uv export -q --frozen --no-hashes --no-annotate --no-header --prune torch --prune torchvision \
	    | sed "s/ ; $(PLATFORMS)$$//; s/ and ($(PLATFORMS))$$//"; } >requirements.txt

$(VENV)/.train: $(LOCK)
	@./install.sh
	@touch $@

$(VENV)/.test: $(LOCK)
	@./install.sh dev
	@touch $(VENV)/.train $@

# The name of the image, here and in the files that use it.
IMAGE := my-registry/deeplabv3
image:
	docker build --tag $(IMAGE) .
	sed -i 's|^\( *image:\) [^ ]*|\1 $(IMAGE)|' launch/kubernetes.yaml yamls/mcloud_run.yaml
