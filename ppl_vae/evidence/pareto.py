r"""Generalized Pareto distributions fitted to the largest weights of many observations at once.

Of excesses y over a threshold, :math:`F(y) = 1 - (1 + k y / \sigma)^{-1/k}`. The fit is the one of Zhang & Stephens
2009, A new and efficient estimation method for the generalized Pareto distribution,
https://doi.org/10.1198/tech.2009.08017, shrunk as Vehtari, Simpson, Gelman, Yao & Gabry 2024 do,
https://arxiv.org/abs/1507.02646.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_TAIL = 5
PRIOR_SIZE, PRIOR_SHAPE = 10, 0.5  # shapes of short tails are drawn to a half, as by ten observations more

NUMBERS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class ParetoTails:
    """The fitted distributions of N observations, in units of each one's largest weight.

    Attributes:
        shape: k, shape (N,); NaN where the tail is too short to tell.
        scale: sigma, shape (N,).
        length: how many weights lie above the threshold, shape (N,).
        threshold: log of the ratio to the largest weight, shape (N,).
    """

    shape: Tensor
    scale: Tensor
    length: Tensor
    threshold: Tensor

    def smoothed(self, n: int) -> Tensor:
        """Logs of the expected order statistics of a tail, relative to the largest raw weight, which none exceeds."""
        length, shape = int(self.length[n]), float(self.shape[n])
        log_survival = torch.log1p(-(torch.arange(length, dtype=torch.float64) + 0.5) / length)
        nearly_exponential = abs(shape) < torch.finfo(torch.float64).eps
        quantiles = -log_survival if nearly_exponential else torch.expm1(-shape * log_survival) / shape
        return torch.log(self.scale[n] * quantiles + self.threshold[n].exp()).clamp(max=0)


def fit_tails(log_w: Tensor, rounding: Tensor) -> ParetoTails:
    """Fits the largest log weights of each observation, in descending order, of which the last one is the threshold.

    Args:
        log_w: shape (N, M + 1), in float64.
        rounding: shape (N,); weights that are not so much larger than the threshold are as large as it.
    """
    relative = log_w - log_w[:, :1]
    threshold = relative[:, -1]
    excess = torch.exp(relative) - torch.exp(threshold).unsqueeze(1)
    above = (excess > torch.finfo(torch.float64).tiny) & (log_w - log_w[:, -1:] > rounding.unsqueeze(1))
    length = above.sum(1)
    shape, scale = torch.full((2, len(log_w)), math.nan, dtype=torch.float64)
    for size in length.unique().tolist():
        if size >= SMALLEST_TAIL:
            rows = (length == size).nonzero().flatten()
            for some in rows.split(max(1, NUMBERS_AT_ONCE // (size * _num_candidates(size)))):
                shape[some], scale[some] = _fit(excess[some, :size])
    return ParetoTails(shape, scale, length, threshold)


def _num_candidates(size: int) -> int:
    return 30 + math.isqrt(size)


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale for each row of excesses in descending order: means over candidates for b = -k / sigma."""
    size = excess.shape[1]
    first_quartile, largest = excess[:, size - 1 - int(size / 4 - 0.5)], excess[:, 0]
    number = torch.arange(1, _num_candidates(size) + 1, dtype=torch.float64)
    steps = (1 - (len(number) / (number - 0.5)).sqrt()) / 3
    b = steps / first_quartile.unsqueeze(1) + 1 / largest.unsqueeze(1)
    k = torch.log1p(-b.unsqueeze(2) * excess.unsqueeze(1)).mean(2)
    rate = torch.where(b == 0, 1 / excess.mean(1, keepdim=True), -b / k)
    weights = torch.softmax(size * (rate.log() - k - 1), dim=1)
    b = (weights * b).sum(1)
    k = torch.log1p(-b.unsqueeze(1) * excess).mean(1)
    scale = torch.where(b == 0, excess.mean(1), -k / b)
    return (k * size + PRIOR_SHAPE * PRIOR_SIZE) / (size + PRIOR_SIZE), scale
