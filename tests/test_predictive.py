"""Predictive checks pass what the story made, and catch what it did not."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from example_stories import (
    GammaPoisson,
    TwoLatents,
    images,
    labels,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from matplotlib.figure import Figure
from torch import nn

from ppl_vae import VAE, likelihoods, networks, posteriors, priors, stories, traces
from ppl_vae.diagnostics import predictive
from ppl_vae.diagnostics.predictive import (
    coverage,
    default_statistics,
    pixel_calibration,
    predictive_check,
    ratio_and_error,
)
from ppl_vae.plots import predictive as plots


def made_by(story, num_observations=300, seed=7):
    return traces.draws(traces.prior_predictive(story, num_observations, seed=seed))["x"]


class Coins(nn.Module):
    """Two factors of five coins each, told with other logits than they were tossed with; the guide is exact."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.kinds = nn.Parameter(torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0], [1.5, 0.5, -0.5, -1.0, 0.2]]))

    def model(self, x=None, *, num_observations=1):
        with pyro.plate("observations", num_observations if x is None else len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(torch.full((), 0.5)))
            pyro.sample("x", self.likelihood(kind), obs=x)

    def likelihood(self, kind):
        return dist.Bernoulli(logits=self.factor * self.kinds[kind.long()]).to_event(1)

    def guide(self, x):
        logits = self.likelihood(torch.ones(len(x))).log_prob(x) - self.likelihood(torch.zeros(len(x))).log_prob(x)
        with pyro.plate("observations", len(x)):
            pyro.sample("kind", dist.Bernoulli(logits=logits))


def off(table, forecast, value, expected, error="standard_error"):
    """How many standard errors lie between a variable and what is expected of it."""
    one = table.sel(forecast=forecast)
    return ((one[value] - expected) / one[error]).values


# Statistics -----------------------------------------------------------------------------------------------------------

MEAN = {"mean": lambda x: x.mean(1)}


def test_prior_p_values_are_valid_for_data_from_the_story(float64):
    story = linear_gaussian(5, 2)
    p_values, ranks = [], []
    for seed in range(30):
        checked = predictive_check(
            story, made_by(story, 20, seed + 100), group="prior", statistics=MEAN, num_draws=19, seed=seed
        )
        p_values.append(checked["p_value"].sel(statistic="mean").item())
        ranks.append(checked["tail_probability"].sel(statistic="mean").item())
    assert scipy.stats.kstest(ranks, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.1) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 30)


def test_each_observation_has_its_rank_among_draws_of_the_prior(float64):
    story = linear_gaussian(5, 2)
    checked = predictive_check(story, made_by(story), group="prior", statistics=MEAN, num_draws=30)
    tail = checked["observation_tail_probability"].values[0]
    assert scipy.stats.kstest(tail, "uniform").pvalue > 0.01


@pytest.mark.parametrize("group", ["prior", "posterior"])
def test_shifted_data_are_caught(float64, group):
    story = linear_gaussian(5, 2)
    x = made_by(story)
    fine, shifted = (
        predictive_check(story, data, group=group, statistics=MEAN) for data in (x, x + torch.tensor([3.0, 0, 0, 0, 0]))
    )
    assert abs(fine["effect_size"].item()) < 4 < abs(shifted["effect_size"].item())
    assert shifted["p_value"].item() == shifted.attrs["smallest_p_value"] == pytest.approx(2 / 51)
    assert shifted["standardized_difference"].item() > 0


def test_prior_predictive_mean_and_spread_are_those_of_the_closed_form(float64):
    story = linear_gaussian(4, 2)
    checked = predictive_check(story, made_by(story, 500), group="prior", statistics=MEAN, num_draws=100)
    weight, bias = (tensor.detach().mean(0) for tensor in (story.decoder.loc.weight, story.decoder.loc.bias))
    variance = (weight.square().sum() + 0.5**2 / 4).item()
    replicated = checked["replicated"].values[0]
    assert abs(replicated.mean() - bias.item()) < 4 * np.sqrt(variance / 500 / 100)
    assert abs(replicated.var(ddof=1) / (variance / 500) - 1) < 4 * np.sqrt(2 / 99)
    middle = checked["replicated_quantile"].sel(statistic="mean", quantile=0.505).item()
    expected = bias.item() + np.sqrt(variance) * scipy.stats.norm.ppf(0.505)
    assert abs(middle - expected) < 4 * np.sqrt(np.pi / 2 * variance / 500 / 100)


