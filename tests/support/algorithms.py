"""A small network and training runs with EMA, SAM and MixUp, of this project or of Composer."""

import types

import composer.algorithms
import numpy as np
import torch
import torch.nn.functional as F
from composer import Callback, ComposerModel, Trainer
from composer.core import Event
from composer.loss import DiceLoss, soft_cross_entropy
from composer.optim import ConstantScheduler, CosineAnnealingScheduler, DecoupledSGDW
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from segmentation.losses import segmentation_loss
from segmentation.metrics import MIoU, score_batch
from training.ema import EMA
from training.mixup import MixUp
from training.sam import SAM
from training.seeding import SeedMicrobatch

CLASSES = 5
STEPS = 10
BATCHES_PER_EPOCH = 4


class Segmenter(ComposerModel):
    """A network with BatchNorm and dropout; `dense` upsamples its logits, as Composer needs."""

    def __init__(self, dense=False):
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(8, CLASSES, 3, padding=1),
        )
        self.dense = dense
        self.dice = DiceLoss(softmax=True, batch=True, ignore_absent_classes=True)

    def forward(self, batch):
        logits = self.module(batch[0])
        if self.dense:
            logits = F.interpolate(logits, batch[0].shape[2:], mode="bilinear")
        return logits

    def loss(self, outputs, batch):
        if not self.dense:
            return segmentation_loss(outputs, batch[1])
        cross_entropy = soft_cross_entropy(outputs, batch[1], ignore_index=-1)
        return {"total": 0.375 * cross_entropy + 1.125 * self.dice(outputs, batch[1])}

    def get_metrics(self, is_train=False):
        return {} if is_train else {"MIoU": MIoU(CLASSES)}

    def eval_forward(self, batch, outputs=None):
        return self(batch)

    def update_metric(self, batch, outputs, metric):
        metric.update(score_batch(outputs, batch[1]))


class Losses(Callback):
    def __init__(self):
        self.values = []

    def batch_end(self, state, logger):
        self.values.append(state.total_loss_dict["loss/train/total"])


def recipe(name, theirs=False):
    """Return a recipe's learning rate schedule and algorithms, of this project or Composer."""
    algorithms = [SeedMicrobatch(17)]
    source = composer.algorithms if theirs else types.SimpleNamespace(EMA=EMA, SAM=SAM, MixUp=MixUp)
    if name != "none":
        half_life, interval = ("8ba", "1ba") if name == "hot" else ("20ba", "3ba")
        algorithms.append(source.EMA(half_life=half_life, update_interval=interval))
    if name in ("medium", "hot"):
        algorithms.append(source.SAM(rho=0.3, interval=1 if name == "hot" else 2))
        algorithms.append(source.MixUp(alpha=0.5 if name == "hot" else 0.2))
    constant = name in ("mild", "medium")
    return algorithms, ConstantScheduler() if constant else CosineAnnealingScheduler()


def loader(rank=0, ranks=1):
    """Return a loader of four batches of four images, which are split among the ranks."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(-1, CLASSES, (4 * BATCHES_PER_EPOCH, 4, 4), generator=generator)
    target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = torch.randn(len(target), 3, 16, 16, generator=generator) + target[:, None] / 2
    dataset = TensorDataset(image, target)
    if ranks > 1:  # one of two ranks takes the even images, the other the odd ones
        sampler = DistributedSampler(dataset, ranks, rank, shuffle=False)
    else:  # the first micro-batch has the even images, the second the odd ones
        sampler = np.arange(len(target)).reshape(-1, 2, 2).transpose(0, 2, 1).flatten().tolist()
    return DataLoader(dataset, batch_size=4 // ranks, sampler=sampler)


def train(name, theirs=False, callbacks=(), steps=STEPS, algorithms=None, **kwargs):
    recipes, schedule = recipe(name, theirs)
    model = Segmenter(dense=theirs)
    losses = Losses()
    trainer = Trainer(
        model=model,
        train_dataloader=loader(dist.get_global_rank(), dist.get_world_size()),
        optimizers=DecoupledSGDW(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-5),
        schedulers=schedule,
        algorithms=algorithms or recipes,
        callbacks=[losses, *callbacks],
        max_duration=f"{steps}ba",
        device_train_microbatch_size=2,
        device="cpu",
        precision="fp32",
        progress_bar=False,
        seed=17,
        **kwargs,
    )
    trainer.fit()
    trainer.losses = losses.values
    return trainer


def tensors(trainer):
    """Return a trainer's weights, momentum buffers and EMA weights by name."""
    state = trainer.state
    model = state.model.module if state.is_model_ddp else state.model
    named_tensors = dict(model.state_dict())
    optimizer = getattr(state.optimizers[0], "base_optimizer", state.optimizers[0])
    for name, parameter in model.named_parameters():
        named_tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    for algorithm in state.algorithms:
        if isinstance(algorithm, composer.algorithms.EMA):
            named_tensors |= {f"average.{n}": t for n, t in algorithm.ema_model.named_parameters()}
            named_tensors |= {f"average.{n}": t for n, t in algorithm.ema_model.named_buffers()}
    return named_tensors


def save_at(*batches):
    """Return a `save_interval` for these batches; an epoch's last one is saved at epoch end."""

    def save_interval(state, event):
        last = state.timestamp.batch.value % BATCHES_PER_EPOCH == 0
        here = Event.EPOCH_CHECKPOINT if last else Event.BATCH_CHECKPOINT
        return event == here and state.timestamp.batch.value in batches

    return save_interval
