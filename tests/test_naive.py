"""Naive Monte Carlo with particles that all observations share: the estimates, and the error of their mean."""

import math

import numpy as np
import pytest
import torch
from example_stories import (
    ORACLES,
    ShiftedNormal,
    closed_form_log_evidence,
    images,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from torch import nn

from ppl_vae import VAE, likelihoods, log_evidence, noise, priors
from ppl_vae.evidence import sharing
from ppl_vae.evidence.sampling import PILOT_PARTICLES


def draws_of_the_prior(story, num_particles: int, seed: int, unit: int = 0) -> torch.Tensor:
    """What the prior of a VAE draws in a unit of noise, shape (S, K)."""
    with noise.unit(torch.device("cpu"), seed, noise.Purpose.EVIDENCE, unit), torch.no_grad():
        return story.prior().expand([num_particles]).sample()


def test_estimates_are_those_of_a_loop_written_by_hand(float64):
    story = linear_gaussian(num_features=4, latent_dim=2, scale=1.0)
    x = story.model(num_observations=5).detach()
    evidence = log_evidence(story, x, method="prior", num_particles=1500, seed=3)
    z = torch.cat([draws_of_the_prior(story, size, 3, unit) for unit, size in enumerate((1024, 476))])
    for n in range(5):
        log_weights = [story.decoder(z_s).log_prob(x[n]).item() for z_s in z]
        by_hand = math.log(sum(map(math.exp, log_weights)) / 1500)
        assert evidence["estimate"].values[n] == pytest.approx(by_hand, rel=1e-9)


def test_images_are_decoded_once_for_all_observations(float64):
    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.count = inner, 0

        def forward(self, z):
            self.count += len(z)
            return self.inner(z)

    story = small_vae()
    story.decoder = likelihoods.Bernoulli(Counting(story.decoder.logits))
    log_evidence(story, images(), method="prior", num_particles=2000)
    assert story.decoder.logits.count < 2000 + PILOT_PARTICLES + 1000 + 100  # draws, pilot, coordinates, dry runs


def test_two_observations_are_correlated_where_particles_are_shared(float64):
    story = linear_gaussian(num_features=2, latent_dim=1, scale=0.5)
    x = story.model(num_observations=1).detach().repeat(2, 1)
    evidence = log_evidence(story, x, method="prior", num_particles=100)
    assert evidence["estimate"].values[0] == pytest.approx(evidence["estimate"].values[1], rel=1e-12)


# The error of the mean


@pytest.fixture(scope="module")
def repeats() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, their printed errors, and what independent particles would have, of the same data with 200 seeds.

    The observations are alike, so that a particle that suits one suits them all.
    """
    torch.manual_seed(0)
    story = linear_gaussian(num_features=3, latent_dim=1, scale=1.0)
    x = story.model(num_observations=1).detach() + 0.2 * torch.randn(20, 3)
    means, printed, as_if_independent = [], [], []
    for seed in range(200):
        evidence = log_evidence(story, x, method="prior", num_particles=640, seed=seed)
        means.append(evidence.summary().mean)
        printed.append(evidence.summary().monte_carlo_error)
        as_if_independent.append(math.sqrt((evidence["standard_error"].values ** 2).sum()) / len(x))
    return np.array(means), np.array(printed), np.array(as_if_independent)


@pytest.mark.slow
def test_the_printed_error_of_the_mean_is_the_spread_over_seeds(repeats):
    means, printed, _ = repeats
    assert 0.8 < printed.mean() / means.std(ddof=1) < 1.25
    assert printed.std() / printed.mean() < 0.5


def test_the_error_of_independent_particles_would_be_far_too_small(repeats):
    means, _, as_if_independent = repeats
    assert as_if_independent.mean() / means.std(ddof=1) < 0.3


def test_a_single_particle_tells_no_error(float64):
    story = linear_gaussian(num_features=3, latent_dim=1)
    x = story.model(num_observations=4).detach()
    assert math.isnan(log_evidence(story, x, method="prior", num_particles=1).summary().monte_carlo_error)


# Conditions


def test_observations_with_equal_conditions_share_their_particles(float64):
    x, y = torch.tensor([0.3, 0.3, 0.3, -1.0]), torch.tensor([0.0, 2.0, 0.0, 2.0])
    story = ShiftedNormal()
    columns = (x, y)
    groups = list(sharing.rows_with_equal_conditions(columns, sharing.scored_columns(story, columns)))
    assert sorted(group.tolist() for group in groups) == [[0, 2], [1, 3]]
    estimate = log_evidence(story, x, y, method="prior", num_particles=500)["estimate"].values
    assert estimate[0] == estimate[2] != estimate[1]


def test_conditional_estimates_are_of_each_rows_own_condition(float64):
    story = ShiftedNormal()
    x, y = torch.linspace(-2, 3, 30), torch.arange(30.0) % 3
    evidence = log_evidence(story, x, y, method="prior", num_particles=5000)
    error = abs(evidence["estimate"].values - story.log_evidence(x, y).numpy())
    good = evidence["verdict"].values == "good"
    assert good.mean() > 0.8
    assert (error[good] < 4.5 * evidence["standard_error"].values[good]).all()


def test_every_observation_is_in_one_group():
    story, y = small_conditional(), torch.tensor([2, 0, 1, 0, 2, 2])
    columns = (images(6), y)
    groups = sharing.rows_with_equal_conditions(columns, sharing.scored_columns(story, columns))
    assert sorted(row for group in groups for row in group.tolist()) == list(range(6))


def test_no_particles_are_shared_where_the_model_looks_at_its_data(float64):
    class Scaled(nn.Module):
        """A model whose noise depends on the data that it scores: each observation draws for itself."""

        def __init__(self, story: VAE) -> None:
            super().__init__()
            self.story = story

        def model(self, x):
            self.story.model(x + 0)

        def guide(self, x):
            self.story.guide(x)

    inner = linear_gaussian(num_features=3, latent_dim=1, scale=1.0)
    x = inner.model(num_observations=1).detach().repeat(20, 1)
    assert sharing.scored_columns(Scaled(inner), (x,)) == {}
    evidence = log_evidence(Scaled(inner), x, method="prior", num_particles=2000)
    estimate = evidence["estimate"].values
    assert len(set(estimate)) == 20
    assert (abs(estimate - closed_form_log_evidence(inner, x).numpy()) < 4.5 * evidence["standard_error"].values).all()


# Streams and chunks


@pytest.mark.parametrize("name", ["log-normal", "hierarchical", "gamma"])
def test_any_prior_is_averaged_over(float64, name):
    make, columns, log_evidence_of = ORACLES[name]
    story, columns = make(), columns()
    evidence = log_evidence(story, *columns, method="prior", num_particles=10_000)
    good = evidence["verdict"].values == "good"
    error = abs(evidence["estimate"].values - log_evidence_of(story, *columns).numpy())
    assert good.any() and (error[good] < 4.5 * evidence["standard_error"].values[good]).all()


def test_likelihoods_that_are_not_numbers_are_named():
    class Fragile(nn.Module):
        def forward(self, z):
            return torch.where(z > 2, math.nan, z).expand(*z.shape[:-1], 2)

    encoder = linear_gaussian(num_features=2, latent_dim=1).encoder
    story = VAE(priors.StandardNormal(1), likelihoods.Normal(Fragile(), scale=1.0), encoder)
    with pytest.raises(ValueError, match=r"NaN or infinite for the observations \[0, 1, 2, 3\]"):
        log_evidence(story, rows(4)[:, :2], method="prior")
