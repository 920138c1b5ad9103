"""Objectives against closed forms, quadrature over their particles, Pyro's own losses, and what must not happen."""

from functools import partial
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from example_stories import (
    ThreeKinds,
    TwoClusters,
    TwoLatents,
    closed_form_log_evidence,
    images,
    labels,
    linear_gaussian,
    rows,
    small_vae,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer import RenyiELBO as PyrosRenyiELBO
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn.functional import one_hot

from ppl_vae import networks, traces
from ppl_vae.objectives import FreeBitsELBO, ImportanceWeightedELBO, RenyiELBO, SummedOutELBO
from ppl_vae.training.steps import Tempering


def gradients(loss, story, *columns, seed=0, through=lambda program: program):
    """The loss of a story and its gradient in every parameter, one after the other."""

    def guide(*columns):
        pyro.module("story", story)
        return story.guide(*columns)

    story.zero_grad()
    pyro.set_rng_seed(seed)
    with traces.own_parameter_store():
        value = loss.loss_and_grads(through(story.model), through(guide), *columns)
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in story.parameters()]
    return value, torch.cat([slope.flatten() for slope in slopes])


def bounds(objective, story, *columns, seed=0):
    pyro.set_rng_seed(seed)
    return objective.bounds(story.model, story.guide, *columns).detach()


def assert_same_in_value_and_gradient(one, other, rtol=1e-9):
    assert one[0] == pytest.approx(other[0], rel=rtol)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=1e-9)


# Stories whose weights are written down a second time, as functions of standard normal noise


class Factor(nn.Module):
    """z ~ N(0, 1), x ~ N(a z + b, 0.6^2), q(z | x) a normal with learned location and scale."""

    num_latents = 1

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([1.0, -0.7])), nn.Parameter(torch.tensor([0.2, 0.1]))
        self.slope, self.shift = nn.Parameter(torch.tensor([0.4, -0.1])), nn.Parameter(torch.tensor(0.1))
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def posterior(self, x):
        return x @ self.slope + self.shift, self.log_scale.exp()

    def prior(self):
        return dist.Normal(0.0, 1.0)

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z[..., None] * self.a + self.b, 0.6).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(*self.posterior(x)))

    def log_prior(self, z):
        return Normal(0.0, 1.0).log_prob(z)

    def log_weight(self, x, noise, beta=1.0):
        loc, scale = self.posterior(x)
        z = loc + scale * noise[0]
        log_likelihood = Normal(z[..., None] * self.a + self.b, 0.6).log_prob(x).sum(-1)
        return log_likelihood + beta * (self.log_prior(z) - Normal(loc, scale).log_prob(z))


