"""A story with a condition: how an observation is made when something about it, y, is already known."""

import pyro
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn


class ConditionalVAE(PyroModule):
    r"""Latent-variable model :math:`p(z)\,p(x \mid z, y)` with amortized guide :math:`q(z \mid x, y)`.

    Sohn, Lee & Yan 2015, Learning structured output representation using deep conditional generative models. The
    evidence of this story is :math:`\log p(x \mid y)`.

    Args:
        prior: ``prior()`` returns p(z).
        decoder: ``decoder(z, y)`` returns p(x | z, y).
        encoder: ``encoder(x, y)`` returns q(z | x, y).

    >>> import torch
    >>> from ppl_vae import likelihoods, networks, posteriors, priors
    >>> from ppl_vae.networks import WithLabels, mlp
    >>> story = ConditionalVAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(WithLabels(mlp(2 + 10, 64, (1, 28, 28)), num_labels=10)),
    ...     encoder=posteriors.DiagonalNormal(WithLabels(mlp(784 + 10, 64, 4), num_labels=10)),
    ... )
    >>> story.model(y=torch.arange(10)).shape
    torch.Size([10, 1, 28, 28])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder

    @pyro_method
    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        r"""Tells :math:`z_n \sim p(z)`, then :math:`x_n \sim p(x \mid z_n, y_n)`, one for each label."""
        if y is None:
            raise TypeError("A conditional story needs its condition: model(y=labels), or model(x, labels).")
        with pyro.plate("observations", len(y)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decoder(z, y), obs=x)

    @pyro_method
    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid x_n, y_n)`."""
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self.encoder(x, y))
