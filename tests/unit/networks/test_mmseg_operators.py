"""Tests of networks/mmseg_operators.py."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import ModelError
from networks import mmseg_operators
from networks.mmseg_operators import (
    COLLECT,
    DISTRIBUTE,
    EXTENSION,
    MissingOperators,
    lacks_operators,
    provide_extension,
    psa_mask,
)
from networks.registry import named_network

SHAPES = [
    pytest.param((1, 1), (1, 1), id="feature map of one pixel"),
    pytest.param((4, 5), (3, 3), id="window smaller than the feature map"),
    pytest.param((5, 4), (7, 9), id="window larger than the feature map"),
    pytest.param((4, 4), (7, 7), id="window of 2n - 1, as in PSANet"),
    pytest.param((3, 6), (2, 4), id="window of even size"),
    pytest.param((6, 3), (5, 1), id="window of one column"),
]
KINDS = [pytest.param(COLLECT, id="collect"), pytest.param(DISTRIBUTE, id="distribute")]


def reference_psa_mask(mask: Tensor, kind: int, mask_size: tuple[int, int]) -> Tensor:
    """Compute a PSAMask value by value, following its definition."""
    batch, _, height, width = mask.shape
    rows, columns = mask_size
    result = mask.new_zeros(batch, height * width, height, width)
    for y in range(height):
        for x in range(width):
            for row in range(rows):
                for column in range(columns):
                    v, u = y + row - (rows - 1) // 2, x + column - (columns - 1) // 2
                    if not (0 <= v < height and 0 <= u < width):
                        continue
                    value = mask[:, row * columns + column, y, x]
                    if kind == COLLECT:
                        result[:, v * width + u, y, x] = value
                    else:
                        result[:, y * width + x, v, u] = value
    return result


def run_psa_mask(function: Any, size: tuple[int, int], window: tuple[int, int], kind: int) -> Any:
    """Return a PSAMask's output and input gradient for seeded values."""
    random = torch.Generator().manual_seed(0)
    mask = torch.randn(2, window[0] * window[1], *size, generator=random, requires_grad=True)
    output = function(mask, kind, window)
    output.backward(torch.randn(output.shape, generator=random))
    return output.detach(), mask.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "window"), SHAPES)
def test_psa_mask_matches_its_definition(
    size: tuple[int, int], window: tuple[int, int], kind: int
) -> None:
    expected, gradient = run_psa_mask(reference_psa_mask, size, window, kind)
    output, own_gradient = run_psa_mask(psa_mask, size, window, kind)
    assert torch.equal(output, expected)
    assert torch.equal(own_gradient, gradient)


@pytest.mark.skipif(
    isinstance(sys.modules.get(EXTENSION), MissingOperators)
    or importlib.util.find_spec("mmcv._ext") is None,
    reason="this mmcv-full has no compiled operators",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "window"), SHAPES)
def test_psa_mask_matches_the_compiled_operator(
    size: tuple[int, int], window: tuple[int, int], kind: int
) -> None:
    from mmcv.ops.psa_mask import PSAMaskFunction

    expected, gradient = run_psa_mask(PSAMaskFunction.apply, size, window, kind)
    output, own_gradient = run_psa_mask(psa_mask, size, window, kind)
    assert torch.equal(output, expected) and torch.equal(own_gradient, gradient)


def test_psa_mask_ignores_values_outside_the_feature_map() -> None:
    """Multiplying infinite mask values by 0 would give NaN."""
    mask = torch.full((1, 9, 1, 1), float("inf"))
    mask[:, 4] = 2.0
    assert psa_mask(mask, COLLECT, (3, 3)).tolist() == [[[[2.0]]]]


@pytest.mark.parametrize("operator", ["deform_conv_forward", "sigmoid_focal_loss_forward", "nms"])
def test_missing_mmcv_operator_gives_a_one_line_error(operator: str) -> None:
    extension = MissingOperators("this mmcv-full has none")
    with pytest.raises(ModelError, match=f"operator {operator} is missing.*build mmcv-full") as e:
        getattr(extension, operator)(torch.zeros(1), scale=2)
    assert "\n" not in str(e.value)
    assert not hasattr(extension, "__path__")


