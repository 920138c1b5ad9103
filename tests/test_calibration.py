"""Calibration passes an exact guide, as often as it says, and catches each wrong one by what is known to catch it."""

import importlib
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from example_stories import Fragile, GammaPoisson, ShiftedNormal, ThreeKinds, TwoClusters, TwoLatents, linear_gaussian
from matplotlib.colors import to_rgba
from scipy import stats
from torch import nn

from ppl_vae import VAE, likelihoods, posteriors, priors
from ppl_vae.diagnostics.calibration import (
    DISTANCE,
    JOINT,
    LIKELIHOOD,
    calibration,
    most_similar,
    rank_counts,
    simultaneous_band,
    uniformity_p_value,
)
from ppl_vae.plots.calibration import calibration as draw

OF_DATA = [LIKELIHOOD, JOINT, DISTANCE]


class Shifted(nn.Module):
    """A guide moved by so many of its own standard deviations in every coordinate."""

    def __init__(self, exact: nn.Module, by: float) -> None:
        super().__init__()
        self.exact, self.by = exact, by

    def forward(self, x):
        q = self.exact(x)
        return dist.MultivariateNormal(q.mean + self.by * q.variance.sqrt(), q.covariance_matrix)


class Blind(nn.Module):
    """The prior as a guide."""

    def forward(self, x):
        return dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)


class ExactShifted(ShiftedNormal):
    """The same story with its posterior, times a factor in width."""

    width = 1.0

    def guide(self, x, y):
        with pyro.plate("observations", len(y)):
            pyro.sample("z", dist.Normal((x - y) / 1.25, self.width * 0.2**0.5))


class ExactKinds(ThreeKinds):
    """The same story with its posterior."""

    def guide(self, x):
        logits = torch.tensor(self.probs).log() - (x[..., None] - torch.arange(3)) ** 2 / (2 * 0.8**2)
        with pyro.plate("observations", len(x)):
            pyro.sample("kind", dist.Categorical(logits=logits))


class ExactGamma(GammaPoisson):
    """The same story with its posterior."""

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 1.5))


def blind_story():
    story = linear_gaussian(6, 2)
    story.encoder = Blind()
    return story


def verdicts(ranks):
    return dict(zip(ranks["quantity"].values.tolist(), ranks["verdict"].values.tolist(), strict=True))


# Known guides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_guide_makes_ranks_uniform_and_coverage_diagonal(dtype):
    torch.set_default_dtype(dtype)
    ranks = calibration(linear_gaussian(6, 2), num_observations=500)
    assert set(verdicts(ranks).values()) == {"passes"}
    assert ranks.attrs["num_failed"] == 0 and ranks.attrs["coverage_verdict"] == "passes"
    assert (ranks["coverage"] >= ranks["coverage_lower"]).all() and (ranks["coverage"] <= ranks["coverage_upper"]).all()
    for effect, truth in (("shift", 0.0), ("width_ratio", 1.0)):
        assert (abs(ranks[effect] - truth) < 4 * ranks[f"{effect}_error"]).all()


def test_a_narrow_guide_is_caught_by_every_coordinate_and_measured():
    ranks = calibration(linear_gaussian(6, 2, widened=0.7))
    assert set(verdicts(ranks).values()) == {"fails"}
    latent = ranks.sel(quantity=["z[0]", "z[1]"])
    assert (abs(latent["width_ratio"] - 1 / 0.7) < 4 * latent["width_ratio_error"]).all()
    assert (abs(latent["shift"]) < 4 * latent["shift_error"]).all()
    coverage = ranks["coverage"].sel(credibility=slice(0.5, 0.9))
    assert (
        coverage < ranks["coverage_lower"].sel(credibility=slice(0.5, 0.9))
    ).all()  # a narrow guide covers too little
    assert 1.2 < ranks.attrs["smallest_width_ratio"] <= ranks.attrs["largest_width_ratio"] < 1.7


def test_a_wide_guide_covers_too_much():
    ranks = calibration(linear_gaussian(6, 2, widened=1.5))
    middle = ranks.sel(credibility=slice(0.3, 0.7))
    assert (middle["coverage"] > middle["coverage_upper"]).all()
    assert ranks.attrs["largest_width_ratio"] < 0.75


def test_a_shift_of_half_a_standard_deviation_is_caught_by_every_coordinate_and_measured():
    story = linear_gaussian(6, 2)
    story.encoder = Shifted(story.encoder, 0.5)
    ranks = calibration(story)
    latent = ranks.sel(quantity=["z[0]", "z[1]"])
    assert (latent["verdict"] == "fails").all()
    assert (abs(latent["shift"] + 0.5) < 4 * latent["shift_error"]).all()
    assert (abs(latent["width_ratio"] - 1) < 4 * latent["width_ratio_error"]).all()
    assert ranks.attrs["largest_shift"] < -0.4


