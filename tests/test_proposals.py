"""Every method on stories whose evidence is known; proposals as densities; and what the methods refuse."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import ORACLES, ThreeKinds, TwoClusters, TwoLatents, images, linear_gaussian, rows, small_vae
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import log_evidence, traces
from ppl_vae.evidence import Annealed, Mixture
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import Block, MixtureDensity
from ppl_vae.evidence.sampling import METHODS

ALL = list(ORACLES)
CONTINUOUS = [name for name in ALL if name != "discrete"]
UP_TO_TWO_DIMENSIONS = [name for name in CONTINUOUS if name != "log-normal"]
FEW = Annealed(num_temperatures=20)  # a fifth of the usual number

APPLIES = {
    "importance": ALL,
    "prior": ALL,
    "pyro": ALL,
    "laplace": CONTINUOUS,
    "mixture": CONTINUOUS,
    "annealed": CONTINUOUS,
    "quadrature": UP_TO_TWO_DIMENSIONS,
    "exact": ["discrete"],
    "auto": ALL,
}
PARTICLES = {"pyro": 100, "annealed": 64}  # slow ones; the others draw 2000


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in APPLIES.items() for name in names])
def test_every_method_finds_the_evidence_where_it_says_so(float64, method, name):
    make, columns, log_evidence_of = ORACLES[name]
    story, columns = make(), columns()
    if method == "pyro":
        columns = tuple(column[:2] for column in columns)
    evidence = log_evidence(
        story, *columns, method=FEW if method == "annealed" else method, num_particles=PARTICLES.get(method, 2000)
    )
    good = np.isin(evidence["verdict"].values, ("good", "exact"))
    error = abs(evidence["estimate"].values - log_evidence_of(story, *columns).numpy())
    assert (error[good] < 4.5 * evidence["standard_error"].values[good] + 1e-6).all()
    if method in ("mixture", "quadrature", "exact", "auto"):
        assert good.mean() > (0.7 if method == "mixture" else 0.99)


def test_enumeration_is_exact_to_rounding(float64):
    make, columns, log_evidence_of = ORACLES["discrete"]
    for method in ("exact", "auto"):
        evidence = log_evidence(make(), *columns(), method=method)
        np.testing.assert_allclose(evidence["estimate"], log_evidence_of(make(), *columns()), rtol=1e-12)
        assert set(evidence["verdict"].values) == {"exact"} and set(evidence["method"].values) == {"exact"}


# What proposals promise


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_mixtures_draws_follow_its_density(float64, name):
    make, columns, _ = ORACLES[name]
    story, columns = make(), columns()
    with traces.scoring(story):
        block = Block(joint_of(story, columns, "rows"), columns, first=0, seed=0)
        mixture = Mixture().density(block)
        draws = mixture.sample(5000)
        rows = traces.as_rows(columns, len(draws))
        log_prior = block.joint.log_prob(rows, draws.flatten(0, 1))[0].reshape(draws.shape[:2])
        log_q = mixture.log_prob(draws, log_prior)
        # Any density g has mean g / q = 1 over draws of q: the prior, which a tenth of q bounds, and the modes.
        modes = mixture.components[2].log_prob(draws, log_prior)
    for log_g in (log_prior, modes):
        ratio = torch.exp(log_g - log_q)
        assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / math.sqrt(len(ratio))).all()


def test_no_weight_exceeds_the_likelihood_by_more_than_the_share_of_the_prior(float64):
    story = linear_gaussian(num_features=6, latent_dim=3, widened=0.3)
    x = story.model(num_observations=20).detach()
    with traces.scoring(story):
        block = Block(joint_of(story, (x,), "rows"), (x,), first=0, seed=0)
        log_weights = Mixture(prior=0.1).prepare(block).log_weights(2000)
        best = story.decoder(torch.linalg.lstsq(story.decoder.loc.weight, (x - story.decoder.loc.bias).T).solution.T)
    assert (log_weights <= best.log_prob(x) + math.log(10) + 1e-9).all()


@pytest.mark.parametrize("name", ["importance", "prior", "laplace", "mixture", "annealed"])
def test_a_proposal_for_some_observations_is_that_for_all_of_them(float64, name):
    story = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x = story.model(num_observations=20).detach()
    rows = torch.tensor([3, 4, 11])
    method = Annealed(num_temperatures=5) if name == "annealed" else METHODS[name]
    with traces.scoring(story):
        proposal = method.prepare(Block(joint_of(story, (x,), "rows"), (x,), first=0, seed=0))
        whole, part = proposal.log_weights(100), proposal.at(rows).log_weights(100)
    both = torch.stack([w.logsumexp(0) - math.log(100) for w in (whole[:, rows], part)])
    errors = torch.stack([w.exp().std(0) / w.exp().mean(0) / 10 for w in (whole[:, rows], part)])
    assert part.shape == (100, 3)
    assert ((both[0] - both[1]).abs() < 4.5 * errors.norm(dim=0)).all()


def test_the_mixtures_components_and_shares_are_as_told(float64):
    story = TwoLatents()
    block = Block(joint_of(story, (rows(4),), "rows"), (rows(4),), first=0, seed=0)
    with traces.scoring(story):
        density = Mixture(prior=0.2, guide=0.5).density(block)
    assert isinstance(density, MixtureDensity)
    assert density.weights == pytest.approx((0.2, 0.5, 0.3))


# What does not apply is refused, with a way out


class Direction(nn.Module):
    """angle ~ VonMises(0, 1), x ~ N(sin(angle), 0.5^2)."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(angle.sin(), 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("angle", dist.VonMises(x.clamp(-1, 1).asin(), 1.0))

    def log_evidence(self, x: Tensor) -> Tensor:
        angle = torch.linspace(-math.pi, math.pi, 20_001)
        log_p = dist.Normal(angle.sin(), 0.5).log_prob(x[:, None]) + dist.VonMises(0.0, 1.0).log_prob(angle)
        return torch.trapezoid(log_p.exp(), angle).log()


