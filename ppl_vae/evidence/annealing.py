r"""Annealed importance sampling: from a proposal to the posterior in small steps, moved by Hamiltonian Monte Carlo.

Neal 2001, https://doi.org/10.1023/A:1008923215028; Wu, Burda, Salakhutdinov & Grosse 2017,
https://arxiv.org/abs/1611.04273. The path is :math:`\pi_\beta(u) \propto q_0(u)^{1-\beta}\, p(x, u)^\beta`, in
coordinates whitened by the curvature at the mode. Every chain gives one weight whose mean is p(x), whatever the step
sizes are, as long as they are fixed before the chains run: they are learned for each observation and temperature by
chains that are thrown away.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl_vae import noise, traces
from ppl_vae.evidence import hamiltonian
from ppl_vae.evidence.laplace import GRADIENT, cost_of_modes
from ppl_vae.evidence.proposals import Block, Density, Laplace, LaplaceDensity, PriorDensity

PILOT_CHAINS = 16
FIRST_STEP_SIZE = 0.3
ACCEPTED = 0.8
ADAPTATION = 0.2
LONGEST_STEP = 0.5  # with four leaps a third of a turn: longer ones come back to where they started
STEEPNESS = 4.0


@dataclass(frozen=True)
class Annealed:
    """Annealed importance sampling from Laplace proposals, or from the prior as a slow cross-check.

    Attributes:
        num_temperatures: steps from the proposal to the posterior.
        num_leapfrog: gradient evaluations of a step.
        start: "laplace" or "prior".
    """

    num_temperatures: int = 100
    num_leapfrog: int = 4
    start: str = "laplace"
    degrees_of_freedom: float = 10.0
    refinements: int = 6
    name = "annealed"
    default_particles = 32  # with 16, 95 % intervals cover 90 %

    @property
    def cost_of_particle(self) -> int:
        return GRADIENT * self.num_temperatures * self.num_leapfrog

    def cost_of_preparing(self, dim: int) -> int:
        modes = cost_of_modes(dim, self.refinements) if self.start == "laplace" else 0
        return modes + PILOT_CHAINS * self.cost_of_particle

    def prepare(self, block: Block) -> "Annealing":
        block.joint.require_space(self.name)
        if not block.joint.is_differentiable(block.columns):
            raise ValueError("Annealing moves along gradients, and the model has parts without; use method='mixture'.")
        density, whitening = self._start(block)
        temperatures = _temperatures(self.num_temperatures, self.start)
        size = torch.full((len(temperatures) - 1, block.size), FIRST_STEP_SIZE).to(whitening)
        with block.noise(noise.Purpose.PROPOSAL, 1):
            learning = Annealing(block, density, whitening, temperatures, size, self.num_leapfrog)
            pilot_log_weights = learning.learn()
        return Annealing(block, density, whitening, temperatures, size, self.num_leapfrog, pilot_log_weights)

    def _start(self, block: Block) -> tuple[Density, Tensor]:
        """The first density of the path, and a scale for each observation, shape (N, K, K)."""
        if self.start == "laplace":
            density = Laplace(self.degrees_of_freedom, self.refinements).density(block)
            assert isinstance(density, LaplaceDensity)
            return density, density.students.scale_tril[:, 0]
        if self.start == "prior":
            unit = torch.eye(block.joint.dim).to(block.columns[0].device, traces.device_and_dtype(block.joint.story)[1])
            return PriorDensity(block), unit.expand(block.size, -1, -1)
        raise ValueError(f"Annealing starts from 'laplace' or 'prior'; found {self.start!r}.")


def _temperatures(number: int, start: str) -> Tensor:
    """From 0 to 1; from the prior slowly at both ends, as Wu et al. do."""
    if number < 1:
        raise ValueError(f"num_temperatures must be at least 1; found {number}.")
    line = torch.linspace(0, 1, number + 1, dtype=torch.float64)
    if start == "laplace":
        return line
    curve = torch.sigmoid(STEEPNESS * (2 * line - 1))
    return (curve - curve[0]) / (curve[-1] - curve[0])


@dataclass(frozen=True)
class State:
    """Where the chains are, shape (C, N, K), with both ends' log densities and gradients there."""

    u: Tensor
    log_start: Tensor
    log_joint: Tensor
    start_slope: Tensor
    joint_slope: Tensor

    def log_prob(self, temperature: float) -> Tensor:
        """Log density of the path at this temperature, shape (C, N); minus infinity where it is undefined."""
        log_p = (1 - temperature) * self.log_start + temperature * self.log_joint
        return log_p.nan_to_num(nan=-math.inf, posinf=-math.inf)

    def slope(self, temperature: float) -> Tensor:
        """Its gradient, shape (C, N, K)."""
        return ((1 - temperature) * self.start_slope + temperature * self.joint_slope).nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling with frozen settings, for a block of observations.

    Attributes:
        density: where the path starts.
        whitening: a scale for each observation, shape (N, K, K).
        temperatures: from 0 to 1, shape (T + 1,).
        step_size: for each temperature and observation, shape (T, N).
        pilot_log_weights: of the chains that learned the step sizes, shape (C, N). Not to be averaged: the step sizes
            followed these chains.
    """

    block: Block
    density: Density
    whitening: Tensor
    temperatures: Tensor
    step_size: Tensor
    num_leapfrog: int
    pilot_log_weights: Tensor | None = None

    def log_weights(self, num_particles: int) -> Tensor:
        """Log weights of new chains, shape (C, N)."""
        return self._forward(self.state(self.density.sample(num_particles)), learning=False)

    def log_weights_backward(self, u: Tensor) -> Tensor:
        """Log weights of chains that start from posterior draws, shape (C, N, K), and run to the proposal; (C, N).

        The mean of their inverses is 1 / p(x).
        """
        state, log_weights = self.state(u), torch.zeros(u.shape[:2]).to(u)
        for step in reversed(range(len(self.step_size))):
            state, _ = self._move(state, float(self.temperatures[step + 1]), self.step_size[step])
            log_weights += self._gain(state, step)
        return log_weights

    def at(self, rows: Tensor) -> "Annealing":
        """The same for some of the observations."""
        return replace(
            self,
            block=self.block.at(rows),
            density=self.density.at(rows),
            whitening=self.whitening[rows],
            step_size=self.step_size[:, rows],
        )

    def learn(self) -> Tensor:
        """Runs chains whose acceptance moves ``step_size``, in place; returns their log weights."""
        return self._forward(self.state(self.density.sample(PILOT_CHAINS)), learning=True)

    def _forward(self, state: State, learning: bool) -> Tensor:
        log_weights = torch.zeros(state.u.shape[:2]).to(state.u)
        for step in range(len(self.step_size)):
            log_weights += self._gain(state, step)
            state, accepted = self._move(state, float(self.temperatures[step + 1]), self.step_size[step])
            if learning and step + 1 < len(self.step_size):
                grown = self.step_size[step] * torch.exp(ADAPTATION * (accepted - ACCEPTED))
                self.step_size[step + 1] = grown.clamp(max=LONGEST_STEP)
        return log_weights

    def _gain(self, state: State, step: int) -> Tensor:
        """How much a step of the temperature changes the log density where the chains are, shape (C, N)."""
        hotter, colder = (float(self.temperatures[number]) for number in (step, step + 1))
        return state.log_prob(colder) - state.log_prob(hotter)

    def _move(self, state: State, temperature: float, step_size: Tensor) -> tuple[State, Tensor]:
        """One Hamiltonian step that leaves the path's density at this temperature as it is; and how often it moved."""
        impulse = hamiltonian.Impulse.like(state.u)
        path = _AtTemperature(self, temperature)
        moved = hamiltonian.move(path, state, impulse, self.whitening, step_size, self.num_leapfrog)
        return moved.point, moved.accepted.to(state.u).mean(0)

    def state(self, u: Tensor) -> State:
        """The densities and gradients at points of shape (C, N, K)."""
        values = self.block.joint.with_gradients(self.block.columns, u.flatten(0, 1))
        log_prior, log_joint, prior_slope, joint_slope = (v.reshape(*u.shape[:2], *v.shape[1:]) for v in values)
        if isinstance(self.density, PriorDensity):
            return State(u, log_prior, log_joint, prior_slope, joint_slope)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_start = self.density.log_prob(u, log_prior)
            (start_slope,) = torch.autograd.grad(log_start.sum(), u)
        return State(u.detach(), log_start.detach(), log_joint, start_slope, joint_slope)


@dataclass(frozen=True)
class _AtTemperature:
    """The path's density at one temperature."""

    annealing: Annealing
    temperature: float

    def at(self, u: Tensor) -> State:
        return self.annealing.state(u)

    def log_prob(self, point: State) -> Tensor:
        return point.log_prob(self.temperature)

    def slope(self, point: State) -> Tensor:
        return point.slope(self.temperature)
