"""Bounds on simulated observations hold the truth between them, in means."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import TwoLatents, closed_form_log_evidence, images, labels, linear_gaussian, small_conditional
from torch import nn

from ppl_vae import evidence_bounds, traces
from ppl_vae.evidence import Annealed, bounds

FEW_STEPS = Annealed(num_temperatures=5, num_leapfrog=2)


@pytest.mark.parametrize("method", ["importance", "laplace", "mixture", FEW_STEPS])
def test_the_truth_lies_between_the_bounds_in_means(float64, method):
    story = linear_gaussian(num_features=10, latent_dim=4, widened=1.5)
    both = evidence_bounds(story, num_observations=300, method=method, num_particles=10)
    truth = closed_form_log_evidence(story, both.columns[0]).numpy()
    for gap in (truth - both["lower"].values, both["upper"].values - truth):
        assert gap.mean() > -3 * gap.std(ddof=1) / np.sqrt(len(gap))


def test_a_poor_proposal_leaves_a_gap_on_both_sides(float64):
    story = linear_gaussian(num_features=10, latent_dim=6, widened=3.0)
    both = evidence_bounds(story, num_observations=300, method="importance", num_particles=5)
    truth = closed_form_log_evidence(story, both.columns[0]).numpy()
    for gap in (truth - both["lower"].values, both["upper"].values - truth):
        assert gap.mean() > 3 * gap.std(ddof=1) / np.sqrt(len(gap))


def test_a_better_proposal_closes_the_gap(float64):
    story = linear_gaussian(num_features=10, latent_dim=6, widened=3.0)
    gap, better = (evidence_bounds(story, method=name, num_particles=20).gap[0] for name in ("importance", "laplace"))
    assert better < gap / 5


def test_an_exact_guide_leaves_no_gap(float64):
    both = evidence_bounds(linear_gaussian(7, 3), num_observations=20, method="importance", num_particles=5)
    np.testing.assert_allclose(both["lower"], both["upper"], atol=1e-10)


def test_the_upper_bound_fails_for_latents_that_did_not_make_the_data(float64, monkeypatch):
    """Negative control: with latents of other observations the 'upper bound' lies below the truth."""
    simulate = bounds.simulate

    def shuffled(*arguments):
        columns, latents = simulate(*arguments)
        return columns, {name: value.roll(1, 0) for name, value in latents.items()}

    monkeypatch.setattr(bounds, "simulate", shuffled)
    story = linear_gaussian(num_features=10, latent_dim=6, widened=3.0)
    both = evidence_bounds(story, num_observations=300, method="importance", num_particles=5)
    gap = both["upper"].values - closed_form_log_evidence(story, both.columns[0]).numpy()
    assert gap.mean() < -3 * gap.std(ddof=1) / np.sqrt(len(gap))


def test_conditions_come_from_the_columns_and_data_from_the_story():
    both = evidence_bounds(small_conditional(), images(), labels(), num_observations=50, num_particles=20)
    x, y = both.columns
    assert torch.equal(y, labels()[torch.arange(50) % 40])
    assert x.shape == (50, 1, 6, 5) and not torch.equal(x[:40], images())


def test_observations_follow_the_seed():
    story = TwoLatents()
    first, again, other = (evidence_bounds(story, num_observations=5, num_particles=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.columns[0], again.columns[0]) and first["upper"].equals(again["upper"])
    assert not torch.equal(first.columns[0], other.columns[0])


def test_simulated_observations_are_those_of_the_prior_predictive():
    story = TwoLatents()
    both = evidence_bounds(story, num_observations=5, num_particles=5, seed=3)
    assert torch.equal(both.columns[0], traces.draws(traces.prior_predictive(story, 5, seed=3))["x"])


def test_print_says_that_real_observations_may_be_harder():
    said = str(evidence_bounds(TwoLatents(), num_observations=5, num_particles=5))
    assert "5 simulated observations" in said and "real ones may be harder" in said


class Reader(nn.Module):
    """A model whose second line depends on the data of the first."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + x.flip(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "prior"}, "Unknown method 'prior'"),
        ({"num_observations": 0}, "num_observations must be at least 1"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        evidence_bounds(TwoLatents(), **arguments)


@pytest.mark.parametrize("columns", [(torch.ones(4, 7), torch.zeros(4).long()), (torch.ones(0, 1, 6, 5), labels()[:0])])
def test_columns_that_the_story_does_not_take_are_refused(columns):
    with pytest.raises(ValueError, match=r"does not run on two rows|at least one observation"):
        evidence_bounds(small_conditional(), *columns)


def test_a_story_without_a_way_to_simulate_is_refused():
    class Unnamed(TwoLatents):
        def model(self, data=None, *, num_observations=1):
            return super().model(data, num_observations=num_observations)

    with pytest.raises(ValueError, match="pass the columns"):
        evidence_bounds(Unnamed())
