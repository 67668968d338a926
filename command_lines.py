"""Command-line parsers for all commands, which run before torch is imported.

This module imports only fast modules, so that --help and errors in options appear immediately.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, MutableMapping

from dataset.workers import available_cores
from errors import escape_names, whole

EXPORT_SUFFIXES = {
    "onnx": ".onnx",
    "torchscript": ".ts",
    "pt2": ".pt2",
    "safetensors": ".safetensors",
}
EXPORT_SUFFIXES |= {"web": "-web", "hub": "-hub"}
CAMERA = re.compile(r"/dev/video\d+|[a-z]+://.+", re.DOTALL)


def start(parse: Callable[[list[str]], object] | None = None) -> None:
    """Prepare this process for a command, before torch is imported.

    Args:
        parse: Function that parses the command line. It handles --help, and ends the process if an
            option is invalid.
    """
    escape_names()
    if parse is not None:
        parse(sys.argv[1:])
    share_cores(os.environ)
    name_node(os.environ)
    # mmcv imports torch.utils.cpp_extension, which logs a warning if there is a CUDA toolkit but no
    # GPU. Silence this warning.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Configure how OpenMP uses the CPU cores, unless the user has already done so.

    OpenMP reads these variables when torch is imported:

    - OMP_WAIT_POLICY: Let waiting threads sleep. By default, waiting threads spin and keep the core
      busy. On two cores, two simultaneous runs would then take several times as long as two
      consecutive runs.
    - OMP_NUM_THREADS: Divide the cores among the processes of this machine. If a single process
      uses all cores, the variable stays unset, because the number of threads affects the rounding
      of sums.

    Args:
        environment: Environment variables, which are modified in place.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cores = available_cores()
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 or cores < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def name_node(environment: MutableMapping[str, str]) -> None:
    """Set NODE_RANK, the node number, which Composer reads but torchrun does not set."""
    if "GROUP_RANK" in environment:
        environment.setdefault("NODE_RANK", environment["GROUP_RANK"])


def parse_evaluate(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of evaluate.py."""
    parser = argparse.ArgumentParser(description="Score a checkpoint on a validation set.")
    add = parser.add_argument
    add("model", help="folder of a run, or a .pt, .safetensors or .onnx file")
    add("--path", help="data set; default: the validation set of the run")
    add(
        "--data",
        metavar="YAML",
        help="description of the data set; default: the run's; empty: ADE20K's layout",
    )
    add("--local", help="folder to cache the shards of a remote data set")
    add("--config", metavar="YAML", help="config of the run, for its eval_dataset")
    add("--protocol", choices=("paper", "square"), default="paper")
    add(
        "--batch-size",
        type=whole(1, 4096),
        default=8,
        help="images that a process computes at once; default: 8",
    )
    add("--amp", action="store_true", help="compute in bf16")
    add(
        "--ignore-background",
        action=argparse.BooleanOptionalAction,
        help="ignore label 0, so that label k is class k - 1; default: as in the run, or yes",
    )
    add("--csv", metavar="FILE", help="write the table of classes to this file")
    add("--json", metavar="FILE", help="write all results to this file")
    add("--per-image", metavar="FILE", help="write the scores of each image to this CSV")
    add(
        "--worst",
        type=whole(1, 10_000),
        metavar="N",
        help="draw the N images with the lowest mIoU into --out",
    )
    add("--out", metavar="FOLDER", help="folder for the pictures of --worst")
    add("--confusion", metavar="FILE", help="draw the confusion matrix as PNG")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if (options.worst is None) != (options.out is None):
        parser.error("--worst N and --out FOLDER must be given together")
    if options.confusion and not options.confusion.lower().endswith(".png"):
        parser.error(f"--confusion: {options.confusion} must end in .png")
    needs_paper = options.per_image or options.worst or options.tta or options.slide
    if options.protocol == "square" and (needs_paper or options.size is not None):
        names = "--per-image, --worst, --tta, --slide and --size"
        parser.error(f"{names} work only with --protocol paper")
    return options


