"""Normalizing flows: what the prior's and the posterior's flow share, around the transforms of Pyro."""

import math
import weakref
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn.auto_reg_nn import MaskedLinear, create_mask
from torch import Tensor, nn
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode

from ppl_vae.networks import mlp
from ppl_vae.templates import Inverse

SLOPE_OF_ONE = math.log(math.expm1(1 - 1e-3))  # before softplus, and before Pyro adds the least slope that it allows


class Transformed(dist.TransformedDistribution):
    r"""A transformed distribution, :math:`\log p(z) = \log p(u) - \log |\det \partial z / \partial u|`, that is right
    at every point.

    Its transforms remember the last draw, so that scoring it costs nothing. They know it by identity: a draw that was
    made without gradients would be scored without them.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        _untie(self.transforms)
        if torch.is_grad_enabled() and value.grad_fn is None:
            value = value.view_as(value)  # another object, which nobody remembers
        return super().log_prob(value)


def _untie(parts: Sequence[Any]) -> None:
    """Lets go of transforms, and of the points that they remember, with the distribution that has them.

    A transform and its inverse hold each other, which would keep the graphs of many steps alive. (Before torch 2.13 the
    inverse is held weakly, and there is nothing to do.)
    """
    for part in parts:
        if part._inv is None and not isinstance(part, transforms.ComposeTransform) and _holds_its_inverse():
            part._inv = Inverse(weakref.proxy(part))


@cache
def _holds_its_inverse() -> bool:
    transform = transforms.ExpTransform()
    inverse = transform.inv
    return transform._inv is inverse


def flipped_between(layers: Sequence[Any], latent_dim: int) -> list[Any]:
    """Transforms with the coordinates reversed between one and the next."""
    flips = [transforms.Permute(torch.arange(latent_dim).flip(0)) for _ in layers[1:]]
    return [layers[0], *(part for pair in zip(flips, layers[1:], strict=True) for part in pair)]


def ends(low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """The ends of an interval, or of a box, as tensors; ValueError when it is empty."""
    a, b = (torch.as_tensor(end, dtype=torch.get_default_dtype()) for end in (low, high))
    if not a.is_meta and not bool((a < b).all()):
        raise ValueError(f"low must be less than high; found {a.tolist()} and {b.tolist()}.")
    return a, b


class ToBox(transforms.AffineTransform):
    """From the numbers between 0 and 1 to those between two ends, and it says so; torch's own says to all numbers."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__(low, high - low, cache_size=1)
        self.ends = low, high

    @property
    def codomain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleMethodOverride]
        return constraints.interval(*self.ends)


# Networks of transforms


