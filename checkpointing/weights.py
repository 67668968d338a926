"""Functions that read and write weights without running code from the file.

    weights = load_weights("latest-rank0.pt")    # a checkpoint, a state dict, or safetensors
    network = build_network(weights)             # the network with these weights
    save_weights("weights.safetensors", weights.state, weights.config, weights.classes)

A `.pt` file is a pickle, so loading it could run code. To prevent this, the module always loads it
with torch's `weights_only=True`. The module accepts tensors, containers and the few types in
`_composer_types`, and rejects everything else.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.torch_version import TorchVersion

from errors import WeightsError, one_line
from files import write_file
from segmentation.classes import ClassInfo, classes_from_json, classes_to_json

# Prefix of the tensor names in DeepLabV3's last layer, which outputs one channel per class.
SCORES = "classifier.conv_seg."
# Prefixes that DistributedDataParallel, torch.compile and the ComposerModel add to tensor names.
PREFIX = re.compile(r"^(?:(?:module|_orig_mod|model)\.)*(?=(?:backbone|classifier)\.)")
# Prefixes that wrappers add to the tensor names of other networks, such as `network.` from
# `networks.base.Network`.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+(?:network\.)?")
# Harmless classes that training scripts often pickle with their weights, such as
# argparse.Namespace.
OPTIONS = (
    "argparse.Namespace",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath")
    ),
)


@dataclass(frozen=True)
class Weights:
    """The weights of one network, with their metadata.

    Attributes:
        state: Tensors on the CPU by their names in the network, such as `backbone.*` and
            `classifier.*`.
        which: `"ema"` for the moving average of the training weights, otherwise `"training"`.
        config: Config of the run that trained the weights, if the file contains it.
        classes: Names and colours of the classes, if the file contains them.
        run_name: Name of the run if the file is a Composer checkpoint, otherwise None.
        server_runs: IDs of the W&B and MLflow runs that the run logged to, by logger name.
        beside: Content of the `config.json` in the weights file's folder; empty if there is none.
    """

    state: dict[str, Tensor]
    which: str = "training"
    config: Mapping[str, Any] | None = None
    classes: list[ClassInfo] | None = None
    run_name: str | None = None
    server_runs: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def eval_size(self) -> int | None:
        """The size of the run's validation images in pixels, or None if unknown."""
        return ((self.config or {}).get("eval_dataset") or {}).get("final_size")

    @property
    def network(self) -> tuple[str, Mapping[str, Any]]:
        """The network's name and arguments, as in the config's `model` section."""
        model = (self.config or {}).get("model") or {}
        return model.get("name") or "deeplabv3", model.get("arguments") or {}

    @property
    def num_classes(self) -> int:
        """The number of classes that the network predicts.

        Raises:
            WeightsError: The file does not contain this number.
        """
        if f"{SCORES}weight" in self.state:
            return self.state[f"{SCORES}weight"].shape[0]
        count = ((self.config or {}).get("model") or {}).get("num_classes")
        if count is None and self.classes is None:
            raise WeightsError(
                "the weights file does not contain the name of its network; give it with --network"
            )
        return count or len(self.classes or ())


