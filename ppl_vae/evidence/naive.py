"""Naive Monte Carlo with particles shared by all observations: decoded once, weighed against everyone.

The estimates of different observations are then correlated. The error of their mean is the spread over particles of
the mean over observations of w_sn / mean_s(w_sn), taken here from batches of particles.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import noise, traces
from ppl_vae.evidence import sharing
from ppl_vae.evidence.joint import Joint
from ppl_vae.evidence.weights import NonFiniteWeightsError, WeightSums
from ppl_vae.traces import Columns

PARTICLES_PER_UNIT = 1024
OBSERVATIONS_AT_ONCE = 1024
MOST_BATCHES = 64


@dataclass(frozen=True)
class SharedSums:
    """Weights of observations that share their particles.

    Attributes:
        rows: the numbers of the observations, shape (N,).
        batches: sum over observations of a batch's mean weight relative to the estimate, shape (batches,).
    """

    rows: Tensor
    sums: WeightSums
    batches: Tensor


def shared_sums(
    joint: Joint,
    columns: Columns,
    scored: dict[str, int],
    num_particles: int,
    seed: int,
    purpose: noise.Purpose,
    powers: int = 2,
) -> list[SharedSums]:
    """The weights of prior draws; observations with equal conditions share them. Columns are where the story is."""
    parts = []
    for rows in sharing.rows_with_equal_conditions(columns, scored):
        for members in rows.split(OBSERVATIONS_AT_ONCE):
            some = tuple(column[members] for column in columns)
            try:
                sums, batches = _sums(joint, some, scored, num_particles, seed, purpose, powers)
            except NonFiniteWeightsError as error:
                raise ValueError(
                    f"The likelihood is NaN or infinite for the observations {members[error.rows].tolist()}."
                ) from None
            parts.append(SharedSums(members.cpu(), sums, batches))
    return parts


def error_of_mean(parts: list[SharedSums]) -> float:
    """Standard error of the mean estimate over all observations, in nats; NaN for a single batch."""
    total = torch.stack([part.batches for part in parts]).sum(0)
    size = sum(len(part.rows) for part in parts)
    return float(total.std() / size / math.sqrt(len(total))) if len(total) > 1 else math.nan


def _sums(
    joint: Joint,
    columns: Columns,
    scored: dict[str, int],
    num_particles: int,
    seed: int,
    purpose: noise.Purpose,
    powers: int,
) -> tuple[WeightSums, Tensor]:
    sums = WeightSums(len(columns[0]), num_particles, powers)
    ends = torch.linspace(0, num_particles, min(MOST_BATCHES, num_particles) + 1).round().long()
    batches = torch.full((len(ends) - 1, len(columns[0])), -math.inf, dtype=torch.float64)
    for number, start in enumerate(range(0, num_particles, PARTICLES_PER_UNIT)):
        size = min(PARTICLES_PER_UNIT, num_particles - start)
        with noise.unit(columns[0].device, seed, purpose, number):
            log_likelihood = _shared_log_likelihood(joint, columns, scored, size)
        sums.update(log_likelihood)
        _add_to_batches(batches, ends - start, log_likelihood.double().cpu())
    log_means = batches - ends.diff().log().unsqueeze(1)
    return sums, torch.exp(log_means - sums.log_mean).nan_to_num(0.0).sum(1)


def _add_to_batches(batches: Tensor, ends: Tensor, log_likelihood: Tensor) -> None:
    """Adds particles, numbered from 0, to batches that end at these numbers; in place."""
    bounds = ends.clamp(0, len(log_likelihood)).tolist()
    for batch, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            batches[batch] = torch.logaddexp(batches[batch], log_likelihood[first:last].logsumexp(0))


def _shared_log_likelihood(joint: Joint, columns: Columns, scored: dict[str, int], num_particles: int) -> Tensor:
    """log p(x_n | z_s) of the same prior draws for all observations, shape (S, N)."""
    first_row = tuple(column[:1].expand(num_particles, *column.shape[1:]) for column in columns)
    trace = poutine.trace(joint.story.model).get_trace(*first_row)
    log_p = torch.zeros(()).to(columns[0].device)
    for name, position in scored.items():
        site = traces.nodes(trace)[name]
        traces.refuse_scale(name, site)
        log_p = log_p + sharing.cross_log_prob(site["fn"], columns[position], 0).T
    return log_p
