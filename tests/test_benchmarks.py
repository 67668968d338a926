"""The benchmarks run, at a size at which their figures mean nothing, and compare like with like."""

import json

import pytest
import torchvision
from composer import Callback
from torchvision.models.resnet import Bottleneck, ResNet

import main as program
from benchmarks import auto_microbatch, camvid, plain, run_all, train_step
from benchmarks.stopwatch import PARTS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """ResNet-50 with four blocks."""

    def resnet50(weights=None, **arguments):
        return ResNet(Bottleneck, [1, 1, 1, 1], **arguments)

    monkeypatch.setattr(torchvision.models.resnet, "resnet50", resnet50)
    monkeypatch.setattr(program, "_build_data", program._build_data)  # restored after the test


@pytest.fixture
def step(synthetic):
    """Arguments of train_step for two steps a run."""
    text = f"--path {synthetic} --classes 12 --size 32 --batch 2 --workers 0 --precision fp32"
    return f"{text} --warmup 2 --steps 2 --rounds 2".split()


class FirstLoss(Callback):
    value: float | None = None

    def batch_end(self, state, logger):
        if self.value is None:
            self.value = state.total_loss_dict["loss/train/total"]


@pytest.mark.parametrize("recipe", ["none", "hot"])
def test_both_sides_train_the_same(step, recipe):
    args = train_step.arguments(step)
    losses = []
    for build in (program.build_trainer, plain.build_trainer):
        trainer = build(train_step.config(args, recipe))
        first = FirstLoss()
        trainer.state.callbacks.append(first)
        trainer.fit(duration="1ba")
        trainer.close()
        losses.append(first.value)
    # MixUp draws its own coefficient on each side; without it the losses are the same.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if recipe == "none" else 0.5)


def test_train_step(step, tmp_path, capsys):
    path = tmp_path / "result.json"
    train_step.main([*step, "--recipes", "none", "hot", "--json", str(path)])
    result = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for recipe in ("none", "hot"):
        for side in ("plain", "ours"):
            found = result["recipes"][recipe][side]
            assert len(found["runs"]) == 2
            assert found["images_per_second"] == pytest.approx(2000 / found["milliseconds"])
            assert 0 < found["utilisation"] < 1
            assert set(found["parts"]) == set(PARTS)
            assert all(found["parts"][part] > 0 for part in ("backbone", "head", "loss"))
            assert f"| {recipe} | {side} | {found['images_per_second']:.1f} |" in printed
    hot = result["recipes"]["hot"]
    assert hot["ours"]["waits"] < hot["plain"]["waits"]
    assert hot["ours"]["bytes"] <= hot["plain"]["bytes"]
    assert hot["plain"]["parts"]["metrics"] > 0
    assert set(result["evaluation"]) == {"plain", "ours"}


def test_operations_are_three_forward_passes():
    """Backward, a convolution takes two products of the forward one's size; the first takes one."""
    args = train_step.arguments(["--size", "64", "--arch", "resnet101", "--classes", "150"])
    # 255 G multiply-adds a forward pass at 512 px, of which 64 px take a 64th.
    assert train_step.operations(args) == pytest.approx(3 * 2 * 255e9 / 64, rel=0.05)


def test_camvid(synthetic, tmp_path, capsys):
    path = tmp_path / "result.json"
    text = f"--path {synthetic} --classes 12 --size 32 --batch 4 --workers 0 --minutes 0.05"
    text += f" --evaluations 2 --probe 1 --recipes none medium --json {path}"
    camvid.main(text.split())
    recipes = json.loads(path.read_text())["recipes"]
    assert list(recipes) == ["none", "medium"]
    for found in recipes.values():
        assert found["evaluations"][-1]["batches"] == found["batches"]
        assert len(found["evaluations"]) >= 2
    assert "| medium |" in capsys.readouterr().out


def test_auto_microbatch_needs_a_gpu():
    with pytest.raises(SystemExit, match="no GPU"):
        auto_microbatch.main([])


def test_run_all_goes_on_after_a_failure(tmp_path):
    outcome = run_all.run(run_all.Benchmark("missing", [], 60), 60, tmp_path)
    assert outcome.failure == "failed with status 1"
    assert "No module named benchmarks.missing" in outcome.output
    sides = {"images_per_second": 10, "bytes": 4}
    result = {"recipes": {"none": {"plain": sides, "ours": {"images_per_second": 25, "bytes": 1}}}}
    good = run_all.Outcome("train_step", "python -m x", 12, None, "| table |", result)
    text = run_all.report([outcome, good], "the command")
    assert "failed with status 1" in text and "| table |" in text and "the command" in text
    assert "2.50 of plain, memory 0.25 of plain" in run_all.summary([outcome, good])


def test_run_all_stops_what_takes_too_long(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "slow.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    outcome = run_all.run(run_all.Benchmark("slow", [], 1), 1, tmp_path)
    assert outcome.failure == "took more than 1 s"
