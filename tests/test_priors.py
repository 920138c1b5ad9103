"""Laws of every prior: density, draws, shapes, gradients, dtype, state; training, checkpoints and evidence with it."""

import copy
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from density_laws import assert_density_integrates_to_one, assert_samples_match_density, missing_classes, moved
from example_parts import EVENT, LATENT_DIM, POSTERIORS, PRIORS, vamp_prior
from gradient_laws import assert_compiled_gradient_is_the_captured_one
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves

from ppl_vae import VAE, check, fit, likelihoods, load, log_evidence, posteriors, priors, save
from ppl_vae.capture import capture
from ppl_vae.networks import mlp

each_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS)


def each_prior_slow_where(word):
    """Every prior, those with a word in their name among the slow tests."""
    return pytest.mark.parametrize(
        "make",
        [pytest.param(make, id=name, marks=[pytest.mark.slow] * (word in name)) for name, make in PRIORS.items()],
    )


def encoder_for(prior):
    """A wide posterior on the prior's support: its own, if it holds one."""
    if isinstance(prior, priors.VampPrior):
        return prior.encoder
    normal = posteriors.DiagonalNormal(mlp(EVENT, 8, 4), floor=1.0)
    support = prior().support.base_constraint
    if isinstance(support, constraints.interval):
        return posteriors.Box(normal, support.lower_bound, support.upper_bound)
    return normal


def story(prior):
    """With a likelihood that narrows what any prior says: no weight has a tail."""
    loc = nn.Sequential(nn.Linear(LATENT_DIM, math.prod(EVENT)), nn.Unflatten(-1, EVENT))
    with torch.no_grad():
        loc[0].weight.copy_(torch.linspace(-1, 1, 12).reshape(6, 2).flip(1) ** 3 + torch.eye(2).repeat(3, 1))
    return VAE(prior, likelihoods.Normal(loc, scale=1.5), encoder_for(prior))


def observations(num=16):
    return torch.randn(num, *EVENT, generator=torch.Generator().manual_seed(3))


# The distribution


def test_every_prior_is_tested():
    assert missing_classes(priors, PRIORS) == set()


@each_prior_slow_where("VampPrior of Flow, splines")
def test_density_integrates_to_one(make, float64):
    with torch.no_grad():
        assert_density_integrates_to_one(moved(make())())


@each_prior_slow_where("VampPrior of Flow, splines")
def test_samples_match_density(make, float64):
    with torch.no_grad():
        assert_samples_match_density(moved(make())())


@each_prior
def test_prior_is_one_event_and_takes_any_batch(make):
    p = make()()
    assert (p.batch_shape, p.event_shape) == ((), (LATENT_DIM,))
    with pyro.plate("particles", 5, dim=-2), pyro.plate("observations", 4):
        z = pyro.sample("z", p)
    for batch in [(), (4,), (5, 4)]:
        q = p.expand(batch)
        assert q.sample().shape == q.sample().shape == (*batch, LATENT_DIM)
        assert q.log_prob(q.sample()).shape == batch
    assert torch.allclose(p.expand((4,)).log_prob(z), p.log_prob(z), atol=1e-5)


@each_prior
def test_gradients_reach_every_parameter_from_the_density_of_draws(make):
    prior = make()
    p = prior()
    if parameters := dict(prior.named_parameters()):
        p.log_prob(p.sample((100,))).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@each_prior
def test_a_draw_has_the_density_and_the_gradients_of_any_other_point(make, float64):
    prior = make()
    for draw in (lambda p: p.sample((7,)), lambda p: p().detach(), torch.no_grad()(lambda p: p((7,)))):
        p = prior()
        z = draw(p)
        densities = [q.log_prob(point) for q, point in ((p, z), (p, z.clone()), (prior(), z))]
        torch.testing.assert_close(densities[0], densities[1], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(densities[0], densities[2], rtol=1e-8, atol=1e-8)
        if parameters := list(prior.parameters()):
            gradients = [torch.autograd.grad(density.sum(), parameters, retain_graph=True) for density in densities]
            torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-6, atol=1e-8)


