"""Compare this project with its peers: DeepLabV3+ on CamVid after equal training times.

    python -m benchmarks.studies.peers --path camvid --minutes 2

Before you run this study, install segmentation_models.pytorch (smp) with `make install WITH=smp`.
The first project is mmsegmentation 0.30, with its own runner, pipeline and config. The second
is a plain PyTorch loop that trains smp's network. All contenders train a ResNet-50 backbone from
scratch with SGD. All contenders use the same image size, batch size, number of threads, number of
loader processes, weight decay and schedule (polynomial over time).

Some differences between the contenders remain. In mmsegmentation, the network has an auxiliary head
and a stem of three convolutions. In smp, the head has 256 channels instead of 512. This project's
loss includes a Dice term. This project also trains in the machine's fastest precision. For a
comparison with the peers in the same precision, see the `fp32` row.

The throughput includes data loading and excludes the first steps. All networks are scored by the
same evaluation code on the same square images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils.reproducibility import seed_all
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import main as program
from benchmarks import harness, train_step
from data import build_data
from dataset.matching import list_samples
from dataset.paths import find_root
from segmentation.metrics import confusion_matrix, mean_iou
from training.schema import Config
from transforms import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD

MOMENTUM, DECAY = 0.9, 5e-4  # SGD settings from mmsegmentation's schedules.

WARM = 3  # Number of warm-up steps that are excluded from the throughput.


# The result of training: a function that maps normalised images (N, 3, H, W) to logits, and the
# training throughput in images per second.
Trained = tuple[Callable[[Tensor], Tensor], float]


class Clock:
    """A timer that sets the learning rate from the elapsed time and records when each step ends."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.start = time.perf_counter()
        self.ends: list[float] = []

    def factor(self) -> float:
        """Return the factor by which to multiply the initial learning rate."""
        passed = (time.perf_counter() - self.start) / self.seconds
        return max(1 - passed, 1e-3) ** 0.9

    def tick(self) -> bool:
        """Record the end of a training step, and return whether the training time is up."""
        self.ends.append(time.perf_counter())
        return self.ends[-1] - self.start > self.seconds and len(self.ends) > WARM + 1

    def rate(self, batch: int) -> float:
        """Return the training throughput in images per second, without the warm-up steps."""
        steps = self.ends[WARM:]
        return batch * (len(steps) - 1) / (steps[-1] - steps[0])


def config(args: argparse.Namespace, precision: str = "auto") -> Config:
    """Return the config for training with this project."""
    return train_step.config(
        args,
        "none",
        precision=precision,
        max_duration="1000000ba",
        device_train_microbatch_size="auto",
        seed=args.seed,
        # The peers' SGD multiplies the weight decay by the learning rate. This project's decoupled
        # weight decay does not, so apply that factor here.
        optimizer={"lr": args.lr, "momentum": MOMENTUM, "weight_decay": args.lr * DECAY},
        schedule={"name": "constant"},
    )


class Timed(Callback):
    """A Composer callback that sets the learning rate and ends the training based on a `Clock`."""

    def __init__(self, clock: Clock, lr: float) -> None:
        self.clock, self.lr = clock, lr

    def batch_start(self, state: State, logger: Logger) -> None:
        for group in state.optimizers[0].param_groups:
            group["lr"] = self.lr * self.clock.factor()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.clock.tick():
            state.stop_training()


def ours(args: argparse.Namespace, precision: str = "auto") -> Trained:
    """Train with the trainer of main.py."""
    clock = Clock(args.minutes)
    trainer = program.build_trainer(config(args, precision), callbacks=[Timed(clock, args.lr)])
    harness.never_evaluate(trainer)
    clock.start = time.perf_counter()
    trainer.fit()
    trainer.close()
    network = cast(nn.Module, trainer.state.model.module).eval()
    return network, clock.rate(args.batch)


