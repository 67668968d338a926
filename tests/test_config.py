"""The YAML's schema: what is read, what is refused, and that every refusal is one clear line."""

from __future__ import annotations

import re
import shlex
import string
from pathlib import Path
from typing import Any

import pytest
from layouts import NAMES, lay_out
from mcli import RunConfig
from omegaconf import OmegaConf

from errors import ClassError, ConfigError
from training import config
from training.config import load, resolve
from training.config_checks import check_evaluates

YAMLS = Path(__file__).parent.parent / "yamls"


def test_deeplabv3_yaml_holds_the_references_numbers(tmp_path: Path) -> None:
    (tmp_path / "ADEChallengeData2016" / "images" / "training").mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016" / "images" / "validation").mkdir()
    paths = [f"train_dataset.path={tmp_path}", f"eval_dataset.path={tmp_path}"]
    typed = resolve(load(str(YAMLS / "deeplabv3.yaml"), paths))
    assert (typed.max_duration, typed.seed, typed.train_dataset.batch_size) == ("128ep", 17, 128)
    assert (typed.optimizer.lr, typed.optimizer.momentum) == (0.08, 0.9)
    assert typed.optimizer.weight_decay == 5e-5
    assert (typed.model.cross_entropy_weight, typed.model.dice_weight) == (0.375, 1.125)
    assert (typed.medium.sam.rho, typed.medium.sam.interval, typed.medium.mixup.alpha) == (
        0.3,
        2,
        0.2,
    )
    assert (typed.hot.sam.rho, typed.hot.sam.interval, typed.hot.mixup.alpha) == (0.3, 1, 0.5)
    assert (typed.mild.ema.half_life, typed.mild.ema.update_interval) == ("1000ba", "10ba")
    assert (typed.hot.ema.half_life, typed.hot.ema.update_interval) == ("2000ba", "1ba")
    # What the YAML spells out is what a config without the key means.
    spelled_out = OmegaConf.to_container(OmegaConf.load(YAMLS / "deeplabv3.yaml"))
    data = {"path": str(tmp_path)}
    defaults = resolve({"train_dataset": data, "eval_dataset": data})
    for section, values in spelled_out.items():
        if section in ("loggers", "train_dataset", "eval_dataset"):
            continue
        default = getattr(defaults, section)
        if isinstance(values, dict):
            default = OmegaConf.to_container(OmegaConf.structured(default))
            default = {name: default[name] for name in values}
        assert values == default, section


