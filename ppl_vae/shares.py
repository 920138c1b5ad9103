"""Work cut into pieces: shared out among processes, and written down as it is finished.

What comes out of a piece depends on the piece alone, so that results are the same, bit for bit, for any number of
processes, and for a task that was interrupted and gone on with.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae import checkpoint
from ppl_vae.ranks import here

Table = dict[str, np.ndarray]

SECONDS_BETWEEN_FILES = 30.0
WORDS = "words:"  # before the name of an array of words, which is written as JSON


@dataclass
class Shares:
    """A task in pieces.

    Attributes:
        folder: where finished pieces are written down, and found when the same task is begun again; None keeps nothing.
        asked: all that the results depend on.
        progress: show a bar; None means when standard error is a terminal.
    """

    folder: Path | None = None
    asked: str = ""
    progress: bool | None = None
    _number: int = field(default=0, init=False)

    def out(
        self, pieces: Sequence[int], compute: Callable[[int], Table], what: str, unit: str = "block"
    ) -> Iterator[tuple[int, Table]]:
        """Each piece and its table, in no order of their own; each is computed by one process and given to all.

        Raises:
            OSError: when a finished piece cannot be written down.
            ValueError: when a file in the folder is damaged.
            RuntimeError: when another process has died.
        """
        ranks, self._number = here(), self._number + 1
        task = hashlib.sha256(f"{self._number} {self.asked}".encode()).hexdigest()
        files = _Files(self.folder, task, ranks.number)
        known = files.read(set(pieces))
        ranks.wait()  # until all have read, nobody writes
        mine: dict[int, Table] = {}
        hidden = not ranks.is_first or (None if self.progress is None else not self.progress)
        rest = ranks.mine([piece for piece in pieces if piece not in known])
        yield from known.items()
        for piece in tqdm(rest, desc=what, unit=unit, disable=hidden):
            table = compute(piece)
            files.add(piece, table)
            if ranks.size > 1:
                mine[piece] = table
            yield piece, table
        files.write()
        for number, content in enumerate(ranks.gather(_to_bytes(mine)) if ranks.size > 1 else ()):
            if number != ranks.number:
                yield from _from_tensors(safetensors.torch.load(content)).items()


class _Files:
    """The pieces of one task that are written down; each file holds those that were finished after the one before."""

    def __init__(self, folder: Path | None, task: str, rank: int) -> None:
        self.folder = folder
        self.task = task
        self.rank = rank
        self.written = time.monotonic()
        self.unwritten: dict[int, Table] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, pieces: set[int]) -> dict[int, Table]:
        """Those of these pieces that are known; files of other tasks are left alone."""
        known: dict[int, Table] = {}
        for file in sorted(self.folder.glob(f"finished-{self.task[:8]}-*.safetensors")) if self.folder else ():
            about, tensors = checkpoint.read(file)
            if about.get("task") == self.task:
                known |= _from_tensors(tensors)
        return {piece: table for piece, table in known.items() if piece in pieces}

    def add(self, piece: int, table: Table) -> None:
        """Takes in a finished piece, and writes when there was nothing written for a while."""
        if self.folder is not None:
            self.unwritten[piece] = table
            if time.monotonic() - self.written >= SECONDS_BETWEEN_FILES:
                self.write()

    def write(self) -> None:
        """Writes what is not written yet."""
        if self.folder is not None and self.unwritten:
            name = f"finished-{self.task[:8]}-{min(self.unwritten):010d}-{self.rank}.safetensors"
            checkpoint.write(self.folder / name, _to_tensors(self.unwritten), {"task": self.task})
            self.unwritten = {}
        self.written = time.monotonic()


def _to_bytes(tables: Mapping[int, Table]) -> bytes:
    return safetensors.torch.save(_to_tensors(tables))


def _to_tensors(tables: Mapping[int, Table]) -> dict[str, Tensor]:
    """Tables of equal columns as tensors: each column of all of them together, and how long it is in each."""
    names = list(next(iter(tables.values()), {}))
    lengths = [[len(table[name]) for name in names] for table in tables.values()]
    tensors = {"pieces": torch.tensor(list(tables), dtype=torch.int64), "lengths": torch.tensor(lengths)}
    for name in names:
        column = np.concatenate([table[name] for table in tables.values()])
        if column.dtype.kind in "OU":
            words = json.dumps(column.tolist()).encode()
            tensors[WORDS + name] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        else:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(column))
    return tensors | {"names": torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)}


def _from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, Table]:
    pieces = tensors["pieces"].tolist()
    names = json.loads(tensors["names"].numpy().tobytes())
    tables: dict[int, Table] = {piece: {} for piece in pieces}
    by_name = tensors["lengths"].reshape(len(pieces), len(names)).T.tolist()
    for name, lengths in zip(names, by_name, strict=True):
        if WORDS + name in tensors:
            column = np.array(json.loads(tensors[WORDS + name].numpy().tobytes()), dtype=object)
        else:
            column = tensors[name].numpy()
        for piece, part in zip(pieces, np.split(column, np.cumsum(lengths)[:-1]), strict=True):
            tables[piece][name] = part
    return tables
