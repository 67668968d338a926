"""What a run is said to take, beside what it takes."""

from __future__ import annotations

import pytest
import torch

from tests.support.plan import SIZE, footprint, network  # noqa: F401
from training.microbatch import Footprint, count

pytestmark = pytest.mark.usefixtures("small_network")


def test_memory_grows_with_the_area_and_a_smaller_type_takes_less(
    network: torch.nn.Module, footprint: Footprint
) -> None:
    assert count(network, 2 * SIZE, torch.bfloat16).image == pytest.approx(
        4 * footprint.image, rel=0.03
    )
    assert count(network, SIZE, None).image > 1.5 * footprint.image
