"""Samples of a split in folders, and what is wrong with their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np

from dataset.paths import Sample


class Finding(NamedTuple):
    """Something wrong with a file."""

    path: str
    reason: str
    fatal: bool  # training would fail; otherwise it is odd, but training works


class Samples(Sequence[Sample]):
    """Samples that share their memory with forked loader processes.

    The text of all names is one array. A list of strings would be copied into every process,
    because Python counts references inside each string.

    Args:
        uids: Name of each sample.
        images: Path of each image below `folders[0]`.
        masks: Path of each mask below `folders[1]`.
        folders: What the paths begin with.
    """

    def __init__(
        self,
        uids: Sequence[str] = (),
        images: Sequence[str] = (),
        masks: Sequence[str] = (),
        folders: tuple[str, str] = ("", ""),
    ) -> None:
        self._folders, self._length = folders, len(uids)
        text = "\0".join([*uids, *images, *masks, ""])
        self._text = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        self._ends = np.append(-1, np.flatnonzero(self._text == 0))  # of each name

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        uid, image, mask = (self._name(place + column * len(self)) for column in range(3))
        return Sample(uid, self._folders[0] + image, self._folders[1] + mask)

    def _name(self, place: int) -> str:
        name = self._text[self._ends[place] + 1 : self._ends[place + 1]]
        return name.tobytes().decode(errors="surrogateescape")


class Listing(NamedTuple):
    """A split's images and masks, and what is wrong with their names.

    Attributes:
        samples: Images with a mask, sorted by name.
        findings: What is wrong with the names of files.
        orphans: Masks that no image of the split belongs to.
        images: Number of images, with a mask or without.
    """

    samples: Samples
    findings: list[Finding]
    orphans: list[str]
    images: int
