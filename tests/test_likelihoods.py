"""Laws of every likelihood: densities, samples, shapes, gradients, dtypes, floors; and the formula of each family."""

import copy
import json
import math
from itertools import combinations, product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from density_laws import missing_classes
from example_parts import LIKELIHOODS
from gradient_laws import assert_compiled_gradient_is_the_captured_one
from torch import nn
from torch.distributions import MixtureSameFamily, constraints

from ppl_vae import VAE, check, compare, fit, likelihoods, log_evidence, posteriors, priors
from ppl_vae.distributions import Columns, Levels
from ppl_vae.networks import mlp

NUM_DRAWS = 20_000
LARGEST_COUNT = 2_000

each_likelihood = pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS)


@pytest.fixture
def unvalidated():
    """For densities at the ends of a support, or beyond it."""
    with pyro.validation_enabled(False):
        yield


def latents(*batch):
    return torch.linspace(-1, 1, 8).reshape(4, 2).expand(*batch, 4, 2)


def of_numbers(p):
    """The distributions of the single numbers that an observation is made of."""
    if isinstance(p, Columns):
        return [q for part in p.parts for q in of_numbers(part)]
    return [p.base_dist if isinstance(p, dist.Independent) else p]


def numbers(p, x):
    """What each of these distributions is of, in an observation."""
    if not isinstance(p, Columns):
        return [x]
    columns = x.split(p.widths, -1)
    return [column if part.event_dim else column.squeeze(-1) for part, column in zip(p.parts, columns, strict=True)]


def support_of(p):
    return p.component_distribution.support if isinstance(p, MixtureSameFamily) else p.support


def points(support):
    """Points that fill a support, and how much of the base measure each stands for."""
    if support.is_discrete:
        largest = int(torch.as_tensor(getattr(support, "upper_bound", LARGEST_COUNT)).max())
        values = torch.arange(2.0 if isinstance(support, type(constraints.boolean)) else largest + 1.0)
        if isinstance(support, Levels):
            values = torch.arange(support.levels) / (support.levels - 1)
        return values, torch.ones_like(values)
    u = torch.linspace(-40, 40, 16_001)
    if isinstance(support, type(constraints.unit_interval)):
        return u.sigmoid(), 0.005 * u.sigmoid() * (-u).sigmoid()
    if isinstance(support, constraints.greater_than):
        return u.exp(), 0.005 * u.exp()
    return u.sinh(), 0.005 * u.cosh()


def masses(p):
    """Points, the probability around each, and the error of their sum: that of coarser grids, or the tail left out."""
    values, measure = (t.reshape(-1, *(1 for _ in p.batch_shape)) for t in points(support_of(p)))
    possible = p.support.check(values.expand(-1, *p.batch_shape))
    mass = (p.log_prob(values).exp() * measure).where(possible, 0.0)
    if not support_of(p).is_discrete:
        error = torch.stack([(mass.sum(0) - 4 * mass[first::4].sum(0)).abs() for first in range(4)]).amax(0)
    elif len(values) > LARGEST_COUNT:  # Chebyshev's inequality
        error = p.variance / (LARGEST_COUNT - p.mean) ** 2
    else:
        error = torch.zeros(p.batch_shape)
    return values, mass, error + 1e-9


# Laws of all ----------------------------------------------------------------------------------------------------------


def test_no_public_likelihood_is_left_out():
    assert not missing_classes(likelihoods, LIKELIHOODS)


@each_likelihood
def test_density_of_every_number_integrates_to_one(make, float64, unvalidated):
    for p in of_numbers(make()(latents())):
        _, mass, error = masses(p)
        assert error.max() < 1e-3
        assert ((mass.sum(0) - 1).abs() <= error).all()


@each_likelihood
def test_density_of_an_observation_is_the_product_over_its_numbers(make, float64):
    p = make()(latents())
    x = p.sample()
    parts = zip(of_numbers(p), numbers(p, x), strict=True)
    expected = sum(q.log_prob(column).reshape(4, -1).sum(1) for q, column in parts)
    assert torch.allclose(p.log_prob(x), expected)


