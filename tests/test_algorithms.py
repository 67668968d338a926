"""algorithms.py against Composer's algorithms, and a resumed run against an uninterrupted one."""

import types
import warnings
from pathlib import Path

import composer.algorithms
import pytest
import torch
import torch.nn.functional as F
from composer import Callback, ComposerModel, Trainer
from composer.core import Event, Time
from composer.loss import DiceLoss, soft_cross_entropy
from composer.optim import ConstantScheduler, CosineAnnealingScheduler, DecoupledSGDW
from composer.trainer._scaler import ClosureGradScaler
from composer.utils.checkpoint import save_checkpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from algorithms import EMA, SAM, MixUp, SeedMicrobatch
from losses import MixedTarget, segmentation_loss

RECIPES = ["none", "mild", "medium", "hot"]
CLASSES = 5
STEPS = 10
BATCHES_PER_EPOCH = 4

pytestmark = pytest.mark.filterwarnings("ignore")


class Segmenter(ComposerModel):
    """A net with BatchNorm and dropout; `dense` trains as Composer alone does, at full size."""

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


class Losses(Callback):
    def __init__(self):
        self.values = []

    def batch_end(self, state, logger):
        self.values.append(state.total_loss_dict["loss/train/total"])


def recipe(name, theirs=False):
    """The algorithms of a recipe, this project's or Composer's, and its schedule."""
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


def loader():
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(-1, CLASSES, (4 * BATCHES_PER_EPOCH, 4, 4), generator=generator)
    target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = torch.randn(len(target), 3, 16, 16, generator=generator) + target[:, None] / 2
    return DataLoader(TensorDataset(image, target), batch_size=4)


def train(name, theirs=False, callbacks=(), steps=STEPS, **kwargs):
    algorithms, schedule = recipe(name, theirs)
    model = Segmenter(dense=theirs)
    losses = Losses()
    trainer = Trainer(
        model=model,
        train_dataloader=loader(),
        optimizers=DecoupledSGDW(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-5),
        schedulers=schedule,
        algorithms=algorithms,
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
    trainer.close()
    trainer.losses = losses.values
    return trainer


def tensors(trainer):
    """Everything a run ends with: weights, momentum and average, by name."""
    state = trainer.state
    found = dict(state.model.state_dict())
    optimizer = getattr(state.optimizers[0], "base_optimizer", state.optimizers[0])
    for name, parameter in state.model.named_parameters():
        found[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    for algorithm in state.algorithms:
        if isinstance(algorithm, composer.algorithms.EMA):
            found |= {f"average.{n}": t for n, t in algorithm.ema_model.named_parameters()}
            found |= {f"average.{n}": t for n, t in algorithm.ema_model.named_buffers()}
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_ten_steps_equal_composer(name):
    ours, theirs = train(name), train(name, theirs=True)
    assert len(ours.losses) == STEPS
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    expected = tensors(theirs)
    assert tensors(ours).keys() == expected.keys()
    for key, value in tensors(ours).items():
        difference = (value - expected[key]).double().norm() / expected[key].double().norm()
        assert difference < 1e-3, key


def assert_equal_runs(left, right):
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def save_at(*batches):
    """A save interval: after these batches, at the end of the epoch where they are its last."""

    def save_interval(state, event):
        last = state.timestamp.batch.value % BATCHES_PER_EPOCH == 0
        here = Event.EPOCH_CHECKPOINT if last else Event.BATCH_CHECKPOINT
        return event == here and state.timestamp.batch.value in batches

    return save_interval


@pytest.mark.parametrize("name", RECIPES)
def test_resume_is_exact(name, tmp_path):
    straight = train(name, save_folder=str(tmp_path), save_interval=save_at(4, 5))
    for checkpoint in ("ep1-ba4-rank0.pt", "ep1-ba5-rank0.pt"):  # between epochs and within one
        resumed = train(name, load_path=str(tmp_path / checkpoint))
        assert resumed.losses == straight.losses[-len(resumed.losses) :]
        assert_equal_runs(resumed, straight)
    if name != "none":
        assert_equal_runs(train(name), straight)  # saving changes nothing
