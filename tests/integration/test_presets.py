"""The descriptions in yamls/data, tested on tiny data sets in the layouts of the real ones."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import main as program
from data import build_ade20k_dataspec
from dataset.description import parse_description, read_description
from dataset.mask_decoder import Masks
from dataset.matching import list_splits, require
from extras.preparation import check_command
from tests.support.paths import ROOT
from tests.support.waits import short_measurement  # noqa: F401
from training.config import resolve

PRESETS = ROOT / "yamls" / "data"
SIZE = 40
check = functools.partial(check_command.main, build_dataspec=build_ade20k_dataspec)
RNG = np.random.default_rng(0)


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(small, (SIZE, SIZE)))


def blocks(classes: int) -> np.ndarray:
    """Return random blocks of class indices with -1 along the upper border."""
    index = RNG.integers(0, classes, (5, 5)).repeat(SIZE // 5, 0).repeat(SIZE // 5, 1)
    index[:2] = -1
    return index


def write(path: Path, mask: np.ndarray, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask.astype(np.uint8))
    if palette is not None:
        image.putpalette(palette.astype(np.uint8).ravel().tolist())
    image.save(path)


def cityscapes(root: Path, kind: str = "labelIds") -> dict[str, np.ndarray]:
    """Write `leftImg8bit` and `gtFine` with a folder per city and three kinds of masks."""
    ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 1])
    expected = {}
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("munster",))):
        for city in cities:
            for number in range(3):
                name = f"{split}/{city}/{city}_00000{number}_000019"
                write_image(root / f"leftImg8bit/{name}_leftImg8bit.png")
                index = blocks(19)
                fine = root / f"gtFine/{name}_gtFine_"
                write(Path(f"{fine}labelIds.png"), ids[index])
                write(Path(f"{fine}labelTrainIds.png"), np.where(index < 0, 255, index))
                write(Path(f"{fine}color.png"), np.stack([index + 1] * 3, 2) * [1, 7, 9])
                Path(f"{fine}polygons.json").write_text("{}")
                expected[f"{name}_gtFine_{kind}.png"] = index
    return expected


def voc2012(root: Path) -> dict[str, np.ndarray]:
    """Write images, a list of names per split, and palette masks with 255 for ignored pixels."""
    expected = {}
    palette = RNG.integers(0, 256, (256, 3))
    for number in range(12):
        write_image(root / f"JPEGImages/2007_0000{number:02}.jpg")
        if number < 9:
            index = blocks(21)
            name = f"SegmentationClass/2007_0000{number:02}.png"
            write(root / name, np.where(index < 0, 255, index), palette)
            expected[name] = index
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"2007_0000{n:02}\n" for n in range(6)))
    (lists / "val.txt").write_text("".join(f"2007_0000{n:02}\n" for n in range(6, 9)))
    return expected


def camvid(root: Path) -> dict[str, np.ndarray]:
    """Write masks named `NAME_L.png` in the 32 colours of CamVid."""
    classes = read_description(str(PRESETS / "camvid.yaml"))["classes"]
    colors = [entry["labels"] for entry in classes.values()]
    expected = {}
    for name in [f"0001TP_00{n:04}" for n in range(6)] + [f"Seq05VD_f0{n:04}" for n in range(3)]:
        write_image(root / f"701_StillsRaw_full/{name}.png")
        index = blocks(11)
        mask = np.zeros((SIZE, SIZE, 3), np.uint8)
        for k, choice in enumerate(colors):
            where = index == k
            mask[where] = np.array(choice)[RNG.integers(0, len(choice), where.sum())]
        write(root / f"LabeledApproved_full/{name}_L.png", mask)
        expected[f"LabeledApproved_full/{name}_L.png"] = index
    return expected


def coco_stuff(root: Path) -> dict[str, np.ndarray]:
    """Write masks whose labels are category ids minus one, with 255 for unlabelled pixels."""
    classes = read_description(str(PRESETS / "coco_stuff.yaml"))["classes"]
    values = np.array([entry["labels"] for entry in classes.values()] + [255])
    expected = {}
    for split, count in (("train2017", 6), ("val2017", 3)):
        for number in range(count):
            write_image(root / f"{split}/00000000{number:04}.jpg")
            index = blocks(171)
            write(root / f"stuffthingmaps/{split}/00000000{number:04}.png", values[index])
            expected[f"stuffthingmaps/{split}/00000000{number:04}.png"] = index
    return expected


def coco_panoptic(root: Path) -> dict[str, np.ndarray]:
    """Write masks of segment ids as colours, and a JSON file of segment classes per split."""
    classes = read_description(str(PRESETS / "coco_panoptic.yaml"))["classes"]
    ids = [entry["labels"] for entry in classes.values()]
    expected = {}
    for split, count in (("train2017", 6), ("val2017", 3)):
        annotations = []
        for number in range(count):
            name = f"00000000{number:04}"
            write_image(root / f"{split}/{name}.jpg")
            index = blocks(133)
            segments = np.zeros(index.shape, np.int64)
            infos = []
            # Split each class into a left and a right segment.
            left = np.arange(SIZE) < SIZE // 2
            for k in np.unique(index[index >= 0]).tolist():
                for half in (left, ~left):
                    place = (index == k) & half
                    if place.any():
                        segments[place] = segment = int(RNG.integers(1, 2**24))
                        infos.append({"id": segment, "category_id": ids[k]})
            path = f"annotations/panoptic_{split}/{name}.png"
            write(root / path, np.stack([segments >> shift & 255 for shift in (0, 8, 16)], 2))
            annotations.append({"file_name": f"{name}.png", "segments_info": infos})
            expected[path] = index
        file = root / f"annotations/panoptic_{split}.json"
        file.write_text(json.dumps({"annotations": annotations, "images": [], "categories": []}))
    return expected


SETS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "cityscapes": cityscapes,
    "cityscapes_train_ids": functools.partial(cityscapes, kind="labelTrainIds"),
    "voc2012": voc2012,
    "camvid": camvid,
    "coco_stuff": coco_stuff,
    "coco_panoptic": coco_panoptic,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """Return the root folder and the expected class indices of each data set."""
    roots = {name: tmp_path_factory.mktemp(name) for name in SETS}
    return {name: (root, SETS[name](root)) for name, root in roots.items()}


def test_every_preset_data_set_is_tested() -> None:
    assert {file.stem for file in PRESETS.glob("*.yaml")} == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_preset_decodes_masks_to_expected_class_indices(name: str, sets: dict[str, Any]) -> None:
    root, expected = sets[name]
    description = parse_description(read_description(str(PRESETS / f"{name}.yaml")))
    seen = set()
    for split, count in (("train", 6), ("val", 3)):
        masks = Masks.of(description, split, str(root))
        samples = require(list_splits(description, split, str(root))[split])
        assert len(samples) == count
        for sample in samples:
            index = masks.labels.index()[masks.decode(*content(sample.mask_path))]
            path = str(Path(sample.mask_path).relative_to(root)).removeprefix("gtFine/")
            np.testing.assert_array_equal(index, expected[path])
            seen.add(path)
    assert seen == expected.keys()


def content(path: str) -> tuple[bytes, str]:
    return Path(path).read_bytes(), path


@pytest.mark.parametrize("name", SETS)
def test_check_accepts_every_preset_data_set(
    name: str, sets: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    root = sets[name][0]
    assert check([str(PRESETS / f"{name}.yaml"), str(root), "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"]
    assert report["splits"]["train"]["good_pairs"] == 6
    assert report["splits"]["val"]["good_pairs"] == 3


@pytest.mark.parametrize("name", ["cityscapes", "voc2012", "coco_panoptic", "coco_stuff"])
def test_run_trains_and_evaluates_on_preset_data_set(
    name: str, sets: dict[str, Any], small_network: None
) -> None:
    root = str(sets[name][0])
    dataset = {"path": root, "base_size": 32, "final_size": 32, "batch_size": 2, "num_workers": 0}
    config = {
        "run_name": name,
        "data": str(PRESETS / f"{name}.yaml"),
        "model": {"backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": dataset,
        "eval_dataset": dict(dataset),
        "max_duration": "1ep",
        "precision": "fp32",
        "pictures": 0,
    }
    trainer = program.main(resolve(config))
    trainer.close()
    matrix = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    labelled = SIZE * (SIZE - 2) / SIZE**2  # all pixels except the ignored border
    assert abs(matrix.sum().item() - 3 * 32 * 32 * labelled) <= 3 * 32
    assert trainer.state.timestamp.batch == 3


def rewrite(path: Path, change: Callable[[dict], Any]) -> None:
    annotations = json.loads(path.read_text())
    change(annotations)
    path.write_text(json.dumps(annotations))


def as_rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def resize(path: Path) -> None:
    Image.open(path).resize((SIZE, SIZE // 2)).save(path)


AACHEN = "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
VOC = "SegmentationClass/2007_000003.png"
JSON = "annotations/panoptic_train2017.json"
PANOPTIC = "annotations/panoptic_train2017/000000000002.png"
WRONG: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "missing mask": (
        "cityscapes",
        lambda root: (root / AACHEN).unlink(),
        "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png",
        "its mask is missing; expected gtFine/train/{dir}/{stem}_gtFine_labelIds.png",
    ),
    "train ids instead of ids": (
        "cityscapes",
        lambda root: shutil.copy(root / AACHEN.replace("labelIds", "labelTrainIds"), root / AACHEN),
        AACHEN,
        "5.00% of its pixels have value 255, which the description does not name",
    ),
    "colours instead of ids": (
        "cityscapes",
        lambda root: shutil.copy(root / AACHEN.replace("labelIds", "color"), root / AACHEN),
        AACHEN,
        "the mask contains colours (RGB), but labels are expected",
    ),
    "half unpacked archive": (
        "cityscapes",
        lambda root: shutil.rmtree(root / "gtFine"),
        "gtFine/train/",
        "folder is missing",
    ),
    "lost palette": (
        "voc2012",
        lambda root: as_rgb(root / VOC),
        VOC,
        "the mask contains colours (RGB), but labels are expected",
    ),
    "list with unknown name": (
        "voc2012",
        lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("2007_000007\n2009_1\n"),
        "ImageSets/Segmentation/val.txt:2",
        "has no image named 2009_1",
    ),
    "missing list": (
        "voc2012",
        lambda root: (root / "ImageSets/Segmentation/train.txt").unlink(),
        "ImageSets/Segmentation/train.txt",
        "cannot read the list: No such file or directory",
    ),
    "mask of other size": (
        "voc2012",
        lambda root: resize(root / VOC),
        "JPEGImages/2007_000003.jpg",
        "the image is 40x40, but its mask is 40x20",
    ),
    "image missing in JSON": (
        "coco_panoptic",
        lambda root: rewrite(root / JSON, lambda annotations: annotations["annotations"].pop(2)),
        PANOPTIC,
        "does not list this mask; add its segments",
    ),
    "category of other JSON": (
        "coco_panoptic",
        lambda root: rewrite(
            root / JSON,
            lambda annotations: annotations["annotations"][2]["segments_info"][0].update(
                category_id=12
            ),
        ),
        PANOPTIC,
        "has a segment of category 12, which the description does not name",
    ),
    "segment missing in JSON": (
        "coco_panoptic",
        lambda root: rewrite(
            root / JSON, lambda annotations: annotations["annotations"][2]["segments_info"].pop(0)
        ),
        PANOPTIC,
        "segment ",
    ),
    "JSON of instances": (
        "coco_panoptic",
        lambda root: (root / JSON).write_text('{"annotations": [{"bbox": [1, 2, 3, 4]}]}'),
        JSON,
        "cannot be read as JSON in COCO's panoptic format",
    ),
    "value of other archive": (
        "coco_stuff",
        lambda root: write(
            root / "stuffthingmaps/val2017/000000000001.png", np.full((SIZE, SIZE), 183)
        ),
        "stuffthingmaps/val2017/000000000001.png",
        "100.00% of its pixels have value 183, which the description does not name",
    ),
    "colour of no class": (
        "camvid",
        lambda root: write(
            root / "LabeledApproved_full/0001TP_000002_L.png", np.full((SIZE, SIZE, 3), 7)
        ),
        "LabeledApproved_full/0001TP_000002_L.png",
        "100.00% of its pixels have colour (7, 7, 7), which the description does not name",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_check_names_faulty_file_of_preset_data_set(
    fault: str,
    sets: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    name, spoil, path, reason = WRONG[fault]
    root = Path(shutil.copytree(sets[name][0], tmp_path / "set"))
    spoil(root)
    assert check([str(PRESETS / f"{name}.yaml"), str(root), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    lines = [line.strip() for line in (printed.out + printed.err).splitlines()]
    named = [line for line in lines if line.removeprefix("error: ").startswith(f"{root / path}")]
    assert len(named) == 1 and reason in named[0], lines