@each_likelihood
def test_samples_fall_below_a_number_as_often_as_the_density_says(make, float64, unvalidated):
    p = make()(latents())
    draws = p.sample((NUM_DRAWS,))
    for q, column in zip(of_numbers(p), numbers(p, draws), strict=True):
        values, mass, error = masses(q)
        number = column[0]
        expected = mass.where(values <= number, 0.0).sum(0)
        coarse = 0.0 if support_of(q).is_discrete else mass.max(0).values
        tolerance = 5 * (expected * (1 - expected) / NUM_DRAWS).clamp(min=0).sqrt() + coarse + error
        assert (((column <= number).double().mean(0) - expected).abs() <= tolerance).all()


# Those with a fourth moment, from which the error of a variance is known.
WITH_MOMENTS = [name for name in LIKELIHOODS if not name.startswith(("StudentT", "Categorical"))]


@pytest.mark.parametrize("name", WITH_MOMENTS)
def test_samples_have_the_mean_and_variance_that_the_distribution_says(name, float64):
    p = LIKELIHOODS[name]()(latents())
    draws = p.sample((NUM_DRAWS,)).double()
    is_number = ~p.mean.isnan()
    for values, truth in ((draws, p.mean), ((draws - p.mean) ** 2, p.variance)):
        error = values.std(0) / NUM_DRAWS**0.5
        assert ((values.mean(0) - truth).abs() <= 5 * error + 1e-9)[is_number].all()


@each_likelihood
def test_samples_lie_in_the_support(make):
    p = make()(latents())
    assert p.support.check(p.sample((NUM_DRAWS,))).all()


@each_likelihood
def test_a_batch_for_each_latent_and_the_rest_in_the_event(make):
    likelihood = make()
    event = likelihood(latents()).event_shape
    assert event.numel() > 1
    for batch in [(), (5,)]:
        p = likelihood(latents(*batch))
        x = p.sample()
        assert p.batch_shape == (*batch, 4) and p.event_shape == event
        assert x.shape == (*batch, 4, *event) and p.log_prob(x).shape == (*batch, 4)
        assert p.mean.shape == p.variance.shape == x.shape


@each_likelihood
def test_particles_and_rows_are_scored_alike(make, float64):
    likelihood = make()
    z = torch.randn(5, 4, 2)
    x = likelihood(z[0]).sample()
    alone = torch.stack([likelihood(particle).log_prob(x) for particle in z])
    assert torch.allclose(likelihood(z).log_prob(x), alone)


@each_likelihood
def test_expanding_and_masking_keep_the_density(make):
    p = make()(latents())
    x = p.sample()
    mask = torch.tensor([True, False, True, True])
    assert torch.allclose(p.expand((3, 4)).log_prob(x), p.log_prob(x).expand(3, 4))
    assert torch.allclose(p.mask(mask).log_prob(x), p.log_prob(x) * mask)


@each_likelihood
def test_gradients_reach_every_parameter(make):
    likelihood = make()
    p = likelihood(latents())
    p.log_prob(p.sample()).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in likelihood.parameters())


@each_likelihood
def test_double_precision_is_kept(make):
    p = make().double()(latents().double())
    assert p.log_prob(p.sample()).dtype == p.variance.dtype == torch.float64
    assert p.sample().dtype == torch.float64 or isinstance(of_numbers(p)[0], dist.Categorical)


@each_likelihood
def test_single_precision_agrees_with_double(make):
    likelihood = make()
    x = likelihood(latents()).sample()
    single = likelihood(latents()).log_prob(x)
    double = likelihood.double()(latents().double()).log_prob(x.double())
    assert torch.allclose(single.double(), double, rtol=1e-5, atol=1e-4)


@each_likelihood
def test_state_rebuilds_the_density_bit_for_bit(make):
    likelihood = make()
    with torch.device("meta"):
        twin = make()
    twin.load_state_dict(likelihood.state_dict(), assign=True)
    p, q = likelihood(latents()), twin(latents())
    x = p.sample()
    assert torch.equal(p.log_prob(x), q.log_prob(x))


