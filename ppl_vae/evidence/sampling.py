"""Drawing the particles of a block, one unit of noise after another; and judging a proposal by a pilot.

The pilot rule: a verdict taken from the draws that it judges spoils both, because "good" then partly means that the
large weight was not drawn yet. So a pilot decides, is thrown away, and fresh draws report.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ppl_vae import noise
from ppl_vae.evidence.annealing import Annealed, Annealing
from ppl_vae.evidence.proposals import (
    PARTICLES_PER_UNIT,
    Block,
    Importance,
    Laplace,
    Mixture,
    Prior,
    Proposal,
    Pyro,
)
from ppl_vae.evidence.weights import NonFiniteWeightsError, Verdict, WeightSums

PILOT_PARTICLES = 1000
UNITS_AT_ONCE = 16  # of noise, whose weights are summed together: that takes little longer than for one

# The spread of a chain's log weight, in nats, below which the average of a few chains is good, and fair.
GOOD_SPREAD, FAIR_SPREAD = 0.5, 1.0


class Method(Protocol):
    """A way to make a proposal for a block of observations."""

    @property
    def name(self) -> str: ...
    @property
    def default_particles(self) -> int: ...
    @property
    def cost_of_particle(self) -> int:
        """Evaluations of log p(x, u) that a particle takes."""
        ...

    def prepare(self, block: Block) -> Proposal:
        """The proposal; what it learns about the block is frozen with it."""
        ...

    def cost_of_preparing(self, dim: int) -> int:
        """Evaluations of log p(x, u) that the proposal takes for one observation of K = ``dim`` coordinates."""
        ...


METHODS: dict[str, Method] = {
    method.name: method for method in (Importance(), Prior(), Pyro(), Laplace(), Mixture(), Annealed())
}


def running_sums(
    block: Block,
    proposal: Proposal,
    num_particles: int,
    purpose: noise.Purpose,
    num_powers: int = 2,
    units_at_once: int = 1,
) -> Iterator[WeightSums]:
    """The weights of a block, after so many units of noise each; it is the same object every time.

    Raises:
        ValueError: naming the observations whose weights are NaN or infinite.
    """
    sums = WeightSums(block.size, num_particles, num_powers)
    num_units = math.ceil(num_particles / PARTICLES_PER_UNIT)
    for first in range(0, num_units, units_at_once):
        units = range(first, min(first + units_at_once, num_units))
        try:
            sums.update(_log_weights(block, proposal, num_particles, purpose, units))
        except NonFiniteWeightsError as error:
            raise ValueError(
                f"Log weights are NaN or infinite for the observations {block.numbers[error.rows].tolist()}. The model "
                "or the guide has a degenerate distribution there; look at their scales."
            ) from None
        yield sums


def _log_weights(
    block: Block, proposal: Proposal, num_particles: int, purpose: noise.Purpose, units: Sequence[int]
) -> Tensor:
    """The log weights of some units of noise, of ``num_particles`` in all; shape (S, N)."""
    device, parts = block.columns[0].device, []
    with noise.forked(device):
        for number, seed in zip(units, block.unit_seeds(purpose, units), strict=True):
            noise.start(device, seed)
            parts.append(proposal.log_weights(min(PARTICLES_PER_UNIT, num_particles - number * PARTICLES_PER_UNIT)))
    return torch.cat(parts)


def draw(
    block: Block, proposal: Proposal, num_particles: int, purpose: noise.Purpose, num_powers: int = 2
) -> WeightSums:
    """The weights of a block, all of them."""
    *_, sums = running_sums(block, proposal, num_particles, purpose, num_powers, UNITS_AT_ONCE)
    return sums


@dataclass(frozen=True)
class Judgement:
    """What a pilot says of a proposal, observation by observation.

    Attributes:
        pareto_k: k-hat, shape (N,); NaN for chains, which are too few for it.
        variance: of one weight, divided by the square of its mean, shape (N,).
        verdicts: N of them.
    """

    pareto_k: Tensor
    variance: Tensor
    verdicts: list[Verdict]

    def at(self, rows: Tensor) -> "Judgement":
        """The same for some of the observations."""
        verdicts = [self.verdicts[row] for row in rows.tolist()]
        return Judgement(self.pareto_k[rows], self.variance[rows], verdicts)

    @property
    def trusted(self) -> Tensor:
        """Where the verdict is "exact" or "good", shape (N,)."""
        return torch.tensor([verdict in ("exact", "good") for verdict in self.verdicts])


def judge(block: Block, proposal: Proposal) -> Judgement:
    """Runs a pilot of the proposal, to be thrown away."""
    if isinstance(proposal, Annealing):
        return _judge_chains(proposal)
    sums = draw(block, proposal, PILOT_PARTICLES, noise.Purpose.PILOT)
    return Judgement(sums.pareto_k, _variance(sums), sums.verdicts())


def _judge_chains(proposal: Annealing) -> Judgement:
    """By the spread of the log weights of the chains that learned the step sizes."""
    assert proposal.pilot_log_weights is not None
    log_weights = proposal.pilot_log_weights.double().cpu()
    spread = log_weights.std(0).nan_to_num(math.inf)
    verdicts: list[Verdict] = [_verdict_of_spread(value) for value in spread.tolist()]
    return Judgement(torch.full_like(spread, math.nan), torch.expm1(spread.square().clamp(max=50)), verdicts)


def _verdict_of_spread(spread: float) -> Verdict:
    if spread < GOOD_SPREAD:
        return "good"
    return "fair" if spread < FAIR_SPREAD else "poor"


def _variance(sums: WeightSums) -> Tensor:
    return (sums.relative_variance * sums.count).nan_to_num(math.inf)
