"""Where particles come from and what they weigh: prior, guide, Laplace at the modes, and a mixture of the three.

A proposal is made for a block of observations, before the draws that it will be used for: what it learns about them
(modes, step sizes) is frozen. Then ``log_weights(S)`` draws S particles for each of the N observations and returns
log p(x_n, z_sn) - log q(z_sn), shape (S, N), whose exponentials have the mean p(x_n).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, Self, cast

import numpy as np
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from ppl_vae import noise, traces
from ppl_vae.evidence.joint import Joint
from ppl_vae.evidence.laplace import StudentMixture, cost_of_modes, laplace
from ppl_vae.traces import Columns

# A unit of noise: so many observations times so many particles, whatever the chunk, the machine or the number of ranks.
OBSERVATIONS_PER_UNIT = 32
PARTICLES_PER_UNIT = 128


@dataclass(frozen=True)
class Block:
    """Some observations, on the story's device.

    Attributes:
        first: the number of the first observation, a multiple of ``OBSERVATIONS_PER_UNIT``.
        taken: which ones of the block these are; None for all.
    """

    joint: Joint
    columns: Columns
    first: int
    seed: int
    taken: Tensor | None = None

    @property
    def size(self) -> int:
        """The number of observations, N."""
        return len(self.columns[0])

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of the observations in the data set, shape (N,)."""
        return self.first + np.arange(self.size) if self.taken is None else self.first + self.taken.cpu().numpy()

    def at(self, rows: Tensor) -> "Block":
        """Some of the observations, in their order."""
        if len(rows) == self.size:
            return self
        columns = tuple(column[rows.to(column.device)] for column in self.columns)
        return replace(self, columns=columns, taken=rows if self.taken is None else self.taken[rows])

    def unit_seeds(self, purpose: noise.Purpose, numbers: Iterable[int]) -> list[int]:
        """The seeds of some of this block's units of noise, for :func:`noise.start`."""
        return [noise.unit_seed(self.seed, purpose, *self._indices((number,))) for number in numbers]

    def noise(self, purpose: noise.Purpose, *indices: int) -> AbstractContextManager[None]:
        """One of this block's units of noise; parts of a block have their own, or their errors would be correlated."""
        return noise.unit(self.columns[0].device, self.seed, purpose, *self._indices(indices))

    def _indices(self, indices: tuple[int, ...]) -> tuple[int, ...]:
        part = () if self.taken is None else (0, int(self.taken[0]))
        return self.first // OBSERVATIONS_PER_UNIT, *indices, *part


def blocks(
    joint: Joint,
    columns: Columns,
    seed: int,
    progress: bool | None = None,
    rows: Tensor | None = None,
    what: str = "evidence",
) -> Iterator[Block]:
    """The observations in blocks, with a bar that says for what; or some rows of them, each in its block."""
    numbers = block_numbers(len(columns[0]), rows)
    for number in tqdm(numbers, desc=what, unit="block", disable=None if progress is None else not progress):
        yield block_of(joint, columns, seed, number, rows)


