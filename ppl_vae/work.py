"""How much there is to do: what decides whether compiling it pays."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class Work:
    """What operations on tensors take.

    Attributes:
        flops: floating point operations of matrix products and convolutions.
        numbers: what all other operations return. One by one they write it to memory, and a compiler fuses most.
        widest: the numbers of a row in the largest tensor of rows.
    """

    flops: int = 0
    numbers: int = 0
    widest: int = 0


@contextmanager
def counted(rows: int = 0) -> Iterator[Work]:
    """Counts what is done inside. Tensors are taken for rows whose first dimension is a multiple of ``rows``."""
    work = Work()
    with _Counting(work, rows):
        yield work


class _Counting(TorchDispatchMode):
    def __init__(self, work: Work, rows: int) -> None:
        super().__init__()
        self.work, self.rows = work, rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = func(*args, **(kwargs or {}))
        if func.is_view:
            return values
        made = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        if func.overloadpacket in flop_registry:
            self.work.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=values)
        else:
            self.work.numbers += sum(value.numel() for value in made)
        if self.rows:
            widths = [value.numel() // self.rows for value in made if value.dim() and len(value) % self.rows == 0]
            self.work.widest = max([self.work.widest, *widths])
        return values
