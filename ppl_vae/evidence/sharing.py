"""Decoding once for many observations: which columns a story only scores, who shares conditions, and cross densities.

Particles of the prior, and the points of a grid, do not depend on x. Where the model looks at x only to score it, they
are decoded once, and log p(x_n | z_g) for all n and g is one matrix product for the likelihoods that
:func:`cross_log_prob` knows.
"""

import math
from collections.abc import Iterator
from functools import singledispatch

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.nn.functional import softplus

from ppl_vae import noise, traces
from ppl_vae.discrete import tell
from ppl_vae.evidence.joint import latent_sites
from ppl_vae.products import product
from ppl_vae.stored import row_slices
from ppl_vae.traces import Columns, Site, Story, observed_sites


def columns_at_sites(story: Story, columns: Columns) -> dict[str, int]:
    """Observed sites whose value is a column as it is: site name -> position of the column."""
    return _tell_two(story, _two_different(story, columns))[1]


def observed_in(story: Story, columns: Columns) -> dict[str, Site]:
    """The sites that a run of the model on two rows scores against data, by name."""
    return observed_sites(_tell_two(story, _two_different(story, columns))[0])


def scored_columns(story: Story, columns: Columns) -> dict[str, int]:
    """The columns that observed sites score as they are, and that nothing else of the model looks at, by site name.

    Empty where the model does more than that with its data: then nothing can be shared.
    """
    rows = _two_different(story, columns)
    trace, scored = _tell_two(story, rows)
    if set(scored) != set(observed_sites(trace)):
        return {}
    latents = {name: site["value"] for name, site in latent_sites(trace).items()}
    swapped = tuple(row.flip(0) if position in scored.values() else row for position, row in enumerate(rows))
    retold = tell(story.model, swapped, latents)
    for name, position in scored.items():
        fns = (traces.nodes(trace)[name]["fn"], traces.nodes(retold)[name]["fn"])
        log_p = [fn.log_prob(rows[position]) for fn in fns]
        if not torch.equal(*log_p):
            return {}
    return scored


def _two_different(story: Story, columns: Columns) -> Columns:
    """The first row and one that differs from it, where there is one; on the story's device, in its dtype."""
    first = tuple(column[:1] for column in columns)
    for rows in row_slices(*columns):
        pairs = [(column[rows], one) for column, one in zip(columns, first, strict=True)]
        differs = torch.stack([(some != one).reshape(len(some), -1).any(1) for some, one in pairs]).any(0)
        if differs.any():
            other = rows.start + int(differs.int().argmax())
            return traces.to_story(story, tuple(column[[0, other]] for column in columns))
    return traces.to_story(story, tuple(column[[0, 0]] for column in columns))


def _tell_two(story: Story, rows: Columns) -> tuple[Trace, dict[str, int]]:
    """A run of the model on two rows, and which of its observed values are columns."""
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        trace, _ = traces.run(story, *rows)
    scored = {
        name: position
        for name, site in observed_sites(trace).items()
        for position, column in enumerate(rows)
        if site["value"] is column
    }
    return trace, scored


def rows_with_equal_conditions(columns: Columns, scored: dict[str, int]) -> Iterator[Tensor]:
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

    A function of the distribution's form: one matrix product for Bernoulli, Binomial, Poisson and Normal, broadcasting
    for any other.

    Args:
        distribution: batch shape ``(G, *event)`` where ``event_dim`` counts the dimensions to sum over.
        x: observations, shape ``(N, *event)``.
    """
    return _broadcast(distribution, x, event_dim)


def _broadcast(distribution: dist.TorchDistribution, x: Tensor, event_dim: int) -> Tensor:
    log_p = distribution.log_prob(x.unsqueeze(1))
    return log_p.flatten(2).sum(2) if event_dim else log_p


@cross_log_prob.register
def _(distribution: dist.Independent, x: Tensor, event_dim: int) -> Tensor:
    return cross_log_prob(distribution.base_dist, x, event_dim + distribution.reinterpreted_batch_ndims)


@cross_log_prob.register
def _(distribution: dist.Bernoulli, x: Tensor, event_dim: int) -> Tensor:
    logits = distribution.logits.flatten(1) if event_dim else distribution.logits.unsqueeze(1)
    return product(x.reshape(len(x), -1), logits.T, -softplus(logits).sum(1))


@cross_log_prob.register
def _(distribution: dist.Binomial, x: Tensor, event_dim: int) -> Tensor:
    logits, count = (
        t.flatten(1) if event_dim else t.unsqueeze(1) for t in (distribution.logits, distribution.total_count)
    )
    if not bool((count == count[:1]).all()):  # of other numbers of coins: another number of ways for each
        return _broadcast(distribution, x, event_dim)
    x, count = x.reshape(len(x), -1), count[0]
    ways = (torch.lgamma(count + 1) - torch.lgamma(x + 1) - torch.lgamma(count - x + 1)).sum(1)
    return ways.unsqueeze(1) + product(x, logits.T, -(count * softplus(logits)).sum(1))


@cross_log_prob.register
def _(distribution: dist.Poisson, x: Tensor, event_dim: int) -> Tensor:
    rate = distribution.rate.flatten(1) if event_dim else distribution.rate.unsqueeze(1)
    if not bool((rate > 0).all()):  # where nothing can happen, 0 log 0 is no matrix product
        return _broadcast(distribution, x, event_dim)
    x = x.reshape(len(x), -1)
    return product(x, rate.log().T, -rate.sum(1)) - torch.lgamma(x + 1).sum(1, keepdim=True)


@cross_log_prob.register
def _(distribution: dist.Normal, x: Tensor, event_dim: int) -> Tensor:
    loc, scale = (t.flatten(1) if event_dim else t.unsqueeze(1) for t in (distribution.loc, distribution.scale))
    x = x.reshape(len(x), -1)
    center = loc.mean(0)  # differences of large squares lose digits: measure both from the middle of the grid
    x, loc, precision = x - center, loc - center, scale**-2
    squares = product(x.square(), precision.T, (loc.square() * precision).sum(1)) - 2 * product(x, (loc * precision).T)
    return -squares / 2 - scale.log().sum(1) - math.log(2 * math.pi) / 2 * loc.shape[1]
