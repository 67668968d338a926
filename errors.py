"""The errors of all commands. Each message is one line, which names the place and the cause.

This module imports no slow modules, so that a bad config is reported before torch is loaded.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable

# Exit status of a run that the same command can resume (EX_TEMPFAIL in sysexits.h).
TRY_AGAIN = 75
# Signals after which a run stops at the end of the current batch. SIGHUP arrives when the terminal
# closes, and the kernel sends SIGUSR1 when the launcher dies.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class UserError(ValueError):
    """An error in a command's input, with a one-line message and the command's exit status."""

    status = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(message))


class ConfigError(UserError):
    """An error in a config; the message names the key."""


class UnevenBatch(ConfigError):
    """An error for a batch size that does not divide evenly among the current processes.

    Under torchrun, the batch may divide evenly again when another node joins.
    """


class DataError(UserError):
    """An error in a data set; the message names the file."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises a worker's exception with the traceback as its message. Keep only
        # the text that follows the exception's class name.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class StoreError(DataError):
    """An error for an object store that stopped responding during training, despite retries."""

    # A later attempt may succeed once the store has recovered.
    status = TRY_AGAIN


class ModelError(UserError):
    """An error for a model that cannot be built, for example because its weights are missing."""


class WeightsError(UserError):
    """An error for a weights file that is missing, damaged, unsafe or incompatible."""


class ClassError(UserError):
    """An error for class names that cannot be read or do not match the model's classes."""


class OutputError(OSError):
    """An error for an output that cannot be completed, usually because the disk is full."""


class RunError(RuntimeError):
    """An error that prevents a run from continuing."""

    status = 1


class Stopped(RunError):
    """An exception that ends a run on request; its message says how to resume the run."""

    # This status tells a launcher or scheduler to restart the run.
    status = TRY_AGAIN


class Lost(RunError):
    """An error for a run that lost one of its processes.

    Args:
        message: One-line description of what happened to the process.
        status: Exit status for this process.
    """

    def __init__(self, message: str, status: int = TRY_AGAIN) -> None:
        super().__init__(message)
        self.status = status


def exit_status(error: BaseException) -> int:
    """Return the exit status for an error: 1 for an incomplete output, 2 for bad input."""
    return 1 if isinstance(error, OutputError) else 2


def escape_names() -> None:
    """Make `print` escape characters that it cannot encode, for example in file names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return an argparse type for an integer from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{_printable(text)} is not an integer between {least} and {most}"
            )
        return value

    return read


def _printable(text: str) -> str:
    """Escape unprintable characters, such as line breaks."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
