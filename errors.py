"""Every way in which a command refuses: each message is one line that says what, where and why.

Nothing slow is imported here, so that a wrong config is answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable

# Exit status of a run that goes on when its command is given again: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75
# Signals that ask a run to stop after its batch. SIGHUP comes when the terminal closes. The kernel
# sends SIGUSR1 when the launcher dies.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class UserError(ValueError):
    """Something that a command was given cannot be used; what it says is one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(message))


class ConfigError(UserError):
    """A config that cannot be run; the message names the key."""


class UnevenBatch(ConfigError):
    """A batch size that does not divide among the processes there are; more of them may come."""


class DataError(UserError):
    """A data set that is not as training needs it; the message names the file."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error again with the worker's whole traceback for message.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class StoreError(DataError):
    """A store that does not give what it gave before, however often it was asked while training."""


class ModelError(UserError):
    """A model that cannot be built: an unknown backbone, or weights that do not fit or exist."""


class WeightsError(UserError):
    """A file of weights that is missing, damaged, unsafe, or of no model of this project."""


class ClassError(UserError):
    """Class names that cannot be read or do not number what the model predicts."""


class OutputError(OSError):
    """An output that cannot be finished, mostly because the disk is full; one line names it."""


class RunError(RuntimeError):
    """A run that cannot go on."""


class Stopped(RunError):
    """A run that ended on request; the message says how it goes on."""


class Lost(RunError):
    """A run that has lost one of its processes; `status` is the one to end with."""

    def __init__(self, message: str, status: int = TRY_AGAIN) -> None:
        super().__init__(message)
        self.status = status


def exit_status(error: BaseException) -> int:
    """Return 1 if an output could not be finished, and 2 if a command was given bad input."""
    return 1 if isinstance(error, OutputError) else 2


def escape_names() -> None:
    """Have print escape what cannot be printed, as in names of files that are no text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return the type of a command-line option: a whole number within bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{_printable(text)} is no whole number from {least} to {most}"
            )
        return value

    return read


def _printable(text: str) -> str:
    """Return a text with what a name or a value may hold, line breaks for one, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
