"""Laws of every posterior family: density, draws and their gradients, shapes, dtype, state; training and evidence."""

import copy
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from density_laws import (
    assert_density_integrates_to_one,
    assert_samples_match_density,
    integral,
    missing_classes,
    moved,
    waves,
)
from example_parts import EVENT, LATENT_DIM, POSTERIORS, encode
from gradient_laws import assert_compiled_gradient_is_the_captured_one
from pyro.distributions import transforms
from torch import nn

from ppl_vae import VAE, check, fit, likelihoods, log_evidence, posteriors, priors, traces
from ppl_vae.networks import mlp

each_posterior = pytest.mark.parametrize("make", POSTERIORS.values(), ids=POSTERIORS)
quick_or_slow = pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[pytest.mark.slow] * ("splines" in name)) for name, make in POSTERIORS.items()],
)


def observations(num=16):
    return torch.randn(num, *EVENT, generator=torch.Generator().manual_seed(3))


def story(posterior):
    """With a prior that the untrained guide covers."""
    loc = nn.Sequential(nn.Linear(LATENT_DIM, math.prod(EVENT)), nn.Unflatten(-1, EVENT))
    prior = dist.Normal(torch.zeros(2), 0.5).to_event(1)
    if isinstance(posterior, posteriors.Box):
        prior = priors.Uniform(LATENT_DIM, posterior.low, posterior.high)
    return VAE(prior, likelihoods.Normal(loc, scale=1.0), posterior)


