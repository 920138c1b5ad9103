r"""Is the guide calibrated on data that the story itself makes? Ranks, expected coverage, and by how much it is off.

For :math:`z^* \sim p(z)`, :math:`x \sim p(x \mid z^*)` and :math:`z_1, \dots, z_L \sim p(z \mid x)` the rank of
:math:`f(x, z^*)` among :math:`f(x, z_1), \dots, f(x, z_L)` is uniform on 0, ..., L, whatever the function f. Draws of
the guide stand in for those of the posterior, and ranks that are not uniform prove that it is another distribution.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ppl_vae import checks, noise, traces
from ppl_vae.discrete import log_densities
from ppl_vae.evidence.bounds import simulate
from ppl_vae.evidence.joint import Joint, coordinate_names, joint_of
from ppl_vae.evidence.proposals import PARTICLES_PER_UNIT, Block, blocks
from ppl_vae.traces import Columns, Story

FEWEST_DRAWS = 7
LIKELIHOOD, JOINT, DISTANCE = "log p(x | z)", "log p(x, z)", "distance to reference"
ROUNDING = 16  # so many units in the last place are no difference: equal latents are scored in batches of other sizes

Latents = dict[str, Tensor]


def calibration(
    story: Story,
    *columns: Tensor,
    num_observations: int = 1000,
    num_draws: int = 127,
    max_coordinates: int = 100,
    family_wise_error: float = 0.01,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Simulation-based calibration of the guide; draw it with ``plots.calibration``.

    The ranked quantities are every latent coordinate, and three that depend on the data, without which a guide that
    ignores them (q = p(z)) would pass: log p(x | z), log p(x, z), and the distance from z to a reference point that is
    a function of x, the latent behind the most similar one of N other simulated observations. The ECDF of the last one
    is the expected coverage of TARP: above the diagonal the guide is too wide, below it too narrow. Ties are broken at
    random.

    Calibration speaks of observations that the story makes; of real ones only so far as they look the same.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: what the model is called with, from which conditions are taken, as for
            :func:`ppl_vae.evidence_bounds`; the data among them are replaced by simulated ones.
        num_observations: how many are simulated, N.
        num_draws: of the guide for each observation, L.
        max_coordinates: more latent coordinates than these are thinned evenly; the other quantities see all of them.
        family_wise_error: probability that an exact guide fails in any quantity, at most.
        seed: the observations and the noise are a function of it.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset. ``rank`` over (observation, quantity) counts the draws below the truth, 0 to L. Over (quantity,
        fraction) ``ecdf_difference`` is the share of normalized ranks below a fraction, minus the fraction;
        ``band_lower`` and ``band_upper`` over fraction hold it simultaneously, in all fractions and quantities, with
        probability 1 - ``family_wise_error`` or more where the guide is exact (Bonferroni). Over quantity:
        ``kind``; ``p_value`` of uniform ranks; ``verdict``, "fails" where the band is left, else "passes"; the effect
        sizes ``shift``, the mean over observations of (truth - guide's mean) / guide's standard deviation, and
        ``width_ratio``, the standard deviation of the same: 1 where the guide is as wide as it should be, above 1 where
        it is too narrow; both corrected for the finite L, with ``shift_error`` and ``width_ratio_error``, and NaN for
        discrete latents. Over credibility ``coverage``, with ``coverage_lower`` and ``coverage_upper``. Attributes say
        how many quantities fail, which is worst, and the extreme effect sizes of the latent coordinates.

    Raises:
        ValueError: when the story cannot simulate its data, has latents without unconstrained coordinates, or gives
            NaN; or when an argument is out of range.

    Talts et al. 2018, https://arxiv.org/abs/1804.06788 (ranks); Modrák et al. 2023, https://arxiv.org/abs/2211.02383
    (quantities that depend on the data); Säilynoja, Bürkner & Vehtari 2022, https://arxiv.org/abs/2103.10522 (bands);
    Lemos et al. 2023, https://arxiv.org/abs/2302.03026 (TARP).

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> ranks = calibration(vae, num_observations=64, num_draws=15)
    >>> ranks["quantity"].values.tolist()
    ['z[0]', 'z[1]', 'z[2]', 'log p(x | z)', 'log p(x, z)', 'distance to reference']
    """
    _refuse_nonsense(num_observations, num_draws, max_coordinates, family_wise_error)
    simulated, latents = simulate(story, columns, num_observations, seed)
    checks.dry_run(story, *simulated)
    other_seed = noise.unit_seed(seed, noise.Purpose.REFERENCE)
    references = most_similar(simulated, *simulate(story, columns, num_observations, other_seed))
    with traces.scoring(story):
        quantities = _test_quantities(joint_of(story, simulated), latents, max_coordinates)
        parts = [
            _compare(block, quantities, _at(latents, block), _at(references, block), num_draws)
            for block in blocks(quantities.joint, simulated, seed, progress, what="calibration")
        ]
    rank, error = (torch.cat(pieces).cpu().numpy() for pieces in zip(*parts, strict=True))
    error[:, [kind == "discrete" for kind in quantities.kinds]] = np.nan  # numbers of classes have no distances
    attributes = {"num_observations": num_observations, "num_draws": num_draws, "seed": seed}
    of_ranks = _uniformity(rank, quantities.names, num_draws, family_wise_error)
    table = of_ranks.assign(_effects(error)).assign(kind=("quantity", list(quantities.kinds)))
    return table.assign_attrs(attributes | _summary(table), num_coordinates=quantities.num_coordinates)


