"""What importance weights say: running sums over particles, the tail, k-hat and a verdict, for each observation.

Notation: ``w`` of shape (S, N) are the weights of S particles for N observations, of which we only ever see the logs.
"""

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

Verdict = Literal["exact", "good", "fair", "poor", "bound", "unresolved"]

GOOD, FAIR = 0.4, 0.7
SMALLEST_TAIL = 5
SMALLEST_ROUNDING = 1e-11  # of log weights in float64, after a matrix has been factorized

# The jackknife treats this many of the largest weights one by one. Any two others hold at most 2/22 of the sum, so that
# the series of log(1 - p), of which JACKKNIFE_POWERS terms are summed, ends below the rounding of float64.
JACKKNIFE_TOP = 20
JACKKNIFE_POWERS = 12

# How many tails of new weights wait before the largest are picked: picking costs as much for few as for many.
PATIENCE = 3


class _ParetoTail(NamedTuple):
    """A generalized Pareto distribution of the ``length`` largest excesses over a threshold.

    Excesses are relative to the largest weight, and the threshold is the log of a ratio to it.
    """

    shape: float
    scale: float
    length: int
    threshold: float


@dataclass
class WeightSums:
    """Everything an estimate needs from the log weights of ``num_particles`` particles, gathered block by block.

    Memory grows with the square root of the number of particles: of the weights only some tails are kept, of the rest
    only power sums. All in float64.

    Args:
        num_observations: N.
        num_particles: S, which sets the length of the tail.
        num_powers: sums of w, w^2 and so on up to this power; :meth:`jackknife` asks for ``JACKKNIFE_POWERS``.
    """

    num_observations: int
    num_particles: int
    num_powers: int = 2
    count: int = 0
    mean: Tensor = field(init=False)
    sum_of_squared_deviations: Tensor = field(init=False)
    smallest: Tensor = field(init=False)
    rounding: float = 0.0
    _largest_weights: Tensor = field(init=False, repr=False)  # in descending order when nothing is pending
    _pending: list[Tensor] = field(init=False, repr=False, default_factory=list)
    _dropped_powers: Tensor = field(init=False, repr=False)  # log sums of w^m over the weights no longer kept
    _pareto_fits: list[_ParetoTail | None] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        size = self.num_observations
        self._largest_weights = torch.empty(0, size, dtype=torch.float64)
        self._dropped_powers = torch.full((self.num_powers, size), -torch.inf, dtype=torch.float64)
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.sum_of_squared_deviations = torch.zeros(size, dtype=torch.float64)
        self.smallest = torch.full((size,), torch.inf, dtype=torch.float64)

    def update(self, log_weights: Tensor) -> None:
        """Takes in the log weights of some more particles, shape (particles, observations).

        Raises:
            ValueError: naming the first observation of this block whose weight is NaN or infinite. A weight of zero
                (a log of minus infinity) is legal.
        """
        self.rounding = max(self.rounding, 64 * torch.finfo(log_weights.dtype).eps, SMALLEST_ROUNDING)
        log_w = log_weights.detach().to("cpu", torch.float64, copy=True)  # ours: it waits, whatever the caller does
        if bool((bad := log_w.isnan() | (log_w == torch.inf)).any()):
            raise NonFiniteWeightsError(bad.any(0).nonzero().flatten().tolist())
        self.smallest = torch.minimum(self.smallest, log_w.amin(0))
        self._update_moments(log_w)
        if sum(map(len, self._pending)) > PATIENCE * self._num_kept:
            self._reduce(in_order=False)
        self._pending.append(log_w)
        self._pareto_fits = None

    def _reduce(self, in_order: bool) -> None:
        """Keeps the largest weights; the others leave their power sums behind."""
        weights = torch.cat([self._largest_weights, *self._pending])
        kept = weights.topk(min(self._num_kept, len(weights)), dim=0, sorted=in_order)
        if len(weights) > self._num_kept:
            dropped = weights.scatter_(0, kept.indices, -torch.inf)
            self._dropped_powers = torch.logaddexp(self._dropped_powers, _log_power_sums(dropped, self.num_powers))
        self._largest_weights, self._pending = kept.values, []

    def _update_moments(self, log_w: Tensor) -> None:
        # Chan, Golub & LeVeque 1983: moments of two parts combined, without cancellation.
        count, mean = len(log_w), log_w.mean(0)
        shift, total = mean - self.mean, self.count + count
        within = (log_w - mean).square().sum(0)
        self.sum_of_squared_deviations += within + shift.square() * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def _tail_length(self) -> int:
        return math.ceil(min(0.2 * self.num_particles, 3 * math.sqrt(self.num_particles)))

    @property
    def _num_kept(self) -> int:
        return max(self._tail_length + 1, JACKKNIFE_TOP if self.num_powers > 2 else 0)

    @property
    def _kept(self) -> Tensor:
        """The largest log weights, in descending order."""
        if self._pending:
            self._reduce(in_order=True)
        return self._largest_weights

    def _power_sums(self, num_powers: int, first: int = 0) -> Tensor:
        """Logs of the sums of w^m for m = 1 to ``num_powers``, over all weights but the ``first`` largest."""
        kept = self._kept[first:]
        return torch.logaddexp(self._dropped_powers[:num_powers], _log_power_sums(kept, num_powers))

    @property
    def tail(self) -> Tensor:
        """The largest log weights, in descending order; the last one is the threshold of the Pareto fit."""
        return self._kept[: self._tail_length + 1]

    @property
    def log_sum(self) -> Tensor:
        """Log of the sum of the weights."""
        return self._power_sums(1)[0]

    @property
    def largest(self) -> Tensor:
        """The largest log weight of each observation."""
        return self.tail[0]

    @property
    def constant(self) -> Tensor:
        """True where all weights agree to rounding: the proposal is the exact posterior there."""
        return self.largest - self.smallest <= self.rounding * self.largest.abs().clamp(min=1)

    @property
    def log_mean(self) -> Tensor:
        r"""The importance sampling estimate, :math:`\log \frac1S \sum_s w_s`, in nats."""
        return self.log_sum - math.log(self.count)

    @property
    def ess(self) -> Tensor:
        r"""Effective sample size :math:`(\sum_s w_s)^2 / \sum_s w_s^2`, from 1 to S; 0 when every weight is zero."""
        log_sum, log_sum_of_squares = self._power_sums(2)
        return torch.exp(2 * log_sum - log_sum_of_squares).nan_to_num(0.0).clamp(max=self.count)

    @property
    def relative_variance(self) -> Tensor:
        r"""Variance of the mean weight over its square, :math:`v = \widehat{\mathrm{Var}}(w) / (S \bar w^2)`."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.count / self.ess - 1) / (self.count - 1)

    @property
    def standard_error_of_mean(self) -> Tensor:
        """Standard error of the mean log weight, in nats."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.sum_of_squared_deviations / (self.count - 1) / self.count).sqrt()

    @property
    def pareto_k(self) -> Tensor:
        r"""Shape :math:`\hat k` of a generalized Pareto distribution fitted to the largest weights.

        Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling,
        https://arxiv.org/abs/1507.02646. Infinite where the tail is too short to tell; minus infinity where the weights
        are constant, the best case.
        """
        shapes = [math.inf if fit is None else fit.shape for fit in self._fits()]
        return torch.tensor(shapes, dtype=torch.float64).masked_fill(self.constant, -math.inf)

    def _fits(self) -> list[_ParetoTail | None]:
        if self._pareto_fits is None:
            rounding = self.rounding * self.largest.abs().clamp(min=1)
            columns = zip(self.tail.T, rounding.tolist(), self.constant.tolist(), strict=True)
            self._pareto_fits = [None if constant else _fit_pareto(tail, error) for tail, error, constant in columns]
        return self._pareto_fits

    @property
    def pareto_smoothed(self) -> Tensor:
        r"""Log of the mean of Pareto smoothed weights, shape (N,), in nats: a correction, biased low, not a bound.

        The M weights above the threshold u become :math:`\min(u + F^{-1}((i - 1/2) / M), w_{\max})` for i = 1 to M,
        with F the distribution that :attr:`pareto_k` is the shape of. Equals :attr:`log_mean` where the weights are
        constant or the tail is too short to fit. Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed
        importance sampling, https://arxiv.org/abs/1507.02646.
        """
        log_sum = self.log_sum
        for n, fit in enumerate(self._fits()):
            if fit is not None and math.isfinite(fit.shape):
                body = torch.cat([self._dropped_powers[:1, n], self._kept[fit.length :, n]])
                smoothed = _smoothed(fit) + self.largest[n]
                log_sum[n] = torch.cat([body, smoothed]).logsumexp(0)
        return log_sum - math.log(self.count)

    def jackknife(self, order: int) -> Tensor:
        r"""Log evidence less the bias of :attr:`log_mean` up to terms in :math:`1 / S^m`: a correction, not a bound.

        .. math:: L^{J,m}_S = \sum_{j=0}^m (-1)^j \frac{(S-j)^m}{(m-j)!\, j!} \, \overline{L}_{S-j}

        with :math:`\overline{L}_{S-j}` the mean of the importance sampling estimates of all subsets of S - j of the S
        weights, exact to rounding. Nowozin 2018, Debiasing evidence approximations: on importance-weighted autoencoders
        and jackknife variational inference, https://openreview.net/forum?id=HyZoi-WRb. Where at most m weights are
        not zero some subset has no estimate, and the result is :attr:`log_mean`.

        Args:
            order: m, 1 or 2.

        Returns:
            The corrected estimates, shape (N,), in nats.

        Raises:
            ValueError: when the order is another, there are not more particles than it, or the power sums are missing.

        >>> sums = WeightSums(num_observations=1, num_particles=3, num_powers=JACKKNIFE_POWERS)
        >>> sums.update(torch.tensor([[1.0], [2.0], [3.0]]).log())
        >>> print(f"{sums.jackknife(1).item():.4f}")  # 3 log 2 - 2 (log 2.5 + log 2 + log 1.5) / 3
        0.7362
        """
        self._check_jackknife(order)
        top = self._kept[:JACKKNIFE_TOP]
        rest = self._power_sums(self.num_powers, len(top))
        below = torch.cat([rest[:1], top.flip(0)]).logcumsumexp(0).flip(0)  # sums without the 0, 1, 2, ... largest
        without_one = torch.cat([below[1:2], _without(below[0], top[1:])])
        lacking = [_lacking_one(without_one, below[0], rest)]
        if order == 2:
            lacking.append(_lacking_two(top, below, without_one, rest, self.count - len(top)))
        corrected = self.log_mean
        for j, log_shares in enumerate(lacking, start=1):
            factor = (-1) ** j * (self.count - j) ** order / (math.factorial(order - j) * math.factorial(j))
            # The factors, that of j = 0 included, sum to one. What all the estimates share stays out: it would cancel.
            corrected = corrected + factor * (log_shares / math.comb(self.count, j) - math.log1p(-j / self.count))
        return torch.where(below[order] > -torch.inf, corrected, self.log_mean)

    def _check_jackknife(self, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"The jackknife has order 1 or 2; found {order}.")
        if self.count <= order:
            raise ValueError(f"A jackknife of order {order} needs {order + 1} particles or more; found {self.count}.")
        if self.num_powers < JACKKNIFE_POWERS:
            raise ValueError(
                f"The jackknife needs {JACKKNIFE_POWERS} power sums of the weights; found {self.num_powers}. "
                "Make WeightSums with num_powers=JACKKNIFE_POWERS."
            )

    def verdicts(self) -> list[Verdict]:
        """How far the importance sampling estimate and its standard error are to be believed."""
        return [_verdict(k) for k in self.pareto_k.tolist()]


