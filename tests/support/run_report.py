"""A parser of report.html, and a finished run with a report."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from tests.support.artifacts import finished_run


class Page(HTMLParser):
    """The content of an HTML page: texts by tag, table rows, images and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.images: list[Image.Image] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "img":
            source = str(dict(attrs)["src"])
            data = base64.b64decode(re.sub("^data:image/(png|jpeg);base64,", "", source))
            self.images.append(Image.open(io.BytesIO(data)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data
        if "td" in self._open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run() -> tuple[Any, str]:
    return finished_run()
