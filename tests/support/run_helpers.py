"""Small complete checkpoints, and a limit on file sizes that acts like a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpointing.stores import LocalFolder, NewCheckpoint


def save_whole(folder: Path, *batches: int) -> list[Path]:
    """Save a small file under the checkpoint name of each batch; return the paths."""
    target = LocalFolder(str(folder))
    target.probe()
    paths = []
    for batch in batches:
        name = f"ep0-ba{batch}-rank0.pt"
        torch.save({"batch": torch.full((100,), batch)}, folder / "unfinished")
        target.publish(NewCheckpoint(str(folder / "unfinished"), name, keep=-1))
        paths.append(folder / name)
    return paths


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limit each file that this process writes to `size` bytes, which acts like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
