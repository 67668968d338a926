"""Random crops compared with torchvision, and compiled device transforms with eager ones."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch._dynamo.utils import counters
from torch._inductor import metrics

from dataset import color_jitter
from dataset.labels import PADDING, Labels
from tests.support.transforms import batch_of, blobs, random_image
from transforms import (
    PADDING_COLOR,
    DeviceTransform,
    RandomCrop,
)


class PlainCrop:
    """The random crop of the reference example, written with Pillow and torchvision."""

    def __init__(self, base_size: int, low: float, high: float, final_size: int):
        self.base_size, self.low, self.high, self.final_size = base_size, low, high, final_size

    def __call__(self, image: Image.Image, target: Image.Image, rng: random.Random):
        side, final = int(self.base_size * rng.uniform(self.low, self.high)), self.final_size
        image = TF.resize(image, [side, side], TF.InterpolationMode.BILINEAR)
        target = TF.resize(target, [side, side], TF.InterpolationMode.NEAREST)
        length = min(side, final)
        for _ in range(11):
            box = [rng.randrange(side - length + 1) for _ in "yx"] + [length, length]
            labels, counts = np.unique(np.array(TF.crop(target, *box)), return_counts=True)
            counts = counts[labels != 0]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        image, target = TF.crop(image, *box), TF.crop(target, *box)
        if rng.random() < 0.5:
            image, target = TF.hflip(image), TF.hflip(target)
        before = (final - length) // 2
        padding = [before, before, final - length - before, final - length - before]
        image = TF.pad(image, padding, fill=PADDING_COLOR)
        return np.asarray(image), np.asarray(TF.pad(target, padding, fill=PADDING))


def describe(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Return statistics of a crop that depend on its scale, position, classes, flip and padding."""
    inside = target != PADDING
    count = np.bincount(target[inside], minlength=2)[1:]
    columns = np.arange(target.shape[1]) - (target.shape[1] - 1) / 2
    return {
        "padded": 1 - inside.mean(),
        "largest class": count.max() / max(count.sum(), 1),
        "too large": float(count.max() > 0.75 * count.sum()),
        "other": (target[inside] == 0).mean(),
        "brightness": image[inside].mean(),
        "contrast": image[inside].std(),
        "detail": np.abs(np.diff(image.astype(int), axis=1))[:, :, 0][inside[:, 1:]].mean(),
        "left or right": float((columns * (target == 1)).mean()),
    }


def test_random_crops_have_same_distribution_as_torchvision() -> None:
    # One class fills the left side, so that flips are visible and it dominates many crops.
    image, mask = random_image(90, 120), blobs(90, 120)
    mask[:, :90], mask[:10], mask[40:45, 10:50] = 1, 0, 2
    plain, ours = PlainCrop(64, 0.5, 2.0, 64), RandomCrop(64, 0.5, 2.0, 64)
    pictures = Image.fromarray(image), Image.fromarray(mask)
    rng = random.Random(0)
    expected = [describe(*plain(*pictures, rng)) for _ in range(1500)]
    actual = [
        describe(*ours.apply(lambda _: image, mask, np.random.default_rng(seed)))
        for seed in range(1500)
    ]
    for name in expected[0]:
        a, b = (np.array([each[name] for each in side]) for side in (expected, actual))
        error = (a.std() ** 2 / len(a) + b.std() ** 2 / len(b)) ** 0.5
        assert abs(a.mean() - b.mean()) < 3.5 * error + 1e-9, (name, a.mean(), b.mean())
        # The standard deviations must agree within about their sampling error of 10%.
        assert abs(a.std() - b.std()) < 0.1 * a.std() + 1e-9, (name, a.std(), b.std())
    assert 0.1 < np.mean([each["too large"] for each in actual]) < 0.9


@pytest.fixture
def without_host_decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skip the shortcuts that depend on tensor values, as on a GPU."""
    monkeypatch.setattr(color_jitter, "_any", lambda change: True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_device_transform_compiles_one_graph_for_all_epochs(
    without_host_decisions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    epochs = iter([0, 1, 2])
    compiled = DeviceTransform(Labels(20), distort=True, epoch=lambda: next(epochs))
    compiled.compile()
    # On a CPU, the eager transform would be used.
    monkeypatch.setattr(compiled, "_transform", compiled._on_gpu)
    for epoch in range(3):
        expected = DeviceTransform(Labels(20), distort=True, epoch=[epoch].pop)(batch_of(2))
        for ours, theirs in zip(compiled(batch_of(2)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("distort", [False, True])
def test_device_transform_compiled_by_inductor_equals_eager(
    without_host_decisions: None, distort: bool
) -> None:
    raw, labels = batch_of(1, 16)
    transform = DeviceTransform(Labels(20), distort=distort)
    expected = transform((raw, labels))
    arguments = [torch.full((), number) for number in (17, 0)]
    metrics.reset()
    actual = torch.compile(transform._transform, fullgraph=True)(raw, labels, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert 0 < metrics.generated_kernel_count < 20
