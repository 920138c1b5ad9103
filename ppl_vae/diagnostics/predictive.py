"""Predictive checks: is what the story makes, from its prior or from its guide's guesses, like what was observed?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import scipy.special
import scipy.stats
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from ppl_vae import checks, discrete, noise, traces
from ppl_vae.discrete import Assignments
from ppl_vae.distributions import Columns as SideBySide
from ppl_vae.traces import Columns, Site, Story

Group = Literal["posterior", "prior"]
Statistic = Callable[[Tensor], Tensor]

# A unit of noise: so many observations, and one draw.
ROWS_AT_ONCE = 512

# A value is worth counting when at least this share of the numbers in the data has it.
SMALLEST_SHARE = 0.01

QUANTILES = (np.arange(100) + 0.5) / 100
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
PIT_BINS = 20
WORST = 5

# Draws that stand in for a distribution function without a closed form.
RANK_DRAWS = 20

MEAN_OF_ABSOLUTE_NORMAL = math.sqrt(2 / math.pi)


# Statistics of replicated data


def predictive_check(
    story: Story,
    *columns: Tensor,
    statistics: Mapping[str, Statistic] | None = None,
    group: Group = "posterior",
    num_draws: int = 50,
    site: str = "x",
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Statistics of data that the story makes against those of the observed data; draw it with
    ``plots.predictive_check``.

    A replicated data set has as many observations as the data, under the same conditions:
    :math:`z_n \sim q(z \mid x_n)`, :math:`\tilde x_n \sim p(x \mid z_n)` in the group "posterior", and
    :math:`z_n \sim p(z)` in the group "prior". With the statistic T of the data, and
    :math:`T(\tilde x^{(1)}), \dots, T(\tilde x^{(S)})`,

    .. math::
        p = \min\Big(1,\; 2\, \frac{1 + \min(\#\{s: T(\tilde x^{(s)}) \ge T(x)\},\,
        \#\{s: T(\tilde x^{(s)}) \le T(x)\})}{S + 1}\Big).

    In the group "prior" this two-sided p-value is valid: for data from the story it is at most a with a probability of
    at most a. Posterior predictive p-values are conservative: the latents were guessed from the same x, so for data
    from the story they gather around 1, and what is small is smaller evidence than it could be. Gelman, Meng & Stern
    1996, http://www3.stat.sinica.edu.tw/statistica/oldpdf/A6n41.pdf; Gabry et al. 2019,
    https://arxiv.org/abs/1709.01449.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: as for :func:`ppl_vae.log_evidence`.
        statistics: by name, functions of observations ``(N, *event)``, one number for each, ``(N,)``, or one for the
            data set. None chooses those of :func:`default_statistics`.
        group: where latents come from, ``"posterior"`` (the guide) or ``"prior"``.
        num_draws: replicated data sets, S. The smallest p-value is 2 / (S + 1).
        site: the site whose observations are checked.
        seed: the noise is a function of it.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset over statistic, draw, observation and quantile, in the units of each statistic. Of the data set,
        where a statistic of single observations counts by its mean: ``observed``, ``replicated`` (statistic, draw),
        ``tail_probability`` (the mid-p-value, P(replicated > observed) + P(equal) / 2), ``p_value`` and ``effect_size``
        (the distance to the mean of the replicated in their standard deviations). Of the distribution over
        observations, NaN for statistics of the data set: ``standardized_difference`` (of means, in standard deviations
        over replicated observations), ``wasserstein`` (distance to the average replicated distribution, in the same
        unit) and its one-sided ``wasserstein_p_value``, ``observed_quantile``, ``replicated_quantile`` (mean over
        draws), ``lower_quantile`` and ``upper_quantile`` (90 % of draws lie between). Of each observation:
        ``value``, ``observation_tail_probability`` and ``observation_effect_size``.

    Raises:
        ValueError: when the story scores no such site, a statistic is not finite or of another shape, or an argument is
            out of its range.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Normal(networks.mlp(2, 5), scale=1.0),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> check = predictive_check(vae, 5 + torch.rand(20, 5), statistics={"mean": lambda x: x.mean(1)}, group="prior")
    >>> bool(check["effect_size"].item() > 3), round(check["p_value"].item(), 3)
    (True, 0.039)
    """
    if group not in ("posterior", "prior"):
        raise ValueError(f"group must be 'posterior' or 'prior'; found {group!r}.")
    checks.check_at_least(2, num_draws=num_draws)
    chunks = list(_chunks(story, columns, site, group, seed))
    x = torch.cat([chunk.x for chunk in chunks])
    statistics = default_statistics(x) if statistics is None else statistics
    found = {name: [_value(name, statistic, x)] for name, statistic in statistics.items()}
    for draw in _bar(range(num_draws), f"{group} predictive", progress):
        replicated = torch.cat([chunk.replicated(draw) for chunk in chunks])
        for name, statistic in statistics.items():
            found[name].append(_value(name, statistic, replicated))
    tables = [_compared(np.stack(values), len(x)) for values in found.values()]
    attributes = {
        "group": group,
        "site": site,
        "num_draws": num_draws,
        "num_observations": len(x),
        "smallest_p_value": 2 / (num_draws + 1),
        "seed": seed,
    }
    coordinates = {
        "statistic": list(found),
        "draw": np.arange(num_draws),
        "observation": np.arange(len(x)),
        "quantile": QUANTILES,
    }
    return xr.concat(tables, dim="statistic").assign_coords(coordinates).assign_attrs(attributes)


