"""Tests of evaluate.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from composer.utils import dist

import evaluate
from evaluate import group_by, main


def test_images_are_grouped_by_size_with_a_bounded_buffer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "PENDING", 10)
    items = np.random.default_rng(0).integers(0, 50, 500).tolist()
    taken, largest, out = 0, 0, []

    def count() -> Any:
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    for group in group_by(count(), 4, lambda item: item % 7):
        assert 1 <= len(group) <= 4 and len({item % 7 for item in group}) == 1
        out += group
        largest = max(largest, taken - len(out))
    assert sorted(out) == sorted(items) and largest <= 10


def test_conflicting_options_are_rejected():
    with pytest.raises(SystemExit):
        main(["x.pt", "--protocol", "square", "--tta"])


def test_evaluation_on_several_ranks_keeps_tf32_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's get_device enables TF32, which a single process does not use."""
    allowed = torch.backends.cuda.matmul.allow_tf32

    def get_device(name: str | None) -> None:
        torch.backends.cuda.matmul.allow_tf32 = True

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "initialize_dist", lambda device: None)
    monkeypatch.setattr(evaluate, "get_device", get_device)
    try:
        assert main(["/nowhere.pt"]) == 2
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
