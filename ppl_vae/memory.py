"""Memory: running out of it, which torch tells in several ways, and files that claim more than they can hold."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Deflate, inside gzip, zip and HDF5, packs at most 1032 bytes into one: a larger claim is a lie.
MOST_BYTES_PER_PACKED_BYTE = 1100


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Inside, running out of memory is a MemoryError that says of what there was too much."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{what} do not fit in memory.") from error


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