class Below(nn.Module):
    """z ~ Uniform(0, y), x ~ N(z, 0.5^2): the support of the latent depends on the condition y."""

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), y))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(()), y))

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.distributions.Normal(0.0, 0.5)
        return ((noise.cdf(x) - noise.cdf(x - y)) / y).log()


class Counts(nn.Module):
    """z ~ N(0, 1), count ~ Poisson(3), x ~ N(z + count, 0.5^2): a discrete latent with infinitely many values."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            count = pyro.sample("count", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(z + count, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            count = pyro.sample("count", dist.Poisson(x.clamp(min=1.0)))
            pyro.sample("z", dist.Normal((x - count) / 1.25, 0.6))

    def log_evidence(self, x: Tensor) -> Tensor:
        count = torch.arange(60.0)
        log_p = dist.Normal(count, math.sqrt(1.25)).log_prob(x[:, None]) + dist.Poisson(3.0).log_prob(count)
        return log_p.logsumexp(1)


UNUSUAL = {
    "circle": (Direction, (torch.linspace(-0.9, 0.9, 6),)),
    "row by row": (Below, (torch.linspace(0, 2, 6), torch.arange(1.0, 7.0))),
    "counts": (Counts, (torch.linspace(0, 6, 6),)),
}


@pytest.mark.parametrize("method", ["importance", "prior", "auto"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_latents_are_weighed_by_the_methods_that_draw_them(float64, name, method):
    make, columns = UNUSUAL[name]
    columns = tuple(column.double() for column in columns)
    evidence = log_evidence(make(), *columns, method=method, num_particles=4000)
    error = abs(evidence["estimate"].values - make().log_evidence(*columns).numpy())
    assert (error < 4.5 * evidence["standard_error"].values).all()


@pytest.mark.parametrize("method", ["laplace", "mixture", "annealed", "quadrature"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("circle", "Site 'angle' lives on a circle.*use 'importance'"),
        ("row by row", "The support of site 'z' differs between observations.*method='importance'"),
        ("counts", "sums out discrete latents, and these have infinitely or too many values; use 'importance'"),
    ],
)
def test_methods_that_move_through_latents_refuse_what_has_no_coordinates(name, message, method):
    make, columns = UNUSUAL[name]
    with pytest.raises(ValueError, match=message):
        log_evidence(make(), *columns, method=method)


@pytest.mark.parametrize("method", ["laplace", "mixture", "annealed", "quadrature"])
def test_methods_that_move_through_latents_refuse_discrete_stories(method):
    with pytest.raises(ValueError, match=f"method='{method}' needs a continuous latent; use 'exact'"):
        log_evidence(ThreeKinds(), torch.zeros(3), method=method)


@pytest.mark.parametrize("make", [TwoClusters, Counts, Direction])
def test_exact_refuses_what_it_cannot_enumerate(make):
    with pytest.raises(ValueError, match="method='exact' sums over discrete latents with few joint values"):
        log_evidence(make(), torch.zeros(3), method="exact")


def test_quadrature_refuses_three_dimensions():
    with pytest.raises(ValueError, match="one or two latent dimensions; this story has 3"):
        log_evidence(TwoLatents(), rows(4), method="quadrature")


def test_annealing_refuses_an_unknown_start():
    with pytest.raises(ValueError, match="starts from 'laplace' or 'prior'; found 'guide'"):
        log_evidence(small_vae(), images(2), method=Annealed(start="guide"))


# Bad input is an error that says what and where


class Plain(nn.Module):
    """z ~ N(0, I), x ~ N(z, 1), to be told wrongly."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


