"""Tests of errors.py."""

from __future__ import annotations

import pickle

from errors import DataError, OutputError


def test_data_error_survives_pickling_and_the_dataloader() -> None:
    error = DataError("a.jpg: unknown image format")
    assert str(pickle.loads(pickle.dumps(error))) == "a.jpg: unknown image format"
    wrapped = (
        f"Caught DataError in DataLoader worker process 0.\nTraceback:\nshards.DataError: {error}\n"
    )
    assert str(DataError(wrapped)) == "a.jpg: unknown image format"


def test_output_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(OutputError("out: No space left on device")))
    assert isinstance(error, OutputError) and str(error) == "out: No space left on device"
