"""Networks by name: of torchvision, segmentation_models.pytorch, transformers, or of one's own.

Each builder takes what follows the colon in `model.name`, and gives a `Network`. A file that names
a network is not its user: `from_file` tells a builder to load nothing by name or address, and to
run no code but the library's own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from errors import ModelError, one_line
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD, Network

OF_NETWORK = ("mean", "std", "size_divisor", "channels_last")  # arguments that are Network's
# What makes a library load a file or an address.
LOADING = re.compile(
    r"pretrained.*|use_pretrained.*|.*_weights|weights.*|checkpoint.*|init_cfg|auto_map|_name_or_path"
)
PLAIN = re.compile(r"[\w.+-]*")  # a string that is neither a path nor an address


def foreign_arguments(
    network: str, beside: Mapping[str, Any], state: Iterable[str], where: str
) -> tuple[dict[str, Any], str]:
    """Return what a library's own file of weights says of its network.

    Args:
        network: The network, as the user names it.
        beside: The `config.json` beside the file, as `save_pretrained` writes it; or empty.
        state: Names of the file's tensors.
        where: The file.

    Returns:
        Arguments of the network, and its name: of transformers, the folder that has the config.
    """
    kind = network.partition(":")[0]
    if kind == "hf" and "model_type" in beside:
        folder = where if os.path.isdir(where) else os.path.dirname(os.path.abspath(where))
        return {}, f"hf:{folder}"
    if kind == "smp" and "encoder_name" in beside:
        own = {k: v for k, v in beside.items() if not (k == "classes" or k.startswith("_"))}
        return plain(own, where), network
    if kind == "torchvision" and any(name.startswith("aux_classifier.") for name in state):
        return {"aux_loss": True}, network
    return {}, network


def require(package: str, name: str, group: str | None = None) -> Any:
    """Import a package that only some networks need.

    Raises:
        ModelError: It is not installed; says how to.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"model.name={name} needs {package}; make install WITH={group or package}")
    return importlib.import_module(package)


