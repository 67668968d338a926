"""Functions that find and check the checkpoint from which a run starts."""

from __future__ import annotations

import errno
import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composer.utils import get_file
from torch import nn

from checkpointing.saver import on_first_process, open_folder
from checkpointing.stores import LocalFolder, checkpoint_in, time_of
from checkpointing.weights import Weights
from errors import ClassError, ConfigError, WeightsError, one_line
from files import is_remote
from networks.base import inner
from networks.deeplab import infer_architecture
from segmentation.classes import ClassInfo, first_difference, match_classes

if TYPE_CHECKING:
    from checkpointing.remote_store import RemoteFolder

log = logging.getLogger(__name__)

# Config keys that only DeepLabV3 uses and other networks ignore.
DEEPLABV3_KEYS = ("model.backbone_arch", "model.use_plus")
_MISSING = object()


@dataclass(frozen=True)
class Start:
    """A checkpoint from which a run starts.

    Attributes:
        where: Path or URI of the checkpoint.
        weights: Weights in the checkpoint.
        state_path: Local path of the checkpoint, or None if the run does not need its training
            state.
        is_resume: Whether this run saved the checkpoint itself, in its own folder.
    """

    where: str
    weights: Weights
    state_path: str | None
    is_resume: bool

    @property
    def _remedy(self) -> str:
        """The advice for a user whose config differs from the checkpoint's record."""
        if self.state_path is None:
            return "restore the old value"
        if self.is_resume:
            return (
                "restore the old value, or start a new run: use a new save_folder, with "
                f"load_path={self.where} load_weights_only=true autoresume=false"
            )
        return (
            "restore the old value, or start a new run from its weights with load_weights_only=true"
        )

    def server_runs(self, run_name: str | None) -> Mapping[str, str]:
        """Return the IDs of the W&B and MLflow runs that a resumed run of this name continues."""
        is_same_run = self.state_path is not None and self.weights.run_name == run_name
        return self.weights.server_runs if is_same_run else {}

    def check_config(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], classes: Sequence[ClassInfo]
    ) -> None:
        """Check that the checkpoint's recorded config matches the config of the run that loads it.

        Args:
            values: Config values that must match, by their dotted names. For an evaluation, only
                the `model` keys must match.
            defaults: Default values for keys that are missing from old records.
            classes: Classes of the config.

        Raises:
            ConfigError: A value differs. The message names the key and both values.
        """
        for name, theirs in self._recorded(defaults).items():
            if name not in values or name in ("data", "class_names", "model.arguments"):
                # Skip the keys for classes and network arguments, because they are compared
                # separately.
                continue
            if json.loads(json.dumps(values[name])) != theirs:
                raise self._difference(name, values[name], theirs)
        if self.state_path is None:
            return
        where, theirs = "class_names or data", self.weights.classes or ()
        try:
            order = match_classes(classes, theirs, where, self.where)
        except ClassError as error:
            raise ConfigError(f"{error}; {self._remedy}") from None
        if order is not None:
            line = first_difference(classes, theirs, where, self.where)
            raise ConfigError(f"{line}; {self._remedy}")

    def _difference(self, name: str, ours: Any, theirs: Any) -> ConfigError:
        return ConfigError(
            f"{name}: the config sets {_shown(ours)}, but {self.where} was trained with "
            f"{_shown(theirs)}; {self._remedy}"
        )

    def _recorded(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checkpoint's values of the keys in `defaults`, from its config and tensors."""
        recorded: dict[str, Any] = {}
        config = self.weights.config
        if config is not None:
            for name, default in defaults.items():
                found: Any = config
                for part in name.split("."):
                    found = found.get(part, _MISSING) if isinstance(found, Mapping) else _MISSING
                recorded[name] = json.loads(json.dumps(default)) if found is _MISSING else found
            recorded["model.name"], _ = self.weights.network
            recorded["model.num_classes"] = self.weights.num_classes
            # A run that resumes its own checkpoint must keep its name, but a new run may have a
            # different one.
            if not self.is_resume:
                del recorded["run_name"]
        if config is None or recorded["model.name"] == "deeplabv3":
            # Ignore errors here. If the checkpoint contains a different network, `check_network`
            # reports this later.
            with suppress(WeightsError):
                architecture = infer_architecture(self.weights.state, self.where)
                recorded |= {f"model.{name}": value for name, value in architecture.items()}
        else:
            recorded = {k: v for k, v in recorded.items() if k not in DEEPLABV3_KEYS}
        return recorded

    def check_network(self, network: nn.Module) -> None:
        """Check that the checkpoint's tensors and arguments match those of a network.

        Raises:
            ConfigError: The name or shape of a tensor differs, or the value of an argument differs.
        """
        own = {name: tensor.shape for name, tensor in inner(network).state_dict().items()}
        found = {name: tensor.shape for name, tensor in self.weights.state.items()}
        wrong = [name for name in own | found if own.get(name) != found.get(name)]
        if wrong:
            raise ConfigError(
                f"model.arguments: {len(wrong)} tensors of this network do not match {self.where} "
                f"(the first is {wrong[0]}); {self._remedy}"
            )
        ours = json.loads(json.dumps(getattr(network, "arguments", None) or {}, default=str))
        theirs = dict(self.weights.network[1])
        for name in ours | theirs:
            if not _is_same_argument(ours.get(name), theirs.get(name)):
                key = f"model.arguments.{name}"
                raise self._difference(key, ours.get(name), theirs.get(name))


def _is_same_argument(ours: Any, theirs: Any) -> bool:
    """Return whether an argument of the network is the same in the config and in the checkpoint.

    For a network from a library, the record contains the network's complete config. Different
    versions of the library have different keys, so only common keys are compared.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        both = [key for key in ours.keys() & theirs.keys() if not key.endswith("_version")]
        return all(_is_same_argument(ours[key], theirs[key]) for key in both)
    return ours == theirs


def _shown(value: Any) -> str:
    """Return a value in YAML notation."""
    if isinstance(value, bool):
        return str(value).lower()
    return "(empty)" if value is None else str(value)


def plainly_named(path: str, scratch: str) -> str:
    """Create a link to a file at a path without braces or colons, and return that path.

    Without escaping, Composer would replace text in braces and treat text before a colon as the
    scheme of an object store.
    """
    link = os.path.join(scratch, ".start")
    os.symlink(os.path.abspath(path), link)
    return link


def newest_checkpoint(folder: str, scratch: str) -> tuple[str, str] | None:
    """Find the newest complete checkpoint in a folder; all ranks must call this together.

    Args:
        folder: Folder or object-store URI.
        scratch: Local folder for downloads.

    Returns:
        The checkpoint's path or URI and its local path, or None if there is no complete checkpoint.

    Raises:
        ConfigError: The folder cannot be read.
    """
    target = open_folder(folder)

    def newest() -> str | None:
        try:
            return _newest_whole(target, scratch)
        # File systems and object stores raise different exceptions, so catch all.
        except Exception as error:
            raise ConfigError(
                f"save_folder: cannot read {target.path}: {one_line(error)}; check that you can "
                "access it"
            ) from None

    name = on_first_process(newest)
    if name is None:
        return None
    path = on_first_process(lambda: target.fetch(name, scratch), of_each_node=True)
    return f"{target.path}/{name}", path


def _newest_whole(target: LocalFolder | RemoteFolder, scratch: str) -> str | None:
    names, latest = target.names(), target.latest()
    if latest:  # Skip checkpoints newer than `latest`, because they belong to other runs.
        names = [latest, *(name for name in names if time_of(name) < time_of(latest))]
    for name in names:
        try:
            damage = _damage(target.fetch(name, scratch))
        except FileNotFoundError:
            damage = "it is missing"
        if damage is None:
            return name
        log.warning("cannot resume from %s/%s: %s", target.path, name, damage)
    if names:
        log.warning("%s contains no complete checkpoint, so the run starts at batch 0", target.path)
    return None


def _damage(path: str) -> str | None:
    """Verify the checksums in a checkpoint file; return a description of any damage, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    # For a damaged file, zipfile raises many types of errors, even an OSError if a seek position is
    # invalid.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        return one_line(error)
    return f"its part {bad} is damaged" if bad else None


def local_copy(path: str, scratch: str) -> str:
    """Download a checkpoint if it is remote; all ranks must call this together.

    Args:
        path: Path or URI of a file, or path of a run's folder.
        scratch: Local folder for downloads.

    Returns:
        The local path of the checkpoint.

    Raises:
        ConfigError: The file cannot be read.
        WeightsError: The folder contains no checkpoint.
    """
    if not is_remote(path):
        return checkpoint_in(path)
    copy = os.path.join(scratch, os.path.basename(path))

    def download() -> str:
        try:
            get_file(path, copy, overwrite=True, progress_bar=False)
        # An object store's client may raise any exception.
        except Exception as error:
            raise ConfigError(
                f"load_path: cannot read {path}: {one_line(error)}; check that you can access it"
            ) from None
        return copy

    return on_first_process(download, of_each_node=True)
