"""Random numbers as a function of where they are used, never of when or in which process."""

import hashlib

import numpy as np
import torch

__all__ = ["generator", "numpy_generator", "seed_of"]


def seed_of(*key: str | int) -> int:
    """A 63-bit seed for a key such as `(seed, "batches", round, client)`; equal keys give equal seeds everywhere."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded from the key."""
    return torch.Generator().manual_seed(seed_of(*key))


def numpy_generator(*key: str | int) -> np.random.Generator:
    """A NumPy generator seeded from the key."""
    return np.random.default_rng(seed_of(*key))