def test_posterior_p_values_of_single_observations_are_conservative(float64):
    story = linear_gaussian(3, 3)
    checked = predictive_check(story, made_by(story), statistics=MEAN, num_draws=100)
    tail = checked["observation_tail_probability"].values[0]
    assert tail.std() < np.sqrt(1 / 12) - 0.05
    assert abs(tail.mean() - 0.5) < 4 * tail.std() / np.sqrt(len(tail))


def test_posterior_predictive_variance_is_that_of_the_closed_form(float64):
    story = linear_gaussian(4, 2)
    x = made_by(story, 2000)
    checked = predictive_check(story, x, statistics={"first": lambda x: x[:, 0]}, num_draws=40)
    weight = story.decoder.loc.weight.detach()
    posterior = torch.linalg.inv(weight.T @ weight / 0.5**2 + torch.eye(2))
    sd = (weight[0] @ posterior @ weight[0] + 0.5**2).sqrt().item()
    distance = (story.guide.__self__.encoder(x).mean @ weight[0] + story.decoder.loc.bias[0] - x[:, 0]).detach().numpy()
    effects = checked["observation_effect_size"].values[0]
    # Each is the distance over an sd that is estimated from 40 draws, and shifted by an average of 40.
    expected = -distance / sd
    slope = (effects * expected).sum() / (expected**2).sum()
    correction = scipy.special.gammaln(19.0) - scipy.special.gammaln(19.5) + np.log(np.sqrt(39 / 2))  # E sd / s
    assert slope == pytest.approx(np.exp(correction), abs=4 * np.sqrt((1 / 40 + 1 / 80) / (expected**2).sum()))


def test_the_wasserstein_distance_sees_a_spread_that_the_mean_does_not(float64):
    story = linear_gaussian(5, 2)
    x = made_by(story)
    middle = story.decoder.loc.bias.detach()
    narrow = predictive_check(story, middle + (x - middle) / 3, group="prior", statistics=MEAN)
    fine = predictive_check(story, x, group="prior", statistics=MEAN)
    assert narrow["wasserstein_p_value"].item() == pytest.approx(1 / 51)
    assert abs(narrow["effect_size"].item()) < 4
    # E|X - Y| of two quantile functions of the same shape: (1 - 1/3) E|X|, a 51st less, for the data are in the middle
    expected = 2 / 3 * np.sqrt(2 / np.pi) * 50 / 51
    assert narrow["wasserstein"].item() == pytest.approx(expected, abs=0.1)
    assert fine["wasserstein"].item() < 0.2


def test_a_statistic_of_the_data_set_has_no_observations(float64):
    story = linear_gaussian(5, 2)
    statistics = {"correlation": lambda x: torch.corrcoef(x[:, :2].T)[0, 1]} | MEAN
    checked = predictive_check(story, made_by(story), group="prior", statistics=statistics, num_draws=20)
    weight = story.decoder.loc.weight[:2].detach()
    covariance = weight @ weight.T + 0.25 * torch.eye(2)
    truth = (covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item()
    replicated = checked["replicated"].sel(statistic="correlation").values
    assert abs(replicated.mean() - truth) < 4 * (1 - truth**2) / np.sqrt(300 * 20)
    assert checked["value"].sel(statistic="correlation").isnull().all()
    assert not checked["value"].sel(statistic="mean").isnull().any()


def test_default_statistics_fit_the_data():
    assert list(default_statistics(images())) == ["share of ones", "total variation"]
    assert list(default_statistics(torch.randn(40))) == ["mean"]
    counts = torch.poisson(torch.full((50, 6), 1.0))
    assert {"mean", "standard deviation", "smallest", "largest", "share of zeros"} <= set(default_statistics(counts))
    grey = torch.rand(20, 1, 5, 5).clamp(max=0.8)
    assert {"share of 0.8 or more", "total variation"} <= set(default_statistics(grey))


def test_total_variation_is_the_mean_step():
    image = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).reshape(1, 1, 2, 3)
    value = default_statistics(images())["total variation"](image)
    assert value.item() == pytest.approx(3 / 4 + 1 / 3)


