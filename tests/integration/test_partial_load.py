"""Loading weights into a network whose layers or classes differ."""

from __future__ import annotations

import pytest
import torch

from checkpointing.partial_load import load_fitting
from checkpointing.weights import (
    load_weights,
)
from errors import WeightsError
from model import deeplabv3
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES, random_weights
from tests.support.weights import same  # noqa: F401


def test_matching_weights_are_loaded_and_others_are_counted():
    weights = load_weights(random_weights())
    torch.manual_seed(1)
    network = deeplabv3(7, "resnet101", sync_bn=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    line = load_fitting(network, weights, "file.pt")
    unmatched = [
        n for n, t in before.items() if n not in weights.state or t.shape != weights.state[n].shape
    ]
    assert line == (
        "file.pt: classifier.conv_seg: 12 -> 7 classes, newly initialised; "
        f"{len(unmatched) - 2} tensors newly initialised, starting with {unmatched[0]}"
    )
    assert 100 < len(unmatched) < len(before) / 2
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name] if name in unmatched else weights.state[name])
    with pytest.raises(
        WeightsError, match=r"^file.pt: only \d+ of the network's \d+ .*load_least=0.9"
    ):
        load_fitting(network, weights, "file.pt", least=0.9)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        pytest.param(
            CLASSES[::-1], "classes in another order, matched by name", id="reversed order"
        ),
        pytest.param(
            [*CLASSES[:0:-1], "new"],
            "classes with other names, 11 loaded by name, the others newly initialised",
            id="reversed order and one class renamed",
        ),
        pytest.param(
            [f"kind {letter}" for letter in "abcdefghijkl"],
            "classes with other names, none with the same name, all newly initialised",
            id="all classes renamed",
        ),
        pytest.param(
            None, "classes with other names, newly initialised", id="network without class names"
        ),
    ],
)
@pytest.mark.usefixtures("small_network")
def test_classifier_rows_are_matched_by_class_name(names: list[str] | None, note: str):
    weights = load_weights(random_weights())
    network = deeplabv3(12, "resnet50", sync_bn=False)
    before = network.classifier.conv_seg.weight.detach().clone()
    classes = load_classes(names, 12) if names else None
    tensors = [f"classifier.conv_seg.{name}" for name in ("weight", "bias")]
    line = load_fitting(network, weights, "f", 1.0, classes, 12, tensors)
    assert line == f"f: classifier.conv_seg: {note}"
    for place, row in enumerate(network.classifier.conv_seg.weight):
        name = names[place] if names else None
        theirs = weights.state["classifier.conv_seg.weight"]
        expected = theirs[CLASSES.index(name)] if name in CLASSES else before[place]
        assert torch.equal(row, expected)