def _refuse_nonsense(num_observations: int, num_draws: int, max_coordinates: int, family_wise_error: float) -> None:
    checks.check_at_least(2, num_observations=num_observations)
    checks.check_at_least(FEWEST_DRAWS, num_draws=num_draws)
    checks.check_at_least(1, max_coordinates=max_coordinates)
    if not 0 < family_wise_error < 1:
        raise ValueError(f"family_wise_error must lie between 0 and 1; found {family_wise_error}.")


def _at(latents: Latents, block: Block) -> Latents:
    """The latents of a block's observations."""
    return {name: value[block.first : block.first + block.size] for name, value in latents.items()}


# Test quantities


@dataclass(frozen=True)
class _TestQuantities:
    """The functions f(x, z) whose ranks are taken.

    Attributes:
        sites: the latents that the guide draws.
        discrete: those among them that are discrete.
        num_coordinates: of all latents; ``chosen`` are those among them that are ranked one by one.
    """

    joint: Joint
    sites: tuple[str, ...]
    discrete: tuple[str, ...]
    num_coordinates: int
    chosen: Tensor
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    def of(self, columns: Columns, latents: Latents, references: Latents) -> Tensor:
        """Their values at latents of shape (S * N, *event) of N observations, shape (S, N, Q)."""
        num_particles = len(latents[self.sites[0]]) // len(columns[0])
        coordinates, classes = self._coordinates(latents)
        log_prior, log_joint = self._log_densities(traces.as_rows(columns, num_particles), latents)
        reference, reference_classes = (value.repeat(num_particles, 1) for value in self._coordinates(references))
        distance = (coordinates - reference).square().sum(1) + (classes != reference_classes).sum(1)
        chosen = torch.cat([coordinates, classes], dim=1)[:, self.chosen.to(coordinates.device)]
        of_data = torch.stack([log_joint - log_prior, log_joint, distance.sqrt()], dim=1)
        return torch.cat([chosen, of_data], dim=1).double().reshape(num_particles, -1, len(self.names))

    def equal(self, values: Tensor, truth: Tensor) -> Tensor:
        """Where values are the truth's, but for rounding."""
        rounding = ROUNDING * torch.finfo(traces.device_and_dtype(self.joint.story)[1]).eps
        return (values == truth) | ((values - truth).abs() <= rounding * truth.abs())

    def _coordinates(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Continuous latents, unconstrained and in prior standard deviations, and discrete ones as they are."""
        first = latents[self.sites[0]]
        nothing = torch.zeros(len(first), 0, device=first.device, dtype=traces.device_and_dtype(self.joint.story)[1])
        continuous = self.joint.space.coordinates(latents) if self.joint.space else nothing
        classes = [latents[name].reshape(len(first), -1).to(continuous) for name in self.discrete]
        return continuous, torch.cat([nothing, *classes], dim=1)

    def _log_densities(self, rows: Columns, latents: Latents) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x, z), sites that the model sums out summed out; shapes (S * N,)."""

        def densities(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(self.sites, tensors[len(rows) :], strict=True))
            return log_densities(self.joint.model, tensors[: len(rows)], values, self.joint.marked)

        log_prior, log_joint = self.joint.chunks.map(densities, *rows, *(latents[name] for name in self.sites))
        return log_prior, log_joint


def _test_quantities(joint: Joint, latents: Latents, max_coordinates: int) -> _TestQuantities:
    sites = tuple(name for name in latents if name not in joint.marked.values)
    if not sites:
        raise ValueError("The model sums out every latent: the guide draws none, and there is nothing to calibrate.")
    if joint.why_no_space:
        raise ValueError(f"calibration measures latents in unconstrained coordinates. {joint.why_no_space}")
    space = joint.space
    continuous = space.event_shapes if space else {}
    discrete = {name: latents[name].shape[1:] for name in sites if name not in continuous}
    names = [*coordinate_names(continuous), *coordinate_names(discrete)]
    kinds = ["coordinate"] * joint.dim + ["discrete"] * (len(names) - joint.dim)
    chosen = thinned(len(names), max_coordinates)
    return _TestQuantities(
        joint=joint,
        sites=sites,
        discrete=tuple(discrete),
        num_coordinates=len(names),
        chosen=torch.from_numpy(chosen),
        names=(*(names[number] for number in chosen), LIKELIHOOD, JOINT, DISTANCE),
        kinds=(*(kinds[number] for number in chosen), "log density", "log density", "distance"),
    )


def thinned(size: int, most: int) -> np.ndarray:
    """At most so many of the numbers 0, ..., size - 1, evenly spread.

    >>> thinned(5, 3)
    array([0, 2, 4])
    """
    return np.linspace(0, size - 1, min(size, most)).round().astype(int)


def most_similar(columns: Columns, others: Columns, latents: Latents) -> Latents:
    """The latent behind the other observation that is nearest to each, every number of it standardized."""
    observed, other = (_as_table(some) for some in (columns, others))
    scaler = StandardScaler().fit(other)
    neighbors = NearestNeighbors(n_neighbors=1).fit(scaler.transform(other))
    nearest = torch.from_numpy(neighbors.kneighbors(scaler.transform(observed), return_distance=False)[:, 0])
    return {name: value[nearest.to(value.device)] for name, value in latents.items()}


def _as_table(columns: Columns) -> np.ndarray:
    """Columns as rows of numbers, missing ones zero."""
    return torch.cat([column.reshape(len(column), -1).double().nan_to_num() for column in columns], dim=1).cpu().numpy()


# Ranks


def _compare(
    block: Block, quantities: _TestQuantities, truth: Latents, references: Latents, num_draws: int
) -> tuple[Tensor, Tensor]:
    """Ranks of the truth among draws of the guide, and its standardized error; both of shape (N, Q)."""
    latents = {name: truth[name] for name in quantities.sites}
    at_truth = quantities.of(block.columns, latents, references)[0]
    below, tied, total, squares = (torch.zeros_like(at_truth) for _ in range(4))
    for number, start in enumerate(range(0, num_draws, PARTICLES_PER_UNIT)):
        with block.noise(noise.Purpose.CALIBRATION, number):
            draws, _ = block.joint.guide_latents(block.columns, min(PARTICLES_PER_UNIT, num_draws - start))
        values = quantities.of(block.columns, draws, references)
        _refuse_nan(block, values + at_truth, quantities.names)
        same = quantities.equal(values, at_truth)
        below += ((values < at_truth) & ~same).sum(0)
        tied += same.sum(0)
        difference = values - at_truth  # moments around the truth: no large squares are subtracted
        total += difference.sum(0)
        squares += difference.square().sum(0)
    with block.noise(noise.Purpose.CALIBRATION, -(-num_draws // PARTICLES_PER_UNIT)):
        rank = below + (torch.rand_like(tied) * (tied + 1)).floor()
    return rank.long(), _standardized_error(total, squares, num_draws)


def _refuse_nan(block: Block, values: Tensor, names: Sequence[str]) -> None:
    _, row, quantity = values.isnan().nonzero(as_tuple=True)
    if len(row):
        raise ValueError(
            f"{names[int(quantity[0])]} is NaN for the simulated observation {block.numbers[int(row[0])]}. The model "
            "or the guide has a degenerate distribution there; look at their scales."
        )


def _standardized_error(total: Tensor, squares: Tensor, num_draws: int) -> Tensor:
    """(truth - mean) / sd of the draws, scaled to have variance 1 where truth and draws are normal and alike."""
    mean = total / num_draws
    variance = (squares - num_draws * mean.square()) / (num_draws - 1)
    of_t = (1 + 1 / num_draws) * (num_draws - 1) / (num_draws - 3)
    return torch.where(variance > 0, -mean / (of_t * variance).sqrt(), torch.nan)


# Uniform ranks


def rank_counts(rank: ArrayLike, num_draws: int) -> np.ndarray:
    """How many ranks of shape (N, ...) lie below 1, ..., L; shape (L, ...)."""
    return np.stack([(np.asarray(rank) < value).sum(0) for value in range(1, num_draws + 1)])


def simultaneous_band(num_observations: int, num_draws: int, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest :func:`rank_counts` that are no surprise, shapes (L,).

    N uniform ranks leave the band somewhere with probability ``error`` or less, and equally improbably everywhere:
    pointwise binomial intervals whose common level makes them simultaneous (Säilynoja, Bürkner & Vehtari 2022,
    https://arxiv.org/abs/2103.10522).

    >>> lower, upper = simultaneous_band(num_observations=100, num_draws=3, error=0.05)
    >>> lower.tolist(), upper.tolist()
    ([15, 39, 65], [35, 61, 85])
    """
    fractions = np.arange(1, num_draws + 1) / (num_draws + 1)
    narrow_enough, too_narrow = math.log(error / num_draws), math.log(error)  # by the union bound
    while too_narrow - narrow_enough > 1e-6:
        middle = (narrow_enough + too_narrow) / 2
        inside = _probability_inside(*_intervals(math.exp(middle), num_observations, fractions), num_observations)
        narrow_enough, too_narrow = (middle, too_narrow) if inside >= 1 - error else (narrow_enough, middle)
    return _intervals(math.exp(narrow_enough), num_observations, fractions)


def uniformity_p_value(rank: ArrayLike, num_draws: int) -> float:
    """Probability that N uniform ranks on 0, ..., L leave a band that these ranks touch; exact.

    The statistic is the smallest of the two-sided binomial tail probabilities of the :func:`rank_counts`.

    >>> uniformity_p_value([0, 1, 2, 3], num_draws=3)
    1.0
    """
    counts, num_observations = rank_counts(rank, num_draws), len(np.asarray(rank))
    fractions = np.arange(1, num_draws + 1) / (num_draws + 1)
    below = stats.binom.cdf(counts, num_observations, fractions)
    above = stats.binom.sf(counts - 1, num_observations, fractions)
    tail = 2 * min(below.min(), above.min())
    if tail >= 1:
        return 1.0
    lower, upper = _intervals(tail * (1 + 1e-9), num_observations, fractions)
    inside = _probability_inside(lower, upper, num_observations)
    return float(min(1.0, max(1 - inside, tail / 2)))  # the smallest tail alone is as probable, where 1 - 1 is rounding


def _intervals(tail: float, num_observations: int, fractions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The counts at each fraction whose two binomial tails, they included, both have half this probability or more."""
    below = _binomial_cdf(num_observations, len(fractions)) < tail / 2
    return below.sum(0), num_observations - below[:, ::-1].sum(0)


@functools.lru_cache(maxsize=4)
def _binomial_cdf(num_observations: int, num_draws: int) -> np.ndarray:
    """P(count <= n) of the ranks below each fraction, shape (N + 1, L); scipy's ``ppf`` fails far out in the tails."""
    fractions = np.arange(1, num_draws + 1) / (num_draws + 1)
    return stats.binom.cdf(np.arange(num_observations + 1)[:, None], num_observations, fractions)


def _probability_inside(lower: np.ndarray, upper: np.ndarray, num_observations: int) -> float:
    """Probability that the counts of N uniform ranks lie in all intervals.

    Ranks of equal probability are the increments of a Poisson process, given that there are N in all; so the count
    moves from one rank to the next by a convolution.
    """
    if (lower > upper).any():
        return 0.0
    rate = num_observations / (len(lower) + 1)
    largest_step = (np.append(upper, num_observations) - np.append(0, lower)).max()
    increments = stats.poisson.pmf(np.arange(largest_step + 1), rate)
    inside, first = np.ones(1), 0
    for low, high in zip(np.append(lower, num_observations), np.append(upper, num_observations), strict=True):
        inside = np.convolve(inside, increments)[low - first : high - first + 1]
        first = low
    return float(inside[0] / stats.poisson.pmf(num_observations, num_observations))


# The table


def _uniformity(rank: np.ndarray, names: Sequence[str], num_draws: int, family_wise_error: float) -> xr.Dataset:
    """Ranks, their ECDFs with bands, and what the bands say."""
    num_observations, num_quantities = rank.shape
    error = family_wise_error / num_quantities
    fraction = np.arange(num_draws + 2) / (num_draws + 1)
    ecdf = _from_0_to_1(rank_counts(rank, num_draws) / num_observations)
    lower, upper = (
        _from_0_to_1(bound / num_observations) for bound in simultaneous_band(num_observations, num_draws, error)
    )
    p_value = np.array([uniformity_p_value(column, num_draws) for column in rank.T])
    variables = {
        "rank": (("observation", "quantity"), rank),
        "ecdf_difference": (("quantity", "fraction"), ecdf.T - fraction),
        "band_lower": ("fraction", lower - fraction),
        "band_upper": ("fraction", upper - fraction),
        "p_value": ("quantity", p_value),
        "verdict": ("quantity", np.where(p_value <= error, "fails", "passes")),
        "coverage": ("credibility", ecdf[:, list(names).index(DISTANCE)]),
        "coverage_lower": ("credibility", lower),
        "coverage_upper": ("credibility", upper),
    }
    coordinates = {
        "observation": np.arange(num_observations),
        "quantity": list(names),
        "fraction": fraction,
        "credibility": fraction,
    }
    attributes = {"family_wise_error": family_wise_error, "correction": "Bonferroni", "error_per_quantity": error}
    return xr.Dataset(variables, coordinates, attributes)


def _from_0_to_1(values: np.ndarray) -> np.ndarray:
    """What a distribution function is before its first and behind its last point."""
    ends = [(1, 1)] + [(0, 0)] * (values.ndim - 1)
    padded = np.pad(values.astype(float), ends)
    padded[-1] = 1.0
    return padded


def _effects(error: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    """Mean and spread of standardized errors of shape (N, Q), with standard errors; those that are NaN left out."""
    moments = [_moments(column[np.isfinite(column)]) for column in error.T]
    shift, ratio, shift_error, ratio_error = np.array(moments).T
    return {
        "shift": ("quantity", shift),
        "shift_error": ("quantity", shift_error),
        "width_ratio": ("quantity", ratio),
        "width_ratio_error": ("quantity", ratio_error),
    }


def _moments(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean and standard deviation, and the standard error of each; NaN where there are too few values."""
    if len(values) < 2:
        return math.nan, math.nan, math.nan, math.nan
    mean, variance = float(values.mean()), float(values.var(ddof=1))
    fourth = float(np.mean((values - mean) ** 4))
    error_of_sd = math.sqrt(max(fourth - variance**2, 0.0) / (4 * variance * len(values))) if variance else 0.0
    return mean, math.sqrt(variance), math.sqrt(variance / len(values)), error_of_sd


def _summary(table: xr.Dataset) -> dict[str, str | int | float]:
    """What a report says: failures, the worst quantity, the extreme effect sizes of latent coordinates."""
    worst = table.isel(quantity=int(table["p_value"].values.argmin()))
    said: dict[str, str | int | float] = {
        "num_quantities": table.sizes["quantity"],
        "num_failed": int((table["verdict"] == "fails").sum()),
        "worst_quantity": str(worst["quantity"].item()),
        "smallest_p_value": float(worst["p_value"]),
        "largest_coverage_gap": float(abs(table["coverage"] - table["credibility"]).max()),
        "coverage_verdict": str(table["verdict"].sel(quantity=DISTANCE).item()),
    }
    latent = table.isel(quantity=(table["kind"] == "coordinate").values)
    if latent.sizes["quantity"]:
        for name, values, place in (
            ("largest_shift", latent["shift"], abs(latent["shift"]).values.argmax()),
            ("smallest_width_ratio", latent["width_ratio"], latent["width_ratio"].values.argmin()),
            ("largest_width_ratio", latent["width_ratio"], latent["width_ratio"].values.argmax()),
        ):
            said[name] = float(values[int(place)])
            said[f"{name}_quantity"] = str(latent["quantity"].values[int(place)])
    return said
