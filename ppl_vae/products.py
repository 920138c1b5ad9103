"""Matrix products by oneDNN, where it makes more of the processor than the library that torch calls.

torch multiplies matrices in single precision by MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN,
which comes with torch as well, uses AVX-512 wherever there is some, and is twice as fast on a Zen 5. Both round
differently, so that nothing that is to agree with torch bit for bit may be multiplied here.
"""

from functools import cache

import torch
from torch import Tensor, library

# A call of oneDNN takes some ten microseconds longer: it gains from a product of so many operations on.
SMALLEST_PRODUCT = 4e6

library.define("ppl_vae::product", "(Tensor left, Tensor right, Tensor? bias) -> Tensor")


def gains(left: Tensor, right: Tensor) -> bool:
    """Whether :func:`product` is faster than torch for matrices of these shapes, kinds and device."""
    in_single = left.dtype == right.dtype == torch.float32 and left.device.type == "cpu"
    return in_single and 2 * left.numel() * right.shape[1] >= SMALLEST_PRODUCT and _has_more_than_mkl_uses()


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right + bias``, of shape ``(n, m)``, to rounding; without gradients.

    Args:
        left: shape ``(n, k)``; in memory as it comes.
        right: shape ``(k, m)``.
        bias: shape ``(m,)``.
    """
    if gains(left, right):
        return torch.ops.ppl_vae.product(left, right, bias)
    return left @ right if bias is None else torch.addmm(bias, left, right)


@cache
def _has_more_than_mkl_uses() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@library.impl("ppl_vae::product", "CPU")
def _by_onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(left, right.T, bias, "none", [], "")


@library.register_fake("ppl_vae::product")
def _shape(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])
