"""The compiled model: its graphs, and that it trains and scores as the plain one does."""

import functools
from typing import Any

import pytest
import torch
import torchvision
from composer import Callback, Trainer
from torch import nn
from torch._dynamo.utils import counters
from torchvision.models.resnet import Bottleneck, ResNet

import main as program
import model
from config import resolve

RECIPES = ("none", "mild", "medium", "hot")


class Losses(Callback):
    def __init__(self):
        self.values = []

    def batch_end(self, state, logger):
        self.values.append(state.total_loss_dict["loss/train/total"])


@pytest.fixture(autouse=True)
def small_and_compiled_fast(monkeypatch):
    """ResNet-50 with four blocks, and a backend that makes graphs but no C++ of them."""

    def resnet50(weights=None, **arguments):
        return ResNet(Bottleneck, [1, 1, 1, 1], **arguments)

    monkeypatch.setattr(torchvision.models.resnet, "resnet50", resnet50)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(tiny: dict[str, Any], recipe: str, compile: bool, **keys: Any) -> tuple[Trainer, Losses]:
    name = None if recipe == "none" else recipe
    trainer = program.build_trainer(
        resolve(tiny | {"recipe_name": name, "compile": compile} | keys)
    )
    losses = Losses()
    trainer.state.callbacks.append(losses)
    return trainer, losses


def test_one_graph_for_training_and_one_for_evaluation(tiny):
    """Over all recipes: SAM's passes, MixUp's targets, EMA's weights and a last smaller batch."""
    tiny["eval_interval"] = "1000ba"
    for recipe in RECIPES:
        trainer, _ = build(tiny, recipe, compile=True)
        for _ in range(2):
            trainer.fit(duration="2ba")
            trainer.eval()  # of 6 photos in batches of 4
        trainer.close()
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 2


def test_trains_and_scores_as_without(tiny):
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


def test_inductor_makes_the_network(tiny):
    """PyTorch's own backend, which writes C++ here and Triton on a GPU: gradients of one step."""
    torch.manual_seed(0)
    network = model.deeplabv3(12, "resnet50").to(memory_format=torch.channels_last)
    network.upsample = False
    network.classifier.dropout = nn.Identity()  # its random numbers are of another generator
    image = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    found = []
    for forward in (network, torch.compile(network, backend="inductor", fullgraph=True)):
        loss = forward(image).square().mean()
        found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    for plain, compiled in zip(*found, strict=True):
        assert (plain - compiled).norm() <= 1e-3 * plain.norm() + 1e-6


def test_mmcv_leaves_torch_ops_as_it_was():
    namespaces = [getattr(torch.ops, name) for name in torch.ops._dir]
    assert all(isinstance(namespace, torch._ops._OpNamespace) for namespace in namespaces)


def test_every_convolution_sees_channels_last(tiny):
    trainer, _ = build(tiny, "none", compile=False)
    other = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for tensor in (inputs[0], output, module.weight):
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                other.append((module, tuple(tensor.shape), tensor.stride()))

    for module in trainer.state.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    trainer.fit(duration="1ba")
    trainer.eval()
    assert not other
    for weight in trainer.state.model.parameters():
        if weight.ndim == 4:
            assert weight.grad.stride() == weight.stride()
