"""Data sets of encoded images and masks, decoded and transformed one sample at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dataset.decoding import decode_photo
from dataset.mask_decoder import Masks
from dataset.matching import list_samples as list_samples  # part of the public interface
from dataset.sampler import EpochSampler, Item, random_order
from errors import DataError

LoadImage = Callable[[int], np.ndarray]
Transforms = tuple[Callable | None, Callable | None, Callable | None]  # of pair, image, mask


class PairTransform:
    """A transform of an image and its mask together, both as arrays."""

    def apply(
        self, load_image: LoadImage, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform a sample.

        Args:
            load_image: Gives the photo, (H, W, 3) uint8, at 1/1, 1/2,
                1/4 or 1/8 of its size (see `decode_photo`), or at its size in any case.
            mask: (H, W) uint8.
            rng: The only source of randomness.

        Returns:
            tuple[np.ndarray, np.ndarray]: (final_size, final_size, 3) and (final_size, final_size).
        """
        raise NotImplementedError

    def __call__(self, sample: tuple) -> tuple[np.ndarray, np.ndarray]:
        """Transform a pair of Pillow images or arrays, at random as the system's entropy has it."""
        image, mask = sample
        image = image.convert("RGB") if isinstance(image, Image.Image) else image
        return self.apply(lambda _: np.asarray(image), np.asarray(mask), np.random.default_rng())


class EncodedSamples(Dataset):
    """A data set of encoded files, which become the samples of training."""

    def __init__(self, transforms: Transforms, seed: int, masks: Masks) -> None:
        self.both_transforms, self.image_transforms, self.target_transforms = transforms
        self.seed, self.masks = seed, masks
        self.sampler: EpochSampler | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Read a sample's uid, encoded photo, encoded mask, and what to call photo and mask."""
        raise NotImplementedError

    def prefetch(self, index: int) -> None:
        """Prepare for a sample that will be read soon."""

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return an epoch's samples in its order."""
        return items[random_order(len(items), seed, epoch)]

    def __getitem__(self, item: int | Item) -> tuple[Any, Any]:
        """Return a sample: of epoch 0 by its index, or by what a sampler gives."""
        item = Item(*item) if isinstance(item, tuple) else Item(0, item)
        if item.prefetch >= 0:
            self.prefetch(item.prefetch % len(self))
        repetition, index = divmod(item.index, len(self))
        uid, photo, mask, names = self.read(index)
        if repetition > 0:  # which is cropped and coloured in its own way
            uid = f"{uid}#{repetition}"
        try:
            labels = self.masks.decode(mask, names[1])
        except ValueError as error:
            raise DataError(f"{names[1]}: {error}") from error
        try:
            return self._transform(uid, photo, labels, item.epoch)
        except ValueError as error:
            raise DataError(f"{names[0]}: {error}") from error

    def _transform(self, uid: str, photo: bytes, labels: np.ndarray, epoch: int) -> tuple[Any, Any]:
        def load_image(reduction: int = 1) -> np.ndarray:
            return decode_photo(photo, labels.shape, reduction)

        if isinstance(self.both_transforms, PairTransform):
            name = f"{self.seed}/{epoch}/{uid}".encode(errors="surrogateescape")
            key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
            rng = np.random.Generator(np.random.Philox(key=key))
            image, target = self.both_transforms.apply(load_image, labels, rng)
            image, target = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(target)
        else:
            image, target = Image.fromarray(load_image()), Image.fromarray(labels)
            if self.both_transforms:
                image, target = self.both_transforms((image, target))
        if self.image_transforms:
            image = self.image_transforms(image)
        if self.target_transforms:
            target = self.target_transforms(target)
        return image, target

    def resume_with(self, sampler: EpochSampler) -> None:
        """Save and restore this sampler's place in the epoch.

        Composer asks the data set for it, not the sampler.
        """
        self.sampler = sampler

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        """Return what Composer saves in a checkpoint, having seen `num_samples` of the epoch."""
        return {"epoch": self.sampler.epoch if self.sampler else 0, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Go on from there; having this, Composer loads no samples only to skip them."""
        if self.sampler and state:
            self.sampler.resume(state["epoch"], state["sample_in_epoch"])


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Make a batch: photos (N, 3, H, W), channels-last in memory as they were, labels (N, H, W)."""
    images, targets = zip(*samples)
    images = default_collate([image.permute(1, 2, 0) for image in images])
    return images.permute(0, 3, 1, 2), default_collate(list(targets))