def parse_predict(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of predict.py."""
    parser = argparse.ArgumentParser(description="Segment images, videos or a camera.")
    add = parser.add_argument
    add("model", help="folder of a run, or a .pt, .safetensors or .onnx file")
    add(
        "photos",
        nargs="+",
        metavar="image",
        help="images, videos, folders of them, glob patterns; or one camera: /dev/video0, "
        "rtsp://...",
    )
    add("--out", default="predictions", help="folder for the results; default: predictions")
    add(
        "--write",
        default="overlay",
        type=lambda text: text.split(","),
        help="results to write: overlay, index, or overlay,index",
    )
    add(
        "--every",
        type=whole(1, 10**9),
        default=1,
        metavar="N",
        help="process only every N-th frame of a video",
    )
    add_model_options(parser)
    options = parser.parse_args(arguments)
    unknown = set(options.write) - {"overlay", "index"}
    if unknown:
        parser.error(
            f"--write: {', '.join(sorted(unknown))} is unknown; use overlay, index, or "
            "overlay,index"
        )
    if len(options.photos) > 1 and any(map(CAMERA.fullmatch, options.photos)):
        parser.error("photos: a camera cannot be combined with other inputs")
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that predict.py and evaluate.py share."""
    add = parser.add_argument
    add(
        "--size",
        type=whole(0, 8192),
        help="length of an image's shorter side in pixels; 0: no resizing",
    )
    add("--tta", action="store_true", help="average over flips and six sizes (x 0.5 to 1.75)")
    add("--slide", action="store_true", help="process windows instead of the whole image")
    add_checkpoint_options(parser)
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for a checkpoint's classes, weights and network.

    With `--network`, the network may also come from the user's own function.
    """
    add = parser.add_argument
    add("--classes", metavar="FILE", help="file of class names, one per line, or CSV with colours")
    add(
        "--weights",
        choices=("ema", "training"),
        default="ema",
        help="weights to use if the file holds both; default: ema",
    )
    add(
        "--network",
        metavar="NAME",
        help="name of the network, as in model.name; needed if the file does not contain it, or "
        "if it is your own function",
    )


def parse_export(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of export.py."""
    parser = argparse.ArgumentParser(description="Export a checkpoint for deployment.")
    add = parser.add_argument
    add("model", help="folder of a run, checkpoint (.pt) or weights (.safetensors)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to", choices=EXPORT_SUFFIXES, help="format")
    kind.add_argument(
        "--weights-only",
        dest="to",
        action="store_const",
        const="safetensors",
        help="same as --to safetensors: the weights and the run's config",
    )
    kind.add_argument(
        "--card", dest="to", action="store_const", const="card", help="only the model card"
    )
    add(
        "--out",
        metavar="PATH",
        help="file, or folder for web, hub and card; default: named after the checkpoint, in "
        "the working directory; a card is put beside the weights",
    )
    add(
        "--half",
        action="store_true",
        help="store the weights of --to onnx or --to web as float16, in half the size",
    )
    add("--repo", metavar="USER/NAME", help="push the result of --to hub to this repository")
    add("--licence", "--license", metavar="TEXT", help="licence of the data, for the card")
    add(
        "--scores",
        metavar="FILE",
        help="result of evaluate.py --json, for the card; default: evaluate on the run's "
        "validation set",
    )
    add(
        "--photo",
        action="append",
        help="image to compare on; repeat the option to add examples to the page; default: a "
        "sample image of matplotlib",
    )
    add(
        "--size",
        type=whole(16, 4096),
        default=512,
        help="length of its shorter side in pixels; default: 512",
    )
    add_checkpoint_options(parser)
    options = parser.parse_args(arguments)
    if options.repo and options.to != "hub":
        parser.error("--repo works only with --to hub")
    if options.half and options.to not in ("onnx", "web"):
        parser.error("--half works only with --to onnx and --to web")
    return options


def parse_data(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of data.py."""
    parser = argparse.ArgumentParser(
        prog="data.py",
        description="Check a data set before training: decode every file, count every label.",
    )
    add = parser.add_argument
    add("path", help="folder in ADE20K's layout, a description (YAML), or MDS shards")
    add(
        "local",
        nargs="?",
        help="folder to cache shards; root of a description; or the file that --suggest writes",
    )
    add(
        "--num-classes",
        type=whole(1, 253),
        default=150,
        help="number of classes, as model.num_classes (default: 150)",
    )
    add(
        "--ignore-background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ignore label 0, so that label k is class k - 1 (default), as the key of the same "
        "name",
    )
    add(
        "--keep-background",
        dest="ignore_background",
        action="store_false",
        help=argparse.SUPPRESS,  # Former name of --no-ignore-background, hidden from --help.
    )
    add("--ignore-label", type=whole(0, 255), help="one more label to ignore")
    add("--class-names", help="file with one class name per line")
    add("--workers", type=whole(1, 1024), help="processes (default: one per core)")
    add("--suggest", action="store_true", help="write a description of the folder, and a picture")
    add(
        "--picture",
        metavar="FILE",
        help="draw samples as training sees them, to a .png or .jpg file",
    )
    add("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_intermixed_args(arguments)
    if options.picture and not options.picture.lower().endswith((".png", ".jpg", ".jpeg")):
        parser.error(f"--picture: {options.picture} must end in .png or .jpg")
    return options


def parse_convert_ade20k(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line of convert_ade20k.py."""
    parser = argparse.ArgumentParser(
        description="Write ADE20K, or any data set in its layout, as MDS shards for Streaming."
    )
    add = parser.add_argument
    add("--path", required=True, help="folder that holds ADEChallengeData2016, or a description")
    add("--root", help="root of the described data set, instead of the description's")
    add("--out", required=True, help="folder or URL (s3://…) for the shards")
    add(
        "--compression",
        help="compression, such as zstd, zstd:7, gz or br; it gains little, because images are "
        "compressed",
    )
    add("--hashes", default="sha1,xxh64", help="hashes to check shards with (default: sha1,xxh64)")
    add("--size-limit", default="4mb", help="size of a shard (default: 4mb)")
    add("--workers", type=whole(1, 1024), help="processes (default: one per core)")
    add("--staging", help="for a URL: folder where shards wait for their upload")
    return parser.parse_args(arguments)


def parse_convert_dataset(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line of convert_dataset.py."""
    parser = argparse.ArgumentParser(
        description="Make a data set from the files of a labelling tool, COCO or Hugging Face."
    )
    add = parser.add_argument
    add("source", help="JSON, XML, a folder from LabelMe or YOLO, or hf://owner/name")
    add("--images", help="folder of the images")
    add("--out", required=True, help="folder to write to")
    add("--val", default="0.15", help="share for validation, or its annotations (default: 0.15)")
    add("--val-images", help="folder of the validation images (default: same as --images)")
    add("--masks", help="folder of panoptic PNGs (default: the JSON's path without extension)")
    add("--background", help="class of pixels without a shape, or ignore (default: background)")
    add(
        "--overlap",
        choices=("area", "order"),
        default="area",
        help="shape on top: the smaller (area) or the later one (order) (default: area)",
    )
    add("--names", help="file of class names: one per line, YOLO's data.yaml, or id2label.json")
    add("--ignore", default="", metavar="VALUES", help="hf://: values to ignore, such as 0,255")
    add("--columns", metavar="IMAGE,MASK", help="hf://: names of the columns, if not found")
    cores = available_cores()
    add("--workers", type=whole(1, 1024), default=cores, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    options.val_source = None
    try:
        options.val = float(options.val)
    except ValueError:
        options.val_source, options.val = options.val, 0.15
    if not 0 < options.val < 1:
        parser.error(
            f"--val: {options.val:g} must be a share between 0 and 1, or a file of annotations"
        )
    values = [value.strip() for value in options.ignore.split(",") if value.strip()]
    if not all(value.isdigit() for value in values):
        parser.error(f"--ignore: {options.ignore} must be values of masks, such as 0,255")
    options.ignore = {int(value) for value in values}
    if options.background == "":
        parser.error("--background: the value is empty; give a class name, or ignore")
    if options.source == "hf://":
        parser.error("hf://: the name is missing; give hf://owner/name, or a folder")
    if not options.source.startswith("hf://") and options.images is None:
        parser.error("--images: the option is missing; give the folder of the images")
    return options
