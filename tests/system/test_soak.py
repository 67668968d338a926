"""Parts of benchmarks/soak.py: its configs, its memory table and its faulty S3 store."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import soak_memory, soak_run
from tests.support.faulty_store import FAULTS, FaultyStore
from tests.support.resumed_runs import RECIPES
from training.config import resolve


def test_configs_of_soak_test_are_valid(tmp_path: Path) -> None:
    for recipe in RECIPES:
        config = resolve(soak_run.make_config("s3://data/x", str(tmp_path), recipe, "name", 100))
        assert (config.recipe_name or "baseline") == recipe and config.max_duration == "100ba"
    module, _, function = config.model.name.partition(":")
    network = getattr(sys.modules[module], function)(num_classes=12)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 12, 16, 16)


def test_memory_growth_compares_first_and_last_sample() -> None:
    samples = [(225, {"launcher": (100.0, 10)}), (425, {"launcher": (101.0, 13)})]
    text, worst = soak_memory.table(samples)
    assert worst == pytest.approx(0.3)
    assert "| launcher, MB | 100.0 | 101.0 | +1.0% |" in text
    assert "| launcher, files | 10 | 13 | +30.0% |" in text


# A stand-in for main.py that logs three batches per attempt and fails in its first two attempts.
PROGRAM = """
import json, sys
path = json.loads(sys.argv[3].removeprefix("loggers="))["file"]["filename"].format(rank=0)
attempt = int(path.rpartition("/")[2].partition("-")[0])
with open(path, "w") as file:
    for batch in range(3 * attempt - 2, 3 * attempt + 1):
        print(f"[metric][batch={batch}]: loss/train/total: 1.0", file=file)
if attempt == 1:
    sys.exit("error: the disk is full; free up some space")
if attempt == 2:
    raise KeyError("a bug")
"""


def test_soak_test_restarts_a_run_and_records_why_each_attempt_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.py").write_text(PROGRAM)
    monkeypatch.setattr(soak_run, "ROOT", tmp_path)
    run = soak_run.Run(tmp_path / "run", {"seed": 1}, {}, ranks=None)
    run.finish()
    assert (run.attempt, run.newest) == (3, 9)
    assert run.endings == ["1: error: the disk is full", "1: TRACEBACK, nothing was said"]
    assert run.left_over() == []
    run.end()


def test_soak_test_reports_a_run_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(soak_run, "ROOT", tmp_path)
    run = soak_run.Run(tmp_path / "run", {"seed": 1}, {}, ranks=None)
    with pytest.raises(
        RuntimeError, match="the run has not finished a batch in 1 s; the end of its"
    ):
        run.until(lambda: False, 1.0)
    run.end()
    assert run.left_over() == []


@pytest.fixture
def echo() -> Iterator[int]:
    """Return the port of a server that answers each request with 5,000 bytes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                if connection.recv(1000):
                    connection.sendall(bytes(5000))

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def ask(store: FaultyStore) -> bytes:
    """Send a request to the store; return the full response."""
    with socket.create_connection(("127.0.0.1", store.port), 30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(1000), b""))


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_store_applies_each_fault_and_recovers(echo: int, fault: str) -> None:
    store, answers, began = FaultyStore(echo), [], time.monotonic()
    assert ask(store) == bytes(5000)
    asking = threading.Thread(target=lambda: answers.append(ask(store)))
    with store.having(fault):
        if fault == "gone":
            with pytest.raises(ConnectionRefusedError):
                ask(store)
        else:
            asking.start()
            asking.join(0.3 if fault == "silent" else None)
    if fault == "silent":
        assert not answers
        asking.join()
    expected = {"cut": bytes(3000), "slow": bytes(5000), "silent": bytes(5000)}
    if fault in ("500", "503"):
        assert answers[0].startswith(b"HTTP/1.1 " + fault.encode())
    elif fault != "gone":
        assert answers == [expected[fault]]
    assert fault != "slow" or time.monotonic() - began >= 5000 / 50_000
    assert ask(store) == bytes(5000)
    store.close()
