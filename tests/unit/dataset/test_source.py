"""Tests of dataset/source.py."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dataset.description import ade20k
from dataset.labels import Labels
from dataset.matching import Samples, find_samples
from dataset.source import DataSource, check_labels
from errors import ConfigError, DataError
from tests.support.report import cut, original, path, sample, wrong_label  # noqa: F401
from tests.support.source import describe, tree


@pytest.mark.parametrize("exclude", [3, [""], [["a"]], [{"a": 1}]])
def test_exclude_setting_must_be_a_list_of_paths(exclude: Any) -> None:
    with pytest.raises(ConfigError, match=r"exclude: got .*; expected paths of files or folders"):
        describe(exclude=exclude)


@pytest.mark.parametrize("fraction", [0.001, 0.15, 0.5, 0.999])
@pytest.mark.parametrize("names", ["{}", "ADE_train_{:08}", "street/{}", "é {}"])
def test_neither_part_of_a_fraction_split_is_empty(
    tmp_path: Path, names: str, fraction: float
) -> None:
    description = describe(train={"images": "img", "masks": "seg"}, val={"fraction": fraction})
    for count in range(1, 13):
        name = names.format(count)
        tree(tmp_path, [f"img/{name}.jpg", f"seg/{name}.png"])
        train, val = (find_samples(description, s, str(tmp_path))[0] for s in ("train", "val"))
        paths = {sample.image_path for sample in train} | {sample.image_path for sample in val}
        assert len(paths) == len(train) + len(val) == count
        assert count == 1 or (train and val)


@pytest.mark.parametrize(
    ("files", "reasons"),
    [
        pytest.param(["img/5.jpg"], {"its mask is missing; expected seg"}, id="missing mask"),
        pytest.param(["seg/5.png"], {"its image is missing"}, id="missing image"),
        pytest.param(["img/1.png"], {"has the same name as"}, id="duplicate image name"),
        pytest.param(["seg/1.bmp"], {"has the same name as"}, id="duplicate mask name"),
        pytest.param(
            ["img/5.jpg", "seg/6.png"],
            {"its mask is missing; expected seg", "its image is missing"},
            id="missing mask and image",
        ),
    ],
)
def test_file_problem_in_a_fraction_split_is_reported_once(
    tmp_path: Path, files: list[str], reasons: set[str]
) -> None:
    pairs = [
        f"{kind}/{k}.{end}" for k in range(5) for kind, end in (("img", "jpg"), ("seg", "png"))
    ]
    tree(tmp_path, pairs + files)
    description = describe(train={"images": "img", "masks": "seg"}, val={"fraction": 0.5})
    findings = [f for s in ("train", "val") for f in find_samples(description, s, str(tmp_path))[1]]
    assert len(findings) == len(reasons)
    assert all(any(finding.reason.startswith(reason) for finding in findings) for reason in reasons)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [("a", "/x/a.jpg", "/y/a.png")],
        [("é/ü", "/x/é/ü.jpg", "/y/\udcff.png"), ("", "", ""), ("b c", "/ \n.jpg", "日本")],
    ],
)
def test_sample_list_behaves_like_a_sequence(samples: list[tuple[str, str, str]]) -> None:
    packed = pickle.loads(pickle.dumps(Samples(*zip(*samples))))
    assert list(packed) == samples and len(packed) == len(samples)
    assert packed[1:] == samples[1:] and packed[::-1] == samples[::-1]
    with pytest.raises(IndexError):
        packed[len(samples)]
    if samples:
        assert packed[-1] == samples[-1] and packed[0].uid == samples[0][0]


def test_label_check_before_training_finds_bad_masks(path):
    def source(labels: Labels) -> DataSource:
        return DataSource(str(path), "train", ade20k(labels))

    check_labels(source(Labels(12)))
    check_labels(source(Labels(13, False)))
    check_labels(source(Labels(11, ignore_label=12)))
    with pytest.raises(DataError, match=r"\.png: .* have label 12, .* labels 1 to 11; set"):
        check_labels(source(Labels(11)))
    with pytest.raises(DataError, match=r"have label 12, .* labels 0 to 11; set"):
        check_labels(source(Labels(12, False)))
    image, mask = sample(path, 24)
    wrong_label(image, mask)
    with pytest.raises(DataError, match=f"{mask}: .* of its pixels have label 77, .*; set model"):
        check_labels(source(Labels(12)), max_masks=4)  # the check always includes the last mask
    cut(mask, 0.5)
    with pytest.raises(DataError, match=f"{mask}: cannot be decoded"):
        check_labels(source(Labels(12)))