def test_imported_mmcv_extension_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = types.ModuleType(EXTENSION)
    monkeypatch.setitem(sys.modules, EXTENSION, compiled)
    provide_extension()
    assert sys.modules[EXTENSION] is compiled


SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def mmcv_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which Python looks for modules of mmcv."""
    import mmcv

    monkeypatch.setattr(mmcv, "__path__", [str(tmp_path)])
    # Set the entry once, so that monkeypatch restores its old state after the test.
    monkeypatch.setitem(sys.modules, EXTENSION, types.ModuleType(EXTENSION))
    del sys.modules[EXTENSION]
    return tmp_path


def test_missing_mmcv_extension_is_replaced(mmcv_folder: Path) -> None:
    provide_extension()
    assert isinstance(sys.modules[EXTENSION], MissingOperators) and lacks_operators()


def test_installed_mmcv_extension_is_not_replaced(mmcv_folder: Path) -> None:
    (mmcv_folder / "_ext.py").write_text("def nms():\n    return 'compiled'\n")
    provide_extension()
    assert sys.modules[EXTENSION].nms() == "compiled"


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        pytest.param(
            "_ext.py",
            "raise ImportError('_ext.so: undefined symbol: _ZN3c106detail14torchCheckFail\\n')",
            "_ext.so: undefined symbol: _ZN3c106detail14torchCheckFail",
            id="built for another torch",
        ),
        pytest.param(
            "_ext.py",
            "raise ImportError('libcudart.so.11.0: cannot open shared object file')",
            "libcudart.so.11.0: cannot open shared object file",
            id="built for another CUDA",
        ),
        pytest.param(
            f"_ext{SUFFIX}", "cut off", "file too short|invalid ELF header", id="damaged file"
        ),
    ],
)
def test_broken_mmcv_extension_gives_a_one_line_warning(
    mmcv_folder: Path, caplog: pytest.LogCaptureFixture, file: str, content: str, cause: str
) -> None:
    (mmcv_folder / file).write_text(content)
    provide_extension()
    (line,) = caplog.messages
    assert "\n" not in line and re.search(cause, line)
    reason = f"compiled operators of this mmcv-full do not load with torch {torch.__version__}"
    assert reason in line and "build mmcv-full 1.7.2 from source against this torch" in line
    assert lacks_operators()
    with pytest.raises(
        ModelError, match=f"operator nms is missing, because .* do not load.*{cause}"
    ):
        sys.modules[EXTENSION].nms(torch.zeros(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_psa_mask_is_replaced_only_without_the_compiled_operator(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmseg_operators.import_mmseg()  # Without compiled operators, mmcv.ops cannot be imported first.
    from mmcv.ops import psa_mask as module

    monkeypatch.setattr(module, "psa_mask", "the operator")
    monkeypatch.setattr(mmseg_operators, "lacks_operators", lambda: not compiled)
    mmseg_operators.replace_psa_mask()
    assert module.psa_mask == ("the operator" if compiled else psa_mask)


DCN = {"backbone": {"dcn": {"type": "DCN", "deform_groups": 1}, "stage_with_dcn": (True,) * 4}}


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        pytest.param(DCN, "deform_conv_forward is missing", id="backbone"),
    ],
)
def test_network_with_a_missing_mmcv_operator_is_rejected(
    arguments: dict[str, Any], where: str
) -> None:
    mmseg_operators.import_mmseg()
    if not isinstance(sys.modules[EXTENSION], MissingOperators):
        pytest.skip("this mmcv-full has compiled operators")
    network = named_network("mmseg:fcn/fcn_r50-d8_512x512_80k_ade20k", 3, arguments)
    with pytest.raises(ModelError, match=f"model.name=mmseg:fcn.*{where}"):
        network.check(3, [64])