def default_statistics(x: Tensor) -> dict[str, Statistic]:
    """Statistics of single observations that say something about data like these, by name.

    Of binary data the share of ones; of others the mean, the standard deviation, the smallest and largest number, and
    the shares of zeros and of the largest value where at least 1 % of the numbers have it. For images, whose last two
    dimensions are height and width, the total variation: the mean step from a pixel to its neighbours.

    Args:
        x: observations, shape ``(N, *event)``.

    >>> list(default_statistics(torch.bernoulli(torch.full((10, 1, 4, 4), 0.5))))
    ['share of ones', 'total variation']
    """
    numbers = x.reshape(len(x), -1)
    image = {"total variation": _total_variation} if x.dim() > 2 and min(x.shape[-2:]) > 1 else {}
    if bool(((x == 0) | (x == 1)).all()):
        return {"share of ones": lambda x: _rows(x).mean(1)} | image
    chosen: dict[str, Statistic] = {"mean": lambda x: _rows(x).mean(1)}
    if numbers.shape[1] > 1:
        several: dict[str, Statistic] = {
            "standard deviation": lambda x: _rows(x).std(1),
            "smallest": lambda x: _rows(x).amin(1),
            "largest": lambda x: _rows(x).amax(1),
        }
        chosen |= several
    if _is_common(numbers, 0):
        chosen["share of zeros"] = lambda x: (_rows(x) == 0).double().mean(1)
    top = float(numbers.max())
    if top != 0 and _is_common(numbers, top):
        chosen[f"share of {top:g} or more"] = lambda x: (_rows(x) >= top).double().mean(1)
    return chosen | image


def _rows(x: Tensor) -> Tensor:
    """Observations as rows of numbers, shape (N, D)."""
    return x.reshape(len(x), -1).to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _is_common(numbers: Tensor, value: float) -> bool:
    return int((numbers == value).sum()) >= max(2, SMALLEST_SHARE * numbers.numel())


def _total_variation(images: Tensor) -> Tensor:
    """The mean absolute difference between neighbouring pixels, down and across, shape (N,)."""
    images = images.to(images.dtype if images.is_floating_point() else torch.get_default_dtype())
    steps = (images.diff(dim=dim).abs().reshape(len(images), -1).mean(1) for dim in (-2, -1))
    return sum(steps, torch.zeros(len(images), dtype=images.dtype, device=images.device))


def _value(name: str, statistic: Statistic, x: Tensor) -> np.ndarray:
    """A statistic of some observations, one number for each or one for all of them."""
    with torch.no_grad():
        value = torch.as_tensor(statistic(x)).double().cpu().numpy()
    if value.shape not in ((), (len(x),)):
        raise ValueError(
            f"Statistic {name!r} returns the shape {value.shape} for {len(x)} observations; expected one number for "
            "each of them, or a single one."
        )
    if not np.isfinite(value).all():
        raise ValueError(f"Statistic {name!r} is {value[~np.isfinite(value)].flat[0]} for some of the observations.")
    return value


def _compared(values: np.ndarray, num_observations: int) -> xr.Dataset:
    """A statistic of the data, the first of the values, against those of replicated data, all others."""
    of_all = values if values.ndim == 1 else values.mean(1)
    of_each = values if values.ndim == 2 else np.full((len(values), num_observations), np.nan)
    tail, p_value = _tail_and_p_value(of_all)
    own_tail, _ = _tail_and_p_value(of_each)
    spread = of_each[1:].std()
    by_rank = np.sort(of_each, axis=1)
    quantiles = np.quantile(by_rank, QUANTILES, axis=1)  # (quantile, S + 1)
    lower, upper = np.quantile(quantiles[:, 1:], (0.05, 0.95), axis=1)
    distance, distance_p_value = _wasserstein(by_rank)
    variables = {
        "observed": ((), of_all[0]),
        "replicated": ("draw", of_all[1:]),
        "tail_probability": ((), tail),
        "p_value": ((), p_value),
        "effect_size": ((), _in_sds(of_all)),
        "standardized_difference": ((), _quotient(of_each[0].mean() - of_each[1:].mean(), spread)),
        "wasserstein": ((), _quotient(np.asarray(distance), spread)),
        "wasserstein_p_value": ((), distance_p_value),
        "observed_quantile": ("quantile", quantiles[:, 0]),
        "replicated_quantile": ("quantile", quantiles[:, 1:].mean(1)),
        "lower_quantile": ("quantile", lower),
        "upper_quantile": ("quantile", upper),
        "value": ("observation", of_each[0]),
        "observation_tail_probability": ("observation", own_tail if values.ndim == 2 else of_each[0]),
        "observation_effect_size": ("observation", _in_sds(of_each)),
    }
    return xr.Dataset(variables)


