"""Tests of segmentation/classes.py."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from errors import ClassError
from segmentation.classes import (
    ClassInfo,
    classes_from_json,
    classes_to_json,
    distinct_colors,
    label_warning,
    load_classes,
    match_classes,
    rename_classes,
)

NAMES = ["sky", "road", "Straßenlaterne", "tree"]


def test_ade20k_classes_match_mmsegmentation():
    from mmseg.datasets import ADE20KDataset

    classes = load_classes(None, 150)
    assert [c.name for c in classes] == [name.strip() for name in ADE20KDataset.CLASSES]
    assert [list(c.color) for c in classes] == ADE20KDataset.PALETTE
    with_other = load_classes(None, 151)
    assert with_other[0].name == "other" and with_other[1:] == classes


@pytest.mark.parametrize(
    "text, colors",
    [
        ("sky\nroad\nStraßenlaterne\ntree\n", None),
        ("name\nsky\nroad\n\nStraßenlaterne\ntree", None),
        ("\ufeffname\r\nsky\r\nroad\r\nStraßenlaterne\r\ntree\r\n", None),
        (
            "name,red,green,blue\nsky,1,2,3\nroad,4,5,6\nStraßenlaterne,7,8,9\ntree,0,0,255\n",
            (1, 2, 3),
        ),
    ],
)
def test_class_names_are_read_from_files(tmp_path: Path, text: str, colors: tuple | None):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    classes = load_classes(str(path), 4)
    assert [c.name for c in classes] == NAMES
    assert classes[0].color == (colors or distinct_colors(4)[0])
    assert [c.name for c in load_classes(NAMES, 4)] == NAMES
    with pytest.raises(ClassError, match=r"classes\.txt names 4 classes, but the model predicts 5"):
        load_classes(str(path), 5)


@pytest.mark.parametrize("content", [b"sky,red\n", b"sky,1,2,300\n", b"\xff\xfe\x00", None])
def test_invalid_class_file_gives_a_one_line_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "classes.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClassError, match=r"classes\.csv") as error:
        load_classes(str(path), 1)
    assert "\n" not in str(error.value)


def test_classes_round_trip_through_json():
    classes = load_classes(None, 150)
    assert classes_from_json(classes_to_json(classes)) == classes
    for bad in ("", "[1]", '[{"name": "sky"}]'):
        with pytest.raises(ClassError):
            classes_from_json(bad)


def test_generated_colours_are_distinct():
    assert len(set(distinct_colors(254))) == 254
    for count, least in ((12, 40), (40, 20), (150, 10)):
        colors = np.array([[(0, 0, 0), (255, 255, 255), *distinct_colors(count)]], np.float32)
        # A colour difference of about 2 is just noticeable.
        lab = cv2.cvtColor(colors / 255, cv2.COLOR_RGB2LAB)[0]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > least
    assert distinct_colors(5) == distinct_colors(12)[:5]


def classes_named(names: str | None) -> list[ClassInfo] | None:
    return None if names is None else load_classes(names.split(","), names.count(",") + 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        pytest.param("sky,road,tree", "sky,road,tree", None, id="same order"),
        pytest.param("tree,sky,road", "sky,road,tree", [2, 0, 1], id="different order"),
        pytest.param("Traffic_Light,sky", "sky,traffic light", [1, 0], id="different spelling"),
        pytest.param("class 1,class 0", "sky,road", None, id="placeholders"),
        pytest.param("sky,road", "class_7,class_9", None, id="placeholders of a converted dataset"),
        pytest.param("1,0", "0,1", None, id="numbers as names"),
        pytest.param(None, "sky,road", None, id="own names unknown"),
        pytest.param("sky,road", None, None, id="other names unknown"),
        pytest.param("sky,sky", "sky,sky", None, id="duplicate name, same order"),
        pytest.param("a", "1,2,3", None, id="different number, placeholders"),
    ],
)
def test_classes_are_matched_by_name(ours: str | None, theirs: str | None, order: list[int] | None):
    assert match_classes(classes_named(ours), classes_named(theirs), "B.yaml", "x.pt") == order


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        pytest.param(
            "sky,bicyclist",
            "sky,road",
            "B.yaml: class 1 is bicyclist, but in x.pt it is road",
            id="one class",
        ),
        pytest.param(
            "road,bus,sky",
            "sky,road,tree",
            "B.yaml: class 1 is bus, but in x.pt it is road",
            id="moved class",
        ),
        pytest.param(
            "cat,dog", "sky,road", "B.yaml: class 0 is cat, but in x.pt it is sky", id="all classes"
        ),
        pytest.param(
            "sky", "sky,road", "B.yaml has 1 classes, but x.pt has 2", id="number of classes"
        ),
        pytest.param(
            "sky,road,sky",
            "sky,sky,road",
            "the name sky occurs twice, .*class 1 is road, ",
            id="duplicate name",
        ),
    ],
)
def test_error_names_the_unmatched_classes(ours: str, theirs: str, message: str):
    with pytest.raises(ClassError, match=message) as error:
        match_classes(classes_named(ours), classes_named(theirs), "B.yaml", "x.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "is_rejected"),
    [
        pytest.param(["Himmel", "Strasse", "Baum"], False, id="translated"),
        pytest.param(["sky", "street", "tree"], False, id="renamed class"),
        pytest.param(["road", "sky", "tree"], True, id="swapped classes"),
        pytest.param(["sky", "tree", "shrub"], True, id="shifted by one"),
    ],
)
def test_renaming_classes_must_not_reorder_them(names: list[str], is_rejected: bool):
    recorded = classes_named("sky,road,tree")
    if is_rejected:
        with pytest.raises(ClassError, match=r"class \d is \w+, but in x.pt it is \w+; give"):
            rename_classes(names, 3, recorded, "x.pt")
    else:
        assert [c.name for c in rename_classes(names, 3, recorded, "x.pt")] == names
    assert [c.name for c in rename_classes(names, 3, None, "x.pt")] == names
    assert rename_classes(None, 3, recorded, "x.pt") == recorded


@pytest.mark.parametrize(
    ("occurs", "unlabelled", "line"),
    [
        pytest.param([1, 1, 1], 0.4, None, id="all classes"),
        pytest.param([1, 0, 1], 0.1, "no mask has class road", id="missing class"),
        pytest.param(
            [1, 0, 0],
            None,
            "no mask has the classes road, tree; every labelled pixel is class sky",
            id="single class",
        ),
        pytest.param([0, 0, 0], 1.0, "no mask has a labelled pixel; try X", id="no labels"),
        pytest.param(
            [1, 1, 1], 0.83, "83% of the pixels have no class; try X", id="few labelled pixels"
        ),
    ],
)
def test_missing_classes_and_labels_are_reported(
    occurs: list[int], unlabelled: float | None, line: str | None
):
    classes = load_classes(["sky", "road", "tree"], 3)
    assert label_warning([bool(o) for o in occurs], classes, "mask", unlabelled, "try X") == line


def test_long_list_of_missing_classes_is_shortened():
    classes = load_classes([f"kind {letter}" for letter in "abcdefgh"], 8)
    line = label_warning([True] + [False] * 7, classes, "mask")
    assert line is not None and "kind b, kind c, kind d, kind e, kind f and 2 more" in line
    unnamed = load_classes(None, 3)
    assert label_warning([True, True, False], unnamed, "mask") == "no mask has class 2"
