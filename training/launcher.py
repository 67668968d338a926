"""Functions that interact with the launcher of a run, `composer` or `torchrun`.

torchrun restarts the processes after any failure. If the first attempt reports a bad config, only a
person can fix the config, so later attempts end at once and print nothing. After an attempt has
reached training, a later error may be temporary, such as an unreachable object store, so torchrun
may try again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from errors import ConfigError, UnevenBatch

# Timeout of collective operations, in seconds. It is long because all other ranks wait while one
# rank compiles, downloads or saves.
COLLECTIVE_TIMEOUT = 1800.0


def end_with_launcher() -> None:
    """Ask the kernel to send SIGUSR1 to this process when its launcher ends."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(1, int(signal.SIGUSR1))  # Option 1 is PR_SET_PDEATHSIG.


def was_refused() -> bool:
    """Return whether a process on this node reported bad input in torchrun's first attempt."""
    folder = _folder()
    return folder is not None and any(folder.glob("refused-0-*"))


def is_first_to_refuse(text: str) -> bool | None:
    """Record an input error on this node; return whether this process is the first to record it.

    Without torchrun, the processes have no shared folder for the record, so return None.
    """
    folder = _folder()
    if folder is None:
        return None
    name = f"refused-{_attempt()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with suppress(FileExistsError):
        (folder / name).touch(exist_ok=False)
        return True
    return False


def wait_for_nodes(error: ConfigError) -> None:
    """If a run has lost nodes and its batch no longer divides evenly, wait for another node.

    torchrun restarts this process when a node joins. The first attempt does not wait, because the
    user chose its number of processes.
    """
    if isinstance(error, UnevenBatch) and _attempt() > 0:
        if os.environ["RANK"] == "0":
            print(f"waiting for another node: {error}", flush=True)
        signal.pause()


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _folder() -> Path | None:
    attempt = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    return attempt.parent if attempt.name.startswith("attempt_") else None
