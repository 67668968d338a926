"""Runs that are killed or stopped at any moment and then resumed equal uninterrupted runs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.support.forked import Death, run, run_ranks
from tests.support.layouts import lay_out
from tests.support.resumed_runs import (
    largest_difference,
    make_config,
    make_data,
    read_log,
    same_log,
)

SHARDS = {
    "max_duration": "4ba",
    "eval_interval": "100ep",
    "save_interval": "1ba",
    "save_num_checkpoints_to_keep": 1,
}
ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "optimizer.head_lr_scale": 10,
    "optimizer.no_decay": ["norm", "bias"],
    "optimizer.clip_norm": 1.0,
    "schedule": {"name": "poly", "warmup": "5ba", "final": 0.1},
    "save_interval": "1ba",
}
RARE = {
    "max_duration": "4ba",
    "save_interval": "2ba",
    "model.class_weights": "auto",
    "train_dataset.rare_class_sampling": 0.5,
}
FASTSCNN = {
    "model": {"name": "mmseg:fastscnn/fast_scnn_lr0.12_8x4_160k_cityscapes"},
    "hot.max_duration": "6ba",
    "save_interval": "2ba",
    "model.num_classes": 12,
    "model.backbone_weights": None,
    "train_dataset.final_size": 64,
}
VIT = {
    "model": {"name": "timm:vit_tiny_patch16_224"},
    "model.arguments": {"depth": 3, "embed_dim": 48, "drop_path_rate": 0.1},
    "model.num_classes": 12,
    "model.backbone_weights": None,
    "train_dataset.final_size": 64,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "optimizer.layer_decay": 0.8,
    "max_duration": "4ba",
    "hot.max_duration": "4ba",
    "save_interval": "2ba",
}
# With micro-batches of two images, BatchNorm statistics are the same on one or two ranks.
ANY_RANKS = {
    "max_duration": "6ba",
    "eval_interval": "100ep",
    "device_train_microbatch_size": 2,
    "model.sync_bn": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with one data set in three forms: folders, shards, and with a description."""
    folder = str(tmp_path_factory.mktemp("data"))
    make_data(folder)
    lay_out(f"{folder}/folders", Path(folder, "described"), "merged", 12)
    return folder


