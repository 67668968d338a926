"""Tests of training/seeding.py."""

import types

import numpy as np
import pytest
import torch
from composer.core import Event
from composer.utils import dist

from training.seeding import SeedMicrobatch

pytestmark = pytest.mark.filterwarnings("ignore")


def draws(seeding, passes=2, batch=7, samples=4, size=2, before=0):
    """Return pairs of a torch and a NumPy random number for each pass and micro-batch."""
    timestamp = types.SimpleNamespace(batch=types.SimpleNamespace(value=batch))
    state = types.SimpleNamespace(
        batch=(torch.zeros(samples), None), device_train_microbatch_size=size, timestamp=timestamp
    )
    torch.rand(before + 1), np.random.rand(before + 1)
    seeding.apply(Event.BATCH_START, state, None)
    drawn = []
    for _ in range(passes):
        seeding.apply(Event.BEFORE_TRAIN_BATCH, state, None)
        drawn.append([])
        for _ in range(-(-samples // size)):
            seeding.apply(Event.BEFORE_FORWARD, state, None)
            drawn[-1].append((torch.rand(()).item(), np.random.rand()))
    return drawn


def test_seeding_depends_on_seed_batch_pass_and_microbatch():
    expected = draws(SeedMicrobatch(17))
    used = SeedMicrobatch(17)
    draws(used, batch=6)
    assert draws(used, before=5) == expected
    others = [draws(SeedMicrobatch(18)), draws(SeedMicrobatch(17), batch=8)]
    numbers = [pair for drawn in (expected, *others) for row in drawn for pair in row]
    assert len({t for t, _ in numbers}) == len({n for _, n in numbers}) == 12


def test_seeding_does_not_depend_on_the_number_of_ranks(monkeypatch):
    expected = draws(SeedMicrobatch(17))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        shares.append(draws(SeedMicrobatch(17), samples=2))
    assert [a + b for a, b in zip(*shares, strict=True)] == expected


def test_seeding_restarts_when_the_microbatch_size_is_reduced():
    seeding = SeedMicrobatch(17)
    draws(seeding, passes=1, samples=4, size=4)
    state = types.SimpleNamespace(
        batch=(torch.zeros(4), None),
        device_train_microbatch_size=2,
        timestamp=types.SimpleNamespace(batch=types.SimpleNamespace(value=7)),
    )
    seeding.apply(Event.BEFORE_TRAIN_BATCH, state, None)
    seeding.apply(Event.BEFORE_FORWARD, state, None)
    assert torch.rand(()).item() == draws(SeedMicrobatch(17))[0][0][0]
