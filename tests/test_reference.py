"""The reference posterior has the moments of the posterior, and says where it cannot be trusted."""

import math
from functools import cache

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
import xarray as xr
from example_stories import (
    ORACLES,
    ExactPosterior,
    GammaPoisson,
    ShiftedNormal,
    SquaredNormal,
    ThreeKinds,
    TwoClusters,
    TwoLatents,
    images,
    linear_gaussian,
    rows,
    small_vae,
)
from matplotlib.figure import Figure
from torch import nn

from ppl_vae.diagnostics.reference import (
    StepSizes,
    against_guide,
    by_coordinate,
    guide_draws,
    latent_names,
    nuts,
    reference_posterior,
    with_convergence,
)
from ppl_vae.plots import reference as plots

QUICK = {"num_draws": 150, "num_warmup": 60, "progress": False}


@cache
def bimodal():
    """Two observations whose posteriors have one mode and two, and their reference."""
    x = torch.tensor([0.0, 4.0])
    return x, reference_posterior(SquaredNormal(), x, **QUICK)


@cache
def counts():
    """Counts of a gamma rate, and their reference."""
    x = torch.arange(8.0)
    return x, reference_posterior(GammaPoisson(), x, **QUICK)


@cache
def two_latents():
    """A story with two latents, and a short reference of it."""
    story, x = TwoLatents(), rows(6)
    return story, x, reference_posterior(story, x, num_draws=40, num_warmup=20, progress=False)


def errors_of_moments(draws, mean, sd, ess):
    """Deviations of means and standard deviations, in Monte Carlo standard errors of normal draws."""
    pooled = draws.reshape(-1, *draws.shape[2:])
    of_mean = (pooled.mean(0) - mean) / sd * np.sqrt(ess)
    of_sd = (pooled.std(0) / sd - 1) * np.sqrt(2 * ess)
    return of_mean, of_sd


def linear_moments(story, x):
    posterior = ExactPosterior(story.decoder)(x)
    return posterior.mean.detach().numpy(), posterior.variance.sqrt().detach().numpy()


# Moments


def test_moments_are_those_of_the_linear_gaussian_posterior(float64):
    story = linear_gaussian(num_features=6, latent_dim=2, widened=1.4)
    x = story.model(num_observations=20).detach()
    reference = reference_posterior(story, x, **QUICK)
    of_mean, of_sd = errors_of_moments(reference["z"].values, *linear_moments(story, x), reference["ess_bulk"].values)
    assert abs(of_mean).max() < 5 and abs(of_sd).max() < 5
    assert 0.6 < of_mean.std() < 1.4  # the errors are as large as they say, not only small


@pytest.mark.slow
def test_a_hundred_observations_in_one_run_reach_every_threshold(float64):
    story = linear_gaussian(num_features=10, latent_dim=3, widened=1.4)
    x = story.model(num_observations=100).detach()
    reference = reference_posterior(story, x, num_chains=4, num_draws=2000, progress=False)
    of_mean, of_sd = errors_of_moments(reference["z"].values, *linear_moments(story, x), reference["ess_bulk"].values)
    assert abs(of_mean).max() < 5 and abs(of_sd).max() < 5
    assert reference["rhat"].max() < 1.01
    assert reference["ess_bulk"].min() > 400 and reference["ess_tail"].min() > 400
    assert reference.attrs["share_converged"] == 1


def test_draws_of_a_positive_latent_are_those_of_a_gamma(float64):
    x, reference = counts()
    shape = 2 + x.numpy()
    moments = shape / 1.5, np.sqrt(shape) / 1.5
    of_mean, _ = errors_of_moments(reference["rate"].values, *moments, reference["ess_bulk"].values[:, 0])
    assert abs(of_mean).max() < 5
    assert (reference["rate"] > 0).all()
    for n in range(8):  # draws one autocorrelation apart, so that they count as independent
        apart = reference["rate"].values[:, ::3, n].ravel()
        assert scipy.stats.kstest(apart, scipy.stats.gamma(shape[n], scale=1 / 1.5).cdf).pvalue > 1e-4