class SharedPrior(Factor):
    """Its prior is the even mixture of guesses at three points, so that it shares every parameter of the guide."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.tensor([[1.5, -1.0], [-1.0, 1.0], [0.0, 0.5]]))

    def prior(self):
        loc, scale = self.posterior(self.points)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(loc, scale.expand(3)))

    def log_prior(self, z):
        return self.prior().log_prob(z)


class Hierarchy(nn.Module):
    """top ~ N(0, 1), bottom ~ N(c top, 0.8^2), x ~ N(bottom, 0.5^2); the guide climbs from bottom to top."""

    num_latents = 2

    def __init__(self):
        super().__init__()
        self.c, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.2))
        self.slope, self.log_scale = nn.Parameter(torch.tensor(0.6)), nn.Parameter(torch.tensor(-0.5))
        self.top_slope, self.top_log_scale = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.1))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            bottom = pyro.sample("bottom", dist.Normal(self.c * top, 0.8))
            pyro.sample("x", dist.Normal(bottom + self.b, 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            bottom = pyro.sample("bottom", dist.Normal(self.slope * x, self.log_scale.exp()))
            pyro.sample("top", dist.Normal(self.top_slope * bottom.sin(), self.top_log_scale.exp()))

    def log_weight(self, x, noise, beta=1.0):
        betas = {"bottom": 1.0, "top": 1.0} | beta if isinstance(beta, dict) else {"bottom": beta, "top": beta}
        in_guide = Normal(self.slope * x, self.log_scale.exp())
        bottom = in_guide.loc + in_guide.scale * noise[0]
        top_in_guide = Normal(self.top_slope * bottom.sin(), self.top_log_scale.exp())
        top = top_in_guide.loc + top_in_guide.scale * noise[1]
        log_bottom = Normal(self.c * top, 0.8).log_prob(bottom) - in_guide.log_prob(bottom)
        log_top = Normal(0.0, 1.0).log_prob(top) - top_in_guide.log_prob(top)
        log_likelihood = Normal(bottom + self.b, 0.5).log_prob(x)
        return log_likelihood + betas["bottom"] * log_bottom + betas["top"] * log_top


def by_quadrature(story, x, num_particles, points, beta=1.0):
    """The expected bound of a single observation, and its gradient, by Gauss-Hermite quadrature over all the noise."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(points))
    dim = num_particles * story.num_latents
    grid = torch.cartesian_prod(*[nodes] * dim).reshape(-1, num_particles, story.num_latents)
    log_mass = (weights / weights.sum()).log()
    mass = torch.cartesian_prod(*[log_mass] * dim).reshape(-1, dim).sum(1).exp()
    log_weights = story.log_weight(x, grid.unbind(-1), beta)
    bound = mass @ (log_weights.logsumexp(1) - np.log(num_particles))
    slopes = torch.autograd.grad(bound, list(story.parameters()), materialize_grads=True)
    return bound.item(), torch.cat([slope.flatten() for slope in slopes])


ROUNDS, COPIES = 60, 500


def by_monte_carlo(loss, story, x, through=lambda program: program):
    """Means of bound and gradient over many copies of an observation, with their standard errors, and the spread."""
    copies = x.expand(COPIES, *x.shape)
    rounds = [gradients(loss, story, copies, seed=seed, through=through) for seed in range(ROUNDS)]
    values = torch.stack([-torch.cat([torch.tensor([value]), slope]) for value, slope in rounds]) / COPIES
    return values.mean(0), values.std(0) / ROUNDS**0.5


def assert_unbiased(loss, story, x, truth, through=lambda program: program):
    mean, error = by_monte_carlo(loss, story, x, through)
    distance = (mean - torch.cat([torch.tensor([truth[0]]), truth[1]])).abs()
    assert (distance <= 4.5 * error + 1e-12).all(), distance / error
    assert (error < 0.05).all()


def observation(make):
    return torch.tensor(1.3 if make is Hierarchy else [1.2, 0.4])


WEIGHTED = {"plain": partial(ImportanceWeightedELBO, doubly_reparameterized=False), "doubly": ImportanceWeightedELBO}
POINTS = {Factor: {1: 60, 2: 60, 3: 30}, SharedPrior: {1: 60, 2: 60, 3: 30}, Hierarchy: {1: 40, 2: 20}}


@pytest.mark.parametrize("objective", WEIGHTED.values(), ids=WEIGHTED.keys())
@pytest.mark.parametrize(("make", "num_particles"), [(make, k) for make in POINTS for k in POINTS[make]])
def test_importance_weighted_bound_and_gradient_have_the_mean_of_quadrature(float64, make, num_particles, objective):
    story, x = make(), observation(make)
    points = POINTS[make][num_particles]
    truth, coarser = (by_quadrature(story, x, num_particles, n) for n in (points, points - 4))
    torch.testing.assert_close(*truth[1:], *coarser[1:], rtol=1e-3, atol=1e-4)
    assert_unbiased(objective(num_particles), story, x, truth)


