"""A local server with the HTTP API of the Hugging Face hub, one repository and one token."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REPO, TOKEN = "user/name", "hf_right"


class Hub:
    """The state of the local hub.

    Attributes:
        url: Value for `HF_ENDPOINT`.
        files: Content of the repository's files by name.
        commits: Messages of the commits.
        requests: Method and path of each request.
        writable: True if the token may write.
    """

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, uploaded before their commit
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.writable = True

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Apply the file operations of a commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                self.files[value["path"]] = self.objects[value["oid"]]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self._answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if match := re.fullmatch(r"/objects/(\w+)", self.path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.objects[match[1]] = body
            return self._answer(200)
        path = self.path.replace(f"/api/models/{REPO}", "").replace(f"/{REPO}", "")
        if path == self.path:
            return self._answer(404, X_Error_Code="RepoNotFound")
        return self._in_repository(path, body)

    def _in_repository(self, path: str, body: bytes) -> None:
        hub = self.hub
        if name := re.fullmatch(r"/resolve/main/(.*)", path):
            content = hub.files.get(name[1])
            if content is None:
                return self._answer(404, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._answer(200, content, ETag=etag, X_Repo_Commit="0" * 40)
        if path == "":
            return self._answer(200, {"id": REPO, "sha": "0" * 40, "siblings": []})
        if not hub.writable:
            return self._answer(403, X_Error_Message="no write access")
        if path == "/preupload/main":
            files = json.loads(body)["files"]
            for file in files:
                large = file["path"].endswith((".safetensors", ".onnx"))
                file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            return self._answer(200, {"files": files})
        if path == ".git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            kind = {"Content_Type": "application/vnd.git-lfs+json"}
            return self._answer(200, {"transfer": "basic", "objects": objects}, **kind)
        assert path == "/commit/main", path
        hub.commit([json.loads(line) for line in body.splitlines()])
        url = f"{hub.url}/{REPO}/commit/{'0' * 40}"
        return self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[Hub]:
    """Run a local hub with an empty repository; yield its state."""
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield state
        server.shutdown()