def mmsegmentation(args: argparse.Namespace) -> Trained:
    """Train with `mmseg.apis.train_segmentor` and a config that mmsegmentation provides."""
    import mmcv
    import mmseg
    from mmcv.runner import HOOKS, Hook
    from mmseg.apis import train_segmentor
    from mmseg.datasets import build_dataset
    from mmseg.models import build_segmentor

    clock = Clock(args.minutes)

    class ByTheClock(Hook):
        def before_train_iter(self, runner: Any) -> None:
            for group in runner.optimizer.param_groups:
                group["lr"] = args.lr * clock.factor()

        def after_train_iter(self, runner: Any) -> None:
            if clock.tick():
                runner._max_iters = runner.iter + 1

    HOOKS.register_module(name="ByTheClock", module=ByTheClock, force=True)
    configs = Path(mmseg.__file__).parent / ".mim/configs/_base_"
    found = mmcv.Config.fromfile(str(configs / "models/deeplabv3plus_r50-d8.py"))
    data = mmcv.Config.fromfile(str(configs / "datasets/ade20k.py"))
    found.model.pretrained = None
    for part in (found.model.backbone, found.model.decode_head, found.model.auxiliary_head):
        part.norm_cfg = {"type": "BN", "requires_grad": True}
    found.model.decode_head.num_classes = found.model.auxiliary_head.num_classes = args.classes
    train = data.data.train
    train.update(type="CustomDataset", reduce_zero_label=True, seg_map_suffix=".png")
    train.classes = [str(k) for k in range(args.classes)]
    train.palette = [[k] * 3 for k in range(args.classes)]
    train.data_root = str(find_root(args.path))
    for step in train.pipeline:
        if step.type == "Resize":
            step.img_scale = (4 * args.size, args.size)
        elif step.type in ("RandomCrop", "Pad"):
            step["crop_size" if step.type == "RandomCrop" else "size"] = (args.size, args.size)
    on_gpu = torch.cuda.is_available()
    found.merge_from_dict(
        {
            "seed": args.seed,
            "device": "cuda" if on_gpu else "cpu",
            "gpu_ids": range(1),
            "log_level": "ERROR",
            "data": {"samples_per_gpu": args.batch, "workers_per_gpu": args.workers},
            "optimizer": {
                "type": "SGD",
                "lr": args.lr,
                "momentum": MOMENTUM,
                "weight_decay": DECAY,
            },
            "optimizer_config": {},
            "lr_config": None,
            "checkpoint_config": None,
            "log_config": {"interval": 1000, "hooks": []},
            "runner": {"type": "IterBasedRunner", "max_iters": 10**6},
            "custom_hooks": [{"type": "ByTheClock"}],
            "workflow": [("train", 1)],
            "resume_from": None,
            "load_from": None,
            "work_dir": args.scratch,
        }
    )
    model = build_segmentor(found.model)
    model.init_weights()
    samples = build_dataset(train)
    clock.start = time.perf_counter()
    train_segmentor(model, samples, found)
    model.eval()
    return lambda image: model.encode_decode(image, None), clock.rate(args.batch)