def configure(data: str, recipe: str, source: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run of 12 steps, with changes by dotted key."""
    config: Any = OmegaConf.create(make_config(data, recipe, source, workers=0))
    if source == "described":
        config.data = f"{data}/described/merged.yaml"
        for name in ("train_dataset", "eval_dataset"):
            del config[name]["path"]
        del config.model["num_classes"]
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    return OmegaConf.to_container(config)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def uninterrupted(
    data: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], str]:
    """Return a function that runs a config without interruption and returns the save folder."""
    folders: dict[str, str] = {}

    def train(config: dict[str, Any]) -> str:
        key = repr(config)
        if key not in folders:
            folder = str(tmp_path_factory.mktemp("undisturbed"))
            assert run({**config, "save_folder": folder}, f"{folder}/log") == 0
            folders[key] = folder
        return folders[key]

    return train


# Each case: recipe, data source, config changes, interruptions as (ranks, moment), final ranks.
@pytest.mark.parametrize(
    ("recipe", "source", "changes", "cuts", "ranks"),
    [
        pytest.param("baseline", "folders", {}, [(1, Death("batch", 2))], 1, id="baseline"),
        pytest.param("mild", "shards", {}, [(1, Death("eval", 0))], 1, id="mild, shards"),
        pytest.param(
            "medium",
            "described",
            {},
            [(1, Death("write", 0))],
            1,
            id="medium, data set description",
        ),
        pytest.param(
            "hot",
            "folders",
            {"save_interval": "2ba"},
            [
                (
                    1,
                    Death("forward", 3),
                ),  # in SAM's second pass of batch 2, before the first checkpoint
                (1, Death("batch", 4)),  # mid-epoch, one batch after a checkpoint
                (1, Death("eval", 1)),  # in the first evaluation, after a checkpoint
                (1, Death("write", 1)),  # mid-epoch, during the second save
            ],
            1,
            id="hot, killed four times",
        ),
        pytest.param(
            "hot",
            "folders",
            ADAMW,
            [(1, Death("batch", 2)), (1, Death("batch", 5))],
            1,
            id="AdamW with groups, clipping and warm-up",
        ),
        pytest.param(
            "baseline",
            "shards",
            SHARDS,
            [(1, Death("pointer", 1))],
            1,
            id="killed before the pointer is renamed",
        ),
        pytest.param(
            "baseline",
            "shards",
            SHARDS,
            [(1, Death("remove", 1))],
            1,
            id="killed before an old checkpoint is removed",
        ),
        pytest.param(
            "hot",
            "folders",
            {"model.freeze_backbone": "4ba", "save_interval": "1ba"},
            [(1, Death("batch", 2)), (1, Death("batch", 3))],
            1,
            id="killed with frozen and with unfrozen backbone",
        ),
        pytest.param(
            "baseline", "folders", RARE, [(1, Death("batch", 2))], 1, id="rare-class sampling"
        ),
        pytest.param("hot", "folders", FASTSCNN, [(1, Death("batch", 3))], 1, id="Fast-SCNN"),
        pytest.param("hot", "folders", VIT, [(1, Death("batch", 2))], 1, id="ViT"),
        pytest.param(
            "baseline",
            "folders",
            VIT | ANY_RANKS | {"max_duration": "4ba"},
            [(2, Death("forward", 1, signal.SIGTERM))],
            2,
            id="ViT on two ranks",
        ),
        pytest.param(
            "baseline",
            "folders",
            ANY_RANKS,
            # Only rank 1 gets the first signal, and both ranks stop after the same batch.
            [(2, Death("forward", 1, signal.SIGTERM)), (1, Death("forward", 2, signal.SIGTERM))],
            2,
            id="resumed on one and then on two ranks",
        ),
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    uninterrupted: Callable[[dict[str, Any]], str],
    data: str,
    tmp_path: Path,
    recipe: str,
    source: str,
    changes: dict[str, Any],
    cuts: list[tuple[int, Death]],
    ranks: int,
) -> None:
    config = configure(data, recipe, source, changes)
    reference = uninterrupted(config)
    keep = config.setdefault("save_num_checkpoints_to_keep", 2)
    config |= {"save_folder": str(tmp_path), "autoresume": True}
    log = f"{tmp_path}/log"
    for count, death in cuts:
        status = 75 if death.signal == signal.SIGTERM else -death.signal
        assert run_ranks(config, log, count, death) == [status] * count
    assert run_ranks(config, log, ranks) == [0] * ranks
    if ranks == 1:
        assert largest_difference(str(tmp_path), reference) == 0
        assert same_log(log, f"{reference}/log")
    else:  # Sums over several ranks are added in a different order.
        assert losses(log) == pytest.approx(losses(f"{reference}/log"), abs=1e-5)
    assert len(list(tmp_path.glob("ep*.pt"))) == keep


def losses(log: str) -> list[float]:
    """Return the loss of every batch; assert that each is logged once."""
    values = {
        step: value for (step, name), value in read_log(log).items() if name == "loss/train/total"
    }
    assert all(len(value) == 1 for value in values.values())
    assert sorted(values) == list(range(len(values)))
    return [values[step][0] for step in sorted(values)]


@pytest.fixture(scope="module")
def hot(data: str, uninterrupted: Callable[[dict[str, Any]], str]) -> tuple[dict[str, Any], str]:
    """Return a config with EMA, SAM and MixUp, and the folder of its uninterrupted run."""
    config = configure(data, "hot", "folders", {})
    return {**config, "autoresume": True, "save_num_checkpoints_to_keep": 2}, uninterrupted(config)


@pytest.mark.parametrize("death", [Death("batch", 3), Death("eval", 0), Death("batch", 5)])
def test_stop_signal_saves_checkpoint_and_run_can_resume(
    hot: tuple[dict[str, Any], str], tmp_path: Path, death: Death
) -> None:
    config, reference = hot
    log = f"{tmp_path}/log"
    config |= {"save_folder": str(tmp_path)}
    number = signal.SIGTERM if death.moment == "batch" else signal.SIGINT
    assert run(config, log, death._replace(signal=number)) == 75
    name = {("batch", 3): "ep0-ba4", ("eval", 0): "ep1-ba6", ("batch", 5): "ep0-ba6"}[death[:2]]
    batch = name.partition("ba")[2]
    assert Path(f"{log}.0.out").read_text().splitlines()[-2:] == [
        f"{number.name}: saving a checkpoint after this batch",
        f"stopped after batch {batch} as requested; checkpoint: {tmp_path}/{name}-rank0.pt; "
        "to resume, run the same command",
    ]
    assert (6, "metrics/eval/MIoU") not in read_log(log)
    assert run(config, log) == 0
    assert largest_difference(str(tmp_path), reference) == 0
    assert same_log(log, f"{reference}/log")


def test_second_stop_signal_ends_the_run_at_once(
    hot: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config = {**hot[0], "save_folder": str(tmp_path)}
    death = Death(
        "forward", 2, signal.SIGINT, times=2
    )  # in both forward passes of the second batch
    assert run(config, f"{tmp_path}/log", death) == -signal.SIGINT
    assert not list(tmp_path.glob("*.pt"))


def test_restarting_a_completed_run_only_evaluates_it(
    hot: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config, reference = hot
    before = Path(reference, "ep2-ba12-rank0.pt").read_bytes()
    log = f"{tmp_path}/log"
    assert run({**config, "save_folder": reference, "python_log_level": "warning"}, log) == 0
    assert Path(reference, "ep2-ba12-rank0.pt").read_bytes() == before
    output = Path(f"{log}.0.out").read_text()
    assert "nothing is left to train: the run has reached max_duration=2ep" in output
    logged, expected = read_log(log), read_log(f"{reference}/log")
    assert logged == {key: value for key, value in expected.items() if key[0] == 12}
