"""Fuzz tests: random configs and flags and damaged files must work or give a one-line error.

By default, each test tries few cases. `pytest tests/fuzz --hypothesis-profile=long` tries twenty
times as many. Both profiles use a fixed seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import convert_ade20k
import convert_dataset
import download_ade20k
import evaluate
import export
import main as program
import predict
from checkpointing.resume import newest_checkpoint
from checkpointing.weights import load_weights, save_weights
from data import build_ade20k_dataspec, check_dataloader
from dataset.decoding import decode_colors, decode_image, decode_image_for_mask, decode_mask
from dataset.description import parse_description, read_description
from dataset.shards import Shards
from errors import ConfigError, DataError, UserError, escape_names
from extras.preparation import check_command
from extras.preparation.synthetic import make
from model import deeplabv3
from predict import Segmenter
from segmentation.classes import load_classes
from tests.support import convert_dataset as annotation_files
from tests.support.paths import ROOT
from training.build_recipe import build_algorithms, build_schedule, check_times
from training.config import help_text, load, resolve
from training.keys import keys_of
from training.schema import Config

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


def one_line(error: BaseException) -> None:
    """Assert that an error message is a single line and not too long."""
    assert str(error).strip()
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 2000


# The bounds of every config key except the data paths.
KEYS = {
    name: [float(bound) for bound in field.metadata["bounds"][1:-1].split(", ")]
    for name, field, _ in keys_of(Config())
    if name not in ("data", "train_dataset.path", "eval_dataset.path")
}


def near(bounds: list[float]) -> SearchStrategy[Any]:
    """Return a Hypothesis strategy for values at and just beside a config key's bounds."""
    finite = [bound for bound in bounds if abs(bound) < float("inf")] or [0.0]
    steps = [0, 1, -1, 1e-9, -1e-9]
    values = [bound + step for bound in finite for step in steps]
    return st.sampled_from([*values, *(int(value) for value in values)])


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**3), 10**3),
    st.sampled_from([2**31, 2**32, 2**63, 10**20, -(10**20)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "1ep", "10ba", "0ba", "-1ep", "9" * 40 + "ep", "1e9", "../x", "~"]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@settings(max_examples=6 * settings.default.max_examples)
@given(st.data())
def test_any_config_value_is_accepted_or_gives_one_line_error(
    tiny: dict[str, Any], data: Any
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=3, unique=True))
    config = OmegaConf.create(tiny)
    for name in names:
        value = data.draw(st.one_of(near(KEYS[name]), ANYTHING))
        try:
            OmegaConf.update(config, name, value, force_add=True)
        except Exception:  # OmegaConf cannot store this value
            assume(False)
    try:
        typed = resolve(config)
        build_algorithms(typed)
        build_schedule(typed)
        check_times(typed, batches_per_epoch=4)
    except UserError as error:
        one_line(error)
        return
    json.dumps(dataclasses.asdict(typed))  # checkpoints store the config as JSON


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)), st.lists(st.text(max_size=12)))
@example("a: &x [*x]", [])
@example("${oops}: 1\nb: ${c}", ["b=${b}"])
@example("", ["="])
def test_random_text_as_config_file_gives_one_line_error(
    tmp_path: Path, text: str | bytes, overrides: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:  # random text never sets the data path
        resolve(load(str(path), overrides))
    one_line(caught.value)


def test_help_shows_every_config_key() -> None:
    text = help_text()
    assert all(f"  {name} " in text for name in KEYS)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "evaluate": evaluate.main,
    "predict": predict.main,
    "export": export.main,
    "convert_ade20k": convert_ade20k.main,
}
FLAGS = ["--size", "--tta", "--slide", "--classes", "--weights", "--out", "--path", "--json"]
FLAGS += [
    "--csv",
    "--protocol",
    "--to",
    "--photo",
    "--card",
    "--scores",
    "--repo",
    "--write",
    "--batch-size",
    "--local",
    "--config",
]
FLAGS += ["--num-workers", "--size-limit", "--compression", "--hashes", "--nonsense"]
WORDS = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(["0", "-1", "999999999999", "nan", "", "/nowhere", "here", "weights", "onnx"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
)


@pytest.mark.parametrize("command", COMMANDS)
@given(words=st.lists(WORDS, max_size=5))
def test_random_flags_give_one_line_error_in_every_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = COMMANDS[command](words)
    except SystemExit as exit:  # raised by argparse
        assert exit.code in (0, 2)
        return
    error = capsys.readouterr().err
    assert status in (1, 2), (status, error)
    assert "Traceback" not in error
    assert error.startswith("error: ") or "error: " in error or "skipped " in error


# The arguments that each command requires; `OPTIONS` lists its optional ones.
BASE: dict[str, str] = {
    "data": "{data} --num-classes 12",
    "convert_ade20k": "--path {data} --out made",
    "convert_dataset": "{marks} --images {images} --out made",
    "evaluate": "{weights} --path {data}",
    "predict": "{weights} {image} --out made",
    "export": "{weights} --to safetensors --out made.safetensors",
    "plan": "{config} --plan --gpu H100",
}
OPTIONS: dict[str, str] = {
    "data": "--num-classes --ignore-label --class-names --workers --picture --suggest --json",
    "convert_ade20k": "--root --out --compression --hashes --size-limit --workers --staging",
    "convert_dataset": "--images --out --val --val-images --masks --background --names --columns"
    " --workers",
    "evaluate": "--path --data --local --config --batch-size --csv --json --classes --size --slide"
    " --device --network",
    "predict": "--out --write --classes --size --slide --device --network",
    "export": "--to --out --repo --licence --scores --photo --size --classes --network --card",
    "plan": "--gpu --gpus --price --images --json",
}
OPTION_VALUES = st.one_of(
    st.sampled_from(["0", "-1", "1", "2", "253", "256", "9" * 18, "nan", "-inf", "1e400", "0.5"]),
    st.sampled_from(["", ".", "/dev/null/x", "here", "{image}", "{weights}", "{data}", "{marks}"]),
    st.sampled_from(["\udcff", "a,b", "s3://", "hf://", "é\n", "--", "cuda:9", "os:system"]),
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=6),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, small_network: None) -> dict[str, str]:
    """Return paths of small valid inputs for the commands."""
    folder = tmp_path_factory.mktemp("inputs")
    make(str(folder / "data"), training=2, validation=2, size=48)
    image_folder = folder / "data/ADEChallengeData2016/images/training"
    names = sorted(os.listdir(image_folder))
    images = [
        {"id": n, "file_name": name, "height": 48, "width": 48} for n, name in enumerate(names)
    ]
    shape = {"category_id": 1, "segmentation": [[4, 4, 30, 4, 30, 30]], "iscrowd": 0}
    marks = {"images": images, "annotations": [shape | {"image_id": n} for n in range(len(names))]}
    marks["categories"] = [{"id": 1, "name": "leaf"}]
    (folder / "marks.json").write_text(json.dumps(marks))
    config = {"eval_dataset": {"final_size": 48}, "model": {"num_classes": 12}}
    state = deeplabv3(12, "resnet50").state_dict()
    save_weights(folder / "weights.safetensors", state, config, load_classes(None, 12))
    run = {"model": {"num_classes": 12, "backbone_arch": "resnet50", "backbone_weights": None}}
    dataset = {"path": str(folder / "data"), "final_size": 32, "batch_size": 2}
    run |= {"train_dataset": dataset, "eval_dataset": dataset, "max_duration": "2ep"}
    (folder / "run.yaml").write_text(json.dumps(run))
    return {
        "data": str(folder / "data"),
        "images": str(image_folder),
        "image": str(image_folder / names[0]),
        "marks": str(folder / "marks.json"),
        "weights": str(folder / "weights.safetensors"),
        "config": str(folder / "run.yaml"),
    }


