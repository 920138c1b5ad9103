"""Columns whose numbers lie on disk: tensors by shape and type, of which only the rows that are asked for are read.

Rows are read by position and never mapped into memory: of a mapped file that is cut short, a process dies without an
error, and its pages count as the process's own memory.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.overrides import resolve_name

RowMap: TypeAlias = Callable[[Tensor, Tensor], Tensor]

BYTES_AT_ONCE = 2**19

# What a column knows without its numbers.
_PROPERTIES = (
    "shape dtype device ndim layout itemsize nbytes requires_grad grad grad_fn is_leaf is_sparse is_cpu is_cuda"
)
_ABOUT = {getattr(Tensor, name).__get__ for name in [*_PROPERTIES.split(), "is_meta", "is_mps", "is_quantized"]}
_ABOUT |= {Tensor.__len__, Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.numel, Tensor.nelement, torch.numel}
_ABOUT |= {Tensor.element_size, Tensor.is_contiguous, Tensor.get_device}
_ABOUT |= {Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed}
_ABOUT |= {torch.is_floating_point, torch.is_complex, torch.is_signed}

# Row by row, and put off until rows are read.
_CONVERSIONS = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.contiguous, torch.detach}
_CONVERSIONS |= {Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.double, Tensor.bool}
_CONVERSIONS |= {Tensor.short, Tensor.int, Tensor.long}

_SELECTIONS = {
    Tensor.__getitem__: "__getitem__",
    Tensor.index_select: "index_select",
    torch.index_select: "index_select",
    Tensor.narrow: "narrow",
    torch.narrow: "narrow",
}

# Torch turns a TypeError from these into NotImplemented, and Python then calls two columns unequal, silently.
_OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_REFLECTED = ("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul")
_LOGICAL = ("and", "or", "xor", "rand", "ror", "rxor")


class Stored(Tensor):
    """A column whose numbers lie on disk. Made by :func:`ppl_vae.data.stored`, and by ``data.load(..., stream=True)``.

    It has shape, dtype, device and length like any tensor. ``x[3]``, ``x[10:42]``, ``x[rows]`` with row numbers or a
    boolean tensor, and ``x.index_select(0, rows)`` read these rows and return an ordinary tensor. ``x.to`` and its kin,
    ``x.detach()``, ``x[:]``, ``x.narrow(0, first, length)``, ``x.rows(numbers)`` and ``x.map(function)`` return another
    column on disk and read nothing but, perhaps, one row. Everything else would need all rows and is a TypeError.

    A column may be read by several threads at once.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ppl_vae import data
        >>> with TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.arange(12.0).reshape(6, 2))
        ...     x = data.stored(f"{folder}/x.npy")
        >>> x
        Stored('x.npy', shape (6, 2), torch.float64)
        >>> x[torch.tensor([5, 0])]
        tensor([[10., 11.],
                [ 0.,  1.]], dtype=torch.float64)
        >>> x.mean()
        Traceback (most recent call last):
            ...
        TypeError: mean would read all 6 rows of 'x.npy'. Take rows first: x[10:42], x[rows] or x.index_select(0, rows).
    """

    _files: "RowFiles"
    _numbers: range | Tensor
    _maps: tuple[RowMap, ...]

    @staticmethod
    def __new__(
        cls,
        files: "RowFiles",
        numbers: range | Tensor,
        maps: tuple[RowMap, ...],
        event_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Stored":
        column = Tensor._make_wrapper_subclass(cls, (len(numbers), *event_shape), dtype=dtype, device=device)
        column._files, column._numbers, column._maps = files, numbers, maps
        return column

    @classmethod
    def of(cls, files: "RowFiles") -> "Stored":
        """All rows of some files, as they are."""
        return cls(files, range(files.num_rows), (), files.row_shape, files.torch_dtype, torch.device("cpu"))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        place = "" if self.device.type == "cpu" else f", read to {self.device}"
        return f"Stored({self._files.name!r}, shape {tuple(self.shape)}, {self.dtype}{place})"

    def __format__(self, form: str) -> str:
        return format(repr(self), form)

    __hash__ = Tensor.__hash__

    # Rows

    def __getitem__(self, key: Any) -> Tensor:
        """Some rows as an ordinary tensor; ``x[:]``, which is all of them, as a column on disk."""
        if isinstance(key, slice) and key == slice(None):
            return self._with()
        if isinstance(key, int) and not isinstance(key, bool):
            return self._read(self._positions(key).reshape(1))[0].to(self.device)
        if isinstance(key, tuple) or key is None or key is Ellipsis or isinstance(key, bool):
            raise self._refusal("an index of more than rows")
        rows = self._positions(key)
        return self._read(rows.flatten()).reshape(*rows.shape, *self.shape[1:]).to(self.device)

    def index_select(self, dim: int, index: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Some rows as an ordinary tensor; ``dim`` is 0."""
        self._check_rows_are_meant("index_select", dim)
        return self[index.reshape(-1)]

    def narrow(self, dim: int, start: int, length: int) -> "Stored":  # pyright: ignore[reportIncompatibleMethodOverride]
        """So many rows from one on, left on disk; ``dim`` is 0."""
        self._check_rows_are_meant("narrow", dim)
        start = start + len(self) if start < 0 else start
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"There are {len(self)} rows; found start {start} and length {length}.")
        return self._with(numbers=self._numbers[start : start + length])

    def rows(self, index: Tensor | Sequence[int]) -> "Stored":
        """Some rows, in the order of their numbers in ``index``, left on disk."""
        return self._with(numbers=self._numbers_of(self._positions(index)))

    def all_rows(self) -> "Stored":
        """All rows of the files in their order, whichever of them this column is made of."""
        return self._with(numbers=range(self._files.num_rows))

    def in_file_order(self) -> "Stored":
        """The same rows as they lie on disk, so that a pass over them reads forwards."""
        return self if isinstance(self._numbers, range) else self._with(numbers=self._numbers.sort().values)

    def to(self, *args: Any, **kwargs: Any) -> "Stored":
        """The same rows, read to another device or type; takes what :meth:`torch.Tensor.to` takes."""
        return self._converted(Tensor.to, *args, **kwargs)

    def order_on_disk(self) -> Tensor | None:
        """Row numbers such that the rows lie on disk in this order; None where they do so as they are."""
        return None if isinstance(self._numbers, range) else self._numbers.argsort()

    def read_into(self, rows: Tensor, out: Tensor) -> Tensor:
        """Reads rows into memory that is already there, which may be pinned.

        Args:
            rows: their numbers, shape ``(R,)``.
            out: on the CPU, contiguous, of this column's dtype and of shape ``(R, *event)``; row i becomes
                ``x[rows[i]]``.

        Returns:
            ``out``, for the caller to send to :attr:`device`.

        Raises:
            ValueError: when ``out`` does not fit; when a file has been cut short.
        """
        wanted = torch.Size((len(rows), *self.shape[1:]))
        if out.shape != wanted or out.dtype != self.dtype or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous, on the CPU, of shape {tuple(wanted)} and {self.dtype}; found shape "
                f"{tuple(out.shape)} and {out.dtype} on {out.device}."
            )
        return self._read(self._positions(rows), out)

    def map(self, function: RowMap) -> "Stored":
        """Another column, made of this one's rows as they are read.

        Args:
            function: of some rows' values, shape ``(R, *event)`` on the CPU, and their numbers in the files, int64 of
                shape ``(R,)``; what it makes of a row depends on that row and its number alone.

        Returns:
            The column; its shape and type are found by applying ``function`` to the first row.

        Raises:
            ValueError: when ``function`` does not make one row of one.
        """
        changed = self._with(maps=(*self._maps, function))
        first = changed._values_of(self._numbers_of(torch.zeros(min(1, len(self)), dtype=torch.int64)))
        if not isinstance(first, Tensor) or first.shape[:1] != (min(1, len(self)),):
            found = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"The function makes {found} of one row; expected a tensor of one row.")
        return changed._with(event_shape=first.shape[1:], dtype=first.dtype)

    def _with(self, **changes: Any) -> "Stored":
        same = {"files": self._files, "numbers": self._numbers, "maps": self._maps}
        return Stored(**same | {"event_shape": self.shape[1:], "dtype": self.dtype, "device": self.device} | changes)

    def _positions(self, key: Any) -> Tensor:
        """Row numbers within this column, from 0 up, int64 on the CPU."""
        if isinstance(key, slice):
            first, end, step = key.indices(len(self))
            if step < 1:
                raise ValueError(f"The step of a slice must be at least 1; found {step}.")
            return torch.arange(first, max(first, end), step)
        rows = torch.as_tensor(key, device="cpu")
        if rows.dtype == torch.bool:
            if rows.shape != self.shape[:1]:
                raise IndexError(
                    f"A boolean tensor says of each row whether it is meant: expected {len(self)} of them."
                )
            return rows.nonzero().squeeze(1)
        if rows.numel() and (rows.is_floating_point() or rows.is_complex()):
            raise IndexError(f"Rows are whole numbers or booleans; found {rows.dtype}.")
        rows = rows.long()
        rows = torch.where(rows < 0, rows + len(self), rows)
        if bool((outside := (rows < 0) | (rows >= len(self))).any()):
            raise IndexError(f"There is no row {torch.as_tensor(key)[outside][0]} of {len(self)} rows.")
        return rows

    def _numbers_of(self, positions: Tensor) -> Tensor:
        if isinstance(self._numbers, range):
            return self._numbers.start + positions
        return self._numbers[positions]

    def _read(self, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """Values in the order of the positions, on the CPU; the files are read forwards."""
        numbers, order = self._numbers_of(positions).sort(stable=True)
        is_forwards = bool((order[1:] > order[:-1]).all())
        if is_forwards and not self._maps:
            return self._files.read(numbers, out)
        values = self._values_of(numbers)
        if is_forwards and out is None:
            return values
        return (torch.empty_like(values) if out is None else out).index_copy_(0, order, values)

    def _values_of(self, numbers: Tensor) -> Tensor:
        values = self._files.read(numbers)
        for change in self._maps:
            values = change(values, numbers)
        return values

    def _converted(self, conversion: Callable[..., Tensor], *args: Any, **kwargs: Any) -> "Stored":
        """A column that is read to where, and to what type, a conversion takes an empty tensor."""
        end = conversion(torch.empty(0, dtype=self.dtype, device=self.device), *args, **kwargs)
        maps = self._maps if end.dtype == self.dtype else (*self._maps, partial(_cast, end.dtype))
        return self._with(maps=maps, dtype=end.dtype, device=end.device)

    # What torch may do with a column

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            return super().__torch_function__(func, types, tuple(args), kwargs)
        if args and isinstance(args[0], cls):
            if func in _CONVERSIONS:
                return args[0]._converted(func, *args[1:], **kwargs)
            if func in _SELECTIONS:
                return getattr(args[0], _SELECTIONS[func])(*args[1:], **kwargs)
        name = (resolve_name(func) or func.__name__).removeprefix("torch.Tensor.").removesuffix(".__get__")
        columns = (part for part in _flat((*args, *kwargs.values())) if isinstance(part, cls))
        raise next(columns)._refusal(name)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch asks for without asking :meth:`__torch_function__` first."""
        columns = (part for part in _flat((*args, *(kwargs or {}).values())) if isinstance(part, cls))
        raise next(columns)._refusal(str(func))

    def _check_rows_are_meant(self, operation: str, dim: int) -> None:
        if dim not in (0, -self.dim()):
            raise self._refusal(f"{operation} along dimension {dim}")

    def _refusal(self, operation: str) -> TypeError:
        return TypeError(
            f"{operation} would read all {len(self)} rows of {self._files.name!r}. Take rows first: x[10:42], x[rows] "
            "or x.index_select(0, rows)."
        )


def _refused(operation: str) -> Callable[..., Any]:
    def operator(self: Stored, *others: object) -> Any:
        raise self._refusal(operation)

    return operator


for _name in (*_OPERATORS, *_REFLECTED, *_LOGICAL):
    setattr(Stored, f"__{_name}__", _refused(_name))


def _cast(dtype: torch.dtype, values: Tensor, numbers: Tensor) -> Tensor:
    return values.to(dtype)


def _flat(parts: Sequence[Any]) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, list | tuple):
            yield from _flat(part)
        else:
            yield part


def row_slices(*columns: Tensor, most_rows: int | None = None) -> Iterator[slice]:
    """Slices of some columns, one after the other, of which about a megabyte of numbers comes at a time.

    Args:
        columns: in memory or on disk, of one length.
        most_rows: of one slice.

    >>> list(row_slices(torch.zeros(5, 3), most_rows=2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    length = len(columns[0])
    in_row = sum(prod(column.shape[1:]) * column.element_size() for column in columns)
    at_once = max(1, min(most_rows or length, BYTES_AT_ONCE // max(1, in_row)))
    for first in range(0, length, at_once):
        yield slice(first, min(length, first + at_once))


def pieces(*columns: Tensor, most_rows: int | None = None) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """All rows of some columns, some at a time as in :func:`row_slices`: their numbers, int64, and their values.

    A column on disk is read forwards: its rows come in the order in which they lie there.
    """
    stored = next((column for column in columns if isinstance(column, Stored)), None)
    order = None if stored is None else stored.order_on_disk()
    for rows in row_slices(*columns, most_rows=most_rows):
        numbers = torch.arange(rows.start, rows.stop) if order is None else order[rows]
        yield numbers, tuple(column[rows if order is None else numbers] for column in columns)


# Files ----------------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What a ``.npy`` file says of itself; its values start so many bytes from its beginning."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    start: int


def read_header(file: IO[bytes], size: int, where: str) -> Header:
    """The header of an array in numpy's format, once it agrees with the ``size`` of the file in bytes.

    Raises:
        ValueError: naming ``where``, when it is damaged or claims another size, or holds pickled objects.
    """
    shape, is_fortran, dtype = _claims(file, where)
    if dtype.hasobject:
        raise ValueError(
            f"{where} holds pickled Python objects; such a file can run code and is never unpickled. "
            "Save plain numbers, for instance x.astype('float32')"
        )
    expected, found = prod(shape) * dtype.itemsize, size - file.tell()
    if expected != found or min(shape, default=0) < 0:
        raise ValueError(
            f"{where} is truncated or damaged: {found} bytes of values, expected {expected} for {shape} {dtype}"
        )
    return Header(shape, dtype, is_fortran, file.tell())


def _claims(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        return readers[np.lib.format.read_magic(file)](file)
    except (zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # numpy parses the header as Python literals, which can fail in many ways
        raise ValueError(f"{where} is not a .npy array, or its header is damaged") from error


class RowFiles:
    """The rows of some ``.npy`` files, one file after the other, open for reading by position."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        """Opens the files and checks their headers.

        Raises:
            ValueError: when one is damaged, not of real numbers, in Fortran order, or of another shape or type than the
                first; when there are no numbers at all.
            OSError: when one cannot be opened.
        """
        self.name = name
        self._paths = paths
        self._descriptors: list[int] = []
        headers = [self._open(path) for path in paths]
        self.row_shape, self.dtype = headers[0].shape[1:], headers[0].dtype
        for path, header in zip(paths, headers, strict=True):
            if (header.shape[1:], header.dtype) != (self.row_shape, self.dtype):
                raise ValueError(
                    f"{str(path)!r} has rows of shape {header.shape[1:]} and {header.dtype}, expected {self.row_shape} "
                    f"and {self.dtype} as in {str(paths[0])!r}"
                )
        self._starts = [header.start for header in headers]
        self._first_rows = np.cumsum([0, *(header.shape[0] for header in headers)])
        if not (self.num_rows and prod(self.row_shape)):
            raise ValueError(f"{name!r} holds no observations: its shape is {(self.num_rows, *self.row_shape)}")

    @property
    def num_rows(self) -> int:
        """Of all files together."""
        return int(self._first_rows[-1])

    def _open(self, path: Path) -> Header:
        where = repr(str(path))
        with path.open("rb") as file:
            header = read_header(file, os.fstat(file.fileno()).st_size, where)
            self._descriptors.append(os.dup(file.fileno()))
        finalize(self, os.close, self._descriptors[-1])
        if header.dtype.kind not in "biuf":
            raise ValueError(f"{where} must be real numbers; found {header.dtype}")
        if not header.shape:
            raise ValueError(f"{where} holds no observations: its shape is (), expected (rows, ...)")
        if header.is_fortran and len(header.shape) > 1:
            raise ValueError(
                f"{where} is in Fortran order, in which the numbers of a row do not lie together; save it anew as "
                "numpy.ascontiguousarray(x)"
            )
        return header

    def read(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows by their numbers, in ascending order, in the machine's form of the files' type.

        Args:
            numbers: int64 of shape ``(R,)``, ascending.
            out: contiguous and of that type, on the CPU, to read into; None is new memory.

        Raises:
            ValueError: naming the file that has been cut short since it was opened.
        """
        if out is not None and self._shared_dtype == self.dtype:
            self._fill(out.numpy(), numbers.numpy())
            return out
        raw = np.empty((len(numbers), *self.row_shape), self.dtype)
        self._fill(raw, numbers.numpy())
        values = torch.from_numpy(raw.astype(self._shared_dtype, copy=False))
        return values if out is None else out.copy_(values)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of rows that :meth:`read` returns."""
        return torch.from_numpy(np.empty(0, self._shared_dtype)).dtype

    @property
    def _shared_dtype(self) -> np.dtype:
        """What torch and numpy share, in the machine's byte order."""
        return np.dtype(np.float64) if self.dtype.itemsize > 8 else self.dtype.newbyteorder("=")

    def _fill(self, raw: np.ndarray, numbers: np.ndarray) -> None:
        """Reads ascending rows; neighbours in a file, by a single call."""
        if not len(numbers):
            return
        memory, in_row = raw.reshape(-1).view(np.uint8).data, raw[0].nbytes
        files = np.searchsorted(self._first_rows, numbers, side="right") - 1
        offsets = np.array(self._starts)[files] + (numbers - self._first_rows[files]) * in_row
        is_new = (np.diff(numbers, prepend=-2) != 1) | (np.diff(files, prepend=-1) != 0)
        firsts = np.flatnonzero(is_new)
        for first, end in pairwise([*firsts.tolist(), len(numbers)]):
            self._read_run(int(files[first]), memory[first * in_row : end * in_row], int(offsets[first]))

    def _read_run(self, file: int, memory: memoryview, offset: int) -> None:
        while memory:
            try:
                count = os.preadv(self._descriptors[file], [memory], offset)
            except OSError as error:  # names no file
                raise OSError(error.errno, error.strerror or str(error), str(self._paths[file])) from error
            if not count:
                path = str(self._paths[file])
                raise ValueError(f"{path!r} has been cut short since it was opened: there is nothing at byte {offset}")
            memory, offset = memory[count:], offset + count
