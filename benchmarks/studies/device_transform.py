"""Time the data transforms that run on the device: colours, normalisation, class indices.

    python -m benchmarks.studies.device_transform      # uses a GPU if one is available
    python -m benchmarks.studies.device_transform --batch 32 --json result.json

The times are in milliseconds per batch, without the transfer of the batch to the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness import PeakMemory, head, machine, make_parser, row, seconds_of, write_json
from benchmarks.numerics import make_batch
from transforms import DeviceTransform


def measure(device: str, threads: int, batch: int, size: int) -> Iterator[dict]:
    """Yield the results for the training transform and the evaluation transform on one device."""
    data = make_batch(batch, size, device)
    for name, distort in (("training", True), ("evaluation", False)):
        epoch = iter(range(10**9))
        transform = DeviceTransform(distort=distort, epoch=lambda epoch=epoch: next(epoch))
        result = {"device": device, "threads": threads, "transform": name}
        with PeakMemory(device == "cuda") as peak:
            transform(data)
        if device == "cuda":
            result |= {"device": torch.cuda.get_device_name(), "peak_mib": peak.bytes / 2**20}
        taken = seconds_of(partial(transform, data), threads, min_run_time=5)
        result |= {"ms": 1e3 * taken, "images_per_second": batch / taken}
        yield result


HEAD = head("device", "threads", "transform", "ms per batch", "images/s")


def line(result: dict) -> str:
    """Return a result as a row of the Markdown table."""
    rates = f"{result['ms']:.2f}", f"{result['images_per_second']:.0f}"
    return row(result["device"], result["threads"], result["transform"], *rates)


def main() -> None:
    """Run the measurements that the command line selects, and print them as a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default: 16)")
    parser.add_argument("--size", type=int, default=512, help="image size in pixels (default: 512)")
    args = parser.parse_args()
    runs = [("cpu", threads) for threads in sorted({1, torch.get_num_threads()})]
    if torch.cuda.is_available():
        runs = [("cuda", 1)]
    print(f"{args.batch} images of {args.size} px, {machine()['cpu']}\n\n{HEAD}", flush=True)
    rows = []
    for run in runs:
        for found in measure(*run, args.batch, args.size):
            # Print each row immediately, so that an interrupted run still shows the rows it has
            # measured.
            print(line(found), flush=True)
            rows.append(found)
    result = {"batch": args.batch, "size": args.size, "rows": rows, "machine": machine()}
    write_json(args, result)


if __name__ == "__main__":
    main()
