"""What importance weights say: running sums over particles, the tail, k-hat and a verdict, for each observation.

Notation: ``w`` of shape (S, N) are the weights of S particles for N observations, of which we only ever see the logs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ppl_vae.evidence.pareto import ParetoTails, fit_tails

Verdict = Literal["exact", "good", "fair", "poor", "bound", "unresolved"]

GOOD, FAIR = 0.4, 0.7
SMALLEST_ROUNDING = 1e-11  # of log weights in float64, after a matrix has been factorized

# The jackknife treats this many of the largest weights one by one. Any two others hold at most 2/22 of the sum, so that
# the series of log(1 - p), of which JACKKNIFE_POWERS terms are summed, ends below the rounding of float64.
JACKKNIFE_TOP = 20
JACKKNIFE_POWERS = 12

# How many tails of new weights wait before the largest are picked: picking costs as much for few as for many.
PATIENCE = 3

# So many weights are worked on at once: what is made of them stays in the processor's cache.
WEIGHTS_AT_ONCE = 1 << 18

# A weight so many nats below a sum's largest term does not change the sum; exp is slow where its result underflows.
NATS_OF_NOTHING = 80.0


@dataclass
class WeightSums:
    """Everything an estimate needs from the log weights of ``num_particles`` particles, gathered block by block.

    Memory grows with the square root of the number of particles: of the weights only some tails are kept, of the rest
    only power sums, in float64.

    Args:
        num_observations: N.
        num_particles: S, which sets the length of the tail.
        num_powers: sums of w, w^2 and so on up to this power; :meth:`jackknife` asks for ``JACKKNIFE_POWERS``.
        fast: leave out the moments of the log weights, take exponentials with the precision of the weights, and keep no
            more of the first weights than the final tail can need of independent draws; for many observations at once.
    """

    num_observations: int
    num_particles: int
    num_powers: int = 2
    fast: bool = False
    count: int = 0
    mean: Tensor = field(init=False)
    sum_of_squared_deviations: Tensor = field(init=False)
    smallest: Tensor = field(init=False)
    rounding: float = 0.0
    _largest: Tensor = field(init=False, repr=False)  # the kept weights, shape (N, kept), largest first if none waits
    _waiting: list[Tensor] = field(init=False, repr=False, default_factory=list)
    _threshold: Tensor | None = field(init=False, repr=False, default=None)  # smaller weights will not be kept
    _dropped_powers: Tensor = field(init=False, repr=False)  # log sums of w^m over the weights no longer kept
    _pareto_tails: ParetoTails | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        size = self.num_observations
        self._largest = torch.empty(size, 0)
        self._dropped_powers = torch.full((self.num_powers, size), -torch.inf, dtype=torch.float64)
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.sum_of_squared_deviations = torch.zeros(size, dtype=torch.float64)
        self.smallest = torch.full((size,), torch.inf, dtype=torch.float64)

    def update(self, log_weights: Tensor) -> Tensor:
        """Takes in the log weights of some more particles, shape (particles, observations).

        Returns:
            the log of the sum of these weights, shape (N,), in float64.

        Raises:
            ValueError: naming the observations of this block whose weight is NaN or infinite. A weight of zero
                (a log of minus infinity) is legal.
        """
        self.rounding = max(self.rounding, 64 * torch.finfo(log_weights.dtype).eps, SMALLEST_ROUNDING)
        log_w = log_weights.detach().to("cpu", None if self.fast else torch.float64).T
        if bool((bad := ~(log_w.amax(1) < torch.inf)).any()):
            raise NonFiniteWeightsError(bad.nonzero().flatten().tolist())
        step = max(1, WEIGHTS_AT_ONCE // len(log_weights))
        parts = [slice(first, first + step) for first in range(0, self.num_observations, step)]
        sums, large = zip(*(self._take(log_w[rows], rows) for rows in parts), strict=True)
        self.count += len(log_weights)
        if sum(waiting.shape[1] for waiting in self._waiting) > PATIENCE * self._num_kept_now:
            self._reduce()
        self._waiting.append(_stacked(large))
        self._pareto_tails = None
        return torch.cat(sums)

    def _take(self, log_w: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Of the log weights of some rows, shape (rows, particles): log sums, and those that may be kept."""
        self.smallest[rows] = self.smallest[rows].minimum(log_w.amin(1).double())
        if not self.fast:
            self._update_moments(log_w, rows)
        if self._threshold is None:
            return _log_power_sums(log_w, 1)[0], log_w.clone()  # ours: it waits, whatever the caller does
        large, powers = _parted(log_w, self._threshold[rows].to(log_w.dtype), self.num_powers)
        self._dropped_powers[:, rows] = torch.logaddexp(self._dropped_powers[:, rows], powers)
        return torch.logaddexp(powers[0], _log_power_sums(large, 1)[0]), large

    def _reduce(self) -> None:
        """Keeps the largest weights; the others leave their power sums behind."""
        weights = torch.cat([self._largest, *self._waiting], dim=1)
        if (surplus := weights.shape[1] - self._num_kept_now) > 0:
            parted = weights.numpy()
            parted.partition(surplus, axis=1)
            dropped, weights = weights[:, :surplus], weights[:, surplus:].clone()
            self._dropped_powers = torch.logaddexp(self._dropped_powers, _log_power_sums(dropped, self.num_powers))
            self._threshold = weights[:, 0].clone()
        self._largest, self._waiting = weights, []

    def _update_moments(self, log_w: Tensor, rows: slice) -> None:
        # Chan, Golub & LeVeque 1983: moments of two parts combined, without cancellation.
        count, mean = log_w.shape[1], log_w.mean(1)
        within = torch.linalg.vector_norm(log_w - mean.unsqueeze(1), dim=1).double().square()
        shift, total = mean - self.mean[rows], self.count + count
        self.sum_of_squared_deviations[rows] += within + shift.square() * self.count * count / total
        self.mean[rows] += shift * count / total

    @property
    def _tail_length(self) -> int:
        return math.ceil(min(0.2 * self.num_particles, 3 * math.sqrt(self.num_particles)))

    @property
    def _num_kept(self) -> int:
        return max(self._tail_length + 1, JACKKNIFE_TOP if self.num_powers > 2 else 0)

    @property
    def _num_kept_now(self) -> int:
        """How many of the weights until now may be among the largest of all.

        Of independent draws those are spread evenly, and twice their share and 64 more are missed by less than one in
        10^30 observations.
        """
        if not self.fast:
            return self._num_kept
        share = self._num_kept * self.count / self.num_particles
        return min(self._num_kept, math.ceil(2 * share) + 64)

    @property
    def _kept(self) -> Tensor:
        """The largest log weights, in descending order, shape (kept, N)."""
        if self._waiting:
            self._reduce()
            self._largest = self._largest.sort(descending=True).values
        return self._largest.T.double()

    def _power_sums(self, num_powers: int, first: int = 0) -> Tensor:
        """Logs of the sums of w^m for m = 1 to ``num_powers``, over all weights but the ``first`` largest."""
        kept = self._kept[first:].T
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
        return self._tails().shape.nan_to_num(math.inf).masked_fill(self.constant, -math.inf)

    def _tails(self) -> ParetoTails:
        if self._pareto_tails is None:
            self._pareto_tails = fit_tails(self.tail.T, self.rounding * self.largest.abs().clamp(min=1))
        return self._pareto_tails

    @property
    def pareto_smoothed(self) -> Tensor:
        r"""Log of the mean of Pareto smoothed weights, shape (N,), in nats: a correction, biased low, not a bound.

        The M weights above the threshold u become :math:`\min(u + F^{-1}((i - 1/2) / M), w_{\max})` for i = 1 to M,
        with F the distribution that :attr:`pareto_k` is the shape of. Equals :attr:`log_mean` where the weights are
        constant or the tail is too short to fit. Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed
        importance sampling, https://arxiv.org/abs/1507.02646.
        """
        log_sum, tails = self.log_sum, self._tails()
        for n in (tails.shape.isfinite() & ~self.constant).nonzero().flatten().tolist():
            body = torch.cat([self._dropped_powers[:1, n], self._kept[tails.length[n] :, n]])
            log_sum[n] = torch.cat([body, tails.smoothed(n) + self.largest[n]]).logsumexp(0)
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
        >>> _ = sums.update(torch.tensor([[1.0], [2.0], [3.0]]).log())
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
    """Logs of the sums over particles of w^m for m = 1 to ``num_powers``: from (N, S) to (powers, N), in float64."""
    if log_w.shape[1] == 0:
        return torch.full((num_powers, len(log_w)), -torch.inf, dtype=torch.float64)
    largest = log_w.amax(1)
    ratio = log_w - largest.clamp(min=torch.finfo(log_w.dtype).min).unsqueeze(1)
    w = ratio.clamp_(min=-NATS_OF_NOTHING).exp_()
    logs = _power_sums(w, num_powers).log() + torch.arange(1, num_powers + 1)[:, None] * largest.double()
    return logs.masked_fill(largest == -torch.inf, -torch.inf)


