"""Semantic-segmentation networks from Hugging Face transformers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

from errors import ModelError
from networks.base import Network
from networks.libraries import LOADING, Request, convert_mappings, fetch, require


def build(request: Request) -> Network:
    """Build a semantic-segmentation network from transformers, given a hub name or a folder.

    Args:
        request: Hub name or folder path, and arguments of the network.

    Raises:
        ModelError: The network cannot be built.
    """
    whole, name = request.name, request.name_in_library
    transformers = require("transformers", whole)
    auto = transformers.AutoModelForSemanticSegmentation
    safe = dict(trust_remote_code=False)
    normalisation: dict[str, Any] = {}
    recorded = request.recorded_config()
    if recorded is not None:
        said = convert_mappings(recorded, _without_pretrained)
        _check_type(whole, said.get("model_type"))
        config = transformers.AutoConfig.for_model(said.pop("model_type", ""), **said)
        config.num_labels = request.num_classes
    else:
        options = {**request.library_arguments, "num_labels": request.num_classes, **safe}
        stated, _ = fetch(whole, transformers.PretrainedConfig.get_config_dict, name)
        _check_type(whole, stated.get("model_type"))
        config = fetch(whole, transformers.AutoConfig.from_pretrained, name, **options)
        normalisation = _normalisation(transformers, name)
    if recorded is not None or not request.pretrained:
        network = auto.from_config(config, **safe)
    else:
        more = dict(config=config, ignore_mismatched_sizes=True, **safe)
        network = fetch(whole, auto.from_pretrained, name, **more)
    record = json.loads(config.to_json_string(use_diff=False))
    for key in ("id2label", "label2id", "transformers_version"):
        record.pop(key, None)
    record = {"config": convert_mappings(record, _unloading), **request.wrapper_arguments}
    result = Network(network, whole, record, size_divisor=32, **normalisation)
    result.rename = _renaming(network)
    return result


def _check_type(whole: str, kind: str | None) -> None:
    """Reject network types that transformers does not support for semantic segmentation.

    Mask2Former and similar networks predict a set of masks, for which this project has no loss.

    Raises:
        ModelError: The network's type is unknown or does not predict a class for each pixel.
    """
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    known = module.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    if kind not in known:
        raise ModelError(
            f"model.name={whole}: networks of type {kind} do not predict a class for each pixel; "
            f"use one of {', '.join(sorted(known))}"
        )


def _renaming(network: Any) -> Callable[[str], str]:
    """Return a function that converts tensor names of transformers 4 to those of version 5."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    rules = mapping.get_model_conversion_mapping(network)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    own = network.state_dict().keys()

    def rename(name: str) -> str:
        return name if name in own else loading.rename_source_key(name, renamings, [])[0]

    return rename


def _unloading(part: dict[str, Any]) -> dict[str, Any]:
    """Remove the keys that would make transformers load files."""
    return {key: value for key, value in part.items() if not LOADING.fullmatch(key)}


def _without_pretrained(part: dict[str, Any]) -> dict[str, Any]:
    """Turn off the pretrained backbone that part of a config might otherwise load by default."""
    return {**part, "use_pretrained_backbone": False} if "model_type" in part else part


def _normalisation(transformers: Any, name: str) -> dict[str, Any]:
    """Return the mean and standard deviation that a network's image processor defines, if any."""
    try:
        said, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        said = {}
    factor = 1 / said.get("rescale_factor", 1 / 255)
    if not said.get("do_normalize", True):
        return {"mean": [0.0] * 3, "std": [factor] * 3}
    if "image_mean" not in said or "image_std" not in said:
        return {}
    return {key: [factor * value for value in said[f"image_{key}"]] for key in ("mean", "std")}
