"""Tests of networks/batch_norm.py."""

from __future__ import annotations

import torch

from networks.batch_norm import (
    SyncBatchNorm2d,
    count_batches,
    share_statistics,
    stop_counting,
)
from tests.support.batch_norm import make_batch, make_network


def test_sync_batch_norm_keeps_names_and_evaluation_results() -> None:
    network, (images, _) = make_network(), make_batch()
    expected, names = network.eval()(images), list(network.state_dict())
    share_statistics(network, type("Group", (), {"group_name": "0"})())
    assert isinstance(network[1], SyncBatchNorm2d) and not network[1].training
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), expected)


def test_batch_norm_counts_batches_like_pytorch() -> None:
    network, theirs, (images, _) = make_network(), make_network(), make_batch()
    layers = stop_counting(network)
    for frozen in (False, True):
        if frozen:
            for model in (network, theirs):
                model[1].eval()
        count_batches(layers)
        assert torch.equal(network(images), theirs(images))
    state = theirs.state_dict()
    assert network.state_dict().keys() == state.keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
