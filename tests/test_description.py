"""Data sets as they are: each layout gives the batches of ADE20K's, and what is wrong is named."""

from __future__ import annotations

import functools
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from layouts import COLORS, LAYOUTS, NAMES, lay_out
from PIL import Image

import main as program
from checkpointing.weights import load_weights
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
from dataset.labels import Labels
from dataset.mask_decoder import Masks, UnknownValues
from dataset.matching import find_samples
from errors import ConfigError, DataError, UserError
from extras.preparation import check_command
from extras.preparation.suggest import suggest
from extras.preparation.synthetic import TEXTURES, make
from segmentation.classes import load_classes
from training.config import class_infos, load, resolve

check = functools.partial(check_command.main, build_dataspec=build_ade20k_dataspec)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    make(str(path), training=9, validation=4, size=48, seed=1)  # every class is there
    return path


@pytest.fixture(scope="module")
def laid_out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The description of every layout."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: lay_out(source, root / name, name, len(TEXTURES)) for name in LAYOUTS}


def batches(path: str | Path, split: str, **options: Any) -> list[list[bytes]]:
    """What the loader and the device make of two epochs' batches, to the last bit."""
    spec = build_ade20k_dataspec(
        str(path),
        False,
        None,
        batch_size=3,
        split=split,
        base_size=32,
        final_size=32,
        num_workers=0,
        **options,
    )
    found = []
    for epoch in range(2):
        spec.dataloader.sampler.set_epoch(epoch)
        for batch in spec.dataloader:
            assert batch[1].dtype == torch.uint8
            parts = (*batch, *spec.microbatch_transforms(batch))
            found.append([part.contiguous().numpy().tobytes() for part in parts])
    return found


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_batches_of_ade20ks(
    layout: str, split: str, source: Path, laid_out: dict[str, Path]
) -> None:
    root, description = open_description(str(laid_out[layout]))
    expected = batches(source, split, num_classes=12)
    assert len(expected) == (6 if split == "train" else 4)
    assert batches(root, split, description=description) == expected


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_checked(
    layout: str, laid_out: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    assert check([str(laid_out[layout]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["problems"] and not found["oddities"]
    assert found["splits"]["train"]["good_pairs"] == 9
    assert [entry["name"] for entry in found["splits"]["val"]["classes"]] == NAMES


def tiny_run(description: Any, **more: Any) -> dict[str, Any]:
    dataset = {"base_size": 32, "final_size": 32, "batch_size": 4, "num_workers": 0}
    return {
        "run_name": "described",
        "data": description,
        "model": {"backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": dict(dataset),
        "eval_dataset": dict(dataset),
        "optimizer": {"lr": 0.01},
        "max_duration": "2ep",
        "precision": "fp32",
        "pictures": 0,
        **more,
    }


@pytest.mark.trains
def test_every_layout_trains_evaluates_and_resumes_alike(
    source: Path, laid_out: dict[str, Path], tmp_path: Path, small_network: None
) -> None:
    """Two epochs, one of them cut in the middle; the same bits as from ADE20K's layout."""
    from evaluate import main as evaluate

    def run(name: str, **more: Any) -> tuple[list[float], list[float], Path]:
        folder = tmp_path / name
        config = tiny_run(**more, save_folder=str(folder), save_interval="1ba", autoresume=True)
        if more["description"] is not None:  # as if it were killed after the first batch
            program.main({**config, "max_duration": "1ba"}).close()
        trainer = program.main(config)
        trainer.close()
        weights = [p.double().sum().item() for p in trainer.state.model.parameters()]
        return weights, [float(trainer.state.eval_metric_values["MIoU"])], folder

    plain = {"path": str(source), "base_size": 32, "final_size": 32, "batch_size": 4}
    plain["num_workers"] = 0
    model = {"backbone_arch": "resnet50", "backbone_weights": None, "num_classes": 12}
    expected = run(
        "plain", description=None, model=model, train_dataset=plain, eval_dataset=dict(plain)
    )
    for layout, file in laid_out.items():
        found = run(layout, description=str(file))
        assert found[:2] == expected[:2], layout
        scores = tmp_path / "scores.json"
        checkpoint = str(found[2] / "latest-rank0.pt")
        assert evaluate([checkpoint, "--size", "32", "--json", str(scores)]) == 0
        result = json.loads(scores.read_text())
        assert result["photos"] == 4
        assert [row["class"] for row in result["classes"]] == NAMES
        # What predict.py and export.py draw with.
        description = open_description(str(file))[1]
        assert description is not None
        assert load_weights(checkpoint).classes == list(description.classes)
        by_itself = tmp_path / "by_itself.json"
        arguments = ["--data", str(laid_out["merged"]), "--size", "32", "--json", str(by_itself)]
        assert evaluate([checkpoint, *arguments]) == 0
        assert json.loads(by_itself.read_text())["mIoU"] == result["mIoU"]


def test_the_description_gives_the_config_what_follows(laid_out: dict[str, Path]) -> None:
    config = resolve(tiny_run(str(laid_out["colors"])))
    assert config.model.num_classes == 12
    assert config.train_dataset.path == str(laid_out["colors"].parent)
    infos = class_infos(config)
    assert [info.name for info in infos] == NAMES
    assert [list(info.color) for info in infos] == COLORS[1:13].tolist()
    inline = resolve(tiny_run(config.data))  # as a checkpoint holds it
    assert inline.data == config.data and class_infos(inline) == infos
    assert json.loads(json.dumps(config.data)) == config.data
    elsewhere = tiny_run(str(laid_out["colors"]))
    elsewhere["train_dataset"]["path"] = str(laid_out["folders"].parent)
    assert resolve(elsewhere).train_dataset.path == str(laid_out["folders"].parent)


def test_from_the_command_line(laid_out: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_run(None)))
    described = f"data={laid_out['folders']}"
    assert resolve(load(str(file), [described])).model.num_classes == 12
    own = resolve(load(str(Path(__file__).parent.parent / "yamls" / "own.yaml"), [described]))
    assert own.eval_dataset.path == str(laid_out["folders"].parent) and own.run_name == "own"


def test_shards_hold_the_merged_labels(
    source: Path, laid_out: dict[str, Path], tmp_path: Path
) -> None:
    for layout in ("merged", "colors"):
        out = tmp_path / layout
        assert convert(str(laid_out[layout]), str(out), workers=1) == {"train": 9, "val": 4}
        beside = check_command.find_source(str(out), None, Labels())
        assert beside.path == str(out) and beside.shards is not None
        assert [info.name for info in beside.description.classes] == NAMES
        spec = {"is_streaming": True, "path": str(out)}
        config = tiny_run(str(laid_out[layout]))  # the original's serves as well
        for section in ("train_dataset", "eval_dataset"):
            config[section] |= spec
        given = build_data(resolve(config), "train")
        config["data"] = str(out / "description.yaml")
        assert next(iter(given.dataloader))[1].equal(
            next(iter(build_data(resolve(config), "train").dataloader))[1]
        )
        plain = tiny_run(None)
        plain["model"]["num_classes"] = 12
        for section in ("train_dataset", "eval_dataset"):
            plain[section] |= {"path": str(source)}
        for ours, theirs in zip(
            given.dataloader, build_data(resolve(plain), "train").dataloader, strict=True
        ):
            assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
        # Verified against the description, and done.
        assert convert(str(laid_out[layout]), str(out), workers=1) == {"train": 9, "val": 4}


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """As an archive's from Windows are, unpacked on Linux."""
    make(str(tmp_path / "made"), training=6, validation=2, size=32, seed=1)
    for path in sorted((tmp_path / "made").rglob("*_train_*")):
        target = tmp_path / path.parts[-3] / f"file\udce9 {path.name[-7:]}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    raw = {"root": ".", "train": {"images": "images", "masks": "annotations"}}
    raw |= {"val": {"fraction": 0.4}, **describe_labels(load_classes(None, len(TEXTURES)))}
    (tmp_path / "given.yaml").write_text(as_yaml(raw))
    root, description = open_description(str(tmp_path / "given.yaml"))
    given = batches(root, "train", description=description)
    assert convert(str(tmp_path / "given.yaml"), str(tmp_path / "mds"), workers=1)["train"] >= 3
    options = {"batch_size": 3, "base_size": 32, "final_size": 32, "num_workers": 0}
    spec = build_ade20k_dataspec(
        str(tmp_path / "mds"), True, None, description=description, **options
    )
    for ours, theirs in zip(spec.dataloader, given):
        assert ours[0].contiguous().numpy().tobytes() == theirs[0]


# Masks


def encode(array: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def described(classes: dict[str, Any], ignore: Any = None) -> Masks:
    given = parse_description({"classes": classes, "ignore": ignore})
    return (
        Masks.of(given, "train", "")
        if given.sources
        else Masks(given.labels, given.values, given.in_colors)
    )


def test_more_labels_than_a_byte_holds_are_merged() -> None:
    rng = np.random.default_rng(0)
    assignment = rng.integers(0, 254, 5000)  # of each value: ignored, or one of 253 classes
    assignment[:254] = np.arange(254)
    classes = {f"c{k}": {"labels": np.flatnonzero(assignment == k).tolist()} for k in range(1, 254)}
    masks = described(classes, np.flatnonzero(assignment == 0).tolist())
    values = rng.integers(0, 5000, (64, 80)).astype(np.uint16)
    for suffix in (".png", ".tif"):
        found = pickle.loads(pickle.dumps(masks)).decode(encode(values, suffix))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, assignment[values])
    eight_bits = (values % 256).astype(np.uint8)
    np.testing.assert_array_equal(masks.decode(encode(eight_bits)), assignment[eight_bits])
    with pytest.raises(UnknownValues, match=r"^value 5000 on 0\.02% of its pixels, which is"):
        values[3, 3] = 5000
        masks.decode(encode(values))


def test_every_colour_is_told_from_its_neighbours() -> None:
    rng = np.random.default_rng(1)
    colors = np.unique(rng.integers(0, 256, (300, 3)), axis=0)[:250]
    rng.shuffle(colors)
    classes = {f"c{k}": {"labels": [color]} for k, color in enumerate(colors[1:].tolist())}
    masks = described(classes, [colors[0].tolist()])
    index = rng.integers(0, len(colors), (40, 50))
    picture = Image.fromarray(colors[index].astype(np.uint8))
    with_alpha = picture.copy()
    with_alpha.putalpha(Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)))
    for image in (picture, with_alpha):
        for suffix in ("PNG", "TIFF"):
            file = io.BytesIO()
            image.save(file, suffix)
            np.testing.assert_array_equal(masks.decode(file.getvalue()), index)
    near = np.array(picture)
    near[5, 7] ^= 1
    while pack(*near[5, 7].tolist()) in masks.values:
        near[5, 7, 0] += 1
    with pytest.raises(UnknownValues) as error:
        masks.decode(encode(near[..., ::-1]))
    assert str(error.value).startswith(f"colour {tuple(near[5, 7].tolist())} on 0.05%")


def test_a_palette_is_read_by_index_or_by_colour(tmp_path: Path) -> None:
    index = np.random.default_rng(2).integers(0, 3, (9, 11)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(COLORS.ravel().tolist())
    image.save(tmp_path / "mask.png")
    data = (tmp_path / "mask.png").read_bytes()
    by_index = described({"a": 1, "b": 2}, 0)
    by_color = described({"a": [COLORS[1].tolist()], "b": [COLORS[2].tolist()]}, [[0, 0, 0]])
    np.testing.assert_array_equal(by_index.decode(data), index)
    np.testing.assert_array_equal(by_color.decode(data), index)


@pytest.mark.parametrize("decoder", ["kornia_rs", "torchvision"])
def test_colors_are_decoded_as_pillow_does(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = decoding._fast_decoder()
    assert fast is not decoding._decode_png  # kornia-rs is among what the tests install
    if decoder == "torchvision":
        monkeypatch.setitem(sys.modules, "kornia_rs.io", None)
        fast = decoding._fast_decoder.__wrapped__()
        assert fast is decoding._decode_png
    monkeypatch.setattr(decoding, "_fast_decoder", lambda: fast)
    picture = np.random.default_rng(3).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    expected = picture.astype(int) @ [1, 256, 65536]
    np.testing.assert_array_equal(fast(encode(picture[..., ::-1])), picture)
    np.testing.assert_array_equal(decode_colors(encode(picture[..., ::-1])), expected)
    file = io.BytesIO()  # one of its colours stands for transparent, which is left aside
    Image.fromarray(picture).save(file, "png", transparency=tuple(picture[0, 0].tolist()))
    np.testing.assert_array_equal(decode_colors(file.getvalue()), expected)
    alpha = np.concatenate([picture[..., ::-1], picture[..., :1]], -1)
    np.testing.assert_array_equal(decode_colors(encode(alpha)), expected)
    grey = decode_colors(encode(picture[..., 0]))
    np.testing.assert_array_equal(grey, picture[..., 0].astype(int) * 65793)
    assert unpack(pack(1, 2, 3)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(np.zeros((4, 4, 3), np.uint8), ".jpg"), "a JPEG mask, and JPEG changes colours"),
        (encode(np.zeros((4, 4, 3), np.uint16)), "a mask in colours of 16 bits"),
        (encode(np.zeros((40, 40, 3), np.uint8))[:60], "cannot be decoded|not an image"),
        (b"", "the file is empty"),
    ],
)
def test_masks_that_hold_no_colours_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        described({"a": [[1, 1, 1]], "b": [[2, 2, 2]]}, [[0, 0, 0]]).decode(data)


# What a description may say

GOOD: dict[str, Any] = {
    "train": {"images": "a", "masks": "b"},
    "val": {"fraction": 0.5},
    "classes": {"road": {"labels": [1]}, "car": 2},
    "ignore": [0],
}


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
        (changed("kinds", value={}), "unknown key kinds; known: root, train, val, classes"),
        (changed("train", "folder", value="a"), "train: unknown key folder; known: images, masks"),
        (changed("train", value="photos"), "train is missing; as in train: {images"),
        (changed("train", value={"images": "a"}), "train.masks is missing"),
        (changed("train", "images", value=3), "train.images: 3 is not a path"),
        (changed("val", value=None), "val is missing; as in val: {fraction: 0.15}"),
        (changed("val", "fraction", value=1.5), "fraction stands alone, a number between 0 and 1"),
        (changed("classes", value=["a"]), "classes is missing"),
        (changed("classes", value={"a": 1}), "classes: 1 names are not 2 to 253"),
        (changed("classes", "car", value={"label": 2}), "car: unknown key label; known: labels"),
        (changed("classes", "car", value=None), "classes.car: labels is empty"),
        (changed("classes", "car", value="2"), "car: '2' is neither a mask's value, 0 to 65535"),
        (changed("classes", "car", value=70000), "car: 70000 is neither a mask's value"),
        (changed("classes", "car", value=[[1, 2, 256]]), "car: .1, 2, 256. is neither"),
        (changed("classes", "car", value=[[1, 2, 3]]), "some labels are numbers and some are col"),
        (changed("classes", "car", value=1), "label 1 is in both road and car"),
        (changed("ignore", value=2), "label 2 is in both car and ignore"),
        (
            changed("classes", "car", value={"labels": 2, "color": "red"}),
            "classes.car: color: 'red' is not .red, green, blue.",
        ),
        (changed("root", value=5), "root: 5 is not a folder"),
        ({**GOOD, "classes": {True: 1, "b": 2}}, "classes: True is no name; put it in quotes"),
    ],
)
def test_a_wrong_description_is_one_line(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        parse_description(raw, "my.yaml")
    assert str(error.value).startswith("my.yaml: ") and "\n" not in str(error.value)


def test_a_file_that_is_no_description(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    for text, reason in [
        ("- a", "is not a mapping"),
        ("a: [", "is not YAML"),
        ("classes: {a: 1, a: 2}", "a is there twice, line 1 on"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_description(str(file))
    with pytest.raises(ConfigError, match="cannot read the description"):
        read_description(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="has no root"):
        file.write_text(yaml.safe_dump(GOOD))
        open_description(str(file))


def test_in_a_config(laid_out: dict[str, Path], tmp_path: Path) -> None:
    file = str(laid_out["folders"])
    wrong = [
        ({"data": 7}, "data: 7 is neither a description nor the file of one"),
        ({"model": {"num_classes": 11}}, "model.num_classes: 11, but .* has 12 classes"),
        ({"eval_dataset": {"ignore_label": 3}}, "eval_dataset: ignore_background and ignore_label"),
        ({"train_dataset": {"path": str(tmp_path / "no")}}, "train_dataset.path: no folder"),
    ]
    for change, reason in wrong:
        with pytest.raises(ConfigError, match=reason):
            resolve({**tiny_run(file), **change})


def test_as_yaml_reads_back() -> None:
    described = describe_labels(parse_description(GOOD).classes)
    assert yaml.safe_load(as_yaml({**GOOD, **described})) == {**GOOD, **described}


# Templates and lists


def tree(root: Path, *files: str) -> None:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pairs(root: Path, train: dict[str, str], split: str = "train", **more: Any) -> list[tuple]:
    """Name, photo and mask of each sample, the paths below the root; and what is wrong."""
    raw = {**GOOD, "train": train, "val": train, **more}
    samples, problems = find_samples(parse_description(raw), split, str(root))
    found: list[tuple] = [
        (uid, *(Path(path).relative_to(root).as_posix() for path in rest)) for uid, *rest in samples
    ]
    return found + [(p.path.removeprefix(f"{root}/"), p.reason) for p in problems]


def test_templates(tmp_path: Path) -> None:
    tree(tmp_path, "left/a/1_left.png", "left/a/b/2_left.png", "left/3_left.png", "left/notes.txt")
    tree(tmp_path, "fine/a/1_ids.png", "fine/a/b/2_ids.png", "fine/3_ids.png", "fine/3_color.png")
    expected = [
        ("3", "left/3_left.png", "fine/3_ids.png"),
        ("a/1", "left/a/1_left.png", "fine/a/1_ids.png"),
        ("a/b/2", "left/a/b/2_left.png", "fine/a/b/2_ids.png"),
    ]
    by_dir = {"images": "left/{dir}/{stem}_left.png", "masks": "fine/{dir}/{stem}_ids.png"}
    assert pairs(tmp_path, by_dir) == expected
    by_name = {"images": "left/{name}_left.*", "masks": "./fine/{name}_ids"}
    assert pairs(tmp_path, by_name) == expected
    anywhere = {"images": "left/**/{stem}_left.png", "masks": "fine/**/{stem}_ids.png"}
    assert [row[1:] for row in pairs(tmp_path, anywhere)] == [row[1:] for row in expected]
    part = {"images": "left/{stem}_l*t.png", "masks": "fine/{stem}_ids.png"}
    assert pairs(tmp_path, part)[:1] == expected[:1]
    absolute = {key: str(tmp_path / value) for key, value in by_dir.items()}
    assert pairs(tmp_path, absolute) == expected


def test_a_mask_beside_its_photo_is_no_photo(tmp_path: Path) -> None:
    tree(tmp_path, "1.png", "1_L.png", "2.PNG", "2_L.png")
    assert pairs(tmp_path, {"images": ".", "masks": "{stem}_L.png"}) == [
        ("1", "1.png", "1_L.png"),
        ("2", "2.PNG", "2_L.png"),
    ]


def test_lists(tmp_path: Path) -> None:
    tree(tmp_path, "img/1.jpg", "img/2.jpg", "img/3.jpg", "seg/1.png", "seg/2.png", "seg/3.png")
    source = {"images": "img", "masks": "seg", "list": "train.txt"}
    expected = [("1", "img/1.jpg", "seg/1.png"), ("3", "img/3.jpg", "seg/3.png")]
    for lines in (
        "3\n1\n",
        "\ufeff1\r\n\r\n3\r\n",
        "3.jpg\n\n# no\n1.jpg",
        "img/1.jpg\nimg/3.jpg",
        "/img/1.jpg\n3",
    ):
        (tmp_path / "train.txt").write_text(lines)
        assert pairs(tmp_path, source) == expected
    (tmp_path / "train.txt").write_text("1\n7\n")
    assert pairs(tmp_path, source) == [
        expected[0],
        ("train.txt:2", f"7 is the name of no photo in {tmp_path}/img"),
    ]
    columns = {"list": "train.txt"}
    for lines in (
        "img/1.jpg seg/1.png\nimg/3.jpg\tseg/3.png",
        "/img/3.jpg,seg/3.png\nimg/1.jpg,seg/1.png",
    ):
        (tmp_path / "train.txt").write_text(lines)
        assert pairs(tmp_path, columns) == expected
    (tmp_path / "train.txt").write_text("img/1.jpg seg/9.png\nimg/2.jpg\n")
    assert pairs(tmp_path, columns) == [
        ("train.txt:1", "there is no file seg/9.png"),
        ("train.txt:2", "1 columns; without images, a line is a photo and its mask"),
    ]
    assert pairs(tmp_path, {"list": "none.txt"}) == [
        ("none.txt", "the list cannot be read: No such file or directory")
    ]


def test_what_is_wrong_with_names(tmp_path: Path) -> None:
    tree(tmp_path, "img/1.jpg", "img/2.jpg", "img/a/1.jpg", "seg/1.png", "seg/7.png")
    found = pairs(tmp_path, {"images": "img", "masks": "seg/{stem}.png"})
    assert found == [
        ("1", "img/1.jpg", "seg/1.png"),
        ("img/2.jpg", "its mask is missing, seg/{stem}.png"),
        ("img/a/1.jpg", f"has the same mask as {tmp_path}/img/1.jpg"),
        ("seg/7.png", "its photo is missing"),
    ]
    assert pairs(tmp_path, {"images": "no", "masks": "seg"})[0] == ("no", "folder is missing")
    assert pairs(tmp_path, {"images": "img", "masks": "no"}) == [("no", "folder is missing")]
    nothing = pairs(tmp_path, {"images": "seg/{stem}.jpg", "masks": "seg/{stem}.png"})
    assert "holds no photos of train" in nothing[-1][1]
    with pytest.raises(ConfigError, match=r"train.images: {city} is none of {stem}, {dir}"):
        pairs(tmp_path, {"images": "{city}/{stem}.jpg", "masks": "seg"})


def test_a_fraction_by_name_stays_as_photos_are_added(tmp_path: Path) -> None:
    tree(tmp_path, *(f"img/{i}.jpg" for i in range(400)), *(f"seg/{i}.png" for i in range(400)))
    raw = {**GOOD, "train": {"images": "img", "masks": "seg"}, "val": {"fraction": 0.2}}
    description = parse_description(raw)

    def split() -> list[set[str]]:
        return [
            {sample.uid for sample in find_samples(description, name, str(tmp_path))[0]}
            for name in ("train", "val")
        ]

    train, val = split()
    assert not train & val and len(train | val) == 400
    assert 50 <= len(val) <= 110  # 80, give or take four standard deviations
    tree(tmp_path, *(f"img/{i}.jpg" for i in range(400, 450)))
    tree(tmp_path, *(f"seg/{i}.png" for i in range(400, 450)))
    more_train, more_val = split()
    assert train < more_train and val < more_val


# Planted faults, in the check and at the start of a run


def fault(name: str, layout: str = "folders") -> Callable:
    def mark(function: Callable) -> Callable:
        FAULTS[name] = layout, function
        return function

    return mark


FAULTS: dict[str, tuple[str, Callable[[Path], tuple[str, str]]]] = {}


@fault("a value that nothing names")
def unnamed(root: Path) -> tuple[str, str]:
    mask = root / "labels/train/00000002.png"
    labels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    labels[:1, :2] = 77
    cv2.imwrite(str(mask), labels)
    return "labels/train/00000002.png", "value 77 on 0.09% of its pixels, which is neither"


@fault("a colour that nothing names", "colors")
def unnamed_color(root: Path) -> tuple[str, str]:
    mask = root / "masks/val/00000001.png"
    picture = cv2.imread(str(mask))
    picture[0, 0] = (3, 2, 1)
    cv2.imwrite(str(mask), picture)
    return "masks/val/00000001.png", "colour (1, 2, 3) on 0.04% of its pixels, which is neither"


@fault("no mask", "templates")
def no_mask(root: Path) -> tuple[str, str]:
    (root / "train/00000003_mask.png").unlink()
    return "train/00000003_rgb.jpg", "its mask is missing, train/{stem}_mask.png"


@fault("an unknown name in a list", "lists")
def unknown_name(root: Path) -> tuple[str, str]:
    with open(root / "split/train.txt", "a") as file:
        file.write("00000099\n")
    return "split/train.txt:10", "00000099 is the name of no photo"


@pytest.mark.processes
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(
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


# Suggestions


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_suggestion_needs_no_edit(
    layout: str,
    source: Path,
    laid_out: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    file = tmp_path / "found.yaml"
    folder = laid_out[layout].parent
    assert check([str(folder), str(file), "--suggest", "--workers", "1"]) == 0
    assert file.read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 1000
    assert check([str(file), "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["good_pairs"] == 9
    assert found["splits"]["val"]["good_pairs"] == 4
    root, description = open_description(str(file))
    assert description is not None
    if layout == "merged":  # nothing tells what is to be merged
        assert len(description.classes) == 25
        return
    theirs = open_description(str(laid_out[layout]))[1]
    assert theirs is not None and description.values.keys() == theirs.values.keys()
    assert [v for v, label in description.values.items() if label == 0] == [0]
    if layout not in ("colors", "lists"):  # whose classes, or names, are in another order
        assert batches(root, "train", description=description) == batches(
            source, "train", num_classes=12
        )
    assert check([str(folder), str(file), "--suggest"]) == 1
    assert "found.yaml exists: name another file" in capsys.readouterr().err


def test_suggestions_of_names_splits_and_guesses(tmp_path: Path) -> None:
    colors = np.array([[128, 0, 0], [0, 128, 0], [0, 0, 0]], np.uint8)
    rng = np.random.default_rng(0)
    for number in range(12):
        photo = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        index = rng.integers(0, 2, (3, 3)).repeat(8, 0).repeat(8, 1)
        index[0, :4] = 2
        cv2.imwrite(str(tmp_path / f"img_{number:03}.png"), photo)
        cv2.imwrite(str(tmp_path / f"img_{number:03}_L.png"), colors[index][..., ::-1])
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nwood shed,128,0,0\npond,0,128,0\n")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["train"] == {"images": "{stem}.png", "masks": "{stem}_L.png"}
    assert raw["val"] == {"fraction": 0.15}
    assert set(raw["classes"]) == {"wood shed", "pond"} and raw["ignore"] == [[0, 0, 0]]
    text = suggest(str(tmp_path), 1).text
    assert text.count("# A guess") == 2 and "0.694% of the pixels" in text


@pytest.mark.parametrize(
    ("photo", "reason"), [(b"", "the file is empty"), (None, "the photo is 9x9, its mask 24x24")]
)
def test_a_photo_that_cannot_be_drawn_is_one_line(
    photo: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), rng.integers(0, 256, (24, 24, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.eye(24, dtype=np.uint8))
    grey = rng.integers(0, 256, (9, 9, 2), dtype=np.uint8)  # with alpha, and of no mask
    (tmp_path / "brand").mkdir()
    Image.fromarray(grey).save(tmp_path / "brand/logo.png")
    broken = tmp_path / "1.jpg"
    broken.write_bytes(cv2.imencode(".jpg", grey[..., 0])[1].tobytes() if photo is None else photo)
    given = [str(tmp_path), str(tmp_path / "found.yaml"), "--suggest", "--workers", "1"]
    assert check(given) == 1
    assert capsys.readouterr().err == f"error: {broken}: {reason}\n"


def test_a_suggestion_of_any_name_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "Hof ü 字 \U0001f600 \"#'"
    for number in range(6):
        for kind in ("\U0001f4f7", "ids"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        photo = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(photo).save(folder / f"\U0001f4f7/{number}.jpg")
        Image.fromarray(np.eye(24, dtype=np.uint8)).save(folder / f"ids/{number}.png")
    file = tmp_path / "found.yaml"
    assert check([str(folder), str(file), "--suggest", "--workers", "1"]) == 0
    assert open_description(str(file))[0] == str(folder)


def test_a_suggestion_takes_photos_of_every_extension(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, suffix in enumerate([".jpg", ".JPG", ".png"] * 4):
        for folder in ("photos", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        photo = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
        photo.save(tmp_path / f"photos/{number}{suffix}")
        Image.fromarray(np.eye(24, dtype=np.uint8)).save(tmp_path / f"masks/{number}.png")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["train"] == {"images": "photos/{stem}", "masks": "masks/{stem}.png"}
    photo.save(tmp_path / "photos/logo.jpeg")  # which has no mask
    assert yaml.safe_load(suggest(str(tmp_path), 1).text)["train"] == raw["train"]
    photo.save(tmp_path / "photos/0.png")  # which of the two is it?
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["train"]["images"] in [f"photos/{{stem}}{suffix}" for suffix in (".jpg", ".png")]


def test_what_cannot_be_suggested(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        suggest(str(tmp_path / "none"), 1)
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DataError, match=": 1 images and 0 masks, but no mask has a name"):
        suggest(str(tmp_path), 1)
    (tmp_path / "mine.png").write_bytes(b"a picture of somebody's")
    for name, reason in (("mine.yaml", "mine.png exists"), ("mine", "to write, a .yaml")):
        assert check([str(tmp_path), "--suggest", str(tmp_path / name)]) == 1
        assert reason in capsys.readouterr().err
