"""Laws of every prior, likelihood and posterior: densities, samples, shapes, gradients, dtype, floors."""

import math

import pytest
import torch
from torch import nn

from ppl_vae import likelihoods, posteriors, priors
from ppl_vae.networks import mlp

EVENT = (2, 3)
Z = torch.linspace(-1, 1, 8).reshape(4, 2)

LIKELIHOODS = {
    "Bernoulli": lambda: likelihoods.Bernoulli(mlp(2, 8, EVENT)),
    "Normal, fixed scale": lambda: likelihoods.Normal(mlp(2, 8, EVENT), scale=0.3),
    "Normal, fixed scale per dimension": lambda: likelihoods.Normal(mlp(2, 8, EVENT), scale=torch.rand(EVENT) + 0.1),
    "Normal, learned scale": lambda: likelihoods.Normal(mlp(2, 8, EVENT), likelihoods.learned(0.3)),
    "Normal, scale per dimension": lambda: likelihoods.Normal(mlp(2, 8, EVENT), likelihoods.learned(torch.ones(EVENT))),
    "Normal, scale by a network": lambda: likelihoods.Normal(mlp(2, 8, EVENT), scale=mlp(2, 8, EVENT)),
}
each_likelihood = pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS)


@each_likelihood
def test_likelihood_has_the_event_of_the_network_and_a_batch_per_latent(make):
    for batch in [(4,), (5, 4)]:
        p = make()(Z.expand(*batch, 2))
        assert p.batch_shape == batch and p.event_shape == EVENT
        assert p.sample().shape == (*batch, *EVENT) and p.log_prob(p.sample()).shape == batch


@each_likelihood
def test_likelihood_sends_gradients_to_every_parameter(make):
    likelihood = make()
    p = likelihood(Z)
    p.log_prob(p.sample()).sum().backward()
    assert all(parameter.grad is not None for parameter in likelihood.parameters())


@each_likelihood
def test_likelihood_works_in_double_precision(make):
    assert make().double()(Z.double()).sample().dtype == torch.float64


@each_likelihood
def test_likelihood_samples_match_its_mean(make):
    p = make()(Z)
    draws = p.sample((20_000,))
    assert ((draws.mean(0) - p.mean).abs() < 5 * p.variance.sqrt() / math.sqrt(20_000) + 1e-6).all()


def test_bernoulli_sums_to_one_over_all_images():
    p = likelihoods.Bernoulli(mlp(2, 8, EVENT))(Z)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).reshape(-1, 1, *EVENT)
    assert torch.allclose(p.log_prob(images).exp().sum(0), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, likelihoods.learned(0.5), mlp(2, 8, 1)], ids=["fixed", "learned", "network"])
def test_normal_density_integrates_to_one(scale):
    p = likelihoods.Normal(mlp(2, 8, 1), scale)(Z)
    grid = torch.linspace(-20, 20, 40_001)[:, None, None]
    assert torch.allclose(p.log_prob(grid).exp().sum(0) * 1e-3, torch.ones(4), atol=1e-4)


def test_normal_is_the_normal_of_the_mathematics():
    loc = mlp(2, 8, EVENT)
    x = torch.randn(4, *EVENT)
    expected = torch.distributions.Normal(loc(Z), 0.3).log_prob(x).sum((1, 2))
    assert torch.allclose(likelihoods.Normal(loc, 0.3)(Z).log_prob(x), expected)


def test_conditions_reach_both_networks():
    class Sum(nn.Module):
        def forward(self, z, y):
            return z + y

    p = likelihoods.Normal(Sum(), Sum())(torch.zeros(3, 2), torch.arange(3.0)[:, None])
    assert p.mean[:, 0].tolist() == [0, 1, 2]
    assert p.variance[2, 0] > p.variance[0, 0]


def test_a_learned_scale_starts_where_it_is_told():
    initial = torch.tensor([0.01, 0.5, 30.0])
    p = likelihoods.Normal(mlp(2, 3), likelihoods.learned(initial))(Z)
    assert torch.allclose(p.variance.sqrt(), initial.expand(4, 3), rtol=1e-3)


@pytest.mark.parametrize("scale", [likelihoods.learned(0.5), mlp(2, 1)], ids=["learned", "network"])
def test_a_scale_that_trains_stays_above_its_floor_and_says_when_it_is_there(scale):
    likelihood = likelihoods.Normal(mlp(2, 1), scale, floor=0.01)
    assert likelihoods.share_on_floor(likelihood, Z) == 0
    with torch.no_grad():
        for parameter in likelihood.scale.parameters():
            parameter.fill_(-1e4)
    assert likelihood(torch.ones(4, 2)).variance.sqrt().min() >= 0.01
    assert likelihoods.share_on_floor(likelihood, torch.ones(4, 2)) == 1


def test_an_unbounded_likelihood_is_held_by_the_floor():
    likelihood = likelihoods.Normal(mlp(2, 1), likelihoods.learned(0.5), floor=0.05)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        loss = -likelihood(Z[:1]).log_prob(torch.ones(1, 1)).sum()
        loss.backward()
        optimizer.step()
    assert likelihood.scale().item() == pytest.approx(0.05, rel=0.1)
    assert -loss.item() < -math.log(0.05)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.tensor([1.0, 0.0])])
def test_a_fixed_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="must be positive"):
        likelihoods.Normal(mlp(2, 2), scale)


def test_a_learned_scale_must_start_above_its_floor():
    with pytest.raises(ValueError, match=r"above its floor 0\.1"):
        likelihoods.Normal(mlp(2, 2), likelihoods.learned(0.05), floor=0.1)


def test_standard_normal_prior_is_standard_normal():
    z = torch.randn(5, 3)
    expected = (-z.square() / 2 - math.log(2 * math.pi) / 2).sum(1)
    assert torch.allclose(priors.StandardNormal(3)().log_prob(z), expected)


def test_prior_follows_the_story_to_its_dtype():
    assert priors.StandardNormal(3).double()().sample().dtype == torch.float64


def test_prior_needs_a_dimension():
    with pytest.raises(ValueError, match="at least 1"):
        priors.StandardNormal(0)


def test_diagonal_normal_reads_locations_then_scales():
    q = posteriors.DiagonalNormal(nn.Identity())(torch.tensor([[1.0, 2.0, 0.0, 50.0]]))
    assert q.mean.tolist() == [[1.0, 2.0]]
    assert torch.allclose(q.variance.sqrt(), torch.tensor([[math.log(2), 50.0]]), atol=1e-3)


@pytest.mark.parametrize("value", [-1e30, 1e30])
def test_extreme_scales_of_the_guide_stay_finite_and_positive(value):
    q = posteriors.DiagonalNormal(nn.Identity())(torch.tensor([[0.0, value]]))
    scale = q.variance.sqrt() if value < 0 else q.base_dist.scale
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.isfinite(q.log_prob(torch.zeros(1, 1))).all()
