"""Annealed importance sampling: weights with the right mean whatever the settings, and variants that lose it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_stories import ORACLES, ExactPosterior, closed_form_log_evidence, linear_gaussian
from torch import Tensor

from ppl_vae import VAE, log_evidence, traces
from ppl_vae.evidence import Annealed
from ppl_vae.evidence.annealing import Annealing
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import Block

FEW = 5  # temperatures: too few for precision, and more than enough for the right mean


def prepared(story, x: Tensor, **settings) -> Annealing:
    with traces.scoring(story):
        return Annealed(**settings).prepare(Block(joint_of(story, (x,), "rows"), (x,), first=0, seed=0))


def toy(num_observations: int, latent_dim: int = 2, scale: float = 1.0, num_features: int = 3) -> tuple[VAE, Tensor]:
    story = linear_gaussian(num_features, latent_dim, scale, widened=1.3)
    return story, story.model(num_observations=num_observations).detach()


def mean_is_one(ratios: Tensor, standard_errors: float = 4) -> bool:
    """Whether independent numbers have the mean 1, as far as their spread tells."""
    ratios = ratios.flatten()
    return bool((ratios.mean() - 1).abs() < standard_errors * ratios.std() / math.sqrt(len(ratios)))


# The mean of the weights


@pytest.mark.parametrize("step_size", [0.01, 0.3, 2.5])
@pytest.mark.parametrize("start", ["laplace", "prior"])
def test_weights_have_the_mean_p_whatever_the_step_size(float64, start, step_size):
    story, x = toy(num_observations=50)
    annealing = prepared(story, x, num_temperatures=FEW, num_leapfrog=2, start=start)
    annealing = replace(annealing, step_size=torch.full_like(annealing.step_size, step_size))
    with traces.scoring(story):
        log_weights = annealing.log_weights(200)
    assert mean_is_one(torch.exp(log_weights - closed_form_log_evidence(story, x)))


@pytest.mark.parametrize("name", ["gamma", "discrete in guide", "dirichlet"])
def test_weights_have_the_mean_p_where_the_posterior_is_not_normal(float64, name):
    make, columns, log_evidence_of = ORACLES[name]
    story, (x,) = make(), columns()
    annealing = prepared(story, x, num_temperatures=FEW, num_leapfrog=2)
    with traces.scoring(story):
        log_weights = annealing.log_weights(1000)
    for n, log_p in enumerate(log_evidence_of(story, x)):
        assert mean_is_one(torch.exp(log_weights[:, n] - log_p), 4.5)


@pytest.mark.parametrize("start", ["laplace", "prior"])
def test_inverse_weights_of_chains_from_the_posterior_have_the_mean_one_over_p(float64, start):
    story, x = toy(num_observations=50)
    annealing = prepared(story, x, num_temperatures=FEW, num_leapfrog=2, start=start)
    with traces.scoring(story):
        log_weights = annealing.log_weights_backward(posterior_points(story, annealing, x, 200))
    assert mean_is_one(torch.exp(closed_form_log_evidence(story, x) - log_weights))


def posterior_points(story: VAE, annealing: Annealing, x: Tensor, num_particles: int) -> Tensor:
    """Exact draws of the posterior, shape (S, N, K)."""
    z = ExactPosterior(story.decoder)(x).sample((num_particles,))
    space = annealing.block.joint.space
    return space.coordinates({"z": z.flatten(0, 1)}).reshape(z.shape)


def test_more_temperatures_bring_the_chains_together(float64):
    story, x = toy(num_observations=10, scale=0.3)
    spreads = []
    for num_temperatures in (3, 10, 30):
        annealing = prepared(story, x, num_temperatures=num_temperatures, start="prior")
        with traces.scoring(story):
            spreads.append(annealing.log_weights(32).std(0).mean().item())
    assert spreads[0] > 1.5 * spreads[1] > 1.5**2 * spreads[2]


def test_from_the_prior_agrees_with_the_closed_form(float64):
    story, x = toy(num_observations=8, scale=2.0)
    evidence = log_evidence(story, x, method=Annealed(num_temperatures=100, start="prior"), num_particles=64)
    good = evidence["verdict"].values == "good"
    error = abs(evidence["estimate"].values - closed_form_log_evidence(story, x).numpy())
    assert good.mean() > 0.5
    assert (error[good] < 4 * evidence["standard_error"].values[good]).all()


def test_a_path_that_is_too_short_is_flagged(float64):
    story, x = toy(num_observations=16, scale=0.1)
    evidence = log_evidence(story, x, method=Annealed(num_temperatures=2, start="prior"), num_particles=16)
    assert set(evidence["verdict"].values) == {"poor"}


@pytest.mark.parametrize("number", [0, -3])
def test_a_path_without_steps_is_refused(number):
    story, x = toy(num_observations=2)
    with pytest.raises(ValueError, match=f"num_temperatures must be at least 1; found {number}"):
        log_evidence(story, x, method=Annealed(num_temperatures=number))


# Hamiltonian moves leave the posterior as it is


def moved(annealing: Annealing, u: Tensor, step_size: float, num_moves: int = 20) -> Tensor:
    """Points of shape (C, N, K) after some moves at the last temperature."""
    state, size = annealing.state(u), torch.full((u.shape[1],), step_size)
    for _ in range(num_moves):
        state, _ = annealing._move(state, 1.0, size)
    return state.u


def standardized(story: VAE, annealing: Annealing, x: Tensor, u: Tensor) -> Tensor:
    """Draws in coordinates where the posterior is N(0, I)."""
    posterior = ExactPosterior(story.decoder)(x)
    z = annealing.block.joint.space.latents(u.flatten(0, 1))[0]["z"].reshape(u.shape)
    shift = (z - posterior.mean).unsqueeze(-1)
    return torch.linalg.solve_triangular(posterior.scale_tril, shift, upper=False).flatten()


def looks_standard_normal(draws: Tensor) -> bool:
    error_of_mean, error_of_variance = 1 / math.sqrt(len(draws)), math.sqrt(2 / len(draws))
    return abs(draws.mean()) < 4.5 * error_of_mean and abs(draws.square().mean() - 1) < 4.5 * error_of_variance


def after_moves(step_size: float) -> Tensor:
    story, x = toy(num_observations=40, scale=0.5)
    annealing = prepared(story, x, num_temperatures=FEW, num_leapfrog=2)
    with traces.scoring(story):
        u = moved(annealing, posterior_points(story, annealing, x, 100), step_size)
    return standardized(story, annealing, x, u)


@pytest.mark.parametrize("step_size", [0.3, 0.9, 1.5])
def test_moves_leave_posterior_draws_posterior_draws(float64, step_size):
    assert looks_standard_normal(after_moves(step_size))


def test_moves_that_are_always_accepted_would_not(float64, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.zeros(*shape))  # log 0 is less than any change
    assert not looks_standard_normal(after_moves(step_size=1.2))


def test_moves_forget_where_they_started(float64):
    story, x = toy(num_observations=20, scale=0.5)
    annealing = prepared(story, x, num_temperatures=FEW)
    start = posterior_points(story, annealing, x, 100)
    with traces.scoring(story):
        u = moved(annealing, start, 0.3)
    before, after = (standardized(story, annealing, x, points) for points in (start, u))
    assert abs(torch.corrcoef(torch.stack([before, after]))[0, 1]) < 0.1


# Step sizes are learned by chains that are thrown away


def test_step_sizes_are_frozen_before_the_chains_that_report(float64):
    story, x = toy(num_observations=10)
    annealing = prepared(story, x, num_temperatures=FEW)
    learned = annealing.step_size.clone()
    with traces.scoring(story):
        annealing.log_weights(20)
    assert torch.equal(annealing.step_size, learned)
    assert learned.unique().numel() > 10  # each temperature and observation has its own


def test_chains_that_report_are_not_those_that_learned(float64):
    story, x = toy(num_observations=10)
    method = Annealed(num_temperatures=FEW)
    evidence = log_evidence(story, x, method=method, num_particles=16)
    pilot = prepared(story, x, num_temperatures=FEW).pilot_log_weights
    assert pilot.shape == (16, 10)
    assert not np.isclose(evidence["estimate"], pilot.logsumexp(0) - math.log(16), atol=1e-6).any()


def hurried(annealing: Annealing, num_particles: int) -> Tensor:
    """Log weights of chains whose steps follow the run itself: those that fall behind take longer ones."""
    state = annealing.state(annealing.density.sample(num_particles))
    log_weights = torch.zeros(state.u.shape[:2])
    for step in range(len(annealing.step_size)):
        gain = annealing._gain(state, step)
        log_weights = log_weights + gain
        size = torch.where(gain < gain.median(), 1.0, 0.05)
        state, _ = annealing._move(state, float(annealing.temperatures[step + 1]), size)
    return log_weights


def test_adapting_the_step_within_the_run_would_be_biased(float64):
    story, x = toy(num_observations=40, latent_dim=1, scale=0.5, num_features=2)
    annealing = prepared(story, x, num_temperatures=FEW, num_leapfrog=2, start="prior")
    with traces.scoring(story):
        log_weights = [annealing.log_weights(1000), hurried(annealing, 1000)]
    fixed, adapted = (torch.exp(log_w - closed_form_log_evidence(story, x)) for log_w in log_weights)
    assert mean_is_one(fixed)
    assert not mean_is_one(adapted, 8)
