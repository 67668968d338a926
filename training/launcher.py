"""How main.py works with the program that started it: `composer` or `torchrun`.

torchrun starts the processes again after any failure. If the first attempt refused to run, a person
has to fix the cause, and this module makes the further attempts end at once and in silence. Once an
attempt has run, the same error may come from a store that is away, and is tried again.
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

# Seconds that processes wait for each other: one may have to compile, download or save meanwhile.
COLLECTIVE_TIMEOUT = 1800.0


def end_with_launcher() -> None:
    """Have the kernel send SIGUSR1 to this process when its launcher ends, if it has one."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(1, int(signal.SIGUSR1))  # PR_SET_PDEATHSIG


def was_refused() -> bool:
    """Return whether a process of this node refused to run in torchrun's first attempt."""
    folder = _folder()
    return folder is not None and any(folder.glob("refused-0-*"))


def is_first_to_refuse(text: str) -> bool | None:
    """Note that this node refuses to run; return whether this process is the first to say so.

    Return None without torchrun, which keeps a folder for such notes.
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
    """If a run has lost nodes and its batch does not divide among the rest, wait for another node.

    torchrun ends this process when a node joins. The first attempt does not wait, because the user
    chose its number of processes.
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
