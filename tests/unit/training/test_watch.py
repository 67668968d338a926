"""Tests of training/watch.py."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as torch_dist

from tests.support.watch import causes, exits, three  # noqa: F401
from training import watch
from training.watch import Watch


def wait_for_exits(exits: list[int], number: int) -> list[int]:
    end = time.monotonic() + 10
    while len(exits) < number and time.monotonic() < end:
        time.sleep(0.02)
    return exits


def test_all_processes_exit_with_the_status_of_the_first_failure(
    three: list[Watch], exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    three[2].close(2)
    line = "process 2 at 127.0.0.1 ended with status 2; see its output for the reason"
    assert causes(three[:2]) == [(line, 2)] * 2
    assert wait_for_exits(exits, 2) == [2, 2]
    assert capsys.readouterr().err == f"error: {line}\n" * 2


def test_all_processes_end_when_one_is_killed(three: list[Watch], exits: list[int]) -> None:
    (connection,) = three[1]._peers
    connection.shutdown(socket.SHUT_RDWR)
    line = "process 1 at 127.0.0.1 ended without a message: it was killed, or its machine went down"
    assert causes([three[0], three[2]]) == [(line, 75)] * 2


def test_surviving_loader_process_does_not_hide_a_lost_rank(three: list[Watch]) -> None:
    loader = os.fork()
    if loader == 0:
        time.sleep(30)
        os._exit(0)
    try:
        (connection,) = three[1]._peers
        connection.close()  # the kernel closes a killed process's connections
        assert "ended without a message" in causes(three[:1])[0][0]
    finally:
        os.kill(loader, signal.SIGKILL)
        os.waitpid(loader, 0)


def test_processes_that_exit_on_their_own_are_not_killed(
    three: list[Watch], exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE", 60.0)
    three[1].close(1)
    assert (
        causes([three[0], three[2]])
        == [("process 1 at 127.0.0.1 ended with status 1; see its output for the reason", 1)] * 2
    )
    for peer in (three[0], three[2]):
        peer.close(1)
        peer._thread.join()
    assert exits == []


def test_silent_peer_is_reported_as_a_lost_machine(three: list[Watch]) -> None:
    class Silent:
        def recv(self, size: int) -> bytes:
            raise OSError(errno.EHOSTUNREACH, "No route to host")

    cause = watch._last_words(Silent(), "process 3 at n4")
    assert (str(cause), cause and cause.status) == (
        "process 3 at n4 has not responded for 20 s: its machine or the connection to it was lost "
        "(No route to host)",
        75,
    )
    (connection,) = three[1]._peers
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [4, 4, 4]


def test_watch_ignores_store_keys_of_an_earlier_attempt(exits: list[int]) -> None:
    """torchrun's store keeps the port and keys that earlier attempts of the run have set."""
    store = torch_dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as stranger, ThreadPoolExecutor(2) as threads:
        closed = socket.create_server(("127.0.0.1", 0))
        store.set("watch", f"{closed.getsockname()[1]} {'0' * 16}")
        closed.close()
        second = threads.submit(Watch, store, 1, 2)
        time.sleep(0.5)
        store.set("watch", f"{stranger.getsockname()[1]} {'0' * 16}")
        peer, _ = stranger.accept()
        peer.close()
        assert not second.done()
        watches = [threads.submit(Watch, store, 0, 2).result(20), second.result(20)]
    store.set("rank", "of the first attempt")
    watches[0].store.set("rank", "of this one")
    assert watches[1].store.get("rank") == b"of this one"
    for member in watches:
        member.close(0)


def test_error_raised_by_all_processes_is_printed_once_per_node(
    three: list[Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [peer.is_first_to_say("no weights: a") for peer in three] == [True, False, False]
    assert [peer.is_first_to_say(f"disk {rank}") for rank, peer in enumerate(three)] == [True] * 3
    monkeypatch.setenv("NODE_RANK", "1")
    assert [peer.is_first_to_say("no weights: a") for peer in three] == [True, False, False]

    class Gone:
        def add(self, name: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(three[1], "store", Gone())
    for local_rank, is_first in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert three[1].is_first_to_say("another line") is is_first
