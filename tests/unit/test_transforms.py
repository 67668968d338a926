"""Tests of transforms.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.decoding import (
    decode_image_for_mask,
)
from dataset.labels import IGNORED, PADDING, Labels
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from tests.support.transforms import IMAGE, batch_of, blobs, difference, encode, random_image
from transforms import (
    PADDING_COLOR,
    DeviceTransform,
    RandomCrop,
    Resize,
    build_ade20k_transformations,
    resize_image,
    resize_mask,
)


@pytest.mark.parametrize("shape", [(67, 83), (200, 150), (64, 64), (30, 200), (1, 50), (1, 1)])
@pytest.mark.parametrize("size", [(40, 40), (64, 90), (101, 33), (160, 160)])
def test_resizing_matches_pillow(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image, mask = random_image(*shape), blobs(*shape)
    expected = Image.fromarray(image).resize(size[::-1], Image.BILINEAR)
    assert difference(resize_image(image, size), np.asarray(expected)).max() <= 1
    expected = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))
    assert (resize_mask(mask, size) == expected).all()
    assert (resize_mask(mask, size, 3) == expected[::3, ::3]).all()


def test_evaluation_transform_only_resizes() -> None:
    image, mask = random_image(67, 150), blobs(67, 150)
    resized, labels = Resize(96)((Image.fromarray(image), Image.fromarray(mask)))
    assert (resized == resize_image(image, (96, 96))).all()
    assert (labels == resize_mask(mask, (96, 96))).all()


@pytest.mark.parametrize("shape", [(67, 83), (301, 150), (40, 500), (1, 30), (1, 1)])
def test_image_and_mask_get_the_same_crop(shape: tuple[int, int]) -> None:
    """A mask that equals the image's red channel still equals it after the crop."""
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    coordinates = (yy * 3 + xx) % 64 // 16 * 60 + 1  # diagonal stripes
    image = np.repeat(coordinates[..., None], 3, -1).astype(np.uint8)
    mask = image[..., 0].copy()
    transform = RandomCrop(64, 0.5, 2.0, 56, max_class_share=1)
    for seed in range(30):
        crop, labels = transform.apply(lambda _: image, mask, np.random.default_rng(seed))
        inside = labels != PADDING
        # Edges are smooth in the image and sharp in the mask; otherwise both are nearly equal.
        close = np.abs(crop[..., 0].astype(int) - labels)[inside] <= 31
        shrink = max(1, max(shape) / 32)
        assert close.mean() > 1 - 0.08 * shrink or max(shape) > 200, (seed, close.mean())
        assert abs(crop[..., 0][inside].mean() - labels[inside].mean()) < 6 * shrink


def test_crop_of_an_image_decoded_at_reduced_size_is_similar() -> None:
    # With odd sizes, halving loses half a pixel.
    image, mask = random_image(401, 533, detail=50), blobs(401, 533)
    data = encode(image, "JPEG", quality=97)
    reductions = []

    def load(reduction: int) -> np.ndarray:
        reductions.append(reduction)
        return decode_image_for_mask(data, mask.shape, reduction)

    transform = RandomCrop(64, 0.7, 1.5, 48)
    for seed in range(20):
        crop, labels = transform.apply(load, mask, np.random.default_rng(seed))
        expected, same = transform.apply(lambda _: image, mask, np.random.default_rng(seed))
        assert (labels == same).all()
        assert difference(crop, expected).mean() < 4
    assert set(reductions) == {4, 8}


def test_crop_scales_are_uniformly_distributed() -> None:
    image, mask = random_image(30, 40), blobs(30, 40)
    transform = RandomCrop(64, 0.5, 2.0, 128)  # the padding reveals the scaled size
    targets = [
        transform.apply(lambda _: image, mask, np.random.default_rng(seed))[1]
        for seed in range(2000)
    ]
    sides = np.array([(target != PADDING).any(1).sum() for target in targets])
    assert sides.min() == 32 and sides.max() == 127
    count = np.bincount(sides - 32, minlength=96).reshape(8, 12).sum(1)
    assert np.abs(count - 250).max() < 4 * 250**0.5


