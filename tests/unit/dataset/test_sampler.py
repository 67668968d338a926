"""Tests of dataset/sampler.py."""

from __future__ import annotations

import numpy as np
import pytest

import data
from dataset.sampler import EpochSampler, EvalSampler, length_of_repeated, repeated
from tests.support.data import batches, build, digests, expected, folder, on_rank  # noqa: F401


def test_sample_repeat_counts_are_integers_with_the_right_mean() -> None:
    rng = np.random.default_rng(1)
    factors = np.where(rng.random(50) < 0.3, 1 + 3 * rng.random(50), 1.0)
    length, epochs = length_of_repeated(factors), 2000
    assert 0 <= length - factors.sum() < 1
    total = np.zeros(50)
    for epoch in range(epochs):
        items = repeated(factors, 17, epoch)
        assert len(items) == length == len(set(items.tolist()))
        times = np.bincount(items % 50, minlength=50)
        stretched = factors * length / factors.sum()
        assert (times >= np.floor(stretched)).all() and (times <= np.ceil(stretched)).all()
        assert (items // 50 < times[items % 50]).all()  # a sample's repeats are numbered from 0
        total += times
    chance = stretched % 1
    deviation = np.sqrt(chance * (1 - chance) / epochs)
    assert (np.abs(total / epochs - stretched) < 5 * deviation + 1e-9).all()
    np.testing.assert_array_equal(repeated(factors, 17, 3), repeated(factors, 17, 3))
    np.testing.assert_array_equal(repeated(np.ones(9), 17, 3), np.arange(9))


@pytest.mark.parametrize("ranks", [2, 4])
def test_batches_do_not_depend_on_the_number_of_ranks(
    folder: str, expected: list[list[str]], ranks: int
) -> None:
    sides = [batches(on_rank(build(folder), rank, ranks), 2) for rank in range(ranks)]
    assert {len(side) for side in sides} == {5}
    # Join the parts of each batch over the ranks.
    together = [parts for step in zip(*sides) for parts in step]
    assert digests(together) == expected[2]


def test_each_epoch_shuffles_the_samples_independently() -> None:
    class Numbers:
        def __len__(self) -> int:
            return 1000

        def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
            return items[data.random_order(1000, seed, epoch)]

    first = [EpochSampler(Numbers(), 10, num_replicas=1, rank=0) for _ in range(2)]
    first[1].set_epoch(1)
    orders = [[index for _, index, _ in sampler] for sampler in first]
    assert [sorted(order) for order in orders] == [list(range(1000))] * 2
    # Neither order correlates with the index or the other order (4 standard deviations).
    matrix = np.corrcoef([*orders, np.arange(1000)])
    assert np.abs(matrix - np.eye(3)).max() < 4 / 1000**0.5


def test_incomplete_batches_are_divided_among_ranks(folder: str) -> None:
    dataset = build(folder).dataloader.dataset  # a dataset of 22 samples
    options = dict(shuffle=False, drop_last=False, num_replicas=4)
    parts = [EpochSampler(dataset, 2, rank=rank, **options) for rank in range(4)]
    seen = [[index for _, index, _ in part] for part in parts]
    assert [len(part) for part in parts] == [len(each) for each in seen] == [6] * 4
    assert [each[4:] for each in seen] == [[16, 17], [18, 19], [20, 21], [16, 17]]
    one_more = [EpochSampler(dataset, 5, rank=rank, **options) for rank in range(4)]
    assert [[index for _, index, _ in part][5:] for part in one_more] == [[20], [21], [20], [21]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_evaluation_covers_every_sample_once(folder: str, ranks: int) -> None:
    dataset = build(folder, split="val").dataloader.dataset
    seen: list[list[int]] = []
    for rank in range(ranks):
        sampler = EvalSampler(dataset, 2, ranks, rank)
        items = list(sampler)
        seen.append([index for _, index, _ in items])
        assert [later for *_, later in items] == [*seen[-1][2:], -1, -1]
    # As in Composer, the last sample of the last ranks is padding.
    padding = sampler.total_size - len(dataset)
    kept = [each[:-1] if rank >= ranks - padding else each for rank, each in enumerate(seen)]
    assert sorted(index for each in kept for index in each) == list(range(7))