def call(command: str, words: list[str]) -> int:
    """Run a command in this process; return its exit status."""
    run: dict[str, Callable[[list[str]], int]] = COMMANDS | {
        "data": lambda words: check_command.main(words, build_ade20k_dataspec),
        "convert_dataset": convert_dataset.main,
        "plan": program.run,
    }
    escape_names()
    try:
        return run[command](words)
    except SystemExit as exit:  # raised by argparse
        return int(exit.code or 0)


@pytest.mark.parametrize("command", BASE)
@settings(max_examples=max(settings.default.max_examples // 4, 1))
@given(data=st.data())
def test_any_option_value_is_accepted_or_gives_one_line_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inputs: dict[str, str],
    command: str,
    data: Any,
) -> None:
    """Run each command on valid inputs with random values for one or two of its options."""
    place = Path(tempfile.mkdtemp(dir=tmp_path))  # a separate folder for each case
    monkeypatch.chdir(place)
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    words = BASE[command].split()
    for option in data.draw(st.lists(st.sampled_from(OPTIONS[command].split()), max_size=2)):
        words += [option, data.draw(OPTION_VALUES)]
    words = [word.format(**inputs) if word[:1] == "{" and "}" in word else word for word in words]
    status = call(command, words)
    out, error = capsys.readouterr()
    assert status in (0, 1, 2), (words, status, error)
    assert "Traceback" not in error, (words, error)
    in_report = "problem" in out.lower()  # data.py prints problems in its report
    if status == 2 or (status == 1 and not in_report):
        assert "error: " in error or "skipped " in error, (words, error)


@st.composite
def damage(draw: Any) -> Callable[[bytes], bytes]:
    """Return a function that flips, deletes, repeats, swaps or overwrites bytes of a file."""
    kind = draw(st.sampled_from(["flip", "cut", "repeat", "swap", "overwrite", "head"]))
    place, other = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    bits = draw(st.integers(1, 255))
    text = draw(st.binary(max_size=12))
    count = draw(st.integers(1, 8))

    def change(data: bytes) -> bytes:
        first, second = sorted((int(place * len(data)), int(other * len(data))))
        if kind == "cut":
            return data[:first] + data[second:]
        if kind == "repeat":
            return data[:second] + data[first:second] * count + data[second:]
        if kind == "swap":
            middle = (first + second) // 2
            return data[:first] + data[middle:second] + data[first:middle] + data[second:]
        if kind == "overwrite":
            return data[:first] + text + data[first + len(text) :]
        changed = bytearray(data)
        spots = range(count) if kind == "head" else [first, second]
        for spot in spots:
            if spot < len(changed):
                changed[spot] ^= bits
        return bytes(changed)

    return change


def small_files(folder: Path) -> dict[str, bytes]:
    """Return the content of an image and of masks in common file formats."""
    make(str(folder), training=1, validation=1, size=48)
    root = folder / "ADEChallengeData2016"
    jpeg = next(root.rglob("images/**/*.jpg")).read_bytes()
    mask = next(root.rglob("annotations/**/*.png")).read_bytes()
    content_by_name = {"jpeg": jpeg, "png": mask}
    image = Image.open(io.BytesIO(jpeg))
    for name, mode in {
        "palette.png": "P",
        "grey.tiff": "L",
        "rgb.bmp": "RGB",
        "i.gif": "P",
    }.items():
        data = io.BytesIO()
        image.convert(mode).save(data, name.rpartition(".")[2])
        content_by_name[name] = data.getvalue()
    return content_by_name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return small_files(tmp_path_factory.mktemp("pictures"))


@settings(max_examples=4 * settings.default.max_examples)
@given(st.data(), damage(), st.sampled_from([1, 2, 8]))
def test_damaged_image_is_decoded_or_gives_one_line_error(
    pictures: dict[str, bytes], data: Any, change: Callable[[bytes], bytes], reduction: int
) -> None:
    damaged = change(pictures[data.draw(st.sampled_from(sorted(pictures)))])
    for decode in (
        lambda: decode_image(damaged, reduction),
        lambda: decode_image_for_mask(damaged, (48, 48), reduction),
        lambda: decode_mask(damaged),
        lambda: decode_colors(damaged),
    ):
        try:
            decode()
        except ValueError as error:
            one_line(error)


@pytest.fixture(scope="module")
def weights(
    tmp_path_factory: pytest.TempPathFactory, small_network: None
) -> dict[str, tuple[str, bytes]]:
    """Return the extension and content of each weights file."""
    folder = tmp_path_factory.mktemp("weights")
    network = deeplabv3(12, "resnet50", None, False, True)
    state = network.state_dict()
    save_weights(folder / "a.safetensors", state, {"model": {}}, load_classes(None, 12), "ema")
    save_file({"backbone.conv1.weight": torch.zeros(4)}, folder / "b.safetensors")
    content = {"state": {"model": {f"module.{k}": v for k, v in state.items()}}, "rng": []}
    torch.save(content, folder / "c.pt")
    return {path.name: (path.suffix, path.read_bytes()) for path in folder.iterdir()}


@given(st.data(), damage())
def test_damaged_weights_file_loads_or_gives_one_line_error(
    tmp_path: Path, weights: dict[str, Any], data: Any, change: Callable[[bytes], bytes]
) -> None:
    suffix, content = weights[data.draw(st.sampled_from(sorted(weights)))]
    path = tmp_path / f"harmed{suffix}"
    path.write_bytes(change(content))
    try:
        load_weights(path)
    except UserError as error:
        one_line(error)
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "ep0-ba2-rank0.pt")
    newest_checkpoint(str(folder), str(tmp_path))  # must not raise: damaged checkpoints are skipped


