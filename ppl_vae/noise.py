"""Noise in fixed units: every random number is a function of a seed, a purpose and indices, never of what ran before.

A unit is a batch of one epoch, or a block of observations times a block of particles. Because each unit is seeded by
itself, results do not depend on how units are chunked, resumed or spread over processes; and because generators are
forked, the caller's are as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a unit of noise is for. The number is part of the seed, so it never changes its meaning."""

    INITIAL_WEIGHTS = 0
    ORDER = 1
    TRAINING = 2
    VALIDATION = 3
    PILOT = 4
    EVIDENCE = 5
    CHECK = 6
    PREDICTIVE = 7
    PROPOSAL = 8
    BACKWARD = 9
    CALIBRATION = 10
    REFERENCE = 11
    GAPS = 12
    DRAWS = 13
    COLLAPSE = 14


def unit_seed(seed: int, purpose: Purpose, *indices: int) -> int:
    """The seed of one unit of noise, well mixed.

    Raises:
        ValueError: when the seed is negative.

    >>> unit_seed(0, Purpose.TRAINING, 1, 2) == unit_seed(0, Purpose.TRAINING, 1, 3)
    False
    """
    if seed < 0:
        raise ValueError(f"seed must be a whole number from 0 up; found {seed}.")
    if seed >= 2**64:
        raise ValueError(f"seed must be a number of 64 bits; found {seed!s:.20}...")
    return int(np.random.SeedSequence(seed, spawn_key=(purpose, *indices)).generate_state(1, np.uint64)[0])


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Inside, the generators of the CPU and of ``device`` are free to use; afterwards they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def reseed(device: torch.device, seed: int, purpose: Purpose, *indices: int) -> None:
    """Starts a unit of noise on the CPU and on ``device``; call it inside :func:`forked`."""
    start(device, unit_seed(seed, purpose, *indices))


def start(device: torch.device, number: int) -> None:
    """Starts the unit of noise with this :func:`unit_seed`; call it inside :func:`forked`.

    Where many units follow one another their seeds are best worked out together: one on its own takes up to ten times
    as long, because what it needs has left the processor's cache.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


@contextmanager
def unit(device: torch.device, seed: int, purpose: Purpose, *indices: int) -> Iterator[None]:
    """One unit of noise, with the caller's generators left alone."""
    with forked(device):
        reseed(device, seed, purpose, *indices)
        yield


def permutation(size: int, seed: int, *indices: int) -> torch.Tensor:
    """A random order of ``size`` rows, from a generator of its own; shape ``(size,)``, on the CPU."""
    generator = torch.Generator().manual_seed(unit_seed(seed, Purpose.ORDER, *indices))
    return torch.randperm(size, generator=generator)