class _Inert:
    """A placeholder for pickled objects that are not needed."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def load_weights(path: str | os.PathLike[str], weights: str = "ema") -> Weights:
    """Read the weights of a network from a checkpoint, a state dict or a safetensors file.

    Tensors from another project's file keep their names; `checkpointing.partial_load` can match
    these to the names in a network. A checkpoint from a run with EMA contains two sets of weights.
    All other files contain one set, which is returned for both values of `weights`.

    Args:
        path: Path of the file or of a run's folder. In a run's folder, the best checkpoint is used
            if there is one, and otherwise the newest.
        weights: Set of weights to return, `"ema"` or `"training"`.

    Raises:
        WeightsError: The file cannot be read, contains objects that could run code, or contains no
            weights.
    """
    from checkpointing.stores import checkpoint_in

    path = _existing(checkpoint_in(path))
    if path.suffix == ".safetensors":
        found = _read_safetensors(path)
    else:
        content = _load_pickle(path, inert=True)
        try:
            found = _from_checkpoint(content, weights)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: the weights cannot be read: {one_line(error)}") from error
    if not found.state:
        raise WeightsError(
            f"{path}: the file contains no weights; choose a file that maps names to tensors, "
            "either directly or in one of its entries"
        )
    if found.config is not None:
        return found
    from checkpointing.foreign_weights import read_config_beside

    beside, classes = read_config_beside(path)
    return replace(found, beside=beside, classes=found.classes or classes)


def _existing(path: str | os.PathLike[str]) -> Path:
    if not os.path.isfile(path):
        raise WeightsError(f"{os.fspath(path)}: no such file")
    return Path(path)


def _from_checkpoint(content: Any, which: str) -> Weights:
    """Return the weights from the unpickled content of a file."""
    if not isinstance(content, Mapping):
        return Weights({})
    trainer = content.get("state", content)
    is_composers = isinstance(trainer, Mapping) and isinstance(trainer.get("model"), Mapping)
    if not is_composers or (trainer is content and "algorithms" not in trainer):
        from checkpointing.foreign_weights import classes_of_mmseg, select_network

        parts = {"": content} | {str(key): part for key, part in content.items()}
        tensors = {key: _strip_prefixes(part) for key, part in parts.items()}
        return Weights(*select_network(tensors, which), classes=classes_of_mmseg(content))
    state, found = _strip_prefixes(trainer["model"]), "training"
    algorithms = trainer.get("algorithms", ())
    # Old versions of Composer saved the algorithms as a mapping instead of a list of pairs.
    if isinstance(algorithms, Mapping):
        algorithms = algorithms.items()
    for _, algorithm in algorithms:
        if isinstance(algorithm, Mapping) and algorithm.get("ema_started"):
            # Before a save, Composer's EMA usually swaps the averaged weights into the model and
            # keeps the training weights in its own state. `ema_weights_active` tells whether this
            # happened for this file.
            kept = algorithm["ema_model"]
            kept = {**kept["named_parameters_dict"], **kept["named_buffers_dict"]}
            found = "ema" if algorithm["ema_weights_active"] else "training"
            if which != found:
                state, found = {**state, **_strip_prefixes(kept)}, which
    run = trainer.get("callbacks", {}).get("RunRecord", {})
    name = trainer.get("run_name")
    return replace(
        from_metadata({**run, "which": found}, state),
        run_name=name if isinstance(name, str) else None,
        server_runs={str(key): str(value) for key, value in run.get("server_runs", {}).items()},
    )


def _strip_prefixes(state: Any) -> dict[str, Tensor]:
    """Return only the tensors, with wrapper prefixes removed from their names."""
    if not isinstance(state, Mapping):
        return {}
    plain = {
        str(key).replace("._orig_mod.", "."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    ours = {PREFIX.sub("", key): value for key, value in plain.items() if PREFIX.match(key)}
    if f"{SCORES}weight" in ours:
        return ours
    return {WRAPPERS.sub("", key): value for key, value in plain.items()}


def save_weights(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    classes: Sequence[ClassInfo] | None = None,
    which: str = "training",
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a network's weights to a safetensors file, with the config and the class names.

    The file appears only once it is complete.

    Args:
        path: Path of the file.
        state_dict: Tensors by name, from which wrapper prefixes are removed.
        config: Config of the run as JSON types, or None.
        classes: Names and colours of the classes.
        which: Type of the weights, `"ema"` or `"training"`.
        more: Additional metadata entries by name.
    """
    metadata = {"format": "pt", **to_metadata(config, classes, which), **(more or {})}
    tensors = {
        key: value.detach().cpu().contiguous() for key, value in _strip_prefixes(state_dict).items()
    }
    # Do not use safetensors' save_file, because it makes the file readable only by its owner.
    write_file(path, save(tensors, metadata))


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: cannot be read as safetensors; the file is damaged or has a different format "
            f"({error})"
        ) from error
    return from_metadata(metadata, _strip_prefixes(state))