def grid_moments(story, x):
    """Means and standard deviations of two latents under N(0, I) times a Bernoulli likelihood, on a grid."""
    line = torch.linspace(-6, 6, 301)
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        log_p = -z.square().sum(1) / 2 + torch.stack([story.decoder(z).log_prob(one) for one in x])
    weights = log_p.softmax(1)
    mean = weights @ z
    return mean.numpy(), (weights @ z.square() - mean**2).sqrt().numpy()


def test_moments_of_a_bernoulli_story_are_those_of_a_grid(float64):
    story, x = small_vae(), images(12)
    with torch.no_grad():
        for parameter in story.decoder.parameters():
            parameter.mul_(3)  # posteriors that differ from the prior
    reference = reference_posterior(story, x, **QUICK)
    mean, sd = grid_moments(story, x)
    assert sd.min() < 0.7
    of_mean, _ = errors_of_moments(reference["z"].values, mean, sd, reference["ess_bulk"].values)
    assert abs(of_mean).max() < 5


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hierarchical", "log-normal", "conditional")),
        "dirichlet",
        "summed out",
    ],
)
def test_importance_sampling_agrees_with_the_reference(float64, name):
    make, columns, _ = ORACLES[name]
    story, columns = make(), columns()
    reference = reference_posterior(story, *columns, **QUICK)
    for latent in latent_names(reference):
        mean, error = prior_weighted_mean(story, columns, latent)
        draws = reference[latent].values.reshape(-1, *mean.shape)
        smallest = reference["ess_bulk"].values.min(1).reshape(-1, *(1 for _ in mean.shape[1:]))
        total = np.hypot(error, draws.std(0) / np.sqrt(smallest))
        assert (abs(draws.mean(0) - mean) < 5 * total).all()


def prior_weighted_mean(story, columns, latent, num_draws=20_000):
    """Posterior means and their errors, by weighing draws of the prior: no gradients, no chains, no transforms."""
    means, errors = [], []
    for n in range(len(columns[0])):
        repeated = tuple(column[n : n + 1].expand(num_draws, *column.shape[1:]) for column in columns)
        with torch.no_grad():
            trace = pyro.poutine.trace(story.model).get_trace(*repeated)
        trace.compute_log_prob()
        weights = trace.nodes["x"]["log_prob"].softmax(0)
        value = trace.nodes[latent]["value"]
        weights = weights.reshape(-1, *(1 for _ in value.shape[1:]))
        mean = (weights * value).sum(0)
        means.append(mean.numpy())
        errors.append((weights * (value - mean)).square().sum(0).sqrt().numpy())
    return np.stack(means), np.stack(errors)


# What is not to be trusted


def test_chains_in_different_modes_are_flagged(float64):
    _, reference = bimodal()
    signs = np.sign(reference["z"].values[:, :, 1]).mean(1)
    assert set(signs) == {-1.0, 1.0}  # both modes were found, and no chain went from one to the other
    assert reference["rhat"].values[1] > 1.5
    assert reference["converged"].values[1] == 0
    assert reference["rhat"].values[0] < 1.05


def test_converged_asks_for_all_three(float64):
    draws = np.random.default_rng(0).normal(size=(4, 90, 4, 1))
    draws[0, :, 1] += 3  # a chain elsewhere
    draws[:, :, 2] = draws[:, ::10, 2].repeat(10, axis=1)  # chains that move at every tenth step
    many = np.random.default_rng(1).normal(size=(4, 90, 4, 1))
    draws = np.concatenate([draws, np.where(np.arange(4)[:, None] == 3, many, draws)], axis=1)
    table = xr.Dataset(
        {"z": (("chain", "draw", "observation", "z_dim_0"), draws), "divergences": ("chain", [0, 0, 1, 2])}
    )
    table = with_convergence(table)
    assert table["converged"].values.tolist() == [1, 0, 0, 1]
    assert table.attrs["num_divergences"] == 3
    assert table.attrs["share_converged"] == 0.5


