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
    """

    flops: int = 0
    numbers: int = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Counts what is done inside."""
    work = Work()
    with _Counting(work):
        yield work


class _Counting(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.work.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=values)
        elif not func.is_view:
            self.work.numbers += sum(value.numel() for value in tree_leaves(values) if isinstance(value, Tensor))
        return values
