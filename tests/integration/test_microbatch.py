"""The memory estimate agrees with the memory that a real forward pass keeps for autograd."""

from __future__ import annotations

import pytest
import torch

from tests.support.plan import SIZE, config, footprint, network, settings  # noqa: F401
from training.microbatch import Footprint, count

pytestmark = pytest.mark.usefixtures("small_network")


def test_memory_estimate_grows_with_image_area_and_dtype_size(
    network: torch.nn.Module, footprint: Footprint
) -> None:
    assert count(network, 2 * SIZE, torch.bfloat16).image == pytest.approx(
        4 * footprint.image, rel=0.03
    )
    assert count(network, SIZE, None).image > 1.5 * footprint.image


def test_memory_estimate_equals_memory_kept_by_forward_pass(
    network: torch.nn.Module, footprint: Footprint
) -> None:
    """Measure the memory per image as the difference of forward passes on 8 and on 4 images."""

    def kept_bytes(images: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = torch.randn(images, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            logits = network(batch)
        assert logits.requires_grad
        return sum(storages.values())

    image = (kept_bytes(8) - kept_bytes(4)) / 4
    assert footprint.saved == pytest.approx(image, rel=0.1)
    assert footprint.saved < footprint.image < 1.5 * footprint.saved
    weights = sum(p.numel() for p in network.parameters())
    assert (
        footprint.weights == 4 * weights <= 2.2 * footprint.fixed
    )  # autocast also keeps bf16 copies
