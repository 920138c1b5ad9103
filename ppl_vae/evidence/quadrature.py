r"""log p(x) by quadrature: the integral over one or two latent dimensions, on a grid that is refined where it matters.

All latents of an observation are taken together in unconstrained coordinates u, each measured in prior standard
deviations. The trapezoid rule on a smooth integrand that vanishes at the border converges faster than any power of the
step (Trefethen & Weideman 2014, https://doi.org/10.1137/130932132), so halving the step tells the error.

Observations with equal conditions share the decoded grid: log p(x_n | z_g) for all n and g is one matrix product for
the likelihoods that :func:`cross_log_prob` knows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.nn.functional import softplus

from ppl_vae import noise, traces
from ppl_vae.traces import Columns, Story, observed_sites, sample_sites

TOLERANCE = 4e-3  # nats
FIRST_STEP, HALVINGS = 0.1, 5
HALF_WIDTHS = (7.0, 14.0, 28.0)
RESOLVED = 2 * math.sqrt(math.pi)  # effective points per dimension on a normal whose standard deviation is the step
NEGLIGIBLE = math.log(1e-9)
POINTS_AT_ONCE, OBSERVATIONS_AT_ONCE = 4096, 1024
PRIOR_DRAWS = 2000


def quadrature(story: Story, columns: Columns) -> tuple[Tensor, Tensor]:
    """log p(x) of each observation and its error, in nats and float64, both of shape ``(N,)``.

    The error is how much the last halving of the step changed the estimate, or a quarter of what the one before did if
    that is more; infinite where the grid is too coarse or too small. Refinement stops where it is below ``TOLERANCE``.

    Raises:
        ValueError: when the story has discrete latents, or more than two latent dimensions.
    """
    space = _latent_space(story, columns)
    scored = _scored_columns(story, columns, space)
    estimate = torch.empty(len(columns[0]), dtype=torch.float64)
    error = torch.empty_like(estimate)
    for rows in _rows_with_equal_conditions(columns, scored):
        for members in rows.split(OBSERVATIONS_AT_ONCE):
            joint = _Joint(story, tuple(column[members] for column in columns), scored, space)
            estimate[members.cpu()], error[members.cpu()] = _integrate(joint)
    return estimate, error


# The grid. Its points are whole multiples of the step, called cells.


def _integrate(joint: "_Joint") -> tuple[Tensor, Tensor]:
    """Halves the step until the estimate of every observation stands still."""
    dim, step, active = joint.space.dim, FIRST_STEP, torch.arange(joint.num_observations)
    cells, sums, share, escaped = _first_grid(joint, active)
    estimate = sums + dim * math.log(step)
    change, error = (torch.full_like(estimate, math.inf) for _ in range(2))
    for _ in range(HALVINGS):
        step, cells = step / 2, _halved(cells[share > NEGLIGIBLE])
        previous = estimate[active]
        sums, share, num_points = _scan(joint, active, cells * step, previous - dim * math.log(step))
        estimate[active] = sums + dim * math.log(step)
        # Two grids may agree by chance: they count where the step resolves the posterior, and where the halving
        # before already promised it (the error of a rule of second order falls to a quarter).
        promised, change[active] = change[active] / 4, (estimate[active] - previous).abs()
        resolved = num_points > RESOLVED**dim
        error[active] = torch.where(resolved, torch.maximum(change[active], promised), math.inf)
        active = active[error[active] >= TOLERANCE]
        if not len(active):
            break
    if escaped:
        error[:] = math.inf
    return estimate + joint.space.scale.log().sum().item(), error


def _first_grid(joint: "_Joint", active: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """A coarse grid, widened while mass is left at its border: cells, sums, shares, and whether some is left still."""
    cells, sums, share, escaped = torch.empty(0), torch.empty(0), torch.empty(0), True
    for half_width in HALF_WIDTHS:
        last = round(half_width / FIRST_STEP)
        line = torch.arange(-last, last + 1)
        cells = torch.cartesian_prod(*[line] * joint.space.dim).reshape(-1, joint.space.dim)
        sums, _, _ = _scan(joint, active, cells * FIRST_STEP)
        _, share, _ = _scan(joint, active, cells * FIRST_STEP, sums)
        escaped = bool(share[(cells.abs() == last).any(1)].max() > NEGLIGIBLE)
        if not escaped:
            break
    return cells, sums, share, escaped


def _halved(cells: Tensor) -> Tensor:
    """The cells of half the step that lie on these cells or beside them."""
    dim = cells.shape[1]
    around = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * dim).reshape(-1, dim)
    within = torch.cartesian_prod(*[torch.tensor([0, 1])] * dim).reshape(-1, dim)
    wider = (cells[:, None] + around).flatten(0, 1).unique(dim=0)
    return (2 * wider[:, None] + within).flatten(0, 1)


def _scan(
    joint: "_Joint", active: Tensor, points: Tensor, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums p(x_n, u_g) over points.

    Returns the log of the sum, shape (N,); the log of each point's largest share of it, shape (G,), measured against
    ``expected``, the sums of another scan; and the effective number of points that share it, shape (N,).
    """
    sums = torch.full((len(active),), -math.inf, dtype=torch.float64)
    squares, shares = sums.clone(), []
    for some in points.split(POINTS_AT_ONCE):
        log_p = joint.log_prob(some, active).double().cpu()
        sums = torch.logaddexp(sums, log_p.logsumexp(1))
        squares = torch.logaddexp(squares, (2 * log_p).logsumexp(1))
        if expected is not None:
            shares.append((log_p - expected[:, None]).amax(0))
    return sums, torch.cat(shares) if shares else torch.empty(0), torch.exp(2 * sums - squares)


