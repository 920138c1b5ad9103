"""Sums of weights against special functions, all subsets, ArviZ and extreme value theory."""

import io
import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from ppl_vae.evidence.weights import JACKKNIFE_POWERS, JACKKNIFE_TOP, WeightSums


def feed(log_weights: Tensor, *sizes: int, num_powers: int = JACKKNIFE_POWERS) -> WeightSums:
    """Sums of the weights (S, N), taken in blocks of these sizes; all at once by default."""
    sums = WeightSums(log_weights.shape[1], len(log_weights), num_powers)
    for block in log_weights.split(list(sizes or [len(log_weights)])):
        sums.update(block)
    return sums


def heavy_tailed(num_particles: int, *shapes: float) -> Tensor:
    """Logs of Pareto weights, one column for each shape k; the mean weight is 1 / (1 - k) for k < 1."""
    return torch.tensor(shapes) * torch.distributions.Exponential(1.0).sample((num_particles, 1)).double()


def gaussian_log_weights(scale: float, num_particles: int, repeats: int, latent_dim: int = 1) -> Tensor:
    """Target N(0, I), proposal N(0, scale^2 I): the mean weight is 1."""
    z = scale * torch.randn(num_particles, repeats, latent_dim)
    return (-z.square() / 2 + z.square() / (2 * scale**2) + math.log(scale)).sum(-1)


def within_four_standard_errors(values: Tensor, truth: float) -> bool:
    return abs(values.mean().item() - truth) < 4 * values.std().item() / math.sqrt(len(values))


# Gamma weights: the sum of S of shape a is Gamma(S a), so that every expectation is known


def gamma_log_weights(shape: float, num_particles: int, repeats: int) -> Tensor:
    return torch.distributions.Gamma(shape, 1.0).sample((num_particles, repeats)).log()


def gamma_bias(shape: float, num_particles: int) -> float:
    """Of the log mean of so many Gamma weights."""
    return scipy.special.digamma(shape * num_particles) - math.log(shape * num_particles)


def jackknife_bias(shape: float, num_particles: int, order: int) -> float:
    """Nowozin's formula with an expectation for each of its means."""
    factors = [
        (-1) ** j * (num_particles - j) ** order / math.factorial(order - j) / math.factorial(j)
        for j in range(order + 1)
    ]
    return sum(factor * gamma_bias(shape, num_particles - j) for j, factor in enumerate(factors))


@pytest.mark.parametrize(("shape", "num_particles"), [(0.3, 5), (2.0, 40)])
def test_log_mean_of_gamma_weights_has_digamma_mean_and_trigamma_variance(float64, shape, num_particles):
    log_mean = feed(gamma_log_weights(shape, num_particles, 50_000)).log_mean
    variance = scipy.special.polygamma(1, shape * num_particles)
    kurtosis = scipy.stats.kurtosis(log_mean, fisher=False)
    assert within_four_standard_errors(log_mean, math.log(shape) + gamma_bias(shape, num_particles))
    assert abs(log_mean.var().item() / variance - 1) < 4 * math.sqrt((kurtosis - 1) / len(log_mean))


@pytest.mark.parametrize(("shape", "num_particles"), [(0.5, 10), (2.0, 40)])
def test_relative_variance_of_gamma_weights_halves_to_the_bias_up_to_second_order(float64, shape, num_particles):
    relative_variance = feed(gamma_log_weights(shape, num_particles, 50_000)).relative_variance
    total = shape * num_particles
    assert within_four_standard_errors(relative_variance, 1 / (total + 1))  # sum w^2 / (sum w)^2 is Beta moments
    assert abs(gamma_bias(shape, num_particles) + 1 / (total + 1) / 2) < 1 / total**2


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("shape", "num_particles"), [(0.5, 4), (1.0, 10), (2.0, 40)])
def test_jackknife_of_gamma_weights_has_the_bias_of_theory(float64, shape, num_particles, order):
    estimates = feed(gamma_log_weights(shape, num_particles, 50_000)).jackknife(order)
    assert within_four_standard_errors(estimates, math.log(shape) + jackknife_bias(shape, num_particles, order))


def test_each_order_of_the_jackknife_removes_bias(float64):
    sums = feed(gamma_log_weights(0.5, 4, 200_000))
    errors = torch.stack([sums.log_mean, sums.jackknife(1), sums.jackknife(2)]) - math.log(0.5)
    standard_error = errors.std(1).max().item() / math.sqrt(200_000)
    none, first, second = errors.mean(1).abs().tolist()
    assert none > first + 4 * standard_error and first > second + 4 * standard_error


