"""Export a checkpoint for deployment, with all the metadata that a program needs.

    python export.py runs/first --to onnx                           # best checkpoint, as first.onnx
    python export.py runs/first --to onnx --half                    # half the size
    python export.py runs/first/latest-rank0.pt --weights-only      # latest-rank0.safetensors
    python export.py runs/first --to web --out demo --photo street.jpg --photo yard.jpg
    python export.py runs/first --to hub --repo user/name --licence "CC BY 4.0"
    python export.py runs/first --card                              # runs/first/README.md

| format        | loaded with                          | needs                         |
|---------------|--------------------------------------|-------------------------------|
| `onnx`        | `onnxruntime`                        | neither PyTorch nor this code |
| `torchscript` | `torch.jit.load`                     | PyTorch                       |
| `pt2`         | `torch.export.load`                  | PyTorch                       |
| `safetensors` | `checkpointing.weights.load_weights` | this code; to train on        |
| `web`         | a browser, from any static host      | see extras/sharing/web.py     |
| `hub`         | any of these, from Hugging Face      | see extras/sharing/card.py    |

The first three formats take `image`, (N, 3, H, W) uint8 RGB for any N, H and W, and return
`logits`, (N, C, H, W) float32. The models in these formats include normalisation and upsampling.
The metadata of all formats contains `classes` (a JSON list of names and colours), `config` (the
run's config), `size` (the size of its validation images), and `mean` and `std` for normalisation.
Each exported file is compared with the PyTorch model on an image before the export completes.
"""

from __future__ import annotations

from command_lines import EXPORT_SUFFIXES, parse_export, start

if __name__ == "__main__":
    start(parse_export)  # Answer --help and reject bad options before the slow imports.

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from checkpointing.rebuild import build_network, complete
from checkpointing.stores import checkpoint_in
from checkpointing.weights import load_weights, save_weights, to_metadata
from dataset.decoding import read_image
from errors import OutputError, RunError, UserError, exit_status, one_line
from extras.sharing.card import (
    CARD,
    PICTURE,
    Card,
    File,
    card_text,
    is_card,
    read_scores,
    seconds_per_image,
)
from extras.sharing.exporters import Deployed, Source, compare, export
from extras.sharing.hub import check_repo, push
from extras.sharing.web import FILES, MODEL, check_examples, fetch_runtime, is_page, write_page
from files import check_outputs, output_file, output_folder, write_file, write_image
from networks.deeplab import DeepLabV3
from predict import Segmenter
from segmentation.classes import rename_classes

ONNX = ("onnx", "onnxruntime")
NEEDS = {"onnx": ONNX, "web": ONNX, "hub": (*ONNX, "huggingface_hub")}
# Limits for an export: minimum share of pixels with the same class, maximum difference of the
# logits.
LIMITS, LIMITS_HALF = (0.999, 1e-3), (0.99, 1e-2)
MAX_LOSS = 0.1  # Maximum drop in mIoU that float16 weights may cause, in percentage points.


