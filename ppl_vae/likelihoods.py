"""Likelihoods: modules that return p(x | z), the distribution of an observation given its latent.

Networks return unconstrained values; the likelihood maps them. Everything a likelihood is called with goes to its
networks, so ``decoder(z, y)`` calls ``network(z, y)``. The latent comes first and is a vector; whatever dimensions the
network adds to it belong to the event.

A positive parameter, such as a scale, is a number or a tensor (fixed), :func:`learned` from a value on (one number, or
one per dimension), or a second network of z, whose output goes through softplus. What trains stays above a floor, so
that no density grows without bound.

Any other module that returns a Pyro distribution with one batch dimension per observation is a likelihood, too.
"""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import distributions

# A count's mean is exp(f(z)) up to this exponent, then grows linearly in f, so that it cannot overflow; and it is never
# zero, where a count that was seen would have no log probability.
LARGEST_EXPONENT = 10.0
SMALLEST_MEAN = 1e-6

SMALLEST_DF = 1.0
SMALLEST_SCALE_OF_BETA = 1e-4  # below, its log gammas overflow, or cancel
LARGEST_COUNT = 2**24  # the whole numbers that single precision tells apart


@dataclass(frozen=True)
class Learned:
    """A value to start from and to train; made by :func:`learned`."""

    initial: Tensor


# What a parameter may be given as.
Positive = float | Tensor | Learned | nn.Module
Probability = float | Tensor | Learned | nn.Module


def learned(initial: float | Tensor) -> Learned:
    """Marks a parameter as one that trains from ``initial`` on: one number, or a tensor with one per dimension.

    >>> learned(0.5)
    Learned(initial=tensor(0.5000))
    """
    return Learned(torch.as_tensor(initial, dtype=torch.get_default_dtype()))


# Numbers that are 0 or 1


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
        return _of_observations(dist.Bernoulli(logits=self.logits(z, *conditions)), z)


# Real numbers


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

    def __init__(self, loc: nn.Module, scale: Positive, floor: float = 1e-3) -> None:
        super().__init__()
        self.loc = loc
        self.floor = floor
        self.scale = _positive(scale, floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        return _of_observations(dist.Normal(self.loc(z, *conditions), self.scale(z, *conditions)), z)


class Laplace(nn.Module):
    r"""Independent Laplace distributions, :math:`p(x \mid z) = \prod_d \frac{1}{2 b_d} e^{-|x_d - f_d(z)| / b_d}`.

    Its median is f(z), so that the loss is the absolute error. A density over the real numbers (Lebesgue measure).

    Args:
        loc: network from ``(N, K)`` to ``(N, *event)``.
        scale: b, the mean absolute deviation; fixed, :func:`learned` or a network.
        floor: smallest scale that trains; without it the density has no upper bound.

    Raises:
        ValueError: when a fixed scale is not positive, or a learned one starts at or below the floor.

    >>> from ppl_vae.networks import mlp
    >>> Laplace(mlp(2, 64, 5), scale=learned(0.5))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, loc: nn.Module, scale: Positive, floor: float = 1e-3) -> None:
        super().__init__()
        self.loc = loc
        self.floor = floor
        self.scale = _positive(scale, floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        return _of_observations(dist.Laplace(self.loc(z, *conditions), self.scale(z, *conditions)), z)


class StudentT(nn.Module):
    r"""Independent Student-t distributions, which bear outliers: :math:`p(x \mid z) = \prod_d
    \frac{1}{\sigma_d}\, t_{\nu_d}\big((x_d - f_d(z)) / \sigma_d\big)`.

    A density over the real numbers (Lebesgue measure). Its mean exists for :math:`\nu > 1`, its variance for
    :math:`\nu > 2`; elsewhere they are NaN, or infinite.

    Args:
        loc: network from ``(N, K)`` to ``(N, *event)``.
        scale: :math:`\sigma`; fixed, :func:`learned` or a network.
        df: degrees of freedom :math:`\nu`; fixed, :func:`learned` or a network. Those that train stay above 1.
        floor: smallest scale that trains; without it the density has no upper bound.

    Raises:
        ValueError: when a fixed scale is not positive, a fixed df is below 0.2, or a learned one starts at or below its
            floor.

    >>> from ppl_vae.networks import mlp
    >>> StudentT(mlp(2, 64, 5), scale=learned(0.5), df=learned(5.0))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, loc: nn.Module, scale: Positive, df: Positive, floor: float = 1e-3) -> None:
        super().__init__()
        self.loc = loc
        self.floor = floor
        self.scale = _positive(scale, floor)
        self.df = _positive(df, SMALLEST_DF, "df", distributions.SMALLEST_DF_OF_DRAWS)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        parameters = (network(z, *conditions) for network in (self.df, self.loc, self.scale))
        return _of_observations(distributions.StudentT(*parameters), z)


