"""Tests of training/start.py; integration/test_main.py resumes real runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.saver import Checkpoints
from errors import ConfigError
from model import deeplabv3
from training.callbacks import EvaluationSchedule
from training.config import resolve
from training.start import build_saver, find_run_start, release_save_folder

pytestmark = pytest.mark.usefixtures("small_network")


def test_run_without_a_save_folder_has_no_saver(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert build_saver(resolve(tiny), EvaluationSchedule("1ep")) is None
    assert "save_folder is empty" in caplog.text


def test_evaluation_has_no_saver(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = resolve({**tiny, "save_folder": str(tmp_path)})
    config.is_train = False
    assert build_saver(config, EvaluationSchedule("1ep")) is None
    assert not list(tmp_path.iterdir())


def test_run_with_a_save_folder_has_a_saver(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = resolve({**tiny, "save_folder": str(tmp_path), "save_num_checkpoints_to_keep": 3})
    saver = build_saver(config, EvaluationSchedule("1ep"))
    assert isinstance(saver, Checkpoints) and saver.keep == 3 and saver.run_name == "tiny"
    release_save_folder(config)


def test_unwritable_save_folder_is_rejected(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = resolve({**tiny, "save_folder": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="save_folder: "):
        build_saver(config, EvaluationSchedule("1ep"))


@pytest.mark.parametrize("is_train", [True, False])
def test_start_from_weights_loads_no_training_state(
    tiny: dict[str, Any], tmp_path: Path, is_train: bool
) -> None:
    file = str(tmp_path / "weights.pt")
    torch.save(deeplabv3(12, "resnet50", None).state_dict(), file)
    config = resolve({**tiny, "load_path": file, "load_weights_only": True, "is_train": is_train})
    start = find_run_start(config, None, str(tmp_path))
    assert start and start.where == file
    assert start.state_path is None and not start.server_runs("tiny")
    assert start.weights.config is None


def test_autoresume_without_checkpoints_starts_a_new_run(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = resolve({**tiny, "save_folder": str(tmp_path / "none"), "autoresume": True})
    assert find_run_start(config, None, str(tmp_path)) is None


def test_evaluation_without_a_checkpoint_is_rejected(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = resolve({**tiny, "save_folder": str(tmp_path), "autoresume": True})
    config.is_train = False
    with pytest.raises(ConfigError, match="contains no checkpoint to evaluate; set load_path"):
        find_run_start(config, None, str(tmp_path))
