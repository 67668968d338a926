"""One split of one data set: what it lists, what it leaves out, and how often it looks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from data import build_data
from dataset import paths, shards, workers
from dataset.description import Description, ade20k, parse_description
from dataset.matching import Samples, find_samples, list_samples
from dataset.shard_classes import shard_classes
from dataset.shards import fetch_beside
from dataset.source import DataSource, ShardOptions
from errors import ConfigError, DataError, StoreError
from extras.preparation.synthetic import make
from extras.preparation.unused import find_unused
from training.config import data_sources, resolve

CLASSES = {"classes": {"road": [1], "sky": [2]}}
FOLDERS = {split: {"images": f"img/{split}", "masks": f"seg/{split}"} for split in ("train", "val")}
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


def describe(**keys: Any) -> Description:
    return parse_description({**FOLDERS, **CLASSES, **keys})


def tree(root: Path, files: list[str]) -> None:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# What no split uses


def case(
    more: list[str], expected: dict[str, int], id: str, layout: Any = None, **keys: Any
) -> Any:
    return pytest.param(layout or FOLDERS, more, keys, expected, id=id)


@pytest.mark.parametrize(
    ("layout", "more", "keys", "expected"),
    [
        case([], {}, "nothing is left"),
        case(["img/test/3.jpg", "img/test/4.jpg"], {"images": 2}, "a third split"),
        case(["old/3.jpeg", "3.WEBP"], {"images": 2}, "anywhere below the root"),
        case(["old/3.png"], {"either": 1}, "a PNG may be either"),
        case(["seg/train/color/1.png"], {"orphans": 1}, "a mask without image"),
        case(["img/train/.3.jpg", ".cache/3.jpg"], {}, "hidden files"),
        case(["img/train/3.heic", "3.AVIF"], {"images": 2}, "formats that are not read"),
        case(["img/train/3.docx", "notes.docx"], {"others": 1}, "another kind of file"),
        case(["img/train/1.json", "seg/val/README"], {}, "files that lie beside images"),
        case(["a/3.jpg", "b/4.jpg"], {"images": 1}, "a folder excluded", exclude="a"),
        case(["a/3.jpg", "a/4.jpg"], {"images": 1}, "a file excluded", exclude=["a/3.jpg"]),
        case(
            ["a/3.jpg", "b/4_old.jpg", "b/4.jpg"],
            {"images": 1},
            "templates excluded",
            exclude=["a/*.jpg", "**/*_old.jpg"],
        ),
        case(
            ["train/3.png", "train/1_color.png"],
            {},
            "side by side, and both are images without a mask",
            BESIDE,
        ),
        case(["other/1_L.png"], {"either": 1}, "side by side, and elsewhere", BESIDE),
        case(["img/3.jpg", "seg/3.png", "old/4.jpg"], {"unlisted": 2, "images": 1}, "list", LISTED),
        case(["x/3.jpg"], {"unlisted": 1}, "lists of pairs", COLUMNS),
        case(["img/train/3.jpg"], {}, "an image without mask is a problem already"),
    ],
)
def test_what_no_split_uses(
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
    named = " ".join(finding.path + finding.reason for finding in unused.findings())
    assert all(Path(file).name in named for file in unused.images + unused.either)
    assert len(source.listing().samples) == 1


def test_links_are_no_further_images(tmp_path: Path) -> None:
    tree(tmp_path, ["all/1.jpg", "all/2.jpg", "masks/1.png", "masks/2.png"])
    for split, name in (("train", "1"), ("val", "2")):
        for kind, folder, suffix in (("img", "all", "jpg"), ("seg", "masks", "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            link = tmp_path / kind / split / f"{name}.{suffix}"
            link.symlink_to(tmp_path / folder / f"{name}.{suffix}")
    unused = find_unused(DataSource(str(tmp_path), "train", describe()))
    assert not any(unused.counts.values())


def test_a_picture_that_a_command_drew_is_not_of_the_data_set(tmp_path: Path) -> None:
    tree(tmp_path, [*PAIRS, "set.png"])
    source = DataSource(str(tmp_path), "train", describe())
    assert find_unused(source).either == [str(tmp_path / "set.png")]
    assert not any(find_unused(source, [str(tmp_path / "set.png")]).counts.values())


def test_masks_of_both_splits_in_one_folder_are_no_orphans(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(tmp_path, ["img/train/1.jpg", "img/val/2.jpg", "seg/1.png", "seg/2.png", "seg/3.png"])
    layout = {s: {"images": f"img/{s}", "masks": "seg/{stem}.png"} for s in ("train", "val")}
    source = DataSource(str(tmp_path), "train", describe(**layout))
    assert len(source.samples()) == 1 and not caplog.text
    assert find_unused(source).masks == [str(tmp_path / "seg/3.png")]


@pytest.mark.parametrize("exclude", [3, [""], [["a"]], [{"a": 1}]])
def test_exclude_is_a_list_of_paths(exclude: Any) -> None:
    with pytest.raises(ConfigError, match=r"exclude: .* is not a path"):
        describe(exclude=exclude)


# A fraction


@pytest.mark.parametrize("fraction", [0.001, 0.15, 0.5, 0.999])
@pytest.mark.parametrize("names", ["{}", "ADE_train_{:08}", "street/{}", "é {}"])
def test_a_fraction_leaves_no_split_empty(tmp_path: Path, names: str, fraction: float) -> None:
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
        pytest.param(["img/5.jpg"], {"its mask is missing, seg"}, id="no mask"),
        pytest.param(["seg/5.png"], {"its photo is missing"}, id="no image"),
        pytest.param(["img/1.png"], {"same name as"}, id="the same name twice"),
        pytest.param(["seg/1.bmp"], {"same name as"}, id="two masks"),
        pytest.param(
            ["img/5.jpg", "seg/6.png"],
            {"its mask is missing, seg", "its photo is missing"},
            id="one of each",
        ),
    ],
)
def test_one_fault_of_a_fraction_is_one_finding(
    tmp_path: Path, files: list[str], reasons: set[str]
) -> None:
    pairs = [
        f"{kind}/{k}.{end}" for k in range(5) for kind, end in (("img", "jpg"), ("seg", "png"))
    ]
    tree(tmp_path, pairs + files)
    description = describe(train={"images": "img", "masks": "seg"}, val={"fraction": 0.5})
    found = [f for s in ("train", "val") for f in find_samples(description, s, str(tmp_path))[1]]
    assert len(found) == len(reasons)
    assert all(any(finding.reason.startswith(reason) for finding in found) for reason in reasons)


# How samples are kept, and how often folders are read


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [("a", "/x/a.jpg", "/y/a.png")],
        [("é/ü", "/x/é/ü.jpg", "/y/\udcff.png"), ("", "", ""), ("b c", "/ \n.jpg", "日本")],
    ],
)
def test_samples_are_a_sequence(samples: list[tuple[str, str, str]]) -> None:
    packed = pickle.loads(pickle.dumps(Samples(*zip(*samples))))
    assert list(packed) == samples and len(packed) == len(samples)
    assert packed[1:] == samples[1:] and packed[::-1] == samples[::-1]
    with pytest.raises(IndexError):
        packed[len(samples)]
    if samples:
        assert packed[-1] == samples[-1] and packed[0].uid == samples[0][0]


@pytest.mark.parametrize("described", [False, True], ids=["ADE20K's layout", "a fraction"])
def test_a_process_reads_each_folder_once(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: bool
) -> None:
    make(str(tmp_path), training=12, validation=6, size=48)
    root = tmp_path / "ADEChallengeData2016"
    for section in ("train_dataset", "eval_dataset"):
        tiny[section]["path"] = str(root if described else tmp_path)
    if described:
        names = {f"class {k}": [k] for k in range(1, 13)}
        train = {"images": "images/training", "masks": "annotations/training"}
        tiny["data"] = {"train": train, "val": {"fraction": 0.4}, "classes": names, "ignore": [0]}
    read: list[str] = []
    list_files = paths.list_files

    def note(folder: str) -> list[str]:
        read.append(os.path.relpath(folder, root))
        return list_files(folder)

    monkeypatch.setattr(paths, "list_files", note)
    config = resolve(tiny)
    sources = data_sources(config)
    for split, source in sources.items():
        build_data(config, split, source=source)
    splits = ["training"] if described else ["training", "validation"]
    assert read == [f"{kind}/{split}" for split in splits for kind in ("images", "annotations")]


def test_folders_are_read_anew_by_a_new_source(tmp_path: Path) -> None:
    make(str(tmp_path), training=2, validation=1, size=48)
    before = list_samples(str(tmp_path), "train")
    Path(before[0].mask_path).unlink()
    with pytest.raises(DataError, match="its mask is missing"):
        list_samples(str(tmp_path), "train")


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.available_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert workers.available_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers.available_cores() == 1


# A store that does not say whether there is a description


def client_error(code: str) -> Exception:
    return ClientError({"Error": {"Code": code, "Message": "not found!"}}, "HeadObject")


@pytest.mark.parametrize(
    ("error", "is_error"),
    [
        pytest.param(FileNotFoundError("Object gs://b/x not found."), False, id="no such object"),
        pytest.param(client_error("404"), False, id="404"),
        pytest.param(client_error("NoSuchKey"), False, id="NoSuchKey"),
        pytest.param(RuntimeError("The specified blob does not exist."), False, id="words"),
        pytest.param(client_error("403"), True, id="403"),
        pytest.param(client_error("500"), True, id="500"),
        pytest.param(client_error("SlowDown"), True, id="SlowDown"),
        pytest.param(ConnectionResetError("reset by peer"), True, id="reset"),
        pytest.param(EndpointConnectionError(endpoint_url="http://x"), True, id="no endpoint"),
        pytest.param(PermissionError(13, "denied"), True, id="denied"),
        pytest.param(TimeoutError("timed out"), True, id="timeout"),
    ],
)
def test_only_a_store_that_says_so_has_no_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_error: bool
) -> None:
    def download(*_: Any) -> None:
        raise error

    monkeypatch.setattr(shards.CloudDownloader, "direct_download", download)
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)

    def find() -> str | None:
        return fetch_beside("s3://b/set", "description.yaml", str(tmp_path))

    source = DataSource("s3://b/set", "train", ade20k(), ShardOptions(str(tmp_path / "cache")))
    if not is_error:
        assert find() is None and shard_classes(source) is None
        return
    with pytest.raises(DataError, match=r"s3://b/set/description\.yaml: "):
        find()
    with pytest.raises(DataError, match=r"s3://b/set/description\.yaml: "):
        shard_classes(source)
    # A run whose cache has the split goes on without the store.
    tree(tmp_path, ["cache/train/index.json"])
    assert shard_classes(source) is None


def test_a_store_that_answers_again_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [ConnectionResetError("reset"), client_error("503")]

    def download(remote: str, local: str) -> None:
        if answers:
            raise answers.pop()
        Path(local).write_text("x")

    monkeypatch.setattr(shards.CloudDownloader, "direct_download", download)
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    assert fetch_beside("s3://b/set", "description.yaml", str(tmp_path)) is not None
    answers += [ConnectionResetError("reset")] * 9
    with pytest.raises(StoreError, match="reset"):
        fetch_beside("s3://b/set", "description.yaml", str(tmp_path))
