"""Quadrature against closed forms, enumeration by hand, and a grid of its own written out."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import torch
from example_stories import (
    TwoLatents,
    closed_form_log_evidence,
    images,
    labels,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from torch import nn

from ppl_vae import log_evidence
from ppl_vae.evidence.sharing import cross_log_prob


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_finds_the_closed_form(float64, latent_dim):
    story = linear_gaussian(num_features=8, latent_dim=latent_dim)
    x = story.model(num_observations=50).detach()
    evidence = log_evidence(story, x, method="quadrature", tolerance=1e-6)
    np.testing.assert_allclose(evidence["estimate"], closed_form_log_evidence(story, x), atol=1e-6)
    assert set(evidence["verdict"].values) == {"exact"}


def test_the_grid_is_refined_until_narrow_posteriors_are_resolved(float64):
    story = linear_gaussian(num_features=8, latent_dim=2, scale=0.05)
    x = story.model(num_observations=20).detach()
    evidence = log_evidence(story, x, method="quadrature", tolerance=1e-6)
    error = abs(evidence["estimate"].values - closed_form_log_evidence(story, x).numpy())
    assert (error <= evidence["standard_error"].values + 1e-8).all()
    assert (evidence["verdict"] == "exact").all()


def test_the_grid_is_widened_for_observations_far_out(float64):
    story = linear_gaussian(num_features=8, latent_dim=1, scale=0.5)
    x = story.model(num_observations=5).detach() + 10 * story.decoder.loc.weight.detach().T
    evidence = log_evidence(story, x, method="quadrature", tolerance=1e-6)
    np.testing.assert_allclose(evidence["estimate"], closed_form_log_evidence(story, x), atol=1e-6)


def test_the_printed_error_bounds_the_error_of_a_story_with_relu_networks():
    story, x = small_vae(), images(10)
    evidence = log_evidence(story, x, method="quadrature", tolerance=1e-6)
    line = torch.linspace(-6, 6, 601)
    z = torch.cartesian_prod(line, line)
    theta = torch.sigmoid(story.decoder.logits(z)).detach().flatten(1).double()
    log_p = x.flatten(1).double() @ theta.log().T + (1 - x.flatten(1).double()) @ (1 - theta).log().T
    prior = -z.double().square().sum(1) / 2 - math.log(2 * math.pi)
    truth = (log_p + prior).logsumexp(1) + 2 * math.log(12 / 600)
    assert (abs(evidence["estimate"].values - truth.numpy()) < evidence["standard_error"].values + 2e-4).all()


def test_conditions_are_taken_into_account(float64):
    story, x, y = small_conditional(), images(9), labels(9)
    evidence = log_evidence(story, x, y, method="quadrature")
    naive = log_evidence(story, x, y, method="prior", num_particles=20_000)
    assert (abs(evidence["estimate"] - naive["estimate"]) < 4.5 * naive["standard_error"]).all()


class GammaScale(nn.Module):
    """One positive latent: z ~ Gamma(3, 2), x ~ N(0, z)."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Normal(0.0, z), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))


def test_a_positive_latent_is_integrated_in_unconstrained_space(float64):
    x = torch.tensor([0.0, 0.3, -2.0, 6.0])
    evidence = log_evidence(GammaScale(), x, method="quadrature", tolerance=1e-6)

    def joint(z, value):
        return 4 * z**2 * math.exp(-2 * z) * math.exp(-((value / z) ** 2) / 2) / z / math.sqrt(2 * math.pi)

    truth = [math.log(scipy.integrate.quad(joint, 0, np.inf, args=(value,))[0]) for value in x.tolist()]
    np.testing.assert_allclose(evidence["estimate"], truth, atol=1e-5)


def test_a_model_that_reads_its_data_is_told_once_for_each_observation(float64):
    class Chain(nn.Module):  # the second value is drawn around the first one that was observed
        def model(self, x):
            with pyro.plate("observations", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                loc = torch.stack([z, x[:, 0]], dim=-1)
                pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(5, 2)
    first = torch.distributions.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 0])
    second = torch.distributions.Normal(x[:, 0], 0.5).log_prob(x[:, 1])
    np.testing.assert_allclose(
        log_evidence(Chain(), x, method="quadrature", tolerance=1e-6)["estimate"], first + second, atol=1e-6
    )


@pytest.mark.parametrize(
    ("story", "x", "message"),
    [(TwoLatents(), rows(), "this story has 3")],
)
def test_stories_that_a_grid_cannot_hold_are_refused(story, x, message):
    with pytest.raises(ValueError, match=message):
        log_evidence(story, x, method="quadrature")


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Bernoulli(logits=torch.randn(6, 1, 3)).to_event(2),
        dist.Normal(torch.randn(6, 1, 3), torch.rand(6, 1, 3) + 0.1).to_event(2),
        dist.Normal(torch.randn(6, 1, 3), 0.3).to_event(2),
        dist.Binomial(5.0, logits=torch.randn(6, 1, 3)).to_event(2),
        dist.Binomial(torch.tensor([3.0, 4.0, 5.0]), logits=torch.randn(6, 1, 3)).to_event(2),
        dist.Binomial(torch.arange(1.0, 7.0)[:, None, None], logits=torch.randn(6, 1, 3)).to_event(2),
        dist.Poisson(torch.rand(6, 1, 3) + 0.1).to_event(2),
        dist.Poisson(torch.rand(6)),
        dist.Laplace(torch.randn(6, 1, 3), 0.3).to_event(2),
        dist.MultivariateNormal(torch.randn(6, 3), torch.eye(3)),
        dist.Normal(torch.randn(6), 0.3),
        dist.Bernoulli(logits=torch.randn(6)),
    ],
    ids=lambda d: f"{type(d).__name__}-{tuple(d.event_shape)}",
)
def test_the_fast_product_equals_the_density(distribution):
    x = torch.bernoulli(torch.full((4, *distribution.event_shape), 0.5))
    plain = torch.stack([distribution.log_prob(row) for row in x])
    assert torch.allclose(cross_log_prob(distribution, x, 0), plain, atol=1e-4)
