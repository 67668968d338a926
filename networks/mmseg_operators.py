"""A placeholder for mmcv's compiled operators, and PSAMask implemented with torch operations.

mmcv-full is published as source code. Building its operators requires a C++ compiler and takes
several minutes, so the wheel that this project installs does not contain them. However,
mmsegmentation imports mmcv.ops, and this import fails without the operators, although only PSANet
and DCN layers call them.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ModelError, one_line

log = logging.getLogger(__name__)

EXTENSION = "mmcv._ext"
REMEDY = "build mmcv-full 1.7.2 from source against this torch"
COLLECT, DISTRIBUTE = 0, 1  # mmcv's constants for the two types of PSAMask.


class MissingOperators(types.ModuleType):
    """A placeholder for mmcv's compiled extension, whose operators raise ModelError.

    Args:
        reason: Reason why the operators are missing, for error messages.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(EXTENSION)
        self._reason = reason

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*_: Any, **__: Any) -> Any:
            raise ModelError(
                f"mmcv's operator {name} is missing, because {self._reason}; choose a network "
                f"that does not need it, or {REMEDY}"
            )

        return operator

    @staticmethod
    def get_compiling_cuda_version() -> str:
        """Return the text that mmcv returns when it is built without CUDA."""
        return "not available"


@contextmanager
def root_handlers_kept() -> Iterator[None]:
    """Restore the levels of the root logger's handlers, which mmcv sets to ERROR."""
    levels = {handler: handler.level for handler in logging.root.handlers}
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


@root_handlers_kept()
def import_mmseg() -> Any:
    """Import mmsegmentation's models, and undo mmcv's changes to torch.

    At every import, mmcv prints an announcement of version 2.0. mmcv also adds a function
    `_check_balance` to all modules named torch*. As a result, torch.ops lists this function as an
    operator namespace, and torch.compile fails.
    """
    with warnings.catch_warnings(), timm_left_out():
        warnings.simplefilter("ignore", UserWarning)
        provide_extension()
        from mmseg import models
    replace_psa_mask()
    if "_check_balance" in torch.ops._dir:
        torch.ops._dir.remove("_check_balance")
        delattr(torch.ops, "_check_balance")
    return models


@contextmanager
def timm_left_out() -> Iterator[None]:
    """Make `import timm` fail unless timm is already loaded, because the import takes 2 s.

    The entry None in sys.modules makes the import fail. Only one backbone of mmsegmentation needs
    timm, and `provide_timm` loads timm for it.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("timm", None)
    try:
        yield
    finally:
        if modules["timm"] is None:
            del modules["timm"]


def provide_timm() -> None:
    """Give mmsegmentation's TIMMBackbone the module timm, if it is installed."""
    from mmseg.models.backbones import timm_backbone

    if importlib.util.find_spec("timm") is not None:
        module = importlib.import_module("timm")
        timm_backbone.timm = module  # pyrefly: ignore[bad-assignment]


def provide_extension() -> None:
    """Replace mmcv's extension with the placeholder, unless a compiled extension can be loaded.

    An extension that was compiled against a different torch version cannot be loaded. In this case,
    the function only logs a warning, because most networks do not need the operators.
    """
    reason = "this mmcv-full was installed without compiled operators"
    try:
        importlib.import_module(EXTENSION)
    except ModuleNotFoundError:
        sys.modules[EXTENSION] = MissingOperators(reason)
    except ImportError as error:
        reason = (
            f"the compiled operators of this mmcv-full do not load with torch {torch.__version__} "
            f"({one_line(error)})"
        )
        log.warning("%s; networks that need them cannot be used; %s", reason, REMEDY)
        sys.modules[EXTENSION] = MissingOperators(reason)


def replace_psa_mask() -> None:
    """Replace mmcv's PSAMask with torch operations if its operator is missing on this machine."""
    from mmcv.ops import psa_mask as module

    if lacks_operators():
        module.psa_mask = psa_mask


def lacks_operators() -> bool:
    """Return whether mmcv's operators are missing for this machine's device."""
    if isinstance(sys.modules.get(EXTENSION), MissingOperators):
        return True
    from mmcv.ops import get_compiling_cuda_version

    return torch.cuda.is_available() and get_compiling_cuda_version() == "not available"


def psa_mask(mask: Tensor, kind: int, mask_size: tuple[int, int]) -> Tensor:
    """Spread each position's attention values over the feature map, like mmcv's operator.

    Each position has one attention value for every cell in the window of size `mask_size` that is
    centred on it. Values for cells outside the feature map are dropped. Positions outside the
    window get the value 0.

    Args:
        mask: Attention values (N, rows * columns, H, W).
        kind: Direction of the attention, COLLECT or DISTRIBUTE.
        mask_size: Number of rows and columns of the window.

    Returns:
        A tensor (N, H * W, H, W). With COLLECT, the second dimension is the cell, and the last two
        dimensions are the position. With DISTRIBUTE, the roles are swapped.

    Reference:
        Zhao et al., PSANet: Point-wise Spatial Attention Network for Scene Parsing, ECCV 2018.
    """
    batch, channels, height, width = mask.shape
    rows, columns = mask_size
    # Row and column of every cell within the attention window of every position.
    y, x = (torch.arange(size, device=mask.device) for size in (height, width))
    row = y[:, None] - y + (rows - 1) // 2
    column = x[:, None] - x + (columns - 1) // 2
    in_rows, in_columns = (row >= 0) & (row < rows), (column >= 0) & (column < columns)
    inside = in_rows[:, None, :, None] & in_columns[None, :, None, :]
    channel = row[:, None, :, None] * columns + column[None, :, None, :]
    # Cells outside the window read from an additional channel of zeros.
    channel = torch.where(inside, channel, channels).reshape(height * width, height * width)
    values = F.pad(mask.flatten(2), (0, 0, 0, 1))
    spread = values.gather(1, channel.expand(batch, -1, -1))
    if kind == DISTRIBUTE:
        spread = spread.transpose(1, 2)
    return spread.reshape(batch, height * width, height, width)
