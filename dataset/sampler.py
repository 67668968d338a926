"""Samplers that divide the samples of an epoch among the ranks.

The order of the samples does not depend on the number of ranks, nor on a resume. Samplers yield
`Item`s instead of indices, because workers live for the whole run and learn the epoch from each
item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import numpy as np
from composer.utils import dist
from torch.utils.data import Dataset, DistributedSampler


class Item(NamedTuple):
    """A request to a loader: a sample of an epoch, and a later sample to prefetch.

    In a data set of n samples, an index of n or more is a repetition: `i + k * n` is the k-th
    repetition of sample i.

    Attributes:
        epoch: Number of the epoch.
        index: Index of the sample.
        prefetch: Index of a sample to prefetch, or -1.
    """

    epoch: int
    index: int
    prefetch: int = -1


class Ordered(Protocol):
    """A data set that defines the order of the samples in an epoch."""

    def __len__(self) -> int: ...

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the items in the order of an epoch."""
        ...


def random_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random permutation of range(length).

    Args:
        length: Number of samples.
        seed: Seed of the order.
        epoch: Number of the epoch.
    """
    return random_keys(length, seed, epoch).argsort(kind="stable")


def random_keys(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return random 64-bit integers, one for each sample.

    NumPy guarantees that all its versions give the same bits for this generator.

    Args:
        length: Number of integers.
        seed: Seed of the generator.
        epoch: Number of the epoch.
    """
    return np.random.Philox(key=[seed, epoch]).random_raw(length)


def length_of_repeated(factors: np.ndarray) -> int:
    """Return the number of samples that `repeated` returns.

    Args:
        factors: Average number of times that an epoch takes each sample, (n,).
    """
    return math.ceil(round(float(factors.sum()), 6))


def repeated(factors: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Repeat each sample floor(factor) or ceil(factor) times, chosen at random.

    On average a sample is taken as often as its factor says. The number of samples is always the
    same, so all epochs have equally many batches.

    The method is systematic sampling (Madow 1949). It lays the factors end to end in random order
    and counts the integers that fall into each. To make the total an integer, it stretches the
    factors by less than 1 / n.

    Args:
        factors: Average number of times that an epoch takes each sample, (n,).
        seed: Seed of the random choice.
        epoch: Number of the epoch.

    Returns:
        The first take of each sample, 0 to n - 1, followed by the repetitions, as `Item.index`
        counts them.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1])
    place = generator.random_raw(len(factors)).argsort(kind="stable")
    offset = np.random.Generator(generator).random()
    length = length_of_repeated(factors)
    ends = factors[place].cumsum()
    teeth = np.floor(ends * (length / ends[-1]) + offset).astype(np.int64)
    teeth[-1] = length  # The last sum may have been rounded, so set it to the exact length.
    times = np.empty_like(teeth)
    times[place] = np.diff(teeth, prepend=0)
    takes = [np.flatnonzero(times > k) + k * len(factors) for k in range(times.max())]
    return np.concatenate(takes)


class EpochSampler(DistributedSampler):
    """A sampler for training: batch b of the run is the b-th part of the epoch's order.

    Each rank gets a contiguous part of each batch. Together the ranks see the same samples as one
    process whose micro-batches have the size of one rank's part.

    The class is a `DistributedSampler` so that Composer sets its epoch. Its length is the length of
    the whole epoch, even if the epoch is resumed in the middle, because Composer compares it with
    the number of batches since the epoch began.

    Args:
        dataset: Data set with a length and a method `order(items, seed, epoch)`.
        batch_size: Number of samples of one rank in a batch.
        seed: Seed of the order.
        shuffle: Whether to shuffle the samples.
        drop_last: Whether to drop the last, smaller batch. If False, its samples are repeated until
            all ranks have equally many.
        prefetch_distance: Number of samples to prefetch ahead. If 0, nothing is prefetched.
        num_replicas: Number of ranks. If None, Composer's value is used.
        rank: Number of this rank. If None, Composer's value is used.
        repeat_factors: Average number of times that an epoch takes each sample, (n,). If None,
            each sample is taken once.
    """

    dataset: Ordered

    def __init__(
        self,
        dataset: Ordered,
        batch_size: int,
        seed: int = 17,
        shuffle: bool = True,
        drop_last: bool = True,
        prefetch_distance: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        repeat_factors: np.ndarray | None = None,
    ):
        num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
        rank = dist.get_global_rank() if rank is None else rank
        super().__init__(cast(Dataset, dataset), num_replicas, rank, shuffle, seed, drop_last)
        self.batch_size, self.prefetch_distance = batch_size, prefetch_distance
        self.repeat_factors = repeat_factors
        self.resumed_epoch, self.seen = -1, 0
        self.num_samples = len(self._positions(0))

    def resume(self, epoch: int, seen: int) -> None:
        """Skip the first samples of an epoch.

        Args:
            epoch: Number of the epoch.
            seen: Number of samples to skip, over all ranks.
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
        """Return the positions of this rank's samples in the order of the epoch."""
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
    """A sampler for evaluation: all samples in order, divided among the ranks as torch does.

    torch repeats samples until all ranks have equally many. Composer removes the repetitions from
    the results.

    Args:
        dataset: Data set to evaluate.
        prefetch_distance: Number of samples to prefetch ahead. If 0, nothing is prefetched.
    """

    def __init__(self, dataset: Dataset, prefetch_distance: int = 0):
        super().__init__(dataset, dist.get_world_size(), dist.get_global_rank(), shuffle=False)
        self.prefetch_distance = prefetch_distance

    def __iter__(self) -> Iterator[Item]:
        return _items(0, list(super().__iter__()), self.prefetch_distance)


def _items(epoch: int, indices: list[int], prefetch_distance: int) -> Iterator[Item]:
    later = (indices[prefetch_distance:] if prefetch_distance else []) + [-1] * len(indices)
    return (Item(epoch, index, prefetch) for index, prefetch in zip(indices, later))
