"""The ladder of estimators against the linear-Gaussian closed form: errors, verdicts, coverage, and the pilot rule."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from example_stories import closed_form_log_evidence, linear_gaussian

from ppl_vae import log_evidence
from ppl_vae.evidence import Annealed

DIMENSIONS = [1, 2, 8, 32]
INEXACT = [0.7, 1.2, 1.5]


@dataclass
class Scores:
    """Errors, standard errors and verdicts of simulated observations, shape (N,)."""

    error: np.ndarray
    standard_error: np.ndarray
    verdict: np.ndarray
    pareto_k: np.ndarray

    @property
    def good(self) -> np.ndarray:
        return np.isin(self.verdict, ("good", "exact"))

    @property
    def covered(self) -> np.ndarray:
        return abs(self.error) < 1.96 * self.standard_error


def score(
    method, latent_dim: int, widened: float, num_observations: int, num_features: int = 12, **arguments
) -> Scores:
    story = linear_gaussian(num_features, latent_dim, widened=widened)
    x = story.model(num_observations=num_observations).detach()
    evidence = log_evidence(story, x, method=method, **arguments)
    error = evidence["estimate"].values - closed_form_log_evidence(story, x).numpy()
    return Scores(error, *(evidence[name].values for name in ("standard_error", "verdict", "pareto_k")))


def within(scores: Scores, standard_errors: float) -> bool:
    return bool((abs(scores.error) <= standard_errors * scores.standard_error + 1e-8)[scores.good].all())


# Estimates


@pytest.mark.parametrize("latent_dim", DIMENSIONS)
@pytest.mark.parametrize("widened", INEXACT)
@pytest.mark.parametrize("method", ["importance", "mixture", "auto"])
def test_good_estimates_lie_within_four_standard_errors(float64, method, latent_dim, widened):
    scores = score(method, latent_dim, widened, num_observations=16)
    assert within(scores, 4)
    assert scores.good.all() or method == "importance"


@pytest.mark.parametrize("latent_dim", DIMENSIONS)
@pytest.mark.parametrize("method", ["laplace", Annealed(num_temperatures=20)], ids=lambda m: getattr(m, "name", m))
def test_good_estimates_from_modes_lie_within_four_standard_errors(float64, method, latent_dim):
    num_particles = 1000 if method == "laplace" else 64
    scores = score(method, latent_dim, 0.7, num_observations=8, num_particles=num_particles)
    assert within(scores, 4)
    assert scores.good.any()


@pytest.mark.parametrize("method", ["prior", "pyro"])
def test_good_estimates_of_the_slow_references_lie_within_four_standard_errors(float64, method):
    particles, rows = (5000, 64) if method == "prior" else (150, 2)
    scores = score(method, 1, 1.3, num_observations=rows, num_features=2, num_particles=particles)
    assert scores.good.any() and within(scores, 4)


@pytest.mark.parametrize("latent_dim", DIMENSIONS)
@pytest.mark.parametrize("method", ["importance", "auto"])
def test_an_exact_guide_is_reported_as_exact(float64, method, latent_dim):
    scores = score(method, latent_dim, 1.0, num_observations=64, num_features=40)
    assert set(scores.verdict) == {"exact"}
    assert abs(scores.error).max() < 1e-6


@pytest.mark.parametrize("latent_dim", DIMENSIONS)
@pytest.mark.parametrize("method", ["importance", "auto"])
def test_few_observations_are_flagged_where_the_guide_is_a_little_wide(float64, method, latent_dim):
    assert score(method, latent_dim, 1.2, num_observations=64).good.mean() >= 0.8


def test_observations_are_flagged_where_the_guide_is_narrow(float64):
    scores = score("importance", 32, 0.7, num_observations=64)
    assert scores.error.mean() < -0.1
    assert scores.good.mean() < 0.05


# Intervals


@pytest.mark.slow
def test_intervals_with_a_good_verdict_cover_the_truth(float64, capsys):
    cells = [(dim, widened) for dim in DIMENSIONS for widened in INEXACT]
    runs = [score("importance", dim, widened, num_observations=256) for dim, widened in cells]
    runs += [score("mixture", dim, 0.7, num_observations=192) for dim in DIMENSIONS]
    covered, verdict = (np.concatenate([getattr(run, name) for run in runs]) for name in ("covered", "verdict"))
    good, fair = covered[verdict == "good"], covered[verdict == "fair"]
    with capsys.disabled():
        print(f"\ncoverage of good {good.mean():.1%} of {len(good)}, of fair {fair.mean():.1%} of {len(fair)}")
    assert len(good) >= 2000
    assert 0.92 <= good.mean() <= 0.98
    assert fair.mean() < good.mean()


@pytest.mark.slow
def test_intervals_of_annealing_cover_the_truth(float64):
    scores = score(Annealed(num_temperatures=10), 2, 0.7, num_observations=640, num_features=4, num_particles=128)
    assert (scores.verdict == "good").mean() > 0.95
    assert 0.92 <= scores.covered[scores.verdict == "good"].mean() <= 0.98


# The pilot rule: E[p-hat / p] among the rows that are kept


@pytest.fixture(scope="module")
def narrow() -> Scores:
    """10,000 observations, 16 dimensions, a guide of 0.7 standard deviations."""
    torch.manual_seed(0)
    return score("importance", 16, 0.7, num_observations=10_000, num_features=3, num_particles=500)


@pytest.fixture(scope="module")
def less_narrow() -> Scores:
    """2,000 observations, 16 dimensions, a guide of 0.8 standard deviations."""
    torch.manual_seed(0)
    return score("importance", 16, 0.8, num_observations=2000, num_features=3, num_particles=500)


def standard_errors_from_one(ratios: np.ndarray) -> float:
    return (ratios.mean() - 1) / (ratios.std(ddof=1) / len(ratios) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["narrow", "less_narrow"])
def test_estimates_that_a_pilot_calls_good_are_unbiased(setting, request):
    scores = request.getfixturevalue(setting)
    ratios = np.exp(scores.error[scores.verdict == "good"])
    assert len(ratios) > 50
    assert abs(standard_errors_from_one(ratios)) < 3


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["narrow", "less_narrow"])
def test_estimates_that_their_own_draws_call_good_would_be_biased(setting, request):
    scores = request.getfixturevalue(setting)
    ratios = np.exp(scores.error[scores.pareto_k < 0.4])
    assert len(ratios) > 50
    assert standard_errors_from_one(ratios) < -10
