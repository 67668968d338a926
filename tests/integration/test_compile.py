"""The compiled model: its graphs, and that it trains and scores as the plain one does."""

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
    """A network of a few layers, and a backend that makes graphs but no C++ of them."""
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


def test_one_graph_for_training_and_one_for_evaluation(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe `medium` has MixUp, EMA, and steps with SAM's second pass and steps without it."""
    # Dynamo makes the graphs; a backend that runs them as they are suffices to count them.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    tiny["precision"] = "amp_bf16"
    for recipe in ("none", "medium"):
        trainer, _ = build(tiny, recipe, compile=True)
        for _ in range(2):
            trainer.fit(duration="2ba")
            trainer.eval()  # of 6 photos in batches of 4
        trainer.close()
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["recompile_limit"]


def test_trains_and_scores_as_without(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bilinear interpolation is left out: a graph computes it in other operations than a kernel.

    With it, outputs differ by 2e-7 of their size; where that decided a ReLU, the third loss
    differed by 4e-4. Without it, torch 2.15 gives the same bits, torch 2.7 was 1.4e-5 apart.
    """

    def nearest(input: Tensor, size: Any, **_: Any) -> Tensor:
        return functional.interpolate(input, tuple(size), mode="nearest")

    for module in ("aspp_head", "sep_aspp_head"):
        monkeypatch.setattr(f"mmseg.models.decode_heads.{module}.resize", nearest)
    scores, losses = [], []
    for compile in (True, False):
        trainer, found = build(tiny, "hot", compile)
        trainer.fit(duration="3ba")
        trainer.eval()
        scores.append({k: float(v) for k, v in trainer.state.eval_metric_values.items()})
        losses.append(found.values)
        trainer.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_inductor_makes_what_it_is_given() -> None:
    """PyTorch's own backend, which writes C++ here and Triton on a GPU: gradients of one step."""
    torch.manual_seed(0)
    network = model.deeplabv3(12, "resnet50").to(memory_format=torch.channels_last)
    # A branch of the head, with the operator of depthwise.py.
    layers = network.classifier.aspp_modules[1]
    channels = next(layers.parameters()).shape[0]
    features = torch.randn(2, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    found = []
    for forward in (layers, torch.compile(layers, backend="inductor", fullgraph=True)):
        loss = forward(features).square().mean()
        found.append((loss, *torch.autograd.grad(loss, list(layers.parameters()))))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


def test_mmcv_leaves_torch_ops_as_it_was() -> None:
    namespaces = [getattr(torch.ops, name) for name in torch.ops._dir]
    assert all(isinstance(namespace, torch._ops._OpNamespace) for namespace in namespaces)


def test_convolutions_see_channels_last(tiny: dict[str, Any]) -> None:
    trainer, _ = build(tiny, "none", compile=False)
    seen, other = [], []

    def look(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for tensor in (inputs[0], output, module.weight):
            seen.append(tensor.shape)
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                other.append((module, tuple(tensor.shape)))

    for module in trainer.state.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    trainer.fit(duration="1ba")
    trainer.eval()
    # Image pooling's single pixel has no layout, and what it is joined to takes the default.
    bottleneck = trainer.state.model.module.classifier.bottleneck.conv
    assert seen and all(module is bottleneck and shape[1] == 160 for module, shape in other)