class NonFiniteWeightsError(ValueError):
    """Log weights that are NaN or plus infinity, with the positions of their observations in the block."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"Log weights are NaN or infinite for the observations {rows}.")
        self.rows = rows


def _log_power_sums(log_w: Tensor, num_powers: int) -> Tensor:
    """Logs of the sums of w^m over the first dimension for m = 1 to ``num_powers``; shape (powers, observations)."""
    if len(log_w) == 0:
        return torch.full((num_powers, log_w.shape[1]), -torch.inf, dtype=log_w.dtype)
    largest = log_w.amax(0).clamp(min=torch.finfo(log_w.dtype).min)
    w = torch.exp(log_w - largest)
    power, sums = w.clone(), [w.sum(0)]
    for _ in range(1, num_powers):
        sums.append(power.mul_(w).sum(0))
    return torch.stack(sums).log() + torch.arange(1, num_powers + 1)[:, None] * largest


def _verdict(pareto_k: float) -> Verdict:
    if pareto_k == -math.inf:
        return "exact"
    if pareto_k < GOOD:
        return "good"
    return "fair" if pareto_k < FAIR else "poor"


# Pareto tails


def _fit_pareto(tail: Tensor, rounding: float) -> _ParetoTail | None:
    """Fits the largest log weights, in descending order, of which the last one is the threshold; None if too short."""
    threshold = tail[-1] - tail[0]
    excess = torch.exp(tail - tail[0]) - torch.exp(threshold)
    excess = excess[(excess > torch.finfo(torch.float64).tiny) & (tail - tail[-1] > rounding)]
    if len(excess) < SMALLEST_TAIL:
        return None
    try:
        shape, scale = fit_generalized_pareto(excess)
    except ZeroDivisionError:  # Pyro's grid contains zero where 100 to 120 excesses are equal: discrete latents
        shape, scale = fit_generalized_pareto(excess[:99])
    return _ParetoTail(shape, scale, len(excess), threshold.item())


def _smoothed(fit: _ParetoTail) -> Tensor:
    """Logs of the expected order statistics of a tail, relative to the largest raw weight, which they do not exceed."""
    probabilities = (torch.arange(fit.length, dtype=torch.float64) + 0.5) / fit.length
    log_survival = torch.log1p(-probabilities)
    nearly_exponential = abs(fit.shape) < torch.finfo(torch.float64).eps
    quantiles = -log_survival if nearly_exponential else torch.expm1(-fit.shape * log_survival) / fit.shape
    return torch.log(fit.scale * quantiles + math.exp(fit.threshold)).clamp(max=0)


# The jackknife. The share of a weight in the sum of all is p; weights are the T largest and the rest.


def _without(log_sum: Tensor, log_w: Tensor) -> Tensor:
    """Log of a sum less one of its terms, accurate where the term is not much more than half of it."""
    return log_sum + torch.log1p(-torch.exp(log_w - log_sum))


def _series(power_sums: Tensor, log_sum: Tensor) -> Tensor:
    r"""Minus the sum over weights of :math:`\log(1 - p) = -\sum_m p^m / m`, from the log power sums of the weights."""
    powers = torch.arange(1, len(power_sums) + 1)[:, None]
    return (torch.exp(power_sums - powers * log_sum) / powers).sum(0)


def _lacking_one(without_one: Tensor, total: Tensor, rest: Tensor) -> Tensor:
    """Sum of log(1 - p) over weights: without each of the largest, shape (T, N), and power sums of the rest."""
    return (without_one - total).sum(0) - _series(rest, total)


def _lacking_two(top: Tensor, below: Tensor, without_one: Tensor, rest: Tensor, num_rest: int) -> Tensor:
    """Sum of log(1 - p - p') over pairs of weights: both among the largest, one of them, or none.

    Args:
        top: the largest log weights in descending order, shape (T, N).
        below: log sums of all weights but the 0 to T largest, shape (T + 1, N).
        without_one: log sums of all weights but one of the largest, shape (T, N).
        rest: log power sums of the rest, shape (powers, N).
        num_rest: how many these are.
    """
    total = below[0]
    pairs = below[2] - total  # the first pair on its own: it may be nearly all of the sum
    for i, j in list(combinations(range(len(top)), 2))[1:]:
        pairs = pairs + _without(without_one[i], top[j]) - total
    for log_sum in without_one:  # log(1 - p - p') = log(1 - p) + log(1 - p' / (1 - p))
        pairs = pairs + num_rest * (log_sum - total) - _series(rest, log_sum)
    return pairs + _rest_pairs(rest, total, num_rest)  # the largest at last: the others would drown in its rounding


def _rest_pairs(rest: Tensor, total: Tensor, num_rest: int) -> Tensor:
    r"""Sum of log(1 - p - p') over pairs of the rest, by :math:`(p + p')^m = \sum_a \binom{m}{a} p^a p'^{m-a}`."""
    powers = torch.arange(1, len(rest) + 1)[:, None]
    sums = torch.cat([torch.full_like(total, num_rest)[None], torch.exp(rest - powers * total)])
    pairs = torch.zeros_like(total)
    for m in range(1, len(sums)):
        twice = sum(math.comb(m, a) * sums[a] * sums[m - a] for a in range(m + 1)) - 2**m * sums[m]
        pairs = pairs - twice / (2 * m)
    return pairs
