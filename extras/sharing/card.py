"""A model card that describes the network, its data, its accuracy, and how to load it.

    text = card_text(Card(...))           # README.md, as model hubs show it
    write_card("first-hub", text, picture)

The card states only facts that were measured, given by the user or found in the run's config.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from errors import UserError
from files import write_file, write_image

CARD, PICTURE = "README.md", "overlay.jpg"
MARK = "<!-- Written by export.py, which replaces this file as long as this line is here. -->"
PROTOCOLS = {
    "paper": "images keep their aspect ratio (shorter side {size}), and the prediction is resized "
    "to the mask's own resolution and scored there, as mmsegmentation does on ADE20K",
    "square": "image and mask are resized to squares of {size} pixels, as in training's evaluation",
}
# Config keys that the model card shows, with their titles on the card.
SETTINGS = {
    "recipe_name": "recipe",
    "max_duration": "duration",
    "model.backbone_weights": "backbone weights",
    "train_dataset.final_size": "crop size, pixels",
    "train_dataset.batch_size": "batch size",
    "optimizer.name": "optimizer",
    "optimizer.lr": "learning rate",
    "optimizer.weight_decay": "weight decay",
    "seed": "seed",
}


@dataclass(frozen=True)
class File:
    """An exported file of the network.

    Attributes:
        name: File name, relative to the card's folder.
        megabytes: Size of the file in MB.
        seconds: Time to segment one image, in seconds.
    """

    name: str
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        title: Heading of the card.
        network: Name of the network, with its backbone.
        parameters: Number of parameters.
        which: Type of the weights, `"ema"` or `"training"`.
        classes: Names of the classes.
        config: Config of the run, or None if it is not known.
        size: Length of an image's shorter side at the network's input, in pixels.
        scores: Output of `evaluate.py --json`, or None if there are no scores.
        files: Exported files to list on the card.
        machine: Name of the GPU or CPU on which the files were timed.
        image_size: Width and height of the timed image, in pixels.
        licence: Licence of the training data, as stated by the user.
        repo: Repository of the card, as `user/name`.
    """

    title: str
    network: str
    parameters: int
    which: str
    classes: Sequence[str]
    config: Mapping[str, Any] | None
    size: int
    scores: Mapping[str, Any] | None
    files: Sequence[File]
    machine: str
    image_size: tuple[int, int]
    licence: str | None = None
    repo: str | None = None

    @property
    def data(self) -> str:
        """The name of the training data, which is the last part of its path.

        A full path could reveal private information.
        """
        dataset = (self.config or {}).get("train_dataset") or {}
        return str(dataset.get("path") or "").rstrip("/").rpartition("/")[2]


def card_text(card: Card) -> str:
    """Format the card as Markdown, with metadata for hubs at the top.

    Args:
        card: Content of the card.
    """
    parts = [
        f"---\n{_front_matter(card)}---\n{MARK}",
        f"# {_plain(card.title)}\n\n{_summary(card)}\n\n![Classes over an image]({PICTURE})",
        "## Use\n\n" + _use(card),
        "## Accuracy\n\n" + _accuracy(card),
        "## Files\n\n" + _files(card),
        "## Training\n\n" + _training(card),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    about: dict[str, Any] = {
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "pytorch", "onnx"],
    }
    if card.scores is not None and card.scores["mIoU"] is not None:
        name = card.data or "validation set"
        result = {
            "task": {"type": "image-segmentation", "name": "Semantic segmentation"},
            "dataset": {"name": name, "type": name},
            "metrics": [
                {"type": "mean_iou", "name": "mIoU", "value": round(card.scores["mIoU"], 2)}
            ],
        }
        about["model-index"] = [{"name": card.title, "results": [result]}]
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)


def _summary(card: Card) -> str:
    trained = f", trained on the data set {_plain(card.data)}" if card.data else ""
    return (
        f"Semantic segmentation into {len(card.classes)} classes: {card.network}, "
        f"{card.parameters / 1e6:.1f} million parameters{trained}."
    )


def _use(card: Card) -> str:
    names = [file.name for file in card.files]
    weights = next(name for name in names if not name.endswith(".onnx"))
    imports, path = "", f'"{weights}"'
    if card.repo:
        imports = "from huggingface_hub import hf_hub_download\n"
        path = f'hf_hub_download("{card.repo}", "{weights}")'
    text = (
        "With the project that trained it:\n\n"
        f"```python\n{imports}from predict import Segmenter\n"
        f'prediction = Segmenter({path})("street.jpg")  # (H, W) class indices\n```'
    )
    if "model.onnx" in names:
        path = path.replace(weights, "model.onnx")
        text += (
            "\n\nWith onnxruntime alone (the file includes normalisation and upsampling):\n\n"
            f"```python\n{imports}session = onnxruntime.InferenceSession({path})\n"
            '(logits,) = session.run(None, {"image": image})  # (1, C, H, W)\n```\n\n'
            f"`image` is (1, 3, H, W) uint8 RGB with a shorter side of about {card.size}; "
            "`logits.argmax(1)` are the class indices."
        )
    return text