class Output(nn.Module):
    """A network whose output is what it is told."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(torch.as_tensor(output, dtype=torch.get_default_dtype()))

    def forward(self, x):
        return self.output.expand(len(x), -1)


# The distribution


def test_every_posterior_is_tested():
    assert missing_classes(posteriors, POSTERIORS) == set()


@each_posterior
def test_density_integrates_to_one(make, float64):
    with torch.no_grad():
        assert_density_integrates_to_one(moved(make())(observations(3)))


@each_posterior
def test_samples_match_density(make, float64):
    with torch.no_grad():
        assert_samples_match_density(moved(make())(observations(3)))


@each_posterior
def test_posterior_has_a_batch_per_observation_and_takes_particles(make):
    q = make()(observations(4))
    assert (q.batch_shape, q.event_shape) == ((4,), (LATENT_DIM,))
    assert q.has_rsample
    with pyro.plate("particles", 5, dim=-2), pyro.plate("observations", 4):
        z = pyro.sample("z", q)
    assert z.shape == (5, 4, LATENT_DIM)
    assert q.log_prob(z).shape == q.expand((5, 4)).log_prob(z).shape == (5, 4)
    assert torch.allclose(q.log_prob(z), q.expand((5, 4)).log_prob(z), atol=1e-5)
    assert q.sample((3, 2)).shape == (3, 2, 4, LATENT_DIM)
    assert q.log_prob(q.sample((3, 2))).shape == (3, 2, 4)


@each_posterior
def test_gradients_reach_every_parameter_through_draws(make):
    posterior = make()
    q = posterior(observations(50))
    z = q.rsample()
    (q.log_prob(z) + z.square().sum(-1)).sum().backward()
    for name, parameter in posterior.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@each_posterior
def test_a_draw_has_the_density_and_the_gradients_of_any_other_point(make, float64):
    posterior, x = make(), observations(4)
    for draw in (lambda q: q.sample((7,)), lambda q: q().detach(), torch.no_grad()(lambda q: q((7,)))):
        q = posterior(x)
        z = draw(q)
        densities = [p.log_prob(point) for p, point in ((q, z), (q, z.clone()), (posterior(x), z))]
        for other in densities[1:]:
            torch.testing.assert_close(densities[0], other, rtol=1e-8, atol=1e-8)
        gradients = [
            torch.autograd.grad(density.sum(), list(posterior.parameters()), retain_graph=True) for density in densities
        ]
        for other in gradients[1:]:
            torch.testing.assert_close(gradients[0], other, rtol=1e-6, atol=1e-8)


@each_posterior
def test_the_density_of_a_draw_is_that_of_its_number(make, float64):
    q = make()(observations(4)).expand((5, 4))
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.detach().clone()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in POSTERIORS if "Flow" in name])
def test_scoring_a_draw_takes_no_further_pass_through_a_network(name):
    posterior, passes = POSTERIORS[name](), []
    for module in posterior.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: passes.append(1))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            q = posterior(observations(4))
            z = q.rsample()
            before = len(passes)
            q.log_prob(z)
            assert len(passes) == before
            q.log_prob(z.clone())
            assert len(passes) > before


@each_posterior
def test_draws_move_as_the_expectation_does(make, float64):
    posterior, x, weights = moved(make()), observations(1), torch.randn(10)
    parameters = list(posterior.parameters())

    def gradient(expectation):
        return torch.cat([part.flatten() for part in torch.autograd.grad(expectation, parameters)])

    batches = [gradient((waves(posterior(x).rsample((500,))) @ weights).mean()) for _ in range(50)]
    estimate = torch.stack(batches)
    fine, coarse = (gradient(integral(posterior(x), points, waves)[0] @ weights) for points in (320, 160))
    standard_error = estimate.std(0) / 50**0.5
    quantile = scipy.stats.t(49).ppf(1 - 1e-3 / len(fine))  # of all parameters together
    change = (fine - coarse).abs()
    of_quadrature = 2 * torch.maximum(change, fine.abs() * change.norm() / fine.norm())  # densities have kinks
    error = of_quadrature + quantile * standard_error
    assert ((estimate.mean(0) - fine).abs() <= error + 1e-12).all()
    assert error.norm() < 0.5 * fine.norm()


# Device, dtype and state


@each_posterior
def test_posterior_follows_the_story_to_its_dtype(make):
    q = make().double()(observations(4).double())
    z = q.rsample()
    assert z.dtype == q.log_prob(z).dtype == q.log_prob(z.detach()).dtype == torch.float64


@each_posterior
def test_a_posterior_is_its_state(make):
    posterior, other = moved(make()), make()
    z = posterior(observations(4)).sample((50,))
    other.load_state_dict(posterior.state_dict())
    densities = [q(observations(4)).log_prob(z) for q in (posterior, other, copy.deepcopy(posterior))]
    assert torch.equal(densities[0], densities[1]) and torch.equal(densities[0], densities[2])


@pytest.mark.parametrize("name", [name for name in POSTERIORS if "Pyro's own" not in name])
def test_a_posterior_made_without_memory_is_filled_by_its_state(name):
    posterior = POSTERIORS[name]()
    with torch.device("meta"):
        empty = POSTERIORS[name]()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(posterior.state_dict(), assign=True)
    z = posterior(observations(4)).sample((50,))
    assert torch.equal(posterior(observations(4)).log_prob(z), empty(observations(4)).log_prob(z))


@each_posterior
def test_nothing_of_a_run_stays_with_the_posterior(make):
    posterior = make()
    names = posterior.state_dict().keys()
    q = posterior(observations(4))
    q.log_prob(q()).sum().backward()
    assert copy.deepcopy(posterior).state_dict().keys() == names


@pytest.mark.parametrize("name", [name for name in POSTERIORS if "Flow" in name or name == "Box"])
def test_a_flow_lets_go_of_its_graph_at_once(name):
    posterior = POSTERIORS[name]()
    gc.collect()
    gc.disable()
    try:
        q = posterior(observations(4))
        q.log_prob(q.rsample()).sum().backward()
        remembering = [weakref.ref(transform) for transform in q.transforms]
        del q
        assert [transform() for transform in remembering] == [None] * len(remembering)
    finally:
        gc.enable()


# Stories told with it


@each_posterior
def test_a_story_with_the_posterior_passes_its_check(make):
    check(story(make()), observations())


@each_posterior
def test_importance_sampling_agrees_with_quadrature(make, float64):
    told = story(make())
    exact = log_evidence(told, observations(4), method="quadrature")
    estimate = log_evidence(told, observations(4), method="importance", num_particles=4000)
    error = torch.tensor(estimate["standard_error"].values ** 2 + exact["standard_error"].values ** 2).sqrt()
    assert exact["standard_error"].max() < 2.5e-3 and error.max() < 0.1
    assert (torch.tensor(estimate["estimate"].values - exact["estimate"].values).abs() < 4.5 * error).all()


@quick_or_slow
def test_a_captured_training_is_that_of_svi_and_can_go_on(make):
    torch.manual_seed(5)
    start = story(make())
    told = {engine: copy.deepcopy(start) for engine in ("svi", "captured")}
    for epochs in (2, 1):
        for engine, one in told.items():
            assert fit(one, observations(), epochs=epochs, batch_size=8, engine=engine).engine == engine
        log_evidence(told["captured"], observations(2), method="importance", num_particles=10)
        told["captured"] = copy.deepcopy(told["captured"])
    states = [one.state_dict() for one in told.values()]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for name, tensor in start.named_parameters():
        assert not torch.equal(tensor, states[0][name]), name


@pytest.mark.slow
@each_posterior
def test_the_compiled_gradient_is_the_captured_one(make):
    assert_compiled_gradient_is_the_captured_one(story(make()), observations())


@each_posterior
def test_particles_in_a_plate_are_those_of_rows(make, float64):
    with traces.scoring(told := story(make())):
        assert traces.fastest_layout(told, (observations(2),)) == "plate"


# Each family is that of the mathematics


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


def softplus(number):
    return math.log1p(math.exp(number))


def test_full_normal_reads_locations_then_the_diagonal_then_what_is_below_it(float64):
    output = [1.0, 2.0, 3.0, 0.1, 0.2, 0.3, -1.0, -2.0, -3.0]
    root = torch.tensor([[softplus(0.1), 0, 0], [-1, softplus(0.2), 0], [-2, -3, softplus(0.3)]])
    q = posteriors.FullNormal(nn.Identity(), floor=0.0)(torch.tensor([output]))
    z = torch.randn(20, 3)
    expected = scipy.stats.multivariate_normal([1, 2, 3], (root @ root.T).numpy()).logpdf(z.numpy())
    assert torch.allclose(q.log_prob(z), torch.as_tensor(expected))


def test_full_normal_stays_positive_definite_by_its_floor():
    q = posteriors.FullNormal(nn.Identity(), floor=0.01)(torch.tensor([[0.0, 0.0, -1e4, -1e4, 0.0]]))
    assert torch.allclose(q.covariance_matrix, 1e-4 * torch.eye(2))


def test_a_mixture_reads_log_weights_then_locations_then_scales(float64):
    output = [0.0, math.log(3.0), 1.0, 2.0, -3.0, -4.0, 0.1, 0.2, 0.3, 0.4]
    q = posteriors.MixtureOfNormals(nn.Identity(), components=2, floor=0.0)(torch.tensor([output]))
    z = torch.randn(20, 2)
    scales = [[softplus(0.1), softplus(0.2)], [softplus(0.3), softplus(0.4)]]
    one, other = (
        scipy.stats.norm(loc, scale).pdf(z.numpy()).prod(-1)
        for loc, scale in zip([[1, 2], [-3, -4]], scales, strict=True)
    )
    assert torch.allclose(q.log_prob(z).exp(), torch.as_tensor(0.25 * one + 0.75 * other))


def test_a_flow_without_transforms_is_a_diagonal_normal():
    output, z = torch.randn(4, 6), torch.randn(4, 3)
    flow, normal = posteriors.Flow(nn.Identity(), 3, []), posteriors.DiagonalNormal(nn.Identity())
    assert torch.allclose(flow(output).log_prob(z), normal(output).log_prob(z), atol=1e-5)


CONTEXTUAL = {"autoregressive": posteriors.inverse_autoregressive, "splines": posteriors.splines}


@pytest.mark.parametrize("make", CONTEXTUAL.values(), ids=CONTEXTUAL)
def test_a_coordinate_of_a_flow_depends_on_those_before_it_and_on_the_context(make, float64):
    flow = moved(posteriors.Flow(nn.Identity(), 4, make(4, context_dim=3, num_layers=1)))
    u, context = torch.randn(4), torch.randn(3)

    def g(u, context):
        output = torch.cat([torch.zeros(8), context])[None]
        return flow(output).transforms[0](u[None])[0]

    by_u, by_context = torch.autograd.functional.jacobian(g, (u, context))
    assert (by_u.diag() > 0).all() and (by_u.triu(1) == 0).all() and by_u.tril(-1).abs().sum() > 0
    assert (by_context.abs().sum(1) > 0).all()


@pytest.mark.parametrize("make", CONTEXTUAL.values(), ids=CONTEXTUAL)
def test_two_layers_of_a_flow_bind_every_coordinate_to_every_other(make, float64):
    flow = moved(posteriors.Flow(nn.Identity(), 4, make(4, context_dim=3, num_layers=2)))
    first, second, _ = flow(torch.zeros(1, 11)).transforms
    jacobian = torch.autograd.functional.jacobian(lambda u: second(first(u[None]))[0], torch.randn(4))
    assert (jacobian != 0).all()


# Sizes

FAMILIES = {
    "DiagonalNormal": lambda k: posteriors.DiagonalNormal(mlp(5, posteriors.DiagonalNormal.num_parameters(k))),
    "FullNormal": lambda k: posteriors.FullNormal(mlp(5, posteriors.FullNormal.num_parameters(k))),
    "MixtureOfNormals": lambda k: posteriors.MixtureOfNormals(
        mlp(5, posteriors.MixtureOfNormals.num_parameters(k, 4)), components=4
    ),
} | {
    name: lambda k, make=make: posteriors.Flow(
        mlp(5, posteriors.Flow.num_parameters(k, context_dim=3)), k, make(k, context_dim=3)
    )
    for name, make in CONTEXTUAL.items()
}


@pytest.mark.parametrize("name", FAMILIES)
def test_num_parameters_is_what_the_network_must_return(name):
    for latent_dim in (1, 2, 7):
        posterior = FAMILIES[name](latent_dim)
        q = posterior(torch.randn(4, 5))
        assert (q.batch_shape, q.event_shape) == ((4,), (latent_dim,))
        q.log_prob(q.rsample()).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in posterior.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_posterior_of_one_dimension_integrates_to_one(name, float64):
    with torch.no_grad():
        assert_density_integrates_to_one(moved(FAMILIES[name](1))(torch.randn(3, 5)), points=20_000)


def test_draws_of_a_mixture_move_in_single_precision_as_in_double_in_many_dimensions():
    posterior = posteriors.MixtureOfNormals(Output(torch.randn(4 * 101) / 2), components=4)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        q = posterior.to(dtype)(torch.zeros(64, 1))
        normal = q.component_distribution.base_dist
        z = (normal.loc + 0.5 * normal.scale)[:, 1].detach().to(dtype)
        (gradient,) = torch.autograd.grad(q._with_gradient(z).sin().sum(), posterior.network.output)
        gradients.append(gradient.double())
    assert gradients[0].isfinite().all()
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


# Pyro's own


class Logistic(nn.Module):
    """A user's own posterior."""

    def __init__(self):
        super().__init__()
        self.network = encode(4)

    def forward(self, x):
        loc, log_scale = self.network(x).chunk(2, -1)
        return dist.Logistic(loc, log_scale.exp()).to_event(1)


