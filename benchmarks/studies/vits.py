"""Build vision transformers from timm as DeepLabV3+ backbones, and train, rebuild and export them.

    python -m benchmarks.studies.vits                  # takes 6 minutes
    python -m benchmarks.studies.vits --names vit_tiny_patch16_224

Each network has 11 classes and no pretrained weights. The test trains each network for one SGD step
on two random images, and rebuilds the network from the arguments that a checkpoint stores. The
rebuilt network must return the same logits at a different image size, which resizes the position
embeddings. Then the test exports the network to ONNX and compares the file with PyTorch at two more
sizes. The Markdown table shows the cause of each failure.
"""

from __future__ import annotations

import gc
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Table, make_parser, quiet, write_json
from benchmarks.studies.families import CLASSES, rebuild, step
from errors import one_line
from extras.sharing.exporters import Deployed, compare, export
from model import build_composer_model
from networks.base import Network

# Small networks from each family of vision transformers in timm.
NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_clip_224",
    "vit_medium_patch16_reg4_gap_256",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "flexivit_small",
)


def measure(name: str, size: int) -> dict[str, Any]:
    """Test one network, and return the values for the table."""
    torch.manual_seed(0)
    model = build_composer_model(
        f"timm:{name}", None, num_classes=CLASSES, backbone_weights=None, sync_bn=False
    )
    network = model.module
    assert isinstance(network, Network)
    network.check(CLASSES, [size])
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    row = {"parameters": parameters, "loss": step(model, size), "divisor": network.size_divisor}
    difference = rebuild(network, size * 3 // 2)
    if difference:
        raise ArithmeticError(f"the logits of the rebuilt network differ by {difference:.1e}")
    photo = np.random.default_rng(0).integers(0, 256, (size, size * 4 // 3, 3), np.uint8)
    deployed = Deployed(network).eval()
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        agreement, difference = compare(
            deployed, export(deployed, "onnx", file.name, {}), photo, size
        )
    return row | {"agreement": 100 * agreement, "difference": difference}


@quiet()
def main(argv: list[str] | None = None) -> int:
    """Print the table, and return the number of networks that fail."""
    parser = make_parser(__doc__)
    parser.add_argument("--names", nargs="+", default=NAMES, help="names of timm's networks")
    parser.add_argument("--size", type=int, default=96, help="image size in pixels")
    options = parser.parse_args(argv)
    columns = ["timm:", "million parameters", "size divisor", "loss", "ONNX: same class"]
    table = Table(*columns, "ONNX: largest difference", "")
    failed = 0
    for name in options.names:
        try:
            row = measure(name, options.size)
            cells = [f"{row['parameters']:.1f}", row["divisor"], f"{row['loss']:.3f}"]
            cells += [f"{row['agreement']:.3f}%", f"{row['difference']:.1e}", "works"]
        except Exception as error:  # An error must not stop the test of the other networks.
            failed += 1
            cells = ["", "", "", "", "", one_line(error)[:300]]
        table.add(name, *cells)
        gc.collect()
    print(f"\n{len(options.names) - failed} of {len(options.names)} networks work")
    write_json(options, table.result())
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
