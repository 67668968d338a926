"""The interaction of main.py with the program that started it: `composer` or `torchrun`.

torchrun restarts the processes after any failure. If the first attempt refuses the config, a person
has to fix it, so this module ends the later attempts at once and without output. After an attempt
has run, the same error may have another cause, such as an object store that is down, so it is tried
again.
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

# Seconds that ranks wait for each other in a collective, because one may have to compile, download
# or save.
COLLECTIVE_TIMEOUT = 1800.0


def end_with_launcher() -> None:
    """Ask the kernel to send SIGUSR1 to this process when its launcher ends."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(1, int(signal.SIGUSR1))  # The constant 1 is PR_SET_PDEATHSIG.


def was_refused() -> bool:
    """Return whether a process of this node refused to run in torchrun's first attempt."""
    folder = _folder()
    return folder is not None and any(folder.glob("refused-0-*"))


def is_first_to_refuse(text: str) -> bool | None:
    """Note that this node refuses to run; return whether this process is the first to say so.

    Return None without torchrun, because only torchrun has a folder for such notes.
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
    """Wait for another node if a run has lost nodes and its batch no longer divides among the rest.

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