def to_metadata(
    config: Mapping[str, Any] | None, classes: Sequence[ClassInfo] | None, which: str
) -> dict[str, str]:
    """Return the metadata for a weights file or an exported file.

    `from_metadata` reads this metadata. For other programs, the entry `size` gives the length of
    the validation images' shorter side, in pixels.
    """
    metadata = {"which": which}
    if config is not None:
        metadata["config"] = json.dumps(config)
    if classes is not None:
        metadata["classes"] = classes_to_json(classes)
    size = Weights({}, config=config).eval_size
    if size is not None:
        metadata["size"] = str(size)
    return metadata


def from_metadata(metadata: Mapping[str, str], state: dict[str, Tensor]) -> Weights:
    """Combine tensors with the metadata that `to_metadata` created."""
    config = _config_from_json(metadata["config"]) if "config" in metadata else None
    classes = classes_from_json(metadata["classes"]) if "classes" in metadata else None
    return Weights(state, metadata.get("which", "training"), config, classes)


def _config_from_json(text: str) -> Mapping[str, Any]:
    """Parse a run's config; raise WeightsError if the text comes from a different project."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"the config in the file's metadata is malformed: {error}") from error
    sections = ("model", "eval_dataset")
    if not isinstance(config, Mapping) or not all(
        isinstance(config.get(name) or {}, Mapping) for name in sections
    ):
        raise WeightsError(
            "the config in the file's metadata was not written by this project; choose a different "
            "file"
        )
    return config


def check_checkpoint(path: str | os.PathLike[str], specs: Any = None) -> bool:
    """Reject a training checkpoint with objects that do not belong to Composer's training state.

    Call this before Composer loads the checkpoint, because Composer unpickles it without a check.
    Composer requires the second argument and the return value True (see
    `training.start.guarded_loading`).

    Raises:
        WeightsError: The file contains an unexpected type of object, or it is not a checkpoint.
    """
    path = _existing(path)
    content = None if path.suffix == ".safetensors" else _load_pickle(path, inert=False)
    if not isinstance(content, Mapping) or not isinstance(content.get("state"), Mapping):
        raise WeightsError(
            f"{path}: the file is not a training checkpoint; to train from its weights, set "
            "load_weights_only=true"
        )
    return True


def _composer_types() -> list[Any]:
    """Return the types in Composer 0.32's state that are neither tensors nor plain Python types.

    For example, NumPy's random state is an array, and the elapsed time is a timedelta. Creating
    these objects runs no code from the file. NumPy 1 and 2 have different names for the function
    that creates an array.
    """
    make_array = np.empty(0).__reduce__()[0]
    make_scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFDGSUmM"}
    return [
        np.ndarray,
        np.dtype,
        *kinds,
        (make_array, "numpy._core.multiarray._reconstruct"),
        (make_array, "numpy.core.multiarray._reconstruct"),
        (make_scalar, "numpy._core.multiarray.scalar"),
        (make_scalar, "numpy.core.multiarray.scalar"),
        datetime.timedelta,
        TorchVersion,
    ]


def _load_pickle(path: Path, inert: bool) -> Any:
    """Unpickle a torch file without running code from it.

    Args:
        path: Path of the file.
        inert: Whether to replace options, paths, and Composer and torchmetrics objects with
            placeholders. Checkpoints from MosaicML's code need placeholders, because Composer
            before 0.13 pickled its metrics into checkpoints.
    """
    allowed = _composer_types()
    if inert:
        allowed += [(_Inert, name) for name in OPTIONS]
    try:
        if inert and zipfile.is_zipfile(path):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed += [(_Inert, n) for n in names if n.startswith(("composer.", "torchmetrics."))]
        with torch.serialization.safe_globals(allowed):
            # Map the file into memory, so that unused parts such as the optimizer state are never
            # read.
            return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types of errors for a damaged file.
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            raise WeightsError(
                f"{path}: rejected, because it contains {unsafe[1]}, which could run code and is "
                "not part of a training state; save only the weights"
            ) from error
        raise WeightsError(
            f"{path}: cannot be read as a PyTorch checkpoint; the file is damaged or has a "
            f"different format ({type(error).__name__})"
        ) from error
