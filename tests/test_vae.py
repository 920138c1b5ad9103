"""The VAE is a Pyro program like any other: Pyro's own tools take it as it is."""

import math

import pyro
import pytest
import torch
from example_stories import convolutional_vae, images, linear_gaussian, small_conditional, small_vae
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO


def test_model_without_data_draws_from_the_prior_predictive():
    torch.manual_seed(1)
    story = linear_gaussian(num_features=3, latent_dim=2)
    x = story.model(num_observations=200_000).detach()
    weight, bias, scale = story.decoder.loc.weight, story.decoder.loc.bias, story.decoder.scale()
    covariance = weight @ weight.T + scale**2 * torch.eye(3)
    assert torch.allclose(x.mean(0), bias, atol=0.05)
    assert torch.allclose(torch.cov(x.T), covariance, atol=0.1)


@pytest.mark.parametrize("make", [small_vae, convolutional_vae])
def test_trace_has_a_latent_and_an_observation_per_row(make):
    trace = poutine.trace(make().model).get_trace(images(7))
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (7, 2)
    assert trace.nodes["x"]["log_prob"].shape == (7,)
    assert trace.nodes["x"]["is_observed"]


def test_log_joint_is_that_of_the_mathematics():
    story, x = small_vae(), images(5)
    z = torch.randn(5, 2)
    trace = poutine.trace(poutine.condition(story.model, {"z": z})).get_trace(x)
    theta = torch.sigmoid(story.decoder.logits(z))
    log_p = (-z.square() / 2 - math.log(2 * math.pi) / 2).sum(1)
    log_p = log_p + torch.where(x == 1, theta, 1 - theta).log().sum((1, 2, 3))
    assert trace.log_prob_sum().item() == pytest.approx(log_p.sum().item(), rel=1e-5)


def test_predictive_draws_new_observations():
    story = small_vae()
    prior = Predictive(story.model, num_samples=3)(num_observations=4)
    assert prior["x"].shape == (3, 4, 1, 6, 5)
    replicated = Predictive(poutine.uncondition(story.model), guide=story.guide, num_samples=3)(images(4))
    assert replicated["x"].shape == (3, 4, 1, 6, 5) and not torch.equal(replicated["x"][0], images(4))


def test_pyros_importance_sampler_finds_the_evidence_of_one_observation():
    story = linear_gaussian(num_features=3, latent_dim=1)
    x = story.model(num_observations=1).detach()
    posterior = Importance(story.model, story.guide, num_samples=20).run(x)
    weight, bias, scale = story.decoder.loc.weight, story.decoder.loc.bias, story.decoder.scale()
    truth = torch.distributions.MultivariateNormal(bias, weight @ weight.T + scale**2 * torch.eye(3)).log_prob(x)
    assert posterior.get_log_normalizer().item() == pytest.approx(truth.item(), abs=1e-4)


def test_nuts_samples_the_posterior_of_one_observation(float64):
    story = linear_gaussian(num_features=3, latent_dim=1)
    x = story.model(num_observations=1).detach()
    mcmc = MCMC(NUTS(story.model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x)
    z, exact = mcmc.get_samples()["z"], story.encoder(x)
    assert abs(z.mean() - exact.mean).item() < 0.2 * exact.variance.sqrt().item() + 0.05


def test_two_vaes_in_scopes_of_their_own_train_under_the_users_svi():
    for _ in range(2):
        story = small_vae()
        before = [parameter.detach().clone() for parameter in story.parameters()]
        with pyro.get_param_store().scope():
            SVI(story.model, story.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(images())
        assert all(not torch.equal(old, new) for old, new in zip(before, story.parameters(), strict=True))


def test_conditional_model_draws_one_observation_for_each_label():
    assert small_conditional().model(y=torch.tensor([0, 2, 2, 1])).shape == (4, 1, 6, 5)


def test_conditional_model_asks_for_its_condition():
    with pytest.raises(TypeError, match=r"model\(y=labels\)"):
        small_conditional().model()
