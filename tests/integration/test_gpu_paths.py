"""GPU code paths of Composer and this project, tested with a simulated GPU.

Composer sees a GPU, but its tensors are on the CPU. These tests fail if a new release of torch
changes something that only the GPU code paths use.
"""

from __future__ import annotations

import collections
import copy
import itertools
import json
import os
import re
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer import Callback
from composer.callbacks import memory_monitor
from composer.core import Event, State
from composer.devices import DeviceGPU
from composer.distributed import ddp_sync_context, prepare_ddp_module
from composer.loggers import Logger
from composer.trainer._scaler import ClosureGradScaler
from composer.utils import dist
from torch import nn
from torch._functorch import config as functorch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.overrides import TorchFunctionMode

import main as program
import model
from benchmarks import harness, loss, train_step
from benchmarks.studies import camvid, device_transform
from errors import ConfigError
from networks.deeplab import create_meta_network
from predict import Segmenter, highest_class
from segmentation import losses
from segmentation.metrics import confusion_matrix, confusion_matrix_of_predictions
from training.composer_internals import EMAParameters
from training.config import resolve
from training.ema import EMA
from training.microbatch import CONTEXT, count
from training.mixup import MixUp
from training.optimizer import DecoupledSGDW
from training.precision import check_kernels, choose_precision
from training.sam import _climbed
from transforms import DeviceTransform

pytestmark = [
    pytest.mark.usefixtures("small_network", "no_curves"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU"),
]


class PretendedGPU(DeviceGPU):
    """A device that Composer takes for a GPU, but whose tensors are on the CPU."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")


def documented_statistics() -> set[str]:
    """Return the names of the statistics in the docstring of `torch.cuda.memory_stats`."""
    text = re.sub(r"\s", "", torch.cuda.memory_stats.__doc__ or "")
    result = set()
    for name in re.findall(r'``"([^"]*)"``', text):
        expanded = [""]
        for part in re.split(r"(\{[^}]*\})", name):
            choices = part.strip("{}").split(",")
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        result |= set(expanded)
    return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch and Composer report an H100 with 80 GiB."""
    statistics = dict.fromkeys(documented_statistics(), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *a: statistics)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *a: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *a: self)
    monkeypatch.setattr("composer.utils.get_device", lambda _: PretendedGPU())
    monkeypatch.setattr("training.distributed.get_device", lambda _: PretendedGPU())
    yield


class Watch(Callback):
    """Records the autocast settings, losses and micro-batch sizes of a run."""

    def __init__(self, fails_above: int | None = None) -> None:
        self.autocast: set[tuple[bool, torch.dtype]] = set()
        self.losses: list[float] = []
        self.sizes: list[int] = []
        self.fails_above = fails_above

    def init(self, state: State, logger: Logger) -> None:
        state.model.register_forward_pre_hook(self.look)

    def look(self, module: nn.Module, inputs: tuple[Any]) -> None:
        enabled = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        self.autocast.add(enabled)
        self.sizes.append(len(inputs[0][0]))
        if self.fails_above and self.sizes[-1] > self.fails_above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append(float(state.total_loss_dict["loss/train/total"]))


def train(tiny: dict[str, Any], watch: Watch, duration: str, **changes: Any) -> Any:
    config = tiny | {"compile": False, "eval_interval": "1000ba"} | changes
    trainer = program.build_trainer(resolve(config), callbacks=[watch])
    trainer.fit(duration=duration)  # a recipe would set its own duration
    trainer.close()
    return trainer


