r"""Hamiltonian Monte Carlo: one move of many chains for each of many observations at once.

Neal 2011, MCMC using Hamiltonian dynamics, https://arxiv.org/abs/1206.1901. A point is pushed by a random momentum and
follows the gradient for some leaps; where it ends is accepted with the probability that leaves the density as it is.
Momenta are standard normal in coordinates whitened for each observation.
"""

import math
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

JITTER = 0.2


class Point(Protocol):
    """Where chains are, and what is known of the density there: a dataclass of tensors, all of them (C, N, ...)."""

    @property
    def u(self) -> Tensor: ...


P = TypeVar("P", bound=Point)


class Target(Protocol[P]):
    """A density to move in."""

    def at(self, u: Tensor) -> P:
        """What is to be known at points of shape (C, N, K)."""
        ...

    def log_prob(self, point: P) -> Tensor:
        """Log density, shape (C, N); minus infinity where it is undefined."""
        ...

    def slope(self, point: P) -> Tensor:
        """Its gradient, shape (C, N, K)."""
        ...


@dataclass(frozen=True)
class Impulse:
    """The chance in one move of C chains for each of N observations.

    Attributes:
        momentum: standard normal, shape (C, N, K).
        jitter: uniform, makes the step longer or shorter by up to ``JITTER``; shape (C, N).
        threshold: uniform, shape (C, N); the move is accepted if its probability is larger.
    """

    momentum: Tensor
    jitter: Tensor
    threshold: Tensor

    @classmethod
    def like(cls, u: Tensor) -> Self:
        """For chains at points of shape (C, N, K), or for any number of moves before these dimensions."""
        momentum = torch.randn_like(u)
        jitter, threshold = (torch.rand(u.shape[:-1]).to(u) for _ in range(2))
        return cls(momentum, jitter, threshold)


@dataclass(frozen=True)
class Move(Generic[P]):
    """Where chains are after a move.

    Attributes:
        change: how much the log density of point and momentum changed on the way, shape (C, N), in nats; minus
            infinity where the way led nowhere.
        accepted: which chains moved, shape (C, N).
    """

    point: P
    change: Tensor
    accepted: Tensor


def move(
    target: Target[P], point: P, impulse: Impulse, whitening: Tensor, step_size: Tensor, num_leapfrog: int
) -> Move[P]:
    """One trajectory of every chain, accepted or not.

    Args:
        target: the density.
        point: where the chains are.
        impulse: the chance of this move.
        whitening: a scale for each observation, shape (N, K, K).
        step_size: of each observation, shape (N,), before the jitter.
        num_leapfrog: gradients of a trajectory.
    """
    momentum = impulse.momentum
    size = (step_size * (1 + JITTER * (2 * impulse.jitter - 1))).unsqueeze(-1)
    energy = momentum.square().sum(-1) / 2 - target.log_prob(point)
    moved, momentum = point, momentum + size / 2 * _pull(target.slope(point), whitening)
    for leap in range(num_leapfrog):
        moved = target.at(moved.u + _stretched(size * momentum, whitening))
        last = leap + 1 == num_leapfrog
        momentum = momentum + size / (2 if last else 1) * _pull(target.slope(moved), whitening)
    change = energy - (momentum.square().sum(-1) / 2 - target.log_prob(moved))
    change = change.nan_to_num(nan=-math.inf, neginf=-math.inf)
    accepted = torch.log(impulse.threshold) < change
    chosen = [
        torch.where(accepted.reshape(accepted.shape + (1,) * (new.dim() - 2)), new, old)
        for new, old in zip(vars(moved).values(), vars(point).values(), strict=True)
    ]
    return Move(type(point)(*chosen), change, accepted)


def _pull(slope: Tensor, whitening: Tensor) -> Tensor:
    """The gradient in whitened coordinates, shape (C, N, K)."""
    return torch.einsum("nkl,cnk->cnl", whitening, slope)


def _stretched(standard: Tensor, whitening: Tensor) -> Tensor:
    """A step in whitened coordinates as a step of u, shape (C, N, K)."""
    return torch.einsum("nkl,cnl->cnk", whitening, standard)
