"""Posterior families: modules that return q(z | x), the guide's guess of the latent behind an observation.

Any callable that returns a Pyro distribution of z for each x is one.
"""

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import softplus

from ppl_vae import distributions, flows, mixtures
from ppl_vae.templates import Template

FLOOR = 1e-4


class DiagonalNormal(nn.Module):
    r"""Independent normals, :math:`q(z \mid x) = \prod_k \mathcal{N}(z_k; \mu_k(x), \sigma_k(x)^2)`.

    The scale is ``softplus`` of the network's second half plus a floor, so that it stays positive and finite.

    Args:
        network: maps an observation (and whatever conditions the story hands on) to ``num_parameters(K)`` numbers:
            locations first, then unconstrained scales.
        floor: smallest standard deviation.

    Returns (when called with ``x`` of shape ``(N, *event)``):
        a distribution with batch shape ``(N,)`` and event shape ``(K,)``.

    >>> import torch
    >>> from ppl_vae.networks import mlp
    >>> encoder = DiagonalNormal(mlp((1, 28, 28), 64, DiagonalNormal.num_parameters(2)))
    >>> q = encoder(torch.zeros(7, 1, 28, 28))
    >>> q.batch_shape, q.event_shape
    (torch.Size([7]), torch.Size([2]))
    """

    def __init__(self, network: nn.Module, floor: float = FLOOR) -> None:
        super().__init__()
        self.network = network
        self.floor = distributions.checked_floor(floor)

    @staticmethod
    def num_parameters(latent_dim: int) -> int:
        """Numbers that the network must return for a latent of this size."""
        return 2 * latent_dim

    def forward(self, *x: object) -> dist.TorchDistribution:
        loc, unconstrained = self.network(*x).chunk(2, dim=-1)
        return dist.Normal(loc, self.floor + softplus(unconstrained)).to_event(1)


class FullNormal(nn.Module):
    r"""A normal whose dimensions depend on each other, :math:`q(z \mid x) = \mathcal{N}(z; \mu(x), L(x) L(x)^\top)`.

    L is lower triangular, its diagonal ``softplus`` of numbers of the network plus a floor.

    Args:
        network: maps an observation (and whatever conditions the story hands on) to ``num_parameters(K)`` numbers:
            locations first, then the unconstrained diagonal of L, then what is below it, row by row.
        floor: smallest entry of the diagonal.

    Returns (when called with ``x`` of shape ``(N, *event)``):
        a distribution with batch shape ``(N,)`` and event shape ``(K,)``.

    Raises:
        ValueError: when the network returns another number of numbers than any K asks for.

    >>> import torch
    >>> from ppl_vae.networks import mlp
    >>> encoder = FullNormal(mlp((1, 28, 28), 64, FullNormal.num_parameters(2)))
    >>> encoder(torch.zeros(7, 1, 28, 28)).covariance_matrix.shape
    torch.Size([7, 2, 2])
    """

    def __init__(self, network: nn.Module, floor: float = FLOOR) -> None:
        super().__init__()
        self.network = network
        self.floor = distributions.checked_floor(floor)

    @staticmethod
    def num_parameters(latent_dim: int) -> int:
        """Numbers that the network must return for a latent of this size."""
        return 2 * latent_dim + latent_dim * (latent_dim - 1) // 2

    def forward(self, *x: object) -> dist.TorchDistribution:
        output: Tensor = self.network(*x)
        latent_dim = (math.isqrt(9 + 8 * output.shape[-1]) - 3) // 2
        _check_size("FullNormal", output, self.num_parameters(latent_dim))
        loc, diagonal, below = output.split([latent_dim, latent_dim, output.shape[-1] - 2 * latent_dim], dim=-1)
        scale_tril = torch.diag_embed(self.floor + softplus(diagonal))
        row, column = torch.tril_indices(latent_dim, latent_dim, -1, device=output.device)
        scale_tril[..., row, column] = below
        return distributions.MultivariateNormal(loc, scale_tril=scale_tril)


