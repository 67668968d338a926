"""Tests of training/optimizer.py."""

import copy

import composer.optim
import pytest
import torch
from torch import nn

from errors import ConfigError
from training.optimizer import DecoupledSGDW, build_optimizer
from training.schema import OptimizerConfig

ROUNDING = dict(rtol=1e-6, atol=1e-6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Linear(2, 2)
    )
    return layers.to(memory_format=torch.channels_last)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Run steps with random gradients; the linear layer has none in the first three steps."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - number / 20)
        for index, weight in enumerate(model.parameters()):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if index >= 6 and number < 3:
                weight.grad = None
        optimizer.step()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(momentum=0.9, weight_decay=5e-5),
        dict(momentum=0.9, weight_decay=5e-4, dampening=0.1),
        dict(momentum=0.9, nesterov=True),
        dict(weight_decay=5e-4),
    ],
    ids=str,
)
def test_sgdw_steps_match_composer(arguments):
    ours, theirs = network(), network()
    optimizer = DecoupledSGDW(ours.parameters(), lr=0.1, **arguments)
    reference = composer.optim.DecoupledSGDW(theirs.parameters(), lr=0.1, **arguments)
    steps(ours, optimizer, 0, 8)
    steps(theirs, reference, 0, 8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **ROUNDING)
    ours_state, theirs_state = optimizer.state_dict(), reference.state_dict()
    torch.testing.assert_close(ours_state, theirs_state, **ROUNDING)
    # Checkpoints store the name of the class.
    assert type(optimizer).__qualname__ == type(reference).__qualname__


def test_sgdw_resumes_composer_state_in_another_memory_format():
    theirs = network().to(memory_format=torch.contiguous_format)
    reference = composer.optim.DecoupledSGDW(theirs.parameters(), lr=0.1, momentum=0.9)
    steps(theirs, reference, 0, 4)
    ours = network()
    ours.load_state_dict(theirs.state_dict())
    optimizer = DecoupledSGDW(ours.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    buffer = optimizer.state[ours[0].weight]["momentum_buffer"]
    assert buffer.stride() != ours[0].weight.stride()  # the memory formats must differ
    steps(ours, optimizer, 4, 8)
    steps(theirs, reference, 4, 8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **ROUNDING)


class Network(torch.nn.Module):
    """A network with norms and biases in backbone and head, which share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        self.head.append(self.backbone[0])


@pytest.mark.parametrize("name", ["sgdw", "adamw"])
def test_optimizer_parameter_groups_follow_the_config(name):
    network = Network()
    weights = dict(network.named_parameters())
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1)
    optimizer = build_optimizer(config, network)
    expected = {"sgdw": DecoupledSGDW, "adamw": composer.optim.DecoupledAdamW}[name]
    assert type(optimizer) is expected
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], network.parameters(), strict=True))
    config.head_lr_scale, config.no_decay, config.betas = 10.0, ["norm", "bias"], [0.8, 0.99]
    optimizer = build_optimizer(config, network)
    actual = {
        key: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for key, weight in weights.items()
        if any(weight is other for other in group["params"])
    }
    assert actual == {
        "backbone.0.weight": (0.01, 0.1),
        "backbone.0.bias": (0.01, 0.0),
        "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.01, 0.0),
        "head.0.weight": (0.1, 0.1),
        "head.0.bias": (0.1, 0.0),
        "head.1.weight": (0.1, 0.0),
        "head.1.bias": (0.1, 0.0),
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights)
    if name == "adamw":
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    config.no_decay = ["bias"]  # biases of norm layers count as norm
    decays = [group["weight_decay"] for group in build_optimizer(config, network).param_groups]
    assert decays == [0.1, 0.0, 0.1, 0.0]


def test_head_lr_scale_without_a_backbone_is_rejected():
    with pytest.raises(ConfigError, match=r"head_lr_scale: this network has no known backbone"):
        build_optimizer(OptimizerConfig(head_lr_scale=10.0), network())


class Transformer(nn.Module):
    """A backbone with the names of a vision transformer of three blocks."""

    def __init__(self, blocks: str) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 4))
        self.patch_embed = nn.Conv2d(3, 4, 16)
        part: nn.Module = self
        *parents, last = blocks.split(".")
        for name in parents:
            part.add_module(name, nn.Module())
            part = part.get_submodule(name)
        part.add_module(last, nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(4, 4)}) for _ in "abc"))
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize("blocks", ["blocks", "layers", "encoder.layer"])
def test_transformer_layers_get_decaying_learning_rates(blocks: str) -> None:
    """Layer l of L has lr * decay ** (L + 1 - l), as in BEiT. The embeddings are layer 0."""
    model = nn.Module()
    model.backbone = Transformer(blocks)
    model.head = nn.Linear(4, 2)
    config = OptimizerConfig(
        name="adamw", lr=1.0, layer_decay=0.5, head_lr_scale=4.0, no_decay=["bias"]
    )
    optimizer = build_optimizer(config, model)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    actual = {name: rates[id(p)] for name, p in model.named_parameters() if name.endswith("weight")}
    assert list(actual.values()) == [0.0625, 0.125, 0.25, 0.5, 1.0, 4.0]
    assert rates[id(model.backbone.pos_embed)] == 0.0625
    decays = {g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if p.ndim == 1}
    assert 0.0 in decays


def test_layer_weight_decay_matches_pytorch_adamw() -> None:
    """BEiT and MAE use PyTorch's AdamW, which multiplies the weight decay by the learning rate."""
    model = nn.Module()
    model.backbone = Transformer("blocks")
    nn.init.ones_(model.backbone.pos_embed)
    theirs = copy.deepcopy(model)
    config = OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.1 * 0.5, layer_decay=0.5)
    rates = {"pos_embed": 0.1 * 0.5**4, "patch_embed": 0.1 * 0.5**4, "norm": 0.1}
    rates |= {f"blocks.{i}": 0.1 * 0.5 ** (3 - i) for i in range(3)}
    groups = [
        {"params": [weight], "lr": next(lr for n, lr in rates.items() if name.startswith(n))}
        for name, weight in theirs.backbone.named_parameters()
    ]
    steps = (
        (model, build_optimizer(config, model)),
        (theirs, torch.optim.AdamW(groups, weight_decay=0.5)),
    )
    for network, optimizer in steps:
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    for weight, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("has_backbone", [True, False])
def test_layer_decay_without_transformer_layers_is_rejected(has_backbone: bool) -> None:
    model = network()
    if has_backbone:
        model.backbone = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleList([nn.Conv2d(3, 3, 1)]))
    with pytest.raises(
        ConfigError, match=r"optimizer\.layer_decay: the network has no transformer"
    ):
        build_optimizer(OptimizerConfig(layer_decay=0.8), model)
