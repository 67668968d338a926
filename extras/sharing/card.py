"""A model card that describes the network, its data, its accuracy, and how to load it.

    text = card_text(Card(...))           # the README.md that model hubs show

The card states only facts that were measured, given by the user or found in the run's config.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from errors import UserError
from extras.sharing.exporters import Source
from networks.deeplab import DeepLabV3, infer_architecture

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


class File(NamedTuple):
    """An exported file of the network.

    Attributes:
        name: File name, relative to the card's folder.
        megabytes: Size of the file in MB.
        seconds: Time to segment one image, in seconds.
    """

    name: str
    megabytes: float
    seconds: float


class Card(NamedTuple):
    """The content of a model card.

    Attributes:
        source: The exported model, and the image on which it was timed.
        files: Exported files to list on the card.
        scores: Output of `evaluate.py --json`, or None if there are no scores.
        licence: Licence of the training data, as stated by the user.
        repo: Repository of the card, as `user/name`.
    """

    source: Source
    files: Sequence[File]
    scores: Mapping[str, Any] | None
    licence: str | None
    repo: str | None

    @property
    def title(self) -> str:
        """The heading of the card."""
        return (self.repo or self.source.name).rpartition("/")[2]

    @property
    def data(self) -> str:
        """The name of the training data, which is the last part of its path.

        A full path could reveal private information.
        """
        dataset = (self.source.weights.config or {}).get("train_dataset") or {}
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
    network, parameters = card.source.network, card.source.network.parameters()
    name = network.name
    if isinstance(network, DeepLabV3):
        built = infer_architecture(card.source.weights.state)
        name = f"DeepLabV3{'+' if built['use_plus'] else ''} on {built['backbone_arch']}"
    return (
        f"Semantic segmentation into {len(card.source.classes)} classes: {name}, "
        f"{sum(p.numel() for p in parameters) / 1e6:.1f} million parameters{trained}."
    )


def _use(card: Card) -> str:
    names, size = [file.name for file in card.files], card.source.input_size
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
            f"`image` is (1, 3, H, W) uint8 RGB with a shorter side of about {size}; "
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
    height, width, _ = card.source.image.shape
    is_ema = card.source.weights.which == "ema"
    which = "the moving average of the weights" if is_ema else "the weights as trained"
    return (
        "\n".join(table)
        + f"\n\nThe files contain {which}. The times are for an image of {width} x {height} "
        f"pixels, with a shorter side of {card.source.input_size} at the network's input, on "
        f"{machine()} (median of three)."
    )


def _training(card: Card) -> str:
    rows = []
    for key, name in SETTINGS.items():
        value: Any = card.source.weights.config or {}
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
    return statistics.median(timeit.repeat(segment, number=1, repeat=3))


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