# The joint density


@dataclass(frozen=True)
class _LatentSpace:
    """All latents of an observation as one vector u, unconstrained and in prior standard deviations."""

    event_shapes: dict[str, torch.Size]
    transforms: dict[str, Any]
    loc: Tensor
    scale: Tensor

    @property
    def dim(self) -> int:
        return len(self.loc)

    def latents(self, points: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents at points of shape (G, dim), by site name, and the log of their volume element, shape (G,)."""
        unconstrained = self.loc + self.scale * points.to(self.loc)
        sizes = [shape.numel() for shape in self.event_shapes.values()]
        values, log_volume = {}, torch.zeros(len(points)).to(self.loc)
        for (name, shape), part in zip(self.event_shapes.items(), unconstrained.split(sizes, dim=1), strict=True):
            part = part.reshape(len(points), *shape)
            values[name] = self.transforms[name](part)
            element = self.transforms[name].log_abs_det_jacobian(part, values[name])
            log_volume = log_volume + element.reshape(len(points), -1).sum(1)
        return values, log_volume


@dataclass(frozen=True)
class _Joint:
    """log p(x_n, u_g) of observations that share their conditions."""

    story: Story
    columns: Columns
    scored: dict[str, int]
    space: _LatentSpace

    @property
    def num_observations(self) -> int:
        return len(self.columns[0])

    def log_prob(self, points: Tensor, active: Tensor) -> Tensor:
        """The log joint density of the active observations at points of shape (G, dim); shape (N, G)."""
        latents, log_volume = self.space.latents(points)
        first_row = tuple(column[:1].expand(len(points), *column.shape[1:]) for column in self.columns)
        trace = _tell(self.story, latents, first_row)
        unobserved = {name: site for name, site in sample_sites(trace).items() if name in latents}
        log_p = (traces.log_prob(trace, unobserved) + log_volume).unsqueeze(0)
        for name, site in sample_sites(trace).items():
            if name in self.scored:
                x = self.columns[self.scored[name]][active.to(points.device)]
                log_p = log_p + cross_log_prob(site["fn"], x, 0)
            elif name not in latents:
                log_p = log_p + traces.log_prob(trace, {name: site})
        return log_p.expand(len(active), -1)


def _tell(story: Story, latents: dict[str, Tensor], rows: Columns) -> Trace:
    return poutine.trace(poutine.condition(story.model, data=latents)).get_trace(*rows)


def _latent_space(story: Story, columns: Columns) -> _LatentSpace:
    """Where the prior puts the latents, from draws of it given the first conditions in turn."""
    rows = tuple(column[torch.arange(PRIOR_DRAWS) % len(column)] for column in columns)
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        trace = poutine.trace(story.model).get_trace(*rows)
    sites = {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}
    if discrete := [name for name, site in sites.items() if site["fn"].support.is_discrete]:
        raise ValueError(f"Quadrature integrates over continuous latents; {discrete} are discrete.")
    transforms = {name: biject_to(site["fn"].support) for name, site in sites.items()}
    draws = {name: transforms[name].inv(site["value"]) for name, site in sites.items()}
    together = torch.cat([draw.reshape(PRIOR_DRAWS, -1) for draw in draws.values()], dim=1)
    if together.shape[1] > 2:
        raise ValueError(f"Quadrature is for one or two latent dimensions; this story has {together.shape[1]}.")
    shapes = {name: draw.shape[1:] for name, draw in draws.items()}
    return _LatentSpace(shapes, transforms, together.mean(0), together.std(0))


def _scored_columns(story: Story, columns: Columns, space: _LatentSpace) -> dict[str, int]:
    """Observed sites that score a column as it is, and nothing else of the model looks at: site name -> column."""
    rows = tuple(column[torch.arange(2) % len(column)] for column in columns)
    latents, _ = space.latents(torch.zeros(2, space.dim))
    trace = _tell(story, latents, rows)
    scored = {
        name: position
        for name, site in observed_sites(trace).items()
        for position, column in enumerate(rows)
        if site["value"] is column
    }
    if not scored:
        return {}
    swapped = tuple(row.flip(0) if position in scored.values() else row for position, row in enumerate(rows))
    retold = _tell(story, latents, swapped)
    for name, position in scored.items():
        fns = (traces.nodes(trace)[name]["fn"], traces.nodes(retold)[name]["fn"])
        log_p = [fn.log_prob(rows[position]) for fn in fns]
        if not torch.equal(*log_p):
            return {}
    return scored


def _rows_with_equal_conditions(columns: Columns, scored: dict[str, int]) -> Iterator[Tensor]:
    """Groups of row numbers whose columns, but for the scored ones, are equal."""
    conditions = [column for position, column in enumerate(columns) if position not in scored.values()]
    if not conditions:
        yield torch.arange(len(columns[0]), device=columns[0].device)
        return
    kinds = [column.reshape(len(column), -1).unique(dim=0, return_inverse=True)[1] for column in conditions]
    _, group = torch.stack(kinds, dim=1).unique(dim=0, return_inverse=True)
    for number in range(int(group.max()) + 1):
        yield (group == number).nonzero().flatten()


@singledispatch
def cross_log_prob(distribution: dist.TorchDistribution, x: Tensor, event_dim: int) -> Tensor:
    """log p_g(x_n) for G distributions and N observations, shape (N, G); densities summed over the event.

    A function of the distribution's form: one matrix product for Bernoulli and for Normal, broadcasting for any other.

    Args:
        distribution: batch shape ``(G, *event)`` where ``event_dim`` counts the dimensions to sum over.
        x: observations, shape ``(N, *event)``.
    """
    log_p = distribution.log_prob(x.unsqueeze(1))
    return log_p.flatten(2).sum(2) if event_dim else log_p


@cross_log_prob.register
def _(distribution: dist.Independent, x: Tensor, event_dim: int) -> Tensor:
    return cross_log_prob(distribution.base_dist, x, event_dim + distribution.reinterpreted_batch_ndims)


@cross_log_prob.register
def _(distribution: dist.Bernoulli, x: Tensor, event_dim: int) -> Tensor:
    logits = distribution.logits.flatten(1) if event_dim else distribution.logits.unsqueeze(1)
    return x.reshape(len(x), -1) @ logits.T - softplus(logits).sum(1)


@cross_log_prob.register
def _(distribution: dist.Normal, x: Tensor, event_dim: int) -> Tensor:
    loc, scale = (t.flatten(1) if event_dim else t.unsqueeze(1) for t in (distribution.loc, distribution.scale))
    x = x.reshape(len(x), -1)
    center = loc.mean(0)  # differences of large squares lose digits: measure both from the middle of the grid
    x, loc, precision = x - center, loc - center, scale**-2
    squares = x.square() @ precision.T - 2 * x @ (loc * precision).T + (loc.square() * precision).sum(1)
    return -squares / 2 - scale.log().sum(1) - math.log(2 * math.pi) / 2 * loc.shape[1]