class LogNormal(nn.Module):
    r"""Independent log-normals, :math:`p(x \mid z) = \prod_d \frac{1}{x_d} \mathcal{N}(\log x_d; f_d(z), \sigma_d^2)`.

    A density over the numbers above 0 (Lebesgue measure); an exact 0 is no observation of it.

    Args:
        loc: network from ``(N, K)`` to ``(N, *event)``, the mean of log x.
        scale: the standard deviation of log x; fixed, :func:`learned` or a network.
        floor: smallest scale that trains; without it the density has no upper bound.

    Raises:
        ValueError: when a fixed scale is not positive, or a learned one starts at or below the floor.

    >>> from ppl_vae.networks import mlp
    >>> LogNormal(mlp(2, 64, 5), scale=learned(0.5))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, loc: nn.Module, scale: Positive, floor: float = 1e-3) -> None:
        super().__init__()
        self.loc = loc
        self.floor = floor
        self.scale = _positive(scale, floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        return _of_observations(dist.LogNormal(self.loc(z, *conditions), self.scale(z, *conditions)), z)


# Numbers from 0 to 1


class ContinuousBernoulli(nn.Module):
    r"""Independent exponentials on the unit interval, :math:`p(x \mid z) = \prod_d \frac{\eta_d}{e^{\eta_d} - 1}\,
    e^{\eta_d x_d}` with :math:`\eta = \frac1\epsilon \tanh(\epsilon f(z))`.

    A density over the numbers from 0 to 1, both ends included (Lebesgue measure), for grey levels, which a Bernoulli
    does not have. The mean is not the sigmoid of the logit. At 0 and at 1 the density grows with the logit, without
    bound, so the logit stays below :math:`1 / \epsilon`. Loaiza-Ganem & Cunningham 2019,
    https://arxiv.org/abs/1907.06845.

    Args:
        logits: network from ``(N, K)`` to ``(N, *event)``.
        floor: :math:`\epsilon`, the shortest way on which the density may fall by a factor e.

    >>> from ppl_vae.networks import mlp
    >>> ContinuousBernoulli(mlp(2, 64, (1, 28, 28)))(torch.zeros(7, 2)).event_shape
    torch.Size([1, 28, 28])
    """

    def __init__(self, logits: nn.Module, floor: float = 1e-3) -> None:
        super().__init__()
        self.logits = logits
        if not floor > 0:
            raise ValueError(f"floor must be positive; found {floor:g}.")
        self.floor = distributions.checked_floor(floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        logits = torch.tanh(self.floor * self.logits(z, *conditions)) / self.floor
        return _of_observations(distributions.ContinuousBernoulli(logits=logits), z)


class Beta(nn.Module):
    r"""Independent beta distributions with one mode, :math:`p(x \mid z) = \prod_d \mathrm{Beta}(x_d;\,
    1 + m_d / s_d^2,\, 1 + (1 - m_d) / s_d^2)` with :math:`\operatorname{logit} m = f(z)`.

    A density over the numbers between 0 and 1 (Lebesgue measure); an exact 0 or 1 is no observation of it. The mode is
    m, and for small s the standard deviation is nearly :math:`s \sqrt{m (1 - m)}`; for large s the distribution is
    uniform. No parameter of Beta is below 1, so that the density is bounded at both ends, and by the floor elsewhere.

    Args:
        logits: network from ``(N, K)`` to ``(N, *event)``.
        scale: s; fixed, :func:`learned` or a network.
        floor: smallest scale that trains. Below 0.02 single precision leaves errors of more than 0.001 in log p.

    Raises:
        ValueError: when a fixed scale or the floor is below 0.0001, or a learned one starts at or below the floor.

    >>> from ppl_vae.networks import mlp
    >>> Beta(mlp(2, 64, 5), scale=learned(0.5))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, logits: nn.Module, scale: Positive, floor: float = 0.02) -> None:
        super().__init__()
        if floor < SMALLEST_SCALE_OF_BETA:
            raise ValueError(f"The floor of a beta's scale must be at least {SMALLEST_SCALE_OF_BETA:g}; found {floor}.")
        self.logits = logits
        self.floor = floor
        self.scale = _positive(scale, floor, smallest=SMALLEST_SCALE_OF_BETA)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        logits, precision = self.logits(z, *conditions), self.scale(z, *conditions) ** -2
        concentrations = (1 + torch.sigmoid(sign * logits) * precision for sign in (1, -1))
        return _of_observations(distributions.Beta(*concentrations), z)


