"""What a compiled program computes by other operations than were traced: the same values to rounding, but faster."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from ppl_vae import products

aten = torch.ops.aten

LOG2_E = 1.4426950408889634
# log(1 + t) / t at t from 0 to 1, to a relative 4e-8; its coefficients from the constant up.
LOG1P_OVER_T = Chebyshev.interpolate(lambda t: np.log1p(t) / t, deg=8, domain=[0, 1]).convert(kind=Polynomial)
MOST_CHANNELS = 4  # of an output that oneDNN's transposed convolution is slow at


def decompositions(with_products: bool) -> dict[Any, Callable[..., Any]]:
    """Inductor's own decompositions of operations, and ours.

    Args:
        with_products: multiply large matrices as :mod:`ppl_vae.products` does; its calls come from Python.
    """
    of_inductor = _of_inductor()
    ours: dict[Any, Callable[..., Any]] = {
        aten.log1p.default: log1p,
        aten.binary_cross_entropy_with_logits.default: _bernoulli_nll,
        aten.convolution.default: _convolution,
        aten.convolution_backward.default: _convolution_backward,
    }
    if with_products:
        ours |= {aten.mm.default: _mm, aten.addmm.default: _addmm}
    return of_inductor | ours


def _of_inductor() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import decompositions  # a second of imports, for those who compile

    return decompositions


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) by a logarithm and a correction, to a few units in the last place.

    The vectorized log1p that torch and inductor call takes ten times as long as its log. Kahan's formula: Goldberg
    1991, What every computer scientist should know about floating-point arithmetic, theorem 4,
    https://doi.org/10.1145/103162.103163.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    one_more = 1 + x
    exact = (one_more == 1) | (one_more == torch.inf)
    return torch.where(exact, x, one_more.log() * (x / (one_more - 1)))


def _bernoulli_nll(
    logits: Tensor, x: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    r"""Minus a Bernoulli's log density of each pixel, with neither a logarithm nor anything to be stored in between.

    Of :math:`(1 - x) l - \min(0, l) + \log(1 + e^{-|l|})` the last term is :math:`t = e^{-|l|} \le 1` times a
    polynomial in it. Inductor would write an exponential that is used twice to memory and read it back, but not a power
    of two. That rounds the logit once more, as the layer that made it has done already.
    """
    for_each = weight is None and pos_weight is None and reduction == 0
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or not for_each:
        inductors = _of_inductor()[aten.binary_cross_entropy_with_logits.default]
        return inductors(logits, x, weight, pos_weight, reduction)
    t = (-LOG2_E * logits.abs()).exp2()
    *lower, highest = LOG1P_OVER_T.coef.tolist()
    polynomial = torch.full_like(t, highest)
    for coefficient in reversed(lower):
        polynomial = polynomial * t + coefficient
    return (1 - x) * logits - logits.clamp(max=0) + t * polynomial


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.ppl_vae.product(left.contiguous(), right, None) if products.gains(left, right) else NotImplemented


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if bias.shape != right.shape[1:] or (beta, alpha) != (1, 1) or not products.gains(left, right):
        return NotImplemented
    return torch.ops.ppl_vae.product(left, right, bias)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """A transposed convolution to few channels as one that makes all pixels which an input pixel lies at, side by side.

    The last layer of a decoder of images is one, and oneDNN takes twice as long for it. Where stride s takes the output
    apart into s * s images, each of them is a convolution of x with every s-th entry of the kernel: Shi et al. 2016,
    https://arxiv.org/abs/1609.07009.
    """
    stride, padding, dilation, transposed, output_padding, groups = settings
    few = transposed and x.dim() == 4 and weight.shape[1] <= MOST_CHANNELS and x.device.type == "cpu"
    if not few or groups > 1 or max(dilation) > 1 or min(stride) == 1:
        return NotImplemented
    steps, sizes, channels = tuple(stride), weight.shape[2:], weight.shape[1]
    taps = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
    numbers = zip(x.shape[2:], steps, padding, sizes, output_padding, strict=True)
    edges = [(n - 1) * s - 2 * p + k + o for n, s, p, k, o in numbers]
    made = [(n + t - 1) * s for n, t, s in zip(x.shape[2:], taps, steps, strict=True)]
    if any(p + edge > all_of for p, edge, all_of in zip(padding, edges, made, strict=True)):
        return NotImplemented  # the output's padding is more than a kernel reaches
    missing = [t * s - k for t, s, k in zip(taps, steps, sizes, strict=True)]
    kernel = aten.constant_pad_nd(weight, [0, missing[1], 0, missing[0]])
    kernel = kernel.reshape(len(weight), channels, taps[0], steps[0], taps[1], steps[1]).flip(2, 4)
    kernel = kernel.permute(1, 3, 5, 0, 2, 4).reshape(-1, len(weight), *taps)
    images = aten.convolution(x, kernel, None, [1, 1], [t - 1 for t in taps], [1, 1], False, [0, 0], 1)
    images = images.reshape(len(x), channels, *steps, *images.shape[2:]).permute(0, 1, 4, 2, 5, 3)
    whole = images.reshape(len(x), channels, *made)
    image = whole[:, :, padding[0] : padding[0] + edges[0], padding[1] : padding[1] + edges[1]]
    return image.contiguous() if bias is None else image + bias[:, None, None]


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the bias as a sum, which oneDNN takes longer for than it needs to be read."""
    *others, (for_x, for_weight, for_bias) = settings
    if not for_bias:
        return NotImplemented
    by_x, by_weight, _ = aten.convolution_backward(gradient, x, weight, bias_sizes, *others, [for_x, for_weight, False])
    return by_x, by_weight, gradient.sum([0, *range(2, gradient.dim())])
