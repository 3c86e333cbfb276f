"""Randomness of training as a function of (seed, step, name, place in the batch): nothing to store, nothing to restore."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """The random numbers of one optimizer step.

    Those of a sample depend on (seed, step, name, place) alone: the same on one process or many, in one batch or several, and
    after a resume.

    Args:
        places: (B,) of the samples in the step's batch over all processes.
    """

    def __init__(self, seed: int, step: int, places: Sequence[int]) -> None:
        self.seed, self.step, self.places = seed, step, places

    def normal(self, name: str, like: Tensor) -> Tensor:
        """(B, ...) standard normal float32 numbers on the device of ``like`` (B, ...)."""
        shape = tuple(like.shape[1:])
        made = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in self._streams(name)])
        return torch.from_numpy(made).to(like.device)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(B,) float64 in [low, high)."""
        return np.array([stream.uniform(low, high) for stream in self._streams(name)])

    def integers(self, name: str, low: int, high: int) -> np.ndarray:
        """(B,) whole numbers from low to high - 1."""
        return np.array([stream.integers(low, high) for stream in self._streams(name)])

    def gaussian(self, name: str, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """(B,) float64 normal numbers."""
        return np.array([stream.normal(mean, std) for stream in self._streams(name)])

    def _streams(self, name: str):
        key = hashed(self.seed, self.step, name)
        return (np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(place)])) for place in self.places)


def hashed(*words: object) -> int:
    """64 bits that depend on all words."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest(), "little")


def order(seed: int, num_examples: int, positions: Sequence[int]) -> list[int]:
    """Which examples stand at those positions of an endless row of epochs, each a permutation that depends on (seed, epoch)."""
    made: dict[int, np.ndarray] = {}
    found = []
    for position in positions:
        epoch, place = divmod(int(position), num_examples)
        if epoch not in made:
            made[epoch] = np.random.Generator(np.random.Philox(key=hashed(seed, "order", epoch))).permutation(num_examples)
        found.append(int(made[epoch][place]))
    return found
