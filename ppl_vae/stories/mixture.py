"""A story of several kinds of observations, where nobody says which kind one is."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from ppl_vae.stories.components import responsibilities


class MixtureVAE(PyroModule):
    r"""Latent-variable model :math:`p(c)\,p(z \mid c)\,p(x \mid z, c)` whose component c is summed out, with amortized
    guide :math:`q(z \mid x)`.

    As in Dilokthanakul et al. 2016, https://arxiv.org/abs/1611.02648, but no component is ever guessed: training and
    evidence use :math:`p(x, z) = \sum_c \pi_c\, p(z \mid c)\, p(x \mid z, c)`, exactly. Where x depends on c through z
    alone, ``VAE(prior=priors.MixtureOfNormals(...))`` is the same story.

    Args:
        prior: ``prior(c)`` returns p(z | c), for instance :class:`ppl_vae.priors.PerClass`.
        decoder: ``decoder(z, c)`` returns p(x | z, c).
        encoder: ``encoder(x)`` returns q(z | x).
        components: C, how many there are; their weights :math:`\pi` are learned, and start even.

    >>> import torch
    >>> from ppl_vae import likelihoods, posteriors, priors
    >>> from ppl_vae.networks import WithLabels, mlp
    >>> story = MixtureVAE(
    ...     prior=priors.PerClass(2, num_labels=5),
    ...     decoder=likelihoods.Bernoulli(WithLabels(mlp(2 + 5, 64, (1, 28, 28)), num_labels=5)),
    ...     encoder=posteriors.DiagonalNormal(mlp((1, 28, 28), 64, 4)),
    ...     components=5,
    ... )
    >>> story.model(num_observations=3).shape
    torch.Size([3, 1, 28, 28])
    >>> story.responsibilities(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 5])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module, components: int) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.logits = nn.Parameter(torch.zeros(components))

    @pyro_method
    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        r"""Tells :math:`c_n \sim \mathrm{Categorical}(\pi)`, then :math:`z_n \sim p(z \mid c_n)`, then
        :math:`x_n \sim p(x \mid z_n, c_n)`."""
        with pyro.plate("observations", num_observations if x is None else len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            z = pyro.sample("z", self.prior(c))
            return pyro.sample("x", self.decoder(z, c), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid x_n)`; the component is summed out."""
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self.encoder(x))

    def responsibilities(self, x: Tensor, num_particles: int = 100, seed: int = 0) -> Tensor:
        r"""The component of each observation, :math:`p(c \mid x_n)`, shape ``(N, C)``; see
        :func:`ppl_vae.stories.responsibilities`."""
        return responsibilities(self, x, num_particles=num_particles, seed=seed)
