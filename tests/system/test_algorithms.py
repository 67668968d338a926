"""Training with EMA, MixUp and SAM on two ranks, compared with training on one rank."""

import pytest
import torch
from composer.utils import dist

from tests.support.algorithms import loader, save_at, tensors, train
from tests.support.forked import call_on_two_ranks
from training.ema import EMA
from training.mixup import MixUp
from training.seeding import SeedMicrobatch

pytestmark = pytest.mark.filterwarnings("ignore")


def train_on_ranks(folder):
    """Train and evaluate on this rank; save and return the weights, confusion matrix and losses."""
    algorithms = [SeedMicrobatch(17), EMA("8ba"), MixUp(0.5)]
    trainer = train(
        "mild",
        algorithms=algorithms,
        eval_dataloader=loader(dist.get_global_rank(), dist.get_world_size()),
        eval_interval="10ba",
        save_folder=folder,
        save_interval=save_at(5),
    )
    hot = train("hot")  # SAM's result depends on the number of ranks, but all ranks must agree
    results = tensors(trainer) | {f"hot.{key}": value for key, value in tensors(hot).items()}
    results["matrix"] = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    results["losses"] = torch.tensor(trainer.losses)
    torch.save(results, f"{folder}/rank{dist.get_global_rank()}.pt")
    return results


def test_training_on_two_ranks_equals_training_on_one_rank(tmp_path):
    call_on_two_ranks(train_on_ranks, str(tmp_path))
    (tmp_path / "one").mkdir()
    one = train_on_ranks(str(tmp_path / "one"))
    two = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    # Every rank has the confusion matrix of the full validation set.
    assert torch.equal(two[0]["matrix"], two[1]["matrix"])
    assert two[0]["matrix"].sum() == one["matrix"].sum()
    # BatchNorm statistics differ, because each rank has its own images; all else is equal.
    rank_specific = ("matrix", "running_mean", "running_var", "num_batches_tracked")
    weights = [key for key in one if not key.endswith(rank_specific)]
    for key in weights:
        assert torch.equal(two[0][key], two[1][key])
        if not key.startswith("hot."):
            torch.testing.assert_close(two[0][key], one[key], rtol=1e-3, atol=1e-5)
    # A checkpoint from two ranks with DistributedDataParallel resumes on one rank.
    resumed = train(
        "mild",
        algorithms=[SeedMicrobatch(17), EMA("8ba"), MixUp(0.5)],
        load_path=str(tmp_path / "ep1-ba5-rank0.pt"),
    )
    for key, value in tensors(resumed).items():
        if key in weights:
            torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-5)
