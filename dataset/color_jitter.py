"""Colour distortion of a batch on the device, with reproducible random numbers.

For a given seed, the random numbers are the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_per_sample(image: Tensor, seed: Tensor, epoch: Tensor, steps: Tensor) -> Tensor:
    """Return random numbers that depend only on the seed, the epoch and a sample's pixels.

    Source: SplitMix64 (Steele et al. 2014).

    Args:
        image: (N, 3, H, W) uint8 on any device. The result is bit-identical on all devices.
        seed: Seed of the run, 0-d int64 on the image's device.
        epoch: Epoch of the run, 0-d int64 on the image's device.
        steps: Result of `equal_steps` for the number of random numbers per sample, on the image's
            device.

    Returns:
        Tensor: (n, N, 1, 1, 1) float32, uniform in [0, 1), where n is the number of random numbers
        per sample.
    """
    # For a channels-last image, this reshape is a view and copies nothing.
    pixels = image.permute(0, 2, 3, 1).reshape(len(image), -1)
    # Drop trailing bytes that do not fill a 64-bit word. Clone the rest, so that each image's data
    # is aligned to 64-bit words.
    if pixels.shape[1] % 8:
        whole = pixels[:, : pixels.shape[1] // 8 * 8]
        pixels = whole.clone(memory_format=torch.contiguous_format)
    words = pixels.contiguous().view(torch.int64)
    # Integer sums wrap around on overflow, so their result does not depend on the order of
    # addition.
    state = words.sum(dim=1)
    for number in (seed, epoch):
        state = _mix(state ^ _mix(number))
    # SplitMix64 repeatedly adds a constant to its state, and mixes the bits of each sum into a
    # random number.
    bits = _mix(state + steps)
    return (((bits >> 40) & 0xFFFFFF).float() / 2**24)[..., None, None, None]


def equal_steps(count: int) -> Tensor:
    """Return multiples of SplitMix64's increment as a (count, 1) int64 tensor.

    The multiples are computed in advance, because Inductor cannot compile an integer product that
    overflows.

    Args:
        count: Number of steps.
    """
    return torch.arange(1, count + 1)[:, None] * -0x61C8864680B583EB


def _mix(state: Tensor) -> Tensor:
    """Mix the 64 bits of each state as SplitMix64 does.

    The products overflow int64 and wrap around. Right shifts copy the sign bit, so a bit mask
    removes the copies.
    """
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def distort_colors(image: Tensor, inside: Tensor, uniform: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, each for half of the samples.

    The result matches torchvision's ColorJitter on Pillow images. Values are clipped after each
    step.

    - Brightness is multiplied by a random factor between 1 - 32/255 and 1 + 32/255.
    - Contrast multiplies each pixel's distance from the image's mean grey by 0.5 to 1.5. The
      contrast is changed right after the brightness for half of the samples, and last for the other
      half.
    - Saturation multiplies each pixel's distance from its own grey by 0.5 to 1.5.
    - Hue is rotated by up to ±18/255 of the colour circle.

    Args:
        image: (N, 3, H, W) float, 0 to 255.
        inside: (N, 1, H, W) float, 0 in the padding and 1 inside the image.
        uniform: (9, N, 1, 1, 1) random numbers in [0, 1).

    Returns:
        Tensor: (N, 3, H, W) distorted images.
    """
    change = (uniform[4:8] * 2 - 1) * (uniform[:4] < 0.5)
    brightness, contrast, saturation = (
        1 + strength * step for strength, step in zip((32 / 255, 0.5, 0.5), change)
    )
    contrast_first = uniform[8] < 0.5
    image = (image * brightness).clamp_(0, 255)
    image = _contrast(image, inside, torch.where(contrast_first, contrast, 1.0))
    if _any(change[2]):
        image = _blend(image, _gray(image), saturation)
    if _any(change[3]):
        image = _turn_hue(image, change[3] * (18 / 255))
    return _contrast(image, inside, torch.where(contrast_first, 1.0, contrast))


def _any(change: Tensor) -> bool:
    """Return whether a colour change applies to any sample.

    On a GPU, return True without checking, because reading the values would mean waiting for the
    device.
    """
    return change.device.type != "cpu" or bool(change.any())


def _contrast(image: Tensor, inside: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, _mean_gray(image, inside), factor) if _any(factor - 1) else image


def _gray(image: Tensor) -> Tensor:
    """Return the ITU-R 601 luma, (N, 1, H, W)."""
    red, green, blue = image.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _mean_gray(image: Tensor, inside: Tensor) -> Tensor:
    """Return each image's mean luma outside the padding, (N, 1, 1, 1)."""
    # Threads may add rows in any order. Add the float32 row sums in float64, so that the order
    # hardly affects the result.
    rows = torch.stack([_gray(image).mul_(inside), inside]).sum(dim=-1)
    total, area = rows.sum(dim=-1, dtype=torch.float64)[..., None, None]
    return (total / area.clamp_(min=1)).to(image.dtype)


def _blend(image: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(other, image, weight).clamp_(0, 255)


def _turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Rotate the HSV hue by `turn`, a fraction of the colour circle; keep saturation and value.

    Let V be the value, C the chroma and h the hue in sixths of the circle. Then red is V - C (1 -
    clip(|h - 3| - 1)), green is V - C (1 - clip(2 - |h - 2|)) and blue is V - C (1 - clip(2 - |h -
    4|)), where clip limits its argument to 0..1.
    """
    red, green, blue = image.split(1, dim=1)
    value = image.amax(dim=1, keepdim=True)
    chroma = value - image.amin(dim=1, keepdim=True)
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * turn)
    hue = hue.sub_(6 * torch.floor(hue / 6))
    lacks = (2 - (hue - 3).abs_(), (hue - 2).abs_().sub_(1), (hue - 4).abs_().sub_(1))
    return torch.cat([value - lack.clamp_(0, 1).mul_(chroma) for lack in lacks], dim=1)
