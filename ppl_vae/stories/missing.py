"""A story of observations with holes: some of their values are missing, at random."""

from functools import singledispatch

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from ppl_vae import checks, noise, traces
from ppl_vae.distributions import Columns


class MissingValuesVAE(PyroModule):
    r"""Latent-variable model :math:`p(z) \prod_{d \text{ observed}} p(x_d \mid z)` with amortized guide
    :math:`q(z \mid x_{\text{obs}})`.

    For values that are missing at random: whether one is, may depend on those that are there, and not on itself. The
    evidence is :math:`\log p(x_{\text{obs}})`, the log of the integral of the above over z, a number of other units
    for rows with other holes. Mattei & Frellsen 2019, https://arxiv.org/abs/1812.02633; for tables of several kinds of
    columns Nazabal et al. 2018, https://arxiv.org/abs/1807.03653.

    Both programs take x and a mask of its shape, True where a value was observed; what x holds elsewhere does not
    matter, and may be NaN.

    Args:
        prior: ``prior()`` returns p(z).
        decoder: ``decoder(z)`` returns p(x | z), independent over dimensions (``Independent`` of a distribution of
            single numbers, or :class:`ppl_vae.likelihoods.ByColumn` of such).
        encoder: returns q(z | x_obs) of the filled values and the mask, one behind the other in the first dimension of
            an observation: a row of ``2 D`` numbers, or an image with twice as many channels.
        fill: stands in the place of a missing value, a number or one for each dimension; it has no effect on the
            evidence, and must be in the support of the likelihood (above 0 for a LogNormal).

    Raises:
        TypeError: when the model runs with a likelihood that is not independent over dimensions.

    >>> from ppl_vae import likelihoods, posteriors, priors
    >>> from ppl_vae.networks import mlp
    >>> story = MissingValuesVAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Normal(loc=mlp(2, 32, 5), scale=likelihoods.learned(1.0)),
    ...     encoder=posteriors.DiagonalNormal(mlp(2 * 5, 32, 4)),
    ... )
    >>> x = torch.randn(3, 5)
    >>> x[0, 1] = torch.nan
    >>> story.impute(x, ~x.isnan(), num_draws=20).shape
    torch.Size([20, 3, 5])
    """

    fill: Tensor

    def __init__(self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module, fill: float | Tensor = 0.0) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.register_buffer("fill", torch.as_tensor(fill, dtype=torch.get_default_dtype()))

    @pyro_method
    def model(self, x: Tensor | None = None, mask: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        r"""Tells :math:`z_n \sim p(z)`, then :math:`x_{nd} \sim p(x_d \mid z_n)` for the dimensions that are observed;
        for all of them without x."""
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            if x is None:
                return pyro.sample("x", self.decoder(z))
            if mask is None:
                raise TypeError("This story needs to know which values are there: model(x, mask), True where observed.")
            return pyro.sample("x", observed(self.decoder(z), mask), obs=torch.where(mask, x, self.fill))

    @pyro_method
    def guide(self, x: Tensor, mask: Tensor) -> Tensor:
        r"""Guesses :math:`z_n \sim q(z \mid x_{n,\text{obs}})`."""
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", self._encoded(x, mask))

    def _encoded(self, x: Tensor, mask: Tensor) -> dist.TorchDistribution:
        filled = torch.where(mask, x, self.fill)
        return self.encoder(torch.cat([filled, mask.to(filled)], dim=1))

    def impute(self, x: Tensor, mask: Tensor, num_draws: int = 1, num_particles: int = 1000, seed: int = 0) -> Tensor:
        r"""Draws of :math:`p(x_{\text{missing}} \mid x_{\text{obs}})`; what was observed stays.

        A latent is chosen among draws of the guide with probabilities proportional to
        :math:`p(x_{\text{obs}}, z_s) / q(z_s \mid x_{\text{obs}})` (sampling importance resampling: Rubin 1987), and
        makes the missing values.

        Args:
            x: observations, shape ``(N, *event)``.
            mask: of the same shape, True where observed.
            num_draws: M, how many imputations; all of them choose among the same particles.
            num_particles: draws of the guide for each observation.
            seed: rules the draws.

        Returns:
            Observations without holes, shape ``(M, N, *event)``.
        """
        checks.dry_run(self, x, mask)
        x, mask = traces.to_story(self, (x, mask))
        with noise.unit(x.device, seed, noise.Purpose.PREDICTIVE), traces.scoring(self):
            p, q, x = self.prior(), self._encoded(x, mask), torch.where(mask, x, self.fill)
            z = q.sample(torch.Size([num_particles]))
            log_likelihood = torch.stack([observed(self.decoder(z_s), mask).log_prob(x) for z_s in z])
            log_weights = p.log_prob(z) + log_likelihood - q.log_prob(z)
            chosen = dist.Categorical(logits=log_weights.T).sample(torch.Size([num_draws]))
            latents = z[chosen, torch.arange(len(x), device=x.device)]
            return torch.stack([torch.where(mask, x, self.decoder(z_n).sample()) for z_n in latents])


@singledispatch
def observed(p: dist.TorchDistribution, mask: Tensor) -> dist.TorchDistribution:
    r"""The factors of the observed dimensions, :math:`\prod_{d \text{ observed}} p(x_d)`, of a product over all.

    Args:
        p: an ``Independent`` of a distribution of single numbers, or :class:`ppl_vae.distributions.Columns` of such.
        mask: shape ``(N, *event)``.

    Raises:
        TypeError: when p is no such product.

    >>> p = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> observed(p, torch.tensor([True, False, False])).log_prob(torch.zeros(3))
    tensor(-0.9189)
    """
    raise TypeError(
        f"Values can be left out of a product over dimensions; found {type(p).__name__}. Use a likelihood that is "
        "independent over dimensions, or ByColumn of such."
    )


@observed.register
def _(p: dist.Independent, mask: Tensor) -> dist.TorchDistribution:
    if p.base_dist.event_dim:
        return observed(p.base_dist, mask).to_event(p.reinterpreted_batch_ndims)
    return p.base_dist.mask(mask).to_event(p.reinterpreted_batch_ndims)


@observed.register
def _(p: Columns, mask: Tensor) -> dist.TorchDistribution:
    parts = zip(p.parts, mask.split(p.widths, -1), strict=True)
    return Columns([observed(part, m) if part.event_dim else part.mask(m.squeeze(-1)) for part, m in parts])