def test_conditions_are_respected():
    class Shifted(nn.Module):
        def model(self, x, y):
            with pyro.plate("observations", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 0.1))
                pyro.sample("x", dist.Normal(z + 10 * y, 0.1), obs=x)

        def guide(self, x, y):
            with pyro.plate("observations", len(y)):
                pyro.sample("z", dist.Normal((x - 10 * y) / 2, 0.1))

    y = torch.arange(40.0) % 3
    for group in ("prior", "posterior"):
        checked = predictive_check(Shifted(), 10 * y + 0.1 * torch.randn(40), y, group=group, num_draws=10)
        assert (abs(checked["observation_effect_size"]) < 20).all()


def test_latents_that_the_model_sums_out_are_those_of_the_observation(float64):
    """x ~ N(100 c, 1): with c from its prior, half of the replicated data would be 100 away."""

    class Far(nn.Module):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                c = pyro.sample("c", dist.Bernoulli(torch.full((), 0.5)), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(100 * c + z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Normal((x - 100 * (x > 50)) / 2, 0.5**0.5))

    x = 100 * (torch.arange(200) % 2) + 2**0.5 * torch.randn(200)
    checked = predictive_check(Far(), x, num_draws=10)
    assert (abs(checked["observation_effect_size"]) < 20).all()
    held = coverage(Far(), x, num_draws=10)
    assert abs(off(held, "draw", "coverage", held["level"])).max() < 4


def test_missing_values_do_not_count():
    story = stories.MissingValuesVAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(networks.mlp(2, 8, 5), scale=1.0),
        encoder=posteriors.DiagonalNormal(networks.mlp(10, 8, 4)),
    )
    x, mask = torch.randn(30, 5), torch.ones(30, 5, dtype=torch.bool)
    mask[:, 4] = False
    mask[0] = False
    checked = predictive_check(story, x, mask, statistics={"last": lambda x: x[:, 4], "sum": lambda x: x.sum(1)})
    assert (checked["replicated"].sel(statistic="last") == 0).all()
    assert checked["observation_effect_size"].sel(statistic="sum", observation=0).item() == 0
    held = coverage(story, x, mask, num_draws=5)
    assert held["feature_coverage"].isel(feature=4).isnull().all()
    assert not held["feature_coverage"].isel(feature=3).isnull().any()


def test_a_mask_around_the_site_leaves_rows_out(float64):
    class Masked(nn.Module):
        def model(self, x, mask):
            with pyro.plate("observations", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                with pyro.poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 3]).to_event(1), obs=x)

        def guide(self, x, mask):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Normal(x.sum(-1) / 4, 0.5))

    mask = torch.arange(300) % 2 == 0
    x = torch.randn(300, 1) + torch.randn(300, 3)
    x[~mask] = 50.0
    held = coverage(Masked(), x, mask, num_draws=10)
    assert abs(off(held, "draw", "coverage", held["level"])).max() < 4
    checked = predictive_check(Masked(), x, mask, num_draws=10, statistics=MEAN)
    assert (checked["observation_effect_size"].values[0][~mask.numpy()] == 0).all()


# Binary pixels --------------------------------------------------------------------------------------------------------


def test_single_draws_are_calibrated_for_data_from_the_story(float64):
    story = Coins()
    table = pixel_calibration(story, made_by(story, 2000), num_draws=10)
    assert np.nanmax(abs(off(table, "draw", "gap", 0))) < 4
    assert table.attrs["expected_calibration_error"] < 2.5 * table.attrs["noise_floor"]


def test_doubled_logits_are_caught(float64):
    x = made_by(Coins(), 2000)
    table = pixel_calibration(Coins(factor=2.0), x, num_draws=10)
    assert table.attrs["expected_calibration_error"] > 5 * table.attrs["noise_floor"]
    sure = table.sel(forecast="draw").dropna("bin")
    assert (sure["gap"].isel(bin=0) > 0) and (sure["gap"].isel(bin=-1) < 0)  # too sure at both ends


def test_the_mean_over_latents_is_too_timid_though_the_story_is_true(float64):
    """z says which of two coins it is, and x = 1 makes it the one with p = 0.9: where 0.9 * 0.9 + 0.1 * 0.1 = 0.82 is
    predicted, all are ones."""

    class OneCoin(nn.Module):
        def model(self, x=None, *, num_observations=1):
            with pyro.plate("observations", num_observations if x is None else len(x)):
                kind = pyro.sample("kind", dist.Bernoulli(torch.full((), 0.5)))
                pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * kind), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("kind", dist.Bernoulli(0.1 + 0.8 * x))

    table = pixel_calibration(OneCoin(), made_by(OneCoin(), 1000), num_draws=200, num_bins=2)
    upper = table.sel(forecast="mean").isel(bin=1)
    assert upper["observed"].item() == 1
    assert upper["predicted"].item() == pytest.approx(0.82, abs=4 * 0.8 * 0.3 / np.sqrt(200 * 480))
    assert abs(off(table, "draw", "gap", 0)).max() < 4


