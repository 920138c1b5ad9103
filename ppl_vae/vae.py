"""The variational autoencoder: two short Pyro programs, how an observation is made and how its latent is guessed."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule, pyro_method
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.priors import Fixed


class VAE(PyroModule):
    r"""Latent-variable model :math:`p(z)\,p(x \mid z)` with amortized guide :math:`q(z \mid x)`.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114. Both stories are ordinary Pyro programs: ``pyro.infer.SVI``,
    ``Predictive``, ``Importance``, ``NUTS`` and ``poutine`` take them as they are.

    Args:
        prior: ``prior()`` returns p(z); or p(z) itself, a Pyro distribution that is then held as
            :class:`ppl_vae.priors.Fixed`.
        decoder: ``decoder(z)`` returns p(x | z).
        encoder: ``encoder(x)`` returns q(z | x).

    >>> import torch
    >>> from ppl_vae import likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 64, (1, 28, 28))),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp((1, 28, 28), 64, 4)),
    ... )
    >>> vae.model(num_observations=3).shape
    torch.Size([3, 1, 28, 28])
    >>> vae.guide(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        prior: Callable[[], dist.TorchDistribution] | dist.TorchDistribution,
        decoder: Callable[..., dist.TorchDistribution],
        encoder: Callable[..., dist.TorchDistribution],
    ) -> None:
        super().__init__()
        self.prior = Fixed(prior) if isinstance(prior, Distribution) else prior
        self.decoder = decoder
        self.encoder = encoder

    @pyro_method
    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        r"""Tells :math:`z_n \sim p(z)`, then :math:`x_n \sim p(x \mid z_n)`."""
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decoder(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid x_n)`."""
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self.encoder(x))
