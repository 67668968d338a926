"""optimizer.py against Composer's: the same but for the rounding of a fused multiply-add."""

import copy

import composer.optim
import pytest
import torch
from torch import nn

from training.optimizer import DecoupledSGDW

ROUNDING = dict(rtol=1e-6, atol=1e-6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Linear(2, 2)
    )
    return layers.to(memory_format=torch.channels_last)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps of made-up gradients under a falling learning rate; the linear layer joins late."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - number / 20)
        for index, weight in enumerate(model.parameters()):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if index >= 6 and number < 3:
                weight.grad = None
        optimizer.step()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(momentum=0.9, weight_decay=5e-5),
        dict(momentum=0.9, weight_decay=5e-4, dampening=0.1),
        dict(momentum=0.9, nesterov=True),
        dict(weight_decay=5e-4),
    ],
    ids=str,
)
def test_steps_equal_composers(arguments):
    ours, theirs = network(), network()
    optimizer = DecoupledSGDW(ours.parameters(), lr=0.1, **arguments)
    reference = composer.optim.DecoupledSGDW(theirs.parameters(), lr=0.1, **arguments)
    steps(ours, optimizer, 0, 8)
    steps(theirs, reference, 0, 8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **ROUNDING)
    ours_state, theirs_state = optimizer.state_dict(), reference.state_dict()
    torch.testing.assert_close(ours_state, theirs_state, **ROUNDING)
    assert type(optimizer).__qualname__ == type(reference).__qualname__  # its name in a checkpoint


def test_goes_on_from_a_checkpoint_of_composers_in_another_memory_format():
    theirs = network().to(memory_format=torch.contiguous_format)
    reference = composer.optim.DecoupledSGDW(theirs.parameters(), lr=0.1, momentum=0.9)
    steps(theirs, reference, 0, 4)
    ours = network()
    ours.load_state_dict(theirs.state_dict())
    optimizer = DecoupledSGDW(ours.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    buffer = optimizer.state[ours[0].weight]["momentum_buffer"]
    assert buffer.stride() != ours[0].weight.stride()  # else this shows nothing
    steps(ours, optimizer, 4, 8)
    steps(theirs, reference, 4, 8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **ROUNDING)
