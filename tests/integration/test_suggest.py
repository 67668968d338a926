"""`data.py --suggest` pairs images and masks in many layouts and names unusable masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from dataset.mask_decoder import Masks
from extras.preparation.suggest import suggest
from tests.support.layouts import LAYOUTS, lay_out
from tests.support.suggest import COLORED, N, check, described, lay_out, save


def test_suggested_description_pairs_images_of_every_extension(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, suffix in enumerate([".jpg", ".JPG", ".png"] * 4):
        for folder in ("photos", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
        image.save(tmp_path / f"photos/{number}{suffix}")
        Image.fromarray(np.eye(24, dtype=np.uint8)).save(tmp_path / f"masks/{number}.png")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["train"] == {"images": "photos/{stem}", "masks": "masks/{stem}.png"}
    image.save(tmp_path / "photos/logo.jpeg")  # an image without a mask
    assert yaml.safe_load(suggest(str(tmp_path), 1).text)["train"] == raw["train"]
    image.save(tmp_path / "photos/0.png")  # two images whose names differ only in the extension
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["train"]["images"] in [f"photos/{{stem}}{suffix}" for suffix in (".jpg", ".png")]


M = [f"{n:03}" for n in range(8, 12)]

# Each layout lists path templates of images and masks with sample names, the expected mask
# templates of train and val, their expected numbers of pairs, and texts expected in the comments.
LAYOUTS = {
    "words first, masks with a suffix": (
        [("images/{}.jpg", "masks/{}_mask.png", [f"{w}_{n}" for n in N for w in ("cat", "dog")])],
        ("masks/{stem}_mask.png", None),
        (16, None),
        (),
    ),
    "words only": (
        [("a/{}.jpg", "b/{}.png", ["alpha", "beta", "gamma one", "Delta", "train car", "epsilon"])],
        ("b/{stem}.png", None),
        (6, None),
        (),
    ),
    "words in both names": (
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
    "train and train_masks, test without masks": (
        [("train/{}.jpg", "train_masks/{}_mask.gif", N), ("test/{}.jpg", "", M)],
        ("train_masks/{stem}_mask.gif", None),
        (8, None),
        ("# 4 images are left out, such as test/008.jpg.",),
    ),
    "test used as val": (
        [("train/a/{}.jpg", "train/b/{}.png", N), ("test/a/{}.jpg", "test/b/{}.png", M)],
        ("train/b/{stem}.png", "test/b/{stem}.png"),
        (8, 4),
        ("# A guess: test serves as val",),
    ),
    "test and val": (
        [
            ("train/a/{}.jpg", "train/b/{}.png", N),
            ("val/a/{}.jpg", "val/b/{}.png", M),
            ("test/a/{}.jpg", "test/b/{}.png", ["x1", "x2", "x3"]),
        ],
        ("train/b/{stem}.png", "val/b/{stem}.png"),
        (8, 4),
        ("# 3 images and 3 masks are left out, such as test/a/x1.jpg and test/b/x1.png.",),
    ),
    "hash in the names": (
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
    "folder per image": (
        [("{}/img.png", "{}/label.png", [f"{n}_json" for n in N])],
        ("{name}/label.png", None),
        (8, None),
        (),
    ),
    "split and kind in one word": (
        [
            ("train/{}.png", "trainannot/{}.png", N),
            ("val/{}.png", "valannot/{}.png", M),
            ("test/{}.png", "testannot/{}.png", ["t"]),
        ],
        ("trainannot/{stem}.png", "valannot/{stem}.png"),
        (8, 4),
        ("# 1 image and 1 mask are left out, such as test/t.png and testannot/t.png.",),
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
    "unused folder": (
        [("x/{}.jpg", "y/{}.png", N), ("extra/{}-a.jpg", "other/{}-b.png", M)],
        ("y/{stem}.png", None),
        (8, None),
        ("# 4 images and 4 masks are left out, such as extra/008-a.jpg and other/008-b.png.",),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_suggestion_pairs_every_image_or_lists_it_as_left_out(name: str, tmp_path: Path) -> None:
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
    assert ("left out, such as" in text) == any(
        "left out, such as" in comment for comment in comments
    )
    for sample in [
        *samples["train"],
        *samples["val"],
    ]:  # check that each image is paired with its own mask
        mask = Image.open(sample.mask_path)
        labels = Masks.of(description, "train", str(tmp_path)).decode(
            Path(sample.mask_path).read_bytes()
        )
        assert (labels - 1 == np.array(mask)).all()  # values 0, 1, 2 become classes 0, 1, 2


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


def with_mixed_modes(mask: np.ndarray, n: int, path: Path) -> None:
    save(path, mask if n % 2 else np.array(COLORED, np.uint8)[mask] + np.uint8(9))


def with_many_values(mask: np.ndarray, n: int, path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) + 64 * n
    cv2.imwrite(str(path), values.repeat(4, 0).repeat(4, 1))


def with_wild_palettes(mask: np.ndarray, n: int, path: Path) -> None:
    save(path, mask, np.random.default_rng(n).integers(0, 256, 9).tolist())


REFUSED = [
    pytest.param(as_jpeg, "8 masks are JPEGs, first m/000.jpg; JPEG changes", id="colour JPEGs"),
    pytest.param(as_grey_jpeg, "8 masks are JPEGs, first m/000.jpeg; JPEG", id="grey JPEGs"),
    pytest.param(as_webp, "8 masks are WebPs, first m/000.webp; masks must be", id="WebPs"),
    pytest.param(cut_short, "8 masks cannot be decoded, first m/000.png", id="all truncated"),
    pytest.param(
        as_text,
        "8 masks cannot be decoded, first m/000.png (unknown image format)",
        id="text instead of images",
    ),
    pytest.param(some_cut_short, " (2 of 8 masks cannot be read); copy ", id="some truncated"),
    pytest.param(with_mixed_modes, "is in colours, but ", id="label masks and colour masks mixed"),
    pytest.param(
        with_many_values,
        "needs 2 to 253 classes, but the masks have 510; merge or add classes",
        id="too many values",
    ),
    pytest.param(
        with_wild_palettes,
        "in different colours, so its meaning is unknown",
        id="different palettes",
    ),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_suggestion_names_unusable_masks_and_writes_no_file(
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
