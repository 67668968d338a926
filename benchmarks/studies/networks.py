"""Train, kill, resume, evaluate and export one network from each supported library.

    python -m benchmarks.studies.networks --path camvid      # takes 15 minutes on a CPU
    python -m benchmarks.studies.networks --path camvid --networks smp:Unet --batches 40

Each table row is a run of the hot recipe on CamVid from scratch. The test kills the run halfway
with SIGKILL and resumes it with the same config. The row shows the largest difference between the
run's weights, averaged weights and momentum and those of an undisturbed run. The row also shows
whether all losses and mIoUs are the same as in the undisturbed run.

Then evaluate.py scores the checkpoint at the masks' original resolution, and predict.py segments an
image. Finally, export.py writes an ONNX file and compares it with PyTorch. All three commands use
only the checkpoint, not the YAML config. To save time, deeplabv3 uses a ResNet with four blocks.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import evaluate
import export
import predict
from benchmarks.harness import Table, make_parser, run_command, write_json
from dataset.paths import find_root
from errors import one_line
from tests.support.forked import Death, run, shrink
from tests.support.resumed_runs import largest_difference, read_log, same_log

NETWORKS: dict[str, dict[str, Any]] = {
    "deeplabv3": {},
    "mmseg:segformer/segformer_mit-b0_512x512_160k_ade20k": {},
    "mmseg:bisenetv1/bisenetv1_r18-d32_4x4_1024x1024_160k_cityscapes": {},
    "torchvision:lraspp_mobilenet_v3_large": {},
    "smp:Unet": {"encoder_name": "resnet18"},
    "hf:FOLDER": {},
    "timm:convnext_atto": {},
    "timm:vit_tiny_patch16_224": {},
    "timm:vit_small_patch16_dinov3": {},
    "benchmarks.studies.networks:plain": {},
}


def plain(num_classes: int) -> Any:
    """Build a three-layer network, as an example of the model name `package.module:function`."""
    from torch import nn

    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, num_classes, 3, 1, 1))


def make_hf(folder: str) -> None:
    """Save a SegFormer-B0 with random weights in the format of the transformers library."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    # All transformers configs accept `num_labels`, although their signatures do not declare it.
    config = SegformerConfig(num_labels=150)  # pyrefly: ignore[unexpected-keyword]
    SegformerForSemanticSegmentation(config).save_pretrained(folder)


def make_config(args: argparse.Namespace, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the config for training the named network."""
    dataset: dict[str, Any] = {"path": args.path, "base_size": args.size, "final_size": args.size}
    dataset |= {"batch_size": args.batch, "num_workers": 0}
    model: dict[str, Any] = {"name": name, "num_classes": 11, "backbone_weights": None}
    half_life = {"half_life": f"{max(args.batches // 5, 1)}ba", "update_interval": "1ba"}
    return {
        "run_name": "network",
        "recipe_name": "hot",
        "hot": {"max_duration": f"{args.batches}ba", "ema": half_life},
        "model": model | {"arguments": arguments or None, "backbone_arch": "resnet50"},
        "train_dataset": dataset,
        "eval_dataset": dict(dataset),
        "eval_interval": f"{args.batches}ba",
        "save_interval": f"{max(args.batches // 4, 1)}ba",
        "optimizer": {"lr": args.lr},
        "pictures": 0,
        "python_log_level": "error",
    }


def measure(args: argparse.Namespace, name: str, folder: str) -> list[str]:
    """Run all tests for the named network, and return the cells of its table row."""
    place = name
    if name == "hf:FOLDER":
        place = f"hf:{folder}/hf"
        make_hf(f"{folder}/hf")
    config = make_config(args, place, NETWORKS[name])
    whole, killed = f"{folder}/whole", f"{folder}/killed"
    if run(config | {"save_folder": whole}, f"{folder}/whole.log"):
        return [one_line(RuntimeError(Path(f"{folder}/whole.log.0.out").read_text()[-300:]))]
    config |= {"save_folder": killed, "autoresume": True}
    death = Death("batch", args.batches * 5 // 8)
    status = run(config, f"{folder}/killed.log", death)
    assert status == -signal.SIGKILL, f"the run exited with status {status} before it was killed"
    status = run(config, f"{folder}/killed.log")
    assert status == 0, f"the resumed run failed with status {status}"
    difference = largest_difference(killed, whole)
    same = "the same" if same_log(f"{folder}/killed.log", f"{folder}/whole.log") else "DIFFER"
    log = read_log(f"{folder}/whole.log")
    losses = [values[0] for (_, key), values in sorted(log.items()) if key == "loss/train/total"]

    checkpoint = f"{killed}/latest-rank0.pt"
    named = ["--network", place] if "." in place.partition(":")[0] else []
    evaluate_status, line = run_command(
        evaluate.main, checkpoint, "--json", f"{folder}/scores.json", *named
    )
    miou = line
    if evaluate_status == 0:
        miou = f"{json.loads(Path(f'{folder}/scores.json').read_text())['mIoU']:.2f}"
    image = next((find_root(args.path) / "images" / "validation").iterdir())
    _, predicted = run_command(
        predict.main, checkpoint, str(image), "--out", f"{folder}/predictions", *named
    )
    size = ["--photo", str(image), "--size", "128"]
    _, exported = run_command(
        export.main, checkpoint, "--to", "onnx", "--out", f"{folder}/model.onnx", *size, *named
    )
    ran = f"{losses[0]:.3f} to {losses[-1]:.3f}"
    return [ran, f"{difference:g}", same, miou, predicted.partition(" into")[0], exported]


def main(argv: list[str] | None = None) -> int:
    """Test the networks and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--size", type=int, default=64, help="image size in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--batches", type=int, default=24, help="number of steps")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    args = parser.parse_args(argv)
    # Replace ResNet-50 with a small ResNet in this process too, because evaluate.py, predict.py and
    # export.py run here.
    shrink()
    columns = ["network", "loss, first to last", "killed: largest difference", "its losses"]
    columns += ["mIoU", "predict.py", "export.py --to onnx"]
    table = Table(*columns)
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            cells = measure(args, name, folder)
        table.add(name, *cells)
    write_json(args, table.result())
    return 0


if __name__ == "__main__":
    sys.exit(main())
