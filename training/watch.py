"""A monitor for a run's processes: if one process is lost, it ends all others.

Without the watch, the other processes would wait half an hour for a lost process, because a healthy
one may need that long to compile, download or save. Each process keeps a TCP connection to the
first process and sends nothing on it until it ends. If a process dies, Linux closes its connection.
If a machine is lost, TCP keepalive notices within seconds, even if the processes are busy.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as torch_dist
from composer.utils import dist, get_device
from torch.distributed.rendezvous import rendezvous

from errors import Lost, one_line
from training.launcher import COLLECTIVE_TIMEOUT, is_first_to_refuse

# Seconds to wait for all processes to start. torchrun starts them together, but starting them by
# hand takes longer.
TOGETHER = 300.0 if "TORCHELASTIC_RUN_ID" in os.environ else COLLECTIVE_TIMEOUT
# TCP keepalive: seconds between two probes, and number of failed probes after which a machine
# counts as lost. A loss is thus detected within 20 s.
INTERVAL, ATTEMPTS = 4, 4
# Seconds that a process has to exit on its own, for example after a failed collective operation.
GRACE = 3.0


def join() -> Watch:
    """Connect the processes of a run, and watch for processes that are lost.

    Raises:
        Lost: Some processes did not start in time.
    """
    ranks, patience = dist.get_world_size(), timedelta(seconds=COLLECTIVE_TIMEOUT)
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=TOGETHER)))
        watch = Watch(store, rank, ranks)
        backend = get_device(None).dist_backend
        torch_dist.init_process_group(
            backend, timeout=patience, world_size=ranks, rank=rank, store=watch.store
        )
    except (RuntimeError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = one_line(error)[:160]
        raise Lost(
            f"the {ranks} processes of the run did not connect at {where} ({reason}); check "
            "that all processes have started"
        ) from None
    return watch


class Watch:
    """The connections between the first process of a run and all other processes.

    Args:
        store: Distributed store in which the first process publishes its port.
        rank: Number of this process.
        ranks: Number of processes.

    Attributes:
        store: View of the store that belongs to this attempt only, because torchrun shares one
            store among all attempts.
    """

    def __init__(self, store: torch_dist.Store, rank: int, ranks: int):
        self._heard, self._closed = threading.Event(), threading.Event()
        self._cause: Lost | None = None
        peers, token = _accept(store, ranks) if rank == 0 else _connect(store, rank)
        self.store = torch_dist.PrefixStore(token, store)
        for peer in peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, INTERVAL)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ATTEMPTS)
        self._peers = peers
        # Forked loader processes inherit these connections and may outlive the run, so close the
        # connections in every child process.
        os.register_at_fork(after_in_child=self._leave)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        for peer in self._peers:
            peer.close()

    def cause(self, seconds: float = GRACE) -> Lost | None:
        """Return why a process was lost, or None if the reason does not become known in time."""
        self._heard.wait(seconds)
        return self._cause

    def is_first_to_say(self, text: str) -> bool:
        """Return whether this process is the first on its node to print the given text."""
        try:
            return self.store.add(f"said/{os.environ.get('NODE_RANK', '0')}/{text}", 1) == 1
        except RuntimeError:  # The store is gone once the first process has exited.
            return dist.get_local_rank() == 0

    def close(self, status: int) -> None:
        """Tell the other processes that this process is about to exit, and with which status."""
        self._closed.set()
        self._tell(status, "")

    def _tell(self, status: int, text: str) -> None:
        for peer in self._peers:
            with suppress(OSError):  # This peer may be the process that was lost.
                peer.sendall(bytes([status]) + text.encode())
                peer.shutdown(socket.SHUT_WR)

    def _listen(self) -> None:
        """Wait for the other processes to end; if one of them fails, end this process as well."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = key.fileobj
                    assert isinstance(peer, socket.socket)
                    selector.unregister(peer)
                    cause = _last_words(peer, self._peers[peer])
                    if cause:
                        self._end(cause)
                        return

    def _end(self, cause: Lost) -> None:
        self._cause = cause
        self._heard.set()
        self._tell(cause.status, str(cause))
        if self._closed.wait(GRACE):
            return
        if cause.status == 2:
            # Record the error on this node, so that torchrun's next attempt ends immediately.
            is_first_to_refuse(str(cause))
        if dist.get_local_rank() == 0:
            print(f"error: {cause}", file=sys.stderr, flush=True)
        for loader in multiprocessing.active_children():
            loader.kill()
        os._exit(cause.status)


def _accept(store: torch_dist.Store, ranks: int) -> tuple[dict[socket.socket, str], str]:
    """Accept the other processes; return their connections and names, and this attempt's token."""
    peers: dict[int, tuple[socket.socket, str]] = {}
    token = secrets.token_hex(8)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=ranks, dualstack_ipv6=dual) as server:
        store.set("watch", f"{server.getsockname()[1]} {token}")
        server.settimeout(TOGETHER)
        while len(peers) < ranks - 1:
            peer, address = server.accept()
            with suppress(OSError):
                # A process of this run sends its token and rank at once, and retries if it is
                # rejected. A port scanner sends nothing, so use a short timeout.
                peer.settimeout(0.5)
                said, rank = peer.recv(16), int.from_bytes(peer.recv(4), "big")
                if said == token.encode() and 0 < rank < ranks:
                    peer.sendall(b"1")
                    peers[rank] = peer, f"process {rank} at {address[0].removeprefix('::ffff:')}"
                    continue
            peer.close()
    return dict(peers.values()), token


def _connect(store: torch_dist.Store, rank: int) -> tuple[dict[socket.socket, str], str]:
    """Connect to the first process; return the connection, its name, and this attempt's token."""
    host, end = os.environ["MASTER_ADDR"], time.monotonic() + TOGETHER
    while time.monotonic() < end:
        # Read the port each time, because the store may still contain the port of an earlier
        # attempt.
        port, token = store.get("watch").decode().split()
        with suppress(OSError):
            peer = socket.create_connection((host, int(port)), timeout=5)
            peer.settimeout(30)  # The first process may be busy rejecting port scanners.
            peer.sendall(token.encode() + rank.to_bytes(4, "big"))
            if peer.recv(1) == b"1":
                return {peer: f"process 0 at {host}"}, token
            peer.close()
        time.sleep(0.2)
    raise TimeoutError(f"process 0 does not respond at {host}:{port}")


def _last_words(peer: socket.socket, name: str) -> Lost | None:
    """Read the last message of a process and return why it failed, or None if it succeeded."""
    said = b""
    try:
        while part := peer.recv(1000):
            said += part
    except ConnectionResetError:
        pass
    except OSError as error:
        silence = INTERVAL * (ATTEMPTS + 1)
        return Lost(
            f"{name} has not responded for {silence} s: its machine or the connection to it was "
            f"lost ({error.strerror})"
        )
    if not said:
        return Lost(f"{name} ended without a message: it was killed, or its machine went down")
    if said[0] == 0:
        return None
    text = said[1:].decode() or f"{name} ended with status {said[0]}; see its output for the reason"
    return Lost(text, said[0])
