"""Fresh noise as a function of (seed of the sample, call), the same on every device and in every batch.

Many pipelines never hand their generator to ``scheduler.step``; noise keyed like this is seeded all the same, because the
initial latents came from that generator.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seeds_of(x: Tensor, seed: int | Sequence[int] | None) -> tuple[int, ...]:
    """One 64-bit seed per sample of ``x`` (B, ...).

    Args:
        seed: a whole number (sample i gets a hash of it and i), one number per sample, or None: then a checksum of each sample's
            own numbers, which reads the device once.

    Raises:
        ValueError: as many seeds as there are not samples.
    """
    if seed is None:
        host = x.detach().to("cpu", torch.float32).contiguous().numpy()
        return tuple(_hash(sample.tobytes()) for sample in host)
    if isinstance(seed, int):
        return tuple(_hash(f"{seed}/{i}".encode()) for i in range(len(x)))
    if len(seed) != len(x):
        raise ValueError(f"{len(seed)} seeds were given for a batch of {len(x)}")
    return tuple(_hash(str(s).encode()) for s in seed)


def keyed_normal(seeds: Sequence[int], call: int, shape: Sequence[int]) -> Tensor:
    """(B, ...) float32 standard normal on the host; sample i depends on (seeds[i], call) and on nothing else.

    Source: the counter-based generator Philox, Salmon et al. 2011, as NumPy has it: bit-equal on every machine.
    """
    streams = (np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, call, 0])) for seed in seeds)
    return torch.from_numpy(np.stack([stream.standard_normal(tuple(shape[1:]), dtype=np.float32) for stream in streams]))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