def test_the_prior_as_guide_passes_by_coordinate_and_fails_by_all_that_depends_on_data():
    ranks = calibration(blind_story())
    assert {name: v == "fails" for name, v in verdicts(ranks).items()} == {
        "z[0]": False,
        "z[1]": False,
        **dict.fromkeys(OF_DATA, True),
    }
    assert ranks.attrs["num_failed"] == 3 and ranks.attrs["coverage_verdict"] == "fails"


def test_the_prior_as_guide_covers_as_it_should_around_references_that_ignore_the_data(monkeypatch):
    """Negative control: why the reference has to depend on x."""
    module = importlib.import_module("ppl_vae.diagnostics.calibration")
    monkeypatch.setattr(module, "most_similar", lambda columns, others, latents: latents)
    ranks = calibration(blind_story())
    assert verdicts(ranks)[DISTANCE] == "passes"


def test_a_reference_is_the_latent_behind_the_most_similar_observation():
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    order = torch.randperm(20)
    found = most_similar((x + 1e-3, y), (x[order], y[order]), {"z": torch.arange(20)[order]})
    assert found["z"].tolist() == list(range(20))


# Other stories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "fails"), [(1.0, False), (0.7, True)])
def test_conditions_come_from_the_columns(width, fails):
    story = ExactShifted()
    story.width = width
    ranks = calibration(story, torch.zeros(30), torch.arange(30.0) % 7)
    assert (verdicts(ranks)["z"] == "fails") is fails
    latent = ranks.sel(quantity="z")
    assert abs(latent["width_ratio"] - 1 / width) < 4 * latent["width_ratio_error"]


def test_a_latent_above_zero_is_measured_in_unconstrained_coordinates():
    assert calibration(ExactGamma(), torch.zeros(5)).attrs["num_failed"] == 0
    ranks = calibration(GammaPoisson(), torch.zeros(5))
    assert verdicts(ranks)["rate"] == "fails"
    assert ranks.attrs["largest_width_ratio"] < 0.9  # 0.6 times the parameters is a wider posterior


def test_discrete_latents_and_their_ties_are_ranked():
    exact = calibration(ExactKinds(), torch.zeros(5))
    assert exact["quantity"].values.tolist() == ["kind", *OF_DATA]
    assert exact.attrs["num_failed"] == 0
    assert np.isnan(exact["shift"].sel(quantity="kind"))
    assert calibration(ThreeKinds(), torch.zeros(5)).attrs["num_failed"] > 0


def test_a_site_that_the_model_sums_out_has_no_rank():
    ranks = calibration(TwoClusters(), torch.zeros(5), num_observations=50, num_draws=15)
    assert ranks["quantity"].values.tolist() == ["z", *OF_DATA]


def test_several_sites_are_named_by_site_and_place():
    ranks = calibration(TwoLatents(), num_observations=20, num_draws=15)
    assert ranks["quantity"].values.tolist() == ["factors[0]", "factors[1]", "size", *OF_DATA]


def test_many_coordinates_are_thinned_evenly():
    ranks = calibration(linear_gaussian(12, 9), num_observations=20, num_draws=15, max_coordinates=3)
    assert ranks["quantity"].values.tolist() == ["z[0]", "z[4]", "z[8]", *OF_DATA]
    assert ranks.attrs["num_coordinates"] == 9


# Bands and p-values ---------------------------------------------------------------------------------------------------


def smallest_tail(rank, num_draws):
    """By the definition: the smaller binomial tail, at the rank where it is smallest."""
    tails = []
    for value in range(1, num_draws + 1):
        below = sum(r < value for r in rank)
        binomial = stats.binom(len(rank), value / (num_draws + 1))
        tails += [binomial.cdf(below), binomial.sf(below - 1)]
    return min(tails)


def test_the_p_value_is_the_share_of_all_ranks_that_are_as_surprising():
    num_observations, num_draws = 4, 3
    everything = list(itertools.product(range(num_draws + 1), repeat=num_observations))
    surprise = np.array([smallest_tail(rank, num_draws) for rank in everything])
    for number in range(0, len(everything), 11):
        share = (surprise <= surprise[number] * (1 + 1e-9)).mean()
        assert uniformity_p_value(everything[number], num_draws) == pytest.approx(share, abs=1e-12)


def test_so_many_uniform_ranks_leave_the_band_as_it_promises():
    generator, error, repeats = np.random.default_rng(0), 0.1, 4000
    lower, upper = simultaneous_band(200, 31, error)
    counts = rank_counts(generator.integers(0, 32, size=(200, repeats)), 31).T
    share = ((counts < lower) | (counts > upper)).any(1).mean()
    spread = (error * (1 - error) / repeats) ** 0.5
    assert error - 0.02 - 4 * spread < share < error + 4 * spread  # whole counts make it a little less


def test_ranks_leave_the_band_where_their_p_value_is_no_more_than_its_error():
    generator, error = np.random.default_rng(1), 0.2
    lower, upper = simultaneous_band(100, 15, error)
    left = []
    for rank in generator.integers(0, 16, size=(300, 100)):
        counts = rank_counts(rank, 15)
        left.append(bool(((counts < lower) | (counts > upper)).any()))
        assert left[-1] is (uniformity_p_value(rank, 15) <= error)
    assert 30 < sum(left) < 90