@pytest.mark.parametrize("size", [2**62, 2**33, -1])
def test_wrong_tensor_size_in_safetensors_header_is_rejected(tmp_path: Path, size: int) -> None:
    path = tmp_path / "huge.safetensors"
    header = json.dumps(
        {"backbone.conv1.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(UserError) as caught:
        load_weights(path)
    one_line(caught.value)


@settings(max_examples=settings.default.max_examples // 2)
@given(change=damage())
def test_damaged_onnx_file_loads_or_gives_one_line_error(
    tmp_path: Path, onnx_file: bytes, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "harmed.onnx"
    path.write_bytes(change(onnx_file))
    try:
        Segmenter(path, size=32)
    except UserError as error:
        one_line(error)


@pytest.fixture(scope="module")
def onnx_file(
    tmp_path_factory: pytest.TempPathFactory, small_network: None, weights: dict[str, Any]
) -> bytes:
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "a.safetensors").write_bytes(weights["a.safetensors"][1])
    out = folder / "a.onnx"
    assert export.main([str(folder / "a.safetensors"), "--to", "onnx", "--out", str(out)]) == 0
    return out.read_bytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make(str(folder / "images"), training=4, validation=1, size=48)
    arguments = ["--path", str(folder / "images"), "--out", str(folder / "mds")]
    assert convert_ade20k.main([*arguments, "--size-limit", "10kb"]) == 0
    return folder / "mds"


def read_all(path: Path, cache: Path | None) -> None:
    remote = str(path) if cache is None else f"file://{path}"
    shards = Shards(remote, cache and str(cache), "train", download_retry=0)
    assert len(shards) < 10**6
    for index in range(min(len(shards), 8)):
        shards.read(index)


@given(st.data(), damage(), st.booleans())
def test_damaged_shards_are_read_or_give_one_line_error(
    tmp_path_factory: pytest.TempPathFactory,
    shards: Path,
    data: Any,
    change: Callable[[bytes], bytes],
    cached: bool,
) -> None:
    folder = tmp_path_factory.mktemp("harmed")
    shutil.copytree(shards / "train", folder / "mds" / "train")
    names = sorted(os.listdir(shards / "train"))
    path = folder / "mds" / "train" / data.draw(st.sampled_from(["index.json", *names]))
    path.write_bytes(change(path.read_bytes()))
    try:
        read_all(folder / "mds", folder / "cache" if cached else None)
    except DataError as error:
        one_line(error)
    shutil.rmtree(folder)


PLACES = ["raw_data.basename", "raw_data.bytes", "samples", "column_names", "column_encodings"]
PLACES += ["column_sizes", "format", "version", "raw_data", "hashes", "compression"]


@given(
    st.sampled_from(PLACES),
    st.one_of(
        st.sampled_from(["../../escaped.mds", "/tmp/escaped.mds", "..", "", "a\0b", "x" * 300]),
        st.sampled_from([-1, 0, 2**40, 2**70, None, [], {}, ["uid"], 1.5, True]),
    ),
    st.booleans(),
)
def test_malicious_shard_index_writes_only_into_cache_folder(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, place: str, value: Any, cached: bool
) -> None:
    folder = tmp_path_factory.mktemp("lies") / "deep" / "down"
    shutil.copytree(shards / "train", folder / "mds" / "train")
    path = folder / "mds" / "train" / "index.json"
    index = json.loads(path.read_text())
    entry = index["shards"][0]
    *parents, leaf = place.split(".")
    for parent in parents:
        entry = entry[parent]
    entry[leaf] = value
    path.write_text(json.dumps(index))
    before = {*folder.parent.parent.rglob("*")}
    try:
        read_all(folder / "mds", folder / "cache" if cached else None)
    except DataError as error:
        one_line(error)
    new = {*folder.parent.parent.rglob("*")} - before
    assert all(path.is_relative_to(folder / "cache") for path in new), new
    assert not os.path.exists("/tmp/escaped.mds")
    shutil.rmtree(folder.parent.parent)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["root", "train", "val", "images", "masks", "list", "fraction"]),
                st.sampled_from(["classes", "labels", "color", "ignore", "segments"]),
                st.text(max_size=4),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=2 * settings.default.max_examples)
@given(VALUES, VALUES, VALUES)
def test_any_description_loads_or_gives_one_line_error(
    train: Any, classes: Any, anything: Any
) -> None:
    good = {"train": {"images": "a", "masks": "b"}, "val": {"fraction": 0.5}}
    for raw in (
        {**good, "classes": classes},
        {**good, "classes": {"a": classes, "b": {"labels": 1}}, "ignore": train},
        {**good, "train": train, "classes": {"a": 1, "b": 2}},
        anything,
    ):
        try:
            if isinstance(raw, dict):
                parse_description(raw)
        except ConfigError as error:
            one_line(error)


@given(damage())
def test_damaged_description_file_loads_or_gives_one_line_error(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    example = ROOT / "yamls" / "own.yaml"
    path = tmp_path / "harmed.yaml"
    path.write_bytes(change(example.read_bytes()))
    try:
        parse_description(read_description(str(path)))
    except ConfigError as error:
        one_line(error)


@pytest.mark.parametrize("argument", ["/nowhere", "nothing.yaml", "s3://", "\x01", ""])
def test_invalid_data_set_path_is_rejected_without_traceback(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", argument])
    with pytest.raises(SystemExit) as caught:
        check_dataloader()
    assert caught.value.code in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the annotations of the same two images in the format of each labelling tool."""
    folder = tmp_path_factory.mktemp("annotations")
    (folder / "photos").mkdir()
    for number in range(2):
        cv2.imwrite(str(folder / f"photos/{number}.jpg"), np.zeros((48, 64, 3), np.uint8))
    annotation_files.write_coco(folder / "coco.json", numbers=range(2))
    for kind in ("labelme", "yolo"):
        getattr(annotation_files, f"write_{kind}")(folder / kind)
    annotation_files.write_cvat(folder / "cvat.xml")
    annotation_files.write_panoptic(folder / "panoptic.json")
    return folder


@pytest.mark.parametrize("kind", ["coco.json", "labelme", "cvat.xml", "yolo", "panoptic.json"])
@settings(max_examples=max(settings.default.max_examples // 3, 1))
@given(data=st.data(), change=damage())
def test_damaged_annotations_convert_or_give_one_line_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    annotations: Path,
    kind: str,
    data: Any,
    change: Callable[[bytes], bytes],
) -> None:
    """Damage one annotation file of each labelling tool, then convert it to masks."""
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(annotations, place, dirs_exist_ok=True)
    source = place / kind
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    victim = data.draw(st.sampled_from(files))
    victim.write_bytes(change(victim.read_bytes()))
    words = [str(source), "--images", str(place / "photos"), "--out", str(place / "out")]
    status = call("convert_dataset", words)
    error = capsys.readouterr().err
    assert status in (0, 1) and "Traceback" not in error
    if not (place / "out/data.yaml").exists():
        assert status == 1 and "error: " in error


NAMES = ["ADEChallengeData2016/a.txt", "ADEChallengeData2016/../../escaped", "/tmp/escaped"]
NAMES += [
    "ADEChallengeData2016/images/b.jpg",
    "..",
    "C:\\escaped",
    "other/c",
    "a\\..\\b",
    "x/" * 90,
]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.sampled_from([0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO]),
            st.sampled_from([b"", b"text", b"/etc/passwd", bytes(2**20)]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.one_of(st.none(), damage()),
)
def test_malicious_archive_extracts_only_into_target_folder(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, int, bytes]],
    change: Callable[[bytes], bytes] | None,
) -> None:
    folder = tmp_path_factory.mktemp("archive") / "below"
    folder.mkdir()
    archive = folder / "ade20k.zip"
    with contextlib.suppress(UserWarning), zipfile.ZipFile(archive, "w", 8) as zipped:
        for name, kind, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            zipped.writestr(info, content)
    if change is not None:
        archive.write_bytes(change(archive.read_bytes()))
    target = folder / "ADEChallengeData2016"
    try:
        download_ade20k.extract(archive, target, "0" * 40)
    except download_ade20k.DownloadError as error:
        one_line(error)
        assert not target.exists()
    written_names = {path.name for path in folder.parent.iterdir()} | {
        p.name for p in folder.iterdir()
    }
    assert written_names <= {"below", "ade20k.zip", "ADEChallengeData2016"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("declared", [100, 10**7])
def test_archive_larger_than_free_disk_space_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: int
) -> None:
    """Extract 10 MB of zeros, with the correct size and with a smaller size in the ZIP header."""
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("ADEChallengeData2016/zeros", bytes(10**7))
    assert archive.stat().st_size < 20_000
    size, declared_size = (number.to_bytes(4, "little") for number in (10**7, declared))
    archive.write_bytes(archive.read_bytes().replace(size, declared_size))
    room = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(download_ade20k.DownloadError) as caught:
        download_ade20k.extract(archive, tmp_path / "ADEChallengeData2016", "0" * 40)
    one_line(caught.value)
    assert os.listdir(tmp_path) == ["bomb.zip"]
