"""Distributions of our own: right where Pyro's or torch's are not, their supports, and what Pyro asks of any."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import biject_to, constraints
from torch.distributions.constraint_registry import transform_to

from ppl_vae.distributions import (
    Beta,
    Columns,
    Columnwise,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Levels,
    MultivariateNormal,
    OpenInterval,
    StudentT,
    ZeroInflated,
)

LOGITS = [-1000.0, -40.0, -1.0, -0.11, -0.09, -1e-5, 0.0, 1e-9, 0.0999, 0.1001, 2.0, 17.0, 100.0, 1000.0]


def unit_grid(points=200_001):
    """The middles of so many pieces of the unit interval, denser towards both ends; and their lengths."""
    ends = torch.linspace(-40, 40, points).sigmoid()
    return (ends[1:] + ends[:-1]) / 2, ends.diff()


# StudentT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [0.2, 1.0, 5.0, 100.0, 1e4, 1e6, 0.99e8, 1.01e8, 1e12, 1e18])
def test_student_t_is_right_in_single_precision_for_any_degrees_of_freedom(df):
    x = torch.tensor([0.0, 0.5, 3.0, -30.0])
    exact = scipy.stats.t.logpdf(x, df, 0.5, 2.0) if df < 1e15 else scipy.stats.norm.logpdf(x, 0.5, 2.0)
    ours = StudentT(torch.tensor(df), 0.5, 2.0).log_prob(x)
    assert np.allclose(ours, exact, rtol=5e-7, atol=1e-6)


def test_student_t_has_gradients_for_any_degrees_of_freedom(float64):
    df = torch.tensor([0.2, 1.0, 30.0, 1e6, 1e12, 1e30], requires_grad=True)
    StudentT(df, 0.5, 2.0).log_prob(torch.tensor(3.0)).sum().backward()
    step = torch.tensor([1e-5, 1e-5, 1e-3])
    few = df.detach()[:3].numpy()
    slope = scipy.stats.t.logpdf(3.0, few + step.numpy(), 0.5, 2.0) - scipy.stats.t.logpdf(
        3.0, few - step.numpy(), 0.5, 2.0
    )
    assert np.allclose(df.grad[:3], slope / (2 * step.numpy()), rtol=1e-4)
    assert torch.allclose(df.grad[3:], torch.zeros(3), atol=1e-6)


# ContinuousBernoulli --------------------------------------------------------------------------------------------------


def test_continuous_bernoulli_integrates_to_one_with_its_mean_and_variance(float64):
    p = ContinuousBernoulli(logits=torch.tensor(LOGITS))
    x, length = (t[:, None] for t in unit_grid())
    density = p.log_prob(x).exp() * length
    assert torch.allclose(density.sum(0), torch.ones(len(LOGITS)), atol=1e-6)
    assert torch.allclose((density * x).sum(0), p.mean, atol=1e-6)
    assert torch.allclose((density * (x - p.mean) ** 2).sum(0), p.variance, atol=0, rtol=1e-5)


def test_continuous_bernoulli_is_torchs_where_that_is_right(float64):
    logits = torch.linspace(-10, 10, 40)
    x = torch.rand(40)
    ours, theirs = ContinuousBernoulli(logits=logits), torch.distributions.ContinuousBernoulli(logits=logits)
    for quantity in ("log_prob", "cdf", "icdf"):
        assert torch.allclose(getattr(ours, quantity)(x), getattr(theirs, quantity)(x), rtol=1e-6)
    assert torch.allclose(ours.mean, theirs.mean) and torch.allclose(ours.variance, theirs.variance)


def test_continuous_bernoulli_has_all_its_digits_in_single_precision():
    logits = torch.tensor(LOGITS)
    x = torch.tensor([0.0, 0.3, 1.0])[:, None]
    single, double = ContinuousBernoulli(logits=logits), ContinuousBernoulli(logits=logits.double())
    assert torch.allclose(single.log_prob(x).double(), double.log_prob(x.double()), rtol=1e-6, atol=1e-6)
    assert torch.allclose(single.mean.double(), double.mean, rtol=2e-5)
    assert torch.allclose(single.variance.double(), double.variance, rtol=2e-4)


def test_torchs_continuous_bernoulli_still_needs_to_be_replaced():
    p = torch.distributions.ContinuousBernoulli(logits=torch.tensor(100.0))
    assert ContinuousBernoulli(logits=torch.tensor(100.0)).log_prob(torch.ones(())) - p.log_prob(torch.ones(())) > 1


def test_continuous_bernoulli_quantiles_invert_probabilities(float64):
    p = ContinuousBernoulli(logits=torch.tensor(LOGITS))
    u = torch.linspace(0, 1, 101)[:, None]
    assert torch.allclose(p.cdf(p.icdf(u)), u.expand(-1, len(LOGITS)), atol=1e-10)


def test_continuous_bernoulli_samples_have_its_mean():
    p = ContinuousBernoulli(logits=torch.tensor(LOGITS))
    draws = p.sample((20_000,))
    assert ((draws.mean(0) - p.mean).abs() < 5 * (p.variance / 20_000).sqrt()).all()


def test_continuous_bernoulli_has_the_gradients_of_its_formula(float64):
    logits = torch.tensor(LOGITS, requires_grad=True)
    x = torch.tensor(0.3)
    (gradient,) = torch.autograd.grad(ContinuousBernoulli(logits=logits).log_prob(x).sum(), logits)
    assert torch.allclose(gradient, x - ContinuousBernoulli(logits=logits).mean, atol=1e-9)


# Beta and its support -------------------------------------------------------------------------------------------------


def test_beta_is_between_zero_and_one_and_not_there():
    p = Beta(torch.ones(3), torch.ones(3))
    assert p.support.check(torch.tensor([0.0, 0.5, 1.0])).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"support \(OpenInterval\(0\.0, 1\.0\)\)"):
        p.log_prob(torch.tensor([0.0, 0.5, 0.5]))


def test_beta_draws_no_end_although_rounding_would():
    p = Beta(torch.tensor([0.001, 5000.0]), torch.tensor([5000.0, 0.001]))
    draws = p.sample((1000,))
    assert p.support.check(draws).all()
    assert p.log_prob(draws).isfinite().all()


def test_beta_draws_carry_gradients():
    concentration = torch.tensor([2.0, 3.0], requires_grad=True)
    Beta(concentration, torch.ones(2)).expand((4, 2)).rsample().sum().backward()
    assert (concentration.grad > 0).all()


@pytest.mark.parametrize("mapping", [biject_to, transform_to])
def test_an_open_interval_has_unconstrained_coordinates(mapping, float64):
    u = torch.linspace(-5, 5, 11)
    x = mapping(OpenInterval(2.0, 5.0))(u)
    assert torch.allclose(x, 2 + 3 * u.sigmoid())


# Zero inflation -------------------------------------------------------------------------------------------------------


def test_zero_inflated_scores_a_closed_gate_after_a_draw_as_before():
    p = ZeroInflated(dist.Poisson(torch.full((2,), 3.0)), torch.tensor([-0.5, 40.0]))
    x = torch.tensor([2.0, 2.0])
    before = p.log_prob(x)
    p.sample(), p.mean, p.variance
    assert torch.equal(p.log_prob(x), before) and before.isfinite().all()


def test_pyros_zero_inflated_still_needs_to_be_replaced():
    p = dist.ZeroInflatedPoisson(torch.full((1,), 3.0), gate_logits=torch.tensor([40.0]))
    p.sample()
    assert p.log_prob(torch.ones(1)).isinf().all()


def test_zero_inflated_keeps_the_gate_when_expanded():
    p = ZeroInflated(dist.Poisson(torch.full((2,), 3.0)), torch.tensor([-0.5, 0.5]))
    x = torch.tensor([[0.0, 2.0]]).expand(5, 2)
    expanded = p.expand((5, 2))
    assert isinstance(expanded, ZeroInflated)
    assert torch.allclose(expanded.log_prob(x), p.log_prob(x))


# Levels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 256, 65_536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_is_one_after_rounding(levels, dtype):
    k = torch.arange(levels, dtype=dtype)
    single = (k / (levels - 1)).float()
    for x in (k / (levels - 1), k * (1 / (levels - 1)), single.to(dtype)):
        assert Levels(levels).check(x).all()


def test_what_lies_between_levels_or_beyond_them_is_none():
    x = torch.tensor([0.5 / 255, 100.1 / 255, -1 / 255, 256 / 255, 255.0, torch.nan])
    assert not Levels(256).check(x).any()


def test_bytes_are_no_levels_but_for_the_two_ends():
    assert Levels(256).check(torch.arange(256, dtype=torch.uint8)).nonzero().flatten().tolist() == [0, 1]


def test_levels_of_one_number_are_not_those_of_another():
    x = torch.arange(256) / 255
    assert Levels(16).check(x).sum() == 16


# DiscretizedLogistic --------------------------------------------------------------------------------------------------


def grey_levels(levels=256):
    return torch.arange(levels) / (levels - 1)


@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 10.0, 1e4])
def test_probabilities_of_all_levels_sum_to_one(levels, scale, float64):
    p = DiscretizedLogistic(torch.tensor([-30.0, -0.01, 0.0, 0.4321, 1.0, 7.0]), torch.tensor(scale), levels)
    total = p.log_prob(grey_levels(levels)[:, None]).exp().sum(0)
    assert torch.allclose(total, torch.ones(6))


def test_probabilities_are_differences_of_the_cumulative_distribution(float64):
    logistic = scipy.stats.logistic(0.4, 0.05)
    edges = (np.arange(1, 256) - 0.5) / 255
    cumulative = np.concatenate([[0.0], logistic.cdf(edges), [1.0]])
    p = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.05))
    assert torch.allclose(p.log_prob(grey_levels()).exp(), torch.from_numpy(np.diff(cumulative)))


def test_far_tails_fall_by_the_distance_in_scales():
    p = DiscretizedLogistic(torch.tensor([-1e4, 1e4]), torch.tensor(1e-3))
    near, far = p.log_prob(torch.tensor([[0.2], [0.8]]))
    assert torch.allclose(near - far, torch.tensor([600.0, -600.0]), atol=4)  # of ten million, in single precision
    assert near.max() < -9e6


def test_single_precision_agrees_with_double_in_every_tail():
    loc, scale = torch.linspace(-20, 20, 41)[:, None], torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4])
    x = grey_levels()[:, None, None]
    single = DiscretizedLogistic(loc, scale).log_prob(x)
    double = DiscretizedLogistic(loc.double(), scale.double()).log_prob(x.double())
    rounding = torch.finfo(torch.float32).eps * (4 * (loc.abs() + 1) / scale + 4 * double.abs() + 1)
    assert ((single.double() - double).abs() <= rounding).all()


def test_gradients_are_finite_in_every_tail():
    loc = torch.linspace(-1e4, 1e4, 41)[:, None].requires_grad_()
    scale = torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4], requires_grad=True)
    DiscretizedLogistic(loc, scale).log_prob(grey_levels()[:, None, None]).sum().backward()
    assert loc.grad.isfinite().all() and scale.grad.isfinite().all()


def test_first_and_last_level_hold_the_tails(float64):
    p = DiscretizedLogistic(torch.tensor(0.5), torch.tensor(1.0))
    half = 0.5 / 255
    outside = scipy.stats.logistic(0.5, 1.0).cdf(half)
    ends = p.log_prob(torch.tensor([0.0, 1.0])).exp()
    assert torch.allclose(ends, torch.tensor(outside))


def test_mean_and_variance_are_those_of_the_levels(float64):
    p = DiscretizedLogistic(torch.tensor([-0.5, 0.3, 0.99]), torch.tensor([1.0, 0.01, 0.1]))
    x = p.enumerate_support()
    weight = p.log_prob(x).exp()
    mean = (weight * x).sum(0)
    assert torch.allclose(p.mean, mean)
    assert torch.allclose(p.variance, (weight * (x - mean) ** 2).sum(0))
    assert torch.allclose(p.mean[1], torch.tensor(0.3), atol=1e-4)  # nothing to round at an end
    assert torch.allclose(p.variance[1].sqrt(), torch.tensor(0.01 * np.pi / 3**0.5), rtol=0.01)


def test_draws_have_the_probabilities_of_their_levels():
    p = DiscretizedLogistic(torch.tensor([0.1, 0.9]), torch.tensor([0.2, 0.5]), levels=8)
    draws = p.sample((20_000,))
    level = p.enumerate_support(expand=False)[:, None]
    expected = p.log_prob(level[:, 0]).exp()
    found = (draws == level).float().mean(1)
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_draws_come_from_the_generator_that_is_given():
    p = DiscretizedLogistic(torch.tensor([0.1, 0.9]), torch.tensor(0.2))
    state = torch.get_rng_state()
    first, second = (p.sample((50,), generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(p.sample((50,)), first)


def test_parameters_and_values_are_validated_where_that_is_wanted():
    with pytest.raises(ValueError, match="parameter scale"):
        DiscretizedLogistic(torch.zeros(2), torch.tensor([1.0, 0.0]), validate_args=True)
    with pytest.raises(ValueError, match=r"support \(Levels\(256\)\)"):
        DiscretizedLogistic(torch.zeros(2), torch.ones(2), validate_args=True).log_prob(torch.tensor([0.0, 0.3]))
    p = DiscretizedLogistic(torch.zeros(2), torch.ones(2), validate_args=False).expand((3, 2))
    assert p.log_prob(torch.tensor([0.0, 0.3])).shape == (3, 2)


@pytest.mark.parametrize("batch_shape", [(3,), (5, 3), (2, 5, 3)])
def test_discretized_logistic_expands(batch_shape):
    p = DiscretizedLogistic(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2]), levels=16)
    expanded = p.expand(batch_shape)
    assert expanded.batch_shape == batch_shape and expanded.sample((7,)).shape == (7, *batch_shape)
    assert expanded.enumerate_support().shape == (16, *batch_shape)
    x = p.sample()
    assert torch.allclose(expanded.log_prob(x), p.log_prob(x).expand(batch_shape))


# Columns --------------------------------------------------------------------------------------------------------------


def table(*batch_shape):
    """Two measured columns, one counted, one of classes."""
    return Columns(
        [
            dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 2.0])).expand((*batch_shape, 2)).to_event(1),
            dist.Poisson(torch.full(batch_shape, 3.0)),
            dist.Categorical(logits=torch.tensor([0.0, 1.0, -1.0]).expand(*batch_shape, 3)),
        ]
    )


def test_columns_are_scored_by_their_own_distributions(float64):
    x = torch.tensor([[0.5, 3.0, 2.0, 1.0], [-1.0, 4.0, 0.0, 2.0]])
    classes = scipy.special.log_softmax([0.0, 1.0, -1.0])
    expected = (
        scipy.stats.norm([0, 5], [1, 2]).logpdf(x[:, :2]).sum(1)
        + scipy.stats.poisson(3).logpmf(x[:, 2])
        + classes[x[:, 3].long()]
    )
    assert torch.allclose(table(2).log_prob(x), torch.from_numpy(expected))


def test_columns_are_drawn_side_by_side():
    p = table(4)
    x = p.sample((5000,))
    assert x.shape == (5000, 4, 4) and p.support.check(x).shape == (5000, 4)
    assert p.support.check(x).all()
    error = (p.variance[..., :3] / 20_000).sqrt()
    assert ((x.mean((0, 1)) - p.mean[0])[:3].abs() < 5 * error[0]).all()
    assert p.mean[..., 3].isnan().all()


@pytest.mark.parametrize("batch_shape", [(4,), (5, 4)])
def test_columns_expand(batch_shape):
    p, x = table(4), table(4).sample()
    expanded = p.expand(batch_shape)
    assert expanded.batch_shape == batch_shape and expanded.event_shape == (4,)
    assert expanded.sample((3,)).shape == (3, *batch_shape, 4)
    assert torch.allclose(expanded.log_prob(x), p.log_prob(x).expand(batch_shape))


def test_parts_that_differ_in_batch_are_broadcast():
    p = Columns([dist.Normal(torch.zeros(4), 1.0), dist.Normal(0.0, 1.0)])
    assert p.batch_shape == (4,) and p.sample().shape == (4, 2)


def test_columns_carry_gradients_where_all_of_them_can():
    loc = torch.zeros(4, requires_grad=True)
    p = Columns([dist.Normal(loc, 1.0), dist.Laplace(loc, 1.0)])
    assert p.has_rsample and not table(4).has_rsample
    p.rsample().sum().backward()
    assert torch.equal(loc.grad, torch.full((4,), 2.0))


def test_a_column_outside_of_its_support_is_found_there():
    support = table(2).support
    rows = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, -1.0, 2.0], [0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.5, 0.0]])
    assert support.check(rows).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="Columnwise"):
        table(2).log_prob(rows[:2])
    assert Columns(table(2).parts, validate_args=False).expand((2,))._validate_args is False


def test_bounds_that_differ_by_row_stay_with_their_row():
    total = torch.tensor([2.0, 9.0])
    p = Columns([dist.Binomial(total, torch.full((2,), 0.5)), dist.Normal(torch.zeros(2), 1.0)])
    x = torch.tensor([[2.0, 0.0], [9.0, 0.0]])
    assert p.support.check(x).tolist() == [True, True]
    assert p.support.check(x.flip(0)).tolist() == [False, True]


def test_a_table_is_discrete_where_every_column_is():
    assert not table(2).support.is_discrete
    assert Columns([dist.Poisson(torch.ones(2)), dist.Bernoulli(torch.ones(2) / 2)]).support.is_discrete
    assert Columnwise([constraints.real], [3]).event_dim == 1


def test_a_matrix_is_no_column():
    matrix = dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(2)
    with pytest.raises(ValueError, match=r"the event shape \(3, 4\)"):
        Columns([dist.Poisson(torch.ones(2)), matrix])


@pytest.mark.parametrize(
    "p",
    [
        Beta(torch.full((4,), 2.0), torch.ones(4)),
        ContinuousBernoulli(logits=torch.linspace(-2, 2, 4)),
        DiscretizedLogistic(torch.full((4,), 0.5), torch.tensor(0.1)),
        ZeroInflated(dist.Poisson(torch.ones(4)), torch.zeros(4)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_pyro_samples_masks_and_expands_it(p):
    with pyro.plate("particles", 3, dim=-2), pyro.plate("observations", 4):
        x = pyro.sample("x", p)
    assert x.shape == (3, 4)
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(p.mask(mask).log_prob(x) != 0, mask.expand(3, 4))
    assert torch.allclose(copy.deepcopy(p).to_event(1).log_prob(x), p.log_prob(x).sum(1))


# Normals that score their own draws


def nearly_singular(off_diagonal, dtype=torch.float32):
    """Its first coordinate has the scale 1e-3 around 3000, and what is lost of it is magnified in the second."""
    scale_tril = torch.tensor([[1e-3, 0.0], [off_diagonal, 1e-3]], dtype=dtype).requires_grad_()
    return MultivariateNormal(torch.full((5, 2), 3000.0, dtype=dtype), scale_tril=scale_tril), scale_tril


def test_a_draw_of_a_nearly_singular_normal_is_scored_by_its_noise():
    q, scale_tril = nearly_singular(1000.0)
    z = q.rsample()
    noise = q._drawn[1].double().detach()
    truth = scipy.stats.norm.logpdf(noise).sum(1) - 2 * np.log(1e-3)
    np.testing.assert_allclose(q.log_prob(z).detach(), truth, rtol=1e-5)
    lost = dist.MultivariateNormal(q.loc, scale_tril=scale_tril).log_prob(z)  # negative control
    assert (lost.detach() - torch.as_tensor(truth)).abs().max() > 1e3


def test_a_draw_and_any_other_point_have_the_density_and_the_gradient_of_torch():
    q, scale_tril = nearly_singular(0.5, torch.float64)
    z = q.rsample()
    plain = dist.MultivariateNormal(q.loc, scale_tril=scale_tril)
    for value in (z, z.detach(), z.detach() + 1e-4):
        found, expected = (p.log_prob(value) for p in (q, plain))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)
        gradients = [torch.autograd.grad(p.sum(), scale_tril, retain_graph=True)[0].tril() for p in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


def test_a_draw_without_gradients_is_scored_at_a_fixed_point():
    q, scale_tril = nearly_singular(0.5, torch.float64)
    z = q.sample()
    score = torch.autograd.grad(q.log_prob(z).sum(), scale_tril)[0].tril()
    plain = dist.MultivariateNormal(q.loc, scale_tril=scale_tril).log_prob(z)
    torch.testing.assert_close(score, torch.autograd.grad(plain.sum(), scale_tril)[0].tril(), rtol=1e-5, atol=1e-3)
