"""Samplers that divide the samples of an epoch among the ranks.

The order of the samples is the same for any number of ranks and after a resume. Samplers yield
`Item`s instead of indices, because worker processes live for the whole run and learn the epoch from
each item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler


class Item(NamedTuple):
    """A request to a loader: a sample to load now, and a later sample to prefetch.

    In a data set of n samples, the index `i + k * n` refers to the k-th repetition of sample i.

    Attributes:
        epoch: Number of the epoch.
        index: Index of the sample.
        prefetch: Index of a sample to prefetch, or -1.
    """

    epoch: int
    index: int
    prefetch: int = -1


def random_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random permutation of range(length).

    Args:
        length: Number of samples.
        seed: Seed of the order.
        epoch: Number of the epoch.
    """
    return random_keys(length, seed, epoch).argsort(kind="stable")


def random_keys(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return one random 64-bit integer per sample.

    NumPy guarantees that this generator produces the same bits in every version.

    Args:
        length: Number of integers.
        seed: Seed of the generator.
        epoch: Number of the epoch.
    """
    return np.random.Philox(key=[seed, epoch]).random_raw(length)


def length_of_repeated(factors: np.ndarray) -> int:
    """Return the number of samples that `repeated` returns.

    Args:
        factors: Average number of times that each sample is drawn per epoch, (n,).
    """
    return math.ceil(round(float(factors.sum()), 6))


def repeated(factors: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Repeat each sample floor(factor) or ceil(factor) times, chosen at random.

    A sample's factor is the average number of times that the sample is drawn. The number of draws
    is the same in every epoch, so all epochs have the same number of batches.

    The method is systematic sampling (Madow 1949). Each sample gets an interval whose length is the
    sample's factor, and the intervals are laid end to end in random order. A sample is drawn once
    for each integer in its interval. Each factor is first increased by less than 1 / n, so that the
    total is an integer.

    Args:
        factors: Average number of times that each sample is drawn per epoch, (n,).
        seed: Seed of the random choice.
        epoch: Number of the epoch.

    Returns:
        Indices of the drawn samples in ascending order. Repetitions of a sample have indices of n
        or more; see `Item.index`.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1])
    place = generator.random_raw(len(factors)).argsort(kind="stable")
    offset = np.random.Generator(generator).random()
    length = length_of_repeated(factors)
    ends = factors[place].cumsum()
    teeth = np.floor(ends * (length / ends[-1]) + offset).astype(np.int64)
    # Rounding may change the last cumulative sum, so set it to the exact length.
    teeth[-1] = length
    times = np.empty_like(teeth)
    times[place] = np.diff(teeth, prepend=0)
    takes = [np.flatnonzero(times > k) + k * len(factors) for k in range(times.max())]
    return np.concatenate(takes)


class EpochSampler(DistributedSampler):
    """A training sampler that divides the epoch's order into consecutive batches.

    Each rank gets a contiguous part of each batch. Together, the ranks see the same micro-batches
    as a single process whose micro-batch size equals one rank's part.

    The class extends `DistributedSampler`, so that Composer tells it the current epoch. The
    sampler's length is always that of the complete epoch, even after a resume in the middle of an
    epoch. Composer compares this length with the number of batches since the start of the epoch.

    Args:
        dataset: Data set with a length and a method `order(items, seed, epoch)`.
        batch_size: Number of samples per rank in each batch.
        seed: Seed of the order.
        shuffle: Whether to shuffle the samples.
        drop_last: Whether to drop an incomplete last batch. Otherwise, samples are repeated until
            all ranks have the same number of samples.
        prefetch_distance: Number of samples to prefetch ahead, or 0 for no prefetching.
        num_replicas: Number of ranks.
        rank: Number of this rank.
        repeat_factors: Average number of times that each sample is drawn per epoch, (n,), or None
            to draw each sample once.
    """

    dataset: Any

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 17,
        shuffle: bool = True,
        drop_last: bool = True,
        prefetch_distance: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        repeat_factors: np.ndarray | None = None,
    ):
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.batch_size, self.prefetch_distance = batch_size, prefetch_distance
        self.repeat_factors = repeat_factors
        self.resumed_epoch, self.seen = -1, 0
        self.num_samples = len(self._positions(0))

    def resume(self, epoch: int, seen: int) -> None:
        """Skip the first samples of an epoch.

        Args:
            epoch: Number of the epoch.
            seen: Number of samples to skip, summed over all ranks.
        """
        self.resumed_epoch, self.seen = epoch, seen

    def __iter__(self) -> Iterator[Item]:
        items = np.arange(len(self.dataset))
        if self.repeat_factors is not None:
            items = repeated(self.repeat_factors, self.seed, self.epoch)
        order = self.dataset.order(items, self.seed, self.epoch) if self.shuffle else items
        seen = self.seen if self.epoch == self.resumed_epoch else 0
        indices = order[self._positions(seen)].tolist()
        return _items(self.epoch, indices, self.prefetch_distance)

    def _positions(self, seen: int) -> np.ndarray:
        """Return the positions of this rank's remaining samples in the epoch's order."""
        length = len(self.dataset)
        if self.repeat_factors is not None:
            length = length_of_repeated(self.repeat_factors)
        positions = np.arange(seen, length)
        ranks, batch = self.num_replicas, self.num_replicas * self.batch_size
        rest = positions[len(positions) // batch * batch :]
        whole = positions[: len(positions) - len(rest)].reshape(-1, ranks, self.batch_size)
        own = whole[:, self.rank].ravel()
        if self.drop_last or len(rest) == 0:
            return own
        rest = np.resize(rest, (ranks, -(-len(rest) // ranks)))
        return np.concatenate([own, rest[self.rank]])


class EvalSampler(DistributedSampler):
    """An evaluation sampler that yields all samples in order, divided among the ranks.

    `DistributedSampler` repeats samples until all ranks have the same number. Composer removes the
    repetitions from the results.

    Args:
        dataset: Data set to evaluate.
        prefetch_distance: Number of samples to prefetch ahead, or 0 for no prefetching.
        num_replicas: Number of ranks.
        rank: Number of this rank.
    """

    def __init__(
        self, dataset: Dataset, prefetch_distance: int = 0, num_replicas: int = 1, rank: int = 0
    ):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.prefetch_distance = prefetch_distance

    def __iter__(self) -> Iterator[Item]:
        return _items(0, list(super().__iter__()), self.prefetch_distance)


def _items(epoch: int, indices: list[int], prefetch_distance: int) -> Iterator[Item]:
    later = (indices[prefetch_distance:] if prefetch_distance else []) + [-1] * len(indices)
    return (Item(epoch, index, prefetch) for index, prefetch in zip(indices, later))
