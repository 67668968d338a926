"""Algorithms of the recipes against Composer's, and resumed runs against uninterrupted ones."""

import os
import socket
import subprocess
import sys
import types
import warnings
from collections import Counter

import composer.algorithms
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer import Callback, ComposerModel, Trainer
from composer.core import Event
from composer.loss import DiceLoss, soft_cross_entropy
from composer.optim import ConstantScheduler, CosineAnnealingScheduler, DecoupledSGDW
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from segmentation.losses import MixedTarget, segmentation_loss
from segmentation.metrics import MIoU
from training.composer_internals import ClosureGradScaler
from training.ema import EMA
from training.mixup import MixUp
from training.sam import SAM
from training.seeding import SeedMicrobatch

RECIPES = ["none", "mild", "medium", "hot"]
CLASSES = 5
STEPS = 10
BATCHES_PER_EPOCH = 4

pytestmark = [pytest.mark.trains, pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


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

    def get_metrics(self, is_train=False):
        return {} if is_train else {"MIoU": MIoU(CLASSES)}

    def eval_forward(self, batch, outputs=None):
        return self(batch)

    def update_metric(self, batch, outputs, metric):
        metric.update(outputs, batch[1])


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


def loader(rank=0, ranks=1):
    """Four batches of four pictures, two to a micro-batch, shared out among the ranks."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(-1, CLASSES, (4 * BATCHES_PER_EPOCH, 4, 4), generator=generator)
    target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = torch.randn(len(target), 3, 16, 16, generator=generator) + target[:, None] / 2
    dataset = TensorDataset(image, target)
    if ranks > 1:  # one takes the even pictures, the other the odd ones
        sampler = DistributedSampler(dataset, ranks, rank, shuffle=False)
    else:  # in every batch first the even and then the odd ones
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
    """Everything a run ends with: weights, momentum and average, by name."""
    state = trainer.state
    model = state.model.module if state.is_model_ddp else state.model
    found = dict(model.state_dict())
    optimizer = getattr(state.optimizers[0], "base_optimizer", state.optimizers[0])
    for name, parameter in model.named_parameters():
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


class SaveAfter(Callback):
    """Saves after a batch without asking any interval, as on a preemption."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch:
            save_checkpoint(state, str(self.path))


@pytest.mark.parametrize("name", ["mild", "hot"])
def test_resume_from_an_unscheduled_checkpoint(name, tmp_path):
    path = tmp_path / "preempted.pt"
    straight = train(name, callbacks=[SaveAfter(5, path)])
    assert_equal_runs(train(name, load_path=str(path)), straight)


def test_resumed_after_every_step(tmp_path):
    """Ten runs of one step each are one run of ten."""
    straight = train("medium")
    path = None
    for step in range(1, STEPS + 1):
        hop = train(
            "medium",
            callbacks=[SaveAfter(step, tmp_path / f"{step}.pt")],
            steps=step,
            load_path=path,
        )
        path = str(tmp_path / f"{step}.pt")
    assert_equal_runs(hop, straight)


def saved_state(path):
    return torch.load(path, weights_only=False)["state"]


def test_checkpoint_holds_the_average_as_model_and_the_plain_optimizer(tmp_path):
    trainer = train("hot", steps=5, save_folder=str(tmp_path), save_interval=save_at(5))
    state = saved_state(tmp_path / "ep1-ba5-rank0.pt")
    assert list(state["optimizers"]) == ["DecoupledSGDW"]
    momentum = state["optimizers"]["DecoupledSGDW"]["state"]
    assert {key for entry in momentum.values() for key in entry} == {"momentum_buffer"}
    ema = dict(state["algorithms"])["EMA"]
    assert ema["ema_weights_active"] and ema["ema_started"]
    # What was evaluated after the same step is what was saved as the model ...
    evaluated = {}

    class Keep(Callback):
        def eval_start(self, state, logger):
            evaluated.update({k: v.clone() for k, v in state.model.state_dict().items()})

    again = train("hot", steps=5, callbacks=[Keep()], eval_dataloader=loader(), eval_interval="5ba")
    for key, value in evaluated.items():
        assert torch.equal(value, state["model"][key])
    # ... and not what is trained on, which the evaluation puts back.
    training = again.state.model.state_dict()
    assert not torch.equal(training["module.0.weight"], evaluated["module.0.weight"])
    stored = ema["ema_model"]["named_parameters_dict"]["module.0.weight"]
    assert torch.equal(stored, training["module.0.weight"])
    assert trainer.losses == again.losses


@pytest.mark.parametrize("name", ["mild", "hot"])
def test_continues_from_a_checkpoint_of_composer(name, tmp_path):
    train(name, theirs=True, steps=5, save_folder=str(tmp_path), save_interval=save_at(5))
    path = str(tmp_path / "ep1-ba5-rank0.pt")
    if name == "mild":
        ours, theirs = train(name, load_path=path), train(name, theirs=True, load_path=path)
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    else:  # whose SAM does not save the momentum
        with pytest.warns(UserWarning, match="DecoupledSGDW is not in the state_dict"):
            ours = train(name, load_path=path)
    assert len(ours.losses) == 5


def test_ema_keeps_its_names_from_ddp():
    inner, outer = EMA("8ba"), EMA("8ba")
    state = types.SimpleNamespace(model=Segmenter(), is_model_ddp=False)
    inner.apply(Event.INIT, state, None)
    outer.apply(Event.INIT, state, None)
    expected = inner.state_dict()["ema_model"]
    saved = outer.state_dict()
    saved["ema_model"] = {
        kind: {f"module.{name}": tensor + 1 for name, tensor in stored.items()}
        for kind, stored in saved["ema_model"].items()
    }
    inner.load_state_dict(saved)
    loaded = inner.state_dict()["ema_model"]
    for kind, stored in expected.items():
        assert loaded[kind].keys() == stored.keys()
        assert all(torch.equal(loaded[kind][name], stored[name] + 1) for name in stored)


def test_ema_by_epochs_beside_checkpoints_by_batches(tmp_path):
    """Saving an epoch's last batch leaves the average in the model, and the update comes next."""

    def run(**kwargs):
        return train("none", algorithms=[SeedMicrobatch(17), EMA("2ep", "1ep")], **kwargs)

    def last_batch(state, event):
        return event == Event.BATCH_CHECKPOINT and state.timestamp.batch.value == 8

    assert_equal_runs(run(save_folder=str(tmp_path), save_interval=last_batch), run())
    assert (tmp_path / "ep1-ba8-rank0.pt").exists()


def test_ema_update_equals_composer():
    torch.manual_seed(1)
    model, ours, theirs = Segmenter(), EMA("3ba"), composer.algorithms.EMA("3ba")
    state = types.SimpleNamespace(model=model, is_model_ddp=False)
    for ema in (ours, theirs):
        ema.apply(Event.INIT, state, None)
    for _ in range(20):
        for tensor in model.state_dict().values():
            tensor += torch.randint(1, 9, tensor.shape)
        for ema in (ours, theirs):
            ema.apply(Event.BATCH_END, state, None)
    for kind, stored in theirs.state_dict()["ema_model"].items():
        for name, tensor in stored.items():
            torch.testing.assert_close(ours.state_dict()["ema_model"][kind][name], tensor)
    counter = ours.ema_model.named_buffers_dict["module.1.num_batches_tracked"]
    assert counter.dtype == torch.int64 and counter > 0


def test_ema_leaves_tables_of_integers_alone():
    """Swin's indices of relative positions, rounded down at each update, would be other ones."""
    model = torch.nn.BatchNorm2d(2)
    model.register_buffer("table", torch.arange(100).view(10, 10))
    model.register_buffer("mask", torch.tensor([True, False]))
    state = types.SimpleNamespace(model=model, is_model_ddp=False)
    ema = EMA("3ba")
    ema.apply(Event.INIT, state, None)
    for _ in range(20):
        model.num_batches_tracked += 1
        ema.apply(Event.BATCH_END, state, None)
    stored = ema.ema_model.named_buffers_dict
    assert torch.equal(stored["table"], model.table) and torch.equal(stored["mask"], model.mask)
    assert 0 < stored["num_batches_tracked"] < 20


class Point:
    """Two weights, a loss |w|^2 / 2 * factor, and SAM's step for them outside of a trainer."""

    def __init__(self, sam, batch=0, factor=1.0):
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.5)
        timestamp = types.SimpleNamespace(batch=types.SimpleNamespace(value=batch))
        self.state = types.SimpleNamespace(optimizers=[self.optimizer], timestamp=timestamp)
        sam.apply(Event.INIT, self.state, None)
        self.factor = factor
        self.calls, self.seen = [], []

    def closure(self, **kwargs):
        self.calls.append(kwargs)
        self.seen.append(self.weight.detach().clone())
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.factor * self.weight.square().sum() / 2
        loss.backward()
        return loss.item()


