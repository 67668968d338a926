"""Benchmarks at tiny sizes: they run, and the implementations that they compare agree."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from PIL import Image
from torch import nn

import main as program
from benchmarks import dataloader, harness, loss, plain, predict, run_all, train_step
from benchmarks.stopwatch import PARTS
from benchmarks.studies import (
    auto_microbatch,
    camvid,
    device_transform,
    kernels,
    peers,
    rare_classes,
)
from networks.depthwise import DilatedDepthwiseConv2d
from tests.support.forked import shrink
from tests.support.paths import ROOT
from training.schema import Config


class ShortTimer(harness.Timer):
    """A timer that measures for 1% of the requested time."""

    def blocked_autorange(self, min_run_time: float) -> object:
        return super().blocked_autorange(min_run_time=min_run_time / 100)


@pytest.fixture(autouse=True, scope="module")
def release_trainers() -> Iterator[None]:
    yield
    harness.release()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a small network and short measurements."""
    shrink(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(harness, "Timer", ShortTimer)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def step(synthetic: str) -> list[str]:
    """Command line arguments of train_step.py for two steps per run."""
    text = f"--path {synthetic} --classes 12 --size 32 --batch 2 --workers 0 --arch resnet50"
    return f"{text} --warmup 1 --steps 2 --rounds 2".split()


class FirstLoss(Callback):
    value: float | None = None

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.value is None:
            self.value = float(state.total_loss_dict["loss/train/total"])


@pytest.mark.parametrize("recipe", ["none", "mild"])
def test_train_step_benchmark_implementations_have_same_first_loss(
    step: list[str], recipe: str
) -> None:
    args = train_step.arguments([*step, "--precision", "fp32"])
    losses = []
    for build in (program.build_trainer, plain.build_trainer):
        first = FirstLoss()
        trainer = build(train_step.config(args, recipe), callbacks=[first])
        trainer.state.model.module.classifier.dropout = (
            nn.Identity()
        )  # the two implementations seed dropout differently
        trainer.fit(duration="1ba")
        trainer.close()
        losses.append(first.value)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_plain_training_loop_uses_only_pytorch_layers_in_fp32(step: list[str]) -> None:
    trainer = plain.build_trainer(train_step.config(train_step.arguments(step), "none"))
    layers = list(trainer.state.model.modules())
    assert not any(isinstance(layer, DilatedDepthwiseConv2d) for layer in layers)
    assert sum(type(layer) is nn.Conv2d and layer.groups > 1 for layer in layers) == 5
    image = torch.randn(2, 3, 32, 32)
    assert trainer.state.model((image, None)).dtype == torch.float32
    trainer.close()


def test_train_step_benchmark_prints_and_saves_same_results(
    step: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(train_step, "resident_bytes", lambda *about: 5 * 2**28)
    train_step.main([*step, "--recipes", "none", "hot", "--json", str(path)])
    result = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for recipe in ("none", "hot"):
        entry = result["recipes"][recipe]
        for side in ("plain", "ours"):
            measured = entry[side]
            assert len(measured["runs"]) == 2
            assert measured["milliseconds"] == pytest.approx(500 * sum(measured["runs"]))
            assert measured["images_per_second"] == pytest.approx(2000 / measured["milliseconds"])
            assert 0 < measured["utilisation"] < 1
            assert measured["bytes"] == 5 * 2**28
            assert set(measured["parts"]) == set(PARTS)
            assert all(measured["parts"][part] > 0 for part in ("backbone", "head", "loss"))
            assert f"| {recipe} | {side} | {measured['images_per_second']:.1f} |" in printed
        ratio = entry["plain"]["milliseconds"] / entry["ours"]["milliseconds"]
        assert train_step.ratio(entry) == pytest.approx(ratio)
        assert f"| {ratio:.2f} |" in printed
    hot = result["recipes"]["hot"]
    assert hot["ours"]["waits"] < hot["plain"]["waits"]
    assert hot["plain"]["parts"]["metrics"] > 0
    for measured in result["evaluation"].values():
        assert min(measured.values()) > 0
    assert "optimizer" in printed and "| evaluation |" in printed
    longest = max(result["kernels"], key=result["kernels"].__getitem__)
    of_one_step = result["recipes"]["none"]["ours"]["milliseconds"]
    assert 0 < result["kernels"][longest] < 10 * of_one_step and f"| `{longest}` |" in printed
    assert any("conv" in name for name in result["kernels"])
    head, *tables = printed.split("\n\n")
    assert "batch 2; plain in float32" in head and len(tables) == 4
    (*_, last) = tables[0].splitlines()
    assert last.startswith("| hot | ours |") and "| 1.25 GiB |" in last


def test_train_step_benchmark_prints_each_recipe_when_finished(
    step: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a time limit stops the benchmark, the recipes that it finished are already printed."""

    class Stopped(Exception):
        pass

    def build(config: Config, **arguments: Any) -> Any:
        if config.recipe_name == "mild":
            raise Stopped
        return program.build_trainer(config, **arguments)

    monkeypatch.setattr(train_step, "resident_bytes", lambda *about: 0)
    monkeypatch.setattr(train_step.Contender, "fit", lambda self, steps: None)
    monkeypatch.setattr(train_step.Contender, "time", lambda self: 0.5)
    monkeypatch.setitem(train_step.BUILDERS, "ours", build)
    with pytest.raises(Stopped):
        train_step.main([*step, "--recipes", "none", "mild"])
    printed = capsys.readouterr().out
    assert "| none | ours |" in printed and "mild" not in printed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpu_name_selects_its_data_sheet(name: str, expected: str | None) -> None:
    assert train_step.data_sheet(name) == expected


def test_train_step_benchmark_compares_estimates_and_measurements(step: list[str]) -> None:
    args = train_step.arguments([*step, "--recipes", "none", "hot"])
    estimated = train_step.estimates(args, "H100", "amp_bf16")
    assert estimated["none"]["images_per_second"] > estimated["hot"]["images_per_second"] > 0
    assert estimated["hot"]["bytes"] > estimated["none"]["bytes"] > 2**20
    measured = {"images_per_second": 40.0, "bytes": 2**32}
    estimates = {"none": {"images_per_second": 50.0, "bytes": 2**31}}
    result = {"estimates": estimates, "recipes": {"none": {"ours": measured}}}
    assert train_step.estimate_lines(result)[1:] == [
        "| none | 50.0 | 40.0 | 1.25 | 2.0 | 4.0 | 0.50 |"
    ]


def test_training_step_counts_flops_of_three_forward_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # Undo the `small` fixture to use the full network.
    args = train_step.arguments(["--size", "64", "--arch", "resnet101", "--classes", "150"])
    # A forward pass at 512 pixels takes 255 G multiply-adds; 64 pixels need 1/64 of them.
    assert train_step.operations(args) == pytest.approx(3 * 2 * 255e9 / 64, rel=0.05)


def test_camvid_benchmark_prints_and_saves_evaluations(
    synthetic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    text = f"--path {synthetic} --classes 12 --size 32 --batch 4 --workers 0 --minutes 0.01"
    text += f" --evaluations 2 --probe 1 --recipes none medium --json {path}"
    camvid.main(text.split())
    recipes = json.loads(path.read_text())["recipes"]
    printed = capsys.readouterr().out
    assert list(recipes) == ["none", "medium"]
    for recipe, row in recipes.items():
        last = row["evaluations"][-1]
        assert last["batches"] == row["batches"] and last["minutes"] == row["minutes"]
        assert len(row["evaluations"]) >= 2 and 0 < last["miou"] < 100
        assert f"| {recipe} | {row['minutes']:.2f} |" in printed
        assert f"{last['miou']:.2f} |\n" in printed


def test_auto_microbatch_benchmark_requires_a_gpu() -> None:
    with pytest.raises(SystemExit, match="this benchmark needs a GPU"):
        auto_microbatch.main([])


def test_auto_microbatch_benchmark_measures_step_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The full batch fits into CPU memory, so the micro-batch size equals the batch size."""
    device = types.SimpleNamespace(total_memory=80 * 2**30)
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    resets: list[int] = []  # One entry per reset of the peak memory statistics.
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    arguments = auto_microbatch.step_arguments  # Ending loader processes would take seconds.
    monkeypatch.setattr(
        auto_microbatch, "step_arguments", lambda argv: arguments([*argv, "--workers", "0"])
    )
    args = argparse.Namespace(arch="resnet50", size=32, batch=2, memory=40, compile=False)
    result = auto_microbatch.measure(args)
    assert (fractions, resets) == ([0.5], [1])
    assert result["microbatch"] == 2
    assert result["first_step"] > 0 and result["step"] > 0


def run_main(
    main: Callable[[], object], text: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict:
    """Run a benchmark that reads sys.argv; return the results that it writes as JSON."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *text.split(), "--json", str(path)])
    main()
    return json.loads(path.read_text())


def test_dataloader_benchmark_compares_images_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_main(dataloader.main, "--images 16 --repeats 1", tmp_path / "r", monkeypatch)
    assert result["images"] == 16
    rates = result["images_per_second"]
    assert len(rates) == 3 and all(len(rate) == 1 and rate[0] > 0 for rate in rates.values())
    for name, rate in rates.items():
        assert result["ratio"][name] == pytest.approx(rate[0] / rates["Pillow"][0])


def test_device_transform_benchmark_measures_train_and_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, text = device_transform.main, "--batch 2 --size 32"
    rows = run_main(main, text, tmp_path / "r", monkeypatch)["rows"]
    assert capsys.readouterr().out.splitlines()[3:] == [
        "|---|---|---|---|---|",
        *map(device_transform.line, rows),
    ]
    assert {row["transform"] for row in rows} == {"training", "evaluation"}
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])


def test_loss_benchmark_measures_index_and_mixup_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark itself fails if the losses of the two implementations differ."""
    monkeypatch.setattr(loss, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    text = "--batch 1 --classes 5 --size 64 --repeats 2 --threads 1 --device cpu"
    rows = run_main(loss.main, text, tmp_path / "r", monkeypatch)["rows"]
    assert [row["target"] for row in rows] == ["index", "mixed"]
    for row in rows:
        assert set(row["bytes"]) == set(loss.SIDES)  # too little memory to compare
        for side in loss.SIDES:
            assert len(row["seconds"][side]) == 2 and min(row["seconds"][side]) > 0


def test_loss_benchmark_measures_loss_with_class_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All class weights in the benchmark are equal, so both implementations give the same loss."""
    monkeypatch.setattr(loss, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    text = "--batch 1 --classes 5 --size 64 --repeats 1 --threads 1 --device cpu --class-weights"
    rows = run_main(loss.main, text, tmp_path / "r", monkeypatch)["rows"]
    assert [list(row["seconds"]) for row in rows] == 2 * [list(loss.WEIGHTED)]


def test_predict_benchmark_compares_images_per_second(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="make install WITH=hf")
    options = ["--images", "2", "--rounds", "1", "--size", "48", "--device", "cpu"]
    result = predict.main([*options, "--json", str(tmp_path / "r")])
    assert json.loads((tmp_path / "r").read_text())["images_per_second"]
    for network, rates in result["images_per_second"].items():
        assert len(rates) == 5 and all(len(rate) == 1 and rate[0] > 0 for rate in rates.values())
        ours = [row for row in result["rows"] if row[:2] == (network, "predict.py")]
        assert len(ours) == 1 and ours[0][-1] == "1.00"


@pytest.mark.parametrize("build", predict.NETWORKS.values())
def test_programs_in_predict_benchmark_draw_equal_overlays(build: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="make install WITH=hf")
    dataloader.make_data(tmp_path, 1, "val", (48, 64))
    (path,) = (tmp_path / "images/validation").iterdir()
    args = argparse.Namespace(size=48, device="cpu")
    programs = predict.build_contenders(build, tmp_path, args)
    # An overlay is the mean of the image and the class colours of the prediction.
    segmenter = predict.Segmenter(
        tmp_path / f"{build}.safetensors",
        network=f"benchmarks.predict:{build}",
        size=48,
        device="cpu",
    )
    colors = predict.PALETTE[segmenter(path)]
    expected = _blocks(0.5 * np.array(Image.open(path)) + 0.5 * colors)
    for name in ("plain loop", "mmsegmentation"):
        programs[name]([path], tmp_path)
        picture = _blocks(np.array(Image.open(tmp_path / f"{path.stem}.jpg")))
        assert np.abs(picture - expected).mean() < 2 < expected.std()


def _blocks(picture: np.ndarray) -> np.ndarray:
    """Return the mean colour of each block of 8 x 8 pixels, which JPEG compression preserves."""
    height, width = (side // 8 for side in picture.shape[:2])
    return picture.reshape(height, 8, width, 8, 3).mean((1, 3))


def test_rare_classes_benchmark_reports_iou_of_every_class(
    synthetic: str, tmp_path: Path, small_network: None
) -> None:
    text = (
        f"--path {synthetic} --minutes 0.001 --size 32 --batch 4 --probe 1 --seeds 5 --classes 12"
    )
    names = ROOT / "yamls" / "demo_classes.txt"
    result = rare_classes.main([*text.split(), "--names", str(names), "--workers", "0"])
    assert list(result["runs"]) == list(rare_classes.WAYS)
    for (run,) in result["runs"].values():
        assert len(run["iou"]) == 12


def test_table_of_rare_classes_benchmark_averages_over_seeds() -> None:
    nan = float("nan")
    runs = {"neither": [{"iou": [10.0, 20.0, 30.0]}, {"iou": [20.0, 40.0, 60.0]}]}
    rows = rare_classes.table(runs, ["sky", "pole", "bicyclist"]).splitlines()
    assert rows[0] == "| | mIoU | of the seeds | pole | bicyclist | the other classes |"
    assert rows[2] == "| neither | 30.00 | 20.00-40.00 | 30.00 | 45.00 | 15.00 |"
    assert rare_classes.mean([1.0, nan, 3.0]) == 2.0


def fake_benchmarks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write three fake benchmarks: one succeeds, one fails, one hangs after its first output."""
    (root / "benchmarks").mkdir()
    sources = {
        "good": "print('| good |')",
        "bad": "raise SystemExit('error: no luck')",
        "slow": "import time\nprint('| half |', flush=True)\ntime.sleep(60)",
    }
    for name, source in sources.items():
        (root / "benchmarks" / f"{name}.py").write_text(source)
    plan = [run_all.Benchmark(f"benchmarks.{name}", "", 2) for name in ("slow", "bad", "good")]
    monkeypatch.setattr(run_all, "ROOT", root)
    monkeypatch.setattr(run_all, "plan", lambda on_gpu: plan)


def test_run_all_continues_after_failed_and_slow_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_benchmarks(tmp_path, monkeypatch)
    assert run_all.main(["--out", str(tmp_path / "results")]) == 1
    (file,) = (tmp_path / "results").iterdir()
    slow, bad, good = file.read_text().split("\n## ")[1:]
    assert slow.startswith("`python -m benchmarks.slow`")
    assert "s; stopped after 2 s)" in slow and "| half |" in slow
    assert "s; failed with status 1: error: no luck)" in bad
    assert "failed" not in good and "| good |" in good
    assert run_all.main(["--out", str(tmp_path / "results"), "--only", "good"]) == 0
    assert "slow" not in file.read_text()


def test_run_all_gives_remaining_time_to_camvid_benchmark() -> None:
    minutes = []
    for seconds in (300, 600):
        benchmark = run_all.camvid("some where", seconds, on_gpu=True)
        args = camvid.arguments(shlex.split(benchmark.arguments))
        assert args.path == "some where" and args.recipes == train_step.RECIPES
        assert 60 * 4 * args.minutes < seconds
        minutes.append(args.minutes)
    assert minutes[1] > minutes[0]


@pytest.mark.parametrize(
    ("on_gpu", "bf16", "trained"), [(True, True, 1), (False, True, 2), (False, False, 1)]
)
def test_run_all_plans_valid_benchmarks_within_time_limit(
    on_gpu: bool, bf16: bool, trained: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train_step.py accepts the planned arguments, and the whole plan fits into the time limit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr("training.precision._cpu_has_bf16", lambda: bf16)
    planned = run_all.plan(on_gpu)
    assert [b.module for b in planned].count("benchmarks.train_step") == trained
    for benchmark in planned:
        if benchmark.module == "benchmarks.train_step":
            train_step.arguments(shlex.split(benchmark.arguments))
    assert sum(benchmark.seconds for benchmark in planned) < 60 * (9.5 if on_gpu else 20)


def test_peers_benchmark_measures_speed_and_miou_of_each_peer(
    synthetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="make install WITH=smp")
    monkeypatch.setattr(peers, "WARM", 1)
    names = ["mmsegmentation 0.30", "plain loop, smp"]
    options = ["--size", "32", "--minutes", "0.01", "--rounds", "1", "--classes", "12"]
    options += ["--workers", "1", "--json", str(tmp_path / "peers.json")]
    result = peers.main(["--path", synthetic, *options, "--only", *names])
    assert list(result["contenders"]) == names
    for row in result["contenders"].values():
        assert 0 < row["images_per_second"][0] < 1000
        assert 0 <= row["miou"][0] < 100
    assert json.loads((tmp_path / "peers.json").read_text())["contenders"] == result["contenders"]


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_benchmark_counts_registers_and_instructions(backward: bool) -> None:
    counts = kernels.read(kernels.compile_for(80, backward, 1), backward)
    assert counts.stack == 0 and 32 < counts.registers <= 255
    # A thread computes 4 pixels x 160 classes / 32 threads = 20 exponentials, plus a few per pixel.
    assert 20 <= counts.loop["MUFU"] <= 32 and counts.loop.total() > 200
    cells, rows = kernels.LOW + 1, kernels.SIZE
    fewest = kernels.IMAGES * cells * rows
    assert fewest <= counts.rounds < 1.5 * fewest
