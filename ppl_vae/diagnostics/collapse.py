r"""Which latents does the guide use? KL and activity by unit, mutual information, aggregate posterior against prior.

.. math::

    \frac1N \sum_n KL(q(z \mid x_n), p(z)) = I(x; z) + KL(q(z), p(z)), \qquad q(z) = \frac1N \sum_n q(z \mid x_n).

Hoffman & Johnson 2016, ELBO surgery (http://approximateinference.org/accepted/HoffmanJohnson2016.pdf): a large KL is
worth something where it is information; the other part is a prior that the guide, taken together, does not match.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributions as td
import xarray as xr
from pyro import poutine
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor
from torch.distributions import constraints

from ppl_vae import checks, noise, traces
from ppl_vae.discrete import Assignments, log_densities, tell
from ppl_vae.evidence import sharing
from ppl_vae.evidence.joint import Joint, coordinate_names, joint_of
from ppl_vae.evidence.proposals import PARTICLES_PER_UNIT, Block, blocks
from ppl_vae.traces import Columns, Site, Story, sample_sites

ACTIVE = 0.01  # Burda, Grosse & Salakhutdinov 2016
MOST_POINTS = 1000  # each is scored under the guide of every observation
MOST_DRAWS = 5000
ROWS_COMPARED = 256
NEAR_CAP = 1.0  # nats
ROWS_TRIED, DRAWS_TRIED = 8, 64

Latents = dict[str, Tensor]


def collapse(
    story: Story, *columns: Tensor, num_draws: int = 32, seed: int = 0, progress: bool | None = None
) -> xr.Dataset:
    r"""Posterior collapse over the given observations; draw it with ``plots.collapse``.

    A unit is one coordinate of the latents, unconstrained and in prior standard deviations. It is active where
    :math:`Var_x\, E_q[u \mid x] > 0.01` (Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519), the
    mean being measured from the prior's, given the same conditions. Its KL is known where guide and prior factorise
    within a site, in closed form where there is one and it does not depend on other latents; other sites have a KL as a
    whole. Where a site depends on another that the guide draws later, its number is its share of the sum, the mean of
    log q - log p; only the sum is a KL then.

    The information :math:`I(x; z) = E \log q(z \mid x) - E \log q(z)` is about which of the N observations it was, so
    at most log N; for a population that the observations are drawn from it is a lower bound in expectation, and
    KL(q(z), p(z)) an upper one. Close to log N both say nothing but that N is small. Where the prior depends on
    conditions, q(z) is a mixture over the observations with the same ones, and the information is what x tells beyond
    them.

    The aggregate posterior is compared with the prior by one draw of each for every observation. Its p-values hold
    where the observations are independent; several draws for one observation would not be.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, and a continuous latent.
        columns: as for :func:`ppl_vae.log_evidence`.
        num_draws: of the guide for each observation, behind posterior means and Monte Carlo KLs.
        seed: the noise is a function of it.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset. Over unit: ``kl`` and ``kl_error`` (nats; NaN in a site that does not factorise), ``mean_variance``
        of the posterior mean, ``active`` (1 or 0), ``marginal_shift`` and ``marginal_sd_ratio`` of aggregate posterior
        against prior (in prior standard deviations), their ``wasserstein`` distance, and the Kolmogorov-Smirnov
        distance ``ks`` with ``ks_p_value``. Over site: ``site_kl``, ``site_kl_error``, ``kl_method`` ("analytic" or
        "Monte Carlo"), ``kl_level`` ("unit" or "site"). Over (unit, other_unit) ``correlation`` in the aggregate
        posterior and ``prior_correlation``. Over (draw, unit) ``posterior_draw`` and ``prior_draw``. Attributes hold
        ``kl``, ``mutual_information`` with its cap and whether it comes within 1 nat of that, ``marginal_kl`` =
        KL(q(z), p(z)), their Monte Carlo errors, the number of active units, the worst marginal and the worst pair with
        p-values (Bonferroni), and ``classifier_accuracy`` on held-out draws with its p-value, 0.5 where no difference
        is found (Lopez-Paz & Oquab 2017, https://arxiv.org/abs/1610.06545).

    Raises:
        ValueError: when the story has no continuous latent, or one without unconstrained coordinates or whose density
            cannot be computed; when there are fewer than two observations or draws; or when a KL is not finite.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> of_units = collapse(vae, torch.eye(5).repeat(8, 1))
    >>> of_units["kl"].sizes, of_units["kl_method"].item()
    (Frozen({'unit': 3}), 'analytic')
    """
    checks.check_at_least(2, num_draws=num_draws)
    checks.dry_run(story, *columns)
    if len(columns[0]) < 2:
        raise ValueError("Whether a posterior depends on x shows on two observations or more; found 1.")
    with traces.scoring(story):
        joint = joint_of(story, columns)
        _refuse_latents(joint)
        groups = _groups(joint, columns)
        divergence = _divergence(joint, columns)
        about = [
            _look(block, divergence, num_draws, groups.prior_depends)
            for block in blocks(joint, columns, seed, progress, what="collapse")
        ]
        seen = _Seen(*(np.concatenate(parts) for parts in zip(*about, strict=True)))
        surgery = _surgery(joint, columns, seen.posterior_draw, groups, seed)
    table = _of_divergence(seen, divergence).assign(_activity(seen))
    table = table.assign(_aggregate(seen, seed)).assign_coords(unit=divergence.units, other_unit=divergence.units)
    attributes = {"unit": "nats", "num_observations": len(columns[0]), "num_draws": num_draws, "seed": seed}
    return table.assign_attrs(attributes | surgery | _summary(table) | _two_samples(table, seed))


def _refuse_latents(joint: Joint) -> None:
    if joint.why_no_space:
        raise ValueError(f"collapse measures latents in unconstrained coordinates. {joint.why_no_space}")
    if joint.space is None:
        raise ValueError("collapse looks at continuous latents; all latents of this story are discrete.")
    if not joint.can_move:
        raise ValueError(
            "collapse sums out discrete latents, and those of this story have infinitely or too many values."
        )


def _some_rows(size: int, most: int, seed: int) -> Tensor:
    """At most so many row numbers, in order; at random, for even steps might always meet the same label."""
    return noise.permutation(size, seed)[:most].sort().values


# Conditions


@dataclass(frozen=True)
class _Groups:
    """Observations that have the same prior.

    Attributes:
        number: the group of each observation, shape (N,).
        prior_depends: whether the prior depends on conditions; if not, there is one group.
    """

    number: Tensor
    prior_depends: bool

    @property
    def log_sizes(self) -> Tensor:
        """Log of the number of observations in each observation's group, shape (N,)."""
        return self.number.bincount()[self.number].double().log()


def _groups(joint: Joint, columns: Columns) -> _Groups:
    number = torch.zeros(len(columns[0]), dtype=torch.long)
    if not _prior_depends_on_conditions(joint, columns):
        return _Groups(number, False)
    on_device = traces.to_story(joint.story, columns)
    scored = sharing.scored_columns(joint.story, on_device)
    for group, rows in enumerate(sharing.rows_with_equal_conditions(on_device, scored)):
        number[rows.cpu()] = group
    return _Groups(number, True)


def _prior_depends_on_conditions(joint: Joint, columns: Columns) -> bool:
    """Whether points have another prior density beside the conditions of the next observation."""
    chosen = _some_rows(len(columns[0]), ROWS_COMPARED, 0)
    rows = traces.to_story(joint.story, tuple(column[chosen] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        (points,) = joint.prior_points(rows, 1)
    moved = tuple(row.roll(1, 0) for row in rows)
    here, there = (joint.log_prob(some, points)[0] for some in (rows, moved))
    return not torch.allclose(here, there, rtol=1e-4, atol=1e-4)


# KL


@dataclass(frozen=True)
class _Part:
    """A site, or all of them where the model sums out a latent on which they depend, and how its KL is taken.

    Attributes:
        size: the number of its unconstrained coordinates, 0 for a discrete latent.
        by_unit: guide and prior are independent over its coordinates.
        analytic: there is a closed form, and it does not depend on other latents.
    """

    name: str
    size: int
    by_unit: bool
    analytic: bool

    def divergence(self, q: Site, p: Site) -> Tensor:
        """Its KL, or draws with that mean, by coordinate where that is possible; shape (R, width)."""
        z, fns = q["value"], _by_number(q["fn"], p["fn"])
        values = td.kl_divergence(*fns) if self.analytic else fns[0].log_prob(z) - fns[1].log_prob(z)
        return values.reshape(len(z), -1)


def _by_number(q: Any, p: Any) -> tuple[Any, Any]:
    """Both as distributions of single numbers where both are independent over dimensions, else both as they are."""
    bases = _base(q), _base(p)
    return (q, p) if any(base.event_shape for base in bases) else bases


def _base(fn: Any) -> Any:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return fn


@dataclass(frozen=True)
class _Divergence:
    """KL(q(z | x), p(z)), part by part.

    Attributes:
        latents: the sites that the guide draws.
        units: names of the unconstrained coordinates.
    """

    joint: Joint
    latents: tuple[str, ...]
    parts: tuple[_Part, ...]
    units: list[str]

    @property
    def analytic(self) -> bool:
        """Whether no part needs draws."""
        return all(part.analytic for part in self.parts)

    def of(self, columns: Columns, latents: Latents, num_particles: int) -> list[Tensor]:
        """Of each part, its KL or draws with that mean, for latents of shape (S * N, *event); (S, N, width)."""
        rows = traces.as_rows(columns, num_particles)

        def of_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(self.latents, tensors[len(rows) :], strict=True))
            return self._of_rows(tensors[: len(rows)], values)

        found = self.joint.chunks.map(of_rows, *rows, *(latents[name] for name in self.latents))
        return [values.double().unflatten(0, (num_particles, -1)) for values in found]

    def _of_rows(self, rows: Columns, latents: Latents) -> tuple[Tensor, ...]:
        if self.joint.marked.values:
            log_q, _ = log_densities(self.joint.story.guide, rows, latents, Assignments())
            log_p, _ = log_densities(self.joint.model, rows, latents, self.joint.marked)
            return ((log_q - log_p).unsqueeze(1),)
        q, p = _sites(self.joint, rows, latents)
        return tuple(part.divergence(q[part.name], p[part.name]) for part in self.parts)


def _sites(joint: Joint, rows: Columns, latents: Latents) -> tuple[dict[str, Site], dict[str, Site]]:
    """Guide and model told with these latents."""
    q, p = (sample_sites(tell(program, rows, latents)) for program in (joint.story.guide, joint.model))
    return q, p


def _divergence(joint: Joint, columns: Columns) -> _Divergence:
    """How the KL of a story is taken, tried with some draws for the first observations."""
    rows = traces.to_story(joint.story, tuple(column[:ROWS_TRIED] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        tried, _ = joint.guide_latents(rows, DRAWS_TRIED)
    assert joint.space is not None
    shapes = joint.space.event_shapes
    sizes = {name: shapes[name].numel() if name in shapes else 0 for name in tried}
    if joint.marked.values:
        parts = [_Part(", ".join(sizes), joint.dim, joint.dim == 1, False)]
    else:
        q, p = _sites(joint, traces.as_rows(rows, DRAWS_TRIED), tried)
        parts = [_part(name, size, q[name]["fn"], p[name]["fn"]) for name, size in sizes.items()]
        order = list(shapes)  # of the coordinates; discrete latents come last
        parts.sort(key=lambda part: order.index(part.name) if part.name in shapes else len(order))
    return _Divergence(joint, tuple(tried), tuple(parts), coordinate_names(shapes))


def _part(name: str, size: int, q: Any, p: Any) -> _Part:
    fns = _by_number(q, p)
    by_unit = size == 1 or (size > 1 and not any(fn.event_shape for fn in fns))
    try:
        draws = td.kl_divergence(*fns).unflatten(0, (DRAWS_TRIED, -1))
        analytic = bool(torch.isclose(draws, draws[:1], rtol=1e-4, atol=1e-6).all())
    except NotImplementedError:
        analytic = False
    return _Part(name, size, by_unit, analytic)


# Block by block


@dataclass(frozen=True)
class _Seen:
    """What is known of each observation, first dimension N.

    Attributes:
        kl, kl_variance: by coordinate, (N, K), and the square of its Monte Carlo error.
        site_kl, site_kl_variance: by part, (N, parts).
        total_variance: the square of the Monte Carlo error of the whole KL, (N,).
        mean, mean_variance: the posterior mean, measured from the prior's where that depends on conditions, (N, K).
        posterior_draw, prior_draw: one draw, (N, K).
    """

    kl: np.ndarray
    kl_variance: np.ndarray
    site_kl: np.ndarray
    site_kl_variance: np.ndarray
    total_variance: np.ndarray
    mean: np.ndarray
    mean_variance: np.ndarray
    posterior_draw: np.ndarray
    prior_draw: np.ndarray


def _look(block: Block, divergence: _Divergence, num_draws: int, prior_depends: bool) -> tuple[np.ndarray, ...]:
    """The fields of :class:`_Seen` for the observations of a block."""
    u, prior_u, by_part = _draw(block, divergence, num_draws, prior_depends)
    by_unit = [
        values if part.by_unit else torch.full((len(values), block.size, part.size), math.nan)
        for part, values in zip(divergence.parts, by_part, strict=True)
        if part.size
    ]
    sites = torch.stack([values.sum(2) for values in by_part], dim=2)
    _refuse_infinite(block, sites.sum(2))
    mean, mean_variance = _mean_and_variance(u)
    if (known := _mean_in_closed_form(block)) is not None:
        mean, mean_variance = known, torch.zeros_like(known)
    if prior_depends:
        prior_mean, prior_variance = _mean_and_variance(prior_u)
        mean, mean_variance = mean - prior_mean, mean_variance + prior_variance
    found = (
        *_mean_and_variance(torch.cat([values.to(sites) for values in by_unit], dim=2)),
        *_mean_and_variance(sites),
        _mean_and_variance(sites.sum(2))[1],
        *(mean, mean_variance, u[0], prior_u[0]),
    )
    return tuple(values.cpu().numpy() for values in found)


def _mean_in_closed_form(block: Block) -> Tensor | None:
    """The guide's mean, shape (N, K), where it draws all latents at one site, over all numbers, and knows it."""
    space = block.joint.space
    assert space is not None
    with block.noise(noise.Purpose.COLLAPSE):
        sites = sample_sites(poutine.trace(block.joint.story.guide).get_trace(*block.columns))
    if len(sites) > 1 or set(sites) != set(space.event_shapes):
        return None
    ((name, site),) = sites.items()
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        return None
    known = support in (constraints.real, constraints.real_vector) and bool(mean.isfinite().all())
    return space.coordinates({name: mean}) if known else None


def _draw(
    block: Block, divergence: _Divergence, num_draws: int, prior_depends: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Draws of the guide and of the prior, (S, N, K), and what they say of the KL of each part, (S, N, width).

    One draw of the prior is enough where its mean is not wanted, and one value where the KL has a closed form.
    """
    joint, columns = block.joint, block.columns
    assert joint.space is not None
    points, prior_points, terms = [], [], []
    for number, size in enumerate(_pieces(num_draws)):
        with block.noise(noise.Purpose.COLLAPSE, number):
            latents, _ = joint.guide_latents(columns, size)
            if prior_depends or number == 0:
                prior_points.append(joint.prior_points(columns, size if prior_depends else 1))
        points.append(joint.space.coordinates(latents).unflatten(0, (size, -1)))
        if not divergence.analytic:
            terms.append(divergence.of(columns, latents, size))
        elif number == 0:
            terms.append(divergence.of(columns, {name: value[: block.size] for name, value in latents.items()}, 1))
    by_part = [torch.cat(pieces) for pieces in zip(*terms, strict=True)]
    return torch.cat(points).double(), torch.cat(prior_points).double(), by_part


def _pieces(num_draws: int) -> Iterator[int]:
    """So many draws, unit by unit."""
    for start in range(0, num_draws, PARTICLES_PER_UNIT):
        yield min(PARTICLES_PER_UNIT, num_draws - start)


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension, and the variance of that mean; 0 for a closed form, which is a single value."""
    mean = values.mean(0)
    return mean, values.var(0) / len(values) if len(values) > 1 else torch.zeros_like(mean)


def _refuse_infinite(block: Block, kl: Tensor) -> None:
    if len(rows := (~kl.isfinite()).any(0).nonzero().flatten().cpu()):
        numbers = block.numbers[rows.numpy()].tolist()
        raise ValueError(
            f"KL(q(z | x), p(z)) is not finite for the observations {numbers}. The model or the guide has a degenerate "
            "distribution there; look at their scales."
        )


# ELBO surgery


def _surgery(
    joint: Joint, columns: Columns, draws: np.ndarray, groups: _Groups, seed: int
) -> dict[str, float | int | str]:
    """The two parts of the KL: log q(z | x) - log q(z), and log q(z) - log p(z), at one draw for each observation."""
    chosen = _some_rows(len(draws), MOST_POINTS, seed)
    rows = traces.to_story(joint.story, tuple(column[chosen] for column in columns))
    (points,) = traces.to_story(joint.story, (torch.from_numpy(draws)[chosen],))
    log_p = joint.log_prob(rows, points)[0].double().cpu()
    log_own, log_sum = torch.full_like(log_p, math.nan), torch.full_like(log_p, -math.inf)
    for block in blocks(joint, columns, seed, progress=False):
        log_q = _log_guide_of_all(block, points)
        numbers = torch.from_numpy(block.numbers)
        same = groups.number[chosen].unsqueeze(1) == groups.number[numbers]
        log_sum = torch.logaddexp(log_sum, log_q.masked_fill(~same, -math.inf).logsumexp(1))
        point, row = (chosen.unsqueeze(1) == numbers).nonzero(as_tuple=True)
        log_own[point] = log_q[point, row]
    log_sizes = groups.log_sizes[chosen]
    log_aggregate = log_sum - log_sizes
    information, information_error = _mean_and_error(log_own - log_aggregate)
    marginal, marginal_error = _mean_and_error(log_aggregate - log_p)
    cap = float(log_sizes.mean())
    return {
        "mutual_information": information,
        "mutual_information_error": information_error,
        "mutual_information_cap": cap,
        "information_is_capped": int(information > cap - NEAR_CAP),
        "marginal_kl": marginal,
        "marginal_kl_error": marginal_error,
        "num_points": len(chosen),
        "num_groups": int(groups.number.max()) + 1,
    }


def _log_guide_of_all(block: Block, points: Tensor) -> Tensor:
    """log q(u_m | x_n) for M points and the N observations of a block, shape (M, N)."""
    parts = [
        block.joint.log_guide(block.columns, piece.unsqueeze(1).expand(-1, block.size, -1))
        for piece in points.split(PARTICLES_PER_UNIT)
    ]
    return torch.cat(parts).double().cpu()


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


# The table


def _of_divergence(seen: _Seen, divergence: _Divergence) -> xr.Dataset:
    """KLs over units and sites, and the whole."""
    variables = {
        "kl": ("unit", seen.kl.mean(0)),
        "kl_error": ("unit", _error_of_mean(seen.kl_variance)),
        "site_kl": ("site", seen.site_kl.mean(0)),
        "site_kl_error": ("site", _error_of_mean(seen.site_kl_variance)),
        "kl_method": ("site", ["analytic" if part.analytic else "Monte Carlo" for part in divergence.parts]),
        "kl_level": ("site", ["unit" if part.by_unit else "site" for part in divergence.parts]),
    }
    attributes = {
        "kl": float(seen.site_kl.sum(1).mean()),
        "kl_error": float(_error_of_mean(seen.total_variance)),
    }
    return xr.Dataset(variables, {"site": [part.name for part in divergence.parts]}, attributes)


def _error_of_mean(variance: np.ndarray) -> np.ndarray:
    """The error of a mean over observations, each with its own variance."""
    return np.sqrt(variance.sum(0)) / len(variance)


def _activity(seen: _Seen) -> dict[str, tuple[str, np.ndarray]]:
    """The variance of the posterior mean over observations, without that of the draws which estimate it."""
    variance = (seen.mean.var(0, ddof=1) - seen.mean_variance.mean(0)).clip(min=0)
    return {"mean_variance": ("unit", variance), "active": ("unit", (variance > ACTIVE).astype(int))}


def _aggregate(seen: _Seen, seed: int) -> dict[str, Any]:
    """Draws of the aggregate posterior beside draws of the prior: margins and correlations."""
    rows = _some_rows(len(seen.posterior_draw), MOST_DRAWS, seed).numpy()
    q, p = seen.posterior_draw[rows], seen.prior_draw[rows]
    spread = p.std(0, ddof=1)
    tests: list[Any] = [stats.ks_2samp(*pair, method="asymp") for pair in zip(q.T, p.T, strict=True)]
    return {
        "marginal_shift": ("unit", (q.mean(0) - p.mean(0)) / spread),
        "marginal_sd_ratio": ("unit", q.std(0, ddof=1) / spread),
        "wasserstein": ("unit", [stats.wasserstein_distance(*pair) for pair in zip(q.T, p.T, strict=True)]),
        "ks": ("unit", [test.statistic for test in tests]),
        "ks_p_value": ("unit", [test.pvalue for test in tests]),
        "correlation": (("unit", "other_unit"), np.atleast_2d(np.corrcoef(q.T))),
        "prior_correlation": (("unit", "other_unit"), np.atleast_2d(np.corrcoef(p.T))),
        "posterior_draw": (("draw", "unit"), q),
        "prior_draw": (("draw", "unit"), p),
    }


def _summary(table: xr.Dataset) -> dict[str, str | int | float]:
    """What a report says of units, margins and pairs."""
    units = table["unit"].values
    worst = int(table["ks"].values.argmax())
    shifted = int(abs(table["marginal_shift"]).values.argmax())
    return {
        "num_units": len(units),
        "num_active": int(table["active"].sum()),
        "worst_marginal": str(units[worst]),
        "worst_marginal_ks": float(table["ks"][worst]),
        "worst_marginal_p_value": min(1.0, float(table["ks_p_value"][worst]) * len(units)),
        "largest_marginal_shift": float(table["marginal_shift"][shifted]),
        "largest_marginal_shift_unit": str(units[shifted]),
        "smallest_marginal_sd_ratio": float(table["marginal_sd_ratio"].min()),
        "largest_marginal_sd_ratio": float(table["marginal_sd_ratio"].max()),
    } | _worst_pair(table)


def _worst_pair(table: xr.Dataset) -> dict[str, str | float]:
    """The two units whose correlation differs most from the prior's, by Fisher's z, which is N(0, 2 / (n - 3))."""
    units = table["unit"].values
    pairs = list(itertools.combinations(range(len(units)), 2))
    if not pairs or table.sizes["draw"] < 4:
        return {}
    here, prior = (table[name].values[tuple(zip(*pairs, strict=True))] for name in ("correlation", "prior_correlation"))
    difference = np.arctanh(here.clip(-1 + 1e-12, 1 - 1e-12)) - np.arctanh(prior.clip(-1 + 1e-12, 1 - 1e-12))
    worst = int(np.abs(difference).argmax())
    p_value = 2 * stats.norm.sf(abs(difference[worst]) * math.sqrt((table.sizes["draw"] - 3) / 2))
    return {
        "worst_pair_first": str(units[pairs[worst][0]]),
        "worst_pair_second": str(units[pairs[worst][1]]),
        "worst_pair_correlation": float(here[worst]),
        "worst_pair_prior_correlation": float(prior[worst]),
        "worst_pair_p_value": min(1.0, float(p_value) * len(pairs)),
    }


def _two_samples(table: xr.Dataset, seed: int) -> dict[str, float | int]:
    """How often a classifier, taught with half of the draws, tells posterior from prior among the other half."""
    number = noise.unit_seed(seed, noise.Purpose.COLLAPSE) % 2**32
    order = np.random.default_rng(number).permutation(table.sizes["draw"])
    taught, held_out = np.array_split(order, 2)
    q, p = table["posterior_draw"].values, table["prior_draw"].values
    classifier = HistGradientBoostingClassifier(max_iter=50, max_depth=3, random_state=number)  # few draws, small trees
    classifier.fit(*_labelled(q[taught], p[taught]))
    values, truth = _labelled(q[held_out], p[held_out])
    right = int((classifier.predict(values) == truth).sum())
    accuracy = right / len(truth)
    return {
        "classifier_accuracy": accuracy,
        "classifier_error": math.sqrt(accuracy * (1 - accuracy) / len(truth)),
        "classifier_p_value": float(stats.binomtest(right, len(truth), alternative="greater").pvalue),
        "num_held_out": len(truth),
    }


def _labelled(posterior: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws one below the other, and which of them are the posterior's."""
    return np.concatenate([posterior, prior]), np.repeat([1, 0], [len(posterior), len(prior)])
