"""Which samples a rank sees, and when: the same whatever the number of ranks, also after a resume.

Samplers give `Item`s, not indices: workers live for the whole run and learn the epoch from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import numpy as np
from composer.utils import dist
from torch.utils.data import Dataset, DistributedSampler


class Item(NamedTuple):
    """What a loader is asked for: a sample, in an epoch, and one to prefetch for later, or -1.

    An index of n or more, of n samples, is a repetition: the k-th of sample i is `i + k * n`.
    """

    epoch: int
    index: int
    prefetch: int = -1


class Ordered(Protocol):
    """A data set that says in which order an epoch takes its samples."""

    def __len__(self) -> int: ...

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return an epoch's samples in its order."""
        ...


def random_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of range(length)."""
    return random_keys(length, seed, epoch).argsort(kind="stable")


def random_keys(length: int, seed: int, epoch: int) -> np.ndarray:
    """Random 64-bit numbers, of a generator whose bits NumPy keeps from version to version."""
    return np.random.Philox(key=[seed, epoch]).random_raw(length)


def length_of_repeated(factors: np.ndarray) -> int:
    """Return how many samples `repeated` takes."""
    return math.ceil(round(float(factors.sum()), 6))


def repeated(factors: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Take each of n samples as often as its factor says: floor or ceil of it, by chance.

    The chances are those that give the factor on average. The whole always has the same length, so
    that epochs have the same number of batches: the factors are laid end to end, in an order drawn
    anew, and a comb of that many teeth is laid on them (systematic sampling, Madow 1949). For the
    length to be whole, factors are stretched by less than 1 / n.

    Returns:
        The first takes, 0 to n - 1, and then the others, each as `Item.index` counts them.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1])
    place = generator.random_raw(len(factors)).argsort(kind="stable")
    offset = np.random.Generator(generator).random()
    length = length_of_repeated(factors)
    ends = factors[place].cumsum()
    teeth = np.floor(ends * (length / ends[-1]) + offset).astype(np.int64)
    teeth[-1] = length  # whatever the last sum was rounded to
    times = np.empty_like(teeth)
    times[place] = np.diff(teeth, prepend=0)
    takes = [np.flatnonzero(times > k) + k * len(factors) for k in range(times.max())]
    return np.concatenate(takes)


class EpochSampler(DistributedSampler):
    """Training's samples: batch b of the run is the b-th piece of the epoch's order.

    Each rank has a contiguous part of each batch, so that the ranks together see what one process
    with micro-batches of a rank's size does. It is a `DistributedSampler` for Composer to tell it
    the epoch. Its length is the whole epoch's, also when the epoch is resumed in the middle, since
    Composer compares it with the batches since the epoch's start.

    Args:
        dataset: With a length, and `order(seed, epoch)` for the order of an epoch.
        batch_size: A rank's samples in a batch.
        seed: Seed of the order.
        shuffle: Whether to shuffle.
        drop_last: Whether to leave out the last, smaller batch. Otherwise its samples are
            repeated until all ranks have equally many.
        prefetch_distance: How many samples ahead to start downloading; 0: never.
        num_replicas: Number of ranks; None: Composer's.
        rank: This rank; None: Composer's.
        repeat_factors: How often an epoch takes each sample, on average; None: once.
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
        """Leave out the first `seen` samples (of all ranks) of an epoch."""
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
        """Where in the epoch's order this rank's samples are."""
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
    """Evaluation's samples: all, in order, dealt out to the ranks as torch does.

    Composer takes what torch repeats, for the ranks to have equally many, out again.
    """

    def __init__(self, dataset: Dataset, prefetch_distance: int = 0):
        super().__init__(dataset, dist.get_world_size(), dist.get_global_rank(), shuffle=False)
        self.prefetch_distance = prefetch_distance

    def __iter__(self) -> Iterator[Item]:
        return _items(0, list(super().__iter__()), self.prefetch_distance)


def _items(epoch: int, indices: list[int], prefetch_distance: int) -> Iterator[Item]:
    later = (indices[prefetch_distance:] if prefetch_distance else []) + [-1] * len(indices)
    return (Item(epoch, index, prefetch) for index, prefetch in zip(indices, later))
