"""An algorithm that seeds every micro-batch, so that dropout and MixUp are reproducible.

The random numbers of a step depend only on the seed and the step number. A resumed run therefore
draws exactly the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist


class SeedMicrobatch(Algorithm):
    """An algorithm that seeds the global torch and NumPy generators before each forward pass.

    Dropout and MixUp then depend only on the seed, the batch number, the number of the pass over
    the batch (SAM makes two), and the index of the micro-batch in the global batch. They do not
    depend on earlier random numbers, on a resume, or on the number of ranks that share the
    micro-batches.

    Put this algorithm first in the list, because algorithms run in list order before a forward
    pass.
    """

    def __init__(self, seed: int):
        self.seed = seed
        # Number of samples in this rank's share of the batch.
        self.samples = 0
        # Number of passes over the current batch; SAM makes two.
        self.passes = 0
        # Index of the next micro-batch in the batch, counted over all ranks.
        self.microbatch = 0
        self.microbatch_size: float | None = None

    def match(self, event: Event, state: State) -> bool:
        """Return whether a batch, a pass over a batch, or a micro-batch's forward pass begins."""
        return event in (Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Update the counters, and seed the generators before a forward pass."""
        if event == Event.BATCH_START:
            self.samples = len(state.batch[0])
            self.passes = 0
        elif event == Event.BEFORE_TRAIN_BATCH:
            size = state.device_train_microbatch_size
            assert size is not None
            # If the size has changed, Composer ran out of memory and has restarted the batch with
            # smaller micro-batches.
            if size != self.microbatch_size:
                self.passes = 0
            self.microbatch_size = size
            self.passes += 1
            self.microbatch = dist.get_global_rank() * -(-self.samples // int(size))
        else:
            key = (self.seed, state.timestamp.batch.value, self.passes, self.microbatch)
            words = np.random.SeedSequence(key).generate_state(4)
            # torch.manual_seed also seeds the GPUs, without waiting for them.
            torch.manual_seed(int(words[0]) << 32 | int(words[1]))
            np.random.seed(words[2:])
            self.microbatch += 1
