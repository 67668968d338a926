"""Data sets that decode and transform one encoded image and mask at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dataset.decoding import decode_image_for_mask
from dataset.mask_decoder import Masks
from dataset.sampler import EpochSampler, Item, random_order
from errors import DataError

LoadImage = Callable[[int], np.ndarray]
# Transforms of the image and mask together, of the image alone, and of the mask alone.
Transforms = tuple[Callable | None, Callable | None, Callable | None]


class PairTransform:
    """A transform that is applied to an image and its mask together, both as arrays."""

    def apply(
        self, load_image: LoadImage, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform a sample.

        Args:
            load_image: Function that decodes the image to (H, W, 3) uint8. The function's argument
                is the factor by which to reduce a JPEG's size: 1, 2, 4 or 8 (see
                `decode_image_for_mask`). The function may ignore the argument.
            mask: (H, W) uint8 labels.
            rng: Random number generator, which must be the only source of randomness.

        Returns:
            tuple[np.ndarray, np.ndarray]: The image (final_size, final_size, 3) and the mask
                (final_size, final_size).
        """
        raise NotImplementedError

    def __call__(self, sample: tuple) -> tuple[np.ndarray, np.ndarray]:
        """Transform an image and a mask, given as Pillow images or arrays.

        The random number generator is seeded from the system's entropy.

        Args:
            sample: The image and its mask.
        """
        image, mask = sample
        image = image.convert("RGB") if isinstance(image, Image.Image) else image
        return self.apply(lambda _: np.asarray(image), np.asarray(mask), np.random.default_rng())


class EncodedSamples(Dataset):
    """A base class for data sets that decode files and transform them into training samples.

    Args:
        transforms: Transforms of the image and mask together, of the image alone, and of the mask
            alone. Each transform may be None.
        seed: Seed of the random transforms.
        masks: Decoder of the masks.
    """

    def __init__(self, transforms: Transforms, seed: int, masks: Masks) -> None:
        self.both_transforms, self.image_transforms, self.target_transforms = transforms
        self.seed, self.masks = seed, masks
        # Sampler of the training loader. Composer saves a data set's state but not a sampler's, so
        # this data set saves and restores the sampler's position in the epoch.
        self.sampler: EpochSampler | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Return a sample's uid, its encoded image and mask, and their names for error messages.

        Args:
            index: Index of the sample.
        """
        raise NotImplementedError

    def prefetch(self, index: int) -> None:
        """Prepare a sample that will soon be read, for example by downloading it.

        Args:
            index: Index of the sample.
        """

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the sample indices in the order in which this epoch visits them.

        Args:
            items: Indices of the epoch's samples, numbered as in `Item.index`.
            seed: Seed of the order.
            epoch: Number of the epoch.
        """
        return items[random_order(len(items), seed, epoch)]

    def __getitem__(self, item: int | Item) -> tuple[Any, Any]:
        """Return a transformed sample.

        Args:
            item: An `Item` from a sampler, or a sample index, which is read as in epoch 0.

        Raises:
            DataError: The image or the mask cannot be decoded.
        """
        item = Item(*item) if isinstance(item, tuple) else Item(0, item)
        if item.prefetch >= 0:
            self.prefetch(item.prefetch % len(self))
        repetition, index = divmod(item.index, len(self))
        uid, image, mask, names = self.read(index)
        # Give each repetition of a sample its own uid, so that its random crop and colours differ.
        if repetition > 0:
            uid = f"{uid}#{repetition}"
        try:
            labels = self.masks.decode(mask, names[1])
        except ValueError as error:
            raise DataError(f"{names[1]}: {error}") from error
        try:
            return self._transform(uid, image, labels, item.epoch)
        except ValueError as error:
            raise DataError(f"{names[0]}: {error}") from error

    def _transform(self, uid: str, data: bytes, labels: np.ndarray, epoch: int) -> tuple[Any, Any]:
        def load_image(reduction: int = 1) -> np.ndarray:
            return decode_image_for_mask(data, labels.shape, reduction)

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

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        """Return the position that Composer saves in a checkpoint.

        Args:
            num_samples: Number of samples that the run has seen in this epoch.
            from_beginning: Unused argument that Composer passes.
        """
        return {"epoch": self.sampler.epoch if self.sampler else 0, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Restore the position in the epoch.

        Without this method, Composer would load the epoch's first samples only to skip them.

        Args:
            state: The result of `state_dict`, or None.
        """
        if self.sampler and state:
            self.sampler.resume(state["epoch"], state["sample_in_epoch"])


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack samples into a batch of images (N, 3, H, W) and labels (N, H, W).

    Images keep the channels-last memory format in which they were decoded.

    Args:
        samples: Transformed images and labels.
    """
    images, targets = zip(*samples)
    images = default_collate([image.permute(1, 2, 0) for image in images])
    return images.permute(0, 3, 1, 2), default_collate(list(targets))