class Subsampled(Plain):
    def model(self, x):
        with pyro.plate("observations", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class WarmedUp(Plain):
    def model(self, x):
        with poutine.scale(scale=0.25):
            super().model(x)


class OutsideThePlate(Plain):
    def model(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("observations", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class OtherName(Plain):
    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("zed", dist.Normal(x / 2, 1.0).to_event(1))


class NothingDrawn(Plain):
    def guide(self, x):
        pass


WRONG = [
    (Subsampled, "scaled by 500"),
    (WarmedUp, r"scaled by 0\.25"),
    (OutsideThePlate, "plate"),
    (OtherName, "zed"),
    (NothingDrawn, "'z'"),
]


@pytest.mark.parametrize("method", ["importance", "mixture", "annealed", "auto"])
@pytest.mark.parametrize(("make", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_stories_told_wrongly_are_refused_by_every_method(make, message, method):
    with pytest.raises(ValueError, match=message):
        log_evidence(make(), torch.randn(8, 3), method=method)


@pytest.mark.parametrize("method", ["mixture", "auto"])
def test_zero_particles_are_refused(method):
    with pytest.raises(ValueError, match="num_particles must be at least 1; found 0"):
        log_evidence(Plain(), torch.randn(8, 3), method=method, num_particles=0)


@pytest.mark.parametrize("method", ["mixture", "auto"])
def test_rows_that_are_not_numbers_are_named(method):
    x = torch.randn(8, 3)
    x[5, 1] = math.nan
    with pytest.raises(ValueError, match="row 5"):
        log_evidence(Plain(), x, method=method)


@pytest.mark.parametrize("method", ["importance", "laplace", "mixture", "auto"])
def test_rows_whose_weights_are_not_numbers_are_named(method):
    class Degenerate(Plain):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                scale = torch.where(x[:, :1] > 100, math.nan, 1.0)
                pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    x = torch.randn(40, 3)
    x[[6, 37]] = 1000.0
    with pytest.raises(ValueError, match=r"observations \[6\]"):
        log_evidence(Degenerate(), x, method=method)


@pytest.mark.parametrize("method", ["importance", "pyro"])
def test_equal_draws_of_a_discrete_guide_are_not_taken_for_an_exact_one(float64, method):
    class NearlySure(ThreeKinds):
        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("kind", dist.Categorical(torch.tensor([1 - 2e-6, 1e-6, 1e-6])))

    x = torch.tensor([-3.0, -2.5])
    evidence = log_evidence(NearlySure(), x, method=method, num_particles=100)
    assert evidence["ess"].values == pytest.approx(100)  # the same value every time
    assert set(evidence["verdict"].values) == {"good"}
    error = abs(evidence["estimate"].values - NearlySure().log_evidence(x).numpy())
    assert (error > 1e-5).all() and (error < evidence["standard_error"].values).all()