@each_likelihood
def test_extreme_outputs_of_networks_leave_density_and_gradient_finite(make):
    likelihood = make()
    x = likelihood(latents()).sample()
    weights = [parameter for name, parameter in likelihood.named_parameters() if name.endswith("weight")]
    outputs = [parameter for name, parameter in likelihood.named_parameters() if not name.endswith("weight")]
    for weight in weights:
        nn.init.zeros_(weight)
    for extremes in product((-1e4, 1e4), repeat=len(outputs)):
        for output, extreme in zip(outputs, extremes, strict=True):
            nn.init.constant_(output, extreme)
        likelihood.zero_grad()
        log_p = likelihood(latents()).log_prob(x)
        log_p.sum().backward()
        assert log_p.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in likelihood.parameters())


def story_of(likelihood, event_shape):
    encoder = posteriors.DiagonalNormal(mlp(event_shape, 8, posteriors.DiagonalNormal.num_parameters(2)))
    return VAE(priors.StandardNormal(2), likelihood, encoder)


@each_likelihood
def test_captured_training_takes_the_steps_of_svi(make):
    likelihood = make()
    x = likelihood(torch.randn(24, 2)).sample().float()
    story = story_of(likelihood, x.shape[1:])
    twin = copy.deepcopy(story)
    check(story, x)
    histories = [
        fit(each, x, epochs=2, batch_size=8, seed=3, engine=engine)
        for each, engine in ((story, "svi"), (twin, "captured"))
    ]
    assert [history.engine for history in histories] == ["svi", "captured"]
    assert histories[0]["skipped_steps"].sum() == 0
    for key, tensor in story.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[key]), key


@pytest.mark.slow
@each_likelihood
def test_the_compiled_gradient_is_the_captured_one(make):
    likelihood = make()
    x = likelihood(torch.randn(24, 2)).sample().float()
    assert_compiled_gradient_is_the_captured_one(story_of(likelihood, x.shape[1:]), x)


@each_likelihood
def test_importance_sampling_agrees_with_quadrature(make, float64):
    likelihood = make()
    z = 0.5 * torch.randn(4, 2)
    x = likelihood(z).sample().double()
    wide = posteriors.DiagonalNormal(mlp(x.shape[1:], 8, 4), floor=1.0)
    told = VAE(priors.StandardNormal(2), likelihood, wide)
    exact = log_evidence(told, x, method="quadrature")
    estimate = log_evidence(told, x, method="importance", num_particles=4000)
    error = torch.tensor(estimate["standard_error"].values ** 2 + exact["standard_error"].values ** 2).sqrt()
    assert exact["standard_error"].max() < 1e-3 and error.max() < 0.3
    assert (torch.tensor(estimate["estimate"].values - exact["estimate"].values).abs() < 4.5 * error + 1e-6).all()


def test_tables_are_comparable_only_where_their_columns_are():
    def story(*parts):
        return story_of(likelihoods.ByColumn(*parts), (2,))

    x = torch.ones(6, 2)
    measured = likelihoods.Normal(Output(), 1.0), likelihoods.LogNormal(Output(), 1.0)
    kinds = {
        "counted twice": story(likelihoods.Poisson(Output())),
        "counted": story(likelihoods.Poisson(mlp(2, 1)), likelihoods.Binomial(mlp(2, 1), 3)),
        "counted first": story(likelihoods.Poisson(mlp(2, 1)), likelihoods.Normal(mlp(2, 1), 1.0)),
        "counted last": story(likelihoods.Normal(mlp(2, 1), 1.0), likelihoods.Poisson(mlp(2, 1))),
        "measured": story(measured[0]),
        "measured otherwise": story(measured[1]),
    }
    plain = {name: log_evidence(one, x, method="importance", num_particles=50) for name, one in kinds.items()}
    plain["coins"] = log_evidence(
        story_of(likelihoods.Bernoulli(Output()), (2,)), x, method="importance", num_particles=50
    )
    assert json.loads(plain["counted last"].dataset.attrs["base_measure"]) == {"x": "by column 1 Lebesgue, 1 counting"}
    alike = [
        {"counted twice", "counted", "coins"},
        {"measured", "measured otherwise"},
        {"counted first"},
        {"counted last"},
    ]
    for a, b in combinations(plain, 2):
        if any({a, b} <= group for group in alike):
            assert compare({a: plain[a], b: plain[b]}).best in (a, b)
        else:
            with pytest.raises(ValueError, match="no common unit"):
                compare({a: plain[a], b: plain[b]})


