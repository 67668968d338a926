"""Tests of errors.py."""

from __future__ import annotations

import pickle

from errors import DataError, OutputError


def test_a_data_error_stays_itself() -> None:
    error = DataError("a.jpg: unknown image format")
    assert str(pickle.loads(pickle.dumps(error))) == "a.jpg: unknown image format"
    wrapped = (
        f"Caught DataError in DataLoader worker process 0.\nTraceback:\nshards.DataError: {error}\n"
    )
    assert str(DataError(wrapped)) == "a.jpg: unknown image format"


def test_the_error_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(OutputError("out: No space left on device")))
    assert isinstance(error, OutputError) and str(error) == "out: No space left on device"
