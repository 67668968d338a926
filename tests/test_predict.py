"""Photos of any size, kind and number become class indices, resized as mmsegmentation does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from artifacts import CLASSES, random_network, random_weights
from mmcv.image import rescale_size
from PIL import Image
from run_helpers import file_limit

import predict
from errors import ClassError, WeightsError
from predict import Segmenter, find_photos, highest_class, main, window_starts
from segmentation.classes import load_classes


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(random_weights())


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A photo of smooth colours, (45, 60, 3)."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (60, 45), interpolation=cv2.INTER_CUBIC)


def variant(segmenter: Segmenter, **attributes: Any) -> Segmenter:
    """The same, with other attributes."""
    other = copy.copy(segmenter)
    vars(other).update(attributes)
    return other


def pooled(stride: int = 4) -> torch.nn.Module:
    """Stands in for a network that looks at no more than a cell of its own stride."""

    def network(batch: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(batch.float(), stride, ceil_mode=True)

    return network


def test_photo_in_any_form(segmenter: Segmenter, photo: np.ndarray, tmp_path: Path):
    prediction = segmenter(photo)
    assert prediction.shape == (45, 60) and prediction.dtype == np.uint8
    assert len(np.unique(prediction)) > 2  # else the comparisons below would say little
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo).convert("RGBA").save(tmp_path / "alpha.png")
    for form in (
        str(tmp_path / "photo.png"),
        tmp_path / "alpha.png",
        Image.fromarray(photo),
    ):
        assert np.array_equal(segmenter(form), prediction)
    assert segmenter.overlay(photo).size > (60, 45)
    assert [c.name for c in segmenter.classes] == CLASSES and segmenter.size == 32
    with pytest.raises(ValueError, match="uint8"):
        segmenter(photo.astype(float))


def test_it_is_the_network(segmenter: Segmenter, photo: np.ndarray):
    """Step by step: resize, normalise, network, to the size it saw, to the photo's, argmax."""
    height, width = segmenter.network_sizes(45, 60)[0]
    assert (height, width) == (32, 43)
    image = torch.from_numpy(photo).permute(2, 0, 1)[None]
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network = random_network()
    network.upsample = True
    with torch.no_grad():
        logits = network((image - mean[:, None, None]) / std[:, None, None])
    logits = F.interpolate(logits, (45, 60), mode="bilinear")
    # Resizing in parts may round a pixel of the photo the other way.
    assert (logits.argmax(1)[0].numpy() == segmenter(photo)).mean() > 0.99