# The formula of each family -------------------------------------------------------------------------------------------


class Output(nn.Module):
    """A network whose output is the latent: so many numbers for each of the dimensions."""

    def __init__(self, *sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, z):
        return z.unflatten(-1, (-1, *self.sizes)) if self.sizes else z


def interval(distribution, x, levels):
    """log P of a level by the cumulative distribution, from whichever tail is the shorter."""
    low = np.where(x <= 0, -np.inf, x - 0.5 / (levels - 1))
    high = np.where(x >= 1, np.inf, x + 0.5 / (levels - 1))
    below = distribution.cdf(high) - distribution.cdf(low)
    return np.log(np.where(distribution.cdf(low) > 0.5, distribution.sf(low) - distribution.sf(high), below))


def inflated(gate, x, log_p):
    return np.log(gate * (x == 0) + (1 - gate) * np.exp(log_p))


def mixture(z, x):
    """Two logistics of scale 0.2 with the weights softmax(z) at the places z."""
    z = z.reshape(*z.shape[:-1], -1, 2)
    parts = interval(scipy.stats.logistic(z, 0.2), x[..., None], 16)
    return scipy.special.logsumexp(scipy.special.log_softmax(z, -1) + parts, axis=-1)


def negative_binomial(z):
    return scipy.stats.nbinom(1 / 0.7, 1 / (1 + 0.7 * (np.exp(z) + 1e-6)))


