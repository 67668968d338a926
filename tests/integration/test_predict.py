"""predict.py and Segmenter on images of any size, resized as in mmsegmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import predict
from errors import ClassError
from extras.prediction_files import encode_index
from predict import Segmenter, main
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES, random_network, random_weights
from tests.support.predict import image, segmenter, variant  # noqa: F401
from tests.support.run_helpers import file_limit

pytestmark = pytest.mark.usefixtures("small_network")


def pooled(stride: int = 4) -> torch.nn.Module:
    """Return a fake network whose receptive field equals its stride."""

    def network(batch: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(batch.float(), stride, ceil_mode=True)

    return network


def test_path_array_and_pil_image_give_equal_predictions(
    segmenter: Segmenter, image: np.ndarray, tmp_path: Path
):
    prediction = segmenter(image)
    assert prediction.shape == (45, 60) and prediction.dtype == np.uint8
    assert len(np.unique(prediction)) > 2  # otherwise, equal predictions would prove little
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "alpha.png")
    for form in (
        str(tmp_path / "image.png"),
        tmp_path / "alpha.png",
        Image.fromarray(image),
    ):
        assert np.array_equal(segmenter(form), prediction)
    assert segmenter.overlay(image).size > (60, 45)
    assert [c.name for c in segmenter.classes] == CLASSES and segmenter.size == 32
    with pytest.raises(ValueError, match="uint8"):
        segmenter(image.astype(float))


def test_tta_averages_probabilities_of_scales_and_flips(segmenter: Segmenter, image: np.ndarray):
    tta = Segmenter(random_weights(), size=32, tta=True)
    total = 0
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        (size,) = variant(segmenter, scales=(scale,)).network_sizes(45, 60)
        for flip in (False, True):
            tensor = torch.from_numpy(predict.resize_image(image, size).copy())
            tensor = tensor.permute(2, 0, 1)[None]
            with torch.no_grad():
                logits = segmenter.network(tensor.flip(3) if flip else tensor)
            logits = F.interpolate(logits, size, mode="bilinear")
            logits = logits.flip(3) if flip else logits
            total = total + F.interpolate(logits, (45, 60), mode="bilinear").softmax(1)
    assert (tta(image) == total.argmax(1)[0].numpy()).mean() > 0.999


@pytest.mark.parametrize("shape", [(45, 60), (300, 210), (64, 64)])
def test_sliding_windows_equal_full_image_prediction(segmenter: Segmenter, shape: tuple[int, int]):
    """The results must be equal, because the receptive field of the network equals its stride."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    windows = variant(segmenter, size=0, window=64, network=pooled())
    (size,) = windows.network_sizes(*shape)
    assert all(side % 8 == 0 for side in size)
    single_window = variant(windows, window=10**6)  # a window larger than the image
    assert np.array_equal(windows(image), single_window(image))
    assert Segmenter(random_weights(), size=0, slide=True).window == 512


@pytest.mark.parametrize("shape", [(30, 40), (2000, 3000), (1, 700), (1, 1)])
@pytest.mark.parametrize("slide", [False, True])
def test_prediction_has_the_size_of_the_image(
    segmenter: Segmenter, shape: tuple[int, int], slide: bool
):
    image = np.full((*shape, 3), 90, np.uint8)
    assert variant(segmenter, window=64 * slide)(image).shape == shape


def test_classes_argument_of_segmenter_replaces_class_names(segmenter: Segmenter):
    assert Segmenter(random_weights(), classes=list("abcdefghijkl")).classes[1].name == "b"
    with pytest.raises(ClassError, match="2 classes, but the model predicts 12"):
        Segmenter(random_weights(), classes=["a", "b"])


@pytest.mark.parametrize("write", ["overlay", "index"])
@pytest.mark.parametrize("existing", ["x", "camera"])
def test_predict_overwrites_only_its_own_files(
    existing: str,
    write: str,
    image: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image).save("x.bmp")
    target = Path(f"out/x.{'jpg' if write == 'overlay' else 'png'}")
    argument = "x.bmp"
    if existing == "camera":
        argument = "rtsp://127.0.0.1:9/none"
        target = Path("out/camera.mp4" if write == "overlay" else "out/camera/000007.png")
    target.parent.mkdir(parents=True)
    Image.fromarray(image).save(target, "PNG")
    before = target.read_bytes()
    assert main([random_weights(), argument, "--write", write, "--out", "out"]) == 2
    assert (
        f"error: {target} already exists and was not written by predict.py"
        in capsys.readouterr().err
    )
    assert target.read_bytes() == before
    target.unlink()
    if existing == "x":
        for _ in range(2):
            assert main([random_weights(), argument, "--write", write, "--out", "out"]) == 0


