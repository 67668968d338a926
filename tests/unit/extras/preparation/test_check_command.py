"""Tests of extras/preparation/check_command.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from convert_ade20k import convert
from dataset.matching import list_samples
from extras.preparation import check_command, check_report
from tests.support.description import check
from tests.support.report import (  # noqa: F401
    ROOT,
    cut,
    labels_of,
    main,
    original,
    path,
    run,
    sample,
    write,
    wrong_label,
)
from tests.support.run_helpers import file_limit
from tests.support.waits import short_measurement  # noqa: F401


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "the file is empty"),
        (None, "the image is 9x9, but its mask is 24x24; export both at the same size"),
    ],
)
def test_unreadable_image_gives_a_one_line_error(
    image: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), rng.integers(0, 256, (24, 24, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.eye(24, dtype=np.uint8))
    # This image has an alpha channel and no mask.
    grey = rng.integers(0, 256, (9, 9, 2), dtype=np.uint8)
    (tmp_path / "brand").mkdir()
    Image.fromarray(grey).save(tmp_path / "brand/logo.png")
    broken = tmp_path / "1.jpg"
    broken.write_bytes(cv2.imencode(".jpg", grey[..., 0])[1].tobytes() if image is None else image)
    arguments = [str(tmp_path), str(tmp_path / "found.yaml"), "--suggest", "--workers", "1"]
    assert check(arguments) == 1
    assert capsys.readouterr().err == f"error: {broken}: {reason}\n"


def damage_inside(image: Path, mask: Path) -> None:
    """Overwrite compressed data with zeros, so that the rest of the image decodes to garbage."""
    content = bytearray(image.read_bytes())
    start = content.rindex(b"\xff\xda") + 200
    content[start : start + 200] = bytes(200)
    write(image, bytes(content))


def dangling_link(image: Path, mask: Path) -> None:
    image.unlink()
    image.symlink_to("nowhere.jpg")


# Each kind of fault: (fault to plant, reported file, reported reason, whether training fails)
FAULTS: dict[str, tuple[Callable[[Path, Path], object], str, str, bool]] = {
    "no mask": (lambda p, m: m.unlink(), "image", "its mask is missing", True),
    "no image": (lambda p, m: p.unlink(), "mask", "its image is missing", False),
    "JPEG cut short": (lambda p, m: cut(p, 0.7), "image", "truncated", True),
    "JPEG without its end": (lambda p, m: cut(p, 0.99), "image", "truncated", True),
    "PNG cut short": (lambda p, m: cut(m, 0.5), "mask", "cannot be decoded", True),
    "empty image": (lambda p, m: write(p, b""), "image", "the file is empty", True),
    "empty mask": (lambda p, m: write(m, b""), "mask", "the file is empty", True),
    "web page": (lambda p, m: write(p, b"<html>404</html>"), "image", "unknown image format", True),
    "other size": (
        lambda p, m: write(m, np.ones((24, 48), np.uint8)),
        "image",
        "48x48, but its mask is 48x24",
        True,
    ),
    "label": (
        wrong_label,
        "mask",
        "0.04% of its pixels have label 77, but the classes are labels 1 to 12",
        True,
    ),
    "16-bit mask": (
        lambda p, m: write(m, labels_of(m).astype(np.uint16) * 1000 + 300),
        "mask",
        "labels must be between 0 and 255",
        True,
    ),
    "colour mask": (
        lambda p, m: write(m, cv2.applyColorMap(labels_of(m) * 20, cv2.COLORMAP_JET)),
        "mask",
        "the mask contains colours",
        True,
    ),
    "JPEG mask": (lambda p, m: Image.open(m).save(m, "JPEG"), "mask", "the mask is a JPEG", True),
    "nothing labelled": (
        lambda p, m: write(m, np.zeros((48, 48), np.uint8)),
        "mask",
        "no pixel has a class",
        False,
    ),
    "same name": (
        lambda p, m: shutil.copy(p, p.with_suffix(".JPEG")),
        "image",
        ".JPEG",
        True,
    ),
    "stray file": (
        lambda p, m: write(p.with_suffix(".docx"), b"PK"),
        ".docx",
        "the format .docx is not supported",
        False,
    ),
    "stray image": (
        lambda p, m: shutil.copy(p, p.parent.parent / "stray.jpg"),
        "../stray.jpg",
        "in neither training nor validation",
        False,
    ),
    "damage inside": (damage_inside, "image", "can be decoded but is damaged", False),
    "dangling link": (dangling_link, "image", "cannot be read: No such file", True),
}


def plant(path: Path, kinds: list[str]) -> dict[str, str]:
    """Plant one fault per sample; return the expected reason for each file."""
    expected = {}
    for number, kind in enumerate(kinds, 1):
        image, mask = sample(path, number)
        fault, where, reason, _ = FAULTS[kind]
        fault(image, mask)
        file = {"image": image, "mask": mask, ".docx": image.with_suffix(".docx")}.get(where)
        expected[str(file or image.parent.parent / "stray.jpg")] = reason
    return expected


def check_findings(findings: list[dict], expected: dict[str, str]) -> None:
    reasons = {finding["path"]: finding["reason"] for finding in findings}
    assert reasons.keys() == expected.keys() and len(findings) == len(expected)
    for file, reason in expected.items():
        assert reason in reasons[file]


def test_check_finds_every_planted_fault_and_nothing_else(path, capsys):
    fatal = [kind for kind, fault in FAULTS.items() if fault[3]]
    harmless = [kind for kind, fault in FAULTS.items() if not fault[3]]
    expected = plant(path, fatal + harmless)
    status, report = run(capsys, path)
    assert status == 1
    check_findings(report["problems"], dict(list(expected.items())[: len(fatal)]))
    check_findings(report["oddities"], dict(list(expected.items())[len(fatal) :]))
    # The sample of the fault "same name" is still a good pair.
    assert report["splits"]["train"]["good_pairs"] == 24 - len(fatal) - 1 + 1
    assert report["loader"] is None


def test_harmless_findings_alone_do_not_fail_the_check(path, capsys):
    expected = plant(path, [kind for kind, fault in FAULTS.items() if not fault[3]])
    status, report = run(capsys, path)
    assert status == 0 and report["problems"] == []
    check_findings(report["oddities"], expected)
    assert report["loader"]["batches"]


def test_supported_unusual_files_are_not_reported(path, capsys):
    """Unusual files still decode to the expected pixels and labels; see test_decoding.py."""
    pictures = [Image.open(sample(path, number)[0]) for number in range(1, 5)]
    pictures[0].convert("L").save(sample(path, 1)[0])
    pictures[1].convert("CMYK").save(sample(path, 2)[0])
    rgba = sample(path, 3)[0]
    pictures[2].convert("RGBA").save(rgba.with_suffix(".png"))
    rgba.unlink()
    upper = sample(path, 4)[0]
    upper.rename(upper.with_suffix(".JPG"))
    for number, mode in ((5, "P"), (6, "RGB"), (7, "I;16")):
        mask = sample(path, number)[1]
        labels = labels_of(mask)
        if mode == "RGB":
            labels = np.stack([labels] * 3, axis=-1)
        picture = Image.fromarray(labels.astype(np.uint16) if mode == "I;16" else labels)
        if mode == "P":
            picture.putpalette(list(range(256)) * 3)
        picture.save(mask)
    image, mask = sample(path, 8)
    Image.fromarray(np.zeros((1, 7, 3), np.uint8)).save(image)
    Image.fromarray(np.ones((1, 7), np.uint8)).save(mask)
    for file in sample(path, 9):
        (file.parent / "nested").mkdir()
        file.rename(file.parent / "nested" / file.name)
    for file in sample(path, 10):
        (file.parent / ".DS_Store").write_bytes(b"\0")
    status, report = run(capsys, path)
    assert (status, report["problems"], report["oddities"]) == (0, [], [])
    assert report["splits"]["train"]["good_pairs"] == 24
    assert report["splits"]["train"]["size"]["shortest_side"] == 1


def test_reported_statistics_match_the_files(path, capsys):
    image, mask = sample(path, 1)
    Image.open(image).resize((96, 24)).save(image)
    Image.fromarray(np.full((24, 96), 5, np.uint8)).save(mask)
    for number in range(1, 25):  # label 12 never occurs in training
        labels = labels_of(sample(path, number)[1])
        write(sample(path, number)[1], np.where(labels == 12, 0, labels).astype(np.uint8))
    status, report = run(capsys, path, "--workers", "1")
    assert status == 0
    samples = list_samples(str(path), "train")
    masks = [labels_of(Path(sample.mask_path)) for sample in samples]
    pixels = np.sum([np.bincount(labels.ravel(), minlength=13) for labels in masks], axis=0)
    train = report["splits"]["train"]
    assert [entry["label"] for entry in train["classes"]] == list(range(1, 13))
    shares = [entry["share"] for entry in train["classes"]]
    np.testing.assert_allclose(shares, pixels[1:] / pixels[1:].sum(), atol=1e-8)
    present = [sum((labels == label).any() for labels in masks) for label in range(1, 13)]
    assert [entry["photos"] for entry in train["classes"]] == present
    assert train["classes"][11]["photos"] == 0
    assert train["unlabelled"] == pytest.approx(pixels[0] / pixels.sum(), abs=1e-6)
    assert train["size"]["width_mean"] == pytest.approx((23 * 48 + 96) / 24, abs=0.05)
    assert (train["size"]["shortest_side"], train["size"]["longest_side"]) == (24, 96)
    assert report["splits"]["val"]["photos"] == 4


def test_text_report_shows_classes_faults_and_verdict(path, capsys):
    names = path / "names.txt"
    names.write_text("".join(f"kind {number}\n" for number in range(12)))
    arguments = [str(path), "--num-classes", "12", "--class-names", str(names)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "label 1 (kind 0)" in text and "images/s" in text and "24" in text
    assert text.endswith("training would work; no problems found\n")
    expected = plant(path, ["web page"])
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "PROBLEMS (1)" in text and next(iter(expected)) in text
    assert text.endswith("training would fail; fix the problems above\n")


def test_missing_folder_is_reported_as_a_problem(path, capsys):
    shutil.rmtree(path / ROOT / "annotations/validation")
    status, report = run(capsys, path)
    assert status == 1
    reasons = {finding["reason"].split(",")[0] for finding in report["problems"]}
    assert reasons == {"folder is missing"}


def test_long_list_of_similar_findings_is_shortened(path, capsys, monkeypatch):
    monkeypatch.setattr(check_report, "SHOWN", 3)
    for number in range(1, 9):
        sample(path, number)[1].unlink()
    write(sample(path, 9)[0], b"")
    assert main([str(path), "--num-classes", "12"]) == 1
    text = capsys.readouterr().out
    assert "PROBLEMS (9)" in text and text.count("its mask is missing") == 3
    assert "… and 5 more like these; --json lists all" in text and "the file is empty" in text
    assert len(run(capsys, path)[1]["problems"]) == 9


def test_overview_picture_does_not_overwrite_a_sample(path, tmp_path, capsys):
    target = Path(sample(path, 1)[1])
    before = target.read_bytes()
    for picture, reason in (
        (target, "would be overwritten, but it is an input"),
        (tmp_path / "gone/sheet.png", "No such file or directory"),
    ):
        assert main([str(path), "--num-classes", "12", "--picture", str(picture)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(picture) in error and reason in error
    assert target.read_bytes() == before
    with file_limit(1000):
        assert main(["--suggest", str(path), f"{tmp_path}/own.yaml"]) == 1
    assert f"error: {tmp_path}/own" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["set"]


def test_path_without_a_dataset_gives_a_one_line_error(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 1
    assert (
        capsys.readouterr().err
        == f"error: folder {tmp_path / 'none'} does not exist; check the path\n"
    )
    assert main(["s3://bucket/set"]) == 1
    assert "as the second argument" in capsys.readouterr().err
    assert main([str(tmp_path), "--class-names", "none.txt", "--num-classes", "3"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--picture", "sheet.doc"])


def test_shards_are_checked_like_folders(path, tmp_path, capsys):
    kinds = ["label", "nothing labelled"]
    plant(path, kinds)
    shards = tmp_path / "shards"
    convert(str(path), str(shards), size_limit="20kb", workers=1)
    status, report = run(capsys, shards)
    assert (status, report["format"]) == (1, "MDS shards")
    assert report["splits"]["train"]["photos"] == 24
    (problem,), (oddity,) = report["problems"], report["oddities"]
    assert problem["path"].endswith("/train/shard.00000.mds: mask of 00000001")
    assert "label 77" in problem["reason"]
    assert (
        oddity["path"].endswith("mask of 00000002") and "no pixel has a class" in oddity["reason"]
    )


def test_picture_is_skipped_if_training_would_fail(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample(path, 1)[1].unlink()
    picture = tmp_path / "sheet.png"
    assert main([str(path), "--num-classes", "12", "--picture", str(picture)]) == 1
    assert "the loader is not measured, and no picture is drawn, because training" in caplog.text
    assert not picture.exists()


def test_interrupted_check_ends_with_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_command, "check", interrupt)
    assert main([str(path), "--num-classes", "12"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
