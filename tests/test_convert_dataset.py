"""What labelling tools write becomes masks that are those drawn independently."""

from __future__ import annotations

import argparse
import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from matplotlib.path import Path as Outline
from PIL import Image
from run_helpers import file_limit

import convert_dataset
from dataset.decoding import decode_image
from dataset.description import open_description
from dataset.mask_decoder import Masks
from dataset.matching import list_described
from errors import DataError
from extras.preparation import check_command, converters
from extras.preparation.annotation_formats import read_annotations
from extras.preparation.annotations import Shape, draw, photo_size

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.processes

SIZE = (48, 64)  # height and width
NAMES = ["road", "car", "pole"]
COUNT = 8


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        small = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), cv2.resize(small, SIZE[::-1]))
    return folder


def scene(number: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Boxes (left, top, right, bottom) of classes: a large one, and two on it and each other."""
    rng = np.random.default_rng(number)
    found = []
    for name, size in (("road", 30), ("car", 14), ("pole", 6)):
        left, top = rng.integers(0, (SIZE[1] - size, SIZE[0] - size)).tolist()
        found.append((name, (left, top, left + size, top + size)))
    # In the file the smallest is first, and would be covered.
    return found[::-1]


def expected(number: int, by_area: bool = True) -> np.ndarray:
    """Each pixel's class: 0 is the background."""
    mask = np.zeros(SIZE, np.uint8)
    boxes = scene(number)
    for name, (left, top, right, bottom) in boxes[::-1] if by_area else boxes:
        mask[top:bottom, left:right] = 1 + NAMES.index(name)
    return mask


def corners(box: tuple[int, int, int, int]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def columns(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, by columns and from 0."""
    runs, last = [0], 0
    for value in mask.T.ravel().tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def box_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros(SIZE, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def write_coco(file: Path, run_lengths: bool = False, numbers: range = range(COUNT)) -> Path:
    height, width = SIZE
    annotations = []
    for number in numbers:
        for name, box in scene(number):
            outline: Any = [corners(box)]
            if run_lengths:
                outline = {"size": list(SIZE), "counts": columns(box_mask(box))}
            entry = {"image_id": number, "category_id": 10 + NAMES.index(name)}
            annotations.append(entry | {"segmentation": outline, "iscrowd": int(run_lengths)})
    images = [{"id": n, "file_name": f"{n}.jpg", "height": height, "width": width} for n in numbers]
    categories = [{"id": 10 + k, "name": name} for k, name in enumerate(NAMES)]
    found = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(found))
    return file


def write_labelme(folder: Path) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        shapes = [
            {"label": name, "shape_type": "rectangle", "points": [box[:2], box[2:]]}
            if name == "car"
            else {"label": name, "points": np.reshape(corners(box), (-1, 2)).tolist()}
            for name, box in scene(number)
        ] + [{"label": "road", "shape_type": "point", "points": [[1, 1]]}]
        found = {"imagePath": f"..\\photos\\{number}.jpg", "imageData": None, "shapes": shapes}
        found |= {"imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (folder / f"{number}.json").write_text(json.dumps(found))
    return folder


def write_cvat(file: Path) -> Path:
    """A polygon, a box, and run lengths by rows within a box."""
    images = []
    for number in range(COUNT):
        shapes = []
        for level, (name, box) in enumerate(scene(number)):
            left, top, right, bottom = box
            more = f'label="{name}" z_order="{level}"'
            if name == "road":
                points = ";".join(f"{x},{y}" for x, y in np.reshape(corners(box), (-1, 2)))
                shapes.append(f'<polygon points="{points}" {more}/>')
            elif name == "car":
                sides = f'xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"'
                shapes.append(f"<box {sides} {more}/>")
            else:
                place = f'left="{left - 1}" top="{top}" width="{right - left + 1}"'
                row = f"1,{right - left}"
                runs = ",".join([row] * (bottom - top))
                shapes.append(f'<mask rle="{runs}" {place} height="{bottom - top}" {more}/>')
        attributes = f'id="{number}" name="{number}.jpg" width="{SIZE[1]}" height="{SIZE[0]}"'
        images.append(f"<image {attributes}>{''.join(shapes)}</image>")
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    file.write_text(f"<annotations><meta>{labels}</meta>{''.join(images)}</annotations>")
    return file


def write_yolo(folder: Path) -> Path:
    folder.mkdir()
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": dict(enumerate(NAMES))}))
    for number in range(COUNT):
        lines = []
        for name, box in scene(number):
            shares = np.reshape(corners(box), (-1, 2)) / SIZE[::-1]
            values = " ".join(f"{share:.10f}" for share in shares.ravel())
            lines.append(f"{NAMES.index(name)} {values}\n")
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def write_panoptic(file: Path) -> Path:
    folder = file.with_suffix("")
    folder.mkdir()
    annotations = []
    for number in range(COUNT):
        labels = expected(number)
        numbers = np.array([0, 70000 + number, 300, 7])
        ids = numbers[labels]
        picture = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], 2).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        infos = [
            {"id": int(numbers[k]), "category_id": 10 + k - 1}
            for k in np.unique(labels).tolist()
            if k
        ]
        annotations.append({"file_name": f"{number}.png", "segments_info": infos})
    categories = [{"id": 10 + k, "name": name} for k, name in enumerate(NAMES)]
    file.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    return file


def masks_of(out: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the classes, and each photo's class indices, -1 where ignored."""
    root, description = open_description(str(out / "data.yaml"))
    assert description is not None
    found = {}
    for split in ("train", "val"):
        masks = Masks.of(description, split, root)
        for sample in list_described(description, split, root):
            content = Path(sample.mask_path).read_bytes()
            name = f"{Path(sample.image_path).parent.name}/{Path(sample.image_path).stem}"
            found[name] = masks.labels.index()[masks.decode(content, sample.mask_path)]
    return [info.name for info in description.classes], found


def convert(*arguments: Any) -> int:
    return convert_dataset.main([*map(str, arguments), "--workers", "1"])


SOURCES = {
    "coco": lambda folder: write_coco(folder / "instances.json"),
    "coco-rle": lambda folder: write_coco(folder / "instances.json", run_lengths=True),
    "labelme": lambda folder: write_labelme(folder / "labelled"),
    "cvat": lambda folder: write_cvat(folder / "annotations.xml"),
    "yolo": lambda folder: write_yolo(folder / "labels"),
}


@pytest.mark.parametrize("overlap", ["area", "order"])
@pytest.mark.parametrize("tool", SOURCES)
def test_masks_are_those_drawn_independently(
    tool: str, overlap: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, out = SOURCES[tool](tmp_path), tmp_path / "out"
    arguments = ["--images", photos, "--out", out, "--val", "0.4", "--overlap", overlap]
    assert convert(source, *arguments) == 0
    printed = capsys.readouterr()
    assert "no problem: this can be trained on" in printed.out
    assert "pixels without a shape are of class background" in printed.err
    assert ("because they have no area" in printed.err) == (tool == "labelme")
    names, masks = masks_of(out)
    assert len(masks) == COUNT and sorted(names) == sorted(["background", *NAMES])
    ours = np.array([names.index(name) for name in ["background", *NAMES]])
    for number in range(COUNT):
        drawn = expected(number, overlap == "area")
        np.testing.assert_array_equal(masks[f"train/{number}"], ours[drawn])


def test_panoptic(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_panoptic(tmp_path / "panoptic.json")
    arguments = ["--images", photos, "--val", source, "--out"]
    assert convert(source, *arguments, tmp_path / "out") == 0
    assert "pixels without a shape are ignored" in capsys.readouterr().err
    names, masks = masks_of(tmp_path / "out")
    assert names == NAMES and len(masks) == 2 * COUNT
    for number in range(COUNT):
        for split in ("train", "val"):
            np.testing.assert_array_equal(
                masks[f"{split}/{number}"], expected(number).astype(int) - 1
            )
    assert convert(source, *arguments, tmp_path / "with", "--background", "other") == 0
    names, masks = masks_of(tmp_path / "with")
    assert names == ["other", *NAMES]
    np.testing.assert_array_equal(masks["train/3"], expected(3))


def test_a_validation_file_of_its_own(photos: Path, tmp_path: Path) -> None:
    train = write_coco(tmp_path / "train.json", numbers=range(5))
    val = write_coco(tmp_path / "val.json", numbers=range(5, COUNT))
    arguments = ["--images", photos, "--val", val, "--out", tmp_path / "out"]
    assert convert(train, *arguments, "--background", "ignore") == 0
    names, masks = masks_of(tmp_path / "out")
    assert names == NAMES
    assert sorted(masks) == [f"train/{n}" for n in range(5)] + [f"val/{n}" for n in range(5, COUNT)]
    np.testing.assert_array_equal(masks["val/6"], expected(6).astype(int) - 1)
    assert (tmp_path / "out/photos/train/0.jpg").stat().st_nlink > 1  # no copies


def test_slanted_outlines_differ_at_the_edge_alone() -> None:
    """COCO's rule and a point's being inside: the same but for pixels that the outline touches."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        points = np.array([32, 24]) + 20 * np.stack([np.cos(angles), np.sin(angles)], 1)
        mask = draw([Shape("a", [points.ravel().tolist()])], SIZE, {"a": 1}, True)
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        centers = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], 1)
        inside = Outline(points).contains_points(centers).reshape(SIZE)
        edge = np.zeros(SIZE, np.uint8)
        shifted = np.round((points - 0.5) * 256).astype(np.int32)
        cv2.polylines(edge, [shifted], True, 1, thickness=2, shift=8)
        edge = cv2.dilate(edge, np.ones((3, 3), np.uint8))
        assert inside.sum() > 200
        np.testing.assert_array_equal(mask[edge == 0], inside[edge == 0])


def test_cvats_turned_boxes_and_ellipses(photos: Path, tmp_path: Path) -> None:
    """CVAT writes them as they were before they were turned clockwise, by `rotation` degrees."""
    (tmp_path / "turned.xml").write_text(
        '<annotations><image name="0.jpg" width="64" height="48">'
        '<box label="road" xtl="4" ytl="20" xbr="28" ybr="26" rotation="30.00"/>'
        '<ellipse label="car" cx="48" cy="24" rx="12" ry="4" rotation="330"/>'
        "</image></annotations>"
    )
    arguments = ["--images", photos, "--out", tmp_path / "out"]
    convert(tmp_path / "turned.xml", *arguments)  # one photo is too few to train on
    _, description = open_description(str(tmp_path / "out/data.yaml"))
    assert description is not None
    names = [info.name for info in description.classes]
    drawn = cv2.imread(str(tmp_path / "out/masks/train/0.png"), cv2.IMREAD_UNCHANGED)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for name, middle, degrees, inside in (
        ("road", (16, 23), 30, lambda u, v: (abs(u) < 12) & (abs(v) < 3)),
        ("car", (48, 24), -30, lambda u, v: (u / 12) ** 2 + (v / 4) ** 2 < 1),
    ):
        along = np.exp(1j * np.radians(degrees))  # the first axis, y being downwards
        at = (x - middle[0] + 1j * (y - middle[1])) / along
        expected = inside(at.real, at.imag)
        wrong = (drawn == names.index(name)) != expected
        assert expected.sum() > 100 and wrong.sum() < 0.15 * expected.sum()


def test_a_photo_is_found_by_its_whole_name(photos: Path, tmp_path: Path) -> None:
    """Not what is beside it and called as it is, with one more extension."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for photo in photos.iterdir():
        cv2.imwrite(str(folder / f"{photo.name}.png"), np.zeros(SIZE, np.uint8))
    source = write_coco(tmp_path / "instances.json")
    assert convert(source, "--images", folder, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out/photos/train").iterdir()) == sorted(
        path.name for path in photos.iterdir()
    )


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_photos_size_is_that_of_a_viewer(suffix: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = tmp_path / f"photo{suffix}"
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(photo, exif=exif)
    assert photo_size(photo) == decode_image(photo.read_bytes()).shape[:2]


def test_labelmes_masks(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What LabelMe's AI draws: a picture of the box between two corners, both within it."""
    source = write_labelme(tmp_path / "labelled")
    for number in range(COUNT):
        file = source / f"{number}.json"
        found = json.loads(file.read_text())
        (pole, *_) = found["shapes"]
        left, top, right, bottom = dict(scene(number))["pole"]
        picture = io.BytesIO()
        Image.fromarray(np.ones((bottom - top, right - left), np.uint8)).save(picture, "PNG")
        pole["mask"] = base64.b64encode(picture.getvalue()).decode()
        pole |= {"shape_type": "mask", "points": [[left, top], [right - 1.0, bottom - 1.0]]}
        found["shapes"][2]["shape_type"] = None  # a polygon, as in old files
        file.write_text(json.dumps(found))
    assert convert(source, "--images", photos, "--out", tmp_path / "out") == 0
    assert f"because they have no area: {COUNT} (" in capsys.readouterr().err
    names, masks = masks_of(tmp_path / "out")
    ours = np.array([names.index(name) for name in ["background", *NAMES]])
    for number in range(COUNT):
        np.testing.assert_array_equal(masks[f"train/{number}"], ours[expected(number)])
    found["shapes"][0]["mask"] = "none"
    file.write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"7\.json: cannot identify image file"):
        read_annotations(str(source))


def test_yolos_classes_go_by_their_numbers(photos: Path, tmp_path: Path) -> None:
    source = write_yolo(tmp_path / "labels")
    for line in (source / "0.txt").read_text().splitlines():
        with (source / "1.txt").open("a") as file:
            file.write(f"{int(line[0]) + 3}{line[1:]}\n")
    with (source / "1.txt").open("a") as file:
        file.write("\n \n")  # blank lines are none
    (source / "data.yaml").write_text("names: {4: bus, 5: sign, 2: pole, 0: road, 3: lane, 1: car}")
    found = read_annotations(str(source))
    assert found.classes == ["road", "car", "pole", "lane", "bus", "sign"]
    names = [shape.name for shape in found.photos[1].shapes]
    assert names == [name for name, _ in scene(1)] + ["sign", "bus", "lane"]
    (tmp_path / "names.txt").write_text("\ufeffroad\r\ncar\r\n")  # as Windows' editor writes it
    assert converters.read_names(str(tmp_path / "names.txt")) == ["road", "car"]
    assert list(converters.read_names(str(source / "data.yaml"))) == [0, 1, 2, 3, 4, 5]
    for number in ("-1", "6"):
        (source / "1.txt").write_text(f"{number} 0 0 0 1 1 1")
        with pytest.raises(DataError, match=f"1.txt: class {number} is none of the 6 with a name"):
            read_annotations(str(source))


def test_hugging_face(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")

    def rows(numbers: range) -> Any:
        pictures = [Image.open(photos / f"{number}.jpg") for number in numbers]
        labels = [Image.fromarray(expected(number)) for number in numbers]
        columns = {"pixel_values": pictures, "label": labels}
        return datasets.Dataset.from_dict(
            columns,
            features=datasets.Features(
                {"pixel_values": datasets.Image(), "label": datasets.Image()}
            ),
        )

    saved = tmp_path / "saved"
    whole = datasets.DatasetDict({"train": rows(range(5)), "validation": rows(range(5, COUNT))})
    whole.save_to_disk(str(saved))
    names = {0: "background", 1: "road", 2: "car", 3: "pole"}
    (saved / "id2label.json").write_text(json.dumps(names))
    assert convert(f"hf://{saved}", "--out", tmp_path / "out") == 0
    assert "no problem" in capsys.readouterr().out
    found, masks = masks_of(tmp_path / "out")
    assert found == list(names.values()) and len(masks) == COUNT
    for number in range(COUNT):
        split, row = ("train", number) if number < 5 else ("val", number - 5)
        np.testing.assert_array_equal(masks[f"{split}/{row:08}"], expected(number))
        kept = tmp_path / f"out/photos/{split}/{row:08}.jpg"
        assert kept.read_bytes() == (photos / f"{number}.jpg").read_bytes()

    # Both become validation, and neither may overwrite the other's files.
    shared = tmp_path / "shared"
    halves = {"validation": rows(range(5)), "test": rows(range(5, COUNT))}
    datasets.DatasetDict(halves).save_to_disk(str(shared))
    options = argparse.Namespace(source=f"hf://{shared}", names=None, columns=None, ignore=set())
    converters.convert_hugging_face(options, tmp_path / "both")
    kept = sorted((tmp_path / "both/photos/val").iterdir())
    assert [file.read_bytes() for file in kept] == [
        (photos / f"{number}.jpg").read_bytes() for number in range(COUNT)
    ]

    (tmp_path / "names.txt").write_text("\n".join(names.values()))
    arguments = f"hf://{saved}", "--names", tmp_path / "names.txt", "--out", tmp_path / "named"
    assert convert(*arguments) == 0
    assert masks_of(tmp_path / "named")[0] == list(names.values())
    for text in ('{"road": 1}', "[]", "{"):
        (saved / "id2label.json").write_text(text)
        capsys.readouterr()
        assert convert(f"hf://{saved}", "--out", tmp_path / "refused") == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {saved}/id2label.json: not of a format that is known")
        assert not (tmp_path / "refused/photos").exists()


def test_what_cannot_be_converted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(source: Any, reason: str, *more: Any) -> None:
        arguments = [source, "--images", photos, "--out", tmp_path / "out", *more]
        assert convert(*arguments) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("error: ") and reason in line

    coco = write_coco(tmp_path / "instances.json")
    refused(tmp_path / "none.json", "No such file")
    refused(coco, "--images: there is no folder", "--images", tmp_path / "none")
    (tmp_path / "other.json").write_text('{"a": 1}')
    refused(tmp_path / "other.json", "'categories' is missing: not of a format that is known")
    (tmp_path / "other.xml").write_text("<annotation><size/></annotation>")
    refused(tmp_path / "other.xml", "it holds no <image>")
    for tool, name, text, reason in (
        ("labelme", "3.json", '{"shapes"', "not of a format that is known (Expecting"),
        ("labelme", "3.json", '{"imageHeight": 9, "imageWidth": 9}', "'shapes' is missing"),
        ("yolo", "3.txt", "0 0 0 0 1 1 x", "not of a format that is known (could not"),
    ):
        (tmp_path / tool).mkdir(exist_ok=True)
        folder = SOURCES[tool](tmp_path / tool)
        (folder / name).write_text(text)
        refused(folder, f"error: {folder / name}: {reason}")
        shutil.rmtree(tmp_path / tool)
    found = json.loads(coco.read_text())
    found["images"][0]["file_name"] = "elsewhere.jpg"
    (tmp_path / "renamed.json").write_text(json.dumps(found))
    refused(tmp_path / "renamed.json", "names elsewhere.jpg, not in")
    found = json.loads(coco.read_text())
    found["images"][2]["width"] = 65
    (tmp_path / "wide.json").write_text(json.dumps(found))
    refused(tmp_path / "wide.json", "2.jpg: is 64x48, its annotation of (65, 48)")
    assert not (tmp_path / "out").exists()  # a failed conversion leaves nothing
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    refused(coco, "out is there already: delete it, or use another --out")
    shutil.rmtree(tmp_path / "out")
    for key, names in (("images", "0.jpg and of 1.jpg"), ("categories", "road and of car")):
        found = json.loads(coco.read_text())  # as files that were put together without new ids
        found[key][1]["id"] = found[key][0]["id"]
        (tmp_path / "twice.json").write_text(json.dumps(found))
        refused(tmp_path / "twice.json", f"(id {found[key][0]['id']} is of {names})")


@pytest.mark.parametrize("other", ["3.png", "3.JPG"])
def test_two_photos_with_one_mask_are_refused(
    other: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Their masks would both be 3.png."""
    shutil.copytree(photos, tmp_path / "photos")
    cv2.imwrite(str(tmp_path / "photos" / other.replace("JPG", "bmp")), np.zeros((48, 64, 3)))
    if other == "3.JPG":
        (tmp_path / "photos/3.bmp").rename(tmp_path / "photos/3.JPG")
    coco = json.loads(write_coco(tmp_path / "instances.json").read_text())
    twin = next(image for image in coco["images"] if image["file_name"] == "3.jpg")
    coco["images"].append(twin | {"id": 99, "file_name": other})
    shapes = [shape for shape in coco["annotations"] if shape["image_id"] == twin["id"]]
    coco["annotations"] += [
        shape | {"id": 900 + number, "image_id": 99} for number, shape in enumerate(shapes)
    ]
    (tmp_path / "twins.json").write_text(json.dumps(coco))
    arguments = [tmp_path / "twins.json", "--images", tmp_path / "photos"]
    assert convert(*arguments, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/photos/{other}" in error and "would have the same mask" in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_data_set(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    coco = write_coco(tmp_path / "instances.json")
    with file_limit(50):
        arguments = [coco, "--images", photos, "--out", tmp_path / "out", "--workers", "1"]
        assert convert(*arguments) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/out/masks/train/") and "File too large" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instances.json"]


def square(left: int, top: int, side: int) -> np.ndarray:
    """Corners of a square, (4, 2)."""
    return np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * side + (left, top)


def drawn(*squares: tuple[tuple[int, int, int], int]) -> np.ndarray:
    """A mask of squares with their values, the later on the earlier."""
    mask = np.zeros(SIZE, np.uint8)
    for (left, top, side), value in squares:
        mask[top : top + side, left : left + side] = value
    return mask


ROAD, CAR, EDGE = (4, 4, 30), (8, 8, 12), (24, 24, 8)


def yolo_line(kind: int, box: tuple[int, int, int]) -> str:
    shares = (square(*box) / SIZE[::-1]).ravel()
    return f"{kind} {' '.join(f'{share:.8f}' for share in shares)}\n"


@pytest.mark.parametrize("given", ["folder", "labels", "data.yaml", "names"])
@pytest.mark.parametrize("layout", ["ultralytics", "roboflow"])
def test_yolo_as_others_lay_it_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, layout: str, given: str
) -> None:
    root = tmp_path / "set"
    for number in range(COUNT):
        split = "train" if number < 5 else "val" if layout == "ultralytics" else "valid"
        folders = {
            "ultralytics": (f"images/{split}", f"labels/{split}"),
            "roboflow": (f"{split}/images", f"{split}/labels"),
        }[layout]
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"{number}.jpg", root / folders[0] / f"{number}.jpg")
        text = yolo_line(0, ROAD) + yolo_line(1, CAR) if number else ""  # the first is empty
        (root / folders[1] / f"{number}.txt").write_text(text)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [road, car]\n")
    (root / "README.roboflow.txt").write_text("This data set was exported on a Monday\n")
    (root / "train.txt").write_text("./images/train/0.jpg\n./images/train/1.jpg\n")
    has_labels = layout == "ultralytics" and given in ("labels", "names")
    source = root / {"data.yaml": "data.yaml"}.get(given, "labels" if has_labels else "")
    more = ["--names", root / "data.yaml"] if given == "names" else []
    out = tmp_path / "out"
    assert convert(source, "--images", root, "--out", out, *more) == 0
    left_out = capsys.readouterr().err
    if not has_labels:
        assert "README.roboflow.txt: a text file that labels no image" in left_out
    names, masks = masks_of(out)
    assert names == ["background", "road", "car"]
    whole = drawn((ROAD, 1), (CAR, 2))
    for split, numbers in {"train": range(5), "val": range(5, COUNT)}.items():
        stems = sorted(path.stem for path in (out / "photos" / split).rglob("*.jpg"))
        assert stems == [str(number) for number in numbers]
    assert len(masks) == COUNT
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, np.zeros(SIZE) if name.endswith("/0") else whole)


def labelme(folder: Path, shapes: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        found = {"imagePath": f"{number}.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (folder / f"{number}.json").write_text(json.dumps({**found, "shapes": shapes}))
    return folder


def shape(label: str, kind: str, points: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": np.asarray(points).tolist()}


@pytest.mark.parametrize(
    ("shapes", "names", "mask"),
    [
        pytest.param(
            [
                shape("road", "polygon", square(*ROAD)),
                shape("_background_", "polygon", square(*CAR)),
                shape("__ignore__", "polygon", square(*EDGE)),
            ],
            ["background", "road"],
            drawn((ROAD, 1), (CAR, 0), (EDGE, 255)),
            id="reserved names",
        ),
        pytest.param(
            [
                shape("road", "rectangle", square(*ROAD)),
                shape("car", "rotation", square(*CAR)),
                shape("car", "linestrip", [[0, 0], [3, 3]]),
            ],
            ["background", "car", "road"],
            drawn((ROAD, 2), (CAR, 1)),
            id="four corners, a rotated box and a line",
        ),
        pytest.param(
            [
                shape("road", "rectangle", [square(*ROAD)[2], square(*ROAD)[0]]),
                shape("car", "polygon", [[1, 1], [2, 2]]),
            ],
            ["background", "road"],
            drawn((ROAD, 1)),
            id="a box from its lower corner, and an outline of two points",
        ),
    ],
)
def test_shapes_of_labelme(
    photos: Path, tmp_path: Path, shapes: list[dict[str, Any]], names: list[str], mask: np.ndarray
) -> None:
    source = labelme(tmp_path / "labelled", shapes)
    assert convert(source, "--images", photos, "--out", tmp_path / "out") == 0
    found, masks = masks_of(tmp_path / "out")
    assert found == names
    for one in masks.values():
        np.testing.assert_array_equal(one, np.where(mask == 255, -1, mask.astype(int)))


def test_an_unknown_shape_of_labelme_is_named(photos: Path, tmp_path: Path, capsys: Any) -> None:
    source = labelme(tmp_path / "labelled", [shape("road", "star", square(*ROAD))])
    assert convert(source, "--images", photos, "--out", tmp_path / "out") == 1
    assert "a shape of the unknown type star" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "names", "left_out"),
    [
        pytest.param({"segmentation": [[1, 1]]}, ["road", "car"], ["annotation 7"], id="a point"),
        pytest.param({"segmentation": [1, 1, 9, 1, 9, 9]}, ["road", "car"], [], id="a flat list"),
        pytest.param(
            {"segmentation": [[1, 1, 9, 1, 9]]}, ["road", "car"], ["annotation 7"], id="odd"
        ),
        pytest.param(
            {"segmentation": [[1, 1, 9, 1, 9, 1e9]]}, ["road", "car"], ["annotation 7"], id="far"
        ),
        pytest.param({"root": True}, ["road", "car"], [], id="the root of the categories"),
        pytest.param({"windows": True}, ["road", "car"], [], id="separators of Windows"),
        pytest.param({"category_id": 9}, "annotation 7: category 9 is not", [], id="a category"),
        pytest.param({"image_id": 99}, "annotation 7: image 99 is not", [], id="an image"),
    ],
)
def test_files_of_coco(
    photos: Path, tmp_path: Path, capsys: Any, change: dict[str, Any], names: Any, left_out: Any
) -> None:
    separator = "\\" if change.pop("windows", False) else "/"
    images = [
        {"id": n, "file_name": f"images{separator}{n}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for n in range(COUNT)
    ]
    categories = [
        {"id": 1, "name": "road", "supercategory": "all"},
        {"id": 2, "name": "car", "supercategory": "all"},
    ]
    if change.pop("root", False):
        categories.insert(0, {"id": 0, "name": "all", "supercategory": "none"})
    squares = [(ROAD, 1), (CAR, 2)]
    annotations = [
        {"id": 10 * n + k, "image_id": n, "category_id": k, "segmentation": [corners_of(box)]}
        for n in range(COUNT)
        for box, k in squares
    ]
    more = {"id": 7, "image_id": 0, "category_id": 1, "segmentation": [corners_of((40, 40, 4))]}
    annotations.append({**more, **change})
    source = tmp_path / "coco.json"
    source.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": annotations})
    )
    status = convert(source, "--images", photos, "--out", tmp_path / "out")
    errors = capsys.readouterr().err
    if isinstance(names, str):
        assert status == 1
        assert names in errors
        return
    assert status == 0
    found, masks = masks_of(tmp_path / "out")
    assert found == ["background", *names]
    for name in left_out:
        assert f"{name}: no outline of three points or more" in errors
    for name, mask in masks.items():
        if not name.endswith("/0"):
            np.testing.assert_array_equal(mask, drawn((ROAD, 1), (CAR, 2)))


def corners_of(box: tuple[int, int, int]) -> list[float]:
    return [float(value) for value in square(*box).ravel()]


CVAT_LABELS = "".join(
    f"<label><name>{name}</name><type>{kind}</type></label>"
    for name, kind in {
        "road": "polygon",
        "rainy": "tag",
        "knee": "points",
        "leg": "skeleton",
    }.items()
)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        pytest.param('<tag label="rainy"/>', ["background", "road"], id="a tag"),
        pytest.param('<points label="knee" points="1,1"/>', ["background", "road"], id="points"),
        pytest.param('<skeleton label="leg"/>', ["background", "road"], id="a skeleton"),
        pytest.param(
            '<polygon label="" points="1,1;2,1;2,2"/>',
            "3.jpg: a polygon has no label",
            id="no name",
        ),
        pytest.param(None, "tracks of a video; export the task as CVAT for images", id="a video"),
    ],
)
def test_files_of_cvat(photos: Path, tmp_path: Path, capsys: Any, body: Any, outcome: Any) -> None:
    points = ";".join(f"{x},{y}" for x, y in square(*ROAD))
    road = f'<polygon label="road" points="{points}" z_order="0"/>'
    images = "".join(
        f'<image id="{n}" name="{n}.jpg" width="{SIZE[1]}" height="{SIZE[0]}">{road}'
        f"{body if n == 3 else ''}</image>"
        for n in range(COUNT)
    )
    if body is None:
        images = f'<track id="0" label="road">{road}</track>'
    source = tmp_path / "cvat.xml"
    source.write_text(f"<annotations><meta>{CVAT_LABELS}</meta>{images}</annotations>")
    status = convert(source, "--images", photos, "--out", tmp_path / "out")
    if isinstance(outcome, str):
        assert status == 1
        assert outcome in capsys.readouterr().err
        return
    assert status == 0
    names, masks = masks_of(tmp_path / "out")
    assert names == outcome
    for mask in masks.values():
        np.testing.assert_array_equal(mask, drawn((ROAD, 1)))


@pytest.mark.parametrize(
    ("values", "names", "more", "classes", "note"),
    [
        pytest.param([0, 255], None, [], [0, 255], "value 255 is a class, 14.", id="binary"),
        pytest.param([0, 127, 255], None, [], [0, 127, 255], "--ignore 255 ignores it", id="three"),
        pytest.param(
            [0, 1, 255], None, ["--ignore", "255"], [0, 1], "value 255 is ignored, ", id="asked for"
        ),
        pytest.param(
            [0, 1, 9], {0: "a", 1: "b", 9: "void"}, [], [0, 1], "value 9 is ignored, ", id="by name"
        ),
    ],
)
def test_what_hugging_faces_masks_ignore(
    photos: Path,
    tmp_path: Path,
    capsys: Any,
    values: list[int],
    names: dict[int, str] | None,
    more: list[str],
    classes: list[int],
    note: str,
) -> None:
    datasets = pytest.importorskip("datasets")
    mask = np.select([drawn((ROAD, 1), (CAR, 2)) == k for k in range(len(values))], values)
    mask[:, 40:] = values[-1] if len(values) == 2 else values[0]
    rows = datasets.Dataset.from_dict(
        {
            "image": [Image.open(photos / f"{n}.jpg") for n in range(COUNT)],
            "label": [Image.fromarray(mask.astype(np.uint8))] * COUNT,
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Image()}),
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    if names:
        (tmp_path / "saved/id2label.json").write_text(json.dumps(names))
    assert convert(f"hf://{tmp_path}/saved", "--out", tmp_path / "out", *more) == 0
    assert note.partition(" 14.")[0] in capsys.readouterr().err
    _, masks = masks_of(tmp_path / "out")
    expected_index = np.full(mask.shape, -1)
    for index, value in enumerate(classes):
        expected_index[mask == value] = index
    for found in masks.values():
        np.testing.assert_array_equal(found, expected_index)


def test_an_image_that_may_be_either_of_two_is_refused(
    photos: Path, tmp_path: Path, capsys: Any
) -> None:
    for folder in ("a", "b"):
        shutil.copytree(photos, tmp_path / "images" / folder)
    source = write_coco(tmp_path / "coco.json")
    assert convert(source, "--images", tmp_path / "images", "--out", tmp_path / "out") == 1
    assert "names 0.jpg, which may be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [2**24, 2**25, 2**40, -1])
def test_a_panoptic_id_beyond_three_bytes_is_refused(
    photos: Path, tmp_path: Path, capsys: Any, number: int
) -> None:
    source = write_panoptic(tmp_path / "panoptic.json")
    found = json.loads(source.read_text())
    found["annotations"][0]["segments_info"][0]["id"] = number
    source.write_text(json.dumps(found))
    assert convert(source, "--images", photos, "--out", tmp_path / "out") == 1
    assert f"segment id {number} does not fit the three bytes" in capsys.readouterr().err


def test_only_a_data_set_without_names_goes_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    errors: list[Exception] = [
        EntryNotFoundError.__new__(EntryNotFoundError),
        LocalEntryNotFoundError("the hub cannot be reached"),
        OSError(101, "Network is unreachable"),
        RuntimeError("503 Service Unavailable"),
    ]

    def download(*arguments: Any, **options: Any) -> str:
        raise errors[0]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert converters._names("owner/name", None) == {}
    while errors := errors[1:]:
        with pytest.raises(DataError, match=r"owner/name: cannot fetch id2label.json.*--names"):
            converters._names("owner/name", None)


@pytest.mark.parametrize("overlap", ["area", "order"])
def test_cvats_levels_decide_and_not_the_files_order(
    photos: Path, tmp_path: Path, overlap: str
) -> None:
    # In the file the small box comes first, and lies on the higher level.
    shapes = ""
    for label, (left, top, side), level in (("car", CAR, 5), ("road", ROAD, 2)):
        sides = f'xtl="{left}" ytl="{top}" xbr="{left + side}" ybr="{top + side}"'
        shapes += f'<box label="{label}" {sides} z_order="{level}"/>'
    images = "".join(
        f'<image id="{n}" name="{n}.jpg" width="{SIZE[1]}" height="{SIZE[0]}">{shapes}</image>'
        for n in range(COUNT)
    )
    labels = "<label><name>road</name></label><label><name>car</name></label>"
    source = tmp_path / "cvat.xml"
    source.write_text(f"<annotations><meta>{labels}</meta>{images}</annotations>")
    arguments = [source, "--images", photos, "--out", tmp_path / "out", "--overlap", overlap]
    assert convert(*arguments) == 0
    for mask in masks_of(tmp_path / "out")[1].values():
        np.testing.assert_array_equal(mask, drawn((ROAD, 1), (CAR, 2)))


def test_labelmes_circle_has_the_radius_of_its_edge_point(photos: Path, tmp_path: Path) -> None:
    source = labelme(tmp_path / "labelled", [shape("pond", "circle", [[24, 24], [24, 36]])])
    assert convert(source, "--images", photos, "--out", tmp_path / "out") == 0
    rows, columns = np.indices(SIZE) + 0.5
    distance = np.hypot(rows - 24, columns - 24)
    for mask in masks_of(tmp_path / "out")[1].values():
        assert (mask[distance < 11] == 1).all()
        assert (mask[distance > 13] == 0).all()


def test_yolos_boxes_are_counted_and_left_out(photos: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_yolo(tmp_path / "labels")
    with (source / "2.txt").open("a") as file:
        file.write("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.2\n")
    assert convert(source, "--images", photos, "--out", tmp_path / "out") == 0
    line = "left out, because they have no area: 2 (2.txt: line 4, a box; 2.txt: line 5, a box)"
    assert line in capsys.readouterr().err
    np.testing.assert_array_equal(
        next(m for n, m in masks_of(tmp_path / "out")[1].items() if n.endswith("/2")), expected(2)
    )