def main(arguments: list[str]) -> int:
    """Run the command line.

    Returns:
        The exit status is 0 for success, 1 if the exported file differs from the model, or 2 if the
            model or an option is unusable.
    """
    options = parse_export(arguments)
    options.photo = options.photo or [_sample_image()]
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    missing = [name for name in NEEDS.get(options.to, ()) if not importlib.util.find_spec(name)]
    try:
        if missing:
            raise UserError(
                f"--to {options.to} needs more packages; run pip install {' '.join(missing)}"
            )
        if options.repo:
            check_repo(options.repo)
        if options.to == "card":
            _write_card_alone(options)
            return 0
        path = Path(options.out or f"{_stem(options.model)}{EXPORT_SUFFIXES[options.to]}")
        source = _read(options)
        if options.to == "web":
            _write_web(source, path, options)
        elif options.to == "hub":
            _write_hub(source, path, options)
        else:
            check_outputs([path], _inputs(options))
            if options.to == "safetensors":
                _write_weights(source, path)
            else:
                _write_deployed(source, options.to, path, options)
            _print_size(source, path)
    except (UserError, OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else exit_status(error)
    return 0


def _stem(model: str) -> str:
    return Path(model).resolve().name if os.path.isdir(model) else Path(model).stem


def _read(options: argparse.Namespace) -> Source:
    """Read the model, the class names and the images specified on the command line."""
    weights = load_weights(options.model, options.weights)
    weights = complete(weights, options.model, options.network)
    classes = rename_classes(options.classes, weights.num_classes, weights.classes, options.model)
    network = build_network(weights, options.model, options.network)
    try:
        images = [read_image(image) for image in options.photo]
    except ValueError as error:
        raise UserError(f"--photo {' '.join(options.photo)}: {error}") from error
    name = str((weights.config or {}).get("run_name") or _stem(options.model))
    return Source(name, weights, network, classes, images[0])


def _inputs(options: argparse.Namespace) -> list[str]:
    """Return the files that an export reads and must not overwrite."""
    optional = [path for path in (options.classes, options.scores) if path]
    return [checkpoint_in(options.model), *options.photo, *optional]


def _write_weights(source: Source, path: Path) -> None:
    weights, metadata = source.weights, source.normalisation
    save_weights(path, weights.state, weights.config, source.classes, weights.which, metadata)


def _write_deployed(
    source: Source, kind: str, path: Path, options: argparse.Namespace, upsample: bool = True
) -> None:
    """Write the model in a self-contained format, and compare the file with the PyTorch model.

    Raises:
        RunError: The network cannot be exported, or the file differs from the model. In either
            case, no file is left behind.
        OutputError: The disk is full.
    """
    network, weights = source.network, source.weights
    model = Deployed(network, upsample).eval()
    metadata = to_metadata(weights.config, source.classes, weights.which) | source.normalisation
    with output_file(path) as unfinished:
        try:
            exported = export(model, kind, unfinished, metadata, options.half)
            agreement, difference = compare(model, exported, source.image, options.size)
        except (OutputError, UserError):
            raise
        except Exception as error:  # An exporter can raise any type of error.
            if isinstance(network, DeepLabV3):
                raise
            raise RunError(
                f"{network.name}: --to {kind} failed ({one_line(error)[:300]}); use another format"
            ) from error
        least, most = LIMITS_HALF if options.half else LIMITS
        good = agreement >= least and difference <= most
        verdict = "matches" if good else "does NOT match"
        print(
            f"{verdict} PyTorch: {agreement:.4%} of the pixels have the same class, and "
            f"logits differ by at most {difference:.1e}"
        )
        if not good:
            advice = "export without --half" if options.half else "try a different format"
            raise RunError(f"the exported file differs from the model and was deleted; {advice}")
        if options.half:
            _compare_scores(unfinished, options)


def _compare_scores(half: Path, options: argparse.Namespace) -> None:
    """Score the model and its float16 version on the run's validation set.

    Raises:
        RunError: The file's mIoU is too far below the model's.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        model = _evaluate(options.model, options)
        file = _evaluate(str(half), options) if model else None
    if not model or not file or model["mIoU"] is None or file["mIoU"] is None:
        note = "the file is kept without scores; to score it, run evaluate.py on it with --path"
        print(note, file=sys.stderr)
        return
    change = f"mIoU {file['mIoU']:.2f} with float16 weights, {model['mIoU']:.2f} without"
    if file["mIoU"] < model["mIoU"] - MAX_LOSS:
        raise RunError(f"--half lowers the mIoU too much ({change}); export without it")
    print(f"{change}, on {model['photos']} images of {model['data']}")


def _write_web(source: Source, folder: Path, options: argparse.Namespace) -> None:
    """Write the web page that extras/sharing/web.py describes."""
    images = options.photo
    if len(source.classes) > 256:
        raise UserError("--to web: the page supports at most 256 classes; use another format")
    check_examples(images)
    _check_folder(folder, FILES, is_page(folder), options)
    runtime = fetch_runtime()
    with output_folder(folder) as unfinished:
        _write_deployed(source, "onnx", unfinished / MODEL, options, upsample=False)
        write_page(unfinished, runtime, source.name, source.classes, source.input_size, images)
    _print_size(source, folder / MODEL)
    print(f"{folder}: the page; to view it, run python -m http.server -d {folder}")


def _check_folder(
    folder: Path, names: Sequence[str], is_ours: bool, options: argparse.Namespace
) -> None:
    """Raise UserError if an export would overwrite an input or a file from another program."""
    paths = [folder / name for name in names]
    check_outputs(paths, _inputs(options))
    for path in paths:
        if path.exists() and not is_ours:
            raise UserError(
                f"{path} would be overwritten, but was not written by export.py; move it, or use "
                "a different --out"
            )


def _write_hub(source: Source, folder: Path, options: argparse.Namespace) -> None:
    """Write the weights, ONNX file, config and card; with `--repo`, also push them to the hub."""
    names = ["model.safetensors", MODEL, PICTURE, CARD]
    config = source.weights.config
    if config is not None:
        names.append("config.yaml")
    _check_folder(folder, names, is_card(folder), options)
    scores = _scores(source, options)
    with output_folder(folder) as unfinished:
        weights, onnx = unfinished / "model.safetensors", unfinished / MODEL
        _write_weights(source, weights)
        _write_deployed(source, "onnx", onnx, options)
        if config is not None:
            write_file(unfinished / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        _write_card(source, unfinished, [weights, onnx], scores, options)
    _print_size(source, folder / weights.name)
    _print_size(source, folder / onnx.name)
    print(f"{folder}: {', '.join(names)}")
    not_pushed = "not pushed; use --repo user/name to push"
    print(f"pushed: {push(folder, names, options.repo)}" if options.repo else not_pushed)


def _write_card_alone(options: argparse.Namespace) -> None:
    """Write the model card beside the weights."""
    weights = Path(checkpoint_in(options.model))
    folder = Path(options.out or weights.parent)
    _check_folder(folder, [CARD, PICTURE], is_card(folder), options)
    source = _read(options)
    scores = _scores(source, options)
    with output_folder(folder) as unfinished:
        _write_card(source, unfinished, [weights], scores, options)
    print(f"{folder / CARD}, with {PICTURE}")


def _write_card(
    source: Source,
    folder: Path,
    files: list[Path],
    scores: Mapping[str, Any] | None,
    options: argparse.Namespace,
) -> None:
    """Write a model card with measured file sizes and speeds."""
    measured, picture = [], None
    for path in files:
        segmenter = Segmenter(
            path, classes=options.classes, weights=options.weights, network=options.network
        )
        seconds = seconds_per_image(functools.partial(segmenter, source.image))
        measured.append(File(path.name, path.stat().st_size / 1e6, seconds))
        picture = picture or segmenter.overlay(source.image)
    assert picture is not None
    write_image(folder / PICTURE, picture, quality=90)
    card = Card(source, measured, scores, options.licence, options.repo)
    write_file(folder / CARD, card_text(card))


def _scores(source: Source, options: argparse.Namespace) -> Mapping[str, Any] | None:
    """Return the scores from `--scores` or `evaluate.py`, or None if the evaluation fails."""
    if options.scores:
        names, which = [c.name for c in source.classes], source.weights.which
        scores = read_scores(options.scores, names, which)
        scored = scores["checkpoint"]
        if os.path.exists(scored) and not os.path.samefile(
            checkpoint_in(scored), checkpoint_in(options.model)
        ):
            raise UserError(
                f"{options.scores} contains the scores of {scored}; use those of {options.model}"
            )
        return scores
    scores = _evaluate(options.model, options)
    if scores is None:
        note = "the card will have no scores; give --scores FILE from evaluate.py --json FILE"
        print(note, file=sys.stderr)
    return scores


def _evaluate(model: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return a model's scores on the run's validation set, or None if the evaluation fails."""
    import evaluate  # Import Composer only for exports that need scores.

    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "scores.json")
        command = [model, "--json", str(path), "--weights", options.weights]
        for flag in ("classes", "network"):
            if getattr(options, flag):
                command += [f"--{flag}", getattr(options, flag)]
        return json.loads(path.read_text()) if evaluate.main(command) == 0 else None


def _print_size(source: Source, path: Path) -> None:
    weights, size = source.weights, os.path.getsize(path) / 1e6
    print(f"{path}: {weights.num_classes} classes, {weights.which} weights, {size:.0f} MB")


def _sample_image() -> str:
    """Return the path of the default comparison image, from matplotlib's sample data."""
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
