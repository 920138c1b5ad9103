"""Batches, ready to be computed with; rows that lie on disk are read one batch ahead."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.stored import Stored
from ppl_vae.traces import Columns
from ppl_vae.training.steps import Task


@dataclass(frozen=True)
class Part:
    """Some rows of some columns on the story's device, and which part of their batch they are."""

    shard: int
    columns: Columns
    rows: Tensor


@dataclass(frozen=True)
class Batch:
    """The parts of a batch that fall to this process.

    Attributes:
        size: of the whole batch, those of other processes included.
    """

    epoch: int
    number: int
    size: int
    parts: list[Part]


class Supply:
    """The batches of an epoch, by number."""

    def __init__(self, task: Task, epoch: int, ahead: ThreadPoolExecutor | None) -> None:
        self.task = task
        self.epoch = epoch
        self.ahead = ahead
        self.rows = task.batches(epoch)
        self.coming: tuple[int, Future[Batch]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Batch:
        """A batch, counted from the end if its number is negative; the one after it is read in the meantime."""
        number %= len(self.rows)
        if self.ahead is None:
            return self._batch(number)
        coming, self.coming = self.coming, None
        batch = coming[1].result() if coming is not None and coming[0] == number else self._batch(number)
        if number + 1 < len(self.rows):
            self.coming = number + 1, self.ahead.submit(self._batch, number + 1)
        return batch

    def _batch(self, number: int) -> Batch:
        task, rows = self.task, self.rows[number]
        parts = [
            Part(shard, *_at_hand(task.columns, some))
            for shard, some in task.parts(rows)
            if shard % task.ranks.size == task.ranks.number
        ]
        return Batch(self.epoch, number, len(rows), parts)


@contextmanager
def supply(task: Task, epoch: int) -> Iterator[Supply]:
    """The batches of an epoch, with a thread that reads ahead where columns lie on disk."""
    if not are_stored(task.columns):
        yield Supply(task, epoch, None)
        return
    with ThreadPoolExecutor(max_workers=1) as ahead:
        yield Supply(task, epoch, ahead)


def are_stored(columns: Columns) -> bool:
    """Whether some of the columns lie on disk."""
    return any(isinstance(column, Stored) for column in columns)


def _at_hand(columns: Columns, rows: Tensor) -> tuple[Columns, Tensor]:
    """Columns and row numbers; of columns that lie on disk just these rows, and their new numbers."""
    if not are_stored(columns):
        return columns, rows
    read = tuple(column.index_select(0, rows) for column in columns)
    return read, torch.arange(len(rows), device=rows.device)
