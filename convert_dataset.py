"""Convert annotations from a labelling tool, COCO or Hugging Face to a data set for training.

    python convert_dataset.py annotations.json --images photos --out my-data    # COCO, instances
    python convert_dataset.py panoptic.json --images photos --out my-data       # COCO, panoptic
    python convert_dataset.py annotations.xml --images photos --out my-data     # CVAT for images
    python convert_dataset.py labelled --images photos --out my-data            # LabelMe, YOLO
    python convert_dataset.py hf://owner/name --out my-data                     # Hugging Face

The command writes the images, the masks and their description `data.yaml` to the folder `my-data`.
If the file system supports hard links, the command links the images instead of copying them.
Finally, the command checks the data set as `data.py` does. If shapes overlap, the smaller shape
covers the larger one. With `--overlap order`, the later shape covers the earlier one. In CVAT, the
later shape is the one with the higher z-order. Pixels without a shape get the class `background`.
With `--background ignore`, these pixels are ignored, as in panoptic masks.
"""

from __future__ import annotations

from command_lines import parse_convert_dataset, start

if __name__ == "__main__":
    start(parse_convert_dataset)  # Answer --help and reject bad options before the slow imports.

import argparse
import logging
import sys
from pathlib import Path

from data import build_ade20k_dataspec
from dataset.description import as_yaml
from dataset.labels import IGNORED
from errors import DataError, UserError
from extras.preparation import check_command, converters
from extras.preparation.hugging_face import convert_hugging_face
from files import output_folder, write_file

DESCRIPTION = "data.yaml"


def describe(out: Path, converted: converters.Converted, options: argparse.Namespace) -> None:
    """Write the description of a converted data set."""
    values, is_hub = dict(converted.values), options.source.startswith("hf://")
    ignored = list(converted.ignored)
    if not is_hub and 0 not in values.values():
        if options.background == "ignore":
            ignored.append(0)
        else:
            values = {options.background: 0, **values}
    if not 2 <= len(values) < IGNORED:
        raise DataError(
            f"{options.source}: a network needs 2 to {IGNORED - 1} classes, but the data set "
            f"has {len(values)} ({', '.join(values)}); add or merge classes"
        )
    split = {
        name: {"images": f"photos/{name}", "masks": f"masks/{name}"} for name in ("train", "val")
    }
    if not (out / "photos" / "val").is_dir():
        split["val"] = {"fraction": options.val}
    classes = {name: {"labels": [value]} for name, value in values.items()}
    raw = {"root": ".", **split, "classes": classes, "ignore": ignored}
    write_file(out / DESCRIPTION, as_yaml(raw))


def convert(options: argparse.Namespace) -> Path:
    """Convert the data set named on the command line and return the path of its description.

    Raises:
        DataError: An input or option cannot be used; the message names it.
    """
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} already exists; delete it, or use a different --out")
    is_hub = options.source.startswith("hf://")
    if not is_hub and not (options.images and Path(options.images).is_dir()):
        raise DataError(f"--images: cannot find the folder {options.images}; check the path")
    is_panoptic = False
    if options.source.endswith(".json") and Path(options.source).is_file():
        is_panoptic = b"segments_info" in Path(options.source).read_bytes()
    if options.background is None:
        options.background = "ignore" if is_panoptic else converters.BACKGROUND
    # Write to a temporary folder first, so that a failure leaves no incomplete data set behind.
    with output_folder(out) as unfinished:
        if is_hub:
            converted = convert_hugging_face(options, unfinished)
        elif is_panoptic:
            converted = converters.convert_panoptic(options, unfinished)
        else:
            converted = converters.convert_annotations(options, unfinished)
        describe(unfinished, converted, options)
    background = "ignored" if options.background == "ignore" else f"of class {options.background}"
    for note in [f"pixels without a shape are {background}"] * (not is_hub) + converted.notes:
        print(note, file=sys.stderr)
    return out / DESCRIPTION


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status of the final check."""
    options = parse_convert_dataset(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        file = convert(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {file}; checking the data set", file=sys.stderr)
    return check_command.main([str(file)], build_ade20k_dataspec)


if __name__ == "__main__":
    sys.exit(main())