@pytest.mark.parametrize("size", [(512, 683), (20, 31), (100, 50)])
def test_highest_class_is_two_resizes_and_argmax(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("segmentation.views.BAND_ELEMENTS", 3 * size[1] * 7)  # bands of seven rows
    torch.manual_seed(0)
    views = [(torch.randn(3, 8, 12), (32, 45)), (torch.randn(3, 16, 22), (64, 88))]
    full = [
        F.interpolate(F.interpolate(logits[None], seen, mode="bilinear"), size, mode="bilinear")[0]
        for logits, seen in views
    ]
    assert torch.equal(highest_class(views[:1], size), full[0].argmax(0))
    mean = sum(scores.softmax(0) for scores in full)
    assert torch.equal(highest_class(views, size), mean.argmax(0))


def test_sizes_are_mmsegmentations(segmenter: Segmenter):
    rng = np.random.default_rng(0)
    plain = variant(segmenter, size=512)
    tta = variant(segmenter, size=512, scales=predict.TTA_SCALES)
    for height, width in rng.integers(20, 4000, (200, 2)).tolist():
        expected = rescale_size((width, height), (2048, 512))
        assert plain.network_sizes(height, width) == (expected[::-1],)
        # mmsegmentation rounds the scaled limits first, which can move a side by a pixel.
        for scale, size in zip(predict.TTA_SCALES, tta.network_sizes(height, width)):
            expected = rescale_size((width, height), (int(2048 * scale), int(512 * scale)))
            assert np.abs(np.subtract(size, expected[::-1])).max() <= 1
    assert variant(segmenter, size=0).network_sizes(30, 40) == ((30, 40),)


def test_tta_averages_probabilities(segmenter: Segmenter, photo: np.ndarray):
    tta = Segmenter(random_weights(), size=32, tta=True)
    total = 0
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        (size,) = variant(segmenter, scales=(scale,)).network_sizes(45, 60)
        for flip in (False, True):
            image = torch.from_numpy(predict.resize_image(photo, size).copy())
            image = image.permute(2, 0, 1)[None]
            with torch.no_grad():
                logits = segmenter.network(image.flip(3) if flip else image)
            logits = F.interpolate(logits, size, mode="bilinear")
            logits = logits.flip(3) if flip else logits
            total = total + F.interpolate(logits, (45, 60), mode="bilinear").softmax(1)
    assert (tta(photo) == total.argmax(1)[0].numpy()).mean() > 0.999


@pytest.mark.parametrize("shape", [(45, 60), (300, 210), (64, 64)])
def test_windows_add_up_to_the_whole(segmenter: Segmenter, shape: tuple[int, int]):
    """A network that looks no further than its stride gives the same in windows as at once."""
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    windows = variant(segmenter, size=0, window=64, network=pooled())
    (size,) = windows.network_sizes(*shape)
    assert all(side % 8 == 0 for side in size)
    whole = variant(windows, window=10**6)  # a multiple of 8, so that the sizes are the same
    assert np.array_equal(windows(photo), whole(photo))
    assert Segmenter(random_weights(), size=0, slide=True).window == 512


def test_windows_cover_everything():
    for length in range(8, 1500, 8):
        starts = window_starts(length, 512)
        covered = np.zeros(length, int)
        for start in starts:
            covered[start : start + 512] += 1
        assert covered.min() >= 1 and max(starts) == max(length - 512, 0)
        assert all(start % 8 == 0 for start in starts)


@pytest.mark.parametrize("shape", [(30, 40), (2000, 3000), (1, 700), (1, 1)])
@pytest.mark.parametrize("slide", [False, True])
def test_any_size(segmenter: Segmenter, shape: tuple[int, int], slide: bool):
    photo = np.full((*shape, 3), 90, np.uint8)
    assert variant(segmenter, window=64 * slide)(photo).shape == shape


def test_photos_of_like_size_together(segmenter: Segmenter, photo: np.ndarray):
    double = cv2.resize(photo, (120, 90))
    together = segmenter.predict([photo, double])
    alone = [segmenter(photo), segmenter(double)]
    for a, b in zip(together, alone):
        assert a.shape == b.shape and (a.numpy() == b).mean() > 0.999


def test_classes_given(segmenter: Segmenter):
    assert Segmenter(random_weights(), classes=list("abcdefghijkl")).classes[1].name == "b"
    with pytest.raises(ClassError, match="2 classes, but the model predicts 12"):
        Segmenter(random_weights(), classes=["a", "b"])


def test_finds_photos(tmp_path: Path, photo: np.ndarray):
    for name in ("a/x.jpg", "a/b/x.png", "x.png", "x.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = list(find_photos([f"{tmp_path}/a", f"{tmp_path}/*.png", f"{tmp_path}/x.*", "gone.jpg"]))
    assert [(str(path).removeprefix(f"{tmp_path}/"), name) for path, name in found] == [
        ("a/b/x.png", "b/x"),
        ("a/x.jpg", "x"),
        ("x.png", "x_2"),
        ("x.jpg", "x_3"),
        ("gone.jpg", "gone"),
    ]


def test_videos_and_images_have_outputs_of_their_own(tmp_path: Path):
    """The indices of a video's frames go to a folder, which may be that of images."""
    names = ("drive/000001.jpg", "drive.mp4", "Yard.jpg", "yard.png", "b.mov", "b/c/d.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for order in (1, -1):
        found = dict(find_photos([f"{tmp_path}/{name.split('/')[0]}" for name in names][::order]))
        # A folder that is named gives its images their names inside.
        assert len({name.casefold() for name in found.values()}) == len(names)
        found = {
            str(path.relative_to(tmp_path)): name for path, name in find_photos([str(tmp_path)])
        }
        assert found == {
            "Yard.jpg": "Yard",
            "b/c/d.png": "b/c/d",
            "b.mov": "b_2",
            "drive/000001.jpg": "drive/000001",
            "drive.mp4": "drive_2",
            "yard.png": "yard_2",
        }


@pytest.mark.parametrize("write", ["overlay", "index"])
@pytest.mark.parametrize("existing", ["x", "camera"])
def test_only_its_own_outputs_are_replaced(
    existing: str,
    write: str,
    photo: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("x.bmp")
    target = Path(f"out/x.{'jpg' if write == 'overlay' else 'png'}")
    argument = "x.bmp"
    if existing == "camera":
        argument = "rtsp://127.0.0.1:9/none"
        target = Path("out/camera.mp4" if write == "overlay" else "out/camera/000007.png")
    target.parent.mkdir(parents=True)
    Image.fromarray(photo).save(target, "PNG")
    before = target.read_bytes()
    assert main([random_weights(), argument, "--write", write, "--out", "out"]) == 2
    assert f"error: {target} would be overwritten, and predict.py did" in capsys.readouterr().err
    assert target.read_bytes() == before
    target.unlink()
    if existing == "x":
        for _ in range(2):
            assert main([random_weights(), argument, "--write", write, "--out", "out"]) == 0


def test_a_full_disk_ends_the_work(
    photo: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number in range(3):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    large = Image.effect_noise((300, 300), 99)
    large.save(tmp_path / "1.png")
    arguments = [random_weights(), str(tmp_path), "--out", f"{tmp_path}/out"]
    with file_limit(60_000):
        assert main(arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error == [
        f"error: {tmp_path}/out/1.jpg: File too large; make room, or choose another place"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.jpg"]


def test_more_classes_than_a_byte_holds(photo: np.ndarray, tmp_path: Path):
    """Class 290 is written as 290, and not as 290 - 256."""

    def network(batch: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(batch), 300, *batch.shape[2:])
        logits[:, 290, :, :20], logits[:, 5, :, 20:] = 1, 1
        return logits

    many = variant(Segmenter(random_weights()), network=network)
    many.classes = load_classes([f"class {number}" for number in range(300)], 300)
    prediction = many(photo)
    assert prediction.dtype == np.uint16 and set(np.unique(prediction)) == {5, 290}
    predict.save_index(prediction, tmp_path / "index.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "index.png")), prediction)
    legend = many.overlay(photo, prediction)
    assert legend.size == many.overlay(photo).size
    few = variant(many, classes=many.classes[:256], network=lambda batch: network(batch)[:, :256])
    assert few(photo).dtype == np.uint8


def test_command_line(
    tmp_path: Path,
    photo: np.ndarray,
    segmenter: Segmenter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    Image.fromarray(photo).save("in/deep/good.png")
    assert main([random_weights(), "in", "--write", "overlay,index"]) == 0
    assert "1 of 1 photos segmented into predictions/" in capsys.readouterr().out
    index = np.array(Image.open("predictions/deep/good.png"))
    assert np.array_equal(index, segmenter(photo))
    assert Image.open("predictions/deep/good.jpg").height == segmenter.overlay(photo).height

    Path("in/bad.jpg").write_bytes(b"\xff\xd8\xff junk")
    assert main([random_weights(), "in", "gone.jpg", "--out", "out"]) == 1
    output = capsys.readouterr()
    assert "skipped in/bad.jpg: " in output.err and "skipped gone.jpg: " in output.err
    assert "1 of 3 photos segmented into out/, 2 skipped" in output.out
    assert sorted(path.name for path in Path("out").rglob("*.*")) == ["good.jpg"]

    assert main(["gone.pt", "in"]) == 2
    assert capsys.readouterr().err == "error: gone.pt: no such file\n"
    with pytest.raises(SystemExit):
        main([random_weights(), "in", "--write", "video"])


def test_photo_longer_than_a_jpeg(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, width in (("long", 65_500), ("short", 60)):  # the legend makes it wider
        Image.new("RGB", (width, 2)).save(tmp_path / f"{name}.png")
    arguments = [str(tmp_path), "--out", f"{tmp_path}/out", "--write", "overlay,index"]
    assert main([random_weights(), *arguments]) == 1
    output = capsys.readouterr()
    assert "long.png: its overlay would have 65" in output.err
    assert "1 of 2 photos segmented" in output.out and "1 without overlay" in output.out
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["long.png", "short.jpg", "short.png"]


def test_refuses_other_onnx_files(tmp_path: Path):
    (tmp_path / "other.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match=r"other\.onnx: onnxruntime cannot read it"):
        Segmenter(tmp_path / "other.onnx")