class SquaredEverywhere:
    """The known wrong variant: whatever depends on a parameter has squared weights, not the path through z alone."""

    def __init__(self, num_particles):
        self.num_particles = num_particles

    def loss_and_grads(self, model, guide, x):
        story = model.__self__
        loc, scale = story.posterior(x)
        z = loc + scale * torch.randn(self.num_particles, len(x))
        log_likelihood = Normal(z[..., None] * story.a + story.b, 0.6).log_prob(x).sum(-1)
        log_weights = log_likelihood + story.log_prior(z) - Normal(loc.detach(), scale.detach()).log_prob(z)
        (-(log_weights.softmax(0).detach() ** 2 * log_weights).sum()).backward()
        return -(log_weights.logsumexp(0) - np.log(self.num_particles)).sum().item()


def test_squared_weights_for_what_prior_and_guide_share_are_noticed(float64):
    story, x = SharedPrior(), observation(SharedPrior)
    value, slopes = by_quadrature(story, x, 2, 60)
    mean, error = by_monte_carlo(SquaredEverywhere(2), story, x)
    assert abs(mean[0] - value) < 4.5 * error[0]
    names = [name for name, parameter in story.named_parameters() for _ in range(parameter.numel())]
    wrong = {
        name for name, off in zip(names, ((mean[1:] - slopes).abs() > 10 * error[1:]).tolist(), strict=True) if off
    }
    assert {"a", "slope", "shift", "log_scale", "points"} <= wrong


