"""log p(x) against closed forms, Pyro and ArviZ; and the wrong variants, which must fail."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from example_stories import (
    TwoClusters,
    TwoLatents,
    closed_form_log_evidence,
    images,
    labels,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import VAE, likelihoods, log_evidence, noise, posteriors, priors, traces
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import Block, FromGuide
from ppl_vae.evidence.weights import WeightSums


def guide_log_weights(story, *columns: Tensor, num_particles: int, layout: traces.Layout = "rows") -> Tensor:
    block = Block(joint_of(story, columns, layout), columns, first=0, seed=0)
    return FromGuide(block).log_weights(num_particles)


# Against the closed form


def test_exact_guide_makes_every_log_weight_equal_log_p(float64):
    story = linear_gaussian(num_features=7, latent_dim=3)
    x = story.model(num_observations=50).detach()
    with traces.scoring(story):
        log_weights = guide_log_weights(story, x, num_particles=20)
    assert (log_weights - closed_form_log_evidence(story, x)).abs().max() < 1e-10


def test_exact_guide_is_reported_as_exact(float64):
    story = linear_gaussian(num_features=7, latent_dim=3)
    x = story.model(num_observations=40).detach()
    evidence = log_evidence(story, x, num_particles=100, method="importance")
    assert set(evidence["verdict"].values) == {"exact"}
    np.testing.assert_allclose(evidence["estimate"], closed_form_log_evidence(story, x), atol=1e-10)
    assert evidence["standard_error"].max() < 1e-6
    assert (evidence["pareto_k"] == -np.inf).all()
    np.testing.assert_allclose(evidence["ess"], 100, rtol=1e-6)


def test_exact_guide_is_reported_as_exact_in_single_precision():
    story = linear_gaussian(num_features=50, latent_dim=3)
    x = story.model(num_observations=40).detach()
    assert set(log_evidence(story, x, num_particles=100, method="importance")["verdict"].values) == {"exact"}


@pytest.mark.parametrize("latent_dim", [1, 4])
def test_trusted_estimates_lie_within_four_standard_errors_of_the_truth(float64, latent_dim):
    story = linear_gaussian(num_features=8, latent_dim=latent_dim, widened=1.3)
    x = story.model(num_observations=64).detach()
    evidence = log_evidence(story, x, num_particles=2000, method="importance")
    good = evidence["verdict"].values == "good"
    error = abs(evidence["estimate"].values - closed_form_log_evidence(story, x).numpy())
    assert good.mean() > 0.5
    assert (error[good] < 4 * evidence["standard_error"].values[good] + 1e-8).all()


def test_naive_monte_carlo_agrees_with_the_truth_where_the_prior_is_close_to_the_posterior(float64):
    story = linear_gaussian(num_features=2, latent_dim=1, scale=1.5)
    x = story.model(num_observations=64).detach()
    evidence = log_evidence(story, x, method="prior", num_particles=2000)
    error = abs(evidence["estimate"].values - closed_form_log_evidence(story, x).numpy())
    assert (error < 4.5 * evidence["standard_error"].values).mean() > 0.95


def test_naive_monte_carlo_from_the_prior_is_flagged_where_it_fails(float64):
    story = linear_gaussian(num_features=40, latent_dim=6, scale=0.1)
    x = story.model(num_observations=32).detach()
    evidence = log_evidence(story, x, method="prior", num_particles=1000)
    assert evidence.summary().mean < closed_form_log_evidence(story, x).mean() - 10
    assert set(evidence["verdict"].values) == {"poor"}


def test_elbo_is_log_p_minus_the_divergence_of_the_guide(float64):
    story = linear_gaussian(num_features=6, latent_dim=2, widened=1.5)
    x = story.model(num_observations=64).detach()
    elbo = log_evidence(story, x, method="elbo", num_particles=2000)
    divergence = 2 * (1.5**2 / 2 - 0.5 - math.log(1.5))  # KL of N(0, 1.5^2) from N(0, 1), twice
    error = elbo["estimate"].values - (closed_form_log_evidence(story, x).numpy() - divergence)
    assert (abs(error) < 4.5 * elbo["standard_error"].values).all()
    assert set(elbo["verdict"].values) == {"bound"}


def test_elbo_importance_and_truth_come_in_this_order(float64):
    story = linear_gaussian(num_features=6, latent_dim=4, widened=2.0)
    x = story.model(num_observations=200).detach()
    elbo = log_evidence(story, x, method="elbo", num_particles=16).summary().mean
    few = log_evidence(story, x, num_particles=16, method="importance").summary().mean
    more = log_evidence(story, x, num_particles=256, method="importance").summary().mean
    assert elbo < few < more < closed_form_log_evidence(story, x).mean() + 0.01


def test_the_printed_bias_is_that_of_the_estimate(float64):
    story = linear_gaussian(num_features=3, latent_dim=1, widened=2.0)
    x = story.model(num_observations=2000).detach()
    evidence = log_evidence(story, x, num_particles=20, method="importance")
    error = evidence["estimate"].values - closed_form_log_evidence(story, x).numpy()
    standard_error = error.std(ddof=1) / math.sqrt(len(error))
    assert abs(error.mean() - evidence.summary().bias) < 4 * standard_error
    assert error.mean() < -2 * standard_error


def test_conditional_evidence_is_of_x_given_y(float64):
    class Shifted(nn.Module):
        def model(self, x, y):
            with pyro.plate("observations", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + y, 0.5), obs=x)

        def guide(self, x, y):
            with pyro.plate("observations", len(y)):
                pyro.sample("z", dist.Normal((x - y) / 1.25, 0.6))

    x, y = torch.randn(64), torch.randn(64) * 3
    evidence = log_evidence(Shifted(), x, y, num_particles=2000, method="importance")
    truth = scipy.stats.norm.logpdf(x, y, math.sqrt(1.25))
    assert (abs(evidence["estimate"].values - truth) < 4.5 * evidence["standard_error"].values + 1e-8).all()


def test_a_story_of_two_latents_agrees_with_quadrature(float64):
    story = TwoLatents()
    x = rows(8)
    evidence = log_evidence(story, x, method="prior", num_particles=20_000)
    # Given the size, x is normal: one integral over the log of the size is left.
    log_size = torch.linspace(-5, 5, 4001)
    weight, bias = story.loadings.weight.detach(), story.loadings.bias.detach()
    covariance = weight @ weight.T + torch.exp(2 * log_size)[:, None, None] * torch.eye(5)
    given_size = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x[:, None])
    prior = torch.distributions.Normal(0.0, 0.5).log_prob(log_size)
    truth = (given_size + prior).logsumexp(1) + math.log(10 / 4000)
    assert (abs(evidence["estimate"].values - truth.numpy()) < 4 * evidence["standard_error"].values).all()


@pytest.mark.parametrize("method", ["importance", "prior", "pyro"])
def test_a_discrete_latent_that_the_guide_leaves_to_the_model_is_averaged_over(float64, method):
    story = TwoClusters()
    with torch.no_grad():
        story.logits.copy_(torch.tensor([0.3, -0.8]))
    x = torch.linspace(-2, 3, 8)
    num_particles = 300 if method == "pyro" else 2000
    evidence = log_evidence(story, x, method=method, num_particles=num_particles)
    component = torch.distributions.Normal(story.loc, math.sqrt(1.25))
    truth = (component.log_prob(x[:, None]) + story.logits.log_softmax(0)).logsumexp(1).detach().numpy()
    assert (abs(evidence["estimate"].values - truth) < 4.5 * evidence["standard_error"].values + 1e-8).all()


@pytest.mark.parametrize("method", ["importance", "prior"])
def test_a_story_may_sum_out_its_only_latent(float64, method):
    class Coin(nn.Module):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                side = pyro.sample("side", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(2 * side, 1.0), obs=x)

        def guide(self, x):
            pass

    x = torch.linspace(-1, 3, 5)
    evidence = log_evidence(Coin(), x, method=method, num_particles=2000)
    truth = np.log(0.7 * scipy.stats.norm.pdf(x, 0) + 0.3 * scipy.stats.norm.pdf(x, 2))
    assert (abs(evidence["estimate"].values - truth) < 4.5 * evidence["standard_error"].values + 1e-8).all()


def test_a_story_that_asserts_its_shapes_runs_as_rows():
    class Strict(nn.Module):
        def forward(self, z):
            assert z.dim() == 2, "one row per observation"
            return z @ torch.ones(2, 3)

    story = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(Strict()), posteriors.DiagonalNormal(nn.Linear(3, 4)))
    assert log_evidence(story, torch.ones(4, 3), num_particles=5, method="importance")["estimate"].shape == (4,)


def test_deterministic_values_are_neither_drawn_nor_scored(float64):
    class Squared(nn.Module):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                loc = pyro.deterministic("loc", 2 * z)
                pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Normal(2 * x / 4.25, math.sqrt(0.25 / 4.25)))

    x = torch.randn(8)
    evidence = log_evidence(Squared(), x, num_particles=50, method="importance")
    np.testing.assert_allclose(evidence["estimate"], scipy.stats.norm.logpdf(x, 0, math.sqrt(4.25)), atol=1e-10)
    assert evidence.dataset.attrs["num_dimensions"] == 1


# Negative controls: what the package must not do


def test_weights_shared_by_a_batch_would_be_wrong(float64):
    story = linear_gaussian(num_features=6, latent_dim=2, widened=1.5)
    x = story.model(num_observations=64).detach()
    with traces.scoring(story):
        log_weights = guide_log_weights(story, x, num_particles=500)
    truth = closed_form_log_evidence(story, x).sum()
    apart = (log_weights.logsumexp(0) - math.log(500)).sum()
    shared = log_weights.sum(1).logsumexp(0) - math.log(500)
    assert abs(apart - truth) < 1
    assert shared < truth - 5


def test_a_scaled_story_is_refused():
    story = small_vae()
    story.model = poutine.scale(story.model, 0.5)
    with pytest.raises(ValueError, match=r"scaled by 0\.5"):
        log_evidence(story, images(), num_particles=5, method="importance")


def test_a_subsampled_plate_is_refused():
    class Subsampled(nn.Module):
        def model(self, x):
            with pyro.plate("observations", 1000, subsample_size=len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("observations", 1000, subsample_size=len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="scaled"):
        log_evidence(Subsampled(), torch.randn(10), num_particles=5, method="importance")


def test_training_mode_does_not_matter_and_is_left_as_it_was():
    encoder = nn.Sequential(nn.Flatten(-3), nn.Linear(30, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    story = VAE(priors.StandardNormal(2), small_vae().decoder, posteriors.DiagonalNormal(encoder))
    story.train()
    statistics = encoder[2].running_mean.clone()
    training = log_evidence(story, images(), num_particles=10, method="importance")
    assert encoder[2].training and torch.equal(encoder[2].running_mean, statistics)
    story.eval()
    assert training["estimate"].equals(log_evidence(story, images(), num_particles=10, method="importance")["estimate"])


# Noise and layout


def test_the_plate_of_particles_gives_what_particles_as_rows_give():
    story = small_vae()
    with traces.scoring(story):
        weights = []
        for layout in ("rows", "plate"):
            with noise.unit(torch.device("cpu"), 0, noise.Purpose.EVIDENCE):
                weights.append(guide_log_weights(story, images(), num_particles=7, layout=layout))
    assert torch.allclose(*weights, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "columns", "expected"),
    [
        (small_vae, (images(),), "plate"),
        (small_conditional, (images(), labels()), "rows"),
        (TwoLatents, (rows(),), "plate"),
    ],
)
def test_the_fast_layout_is_taken_only_where_it_tells_the_same_story(make, columns, expected):
    story = make()
    with traces.scoring(story):
        assert traces.fastest_layout(story, tuple(column[:2] for column in columns)) == expected


def test_a_story_that_mixes_particles_under_a_plate_runs_as_rows():
    class Mixing(nn.Module):  # the first dimension: particles in a plate, observations in rows
        def forward(self, z: Tensor) -> Tensor:
            return torch.cat([z, z.flip(0)], -1) @ torch.ones(4, 3)

    encoder = posteriors.DiagonalNormal(nn.Linear(3, 4))
    story = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(Mixing()), encoder)
    with traces.scoring(story):
        assert traces.fastest_layout(story, (torch.ones(2, 3),)) == "rows"


def test_an_observations_noise_depends_on_its_place_and_the_seed_only():
    story, x = small_vae(), images(100)
    whole = log_evidence(story, x, num_particles=100, method="importance")["estimate"].values
    again = log_evidence(story, x, num_particles=100, method="importance")["estimate"].values
    start = log_evidence(story, x[:64], num_particles=100, method="importance")["estimate"].values
    other = log_evidence(story, x, num_particles=100, seed=1, method="importance")["estimate"].values
    np.testing.assert_array_equal(whole, again)
    np.testing.assert_allclose(whole[:64], start, rtol=1e-6)
    assert (whole != other).all()


def test_generators_and_parameter_store_are_left_as_they_were():
    pyro.param("mine", torch.ones(1))
    story = small_vae()
    before = torch.random.get_rng_state()
    log_evidence(story, images(), num_particles=10, method="importance")
    assert torch.equal(before, torch.random.get_rng_state())
    assert list(pyro.get_param_store()) == ["mine"]


# Weights


def feed(log_weights: Tensor, sizes: list[int]) -> WeightSums:
    sums = WeightSums(log_weights.shape[1], len(log_weights))
    for part in log_weights.split(sizes):
        sums.update(part)
    return sums


def test_streamed_sums_equal_the_formulas_on_all_weights():
    log_w = 3 * torch.randn(1000, 6, dtype=torch.float64) - 800
    sums = feed(log_w, [1, 63, 436, 500])
    w = np.exp(log_w.numpy() + 800)
    np.testing.assert_allclose(sums.log_mean, np.log(w.mean(0)) - 800, rtol=1e-12)
    np.testing.assert_allclose(sums.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9)
    np.testing.assert_allclose(sums.relative_variance, w.var(0, ddof=1) / 1000 / w.mean(0) ** 2, rtol=1e-9)
    np.testing.assert_allclose(sums.mean, log_w.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sums.standard_error_of_mean, scipy.stats.sem(log_w.numpy()), rtol=1e-9)


def arviz_pareto_k(log_w: np.ndarray) -> np.ndarray:
    """k-hat by ArviZ itself: 0.23 takes log weights, 1.x negates its input."""
    import arviz as az

    if int(az.__version__.split(".")[0]) == 0:
        return np.asarray(az.psislw(log_w.T.copy())[1])
    from arviz_stats.base import array_stats

    return np.array([array_stats.psislw(-column, axis=-1)[1] for column in log_w.T])


# Sizes whose tail, 3 sqrt(S), is a whole number: ArviZ 0.23 rounds it up, as we do, and 1.x down.
@pytest.mark.parametrize("num_particles", [50, 400, 2500])
def test_pareto_k_equals_arviz(num_particles):
    shapes = torch.tensor([0.05, 0.3, 0.6, 1.2, 3.0], dtype=torch.float64)
    log_w = shapes * torch.distributions.Exponential(1.0).sample((num_particles, 1)).double() - 100
    sums = feed(log_w, [num_particles // 2, num_particles - num_particles // 2])
    np.testing.assert_allclose(sums.pareto_k, arviz_pareto_k(log_w.numpy()), rtol=1e-6)


@pytest.mark.parametrize("spread", [10.0, 1e3, 1e5])
def test_weights_of_which_one_rules_are_poor(spread):
    log_w = spread * torch.randn(500, 20, dtype=torch.float64)
    assert set(feed(log_w, [500]).verdicts()) == {"poor"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_weights_are_an_error_naming_the_observations(bad, monkeypatch):
    def broken(proposal, num_particles):
        log_w = torch.zeros(num_particles, proposal.block.size)
        log_w[0, 3] = bad
        return log_w

    monkeypatch.setattr(FromGuide, "log_weights", broken)
    with pytest.raises(ValueError, match=r"observations \[3\]"):
        log_evidence(small_vae(), images(32), num_particles=5, method="importance")


def test_verdict_comes_from_a_pilot_and_not_from_the_draws_it_judges():
    story = small_vae()
    few = log_evidence(story, images(), num_particles=100, method="importance")
    many = log_evidence(story, images(), num_particles=1000, method="importance")
    assert few["pilot_pareto_k"].equals(many["pilot_pareto_k"])
    assert few["verdict"].equals(many["verdict"])
    assert not few["pareto_k"].equals(many["pareto_k"])


# The data set as a whole


def test_summary_keeps_three_errors_apart():
    evidence = log_evidence(small_vae(), images(), num_particles=50, method="importance")
    summary, table = evidence.summary(), evidence.dataset
    assert summary.mean == pytest.approx(float(table["estimate"].mean()))
    assert summary.monte_carlo_error == pytest.approx(math.sqrt((table["standard_error"] ** 2).sum()) / 40)
    assert summary.bias == pytest.approx(-float((table["standard_error"] ** 2).mean()) / 2)
    assert summary.test_sampling_error == pytest.approx(float(scipy.stats.sem(table["estimate"])))
    assert summary.bits_per_dimension == pytest.approx(-summary.mean / 30 / math.log(2))
    assert f"{summary.mean:.3f}" in str(evidence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_particles": 0}, "num_particles must be at least 1"), ({"method": "guess"}, "Unknown method 'guess'")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_evidence(small_vae(), images(), **arguments)


def test_one_observation_is_enough():
    evidence = log_evidence(small_vae(), images(1), num_particles=10, method="importance")
    assert evidence["estimate"].shape == (1,) and math.isnan(evidence.summary().test_sampling_error)
