"""Counted randomness: every draw derives from the seed and counters, never from hidden state.

A sample's augmentation depends on (seed, epoch, index) alone, a step's dropout on (seed, step, rank) alone. A run
therefore continues exactly after a kill, whatever the number of workers, with no random state to save.
"""

from __future__ import annotations

import numpy as np


def rng(seed: int, *counters: int) -> np.random.Generator:
    """A generator that is a pure function of ``seed`` and ``counters`` (all non-negative integers)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *counters))))


def seed_torch(seed: int, *counters: int) -> None:
    """Seed torch's generators (all devices) from ``seed`` and ``counters``."""
    import torch  # not at the top: the workers of propose draw numbers and need no torch

    state = np.random.SeedSequence((seed, *counters)).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