@pytest.mark.parametrize(("beta", "make"), [(0.3, Factor), (2.0, SharedPrior), ({"top": 0.2}, Hierarchy)])
@pytest.mark.parametrize("objective", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_a_beta_leaves_the_gradient_that_of_the_bound_it_scales(float64, beta, make, objective):
    story, x = make(), observation(make)
    truth = by_quadrature(story, x, 2, POINTS[make][2], beta)
    assert_unbiased(objective(2), story, x, truth, through=Tempering(beta))


@pytest.mark.parametrize("make", [Factor, SharedPrior, Hierarchy])
def test_doubly_reparameterized_gradient_of_the_guide_is_less_noisy(float64, make):
    story, x = make(), observation(make)
    in_guide = [
        "slope" in name or "scale" in name for name, tensor in story.named_parameters() for _ in range(tensor.numel())
    ]
    errors = [by_monte_carlo(objective(20), story, x)[1][1:][torch.tensor(in_guide)] for objective in WEIGHTED.values()]
    # Of equal variances the quotient is F-distributed.
    assert ((errors[1] / errors[0]) ** 2 < scipy.stats.f(ROUNDS - 1, ROUNDS - 1).ppf(1e-4)).all()


def exact_factor():
    """A guide of its own parameters that is the posterior."""
    story = Factor()
    with torch.no_grad():
        precision = 1 + story.a.square().sum() / 0.36
        story.slope.copy_(story.a / 0.36 / precision)
        story.shift.copy_(-story.slope @ story.b)
        story.log_scale.copy_(-precision.log() / 2)
    return story


def test_exact_guide_has_a_doubly_reparameterized_gradient_of_zero_without_noise(float64):
    story, x = exact_factor(), torch.randn(30, 2)
    _, slopes = gradients(ImportanceWeightedELBO(4), story, x)
    assert (slopes[4:].abs() < 1e-12).all() and (slopes[:4].abs() > 1e-3).all()
    _, slopes = gradients(ImportanceWeightedELBO(4, doubly_reparameterized=False), story, x)
    assert (slopes[4:].abs() > 1e-3).all()


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize(
    "objective",
    [ImportanceWeightedELBO, WEIGHTED["plain"], partial(RenyiELBO, 0.5), partial(RenyiELBO, -2.0), SummedOutELBO],
    ids=["doubly reparameterized", "importance weighted", "Renyi", "Renyi below 0", "ELBO"],
)
def test_exact_guide_makes_every_bound_the_evidence_of_each_observation(float64, objective, num_particles):
    story = linear_gaussian(num_features=4, latent_dim=2)
    x = story.model(num_observations=9).detach()
    found = bounds(objective(num_particles=num_particles), story, x)
    torch.testing.assert_close(found, closed_form_log_evidence(story, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_particles", [1, 5])
def test_a_guide_that_stays_exact_gives_the_gradient_of_the_evidence_without_noise(float64, num_particles):
    story = linear_gaussian(num_features=4, latent_dim=2)  # its guide is computed from the decoder's parameters
    x = story.model(num_observations=9).detach()
    _, slopes = gradients(WEIGHTED["plain"](num_particles), story, x)
    weight, bias = story.decoder.loc.weight, story.decoder.loc.bias
    covariance = weight @ weight.T + story.decoder.scale() ** 2 * torch.eye(4)
    truth = torch.autograd.grad(-MultivariateNormal(bias, covariance).log_prob(x).sum(), [weight, bias])
    torch.testing.assert_close(slopes, torch.cat([slope.flatten() for slope in truth]), rtol=1e-9, atol=1e-9)


def test_the_importance_weighted_bound_rises_with_particles_to_the_evidence(float64):
    story = linear_gaussian(num_features=3, latent_dim=1, widened=1.8)
    x = story.model(num_observations=1).detach().expand(4000, 3)
    found = [bounds(ImportanceWeightedELBO(k), story, x) for k in (1, 2, 5, 20)]
    errors = [bound.std() / 4000**0.5 for bound in found]
    for (lower, low_error), (higher, high_error) in pairwise(zip(found, errors, strict=True)):
        assert higher.mean() - lower.mean() > 4 * torch.hypot(low_error, high_error)
    assert found[-1].mean() < closed_form_log_evidence(story, x)[0] + 4 * errors[-1]


# Renyi


def test_renyi_of_order_zero_is_the_importance_weighted_bound(float64):
    story, x = TwoLatents().double(), rows(12).double()
    renyi, weighted = gradients(RenyiELBO(0.0, 5), story, x), gradients(WEIGHTED["plain"](5), story, x)
    assert_same_in_value_and_gradient(renyi, weighted)


def test_renyi_bounds_of_the_same_draws_fall_with_the_order(float64):
    story, x = Factor(), torch.randn(50, 2)
    orders = [-3.0, -1.0, 0.0, 0.5, 0.99, None, 1.01, 2.0, 5.0]
    found = [bounds(SummedOutELBO(6) if order is None else RenyiELBO(order, 6), story, x) for order in orders]
    assert all((higher > lower).all() for higher, lower in pairwise(found))


# Each observation by itself

OBJECTIVES = {
    "ELBO": SummedOutELBO(4),
    "doubly reparameterized": ImportanceWeightedELBO(4),
    "importance weighted": ImportanceWeightedELBO(4, doubly_reparameterized=False),
    "Renyi": RenyiELBO(0.5, 4),
}


class WithoutPlate(Factor):
    """The same story with its observations in no plate, the batch one big event."""

    def model(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., None] * self.a + self.b, 0.6).to_event(2), obs=x)

    def guide(self, x):
        loc, scale = self.posterior(x)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


@pytest.fixture
def fixed_noise(monkeypatch):
    """Lets normals draw what a test says, from its first number to its last."""

    def use(table):
        given = iter(table.flatten())

        def draw(shape, dtype, device):
            return torch.stack([next(given) for _ in range(shape.numel())]).reshape(shape)

        monkeypatch.setattr("torch.distributions.normal._standard_normal", draw)

    return use


def loss_of_batches(loss, story, x, noise, fixed_noise, *batches):
    """The sum of losses and of gradients over batches, each observation with its own noise, shape (S, N)."""
    values, slopes = [], []
    for batch in batches:
        fixed_noise(noise[:, batch])
        value, slope = gradients(loss, story, x[batch])
        values.append(value)
        slopes.append(slope)
    return sum(values), torch.stack(slopes).sum(0)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_the_loss_of_a_batch_is_the_sum_over_its_observations(float64, fixed_noise, objective):
    story, x, noise = Factor(), torch.randn(6, 2), torch.randn(4, 6)
    whole = loss_of_batches(objective, story, x, noise, fixed_noise, slice(0, 6))
    parts = loss_of_batches(objective, story, x, noise, fixed_noise, slice(0, 1), slice(1, 4), slice(4, 6))
    assert_same_in_value_and_gradient(whole, parts)


def test_weights_that_a_batch_shares_are_noticed(float64, fixed_noise):
    story, x, noise = WithoutPlate(), torch.randn(6, 2), torch.randn(4, 6)
    shared = PyrosRenyiELBO(alpha=0.5, num_particles=4)
    whole = loss_of_batches(shared, story, x, noise, fixed_noise, slice(0, 6))
    parts = loss_of_batches(shared, story, x, noise, fixed_noise, slice(0, 1), slice(1, 4), slice(4, 6))
    assert abs(whole[0] - parts[0]) > 0.1


def test_renyi_is_pyros_own_in_a_plate(float64, fixed_noise):
    story, x, noise = Factor(), torch.randn(6, 2), torch.randn(4, 6)
    theirs = PyrosRenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    losses = [loss_of_batches(loss, story, x, noise, fixed_noise, slice(0, 6)) for loss in (RenyiELBO(0.5, 4), theirs)]
    assert_same_in_value_and_gradient(*losses)


# Free bits


class Ignored(Factor):
    """Its likelihood does not look at z, so that the guide has nothing to learn but its prior."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.b.expand(len(x), 2), 0.6).to_event(1), obs=x)


def divergence(story, x):
    """The mean of KL(q(z | x), N(0, 1)) over observations, by torch."""
    posterior = Normal(*(tensor.detach() for tensor in story.posterior(x)))
    return torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).mean().item()


def test_below_its_free_bits_a_collapsing_latent_is_left_alone(float64):
    story, x = Ignored(), torch.randn(5000, 2)
    truth = divergence(story, x)
    _, held = gradients(FreeBitsELBO(0.8 * truth), story, x)
    value, free = gradients(FreeBitsELBO(1.2 * truth), story, x)
    assert (held[4:].abs() > 1).all() and (free[4:] == 0).all()
    log_likelihood = Normal(story.b.detach(), 0.6).log_prob(x).sum()
    assert value == pytest.approx(-log_likelihood + 1.2 * truth * len(x))


@pytest.mark.parametrize("make", [TwoLatents, Hierarchy])
def test_far_above_its_free_bits_the_objective_is_pyros_elbo(float64, make):
    story, x = make().double(), rows(40).double() if make is TwoLatents else torch.randn(40)
    assert_same_in_value_and_gradient(gradients(FreeBitsELBO(0.0), story, x), gradients(Trace_ELBO(), story, x))


def test_free_bits_are_those_of_the_mean_over_the_batch(float64):
    story, x = Factor(), torch.tensor([[0.0, 0.0]] * 999 + [[300.0, 0.0]])
    alone, together = divergence(story, x[:1]), divergence(story, x)
    assert alone < 1 < together
    assert_same_in_value_and_gradient(gradients(FreeBitsELBO(1.0), story, x), gradients(Trace_ELBO(), story, x))


def test_free_bits_of_one_site_leave_the_others_alone(float64):
    story, x = TwoLatents().double(), rows(40).double()
    free = gradients(FreeBitsELBO({"size": 1e6}), story, x)
    without = gradients(Trace_ELBO(), story, x, through=Tempering({"size": 0.0}))
    torch.testing.assert_close(free[1], without[1])
    assert free[0] == pytest.approx(without[0] + 40 * 1e6)
    several = gradients(FreeBitsELBO({"size": 1e6, "factors": 1e6}), story, x)
    assert several[0] == pytest.approx(gradients(FreeBitsELBO(1e6), story, x)[0])


def test_free_bits_never_raise_the_bound(float64):
    story, x = TwoLatents().double(), rows(40).double()
    elbo = bounds(SummedOutELBO(3), story, x).sum()
    assert all(bounds(FreeBitsELBO(nats, 3), story, x).sum() <= elbo + 1e-9 for nats in (0.0, 0.1, 1.0, 10.0))


def test_a_beta_scales_the_larger_of_divergence_and_free_bits(float64):
    story, x = Factor(), torch.randn(30, 2)
    likelihood, half, whole = (
        gradients(FreeBitsELBO(50.0), story, x, through=Tempering(beta))[0] for beta in (0.0, 0.5, 1.0)
    )
    assert whole - likelihood == pytest.approx(30 * 50.0) and half - likelihood == pytest.approx(30 * 25.0)


# Latents that are summed out


class Kinds(nn.Module):
    """A label and two switches, all summed out, behind a latent that the guide draws."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.1, -0.4, 0.3]))
        self.loc = nn.Parameter(torch.tensor([-1.0, 0.0, 2.0]))
        self.switch = nn.Parameter(torch.tensor([0.3, 0.6]))
        self.guess = nn.Parameter(torch.tensor([0.4, 0.1, -0.2]))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.loc[kind], 1.0))
            on = pyro.sample("on", dist.Bernoulli(self.switch[0]), infer={"enumerate": "parallel"})
            off = pyro.sample("off", dist.Bernoulli(self.switch[1]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + on - 0.5 * off * kind, 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.guess[0] * x + self.guess[1], self.guess[2].exp()))


