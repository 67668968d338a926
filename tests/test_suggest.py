"""`data.py --suggest` on folders that people have: every image is used, or named as left out."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from data import build_ade20k_dataspec
from dataset.description import Description, open_description, parse_description
from dataset.mask_decoder import Masks
from dataset.matching import find_samples
from errors import DataError, OutputError
from extras.preparation import check_command
from extras.preparation import suggest as suggestions
from extras.preparation.find_classes import FileValues, read_values
from extras.preparation.suggest import suggest

check = functools.partial(check_command.main, build_dataspec=build_ade20k_dataspec)
SIZE = 32


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def blocks(seed: int, values: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """A mask of squares of eight pixels: every value is in it, the first one in two corners."""
    rng = np.random.default_rng(1000 + seed)
    coarse = rng.choice(np.array(values), (4, 4))
    coarse.flat[: len(values)] = values
    return coarse.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(path)


def lay_out(root: Path, templates: list[tuple[str, str, list]]) -> None:
    """Write an image and a mask for every name of every pair of templates; "" writes none."""
    seed = 0
    for image, mask, names in templates:
        for name in names:
            seed += 1
            if image:
                save(root / image.format(name), photo(seed))
            if mask:
                save(root / mask.format(name), blocks(seed))


def described(root: Path, text: str) -> tuple[Description, dict[str, list]]:
    """Return a suggestion as it is read, and the samples of each split."""
    description = parse_description(yaml.safe_load(text))
    samples = {}
    for split in ("train", "val"):
        samples[split], problems = find_samples(description, split, str(root))
        # A fraction of a few images may leave a split empty.
        assert all("holds no" in problem.reason for problem in problems if problem.fatal)
    return description, samples


N = [f"{n:03}" for n in range(8)]
M = [f"{n:03}" for n in range(8, 12)]

# Layout: templates of images and masks with names; the masks of train and val that are expected;
# the numbers of training and validation pairs; texts in the comments.
LAYOUTS = {
    "words first, masks with a tail": (
        [("images/{}.jpg", "masks/{}_mask.png", [f"{w}_{n}" for n in N for w in ("cat", "dog")])],
        ("masks/{stem}_mask.png", None),
        (16, None),
        (),
    ),
    "words alone": (
        [("a/{}.jpg", "b/{}.png", ["alpha", "beta", "gamma one", "Delta", "train car", "epsilon"])],
        ("b/{stem}.png", None),
        (6, None),
        (),
    ),
    "words of both": (
        [("image{}.jpg", "label{}.png", N)],
        ("label{stem}.png", None),
        (8, None),
        (),
    ),
    "vehicles called train": (
        [("i/{}.jpg", "m/{}.png", [f"{w}_{n}" for n in N for w in ("car", "train", "test")])],
        ("m/{stem}.png", None),
        (24, None),
        (),
    ),
    "folder between split and kind": (
        [
            ("Train/Urban/images/{}.png", "Train/Urban/masks/{}.png", N),
            ("Train/Rural/images/{}.png", "Train/Rural/masks/{}.png", M),
            ("Val/Urban/images/{}.png", "Val/Urban/masks/{}.png", M),
            ("Val/Rural/images/{}.png", "Val/Rural/masks/{}.png", N[:3]),
        ],
        ("Train/{dir}/masks/{stem}.png", "Val/{dir}/masks/{stem}.png"),
        (12, 7),
        (),
    ),
    "split words in folders' names": (
        [
            ("train_images/{}.jpg", "train_masks/{}.png", N),
            ("val_images/{}.jpg", "val_masks/{}.png", M),
        ],
        ("train_masks/{stem}.png", "val_masks/{stem}.png"),
        (8, 4),
        (),
    ),
    "split words in camel case": (
        [("imagesTr/{}.png", "labelsTr/{}.png", N), ("imagesVal/{}.png", "labelsVal/{}.png", M)],
        ("labelsTr/{stem}.png", "labelsVal/{stem}.png"),
        (8, 4),
        (),
    ),
    "split words behind the names": (
        [("x/{}_train.jpg", "y/{}_train_gt.png", N), ("x/{}_val.jpg", "y/{}_val_gt.png", M)],
        ("y/{stem}_train_gt.png", "y/{stem}_val_gt.png"),
        (8, 4),
        (),
    ),
    "different split words": (
        [
            ("photos/train/{}.jpg", "masks/training/{}.png", N),
            ("photos/valid/{}.jpg", "masks/validation/{}.png", M),
        ],
        ("masks/training/{stem}.png", "masks/validation/{stem}.png"),
        (8, 4),
        (),
    ),
    "train beside train_masks, test without": (
        [("train/{}.jpg", "train_masks/{}_mask.gif", N), ("test/{}.jpg", "", M)],
        ("train_masks/{stem}_mask.gif", None),
        (8, None),
        ("# 4 images are not part of it, first test/008.jpg.",),
    ),
    "test as val": (
        [("train/a/{}.jpg", "train/b/{}.png", N), ("test/a/{}.jpg", "test/b/{}.png", M)],
        ("train/b/{stem}.png", "test/b/{stem}.png"),
        (8, 4),
        ("# A guess: test serves as val",),
    ),
    "test beside val": (
        [
            ("train/a/{}.jpg", "train/b/{}.png", N),
            ("val/a/{}.jpg", "val/b/{}.png", M),
            ("test/a/{}.jpg", "test/b/{}.png", ["x1", "x2", "x3"]),
        ],
        ("train/b/{stem}.png", "val/b/{stem}.png"),
        (8, 4),
        ("# 3 images and 3 masks are not part of it, first test/a/x1.jpg and test/b/x1.png.",),
    ),
    "a hash in the names": (
        [("train/{}.jpg", "train/{}_mask.png", [f"shot_{n}_jpg.rf.{int(n):05x}ab9" for n in N])],
        ("train/{stem}_mask.png", None),
        (8, None),
        (),
    ),
    "scenes": (
        [(f"{s}/rgb/{{}}.png", f"{s}/semantic/{{}}.png", N) for s in ("scene1", "scene2", "yard")],
        ("{dir}/semantic/{stem}.png", None),
        (24, None),
        (),
    ),
    "a folder for each image": (
        [("{}/img.png", "{}/label.png", [f"{n}_json" for n in N])],
        ("{name}/label.png", None),
        (8, None),
        (),
    ),
    "grown together": (
        [
            ("train/{}.png", "trainannot/{}.png", N),
            ("val/{}.png", "valannot/{}.png", M),
            ("test/{}.png", "testannot/{}.png", ["t"]),
        ],
        ("trainannot/{stem}.png", "valannot/{stem}.png"),
        (8, 4),
        ("# 1 image and 1 mask are not part of it, first test/t.png and testannot/t.png.",),
    ),
    "extensions in the masks' names": (
        [("ds/img/{}.jpg", "ds/masks_machine/{}.jpg.png", N)],
        ("ds/masks_machine/{stem}.jpg.png", None),
        (8, None),
        (),
    ),
    "several extensions in the masks' names": (
        [("i/{}.jpg", "m/{}.jpg.png", N), ("i/{}.jpeg", "m/{}.jpeg.png", M)],
        ("m/{stem}.*.png", None),
        (12, None),
        (),
    ),
    "cities": (
        [
            (f"rgb/{s}/{c}/{c}_{{}}_rgb.png", f"gt/{s}/{c}/{c}_{{}}_gt_labelIds.png", names)
            for s, names in (("train", N), ("val", M))
            for c in ("ulm", "bonn")
        ],
        ("gt/train/{dir}/{stem}_gt_labelIds.png", "gt/val/{dir}/{stem}_gt_labelIds.png"),
        (16, 8),
        (),
    ),
    "ADE20K": (
        [
            ("images/training/{}.jpg", "annotations/training/{}.png", N),
            ("images/validation/{}.jpg", "annotations/validation/{}.png", M),
        ],
        ("annotations/training/{stem}.png", "annotations/validation/{stem}.png"),
        (8, 4),
        (),
    ),
    "two hashes": (
        [(f"a/x{n}_jpg.rf.{n}1ab0{n}.jpg", f"b/x{n}_png.rf.c0f{n}5e.png", [""]) for n in N],
        ("b/{stem}_png.rf.*.png", None),
        (8, None),
        (),
    ),
    "a folder left out": (
        [("x/{}.jpg", "y/{}.png", N), ("extra/{}-a.jpg", "other/{}-b.png", M)],
        ("y/{stem}.png", None),
        (8, None),
        ("# 4 images and 4 masks are not part of it, first extra/008-a.jpg and other/008-b.png.",),
    ),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_images_are_paired_or_named(name: str, tmp_path: Path) -> None:
    templates, masks, counts, comments = LAYOUTS[name]
    lay_out(tmp_path, templates)
    text = suggest(str(tmp_path), 1).text
    raw = yaml.safe_load(text)
    assert raw["train"]["masks"] == masks[0], text
    description, samples = described(tmp_path, text)
    if counts[1] is None:
        assert raw["val"] == {"fraction": 0.15}
        assert len(samples["train"]) + len(samples["val"]) == counts[0]
    else:
        assert raw["val"]["masks"] == masks[1]
        assert (len(samples["train"]), len(samples["val"])) == counts
    for comment in comments:
        assert comment in text
    assert ("not part of it" in text) == any("not part" in comment for comment in comments)
    for sample in [*samples["train"], *samples["val"]]:  # each mask is the one drawn for the image
        drawn = Image.open(sample.mask_path)
        labels = Masks.of(description, "train", str(tmp_path)).decode(
            Path(sample.mask_path).read_bytes()
        )
        assert (labels - 1 == np.array(drawn)).all()  # values 0, 1, 2 are classes 0, 1, 2


def test_semantic_masks_come_before_instances_and_newer_ones_before_older(tmp_path: Path) -> None:
    for n in range(8):
        save(tmp_path / f"images/{n}.jpg", photo(n))
        save(tmp_path / f"SegmentationObject/{n}.png", blocks(n))
        for version in (1, 2):
            save(tmp_path / f"SegmentationClass_v{version}/{n}.png", blocks(n))
    text = suggest(str(tmp_path), 1).text
    assert yaml.safe_load(text)["train"]["masks"] == "SegmentationClass_v2/{stem}.png"
    assert "# 16 masks are not part of it, first SegmentationClass_v1/0.png." in text
    assert "# A guess: SegmentationClass_v1/{stem}.png would fit as many images" in text


def test_instance_masks_are_told_by_their_values(tmp_path: Path) -> None:
    for n in range(8):
        save(tmp_path / f"images/{n}.jpg", photo(n))
        save(tmp_path / f"a/{n}.png", blocks(n, tuple(range(1, 9 + n % 4))))
        save(tmp_path / f"b/{n}.png", blocks(n))
    assert yaml.safe_load(suggest(str(tmp_path), 1).text)["train"]["masks"] == "b/{stem}.png"


def test_names_that_have_little_in_common_are_no_pairs(tmp_path: Path) -> None:
    for n, name in enumerate(("street", "yard", "wood", "lake")):
        save(tmp_path / f"a/{name}.jpg", photo(n))
        save(tmp_path / f"b/mask{n}of_street{n}.png", blocks(n))
    with pytest.raises(DataError, match="4 images and 4 masks, but no mask has a name"):
        suggest(str(tmp_path), 1)


def test_copies_of_a_data_set_are_not_paired_twice(tmp_path: Path) -> None:
    for n in range(8):
        for version in ("v1", "v2"):
            save(tmp_path / f"{version}/images/{n}.jpg", photo(n))
            save(tmp_path / f"{version}/masks/{n}.png", blocks(n))
    text = suggest(str(tmp_path), 1).text
    assert yaml.safe_load(text)["train"]["masks"] == "v2/masks/{stem}.png"
    assert "# 8 images and 8 masks are not part of it, first v1/images/0.jpg" in text


def test_an_image_without_a_mask_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, [("a/{}.jpg", "b/{}.png", N), ("a/{}.jpg", "", ["logo"])])
    text = suggest(str(tmp_path), 1).text
    assert f"# To do, or training stops: {tmp_path}/a/logo.jpg: " in text
    assert "# 1 image is not part of it, first a/logo.jpg." in text


# Values


def smooth(mask: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(mask, (3, 3), 1)


def scale(mask: np.ndarray) -> np.ndarray:
    small = cv2.resize(mask, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(small, mask.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def sharpen(mask: np.ndarray) -> np.ndarray:  # leaves values beyond those of the classes as well
    large = Image.fromarray(mask).resize((384, 384), Image.Resampling.LANCZOS)
    return np.array(large.resize((256, 256), Image.Resampling.BICUBIC))


def drawn_large(seed: int, of: str, blur: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    mask = cv2.resize(blocks(seed), None, fx=8, fy=8, interpolation=cv2.INTER_NEAREST)
    mask = np.array([0, 100, 200], np.uint8)[mask] if of == "grey" else COLORS[mask]
    return blur(mask) if blur else mask


COLORS = np.array([[10, 0, 200], [128, 64, 128], [70, 20, 30]], np.uint8)


@pytest.mark.processes
@pytest.mark.parametrize("of", ["grey", "colours"])
@pytest.mark.parametrize("blur", [smooth, scale, sharpen])
def test_blurred_edges_are_no_classes(blur: Callable, of: str, tmp_path: Path) -> None:
    for n in range(24):
        save(tmp_path / f"i/{n:02}.jpg", cv2.resize(photo(n), (256, 256)))
        save(tmp_path / f"m/{n:02}.png", drawn_large(n, of, blur if n == 13 else None))
    found = suggest(str(tmp_path), 1)
    raw = yaml.safe_load(found.text)
    assert len(raw["classes"]) == 3 and len(raw["ignore"]) > 3
    assert "suspected edges" in found.text and "in 1 files: m/13.png." in found.text
    # The picture begins with that mask: ignored pixels are drawn along its edges.
    description, samples = described(tmp_path, found.text)
    every = [*samples["train"], *samples["val"]]
    first = [sample for sample in every if sample.mask_path.endswith("13.png")]
    only = suggestions.draw(description, first, str(tmp_path), [])
    assert (np.array(found.picture)[:300, :600] == np.array(only)[:300, :600]).all()


def test_edges_in_all_masks_are_no_classes(tmp_path: Path) -> None:
    for n in range(6):
        save(tmp_path / f"i/{n}.jpg", cv2.resize(photo(n), (256, 256)))
        save(tmp_path / f"m/{n}.png", drawn_large(n, "grey", smooth))
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert [entry["labels"] for entry in raw["classes"].values()] == [[0], [100], [200]]


def test_a_thin_class_is_a_class(tmp_path: Path) -> None:
    for n in range(8):
        mask = blocks(n)
        mask[5 + n, :] = 3  # a line one pixel wide, beyond the other values
        save(tmp_path / f"i/{n}.jpg", photo(n))
        save(tmp_path / f"m/{n}.png", mask)
    assert len(yaml.safe_load(suggest(str(tmp_path), 1).text)["classes"]) == 4


GREY_VALUES = [
    pytest.param((128, 255), 0, [[0], [128], [255]], [], id="0 beside 128 and 255"),
    pytest.param((85, 170, 255), 0, [[0], [85], [170], [255]], [], id="four spread levels"),
    pytest.param((1, 2), 0, [[1], [2]], [0], id="0 beside 1 and 2"),
    pytest.param((0, 1), 255, [[0], [1]], [255], id="255 beside 0 and 1"),
]


@pytest.mark.parametrize(("values", "rare", "classes", "ignored"), GREY_VALUES)
def test_rare_values(
    values: tuple, rare: int, classes: list, ignored: list, tmp_path: Path
) -> None:
    for n in range(6):
        mask = blocks(n, values)
        mask[:2, :4] = rare
        save(tmp_path / f"i/{n}.jpg", photo(n))
        save(tmp_path / f"m/{n}.png", mask)
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert [entry["labels"] for entry in raw["classes"].values()] == classes
    assert raw["ignore"] == ignored


COLORED = [[0, 0, 0], [128, 64, 128], [0, 0, 142]]
BY_VALUE = "Pixel Value, Class\n0, sky\n1, on\n2, 007\n"
CVAT = "# label:color_rgb:parts:actions\nsky:0,0,0::\non:128,64,128::\n007:0,0,142::\n"
BY_COLOR = "name,r,g,b\nsky,0,0,0\non,128,64,128\n007,0,0,142\n"
BOTH = "id\tname\tred\tgreen\tblue\n9\tsky\t0\t0\t0\n8\ton\t128\t64\t128\n7\t007\t0\t0\t142\n"
TABLES = [
    pytest.param("_classes.csv", BY_VALUE, "grey", id="Roboflow"),
    pytest.param("labelmap.txt", CVAT, "colours", id="CVAT, colours"),
    pytest.param("labelmap.txt", CVAT, "palette", id="CVAT, palette"),
    pytest.param("class_dict.csv", BY_COLOR, "colours", id="class_dict, colours"),
    pytest.param("class_dict.csv", BY_COLOR, "palette", id="class_dict, palette"),
    pytest.param("colors.tsv", BOTH, "colours", id="numbers and colours"),
    pytest.param("colors.tsv", BOTH, "palette", id="numbers and colours, palette"),
    pytest.param("names.txt", "id;name\n0;sky\n1;on\n2;007\n", "grey", id="semicolons"),
]


@pytest.mark.parametrize(("file", "table", "mode"), TABLES)
def test_names_are_read(file: str, table: str, mode: str, tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    for path in (tmp_path / "m").iterdir():
        mask = np.array(Image.open(path))
        if mode == "palette":
            save(path, mask, [part for color in COLORED for part in color])
        elif mode == "colours":
            save(path, np.array(COLORED, np.uint8)[mask])
    (tmp_path / "m" / file).write_text(table)
    text = suggest(str(tmp_path), 1).text
    description, _ = described(tmp_path, text)
    assert {c.name for c in description.classes} == {"sky", "on", "007"}
    assert f"# Names are those of m/{file}." in text and "Fill in" not in text


def test_colours_of_one_name_are_merged_and_absent_classes_named(tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    for path in (tmp_path / "m").iterdir():
        save(path, np.array(COLORED, np.uint8)[np.array(Image.open(path))])
    (tmp_path / "class_dict.csv").write_text(
        'name,r,g,b\n"road, wet",0,0,0\ntree,0,0,142\n"road, wet",128,64,128\npond,1,2,3\n'
    )
    text = suggest(str(tmp_path), 1).text
    raw = yaml.safe_load(text)
    assert raw["classes"] == {
        "road, wet": {"labels": [[0, 0, 0], [128, 64, 128]]},
        "tree": {"labels": [[0, 0, 142]]},
    }
    assert "# No mask has pond." in text


def test_a_table_decides_what_is_ignored(tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    (tmp_path / "_classes.csv").write_text("Pixel Value, Class\n0, Void\n1, road\n2, tree\n")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert list(raw["classes"]) == ["road", "tree"] and raw["ignore"] == [0]


def test_palettes_that_differ_are_read_by_colour(tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    drawn = {}
    for n, path in enumerate(sorted((tmp_path / "m").iterdir())):
        drawn[str(path)] = mask = np.array(Image.open(path))
        order = np.roll(np.arange(3), n)  # where each value is in this file's palette
        palette = np.zeros((3, 3), int)
        palette[order] = COLORED
        save(path, order.astype(np.uint8)[mask], palette.ravel().tolist())
    text = suggest(str(tmp_path), 1).text
    assert f"as {tmp_path}/m/000.png and {tmp_path}/m/001.png show value 0 in different" in text
    description, samples = described(tmp_path, text)
    names = ["class_0_0_0", "class_128_64_128", "class_0_0_142"]
    masks = Masks.of(description, "train", str(tmp_path))
    for sample in [*samples["train"], *samples["val"]]:
        labels = masks.decode(Path(sample.mask_path).read_bytes())
        for value, name in enumerate(names):
            label = 1 + [c.name for c in description.classes].index(name)
            assert ((labels == label) == (drawn[sample.mask_path] == value)).all()


def test_one_bit_and_255_mean_the_same(tmp_path: Path) -> None:
    drawn = {}
    for n in range(8):
        save(tmp_path / f"i/{n}.jpg", photo(n))
        mask = blocks(n, (0, 1)).astype(bool)
        drawn[f"{n}.png"] = mask
        save(tmp_path / f"m/{n}.png", mask if n % 2 else mask.astype(np.uint8) * 255)
    text = suggest(str(tmp_path), 1).text
    assert yaml.safe_load(text)["classes"] == {
        "class_0": {"labels": [0]},
        "class_255": {"labels": [1, 255]},
    }
    description, samples = described(tmp_path, text)
    masks = Masks.of(description, "train", str(tmp_path))
    for sample in [*samples["train"], *samples["val"]]:
        labels = masks.decode(Path(sample.mask_path).read_bytes())
        assert ((labels == 2) == drawn[Path(sample.mask_path).name]).all()


# Refusals


def spoil(root: Path, change: Callable[[np.ndarray, int, Path], None]) -> None:
    for n, path in enumerate(sorted((root / "m").iterdir())):
        mask = np.array(Image.open(path))
        path.unlink()
        change(mask, n, path)


def as_jpeg(mask: np.ndarray, n: int, path: Path) -> None:
    Image.fromarray(np.array(COLORED, np.uint8)[mask]).save(path.with_suffix(".jpg"))


def as_grey_jpeg(mask: np.ndarray, n: int, path: Path) -> None:
    Image.fromarray(mask * 100).save(path.with_suffix(".jpeg"))


def as_webp(mask: np.ndarray, n: int, path: Path) -> None:
    Image.fromarray(np.array(COLORED, np.uint8)[mask]).save(path.with_suffix(".webp"))


def cut_short(mask: np.ndarray, n: int, path: Path) -> None:
    save(path, mask)
    path.write_bytes(path.read_bytes()[:60])


def some_cut_short(mask: np.ndarray, n: int, path: Path) -> None:
    save(path, mask)
    if n in (2, 5):
        path.write_bytes(path.read_bytes()[:60])


def as_text(mask: np.ndarray, n: int, path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1")


def of_both_kinds(mask: np.ndarray, n: int, path: Path) -> None:
    save(path, mask if n % 2 else np.array(COLORED, np.uint8)[mask] + np.uint8(9))


def of_many_values(mask: np.ndarray, n: int, path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) + 64 * n
    cv2.imwrite(str(path), values.repeat(4, 0).repeat(4, 1))


def with_wild_palettes(mask: np.ndarray, n: int, path: Path) -> None:
    save(path, mask, np.random.default_rng(n).integers(0, 256, 9).tolist())


REFUSED = [
    pytest.param(as_jpeg, "8 masks are JPEGs, first m/000.jpg; JPEG changes", id="JPEGs"),
    pytest.param(as_grey_jpeg, "8 masks are JPEGs, first m/000.jpeg; JPEG", id="grey JPEGs"),
    pytest.param(as_webp, "8 masks are WebPs, first m/000.webp; a mask has to be", id="WebPs"),
    pytest.param(cut_short, "8 masks cannot be decoded, first m/000.png", id="cut short"),
    pytest.param(as_text, "8 masks cannot be decoded, first m/000.png (not an image)", id="text"),
    pytest.param(some_cut_short, "2 of 8 masks cannot be read, first ", id="some cut short"),
    pytest.param(of_both_kinds, "is in colours, and ", id="of both kinds"),
    pytest.param(of_many_values, "hold 512 values, and 253 classes are the most", id="many values"),
    pytest.param(with_wild_palettes, "in different colours, and the colours do not", id="palettes"),
]


@pytest.mark.processes
@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_masks_that_cannot_be_used_are_named_and_nothing_is_left(
    change: Callable[[np.ndarray, int, Path], None],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    lay_out(tmp_path / "set", [("i/{}.jpg", "m/{}.png", N)])
    spoil(tmp_path / "set", change)
    arguments = [str(tmp_path / "set"), str(tmp_path / "set.yaml"), "--suggest", "--workers", "1"]
    assert check(arguments) == 1
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert check(arguments) == 1 and capsys.readouterr().err == message


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path / "set", [("i/{}.jpg", "m/{}.png", N)])

    def fail(path: Path, text: str) -> None:
        raise OutputError(errno.ENOSPC, "full")

    arguments = [str(tmp_path / "set"), str(tmp_path / "set.yaml"), "--suggest", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(check_command, "write_file", fail)
        assert check(arguments) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert check(arguments) == 0
    assert open_description(str(tmp_path / "set.yaml"))[0] == str(tmp_path / "set")


def test_a_suggestion_that_finds_other_pairs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    monkeypatch.setattr(suggestions, "pair_described", lambda *_: ([], []))
    with pytest.raises(DataError, match=r"8 images have masks, but train: .* finds 0"):
        suggest(str(tmp_path), 1)


def test_values_are_counted_with_thin_pixels(tmp_path: Path) -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 50:] = 9
    mask[:20, 50] = 5  # between 0 and 9
    mask[99, 99] = 3  # nothing lies below or above
    save(tmp_path / "a.png", mask)
    (file,) = read_values([str(tmp_path / "a.png")])
    assert file == FileValues(
        str(tmp_path / "a.png"),
        "grey",
        {0: (5000, 0, 0), 3: (1, 1, 0), 5: (20, 20, 20), 9: (4979, 0, 0)},
        {},
    )
