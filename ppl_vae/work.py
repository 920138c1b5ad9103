"""How much there is to do: what decides whether compiling it pays."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass
class Work:
    """What operations on tensors take.

    Attributes:
        flops: floating point operations of matrix products and convolutions.
        numbers: what all other operations return. One by one they write it to memory, and a compiler fuses most.
    """

    flops: int = 0
    numbers: int = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Counts what is done inside; the counts are there afterwards."""
    work = Work()
    with FlopCounterMode(display=False) as products, _Numbers() as numbers:
        yield work
    work.flops, work.numbers = products.get_total_flops(), numbers.total


class _Numbers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in flop_registry:
            self.total += sum(value.numel() for value in tree_leaves(values) if isinstance(value, Tensor))
        return values
