"""Networks built from mmsegmentation 0.30 configs.

Loading an mmsegmentation config runs Python code, so only a user may choose a config. Checkpoints
and weights files describe the network as data instead, without code.
"""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import ModelError, one_line
from networks.libraries import Request, convert_mappings
from networks.mmseg_heads import MMSegNetwork
from networks.mmseg_operators import import_mmseg, lacks_operators, provide_timm, root_handlers_kept

# Backbones with a GroupNorm whose backward pass crashes on a CPU if the input is channels-last
# (torch 2.13.0).
CONTIGUOUS = ("PoolFormer",)
# mmcv.ops modules that this project reimplements with plain torch operations.
IN_TORCH = ("CrissCrossAttention", "PSAMask")
# mmsegmentation modules that call a compiled operator on a GPU, but not on a CPU.
OPERATOR_ON_GPU = ("FocalLoss",)


@root_handlers_kept()
def build(request: Request) -> MMSegNetwork:
    """Build a network from an mmsegmentation config or from a recorded config.

    Args:
        request: The name is the path of a config or the name of a config that ships with
            mmsegmentation, such as `mmseg:segformer/segformer_mit-b0_512x512_160k_ade20k`. The
            arguments change the config's `model` section, or contain a recorded config under the
            key `config`. Edge-detection heads keep their own number of classes.

    Raises:
        ModelError: The config does not exist, or the network cannot be built.
    """
    whole = request.name
    models = import_mmseg()
    recorded, normalisation = request.recorded_config(), {}
    if recorded is not None:
        model = recorded
    else:
        model, normalisation = _read_config(request)
        model = _changed(model, request.library_arguments)
    model = convert_mappings(model, lambda part: _with_classes(part, request.num_classes))
    scratch = convert_mappings(model, _from_scratch)
    if not request.pretrained or recorded is not None:
        model = scratch
    record = {"config": _record(scratch), **request.wrapper_arguments}
    if "'mmcls." in repr(record):
        import mmcls.models  # noqa: F401 (registers them)
    if "'TIMMBackbone'" in repr(record):
        provide_timm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        segmentor = models.build_segmentor(convert_mappings(model, _from_record))
        if recorded is None:
            _initialise(whole, segmentor)
    _check_operators(whole, segmentor)
    options = {"channels_last": type(segmentor.backbone).__name__ not in CONTIGUOUS}
    return MMSegNetwork(segmentor, whole, record, size_divisor=32, **options, **normalisation)


def configs() -> Path:
    """Return the folder with the configs that mmsegmentation ships."""
    import mmseg

    return Path(mmseg.__file__).parent / ".mim" / "configs"


def _read_config(request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a config; return its `model` section, and its mean and std if it defines them."""
    import mmcv

    where, name = f"model.name={request.name}", request.name_in_library
    path = Path(name if os.path.isfile(name) else configs() / f"{name.removesuffix('.py')}.py")
    if not path.is_file():
        known = [str(p.relative_to(configs()))[:-3] for p in configs().glob("[!_]*/*.py")]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ModelError(f"{where}: no config or file has this name; did you mean mmseg:{near}?")
    config = mmcv.Config.fromfile(str(path))
    if "model" not in config:
        raise ModelError(f"{where}: {path} does not define a model; choose a different config")
    said = config.get("img_norm_cfg") or {}
    if not said.get("to_rgb", True):
        raise ModelError(
            f"{where}: the network expects BGR images, but this project uses RGB; "
            "choose a different config"
        )
    return config.model.to_dict(), {key: said[key] for key in ("mean", "std") if key in said}


def _changed(model: Any, changes: Any) -> Any:
    """Return a config with the user's changes: mappings are merged, other values are replaced."""
    if not isinstance(model, Mapping):
        return changes
    result = dict(model)
    for key, value in changes.items():
        if isinstance(result.get(key), tuple) and isinstance(value, list):
            value = tuple(value)
        is_section = isinstance(value, Mapping) and key in result
        result[key] = _changed(result[key], value) if is_section else value
    return result


def _with_classes(part: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Set the number of classes of a head, and replace SyncBN with BN."""
    if "num_classes" in part and part.get("type") != "STDCHead":
        part["num_classes"] = num_classes
    if part.get("type") in ("SyncBN", "MMSyncBN"):
        part["type"] = "BN"
    # Remove the class weights, because they were chosen for the classes of the original config.
    part.pop("class_weight", None)
    return part


def _from_scratch(part: dict[str, Any]) -> dict[str, Any]:
    """Remove the references to pretrained weights."""
    named = [key for key in part if key in ("pretrained", "checkpoint_path")]
    named += [key for key in part if key == "init_cfg" and "'Pretrained'" in repr(part[key])]
    kept = {key: value for key, value in part.items() if key not in named}
    # TIMMBackbone loads pretrained weights by default, so turn this off explicitly.
    if str(part.get("type")).endswith("TIMMBackbone"):
        kept["pretrained"] = False
    return kept


def _record(model: Any) -> Any:
    """Convert a config to JSON types, but keep tuples distinct from lists."""
    if isinstance(model, Mapping):
        # The record is stored with trained weights, so it does not need settings for weight
        # initialisation.
        return {str(k): _record(value) for k, value in model.items() if k != "init_cfg"}
    if isinstance(model, list | tuple):
        parts = [_record(part) for part in model]
        return {"tuple": parts} if isinstance(model, tuple) else parts
    return model


def _from_record(part: dict[str, Any]) -> Any:
    """Convert a config's mapping to mmcv's type, or to a tuple if the mapping encodes a tuple."""
    import mmcv

    return tuple(part["tuple"]) if part.keys() == {"tuple"} else mmcv.ConfigDict(part)


def _initialise(whole: str, segmentor: Any) -> None:
    logging.disable(logging.WARNING)  # Silence mmcv, which logs a line for every tensor.
    try:
        segmentor.init_weights()
    # The download failed, or the file does not contain suitable weights.
    except Exception as error:
        raise ModelError(
            f"model.name={whole}: its pretrained weights cannot be loaded "
            f"({one_line(error)}); to start without them, leave model.backbone_weights empty"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _check_operators(whole: str, segmentor: nn.Module) -> None:
    """Reject networks that need a GPU operator if mmcv-full was built without GPU operators."""
    if not (torch.cuda.is_available() and lacks_operators()):
        return
    for module in segmentor.modules():
        kind = type(module)
        operator = kind.__module__.startswith("mmcv.ops.") and kind.__name__ not in IN_TORCH
        if operator or kind.__name__ in OPERATOR_ON_GPU:
            raise ModelError(
                f"model.name={whole} needs mmcv's operator {kind.__name__}, but the installed "
                "mmcv-full has no GPU operators; set CUDA_VISIBLE_DEVICES= to use the CPU, or "
                "build mmcv-full 1.7.2 with CUDA for this version of torch"
            )
