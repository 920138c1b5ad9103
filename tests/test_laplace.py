"""Laplace proposals: modes and curvatures against closed forms, Student-t against SciPy, and stories without modes."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from example_stories import SquaredNormal, closed_form_log_evidence, linear_gaussian
from torch import Tensor, nn

from ppl_vae import log_evidence, traces
from ppl_vae.evidence import Annealed, Laplace
from ppl_vae.evidence.joint import Joint, joint_of
from ppl_vae.evidence.laplace import StudentMixture, laplace

NORMAL = math.inf


# Against the exact posterior


@pytest.mark.parametrize("latent_dim", [1, 3, 8])
@pytest.mark.parametrize("refinements", [0, 6])
def test_mode_and_covariance_are_those_of_the_closed_form_posterior(float64, latent_dim, refinements):
    story = linear_gaussian(num_features=12, latent_dim=latent_dim, widened=1.5)
    x = story.model(num_observations=16).detach()
    with traces.scoring(story):
        joint = joint_of(story, (x,), "rows")
        students, failed = laplace(joint, (x,), NORMAL, refinements)
        posterior = linear_gaussian(num_features=12, latent_dim=latent_dim).encoder(x)
    assert students.loc.shape == (16, 1, latent_dim) and not failed.any()
    mode = joint.space.latents(students.loc[:, 0])[0]["z"]
    scale_tril = joint.space.scale[:, None] * students.scale_tril[:, 0]
    torch.testing.assert_close(mode, posterior.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(scale_tril @ scale_tril.mT, posterior.covariance_matrix, rtol=0, atol=1e-6)


def test_normal_laplace_is_exact_where_the_posterior_is_normal(float64):
    story = linear_gaussian(num_features=12, latent_dim=4, widened=1.5)
    x = story.model(num_observations=16).detach()
    evidence = log_evidence(story, x, method=Laplace(degrees_of_freedom=NORMAL), num_particles=50)
    np.testing.assert_allclose(evidence["estimate"], closed_form_log_evidence(story, x), atol=1e-6)


def test_the_mode_is_found_however_bad_the_guide(float64):
    story = linear_gaussian(num_features=12, latent_dim=3)
    story.guide = lambda x: pyro.sample("z", dist.Normal(40 * torch.ones(len(x), 3), 0.01).to_event(1))
    x = story.model(num_observations=16).detach()
    with traces.scoring(story):
        joint = joint_of(story, (x,), "rows")
        students, _ = laplace(joint, (x,), NORMAL)
        mode = joint.space.latents(students.loc[:, 0])[0]["z"]
        torch.testing.assert_close(mode, story.encoder(x).mean, rtol=0, atol=1e-4)


# Student-t mixtures


def students(degrees_of_freedom: float) -> StudentMixture:
    """For two observations three components in three dimensions, of which the second observation has two."""
    scale_tril = 0.3 * torch.randn(2, 3, 3, 3).tril(-1) + torch.diag_embed(torch.rand(2, 3, 3) + 0.5)
    log_weights = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]]).log()
    return StudentMixture(2 * torch.randn(2, 3, 3), scale_tril, log_weights, degrees_of_freedom)


def by_scipy(mixture: StudentMixture, row: int, u: np.ndarray) -> np.ndarray:
    density = np.zeros(len(u))
    for j, weight in enumerate(mixture.log_weights[row].exp().tolist()):
        loc, scale_tril = mixture.loc[row, j].numpy(), mixture.scale_tril[row, j].numpy()
        shape = scale_tril @ scale_tril.T
        if math.isfinite(mixture.degrees_of_freedom):
            density += weight * scipy.stats.multivariate_t.pdf(u, loc, shape, df=mixture.degrees_of_freedom)
        else:
            density += weight * scipy.stats.multivariate_normal.pdf(u, loc, shape)
    return np.log(density)


@pytest.mark.parametrize("degrees_of_freedom", [3.0, 10.0, NORMAL])
def test_log_density_equals_scipy(float64, degrees_of_freedom):
    mixture = students(degrees_of_freedom)
    u = 3 * torch.randn(50, 2, 3)
    for row in range(2):
        np.testing.assert_allclose(mixture.log_prob(u)[:, row], by_scipy(mixture, row, u[:, row].numpy()), rtol=1e-10)


@pytest.mark.parametrize("degrees_of_freedom", [10.0, NORMAL])
def test_draws_have_the_moments_of_the_mixture(float64, degrees_of_freedom):
    mixture = students(degrees_of_freedom)
    draws = mixture.sample(200_000)
    weights = mixture.log_weights.exp()
    mean = (weights[..., None] * mixture.loc).sum(1)
    widening = 1 if math.isinf(degrees_of_freedom) else degrees_of_freedom / (degrees_of_freedom - 2)
    spread = (mixture.loc - mean[:, None])[..., None] * (mixture.loc - mean[:, None])[..., None, :]
    within = widening * mixture.scale_tril @ mixture.scale_tril.mT
    covariance = (weights[..., None, None] * (within + spread)).sum(1)
    for row in range(2):
        standard_error = covariance[row].diagonal().sqrt() / math.sqrt(len(draws))
        assert ((draws[:, row].mean(0) - mean[row]).abs() < 4.5 * standard_error).all()
        torch.testing.assert_close(draws[:, row].T.cov(), covariance[row], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("degrees_of_freedom", [5.0, NORMAL])
def test_draws_follow_the_density(float64, degrees_of_freedom):
    mixture = students(degrees_of_freedom)
    draws = mixture.sample(100_000)
    narrow = torch.distributions.Normal(mixture.loc[:, :2], 0.3)  # any density g: the mean of g / q over draws is 1
    log_g = narrow.log_prob(draws[:, :, None]).sum(-1).logsumexp(-1) - math.log(2)
    ratio = torch.exp(log_g - mixture.log_prob(draws))
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / math.sqrt(len(draws))).all()


# Several modes


def test_both_modes_of_all_posteriors_are_found(float64):
    story, x = SquaredNormal(), torch.linspace(0.8, 3, 64)
    with traces.scoring(story):
        joint = joint_of(story, (x,), "rows")
        students, _ = laplace(joint, (x,), 10.0)
    modes = joint.space.latents(students.loc.flatten(0, 1))[0]["z"].reshape(64, -1)
    real = students.log_weights > math.log(0.2)  # a search may also end on the saddle between them
    both = (real & (modes > 0.3)).any(1) & (real & (modes < -0.3)).any(1)
    assert both.all()
    assert (real.sum(1) <= 2).all()
    right_place = (modes**2 - (x - 0.09 / 2)[:, None]).abs() < 0.05  # where the derivative of log p(x, z) is zero
    assert right_place[real].all()


def test_mixture_sees_the_mode_that_the_guide_does_not_know(float64):
    story, x = SquaredNormal(), torch.linspace(0.8, 3, 64)
    truth = log_evidence(story, x, method="quadrature")["estimate"].values
    mixture = log_evidence(story, x, method="mixture")
    importance = log_evidence(story, x, method="importance")
    good = mixture["verdict"].values == "good"
    error = abs(mixture["estimate"].values - truth)
    assert good.mean() > 0.85
    assert (error[good] < 4.5 * mixture["standard_error"].values[good]).all()
    assert np.median(importance["estimate"].values - truth) == pytest.approx(-math.log(2), abs=0.05)


# Where there is no mode to be found


class Transformed(nn.Module):
    """z ~ N(0, I), x ~ N(f(z), 0.5^2 I) for a function that Newton's method may not like."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.function(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x / 1.25, 0.5).to_event(1))


class WithoutGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN for positive numbers."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(ctx, *gradients):
        (z,) = ctx.saved_tensors
        return torch.where(z > 0, math.nan, gradients[0])


def without_gradient(z: Tensor) -> Tensor:
    return z.detach()


def with_broken_gradient(z: Tensor) -> Tensor:
    return torch.as_tensor(WithoutGradient.apply(z))


def exact(x: Tensor) -> np.ndarray:
    """log N(x; 0, 1.25 I)."""
    return scipy.stats.norm.logpdf(x, 0, math.sqrt(1.25)).sum(1)


@pytest.mark.parametrize("function", [without_gradient, with_broken_gradient])
@pytest.mark.parametrize("method", ["laplace", "mixture", "auto"])
def test_a_decoder_without_gradients_costs_precision_only(float64, function, method):
    x = torch.randn(32, 3) * math.sqrt(1.25)
    evidence = log_evidence(Transformed(function), x, method=method)
    error = abs(evidence["estimate"].values - exact(x))
    assert set(evidence["verdict"].values) == {"good"}
    assert (error < 4.5 * evidence["standard_error"].values).all()


def test_annealing_without_gradients_is_flagged(float64):
    x = torch.randn(32, 3) * math.sqrt(1.25)
    evidence = log_evidence(Transformed(without_gradient), x, method=Annealed(num_temperatures=20))
    assert set(evidence["verdict"].values) <= {"fair", "poor"}


def test_a_search_that_fails_falls_back_to_the_widened_guide(float64):
    story, x = Transformed(with_broken_gradient), torch.tensor([[2.0, 2, 2], [-2, -2, -2]])
    with traces.scoring(story):
        joint = joint_of(story, (x,), "rows")
        students, failed = laplace(joint, (x,), NORMAL)
    assert failed.tolist() == [True, False]
    z = joint.space.latents(students.sample(20_000).flatten(0, 1))[0]["z"].reshape(-1, 2, 3)
    assert torch.allclose(z.mean(0)[0], torch.tensor(1.6), atol=0.25)  # a guide of 64 draws
    assert torch.allclose(z.std(0)[0], torch.tensor(1.5 * 0.5), atol=0.25)
    assert torch.allclose(z.std(0)[1], torch.tensor(0.2).sqrt(), atol=0.02)


def test_an_observation_without_mode_leaves_the_others_alone(float64, monkeypatch):
    story = linear_gaussian(num_features=12, latent_dim=3, widened=1.5)
    x = story.model(num_observations=8).detach()
    whole, with_hessian = log_evidence(story, x, method="laplace"), Joint.with_hessian

    def broken(joint, rows, u):
        log_p, slope, hessian = with_hessian(joint, rows, u)
        third = (rows[0] == x[2]).all(1)
        return log_p, slope.masked_fill(third[:, None], math.nan), hessian.masked_fill(third[:, None, None], math.nan)

    monkeypatch.setattr(Joint, "with_hessian", broken)
    parts = log_evidence(story, x, method="laplace")
    error = abs(parts["estimate"].values - closed_form_log_evidence(story, x).numpy())
    assert (error < 4.5 * parts["standard_error"].values).all()
    ratio = (parts["standard_error"] / whole["standard_error"]).values
    assert ratio[2] > 2 and (np.delete(ratio, 2) < 1.2).all()
