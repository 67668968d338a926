"""The web page of `export.py --to web` in a real browser, compared with predict.py."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import export
from extras.sharing import web
from predict import Segmenter
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES
from tests.support.browser import CHROMIUM, Page, browser, static_host
from tests.support.web import folder, images, runtime  # noqa: F401

# True when the page has loaded the network and segmented its first example image.
READY = "document.querySelector('#status').textContent.startsWith('large one #1.jpg: ')"


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Page]:
    """Open the page in a browser and wait until it has loaded its network."""
    if CHROMIUM is None:
        missing = pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip
        missing("no Chromium (Debian: apt-get install chromium)")
    with static_host(folder / "demo") as address, browser() as page:
        page.address = address
        page.screen(1200, 1200)
        page.open(address)
        page.wait(READY)
        yield page


def download_classes(page: Page, name: str) -> np.ndarray:
    """Wait until an image is segmented; return the class indices that the download button saves."""
    page.wait(f"document.querySelector('#status').textContent.startsWith('{name}: ')")
    page.run("document.querySelector('#download').click()")
    mask = Image.open(io.BytesIO(page.downloaded(f"{Path(name).stem}.png")))
    assert mask.mode == "P"
    assert mask.getpalette()[:36] == [v for c in load_classes(CLASSES, 12) for v in c.color]
    return np.array(mask)


def test_web_page_predicts_like_predict_py(page: Page, folder: Path, images: list[Path]) -> None:
    segmenter = Segmenter(folder / "weights.safetensors")
    same, pixels = 0, 0
    for number, image in enumerate(images):
        page.run(f"document.querySelectorAll('#examples button')[{number}].click()")
        actual, expected = download_classes(page, image.name), segmenter(str(image))
        assert actual.shape == expected.shape and len(np.unique(expected)) > 2
        same += (actual == expected).sum()
        pixels += actual.size
    assert same / pixels >= 0.999
    assert not page.messages


def test_web_page_sends_no_data_to_other_servers(page: Page) -> None:
    """The page requests only files of its own folder; its policy blocks other addresses."""
    assert len(page.requests) > 5
    allowed = (page.address, f"blob:{page.address}", "data:", "about:blank")
    assert not [url for url in page.requests if not url.startswith(allowed)]
    blocked_request = """new Promise((resolve) => {
      addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
      fetch("http://127.0.0.2:9/").catch(() => {});
    })"""
    assert page.run(blocked_request) == "connect-src"


def test_image_dropped_on_web_page_is_segmented_with_legend(
    page: Page, folder: Path, images: list[Path]
) -> None:
    page.drop(100, 100, images[1])
    mask = download_classes(page, images[1].name)
    counts = np.bincount(mask.ravel(), minlength=12)
    large = [c for c in np.argsort(-counts, kind="stable") if counts[c] >= mask.size / 1000]
    rows = page.run("[...document.querySelectorAll('#legend tr')].map((row) => row.innerText)")
    expected = [f"{CLASSES[c]}\t{100 * counts[c] / mask.size:.1f}%" for c in large]
    assert rows[: len(large)] == expected
    timing = page.run("document.querySelector('#time').textContent")
    assert timing.endswith("at 82 \N{MULTIPLICATION SIGN} 64 pixels (WebAssembly, threads: 1)")


def test_image_chosen_during_segmentation_is_segmented_next(
    page: Page, folder: Path, images: list[Path]
) -> None:
    page.run("""
      window.said = [];
      const status = document.querySelector('#status');
      const read = (record) => said.push(...[...record.addedNodes].map((node) => node.textContent));
      new MutationObserver((records) => records.forEach(read)).observe(status, {childList: true});
      const buttons = [...document.querySelectorAll('#examples button')];
      buttons.slice(0, 2).forEach((button) => button.click());
    """)
    for image in images[:2]:
        page.wait(f"window.said.some((text) => text.startsWith('{image.name}: '))")


def test_web_page_shows_class_of_pixel_under_the_pointer(page: Page, images: list[Path]) -> None:
    page.choose("#file", images[0])
    mask = download_classes(page, images[0].name)
    box = "(({x, y, width, height}) => [x, y, width, height])"
    box = page.run(f"{box}(document.querySelector('#picture').getBoundingClientRect())")
    seen = set()
    for row, column in ((3, 3), (10, 80), (50, 48), (90, 5), (94, 94)):
        at = [box[0] + (column + 0.5) / 96 * box[2], box[1] + (row + 0.5) / 96 * box[3]]
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
        seen.add(mask[row, column])
        pointer_text = page.run("document.querySelector('#pointed').textContent")
        assert pointer_text == CLASSES[mask[row, column]]
    assert len(seen) > 1
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    page.wait("document.querySelector('#pointed').hidden")


def test_web_page_reports_broken_image_file(page: Page, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "notes.jpg"
    broken.write_bytes(images[0].read_bytes()[:40] + b"no image")
    page.choose("#file", broken)
    page.wait("document.querySelector('#status').className == 'wrong'")
    message = page.run("document.querySelector('#status').textContent")
    assert message == "notes.jpg: this browser cannot read the file as an image"
    page.choose("#file", images[0])  # the page still works after the error
    assert download_classes(page, images[0].name).shape == (96, 96)
    assert page.run("document.querySelector('#status').className") == ""


def tab_to(page: Page, identity: str) -> None:
    for _ in range(12):
        page.press("Tab")
        if page.run("document.activeElement.id || document.activeElement.tagName") == identity:
            return
    pytest.fail(f"Tab does not reach {identity}")


def test_web_page_works_with_keyboard_on_narrow_screen(page: Page, images: list[Path]) -> None:
    page.screen(400, 700, dark=True)
    page.open(f"{page.address}?narrow")
    page.wait(READY)
    tab_to(page, "file")
    tab_to(page, "BUTTON")
    page.press("Enter")
    mask = download_classes(page, images[0].name)
    widths = page.run(
        "[document.documentElement.scrollWidth, document.querySelector('table').offsetWidth]"
    )
    assert widths[0] == 400 and widths[1] > 350
    tab_to(page, "picture")
    for _ in range(5):
        page.press("ArrowLeft", shift=True)  # move the pointer to the left edge
    page.press("ArrowDown")
    pointer_text = page.run("document.querySelector('#pointed').textContent")
    assert pointer_text == CLASSES[mask[int(0.52 * 96), 0]]
    inside = "(({left, right}) => left >= 0 && right <= 400)"
    assert page.run(f"{inside}(document.querySelector('#pointed').getBoundingClientRect())")
    tab_to(page, "opacity")
    page.press("ArrowRight")
    assert page.run("document.querySelector('#overlay').style.opacity") == "0.61"
    tab_to(page, "download")
    page.press("Enter")
    assert (np.array(Image.open(io.BytesIO(page.downloaded("large one #1.png")))) == mask).all()
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert not page.messages


def test_web_page_reports_missing_network_file(page: Page, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "demo", tmp_path / "demo")
    (tmp_path / "demo" / web.MODEL).unlink()
    with static_host(tmp_path / "demo") as address:
        page.open(address)
        page.wait("document.querySelector('#status').className == 'wrong'")
        message = page.run("document.querySelector('#status').textContent")
    assert (
        message == "The network cannot be loaded: model.onnx: the server answered with status 404"
    )


def test_web_page_falls_back_to_webassembly_if_webgpu_fails(page: Page, images: list[Path]) -> None:
    script = "Object.defineProperty(navigator, 'gpu', {value: {requestAdapter: async () => ({})}})"
    added = page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    page.open(f"{page.address}?webgpu")
    page.wait(READY)
    page.call("Page.removeScriptToEvaluateOnNewDocument", **added)
    assert any(m.startswith("WebGPU cannot run this network") for m in page.messages)
    page.messages.clear()
    page.choose("#file", images[0])
    download_classes(page, images[0].name)
    assert "WebAssembly" in page.run("document.querySelector('#time').textContent")


def test_web_page_with_half_weights_predicts_like_predict_py(
    page: Page, folder: Path, images: list[Path], tmp_path: Path
) -> None:
    weights, demo = folder / "weights.safetensors", tmp_path / "demo"
    options = ["--to", "web", "--half", "--out", str(demo), "--photo", str(images[0])]
    assert export.main([str(weights), *options]) == 0
    sizes = [(place / web.MODEL).stat().st_size for place in (demo, folder / "demo")]
    assert sizes[0] < 0.6 * sizes[1]
    with static_host(demo) as address:
        page.open(address)
        actual = download_classes(page, images[0].name)
    assert (actual == Segmenter(weights)(str(images[0]))).mean() >= 0.99
