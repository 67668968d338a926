"""A proxy in front of an S3 server that simulates outages, stalls, slow links and server errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# The faults: connections refused, no bytes forwarded, 50 kB/s, HTTP status 500 or 503, and a
# truncated response.
FAULTS = ("gone", "silent", "slow", "500", "503", "cut")
RATE = 50_000  # Bandwidth of a slow store in bytes per second.
CUT_AFTER = 3_000  # Bytes that are forwarded in each direction before a connection is cut.
METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


class FaultyStore:
    """A proxy between clients and a local S3 server, with optional faults.

    Args:
        port: Port of the S3 server.

    Attributes:
        url: Value for `S3_ENDPOINT_URL`.
        fault: One of `FAULTS`, or None.
    """

    def __init__(self, port: int):
        self.server_port = port
        self.fault: str | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._link = asyncio.Lock()  # All connections share the bandwidth of a slow store.
        self.port = 0
        self._call(self._listen())
        self.url = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def having(self, fault: str) -> Iterator[None]:
        """Simulate one of `FAULTS` inside the `with` block."""
        self.fault = fault
        if fault == "gone":
            self._call(self._leave())
        try:
            yield
        finally:
            self.fault = None
            if fault == "gone":
                self._call(self._listen())

    def close(self) -> None:
        """Stop the proxy and close all connections."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _leave(self) -> None:
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _end(self) -> None:
        await self._leave()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other = await asyncio.open_connection("127.0.0.1", self.server_port)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, other}
        try:
            ways = (self._pass(reader, other, writer), self._pass(other_reader, writer, None))
            tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        finally:
            self._open -= {writer, other}
            writer.close()
            other.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter | None,
    ) -> None:
        """Forward the data of a connection in one direction.

        While the fault is an HTTP status, `client` receives an error response instead. `client` is
        None in the direction from the server.
        """
        left = CUT_AFTER
        with suppress(OSError):
            while data := await reader.read(4096):
                if self.fault in ("500", "503") and client and data.startswith(METHODS):
                    client.write(_refusal(self.fault))
                    await client.drain()
                    return
                while self.fault == "silent":
                    await asyncio.sleep(0.1)
                if self.fault == "slow":
                    async with self._link:
                        await asyncio.sleep(len(data) / RATE)
                if self.fault == "cut":
                    data, left = data[:left], left - len(data)
                writer.write(data)
                await writer.drain()
                if left < 0:
                    return


def _refusal(status: str) -> bytes:
    """Return the error response of an S3 server with the given HTTP status."""
    code = {"500": "InternalError", "503": "SlowDown"}[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