def _tail_and_p_value(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mid-p-value of the first value among all, and the two-sided p-value."""
    num_draws = len(values) - 1
    above, equal = (values[1:] > values[0]).sum(0), (values[1:] == values[0]).sum(0)
    rarer = 1 + np.minimum(above + equal, num_draws - above)
    return (above + (equal + 1) / 2) / (num_draws + 1), np.minimum(1, 2 * rarer / (num_draws + 1))


def _in_sds(values: np.ndarray) -> np.ndarray:
    """The distance from the first value to the mean of the others, in their standard deviations."""
    return _quotient(values[0] - values[1:].mean(0), values[1:].std(0, ddof=1))


def _quotient(difference: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """In units of a spread; 0 for no difference, though nothing spreads."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, np.divide(difference, spread))


def _wasserstein(by_rank: np.ndarray) -> tuple[float, float]:
    """The distance from the first data set to the average of all, each sorted, and the p-value of its rank.

    The average of sorted samples is their Wasserstein barycenter; the data are among them, so that for data from the
    story all S + 1 distances are exchangeable.
    """
    if np.isnan(by_rank).any():
        return math.nan, math.nan
    middle = by_rank.mean(0)
    distances = np.array([scipy.stats.wasserstein_distance(values, middle) for values in by_rank])
    return distances[0], float((distances >= distances[0]).mean())


# Binary pixels


def pixel_calibration(
    story: Story,
    *columns: Tensor,
    num_draws: int = 50,
    num_bins: int = 15,
    site: str = "x",
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Predicted probabilities of ones against how often ones are observed; draw it with ``plots.pixel_calibration``.

    There are two forecasts of a pixel. "draw" is :math:`p(x_{nd} = 1 \mid z_s)` of a single draw
    :math:`z_s \sim q(z \mid x_n)`, averaged over draws after binning. For data from the story and an exact guide
    :math:`(x_n, z_s)` has the law of the story, so this forecast is calibrated though z was guessed from the same x
    (Johnson 2007, https://doi.org/10.1214/07-BA229); what is off speaks of model and guide together. "mean" is the
    posterior predictive mean, :math:`\frac1S \sum_s p(x_{nd} = 1 \mid z_s)`. It saw the pixel that it predicts, and is
    too timid even for a story that is true: observed frequencies are then more extreme than predicted.

    The gap of a bin is its observed frequency minus its mean prediction, and the expected calibration error
    :math:`\mathrm{ECE} = \sum_b w_b\, |\mathrm{gap}_b|` is an effect size (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). A calibrated story has an ECE of about :math:`\sqrt{2/\pi} \sum_b w_b\, s_b`,
    its noise floor. The errors s_b are those of ratios of sums over observations, whose pixels may depend on each other
    in any way.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, whose likelihood is Bernoulli or Binomial in some columns.
        columns: held-out observations, as for :func:`ppl_vae.log_evidence`.
        num_draws: draws of the guide for each observation, S.
        num_bins: bins of equal width between 0 and 1.
        site: the site whose observations are predicted.
        seed: the noise is a function of it.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset over forecast ("draw", "mean") and bin, probabilities throughout: ``predicted``, ``observed``,
        ``gap``, ``standard_error`` of the gap, ``p_value`` (two-sided, normal), ``weight`` (the share of the bin), NaN
        in empty bins; ``num_observations`` with a pixel in the bin; and over forecast
        ``expected_calibration_error``, ``noise_floor`` and ``mean_gap``. The attributes
        ``expected_calibration_error``, ``noise_floor`` and ``mean_gap`` are those of "draw".

    Raises:
        ValueError: when there are fewer than two observations, or x is not binary: see :func:`coverage`.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> reliability = pixel_calibration(vae, torch.ones(20, 5), num_draws=5)
    >>> reliability.attrs["expected_calibration_error"] > 0.2 > reliability.attrs["noise_floor"]
    True
    """
    checks.check_at_least(1, num_draws=num_draws)
    checks.check_at_least(1, num_bins=num_bins)
    _at_least_two_observations(columns)
    parts = []
    for chunk in _bar(_chunks(story, columns, site, "posterior", seed), "calibration", progress, _num_chunks(columns)):
        parts.append(_reliability(chunk, num_draws, num_bins))
    sums = torch.cat(parts, dim=2).double().cpu().numpy()  # (what, forecast, N, bin)
    table = _reliability_table(*sums)
    of_draw = table.sel(forecast="draw")
    names = ("expected_calibration_error", "noise_floor", "mean_gap")
    attributes = {
        "site": site,
        "num_draws": num_draws,
        "num_observations": len(columns[0]),
        "seed": seed,
        **{name: of_draw[name].item() for name in names},
    }
    return table.assign_coords(bin=(np.arange(num_bins) + 0.5) / num_bins).assign_attrs(attributes)


def _reliability(chunk: "_Chunk", num_draws: int, num_bins: int) -> Tensor:
    """Sums of trials, predictions and ones by forecast, observation and bin, shape (3, 2, n, bins)."""
    _, trials = _probabilities(chunk.told(0)["fn"], chunk.x)
    if not bool((trials > 0).any()):
        raise ValueError(
            f"Site {chunk.site!r} is a {type(_peeled(chunk.told(0)['fn'])).__name__}, which has no probability of a "
            "one. Use coverage for numbers, or predictive_check with statistics of your own."
        )
    trials, ones = _rows(trials * chunk.scored), _rows(chunk.x * (trials > 0) * chunk.scored)
    sums = torch.zeros(3, 2, len(trials), num_bins, dtype=torch.float64, device=trials.device)
    mean = torch.zeros_like(trials)
    for draw in range(num_draws):
        probabilities = _rows(_probabilities(chunk.told(draw)["fn"], chunk.x)[0])
        mean += probabilities / num_draws
        sums[:, 0] += _binned(probabilities, trials, ones, num_bins) / num_draws
    sums[:, 1] = _binned(mean, trials, ones, num_bins)
    return sums


def _binned(probabilities: Tensor, trials: Tensor, ones: Tensor, num_bins: int) -> Tensor:
    """Sums of trials, predictions and ones of each observation, by bin of the probability, shape (3, n, bins)."""
    number = (probabilities * num_bins).long().clamp(0, num_bins - 1)
    what = torch.stack([trials, trials * probabilities, ones]).double()
    return what.new_zeros(*what.shape[:2], num_bins).scatter_add_(2, number.expand(3, -1, -1), what)


def _reliability_table(trials: np.ndarray, predicted: np.ndarray, ones: np.ndarray) -> xr.Dataset:
    """The curve from sums of shape (forecast, N, bin)."""
    by_observation = [sums.transpose(1, 0, 2) for sums in (trials, predicted, ones)]
    total, predictions, frequency = (sums.sum(0) for sums in by_observation)
    with np.errstate(invalid="ignore"):
        predictions, frequency = predictions / total, frequency / total
    gap, error = ratio_and_error(by_observation[2] - by_observation[1], by_observation[0])
    weight = total / total.sum(1, keepdims=True)
    dims = ("forecast", "bin")
    return xr.Dataset(
        {
            "predicted": (dims, predictions),
            "observed": (dims, frequency),
            "gap": (dims, gap),
            "standard_error": (dims, error),
            "p_value": (dims, _two_sided(gap, error)),
            "weight": (dims, weight),
            "num_observations": (dims, (trials > 0).sum(1)),
            "expected_calibration_error": ("forecast", np.nansum(weight * np.abs(gap), axis=1)),
            "noise_floor": ("forecast", MEAN_OF_ABSOLUTE_NORMAL * np.nansum(weight * error, axis=1)),
            "mean_gap": ("forecast", np.nansum(weight * gap, axis=1)),
        },
        coords={"forecast": ["draw", "mean"]},
    )


@singledispatch
def _probabilities(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of a one and the number of trials behind each number of x, 0 where it is not binary."""
    return torch.zeros_like(x), torch.zeros_like(x)


@_probabilities.register
def _(p: dist.Bernoulli, x: Tensor) -> tuple[Tensor, Tensor]:
    return p.probs.expand_as(x), torch.ones_like(x)


@_probabilities.register
def _(p: dist.Binomial, x: Tensor) -> tuple[Tensor, Tensor]:
    return p.probs.expand_as(x), torch.as_tensor(p.total_count).to(x).expand_as(x)


@_probabilities.register(dist.Independent)
@_probabilities.register(dist.MaskedDistribution)
def _(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return _probabilities(p.base_dist, x)


@_probabilities.register
def _(p: SideBySide, x: Tensor) -> tuple[Tensor, Tensor]:
    both = zip(*(_probabilities(part, value) for part, value in _parts(p, x)), strict=True)
    probabilities, trials = (_side_by_side(values, x) for values in both)
    return probabilities, trials


# Intervals of numbers


def coverage(
    story: Story,
    *columns: Tensor,
    num_draws: int = 50,
    levels: Sequence[float] = LEVELS,
    group: Group = "posterior",
    site: str = "x",
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""How often central predictive intervals hold the number that was observed; draw it with ``plots.coverage``.

    With the probability integral transform (PIT) :math:`u_{nd} = F(x_{nd})` of a predictive distribution function F,
    the central interval of level l holds :math:`x_{nd}` where :math:`|u_{nd} - 1/2| \le l / 2`. For a calibrated
    forecast u is uniform (Dawid 1984; Gneiting, Balabdaoui & Raftery 2007,
    https://doi.org/10.1111/j.1467-9868.2007.00587.x).

    "draw" is the forecast :math:`F(x \mid z_s)` of a single draw :math:`z_s \sim q(z \mid x_n)`; PITs are pooled over
    draws. For data from the story and an exact guide they are exactly uniform though z was guessed from the same x,
    because :math:`(x_n, z_s)` has the law of the story (Johnson 2007, https://doi.org/10.1214/07-BA229); what is off
    speaks of model and guide together. "mixture" is the predictive distribution, of which
    :math:`\tilde x_s \sim p(x \mid z_s)` are draws. Latents that were guessed from the x that they predict make it
    optimistic: its intervals cover more than they say, the more so the more z knows of a single number. With latents of
    the prior (``group="prior"``) nothing was seen, and it is exactly calibrated for data from the story.

    PITs of the mixture are ranks among replicated numbers, ties broken at random, so that they are exactly uniform for
    a calibrated forecast of any kind and any S. Those of single draws are values of the distribution function, or ranks
    among 20 draws where it has no closed form or x is discrete.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: held-out observations, as for :func:`ppl_vae.log_evidence`.
        num_draws: draws of the latents for each observation, S.
        levels: nominal levels between 0 and 1.
        group: where latents come from, ``"posterior"`` (the guide) or ``"prior"``.
        site: the site whose observations are predicted.
        seed: the noise is a function of it.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset over forecast ("draw" and "mixture"; "mixture" alone for the prior), level, bin and feature (the
        numbers of an observation, in the order of ``x.flatten(1)``): ``coverage`` (forecast, level), its
        ``standard_error`` (features of an observation may depend on each other in any way) and ``p_value`` (two-sided,
        normal); ``pit_density`` (forecast, bin; 1 where it is uniform) and ``pit_error``; and of the first forecast
        ``feature_coverage`` and ``feature_error`` (level, feature), NaN where nothing is observed. Attributes:
        ``calibration_error`` (mean over levels of |coverage - level|, the effect size) with its ``noise_floor``,
        ``mean_deviation`` (above 0: intervals are too wide), ``feature_level``, ``worst_features`` (at that level, the
        worst first), ``worst_coverage``, ``num_features`` and ``num_features_off`` (false discovery rate 5 %).

    Raises:
        ValueError: when there are fewer than two observations, an argument is out of its range, or x is binary (see
            :func:`pixel_calibration`) or a class.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Normal(networks.mlp(2, 5), scale=0.1),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> held = coverage(vae, 3 * torch.randn(20, 5), num_draws=5, levels=[0.5, 0.9])
    >>> bool(held["coverage"].sel(forecast="draw", level=0.9) < 0.5)
    True
    """
    if group not in ("posterior", "prior"):
        raise ValueError(f"group must be 'posterior' or 'prior'; found {group!r}.")
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels lie between 0 and 1; found {list(levels)}.")
    checks.check_at_least(1, num_draws=num_draws)
    _at_least_two_observations(columns)
    ordered = sorted(set(map(float, levels)))
    event_shape, parts = torch.Size(), []
    for chunk in _bar(_chunks(story, columns, site, group, seed), "coverage", progress, _num_chunks(columns)):
        _refuse_binary(chunk)
        event_shape = chunk.x.shape[1:]
        scored = _rows(chunk.scored).double()
        parts.append((*_pit_counts(chunk, num_draws, ordered), scored.sum(1), scored.sum(0)))
    hits, bins, of_features, by_observation, by_feature = zip(*parts, strict=True)
    table = _coverage_table(
        hits=torch.cat(hits, dim=2).cpu().numpy(),
        bins=torch.cat(bins, dim=2).cpu().numpy(),
        of_features=torch.stack(of_features).sum(0).cpu().numpy(),
        by_observation=torch.cat(by_observation).cpu().numpy(),
        by_feature=torch.stack(by_feature).sum(0).cpu().numpy(),
        levels=np.array(ordered),
        forecasts=["draw", "mixture"] if group == "posterior" else ["mixture"],
    )
    attributes = {
        "group": group,
        "site": site,
        "num_draws": num_draws,
        "num_observations": len(columns[0]),
        "event_shape": list(event_shape) or [1],
        "seed": seed,
    }
    return table.assign_attrs(attributes)


def _pit_counts(chunk: "_Chunk", num_draws: int, levels: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the PITs lie: of single draws where these come from the guide, then of the mixture.

    Returns:
        How many features each interval holds, shape (forecast, level, n); how many have their PIT in a bin, shape
        (forecast, bin, n); how many observations each interval of the first forecast holds, shape (level, D).
    """
    x, scored = _rows(chunk.x), _rows(chunk.scored).double()
    below, equal = torch.zeros_like(scored), torch.zeros_like(scored)
    of_draws = []
    for draw in range(num_draws):
        told = chunk.told(draw)
        _compare(_rows(told["value"]).to(x.dtype), x, below, equal)
        if chunk.group == "posterior":
            with chunk.noise(draw, 1):
                of_draws.append(_counted(_rows(_pit(told["fn"], chunk.x)), scored, levels))
    with chunk.noise(num_draws, 1):
        of_mixture = _counted(_rank(below, equal, num_draws), scored, levels)
    forecasts = [[torch.stack(counts).mean(0) for counts in zip(*of_draws, strict=True)]] if of_draws else []
    hits, bins, of_features = zip(*forecasts, of_mixture, strict=True)
    return torch.stack(hits), torch.stack(bins), of_features[0]


def _counted(pits: Tensor, scored: Tensor, levels: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """PITs of shape (n, D) in central intervals, in bins, and in intervals by feature; see :func:`_pit_counts`."""
    narrowest = torch.bucketize(2 * (pits - 0.5).abs(), torch.tensor(levels).to(pits))  # of the intervals that hold it
    by_observation = scored.new_zeros(len(scored), len(levels) + 1).scatter_add_(1, narrowest, scored)
    by_feature = scored.new_zeros(len(levels) + 1, scored.shape[1]).scatter_add_(0, narrowest, scored)
    places = (pits * PIT_BINS).long().clamp(0, PIT_BINS - 1)
    bins = scored.new_zeros(len(scored), PIT_BINS).scatter_add_(1, places, scored)
    return by_observation.cumsum(1)[:, :-1].T, bins.T, by_feature.cumsum(0)[:-1]


def _compare(drawn: Tensor, x: Tensor, below: Tensor, equal: Tensor) -> None:
    """Adds where a draw is smaller than x, and where they are equal but for rounding, in place."""
    same = torch.isclose(drawn, x, rtol=1e-6)
    below += (drawn < x) & ~same
    equal += same


def _rank(below: Tensor, equal: Tensor, num_draws: int) -> Tensor:
    """The PIT from how many of so many draws are smaller and equal; uniform if x is another such draw."""
    return (below + torch.rand_like(below) * (equal + 1)) / (num_draws + 1)


@singledispatch
def _pit(p: Any, x: Tensor) -> Tensor:
    """The distribution function at x, for each number of it; a random rank where there is none."""
    if not p.support.is_discrete and p.event_dim == 0:
        try:
            return p.cdf(x)
        except NotImplementedError:
            pass
    below, equal = torch.zeros(x.shape, device=x.device), torch.zeros(x.shape, device=x.device)
    for _ in range(RANK_DRAWS):
        _compare(p.sample().to(x.dtype), x, below, equal)
    return _rank(below, equal, RANK_DRAWS)


@_pit.register
def _(p: dist.StudentT, x: Tensor) -> Tensor:
    return _by_scipy(scipy.special.stdtr, p.df.expand_as(x), (x - p.loc) / p.scale)


@_pit.register
def _(p: dist.Beta, x: Tensor) -> Tensor:
    return _by_scipy(scipy.special.betainc, p.concentration1.expand_as(x), p.concentration0.expand_as(x), x)


def _by_scipy(function: Callable[..., np.ndarray], *tensors: Tensor) -> Tensor:
    values = function(*(tensor.double().cpu().numpy() for tensor in tensors))
    return torch.as_tensor(values, device=tensors[0].device)


@_pit.register(dist.Independent)
@_pit.register(dist.MaskedDistribution)
def _(p: Any, x: Tensor) -> Tensor:
    return _pit(p.base_dist, x)


@_pit.register
def _(p: SideBySide, x: Tensor) -> Tensor:
    return _side_by_side([_pit(part, value).to(torch.float64) for part, value in _parts(p, x)], x)


def _refuse_binary(chunk: "_Chunk") -> None:
    p = _peeled(chunk.told(0)["fn"])
    if isinstance(p, dist.Bernoulli):
        raise ValueError(f"Site {chunk.site!r} is binary, and has no intervals to speak of. Use pixel_calibration.")
    if isinstance(p, dist.Categorical | dist.OneHotCategorical):
        raise ValueError(
            f"Site {chunk.site!r} is a class: classes have no order, and no intervals. Use predictive_check with "
            "statistics of your own."
        )


def _coverage_table(
    hits: np.ndarray,
    bins: np.ndarray,
    of_features: np.ndarray,
    by_observation: np.ndarray,
    by_feature: np.ndarray,
    levels: np.ndarray,
    forecasts: list[str],
) -> xr.Dataset:
    """From the counts of :func:`_pit_counts`, and how many numbers were scored: shapes (N,) and (D,)."""
    scored = by_observation[:, None, None]
    covered, error = ratio_and_error(np.moveaxis(hits, 2, 0), scored)
    share, share_error = ratio_and_error(np.moveaxis(bins, 2, 0), scored)
    with np.errstate(invalid="ignore", divide="ignore"):
        feature_coverage = of_features / by_feature
        # Hits that are averaged over draws spread less than single ones, so this error is not too small.
        feature_error = np.sqrt(levels * (1 - levels))[:, None] / np.sqrt(by_feature)
    table = xr.Dataset(
        {
            "coverage": (("forecast", "level"), covered),
            "standard_error": (("forecast", "level"), error),
            "p_value": (("forecast", "level"), _two_sided(covered - levels, error)),
            "pit_density": (("forecast", "bin"), PIT_BINS * share),
            "pit_error": (("forecast", "bin"), PIT_BINS * share_error),
            "feature_coverage": (("level", "feature"), feature_coverage),
            "feature_error": (("level", "feature"), np.where(by_feature > 0, feature_error, np.nan)),
        },
        coords={
            "forecast": forecasts,
            "level": levels,
            "bin": (np.arange(PIT_BINS) + 0.5) / PIT_BINS,
            "feature": np.arange(len(by_feature)),
        },
    )
    deviation = covered[0] - levels
    attributes = {
        "calibration_error": float(np.abs(deviation).mean()),
        "noise_floor": float(MEAN_OF_ABSOLUTE_NORMAL * error[0].mean()),
        "mean_deviation": float(deviation.mean()),
        "num_features": len(by_feature),
    }
    return table.assign_attrs(attributes | _worst_features(table))


def _worst_features(table: xr.Dataset) -> dict[str, Any]:
    """Which features are farthest from the level next to 90 %, and how many are off."""
    level = table["level"].values[np.abs(table["level"].values - 0.9).argmin()]
    of_level = table.sel(level=level).dropna("feature", subset=["feature_coverage"])
    z = ((of_level["feature_coverage"] - level) / of_level["feature_error"]).values
    worst = np.abs(z).argsort(kind="stable")[::-1][:WORST]
    adjusted = scipy.stats.false_discovery_control(2 * scipy.stats.norm.sf(np.abs(z)))
    return {
        "feature_level": float(level),
        "worst_features": of_level["feature"].values[worst].tolist(),
        "worst_coverage": of_level["feature_coverage"].values[worst].tolist(),
        "num_features_off": int((adjusted <= 0.05).sum()),
    }


def ratio_and_error(numerator: np.ndarray, denominator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""The ratio of sums over independent observations, :math:`r = \sum_n a_n / \sum_n b_n`, and its standard error

    .. math:: \frac{1}{\sum_n b_n} \sqrt{\frac{N}{N - 1} \sum_n (a_n - r\, b_n)^2}.

    What is summed within an observation may depend on each other in any way (Cochran 1977, Sampling Techniques,
    chapter 6).

    Args:
        numerator: shape ``(N, ...)``.
        denominator: of a shape that broadcasts with it.

    Returns:
        Two arrays of shape ``(...)``, NaN where the denominator is zero.

    >>> ratio, error = ratio_and_error(np.array([1.0, 3.0]), np.array([2.0, 2.0]))
    >>> float(ratio), float(error)
    (1.0, 0.5)
    """
    total = denominator.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = numerator.sum(0) / total
        squares = np.square(numerator - ratio * denominator).sum(0)
        return ratio, np.sqrt(len(numerator) / (len(numerator) - 1) * squares) / total


def _two_sided(difference: np.ndarray, error: np.ndarray) -> np.ndarray:
    """p-values of differences that are normal with these errors."""
    return 2 * scipy.stats.norm.sf(np.abs(_quotient(difference, error)))


# What was observed, and what the story makes of it


@dataclass(frozen=True)
class _Chunk:
    """Some observations, on the story's device.

    Attributes:
        x: what the site scores, as floating point numbers, shape (n, *event).
        scored: which numbers of it count, of the same shape; not those that a mask leaves out.
        marked: discrete latents that the model sums out.
    """

    story: Story
    rows: Columns
    number: int
    site: str
    group: Group
    seed: int
    marked: Assignments
    x: Tensor
    scored: Tensor

    def told(self, draw: int) -> Site:
        """The site when the story is told again: its distribution given new latents, and a new observation."""
        with self.noise(draw), traces.scoring(self.story):
            latents = self._latents() if self.group == "posterior" else {}
            return traces.nodes(traces.retell(self.story.model, self.rows, latents))[self.site]

    def _latents(self) -> dict[str, Tensor]:
        """Draws of the guide; then of what the model sums out, given x and these."""
        drawn = traces.draws(poutine.trace(self.story.guide).get_trace(*self.rows))
        return drawn | discrete.draw_given(self.story.model, self.rows, drawn, self.marked)

    def replicated(self, draw: int) -> Tensor:
        """New observations; numbers that do not count stay."""
        return torch.where(self.scored, self.told(draw)["value"].to(self.x.dtype), self.x)

    def noise(self, *indices: int) -> Any:
        """A unit of this chunk's noise."""
        return noise.unit(self.x.device, self.seed, noise.Purpose.PREDICTIVE, self.number, *indices)


def _chunks(story: Story, columns: Columns, site: str, group: Group, seed: int) -> Iterator[_Chunk]:
    """All observations, some at a time."""
    observed = checks.dry_run(story, *columns)
    if site not in observed:
        raise ValueError(f"The model scores no site {site!r}; it scores {', '.join(map(repr, observed))}.")
    marked = _marked(story, columns)
    _, dtype = traces.device_and_dtype(story)
    for number, first in enumerate(range(0, len(columns[0]), ROWS_AT_ONCE)):
        rows = traces.to_story(story, tuple(column[first : first + ROWS_AT_ONCE] for column in columns))
        with noise.unit(rows[0].device, seed, noise.Purpose.PREDICTIVE, number), traces.scoring(story):
            node = traces.nodes(traces.run(story, *rows)[0])[site]
        x = node["value"] if node["value"].is_floating_point() else node["value"].to(dtype)
        yield _Chunk(story, rows, number, site, group, seed, marked, x, _is_scored(node))


def _num_chunks(columns: Columns) -> int:
    return -(-len(columns[0]) // ROWS_AT_ONCE) if columns else 0


def _marked(story: Story, columns: Columns) -> Assignments:
    """The joint values of the discrete latents that the model sums out."""
    rows = traces.to_story(story, tuple(column[:1] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK), traces.scoring(story):
        return discrete.assignments(discrete.summed_out(*traces.run(story, *rows)))


def _is_scored(site: Site) -> Tensor:
    """Which numbers count, of the shape of the value."""
    shape = site["value"].shape
    outer = torch.as_tensor(True if site["mask"] is None else site["mask"], device=site["value"].device)
    return _mask(site["fn"], shape, site["value"].device) & _over_event(outer, len(shape) - 1).expand(shape)


def _mask(p: Any, shape: torch.Size, device: torch.device) -> Tensor:
    if isinstance(p, dist.MaskedDistribution):
        own = _over_event(torch.as_tensor(p._mask, device=device), p.event_dim)
        return own.expand(shape) & _mask(p.base_dist, shape, device)
    if isinstance(p, dist.Independent):
        return _mask(p.base_dist, shape, device)
    if isinstance(p, SideBySide):
        masks = [_mask(part, value.shape, device) for part, value in _parts(p, torch.zeros(shape, device=device))]
        return _side_by_side(masks, torch.zeros(shape))
    return torch.ones(shape, dtype=torch.bool, device=device)


def _over_event(mask: Tensor, event_dim: int) -> Tensor:
    """A mask of whole events, to broadcast over their numbers."""
    return mask.reshape((*mask.shape, *(1 for _ in range(event_dim))))


def _peeled(p: Any) -> Any:
    """A distribution without what declares its events and masks."""
    while isinstance(p, dist.Independent | dist.MaskedDistribution):
        p = p.base_dist
    return p


def _parts(p: SideBySide, x: Tensor) -> list[tuple[Any, Tensor]]:
    """The distributions that stand side by side, each with its columns of x."""
    values = x.split(p.widths, -1)
    return [(part, value if part.event_dim else value.squeeze(-1)) for part, value in zip(p.parts, values, strict=True)]


def _side_by_side(values: Sequence[Tensor], x: Tensor) -> Tensor:
    """Columns in the order of x, from one value for each of its parts."""
    return torch.cat([value if value.dim() == x.dim() else value.unsqueeze(-1) for value in values], -1)


# Arguments


def _bar(iterable: Any, what: str, progress: bool | None, total: int | None = None) -> Any:
    return tqdm(iterable, desc=what, total=total, disable=None if progress is None else not progress)


def _at_least_two_observations(columns: Columns) -> None:
    if columns and len(columns[0]) < 2:
        raise ValueError("The error of a frequency needs at least 2 observations; found 1.")
