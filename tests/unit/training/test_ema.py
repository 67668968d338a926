"""Tests of training/ema.py."""

import types

import composer.algorithms
import pytest
import torch
from composer.core import Event

from tests.support.algorithms import Segmenter
from training.ema import EMA

pytestmark = pytest.mark.filterwarnings("ignore")


def test_ema_loads_a_state_saved_under_ddp():
    inner, outer = EMA("8ba"), EMA("8ba")
    state = types.SimpleNamespace(model=Segmenter(), is_model_ddp=False)
    inner.apply(Event.INIT, state, None)
    outer.apply(Event.INIT, state, None)
    expected = inner.state_dict()["ema_model"]
    saved = outer.state_dict()
    saved["ema_model"] = {
        kind: {f"module.{name}": tensor + 1 for name, tensor in stored.items()}
        for kind, stored in saved["ema_model"].items()
    }
    inner.load_state_dict(saved)
    loaded = inner.state_dict()["ema_model"]
    for kind, stored in expected.items():
        assert loaded[kind].keys() == stored.keys()
        assert all(torch.equal(loaded[kind][name], stored[name] + 1) for name in stored)


def test_ema_update_matches_composer():
    torch.manual_seed(1)
    model, ours, theirs = Segmenter(), EMA("3ba"), composer.algorithms.EMA("3ba")
    state = types.SimpleNamespace(model=model, is_model_ddp=False)
    for ema in (ours, theirs):
        ema.apply(Event.INIT, state, None)
    for _ in range(20):
        for tensor in model.state_dict().values():
            tensor += torch.randint(1, 9, tensor.shape)
        for ema in (ours, theirs):
            ema.apply(Event.BATCH_END, state, None)
    for kind, stored in theirs.state_dict()["ema_model"].items():
        for name, tensor in stored.items():
            torch.testing.assert_close(ours.state_dict()["ema_model"][kind][name], tensor)
    counter = ours.ema_model.named_buffers_dict["module.1.num_batches_tracked"]
    assert counter.dtype == torch.int64 and counter > 0


def test_ema_does_not_average_integer_tables():
    """Averaging would round Swin's relative position indices down at each update."""
    model = torch.nn.BatchNorm2d(2)
    model.register_buffer("table", torch.arange(100).view(10, 10))
    model.register_buffer("mask", torch.tensor([True, False]))
    state = types.SimpleNamespace(model=model, is_model_ddp=False)
    ema = EMA("3ba")
    ema.apply(Event.INIT, state, None)
    for _ in range(20):
        model.num_batches_tracked += 1
        ema.apply(Event.BATCH_END, state, None)
    stored = ema.ema_model.named_buffers_dict
    assert torch.equal(stored["table"], model.table) and torch.equal(stored["mask"], model.mask)
    assert 0 < stored["num_batches_tracked"] < 20
