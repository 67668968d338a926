"""Which samples a rank sees, and when: the same whatever the number of ranks, also after a resume.

Samplers give `Item`s, not indices: workers live for the whole run and learn the epoch from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import numpy as np
from composer.utils import dist
from torch.utils.data import Dataset, DistributedSampler


class Item(NamedTuple):
    """What a loader is asked for: a sample, in an epoch, and one to prefetch for later, or -1."""

    epoch: int
    index: int
    prefetch: int = -1


class Ordered(Protocol):
    """A data set that says in which order an epoch takes its samples."""

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order of an epoch's samples."""
        ...


def random_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of range(length)."""
    return random_keys(length, seed, epoch).argsort(kind="stable")


def random_keys(length: int, seed: int, epoch: int) -> np.ndarray:
    """Random 64-bit numbers, of a generator whose bits NumPy keeps from version to version."""
    return np.random.Philox(key=[seed, epoch]).random_raw(length)


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
    ):
        num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
        rank = dist.get_global_rank() if rank is None else rank
        super().__init__(cast(Dataset, dataset), num_replicas, rank, shuffle, seed, drop_last)
        self.batch_size, self.prefetch_distance = batch_size, prefetch_distance
        self.resumed_epoch, self.seen = -1, 0
        self.num_samples = len(self._positions(0))

    def resume(self, epoch: int, seen: int) -> None:
        """Leave out the first `seen` samples (of all ranks) of an epoch."""
        self.resumed_epoch, self.seen = epoch, seen

    def __iter__(self) -> Iterator[Item]:
        length = len(self.dataset)
        order = self.dataset.order(self.seed, self.epoch) if self.shuffle else np.arange(length)
        seen = self.seen if self.epoch == self.resumed_epoch else 0
        indices = order[self._positions(seen)].tolist()
        return _items(self.epoch, indices, self.prefetch_distance)

    def _positions(self, seen: int) -> np.ndarray:
        """Where in the epoch's order this rank's samples are."""
        positions = np.arange(seen, len(self.dataset))
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
