"""What tests of runs share: callbacks that meddle, networks that are quick to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composer.core import Callback

import main as main_module
from stores import LocalFolder


def add_callback(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    """Put a callback before those of the runs to come."""
    build = main_module._build_callbacks
    monkeypatch.setattr(main_module, "_build_callbacks", lambda c: [callback, *build(c)])


def save_whole(folder: Path, *batches: int) -> list[Path]:
    """Publish files that count as whole checkpoints."""
    target = LocalFolder(str(folder))
    target.probe()
    paths = []
    for batch in batches:
        name = f"ep0-ba{batch}-rank0.pt"
        torch.save({"batch": torch.full((100,), batch)}, folder / "unfinished")
        target.publish(str(folder / "unfinished"), name, keep=-1)
        paths.append(folder / name)
    return paths
