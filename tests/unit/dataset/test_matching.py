"""Tests of dataset/matching.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.description import (
    parse_description,
)
from dataset.matching import find_samples, list_samples, list_splits
from errors import ConfigError, DataError
from tests.support.data import folder, make_data, save, train  # noqa: F401
from tests.support.description import GOOD, source  # noqa: F401


def test_samples_are_found_whatever_their_file_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, mask = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)
    for name in ("ADE_train_00000002", "b", "street/7", "a.b"):
        save(tmp_path, "train", name, image, mask)
    images, masks = tmp_path / "images/training", tmp_path / "annotations/training"
    Image.fromarray(image).save(images / "UPPER.JPG", "JPEG")
    Image.fromarray(mask).save(masks / "UPPER.PNG", "PNG")
    for name in ("Thumbs.db", ".DS_Store", "._b.jpg", "notes.txt", "b.json"):
        (images / name).write_bytes(b"something else")
    (images / ".cache").mkdir()
    (images / ".cache/c.jpg").write_bytes(b"something else")
    Image.fromarray(mask).save(masks / "alone.png")
    with caplog.at_level(logging.WARNING):
        samples = list_samples(str(tmp_path), "train")
    assert [sample.uid for sample in samples] == ["00000002", "UPPER", "a.b", "b", "street/7"]
    assert samples[1].image_path.endswith("UPPER.JPG") and samples[1].mask_path.endswith(".PNG")
    assert "alone.png" in caplog.text


def test_dataset_is_found_in_the_inner_ade20k_folder(tmp_path: Path) -> None:
    make_data(tmp_path / "ADEChallengeData2016", 2, 1)
    assert len(list_samples(str(tmp_path), "train")) == 2
    assert len(list_samples(str(tmp_path / "ADEChallengeData2016"), "val")) == 1


def test_missing_files_are_reported_with_their_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images/training: folder is missing"):
        list_samples(str(tmp_path), "train")
    make_data(tmp_path, 5, 1)
    with pytest.raises(DataError, match="unknown split 'test'; use train or val"):
        list_samples(str(tmp_path), "test")
    for number in (2, 4):
        (tmp_path / f"annotations/training/ADE_train_{number:08d}.png").unlink()
    with pytest.raises(
        DataError, match=r"00000002.jpg: its mask is missing; expected .*training \(and 1 more\)"
    ):
        list_samples(str(tmp_path), "train")
    for path in (tmp_path / "images/training").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="contains no images"):
        list_samples(str(tmp_path), "train")
    save(tmp_path, "train", "a", np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8))
    (tmp_path / "images/training/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"same name as .*a\.jpg"):
        list_samples(str(tmp_path), "train")


def touch(root: Path, *files: str) -> None:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pairs(root: Path, train: dict[str, str], split: str = "train", **more: Any) -> list[tuple]:
    """Return each sample's name, image and mask relative to the root, and then the problems."""
    raw = {**GOOD, "train": train, "val": train, **more}
    samples, problems = find_samples(parse_description(raw), split, str(root))
    rows: list[tuple] = [
        (uid, *(Path(path).relative_to(root).as_posix() for path in rest)) for uid, *rest in samples
    ]
    return rows + [(p.path.removeprefix(f"{root}/"), p.reason) for p in problems]


def test_path_templates_pair_images_with_masks(tmp_path: Path) -> None:
    touch(tmp_path, "left/a/1_left.png", "left/a/b/2_left.png", "left/3_left.png", "left/notes.txt")
    touch(tmp_path, "fine/a/1_ids.png", "fine/a/b/2_ids.png", "fine/3_ids.png", "fine/3_color.png")
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


def test_mask_beside_its_image_is_not_listed_as_an_image(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "1_L.png", "2.PNG", "2_L.png")
    assert pairs(tmp_path, {"images": ".", "masks": "{stem}_L.png"}) == [
        ("1", "1.png", "1_L.png"),
        ("2", "2.PNG", "2_L.png"),
    ]


