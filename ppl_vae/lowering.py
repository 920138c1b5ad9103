"""What a compiled program computes by other operations than were traced: the same values to rounding, but faster."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_vae import products

aten = torch.ops.aten


def decompositions(with_products: bool) -> dict[Any, Callable[..., Any]]:
    """Inductor's own decompositions of operations, and ours.

    Args:
        with_products: multiply large matrices as :mod:`ppl_vae.products` does; its calls come from Python.
    """
    from torch._inductor.decomposition import decompositions as of_inductor

    ours: dict[Any, Callable[..., Any]] = {
        aten.log1p.default: log1p,
        aten.convolution_backward.default: _convolution_backward,
    }
    if with_products:
        ours |= {aten.mm.default: _mm, aten.addmm.default: _addmm}
    return of_inductor | ours


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) by a logarithm and a correction, to a few units in the last place.

    The vectorized log1p that torch and inductor call takes ten times as long as its log, and every Bernoulli story
    needs it for each pixel. Kahan's formula: Goldberg 1991, What every computer scientist should know about
    floating-point arithmetic, theorem 4, https://doi.org/10.1145/103162.103163.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    one_more = 1 + x
    exact = (one_more == 1) | (one_more == torch.inf)
    return torch.where(exact, x, one_more.log() * (x / (one_more - 1)))


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.ppl_vae.product(left.contiguous(), right, None) if products.gains(left, right) else NotImplemented


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if bias.shape != right.shape[1:] or (beta, alpha) != (1, 1) or not products.gains(left, right):
        return NotImplemented
    return torch.ops.ppl_vae.product(left, right, bias)


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the bias as a sum, which oneDNN takes longer for than it needs to be read."""
    *others, (for_x, for_weight, for_bias) = settings
    if not for_bias:
        return NotImplemented
    by_x, by_weight, _ = aten.convolution_backward(gradient, x, weight, bias_sizes, *others, [for_x, for_weight, False])
    return by_x, by_weight, gradient.sum([0, *range(2, gradient.dim())])