def test_sam_climbs_and_returns():
    point = Point(SAM(rho=1.0))
    assert point.optimizer.step(point.closure) == 12.5
    assert point.calls == [{"ddp_sync": False}, {"loss_dict": {}}]
    torch.testing.assert_close(point.seen[1], torch.tensor([3.6, 4.8]))  # 1 along (3, 4) / 5
    # Stepped by half the gradient at the top, (3.6, 4.8), from where it started.
    torch.testing.assert_close(point.weight.detach(), torch.tensor([1.2, 1.6]))


@pytest.mark.parametrize(
    "batch, climbs", [(0, False), (1, False), (2, True), (3, False), (5, True)]
)
def test_sam_takes_its_turn_by_the_batchs_number(batch, climbs):
    point = Point(SAM(rho=1.0, interval=3), batch)
    point.optimizer.step(point.closure)
    assert point.calls == ([{"ddp_sync": False}, {"loss_dict": {}}] if climbs else [{}])


def test_sam_steps_at_a_loss_of_zero():
    point = Point(SAM(rho=1.0))
    point.optimizer.step(lambda **kwargs: 0 * point.closure(**kwargs))
    torch.testing.assert_close(point.weight.detach(), torch.tensor([1.2, 1.6]))


def test_sam_returns_from_a_pass_that_fails():
    point = Point(SAM(rho=1.0))

    def out_of_memory(**kwargs):
        point.closure(**kwargs)
        if len(point.calls) == 2:
            raise RuntimeError("CUDA out of memory")

    start = point.weight.detach().clone()
    with pytest.raises(RuntimeError):
        point.optimizer.step(lambda **kwargs: out_of_memory(**kwargs) or 1.0)
    assert torch.equal(point.weight, start) and not torch.equal(point.seen[1], start)


