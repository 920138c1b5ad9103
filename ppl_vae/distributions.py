"""Distributions that Pyro lacks, or has with a fault that a likelihood would show; and what they are supported on."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.utils import broadcast_all
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

# Squares of what is smaller, or larger, are no numbers in single precision.
SMALLEST_SCALE, LARGEST_SCALE = 1e-18, 1e18

# Of a Student-t with fewer degrees of freedom single precision has no draws: they overflow.
SMALLEST_DF_OF_DRAWS = 0.2
# With more, the ratio of gammas in its density is its limit, to eight digits.
LARGEST_DF_OF_GAMMA = 1e8

# Where a function of the logit is 0 / 0 at zero, its Taylor series is right to twelve digits up to here.
NEARLY_ZERO = 0.1

# In units of the distance of two levels; k / 65535 in single precision is wrong by 0.004 of them.
LARGEST_ROUNDING = 0.01

SampleShape = torch.Size | list[int] | tuple[int, ...]


# Supports


class OpenInterval(type(constraints.unit_interval)):
    """The numbers between two ends, without them."""

    def check(self, value: Tensor) -> Tensor:
        return (self.lower_bound < value) & (value < self.upper_bound)

    def __repr__(self) -> str:
        return f"OpenInterval({self.lower_bound}, {self.upper_bound})"


@biject_to.register(OpenInterval)
@transform_to.register(OpenInterval)
def _to_open_interval(constraint: Any) -> Any:
    return biject_to(constraints.interval(constraint.lower_bound, constraint.upper_bound))


class Levels(constraints.Constraint):
    """Equally spaced numbers from 0 to 1, such as the grey levels k / 255; a little rounding does not matter.

    >>> Levels(256).check(torch.tensor([0, 0.5, 128 / 255, 1]))
    tensor([ True, False,  True,  True])
    """

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1.0)  # in floating point, also of bytes
        nearest = level.round()
        return ((level - nearest).abs() < LARGEST_ROUNDING) & (nearest >= 0) & (nearest < self.levels)

    def __repr__(self) -> str:
        return f"Levels({self.levels})"


class Columnwise(constraints.Constraint):
    """A support for each column of a row.

    Attributes:
        supports: of each part, with event dimension 0 or 1.
        widths: the number of columns of each part.
    """

    event_dim = 1

    def __init__(self, supports: Sequence[Any], widths: Sequence[int]) -> None:
        self.supports = supports
        self.widths = widths
        super().__init__()

    @property
    def is_discrete(self) -> bool:
        """Whether every column is."""
        return all(support.is_discrete for support in self.supports)

    def check(self, value: Tensor) -> Tensor:
        parts = zip(self.supports, value.split(list(self.widths), -1), strict=True)
        return reduce(torch.logical_and, (support.check(_as_event(support.event_dim, x)) for support, x in parts))

    def __repr__(self) -> str:
        return f"Columnwise({self.supports}, {self.widths})"


def _as_event(event_dim: int, x: Tensor) -> Tensor:
    """The columns of a part, as numbers where it has a single one without an event dimension."""
    return x if event_dim else x.squeeze(-1)


# Distributions


class ContinuousBernoulli(dist.ContinuousBernoulli):
    r"""The density :math:`p(x) = \frac{\eta}{e^\eta - 1} e^{\eta x}` on the interval from 0 to 1, for any logit
    :math:`\eta`.

    Loaiza-Ganem & Cunningham 2019, https://arxiv.org/abs/1907.06845. Torch's own normalizes by a probability that is
    clamped: in single precision its density is too low, by 0.2 nats for :math:`|\eta| = 20` and by 1.8 for 100.

    >>> ContinuousBernoulli(logits=torch.tensor(100.0)).log_prob(torch.tensor(1.0))
    tensor(4.6052)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        # (1 + e^eta) times the normalizer is eta / tanh(eta / 2), an even function.
        square = logits.square()
        series = math.log(2) + square / 12 - 7 * square**2 / 1440 + 31 * square**3 / 90720
        log_normalizer = _where_not_small(logits, series, lambda eta: torch.log(eta / torch.tanh(eta / 2)))
        return log_normalizer - binary_cross_entropy_with_logits(logits, value, reduction="none")

    @property
    def mean(self) -> Tensor:
        series = 1 / 2 + self.logits / 12 - self.logits**3 / 720 + self.logits**5 / 30240
        return _where_not_small(self.logits, series, lambda eta: -1 / torch.expm1(-eta) - 1 / eta)

    @property
    def variance(self) -> Tensor:
        series = 1 / 12 - self.logits**2 / 240 + self.logits**4 / 6048
        return _where_not_small(self.logits, series, lambda eta: eta**-2 - (2 * torch.sinh(eta / 2)) ** -2)

    def cdf(self, value: Tensor) -> Tensor:
        falling = self._mirrored(value)
        size = self.logits.abs()
        share = _where_not_small(size, falling, lambda eta: torch.expm1(-eta * falling) / torch.expm1(-eta), 1e-6)
        return self._mirrored(share).clamp(0, 1)

    def icdf(self, value: Tensor) -> Tensor:
        share = self._mirrored(value)
        size = self.logits.abs()
        falling = _where_not_small(size, share, lambda eta: -torch.log1p(share * torch.expm1(-eta)) / eta, 1e-6)
        return self._mirrored(falling).clamp(0, 1)

    def _mirrored(self, x: Tensor) -> Tensor:
        """Where the density rises, 1 - x: every density falls then."""
        return torch.where(self.logits > 0, 1 - x, x)


