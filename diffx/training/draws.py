"""Randomness of training as a function of (seed, step, name, place in the batch): nothing to store, nothing to restore."""

import functools
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
    places = (divmod(int(position), num_examples) for position in positions)
    return [int(_permutation(hashed(seed, "order", epoch), num_examples)[place]) for epoch, place in places]


@functools.lru_cache(64)  # one of a million takes 20 ms, which would be spent in every step
def _permutation(key: int, num: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=key)).permutation(num)


def batch_order(seed: int, group_sizes: Sequence[int], batch_size: int, step: int, places: Sequence[int]) -> list[int]:
    """Which examples stand at those places of a step's batch, all of one group.

    Examples are numbered group after group. Each group is an endless row of its own epochs; which group a step takes from is a
    permutation that depends on (seed, epoch), in which every group comes as often as it fills batches, and at least once. One
    group gives ``order``.
    """
    batches = [max(1, round(size / batch_size)) for size in group_sizes]
    epoch, step_of_epoch = divmod(step, sum(batches))
    owners = np.repeat(np.arange(len(batches)), batches)[_permutation(hashed(seed, "groups", epoch), sum(batches))]
    group = int(owners[step_of_epoch])
    batch = epoch * batches[group] + int(np.count_nonzero(owners[:step_of_epoch] == group))
    first, own = sum(group_sizes[:group]), seed if len(group_sizes) == 1 else hashed(seed, "group", group)
    return [first + i for i in order(own, group_sizes[group], [batch * batch_size + place for place in places])]
