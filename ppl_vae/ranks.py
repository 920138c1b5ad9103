"""The processes that share one task, as ``torchrun`` starts them, and what they tell each other.

A process by itself is the first of one, and nothing is sent. Everything that is shared out is cut into parts that do
not depend on how many processes there are: they decide who computes a part, never what comes out. Words and numbers are
sent as bytes and tensors; nothing is unpickled.
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_apart = ContextVar("_apart", default=False)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a task.

    Attributes:
        number: of this process, from 0 up; its rank.
        size: how many there are.
    """

    number: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks for all."""
        return self.number == 0

    def mine(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts of a task that fall to this process: every ``size``-th."""
        return parts[self.number :: self.size]

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over processes of each tensor; all of one dtype are sent as one.

        Raises:
            RuntimeError: when another process has died.
        """
        if self.size == 1:
            return list(tensors)
        found: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = {place: tensor for place, tensor in enumerate(tensors) if tensor.dtype == dtype}
            flat = torch.cat([tensor.reshape(-1) for tensor in some.values()])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in some.values()])
            found |= {place: part.view_as(some[place]) for place, part in zip(some, parts, strict=True)}
        return [found[place] for place in range(len(tensors))]

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Puts the first process's numbers into the tensors of all, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

    def gather(self, content: bytes) -> list[bytes]:
        """What each process hands in, in their order; all processes get all of it."""
        if self.size == 1:
            return [content]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        longest = max(int(size) for size in sizes)
        padded = torch.frombuffer(bytearray(content.ljust(max(1, longest), b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part.numpy()[: int(size)].tobytes() for part, size in zip(parts, sizes, strict=True)]

    def said_by_first(self, words: str) -> str:
        """What the first process says."""
        return self.gather(words.encode())[0].decode()

    def refuse_different(self, what: str, said: str) -> None:
        """Raises ValueError when not all processes say the same."""
        for number, other in enumerate(self.gather(said.encode())):
            if other != said.encode():
                raise ValueError(
                    f"The processes of a run do the same together. Of {what}, process {number} says "
                    f"{other.decode():.200}, and process {self.number} says {said:.200}."
                )

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def here() -> Ranks:
    """This process among its equals; under ``torchrun``, joins them first.

    Raises:
        RuntimeError: when the others do not come.
    """
    if _apart.get() or not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if not all(name in os.environ for name in BY_TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
            return Ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on GPUs
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process works by itself, whatever the others do.

    >>> with apart():
    ...     here()
    Ranks(number=0, size=1)
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)