def block_numbers(num_observations: int, rows: Tensor | None = None) -> list[int]:
    """The numbers of the blocks that hold all observations, or some rows of them."""
    if rows is None:
        return list(range(math.ceil(num_observations / OBSERVATIONS_PER_UNIT)))
    return (rows // OBSERVATIONS_PER_UNIT).unique().tolist()


def block_of(joint: Joint, columns: Columns, seed: int, number: int, rows: Tensor | None = None) -> Block:
    """A block by its number; only what it holds of some sorted rows, if these are given."""
    first = number * OBSERVATIONS_PER_UNIT
    some = tuple(column[first : first + OBSERVATIONS_PER_UNIT] for column in columns)
    block = Block(joint, traces.to_story(joint.story, some), first, seed)
    if rows is None:
        return block
    inside = rows[(rows >= first) & (rows < first + OBSERVATIONS_PER_UNIT)] - first
    return block.at(inside)


class Proposal(Protocol):
    """Draws particles and weighs them."""

    def log_weights(self, num_particles: int) -> Tensor:
        """Log weights of new draws, shape (S, N); call it inside a unit of noise."""
        ...

    def at(self, rows: Tensor) -> Self:
        """The same proposal for some of the observations."""
        ...


class Density(Protocol):
    """A proposal with a density in unconstrained coordinates."""

    def sample(self, num_particles: int) -> Tensor:
        """Draws, shape (S, N, K)."""
        ...

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        """Log density at points of shape (S, N, K) whose prior log density is known; shape (S, N)."""
        ...

    def at(self, rows: Tensor) -> Self:
        """The same density for some of the observations."""
        ...


def without_mode(density: Density) -> Tensor | None:
    """Where the widened guide stands in for a mode that was not found, shape (N,); None where none was sought."""
    if isinstance(density, MixtureDensity):
        return without_mode(density.components[-1])
    return density.without_mode if isinstance(density, LaplaceDensity) else None


@dataclass(frozen=True)
class FromDensity:
    """Weighs draws of a density over unconstrained coordinates."""

    block: Block
    density: Density

    def log_weights(self, num_particles: int) -> Tensor:
        return self.log_weights_at(self.density.sample(num_particles))

    def log_weights_at(self, u: Tensor) -> Tensor:
        """Log weights of points of shape (S, N, K), shape (S, N)."""
        log_ps = self.block.joint.log_prob(self.block.columns, u.flatten(0, 1))
        log_prior, log_joint = (log_p.reshape(u.shape[:2]) for log_p in log_ps)
        return log_joint - self.density.log_prob(u, log_prior)

    def at(self, rows: Tensor) -> Self:
        return replace(self, block=self.block.at(rows), density=self.density.at(rows))


@dataclass(frozen=True)
class FromGuide:
    """Weighs draws of the guide, its discrete latents included."""

    block: Block

    def log_weights(self, num_particles: int) -> Tensor:
        joint, columns = self.block.joint, self.block.columns
        latents, log_q = joint.guide_latents(columns, num_particles)
        log_p = joint.log_prob_of_latents(columns, latents, num_particles)
        return log_p.reshape(log_q.shape) - log_q

    def at(self, rows: Tensor) -> Self:
        return replace(self, block=self.block.at(rows))


@dataclass(frozen=True)
class FromPrior:
    """Naive Monte Carlo: the likelihood of draws of the prior, each observation with draws of its own."""

    block: Block

    def log_weights(self, num_particles: int) -> Tensor:
        rows = traces.as_rows(self.block.columns, num_particles)
        trace = poutine.trace(self.block.joint.story.model).get_trace(*rows)
        return traces.log_prob(trace, traces.observed_sites(trace)).reshape(num_particles, -1)

    def at(self, rows: Tensor) -> Self:
        return replace(self, block=self.block.at(rows))


@dataclass(frozen=True)
class FromPyro:
    """``pyro.infer.Importance``, one observation at a time: the slow reference."""

    block: Block

    def log_weights(self, num_particles: int) -> Tensor:
        weights = []
        story, columns = self.block.joint.story, self.block.columns
        for row in range(self.block.size):
            sampler = pyro.infer.Importance(traces.scored_model(story), story.guide, num_samples=num_particles)
            sampler.run(*(column[row : row + 1] for column in columns))
            weights.append(torch.stack(cast(list[Tensor], sampler.log_weights)))
        return torch.stack(weights, dim=1)

    def at(self, rows: Tensor) -> Self:
        return replace(self, block=self.block.at(rows))


@dataclass(frozen=True)
class GuideDensity:
    """The guide, in unconstrained coordinates."""

    block: Block

    def sample(self, num_particles: int) -> Tensor:
        return self.block.joint.guide_points(self.block.columns, num_particles)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        return self.block.joint.log_guide(self.block.columns, u)

    def at(self, rows: Tensor) -> Self:
        return replace(self, block=self.block.at(rows))


@dataclass(frozen=True)
class PriorDensity:
    """The prior, in unconstrained coordinates."""

    block: Block

    def sample(self, num_particles: int) -> Tensor:
        return self.block.joint.prior_points(self.block.columns, num_particles)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        return log_prior

    def at(self, rows: Tensor) -> Self:
        return replace(self, block=self.block.at(rows))


@dataclass(frozen=True)
class LaplaceDensity:
    """Student-t distributions at the posterior's modes, or the widened guide where no mode was found."""

    students: StudentMixture
    without_mode: Tensor

    def sample(self, num_particles: int) -> Tensor:
        return self.students.sample(num_particles)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        return self.students.log_prob(u)

    def at(self, rows: Tensor) -> Self:
        return replace(self, students=self.students.at(rows), without_mode=self.without_mode[rows])


@dataclass(frozen=True)
class MixtureDensity:
    r"""A mixture with fixed weights, :math:`\sum_c a_c\, q_c(u)`: every draw is weighed against all components.

    Veach & Guibas 1995 call these balance weights, https://doi.org/10.1145/218380.218498. With the prior as a
    component no weight exceeds the likelihood by more than 1 / a.
    """

    block: Block
    components: tuple[Density, ...]
    weights: tuple[float, ...]

    def sample(self, num_particles: int) -> Tensor:
        shape = num_particles, self.block.size
        component = torch.multinomial(torch.tensor(self.weights), math.prod(shape), replacement=True).reshape(shape)
        points = torch.zeros(*shape, self.block.joint.dim, device=self.block.columns[0].device)
        for number, density in enumerate(self.components):
            chosen = (component == number).to(points.device)
            if most := int(chosen.sum(0).max()):
                draws = density.sample(most)
                turn = (chosen.cumsum(0) - 1).clamp(min=0)  # which draw of this component it takes
                own = draws.gather(0, turn.unsqueeze(-1).expand_as(points))
                points = torch.where(chosen.unsqueeze(-1), own, points)
        return points

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        parts = [
            math.log(weight) + density.log_prob(u, log_prior)
            for weight, density in zip(self.weights, self.components, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)

    def at(self, rows: Tensor) -> Self:
        return replace(
            self, block=self.block.at(rows), components=tuple(density.at(rows) for density in self.components)
        )


# Methods: how a proposal is made for a block


class Unprepared:
    """What methods share that learn nothing before they draw."""

    default_particles = 1000
    cost_of_particle = 1

    def cost_of_preparing(self, dim: int) -> int:
        return 0


@dataclass(frozen=True)
class Importance(Unprepared):
    """The guide proposes (Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519)."""

    name = "importance"

    def prepare(self, block: Block) -> Proposal:
        return FromGuide(block)

    def density(self, block: Block) -> Density:
        """The proposal's density in unconstrained coordinates, discrete latents summed out."""
        block.joint.require_space(self.name)
        return GuideDensity(block)


@dataclass(frozen=True)
class Prior(Unprepared):
    """The prior proposes: naive Monte Carlo."""

    name = "prior"

    def prepare(self, block: Block) -> Proposal:
        return FromPrior(block)


@dataclass(frozen=True)
class Pyro(Unprepared):
    """``pyro.infer.Importance``, one observation at a time."""

    name = "pyro"

    def prepare(self, block: Block) -> Proposal:
        return FromPyro(block)


@dataclass(frozen=True)
class Laplace:
    """Student-t distributions at the modes propose; infinite degrees of freedom make them normal."""

    degrees_of_freedom: float = 10.0
    refinements: int = 0
    name = "laplace"
    default_particles = 1000
    cost_of_particle = 1

    def cost_of_preparing(self, dim: int) -> int:
        return cost_of_modes(dim, self.refinements)

    def prepare(self, block: Block) -> Proposal:
        return FromDensity(block, self.density(block))

    def density(self, block: Block) -> Density:
        """The proposal's density."""
        block.joint.require_space(self.name)
        with block.noise(noise.Purpose.PROPOSAL):
            return LaplaceDensity(*laplace(block.joint, block.columns, self.degrees_of_freedom, self.refinements))


@dataclass(frozen=True)
class Mixture:
    """Prior, guide and Laplace together (Owen & Zhou 2000, https://doi.org/10.1080/01621459.2000.10473909)."""

    prior: float = 0.1
    guide: float = 0.3
    degrees_of_freedom: float = 10.0
    refinements: int = 6
    name = "mixture"
    default_particles = 1000
    cost_of_particle = 1

    def cost_of_preparing(self, dim: int) -> int:
        return cost_of_modes(dim, self.refinements)

    def prepare(self, block: Block) -> Proposal:
        return FromDensity(block, self.density(block))

    def density(self, block: Block) -> Density:
        """The proposal's density."""
        block.joint.require_space(self.name)
        modes = Laplace(self.degrees_of_freedom, self.refinements).density(block)
        components = PriorDensity(block), GuideDensity(block), modes
        return MixtureDensity(block, components, (self.prior, self.guide, 1 - self.prior - self.guide))
