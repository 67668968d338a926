"""The seeding of each micro-batch, on which dropout and MixUp draw.

A step's random numbers follow from the seed and the step's number. A run that was resumed from a
checkpoint therefore goes on bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist


class SeedMicrobatch(Algorithm):
    """Seeds torch's and numpy's global generators before the forward pass of each micro-batch.

    Dropout and MixUp then depend on nothing but the seed, the batch's number, the pass over it (SAM
    makes two) and the micro-batch's place in the global batch: not on what was drawn before, on a
    resume, nor on how many ranks share the micro-batches.

    Put it first in the list of algorithms: that is the order they run in before a forward pass.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.samples = 0  # of this rank in the batch
        self.passes = 0  # over the batch so far
        self.microbatch = 0  # index in the global batch
        self.microbatch_size: float | None = None

    def match(self, event: Event, state: State) -> bool:
        """Run when a batch, a pass over it and the forward pass of a micro-batch begin."""
        return event in (Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Count, and seeds before a forward pass."""
        if event == Event.BATCH_START:
            self.samples = len(state.batch[0])
            self.passes = 0
        elif event == Event.BEFORE_TRAIN_BATCH:
            size = state.device_train_microbatch_size
            assert size is not None
            if size != self.microbatch_size:  # `auto` ran out of memory and starts the batch anew
                self.passes = 0
            self.microbatch_size = size
            self.passes += 1
            self.microbatch = dist.get_global_rank() * -(-self.samples // int(size))
        else:
            key = (self.seed, state.timestamp.batch.value, self.passes, self.microbatch)
            words = np.random.SeedSequence(key).generate_state(4)
            torch.manual_seed(int(words[0]) << 32 | int(words[1]))  # GPUs too, without waiting
            np.random.seed(words[2:])
            self.microbatch += 1
