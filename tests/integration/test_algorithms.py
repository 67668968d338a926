"""EMA, SAM and MixUp compared with Composer's, and resumed runs with uninterrupted runs."""

from collections import Counter

import pytest
import torch
from composer import Callback
from composer.core import Event
from composer.utils.checkpoint import save_checkpoint
from torch.profiler import ProfilerActivity, profile

from tests.support.algorithms import STEPS, loader, save_at, tensors, train
from training.ema import EMA
from training.seeding import SeedMicrobatch

pytestmark = pytest.mark.filterwarnings("ignore")


RECIPES = ["none", "mild", "medium", "hot"]


@pytest.mark.parametrize("name", RECIPES)
def test_ten_steps_with_ema_sam_and_mixup_equal_composer(name):
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


class SaveAfter(Callback):
    """Saves a checkpoint after one batch regardless of the save interval, as a stop signal does."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch:
            save_checkpoint(state, str(self.path))


def test_run_resumed_after_every_step_equals_uninterrupted_run(tmp_path):
    """Compare ten runs of one step, each resumed from the previous one, with a run of ten steps."""
    uninterrupted = train("medium")
    path = None
    for step in range(1, STEPS + 1):
        resumed = train(
            "medium",
            callbacks=[SaveAfter(step, tmp_path / f"{step}.pt")],
            steps=step,
            load_path=path,
        )
        path = str(tmp_path / f"{step}.pt")
    assert_equal_runs(resumed, uninterrupted)


def saved_state(path):
    return torch.load(path, weights_only=False)["state"]


def test_checkpoint_has_ema_weights_and_inner_optimizer_of_sam(tmp_path):
    trainer = train("hot", steps=5, save_folder=str(tmp_path), save_interval=save_at(5))
    state = saved_state(tmp_path / "ep1-ba5-rank0.pt")
    assert list(state["optimizers"]) == ["DecoupledSGDW"]
    momentum = state["optimizers"]["DecoupledSGDW"]["state"]
    assert {key for entry in momentum.values() for key in entry} == {"momentum_buffer"}
    ema = dict(state["algorithms"])["EMA"]
    assert ema["ema_weights_active"] and ema["ema_started"]
    # The checkpoint has the EMA weights, which an evaluation after the same step uses ...
    evaluated = {}

    class Keep(Callback):
        def eval_start(self, state, logger):
            evaluated.update({k: v.clone() for k, v in state.model.state_dict().items()})

    again = train("hot", steps=5, callbacks=[Keep()], eval_dataloader=loader(), eval_interval="5ba")
    for key, value in evaluated.items():
        assert torch.equal(value, state["model"][key])
    # ... and which differ from the training weights, which the evaluation restores.
    training = again.state.model.state_dict()
    assert not torch.equal(training["module.0.weight"], evaluated["module.0.weight"])
    stored = ema["ema_model"]["named_parameters_dict"]["module.0.weight"]
    assert torch.equal(stored, training["module.0.weight"])
    assert trainer.losses == again.losses


@pytest.mark.parametrize("name", ["mild", "hot"])
def test_run_resumes_from_checkpoint_of_composers_algorithms(name, tmp_path):
    train(name, theirs=True, steps=5, save_folder=str(tmp_path), save_interval=save_at(5))
    path = str(tmp_path / "ep1-ba5-rank0.pt")
    if name == "mild":
        ours, theirs = train(name, load_path=path), train(name, theirs=True, load_path=path)
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    else:  # With SAM, Composer's checkpoints lack the momentum.
        with pytest.warns(UserWarning, match="DecoupledSGDW is not in the state_dict"):
            ours = train(name, load_path=path)
    assert len(ours.losses) == 5


def test_saving_between_last_batch_and_ema_update_changes_nothing(tmp_path):
    """Save a checkpoint after an epoch's last batch, just before the EMA is updated."""

    def run(**kwargs):
        return train("none", algorithms=[SeedMicrobatch(17), EMA("2ep", "1ep")], **kwargs)

    def last_batch(state, event):
        return event == Event.BATCH_CHECKPOINT and state.timestamp.batch.value == 8

    assert_equal_runs(run(save_folder=str(tmp_path), save_interval=last_batch), run())
    assert (tmp_path / "ep1-ba8-rank0.pt").exists()


class CountSyncs(Callback):
    """Counts how often each training step reads a number from the device."""

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


def test_ema_sam_and_mixup_add_no_device_synchronisation():
    baseline = syncs("none")
    assert syncs("mild") == baseline
    # SAM's second pass repeats the trainer's own two reads: the batch size and the loss.
    one, both = baseline[0], baseline[0] + 2
    assert syncs("medium") == [one, both]
    assert syncs("hot") == [both, both]
    assert min(syncs("hot", theirs=True)) > both
