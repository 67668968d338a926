"""The errors of all commands. Each message is one line that says where, what and why.

This module imports nothing slow, so that a bad config is reported before torch is loaded.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable

# Exit status of a run that can be resumed by the same command (EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75
# Signals that ask a run to stop after its batch. SIGHUP comes when the terminal closes. The kernel
# sends SIGUSR1 when the launcher dies.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class UserError(ValueError):
    """An error in the input of a command; its message is one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(message))


class ConfigError(UserError):
    """A config that cannot be run; the message names the key."""


class UnevenBatch(ConfigError):
    """A batch size that does not divide among the processes; more processes may still join."""


class DataError(UserError):
    """A data set that training cannot use; the message names the file."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises the error of a worker again, with the worker's traceback as its
        # message.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class StoreError(DataError):
    """A store that stopped answering during training, despite retries."""


class ModelError(UserError):
    """A model that cannot be built, for example because its weights are missing."""


class WeightsError(UserError):
    """A file of weights that is missing, damaged, unsafe, or not for a model of this project."""


class ClassError(UserError):
    """Class names that cannot be read, or whose number differs from the model's."""


class OutputError(OSError):
    """An output that cannot be completed, mostly because the disk is full; the message names it."""


class RunError(RuntimeError):
    """A run that cannot continue."""


class Stopped(RunError):
    """A run that ended on request; the message says how to resume it."""


class Lost(RunError):
    """A run that lost one of its processes.

    Args:
        message: One line about the lost process.
        status: Exit status for this process.
    """

    def __init__(self, message: str, status: int = TRY_AGAIN) -> None:
        super().__init__(message)
        self.status = status


def exit_status(error: BaseException) -> int:
    """Return the exit status: 1 if an output could not be completed, 2 if the input is bad."""
    return 1 if isinstance(error, OutputError) else 2


def escape_names() -> None:
    """Make print escape characters that it cannot encode, as in file names that are not text."""
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
    """Return the message of an error without line breaks, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
