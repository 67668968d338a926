"""A generator for a small data set in ADE20K's layout that a network can learn in minutes.

    python -m extras.preparation.synthetic demo/data

Each scene consists of overlapping shapes with different textures. The texture of an area determines
its class. Each area has two random colours, so the colour alone does not reveal the class.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import cv2
import numpy as np

from files import write_file

log = logging.getLogger(__name__)


def textures(size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw every texture as a pattern of zeros and ones, with a random period and phase.

    Args:
        size: Side length of the patterns in pixels.
        rng: Random number generator.

    Returns:
        Each texture's (size, size) pattern, indexed by the texture's name.
    """
    y, x = np.mgrid[:size, :size].astype(np.float32) + rng.uniform(0, 16, (2, 1, 1))
    period = rng.uniform(5, 8)
    u, v = x % period < period / 2, y % period < period / 2
    center = rng.uniform(0, size, 2)
    return {
        "plain": np.zeros_like(x),
        "rows": v,
        "columns": u,
        # Choose the direction at random, because a flip during training reverses it but must not
        # change the class.
        "diagonals": (x + y * rng.choice([-1, 1])) % (1.4 * period) < 0.7 * period,
        "speckle": cv2.resize((rng.random((size // 2, size // 2)) < 0.12) * 1.0, (size, size))
        > 0.4,
        "checks": u ^ v,
        "dots": np.hypot(x % period - period / 2, y % period - period / 2) < 0.3 * period,
        "noise": rng.random((size // 2 + 1, size // 2 + 1)).repeat(2, 0).repeat(2, 1)[:size, :size],
        "grid": (x % period < 2) | (y % period < 2),
        "rings": np.hypot(x - center[0], y - center[1]) % period < period / 2,
        "bricks": (y % period < 1.5) | ((x + y // period * period) % (2 * period) < 1.5),
        "waves": (y + 3 * np.sin(x * 0.6)) % period < period / 2,
    }


TEXTURES = tuple(textures(8, np.random.default_rng(0)))


def texture(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the pattern of one texture.

    Args:
        name: Name of a texture in `TEXTURES`.
        size: Side length of the pattern in pixels.
        rng: Random number generator.

    Returns:
        (size, size) float32.
    """
    return textures(size, rng)[name].astype(np.float32)


def shape(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random half-plane, ellipse or polygon.

    Args:
        size: Side of the scene in pixels.
        rng: Random number generator.

    Returns:
        (size, size) bool.
    """
    mask = np.zeros((size, size), np.uint8)
    center = rng.uniform(0.1, 0.9, 2) * size
    kind = rng.integers(3)
    if kind == 0:
        y, x = np.mgrid[:size, :size]
        angle = rng.uniform(0, 2 * np.pi)
        return (x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle) > 0
    radius = rng.uniform(0.15, 0.4, 2) * size
    if kind == 1:
        axes = tuple(radius.astype(int).tolist())
        cv2.ellipse(
            mask, tuple(center.astype(int).tolist()), axes, rng.uniform(0, 180), 0, 360, (1,), -1
        )
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        corners = center + radius.max() * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(mask, [corners.astype(np.int32)], (1,))
    return mask.astype(bool)


def scene(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image and its mask.

    Args:
        size: Side of the scene in pixels.
        rng: Random number generator.

    Returns:
        The image (size, size, 3) and its mask (size, size), both uint8. Label 0 is "other", and
        labels 1 to 12 are textures.
    """
    image = np.zeros((size, size, 3), np.float32)
    mask = np.zeros((size, size), np.uint8)
    for layer in range(5):
        area = np.ones((size, size), bool) if layer == 0 else shape(size, rng)
        label = int(rng.integers(len(TEXTURES)))
        pattern = texture(TEXTURES[label], size, rng)[..., None]
        dark, light = rng.uniform(20, 120, 3), rng.uniform(135, 235, 3)
        if rng.random() < 0.5:
            dark, light = light, dark
        image[area] = (dark * (1 - pattern) + light * pattern)[area]
        mask[area] = label + 1
        edge = cv2.morphologyEx(area.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0
        if layer > 0:
            mask[edge & area] = 0
    image = cv2.GaussianBlur(image, (3, 3), 0.6) + rng.normal(0, 5, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def make(
    path: str, training: int = 256, validation: int = 48, size: int = 96, seed: int = 0
) -> None:
    """Write the data set, unless a complete data set with the same options exists.

    Args:
        path: Folder that will contain ADEChallengeData2016.
        training: Number of training scenes.
        validation: Number of validation scenes.
        size: Side of a scene in pixels.
        seed: Seed of the random scenes.
    """
    root = Path(path) / "ADEChallengeData2016"
    done, kind = root / "synthetic.txt", f"{training} {validation} {size} {seed}\n"
    if done.is_file() and done.read_text() == kind:
        log.info("%s already exists", path)
        return
    for split, short, count in (("training", "train", training), ("validation", "val", validation)):
        for i in range(count):
            rng = np.random.default_rng((seed, split == "training", i))
            image, mask = scene(size, rng)
            name = f"ADE_{short}_{i + 1:08d}"
            image_path = root / "images" / split / f"{name}.jpg"
            jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            write_file(image_path, jpeg.tobytes())
            png = cv2.imencode(".png", mask)[1]
            write_file(root / "annotations" / split / f"{name}.png", png.tobytes())
    write_file(done, kind)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a small learnable data set like ADE20K.")
    parser.add_argument("path", help="folder for ADEChallengeData2016")
    parser.add_argument("--training", type=int, default=256, help="scenes to train on (256)")
    parser.add_argument("--validation", type=int, default=48, help="scenes to evaluate on (48)")
    parser.add_argument("--size", type=int, default=96, help="side of a scene in pixels (96)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    make(**vars(parser.parse_args()))