def unknown(kind: str, name: str, known: Iterable[str]) -> ModelError:
    """Return the error about a name that a library does not have."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
    return ModelError(f"model.name={kind}:{name}: no such network; there is {', '.join(near)}")


def call(name: str, builder: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Call a library's builder; whatever it raises becomes one line."""
    try:
        return builder(*args, **arguments)
    except ModelError:
        raise
    except Exception as error:  # a library's own, of any kind
        raise ModelError(
            f"model.name={name} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error


def plain(value: Any, where: str, key: str = "") -> Any:
    """Return what a file says of a network, without anything that would load more.

    Keys that load weights are left out; their values come with the file.

    Raises:
        ModelError: A string could be a path or an address.
    """
    if isinstance(value, Mapping):
        left = {k: v for k, v in value.items() if not LOADING.fullmatch(str(k))}
        return {k: plain(v, where, f"{key}.{k}".lstrip(".")) for k, v in left.items()}
    if isinstance(value, list | tuple):
        return [plain(part, where, key) for part in value]
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        raise ModelError(
            f"{where}: refused: {key} is {value!r}, which could be a path or an address"
        )
    return value


def without_own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are the library's."""
    return {name: value for name, value in arguments.items() if name not in OF_NETWORK}


def torchvision_network(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> Network:
    """Build a segmentation network of torchvision; `pretrained` names its backbone's weights."""
    from torchvision import models

    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise unknown("torchvision", name, known)
    options = {"weights_backbone": pretrained, **without_own(arguments)}
    if from_file:
        options |= {"weights": None, "weights_backbone": None}
    whole = f"torchvision:{name}"
    network = call(whole, models.get_model_builder(name), num_classes=num_classes, **options)
    return Network(network, whole, arguments)


def smp_network(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> Network:
    """Build a network of segmentation_models.pytorch, `Unet` for one."""
    whole = f"smp:{name}"
    smp = require("segmentation_models_pytorch", whole, "smp")
    known = [k for k in vars(smp) if _is_network(getattr(smp, k), smp)]
    if name not in known:
        raise unknown("smp", name, known)
    encoder = str(arguments.get("encoder_name", "resnet34"))
    weights = "imagenet" if pretrained else None
    options = {"encoder_weights": weights, **without_own(arguments)}
    if from_file:
        options["encoder_weights"] = None
    network = call(whole, getattr(smp, name), classes=num_classes, **options)
    mean, std = IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
    if options["encoder_weights"]:
        said = call(
            whole, smp.encoders.get_preprocessing_params, encoder, options["encoder_weights"]
        )
        factor = 255 / said["input_range"][1]
        mean, std = ([factor * value for value in said[key]] for key in ("mean", "std"))
    return Network(network, whole, arguments, mean, std, size_divisor=32)


def _is_network(value: Any, smp: Any) -> bool:
    return isinstance(value, type) and issubclass(value, smp.base.SegmentationModel)


def hf_network(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> Network:
    """Build a network for semantic segmentation of transformers, from a hub's name or a folder."""
    whole = f"hf:{name}"
    transformers = require("transformers", whole, "hf")
    auto = transformers.AutoModelForSemanticSegmentation
    kind = transformers.AutoConfig
    safe = dict(trust_remote_code=False)
    mean, std = IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
    if from_file and "config" not in arguments:
        raise ModelError(f"{whole}: the file does not hold the config itself")
    if "config" in arguments:  # as the lines below record it
        said = _without_pretrained(arguments["config"])
        config = call(whole, kind.for_model, said.pop("model_type", ""), **said)
        config.num_labels = num_classes
    else:
        options = {**without_own(arguments), "num_labels": num_classes, **safe}
        config = _fetch(whole, kind.from_pretrained, name, **options)
        mean, std = _hf_normalisation(transformers, name)
    if "config" in arguments or not pretrained:
        network = call(whole, auto.from_config, config, **safe)
    else:
        more = dict(config=config, ignore_mismatched_sizes=True, **safe)
        network = _fetch(whole, auto.from_pretrained, name, **more)
    record = json.loads(config.to_json_string(use_diff=False))
    for key in ("id2label", "label2id", "transformers_version"):
        record.pop(key, None)
    own = {key: arguments[key] for key in OF_NETWORK if key in arguments}
    record = {"config": _unloading(record), **own}
    result = Network(network, whole, record, mean, std, size_divisor=32)
    result.rename = _hf_renaming(network)
    return result


def _hf_renaming(network: Any) -> Callable[[str], str] | None:
    """Return transformers 5's translation of a tensor's name of transformers 4, if it has one."""
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # transformers 4
        return None
    rules = mapping.get_model_conversion_mapping(network)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    own = network.state_dict().keys()

    def rename(name: str) -> str:
        return name if name in own else loading.rename_source_key(name, renamings, [])[0]

    return rename


def _unloading(config: Any) -> Any:
    """Return a config without the keys that load anything."""
    if not isinstance(config, Mapping):
        return config
    return {k: _unloading(v) for k, v in config.items() if not LOADING.fullmatch(k)}


def _without_pretrained(config: Any) -> Any:
    """Return a config none of whose parts loads weights, as some do if told nothing."""
    if not isinstance(config, Mapping):
        return config
    parts = {key: _without_pretrained(value) for key, value in config.items()}
    return {**parts, "use_pretrained_backbone": False} if "model_type" in config else parts


def timm_features(
    name: str, arguments: Mapping[str, Any], pretrained: str | None
) -> tuple[Any, dict[str, Any]]:
    """Build a backbone of timm's that gives features of stride 4 and its last ones.

    Returns:
        The backbone, and the arguments with the `output_stride` that it has.
    """
    whole = f"timm:{name}"
    timm = require("timm", whole, "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {"features_only": True, **without_own(arguments)}

    def build(**more: Any) -> Any:
        return timm.create_model(name, **options, **more)

    with torch.device("meta"):  # which strides it has costs no weights there
        if "output_stride" not in options:
            try:
                build(output_stride=8)
                options["output_stride"] = 8
            except Exception:  # timm's ways of saying that a network has no such argument
                pass
        strides = call(whole, build).feature_info.reduction()
    if 4 not in strides:
        raise ModelError(f"model.name={whole} has no features of stride 4, but of {strides}")
    places = (strides.index(4), len(strides) - 1)
    options = {"pretrained": bool(pretrained), **options}
    backbone = _fetch(whole, build, out_indices=places)
    if "output_stride" in options:
        arguments = {**arguments, "output_stride": options["output_stride"]}
    return backbone, dict(arguments)


def timm_normalisation(name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation that a network of timm's wants, of values up to 255."""
    timm = importlib.import_module("timm")
    said = timm.get_pretrained_cfg(name)
    mean = said.mean if said else (0.485, 0.456, 0.406)
    std = said.std if said else (0.229, 0.224, 0.225)
    return [255 * value for value in mean], [255 * value for value in std]


def _fetch(name: str, load: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Call what may download; say where it cannot."""
    try:
        return load(*args, **arguments)
    except OSError as error:
        raise ModelError(
            f"model.name={name}: neither a folder nor to be had from the hub ({one_line(error)}); "
            "a folder that save_pretrained wrote works too"
        ) from error
    except Exception as error:
        raise ModelError(f"model.name={name} cannot be built: {one_line(error)}") from error


def _hf_normalisation(transformers: Any, name: str) -> tuple[Any, Any]:
    """Return mean and standard deviation that a network's image processor says."""
    try:
        said, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        said = {}
    if not said.get("do_normalize", True):
        return (0.0,) * 3, (1 / said.get("rescale_factor", 1 / 255),) * 3
    if "image_mean" not in said or "image_std" not in said:
        return IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
    factor = 1 / said.get("rescale_factor", 1 / 255)
    mean, std = ([factor * value for value in said[key]] for key in ("image_mean", "image_std"))
    return mean, std


def own_network(name: str, num_classes: int, arguments: Mapping[str, Any]) -> Network:
    """Call a function of the user's, `package.module:function`, for a network."""
    module, _, function = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"model.name={name}: {one_line(error)}; it is looked for as Python "
            "does, on PYTHONPATH for one"
        ) from error
    network = call(name, builder, num_classes=num_classes, **without_own(arguments))
    if not isinstance(network, nn.Module):
        raise ModelError(f"model.name={name} returns {type(network).__name__}, not an nn.Module")
    mean = getattr(network, "mean", IMAGENET_CHANNEL_MEAN)
    std = getattr(network, "std", IMAGENET_CHANNEL_STD)
    return Network(network, name, arguments, mean, std, getattr(network, "size_divisor", 1))