# Grey levels


class DiscretizedLogistic(nn.Module):
    r"""Independent logistic distributions rounded to grey levels, :math:`P(x \mid z) = \prod_d
    \sigma\big(\frac{x_d + h - f_d(z)}{s_d}\big) - \sigma\big(\frac{x_d - h - f_d(z)}{s_d}\big)` with half a level
    :math:`h = \frac{1}{2 (\text{levels} - 1)}`.

    A probability of each of the numbers k / (levels - 1) from 0 to 1 (counting measure), for pixels as they were
    stored; the first and the last level hold the tails. Kingma et al. 2016, https://arxiv.org/abs/1606.04934.

    Args:
        loc: network from ``(N, K)`` to ``(N, *event)``, in units of the data.
        scale: s; fixed, :func:`learned` or a network.
        levels: how many grey levels there are, 256 for pixels of 8 bits.
        floor: smallest scale that trains; this one lets a single level of 256 have all the probability.

    Raises:
        ValueError: when there are less than two levels or more than 2^24, a fixed scale is not positive, or a learned
            one starts at or below the floor.

    >>> from ppl_vae.networks import mlp
    >>> DiscretizedLogistic(mlp(2, 64, (1, 28, 28)), scale=learned(0.1))(torch.zeros(7, 2)).event_shape
    torch.Size([1, 28, 28])
    """

    def __init__(self, loc: nn.Module, scale: Positive, levels: int = 256, floor: float = 1e-4) -> None:
        super().__init__()
        self.loc = loc
        self.levels = _checked_levels(levels)
        self.scale = _positive(scale, floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        loc, scale = self.loc(z, *conditions), self.scale(z, *conditions)
        return _of_observations(distributions.DiscretizedLogistic(loc, scale, self.levels), z)


class MixtureOfDiscretizedLogistics(nn.Module):
    r"""For each pixel a mixture of C logistic distributions rounded to grey levels, :math:`P(x \mid z) = \prod_d \sum_c
    \pi_{dc}(z)\, P_{dc}(x_d \mid z)` with :math:`\pi = \operatorname{softmax} f(z)` and P of
    :class:`DiscretizedLogistic`.

    A probability of each of the numbers k / (levels - 1) from 0 to 1 (counting measure). Salimans et al. 2017,
    https://arxiv.org/abs/1701.05517; colours are independent here, as all dimensions are given z.

    Args:
        logits: network from ``(N, K)`` to ``(N, *event, C)``, of the components' weights.
        loc: network from ``(N, K)`` to ``(N, *event, C)``, in units of the data.
        scale: fixed, :func:`learned` (one number, or a tensor of shape ``(C,)`` or ``(*event, C)``) or a network.
        levels: how many grey levels there are.
        floor: smallest scale that trains.

    Raises:
        ValueError: as for :class:`DiscretizedLogistic`.

    >>> from ppl_vae.networks import mlp
    >>> logits, loc = mlp(2, 64, (1, 28, 28, 5)), mlp(2, 64, (1, 28, 28, 5))
    >>> MixtureOfDiscretizedLogistics(logits, loc, scale=learned(0.1))(torch.zeros(7, 2)).event_shape
    torch.Size([1, 28, 28])
    """

    def __init__(
        self, logits: nn.Module, loc: nn.Module, scale: Positive, levels: int = 256, floor: float = 1e-4
    ) -> None:
        super().__init__()
        self.logits = logits
        self.loc = loc
        self.levels = _checked_levels(levels)
        self.scale = _positive(scale, floor)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        weights = dist.Categorical(logits=self.logits(z, *conditions))
        loc, scale = self.loc(z, *conditions), self.scale(z, *conditions)
        components = distributions.DiscretizedLogistic(loc, scale, self.levels)
        return _of_observations(dist.MixtureSameFamily(weights, components), z)


# Counts and classes


class Binomial(nn.Module):
    r"""Independent binomials, :math:`P(x \mid z) = \prod_d \binom{n_d}{x_d} \theta_d^{x_d} (1 - \theta_d)^{n_d - x_d}`
    with :math:`\operatorname{logit} \theta = f(z)`.

    A probability of the whole numbers from 0 to n (counting measure): successes among n.

    Args:
        logits: network from ``(N, K)`` to ``(N, *event)``.
        total_count: n, one number or one per dimension.

    Raises:
        ValueError: when n is not a positive whole number up to 16,777,216.

    >>> from ppl_vae.networks import mlp
    >>> Binomial(mlp(2, 64, 5), total_count=10)(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    total_count: Tensor

    def __init__(self, logits: nn.Module, total_count: int | Tensor) -> None:
        super().__init__()
        self.logits = logits
        held = min(total_count, 2 * LARGEST_COUNT) if isinstance(total_count, int) else total_count
        count = torch.as_tensor(held, dtype=torch.get_default_dtype())
        if not count.numel() or not _holds((count >= 1) & (count <= LARGEST_COUNT) & (count % 1 == 0)):
            most = f"up to {LARGEST_COUNT:,}"
            raise ValueError(f"total_count must be a positive whole number {most}; found {total_count}.")
        self.register_buffer("total_count", count)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        return _of_observations(dist.Binomial(self.total_count, logits=self.logits(z, *conditions)), z)


class Categorical(nn.Module):
    r"""Independent choices among C classes, :math:`P(x \mid z) = \prod_d \operatorname{softmax}(f_d(z))_{x_d}`.

    A probability of the whole numbers from 0 to C - 1 (counting measure), stored as floating point numbers or as
    integers. They are names of classes: mean and variance are NaN, ``mode`` is the most probable class.

    Args:
        logits: network from ``(N, K)`` to ``(N, *event, C)``.

    >>> from ppl_vae.networks import mlp
    >>> p = Categorical(mlp(2, 64, (5, 3)))(torch.zeros(7, 2))
    >>> p.event_shape, p.mode.shape
    (torch.Size([5]), torch.Size([7, 5]))
    """

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        return _of_observations(dist.Categorical(logits=self.logits(z, *conditions)), z)


class Poisson(nn.Module):
    r"""Independent counts, :math:`P(x \mid z) = \prod_d e^{-\lambda_d} \lambda_d^{x_d} / x_d!` with
    :math:`\log \lambda = f(z)`.

    A probability of the whole numbers from 0 on (counting measure). The link is logarithmic where f is below 10, and
    :math:`\lambda = e^{10} (f - 9)`, its tangent, above, so that no output of a network makes it infinite; 1e-6 is
    added, so that none makes it zero.

    Args:
        rate: network from ``(N, K)`` to ``(N, *event)``, the logarithm of the rate.

    >>> from ppl_vae.networks import mlp
    >>> Poisson(mlp(2, 64, 5))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, rate: nn.Module) -> None:
        super().__init__()
        self.rate = _Exponential(rate)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        return _of_observations(dist.Poisson(self.rate(z, *conditions)), z)