def test_full_disk_stops_prediction_with_one_line_error(
    image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number in range(3):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    large = Image.effect_noise((300, 300), 99)
    large.save(tmp_path / "1.png")
    arguments = [random_weights(), str(tmp_path), "--out", f"{tmp_path}/out"]
    with file_limit(60_000):
        assert main(arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error == [
        f"error: {tmp_path}/out/1.jpg: File too large; free up some space, "
        "or choose a different location"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.jpg"]


def test_predictions_with_over_256_classes_are_saved_as_uint16(image: np.ndarray, tmp_path: Path):
    """Class 290 must not be written as 290 - 256 = 34."""

    def network(batch: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(batch), 300, *batch.shape[2:])
        logits[:, 290, :, :20], logits[:, 5, :, 20:] = 1, 1
        return logits

    segmenter = variant(Segmenter(random_weights()), network=network)
    segmenter.classes = load_classes([f"class {number}" for number in range(300)], 300)
    prediction = segmenter(image)
    assert prediction.dtype == np.uint16 and set(np.unique(prediction)) == {5, 290}
    (tmp_path / "index.png").write_bytes(encode_index(prediction))
    assert np.array_equal(np.array(Image.open(tmp_path / "index.png")), prediction)
    legend = segmenter.overlay(image, prediction)
    assert legend.size == segmenter.overlay(image).size
    byte_segmenter = variant(
        segmenter, classes=segmenter.classes[:256], network=lambda batch: network(batch)[:, :256]
    )
    assert byte_segmenter(image).dtype == np.uint8


def test_image_too_long_for_jpeg_has_no_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, width in (("long", 65_500), ("short", 60)):  # the legend widens the overlay
        Image.new("RGB", (width, 2)).save(tmp_path / f"{name}.png")
    arguments = [str(tmp_path), "--out", f"{tmp_path}/out", "--write", "overlay,index"]
    assert main([random_weights(), *arguments]) == 1
    output = capsys.readouterr()
    assert "long.png: its overlay would have 65" in output.err
    assert "1 of 2 images segmented" in output.out and "1 without overlay" in output.out
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["long.png", "short.jpg", "short.png"]


def test_segmenter_prediction_equals_manual_computation(segmenter: Segmenter, image: np.ndarray):
    """Resize, normalise, run the network, upsample to the image size and take the argmax."""
    height, width = segmenter.network_sizes(45, 60)[0]
    assert (height, width) == (32, 43)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    tensor = F.interpolate(tensor, (height, width), mode="bilinear", antialias=True).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network = random_network()
    network.upsample = True
    with torch.no_grad():
        logits = network((tensor - mean[:, None, None]) / std[:, None, None])
    logits = F.interpolate(logits, (45, 60), mode="bilinear")
    # The project may round a few pixels differently when it resizes.
    assert (logits.argmax(1)[0].numpy() == segmenter(image)).mean() > 0.99


def test_predict_command_writes_predictions_and_skips_bad_images(
    tmp_path: Path,
    image: np.ndarray,
    segmenter: Segmenter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    Image.fromarray(image).save("in/deep/good.png")
    assert main([random_weights(), "in", "--write", "overlay,index"]) == 0
    assert "1 of 1 images segmented into predictions/" in capsys.readouterr().out
    index = np.array(Image.open("predictions/deep/good.png"))
    assert np.array_equal(index, segmenter(image))
    assert Image.open("predictions/deep/good.jpg").height == segmenter.overlay(image).height

    Path("in/bad.jpg").write_bytes(b"\xff\xd8\xff junk")
    assert main([random_weights(), "in", "gone.jpg", "--out", "out"]) == 1
    output = capsys.readouterr()
    assert "skipped in/bad.jpg: " in output.err and "skipped gone.jpg: " in output.err
    assert "1 of 3 images segmented into out/, 2 skipped" in output.out
    assert sorted(path.name for path in Path("out").rglob("*.*")) == ["good.jpg"]

    assert main(["gone.pt", "in"]) == 2
    assert capsys.readouterr().err == "error: gone.pt: no such file\n"
    with pytest.raises(SystemExit):
        main([random_weights(), "in", "--write", "video"])
