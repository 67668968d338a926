"""Tests of dataset/description.py."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from convert_ade20k import convert
from data import build_ade20k_dataspec, build_data
from dataset import decoding
from dataset.decoding import decode_colors
from dataset.description import (
    as_yaml,
    describe_labels,
    open_description,
    pack,
    parse_description,
    read_description,
    unpack,
)
from errors import ConfigError, DataError, UserError
from extras.preparation.synthetic import TEXTURES, make
from segmentation.classes import load_classes
from tests.support.description import (  # noqa: F401
    GOOD,
    batches,
    check,
    described,
    encode,
    laid_out,
    source,
    tiny_run,
)
from tests.support.layouts import COLORS, LAYOUTS, NAMES, lay_out
from tests.support.paths import ROOT
from tests.support.waits import short_measurement  # noqa: F401
from training.config import class_infos, load, resolve


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_folder_layout_gives_the_same_batches_as_ade20k(
    layout: str, split: str, source: Path, laid_out: dict[str, Path]
) -> None:
    root, description = open_description(str(laid_out[layout]))
    expected = batches(source, split, num_classes=12)
    assert len(expected) == (6 if split == "train" else 4)
    assert batches(root, split, description=description) == expected


def test_dataset_description_sets_classes_colours_and_paths(
    laid_out: dict[str, Path],
) -> None:
    config = resolve(tiny_run(str(laid_out["colors"])))
    assert config.model.num_classes == 12
    assert config.train_dataset.path == str(laid_out["colors"].parent)
    infos = class_infos(config)
    assert [info.name for info in infos] == NAMES
    assert [list(info.color) for info in infos] == COLORS[1:13].tolist()
    inline = resolve(tiny_run(config.data))  # checkpoints store the description inline
    assert inline.data == config.data and class_infos(inline) == infos
    assert json.loads(json.dumps(config.data)) == config.data
    elsewhere = tiny_run(str(laid_out["colors"]))
    elsewhere["train_dataset"]["path"] = str(laid_out["folders"].parent)
    assert resolve(elsewhere).train_dataset.path == str(laid_out["folders"].parent)


def test_dataset_description_can_be_set_on_the_command_line(
    laid_out: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_run(None)))
    described = f"data={laid_out['folders']}"
    assert resolve(load(str(file), [described])).model.num_classes == 12
    own = resolve(load(str(ROOT / "yamls" / "own.yaml"), [described]))
    assert own.eval_dataset.path == str(laid_out["folders"].parent) and own.run_name == "own"


def test_file_names_that_are_not_valid_utf_8_are_supported(tmp_path: Path) -> None:
    """Windows archives that are unpacked on Linux can contain such file names."""
    make(str(tmp_path / "made"), training=6, validation=2, size=32, seed=1)
    for path in sorted((tmp_path / "made").rglob("*_train_*")):
        target = tmp_path / path.parts[-3] / f"file\udce9 {path.name[-7:]}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    raw = {"root": ".", "train": {"images": "images", "masks": "annotations"}}
    raw |= {"val": {"fraction": 0.4}, **describe_labels(load_classes(None, len(TEXTURES)))}
    (tmp_path / "given.yaml").write_text(as_yaml(raw))
    root, description = open_description(str(tmp_path / "given.yaml"))
    expected = batches(root, "train", description=description)
    assert convert(str(tmp_path / "given.yaml"), str(tmp_path / "mds"), workers=1)["train"] >= 3
    options = {"batch_size": 3, "base_size": 32, "final_size": 32, "num_workers": 0}
    spec = build_ade20k_dataspec(
        str(tmp_path / "mds"), True, None, description=description, **options
    )
    for ours, theirs in zip(spec.dataloader, expected):
        assert ours[0].contiguous().numpy().tobytes() == theirs[0]


@pytest.mark.parametrize("decoder", ["kornia_rs", "torchvision"])
def test_colour_masks_are_decoded_like_pillow(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = decoding._fast_decoder()
    assert fast is not decoding._decode_png  # kornia-rs is installed for the tests
    if decoder == "torchvision":
        monkeypatch.setitem(sys.modules, "kornia_rs.io", None)
        fast = decoding._fast_decoder.__wrapped__()
        assert fast is decoding._decode_png
    monkeypatch.setattr(decoding, "_fast_decoder", lambda: fast)
    picture = np.random.default_rng(3).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    expected = picture.astype(int) @ [1, 256, 65536]
    np.testing.assert_array_equal(fast(encode(picture[..., ::-1])), picture)
    np.testing.assert_array_equal(decode_colors(encode(picture[..., ::-1])), expected)
    file = io.BytesIO()  # the decoder ignores the transparent colour
    Image.fromarray(picture).save(file, "png", transparency=tuple(picture[0, 0].tolist()))
    np.testing.assert_array_equal(decode_colors(file.getvalue()), expected)
    alpha = np.concatenate([picture[..., ::-1], picture[..., :1]], -1)
    np.testing.assert_array_equal(decode_colors(encode(alpha)), expected)
    grey = decode_colors(encode(picture[..., 0]))
    np.testing.assert_array_equal(grey, picture[..., 0].astype(int) * 65793)
    assert unpack(pack(1, 2, 3)) == (1, 2, 3)


def changed(*keys: str, value: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(GOOD))
    part = raw
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            changed("kinds", value={}),
            "unknown key kinds; the known keys are root, train, val, classes",
        ),
        (
            changed("train", "folder", value="a"),
            "train: unknown key folder; the known keys are images, masks",
        ),
        (changed("train", value="photos"), "train is missing; add it, as in train: {images"),
        (changed("train", value={"images": "a"}), "train.masks is missing"),
        (changed("train", "images", value=3), "train.images: got 3; expected a path"),
        (changed("val", value=None), "val is missing; add it, as in val: {fraction: 0.15}"),
        (
            changed("val", "fraction", value=1.5),
            "fraction must be a number between 0 and 1, and cannot be combined with other keys",
        ),
        (changed("classes", value=["a"]), "classes is missing"),
        (
            changed("classes", value={"a": 1}),
            "classes: the number of classes is 1; list between 2 and 253",
        ),
        (
            changed("classes", "car", value={"label": 2}),
            "car: unknown key label; the known keys are labels",
        ),
        (changed("classes", "car", value=None), "classes.car: labels is empty"),
        (
            changed("classes", "car", value="2"),
            "car: got '2'; expected a mask value from 0 to 65535",
        ),
        (changed("classes", "car", value=70000), "car: got 70000; expected a mask value"),
        (changed("classes", "car", value=[[1, 2, 256]]), "car: got .1, 2, 256.; expected"),
        (changed("classes", "car", value=[[1, 2, 3]]), "some labels are numbers and some are col"),
        (changed("classes", "car", value=1), "road and car both have label 1; remove it"),
        (changed("ignore", value=2), "car and ignore both have label 2; remove it"),
        (
            changed("classes", "car", value={"labels": 2, "color": "red"}),
            "classes.car: color: got 'red'; expected .red, green, blue.",
        ),
        (changed("root", value=5), "root: got 5; expected the path of a folder"),
        (
            {**GOOD, "classes": {True: 1, "b": 2}},
            "classes: the name True is not text; put it in quotes",
        ),
    ],
)
def test_invalid_dataset_description_gives_a_one_line_error(
    raw: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        parse_description(raw, "my.yaml")
    assert str(error.value).startswith("my.yaml: ") and "\n" not in str(error.value)


def test_invalid_dataset_description_file_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    for text, reason in [
        ("- a", "must be a mapping"),
        ("a: [", "cannot parse the description"),
        ("classes: {a: 1, a: 2}", "duplicate key a in the mapping at line 1"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_description(str(file))
    with pytest.raises(ConfigError, match="cannot read the description"):
        read_description(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="root is missing"):
        file.write_text(yaml.safe_dump(GOOD))
        open_description(str(file))


def test_config_conflicting_with_the_dataset_description_is_rejected(
    laid_out: dict[str, Path], tmp_path: Path
) -> None:
    file = str(laid_out["folders"])
    wrong = [
        ({"data": 7}, "data: 7 must be the path of a description"),
        ({"model": {"num_classes": 11}}, "model.num_classes: 11 does not match the 12 classes in "),
        ({"eval_dataset": {"ignore_label": 3}}, "eval_dataset: ignore_background and ignore_label"),
        ({"train_dataset": {"path": str(tmp_path / "no")}}, "path: cannot find the folder .*no;"),
    ]
    for change, reason in wrong:
        with pytest.raises(ConfigError, match=reason):
            resolve({**tiny_run(file), **change})


def test_dataset_description_round_trips_through_yaml() -> None:
    described = describe_labels(parse_description(GOOD).classes)
    assert yaml.safe_load(as_yaml({**GOOD, **described})) == {**GOOD, **described}


def fault(name: str, layout: str = "folders") -> Callable:
    def mark(function: Callable) -> Callable:
        FAULTS[name] = layout, function
        return function

    return mark


FAULTS: dict[str, tuple[str, Callable[[Path], tuple[str, str]]]] = {}


@fault("unknown value")
def unknown_value(root: Path) -> tuple[str, str]:
    mask = root / "labels/train/00000002.png"
    labels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    labels[:1, :2] = 77
    cv2.imwrite(str(mask), labels)
    return "labels/train/00000002.png", "0.09% of its pixels have value 77, which"


@fault("unknown colour", "colors")
def unknown_color(root: Path) -> tuple[str, str]:
    mask = root / "masks/val/00000001.png"
    picture = cv2.imread(str(mask))
    picture[0, 0] = (3, 2, 1)
    cv2.imwrite(str(mask), picture)
    return "masks/val/00000001.png", "0.04% of its pixels have colour (1, 2, 3), which"


@fault("missing mask", "templates")
def missing_mask(root: Path) -> tuple[str, str]:
    (root / "train/00000003_mask.png").unlink()
    return "train/00000003_rgb.jpg", "its mask is missing; expected train/{stem}_mask.png"


@fault("unknown name in a list", "lists")
def unknown_name(root: Path) -> tuple[str, str]:
    with open(root / "split/train.txt", "a") as file:
        file.write("00000099\n")
    return "split/train.txt:10", f"{root}/JPEGImages has no image named 00000099"


@pytest.mark.parametrize("name", FAULTS)
def test_dataset_error_names_the_faulty_file(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    layout, plant = FAULTS[name]
    file = lay_out(source, tmp_path / layout, layout, 12)
    path, reason = plant(file.parent)
    assert check([str(file), "--workers", "1", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["path"] == str(file.parent / path) and problem["reason"].startswith(reason)
    split = "val" if "/val/" in path else "train"
    with pytest.raises(UserError) as error:
        build_data(resolve(tiny_run(str(file))), split)
    assert reason in str(error.value) and path in str(error.value)
    with pytest.raises(DataError):
        convert(str(file), str(tmp_path / "shards"), workers=1)
