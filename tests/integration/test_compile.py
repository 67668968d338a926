"""The compiled model has no graph breaks, and trains and scores like the uncompiled model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

import main as program
import model
from benchmarks.harness import release
from tests.support.forked import shrink
from training.config import resolve


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.values.append(float(state.total_loss_dict["loss/train/total"]))


@pytest.fixture(autouse=True)
def small_and_compiled_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a small network, and a backend that captures graphs without compiling C++."""
    shrink(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    release()


def build(tiny: dict[str, Any], recipe: str, compile: bool) -> tuple[Trainer, Losses]:
    name = None if recipe == "none" else recipe
    losses = Losses()
    changes: dict[str, Any] = {"recipe_name": name, "compile": compile, "eval_interval": "1000ba"}
    if name:
        changes[name] = {"ema": {"half_life": "2ba", "update_interval": "1ba"}}
    config = resolve(tiny | changes)
    return program.build_trainer(config, callbacks=[losses]), losses


def test_training_and_evaluation_compile_one_graph_each(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe `medium` covers MixUp, EMA, and steps with and without SAM's second pass."""
    # The eager backend is enough to count the graphs that Dynamo captures.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    tiny["precision"] = "amp_bf16"
    for recipe in ("none", "medium"):
        trainer, _ = build(tiny, recipe, compile=True)
        for _ in range(2):
            trainer.fit(duration="2ba")
            trainer.eval()  # The last batch is smaller: 6 images in batches of 4.
        trainer.close()
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["recompile_limit"]


def test_compiled_model_trains_and_scores_like_uncompiled(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare a compiled run with an uncompiled one, without bilinear interpolation.

    A compiled graph rounds bilinear interpolation differently from the eager kernel. The relative
    difference of 2e-7 flipped a ReLU and changed the third loss by 4e-4. Without interpolation, the
    losses are bit-identical in torch 2.15, and differ by 1.4e-5 in torch 2.7.
    """

    def nearest(input: Tensor, size: Any, **_: Any) -> Tensor:
        return functional.interpolate(input, tuple(size), mode="nearest")

    for module in ("aspp_head", "sep_aspp_head"):
        monkeypatch.setattr(f"mmseg.models.decode_heads.{module}.resize", nearest)
    scores, losses = [], []
    for compile in (True, False):
        trainer, recorded = build(tiny, "hot", compile)
        trainer.fit(duration="3ba")
        trainer.eval()
        scores.append({k: float(v) for k, v in trainer.state.eval_metric_values.items()})
        losses.append(recorded.values)
        trainer.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_inductor_gradients_equal_eager_gradients() -> None:
    """Compare gradients of one ASPP branch; Inductor writes C++ on a CPU and Triton on a GPU."""
    torch.manual_seed(0)
    network = model.deeplabv3(12, "resnet50").to(memory_format=torch.channels_last)
    # This ASPP branch contains the custom operator of networks/depthwise.py.
    layers = network.classifier.aspp_modules[1]
    channels = next(layers.parameters()).shape[0]
    features = torch.randn(2, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    results = []
    for forward in (layers, torch.compile(layers, backend="inductor", fullgraph=True)):
        loss = forward(features).square().mean()
        results.append((loss, *torch.autograd.grad(loss, list(layers.parameters()))))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


def test_importing_mmcv_does_not_modify_torch_ops() -> None:
    namespaces = [getattr(torch.ops, name) for name in torch.ops._dir]
    assert all(isinstance(namespace, torch._ops._OpNamespace) for namespace in namespaces)


def test_convolutions_receive_channels_last_tensors(tiny: dict[str, Any]) -> None:
    trainer, _ = build(tiny, "none", compile=False)
    shapes, wrong_layouts = [], []

    def look(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for tensor in (inputs[0], output, module.weight):
            shapes.append(tensor.shape)
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                wrong_layouts.append((module, tuple(tensor.shape)))

    for module in trainer.state.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    trainer.fit(duration="1ba")
    trainer.eval()
    # The bottleneck is the exception: a pooled image of 1 x 1 pixels fits both memory layouts.
    bottleneck = trainer.state.model.module.classifier.bottleneck.conv
    assert shapes and all(
        module is bottleneck and shape[1] == 160 for module, shape in wrong_layouts
    )