@each_prior
@torch.no_grad()
def test_the_density_of_the_same_tensor_follows_the_parameters(make):
    prior = make()
    z = prior().sample((7,))
    before = prior().log_prob(z)
    after = moved(prior)().log_prob(z)
    assert torch.equal(after, prior().log_prob(z.clone()))
    assert torch.equal(after, before) != bool(list(prior.parameters()))


# Device, dtype and state


@each_prior
def test_prior_follows_the_story_to_its_dtype(make):
    prior = make().double()
    p = prior()
    z = p.sample((3,))
    assert z.dtype == p.log_prob(z).dtype == p.log_prob(z.clone()).dtype == torch.float64
    assert all(tensor.dtype != torch.float32 for tensor in prior.state_dict().values())


@each_prior
def test_a_prior_is_its_state(make):
    torch.manual_seed(1)
    prior, other = make(), make()
    z = prior().sample((50,))
    other.load_state_dict(prior.state_dict())
    assert torch.equal(prior().log_prob(z), other().log_prob(z))
    assert torch.equal(prior().log_prob(z), copy.deepcopy(prior)().log_prob(z))


@pytest.mark.parametrize("name", [name for name in PRIORS if "Pyro's own" not in name])
def test_a_prior_made_without_memory_is_filled_by_its_state(name):
    make = PRIORS[name]
    prior = make()
    with torch.device("meta"), pyro.validation_enabled(False):
        empty = make()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(prior.state_dict(), assign=True)
    z = prior().sample((50,))
    assert torch.equal(prior().log_prob(z), empty().log_prob(z))


@each_prior
def test_nothing_of_a_run_stays_with_the_prior(make):
    prior = make()
    state = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    p = prior()
    (p.log_prob(p()).sum() + 0 * torch.zeros((), requires_grad=True)).backward()
    copied = copy.deepcopy(prior)
    assert state.keys() == copied.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in copied.state_dict().items())


@pytest.mark.parametrize("name", [name for name in PRIORS if "Flow" in name])
def test_a_flow_lets_go_of_its_graph_at_once(name):
    prior = PRIORS[name]()
    gc.collect()
    gc.disable()
    try:
        p = prior()
        p.log_prob(torch.randn(5, LATENT_DIM)).sum().backward()
        parts = p.component_distribution.transforms if "Vamp" in name else p.transforms
        remembering = [weakref.ref(transform) for transform in parts]
        del p, parts
        assert [transform() for transform in remembering] == [None] * len(remembering)
    finally:
        gc.enable()


# Stories told with it


@each_prior
def test_a_story_with_the_prior_passes_its_check(make):
    check(story(make()), observations())


@each_prior_slow_where("VampPrior of Flow, splines")
def test_importance_sampling_agrees_with_quadrature(make, float64):
    told = story(make())
    exact = log_evidence(told, observations(4), method="quadrature")
    estimate = log_evidence(told, observations(4), method="importance", num_particles=4000)
    error = torch.tensor(estimate["standard_error"].values ** 2 + exact["standard_error"].values ** 2).sqrt()
    assert exact["standard_error"].max() < 2.5e-3 and error.max() < 0.1
    assert (torch.tensor(estimate["estimate"].values - exact["estimate"].values).abs() < 4.5 * error).all()


@each_prior_slow_where("splines")
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
    moved = [
        name for name, tensor in start.prior.named_parameters() if not torch.equal(tensor, states[0]["prior." + name])
    ]
    assert moved == [name for name, _ in start.prior.named_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRIORS if not name.startswith("VampPrior of")])
def test_the_compiled_gradient_is_the_captured_one(name):
    assert_compiled_gradient_is_the_captured_one(story(PRIORS[name]()), observations())