def test_errors_of_frequencies_allow_for_pixels_that_hang_together():
    """Ten copies of one coin are one coin: the error is that of N coins, not of 10 N."""

    class Copies(Coins):
        def likelihood(self, kind):
            return dist.Bernoulli(logits=torch.zeros(*kind.shape, 10)).to_event(1)

    x = (torch.arange(400) % 2).float()[:, None].expand(400, 10)
    table = pixel_calibration(Copies(), x, num_draws=2)
    error = np.nanmax(table["standard_error"].values)
    assert error == pytest.approx(0.5 / np.sqrt(399), rel=1e-6)


def test_counts_out_of_many_are_calibrated(float64):
    class Binomials(nn.Module):
        def model(self, x=None, *, num_observations=1):
            with pyro.plate("observations", num_observations if x is None else len(x)):
                z = pyro.sample("z", dist.Beta(torch.full((), 2.0), 2.0))
                pyro.sample("x", dist.Binomial(6, z), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Beta(2 + x, 2 + 6 - x))

    table = pixel_calibration(Binomials(), made_by(Binomials(), 2000), num_draws=10)
    assert np.nanmax(abs(off(table, "draw", "gap", 0))) < 4
    assert table["weight"].sum("bin").values == pytest.approx(1)


def test_calibration_takes_the_binary_columns_of_a_table():
    story = VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.ByColumn(
            likelihoods.Bernoulli(networks.mlp(2, 3)), likelihoods.Normal(networks.mlp(2, 2), scale=1.0)
        ),
        encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    )
    x = torch.cat([torch.ones(20, 3), 50 + torch.randn(20, 2)], dim=1)
    table = pixel_calibration(story, x, num_draws=3)
    filled = table.sel(forecast="draw").dropna("bin")
    assert (filled["observed"] == 1).all()
    assert coverage(story, x, num_draws=3).attrs["num_features"] == 5


def test_numbers_have_no_probability_of_a_one(float64):
    with pytest.raises(ValueError, match=r"is a Normal, which has no probability of a one\. Use coverage"):
        pixel_calibration(linear_gaussian(3, 1), torch.randn(5, 3))


# Coverage -------------------------------------------------------------------------------------------------------------


def test_prior_predictive_intervals_hold_what_they_say(float64):
    story = linear_gaussian(5, 2)
    held = coverage(story, made_by(story, 1500), group="prior", num_draws=9)
    assert abs(off(held, "mixture", "coverage", held["level"])).max() < 4
    assert abs(off(held, "mixture", "pit_density", 1, "pit_error")).max() < 4.5
    assert held.attrs["num_features_off"] == 0


def test_single_draws_of_an_exact_guide_hold_what_they_say(float64):
    story = linear_gaussian(5, 2)
    held = coverage(story, made_by(story, 1500), num_draws=20)
    assert abs(off(held, "draw", "coverage", held["level"])).max() < 4
    assert held.attrs["calibration_error"] < 3 * held.attrs["noise_floor"]


def test_the_mixture_covers_what_the_closed_form_says(float64):
    """x ~ N(0, w^2 + s^2), predicted by N(b x, b s^2 + s^2) with b = w^2 / (w^2 + s^2) once z was guessed from x."""
    story = linear_gaussian(1, 1, scale=2.0)
    held = coverage(story, made_by(story, 1000), num_draws=150, levels=[0.5, 0.8, 0.9])
    variance, noise = story.decoder.loc.weight.item() ** 2, 2.0**2
    b = variance / (variance + noise)
    spread = (1 - b) * np.sqrt(variance + noise) / np.sqrt((1 + b) * noise)  # sd of x - b x in predictive sds
    expected = 2 * scipy.stats.norm.cdf(scipy.stats.norm.ppf(0.5 + held["level"].values / 2) / spread) - 1
    assert abs(off(held, "mixture", "coverage", expected)).max() < 4
    assert (held["coverage"].sel(forecast="mixture") > held["level"] + 0.02).all()


