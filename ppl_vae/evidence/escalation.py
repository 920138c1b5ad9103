"""The rule of ``method="auto"``: each observation by the first method whose pilot is good and that it can afford.

Importance sampling with the guide comes first, then the mixture, then annealing. Pilots decide method and number of
particles and are thrown away; the draws that report are fresh.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.evidence.annealing import Annealed
from ppl_vae.evidence.proposals import Block, Importance, Mixture, Proposal
from ppl_vae.evidence.sampling import PILOT_PARTICLES, Judgement, Method, judge
from ppl_vae.evidence.weights import Verdict

LADDER: tuple[Method, ...] = (Importance(), Mixture(), Annealed())
RANKS: dict[Verdict, int] = {"exact": 0, "good": 1, "fair": 2, "poor": 3, "unresolved": 3, "bound": 3}
MARGIN = 2.0  # a pilot of heavy-tailed weights sees too little variance


@dataclass(frozen=True)
class Settings:
    """What the caller asked for.

    Attributes:
        num_particles: draws for each observation, and at least so many where there is a tolerance; None is the
            method's default.
        tolerance: standard error to be reached, in nats, or None.
        budget: evaluations of log p(x, z) for each observation; a gradient counts as two.
    """

    num_particles: int | None
    tolerance: float | None
    budget: int


@dataclass(frozen=True)
class Planned:
    """Observations of a block that are drawn in the same way; ``rows`` are their places in the block."""

    method: Method
    proposal: Proposal
    judgement: Judgement
    rows: Tensor
    num_particles: int


@dataclass(frozen=True)
class Rung:
    """A method tried on some observations, and what its pilot promises for each; all of shape (rows,)."""

    method: Method
    proposal: Proposal
    judgement: Judgement
    rows: Tensor
    needed: Tensor
    affordable: Tensor

    @property
    def accepted(self) -> Tensor:
        """Where it is good and what it needs is affordable."""
        return self.judgement.trusted & (self.needed <= self.affordable)

    @property
    def doubt(self) -> Tensor:
        """Smaller is better: the verdict first, then the error that the affordable particles would leave."""
        ranks = torch.tensor([RANKS[verdict] for verdict in self.judgement.verdicts], dtype=torch.float64)
        particles = torch.minimum(self.needed, self.affordable).clamp(min=1)
        error = (self.judgement.variance / particles).sqrt().nan_to_num(math.inf)
        return torch.where(self.accepted, -1.0, ranks + torch.tanh(error))


def plan(block: Block, methods: tuple[Method, ...], settings: Settings) -> Iterator[Planned]:
    """Tries methods in turn, on the observations that the ones before did not settle; yields who is drawn how."""
    rungs: list[Rung] = []
    rest = torch.arange(block.size)
    spent = 0
    for method in methods:
        start = method.cost_of_preparing(block.joint.dim) + PILOT_PARTICLES
        if not len(rest) or (rungs and spent + start >= settings.budget):
            break
        spent += start
        usual = len(methods) > 1 and method.cost_of_particle > 1  # chains are not counted in the same coin as draws
        least = (not usual and settings.num_particles) or method.default_particles
        proposal = method.prepare(block.at(rest))
        judgement = judge(block.at(rest), proposal)
        needed = _needed(judgement, settings.tolerance, least)
        affordable = torch.full_like(needed, max(2, (settings.budget - spent) // method.cost_of_particle))
        rungs.append(Rung(method, proposal, judgement, rest, needed, affordable))
        rest = rest[~rungs[-1].accepted]
    yield from _chosen(block, rungs)


def _needed(judgement: Judgement, tolerance: float | None, least: int) -> Tensor:
    """Particles for each observation, shape (N,): ``least``, doubled until they promise the tolerance."""
    if tolerance is None:
        return torch.full((len(judgement.verdicts),), least)
    wanted = MARGIN * judgement.variance / tolerance**2
    doublings = (wanted / least).clamp(1, 2.0**40).log2().ceil()
    return (least * 2**doublings).long()


def _chosen(block: Block, rungs: list[Rung]) -> Iterator[Planned]:
    """Every observation with the method that leaves least doubt, in groups of equal method and number of particles."""
    doubt = torch.full((len(rungs), block.size), math.inf, dtype=torch.float64)
    for number, rung in enumerate(rungs):
        doubt[number, rung.rows] = rung.doubt
    choice = doubt.argmin(0)
    for number, rung in enumerate(rungs):
        mine = choice[rung.rows] == number
        particles = torch.minimum(rung.needed, rung.affordable)
        for count in particles[mine].unique().tolist():
            group = (mine & (particles == count)).nonzero().flatten()
            proposal, judged = rung.proposal.at(group), rung.judgement.at(group)
            yield Planned(rung.method, proposal, judged, rung.rows[group], count)