@pytest.mark.parametrize("name", ["MixtureOfNormals", "Flow, realnvp", "Flow, splines", "VampPrior of FullNormal"])
def test_the_users_own_svi_trains_every_parameter(name):
    told = story(PRIORS[name]())
    before = [parameter.detach().clone() for parameter in told.parameters()]
    svi = SVI(told.model, told.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(math.isfinite(svi.step(observations())) for _ in range(2))
    assert all(not torch.equal(*pair) for pair in zip(before, told.parameters(), strict=True))


# Each prior is that of the mathematics


def scipy_density(frozen, z):
    return torch.as_tensor(frozen.logpdf(z.numpy())).sum(-1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: priors.StandardNormal(3), scipy.stats.norm()),
        (lambda: priors.Normal(3), scipy.stats.norm()),
        (lambda: priors.Laplace(3), scipy.stats.laplace()),
        (lambda: priors.StudentT(3, df=4), scipy.stats.t(4)),
        (lambda: priors.Uniform(3, -5, 5), scipy.stats.uniform(-5, 10)),
        (lambda: priors.Flow(3, []), scipy.stats.norm()),
    ],
    ids=["StandardNormal", "Normal", "Laplace", "StudentT", "Uniform", "Flow without transforms"],
)
def test_prior_has_the_density_that_scipy_knows(make, expected, float64):
    z = torch.randn(20, 3)
    assert torch.allclose(make()().log_prob(z), scipy_density(expected, z))


def test_a_mixture_weighs_its_normals(float64):
    prior = moved(priors.MixtureOfNormals(2, components=4))
    z = torch.randn(20, 2)
    shares = prior.logits.detach().exp() / prior.logits.detach().exp().sum()
    pairs = zip(prior.normals.loc.detach(), prior.normals.scale.detach(), strict=True)
    densities = [scipy_density(scipy.stats.norm(loc, scale), z).exp() for loc, scale in pairs]
    assert torch.allclose(prior().log_prob(z).exp(), torch.stack(densities, -1) @ shares)


def test_components_start_apart_and_evenly_weighted():
    prior = priors.MixtureOfNormals(2, components=4)
    assert torch.pdist(prior.normals.loc.detach()).min() > 0.1
    assert torch.equal(prior().mixture_distribution.probs, torch.full((4,), 0.25))
    assert torch.allclose(prior.normals.scale, torch.ones(4, 2))


def test_each_label_has_its_normal_and_no_label_their_even_mixture(float64):
    prior = moved(priors.PerClass(2, num_labels=3))
    z, y = torch.randn(20, 2), torch.arange(20) % 3
    loc, scale = prior.normals.loc.detach(), prior.normals.scale.detach()
    by_label = torch.stack([scipy_density(scipy.stats.norm(loc[k], scale[k]), z) for k in range(3)], -1)
    assert prior(y).batch_shape == (20,)
    assert torch.allclose(prior(y).log_prob(z), by_label[torch.arange(20), y])
    assert torch.allclose(prior().log_prob(z), by_label.exp().mean(-1).log())


def test_the_gradient_of_a_label_reaches_its_normal_alone():
    prior = priors.PerClass(2, num_labels=3)
    prior(torch.tensor([1, 1])).log_prob(torch.randn(2, 2)).sum().backward()
    assert prior.normals.loc.grad.abs().sum(1).bool().tolist() == [False, True, False]


@pytest.mark.parametrize("make", POSTERIORS.values(), ids=POSTERIORS)
def test_a_vamp_prior_is_the_mean_of_the_guesses_at_its_pseudo_inputs(make, float64):
    prior = vamp_prior(make)
    z = prior().sample((20,))
    guesses = [prior.encoder(u[None]).log_prob(z[:, None])[:, 0].exp() for u in prior.pseudo_inputs]
    assert torch.allclose(prior().log_prob(z).exp(), torch.stack(guesses).mean(0))


def test_pseudo_inputs_stay_within_their_bounds_and_start_where_they_are_told():
    initial = torch.tensor([[-1.0, 0.5], [1.0, 3.0]])
    prior = priors.VampPrior(posteriors.DiagonalNormal(nn.Linear(2, 4)), initial, low=-1.0, high=3.0)
    assert torch.allclose(prior.pseudo_inputs, initial.clamp(-0.96, 2.96), atol=1e-5)
    with torch.no_grad():
        prior.unbounded.copy_(torch.tensor([[-1e4, 1e4], [-5.0, 5.0]]))
    assert -1 <= prior.pseudo_inputs.min() < prior.pseudo_inputs.max() <= 3