class NegativeBinomial(nn.Module):
    r"""Independent counts of more than Poisson's variance, :math:`P(x \mid z) = \prod_d
    \binom{x_d + r_d - 1}{x_d} \big(\frac{r_d}{r_d + m_d}\big)^{r_d} \big(\frac{m_d}{r_d + m_d}\big)^{x_d}` with
    :math:`\log m = f(z)` and :math:`r = 1 / \phi`.

    A probability of the whole numbers from 0 on (counting measure), with mean m and variance :math:`m + \phi\, m^2`;
    the link is that of :class:`Poisson`.

    Args:
        mean: network from ``(N, K)`` to ``(N, *event)``, the logarithm of the mean.
        dispersion: :math:`\phi`, the inverse of Pyro's ``total_count``; fixed, :func:`learned` or a network.
        floor: smallest dispersion that trains. With less it is a Poisson, to which single precision adds noise.

    Raises:
        ValueError: when a fixed dispersion is not positive, or a learned one starts at or below the floor.

    >>> from ppl_vae.networks import mlp
    >>> NegativeBinomial(mlp(2, 64, 5), dispersion=learned(0.5))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, mean: nn.Module, dispersion: Positive, floor: float = 1e-3) -> None:
        super().__init__()
        self.mean = _Exponential(mean)
        self.dispersion = _positive(dispersion, floor, "dispersion")

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        mean, dispersion = self.mean(z, *conditions), self.dispersion(z, *conditions)
        return _of_observations(dist.NegativeBinomial(1 / dispersion, logits=torch.log(mean * dispersion)), z)


class ZeroInflatedPoisson(nn.Module):
    r"""Independent counts that are zero more often, :math:`P(x \mid z) = \prod_d \gamma_d\, [x_d = 0] +
    (1 - \gamma_d)\, \mathrm{Poisson}(x_d; \lambda_d)` with :math:`\log \lambda = f(z)`.

    A probability of the whole numbers from 0 on (counting measure); the link is that of :class:`Poisson`. Lambert 1992,
    https://doi.org/10.2307/1269547.

    Args:
        rate: network from ``(N, K)`` to ``(N, *event)``, the logarithm of the rate.
        gate: :math:`\gamma`, the probability of an extra zero; fixed, :func:`learned`, or a network of its logit.

    Raises:
        ValueError: when a gate is not between 0 and 1.

    >>> from ppl_vae.networks import mlp
    >>> ZeroInflatedPoisson(mlp(2, 64, 5), gate=learned(0.5))(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, rate: nn.Module, gate: Probability) -> None:
        super().__init__()
        self.rate = _Exponential(rate)
        self.gate = _logits(gate)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        counts = dist.Poisson(self.rate(z, *conditions))
        return _of_observations(distributions.ZeroInflated(counts, self.gate(z, *conditions)), z)