FORMULAS = {
    "Bernoulli": (
        lambda: likelihoods.Bernoulli(Output()),
        lambda z, x: scipy.stats.bernoulli(scipy.special.expit(z)).logpmf(x),
    ),
    "Normal": (lambda: likelihoods.Normal(Output(), 0.3), lambda z, x: scipy.stats.norm(z, 0.3).logpdf(x)),
    "Laplace": (lambda: likelihoods.Laplace(Output(), 0.3), lambda z, x: scipy.stats.laplace(z, 0.3).logpdf(x)),
    "StudentT": (lambda: likelihoods.StudentT(Output(), 0.3, 2.5), lambda z, x: scipy.stats.t(2.5, z, 0.3).logpdf(x)),
    "LogNormal": (
        lambda: likelihoods.LogNormal(Output(), 0.3),
        lambda z, x: scipy.stats.lognorm(0.3, scale=np.exp(z)).logpdf(x),
    ),
    "ContinuousBernoulli": (
        lambda: likelihoods.ContinuousBernoulli(Output(), floor=0.2),
        lambda z, x: np.log(5 * np.tanh(z / 5) / np.expm1(5 * np.tanh(z / 5))) + 5 * np.tanh(z / 5) * x,
    ),
    "Beta": (
        lambda: likelihoods.Beta(Output(), 0.5),
        lambda z, x: scipy.stats.beta(1 + 4 * scipy.special.expit(z), 1 + 4 * scipy.special.expit(-z)).logpdf(x),
    ),
    "DiscretizedLogistic": (
        lambda: likelihoods.DiscretizedLogistic(Output(), 0.2),
        lambda z, x: interval(scipy.stats.logistic(z, 0.2), x, 256),
    ),
    "MixtureOfDiscretizedLogistics": (
        lambda: likelihoods.MixtureOfDiscretizedLogistics(Output(2), Output(2), 0.2, levels=16),
        mixture,
    ),
    "Binomial": (
        lambda: likelihoods.Binomial(Output(), 9),
        lambda z, x: scipy.stats.binom(9, scipy.special.expit(z)).logpmf(x),
    ),
    "Categorical": (
        lambda: likelihoods.Categorical(Output(2)),
        lambda z, x: scipy.stats.bernoulli(scipy.special.expit(z[..., 1::2] - z[..., ::2])).logpmf(x),
    ),
    "Poisson": (lambda: likelihoods.Poisson(Output()), lambda z, x: scipy.stats.poisson(np.exp(z) + 1e-6).logpmf(x)),
    "NegativeBinomial": (
        lambda: likelihoods.NegativeBinomial(Output(), 0.7),
        lambda z, x: negative_binomial(z).logpmf(x),
    ),
    "ZeroInflatedPoisson": (
        lambda: likelihoods.ZeroInflatedPoisson(Output(), 0.4),
        lambda z, x: inflated(0.4, x, scipy.stats.poisson(np.exp(z) + 1e-6).logpmf(x)),
    ),
    "ZeroInflatedNegativeBinomial": (
        lambda: likelihoods.ZeroInflatedNegativeBinomial(Output(), 0.7, gate=Output()),
        lambda z, x: inflated(scipy.special.expit(z), x, negative_binomial(z).logpmf(x)),
    ),
    "ByColumn": (
        lambda: likelihoods.ByColumn(likelihoods.Normal(Output(), 0.3), likelihoods.Poisson(Output())),
        lambda z, x: np.concatenate(
            [
                scipy.stats.norm(z, 0.3).logpdf(x[..., :6]),
                scipy.stats.poisson(np.exp(z) + 1e-6).logpmf(x[..., 6:]),
            ],
            -1,
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_log_density_is_the_formula_of_the_family(name, float64):
    make, formula = FORMULAS[name]
    z = 2 * torch.randn(200, 6)
    likelihood = make()
    x = likelihood(z).sample()
    expected = torch.from_numpy(formula(z.numpy(), x.numpy())).sum(-1)
    assert torch.allclose(likelihood(z).log_prob(x), expected)


def test_every_family_has_a_formula():
    assert set(FORMULAS) == {name.split(",")[0] for name in LIKELIHOODS}


def test_student_t_has_the_moments_of_the_mathematics(float64):
    df = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 30.0])
    p = likelihoods.StudentT(Output(), 0.3, df)(torch.randn(4, 6))
    reference = scipy.stats.t(df.numpy(), p.base_dist.loc.numpy(), 0.3)
    mean, variance = torch.from_numpy(reference.mean()), torch.from_numpy(reference.var())
    assert torch.allclose(p.mean[:, 2:], mean[:, 2:]) and p.mean[:, :2].isnan().all()
    assert torch.allclose(p.variance[:, 4:], variance[:, 4:]) and p.variance[:, 2:4].isinf().all()


def test_negative_binomial_has_the_variance_that_its_dispersion_says(float64):
    p = likelihoods.NegativeBinomial(Output(), 0.7)(torch.randn(4, 6))
    assert torch.allclose(p.variance, p.mean + 0.7 * p.mean**2)


def test_beta_has_its_mode_at_the_sigmoid_of_the_logit(float64):
    z = torch.randn(4, 6)
    p = likelihoods.Beta(Output(), 0.2)(z)
    assert torch.allclose(p.mode, z.sigmoid())
    assert torch.allclose(p.variance.sqrt(), 0.2 * (z.sigmoid() * (-z).sigmoid()).sqrt(), rtol=0.1)


def test_the_link_of_counts_is_exponential_and_grows_along_its_tangent(float64):
    exponent = torch.tensor([[-1e4, -2.0, 0.0, 9.9, 10.0, 11.0, 1e4]], requires_grad=True)
    rate = likelihoods.Poisson(Output())(exponent).mean - 1e-6
    (slope,) = torch.autograd.grad(rate.sum(), exponent)
    largest = math.exp(10)
    assert torch.allclose(rate[0, :5], exponent[0, :5].exp())
    assert torch.allclose(rate[0, 5:], largest * (exponent[0, 5:] - 9))
    assert torch.allclose(slope[0], exponent[0].clamp(max=10).exp())


def test_class_numbers_are_read_as_floats_and_as_integers():
    p = likelihoods.Categorical(Output(3))(torch.randn(4, 6))
    x = p.sample()
    assert x.dtype == torch.int64
    assert torch.equal(p.log_prob(x), p.log_prob(x.double()))
    assert p.mean.isnan().all()
    assert torch.equal(p.mode, p.base_dist.logits.argmax(-1))


def test_mixture_with_equal_components_is_the_component(float64):
    z = torch.randn(4, 6)
    single = likelihoods.DiscretizedLogistic(Output(), 0.2)(z)
    same = likelihoods.MixtureOfDiscretizedLogistics(Output(3), Output(3), 0.2)(z.repeat_interleave(3, -1))
    x = single.sample()
    assert torch.allclose(same.log_prob(x), single.log_prob(x))


# What trains, and what it is held by ----------------------------------------------------------------------------------

WITH_FLOORS = {
    "Normal": lambda scale, **floor: likelihoods.Normal(mlp(2, 1), scale, **floor),
    "Laplace": lambda scale, **floor: likelihoods.Laplace(mlp(2, 1), scale, **floor),
    "StudentT": lambda scale, **floor: likelihoods.StudentT(mlp(2, 1), scale, 3.0, **floor),
    "LogNormal": lambda scale, **floor: likelihoods.LogNormal(mlp(2, 1), scale, **floor),
    "Beta": lambda scale, **floor: likelihoods.Beta(mlp(2, 1), scale, **floor),
}
each_with_a_floor = pytest.mark.parametrize("make", WITH_FLOORS.values(), ids=WITH_FLOORS)


def test_conditions_reach_every_network():
    class Sum(nn.Module):
        def forward(self, z, y):
            return z + y

    z, y = torch.zeros(3, 2), torch.arange(3.0)[:, None]
    p = likelihoods.Normal(Sum(), Sum())(z, y)
    assert p.mean[:, 0].tolist() == [0, 1, 2]
    assert p.variance[2, 0] > p.variance[0, 0]
    table = likelihoods.ByColumn(likelihoods.Poisson(Sum()), likelihoods.Normal(Sum(), 1.0))(z, y)
    assert torch.allclose(table.mean, torch.cat([y.exp(), y.exp(), y, y], 1), atol=1e-5)


def test_a_trunk_reads_conditions_and_its_parts_read_the_trunk():
    class Join(nn.Module):
        def forward(self, z, y):
            return torch.cat([z, y], 1)

    parts = likelihoods.Normal(Output(), 1.0), likelihoods.Laplace(Output(), 1.0)
    z, y = torch.randn(3, 2), torch.randn(3, 1)
    p = likelihoods.ByColumn(*parts, trunk=Join())(z, y)
    assert torch.equal(p.mean, torch.cat([z, y, z, y], 1))


def test_a_trunk_runs_once():
    calls = []

    class Trunk(nn.Module):
        def forward(self, z):
            calls.append(z)
            return z

    parts = [likelihoods.Normal(Output(), 1.0) for _ in range(3)]
    likelihoods.ByColumn(*parts, trunk=Trunk())(torch.randn(3, 2))
    assert len(calls) == 1


@pytest.mark.parametrize("make", [*WITH_FLOORS.values(), lambda phi: likelihoods.NegativeBinomial(mlp(2, 1), phi)])
def test_what_is_learned_starts_where_it_is_told(make):
    likelihood = make(likelihoods.learned(torch.tensor([0.03, 0.5, 30.0])))
    found = likelihood.dispersion() if isinstance(likelihood, likelihoods.NegativeBinomial) else likelihood.scale()
    assert torch.allclose(found, torch.tensor([0.03, 0.5, 30.0]), rtol=1e-3)


def test_a_learned_gate_starts_where_it_is_told(float64):
    p = likelihoods.ZeroInflatedPoisson(Output(), likelihoods.learned(0.3))(torch.randn(4, 6))
    assert torch.allclose(p.base_dist.gate, torch.tensor(0.3))


@each_with_a_floor
@pytest.mark.parametrize("scale", [lambda: likelihoods.learned(0.5), lambda: mlp(2, 1)], ids=["learned", "network"])
def test_a_scale_that_trains_stays_above_its_floor_and_says_when_it_is_there(make, scale):
    likelihood = make(scale(), floor=0.01)
    assert likelihoods.share_on_floor(likelihood, latents()) == 0
    with torch.no_grad():
        for parameter in likelihood.scale.parameters():
            parameter.fill_(-1e4)
    assert likelihood.scale(torch.ones(4, 2)).min() >= 0.01
    assert likelihoods.share_on_floor(likelihood, torch.ones(4, 2)) == 1


@each_with_a_floor
def test_an_unbounded_density_is_held_by_the_floor(make):
    likelihood = make(likelihoods.learned(0.5), floor=0.05)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        loss = -likelihood(latents()[:1]).log_prob(torch.full((1, 1), 0.7)).sum()
        loss.backward()
        optimizer.step()
    assert likelihood.scale().item() == pytest.approx(0.05, rel=0.1)
    assert -loss.item() < -math.log(0.05) + 0.5


def test_the_density_of_zero_is_held_by_the_floor_of_its_logit(float64):
    p = likelihoods.ContinuousBernoulli(Output(), floor=0.01)(torch.tensor([[-1e6, -100.0, -1.0]]))
    density = p.base_dist.log_prob(torch.zeros(1, 3)).exp()
    assert density[0, 0] == pytest.approx(100)
    assert density[0, 1] == pytest.approx(100 * math.tanh(1))
    assert density[0, 2] == pytest.approx(1 / (1 - math.exp(-1)), rel=1e-3)


@each_with_a_floor
@pytest.mark.parametrize("scale", [0.0, -1.0, torch.tensor([1.0, 0.0])])
def test_a_fixed_scale_must_be_positive(make, scale):
    with pytest.raises(ValueError, match=r"A fixed scale must be positive; found (0|-1)\."):
        make(scale)


@each_with_a_floor
def test_a_learned_scale_must_start_above_its_floor(make):
    with pytest.raises(ValueError, match=r"A learned scale must start above its floor 0\.1; found 0\.05\."):
        make(likelihoods.learned(0.05), floor=0.1)


REFUSED = {
    "df": (
        lambda: likelihoods.StudentT(Output(), 1.0, likelihoods.learned(0.5)),
        "learned df must .* floor 1; found 0.5",
    ),
    "dispersion": (lambda: likelihoods.NegativeBinomial(Output(), 0.0), "fixed dispersion must be positive; found 0"),
    "fixed gate": (lambda: likelihoods.ZeroInflatedPoisson(Output(), 1.0), r"between 0 and 1; found 1\.0"),
    "learned gate": (
        lambda: likelihoods.ZeroInflatedNegativeBinomial(Output(), 0.5, likelihoods.learned(torch.tensor([0.5, 0.0]))),
        r"between 0 and 1; found \[0\.5, 0\.0\]",
    ),
    "total": (
        lambda: likelihoods.Binomial(Output(), torch.tensor([3, 0])),
        r"whole number up to .*; found tensor\(\[3, 0\]\)",
    ),
    "half total": (lambda: likelihoods.Binomial(Output(), 2.5), r"whole number up to .*; found 2\.5"),
    "huge total": (lambda: likelihoods.Binomial(Output(), 10**400), "up to 16,777,216; found 1000"),
    "tiny floor": (lambda: likelihoods.Normal(Output(), Output(), 1e-45), "from 1e-18 to 1e.18, or 0; found 1.*e-45"),
    "levels": (lambda: likelihoods.DiscretizedLogistic(Output(), 0.1, levels=1), "at least two levels, .*; found 1"),
    "no totals": (
        lambda: likelihoods.Binomial(Output(), torch.zeros(0)),
        "positive whole number up to .*; found tensor",
    ),
    "too many levels": (
        lambda: likelihoods.DiscretizedLogistic(Output(), 0.1, 10**30),
        "at most 16,777,216; found 1000",
    ),
    "beta": (lambda: likelihoods.Beta(Output(), 1e-6), "fixed scale must be at least 0.0001; found 1e-06"),
    "beta's floor": (lambda: likelihoods.Beta(mlp(2, 4), mlp(2, 4), 1e-45), "must be at least 0.0001; found 1e-45"),
    "huge start": (
        lambda: likelihoods.Normal(Output(), likelihoods.learned(3e38)),
        r"learned scale must start at 1e\+18 at most; found 3e\+38",
    ),
    "fixed df": (lambda: likelihoods.StudentT(Output(), 1.0, 0.1), "fixed df must be at least 0.2; found 0.1"),
    "no columns": (lambda: likelihoods.ByColumn(), "one likelihood or more; found none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_parameter_is_refused(name):
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        make()