def test_anything_that_returns_a_distribution_is_a_posterior():
    told = story(Logistic())
    check(told, observations())
    fit(told, observations(), epochs=1, engine="captured")


def test_conditional_and_other_transforms_of_pyro_go_together(float64):
    given = [
        transforms.conditional_affine_autoregressive(2, 3, [8]),
        transforms.Permute(torch.tensor([1, 0])),
        transforms.conditional_spline(2, 3, [8], count_bins=4),
        dist.conditional.ConditionalComposeTransformModule([transforms.affine_coupling(2, [8])]),
    ]
    posterior = posteriors.Flow(encode(4 + 3), 2, given)
    with torch.no_grad():
        assert_density_integrates_to_one(posterior(observations(3)))
    assert {id(p) for t in given if isinstance(t, nn.Module) for p in t.parameters()} < {
        id(p) for p in posterior.parameters()
    }


# What is refused

REFUSED = {
    "FullNormal": (
        lambda: posteriors.FullNormal(Output(torch.zeros(6)))(torch.zeros(4, 1)),
        "FullNormal returns 6 numbers",
    ),
    "MixtureOfNormals": (
        lambda: posteriors.MixtureOfNormals(Output(torch.zeros(13)), 3)(torch.zeros(4, 1)),
        r"MixtureOfNormals returns 13 numbers.*Ask MixtureOfNormals\.num_parameters",
    ),
    "Flow": (lambda: posteriors.Flow(Output(torch.zeros(3)), 2, [])(torch.zeros(4, 1)), "Flow returns 3 numbers"),
    "narrow": (lambda: posteriors.inverse_autoregressive(9, 2, hidden_dims=(8,)), "must be at least 9"),
    "empty box": (lambda: posteriors.Box(nn.Identity(), 1.0, 1.0), "low must be less than high"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_posterior_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