class ZeroInflatedNegativeBinomial(nn.Module):
    r"""Independent counts of more than Poisson's variance that are zero more often, :math:`P(x \mid z) = \prod_d
    \gamma_d\, [x_d = 0] + (1 - \gamma_d)\, \mathrm{NB}(x_d; m_d, \phi_d)` with NB of :class:`NegativeBinomial`.

    A probability of the whole numbers from 0 on (counting measure); the link is that of :class:`Poisson`. As for single
    cells, Lopez et al. 2018, https://doi.org/10.1038/s41592-018-0229-2.

    Args:
        mean: network from ``(N, K)`` to ``(N, *event)``, the logarithm of m.
        dispersion: :math:`\phi`; fixed, :func:`learned` or a network.
        gate: :math:`\gamma`, the probability of an extra zero; fixed, :func:`learned`, or a network of its logit.
        floor: smallest dispersion that trains.

    Raises:
        ValueError: when a gate is not between 0 and 1, and as for :class:`NegativeBinomial`.

    >>> from ppl_vae.networks import mlp
    >>> p = ZeroInflatedNegativeBinomial(mlp(2, 64, 5), dispersion=learned(0.5), gate=mlp(2, 5))(torch.zeros(7, 2))
    >>> p.event_shape
    torch.Size([5])
    """

    def __init__(self, mean: nn.Module, dispersion: Positive, gate: Probability, floor: float = 1e-3) -> None:
        super().__init__()
        self.mean = _Exponential(mean)
        self.dispersion = _positive(dispersion, floor, "dispersion")
        self.gate = _logits(gate)

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        mean, dispersion = self.mean(z, *conditions), self.dispersion(z, *conditions)
        counts = dist.NegativeBinomial(1 / dispersion, logits=torch.log(mean * dispersion))
        return _of_observations(distributions.ZeroInflated(counts, self.gate(z, *conditions)), z)


# Tables


class ByColumn(nn.Module):
    r"""Likelihoods side by side, :math:`p(x \mid z) = \prod_c p_c(x_c \mid z)`: a table whose columns differ in kind.

    Its base measure is the product of those of the columns, so that two tables have comparable evidence where each of
    their columns is counted, or measured, in the same way.

    Args:
        parts: likelihoods in the order of the columns; each is of one column (event shape ``()``) or of several
            (``(d,)``).
        trunk: network of z that the parts share: they are called with its output instead. It runs once.

    Raises:
        ValueError: when there is no part, or (when called) one has another event shape.

    >>> from ppl_vae.networks import mlp
    >>> table = ByColumn(
    ...     Normal(nn.Linear(64, 3), scale=learned(1.0)),
    ...     Poisson(nn.Linear(64, 1)),
    ...     Categorical(nn.Linear(64, 4)),
    ...     trunk=nn.Sequential(mlp(2, 64), nn.ReLU()),
    ... )
    >>> table(torch.zeros(7, 2)).event_shape
    torch.Size([5])
    """

    def __init__(self, *parts: nn.Module, trunk: nn.Module | None = None) -> None:
        super().__init__()
        if not parts:
            raise ValueError("ByColumn takes one likelihood or more; found none.")
        self.parts = nn.ModuleList(parts)
        self.trunk = trunk

    def forward(self, z: Tensor, *conditions: Tensor) -> dist.TorchDistribution:
        inputs = (z, *conditions) if self.trunk is None else (self.trunk(z, *conditions),)
        return distributions.Columns([part(*inputs) for part in self.parts])