def test_pseudo_inputs_without_bounds_are_parameters_as_they_are():
    initial = torch.randn(3, 5)
    prior = priors.VampPrior(posteriors.DiagonalNormal(nn.Linear(5, 4)), initial)
    assert torch.equal(prior.pseudo_inputs, initial) and prior.pseudo_inputs.requires_grad
    assert prior.pseudo_inputs.data_ptr() != initial.data_ptr()


def test_a_flow_of_splines_starts_as_its_base_in_one_dimension(float64):
    z = torch.randn(20, 1) * 2
    flow, base = priors.Flow(1, priors.splines(1, num_layers=3)), priors.StandardNormal(1)
    assert torch.allclose(flow().log_prob(z), base().log_prob(z), atol=0.01)  # Pyro's slope at the bound is 0.999


@pytest.mark.parametrize("kind", ["splines", "MixtureOfNormals"])
def test_a_prior_of_one_dimension_integrates_to_one(kind, float64):
    makes = {
        "splines": lambda: priors.Flow(1, priors.splines(1, num_layers=3, bins=4)),
        "MixtureOfNormals": lambda: priors.MixtureOfNormals(1, components=3),
    }
    p = moved(makes[kind]())()
    assert p.event_shape == (1,) and p.sample((4,)).shape == (4, 1)
    assert_density_integrates_to_one(p, points=20_000)


MANY_DIMENSIONS = {
    "realnvp": lambda: priors.realnvp(5, num_layers=3),
    "splines": lambda: priors.splines(5, num_layers=3),
    "Pyro's splines": lambda: [transforms.spline_coupling(5), transforms.spline(5), transforms.permute(5)],
    "Pyro's batch normalization": lambda: [transforms.batchnorm(5).eval(), transforms.affine_coupling(5)],
}


@pytest.mark.parametrize("make", MANY_DIMENSIONS.values(), ids=MANY_DIMENSIONS)
def test_a_flow_has_the_density_of_its_jacobian(make, float64):
    p = moved(priors.Flow(5, make()))()
    u = torch.randn(20, 5)
    jacobian = torch.autograd.functional.jacobian(lambda u: through(p, u).sum(0), u).transpose(0, 1)
    expected = scipy_density(scipy.stats.norm(), u) - jacobian.det().abs().log()
    assert torch.allclose(p.log_prob(through(p, u).detach()), expected)


def through(p, u):
    for transform in p.transforms:
        u = transform(u)
    return u


def test_a_captured_flow_of_splines_has_no_shape_that_depends_on_the_data():
    flow, z = priors.Flow(2, priors.splines(2)), torch.randn(7, 2) * 3
    with pyro.validation_enabled(False):
        program = capture(lambda z: (flow().log_prob(z),), z)
        assert torch.equal(program(z)[0], flow().log_prob(z))
    values = [node.meta["val"] for node in program.graph.graph.nodes if "val" in node.meta]
    assert all(type(size) is int for value in tree_leaves(values) for size in value.shape)


def test_realnvp_moves_every_coordinate_with_two_layers():
    p = moved(priors.Flow(5, priors.realnvp(5, num_layers=2)))()
    u = torch.randn(20, 5)
    assert (through(p, u) != u.flip(1)).all(0).all()


@pytest.mark.parametrize("make", [lambda: priors.Normal(2, floor=0.01), lambda: priors.PerClass(2, 3, floor=0.01)])
def test_learned_scales_start_at_one_and_stay_above_their_floor(make):
    prior = make()
    normals = prior.normal if isinstance(prior, priors.Normal) else prior.normals
    assert torch.allclose(normals.scale, torch.ones(()))
    with torch.no_grad():
        normals.unconstrained_scale.fill_(-1e4)
    assert (normals.scale == 0.01).all()


# Pyro's transforms


