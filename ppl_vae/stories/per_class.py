"""A story with a prior of its own for each label: a different z for each digit."""

import pyro
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn


class PerClassVAE(PyroModule):
    r"""Latent-variable model :math:`p(z \mid y)\,p(x \mid z)` with amortized guide :math:`q(z \mid x)`.

    The label moves the latent, and x knows of it through z alone. The evidence of this story is
    :math:`\log p(x \mid y)`. With the label unknown, :class:`ppl_vae.priors.PerClass` is the even mixture of what it is
    for each label, and the same parts make an ordinary VAE, whose evidence is
    :math:`\log p(x) = \log \frac1L \sum_y p(x \mid y)`.

    Args:
        prior: ``prior(y)`` returns p(z | y).
        decoder: ``decoder(z)`` returns p(x | z).
        encoder: ``encoder(x)`` returns q(z | x).

    >>> import torch
    >>> from ppl_vae import VAE, likelihoods, posteriors, priors
    >>> from ppl_vae.networks import mlp
    >>> story = PerClassVAE(
    ...     prior=priors.PerClass(2, num_labels=10),
    ...     decoder=likelihoods.Bernoulli(mlp(2, 64, (1, 28, 28))),
    ...     encoder=posteriors.DiagonalNormal(mlp((1, 28, 28), 64, 4)),
    ... )
    >>> story.model(y=torch.arange(10)).shape
    torch.Size([10, 1, 28, 28])
    >>> without_label = VAE(story.prior, story.decoder, story.encoder)
    >>> without_label.model(num_observations=10).shape
    torch.Size([10, 1, 28, 28])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder

    @pyro_method
    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        r"""Tells :math:`z_n \sim p(z \mid y_n)`, then :math:`x_n \sim p(x \mid z_n)`, one for each label."""
        if y is None:
            raise TypeError("This story needs the label of each observation: model(y=labels), or model(x, labels).")
        with pyro.plate("observations", len(y)):
            z = pyro.sample("z", self.prior(y))
            return pyro.sample("x", self.decoder(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid x_n)`, whatever the label."""
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self.encoder(x))
