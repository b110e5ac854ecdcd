"""A shuffled order of samples that is computed where it is asked for: it takes no memory, and any place of it is found at once.

It is a Feistel network (Luby and Rackoff 1988) over the next power of four; what lies beyond the samples is sent through it again until
it does not (cycle walking, Black and Rogaway 2002). Its rounds are the finalizer of SplitMix64 (Steele, Lea, Flood 2014). So
it is the same with every release of torch and numpy, and on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64's state
_MASK = (1 << 64) - 1
_LEAST_HALF_BITS = 2


def shuffled(places: NDArray[np.int64], num_samples: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """The samples at some places of a shuffled order.

    Args:
        places: of any shape, each from 0 to `num_samples` - 1.
        key: two numbers of 64 bits, such as a seed and an epoch; each pair gives another order.

    Returns:
        Numbers of samples, of the shape of `places`; different for different places.
    """
    half_bits = max(_LEAST_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    samples = places.astype(np.uint64)
    outside = np.ones(samples.shape, dtype=bool)
    while outside.any():
        samples[outside] = _network(samples[outside], half_bits, keys)
        outside = samples >= num_samples
    return samples.astype(np.int64)


def _network(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of all numbers of twice so many bits."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << bits) | right


def _round_keys(key: tuple[int, int]) -> NDArray[np.uint64]:
    first, second = (np.array([part & _MASK], dtype=np.uint64) for part in key)
    steps = np.array([(number + 1) * _STEP & _MASK for number in range(_ROUNDS)], dtype=np.uint64)
    return _mixed(_mixed(_mixed(first) + second) + steps)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
