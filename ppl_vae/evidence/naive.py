"""Naive Monte Carlo with particles shared by all observations: decoded once, weighed against everyone.

The estimates of different observations are then correlated. The error of their mean is the spread over particles of
the mean over observations of w_sn / mean_s(w_sn), taken here from batches of particles.
"""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import noise, traces
from ppl_vae.evidence import sharing
from ppl_vae.evidence.joint import Joint
from ppl_vae.evidence.weights import NonFiniteWeightsError, WeightSums
from ppl_vae.traces import Columns

PARTICLES_PER_UNIT = 1024
OBSERVATIONS_AT_ONCE = 5120
MOST_BATCHES = 64


@dataclass(frozen=True)
class SharedParticles:
    """Draws of the prior that are weighed against all observations with equal conditions.

    Attributes:
        scored: the columns that observed sites score, by site name.
        columns: all observations.
    """

    joint: Joint
    columns: Columns
    scored: dict[str, int]
    seed: int

    def groups(self) -> list[Tensor]:
        """Row numbers of observations that share their particles, a bounded number at once."""
        together = sharing.rows_with_equal_conditions(self.columns, self.scored)
        return [members.cpu() for rows in together for members in rows.split(OBSERVATIONS_AT_ONCE)]

    def draw(
        self, rows: Tensor, num_particles: int, purpose: noise.Purpose, num_powers: int = 2
    ) -> tuple[WeightSums, Tensor]:
        """The weights of some observations, and the sum over them of w / mean(w) in batches of particles.

        Raises:
            ValueError: naming the observations whose likelihood is NaN or infinite.
        """
        columns = traces.to_story(self.joint.story, tuple(column[rows] for column in self.columns))
        sums = WeightSums(len(rows), num_particles, num_powers, fast=True)
        ends = torch.linspace(0, num_particles, min(MOST_BATCHES, num_particles) + 1).round().long()
        batches = torch.full((len(ends) - 1, len(rows)), -math.inf, dtype=torch.float64)
        for number, start in enumerate(range(0, num_particles, PARTICLES_PER_UNIT)):
            size = min(PARTICLES_PER_UNIT, num_particles - start)
            with noise.unit(columns[0].device, self.seed, purpose, number):
                log_likelihood = self._log_likelihood(columns, size)
            bounds = (ends - start).clamp(0, size)
            for batch, part in enumerate(log_likelihood.split(bounds.diff().tolist())):
                if len(part):
                    batches[batch] = torch.logaddexp(batches[batch], self._update(sums, part, rows))
        log_means = batches - ends.diff().log().unsqueeze(1)
        return sums, torch.exp(log_means - sums.log_mean).nan_to_num(0.0).sum(1)

    def _update(self, sums: WeightSums, log_weights: Tensor, rows: Tensor) -> Tensor:
        try:
            return sums.update(log_weights)
        except NonFiniteWeightsError as error:
            numbers = rows[error.rows].tolist()
            raise ValueError(f"The likelihood is NaN or infinite for the observations {numbers}.") from None

    def _log_likelihood(self, columns: Columns, num_particles: int) -> Tensor:
        """log p(x_n | z_s) of the same prior draws for all these observations, shape (S, N)."""
        first_row = tuple(column[:1].expand(num_particles, *column.shape[1:]) for column in columns)
        trace = poutine.trace(self.joint.story.model).get_trace(*first_row)
        log_ps = []
        for name, position in self.scored.items():
            site = traces.nodes(trace)[name]
            traces.refuse_scale(name, site)
            log_ps.append(sharing.cross_log_prob(site["fn"], columns[position], 0))
        return reduce(torch.add, log_ps).T  # of a single site without a copy: it is as large as all weights of a unit


def error_of_mean(batches: Tensor, num_observations: int) -> float:
    """Standard error of the mean estimate, in nats, from the batches of all observations; NaN for a single batch."""
    return float(batches.std() / num_observations / math.sqrt(len(batches))) if len(batches) > 1 else math.nan