# Parameters, and what keeps them in bounds


WithFloor = Normal | Laplace | StudentT | LogNormal | Beta


def share_on_floor(likelihood: WithFloor, z: Tensor, *conditions: Tensor) -> float:
    """The share of scales, over observations and dimensions, within 1 % of the likelihood's floor.

    >>> from ppl_vae.networks import mlp
    >>> share_on_floor(Normal(mlp(2, 5), scale=learned(0.5)), torch.zeros(7, 2))
    0.0
    """
    scale = likelihood.scale(z, *conditions)
    return (scale <= 1.01 * likelihood.floor).float().mean().item()


class _Fixed(nn.Module):
    """A value, whatever z is."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *z: Tensor) -> Tensor:
        return self.value


class _Trained(nn.Module):
    """A parameter, whatever z is."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(initial)

    def forward(self, *z: Tensor) -> Tensor:
        return self.value


class _Above(nn.Module):
    """A network's output kept above a floor."""

    def __init__(self, network: nn.Module, floor: float) -> None:
        super().__init__()
        self.network = network
        self.floor = floor

    def forward(self, *z: Tensor) -> Tensor:
        return self.floor + softplus(self.network(*z))


class _Exponential(nn.Module):
    """The log link of counts: neither infinite nor zero, whatever the network returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *z: Tensor) -> Tensor:
        exponent = self.network(*z)
        bounded = exponent.clamp(max=LARGEST_EXPONENT)
        return SMALLEST_MEAN + bounded.exp() * (1 + exponent - bounded)


def _positive(value: Positive, floor: float, name: str = "scale", smallest: float = 0.0) -> nn.Module:
    """A positive parameter as a module of z; above the floor if it trains, else not below the smallest."""
    distributions.checked_floor(floor)
    if isinstance(value, nn.Module):
        return _Above(value, floor)
    if isinstance(value, Learned):
        if not _holds((value.initial > floor) & value.initial.isfinite()):
            raise ValueError(f"A learned {name} must start above its floor {floor:g}; found {value.initial.min():g}.")
        if not _holds(value.initial <= (most := distributions.LARGEST_SCALE)):
            raise ValueError(f"A learned {name} must start at {most:g} at most; found {value.initial.max():g}.")
        excess = value.initial - floor
        return _Above(_Trained(excess + torch.log(-torch.expm1(-excess))), floor)  # the inverse of softplus
    fixed = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if not _holds(fixed > 0):
        raise ValueError(f"A fixed {name} must be positive; found {fixed.min():g}.")
    if not _holds(fixed >= smallest):
        raise ValueError(f"A fixed {name} must be at least {smallest:g}; found {fixed.min():g}.")
    square_root = torch.finfo(fixed.dtype).tiny ** 0.5
    if not _holds((fixed >= square_root) & (fixed <= 1 / square_root)):
        raise ValueError(f"The square of a fixed {name} must be a number; found {fixed.min():g} to {fixed.max():g}.")
    return _Fixed(fixed)


def _logits(probability: Probability) -> nn.Module:
    """A probability as a module from z to its logit."""
    if isinstance(probability, nn.Module):
        return probability
    trains = isinstance(probability, Learned)
    value = torch.as_tensor(probability.initial if trains else probability, dtype=torch.get_default_dtype())
    if not _holds((value > 0) & (value < 1)):
        raise ValueError(f"A gate is a probability between 0 and 1; found {value.tolist()}.")
    return _Trained(value.logit()) if trains else _Fixed(value.logit())


def _checked_levels(levels: int) -> int:
    if not 2 <= levels <= LARGEST_COUNT:
        raise ValueError(f"There must be at least two levels, and at most {LARGEST_COUNT:,}; found {levels}.")
    return levels


def _of_observations(distribution: dist.TorchDistribution, z: Tensor) -> dist.TorchDistribution:
    """One batch dimension for each of z; what a network adds to them belongs to the event."""
    return distribution.to_event(len(distribution.batch_shape) - z.dim() + 1)


def _holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; on the meta device, where a story is rebuilt, there is nothing to ask."""
    return condition.is_meta or bool(condition.all())
