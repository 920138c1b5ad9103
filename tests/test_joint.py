"""The joint density in unconstrained coordinates: volumes, derivatives, discrete sums, and chunks of rows."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import (
    ORACLES,
    ClustersInGuide,
    DirichletMultinomial,
    GammaPoisson,
    HierarchicalNormal,
    TwoLatents,
    closed_form_log_evidence,
    images,
    linear_gaussian,
    rows,
    small_vae,
)
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae import VAE, likelihoods, log_evidence, priors, traces
from ppl_vae.evidence import estimators
from ppl_vae.evidence.joint import Chunks, Joint, joint_of

CONTINUOUS = ["hierarchical", "gamma", "log-normal", "dirichlet", "summed out", "discrete in guide", "conditional"]


class OneLatent(nn.Module):
    """z ~ prior, x ~ N(z, 1)."""

    def __init__(self, prior: TorchDistribution) -> None:
        super().__init__()
        self.prior = prior

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", self.prior), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", self.prior)


def told(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Joint]:
    make, columns, _ = ORACLES[name]
    story = make()
    return story, columns(), joint_of(story, columns(), "rows")


# Coordinates


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (GammaPoisson, (torch.arange(6.0),)),
        (HierarchicalNormal, (torch.ones(6, 3),)),
        (TwoLatents, (rows(6),)),
        (DirichletMultinomial, (torch.tensor([[4.0, 4, 4]] * 6),)),
        (ClustersInGuide, (torch.ones(6),)),
    ],
)
def test_latents_of_their_own_coordinates_are_themselves(float64, make, columns):
    story = make()
    columns = tuple(column.double() for column in columns)
    space = joint_of(story, columns, "rows").space
    drawn = traces.draws(traces.run(story, *columns)[1])
    again, _ = space.latents(space.coordinates(drawn))
    assert set(again) <= set(drawn)
    assert all(torch.allclose(again[name], drawn[name]) for name in again)


def test_a_latent_that_the_guide_leaves_out_is_named():
    story, x = small_vae(), images(3)
    joint = joint_of(story, (x,))
    story.guide = lambda x: None
    with (
        pytest.raises(ValueError, match=r"The guide does not draw \['z'\], which the model does"),
        traces.scoring(story),
    ):
        joint.guide_points((x,), 2)


def test_coordinates_are_measured_in_standard_deviations_of_the_prior(float64):
    space = joint_of(OneLatent(dist.Normal(300.0, 50.0)), (torch.ones(2),), "rows").space
    u = space.coordinates({"z": torch.tensor([250.0, 300.0, 350.0])})
    assert torch.allclose(u.flatten(), torch.tensor([-1.0, 0.0, 1.0]), atol=0.2)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(3.0, 10.0),
        dist.Gamma(2.0, 0.5),
        dist.LogNormal(1.0, 0.5),
        dist.Uniform(-1.0, 3.0),
        dist.Beta(2.0, 3.0),
        dist.HalfNormal(4.0),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_the_prior_density_of_coordinates_integrates_to_one(float64, prior):
    u = torch.linspace(-40, 40, 40_001)[:, None]
    x = torch.zeros(len(u))
    log_prior, _ = joint_of(OneLatent(prior), (x,), "rows").log_prob((x,), u)
    assert torch.trapezoid(log_prior.exp(), u.flatten()).item() == pytest.approx(1, abs=1e-6)


def test_the_joint_density_is_prior_times_likelihood(float64):
    u = torch.linspace(-3, 3, 50)[:, None]
    x = torch.linspace(0, 5, 50)
    joint = joint_of(OneLatent(dist.Gamma(2.0, 0.5)), (x,), "rows")
    log_prior, log_joint = joint.log_prob((x,), u)
    z = joint.space.latents(u)[0]["z"]
    assert torch.allclose(log_joint - log_prior, dist.Normal(z, 1.0).log_prob(x))


def test_the_guides_density_of_coordinates_integrates_to_one(float64):
    story, x = GammaPoisson(), torch.tensor([0.0, 3.0, 9.0])
    u = torch.linspace(-40, 40, 40_001)
    joint = joint_of(story, (x,), "rows")
    log_q = joint.log_guide((x,), u[:, None, None].expand(-1, 3, 1))
    assert torch.allclose(torch.trapezoid(log_q.exp(), u, dim=0), torch.ones(3), atol=1e-6)


def test_discrete_latents_are_summed_out_of_model_and_guide(float64):
    story, x = ClustersInGuide(), torch.linspace(-1, 2, 5)
    joint = joint_of(story, (x,), "rows")
    z = torch.linspace(-2, 2, 5)
    u = joint.space.coordinates({"z": z})
    volume = joint.space.latents(u)[1]
    by_hand = torch.stack([0.5 * dist.Normal(loc, 1.0).log_prob(z).exp() for loc in (-1.0, 1.0)]).sum(0).log()
    log_prior, log_joint = joint.log_prob((x,), u)
    assert torch.allclose(log_prior - volume, by_hand)
    assert torch.allclose(log_joint - volume, by_hand + dist.Normal(z, 0.5).log_prob(x))
    share = torch.softmax(torch.stack([-x, x]), 0)
    parts = torch.stack([dist.Normal((4 * x + loc) / 5, 0.6).log_prob(z).exp() for loc in (-1.0, 1.0)])
    assert torch.allclose(joint.log_guide((x,), u[None])[0] - volume, (share * parts).sum(0).log())


# Derivatives


@pytest.mark.parametrize("name", CONTINUOUS)
def test_gradients_and_hessians_equal_finite_differences(float64, name):
    _, columns, joint = told(name)
    u = 0.5 * torch.randn(len(columns[0]), joint.dim)
    log_prior, log_joint, prior_slope, joint_slope = joint.with_gradients(columns, u)
    log_p, slope, hessian = joint.with_hessian(columns, u)
    assert torch.equal(log_p, log_joint) and torch.allclose(slope, joint_slope)
    assert torch.allclose(torch.stack(joint.log_prob(columns, u)), torch.stack([log_prior, log_joint]))
    for k, step in enumerate(1e-5 * torch.eye(joint.dim)):
        above, below = joint.with_gradients(columns, u + step), joint.with_gradients(columns, u - step)
        differences = [(high - low) / 2e-5 for high, low in zip(above, below, strict=True)]
        torch.testing.assert_close(prior_slope[:, k], differences[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(joint_slope[:, k], differences[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(hessian[:, k], differences[3], rtol=1e-6, atol=1e-6)


def test_a_latent_that_the_likelihood_ignores_has_the_curvature_of_its_prior(float64):
    class Ignored(OneLatent):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", self.prior)
                pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    joint = joint_of(Ignored(dist.Normal(0.0, 1.0)), (torch.zeros(2),), "rows")
    _, slope, hessian = joint.with_hessian((torch.zeros(2),), torch.zeros(2, 1))
    scale = joint.space.scale
    assert torch.allclose(slope, -scale * joint.space.loc) and torch.allclose(hessian, -(scale**2).expand(2, 1, 1))


# Chunks


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunks_of_any_size_give_the_same_values(float64, name, size):
    _, columns, joint = told(name)
    columns = tuple(column.repeat(6, *(1 for _ in column.shape[1:])) for column in columns)
    u = torch.randn(len(columns[0]), joint.dim)
    whole = [*joint.log_prob(columns, u), *joint.with_hessian(columns, u)]
    joint.chunks.rows = size
    parts = [*joint.log_prob(columns, u), *joint.with_hessian(columns, u)]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Full(nn.Module):
    """A linear layer that has no memory for more than so many rows."""

    def __init__(self, linear: nn.Linear, rows: float) -> None:
        super().__init__()
        self.linear, self.rows, self.most = linear, rows, 0

    def forward(self, z: Tensor) -> Tensor:
        if z.shape[:-1].numel() > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.most = max(self.most, z.shape[:-1].numel())
        return self.linear(z)


def with_little_memory(whole: VAE, rows: float) -> VAE:
    decoder = likelihoods.Normal(Full(whole.decoder.loc, rows), scale=0.5)
    return VAE(priors.StandardNormal(3), decoder, whole.encoder)


@pytest.mark.parametrize("method", ["importance", "auto"])
def test_out_of_memory_halves_the_chunk_and_changes_nothing(float64, method):
    whole = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x = whole.model(num_observations=40).detach()
    plenty = log_evidence(whole, x, method=method, num_particles=300)
    story = with_little_memory(whole, 1100)
    little = log_evidence(story, x, method=method, num_particles=300)
    assert story.decoder.loc.most <= 1100
    np.testing.assert_allclose(plenty["estimate"], little["estimate"], rtol=1e-12)
    assert plenty["verdict"].equals(little["verdict"])


def test_a_story_that_never_fits_is_a_memory_error(float64, monkeypatch):
    whole = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    story, x = with_little_memory(whole, math.inf), whole.model(num_observations=4).detach()

    def then_full(*arguments, **named):
        joint = joint_of(*arguments, **named)
        story.decoder.loc.rows = 0
        return joint

    monkeypatch.setattr(estimators, "joint_of", then_full)
    with pytest.raises(MemoryError, match="does not fit in memory with one particle of one observation"):
        log_evidence(story, x, method="importance")


def test_other_errors_of_a_story_pass_through_chunks():
    def broken(u: Tensor) -> tuple[Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Chunks().map(broken, torch.zeros(3, 2))


def test_the_number_of_rows_at_once_stays_halved():
    def small(u: Tensor) -> tuple[Tensor]:
        if len(u) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return (2 * u,)

    chunks = Chunks(rows=10)
    assert torch.equal(chunks.map(small, torch.arange(17.0))[0], 2 * torch.arange(17.0))
    assert chunks.rows == 2


def test_estimates_do_not_depend_on_the_rows_at_once(float64, monkeypatch):
    story = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x = story.model(num_observations=6).detach()
    whole = log_evidence(story, x, method="mixture")
    monkeypatch.setattr(estimators, "joint_of", lambda *a, **named: _in_chunks(joint_of(*a, **named), 131))
    parts = log_evidence(story, x, method="mixture")
    np.testing.assert_allclose(whole["estimate"], parts["estimate"], rtol=1e-12)
    error = abs(parts["estimate"].values - closed_form_log_evidence(story, x).numpy())
    assert (error < 4.5 * parts["standard_error"].values).all()


def _in_chunks(joint: Joint, size: int) -> Joint:
    joint.chunks.rows = size
    return joint