class Parts(nn.Module):
    """A multilayer perceptron whose output comes in parts along the last dimension, as Pyro's couplings want it."""

    def __init__(self, input_dim: int, hidden_dims: Sequence[int], sizes: Sequence[int]) -> None:
        super().__init__()
        self.network = mlp(input_dim, *hidden_dims, sum(sizes))
        self.sizes = list(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.network(x).split(self.sizes, dim=-1)


def affine_coupling(latent_dim: int, hidden_dims: Sequence[int]) -> transforms.AffineCoupling:
    """Shifts and scales the second half of the coordinates by a network of the first."""
    given, moved = latent_dim // 2, latent_dim - latent_dim // 2
    return transforms.AffineCoupling(given, Parts(given, hidden_dims, [moved, moved]))


class Autoregressive(nn.Module):
    """A masked network: the parameters of coordinate k depend on the coordinates before it, and on a context.

    Germain et al. 2015, https://arxiv.org/abs/1502.03509; the context as in Paige & Wood 2016,
    https://arxiv.org/abs/1602.06701.

    Pyro's own takes numbers out of tensors when it is made, which a story that is rebuilt without memory cannot do,
    and the order of coordinates out of a buffer, which a captured step cannot do.

    Args:
        latent_dim: K.
        context_dim: size of the context.
        hidden_dims: sizes of the hidden layers, none smaller than K.
        sizes: how many numbers each parameter of a coordinate has; all ones drop that dimension.
        reverse: whether the last coordinate comes first.

    Returns (when called with ``u`` of shape ``(*batch, K)`` and ``context`` of shape ``(*batch, context_dim)``):
        a tuple of parameters, each of shape ``(*batch, size, K)`` or ``(*batch, K)``.
    """

    def __init__(
        self, latent_dim: int, context_dim: int, hidden_dims: Sequence[int], sizes: Sequence[int], reverse: bool
    ) -> None:
        super().__init__()
        if not hidden_dims or min(hidden_dims) < latent_dim:
            raise ValueError(f"Autoregressive hidden_dims must be at least {latent_dim}; found {tuple(hidden_dims)}.")
        self.latent_dim = latent_dim
        self.sizes = list(sizes)
        self.permutation = range(latent_dim)[:: -1 if reverse else 1]
        order = torch.arange(latent_dim).flip(0) if reverse else torch.arange(latent_dim)
        masks, _ = create_mask(latent_dim, context_dim, list(hidden_dims), cast(Any, order), sum(sizes))
        layers: list[nn.Module] = []
        for mask in masks:
            layers += [MaskedLinear(mask.shape[1], mask.shape[0], mask), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def get_permutation(self) -> range:
        """The order of the coordinates."""
        return self.permutation

    def forward(self, u: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        context = context.expand(*u.shape[:-1], context.shape[-1])
        parameters = self.layers(torch.cat([context, u.to(context.dtype)], dim=-1))
        parts = parameters.unflatten(-1, (-1, self.latent_dim)).split(self.sizes, dim=-2)
        return tuple(part.squeeze(-2) for part in parts) if set(self.sizes) == {1} else parts


def affine_autoregressive(
    latent_dim: int, context_dim: int, hidden_dims: Sequence[int], reverse: bool
) -> transforms.ConditionalAffineAutoregressive:
    """Shifts and scales each coordinate by a network of those before it and of a context."""
    network = Autoregressive(latent_dim, context_dim, hidden_dims, [1, 1], reverse)
    return transforms.ConditionalAffineAutoregressive(network)


# Splines


class _MaskedByWhere(TorchFunctionMode):
    """Inside, ``a[mask] = b[mask]`` is ``a = where(mask, b, a)``: no shape depends on what the mask holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _is_mask(args[1]):
            return args[0] if func is Tensor.__getitem__ else args[0].copy_(torch.where(args[1], args[2], args[0]))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


class _FixedShapes:
    """Pyro's splines pick out what lies beyond their bound, by a mask; a CUDA graph cannot."""

    def _call(self, x: Tensor) -> Tensor:
        with _MaskedByWhere():
            return super()._call(x)  # pyright: ignore[reportAttributeAccessIssue]

    def _inverse(self, y: Tensor) -> Tensor:
        with _MaskedByWhere():
            return super()._inverse(y)  # pyright: ignore[reportAttributeAccessIssue]


class _Spline(_FixedShapes, transforms.Spline):
    pass


class _SplineCoupling(_FixedShapes, transforms.SplineCoupling):
    pass


class _SplineAutoregressive(_FixedShapes, transforms.SplineAutoregressive):
    pass


class _ConditionalSplineAutoregressive(transforms.ConditionalSplineAutoregressive):
    def condition(self, context: Tensor) -> _SplineAutoregressive:
        return _SplineAutoregressive(self.input_dim, partial(self.nn, context=context), **self.kwargs)


def spline(latent_dim: int, bins: int, bound: float) -> transforms.Spline:
    """A spline for each coordinate. All splines here start as the identity, or near it; Pyro's start with spikes."""
    _check_spline(bins, bound)
    made = _Spline(latent_dim, bins, bound)
    _start_as_identity(made)
    return made


def spline_coupling(latent_dim: int, hidden_dims: Sequence[int], bins: int, bound: float) -> transforms.SplineCoupling:
    """A spline for each coordinate: for the second half those that a network of the first half chooses."""
    given, moved = latent_dim // 2, latent_dim - latent_dim // 2
    _check_spline(bins, bound)
    network = Parts(given, hidden_dims, [moved * int(size) for size in _spline_sizes(bins)])
    _start_near_identity(network.network, bins)
    made = _SplineCoupling(latent_dim, given, network, bins, bound)
    _start_as_identity(made.lower_spline)
    return made


def spline_autoregressive(
    latent_dim: int, context_dim: int, hidden_dims: Sequence[int], bins: int, bound: float, reverse: bool
) -> transforms.ConditionalSplineAutoregressive:
    """A spline for each coordinate, chosen by a network of those before it and of a context."""
    _check_spline(bins, bound)
    network = Autoregressive(latent_dim, context_dim, hidden_dims, _spline_sizes(bins), reverse)
    _start_near_identity(network.layers, bins)
    return _ConditionalSplineAutoregressive(latent_dim, network, count_bins=bins, bound=bound)


def _check_spline(bins: int, bound: float) -> None:
    if bins < 2 or not 0 < bound < math.inf:
        raise ValueError(f"A spline has two bins or more, between finite bounds; found {bins} and {bound:g}.")


def _spline_sizes(bins: int) -> list[int]:
    """The numbers of a rational linear spline: widths, heights, slopes between bins, and where each bin divides."""
    return [bins, bins, bins - 1, bins]


def _start_as_identity(spline: transforms.Spline) -> None:
    for parameter in (spline.unnormalized_widths, spline.unnormalized_heights, spline.unnormalized_lambdas):
        nn.init.zeros_(parameter)
    nn.init.constant_(spline.unnormalized_derivatives, SLOPE_OF_ONE)


def _start_near_identity(network: nn.Sequential, bins: int) -> None:
    """By the biases of the last layer, which the slopes are a part of."""
    bias = cast(Tensor, network[-1].bias).detach()
    each = len(bias) // sum(_spline_sizes(bins))
    bias.zero_().split([each * size for size in _spline_sizes(bins)])[2].fill_(SLOPE_OF_ONE)
