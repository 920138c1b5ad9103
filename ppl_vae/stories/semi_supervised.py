"""A story of labelled observations, most of whose labels are unknown."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ppl_vae.stories.components import responsibilities

# The log probability of a label that is not the class: exp of it is zero, and its gradients are finite.
IMPOSSIBLE = -1e30


class SemiSupervisedVAE(PyroModule):
    r"""Latent-variable model :math:`p(c)\,p(z)\,p(x \mid z, c)` with amortized guide :math:`q(z \mid x)`, where the
    class c is summed out, and a label y says for some observations what it is.

    Kingma, Rezende, Mohamed & Welling 2014, https://arxiv.org/abs/1406.5298, without their classifier
    :math:`q(c \mid x)`: the sum over classes is exact, and Bayes' rule classifies. The evidence is
    :math:`\log p(x, y)` for the rows whose label is known, and :math:`\log p(x) = \log \sum_c p(x, c)` for others.
    It is the evidence that is trained, not the share of right labels: where z tells digits apart as well as c does, a
    few labels leave the class free to mean something else.

    Args:
        prior: ``prior()`` returns p(z).
        decoder: ``decoder(z, c)`` returns p(x | z, c).
        encoder: ``encoder(x)`` returns q(z | x).
        num_labels: L; labels are the integers from 0 to L - 1, and -1 where unknown. The probabilities of the classes
            are learned, and start even.

    >>> import torch
    >>> from ppl_vae import likelihoods, posteriors, priors
    >>> from ppl_vae.networks import WithLabels, mlp
    >>> story = SemiSupervisedVAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(WithLabels(mlp(2 + 10, 64, (1, 28, 28)), num_labels=10)),
    ...     encoder=posteriors.DiagonalNormal(mlp((1, 28, 28), 64, 4)),
    ...     num_labels=10,
    ... )
    >>> x, y = torch.zeros(3, 1, 28, 28), torch.tensor([7, -1, -1])
    >>> story.model(x, y).shape
    torch.Size([3, 1, 28, 28])
    >>> story.classify(x).shape
    torch.Size([3, 10])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.logits = nn.Parameter(torch.zeros(num_labels))

    @pyro_method
    def model(self, x: Tensor | None = None, y: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        r"""Tells :math:`c_n \sim p(c)` and :math:`z_n \sim p(z)`, then :math:`x_n \sim p(x \mid z_n, c_n)`, and
        :math:`y_n = c_n` where it is known."""
        with pyro.plate("observations", num_observations if x is None else len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            z = pyro.sample("z", self.prior())
            if y is not None:
                pyro.sample("y", self._label(c).mask(y >= 0), obs=y.clamp(min=0))
            return pyro.sample("x", self.decoder(z, c), obs=x)

    def _label(self, c: Tensor) -> dist.TorchDistribution:
        r"""The label of a class, :math:`p(y \mid c) = [y = c]`."""
        return dist.Categorical(logits=IMPOSSIBLE * (1 - one_hot(c, len(self.logits)).to(self.logits)))

    @pyro_method
    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid x_n)`, whatever the label; the class is summed out."""
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self.encoder(x))

    def classify(self, x: Tensor, num_particles: int = 100, seed: int = 0) -> Tensor:
        r"""The class of each observation by Bayes' rule, :math:`p(c \mid x_n)`, shape ``(N, L)``; see
        :func:`ppl_vae.stories.responsibilities`."""
        return responsibilities(self, x, num_particles=num_particles, seed=seed)
