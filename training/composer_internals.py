"""All of Composer's private names that this project uses.

Composer may change private names in any release. All other modules use only documented names.
"""

from __future__ import annotations

from typing import cast

from composer import Trainer
from composer.algorithms.ema.ema import EMAParameters as EMAParameters
from composer.core import DataSpec, State
from torch import nn

# Trainer methods whose run time benchmarks.stopwatch measures.
TRAINER_METHODS = ("_train_microbatches", "_eval_train_metrics", "_compute_and_log_metrics")


def train_data_spec(trainer: Trainer) -> DataSpec:
    """Return the DataSpec of a trainer's training data."""
    return cast(DataSpec, trainer._train_data_spec)


def without_ddp(state: State) -> nn.Module:
    """Return the model without its DistributedDataParallel wrapper."""
    return cast(nn.Module, state.model.module) if state.is_model_ddp else state.model