def _where_not_small(
    x: Tensor, small: Tensor, function: Callable[[Tensor], Tensor], limit: float = NEARLY_ZERO
) -> Tensor:
    """The function of x, or what it is ``small``; gradients are finite for either."""
    is_small = x.abs() < limit
    return torch.where(is_small, small, function(torch.where(is_small, 1.0, x)))


class StudentT(dist.StudentT):
    """Pyro's, whose log density is right however many degrees of freedom there are.

    Pyro's own subtracts two log gammas in the precision of its parameters: in single precision it is wrong by 0.003 for
    10,000 degrees of freedom, by 0.1 for a million, and NaN for 1e38.

    >>> StudentT(torch.tensor([1e6, 1e38])).log_prob(torch.tensor(1.0))
    tensor([-1.4189, -1.4189])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        squares = ((value - self.loc) / self.scale) ** 2
        return _log_peak_of_t(self.df) - self.scale.log() - 0.5 * (self.df + 1) * torch.log1p(squares / self.df)


def _log_peak_of_t(df: Tensor) -> Tensor:
    r""":math:`\log \Gamma(\frac{\nu + 1}{2}) - \log \Gamma(\frac{\nu}{2}) - \frac12 \log \pi \nu`."""
    many = df.double()
    few = many.clamp(max=LARGEST_DF_OF_GAMMA)
    log_ratio = torch.lgamma((few + 1) / 2) - torch.lgamma(few / 2) - 0.5 * few.log()
    return (log_ratio - 0.5 * math.log(math.pi)).to(df.dtype)


class Beta(dist.Beta):
    """Pyro's, on the numbers between 0 and 1 without the two, where its density may be zero or infinite."""

    support = OpenInterval(0.0, 1.0)

    def rsample(self, sample_shape: SampleShape = ()) -> Tensor:
        x = super().rsample(sample_shape)
        limits = torch.finfo(x.dtype)
        return x.clamp(limits.tiny, 1 - limits.eps)