def test_hopeless_ranks_have_a_p_value_of_nothing():
    assert uniformity_p_value(np.zeros(1000, int), 127) < 1e-100


@pytest.mark.slow
def test_an_exact_guide_fails_as_often_as_the_family_wise_error_says():
    """Bonferroni: no more often than stated in all; each quantity as often as its share."""
    repeats, stated = 300, 0.3
    story = linear_gaussian(4, 2)
    runs = [
        calibration(story, num_observations=100, num_draws=31, family_wise_error=stated, seed=seed)
        for seed in range(repeats)
    ]
    failed = sum(run.attrs["num_failed"] > 0 for run in runs)
    assert stats.binomtest(failed, repeats, stated, alternative="greater").pvalue > 1e-3
    assert failed > 0.4 * stated * repeats  # the quantities are dependent; were the bands too wide, none would fail
    each = np.sum([run["verdict"].values == "fails" for run in runs], axis=0)
    for count in each:
        assert stats.binomtest(int(count), repeats, stated / 5, alternative="greater").pvalue > 1e-3
    p_values = np.concatenate([run["p_value"].values[:1] for run in runs])
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


# What is left, and what is refused ------------------------------------------------------------------------------------


def test_ranks_follow_the_seed_and_leave_the_generator_alone():
    story = TwoLatents()
    before = torch.get_rng_state()
    first, again, other = (calibration(story, num_observations=40, num_draws=9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first.identical(again)
    assert not first["rank"].equals(other["rank"])


def test_a_dataset_comes_back_from_its_file(tmp_path):
    ranks = calibration(TwoLatents(), num_observations=20, num_draws=9)
    ranks.to_netcdf(tmp_path / "ranks.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "ranks.nc", engine="h5netcdf") as read:
        xr.testing.assert_equal(read.load(), ranks)
        assert {name: value for name, value in read.attrs.items()} == ranks.attrs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_observations": 1}, "num_observations must be at least 2"),
        ({"num_draws": 3}, "num_draws must be at least 7"),
        ({"max_coordinates": 0}, "max_coordinates must be at least 1"),
        ({"family_wise_error": 1.0}, "family_wise_error must lie between 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibration(TwoLatents(), **arguments)


def test_a_guide_without_latents_has_nothing_to_calibrate():
    class SummedOut(ThreeKinds):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                kind = pyro.sample("kind", dist.Categorical(torch.tensor(self.probs)), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(kind.to(x), 0.8), obs=x)

        def guide(self, x):
            pass

    with pytest.raises(ValueError, match="sums out every latent"):
        calibration(SummedOut(), torch.zeros(5))


def test_a_latent_on_a_circle_is_refused():
    class Circle(nn.Module):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
                pyro.sample("x", dist.Normal(angle.cos(), 0.5), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("angle", dist.VonMises(x, 1.0))

    with pytest.raises(ValueError, match="lives on a circle"):
        calibration(Circle(), torch.zeros(5))


def test_an_observation_with_a_degenerate_guide_is_named():
    class Degenerate(Fragile):
        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Normal(torch.where(x > 2.5, torch.nan, x + self.guess), 1.0))

    with pytest.raises(ValueError, match=r"z is NaN for the simulated observation \d+\."):
        calibration(Degenerate(), torch.zeros(5), num_observations=200, num_draws=9)


# The picture ----------------------------------------------------------------------------------------------------------


def test_the_picture_holds_bands_lines_and_effects():
    ranks = calibration(linear_gaussian(6, 2, widened=0.6), num_observations=300, num_draws=31)
    left, middle, right = draw(ranks).axes
    assert left.get_title() == f"ranks: {ranks.attrs['num_failed']} of 5 quantities fail"
    red = [line for line in left.lines if to_rgba(line.get_color()) == to_rgba("tab:red")]
    assert len(red) == 2
    np.testing.assert_allclose(red[0].get_ydata(), ranks["ecdf_difference"].sel(quantity="z[0]"))
    coverage = middle.lines[1]
    np.testing.assert_allclose(coverage.get_xydata(), np.stack([ranks["credibility"], ranks["coverage"]], 1))
    points = next(line for line in right.lines if line.get_label() == "fails")
    np.testing.assert_allclose(points.get_xydata(), ranks[["shift", "width_ratio"]].to_array().T[:2])


def test_a_story_without_continuous_latents_is_drawn():
    ranks = calibration(ExactKinds(), torch.zeros(5), num_observations=50, num_draws=15)
    assert draw(ranks).axes[0].get_title() == "ranks: 0 of 4 quantities fail"


def test_a_vae_with_a_learned_prior_is_calibrated_by_its_own_prior():
    story = VAE(
        prior=priors.MixtureOfNormals(2, components=3),
        decoder=likelihoods.Bernoulli(nn.Linear(2, 4)),
        encoder=posteriors.DiagonalNormal(nn.Linear(4, 4)),
    )
    assert calibration(story, num_observations=20, num_draws=9).attrs["num_quantities"] == 5
