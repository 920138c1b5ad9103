"""Memory: running out of it, which torch tells in several ways, and files that claim more than they can hold."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

# Deflate, inside gzip, zip and HDF5, packs at most 1032 bytes into one: a larger claim is a lie.
MOST_BYTES_PER_PACKED_BYTE = 1100


LARGEST_KEPT = 2**25 - 2**16  # bytes; glibc looks at blocks below 32 MB only


@cache
def keep_what_is_freed() -> None:
    """Has the C library keep up to 64 MB that is freed for what is allocated next; once in a process is enough.

    glibc raises these limits by itself, up to there, when a block so large is freed. Until then a program that needs
    the same megabytes for every step gets them from the system page by page, every time: a compiled convolutional step
    took 1.5 times as long. Elsewhere, and where memory is short, nothing happens.
    """
    with suppress(RuntimeError):
        torch.empty(LARGEST_KEPT, dtype=torch.uint8, device="cpu")


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Inside, running out of memory is a MemoryError that says of what there was too much."""
    try:
        yield
    except (RuntimeError, OverflowError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{what} do not fit in memory.") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether there is not so much, or would not be on any machine: sizes beyond 64 bits are told otherwise."""
    words = (
        "can't allocate memory",
        "Storage size calculation overflowed",
        "int too big to convert",
        "without overflow",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
