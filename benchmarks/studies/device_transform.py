"""The cost of the data pipeline's device part: colours, normalisation, class indices.

    python -m benchmarks.studies.device_transform      # on a GPU if there is one
    python -m benchmarks.studies.device_transform --batch 32 --json result.json

The times are milliseconds for a batch that the loader has put on the device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmarks.dataloader import machine
from dataset.labels import PADDING
from transforms import DeviceTransform


def make_batch(batch: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images with a strip of padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size, size)
    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 151, shape, dtype=torch.uint8, generator=generator)
    labels[:, : size // 16] = PADDING
    return images.permute(0, 3, 1, 2).to(device), labels.to(device)


def measure(device: str, threads: int, batch: int, size: int) -> Iterator[dict]:
    """Yield the timing of the training and evaluation transforms on one device."""
    data = make_batch(batch, size, device)
    for name, distort in (("training", True), ("evaluation", False)):
        epoch = iter(range(10**9))
        transform = DeviceTransform(distort=distort, epoch=lambda epoch=epoch: next(epoch))
        timer = Timer(
            "transform(data)", globals={"transform": transform, "data": data}, num_threads=threads
        )
        times = timer.blocked_autorange(min_run_time=5)
        row = {"device": device, "threads": threads, "transform": name}
        if device == "cuda":
            row["device"] = torch.cuda.get_device_name()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            transform(data)
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row |= {"ms": times.median * 1e3, "iqr_ms": times.iqr * 1e3}
        row["images_per_second"] = batch / times.median
        yield row


HEAD = "| device | threads | transform | ms a batch | images/s |\n|---|---|---|---|---|"


def line(row: dict) -> str:
    """Return a row of the Markdown table."""
    return (
        f"| {row['device']} | {row['threads']} | {row['transform']} | {row['ms']:.2f} "
        f"(IQR {row['iqr_ms']:.2f}) | {row['images_per_second']:.0f} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--size", type=int, default=512, help="their side (default: 512)")
    parser.add_argument("--json", help="write the result there as well")
    args = parser.parse_args()
    runs = [("cpu", threads) for threads in sorted({1, torch.get_num_threads()})]
    if torch.cuda.is_available():
        runs = [("cuda", 1)]
    print(f"{args.batch} images of {args.size} px, {machine()['cpu']}\n\n{HEAD}", flush=True)
    rows = []
    for run in runs:
        for row in measure(*run, args.batch, args.size):
            # Print at once, so that an interrupted run keeps its first rows.
            print(line(row), flush=True)
            rows.append(row)
    if args.json:
        result = {"batch": args.batch, "size": args.size, "rows": rows, "machine": machine()}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
