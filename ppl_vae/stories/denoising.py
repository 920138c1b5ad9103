"""A story whose guide learns from noisy observations."""

from collections.abc import Callable

import pyro
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn


class DenoisingVAE(PyroModule):
    r"""The model of a VAE, :math:`p(z)\,p(x \mid z)`, with a guide that trains on corrupted observations,
    :math:`q(z \mid \tilde x)` with :math:`\tilde x \sim p(\tilde x \mid x)`.

    Im, Ahn, Memisevic & Bengio 2017, https://arxiv.org/abs/1511.06406. The observation that is scored stays clean, so
    that for every corruption the training objective is a lower bound on its evidence, :math:`\log p(x) \ge
    \mathbb{E}_{p(\tilde x \mid x)}\, \mathbb{E}_{q(z \mid \tilde x)} \log \frac{p(x, z)}{q(z \mid \tilde x)}`. In
    eval mode the guide sees x as it is, and the story is a VAE of the same parts.

    Args:
        prior: ``prior()`` returns p(z).
        decoder: ``decoder(z)`` returns p(x | z).
        encoder: ``encoder(x)`` returns q(z | x).
        corrupt: ``corrupt(x)`` returns a noisy x of the same shape, such as ``nn.Dropout(0.2)``. It draws its random
            numbers from torch's global generator, as ``torch.randn_like`` does, so that ``fit`` seeds them.

    >>> import torch
    >>> from ppl_vae import likelihoods, posteriors, priors
    >>> from ppl_vae.networks import mlp
    >>> story = DenoisingVAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(mlp(2, 64, (1, 28, 28))),
    ...     encoder=posteriors.DiagonalNormal(mlp((1, 28, 28), 64, 4)),
    ...     corrupt=lambda x: x + 0.3 * torch.randn_like(x),
    ... )
    >>> story.guide(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module, corrupt: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.corrupt = corrupt

    @pyro_method
    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        r"""Tells :math:`z_n \sim p(z)`, then :math:`x_n \sim p(x \mid z_n)`."""
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decoder(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid \tilde x_n)`, in training from a corrupted :math:`\tilde x_n`."""
        seen = self.corrupt(x) if self.training else x
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self.encoder(seen))