@pytest.mark.parametrize("make", [TwoClusters, Kinds])
def test_summed_out_elbo_is_pyros_enumeration(float64, make):
    story, x = make().double(), torch.linspace(-2, 3, 30)
    theirs = gradients(TraceEnum_ELBO(max_plate_nesting=1), story, x)
    assert_same_in_value_and_gradient(gradients(SummedOutELBO(), story, x), theirs)


@pytest.mark.parametrize(("make", "columns"), [(small_vae, (images,)), (TwoLatents, (rows,))])
def test_without_anything_to_sum_out_it_is_the_trace_elbo(float64, make, columns):
    story, columns = make().double(), [column().double() for column in columns]
    assert_same_in_value_and_gradient(
        gradients(SummedOutELBO(), story, *columns), gradients(Trace_ELBO(), story, *columns)
    )


class Told(nn.Module):
    """Images of labels that are summed out, by convolutions of the latent beside its label."""

    def __init__(self):
        super().__init__()
        self.encoder = networks.convolutional_encoder((1, 6, 5), 4, output=2)
        self.decoder = networks.convolutional_decoder(1 + 3, 4, image=(1, 6, 5))

    def model(self, x, shift):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            logits = self.decoder(torch.cat([z + shift[:, None], one_hot(kind, 3)], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(self, x, shift):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_convolutions_and_concatenated_labels_are_summed_by_hand(float64):
    story, x, shift = Told().double(), images(7).double(), labels(7).double()
    found = bounds(SummedOutELBO(), story, x, shift)
    pyro.set_rng_seed(0)
    trace = poutine.trace(story.guide).get_trace(x, shift)
    z, log_q = trace.nodes["z"]["value"], trace.nodes["z"]["fn"].log_prob(trace.nodes["z"]["value"])
    log_likelihoods = []
    for kind in range(3):
        logits = story.decoder(torch.cat([z + shift[:, None], torch.eye(3)[kind].expand(7, 3)], -1))
        log_likelihoods.append(
            -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
        )
    log_p = torch.stack(log_likelihoods).logsumexp(0) - np.log(3) + Normal(0.0, 1.0).log_prob(z.squeeze(1))
    torch.testing.assert_close(found, (log_p - log_q).detach())


class Mixture(TwoClusters):
    """The same story, its clusters summed out by the distribution of z."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            components = dist.Normal(self.loc.expand(len(x), 2), 1.0)
            z = pyro.sample(
                "z", dist.MixtureSameFamily(dist.Categorical(logits=self.logits.expand(len(x), 2)), components)
            )
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), FreeBitsELBO(1.0, 4)], ids=[*OBJECTIVES, "free bits"])
def test_every_objective_sums_out_what_is_marked(float64, objective, beta):
    marked, summed, x = TwoClusters().double(), Mixture().double(), torch.linspace(-2, 3, 30)
    summed.load_state_dict(marked.state_dict())
    losses = [gradients(objective, story, x, through=Tempering(beta)) for story in (marked, summed)]
    assert_same_in_value_and_gradient(*losses)


class Clusters(TwoClusters):
    """Nothing is left for the guide to draw."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            cluster = pyro.sample("cluster", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.loc[cluster], 0.5), obs=x)

    def guide(self, x):
        pass


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_with_every_latent_summed_out_the_bound_is_the_evidence(float64, objective):
    story, x = Clusters().double(), torch.linspace(-2, 3, 30)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=story.logits), Normal(story.loc, 0.5)
    )
    log_p = mixture.log_prob(x).sum()
    slopes = torch.autograd.grad(-log_p, [story.loc, story.logits])
    value, found = gradients(objective, story, x)
    assert value == pytest.approx(-log_p.item())
    torch.testing.assert_close(found[:4], torch.cat(slopes))