def test_transforms_share_their_parameters_with_the_prior():
    transform = transforms.affine_coupling(2, [8])
    prior = priors.Flow(2, [transform])
    assert {id(p) for p in prior.parameters()} == {id(p) for p in transform.parameters()}
    transform(torch.randn(3, 2))
    copy.deepcopy(prior)


# Any distribution of Pyro's

DISTRIBUTIONS = {
    "independent": lambda: dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])),
    "gamma inside": lambda: dist.StudentT(torch.tensor([3.0, 5.0]), 0.0, 2.0).to_event(1),
    "inverted transforms": lambda: dist.Gumbel(torch.zeros(2), 1.0).to_event(1),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.Normal(torch.randn(3, 2), 0.3).to_event(1)
    ),
    "transformed mixture": lambda: dist.TransformedDistribution(
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(torch.randn(3, 2), 0.3).to_event(1)),
        [transforms.Permute(torch.tensor([1, 0])), transforms.AffineTransform(torch.ones(2), 2.0, cache_size=1)],
    ),
}


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_distribution_is_a_prior_that_follows_the_story(make):
    p = make()
    told = VAE(p, likelihoods.Normal(mlp(2, 8, EVENT), 0.5), posteriors.DiagonalNormal(mlp(EVENT, 8, 4)))
    z = p.sample((20,))
    check(told, observations())
    assert torch.allclose(told.prior().log_prob(z), p.log_prob(z), atol=1e-5)
    assert not list(told.prior.parameters()) and list(told.prior.buffers())
    told.double()
    assert told.prior().sample().dtype == told.prior().log_prob(z.double()).dtype == torch.float64
    assert torch.allclose(told.prior().log_prob(z.double()).float(), p.log_prob(z), atol=1e-4)
    copied = copy.deepcopy(told).prior()
    assert torch.allclose(copied.log_prob(z.double()).float(), p.log_prob(z), atol=1e-4)
    with pyro.validation_enabled(False):
        assert told.to("meta").prior().log_prob(z.to("meta", torch.float64)).is_meta
    assert p.log_prob(z).device.type == "cpu"


def test_a_fixed_prior_has_the_numbers_of_its_state():
    prior, other = (priors.Fixed(dist.Normal(torch.full((2,), loc), 1.0).to_event(1)) for loc in (0.0, 3.0))
    prior.load_state_dict(other.state_dict())
    assert torch.equal(prior().mean, torch.full((2,), 3.0))


def test_a_function_is_a_prior_as_it_is():
    def prior():
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    told = VAE(prior, likelihoods.Normal(mlp(2, 8, EVENT), 0.5), posteriors.DiagonalNormal(mlp(EVENT, 8, 4)))
    assert told.prior is prior
    check(told, observations())
    fit(told, observations(), epochs=1, engine="captured")


def test_a_prior_with_a_batch_is_refused_by_the_check():
    told = VAE(
        dist.Normal(torch.zeros(2), 1.0), likelihoods.Normal(mlp(2, 8, 5), 0.5), posteriors.DiagonalNormal(mlp(5, 8, 4))
    )
    with pytest.raises(ValueError):
        check(told, torch.randn(16, 5))


class BetaOnBox(nn.Module):
    """A user's own posterior: independent Betas between -1 and 1.5."""

    def __init__(self):
        super().__init__()
        self.network = mlp(EVENT, 8, 4)

    def forward(self, x):
        concentrations = nn.functional.softplus(self.network(x)) + 0.5
        low, scale = torch.full((2,), -1.0), torch.full((2,), 2.5)
        return dist.AffineBeta(*concentrations.chunk(2, -1), low, scale).to_event(1)


def test_a_posterior_on_the_box_of_the_prior_passes_the_check_and_no_other():
    told = VAE(priors.Uniform(2, -1.0, 1.5), likelihoods.Normal(mlp(2, 8, EVENT), 0.5), BetaOnBox())
    check(told, observations())
    fit(told, observations(), epochs=1, engine="captured")
    normal = posteriors.DiagonalNormal(mlp(EVENT, 8, 4))
    for told.encoder in (normal, posteriors.Box(normal, -1.0, 1.0)):
        with pytest.raises(ValueError, match="The guide must cover what the prior covers"):
            check(told, observations())