@pytest.mark.parametrize(
    ("recipe", "duration"), [("mild", "25ep"), ("medium", "90ep"), ("hot", "240ep")]
)
def test_a_recipe_sets_its_duration_and_the_command_line_beats_it(
    tiny: dict[str, Any], tmp_path: Path, recipe: str, duration: str
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    assert resolve(load(str(path), [])).max_duration == "4ba"
    assert resolve(load(str(path), [f"recipe_name={recipe}"])).max_duration == duration
    given = [f"recipe_name={recipe}", "max_duration=2ep"]
    assert resolve(load(str(path), given)).max_duration == "2ep"
    given = [f"recipe_name={recipe}", f"{recipe}.max_duration=30"]
    assert resolve(load(str(path), given)).max_duration == "30ep"


WRONG = {
    "optimiser.lr=1": "unknown key optimiser; did you mean optimizer?",
    "model.backbone=resnet50": "unknown key model.backbone; did you mean model.backbone_arch?",
    "seed=abc": "seed: .*'abc'",
    "seed=null": "seed is empty",
    "optimizer=5": "optimizer: 5 is not a section",
    "optimizer.lr=0": "optimizer.lr: 0.0 is not a finite number of more than 0",
    "optimizer.lr=.nan": "optimizer.lr: nan",
    "optimizer.name=adam": "optimizer.name: adam is neither sgdw nor adamw",
    "optimizer.name=adamw optimizer.lr=0.02": "optimizer.lr: 0.02 is too much for adamw",
    "optimizer.betas=[0.9]": "optimizer.betas: .* are not two numbers",
    "optimizer.betas=[0.9,1]": "optimizer.betas: 1.0 is not 0 to below 1",
    "optimizer.no_decay=[norms]": "optimizer.no_decay: norms is neither norm nor bias",
    "model.arguments=[a]": "model.arguments: .'a'. is not keys and values",
    "optimizer.no_decay=norm": "optimizer.no_decay: ",
    "optimizer.clip_norm=0": "optimizer.clip_norm: 0.0 is not a finite number of more than 0",
    "optimizer.head_lr_scale=-1": "optimizer.head_lr_scale: -1.0",
    "schedule.name=cosin": "schedule.name: cosin is none of cosine, poly, constant, linear",
    "schedule.warmup=soon": "schedule.warmup: 'soon' is not a time, as in 1500ba",
    "schedule.warmup=05ba": "schedule.warmup: '05ba' is not a time, as in 1500ba",
    "schedule.power=0": "schedule.power: 0.0",
    "schedule.final=-0.1": "schedule.final: -0.1",
    "train_dataset.max_class_share=0": "max_class_share: 0.0 is not more than 0 to 1",
    "train_dataset.rare_class_sampling=2": "rare_class_sampling: 2.0 is not more than 0 to 1",
    "optimizer.momentum=1": "optimizer.momentum: 1.0 is not 0 to below 1",
    "train_dataset.path=/nowhere": "train_dataset.path: no folder /nowhere",
    "train_dataset.path=null": "train_dataset.path is empty",
    "eval_dataset.path=s3://bucket/x": "eval_dataset.path is remote; set eval_dataset.is_streaming",
    "train_dataset.min_resize_scale=3": "min_resize_scale: 3.0 is above max_resize_scale",
    "train_dataset.final_size=-64": "train_dataset.final_size: -64",
    "train_dataset.num_workers=many": "num_workers: 'many' is neither a number nor auto",
    "device_train_microbatch_size=big": "device_train_microbatch_size: 'big'",
    "device_train_microbatch_size=0": "device_train_microbatch_size: 0 is not a finite",
    "max_duration=2 epochs": "max_duration: '2 epochs' is not a time",
    "save_interval=0ep": "save_interval: '0ep' is not a time",
    "recipe_name=mid": "recipe_name: mid is none of mild, medium, hot",
    "precision=bf17": "precision: bf17 is none of",
    "compile=maybe": "compile: maybe is none of",
    "model.fused_loss=true": "model.fused_loss: True; use auto or false",
    "model.fused_loss=triton": "model.fused_loss: triton; use auto or false",
    "loggers.wanb={}": "loggers.wanb: no such logger; did you mean wandb?",
    "loggers.file=log.txt": "loggers.file: 'log.txt' is not its arguments",
    "loggers=wandb": "loggers: 'wandb' is not a section",
    "loggers.comet_ml={}": "comet_ml: its package is missing; make install WITH=comet_ml",
    "model.num_classes=1000": "model.num_classes: 1000 is not 2 to 253",
    "model.dice_weight=0 model.cross_entropy_weight=0": "no loss is left",
    "save_num_checkpoints_to_keep=0": "save_num_checkpoints_to_keep: 0 is neither 1 or more nor -1",
    "save_num_checkpoints_to_keep=-7": "save_num_checkpoints_to_keep: -7 is neither 1 or more nor",
    "seed=99999999999999999999": "seed: 99999999999999999999 is not 0 to 4294901760",
    "train_dataset.shuffle_seed=-5": "train_dataset.shuffle_seed: -5 is not 0 to",
    "train_dataset.ignore_label=300": "train_dataset.ignore_label: 300 is not 0 to 255",
    "train_dataset.final_size=100000": "train_dataset.final_size: 100000 is not 16 to 16384",
    "train_dataset.final_size=16384 train_dataset.batch_size=1024": "is 1024.0 GB; lower",
    "train_dataset.max_resize_scale=1e9": "max_resize_scale: 1000000000.0 is not more than 0 to",
    "train_dataset.max_resize_scale=90 train_dataset.base_size=512": "is 46080 pixels, above 32767",
    "train_dataset.num_workers=1000": "train_dataset.num_workers: 1000 is ",
    "train_dataset.cache_limit=12parsecs": "train_dataset.cache_limit: '12parsecs' is not bytes",
    "train_dataset.download_timeout=-1": "train_dataset.download_timeout: -1.0 is not a finite",
    "run_name=../../x save_folder=runs/{run_name}": "run_name: '../../x' is no name of a folder",
    "hot.sam.interval=0": "hot.sam.interval: 0 is not a finite number of 1 or more",
    "load_least=2": "load_least: 2.0 is not 0 to 1",
    "load_least=.nan": "load_least: nan is not 0 to 1",
    "load_classes_by_name=true": "load_classes_by_name needs load_weights_only=true",
    "grad_accum=many": "grad_accum: 'many' is neither 1 or more nor auto",
    "load_path=/nowhere.pt": "load_path: no file or folder /nowhere.pt",
    "class_names=/nowhere.txt": "class_names: no file /nowhere.txt",
    "autoresume=true": "autoresume needs save_folder",
    "train_dataset.ignore_background=false": "train_dataset.ignore_background is false, "
    "eval_dataset.ignore_background is true; a label means the same in both",
    "eval_dataset.ignore_label=7": "train_dataset.ignore_label is none, eval_dataset.ignore_label "
    "is 7; a label means the same in both",
    "seed": "'seed' is not an override; write key=value",
    "load_weights_only=true": "load_weights_only needs load_path; give it, or leave out",
    "load_least=0.9": "load_least needs load_path",
    "best_metric=IoU/nosuch": "best_metric needs save_folder",
    "stop_after=2ep": "stop_after needs save_folder",
    "class_table_csv=true": "class_table_csv needs save_folder",
    "optimizer.betas=[0.8,0.9]": "optimizer.betas needs optimizer.name=adamw",
    "optimizer.name=adamw optimizer.lr=1e-4 optimizer.momentum=0.5": "optimizer.momentum needs",
    "schedule.name=linear schedule.power=2": "schedule.power needs schedule.name=poly",
    "eval_dataset.rare_class_sampling=0.1": "eval_dataset.rare_class_sampling: only train_dataset",
    "eval_dataset.max_class_share=0.5": "eval_dataset.max_class_share: only train_dataset has",
    "eval_dataset.shuffle_seed=3": "eval_dataset.shuffle_seed: only train_dataset has this key",
    "recipe_name=mild mild.ema.half_life=3ep": "must have the same unit",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_a_wrong_config_is_answered_in_one_line(
    tiny: dict[str, Any], tmp_path: Path, overrides: str
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    parts = [overrides] if "epochs" in overrides else overrides.split()
    with pytest.raises(ConfigError) as caught:
        resolve(load(str(path), parts))
    message = str(caught.value)
    assert re.search(WRONG[overrides], message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({"ignore_background": False, "ignore_label": 3}, id="the same in both"),
        pytest.param({}, id="255, which is ignored in any case"),
    ],
)
def test_labels_that_mean_the_same_are_accepted(
    tiny: dict[str, Any], labels: dict[str, Any]
) -> None:
    for section in ("train_dataset", "eval_dataset"):
        tiny[section] |= labels
    tiny["eval_dataset"].setdefault("ignore_label", 255)
    assert resolve(tiny).eval_dataset.ignore_label in (3, 255)
    # An evaluation does not read the training section.
    tiny |= {"is_train": False, "load_path": __file__}
    tiny["train_dataset"]["ignore_background"] = not tiny["train_dataset"].get("ignore_background")
    assert not resolve(tiny).is_train


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [
        pytest.param({}, True, id="no checkpoint"),
        pytest.param({"save_folder": "runs/x"}, True, id="a folder that is not looked into"),
        pytest.param({"load_path": __file__}, False, id="load_path"),
        pytest.param({"autoresume": True, "save_folder": "runs/x"}, False, id="autoresume"),
        pytest.param({"is_train": True}, False, id="training"),
    ],
)
def test_an_evaluation_names_a_checkpoint(
    tiny: dict[str, Any], keys: dict[str, Any], is_refused: bool
) -> None:
    typed = resolve({**tiny, "is_train": False, **keys})
    if is_refused:
        with pytest.raises(ConfigError, match="is_train=false evaluates a checkpoint; name it"):
            check_evaluates(typed)
    else:
        check_evaluates(typed)


def test_class_names_in_another_order_than_the_descriptions_are_refused(
    synthetic: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["data"] = str(lay_out(synthetic, tmp_path / "set", "folders", 12))
    del tiny["model"]["num_classes"]
    for section in ("train_dataset", "eval_dataset"):
        del tiny[section]["path"]
    names = tmp_path / "names.txt"
    tiny["class_names"] = str(names)
    names.write_text("\n".join(f"Klasse {name}" for name in NAMES))
    assert resolve(tiny).class_names == str(names)
    names.write_text("\n".join(reversed(NAMES)))
    with pytest.raises(ClassError, match=r"names.txt: class 0 is plane, in .*yaml it is sky"):
        resolve(tiny)


def test_a_data_set_may_be_the_folder_in_ade20ks_folder(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    root = Path(tiny["train_dataset"]["path"], "ADEChallengeData2016")
    for section in ("train_dataset", "eval_dataset"):
        tiny[section]["path"] = str(root)
    assert resolve(tiny).train_dataset.path == str(root)
    tiny["train_dataset"]["path"] = str(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no ADEChallengeData2016/images/training"):
        resolve(tiny)


def test_a_logger_is_taken_out_by_null(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny | {"loggers": {"progress_bar": {}, "wandb": None}}, path)
    assert resolve(load(str(path), ["loggers.wandb=null"])).loggers == {"progress_bar": {}}
    left_empty = resolve(load(str(path), [])).loggers
    assert left_empty == {"progress_bar": {}, "wandb": {}}


INTERPOLATIONS = {
    "recipe_name=${oc.env:NOPE}": "recipe_name: .*'NOPE' not found",
    "recipe_name=mild max_duration=${mild.nosuch}": "max_duration: .*'mild.nosuch' not found",
    "max_duration=${max_duration} recipe_name=hot": "max_duration: Recursive interpolation",
    "load_path=${oc.env:NOPE}/x.pt": "load_path: .*'NOPE' not found",
    "seed=${nosuch:1}": "seed: Unsupported interpolation type nosuch",
    "seed=${a": "seed: no viable alternative",
    "seed=???": "seed: Missing mandatory value",
}


@pytest.mark.parametrize("overrides", INTERPOLATIONS)
@pytest.mark.parametrize("where", ["override", "file"])
def test_an_interpolation_that_fails_is_one_line(
    tiny: dict[str, Any], tmp_path: Path, overrides: str, where: str
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    parts = overrides.split()
    if where == "file":
        names = {part.partition("=")[0] for part in parts}
        lines = [line for line in path.read_text().splitlines() if line.split(":")[0] not in names]
        text = "\n".join([*lines, *(part.replace("=", ": ", 1) for part in parts)])
        path.write_text(text)
        parts = []
    with pytest.raises(ConfigError, match=INTERPOLATIONS[overrides]) as caught:
        resolve(load(str(path), parts))
    assert "\n" not in str(caught.value)


def test_a_duration_may_be_taken_from_the_recipe(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny | {"mild": {"max_duration": "7ep"}}, path)
    given = ["recipe_name=mild", "max_duration=${mild.max_duration}"]
    assert resolve(load(str(path), given)).max_duration == "7ep"


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"train_dataset.batch_size: 4 images .* use 3"):
        resolve(tiny)


@pytest.mark.parametrize("text", [None, "a: [1", "- just\n- a list\n"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken.yaml") as caught:
        load(str(path), [])
    assert "\n" not in str(caught.value)


def test_help_names_every_key_of_the_yaml() -> None:
    lines = config.help_text()
    for section, values in OmegaConf.to_container(OmegaConf.load(YAMLS / "deeplabv3.yaml")).items():
        names = values if isinstance(values, dict) and section != "loggers" else [None]
        for name in names:
            assert f"\n  {section}{f'.{name}' if name else ''}" in lines


def test_mcloud_run_trains_deeplabv3_yaml_on_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig.from_file(str(YAMLS / "mcloud_run.yaml"))
    monkeypatch.chdir(YAMLS.parent)
    words = shlex.split(
        string.Template(run.command.replace("\\\n", "")).substitute(run.env_variables)
    )
    assert words[:4] == ["cd", "deeplab", "composer", "main.py"]
    assert words[4] == "yamls/deeplabv3.yaml"
    ours, plain = resolve(load(words[4], words[5:])), load(words[4], [])
    shards = {"is_streaming": True, "path": "s3://my-bucket/ade20k", "local": "/tmp/ade20k"}
    for section in ("train_dataset", "eval_dataset"):
        plain[section] |= shards
    assert ours == resolve(plain)


def test_the_other_yamls_fit_the_schema(synthetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(YAMLS.parent)
    paths = [f"{section}.path={synthetic}" for section in ("train_dataset", "eval_dataset")]
    for name in ("demo.yaml", "camvid.yaml"):
        assert resolve(load(str(YAMLS / name), paths)).run_name == name.removesuffix(".yaml")