@pytest.mark.parametrize("overflows", [None, 0, 1])
def test_sam_with_a_gradient_scaler(overflows):
    """As the trainer drives it in fp16: an overflow in either pass skips the step."""
    scaler = ClosureGradScaler("cpu", init_scale=8.0)
    point = Point(SAM(rho=1.0))
    start = point.weight.detach().clone()

    def closure(**kwargs):
        infinite = len(point.calls) == overflows
        point.calls.append(kwargs)
        loss = point.weight.square().sum() / 2 * (torch.inf if infinite else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(point.optimizer)
        return loss.detach()

    assert point.optimizer._step_supports_amp_closure
    scaler.step(point.optimizer, closure=closure)
    scaler.update()
    if overflows is None:
        torch.testing.assert_close(point.weight.detach(), torch.tensor([1.2, 1.6]))
    else:
        assert torch.equal(point.weight, start)
    assert scaler.get_scale() == (8 if overflows is None else 4)


def test_sam_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAM(0.3, 2)


@pytest.mark.parametrize("rho, interval", [(0, 1), (-1, 1), (0.3, 0)])
def test_sam_refuses(rho, interval):
    with pytest.raises(ValueError, match="rho > 0 and interval >= 1"):
        SAM(rho, interval)


def mix(image, target, alpha=0.5):
    state = types.SimpleNamespace(batch=[image, target])
    MixUp(alpha).apply(Event.BEFORE_FORWARD, state, None)
    return state.batch


def test_mixup_mixes_photos_and_names_both_targets():
    np.random.seed(0)
    torch.manual_seed(1)
    image = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    target = torch.randint(-1, CLASSES, (4, 8, 8))
    mixed, mixed_target = mix(image, target)
    assert isinstance(mixed_target, MixedTarget) and 0 < mixed_target.mixing <= 0.5
    assert mixed_target.target is target
    other = [next(j for j in range(4) if torch.equal(target[j], t)) for t in mixed_target.permuted]
    assert sorted(other) == [0, 1, 2, 3] and other != [0, 1, 2, 3]
    m = mixed_target.mixing
    torch.testing.assert_close(mixed, (1 - m) * image + m * image[other])
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_mixup_of_one_photo_and_of_none():
    image, target = torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    assert torch.equal(mix(image, target)[0], image)
    image, target = torch.randn(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.int64)
    mixed, mixed_target = mix(image, target, alpha=0)
    assert torch.equal(mixed, image) and mixed_target.mixing == 0
    with pytest.raises(ValueError, match="alpha >= 0"):
        MixUp(-0.1)


def draws(seeding, passes=2, batch=7, samples=4, size=2, before=0):
    """What a batch draws: a (passes, micro-batches) list of (torch's number, numpy's number)."""
    timestamp = types.SimpleNamespace(batch=types.SimpleNamespace(value=batch))
    state = types.SimpleNamespace(
        batch=(torch.zeros(samples), None), device_train_microbatch_size=size, timestamp=timestamp
    )
    torch.rand(before + 1), np.random.rand(before + 1)
    seeding.apply(Event.BATCH_START, state, None)
    drawn = []
    for _ in range(passes):
        seeding.apply(Event.BEFORE_TRAIN_BATCH, state, None)
        drawn.append([])
        for _ in range(-(-samples // size)):
            seeding.apply(Event.BEFORE_FORWARD, state, None)
            drawn[-1].append((torch.rand(()).item(), np.random.rand()))
    return drawn


def test_seeding_depends_on_seed_batch_pass_and_microbatch():
    expected = draws(SeedMicrobatch(17))
    used = SeedMicrobatch(17)
    draws(used, batch=6)
    assert draws(used, before=5) == expected
    others = [draws(SeedMicrobatch(18)), draws(SeedMicrobatch(17), batch=8)]
    numbers = [pair for drawn in (expected, *others) for row in drawn for pair in row]
    assert len({t for t, _ in numbers}) == len({n for _, n in numbers}) == 12


def test_seeding_does_not_depend_on_the_number_of_ranks(monkeypatch):
    expected = draws(SeedMicrobatch(17))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        shares.append(draws(SeedMicrobatch(17), samples=2))
    assert [a + b for a, b in zip(*shares, strict=True)] == expected


def test_seeding_starts_anew_when_auto_microbatching_does():
    seeding = SeedMicrobatch(17)
    draws(seeding, passes=1, samples=4, size=4)
    state = types.SimpleNamespace(
        batch=(torch.zeros(4), None),
        device_train_microbatch_size=2,
        timestamp=types.SimpleNamespace(batch=types.SimpleNamespace(value=7)),
    )
    seeding.apply(Event.BEFORE_TRAIN_BATCH, state, None)
    seeding.apply(Event.BEFORE_FORWARD, state, None)
    assert torch.rand(()).item() == draws(SeedMicrobatch(17))[0][0][0]


class CountSyncs(Callback):
    """How often each training step reads a number from the device."""

    def __init__(self):
        self.steps = []

    def batch_start(self, state, logger):
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.profiler.__enter__()

    def batch_end(self, state, logger):
        self.profiler.__exit__(None, None, None)
        names = Counter(event.name for event in self.profiler.events())
        self.steps.append(names["aten::_local_scalar_dense"] + names["aten::nonzero"])


def syncs(name, **kwargs):
    count = CountSyncs()
    train(name, callbacks=[count], steps=2, **kwargs)
    return count.steps


def test_algorithms_add_no_synchronisation():
    plain = syncs("none")
    assert syncs("mild") == plain
    # A second pass over the batch adds the trainer's own two: the batch size and the loss.
    one, both = plain[0], plain[0] + 2
    assert syncs("medium") == [one, both]
    assert syncs("hot") == [both, both]
    assert min(syncs("hot", theirs=True)) > both


def test_sam_itself_does_not_synchronise():
    point = Point(SAM(rho=1.0))
    gradient = torch.tensor([3.0, 4.0])

    def closure(**kwargs):
        point.weight.grad = gradient.clone()
        return 1.0

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        point.optimizer.step(closure)
    names = {event.name for event in profiler.events()}
    assert not names & {"aten::item", "aten::_local_scalar_dense"}
    assert "aten::_foreach_norm" in names


def train_on_ranks(folder):
    """Trains and evaluates on this rank: EMA and MixUp, which two ranks do as one does."""
    algorithms = [SeedMicrobatch(17), EMA("8ba"), MixUp(0.5)]
    trainer = train(
        "mild",
        algorithms=algorithms,
        eval_dataloader=loader(dist.get_global_rank(), dist.get_world_size()),
        eval_interval="10ba",
        save_folder=folder,
        save_interval=save_at(5),
    )
    hot = train("hot")  # its climbs differ by design; it has to run, and keep the ranks together
    found = tensors(trainer) | {f"hot.{key}": value for key, value in tensors(hot).items()}
    found["matrix"] = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    found["losses"] = torch.tensor(trainer.losses)
    torch.save(found, f"{folder}/rank{dist.get_global_rank()}.pt")
    return found


def test_two_ranks_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        environment = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "NODE_RANK": 0,
        }
        environment = os.environ | {key: str(value) for key, value in environment.items()}
        command = [sys.executable, "-W", "ignore", __file__, str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=environment))
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    (tmp_path / "one").mkdir()
    one = train_on_ranks(str(tmp_path / "one"))
    two = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    # Every rank knows the matrix of the whole set.
    assert torch.equal(two[0]["matrix"], two[1]["matrix"])
    assert two[0]["matrix"].sum() == one["matrix"].sum()
    # Each rank's BatchNorm statistics are of its own pictures; all else is common to them.
    own = ("matrix", "running_mean", "running_var", "num_batches_tracked")
    weights = [key for key in one if not key.endswith(own)]
    for key in weights:
        assert torch.equal(two[0][key], two[1][key])
        if not key.startswith("hot."):
            torch.testing.assert_close(two[0][key], one[key], rtol=1e-3, atol=1e-5)
    # A checkpoint of two ranks, saved under DDP, resumes on one.
    resumed = train(
        "mild",
        algorithms=[SeedMicrobatch(17), EMA("8ba"), MixUp(0.5)],
        load_path=str(tmp_path / "ep1-ba5-rank0.pt"),
    )
    for key, value in tensors(resumed).items():
        if key in weights:
            torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    train_on_ranks(sys.argv[1])