class ThreeKindsLearned(ThreeKinds):
    """Its guide draws the kind, whose draws have no gradient."""

    def __init__(self):
        super().__init__()
        self.slope, self.loc = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor(self.probs)))
            pyro.sample("x", dist.Normal(kind.to(x) + self.loc, 0.8), obs=x)

    def logits(self, x):
        return -((self.slope * x[..., None] - torch.arange(3)) ** 2)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("kind", dist.Categorical(logits=self.logits(x)))


def test_draws_without_a_gradient_learn_by_their_score(float64):
    story, x = ThreeKindsLearned(), torch.tensor(1.4)
    q = torch.distributions.Categorical(logits=story.logits(x))
    log_p = torch.tensor(story.probs).log() + Normal(torch.arange(3.0) + story.loc, 0.8).log_prob(x)
    bound = (q.probs * (log_p - q.logits)).sum()
    slopes = torch.autograd.grad(bound, list(story.parameters()))
    assert_unbiased(SummedOutELBO(2), story, x, (bound.item(), torch.stack(slopes)))


# Betas


LATENT_FREE = OBJECTIVES | {"free bits": FreeBitsELBO(0.5), "Pyro": Trace_ELBO()}


@pytest.mark.parametrize("objective", LATENT_FREE.values(), ids=LATENT_FREE.keys())
def test_a_beta_of_zero_leaves_the_likelihood_alone(float64, objective):
    story, x = exact_factor(), torch.randn(1, 2)
    with torch.no_grad():
        story.a.zero_()
    value, slopes = gradients(objective, story, x, through=Tempering(0.0))
    assert value == pytest.approx(-Normal(story.b, 0.6).log_prob(x).sum().item())
    assert (slopes[4:] == 0).all()