class PlainDataset(Dataset):
    """A data set that decodes images and masks with Pillow and augments them with torchvision."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.samples = list_samples(args.path, "train")
        mean = [part / 255 for part in IMAGENET_CHANNEL_MEAN]
        std = [part / 255 for part in IMAGENET_CHANNEL_STD]
        self.transforms = v2.Compose(
            [
                v2.RandomResize(args.size // 2, 2 * args.size),
                v2.RandomCrop(args.size, pad_if_needed=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.125, 0.5, 0.5, 0.05),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _, image_path, mask_path = self.samples[index]
        pixels = torch.from_numpy(np.array(Image.open(image_path).convert("RGB"))).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(Image.open(mask_path)))
        image, labels = self.transforms(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return image, labels.long() - 1


def plain_loop(args: argparse.Namespace) -> Trained:
    """Train smp's network with a typical PyTorch training loop."""
    import segmentation_models_pytorch as smp

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = smp.DeepLabV3Plus(
        "resnet50", encoder_weights=None, encoder_output_stride=8, classes=args.classes
    ).to(device)
    loader = DataLoader(
        PlainDataset(args),
        args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    optimizer = torch.optim.SGD(
        network.parameters(), args.lr, momentum=MOMENTUM, weight_decay=DECAY
    )
    clock, finished = Clock(args.minutes), False
    network.train()
    while not finished:
        for image, target in loader:
            optimizer.param_groups[0]["lr"] = args.lr * clock.factor()
            loss = F.cross_entropy(network(image.to(device)), target.to(device), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Reading the loss waits for the GPU, so the step time includes the GPU's work, as with
            # the other trainers.
            loss.item()
            finished = clock.tick()
            if finished:
                break
    return network.eval(), clock.rate(args.batch)


@torch.inference_mode()
def score(args: argparse.Namespace, forward: Callable[[Tensor], Tensor]) -> float:
    """Return a trained network's mIoU on the validation images, in percent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = build_data(config(args), "val")
    loader = cast(DataLoader, spec.dataloader)
    matrix = torch.zeros(args.classes, args.classes, dtype=torch.int64, device=device)
    for image, labels in loader:
        image, target = spec.microbatch_transforms((image.to(device), labels.to(device)))
        logits = forward(image).float()
        matrix += confusion_matrix(logits, target, args.classes)
    return 100 * float(mean_iou(matrix))


CONTENDERS: dict[str, Callable[[argparse.Namespace], Trained]] = {
    "this project": ours,
    "this project, fp32": lambda args: ours(args, "fp32"),
    "mmsegmentation 0.30": mmsegmentation,
    "plain loop, smp": plain_loop,
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command-line arguments."""
    on_gpu = torch.cuda.is_available()
    cores = os.cpu_count() or 1
    parser = harness.make_parser(__doc__)
    parser.add_argument("--path", required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--minutes", type=float, default=2, help="minutes per training run")
    parser.add_argument("--rounds", type=int, default=3, help="training runs per contender")
    parser.add_argument("--size", type=int, default=512 if on_gpu else 128, help="image size")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 4, help="images per step")
    parser.add_argument("--lr", type=float, default=0.01, help="initial learning rate")
    parser.add_argument("--threads", type=int, default=max(cores // 2, 1), help="torch threads")
    parser.add_argument("--workers", type=int, default=4 if on_gpu else 1, help="loader processes")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.set_defaults(arch="resnet50", precision="auto", compile="auto")
    return parser.parse_args(argv)


@harness.quiet()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the study and return the result in the format for `--json`."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    found: dict[str, dict[str, list[float]]] = {
        name: {"images_per_second": [], "miou": []} for name in args.only
    }
    with tempfile.TemporaryDirectory() as args.scratch:
        for seed in range(args.rounds):
            args.seed = seed
            for name in found:
                seed_all(seed)
                forward, rate = CONTENDERS[name](args)
                found[name]["images_per_second"].append(rate)
                found[name]["miou"].append(score(args, forward))
                harness.release()
    print(
        f"CamVid from scratch, ResNet-50, {args.size} px, batch {args.batch}, {args.threads} "
        f"threads and {args.workers} loader processes, {args.minutes:g} minutes, {args.rounds} "
        f"times in turn\n\n{harness.head('', 'images/s, median', 'mIoU, mean', 'each')}"
    )
    for name, runs in found.items():
        each = ", ".join(f"{miou:.1f}" for miou in runs["miou"])
        rate, miou = statistics.median(runs["images_per_second"]), statistics.mean(runs["miou"])
        print(harness.row(name, f"{rate:.2f}", f"{miou:.2f}", each))
    names = ("size", "batch", "lr", "threads", "workers", "minutes", "rounds")
    result: dict[str, Any] = {name: getattr(args, name) for name in names}
    result |= {"machine": harness.machine(), "contenders": found}
    harness.write_json(args, result)
    return result


if __name__ == "__main__":
    main()