class MixtureOfNormals(nn.Module):
    r"""A mixture, :math:`q(z \mid x) = \sum_c \pi_c(x) \prod_k \mathcal{N}(z_k; \mu_{ck}(x), \sigma_{ck}(x)^2)`.

    Its draws have gradients, by implicit reparameterization (Figurnov, Mohamed & Mnih 2018,
    https://arxiv.org/abs/1805.08498). They are large in the gap between components that are far apart: clip them.

    Args:
        network: maps an observation (and whatever conditions the story hands on) to ``num_parameters(K, C)`` numbers:
            C unnormalized log weights first, then C times K locations, then unconstrained scales.
        components: C, how many there are.
        floor: smallest standard deviation.

    Returns (when called with ``x`` of shape ``(N, *event)``):
        a distribution with batch shape ``(N,)`` and event shape ``(K,)``.

    Raises:
        ValueError: when the network returns another number of numbers than any K asks for.

    >>> import torch
    >>> from ppl_vae.networks import mlp
    >>> encoder = MixtureOfNormals(mlp((1, 28, 28), 64, MixtureOfNormals.num_parameters(2, 5)), components=5)
    >>> encoder(torch.zeros(7, 1, 28, 28)).event_shape
    torch.Size([2])
    """

    def __init__(self, network: nn.Module, components: int, floor: float = FLOOR) -> None:
        super().__init__()
        self.network = network
        if components < 1:
            raise ValueError(f"components must be at least 1; found {components}.")
        self.components = components
        self.floor = distributions.checked_floor(floor)

    @staticmethod
    def num_parameters(latent_dim: int, components: int) -> int:
        """Numbers that the network must return for a latent of this size."""
        return components * (1 + 2 * latent_dim)

    def forward(self, *x: object) -> dist.TorchDistribution:
        output: Tensor = self.network(*x)
        latent_dim = (output.shape[-1] // self.components - 1) // 2
        _check_size("MixtureOfNormals", output, self.num_parameters(latent_dim, self.components))
        logits, normals = output.split([self.components, 2 * latent_dim * self.components], dim=-1)
        loc, unconstrained = normals.unflatten(-1, (2, self.components, latent_dim)).unbind(-3)
        return mixtures.normals(logits, loc, self.floor + softplus(unconstrained))


class Flow(nn.Module):
    r"""A conditional normalizing flow, :math:`z = \mu(x) + \sigma(x) \odot g(u; h(x))` with
    :math:`u \sim \mathcal{N}(0, I)`.

    The network returns the context h as well as location and scale. They come last, so that g has only the form of
    the posterior to find: without transforms this is :class:`DiagonalNormal`.

    Args:
        network: maps an observation (and whatever conditions the story hands on) to ``num_parameters(K, H)`` numbers:
            locations first, then unconstrained scales, then the context h.
        latent_dim: K, the size of z.
        transforms: what g is composed of, first to last: those of :func:`inverse_autoregressive` or :func:`splines`,
            or any of ``pyro.distributions.transforms``, conditional or not, that map K numbers to K numbers.
        floor: smallest value of :math:`\sigma`.

    Returns (when called with ``x`` of shape ``(N, *event)``):
        a distribution with batch shape ``(N,)`` and event shape ``(K,)``.

    Raises:
        ValueError: when the network returns fewer numbers than location and scale need.

    >>> import torch
    >>> from ppl_vae.networks import mlp
    >>> network = mlp((1, 28, 28), 64, Flow.num_parameters(2, context_dim=8))
    >>> encoder = Flow(network, 2, inverse_autoregressive(2, context_dim=8))
    >>> encoder(torch.zeros(7, 1, 28, 28)).batch_shape
    torch.Size([7])
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        transforms: Sequence[Transform | ConditionalTransform],
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        self.network = network
        self.latent_dim = latent_dim
        self.transforms = nn.ModuleList(Template(transform) for transform in transforms)
        self.floor = distributions.checked_floor(floor)

    @staticmethod
    def num_parameters(latent_dim: int, context_dim: int) -> int:
        """Numbers that the network must return for a latent and a context of these sizes."""
        return 2 * latent_dim + context_dim

    def forward(self, *x: object) -> dist.TorchDistribution:
        output: Tensor = self.network(*x)
        context_dim = max(0, output.shape[-1] - 2 * self.latent_dim)
        _check_size("Flow", output, self.num_parameters(self.latent_dim, context_dim))
        loc, unconstrained, context = output.split([self.latent_dim, self.latent_dim, context_dim], dim=-1)
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        g = [transform() for transform in self.transforms]
        given_x = [part.condition(context) if isinstance(part, ConditionalTransform) else part for part in g]
        # It remembers its last point as the others do, or their inverses would be computed anew for every draw.
        to_z = transforms.AffineTransform(loc, self.floor + softplus(unconstrained), event_dim=1, cache_size=1)
        return flows.Transformed(base, [*given_x, to_z])


class Box(nn.Module):
    r"""Any posterior, taken to a box: :math:`z = a + (b - a) \odot \operatorname{sigmoid}(u)` with
    :math:`u \sim q(u \mid x)`. For a prior that lives there, :class:`ppl_vae.priors.Uniform`.

    Args:
        posterior: a posterior family, or any callable that returns the distribution of u.
        low: a, a number or a tensor of shape ``(K,)``.
        high: b, likewise.

    Returns (when called with ``x`` of shape ``(N, *event)``):
        a distribution with batch shape ``(N,)`` and event shape ``(K,)``.

    Raises:
        ValueError: when the box is empty.

    >>> import torch
    >>> from ppl_vae.networks import mlp
    >>> encoder = Box(DiagonalNormal(mlp((1, 28, 28), 64, 4)), low=-1.0, high=1.0)
    >>> z = encoder(torch.zeros(7, 1, 28, 28)).sample()
    >>> z.shape, bool((z.abs() < 1).all())
    (torch.Size([7, 2]), True)
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, posterior: Callable[..., dist.TorchDistribution], low: float | Tensor, high: float | Tensor
    ) -> None:
        super().__init__()
        self.posterior = posterior
        for name, end in zip(("low", "high"), flows.ends(low, high), strict=True):
            self.register_buffer(name, end.clone())

    def forward(self, *x: object) -> dist.TorchDistribution:
        to_box = [transforms.SigmoidTransform(cache_size=1), flows.ToBox(self.low, self.high)]
        return flows.Transformed(self.posterior(*x), to_box)