def test_a_beta_of_one_site_touches_no_other(float64):
    story, x = Hierarchy(), torch.randn(20)
    losses = {
        name: gradients(Trace_ELBO(), story, x, through=Tempering(beta))[0]
        for name, beta in {"all": 1.0, "top": {"top": 3.0}, "bottom": {"bottom": 3.0}, "both": 3.0}.items()
    }
    pyro.set_rng_seed(0)
    guide_trace = poutine.trace(story.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(story.model, trace=guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    for name in ("top", "bottom"):
        divergence = (guide_trace.nodes[name]["log_prob"] - model_trace.nodes[name]["log_prob"]).sum().item()
        assert losses[name] - losses["all"] == pytest.approx(2 * divergence)
    assert losses["both"] - losses["all"] == pytest.approx(losses["top"] + losses["bottom"] - 2 * losses["all"])


# Refusals


class NoPlate(Factor):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", self.prior())
        pyro.sample("x", dist.Normal(z.sum() * self.a, 0.6).to_event(1), obs=x[0])


class Subsampled(Factor):
    def model(self, x):
        with pyro.plate("observations", 10 * len(x), subsample_size=len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z[..., None] * self.a + self.b, 0.6).to_event(1), obs=x)


class OneMore(Factor):
    def guide(self, x):
        super().guide(x)
        with pyro.plate("again", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0))