def _parted(log_w: Tensor, threshold: Tensor, num_powers: int) -> tuple[Tensor, Tensor]:
    """The weights above each row's threshold, side by side, and the log power sums of all others.

    Args:
        log_w: shape (N, S).
        threshold: shape (N,).

    Returns:
        Log weights, from the left, rows with fewer filled up with weights of zero; shape (powers, N), in float64.
    """
    distance = log_w - threshold.clamp(min=torch.finfo(log_w.dtype).min).unsqueeze(1)
    large, counts = _side_by_side(log_w, (distance > 0).numpy())
    w = distance.clamp_(min=-NATS_OF_NOTHING, max=0.0).exp_()  # of what is above its threshold: one
    sums = (_power_sums(w, num_powers) - counts).clamp(min=0.0)
    logs = sums.log() + torch.arange(1, num_powers + 1)[:, None] * threshold.double()
    return large, logs.masked_fill(threshold == -torch.inf, -torch.inf)


def _power_sums(w: Tensor, num_powers: int) -> Tensor:
    """Sums of w^m for m = 1 to ``num_powers``, shape (powers, N), in float64; w may be overwritten."""
    sums = [w.sum(1)]
    power = w.clone() if num_powers > 2 else w
    for _ in range(1, num_powers):
        sums.append(power.mul_(w).sum(1))
    return torch.stack(sums).double()


def _side_by_side(log_w: Tensor, wanted: np.ndarray) -> tuple[Tensor, Tensor]:
    """What is wanted of each row, from the left, filled up with weights of zero; and how many these are."""
    rows, columns = wanted.shape
    flat = np.flatnonzero(wanted)  # numpy picks several times faster than torch
    starts = np.searchsorted(flat, np.arange(rows + 1) * columns)
    counts = np.diff(starts)
    row = np.repeat(np.arange(rows), counts)
    packed = np.full((rows, counts.max()), -np.inf, log_w.numpy().dtype)
    packed[row, np.arange(len(flat)) - starts[row]] = log_w.numpy()[row, flat - row * columns]
    return torch.from_numpy(packed), torch.from_numpy(counts)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths below one another, filled up with weights of zero."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, longest - part.shape[1]), value=-math.inf) for part in parts])


def _verdict(pareto_k: float) -> Verdict:
    if pareto_k == -math.inf:
        return "exact"
    if pareto_k < GOOD:
        return "good"
    return "fair" if pareto_k < FAIR else "poor"


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