def inverse_autoregressive(
    latent_dim: int, context_dim: int, num_layers: int = 2, hidden_dims: Sequence[int] = (64, 64)
) -> list[ConditionalTransform]:
    """Each coordinate is shifted and scaled by a network of those before it and of the context.

    Kingma et al. 2016, https://arxiv.org/abs/1606.04934. A draw and its density take one pass; the density at any other
    point takes K of them.

    Args:
        latent_dim: K.
        context_dim: size of the context.
        num_layers: how many transforms; every second one goes through the coordinates backwards.
        hidden_dims: sizes of the hidden layers of each network, none smaller than K.

    >>> len(inverse_autoregressive(2, context_dim=8, num_layers=3))
    3
    """
    return [
        flows.affine_autoregressive(latent_dim, context_dim, hidden_dims, reverse=bool(layer % 2))
        for layer in range(num_layers)
    ]


def splines(
    latent_dim: int,
    context_dim: int,
    num_layers: int = 2,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 3.0,
) -> list[ConditionalTransform]:
    """Each coordinate goes through a monotonic rational spline that those before it and the context choose.

    Durkan, Bekasov, Murray & Papamakarios 2019, https://arxiv.org/abs/1906.04032; of linear over linear functions, as
    in Dolatabadi, Erfani & Leckie 2020, https://arxiv.org/abs/2001.05168. A draw and its density take one pass; the
    density at any other point takes K of them.

    Args:
        latent_dim: K.
        context_dim: size of the context.
        num_layers: how many transforms; every second one goes through the coordinates backwards.
        hidden_dims: sizes of the hidden layers of each network, none smaller than K.
        bins: pieces of a spline.
        bound: outside of ``[-bound, bound]`` a spline is the identity.

    >>> len(splines(2, context_dim=8))
    2
    """
    return [
        flows.spline_autoregressive(latent_dim, context_dim, hidden_dims, bins, bound, reverse=bool(layer % 2))
        for layer in range(num_layers)
    ]


def _check_size(family: str, output: Tensor, expected: int) -> None:
    if output.shape[-1] != expected:
        raise ValueError(
            f"The network of {family} returns {output.shape[-1]} numbers for each observation; that fits no size of z. "
            f"Ask {family}.num_parameters how many it needs."
        )