def test_samples_are_selected_by_list_files(tmp_path: Path) -> None:
    touch(tmp_path, "img/1.jpg", "img/2.jpg", "img/3.jpg", "seg/1.png", "seg/2.png", "seg/3.png")
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
        ("train.txt:2", f"{tmp_path}/img has no image named 7; correct the list"),
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
        ("train.txt:1", "file seg/9.png is missing"),
        ("train.txt:2", "got 1 columns; expected an image and its mask"),
    ]
    assert pairs(tmp_path, {"list": "none.txt"}) == [
        ("none.txt", "cannot read the list: No such file or directory")
    ]


@pytest.mark.parametrize("excluded", ["img/2.jpg", "seg/2.png", "img/2*", "seg/2.*"])
def test_excluded_pairs_of_a_list_are_left_out(tmp_path: Path, excluded: str) -> None:
    touch(tmp_path, "img/1.jpg", "img/2.jpg", "seg/1.png", "seg/2.png")
    (tmp_path / "train.txt").write_text("img/1.jpg seg/1.png\nimg/2.jpg seg/2.png")
    kept = pairs(tmp_path, {"list": "train.txt"}, exclude=[excluded])
    assert kept == [("1", "img/1.jpg", "seg/1.png")]


def test_missing_files_and_name_conflicts_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "img/1.jpg", "img/2.jpg", "img/a/1.jpg", "seg/1.png", "seg/7.png")
    rows = pairs(tmp_path, {"images": "img", "masks": "seg/{stem}.png"})
    assert rows == [
        ("1", "img/1.jpg", "seg/1.png"),
        ("img/2.jpg", "its mask is missing; expected seg/{stem}.png"),
        ("img/a/1.jpg", f"has the same mask as {tmp_path}/img/1.jpg; rename one of them"),
        ("seg/7.png", "its image is missing"),
    ]
    assert pairs(tmp_path, {"images": "no", "masks": "seg"})[0] == ("no", "folder is missing")
    assert pairs(tmp_path, {"images": "img", "masks": "no"}) == [("no", "folder is missing")]
    nothing = pairs(tmp_path, {"images": "seg/{stem}.jpg", "masks": "seg/{stem}.png"})
    assert "contains no images for train" in nothing[-1][1]
    with pytest.raises(
        ConfigError, match=r"train.images: unknown placeholder {city}; use {stem}, {dir}"
    ):
        pairs(tmp_path, {"images": "{city}/{stem}.jpg", "masks": "seg"})


def test_fraction_divides_images_even_if_most_have_no_mask(tmp_path: Path) -> None:
    touch(tmp_path, *(f"img/{i}.jpg" for i in range(40)), *(f"seg/{i}.png" for i in range(10)))
    raw = {**GOOD, "train": {"images": "img", "masks": "seg"}, "val": {"fraction": 0.5}}
    listings = list_splits(parse_description(raw), "train", str(tmp_path))
    train, val = ({s.uid for s in listings[name].samples} for name in ("train", "val"))
    assert train and val and not train & val and len(train | val) == 10


def test_fraction_split_stays_fixed_when_images_are_added(tmp_path: Path) -> None:
    touch(tmp_path, *(f"img/{i}.jpg" for i in range(400)), *(f"seg/{i}.png" for i in range(400)))
    raw = {**GOOD, "train": {"images": "img", "masks": "seg"}, "val": {"fraction": 0.2}}
    description = parse_description(raw)

    def split() -> list[set[str]]:
        return [
            {sample.uid for sample in find_samples(description, name, str(tmp_path))[0]}
            for name in ("train", "val")
        ]

    train, val = split()
    assert not train & val and len(train | val) == 400
    assert 50 <= len(val) <= 110  # 80, within four standard deviations
    touch(tmp_path, *(f"img/{i}.jpg" for i in range(400, 450)))
    touch(tmp_path, *(f"seg/{i}.png" for i in range(400, 450)))
    more_train, more_val = split()
    assert train < more_train and val < more_val
