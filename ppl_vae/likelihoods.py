"""Likelihoods: modules that return p(x | z), the distribution of an observation given its latent.

Networks return unconstrained values; the likelihood maps them. Everything a likelihood is called with goes to its
networks, so ``decoder(z, y)`` calls ``network(z, y)``. The latent comes first and is a vector; whatever dimensions the
network adds to it belong to the event.
"""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Bernoulli(nn.Module):
    r"""Independent coins, :math:`p(x \mid z) = \prod_d \theta_d^{x_d} (1 - \theta_d)^{1 - x_d}` with
    :math:`\operatorname{logit} \theta = f(z)`.

    A distribution over the numbers 0 and 1 (counting measure). Grey levels between them are not observations of it.

    Args:
        logits: network from ``(N, K)`` to ``(N, *event)``.

    >>> from ppl_vae.networks import mlp
    >>> p = Bernoulli(mlp(2, 64, (1, 28, 28)))(torch.zeros(7, 2))
    >>> p.batch_shape, p.event_shape
    (torch.Size([7]), torch.Size([1, 28, 28]))
    """

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        logits = self.logits(z, *conditions)
        return dist.Bernoulli(logits=logits).to_event(logits.dim() - z.dim() + 1)


class Normal(nn.Module):
    r"""Independent normals, :math:`p(x \mid z) = \prod_d \mathcal{N}(x_d; f_d(z), \sigma_d^2)`.

    A density with respect to Lebesgue measure, in the units of the data: rescaling x by c moves log p by D log c. With
    a free scale the likelihood has no upper bound (Mattei & Frellsen 2018, https://arxiv.org/abs/1802.04826), so
    learned and predicted scales stay above ``floor``; :func:`share_on_floor` tells how many of them reached it.

    Args:
        loc: network from ``(N, K)`` to ``(N, *event)``.
        scale: the standard deviation. A number or tensor is fixed; :func:`learned` starts from a value (one number, or
            one per dimension) and trains it; a module is a second network of z, whose output goes through softplus.
        floor: smallest standard deviation of a scale that trains.

    Raises:
        ValueError: when a fixed scale is not positive, or a learned one starts at or below the floor.

    >>> from ppl_vae.networks import mlp
    >>> fixed = Normal(loc=mlp(2, 64, 5), scale=0.1)
    >>> one_per_dimension = Normal(loc=mlp(2, 64, 5), scale=learned(torch.ones(5)))
    >>> heteroscedastic = Normal(loc=mlp(2, 64, 5), scale=mlp(2, 64, 5))
    >>> heteroscedastic(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, loc: nn.Module, scale: "float | Tensor | Learned | nn.Module", floor: float = 1e-3) -> None:
        super().__init__()
        self.loc = loc
        self.floor = floor
        self.scale = _scale(scale, floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        loc = self.loc(z, *conditions)
        return dist.Normal(loc, self.scale(z, *conditions)).to_event(loc.dim() - z.dim() + 1)


@dataclass(frozen=True)
class Learned:
    """A positive value to start from and to train; made by :func:`learned`."""

    initial: Tensor


def learned(initial: float | Tensor) -> Learned:
    """Marks a scale as a parameter that starts at ``initial``: one number, or a tensor with one per dimension.

    >>> learned(0.5)
    Learned(initial=tensor(0.5000))
    """
    return Learned(torch.as_tensor(initial, dtype=torch.get_default_dtype()))


def share_on_floor(likelihood: Normal, z: Tensor, *conditions: Tensor) -> float:
    """The share of scales, over observations and dimensions, within 1 % of the likelihood's floor.

    >>> from ppl_vae.networks import mlp
    >>> share_on_floor(Normal(mlp(2, 5), scale=learned(0.5)), torch.zeros(7, 2))
    0.0
    """
    scale = likelihood.scale(z, *conditions)
    return (scale <= 1.01 * likelihood.floor).float().mean().item()


class _FixedScale(nn.Module):
    """A number, whatever z is."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *z: Tensor) -> Tensor:
        return self.value


class _LearnedScale(nn.Module):
    """A parameter kept above a floor, whatever z is."""

    def __init__(self, initial: Tensor, floor: float) -> None:
        super().__init__()
        self.floor = floor
        excess = initial - floor
        self.unconstrained = nn.Parameter(excess + torch.log(-torch.expm1(-excess)))  # the inverse of softplus

    def forward(self, *z: Tensor) -> Tensor:
        return self.floor + softplus(self.unconstrained)


class _PredictedScale(nn.Module):
    """A network's output kept above a floor."""

    def __init__(self, network: nn.Module, floor: float) -> None:
        super().__init__()
        self.network = network
        self.floor = floor

    def forward(self, *z: Tensor) -> Tensor:
        return self.floor + softplus(self.network(*z))


def _scale(scale: float | Tensor | Learned | nn.Module, floor: float) -> nn.Module:
    if isinstance(scale, nn.Module):
        return _PredictedScale(scale, floor)
    if isinstance(scale, Learned):
        if not _holds(scale.initial > floor):
            raise ValueError(f"A learned scale must start above its floor {floor:g}; found {scale.initial.min():g}.")
        return _LearnedScale(scale.initial, floor)
    value = torch.as_tensor(scale, dtype=torch.get_default_dtype())
    if not _holds(value > 0):
        raise ValueError(f"A scale is a standard deviation and must be positive; found {value.min():g}.")
    return _FixedScale(value)


def _holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; on the meta device, where a story is rebuilt, there is nothing to ask."""
    return condition.is_meta or bool(condition.all())