def test_crops_of_a_single_class_are_redrawn_ten_times() -> None:
    draws = []

    class Counting(RandomCrop):
        def _is_varied(self, labels: np.ndarray) -> bool:
            draws.append(labels)
            return super()._is_varied(labels)

    one_class, nothing = np.full((90, 90), 3, np.uint8), np.zeros((90, 90), np.uint8)
    ignored = np.full((90, 90), IGNORED, np.uint8)
    ignored[:, ::2] = 1
    for mask in (one_class, nothing, ignored):
        draws.clear()
        Counting(64, 2, 2, 64).apply(lambda _: random_image(90, 90), mask, np.random.default_rng(0))
        assert len(draws) == 11
    draws.clear()
    Counting(64, 2, 2, 64).apply(
        lambda _: random_image(90, 90), blobs(90, 90), np.random.default_rng(0)
    )
    assert len(draws) == 1
    draws.clear()  # A crop that cannot move is not drawn again.
    Counting(64, 1, 1, 64).apply(
        lambda _: random_image(90, 90), one_class, np.random.default_rng(0)
    )
    assert not draws


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (3, 200)])
def test_small_images_are_padded_evenly(shape: tuple[int, int]) -> None:
    image, target = RandomCrop(64, 0.5, 0.5, 65)((random_image(*shape), np.ones(shape, np.uint8)))
    inside = np.zeros((65, 65), bool)
    inside[16:48, 16:48] = True  # 33 pixels are missing: 16 before and 17 after
    assert (target[inside] == 1).all() and (target[~inside] == PADDING).all()
    assert (image[~inside] == PADDING_COLOR).all()


def test_each_split_gets_its_transforms() -> None:
    both, *others = build_ade20k_transformations("train", 40, 0.6, 1.7, 32)
    assert isinstance(both, RandomCrop) and others == [None, None]
    assert (both.base_size, both.min_resize_scale, both.max_resize_scale) == (40, 0.6, 1.7)
    assert both((IMAGE, Image.fromarray(blobs(45, 61))))[0].shape == (32, 32, 3)
    both, *others = build_ade20k_transformations("val", 40, 0.6, 1.7, 32)
    assert isinstance(both, Resize) and others == [None, None]


def test_device_transform_normalises_and_makes_class_indices() -> None:
    raw, labels = batch_of(3)
    image, target = DeviceTransform(Labels(20))((raw, labels))
    mean, std = (
        torch.tensor(each).view(1, 3, 1, 1)
        for each in (IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD)
    )
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(image[:, :, 4:], (raw[:, :, 4:] - mean) / std, atol=1e-5)
    assert (image[:, :, :4] == 0).all()
    assert (image[:, :, 5] != 0).any()  # ignored pixels are not black
    assert target.dtype == torch.int64
    expected = labels.long() - 1
    expected[:, :4] = expected[:, 5] = -1
    assert torch.equal(target, expected)
    _, target = DeviceTransform(Labels(21, False))((raw, labels))
    expected[:, 6:], expected[:, 4] = labels[:, 6:].long(), labels[:, 4].long()
    assert torch.equal(target, expected)


def test_colour_jitter_of_a_sample_does_not_depend_on_its_batch() -> None:
    raw, labels = batch_of(6)
    epoch = 0
    transform = DeviceTransform(Labels(20), distort=True, seed=5, epoch=lambda: epoch)
    together, _ = transform((raw, labels))
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert (together[:, :, :4] == 0).all()
    parts = torch.cat([transform((raw[i : i + 2], labels[i : i + 2]))[0] for i in range(0, 6, 2)])
    assert torch.equal(together, parts)
    plain, _ = DeviceTransform(Labels(20))((raw, labels))
    changed = (together != plain).flatten(1).any(1)
    epoch = 1
    again, _ = transform((raw, labels))
    assert changed.any() and not torch.equal(together, again)
    assert torch.equal(raw, batch_of(6)[0])  # the batch itself is unchanged


@pytest.mark.parametrize(
    ("labels", "values", "share", "draws"),
    [
        pytest.param(Labels(2, ignore_background=False), (0, 1), 0.75, 1, id="label 0 is a class"),
        pytest.param(Labels(2), (1, 2), 0.75, 1, id="label 0 is ignored and absent"),
        pytest.param(Labels(2), (0, 1), 0.75, 11, id="label 0 is ignored, one class remains"),
        pytest.param(
            Labels(3, ignore_background=False), (0, 0), 0.75, 11, id="label 0 fills the crop"
        ),
        pytest.param(Labels(2), (0, 0), 0.75, 11, id="no label"),
        pytest.param(Labels(2), (0, 0), 1.0, 1, id="maximum share 1, no label"),
        pytest.param(Labels(2), (1, 1), 1.0, 1, id="maximum share 1"),
    ],
)
def test_number_of_crop_draws_depends_on_the_largest_class_share(
    labels: Labels, values: tuple[int, int], share: float, draws: int
) -> None:
    mask = np.array(values, np.uint8)[np.indices((64, 64)).sum(0) % 2]
    crop = RandomCrop(64, 2.0, 2.0, 32, share, is_class=labels.classes())

    class Counting:
        def __init__(self) -> None:
            self.rng, self.drawn = np.random.default_rng(0), 0

        def random(self) -> float:
            self.drawn += 1
            return self.rng.random()

    rng = Counting()
    crop.apply(lambda _: np.zeros((64, 64, 3), np.uint8), mask, rng)
    assert rng.drawn == 1 + 2 * draws + 1  # the scale, two offsets for each crop, and the flip
