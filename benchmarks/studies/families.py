"""Build one network from each mmsegmentation family and train it for one step.

    python -m benchmarks.studies.families                  # takes 10 minutes
    python -m benchmarks.studies.families --families swin segformer

Each network has 11 classes and no pretrained weights. The test trains each network for one SGD step
on two random images. Then the test builds a second network from the arguments that a checkpoint
stores, and copies the weights. In evaluation mode, both networks must return the same logits. The
Markdown table shows the cause of each failure.
"""

from __future__ import annotations

import gc
import json
from typing import Any

import torch

from benchmarks.harness import Table, make_parser, quiet, write_json
from errors import one_line
from model import ComposerDeepLabV3, build_composer_model
from networks.base import Network
from networks.mmseg import configs
from networks.registry import named_network
from training.optimizer import DecoupledSGDW

CLASSES = 11
# Parts of config names that identify small networks, from the smallest to the largest.
SMALL = ("_b0", "mit-b0", "s12", "_r18", "-t_", "tiny", "small", "r50-d8", "r50", "base")
# Families whose position embeddings depend on the image size, so the config must specify this size.
FIXED = ("beit", "mae")

# MobileNetV3's pooling layer needs a feature map of at least 49 x 49 cells.
SIZES = {"mobilenet_v3": 512}


def families() -> list[str]:
    """Return the names of mmsegmentation's network families."""
    return sorted(path.name for path in configs().iterdir() if path.name != "_base_")


def choose(family: str) -> str:
    """Return the name of the config with the family's smallest network."""
    names = sorted(path.stem for path in (configs() / family).glob("*.py"))
    rank = {n: next((i for i, part in enumerate(SMALL) if part in n), len(SMALL)) for n in names}
    return f"{family}/{min(names, key=lambda name: (rank[name], name))}"


def step(model: ComposerDeepLabV3, size: int) -> float:
    """Train a model for one step on two random images, and return the loss."""
    optimizer = DecoupledSGDW(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5)
    image = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    batch = (image, torch.randint(-1, CLASSES, (2, size, size)))
    loss = model.loss(model.train()(batch), batch)["total"]
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    if not all(bool(grad.isfinite().all()) for grad in found) or not loss.isfinite():
        raise ArithmeticError("the loss or one of its gradients is not finite")
    optimizer.step()
    return loss.item()


@torch.no_grad()
def rebuild(network: Network, size: int) -> float:
    """Rebuild a network from its stored arguments; return the largest difference in the logits."""
    record = json.loads(json.dumps(network.arguments))
    again = named_network(network.name, CLASSES, record, from_file=True)
    again.load_state_dict(network.state_dict())
    again.to(memory_format=again.memory_format)  # pyrefly: ignore[no-matching-overload]
    image = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    return float((again.eval()(image) - network.eval()(image)).abs().max())


def measure(family: str, size: int) -> list[Any]:
    """Test a family with a small network; return its million parameters, pixels and loss."""
    torch.manual_seed(0)
    size = SIZES.get(family, size)
    arguments = {"backbone": {"img_size": [size, size]}} if family in FIXED else None
    model = build_composer_model(
        f"mmseg:{choose(family)}",
        arguments,
        num_classes=CLASSES,
        backbone_weights=None,
        sync_bn=False,
    )
    network = model.module
    assert isinstance(network, Network)
    network.check(CLASSES, [size])
    loss = step(model, size)
    difference = rebuild(network, size)
    if difference:
        raise ArithmeticError(
            f"the logits of the rebuilt network differ from the original by {difference:.1e}"
        )
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return [f"{parameters:.1f}", size, f"{loss:.3f}"]


@quiet()
def main(argv: list[str] | None = None) -> int:
    """Print the table, and return the number of families that fail."""
    parser = make_parser(__doc__)
    parser.add_argument("--families", nargs="+", default=families(), choices=families())
    parser.add_argument("--size", type=int, default=128, help="image size in pixels")
    options = parser.parse_args(argv)
    table = Table("family", "config", "million parameters", "pixels", "loss", "")
    failed = 0
    for family in options.families:
        try:
            cells = [*measure(family, options.size), "works"]
        # If one network fails, still test the others.
        except Exception as error:
            failed += 1
            cells = ["", "", "", one_line(error)[:300]]
        table.add(family, choose(family), *cells)
        gc.collect()
    print(f"\n{len(options.families) - failed} of {len(options.families)} families work")
    write_json(options, table.result())
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
