"""Matrix products and convolutions in a smaller dtype, everything else as it is.

Only what is heavy is rounded: the inputs of linear layers and convolutions. Their results come back in the dtype of the
story, so that densities, losses and sums are never in low precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

HEAVY = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
    functional.bilinear,
}


class _HeavyIn(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in HEAVY:
            return func(*args, **kwargs)
        given = args[0].dtype
        rounded = [arg.to(self.dtype) if isinstance(arg, Tensor) else arg for arg in args]
        named = {name: arg.to(self.dtype) if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        return func(*rounded, **named).to(given)


@contextmanager
def matrix_products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, linear layers and convolutions compute in ``dtype``; None leaves them as they are.

    >>> with matrix_products_in(torch.bfloat16):
    ...     third = torch.nn.functional.linear(torch.ones(1, 1), torch.tensor([[1 / 3]]))
    >>> third.dtype, third.item()
    (torch.float32, 0.333984375)
    """
    if dtype is None:
        yield
        return
    with _HeavyIn(dtype):
        yield
