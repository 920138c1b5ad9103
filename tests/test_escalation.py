"""The rule of method="auto": who is drawn by which method, with how many particles, and what a budget cannot buy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from example_stories import ORACLES, ThreeKinds, TwoLatents, closed_form_log_evidence, linear_gaussian, rows
from torch import Tensor, nn

from ppl_vae import VAE, Evidence, likelihoods, log_evidence, priors
from ppl_vae.evidence import Annealed, Mixture, replays


def toy(latent_dim: int, widened: float, num_observations: int = 40) -> tuple[VAE, Tensor]:
    story = linear_gaussian(num_features=12, latent_dim=latent_dim, widened=widened)
    return story, story.model(num_observations=num_observations).detach()


def errors(evidence: Evidence, story: VAE, x: Tensor) -> np.ndarray:
    return evidence["estimate"].values - closed_form_log_evidence(story, x).numpy()


# Who is drawn how


def test_an_exact_guide_is_left_at_that(float64):
    story, x = toy(latent_dim=4, widened=1.0)
    evidence = log_evidence(story, x)
    assert set(evidence["method"].values) == {"importance"} and set(evidence["verdict"].values) == {"exact"}


def test_a_narrow_guide_is_escalated_to_the_mixture(float64):
    story, x = toy(latent_dim=8, widened=0.5)
    importance, auto = (log_evidence(story, x, method=method) for method in ("importance", "auto"))
    assert (importance["verdict"].values == "good").mean() < 0.2
    assert (auto["method"].values == "mixture").mean() > 0.8
    assert set(auto["verdict"].values) == {"good"}
    assert (abs(errors(auto, story, x)) < 4.5 * auto["standard_error"].values).all()
    assert auto["standard_error"].max() < importance["standard_error"].median() / 2


def test_each_observation_is_escalated_on_its_own(float64):
    story, x = toy(latent_dim=8, widened=0.75)
    auto, importance = log_evidence(story, x), log_evidence(story, x, method="importance")
    trusted = importance["verdict"].values == "good"
    assert 0 < trusted.sum() < len(x)
    assert set(auto["method"].values[trusted]) == {"importance"}
    assert set(auto["method"].values[~trusted]) == {"mixture"}


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_one_and_two_dimensions_are_integrated(float64, latent_dim):
    story, x = toy(latent_dim, widened=1.5)
    evidence = log_evidence(story, x)
    assert set(evidence["method"].values) == {"quadrature"} and set(evidence["verdict"].values) == {"exact"}


def test_quadrature_is_not_taken_where_it_is_dearer_than_the_budget(float64):
    story, x = toy(latent_dim=2, widened=1.2, num_observations=4)
    evidence = log_evidence(story, x, budget=5000)
    assert set(evidence["method"].values) == {"importance"}


def test_discrete_stories_are_enumerated():
    assert set(log_evidence(ThreeKinds(), torch.zeros(3))["method"].values) == {"exact"}


def test_a_method_that_is_named_is_kept(float64):
    story, x = toy(latent_dim=8, widened=0.5)
    evidence = log_evidence(story, x, method="importance")
    assert set(evidence["method"].values) == {"importance"}
    assert "poor" in evidence["verdict"].values


def test_a_configured_method_is_taken_as_it_is(float64):
    story, x = toy(latent_dim=4, widened=0.5)
    names = [log_evidence(story, x, method=m).dataset.attrs["method"] for m in (Mixture(), Annealed(3))]
    assert names == ["mixture", "annealed"]


# Tolerance and budget


def test_a_tolerance_is_reached_or_the_observation_is_unresolved(float64):
    story, x = toy(latent_dim=4, widened=0.8, num_observations=16)
    evidence = log_evidence(story, x, tolerance=0.02)
    resolved = evidence["verdict"].values != "unresolved"
    assert resolved.mean() > 0.9
    assert (evidence["standard_error"].values[resolved] <= 0.02).all()
    assert (abs(errors(evidence, story, x)) < 4.5 * evidence["standard_error"].values).all()


@pytest.mark.parametrize("method", ["importance", "laplace", "mixture"])
def test_named_methods_draw_until_a_pilot_promises_the_tolerance(float64, method):
    story, x = toy(latent_dim=4, widened=1.4, num_observations=16)
    evidence = log_evidence(story, x, method=method, tolerance=0.01)
    resolved = evidence["verdict"].values != "unresolved"
    assert resolved.mean() > 0.9
    assert (evidence["standard_error"].values[resolved] <= 0.01).all()


def test_hard_observations_get_more_particles_than_easy_ones(float64):
    story, x = TwoLatents(), rows(24)
    usual = log_evidence(story, x, method="laplace")
    evidence = log_evidence(story, x, method="laplace", tolerance=0.015)
    doublings = np.log2(evidence["num_particles"].values / 1000)
    assert set(doublings) <= set(range(12)) and len(set(doublings)) > 1
    assert scipy.stats.spearmanr(usual["standard_error"].values, doublings).statistic > 0.5


def test_a_tolerance_beyond_the_budget_is_unresolved_and_says_so(float64):
    story, x = toy(latent_dim=8, widened=0.7)
    evidence = log_evidence(story, x, tolerance=1e-4, budget=3000)
    assert set(evidence["verdict"].values) == {"unresolved"}
    assert evidence["standard_error"].min() > 1e-4
    assert "unresolved" in str(evidence)


def test_without_a_budget_for_more_the_verdict_stays_as_the_pilot_found_it(float64):
    story, x = toy(latent_dim=8, widened=0.5)
    evidence = log_evidence(story, x, budget=1500)
    assert set(evidence["method"].values) == {"importance"}
    assert "poor" in evidence["verdict"].values


class Counting(nn.Module):
    """A decoder that counts the rows it is given."""

    def __init__(self, decoder: likelihoods.Normal) -> None:
        super().__init__()
        self.decoder, self.count = decoder, 0

    def forward(self, z: Tensor):
        self.count += z.shape[:-1].numel()
        return self.decoder(z)


@pytest.mark.parametrize("budget", [2000, 10_000])
def test_about_as_much_is_decoded_as_the_budget_buys(float64, budget, monkeypatch):
    monkeypatch.setattr(replays, "CALLS_BEFORE_CAPTURE", math.inf)  # a replay does not count
    story, x = toy(latent_dim=3, widened=0.5, num_observations=32)
    decoder = Counting(story.decoder)
    story = VAE(priors.StandardNormal(3), decoder, story.encoder)
    log_evidence(story, x, tolerance=1e-3, budget=budget)
    assert 0.5 * budget < decoder.count / len(x) < 1.3 * budget


def test_more_particles_may_be_asked_for(float64):
    story, x = toy(latent_dim=4, widened=1.2)
    evidence = log_evidence(story, x, num_particles=3000)
    assert set(evidence["num_particles"].values) == {3000}


# What a pilot may not do


def test_escalated_estimates_are_unbiased(float64):
    story, x = toy(latent_dim=4, widened=0.7, num_observations=250)
    ratios = np.exp(errors(log_evidence(story, x, num_particles=60), story, x))
    assert abs(ratios.mean() - 1) < 4 * ratios.std(ddof=1) / math.sqrt(len(ratios))


def test_taking_the_larger_of_two_estimates_would_be_biased(float64):
    story, x = toy(latent_dim=4, widened=1.8, num_observations=250)
    two = [log_evidence(story, x, method="importance", num_particles=60, seed=seed) for seed in (0, 1)]
    for ratios, biased in (
        (np.exp(errors(two[0], story, x)), False),
        (np.exp(np.maximum(*(errors(one, story, x) for one in two))), True),
    ):
        assert (ratios.mean() - 1 > 4 * ratios.std(ddof=1) / math.sqrt(len(ratios))) == biased


@pytest.mark.parametrize("name", ["log-normal", "hierarchical"])
def test_the_draws_that_report_are_not_those_of_the_pilot(float64, name):
    make, columns, _ = ORACLES[name]
    story, columns = make(), columns()
    few, many = (log_evidence(story, *columns, budget=4000, num_particles=count) for count in (500, 1000))
    assert few["pilot_pareto_k"].equals(many["pilot_pareto_k"]) and few["verdict"].equals(many["verdict"])
    assert not np.isclose(few["pareto_k"], few["pilot_pareto_k"]).any()
