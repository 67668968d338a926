"""Fixtures for all tests: a small data set, and the config of a run that takes seconds."""

from __future__ import annotations

import atexit
import copy
import gc
import logging
import os
from collections.abc import Generator, Iterator
from typing import Any

# OpenMP threads that spin while they wait slow down the others. Set this before importing torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` runs tests in several processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # This handler is registered first, so it runs last. It saves 8 s, because no objects are freed.
    atexit.register(os._exit, 0)

import pytest

from tests.support import forked
from tests.support.s3_server import stop_servers

logging.getLogger("PIL").setLevel(logging.WARNING)
# Importing the tests is a second faster without garbage collection. `pytest_runtestloop` enables it
# again.
gc.disable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """Prepare this process after the tests are imported and before pytest redirects the output."""
    gc.freeze()  # Otherwise, a garbage collection would scan the imported modules for 0.5 s.
    gc.enable()
    atexit.register(gc.unfreeze)
    forked.start_server()
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def stop_shared_server() -> Iterator[None]:
    yield
    stop_servers()


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a data set of 16 training and 6 validation images of 48 x 48 pixels, 12 classes."""
    # Imported here, because the process that distributes the tests does not need OpenCV.
    from extras.preparation.synthetic import make

    path = tmp_path_factory.mktemp("synthetic")
    make(str(path), training=16, validation=6, size=48)
    return str(path)


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """Replace resnet50 by a network of 0.2 million parameters for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        forked.shrink(patch.setattr, patch.setitem)
        yield


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Write an empty curves.png, because drawing it takes as long as two training steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.pictures.draw_curves", lambda *_: b"")
        yield


@pytest.fixture(scope="session")
def tiny_config(synthetic: str) -> dict[str, Any]:
    """The config of a run of four steps with ResNet-50 on crops of 32 x 32 pixels; read-only."""
    dataset = {
        "path": synthetic,
        "base_size": 32,
        "final_size": 32,
        "batch_size": 4,
        "num_workers": 0,
    }
    return {
        "run_name": "tiny",
        "model": {"num_classes": 12, "backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": dict(dataset),
        "eval_dataset": dict(dataset),
        "optimizer": {"lr": 0.01},
        "max_duration": "4ba",
        "eval_interval": "4ba",
        "precision": "fp32",
        "pictures": 0,
    }


@pytest.fixture
def tiny(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """Return a deep copy of `tiny_config` that a test may change."""
    return copy.deepcopy(tiny_config)
