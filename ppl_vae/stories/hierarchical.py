"""A story of several layers: a latent is made from a latent above it, and the lowest one makes the observation."""

from collections.abc import Sequence

import pyro
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn


class HierarchicalVAE(PyroModule):
    r"""Latent-variable model :math:`p(z_L)\, p(z_{L-1} \mid z_L) \cdots p(z_1 \mid z_2)\, p(x \mid z_1)` whose guide
    climbs back, :math:`q(z_1 \mid x)\, q(z_2 \mid z_1) \cdots q(z_L \mid z_{L-1})`.

    Rezende, Mohamed & Wierstra 2014, https://arxiv.org/abs/1401.4082; with this guide Burda, Grosse & Salakhutdinov
    2016, https://arxiv.org/abs/1509.00519. The sites are ``z1`` (next to x) to ``zL``. A layer is a likelihood of the
    latent below, or a posterior family used as one: a normal with independent dimensions is
    ``posteriors.DiagonalNormal(network)`` as well as ``likelihoods.Normal(loc=network, scale=...)``.

    Args:
        prior: ``prior()`` returns p(z_L).
        layers: from the top down, each a module that returns p(z_l | z_{l+1}): L - 1 of them.
        decoder: ``decoder(z_1)`` returns p(x | z_1).
        encoders: from x up, modules that return q(z_1 | x), q(z_2 | z_1), ...: L of them.

    Raises:
        ValueError: when there is not one encoder more than there are layers.

    >>> import torch
    >>> from ppl_vae import likelihoods, posteriors, priors
    >>> from ppl_vae.networks import mlp
    >>> story = HierarchicalVAE(
    ...     prior=priors.StandardNormal(2),
    ...     layers=[posteriors.DiagonalNormal(mlp(2, 32, 2 * 8))],
    ...     decoder=likelihoods.Bernoulli(mlp(8, 64, (1, 28, 28))),
    ...     encoders=[
    ...         posteriors.DiagonalNormal(mlp((1, 28, 28), 64, 2 * 8)),
    ...         posteriors.DiagonalNormal(mlp(8, 32, 2 * 2)),
    ...     ],
    ... )
    >>> story.model(num_observations=3).shape
    torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self, prior: nn.Module, layers: Sequence[nn.Module], decoder: nn.Module, encoders: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        if len(encoders) != len(layers) + 1:
            raise ValueError(
                f"{len(layers)} layers and a prior make {len(layers) + 1} latents, each with an encoder of its own; "
                f"found {len(encoders)} encoders."
            )
        self.prior = prior
        self.layers = nn.ModuleList(layers)
        self.decoder = decoder
        self.encoders = nn.ModuleList(encoders)

    @pyro_method
    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        r"""Tells :math:`z_L \sim p(z_L)`, then every :math:`z_l \sim p(z_l \mid z_{l+1})`, then
        :math:`x \sim p(x \mid z_1)`."""
        top = len(self.encoders)
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample(f"z{top}", self.prior())
            for number, layer in zip(range(top - 1, 0, -1), self.layers, strict=True):
                z = pyro.sample(f"z{number}", layer(z))
            return pyro.sample("x", self.decoder(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> Tensor:
        r"""Guesses :math:`z_1 \sim q(z_1 \mid x)`, then every :math:`z_{l+1} \sim q(z_{l+1} \mid z_l)`."""
        z = x
        with pyro.plate("observations", len(x)):
            for number, encoder in enumerate(self.encoders, start=1):
                z = pyro.sample(f"z{number}", encoder(z))
        return z
