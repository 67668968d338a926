"""A plain Composer implementation of the training step, as a baseline for the benchmarks.

The baseline upsamples the logits to the target's size and applies Composer's `soft_cross_entropy`
and `DiceLoss`. The baseline computes Composer's `MIoU` for every training batch. The baseline also
uses Composer's `ChannelsLast`, EMA, SAM, MixUp (with dense targets) and `DecoupledSGDW`. The
baseline's head uses PyTorch's depthwise convolutions.

On a GPU, the baseline runs under fp16 autocast. On a CPU, the baseline runs in fp32, because
Composer does not support mixed precision on CPUs. The baseline uses neither `torch.compile` nor
cuDNN autotuning. The baseline's architecture, data and schedule are the same as this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer import Trainer, algorithms
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.core import Algorithm, Callback, DataSpec
from composer.loss import DiceLoss, soft_cross_entropy
from composer.metrics import CrossEntropy, MIoU
from composer.models import ComposerModel
from composer.optim import DecoupledSGDW
from composer.utils import get_device, reproducibility
from torch import Tensor, nn

from data import build_data
from model import deeplabv3, weight_init
from networks.depthwise import DilatedDepthwiseConv2d
from training.build_recipe import build_schedule
from training.schema import Config


class PlainDeepLabV3(ComposerModel):
    """DeepLabV3+ with Composer's losses and metrics, computed at full image resolution.

    Args:
        config: Config of the run, whose `model` section describes the network.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.module = deeplabv3(
            model.num_classes, model.backbone_arch, model.backbone_weights, init_fn=weight_init
        )
        for layer in self.module.modules():
            if isinstance(layer, DilatedDepthwiseConv2d):
                # Replacing the class is safe, because DilatedDepthwiseConv2d differs from nn.Conv2d
                # only in a method.
                layer.__class__ = nn.Conv2d  # pyrefly: ignore[bad-argument-type]
        self.config = model
        self.dice = DiceLoss(softmax=True, batch=True, ignore_absent_classes=True)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        cross_entropy = soft_cross_entropy(outputs, batch[1], ignore_index=-1)
        dice = self.dice(outputs, batch[1])
        total = self.config.cross_entropy_weight * cross_entropy + self.config.dice_weight * dice
        return {"total": total, "cross_entropy": cross_entropy, "dice": dice}

    def eval_forward(self, batch: tuple[Tensor, Tensor], outputs: Tensor | None = None) -> Tensor:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
        metrics: dict[str, Any] = {"MIoU": MIoU(self.config.num_classes, ignore_index=-1)}
        return metrics if is_train else metrics | {"CrossEntropy": CrossEntropy(ignore_index=-1)}

    def update_metric(self, batch: tuple[Tensor, Tensor], outputs: Tensor, metric: Any) -> None:
        metric.update(outputs, batch[1])


def build_trainer(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    data: tuple[DataSpec, DataSpec] | None = None,
) -> Trainer:
    """Build the plain-Composer counterpart of the trainer from `main.build_trainer`."""
    on_gpu = torch.cuda.is_available()
    reproducibility.seed_all(config.seed)
    train_data, eval_data = data or (build_data(config, "train"), build_data(config, "val"))
    model = PlainDeepLabV3(config)
    return Trainer(
        model=model,
        train_dataloader=train_data,
        eval_dataloader=eval_data,
        eval_interval=config.eval_interval,
        max_duration=config.max_duration,
        optimizers=DecoupledSGDW(
            model.parameters(),
            lr=config.optimizer.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        ),
        schedulers=build_schedule(config),
        algorithms=composers_recipe(config),
        callbacks=[
            *callbacks,
            SpeedMonitor(window_size=20),
            LRMonitor(),
            *([MemoryMonitor()] * on_gpu),
        ],
        progress_bar=False,
        device=get_device(None),
        precision=precision(config),
        device_train_microbatch_size=config.device_train_microbatch_size,
        spin_dataloaders=False,
        seed=config.seed,
    )


def precision(config: Config) -> str:
    """Return Composer's name for the precision in which the baseline runs."""
    return "amp_fp16" if torch.cuda.is_available() and config.precision != "fp32" else "fp32"


def composers_recipe(config: Config) -> list[Algorithm]:
    """Return Composer's own versions of the algorithms in the recipe `config.recipe_name`."""
    if config.recipe_name is None:
        return []
    recipe = getattr(config, config.recipe_name)
    built: list[Algorithm] = [
        algorithms.ChannelsLast(),
        algorithms.EMA(half_life=recipe.ema.half_life, update_interval=recipe.ema.update_interval),
    ]
    if config.recipe_name in ("medium", "hot"):
        built.append(algorithms.SAM(rho=recipe.sam.rho, interval=recipe.sam.interval))
        built.append(algorithms.MixUp(alpha=recipe.mixup.alpha))
    return built
