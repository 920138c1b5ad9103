"""xarray tables in netCDF files: written whole or not at all, read without running anything."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import h5netcdf
import h5py
import numpy as np
import xarray as xr
from xarray.backends import H5NetCDFStore

from ppl_vae.checkpoint import write_atomically
from ppl_vae.memory import MOST_BYTES_PER_PACKED_BYTE

BYTES_AT_ONCE = 2**20
DAMAGED = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


def save(dataset: xr.Dataset, path: Path) -> None:
    """Writes a table; the file appears whole or not at all.

    Raises:
        OSError: when the file cannot be written.
    """
    write_atomically(path, to_bytes(dataset))  # HDF5 dies with the process where a disk is full


def to_bytes(dataset: xr.Dataset) -> bytes:
    """What the file of a table holds."""
    draft = io.BytesIO()
    with h5netcdf.File(draft, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
    return draft.getvalue()


def from_bytes(content: bytes) -> xr.Dataset:
    """The table whose file held this; for bytes of our own making."""
    with xr.open_dataset(io.BytesIO(content), engine="h5netcdf", decode_times=False) as file:
        return _plain(file.load().drop_encoding())


def load(path: Path) -> xr.Dataset:
    """Reads a table: numbers and words.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no whole netCDF file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        _refuse_endless_heaps(path)
        _refuse_claims(path)
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
            return _plain(file.load().drop_encoding())
    except DAMAGED as error:
        raise ValueError(f"{str(path)!r} is not a whole netCDF file: {' '.join(str(error).split())}.") from None


def _refuse_claims(path: Path) -> None:
    """Raises ValueError when a file claims more than it can hold, or takes numbers from other files."""
    claimed = 0

    def add(name: str, item: Any) -> None:
        nonlocal claimed
        if isinstance(item, h5py.Dataset):
            claimed += item.nbytes
            if item.external or item.is_virtual:
                raise ValueError(f"{name!r} lies in another file")

    with h5py.File(path) as file:
        file.visititems(add)
    if claimed > path.stat().st_size * MOST_BYTES_PER_PACKED_BYTE:
        raise ValueError(f"it claims to hold {claimed} bytes")


def _refuse_endless_heaps(path: Path) -> None:
    """Raises ValueError for a heap of words whose parts do not fit into it, in which HDF5 2.0 and older walk for ever.

    HDF5 file format, version 3, III.E: a heap is ``GCOL``, a version, and its size, then objects, each of them an
    index, a count, and its size. Index 0 is free space, whose size includes the 16 bytes that say so. HDF5 adds sizes
    up without a look at the end of the heap: none at all keeps it where it is, and a huge one takes it back.
    """
    size = path.stat().st_size
    left = size // 16  # more objects than a file has room for are in heaps that lie in each other
    with path.open("rb") as file:
        for place in _places_of(b"GCOL", file):
            file.seek(place)
            header = file.read(16)
            if len(header) < 16 or header[4] != 1:
                continue
            heap = file.read(min(int.from_bytes(header[8:], "little"), size) - 16)
            offset = 0
            while offset + 16 <= len(heap):
                index, _, length = struct.unpack_from("<HHxxxxQ", heap, offset)
                taken = length if index == 0 else 16 + (length + 7) // 8 * 8
                left -= 1
                if left < 0 or not 16 <= taken <= len(heap) - offset:
                    raise ValueError("a heap of words has no end")
                offset += taken


def _places_of(word: bytes, file: IO[bytes]) -> Iterator[int]:
    """Where a word is in a file; the file may be read elsewhere in between."""
    start, kept = 0, b""
    while True:
        file.seek(start)
        if not (chunk := file.read(BYTES_AT_ONCE)):
            return
        text, begins = kept + chunk, start - len(kept)
        found = text.find(word)
        while found >= 0:
            yield begins + found
            found = text.find(word, found + 1)
        start, kept = start + len(chunk), text[-len(word) + 1 :]


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    """Words as NumPy strings and attributes as Python's own types, as they were before they were written."""
    words = {
        name: (array.dims, array.values.astype(str), array.attrs)
        for name, array in dataset.variables.items()
        if array.dtype.kind in "OSU"
    }
    attrs = {name: value.item() if isinstance(value, np.generic) else value for name, value in dataset.attrs.items()}
    return dataset.assign(words).assign_attrs(attrs)