@pytest.mark.parametrize(("factor", "sign"), [(0.5, -1), (2.0, 1)])
def test_a_scale_that_is_wrong_by_two_is_caught(float64, factor, sign):
    story = linear_gaussian(5, 2)
    x = made_by(story, 400)
    story.decoder.scale.value *= factor
    held = coverage(story, x, num_draws=10)
    assert sign * held.attrs["mean_deviation"] > 0.05
    assert held.attrs["calibration_error"] > 5 * held.attrs["noise_floor"]
    assert held["p_value"].sel(forecast="draw").min() < 1e-6


def test_a_guide_that_is_wrong_is_caught_though_the_story_is_true(float64):
    story = linear_gaussian(5, 2, widened=3.0)
    held = coverage(story, made_by(story, 400), num_draws=10)
    assert held.attrs["calibration_error"] > 5 * held.attrs["noise_floor"]


def test_the_feature_that_is_off_is_named(float64):
    story = linear_gaussian(12, 2)
    x = made_by(story, 400)
    x[:, 7] *= 3
    held = coverage(story, x, group="prior", num_draws=20)
    assert (held.attrs["worst_features"][0], held.attrs["num_features_off"]) == (7, 1)
    assert held.attrs["worst_coverage"][0] < 0.8


LIKELIHOODS = {
    "Normal": lambda f: likelihoods.Normal(f, scale=0.3),
    "Laplace": lambda f: likelihoods.Laplace(f, scale=0.3),
    "StudentT": lambda f: likelihoods.StudentT(f, scale=0.3, df=3.0),
    "LogNormal": lambda f: likelihoods.LogNormal(f, scale=0.3),
    "ContinuousBernoulli": likelihoods.ContinuousBernoulli,
    "Beta": lambda f: likelihoods.Beta(f, scale=0.2),
    "DiscretizedLogistic": lambda f: likelihoods.DiscretizedLogistic(f, scale=0.05, levels=16),
    "Poisson": likelihoods.Poisson,
    "NegativeBinomial": lambda f: likelihoods.NegativeBinomial(f, dispersion=0.5),
    "ZeroInflatedPoisson": lambda f: likelihoods.ZeroInflatedPoisson(f, gate=0.3),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_pits_are_uniform_for_every_likelihood_of_numbers(float64, name):
    """Given z the PIT of x ~ p(x | z) is uniform: here the guide is the prior, and p(x | z) does not depend on z."""
    network = nn.Sequential(nn.Linear(2, 3))
    nn.init.zeros_(network[0].weight)
    story = VAE(priors.StandardNormal(2), LIKELIHOODS[name](network), posteriors.DiagonalNormal(networks.mlp(3, 4)))
    held = coverage(story, made_by(story, 500), num_draws=2)
    for forecast in ("draw", "mixture"):
        assert abs(off(held, forecast, "coverage", held["level"])).max() < 4
        assert abs(off(held, forecast, "pit_density", 1, "pit_error")).max() < 4.5


@pytest.mark.parametrize(
    ("story", "columns", "message"),
    [
        (small_vae, lambda: (images(),), "is binary, and has no intervals to speak of. Use pixel_calibration"),
        (
            lambda: VAE(
                priors.StandardNormal(2),
                likelihoods.Categorical(networks.mlp(2, (3, 4))),
                posteriors.DiagonalNormal(networks.mlp(3, 4)),
            ),
            lambda: (torch.zeros(5, 3),),
            "is a class",
        ),
    ],
)
def test_what_has_no_intervals_is_refused(story, columns, message):
    with pytest.raises(ValueError, match=message):
        coverage(story(), *columns())


# All of them ----------------------------------------------------------------------------------------------------------


def test_the_ratio_of_sums_is_that_of_scipy_for_equal_denominators():
    values = np.random.default_rng(0).normal(size=(50, 3))
    ratio, error = ratio_and_error(values, np.ones((50, 1)))
    np.testing.assert_allclose(ratio, values.mean(0))
    np.testing.assert_allclose(error, scipy.stats.sem(values))


CASES = {
    "prior": lambda: predictive_check(TwoLatents(), rows(), group="prior", statistics=MEAN, num_draws=3),
    "posterior": lambda: predictive_check(small_vae(), images(), num_draws=3),
    "conditional": lambda: predictive_check(small_conditional(), images(), labels(), group="prior", num_draws=3),
    "data set": lambda: predictive_check(TwoLatents(), rows(), statistics={"all": lambda x: x.mean()}, num_draws=3),
    "pixels": lambda: pixel_calibration(small_conditional(), images(), labels(), num_draws=3),
    "coverage": lambda: coverage(TwoLatents(), rows(), num_draws=3),
    "numbers": lambda: coverage(GammaPoisson(), torch.arange(8.0), num_draws=3),
    "whole numbers": lambda: coverage(GammaPoisson(), torch.arange(8), num_draws=3),
    "prior coverage": lambda: coverage(GammaPoisson(), torch.arange(8.0), group="prior", num_draws=3),
}
DRAWN = {"pixels": plots.pixel_calibration, "coverage": plots.coverage, "numbers": plots.coverage}
DRAWN |= {"prior coverage": plots.coverage, "whole numbers": plots.coverage}


@pytest.mark.parametrize("case", CASES)
def test_tables_are_kept_and_drawn(case, tmp_path):
    table = CASES[case]()
    table.to_netcdf(tmp_path / "table.nc", engine="h5netcdf")
    figure = DRAWN.get(case, plots.predictive_check)(table)
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")
    assert all(axes.get_xlabel() for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>")


@pytest.mark.parametrize("diagnostic", [predictive_check, coverage])
@pytest.mark.parametrize("group", ["prior", "posterior"])
def test_the_noise_is_a_function_of_the_seed(diagnostic, group):
    story, x = TwoLatents(), rows()
    first = diagnostic(story, x, group=group, num_draws=3, seed=4)
    torch.rand(3)
    assert diagnostic(story, x, group=group, num_draws=3, seed=4).equals(first)
    assert not diagnostic(story, x, group=group, num_draws=3, seed=5).equals(first)


def test_the_first_observations_do_not_depend_on_those_that_follow(monkeypatch):
    monkeypatch.setattr(predictive, "ROWS_AT_ONCE", 10)
    story, x = TwoLatents(), rows(30)
    some, all_of_them = (predictive_check(story, data, num_draws=3, statistics=MEAN) for data in (x[:10], x))
    np.testing.assert_array_equal(
        some["observation_effect_size"], all_of_them["observation_effect_size"].isel(observation=slice(10))
    )


def test_generators_and_modes_are_left_alone():
    story = small_vae()
    state = torch.get_rng_state()
    for diagnostic in (predictive_check, pixel_calibration):
        diagnostic(story, images(), num_draws=2)
    assert torch.equal(state, torch.get_rng_state())
    assert story.training


def test_images_of_numbers_are_covered_pixel_by_pixel():
    story = VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(networks.mlp(2, (1, 6, 5)), scale=1.0),
        encoder=posteriors.DiagonalNormal(networks.mlp((1, 6, 5), 4)),
    )
    held = coverage(story, torch.randn(20, 1, 6, 5), num_draws=2)
    image = plots.coverage(held).axes[2].images[0].get_array()
    expected = held["feature_coverage"].sel(level=0.9).values.reshape(6, 5)
    np.testing.assert_allclose(image, expected)


@pytest.mark.parametrize("diagnostic", [predictive_check, pixel_calibration, coverage])
def test_no_columns_at_all_are_refused(diagnostic):
    with pytest.raises(ValueError, match="at least one column of data"):
        diagnostic(small_vae())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: predictive_check(TwoLatents(), x, group="data"), "group must be 'posterior' or 'prior'"),
        (lambda x: predictive_check(TwoLatents(), x, num_draws=1), "num_draws must be at least 2"),
        (lambda x: predictive_check(TwoLatents(), x, site="y"), "scores no site 'y'; it scores 'x'"),
        (lambda x: predictive_check(TwoLatents(), x, statistics={"all": lambda x: x}), "expected one number for each"),
        (lambda x: predictive_check(TwoLatents(), x, statistics={"log": lambda x: x.sum().log() * 0 + torch.nan}),
         "'log' is nan"),
        (lambda x: coverage(TwoLatents(), x, levels=[0.5, 1.0]), "levels lie between 0 and 1"),
        (lambda x: coverage(TwoLatents(), x, group="data"), "group must be"),
        (lambda x: coverage(TwoLatents(), x[:1]), "at least 2 observations"),
        (lambda x: pixel_calibration(TwoLatents(), x, num_bins=0), "num_bins must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows())
