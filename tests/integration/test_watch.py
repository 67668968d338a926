"""If one process of a run fails, the others end and report the same cause."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as torch_dist

from errors import Lost
from tests.support.watch import causes, close, exits, three  # noqa: F401
from training import watch
from training.watch import Watch, join


def test_process_that_succeeds_does_not_end_the_others(
    three: list[Watch], exits: list[int]
) -> None:
    three[2].close(0)
    three[0].close(0)
    assert [one.cause(0.5) for one in three] == [None] * 3
    assert exits == []


def test_unknown_connections_do_not_count_as_processes_of_the_run(exits: list[int]) -> None:
    store = torch_dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(Watch, store, 0, 2)
        port = int(store.get("watch").split()[0])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with socket.create_connection(("127.0.0.1", port)) as reset:
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with socket.create_connection(
            ("127.0.0.1", port)
        ) as guesser:  # sends a rank without the token
            guesser.sendall((1).to_bytes(4, "big"))
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        began = time.monotonic()
        second = threads.submit(Watch, store, 1, 2)
        watches = [first.result(20), second.result(20)]
    assert time.monotonic() - began < 15  # silent connections must not cost 5 s each
    assert list(watches[0]._peers.values()) == ["process 1 at 127.0.0.1"]
    for stranger in silent:
        stranger.close()
    watches[1].close(3)
    assert causes(watches[:1])[0][1] == 3
    close(watches[:1], 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_does_not_connect_gives_one_line_error(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    settings = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(watch, "TOGETHER", 1.0)
    with pytest.raises(
        Lost, match=rf"2 processes of the run did not connect at 127\.0\.0\.1:{port} \("
    ) as caught:
        join()
    assert caught.value.status == 75
    assert "\n" not in str(caught.value)
