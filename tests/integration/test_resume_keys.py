"""On resume, each config key is applied, compared or free. The cases come from the schema."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Time

import data as data_module
import main as main_module
from errors import ConfigError
from extras.preparation.synthetic import make
from main import build_trainer, main
from tests.support.paths import ROOT
from training.config import resolve
from training.keys import APPLIED, COMPARED, FREE, flatten, keys_of
from training.schema import Config

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


# Each key's rule for resumed runs. Keys of `eval_dataset` that are not compared count as `FREE`,
# because evaluation does not affect training.
KINDS = {
    name: FREE if name.startswith("eval_dataset.") and rule == APPLIED else rule
    for name, field, _ in keys_of(Config())
    for rule in [field.metadata["on_resume"]]
}
Changes = dict[str, Any]

# Keys that `changed` cannot handle: the changes of the first run and those of the resumed run.
LRASPP = {"model.name": "torchvision:lraspp_mobilenet_v3_large", "model.arguments": {}}
ADAMW = {"optimizer.name": "adamw"}
SPECIAL: dict[str, tuple[Changes, Changes]] = {
    "model.name": ({}, {"model.name": "torchvision:lraspp_mobilenet_v3_large"}),
    "model.arguments": (LRASPP, {"model.arguments": {"inter_channels": 64}}),
    "model.backbone_arch": ({}, {"model.backbone_arch": "resnext50_32x4d"}),
    "model.backbone_weights": ({}, {"model.backbone_weights": "IMAGENET1K_V2"}),
    "model.class_weights": ({}, {"model.class_weights": [2.0] + [1.0] * 11}),
    "model.freeze_backbone": ({}, {"model.freeze_backbone": "1ep"}),
    "optimizer.betas": (ADAMW, {"optimizer.betas": [0.8, 0.99]}),
    "optimizer.name": ({}, ADAMW),
    "optimizer.no_decay": ({}, {"optimizer.no_decay": ["norm"]}),
    "schedule.name": ({}, {"schedule.name": "linear"}),
    "schedule.power": ({"schedule.name": "poly"}, {"schedule.power": 2.0}),
    "schedule.warmup": ({}, {"schedule.warmup": "2ba"}),
    "recipe_name": ({}, {"recipe_name": "mild"}),
    "precision": ({}, {"precision": "amp_bf16"}),
    "compile": ({}, {"compile": False}),
    "model.fused_loss": ({}, {"model.fused_loss": False}),
    "grad_accum": ({}, {"grad_accum": 2}),
    "device_train_microbatch_size": ({}, {"device_train_microbatch_size": 2}),
    "best_metric": ({"class_names": "names", "save_folder": "new"}, {"best_metric": "IoU/b"}),
    "stop_after": ({"save_folder": "new"}, {"stop_after": "2ep"}),
    "class_table_csv": ({"save_folder": "new"}, {"class_table_csv": True}),
    "save_best": ({"save_folder": "new"}, {"save_best": True}),
    "save_folder": ({}, {"save_folder": "new"}),
    "autoresume": ({"save_folder": "new"}, {"autoresume": True}),
    "load_path": ({}, {"load_path": "checkpoint"}),
    "load_weights_only": ({"load_path": "checkpoint"}, {"load_weights_only": True}),
    "load_least": ({"load_path": "checkpoint"}, {"load_least": 0.4}),
    "load_classes_by_name": (
        {"load_path": "named checkpoint", "load_weights_only": True, "class_names": "names"},
        {"load_classes_by_name": True},
    ),
    "loggers": ({}, {"loggers": {"console": {}}}),
    "python_log_level": ({}, {"python_log_level": "error"}),
    "class_names": ({"class_names": "names"}, {"class_names": "other names"}),
    "data": ({"data": "description"}, {"data": "reversed description"}),
    "train_dataset.path": ({}, {"train_dataset.path": "other data"}),
    "eval_dataset.path": ({}, {"eval_dataset.path": "other data"}),
    "train_dataset.is_streaming": (
        {},
        {"train_dataset.is_streaming": True, "train_dataset.path": "shards"},
    ),
    "eval_dataset.is_streaming": (
        {},
        {"eval_dataset.is_streaming": True, "eval_dataset.path": "shards"},
    ),
    "train_dataset.local": ({}, {"train_dataset.local": "new"}),
    "eval_dataset.local": ({}, {"eval_dataset.local": "new"}),
    **{
        f"{split}_dataset.{name}": (
            {},
            {f"train_dataset.{name}": value, f"eval_dataset.{name}": value},
        )
        for split in ("train", "eval")
        for name, value in {"ignore_background": False, "ignore_label": 3}.items()
    },
    **{
        f"{split}_dataset.{name}": ({}, {f"{split}_dataset.{name}": value})
        for split in ("train", "eval")
        for name, value in {
            "cache_limit": "1gb",
            "num_workers": 1,
            "validate_hash": "sha1",
        }.items()
    },
}
# Not tested here: `is_train`, because evaluations do not resume, and `run_name`, which only
# autoresume compares.
ELSEWHERE = {"is_train", "run_name"}


def changed(name: str, value: Any, bounds: str) -> Any:
    """Return a valid value of a config key that differs from `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str) and value[-2:] in ("ep", "ba"):
        return f"{int(value[:-2]) + 1}{value[-2:]}"
    low, high = (float(bound) for bound in bounds[1:-1].split(", "))
    candidates = (
        [5, 2, 0.4, 0.9, 40] if value is None or isinstance(value, int) else [0.4, 0.9, 2.0]
    )
    if name.endswith(("final_size", "base_size")):
        candidates = [40]
    if name.endswith("resize_scale"):
        candidates = [0.75] if "min" in name else [1.5]
    if name.endswith("batch_size"):
        candidates = [8]
    for candidate in candidates:
        is_fractional = isinstance(value, int) and candidate != int(candidate)
        if low < candidate < high and candidate != value and not is_fractional:
            return candidate
    raise AssertionError(f"SPECIAL needs a case for {name}")


def bounds_of(name: str) -> str:
    section: Any = Config()
    *path, leaf = name.split(".")
    for part in path:
        section = getattr(section, part)
    return section.__dataclass_fields__[leaf].metadata["bounds"]


def case(name: str) -> tuple[Changes, Changes]:
    """Return the changes to the tiny config in the first run and in the resumed run."""
    recipe = name.partition(".")[0]
    base: Changes = {"recipe_name": recipe} if recipe in ("mild", "medium", "hot") else {}
    if name in SPECIAL:
        return base | SPECIAL[name][0], SPECIAL[name][1]
    if name == "mild.max_duration":
        return base, {name: "4ep"}
    return base, {name: changed(name, flatten(Config())[name], bounds_of(name))}


@pytest.fixture(scope="module")
def places(synthetic: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Create the files that `SPECIAL` has placeholders for; return a value for each placeholder."""
    from convert_ade20k import main as convert

    folder = tmp_path_factory.mktemp("places")
    make(str(folder / "other"), training=12, validation=5, size=40)
    assert not convert(["--path", synthetic, "--out", str(folder / "shards")])
    names = [*"abcdefghijkl"]
    (folder / "names.txt").write_text("\n".join(names))
    (folder / "other.txt").write_text("\n".join(reversed(names)))
    description = {
        **{
            split: {
                "images": f"ADEChallengeData2016/images/{kind}",
                "masks": f"ADEChallengeData2016/annotations/{kind}",
            }
            for split, kind in {"train": "training", "val": "validation"}.items()
        },
        "classes": {name: {"labels": [label]} for label, name in enumerate(names, 1)},
        "ignore": [0],
    }
    other = {**description, "classes": dict(reversed(description["classes"].items()))}
    return {
        "names": str(folder / "names.txt"),
        "other names": str(folder / "other.txt"),
        "other data": str(folder / "other"),
        "shards": str(folder / "shards"),
        "description": description,
        "reversed description": other,
    }


@pytest.fixture
def configure(
    tiny_config: dict[str, Any], places: dict[str, Any], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Return a function that applies changes by dotted key to the tiny config."""
    counter = itertools.count()

    def configured(*changes: Changes) -> dict[str, Any]:
        config = copy.deepcopy(tiny_config)
        for name, value in itertools.chain(*(change.items() for change in changes)):
            if value == "new":
                value = str(tmp_path / f"new{next(counter)}")
            elif isinstance(value, str):
                value = places.get(value, value)
            *sections, leaf = name.split(".")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
        return config

    return configured


_checkpoints: dict[str, str] = {}


@pytest.fixture
def checkpoint(
    configure: Callable[..., dict[str, Any]],
    places: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Changes], str]:
    """Return a function that trains one batch with changed keys and returns the checkpoint."""

    def trained(changes: Changes) -> str:
        changes = {k: v for k, v in changes.items() if not k.startswith(("load", "save", "auto"))}
        key = json.dumps(changes, sort_keys=True)
        if key not in _checkpoints:
            folder = tmp_path_factory.mktemp("first")
            config = configure(changes, {"save_folder": str(folder), "save_interval": "1ba"})
            recipe = changes.get("recipe_name")
            config.setdefault(recipe, {})["max_duration"] = "1ba" if recipe else None
            if recipe is None:
                del config[None]
            main(config | {"max_duration": "1ba", "eval_interval": "9ep"}).close()
            _checkpoints[key] = f"{folder}/ep0-ba1-rank0.pt"
        return _checkpoints[key]

    places["checkpoint"] = trained({})
    places["named checkpoint"] = trained({"class_names": "names"})
    return trained


STATE = {"ema_started", "ema_weights_active", "samples", "passes", "microbatch", "is_frozen"}
STATE |= {"microbatch_size"}


def scalars(thing: Any) -> dict[str, str]:
    """Return the attributes of an object that hold settings, as text."""
    kinds = (int, float, str, bool, Time, type(None))
    return {k: str(v) for k, v in vars(thing).items() if isinstance(v, kinds) and k not in STATE}


_settings: dict[str, dict[str, Any]] = {}


def settings(config: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return every setting that a run with this config trains with, read from its trainer.

    Many cases share a config, so the settings of each config are cached.
    """
    key = json.dumps(config, sort_keys=True)
    if key not in _settings:
        _settings[key] = _read_settings(config, patch)
    return _settings[key]


def _read_settings(config: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    build_model = main_module.build_model
    build_dataspec = data_module.build_ade20k_dataspec

    def look_at_model(config: Config, start: Any, precision: Any, weights: Any, data: Any) -> Any:
        model = config.model
        seen["loss"] = [model.cross_entropy_weight, model.dice_weight, weights]
        seen["sync_bn"] = model.sync_bn
        return build_model(config, start, precision, weights, data)

    def look_at_dataset(**options: Any) -> Any:
        if options["split"] == "train":
            seen["cache_limit"] = options["cache_limit"]
        return build_dataspec(**options)

    patch.setattr(main_module, "build_model", look_at_model)
    patch.setattr(data_module, "build_ade20k_dataspec", look_at_dataset)
    try:
        trainer = build_trainer(resolve(config))
    finally:
        patch.undo()
        torch.use_deterministic_algorithms(False)
    state = trainer.state
    (optimizer,), (scheduler,) = state.optimizers, state.schedulers
    now, factors = state.timestamp, []
    for batch in (0, 1, 3, 6, 11):
        epoch, rest = divmod(batch, int(state.dataloader_len))
        state.timestamp = now.copy(batch=batch, epoch=epoch, batch_in_epoch=rest)
        factors.append(scheduler.lr_lambdas[0](0))
    loader = state.train_dataloader
    dataset = loader.dataset
    digest = hashlib.sha1()
    for index in range(len(dataset)):
        uid, image, mask, _ = dataset.read(index)
        digest.update(uid.encode() + image + mask)
    (saver,) = [c for c in state.callbacks if type(c).__name__ == "Checkpoints"] or [None]
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return seen | {
        "optimizer": (type(optimizer).__name__, groups, scheduler.base_lrs),
        "schedule": factors,
        "algorithms": [(type(a).__name__, scalars(a)) for a in state.algorithms],
        "time": str(state.max_duration),
        "precision": (str(state.precision), str(state.model.cpu_autocast)),
        "microbatch": state.device_train_microbatch_size,
        "loader": (loader.batch_size, loader.sampler.drop_last, loader.sampler.seed),
        "items": len(loader.sampler),
        "repeats": str(loader.sampler.repeat_factors),
        "transforms": scalars(dataset.both_transforms),
        "images": digest.hexdigest(),
        "best": (saver.best.metric, saver.best.patience) if saver else ("MIoU", None),
    }


def names_of(kind: str) -> list[str]:
    return [name for name, key_kind in KINDS.items() if key_kind == kind and name not in ELSEWHERE]


def test_every_config_key_is_applied_compared_or_free_on_resume() -> None:
    assert set(KINDS.values()) == {APPLIED, COMPARED, FREE}
    assert KINDS.keys() == flatten(Config()).keys()
    assert SPECIAL.keys() <= KINDS.keys()


@pytest.mark.parametrize("name", names_of(APPLIED))
def test_resumed_run_applies_changed_value_of_applied_key(
    name: str,
    configure: Callable[..., dict[str, Any]],
    checkpoint: Callable[[Changes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, change = case(name)
    before = settings(configure(base), monkeypatch)
    fresh = settings(configure(base, change), monkeypatch)
    assert fresh != before, f"{name} shows in nothing that a run trains with"
    resumed = configure(base, change, {"load_path": checkpoint(base)})
    assert settings(resumed, monkeypatch) == fresh


@pytest.mark.parametrize("name", names_of(FREE))
def test_config_key_marked_free_does_not_change_training(
    name: str,
    configure: Callable[..., dict[str, Any]],
    checkpoint: Callable[[Changes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, change = case(name)
    start = {} if name.startswith("load") else {"load_path": checkpoint(base)}
    before = settings(configure(base, start), monkeypatch)
    assert settings(configure(base, start, change), monkeypatch) == before


@pytest.mark.parametrize("name", names_of(COMPARED))
def test_resumed_run_rejects_changed_value_of_compared_key(
    name: str,
    configure: Callable[..., dict[str, Any]],
    checkpoint: Callable[[Changes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, change = case(name)
    path = checkpoint(base)
    settings(configure(base, {"load_path": path}), monkeypatch)  # the unchanged value is accepted
    with pytest.raises(ConfigError) as caught:
        build_trainer(resolve(configure(base, change, {"load_path": path})))
    line = str(caught.value)
    assert any(part in line.partition(": ")[0] for part in (name, name.replace("eval", "train")))
    assert f"{path} was trained with " in line or f"in {path} it is " in line
    assert line.endswith("start a new run from its weights with load_weights_only=true")


def test_autoresume_rejects_other_run_name(
    configure: Callable[..., dict[str, Any]], checkpoint: Callable[[Changes], str]
) -> None:
    folder = str(Path(checkpoint({})).parent)
    config = configure({"save_folder": folder, "autoresume": True})
    build_trainer(resolve(config))
    with pytest.raises(ConfigError, match=r"run tiny, not to other; use a different save_folder"):
        build_trainer(resolve(config | {"run_name": "other"}))


def test_resume_documentation_lists_every_config_key() -> None:
    text = ROOT.joinpath("docs", "resume.md").read_text()
    for kind in (APPLIED, COMPARED, FREE):
        part = text.partition(f"\n### {kind.title()}\n")[2].partition("\n### ")[0]
        rows = [row for row in part.splitlines() if row.startswith("|")]
        named = re.findall(r"`([\w.]+)`", "".join(rows))
        assert sorted(named) == sorted(name for name, key_kind in KINDS.items() if key_kind == kind)