# The jackknife against its definition


def jackknife_by_subsets(log_w: np.ndarray, order: int) -> float:
    """Nowozin's formula for one column, each subset of S - j weights summed anew."""
    count, estimate = len(log_w), 0.0
    for j in range(order + 1):
        kept = [np.delete(log_w, list(left_out)) for left_out in itertools.combinations(range(count), j)]
        mean = np.mean([scipy.special.logsumexp(subset) - math.log(count - j) for subset in kept])
        estimate += (-1) ** j * (count - j) ** order / math.factorial(order - j) / math.factorial(j) * mean
    return estimate


def jackknife_by_pairs(w: np.ndarray, order: int) -> float:
    """The same for some hundreds of weights of one column that are not too unequal."""
    count, total = len(w), w.sum()
    first, second = np.triu_indices(count, 1)
    means = [
        math.log(total / count),
        np.log((total - w) / (count - 1)).mean(),
        np.log((total - w[first] - w[second]) / (count - 2)).mean(),
    ]
    if order == 1:
        return count * means[0] - (count - 1) * means[1]
    return count**2 / 2 * means[0] - (count - 1) ** 2 * means[1] + (count - 2) ** 2 / 2 * means[2]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_particles", [3, 4, 7, 20, 21, 22, 40])
def test_jackknife_equals_its_definition_over_all_subsets(float64, num_particles, order):
    log_w = heavy_tailed(num_particles, 0.1, 0.5, 1.0, 5.0, 50.0) - 300
    expected = [jackknife_by_subsets(column, order) for column in log_w.T.numpy()]
    np.testing.assert_allclose(feed(log_w).jackknife(order), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_particles", [100, 700])
def test_jackknife_of_many_weights_equals_the_sum_over_all_pairs(float64, num_particles, order):
    log_w = heavy_tailed(num_particles, 0.1, 0.4, 0.8, 1.2)
    expected = [jackknife_by_pairs(column, order) for column in log_w.exp().T.numpy()]
    sums = feed(log_w - 800, 1, num_particles - 1)
    np.testing.assert_allclose(sums.jackknife(order) + 800, expected, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("extra", [1, 2, 5, 40])
def test_jackknife_is_exact_where_more_weights_matter_than_are_taken_one_by_one(float64, order, extra):
    w = np.concatenate([np.ones(JACKKNIFE_TOP + extra), np.full(200, 1e-9)])  # the slowest series there is
    sums = feed(torch.tensor(w).log()[:, None])
    np.testing.assert_allclose(sums.jackknife(order), jackknife_by_pairs(w, order), atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_jackknife_of_constant_weights_is_their_log(float64, order):
    sums = feed(torch.full((20_000, 2), -123.4), 7, 10_000, 9_993)
    np.testing.assert_allclose(sums.jackknife(order), -123.4, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("lead", [30.0, 800.0, 1e5])
@pytest.mark.parametrize("leaders", [1, 2, 3])
def test_jackknife_stays_exact_where_few_weights_rule(float64, leaders, lead, order):
    log_w = torch.randn(30, 1)
    log_w[:leaders] += lead
    expected = jackknife_by_subsets(log_w[:, 0].numpy(), order)
    assert feed(log_w).jackknife(order).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_particles", [10, 300])
def test_jackknife_is_the_log_mean_where_a_subset_has_zero_weights_only(order, num_particles):
    log_w = torch.full((num_particles, order + 1), -torch.inf)
    for column in range(order):
        log_w[: column + 1, column] = torch.randn(column + 1)  # 1 to order weights are not zero
    sums = feed(log_w)
    assert sums.jackknife(order).tolist() == sums.log_mean.tolist()
    assert sums.jackknife(order)[-1] == -math.inf


def test_jackknife_counts_zero_weights(float64):
    w = torch.distributions.Gamma(2.0, 1.0).sample((50, 1))
    w[10:35] = 0
    for order in (1, 2):
        expected = jackknife_by_pairs(w[:, 0].numpy(), order)
        assert feed(w.log()).jackknife(order).item() == pytest.approx(expected, abs=1e-10)


def test_jackknife_refuses_what_it_cannot_correct():
    with pytest.raises(ValueError, match="order 1 or 2; found 3"):
        feed(torch.randn(10, 1)).jackknife(3)
    with pytest.raises(ValueError, match="needs 3 particles or more; found 2"):
        feed(torch.randn(2, 1)).jackknife(2)
    with pytest.raises(ValueError, match="num_powers=JACKKNIFE_POWERS"):
        feed(torch.randn(10, 1), num_powers=2).jackknife(1)


# Streams


@pytest.mark.parametrize("sizes", [[64] * 62 + [32], [1, 1999, 2000], [3000, 500, 500]])
def test_blocks_give_what_all_weights_at_once_give(float64, sizes):
    log_w = heavy_tailed(4000, 0.1, 0.6, 2.0) - 700
    streamed, whole = feed(log_w, *sizes), feed(log_w)
    assert torch.equal(streamed.tail, log_w.sort(dim=0, descending=True).values[: len(whole.tail)])
    for name in (
        "log_mean",
        "ess",
        "relative_variance",
        "mean",
        "standard_error_of_mean",
        "pareto_k",
        "pareto_smoothed",
    ):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-9, atol=1e-11)
    for order in (1, 2):
        torch.testing.assert_close(streamed.jackknife(order), whole.jackknife(order), rtol=0, atol=1e-9)


def test_looking_at_the_sums_on_the_way_changes_nothing(float64):
    log_w = heavy_tailed(1000, 0.3, 0.9)
    watched = WeightSums(2, 1000, JACKKNIFE_POWERS)
    for block in log_w.split(50):
        watched.update(block)
        _ = watched.log_mean, watched.pareto_smoothed, watched.jackknife(2)
    np.testing.assert_allclose(watched.pareto_k, feed(log_w).pareto_k, rtol=1e-9)
    np.testing.assert_allclose(watched.jackknife(2), feed(log_w).jackknife(2), atol=1e-10)


def test_weights_may_be_overwritten_once_taken_in(float64):
    sums, buffer = WeightSums(1, 30), torch.zeros(10, 1)
    for value in (1.0, 2.0, 3.0):
        sums.update(buffer.fill_(value))
    assert sums.log_mean.item() == pytest.approx(np.log(np.exp([1, 2, 3]).mean()))


def test_more_powers_change_neither_tail_nor_k():
    log_w = torch.randn(30, 2)
    few, many = feed(log_w, num_powers=2), feed(log_w)
    assert torch.equal(few.tail, many.tail) and few.pareto_k.tolist() == many.pareto_k.tolist()


def test_memory_grows_with_the_square_root_of_the_number_of_particles():
    sums, stored = WeightSums(1, 1_000_000, JACKKNIFE_POWERS), io.BytesIO()
    for _ in range(1000):
        sums.update(torch.randn(1000, 1))
    torch.save(vars(sums), stored)
    assert sums.count == 1_000_000 and len(stored.getvalue()) < 8 * 5 * len(sums.tail) + 20_000


# Pareto smoothing


def smoothed_by_arviz(log_w: np.ndarray) -> float:
    """The estimate by ArviZ for one column. It normalises: the smallest weight, not smoothed, tells by how much."""
    import arviz as az

    if int(az.__version__.split(".")[0]) == 0:
        smoothed = az.psislw(log_w.copy())[0]
    else:
        from arviz_stats.base import array_stats

        smoothed = array_stats.psislw(-log_w, axis=-1)[0]
    smallest = log_w.argmin()
    return log_w[smallest] - np.asarray(smoothed)[smallest] - math.log(len(log_w))


# Sizes whose tail, 3 sqrt(S), is a whole number: ArviZ 0.23 rounds it up, as we do, and 1.x down.
@pytest.mark.parametrize("num_particles", [50, 400, 2500])
def test_pareto_smoothed_estimate_equals_arviz(float64, num_particles):
    log_w = torch.cat([heavy_tailed(num_particles, 0.05, 0.3, 0.6, 1.2, 3.0), torch.randn(num_particles, 3)], 1) - 900
    expected = [smoothed_by_arviz(column) for column in log_w.T.numpy()]
    sums = feed(log_w, num_particles // 2, num_particles // 2)
    np.testing.assert_allclose(sums.pareto_smoothed, expected, rtol=0, atol=1e-6)
    assert (sums.pareto_smoothed - sums.log_mean).abs().min() > 1e-6


def test_smoothing_of_flipped_weights_is_far_off(float64):
    log_w = torch.randn(2500, 20) - 0.5  # lognormal: the mean weight is 1, that of the reciprocals is e
    assert feed(log_w).pareto_smoothed.abs().max() < 0.2
    np.testing.assert_allclose(feed(-log_w).pareto_smoothed, 1.0, atol=0.2)
    flipped = np.array([smoothed_by_arviz(-column) for column in log_w.T.numpy()])
    assert abs(flipped - feed(log_w).pareto_smoothed.numpy()).min() > 0.6


@pytest.mark.parametrize("scale", [0.5, 0.6])
def test_smoothing_has_less_spread_and_errs_on_the_low_side(float64, scale):
    sums = feed(gaussian_log_weights(scale, 1000, repeats=1000))
    smoothed, plain = sums.pareto_smoothed, sums.log_mean
    assert smoothed.mean() < -4 * smoothed.std() / math.sqrt(1000)
    assert smoothed.square().mean() < 0.7 * plain.square().mean()


def test_smoothing_never_exceeds_the_largest_weight(float64):
    sums = feed(heavy_tailed(500, 0.1, 1.0, 10.0, 1e3))
    assert (sums.pareto_smoothed <= sums.largest).all()


def test_smoothing_leaves_weights_without_a_tail_alone():
    constant, short = torch.full((100, 2), -3.0), torch.randn(10, 2)
    for log_w in (constant, short):
        assert feed(log_w).pareto_smoothed.tolist() == feed(log_w).log_mean.tolist()


# k-hat


@pytest.mark.parametrize("scale", [0.7, 0.8, 0.9])
def test_a_narrow_proposal_has_the_k_of_theory(float64, scale):
    num_particles, limit = 100_000, 1 - scale**2
    sums = feed(gaussian_log_weights(scale, num_particles, repeats=16), num_particles // 2, num_particles // 2)
    shapes = sums.pareto_k
    # The limit is of an infinite threshold; at one of t standard deviations k is less by a share of about 1/t^2.
    threshold = scipy.stats.norm.isf(len(sums.tail) / num_particles / 2)
    slack = 4 * shapes.std().item() / math.sqrt(16)
    assert limit * (1 - 1 / threshold**2) - slack < shapes.mean() < limit + slack


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_a_wide_proposal_has_bounded_weights_and_a_negative_k(float64, latent_dim):
    shapes = feed(gaussian_log_weights(1.5, 100_000, 8, latent_dim), 50_000, 50_000).pareto_k
    assert shapes.max() < 0.1
    # The distance to the bound is the square of that to the origin: a tail of shape -2 / dimension.
    np.testing.assert_allclose(shapes.mean(), -2 / latent_dim, rtol=0.15)


# Zero weights and weights that rule


@pytest.mark.parametrize("num_particles", [30, 1000])
def test_one_ruling_weight_is_a_share_of_the_particles(float64, num_particles):
    log_w = torch.randn(num_particles, 4)
    log_w[3] += 900
    sums = feed(log_w)
    np.testing.assert_allclose(sums.log_mean, log_w[3] - math.log(num_particles), rtol=1e-12)
    np.testing.assert_allclose(sums.ess, 1, rtol=1e-12)
    assert set(sums.verdicts()) == {"poor"}
    for corrected in (sums.jackknife(1), sums.jackknife(2), sums.pareto_smoothed):
        assert corrected.isfinite().all()


def test_zero_weights_count_as_particles(float64):
    log_w = torch.randn(1000, 2)
    log_w[::2] = -torch.inf
    sums, positive = feed(log_w, 500, 500), feed(log_w[1::2])
    np.testing.assert_allclose(sums.log_mean, positive.log_mean - math.log(2), rtol=1e-12)
    np.testing.assert_allclose(sums.ess, positive.ess, rtol=1e-9)
    assert sums.pareto_smoothed.isfinite().all() and sums.jackknife(2).isfinite().all()


def test_weights_that_are_all_zero_mean_log_p_is_minus_infinity():
    sums = feed(torch.full((100, 2), -torch.inf), 60, 40)
    for estimate in (sums.log_mean, sums.pareto_smoothed, sums.jackknife(1), sums.jackknife(2)):
        assert estimate.tolist() == [-math.inf, -math.inf]
    assert sums.ess.tolist() == [0, 0] and sums.verdicts() == ["poor", "poor"]
