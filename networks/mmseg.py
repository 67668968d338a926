"""Networks built from mmsegmentation 0.30 configs.

Loading an mmsegmentation config runs Python code, so only a user may choose a config. Checkpoints
and weights files describe the network as data instead, without code.
"""

from __future__ import annotations

import copy
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
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from networks.libraries import OF_NETWORK, call, without_own
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
def build(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> MMSegNetwork:
    """Build a network from an mmsegmentation config or from a recorded config.

    Args:
        name: Path of a config, or name of a config that mmsegmentation ships, such as
            `segformer/segformer_mit-b0_512x512_160k_ade20k`.
        num_classes: Number of classes for all heads except edge-detection heads.
        arguments: Changes to the config's `model` section, or a recorded config under the key
            `config`.
        pretrained: If this is not None, the pretrained weights named in the config are loaded.
        from_file: Whether the name comes from a file instead of a user.

    Raises:
        ModelError: The config does not exist, or the network cannot be built.
    """
    whole = f"mmseg:{name}"
    models = import_mmseg()
    mean, std = IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
    if "config" in arguments:
        model = copy.deepcopy(dict(arguments["config"]))
    elif from_file:
        raise ModelError(
            f"{whole}: the file does not contain the network's config, so the network cannot be "
            "rebuilt; choose a file that contains the config"
        )
    else:
        model, mean, std = _read_config(whole, name)
        model = _changed(model, without_own(arguments))
    _set_classes(model, num_classes)
    if not pretrained or "config" in arguments:
        model = _from_scratch(model)
    record: dict[str, Any] = {"config": _record(_from_scratch(model))}
    record |= {key: arguments[key] for key in OF_NETWORK if key in arguments}
    if "'mmcls." in repr(record):
        import mmcls.models  # noqa: F401 (registers them)
    if "'TIMMBackbone'" in repr(record):
        provide_timm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        segmentor = call(whole, models.build_segmentor, _from_record(model))
        if "config" not in arguments:
            _initialise(whole, segmentor)
    _check_operators(whole, segmentor)
    layout = type(segmentor.backbone).__name__ not in CONTIGUOUS
    return MMSegNetwork(segmentor, whole, record, mean, std, size_divisor=32, channels_last=layout)


def configs() -> Path:
    """Return the folder with the configs that mmsegmentation ships."""
    import mmseg

    return Path(mmseg.__file__).parent / ".mim" / "configs"


def _read_config(whole: str, name: str) -> tuple[dict[str, Any], Any, Any]:
    """Run a config; return its `model` and the mean and std for normalisation."""
    import mmcv

    path = Path(name if os.path.isfile(name) else configs() / f"{name.removesuffix('.py')}.py")
    if not path.is_file():
        known = [str(p.relative_to(configs()))[:-3] for p in configs().glob("[!_]*/*.py")]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ModelError(
            f"model.name={whole}: no config or file has this name; did you mean mmseg:{near}?"
        )
    config = call(whole, mmcv.Config.fromfile, str(path))
    if "model" not in config:
        raise ModelError(
            f"model.name={whole}: {path} does not define a model; choose a different config"
        )
    said = config.get("img_norm_cfg") or {}
    mean, std = said.get("mean", IMAGENET_CHANNEL_MEAN), said.get("std", IMAGENET_CHANNEL_STD)
    if not said.get("to_rgb", True):
        raise ModelError(
            f"model.name={whole}: the network expects BGR images, but this project uses RGB; "
            "choose a different config"
        )
    return config.model.to_dict(), mean, std


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


def _set_classes(model: Any, num_classes: int) -> None:
    """Set the number of classes in all heads and replace SyncBN with BN, in place."""
    if isinstance(model, dict):
        if "num_classes" in model and model.get("type") != "STDCHead":
            model["num_classes"] = num_classes
        if model.get("type") in ("SyncBN", "MMSyncBN"):
            model["type"] = "BN"
        # Remove the class weights, because they were chosen for the classes of the original config.
        if "class_weight" in model:
            del model["class_weight"]
        for part in model.values():
            _set_classes(part, num_classes)
    elif isinstance(model, list | tuple):
        for part in model:
            _set_classes(part, num_classes)


def _from_scratch(model: Any) -> Any:
    """Return a config without references to pretrained weights."""
    if isinstance(model, Mapping):
        named = [key for key in model if key in ("pretrained", "checkpoint_path")]
        named += [key for key in model if key == "init_cfg" and "'Pretrained'" in repr(model[key])]
        kept = {key: _from_scratch(value) for key, value in model.items() if key not in named}
        # TIMMBackbone loads pretrained weights by default, so turn this off explicitly.
        if str(model.get("type")).endswith("TIMMBackbone"):
            kept["pretrained"] = False
        return kept
    if isinstance(model, list | tuple):
        return type(model)(_from_scratch(part) for part in model)
    return model


def _record(model: Any) -> Any:
    """Convert a config to JSON types, but keep tuples distinct from lists."""
    if isinstance(model, Mapping):
        # The record is stored together with trained weights, so it needs no weight initialisation.
        return {str(k): _record(value) for k, value in model.items() if k != "init_cfg"}
    if isinstance(model, list | tuple):
        parts = [_record(part) for part in model]
        return {"tuple": parts} if isinstance(model, tuple) else parts
    return model


def _from_record(model: Any) -> Any:
    """Convert a recorded or original config to mmcv's own mapping type."""
    import mmcv

    if isinstance(model, Mapping):
        if model.keys() == {"tuple"}:
            return tuple(_from_record(part) for part in model["tuple"])
        return mmcv.ConfigDict({key: _from_record(value) for key, value in model.items()})
    if isinstance(model, list | tuple):
        return type(model)(_from_record(part) for part in model)
    return model


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
    """Reject networks that need a GPU operator if the installed mmcv-full has none."""
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
