"""The command lines of all commands, parsed before torch is imported.

This module imports only what loads fast, so that --help and wrong options are answered at once.
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
    """Prepare this process for a command; call this before torch is imported.

    Args:
        parse: Parser of the command line, which answers --help and ends the process if an option is
            wrong.
    """
    escape_names()
    if parse is not None:
        parse(sys.argv[1:])
    share_cores(os.environ)
    name_node(os.environ)
    # mmcv imports torch.utils.cpp_extension, which warns if there is a CUDA toolkit but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Set how OpenMP uses the cores, unless the user has set it.

    OpenMP reads these variables when torch is imported:

    - OMP_WAIT_POLICY: Waiting threads sleep. By default they spin, which takes the core from
      another process. Two runs on two cores then take several times as long as one after the other.
    - OMP_NUM_THREADS: The cores are divided among the processes of this machine. If one process has
      all cores, the variable stays unset, because the number of threads changes the last bits of
      sums.

    Args:
        environment: Environment variables, which are changed.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cores = available_cores()
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 or cores < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def name_node(environment: MutableMapping[str, str]) -> None:
    """Set NODE_RANK, the number of this node, which Composer reads and torchrun does not set."""
    if "GROUP_RANK" in environment:
        environment.setdefault("NODE_RANK", environment["GROUP_RANK"])


def parse_evaluate(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of evaluate.py."""
    parser = argparse.ArgumentParser(description="Score a checkpoint on a validation set.")
    parser.add_argument("model", help="run's folder, .pt, .safetensors or .onnx file")
    parser.add_argument("--path", help="the data set; default: what the run was validated on")
    parser.add_argument(
        "--data",
        metavar="YAML",
        help="its description; default: the run's; an empty one: ADE20K's layout",
    )
    parser.add_argument("--local", help="folder to cache the shards of a remote data set in")
    parser.add_argument("--config", metavar="YAML", help="the run's config, for its eval_dataset")
    parser.add_argument("--protocol", choices=("paper", "square"), default="paper")
    parser.add_argument(
        "--batch-size", type=whole(1, 4096), default=8, help="photos a process takes at once"
    )
    parser.add_argument("--amp", action="store_true", help="compute in bf16")
    parser.add_argument(
        "--ignore-background",
        action=argparse.BooleanOptionalAction,
        help="label 0 is ignored and label k is class k - 1; default: as the run, or yes",
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table of classes")
    parser.add_argument("--json", metavar="FILE", help="write everything")
    parser.add_argument("--per-image", metavar="FILE", help="write the scores of each image as CSV")
    parser.add_argument(
        "--worst",
        type=whole(1, 10_000),
        metavar="N",
        help="draw the N images with the lowest mIoU into --out",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder for the pictures of --worst")
    parser.add_argument("--confusion", metavar="FILE", help="draw the confusion matrix as PNG")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if (options.worst is None) != (options.out is None):
        parser.error("--worst N and --out FOLDER belong together")
    if options.protocol == "square" and (options.per_image or options.worst):
        parser.error("--per-image and --worst belong to --protocol paper")
    if options.confusion and not options.confusion.lower().endswith(".png"):
        parser.error(f"--confusion: {options.confusion} must end in .png")
    if options.protocol == "square" and (options.tta or options.slide or options.size is not None):
        parser.error("--tta, --slide and --size belong to --protocol paper")
    return options


def parse_predict(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of predict.py."""
    parser = argparse.ArgumentParser(description="Segment photos, videos or a camera.")
    parser.add_argument("model", help="run's folder, .pt, .safetensors or .onnx file")
    parser.add_argument(
        "photos",
        nargs="+",
        help="photos, videos, folders of both, glob patterns; or a camera: /dev/video0, rtsp://...",
    )
    parser.add_argument(
        "--out", default="predictions", help="folder to write to; default: predictions"
    )
    parser.add_argument(
        "--write",
        default="overlay",
        type=lambda text: text.split(","),
        help="overlay, index, or both: overlay,index",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, take every N-th frame"
    )
    add_model_options(parser)
    options = parser.parse_args(arguments)
    unknown = set(options.write) - {"overlay", "index"}
    if unknown:
        parser.error(f"--write: {', '.join(sorted(unknown))} is neither overlay nor index")
    if len(options.photos) > 1 and any(map(CAMERA.fullmatch, options.photos)):
        parser.error("photos: a camera is segmented alone")
    if options.every < 1:
        parser.error(f"--every: {options.every} is not 1 or more")
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that predict.py and evaluate.py share."""
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one a line, or CSV with colours"
    )
    parser.add_argument(
        "--size", type=whole(0, 8192), help="length of a photo's shorter side; 0: as it is"
    )
    parser.add_argument(
        "--tta", action="store_true", help="flip, and sizes x 0.5 to 1.75, averaged"
    )
    parser.add_argument("--slide", action="store_true", help="windows rather than the whole photo")
    parser.add_argument(
        "--weights", choices=("ema", "training"), default="ema", help="default: ema"
    )
    add_network_option(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")


def add_network_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the network, and allows a user's own function to run."""
    parser.add_argument(
        "--network",
        metavar="NAME",
        help="as model.name, where the file does not say it, or it is a function of your own",
    )


def parse_export(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of export.py."""
    parser = argparse.ArgumentParser(description="Export a checkpoint for deployment.")
    parser.add_argument("model", help="run's folder, checkpoint (.pt) or weights (.safetensors)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to", choices=EXPORT_SUFFIXES, help="format")
    kind.add_argument(
        "--weights-only",
        dest="to",
        action="store_const",
        const="safetensors",
        help="as --to safetensors: the weights and the run's config",
    )
    kind.add_argument(
        "--card", dest="to", action="store_const", const="card", help="the model card alone"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="file; of web, hub and card a folder; default: the checkpoint's name, here; of a "
        "card, beside the weights",
    )
    parser.add_argument("--repo", metavar="USER/NAME", help="push what --to hub writes there")
    parser.add_argument(
        "--licence", "--license", metavar="TEXT", help="the data's, for the card to state"
    )
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="of evaluate.py --json, for the card; default: evaluated on the run's validation set",
    )
    parser.add_argument(
        "--photo",
        action="append",
        help="photo to compare on; more of them, given so again, are the page's examples too; "
        "default: one that matplotlib brings",
    )
    parser.add_argument(
        "--size", type=whole(16, 4096), default=512, help="its shorter side; default: 512"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one a line, or CSV with colours"
    )
    parser.add_argument(
        "--weights", choices=("ema", "training"), default="ema", help="default: ema"
    )
    add_network_option(parser)
    options = parser.parse_args(arguments)
    if options.repo and options.to != "hub":
        parser.error("--repo belongs to --to hub")
    return options


def parse_data(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of data.py."""
    parser = argparse.ArgumentParser(
        prog="data.py",
        description="Check a data set before training: decode every file, count every label.",
    )
    add = parser.add_argument
    add("path", help="folder in ADE20K's layout, a description (YAML), or MDS shards")
    add("local", nargs="?", help="folder for shards; a description's root; what --suggest writes")
    add(
        "--num-classes", type=whole(1, 253), default=150, help="as model.num_classes (default: 150)"
    )
    add(
        "--ignore-background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="label 0 is ignored and label k is class k - 1, as the key of that name",
    )
    add(
        "--keep-background",
        dest="ignore_background",
        action="store_false",
        help=argparse.SUPPRESS,  # The name of this option in earlier versions.
    )
    add("--ignore-label", type=whole(0, 255), help="a further label that is ignored")
    add("--class-names", help="file with a class name a line")
    add("--workers", type=whole(1, 1024), help="processes (default: one a core)")
    add("--suggest", action="store_true", help="write the folder's description, and a picture")
    add("--picture", metavar="FILE", help="draw samples as training sees them, a .png or .jpg")
    add("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_intermixed_args(arguments)
    if options.picture and not options.picture.lower().endswith((".png", ".jpg", ".jpeg")):
        parser.error(f"--picture {options.picture}: a .png or .jpg")
    return options


def parse_convert_ade20k(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line of convert_ade20k.py."""
    parser = argparse.ArgumentParser(
        description="Write ADE20K, or any data set in its layout, as MDS shards for Streaming."
    )
    add = parser.add_argument
    add("--path", required=True, help="folder that holds ADEChallengeData2016, or a description")
    add("--root", help="of a description, in place of its root")
    add("--out", required=True, help="folder or URL (s3://…) for the shards")
    add("--compression", help="zstd, zstd:7, gz, br, …; little to gain, photos are compressed")
    add("--hashes", default="sha1,xxh64", help="hashes to check shards with (default: sha1,xxh64)")
    add("--size-limit", default="4mb", help="size of a shard (default: 4mb)")
    add("--workers", type=whole(1, 1024), help="processes (default: one a core)")
    add("--staging", help="of a URL: folder where shards wait for their upload")
    return parser.parse_args(arguments)


def parse_convert_dataset(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line of convert_dataset.py."""
    parser = argparse.ArgumentParser(
        description="Make a data set from the files of a labelling tool, COCO or Hugging Face."
    )
    add = parser.add_argument
    add("source", help="JSON, XML, a folder of LabelMe's or YOLO's files, or hf://owner/name")
    add("--images", help="folder of the photos")
    add("--out", required=True, help="folder to write to")
    add("--val", default="0.15", help="share for validation, or its annotations (default: 0.15)")
    add("--val-images", help="folder of the validation photos (default: that of --images)")
    add("--masks", help="folder of panoptic PNGs (default: the JSON's path without extension)")
    add("--background", help="class of pixels without a shape, or ignore (default: background)")
    add("--overlap", choices=("area", "order"), default="area", help="see above (default: area)")
    add("--names", help="names of the classes, a line each, where the source has none")
    add("--ignore", default="", metavar="VALUES", help="of Hugging Face's masks, as in 0,255")
    add("--columns", metavar="PHOTO,MASK", help="of a Hugging Face data set, if not found")
    add("--workers", type=whole(1, 1024), default=available_cores(), help="default: one a core")
    options = parser.parse_args(arguments)
    options.val_source = None
    try:
        options.val = float(options.val)
    except ValueError:
        options.val_source, options.val = options.val, 0.15
    if not 0 < options.val < 1:
        parser.error(f"--val {options.val:g}: a share between 0 and 1, or a file of annotations")
    values = [value.strip() for value in options.ignore.split(",") if value.strip()]
    if not all(value.isdigit() for value in values):
        parser.error(f"--ignore {options.ignore}: values of masks, as in 0,255")
    options.ignore = {int(value) for value in values}
    if options.background == "":
        parser.error("--background: a name, or ignore")
    if options.source == "hf://":
        parser.error("hf://: hf://owner/name, or a folder")
    if not options.source.startswith("hf://") and options.images is None:
        parser.error("--images: the folder of the photos")
    return options
