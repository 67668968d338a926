"""Headless Chromium, controlled with the DevTools protocol, and a static web server."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
FLAGS += [
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
]
KEYS = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Page:
    """One tab of the browser.

    Attributes:
        requests: Addresses that the page has requested.
        downloads: Folder of downloaded files.
        messages: Console messages and uncaught errors of the page.
    """

    def __init__(self, folder: str, flags: tuple[str, ...]) -> None:
        # Chromium reads commands from its file descriptor 3 and answers on 4.
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        line = f'exec "$@" 3<&{commands} 4>&{answers}'
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", *command],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._numbers, self._received, self._session = itertools.count(1), b"", None
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.downloads = Path(folder, "downloads")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command and return its result; record events that arrive meanwhile."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(60)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._answers], [], [], until - time.monotonic())
            part = os.read(self._answers, 2**20) if ready else b""
            assert part, "Chromium does not answer"
            self._received += part
        first, _, self._received = self._received.partition(b"\0")
        return json.loads(first)

    def _note(self, event: Mapping[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(a.get("value", a)) for a in about["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(str(about["exceptionDetails"]))

    def run(self, script: str) -> Any:
        """Evaluate a JavaScript expression, await it if it is a promise, and return the value."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + seconds
        while not self.run(condition):
            text = self.run("document.body?.innerText")
            assert time.monotonic() < until, f"never {condition}: {text} {self.messages}"
            time.sleep(0.05)

    def downloaded(self, name: str) -> bytes:
        """Wait until a file of this name is downloaded; delete it and return its content."""
        path, until = self.downloads / name, time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < until, f"no {name}: {os.listdir(self.downloads)}"
            time.sleep(0.05)
        content = path.read_bytes()
        path.unlink()
        return content

    def open(self, url: str) -> None:
        """Open an address in the tab."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState=='complete'")

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key."""
        about: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        about["modifiers"] = 8 if shift else 0
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in the file input that matches a CSS selector."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop(self, x: float, y: float, path: Path) -> None:
        """Drag a file to a position on the page and drop it."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        """Set the viewport size and the light or dark colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Save a PNG screenshot of the full page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Close the browser."""
        os.close(self._commands)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._answers)


@contextlib.contextmanager
def browser(*flags: str) -> Iterator[Page]:
    """Start Chromium with a new profile and yield its tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Page(folder, flags)
        try:
            yield page
        finally:
            page.close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, headers_sent: Mapping[str, str] = {}, **more: Any) -> None:
        self.headers_sent = headers_sent
        super().__init__(*args, **more)

    def end_headers(self) -> None:
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def static_host(folder: Path, **headers: str) -> Iterator[str]:
    """Serve a folder over HTTP with additional response headers; yield the address."""
    handler = functools.partial(_Handler, directory=str(folder), headers_sent=headers)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