# Tied


def test_a_vamp_prior_is_saved_and_comes_back_tied(tmp_path):
    start = story(PRIORS["VampPrior, bounded"]())
    told, mine = copy.deepcopy(start), copy.deepcopy(start)
    fit(told, observations(), epochs=1)
    assert told.prior.encoder is told.encoder
    save(told, tmp_path / "vamp.safetensors")
    load(tmp_path / "vamp.safetensors", story=mine)
    z = torch.randn(5, LATENT_DIM)
    assert mine.prior.encoder is mine.encoder
    assert torch.equal(mine.prior().log_prob(z), told.prior().log_prob(z))
    assert not torch.equal(mine.prior().log_prob(z), start.prior().log_prob(z))
    fit(mine, observations(), epochs=1)
    assert torch.equal(mine.prior.encoder.network[1].weight, mine.encoder.network[1].weight)


# What is refused

REFUSED = {
    "no dimension": (lambda: priors.StandardNormal(0), ValueError, "latent_dim must be at least 1; found 0"),
    "no component": (lambda: priors.MixtureOfNormals(2, 0), ValueError, "components must be at least 1"),
    "no label": (lambda: priors.PerClass(2, 0), ValueError, "num_labels must be at least 1"),
    "high floor": (lambda: priors.Normal(2, floor=1.0), ValueError, "floor of a scale that starts at 1"),
    "no freedom": (lambda: priors.StudentT(2, df=0), ValueError, "must lie between 0.2 and 1e.18; found 0"),
    "infinite freedom": (lambda: priors.StudentT(2, df=float("inf")), ValueError, "must lie between .*; found inf"),
    "empty box": (lambda: priors.Uniform(2, 1, torch.tensor([2, 1])), ValueError, r"found 1\.0 and \[2\.0, 1\.0\]"),
    "one bound": (
        lambda: priors.VampPrior(nn.Linear(2, 2), torch.zeros(3, 2), low=0),
        ValueError,
        "between two bounds",
    ),
    "outside": (
        lambda: priors.VampPrior(nn.Linear(2, 2), torch.ones(3, 2), -1, 0.5),
        ValueError,
        "values between 1 and 1",
    ),
    "whole numbers": (
        lambda: priors.VampPrior(nn.Linear(2, 2), torch.ones(3, 2, dtype=torch.int64)),
        ValueError,
        r"real numbers, each of them there; found torch\.int64",
    ),
    "huge guesses": (lambda: priors.VampPrior(nn.Linear(2, 2), torch.full((3, 2), 1e30)), ValueError, "up to 1e.12"),
    "sparse guesses": (
        lambda: priors.VampPrior(nn.Linear(2, 2), torch.zeros(3, 2).to_sparse()),
        ValueError,
        r"real numbers, each of them there; found torch\.float32, torch\.sparse_coo",
    ),
    "guesses of another shape": (
        lambda: priors.VampPrior(nn.Linear(2, 2), torch.zeros(3, 5)),
        ValueError,
        r"does not take the pseudo-inputs, torch\.float32 of the shape \(3, 5\)",
    ),
    "nothing to couple": (lambda: priors.realnvp(1), ValueError, "needs two coordinates or more.*Use splines"),
    "no layers": (lambda: priors.splines(2, num_layers=0), ValueError, "num_layers must be at least 1"),
    "torch's": (lambda: priors.Fixed(torch.distributions.Normal(0, 1)), TypeError, r"Use pyro\.distributions\.Normal"),
    "parameter in a distribution": (
        lambda: priors.Fixed(dist.Normal(nn.Parameter(torch.zeros(2)), 1.0).to_event(1)),
        ValueError,
        "'base_dist_loc' requires a gradient",
    ),
    "module in a distribution": (
        lambda: priors.Fixed(
            dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [transforms.affine_coupling(2)])
        ),
        ValueError,
        r"transforms\.0 is a module, inside an object that is none.*priors\.Flow",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_prior_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