@pytest.mark.parametrize(
    ("recipe", "scaler"),
    [(None, GradScaler), ("hot", ClosureGradScaler)],
    ids=["optimizer without closures", "SAM with closures"],
)
def test_fp16_with_gradient_scaling_trains_like_fp32(
    tiny: dict[str, Any], recipe: str | None, scaler: type, request: pytest.FixtureRequest
) -> None:
    """The gradient scale is a power of two, so it changes no gradient unless one overflows."""
    tiny["recipe_name"] = recipe
    reference = train(tiny, expected := Watch(), "3ba")
    request.getfixturevalue("gpu")
    trainer = train(tiny, watch := Watch(), "3ba", precision="amp_fp16")
    assert type(trainer.state.scaler) is scaler
    assert trainer.state.scaler.is_enabled() and trainer.state.scaler.get_scale() >= 2**16
    assert watch.autocast == {(True, torch.float16)} and expected.autocast != watch.autocast
    torch.testing.assert_close(watch.losses, expected.losses)
    for ours, theirs in zip(
        trainer.state.model.parameters(), reference.state.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_auto_precision_autocasts_to_bf16(gpu: None, tiny: dict[str, Any]) -> None:
    assert choose_precision("auto") == ("amp_bf16", None)
    train(tiny, watch := Watch(), "1ba", precision="auto")
    assert watch.autocast == {(True, torch.bfloat16)}


def test_auto_microbatch_halves_until_batch_fits(gpu: None, tiny: dict[str, Any]) -> None:
    watch = Watch(fails_above=2)
    changes = {"device_train_microbatch_size": "auto", "precision": "amp_bf16"}
    trainer = train(tiny, watch, "2ba", **changes)
    assert watch.sizes == [4, 2, 2, 2, 2]
    assert trainer.state.device_train_microbatch_size == 2


def test_auto_microbatch_starts_at_estimated_size(
    gpu: None, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory estimate gives the first size to try, so no larger one is compiled in vain."""
    network = create_meta_network(**asdict(resolve(tiny).model))
    footprint = count(network, 32, torch.bfloat16)
    room = footprint.step(2, resolve(tiny)) + CONTEXT + 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (room, 80 * 2**30))
    watch = Watch()
    changes = {"device_train_microbatch_size": "auto", "precision": "amp_bf16"}
    trainer = train(tiny, watch, "2ba", **changes)
    assert watch.sizes == [2, 2, 2, 2]
    assert trainer.state.device_train_microbatch_size == 2


def test_memory_monitor_keys_exist_in_torch_memory_stats() -> None:
    assert len(documented_statistics()) > 50
    assert set(memory_monitor._MEMORY_KEYS) <= documented_statistics()


@pytest.fixture
def one_process(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Start a process group of one process as for a GPU; yield the backends that are requested."""
    requested = []
    initialize = torch.distributed.init_process_group

    def with_gloo(backend: str, **arguments: Any) -> None:
        requested.append(backend)
        initialize("gloo", **arguments)

    monkeypatch.setattr(torch.distributed, "init_process_group", with_gloo)
    before = dict(os.environ)
    dist.initialize_dist(PretendedGPU())
    yield requested
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_ddp_gradients_equal_single_process_gradients(one_process: list[str]) -> None:
    assert one_process == ["nccl"] and dist.is_initialized()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    wrapped = prepare_ddp_module(network, find_unused_parameters=False)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    state: Any = type("S", (), {"model": wrapped, "optimizers": [None]})()
    image = torch.randn(4, 3, 8, 8)
    gradients = []
    for model_, halves in ((network, [image]), (wrapped, image.chunk(2))):
        network.zero_grad()
        for index, half in enumerate(halves):
            with ddp_sync_context(state, index == len(halves) - 1, "single_auto_sync"):
                model_.eval()
                model_(half).sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


WHEELS = {
    "2.7.0": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "2.15.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}


@pytest.mark.parametrize(
    ("wheel", "capability", "advice"),
    [
        ("2.7.0", (10, 0), r"capability 10\.0, but torch 2\.7\.0 has no kernels .*CUDA 13"),
        ("2.7.0", (12, 0), "torch 2.15.0 or newer"),
        ("2.15.0", (7, 0), r"capability 7\.0, .*make install TORCH=2\.7\.0"),
        ("2.15.0", (6, 1), "TORCH=2.7.0"),
        ("2.15.0", (13, 0), "or newer"),
        ("2.7.0", (8, 9), None),
        ("2.7.0", (6, 1), None),
        ("2.15.0", (7, 5), None),
        ("2.15.0", (10, 3), None),
        (["sm_90a"], (9, 0), None),
        (["sm_80", "sm_100a"], (10, 3), "no kernels"),
        (["sm_80", "sm_100f"], (10, 3), None),
        (["sm_80", "compute_90"], (12, 0), None),
        (["sm_90", "compute_90"], (8, 6), "no kernels"),
    ],
)
def test_gpu_without_kernels_in_installed_torch_is_rejected(
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tiny: dict[str, Any],
    wheel: str | list[str],
    capability: tuple[int, int],
    advice: str | None,
) -> None:
    """The error is a single line and is raised before the model is built."""
    monkeypatch.setattr(torch, "__version__", wheel if isinstance(wheel, str) else "x")
    built = WHEELS[wheel] if isinstance(wheel, str) else wheel
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *a: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    monkeypatch.setattr(model, "build_composer_deeplabv3", lambda *a, **k: pytest.fail("was built"))
    if advice is None:
        check_kernels()
        return
    with pytest.raises(ConfigError, match=advice) as error:
        program.build_trainer(resolve(tiny))
    assert "\n" not in str(error.value) and str(error.value).startswith("NVIDIA Something has ")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the modules instead of compiling them, because Dynamo needs a real GPU."""
    modules: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: modules.append(self))
    monkeypatch.setattr(DeviceTransform, "compile", lambda self: modules.append(self))
    return modules


def test_run_with_automatic_settings_trains_on_a_gpu(
    gpu: None, compiled: list[Any], tiny: dict[str, Any]
) -> None:
    settings = {"compile": "auto", "device_train_microbatch_size": "auto", "precision": "auto"}
    settings |= {"recipe_name": "hot", "activation_memory_budget": 0.5}
    before = functorch.activation_memory_budget
    try:
        trainer = train(tiny, watch := Watch(), "2ba", eval_interval="2ba", **settings)
        assert functorch.activation_memory_budget == 0.5
    finally:
        functorch.activation_memory_budget = before
    assert watch.autocast == {(True, torch.bfloat16)}
    assert watch.sizes == [4] * 4
    # The network and the transforms of training and evaluation are compiled.
    assert compiled[0] is trainer.state.model.module and len(compiled) == 3
    assert watch.losses[0] > 0 and trainer.state.eval_metric_values["MIoU"] >= 0


def test_run_plan_measures_memory_of_a_gpu(
    gpu: None,
    compiled: list[Any],
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 9 * 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("extras.planning.plan.get_device", lambda _: PretendedGPU())
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.1)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tiny | {"precision": "auto"}))  # JSON is also YAML
    assert program.run([str(file), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "NVIDIA H100 80GB HBM3" and plan["precision"] == "amp_bf16"
    assert plan["compiled"] and plan["batch"]["at_once"] == 4 and len(resets) == 1
    # The step needs 3 GiB of tensors plus 1 GiB outside torch: of 10 GiB in use, torch has 9.
    assert plan["memory"]["step"] == 4 * 2**30
    assert plan["memory"]["device"] == 79 * 2**30 - CONTEXT
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    assert program.run([str(file), "--plan", "--json"]) == 2
    assert (
        "even a micro-batch of 2 is too large"
        in json.loads(capsys.readouterr().out)["does_not_fit"]
    )


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    autocast = "torch.cuda.amp.common.amp_definitely_not_available"
    monkeypatch.setattr(autocast, lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *a: self)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *a: None)
    monkeypatch.setattr(losses, "_implementation", lambda _: (losses.forward_sums, losses.backward))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            torch.empty(2, 1, dtype=torch.uint8, device="cuda").ne(255)[:, None].float()
    except RuntimeError as error:
        pytest.skip(f"this torch cannot pretend CUDA tensors: {error}".partition("\n")[0])
    yield mode


def on_cuda(network: nn.Module) -> nn.Module:
    empty: dict[int, Any] = {}
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        shell = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
        )
        empty[id(tensor)] = nn.Parameter(shell) if isinstance(tensor, nn.Parameter) else shell
    return copy.deepcopy(network, empty)


@pytest.mark.parametrize("mixes", [False, True])
def test_training_step_keeps_tensors_on_the_gpu(
    fake_cuda: FakeTensorMode, tiny: dict[str, Any], mixes: bool
) -> None:
    """Run a full training step without the autograd engine, which needs a real CUDA context."""
    network = create_meta_network(**asdict(resolve(tiny).model))
    with fake_cuda:
        _take_a_step(on_cuda(network), mixes)


@pytest.mark.parametrize("upsampled", [True, False])
def test_logits_of_onnx_file_are_moved_to_the_gpu(
    fake_cuda: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, upsampled: bool
) -> None:
    """onnxruntime returns NumPy arrays, but evaluate.py compares them with masks on the GPU."""
    logits = np.zeros((2, 12, 64, 64) if upsampled else (2, 12, 16, 16), np.float32)

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def get_modelmeta(self) -> Any:
            classes = json.dumps([{"name": name, "color": [0, 0, 0]} for name in "abcdefghijkl"])
            return types.SimpleNamespace(custom_metadata_map={"classes": classes})

        def run(self, *_: Any) -> list[np.ndarray]:
            return [logits]

    runtime = types.SimpleNamespace(InferenceSession=Session, get_available_providers=list)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setattr("predict.find_device", lambda _: torch.device("cuda", 0))
    segmenter = Segmenter("model.onnx")
    image = types.SimpleNamespace(numpy=lambda: None)  # fake tensors have no values, so use a dummy
    with fake_cuda:
        batch = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="cuda")
        target = torch.empty(2, 64, 64, dtype=torch.int64, device="cuda")
        monkeypatch.setattr(torch.Tensor, "cpu", lambda _: image)
        output = segmenter.network(batch)
        assert output.is_cuda and output.shape == logits.shape
        assert confusion_matrix(output, target, 12, -1).is_cuda
        for window in (0, 32):
            segmenter.window = window
            view = segmenter._logits(batch)[0], (64, 64)
            prediction = highest_class([view], (64, 64))
            assert confusion_matrix_of_predictions(prediction, target[0], 12).is_cuda


def _take_a_step(network: nn.Module, mixes: bool) -> None:
    composed = model.ComposerDeepLabV3(network, 12, cross_entropy_weight=0.4, dice_weight=1.1)
    raw = torch.empty(4, 64, 64, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    labels = torch.empty(4, 64, 64, dtype=torch.uint8, device="cuda")
    transform = DeviceTransform(distort=True)
    for name in ("mean", "scale", "steps"):
        constant = getattr(transform, name)
        setattr(transform, name, torch.empty(constant.shape, dtype=constant.dtype, device="cuda"))
    state: Any = type("State", (), {"batch": transform((raw, labels))})()
    assert all(tensor.is_cuda for tensor in state.batch)
    assert state.batch[0].is_contiguous(memory_format=torch.channels_last)
    target = state.batch[1]
    if mixes:
        MixUp(0.5).apply(Event.BEFORE_FORWARD, state, cast(Logger, None))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = composed(state.batch)
        parts = composed.loss(logits, state.batch)
    assert logits.dtype == torch.bfloat16 and logits.shape == (4, 12, 16, 16)
    assert all(part.is_cuda for part in parts.values())
    weights = [*network.parameters()]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = DecoupledSGDW(weights, lr=0.1, momentum=0.9)
    with _climbed(optimizer, 0.3):
        pass
    average = EMA("10ba")
    average.ema_model, average.smoothing = EMAParameters(composed), 0.9
    average._update(composed)
    average._activate(composed, average=True)
    composed.eval()
    composed.eval_batch_size = 6
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        scored = composed.eval_forward((state.batch[0], target))
    assert scored.shape == logits.shape
    counts = confusion_matrix(scored, target, 12, -1)
    assert counts.is_cuda and counts.shape == (12, 12)


class OnTheCPU(TorchFunctionMode):
    """A mode that replaces the device "cuda" by the CPU in every torch function."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        args = [self.place(argument) for argument in args]
        return function(*args, **{name: self.place(v) for name, v in (kwargs or {}).items()})

    def place(self, value: Any) -> Any:
        wanted = isinstance(value, str | torch.device) and str(value).startswith("cuda")
        return torch.device("cpu") if wanted else value


class HostTimer(harness.Timer):
    """A timer that does not wait for the GPU, and measures for 1% of the requested time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, timer=time.perf_counter)

    def blocked_autorange(self, min_run_time: float) -> object:
        return super().blocked_autorange(min_run_time=min_run_time / 100)


@pytest.fixture
def calls(
    gpu: None, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[collections.Counter[str]]:
    """Count the calls of functions in `torch.cuda`, which report 7 MiB in use and a 12 MiB peak."""
    counter: collections.Counter[str] = collections.Counter()

    def count(name: str, value: Any = None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda *a: counter.update([name]) or value)

    count("synchronize")
    count("empty_cache")
    count("reset_peak_memory_stats")
    count("memory_allocated", 7 * 2**20)
    count("max_memory_allocated", 12 * 2**20)
    monkeypatch.setattr("benchmarks.plain.get_device", lambda _: PretendedGPU())
    monkeypatch.setattr(train_step, "GPU_MATRIX", 64)
    monkeypatch.setattr(harness, "Timer", HostTimer)
    threads = torch.get_num_threads()
    with OnTheCPU():
        yield counter
    torch.set_num_threads(threads)
    harness.release()


def test_train_step_benchmark_measures_a_gpu(
    calls: collections.Counter[str], synthetic: str, tmp_path: Path
) -> None:
    text = f"--path {synthetic} --classes 12 --size 32 --batch 2 --workers 0 --arch resnet50"
    text += f" --warmup 1 --steps 2 --rounds 1 --recipes none --json {tmp_path / 'result'}"
    result = train_step.main(text.split())
    assert result["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert result["types"] == {"plain": "float16", "ours": "bfloat16"}
    assert min(calls.values()) > 0
    for row in result["recipes"]["none"].values():
        assert row["bytes"] > 5 * 2**20  # the memory in use before the step is added
        assert all(row["parts"][part] > 0 for part in ("backbone", "head", "loss"))
    assert json.loads((tmp_path / "result").read_text())["recipes"].keys() == {"none"}


def test_camvid_benchmark_trains_on_a_gpu(calls: collections.Counter[str], synthetic: str) -> None:
    default = camvid.arguments(["--path", synthetic])
    assert (default.size, default.batch) == (512, 16)
    text = f"--path {synthetic} --classes 12 --size 32 --batch 4 --workers 0 --minutes 0.005"
    result = camvid.main([*text.split(), "--evaluations", "1", "--probe", "1", "--recipes", "hot"])
    assert result["machine"]["cuda"] == torch.version.cuda
    assert 0 <= result["recipes"]["hot"]["evaluations"][-1]["miou"] <= 100


class ImmediateExecutor:
    """An executor that runs each call at once in the calling thread."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> ImmediateExecutor:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


def test_loss_benchmark_measures_a_gpu(
    calls: collections.Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loss, "ProcessPoolExecutor", ImmediateExecutor)
    path = tmp_path / "result"
    text = f"benchmark --batch 1 --classes 5 --size 64 --repeats 2 --json {path}"
    monkeypatch.setattr(sys, "argv", text.split())
    loss.main()
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert result["dtype"] == "bfloat16"
    sides = len(loss.SIDES)
    for row in result["rows"]:
        assert set(row["bytes"].values()) == {5 * 2**20}
    assert calls["reset_peak_memory_stats"] == sides * len(result["rows"])


def test_device_transform_benchmark_measures_a_gpu(calls: collections.Counter[str]) -> None:
    rows = list(device_transform.measure("cuda", 1, 2, 32))
    assert [row["transform"] for row in rows] == ["training", "evaluation"]
    assert all(row["device"].startswith("NVIDIA") and row["peak_mib"] == 5 for row in rows)