def _accuracy(card: Card) -> str:
    if card.scores is None:
        return "Not measured."
    scores = card.scores
    protocol = PROTOCOLS[scores["protocol"]].format(size=scores["size"] or "as it is")
    more = {"tta": "averaged over six sizes and flips", "slide": "in sliding windows"}
    ways = [text for key, text in more.items() if scores.get(key)]
    how = "; ".join([protocol, *ways])
    table = ["| class | IoU | accuracy | pixels |", "|---|---|---|---|"]
    table += [
        f"| {_plain(row['class'])} | {_percent(row['IoU'])} | {_percent(row['accuracy'])} "
        f"| {row['pixels']} |"
        for row in scores["classes"]
    ]
    return (
        f"mIoU **{_percent(scores['mIoU'])}**, mean accuracy {_percent(scores['mean_accuracy'])}, "
        f"pixel accuracy {_percent(scores['pixel_accuracy'])}, in percent, "
        f"on {scores['photos']} images.\n\n"
        f"Protocol `{scores['protocol']}`: {how}; {scores['weights']} weights.\n\n"
        + "\n".join(table)
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _files(card: Card) -> str:
    table = ["| file | MB | seconds per image |", "|---|---|---|"]
    table += [f"| `{f.name}` | {f.megabytes:.1f} | {f.seconds:.3g} |" for f in card.files]
    width, height = card.image_size
    which = "the moving average of the weights" if card.which == "ema" else "the weights as trained"
    return (
        "\n".join(table)
        + f"\n\nThe files contain {which}. The times are for an image of {width} x {height} "
        f"pixels, with a shorter side of {card.size} at the network's input, on {card.machine} "
        "(median of three)."
    )


def _training(card: Card) -> str:
    rows = []
    for key, name in SETTINGS.items():
        value: Any = card.config or {}
        for part in key.split("."):
            value = (value or {}).get(part)
        if value not in (None, ""):
            rows.append(f"- {name}: {_plain(str(value))}")
    licence = _plain(card.licence) if card.licence else "not stated"
    data = f"- data: {_plain(card.data or 'not known')}; licence: {licence}"
    return "\n".join([data, *rows])


def _plain(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)


def read_scores(path: str, classes: Sequence[str], which: str) -> dict[str, Any]:
    """Read the scores that `evaluate.py --json` wrote.

    Args:
        path: Path of the JSON file.
        classes: Expected names of the classes.
        which: Expected weights, `"ema"` or `"training"`.

    Raises:
        UserError: The file has the wrong format, or its classes or weights are not the expected
            ones.
    """
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [row["class"] for row in scores["classes"]], scores["weights"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} was not written by evaluate.py --json; choose a different file"
        ) from error
    if found[0] != list(classes):
        others = ", ".join(found[0])[:100]
        raise UserError(
            f"{path} contains scores for different classes ({others}); evaluate this model again"
        )
    if found[1] != which:
        raise UserError(
            f"{path} contains scores of the {found[1]} weights; evaluate the {which} "
            "weights instead"
        )
    return scores


def write_card(folder: Path, text: str, picture: Image.Image) -> None:
    """Write the card and its picture.

    Args:
        folder: Folder of the card.
        text: The card as Markdown.
        picture: Picture on the card.

    Raises:
        UserError: The README.md in the folder was not written by export.py.
    """
    check_place(folder)
    write_image(folder / PICTURE, picture, quality=90)
    write_file(folder / CARD, text)


def check_place(folder: Path) -> None:
    """Check that the README.md in a folder, if there is one, was written by export.py.

    Args:
        folder: Folder of the card.

    Raises:
        UserError: The README.md in the folder was not written by export.py.
    """
    path = folder / CARD
    if path.exists() and not is_card(folder):
        raise UserError(
            f"{path} already exists and was not written by export.py; move it, or use a different "
            "--out"
        )


def is_card(folder: Path) -> bool:
    """Return whether a folder contains a card written by export.py.

    Args:
        folder: Folder to check.
    """
    path = folder / CARD
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def seconds_per_image(segment: Callable[[], Any]) -> float:
    """Return the median time of three calls in seconds, after one warm-up call.

    Args:
        segment: Function that segments an image.
    """
    segment()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        segment()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@functools.cache
def machine() -> str:
    """Return the name of the GPU or CPU, and the version of PyTorch."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        # Import cpuinfo only here, because the import takes a second.
        from cpuinfo import get_cpu_info

        name = get_cpu_info().get("brand_raw") or platform.machine()
        name = f"{name} ({torch.get_num_threads()} threads)"
    return f"{name}, PyTorch {torch.__version__}"
