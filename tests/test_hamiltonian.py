"""Hamiltonian moves leave a density as it is, whatever their settings; and do what scipy would do step by step."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from ppl_vae.evidence import hamiltonian
from ppl_vae.evidence.hamiltonian import JITTER, Impulse

PRECISION = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
SCALES = (1.0, 0.3, 3.0)  # of the target of each observation


@dataclass(frozen=True)
class Place:
    u: Tensor
    log_p: Tensor
    gradient: Tensor


class Normals:
    """A correlated normal for each of three observations, of different sizes."""

    scale = torch.tensor(SCALES, dtype=torch.float64)[:, None]

    def at(self, u: Tensor) -> Place:
        gradient = -(u / self.scale**2) @ PRECISION
        return Place(u, (gradient * u).sum(-1) / 2, gradient)

    def log_prob(self, point: Place) -> Tensor:
        return point.log_p

    def slope(self, point: Place) -> Tensor:
        return point.gradient

    def sample(self, num_chains: int) -> Tensor:
        """Exact draws, shape (C, 3, 2)."""
        normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), precision_matrix=PRECISION)
        return normal.sample((num_chains, 3)) * self.scale

    def standardized(self, u: Tensor) -> np.ndarray:
        factor = torch.linalg.cholesky(PRECISION)
        return ((u / self.scale) @ factor).flatten().numpy()


WHITENING = torch.eye(2, dtype=torch.float64) * Normals.scale[:, :, None]


def moved(u: Tensor, step_size: float, num_moves: int = 10, num_leapfrog: int = 3) -> Tensor:
    target = Normals()
    point, size = target.at(u), torch.full((3,), step_size, dtype=torch.float64)
    for _ in range(num_moves):
        point = hamiltonian.move(target, point, Impulse.like(u), WHITENING, size, num_leapfrog).point
    return point.u


@pytest.mark.parametrize("step_size", [0.1, 0.6, 1.2])
def test_draws_stay_draws(step_size):
    u = moved(Normals().sample(3000), step_size)
    assert scipy.stats.kstest(Normals().standardized(u), "norm").pvalue > 1e-3


def test_moves_that_are_always_accepted_do_not_keep_the_density(monkeypatch):
    """Negative control: log 0 is less than any change."""
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.zeros(*shape))
    u = moved(Normals().sample(3000), 1.2)
    assert scipy.stats.kstest(Normals().standardized(u), "norm").pvalue < 1e-6


def test_chains_forget_where_they_started():
    u = moved(torch.full((3000, 3, 2), 2.0, dtype=torch.float64), 0.5, num_moves=30)
    assert scipy.stats.kstest(Normals().standardized(u), "norm").pvalue > 1e-3


def test_a_trajectory_is_that_of_leapfrog_by_hand():
    target, size = Normals(), torch.full((3,), 0.2, dtype=torch.float64)
    point = target.at(target.sample(1))
    impulse = replace(Impulse.like(point.u), threshold=torch.zeros(1, 3, dtype=torch.float64))
    step = hamiltonian.move(target, point, impulse, WHITENING, size, num_leapfrog=4)
    for n, scale in enumerate(SCALES):
        epsilon = 0.2 * (1 + JITTER * (2 * impulse.jitter[0, n].item() - 1))
        precision = PRECISION.numpy() / scale**2
        u, p = point.u[0, n].numpy(), impulse.momentum[0, n].numpy()
        start = u @ precision @ u / 2 + p @ p / 2
        for _ in range(4):
            p = p - epsilon / 2 * scale * precision @ u
            u = u + epsilon * scale * p
            p = p - epsilon / 2 * scale * precision @ u
        np.testing.assert_allclose(step.point.u[0, n], u, rtol=1e-12)
        np.testing.assert_allclose(step.change[0, n], start - (u @ precision @ u / 2 + p @ p / 2), atol=1e-12)


def test_short_steps_keep_the_energy_and_halving_them_quarters_its_error():
    target = Normals()
    point = target.at(target.sample(500))
    impulse = Impulse.like(point.u)
    errors = []
    for step_size, num_leapfrog in ((0.2, 4), (0.1, 8)):
        size = torch.full((3,), step_size, dtype=torch.float64)
        errors.append(hamiltonian.move(target, point, impulse, WHITENING, size, num_leapfrog).change.abs().mean())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_a_way_into_nothing_is_refused():
    class Cliff(Normals):
        def log_prob(self, point: Place) -> Tensor:
            return torch.where((point.u > 0).all(-1), point.log_p, torch.nan)

    u = torch.full((500, 3, 2), 0.1, dtype=torch.float64)
    size = torch.ones(3, dtype=torch.float64)
    step = hamiltonian.move(Cliff(), Cliff().at(u), Impulse.like(u), WHITENING, size, num_leapfrog=2)
    assert (step.point.u > 0).all()
    assert step.accepted.any() and torch.isneginf(step.change).any()
    assert not step.accepted[torch.isneginf(step.change)].any()


def test_what_is_refused_stays_where_it_was_and_what_is_accepted_moves():
    target, size = Normals(), torch.full((3,), 1.5, dtype=torch.float64)
    point = target.at(target.sample(200))
    step = hamiltonian.move(target, point, Impulse.like(point.u), WHITENING, size, num_leapfrog=3)
    same = (step.point.u == point.u).all(-1)
    assert 0 < same.sum() < same.numel()
    assert torch.equal(same, ~step.accepted)
    assert torch.equal(step.point.log_p[same], point.log_p[same])
    torch.testing.assert_close(step.point.log_p, target.at(step.point.u).log_p)