class ZeroInflated(dist.ZeroInflatedDistribution):
    """Pyro's, computed from the logit of its gate, always.

    Pyro's own remembers the gate's probability once it was asked for a draw or a mean, and then computes log_prob from
    that: rounded, and minus infinity for every count above zero where the probability is rounded to one.

    Args:
        base_dist: a distribution of counts, with event shape ``()``.
        gate_logits: logit of the probability of an extra zero.

    >>> p = ZeroInflated(dist.Poisson(torch.ones(1)), gate_logits=torch.tensor([20.0]))
    >>> before, _, after = p.log_prob(torch.ones(1)), p.sample(), p.log_prob(torch.ones(1))
    >>> before, after
    (tensor([-21.]), tensor([-21.]))
    """

    def __init__(
        self, base_dist: dist.TorchDistribution, gate_logits: Tensor, validate_args: bool | None = None
    ) -> None:
        super().__init__(base_dist, gate_logits=gate_logits, validate_args=validate_args)

    @property
    def gate(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.sigmoid(cast(Tensor, self.gate_logits))


class DiscretizedLogistic(dist.TorchDistribution):
    r"""A logistic distribution rounded to the levels k / (levels - 1), a probability of each level (counting measure).

    .. math::
        P(x) = \sigma\Big(\frac{x + h - \mu}{s}\Big) - \sigma\Big(\frac{x - h - \mu}{s}\Big), \quad
        h = \frac{1}{2\,(\text{levels} - 1)}

    where the first level holds all that is below it, the last one all that is above. Kingma et al. 2016,
    https://arxiv.org/abs/1606.04934; Salimans et al. 2017, https://arxiv.org/abs/1701.05517. The difference is computed
    as :math:`\sigma(a) - \sigma(b) = \sigma(a)\, \sigma(-b)\, (1 - e^{b - a})`, whose logarithm is exact however far
    the level is from the mean, so that nothing has to be clamped.

    Args:
        loc: mean of the logistic distribution, in units of the data.
        scale: its scale; the standard deviation is 1.8 times as large.
        levels: how many levels there are.

    >>> DiscretizedLogistic(torch.tensor(0.5), torch.tensor(0.1)).log_prob(torch.tensor([0.0, 128 / 255, 1.0]))
    tensor([-4.9872, -4.6251, -4.9872])
    """

    has_enumerate_support = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: SampleShape, _instance: Any = None) -> "DiscretizedLogistic":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedLogistic(loc, scale, self.levels, validate_args=self._validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {"loc": constraints.real, "scale": constraints.positive}

    @property
    def support(self) -> Levels:
        return Levels(self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        level = (value * (self.levels - 1.0)).round()
        up_to_it = logsigmoid(self._standardized(level + 0.5))
        from_it_on = logsigmoid(-self._standardized(level - 0.5))
        width = 1 / (self.scale * (self.levels - 1))
        between = up_to_it + from_it_on + torch.log(-torch.expm1(-width))
        return torch.where(level <= 0, up_to_it, torch.where(level >= self.levels - 1, from_it_on, between))

    def _standardized(self, level: Tensor) -> Tensor:
        return (level / (self.levels - 1) - self.loc) / self.scale

    def sample(self, sample_shape: SampleShape = (), generator: torch.Generator | None = None) -> Tensor:
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
            level = (self.loc + self.scale * uniform.logit()) * (self.levels - 1)
            return level.round().clamp(0, self.levels - 1) / (self.levels - 1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.arange(self.levels, dtype=self.loc.dtype, device=self.loc.device) / (self.levels - 1)
        values = values.reshape(-1, *(1 for _ in self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    @property
    def mean(self) -> Tensor:
        return self._expected(lambda x: x)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return self._expected(lambda x: (x - mean) ** 2)

    def _expected(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of a function, one level after the other: there may be many pixels."""
        levels = self.enumerate_support(expand=False)
        return sum((function(x) * self.log_prob(x).exp() for x in levels), torch.zeros_like(self.loc))


class Columns(dist.TorchDistribution):
    r"""Distributions side by side, :math:`p(x) = \prod_c p_c(x_c)`: a row of numbers whose columns differ in kind.

    Its base measure is the product of those of the columns.

    Args:
        parts: distributions of one number (event shape ``()``) or of a row of them (``(d,)``), in order of the columns.

    Raises:
        ValueError: when a part has another event shape.

    >>> p = Columns([dist.Poisson(torch.ones(7)), dist.Normal(torch.zeros(7, 2), 1.0).to_event(1)])
    >>> p.batch_shape, p.event_shape
    (torch.Size([7]), torch.Size([3]))
    """

    def __init__(self, parts: Sequence[dist.TorchDistribution], validate_args: bool | None = None) -> None:
        if odd := [tuple(part.event_shape) for part in parts if part.event_dim > 1]:
            raise ValueError(f"Columns are numbers or rows of numbers; found a part with the event shape {odd[0]}.")
        batch_shape = torch.broadcast_shapes(*(part.batch_shape for part in parts))
        self.parts = [part.expand(batch_shape) for part in parts]
        self.widths = [part.event_shape.numel() for part in parts]
        super().__init__(batch_shape, torch.Size([sum(self.widths)]), validate_args=validate_args)

    def expand(self, batch_shape: SampleShape, _instance: Any = None) -> "Columns":
        return Columns([part.expand(batch_shape) for part in self.parts], validate_args=self._validate_args)

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> Columnwise:
        return Columnwise([part.support for part in self.parts], self.widths)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        columns = zip(self.parts, value.split(self.widths, -1), strict=True)
        return torch.stack([part.log_prob(_as_event(part.event_dim, x)) for part, x in columns]).sum(0)

    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        return self._side_by_side(part.sample(torch.Size(sample_shape)) for part in self.parts)

    def rsample(self, sample_shape: SampleShape = ()) -> Tensor:
        return self._side_by_side(part.rsample(torch.Size(sample_shape)) for part in self.parts)

    @property
    def mean(self) -> Tensor:
        return self._side_by_side(part.mean for part in self.parts)

    @property
    def variance(self) -> Tensor:
        return self._side_by_side(part.variance for part in self.parts)

    def _side_by_side(self, values: Iterator[Tensor]) -> Tensor:
        columns = zip(self.parts, values, strict=True)
        return torch.cat([x if part.event_dim else x.unsqueeze(-1) for part, x in columns], -1)


# Latents


class MultivariateNormal(dist.MultivariateNormal):
    r"""A normal that scores its own draw :math:`z = \mu + L \epsilon` by the :math:`\epsilon` that it was made from.

    To solve for :math:`\epsilon` again loses digits where L is nearly singular, and its errors are magnified by what
    else is in L. Training then finds that log q can be made as small as it likes, and an ELBO above every bound.

    >>> q = MultivariateNormal(torch.zeros(7, 2), scale_tril=torch.eye(2))
    >>> q.log_prob(q.rsample()).shape
    torch.Size([7])
    """

    def rsample(self, sample_shape: SampleShape = (), generator: torch.Generator | None = None) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).normal_(generator=generator)
        z = self.loc + (self._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        self._drawn = z, noise
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        z, noise = getattr(self, "_drawn", (None, None))
        # A draw made without gradients has none with respect to z: its score is the density's, at a fixed point.
        if noise is None or value is not z or (torch.is_grad_enabled() and not value.requires_grad):
            return super().log_prob(value)
        log_scales = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -(noise.square() + math.log(2 * math.pi)).sum(-1) / 2 - log_scales


def checked_floor(floor: float) -> float:
    """A smallest scale; ValueError where it is none."""
    if floor != 0 and not SMALLEST_SCALE <= floor < LARGEST_SCALE:
        raise ValueError(
            f"floor is a smallest scale from {SMALLEST_SCALE} to {LARGEST_SCALE:g}, or 0; found {floor:g}."
        )
    return floor
