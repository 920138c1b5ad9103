"""Running a story: what the traces hold, and what running leaves alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import STORIES, images, linear_gaussian, rows, small_vae
from torch import nn

from ppl_vae import discrete, traces


@pytest.mark.parametrize("name", ["VAE", "convolutional", "plain"])
def test_prior_predictive_draws_every_site(name):
    make, columns = STORIES[name]
    draws = traces.draws(traces.prior_predictive(make(), 7))
    assert draws["x"].shape == (7, *columns()[0].shape[1:])
    assert len(draws) >= 2 and all(len(draw) == 7 for draw in draws.values())


@pytest.mark.parametrize(("make", "columns"), STORIES.values(), ids=STORIES)
def test_posterior_predictive_does_not_hand_back_the_data(make, columns):
    trace = discrete.posterior_predictive(make(), *columns())
    assert not torch.equal(traces.draws(trace)["x"], columns()[0])
    assert traces.observed_sites(trace) == {}


def test_posterior_predictive_has_the_spread_of_the_story(float64):
    story = linear_gaussian(num_features=3, latent_dim=2)
    x = story.model(num_observations=1).detach().expand(100_000, 3)
    draws = traces.draws(discrete.posterior_predictive(story, x))["x"]
    weight, posterior = story.decoder.loc.weight, story.encoder(x[:1])
    expected = weight @ posterior.covariance_matrix[0] @ weight.T + 0.25 * torch.eye(3)
    assert torch.allclose(torch.cov(draws.T), expected, atol=0.02)


def test_a_story_is_told_again_with_the_latents_that_it_is_given():
    story, x = linear_gaussian(num_features=3, latent_dim=2), torch.zeros(4, 3)
    z = torch.arange(8.0).reshape(4, 2)
    with traces.scoring(story):
        told = traces.retell(story.model, (x,), {"z": z})
        untold = traces.retell(story.model, (x,), {})
    assert torch.equal(traces.draws(told)["z"], z) and traces.observed_sites(told) == {}
    assert torch.allclose(told.nodes["x"]["fn"].mean, story.decoder.loc(z))
    assert not torch.equal(traces.draws(untold)["z"], z) and (traces.draws(untold)["x"] != 0).all()


def test_predictive_draws_depend_on_the_seed_alone():
    story = small_vae()
    first, again, other = (traces.draws(traces.prior_predictive(story, 5, seed=seed))["x"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_particles_are_rows_with_the_particle_leftmost():
    x, y = torch.arange(3.0)[:, None], torch.arange(3)
    repeated = traces.as_rows((x, y), 2)
    assert repeated[0].flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert repeated[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_log_prob_keeps_one_column_per_observation():
    model_trace, _ = traces.run(small_vae(), images(6))
    log_p = traces.log_prob(model_trace, traces.sample_sites(model_trace))
    assert log_p.shape == (6,)
    assert log_p.sum().item() == pytest.approx(model_trace.log_prob_sum().item(), rel=1e-5)


def test_sites_of_unequal_rows_are_refused():
    class Global(nn.Module):
        def model(self, x):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with pyro.plate("observations", len(x)):
                pyro.sample("x", dist.Normal(torch.zeros(5), scale).to_event(1), obs=x)

        def guide(self, x):
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    model_trace, _ = traces.run(Global(), rows(4))
    with pytest.raises(ValueError, match="one log probability per observation"):
        traces.log_prob(model_trace, traces.sample_sites(model_trace))


def test_scoring_restores_modes_gradients_and_the_store():
    story = small_vae()
    story.encoder.eval()
    pyro.param("mine", torch.ones(1))
    with traces.scoring(story):
        assert not story.training and not torch.is_grad_enabled()
        story.model(images(2))
    assert story.training and not story.encoder.training and torch.is_grad_enabled()
    assert list(pyro.get_param_store()) == ["mine"]
