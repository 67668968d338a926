# make demo     set up, then train on generated data (2 to 4 minutes once installed)
# make test     set up, then run the linters and all tests (12 minutes)
# make check    the linters, and the tests that need no training, process or server (2 minutes)
# make install  set up alone; WITH="wandb onnx" adds groups of pyproject.toml
# make image    build the image of Dockerfile: IMAGE=registry/name is written to the files that run it
#
# TORCH=2.7.0 takes that torch, for GPUs older than Turing, into .venv-2.7.0; PYTHON=PATH names the Python.

VENV := .venv$(if $(TORCH),-$(TORCH))
PY := $(VENV)/bin/python
LOCK := pyproject.toml uv.lock install.sh
# Files in their order: by their number of tests, as else, long ones of few would come last.
PARALLEL := --numprocesses=2 --dist=loadfile --no-loadscope-reorder
export VENV TORCH PYTHON

.PHONY: demo test check lint quick install image

demo: $(VENV)/.train
	@$(PY) -m dataset.synthetic demo/data
	@$(PY) main.py yamls/demo.yaml
	@echo 'Next, on a photo of yours: $(PY) predict.py demo/checkpoints/latest-rank0.pt PHOTO'
	@echo 'Next, on data of yours: yamls/camvid.yaml, as README.md tells under "Data of your own"'

test: lint
	$(PY) -m pytest $(PARALLEL)

check: $(VENV)/.test
	@$(MAKE) --no-print-directory -j2 --output-sync lint quick

lint: $(VENV)/.test
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/pre-commit run --all-files

quick: $(VENV)/.test
	@$(PY) -m pytest $(PARALLEL) -q -m 'not (trains or processes or s3 or gpu or slow)'

install: $(LOCK)
	@./install.sh $(WITH)

$(VENV)/.train: $(LOCK)
	@./install.sh
	@touch $@

$(VENV)/.test: $(LOCK)
	@./install.sh dev
	@touch $(VENV)/.train $@

# One name for the image, here and wherever it is run.
IMAGE := my-registry/deeplabv3
image:
	docker build --tag $(IMAGE) .
	sed -i 's|^\( *image:\) [^ ]*|\1 $(IMAGE)|' launch/kubernetes.yaml yamls/mcloud_run.yaml