def test_convergence_is_what_arviz_says(float64):
    _, _, reference = two_latents()
    names, flat = latent_names(reference), []
    assert names == ["factors", "size"]
    for latent in names:
        values = reference[latent].values.reshape(4, 40, 6, -1)
        flat.append(np.array([[arviz.rhat(values[:, :, n, k]) for k in range(values.shape[3])] for n in range(6)]))
    np.testing.assert_allclose(reference["rhat"], np.concatenate(flat, axis=1))
    assert reference["coordinate"].values.tolist() == ["factors[0]", "factors[1]", "size"]


# Noise and settings


def test_the_seed_rules_and_the_users_generator_is_left_alone():
    story, x = small_vae(), images(5)
    state = torch.get_rng_state()
    first, again, other = (
        reference_posterior(story, x, num_draws=4, num_warmup=20, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equals(again)
    assert not np.allclose(first["z"], other["z"])


def test_an_observation_does_not_depend_on_those_beside_it(float64):
    story, x = small_vae(), images(40)
    settings = {"num_draws": 4, "num_warmup": 20, "progress": False}
    together, alone = (reference_posterior(story, part, **settings) for part in (x, x[:32]))
    np.testing.assert_allclose(together["z"][:, :, :32], alone["z"], atol=1e-6)
    changed = x.clone()
    changed[5:32] = 1 - changed[5:32]
    beside = reference_posterior(story, changed, **settings)
    np.testing.assert_allclose(together["z"][:, :, :5], beside["z"][:, :, :5], atol=1e-6)
    assert abs(together["z"][:, :, 5:32] - beside["z"][:, :, 5:32]).max() > 0.1


@pytest.mark.slow
def test_groups_of_blocks_do_not_matter(float64, monkeypatch):
    story, x = small_vae(), images(40)
    settings = {"num_draws": 10, "num_warmup": 20, "progress": False}
    whole = reference_posterior(story, x, **settings)
    monkeypatch.setattr("ppl_vae.diagnostics.reference.CHAIN_ROWS_AT_ONCE", 1)
    np.testing.assert_allclose(whole["z"], reference_posterior(story, x, **settings)["z"], atol=1e-6)


def test_thinning_keeps_every_second_draw(float64):
    story, x = small_vae(), images(3)
    every, second = (
        reference_posterior(story, x, num_draws=draws, thinning=thinning, num_warmup=20, progress=False)
        for draws, thinning in ((8, 1), (4, 2))
    )
    np.testing.assert_array_equal(every["z"].values[:, 1::2], second["z"].values)


def test_a_table_becomes_netcdf_and_comes_back(float64, tmp_path):
    story, x, reference = two_latents()
    for number, table in enumerate((reference, against_guide(reference, story, x, num_draws=50))):
        table.to_netcdf(tmp_path / f"{number}.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / f"{number}.nc", engine="h5netcdf") as file:
            assert file.load().equals(table)


def test_step_sizes_settle_where_the_acceptance_is_wanted():
    """With an acceptance of exp(-size * n), size is -log(0.8) / n."""
    sharpness = torch.tensor([1.0, 3.0, 10.0])
    steps = StepSizes(torch.full((3,), 0.05), longest=10.0)
    for _ in range(2000):
        steps.update(torch.exp(-steps.size * sharpness))
    torch.testing.assert_close(steps.average, -math.log(0.8) / sharpness, rtol=0.02, atol=0)


def test_step_sizes_do_not_pass_the_longest():
    steps = StepSizes(torch.full((2,), 0.05), longest=0.2)
    for _ in range(50):
        steps.update(torch.ones(2))
        assert (steps.size <= 0.2 + 1e-6).all()
    assert (steps.average <= 0.2 + 1e-6).all()


class Zeta(nn.Module):
    """A model of which torch has no derivative."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.special.zeta(2 + z.abs(), torch.ones(()))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    ("story", "columns", "settings", "message"),
    [
        (ThreeKinds(), (torch.zeros(3),), {}, "All latents of this story are discrete"),
        (Zeta(), (torch.zeros(3),), {}, "moves along gradients"),
        (small_vae(), (images(3),), {"num_chains": 1}, "num_chains must be at least 2; found 1"),
        (small_vae(), (images(3),), {"num_draws": 3}, "num_draws must be at least 4; found 3"),
        (small_vae(), (images(3),), {"num_warmup": 19}, "num_warmup must be at least 20; found 19"),
        (small_vae(), (images(3),), {"num_leapfrog": 0}, "num_leapfrog must be at least 1; found 0"),
        (small_vae(), (images(3),), {"thinning": 0}, "thinning must be at least 1; found 0"),
    ],
)
def test_what_does_not_apply_is_refused(story, columns, settings, message):
    with pytest.raises(ValueError, match=message):
        reference_posterior(story, *columns, **settings)


# Pyro's NUTS


def test_nuts_agrees_with_the_closed_form(float64):
    x, reference = counts()
    draws = nuts(GammaPoisson(), x, observation=3, num_chains=2, num_draws=60, num_warmup=40)
    of_mean, _ = errors_of_moments(draws["rate"].values, 5 / 1.5, 5**0.5 / 1.5, draws["ess_bulk"].values[0, 0])
    assert draws["rate"].shape == (2, 60, 1) and draws["observation"].values.tolist() == [3]
    assert abs(of_mean) < 5
    assert set(draws.data_vars) == set(reference.data_vars)
    table = against_guide(draws, GammaPoisson(), x, num_draws=500, progress=False)
    assert table["observation"].values.tolist() == [3]
    assert abs(table["sd_ratio"].values[0, 0] - 0.6**-0.5) < 5 * table["sd_ratio_error"].values[0, 0]


def test_nuts_leaves_store_and_generator_alone_and_follows_its_seed():
    pyro.param("mine", torch.zeros(2))
    story, x, state = small_vae(), images(2), torch.get_rng_state()
    first, again = (nuts(story, x, num_chains=2, num_draws=5, num_warmup=5) for _ in range(2))
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equals(again)
    assert not np.allclose(first["z"].values[0], first["z"].values[1])


def test_nuts_leaves_discrete_latents_to_the_reference():
    with pytest.raises(ValueError, match="nuts does not sum out discrete latents"):
        nuts(TwoClusters(), torch.zeros(3))


def test_nuts_names_what_it_cannot_find():
    with pytest.raises(ValueError, match="observation must be between 0 and 2; found 3"):
        nuts(small_vae(), images(3), observation=3)


# The guide against it


def test_an_exact_guide_stands_at_the_reference(float64):
    story = linear_gaussian(num_features=6, latent_dim=2)
    x = story.model(num_observations=12).detach()
    table = against_guide(reference_posterior(story, x, **QUICK), story, x, num_draws=1000, progress=False)
    assert abs(table["mean_shift"] / table["mean_shift_error"]).max() < 5
    assert abs((table["sd_ratio"] - 1) / table["sd_ratio_error"]).max() < 5
    assert table["wasserstein"].median() < 1.2 * table["wasserstein_floor"].median()


class ShiftedGuide(ShiftedNormal):
    """The exact posterior of z ~ N(0, 1), x ~ N(z + y, 0.5^2), half a standard deviation off and a third too narrow."""

    def guide(self, x, y):
        sd = 0.2**0.5
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(0.8 * (x - y) + 0.5 * sd, 2 / 3 * sd))


def test_a_shifted_and_narrowed_guide_is_measured_in_posterior_sds(float64):
    columns = torch.linspace(-2, 3, 12), torch.arange(12.0) % 3
    story = ShiftedGuide()
    table = against_guide(reference_posterior(story, *columns, **QUICK), story, *columns, progress=False)
    assert abs((table["mean_shift"] - 0.5) / table["mean_shift_error"]).max() < 5
    assert abs((table["sd_ratio"] - 2 / 3) / table["sd_ratio_error"]).max() < 5
    levels = (np.arange(100_000) + 0.5) / 100_000
    truth = abs(0.5 + (2 / 3 - 1) * scipy.stats.norm.ppf(levels)).mean()
    assert abs(table["wasserstein"] - truth).max() < 5 * table["mean_shift_error"].max()


def test_where_the_reference_failed_the_guide_is_not_blamed(float64):
    x, reference = bimodal()
    table = against_guide(reference.isel(observation=[1]), SquaredNormal(), x, progress=False)
    assert table["trusted"].values.tolist() == [0]
    assert math.isnan(table.attrs["median_wasserstein"]) and table.attrs["largest_wasserstein_observation"] == -1


def test_draws_of_the_guide_are_the_guides(float64):
    draws = guide_draws(GammaPoisson(), torch.arange(5.0), num_draws=300, progress=False)
    for n in range(5):
        law = scipy.stats.gamma(0.6 * (2 + n), scale=1 / 0.9)
        assert scipy.stats.kstest(draws["rate"].values[:, n], law.cdf).pvalue > 1e-4


def test_a_reference_of_other_observations_is_refused(float64):
    story = small_vae()
    reference = reference_posterior(story, images(4), num_draws=10, num_warmup=20, progress=False)
    with pytest.raises(ValueError, match="The reference has observation 3; the columns have 2 rows"):
        against_guide(reference, story, images(2))
    with pytest.raises(
        ValueError, match=r"The reference is of the latents \['z'\]; the story has \['factors', 'size'\]"
    ):
        against_guide(reference, TwoLatents(), rows(4))


def test_coordinates_are_numbered_as_the_latents_are():
    latents = xr.Dataset({"w": (("observation", "w_dim_0", "w_dim_1"), np.arange(12.0).reshape(2, 2, 3))})
    values, labels = by_coordinate(latents)
    assert labels == ["w[0,0]", "w[0,1]", "w[0,2]", "w[1,0]", "w[1,1]", "w[1,2]"]
    np.testing.assert_array_equal(values[1], np.arange(6.0, 12.0))


# Pictures


def pictures():
    story, x, reference = two_latents()
    return reference, against_guide(reference, story, x, num_draws=50), guide_draws(story, x, num_draws=30)


def test_pictures_show_what_the_tables_hold(float64):
    reference, table, guide = pictures()
    figure = plots.guide_against_reference(table)
    assert isinstance(figure, Figure) and len(figure.axes) == 3
    for axes, name in zip(figure.axes, ("mean_shift", "sd_ratio", "wasserstein"), strict=True):
        shown = np.concatenate([cloud.get_offsets()[:, 0] for cloud in axes.collections])
        np.testing.assert_allclose(np.sort(shown), np.sort(table[name].values.ravel()))
    rhat, ess = plots.reference_convergence(reference).axes
    np.testing.assert_allclose(np.sort(rhat.lines[0].get_xdata()), np.sort(reference["rhat"].max("coordinate")))
    assert len(ess.lines) == 3
    (axes,) = plots.posterior_pair(reference, guide, observation=2, coordinates=("factors[1]", "size")).axes
    of_reference, of_guide = axes.collections
    np.testing.assert_allclose(of_guide.get_offsets()[:, 1], guide["size"].values[:, 2], rtol=1e-6)
    assert len(of_reference.get_offsets()) == 4 * 40
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("factors[1]", "size")


def test_a_pair_of_what_is_not_there_is_refused(float64):
    reference, _, guide = pictures()
    with pytest.raises(ValueError, match=r"No coordinate 'z\[0\]'; there are factors\[0\], factors\[1\], size"):
        plots.posterior_pair(reference, guide, coordinates=("z[0]", "size"))
