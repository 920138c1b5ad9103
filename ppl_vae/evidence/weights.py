"""What importance weights say: running sums over particles, the tail, k-hat and a verdict, for each observation.

Notation: ``w`` of shape (S, N) are the weights of S particles for N observations, of which we only ever see the logs.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

Verdict = Literal["exact", "good", "fair", "poor", "bound"]

GOOD, FAIR = 0.4, 0.7
SMALLEST_TAIL = 5


@dataclass
class WeightSums:
    """Everything an estimate needs from the log weights of ``num_particles`` particles, gathered block by block.

    Memory grows with the square root of the number of particles: only the tail is kept. All in float64.
    """

    num_observations: int
    num_particles: int
    count: int = 0
    log_sum: Tensor = field(init=False)
    log_sum_of_squares: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    sum_of_squared_deviations: Tensor = field(init=False)
    smallest: Tensor = field(init=False)
    tail: Tensor = field(init=False)
    rounding: float = 0.0

    def __post_init__(self) -> None:
        size = self.num_observations
        self.log_sum = torch.full((size,), -torch.inf, dtype=torch.float64)
        self.log_sum_of_squares = self.log_sum.clone()
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.sum_of_squared_deviations = torch.zeros(size, dtype=torch.float64)
        self.smallest = torch.full((size,), torch.inf, dtype=torch.float64)
        self.tail = torch.empty(0, size, dtype=torch.float64)

    def update(self, log_weights: Tensor) -> None:
        """Takes in the log weights of some more particles, shape (particles, observations).

        Raises:
            ValueError: naming the first observation of this block whose weight is NaN or infinite. A weight of zero
                (a log of minus infinity) is legal.
        """
        self.rounding = max(self.rounding, 64 * torch.finfo(log_weights.dtype).eps)
        log_w = log_weights.detach().double().cpu()
        if bool((bad := log_w.isnan() | (log_w == torch.inf)).any()):
            raise NonFiniteWeightsError(bad.any(0).nonzero().flatten().tolist())
        self.log_sum = torch.logaddexp(self.log_sum, log_w.logsumexp(0))
        self.log_sum_of_squares = torch.logaddexp(self.log_sum_of_squares, (2 * log_w).logsumexp(0))
        self.smallest = torch.minimum(self.smallest, log_w.amin(0))
        self.tail = torch.cat([self.tail, log_w]).sort(dim=0, descending=True).values[: self._tail_length + 1]
        self._update_moments(log_w)

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
        return torch.exp(2 * self.log_sum - self.log_sum_of_squares).nan_to_num(0.0).clamp(max=self.count)

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
        columns = zip(self.tail.T, self.constant.tolist(), strict=True)
        shapes = [-math.inf if constant else _tail_shape(tail) for tail, constant in columns]
        return torch.tensor(shapes, dtype=torch.float64)

    def verdicts(self) -> list[Verdict]:
        """How far the importance sampling estimate and its standard error are to be believed."""
        return [_verdict(k) for k in self.pareto_k.tolist()]


class NonFiniteWeightsError(ValueError):
    """Log weights that are NaN or plus infinity, with the positions of their observations in the block."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"Log weights are NaN or infinite for the observations {rows}.")
        self.rows = rows


def _tail_shape(tail: Tensor) -> float:
    """k-hat from the largest log weights, in descending order; the last one is the threshold."""
    excess = torch.exp(tail - tail[0]) - torch.exp(tail[-1] - tail[0])
    excess = excess[excess > torch.finfo(torch.float64).tiny]
    if len(excess) < SMALLEST_TAIL:
        return math.inf
    return fit_generalized_pareto(excess)[0]


def _verdict(pareto_k: float) -> Verdict:
    if pareto_k == -math.inf:
        return "exact"
    if pareto_k < GOOD:
        return "good"
    return "fair" if pareto_k < FAIR else "poor"
