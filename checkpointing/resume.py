"""Which checkpoint a run begins from: the newest whole one of a folder, or a file that is named."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.utils import get_file
from torch import nn

from checkpointing.saver import on_first_process
from checkpointing.stores import LocalFolder, RemoteFolder, open_folder, time_of
from checkpointing.weights import Weights, check_checkpoint, infer_architecture, load_weights
from errors import ConfigError, one_line
from segmentation.network import inner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run begins from.

    Attributes:
        where: The checkpoint's path or URI.
        weights: Its weights.
        state_path: A local path of it where the state of training is wanted too, else None.
        is_resume: Whether it is the run's own, found in its folder.
    """

    where: str
    weights: Weights
    state_path: str | None
    is_resume: bool

    def check_fits(self, model: Mapping[str, Any]) -> None:
        """Compare its architecture with the keys of `model`.

        Raises:
            ConfigError: They differ.
        """
        anew = "; load_weights_only=true begins anew with what fits" if self.state_path else ""
        if self.weights.config is None and model["name"] != "deeplabv3":
            return  # the file does not say; its tensors are compared instead
        name, _ = self.weights.network
        says = {"name": name, "num_classes": self.weights.num_classes}
        if name == model["name"] == "deeplabv3":
            says = infer_architecture(self.weights.state, self.where)
        for name, value in says.items():
            if value != model[name]:
                raise ConfigError(
                    f"load_path: {self.where} has {name}={value}, not {model[name]}{anew}"
                )

    def check_optimizer(self, optimizer: Mapping[str, Any]) -> None:
        """Compare which optimizer it has the state of, in which groups, with the config's.

        Raises:
            ConfigError: They differ.
        """
        recorded = (self.weights.config or {}).get("optimizer") or {}
        for name, default in {"name": "sgdw", "head_lr_scale": 1.0, "no_decay": []}.items():
            theirs, ours = recorded.get(name, default), optimizer[name]
            if theirs != ours:
                raise ConfigError(
                    f"load_path: {self.where} was trained with optimizer.{name}={theirs}, not "
                    f"{ours}; load_weights_only=true begins anew with its weights"
                )

    def check_tensors(self, network: nn.Module) -> None:
        """Compare the names and shapes of its tensors with those of a network.

        Raises:
            ConfigError: They differ.
        """
        own = {name: tensor.shape for name, tensor in inner(network).state_dict().items()}
        found = {name: tensor.shape for name, tensor in self.weights.state.items()}
        wrong = [name for name in own | found if own.get(name) != found.get(name)]
        if wrong:
            raise ConfigError(
                f"load_path: {self.where} is of a network with other model.arguments: "
                f"{len(wrong)} tensors differ, first {wrong[0]}; "
                "load_weights_only=true begins anew with what fits"
            )


def find_start(
    folder: str | None, load_path: str | None, weights_only: bool, scratch: str
) -> Start | None:
    """Find what to begin from: the newest checkpoint of a folder, else `load_path`.

    Args:
        folder: Folder or object-store URI to go on from, or None.
        load_path: Path or URI of a checkpoint or of weights, or None.
        weights_only: Take only the weights of `load_path`.
        scratch: Local folder to download to.

    Raises:
        ConfigError: A folder or file cannot be read.
        WeightsError: The file is damaged, or holds what is no part of a checkpoint, or weights
            where a checkpoint is wanted.
    """
    found = newest_checkpoint(folder, scratch) if folder else None
    if found:
        where, path = found
        return Start(where, load_weights(path), _plainly_named(path, scratch), True)
    if load_path:
        path = local_copy(load_path, scratch)
        weights = load_weights(path)
        if weights_only:
            return Start(load_path, weights, None, False)
        check_checkpoint(path)
        return Start(load_path, weights, _plainly_named(path, scratch), False)
    return None


def _plainly_named(path: str, scratch: str) -> str:
    """Return another path of a file, in which Composer finds no placeholder and no store.

    It takes braces for the one, and what is before a colon for the other.
    """
    link = os.path.join(scratch, ".start")
    os.symlink(os.path.abspath(path), link)
    return link


def newest_checkpoint(folder: str, scratch: str) -> tuple[str, str] | None:
    """Find the newest whole checkpoint in a folder, for all processes together.

    Args:
        folder: Folder or object-store URI.
        scratch: Local folder to download to.

    Returns:
        Where it is and a local path of it, or None if there is none.

    Raises:
        ConfigError: The folder cannot be read.
    """
    target = open_folder(folder)

    def newest() -> str | None:
        try:
            return _newest_whole(target, scratch)
        except Exception as error:  # what a file system or the client of an object store raises
            raise ConfigError(
                f"save_folder: cannot read {target.path}: {one_line(error)}"
            ) from None

    name = on_first_process(newest)
    if name is None:
        return None
    path = on_first_process(lambda: target.fetch(name, scratch), of_each_node=True)
    return f"{target.path}/{name}", path


def _newest_whole(target: LocalFolder | RemoteFolder, scratch: str) -> str | None:
    names, latest = target.names(), target.latest()
    if latest:  # later ones are of another run, or `latest` would name them
        names = [latest, *(name for name in names if time_of(name) < time_of(latest))]
    for name in names:
        try:
            damage = _damage(target.fetch(name, scratch))
        except FileNotFoundError:
            damage = "it is missing"
        if damage is None:
            return name
        log.warning("cannot go on from %s/%s: %s", target.path, name, damage)
    if names:
        log.warning("%s holds no whole checkpoint; the run begins anew", target.path)
    return None


def _damage(path: str) -> str | None:
    """Return what is wrong with a checkpoint's file by its checksums, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile has many, also for what it takes for a place in the file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        return one_line(error)
    return f"{bad} in it is damaged" if bad else None


def local_copy(path: str, scratch: str) -> str:
    """Fetch a checkpoint that may be remote; return its local path. For all processes together.

    Raises:
        ConfigError: It cannot be read.
    """
    if "://" not in path:
        return path
    copy = os.path.join(scratch, os.path.basename(path))

    def download() -> str:
        try:
            get_file(path, copy, overwrite=True, progress_bar=False)
        except Exception as error:  # what the client of an object store raises
            raise ConfigError(f"load_path: cannot read {path}: {one_line(error)}") from None
        return copy

    return on_first_process(download, of_each_node=True)
