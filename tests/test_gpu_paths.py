"""What Composer and this project do on a GPU alone, with a GPU that is pretended.

To Composer there is one, whose tensors lie on the CPU. That catches what a new release of torch
renames, moves or refuses there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composer import Callback
from composer.callbacks import memory_monitor
from composer.core import State
from composer.devices import DeviceGPU
from composer.distributed import ddp_sync_context, prepare_ddp_module
from composer.loggers import Logger
from composer.trainer._scaler import ClosureGradScaler
from composer.utils import dist
from torch import nn
from torch.amp.grad_scaler import GradScaler

import main as program
import model
from errors import ConfigError
from training.config import resolve
from training.memory import CONTEXT, count
from training.precision import check_kernels, choose_precision

pytestmark = [
    pytest.mark.usefixtures("small_network"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU"),
]


class PretendedGPU(DeviceGPU):
    """A GPU to Composer; its tensors lie on the CPU."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")


def documented_statistics() -> set[str]:
    """The names in `torch.cuda.memory_stats`, as its documentation has them."""
    text = re.sub(r"\s", "", torch.cuda.memory_stats.__doc__ or "")
    result = set()
    for name in re.findall(r'``"([^"]*)"``', text):
        expanded = [""]
        for part in re.split(r"(\{[^}]*\})", name):
            choices = part.strip("{}").split(",")
            expanded = [begun + choice for begun in expanded for choice in choices]
        result |= set(expanded)
    return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What asks whether there is a GPU, and what it has, is told that there is one."""
    statistics = dict.fromkeys(documented_statistics(), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *a: statistics)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *a: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *a: self)
    monkeypatch.setattr("composer.utils.get_device", lambda _: PretendedGPU())
    yield


class Watch(Callback):
    """What the steps of a run were computed with."""

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
    trainer.fit(duration=duration)  # a recipe has one of its own
    trainer.close()
    return trainer


@pytest.mark.trains
@pytest.mark.parametrize(
    ("recipe", "scaler"),
    [(None, GradScaler), ("hot", ClosureGradScaler)],
    ids=["plain", "closures"],
)
def test_fp16_scales_its_gradients_and_learns_the_same(
    tiny: dict[str, Any], recipe: str | None, scaler: type, request: pytest.FixtureRequest
) -> None:
    """A scale is a power of two, so nothing changes where nothing overflows."""
    tiny["recipe_name"] = recipe
    plain = train(tiny, expected := Watch(), "3ba")
    request.getfixturevalue("gpu")
    trainer = train(tiny, found := Watch(), "3ba", precision="amp_fp16")
    assert type(trainer.state.scaler) is scaler
    assert trainer.state.scaler.is_enabled() and trainer.state.scaler.get_scale() >= 2**16
    assert found.autocast == {(True, torch.float16)} and expected.autocast != found.autocast
    torch.testing.assert_close(found.losses, expected.losses)
    for ours, theirs in zip(
        trainer.state.model.parameters(), plain.state.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.trains
def test_bf16_is_autocast(gpu: None, tiny: dict[str, Any]) -> None:
    assert choose_precision("auto") == ("amp_bf16", None)
    train(tiny, found := Watch(), "1ba", precision="auto")
    assert found.autocast == {(True, torch.bfloat16)}


@pytest.mark.trains
def test_auto_microbatch_halves_until_it_fits(gpu: None, tiny: dict[str, Any]) -> None:
    found = Watch(fails_above=2)
    changes = {"device_train_microbatch_size": "auto", "precision": "amp_bf16"}
    trainer = train(tiny, found, "2ba", **changes)
    assert found.sizes == [4, 2, 2, 2, 2]
    assert trainer.state.device_train_microbatch_size == 2


@pytest.mark.trains
def test_auto_microbatch_begins_where_it_fits(
    gpu: None, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the count, before anything was tried: nothing is compiled in vain."""
    network = program.build_network(resolve(tiny))
    footprint = count(network, 32, torch.bfloat16)
    room = footprint.step(2, resolve(tiny)) + CONTEXT + 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (room, 80 * 2**30))
    found = Watch()
    changes = {"device_train_microbatch_size": "auto", "precision": "amp_bf16"}
    trainer = train(tiny, found, "2ba", **changes)
    assert found.sizes == [2, 2, 2, 2]
    assert trainer.state.device_train_microbatch_size == 2


def test_memory_is_logged_under_the_names_that_torch_gives() -> None:
    assert len(documented_statistics()) > 50
    assert set(memory_monitor._MEMORY_KEYS) <= documented_statistics()


@pytest.fixture
def one_process(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Composer's process group for a GPU, of this process alone; the backends it asked for."""
    asked = []
    initialize = torch.distributed.init_process_group

    def with_gloo(backend: str, **arguments: Any) -> None:
        asked.append(backend)
        initialize("gloo", **arguments)

    monkeypatch.setattr(torch.distributed, "init_process_group", with_gloo)
    before = dict(os.environ)
    dist.initialize_dist(PretendedGPU())
    yield asked
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_ddp(one_process: list[str]) -> None:
    assert one_process == ["nccl"] and dist.is_initialized()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    wrapped = prepare_ddp_module(plain, find_unused_parameters=False)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    state: Any = type("S", (), {"model": wrapped, "optimizers": [None]})()
    image = torch.randn(4, 3, 8, 8)
    gradients = []
    for model_, halves in ((plain, [image]), (wrapped, image.chunk(2))):
        plain.zero_grad()
        for index, half in enumerate(halves):
            with ddp_sync_context(state, index == len(halves) - 1, "single_auto_sync"):
                model_.eval()
                model_(half).sum().backward()
        gradients.append([p.grad.clone() for p in plain.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


# A GPU that torch's wheel has no kernels for.

WHEELS = {
    "2.7.0": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "2.13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}


@pytest.mark.parametrize(
    ("wheel", "capability", "advice"),
    [
        ("2.7.0", (10, 0), r"capability 10\.0, for which torch 2\.7\.0 has no kernels .*CUDA 13"),
        ("2.7.0", (12, 0), "torch 2.13.0 or newer"),
        ("2.13.0", (7, 0), r"capability 7\.0, .*make install TORCH=2\.7\.0"),
        ("2.13.0", (6, 1), "TORCH=2.7.0"),
        ("2.13.0", (13, 0), "or newer"),
        ("2.7.0", (8, 9), None),
        ("2.7.0", (6, 1), None),
        ("2.13.0", (7, 5), None),
        ("2.13.0", (10, 3), None),
        (["sm_90a"], (9, 0), None),
        (["sm_80", "sm_100a"], (10, 3), "no kernels"),
        (["sm_80", "sm_100f"], (10, 3), None),
        (["sm_80", "compute_90"], (12, 0), None),
        (["sm_90", "compute_90"], (8, 6), "no kernels"),
    ],
)
def test_a_gpu_without_kernels_is_refused(
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tiny: dict[str, Any],
    wheel: str | list[str],
    capability: tuple[int, int],
    advice: str | None,
) -> None:
    """In a line, before the model is built."""
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
