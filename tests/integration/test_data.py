"""Batches of a data set in folders are the same for any number of workers, ranks and resumes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.support.data import batches, build, digests, expected, folder, on_rank, train  # noqa: F401
from transforms import RandomCrop


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_equal_for_any_number_of_workers(
    folder: str, expected: list[list[str]], workers: int
) -> None:
    spec = build(folder, num_workers=workers)
    assert [digests(batches(spec, epoch)) for epoch in range(3)] == expected


def test_resumed_run_loads_remaining_samples(
    folder: str, expected: list[list[str]], tmp_path: Path
) -> None:
    options = dict(
        max_duration="3ep", spin_dataloaders=False
    )  # main.py also sets spin_dataloaders=False.
    uninterrupted, trainer = train(build(folder), tmp_path, **options)
    everything = [digest for epoch in expected for digest in epoch]
    assert uninterrupted.seen == everything
    for batch in (3, 5, 7):  # mid-epoch, at the end of an epoch, and in the second epoch
        model, trainer = train(
            build(folder, num_workers=2),
            tmp_path / str(batch),
            load_path=str(tmp_path / f"{batch}.pt"),
            **options,
        )
        assert model.seen == everything[4 * batch :]
        assert trainer.state.timestamp.epoch == 3 and trainer.state.timestamp.batch == 15


def test_run_extended_in_mid_epoch_loads_remaining_samples(
    folder: str, expected: list[list[str]], tmp_path: Path
) -> None:
    train(build(folder), tmp_path, max_duration="7ba")
    model, trainer = train(
        build(folder), tmp_path / "b", load_path=str(tmp_path / "7.pt"), max_duration="10ba"
    )
    assert model.seen == expected[1][8:]
    # Ten batches complete two epochs of five, though only three were loaded after the resume.
    assert trainer.state.timestamp.epoch == 2


@pytest.mark.parametrize(("ranks", "seen"), [(1, 8), (2, 8), (4, 8), (2, 12)])
def test_resume_on_more_or_fewer_ranks_loads_remaining_samples(
    folder: str, expected: list[list[str]], ranks: int, seen: int
) -> None:
    state = build(folder).dataloader.dataset.state_dict(seen, True)
    sides = []
    for rank in range(ranks):
        spec = on_rank(build(folder), rank, ranks)
        spec.dataloader.dataset.load_state_dict(state)
        assert len(spec.dataloader) == 5  # Composer needs the length of the full epoch
        sides.append(batches(spec, 0))
        assert digests(batches(spec, 1))[:1] == [expected[1][rank * 4 // ranks]]
    together = [parts for step in zip(*sides) for parts in step]
    assert digests(together) == expected[0][seen:]


def test_data_set_can_be_pickled(folder: str) -> None:
    dataset = pickle.loads(pickle.dumps(build(folder).dataloader.dataset))
    assert isinstance(dataset.both_transforms, RandomCrop)
    assert len(dataset) == 22
