"""Tests of checkpointing/partial_load.py."""

from __future__ import annotations

import pytest
import torch

from checkpointing.partial_load import load_fitting
from checkpointing.weights import (
    load_weights,
)
from model import deeplabv3
from segmentation.classes import load_classes
from tests.support.artifacts import random_network, random_weights

pytestmark = pytest.mark.usefixtures("small_network")


def test_classes_with_matching_names_keep_their_classifier_weights():
    weights = load_weights(random_weights())
    network = deeplabv3(3, "resnet50", sync_bn=False)
    before = network.classifier.conv_seg.weight[1].clone()
    classes = load_classes(["waves", "new", "plain"], 3)
    line = load_fitting(network, weights, "f", classes=classes)
    assert (
        line
        == "f: classifier.conv_seg: 12 -> 3 classes, 2 loaded by name, the others newly initialised"
    )
    rows, names = network.classifier.conv_seg.weight, [c.name for c in weights.classes]
    for new, name in ((0, "waves"), (2, "plain")):
        expected = weights.state["classifier.conv_seg.weight"][names.index(name)]
        assert torch.equal(rows[new], expected)
    assert torch.equal(rows[1], before)
    assert load_fitting(random_network(), weights, "f") is None