class OneLess(Factor):
    def guide(self, x):
        pass


class TwoBehindAKind(Kinds):
    def model(self, x):
        super().model(x)
        with pyro.plate("again", len(x)):
            pyro.sample("size", dist.Normal(0.0, 1.0))

    def guide(self, x):
        super().guide(x)
        with pyro.plate("again", len(x)):
            pyro.sample("size", dist.Normal(self.guess[0], 1.0))


def plane():
    return torch.randn(4, 2)


def line():
    return torch.randn(4)


REFUSED = {
    "no gradient of draws": (ThreeKindsLearned, line, ImportanceWeightedELBO(2), "'kind' from Categorical"),
    "no gradient of draws, Renyi": (ThreeKindsLearned, line, RenyiELBO(0.5, 2), "'kind' from Categorical"),
    "not drawn": (OneLess, plane, SummedOutELBO(), r"The model draws \['z'\]; the guide draws only \[\]"),
    "drawn for nothing": (OneMore, plane, SummedOutELBO(), r"The guide draws \['y'\]; the model draws only \['z'\]"),
    "no row of its own": (NoPlate, plane, SummedOutELBO(), "expected one for each"),
    "scaled": (Subsampled, plane, SummedOutELBO(), "'x' is scaled by 10"),
    "no such latent": (Factor, plane, FreeBitsELBO({"w": 1.0}), r"names \['w'\]; the latents .* are \['z'\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_objective_is_not_for_is_named(name):
    make, columns, objective, message = REFUSED[name]
    story = make()
    with pytest.raises(ValueError, match=message):
        objective.loss_and_grads(story.model, story.guide, columns())


def test_factors_that_differ_between_latents_with_one_prior_are_refused():
    story, tempering = TwoBehindAKind(), Tempering({"size": 0.5})
    with pytest.raises(ValueError, match=r"\['size', 'z'\] have one prior together, because \['kind', 'off', 'on'\]"):
        SummedOutELBO().loss(tempering(story.model), tempering(story.guide), line())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceWeightedELBO(0), "num_particles must be at least 1; found 0"),
        (lambda: RenyiELBO(1, 2), "use pyro.infer.Trace_ELBO"),
        (lambda: RenyiELBO(float("inf"), 2), "alpha must lie between -1e.06 and 1e.06; found inf"),
        (lambda: RenyiELBO(-1e308, 2), "alpha must lie between"),
        (lambda: FreeBitsELBO(3e38), "free_bits must be at least 0, and at most 1e.12; found 3e.38"),
        (lambda: FreeBitsELBO(-0.1), "free_bits must be at least 0, and at most 1e.12; found -0.1"),
        (lambda: FreeBitsELBO({"z": float("nan")}), "free_bits must be at least 0, and at most 1e.12; found nan"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# As Pyro's losses


ALL = OBJECTIVES | {"free bits": FreeBitsELBO(0.5)}


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL.keys())
def test_a_users_own_svi_learns_by_it(objective):
    story, x = small_vae(), images(100)
    svi = SVI(story.model, story.guide, pyro.optim.Adam({"lr": 1e-2}), objective)
    losses = [svi.step(x) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert isinstance(svi.evaluate_loss(x), float)


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL.keys())
def test_the_three_losses_agree(float64, objective):
    story, x = Hierarchy(), torch.randn(20)
    value, slopes = gradients(objective, story, x)
    pyro.set_rng_seed(0)
    assert objective.loss(story.model, story.guide, x) == pytest.approx(value)
    pyro.set_rng_seed(0)
    differentiable = objective.differentiable_loss(story.model, story.guide, x)
    assert differentiable.item() == pytest.approx(value)
    again = torch.autograd.grad(differentiable, list(story.parameters()), materialize_grads=True)
    torch.testing.assert_close(torch.stack(again), slopes)
