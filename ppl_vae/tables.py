"""xarray tables in netCDF files: written whole or not at all, read without running anything."""

import io
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import xarray as xr
from xarray.backends import H5NetCDFStore

from ppl_vae.checkpoint import write_atomically
from ppl_vae.memory import MOST_BYTES_PER_PACKED_BYTE

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


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    """Words as NumPy strings and attributes as Python's own types, as they were before they were written."""
    words = {
        name: (array.dims, array.values.astype(str), array.attrs)
        for name, array in dataset.variables.items()
        if array.dtype.kind in "OSU"
    }
    attrs = {name: value.item() if isinstance(value, np.generic) else value for name, value in dataset.attrs.items()}
    return dataset.assign(words).assign_attrs(attrs)
