"""Tests of extras/preparation/unused.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataset.source import DataSource
from extras.preparation.unused import find_unused
from tests.support.source import FOLDERS, describe, tree

PAIRS = ["img/train/1.jpg", "seg/train/1.png", "img/val/2.jpg", "seg/val/2.png"]
BESIDE = {
    split: {"images": f"{split}/{{stem}}.png", "masks": f"{split}/{{stem}}_L.png"}
    for split in ("train", "val")
}
BESIDE_PAIRS = ["train/1.png", "train/1_L.png", "val/2.png", "val/2_L.png"]
LISTED = {
    split: {"images": "img", "masks": "seg", "list": f"{split}.txt"} for split in ("train", "val")
}
COLUMNS = {split: {"list": f"{split}.txt"} for split in ("train", "val")}


def case(
    more: list[str], expected: dict[str, int], id: str, layout: Any = None, **keys: Any
) -> Any:
    return pytest.param(layout or FOLDERS, more, keys, expected, id=id)


@pytest.mark.parametrize(
    ("layout", "more", "keys", "expected"),
    [
        case([], {}, "no unused files"),
        case(["img/test/3.jpg", "img/test/4.jpg"], {"images": 2}, "third split"),
        case(["old/3.jpeg", "3.WEBP"], {"images": 2}, "anywhere below the root"),
        case(["old/3.png"], {"either": 1}, "PNG, image or mask"),
        case(["seg/train/color/1.png"], {"orphans": 1}, "mask without image"),
        case(["img/train/.3.jpg", ".cache/3.jpg"], {}, "hidden files"),
        case(["img/train/3.heic", "3.AVIF"], {"images": 2}, "unsupported formats"),
        case(["img/train/3.docx", "notes.docx"], {"others": 1}, "other file types"),
        case(["img/train/1.json", "seg/val/README"], {}, "text files beside images"),
        case(["a/3.jpg", "b/4.jpg"], {"images": 1}, "excluded folder", exclude="a"),
        case(["a/3.jpg", "a/4.jpg"], {"images": 1}, "excluded file", exclude=["a/3.jpg"]),
        case(
            ["a/3.jpg", "b/4_old.jpg", "b/4.jpg"],
            {"images": 1},
            "excluded templates",
            exclude=["a/*.jpg", "**/*_old.jpg"],
        ),
        case(
            ["train/3.png", "train/1_color.png"],
            {},
            "masks beside images, unused images",
            BESIDE,
        ),
        case(["other/1_L.png"], {"either": 1}, "masks beside images, file elsewhere", BESIDE),
        case(["img/3.jpg", "seg/3.png", "old/4.jpg"], {"unlisted": 2, "images": 1}, "list", LISTED),
        case(["x/3.jpg"], {"unlisted": 1}, "lists of pairs", COLUMNS),
        case(["img/train/3.jpg"], {}, "image without mask"),
    ],
)
def test_files_that_no_split_uses_are_found(
    tmp_path: Path, layout: Any, more: list[str], keys: Any, expected: dict[str, int]
) -> None:
    pairs = BESIDE_PAIRS if layout is BESIDE else PAIRS
    if layout in (LISTED, COLUMNS):
        pairs = ["img/1.jpg", "seg/1.png", "img/2.jpg", "seg/2.png"]
        for number, split in enumerate(("train", "val"), 1):
            line = f"{number}\n" if layout is LISTED else f"img/{number}.jpg seg/{number}.png\n"
            (tmp_path / f"{split}.txt").write_text(line)
    tree(tmp_path, pairs + more)
    source = DataSource(str(tmp_path), "train", describe(**layout, **keys))
    unused = find_unused(source)
    assert {name: count for name, count in unused.counts.items() if count} == expected
    report = " ".join(finding.path + finding.reason for finding in unused.findings())
    assert all(Path(file).name in report for file in unused.images + unused.either)
    assert len(source.listing().samples) == 1


def test_linked_images_are_not_counted_as_unused(tmp_path: Path) -> None:
    tree(tmp_path, ["all/1.jpg", "all/2.jpg", "masks/1.png", "masks/2.png"])
    for split, name in (("train", "1"), ("val", "2")):
        for kind, folder, suffix in (("img", "all", "jpg"), ("seg", "masks", "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            link = tmp_path / kind / split / f"{name}.{suffix}"
            link.symlink_to(tmp_path / folder / f"{name}.{suffix}")
    unused = find_unused(DataSource(str(tmp_path), "train", describe()))
    assert not any(unused.counts.values())


def test_output_picture_is_not_reported_as_unused(tmp_path: Path) -> None:
    tree(tmp_path, [*PAIRS, "set.png"])
    source = DataSource(str(tmp_path), "train", describe())
    assert find_unused(source).either == [str(tmp_path / "set.png")]
    assert not any(find_unused(source, [str(tmp_path / "set.png")]).counts.values())


def test_masks_of_both_splits_may_share_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(tmp_path, ["img/train/1.jpg", "img/val/2.jpg", "seg/1.png", "seg/2.png", "seg/3.png"])
    layout = {s: {"images": f"img/{s}", "masks": "seg/{stem}.png"} for s in ("train", "val")}
    source = DataSource(str(tmp_path), "train", describe(**layout))
    assert len(source.samples()) == 1 and not caplog.text
    assert find_unused(source).masks == [str(tmp_path / "seg/3.png")]
