"""Tests of training/sam.py."""

import types
import warnings

import pytest
import torch
from composer.core import Event
from composer.trainer._scaler import ClosureGradScaler
from torch import nn
from torch.profiler import ProfilerActivity, profile

from training.sam import SAM

pytestmark = pytest.mark.filterwarnings("ignore")


class Point:
    """A toy problem with two weights and the loss |w|^2 / 2 * factor, without a trainer."""

    def __init__(self, sam, batch=0, factor=1.0):
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.5)
        timestamp = types.SimpleNamespace(batch=types.SimpleNamespace(value=batch))
        self.state = types.SimpleNamespace(optimizers=[self.optimizer], timestamp=timestamp)
        sam.apply(Event.INIT, self.state, None)
        self.factor = factor
        self.calls, self.seen = [], []

    def closure(self, **kwargs):
        self.calls.append(kwargs)
        self.seen.append(self.weight.detach().clone())
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.factor * self.weight.square().sum() / 2
        loss.backward()
        return loss.item()


def test_sam_steps_with_the_gradient_at_the_perturbed_weights():
    point = Point(SAM(rho=1.0))
    assert point.optimizer.step(point.closure) == 12.5
    assert point.calls == [{"ddp_sync": False}, {"loss_dict": {}}]
    torch.testing.assert_close(point.seen[1], torch.tensor([3.6, 4.8]))  # rho = 1 along (3, 4) / 5
    # The step subtracts half the gradient at (3.6, 4.8) from the original weights.
    torch.testing.assert_close(point.weight.detach(), torch.tensor([1.2, 1.6]))


@pytest.mark.parametrize(
    "batch, climbs", [(0, False), (1, False), (2, True), (3, False), (5, True)]
)
def test_sam_perturbs_the_weights_once_per_interval(batch, climbs):
    point = Point(SAM(rho=1.0, interval=3), batch)
    point.optimizer.step(point.closure)
    assert point.calls == ([{"ddp_sync": False}, {"loss_dict": {}}] if climbs else [{}])


def test_sam_takes_a_step_even_at_zero_loss():
    point = Point(SAM(rho=1.0))
    point.optimizer.step(lambda **kwargs: 0 * point.closure(**kwargs))
    torch.testing.assert_close(point.weight.detach(), torch.tensor([1.2, 1.6]))


def test_sam_restores_weights_after_a_failed_pass():
    point = Point(SAM(rho=1.0))

    def out_of_memory(**kwargs):
        point.closure(**kwargs)
        if len(point.calls) == 2:
            raise RuntimeError("CUDA out of memory")

    start = point.weight.detach().clone()
    with pytest.raises(RuntimeError):
        point.optimizer.step(lambda **kwargs: out_of_memory(**kwargs) or 1.0)
    assert torch.equal(point.weight, start) and not torch.equal(point.seen[1], start)


@pytest.mark.parametrize("overflows", [None, 0, 1])
def test_sam_skips_the_step_if_a_scaled_gradient_overflows(overflows):
    """In fp16, an overflow in either pass skips the step."""
    scaler = ClosureGradScaler("cpu", init_scale=8.0)
    point = Point(SAM(rho=1.0))
    start = point.weight.detach().clone()

    def closure(**kwargs):
        infinite = len(point.calls) == overflows
        point.calls.append(kwargs)
        loss = point.weight.square().sum() / 2 * (torch.inf if infinite else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(point.optimizer)
        return loss.detach()

    assert point.optimizer._step_supports_amp_closure
    scaler.step(point.optimizer, closure=closure)
    scaler.update()
    if overflows is None:
        torch.testing.assert_close(point.weight.detach(), torch.tensor([1.2, 1.6]))
    else:
        assert torch.equal(point.weight, start)
    assert scaler.get_scale() == (8 if overflows is None else 4)


def test_sam_gives_no_warning(recwarn):
    warnings.simplefilter("always")
    assert SAM(0.3, 2).interval == 2
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("rho, interval", [(0, 1), (-1, 1), (0.3, 0)])
def test_sam_rejects_invalid_settings(rho, interval):
    with pytest.raises(ValueError, match="rho > 0 and interval >= 1"):
        SAM(rho, interval)


def test_sam_does_not_synchronise_the_gpu():
    point = Point(SAM(rho=1.0))
    gradient = torch.tensor([3.0, 4.0])

    def closure(**kwargs):
        point.weight.grad = gradient.clone()
        return 1.0

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        point.optimizer.step(closure)
    names = {event.name for event in profiler.events()}
    assert not names & {"aten::item", "aten::_local_scalar_dense"}
    assert "aten::_foreach_norm" in names
