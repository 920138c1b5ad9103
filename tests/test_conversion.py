"""ArviZ data of a story: every group holds what its name says, ArviZ takes it unchanged, and no draw is the data."""

import math

import arviz as az
import h5netcdf
import matplotlib
import matplotlib.pyplot
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
import xarray as xr
from example_stories import (
    STORIES,
    DirichletMultinomial,
    GammaPoisson,
    HierarchicalNormal,
    ShiftedNormal,
    ThreeKinds,
    TwoClusters,
    images,
    labels,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from torch import nn

from ppl_vae import likelihoods, posteriors, priors, stories, traces
from ppl_vae.diagnostics import conversion
from ppl_vae.diagnostics.conversion import log_prob_of_elements, to_arviz
from ppl_vae.distributions import Columns
from ppl_vae.evidence import replays
from ppl_vae.networks import WithLabels, mlp

BEFORE_1 = int(az.__version__.split(".")[0]) == 0
PLOTS = ("plot_trace", "plot_posterior", "plot_ppc") if BEFORE_1 else ("plot_trace", "plot_dist", "plot_ppc_dist")
ELEMENTS = ("x_dim_0", "x_dim_1", "x_dim_2")


def values(tree, group, name):
    """A variable without its one chain."""
    array = tree[group][name]
    return array.values[0] if "chain" in array.dims else array.values


def distance(draws, mean, variance):
    """How many standard errors the mean of independent draws, along the first axis, lies from its expectation."""
    return abs(draws.mean(0) - mean) / np.sqrt(variance / len(draws))


def arviz_pareto_k(log_weights):
    """0.23 takes log weights, 1.x negates its input."""
    if BEFORE_1:
        return np.asarray(az.psislw(log_weights.T.copy())[1])
    from arviz_stats.base import array_stats

    return np.array([array_stats.psislw(-column, axis=-1)[1] for column in log_weights.T])


# The tree


@pytest.mark.parametrize(("make", "columns"), STORIES.values(), ids=STORIES)
def test_every_group_has_its_dimensions(make, columns):
    x, *conditions = columns()
    tree = to_arviz(make(), x, *conditions, num_draws=7, num_predictive=3)
    draws = {"posterior": 7, "prior": 7, "log_prior": 7, "log_likelihood": 7, "posterior_predictive": 3}
    for group, num_draws in (draws | {"prior_predictive": 3}).items():
        sizes = tree[group].sizes
        assert (sizes["chain"], sizes["draw"], sizes["observation"]) == (1, num_draws, len(x))
    elements = tuple(f"x_dim_{place}" for place in range(x.dim() - 1))
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "observation", *elements)
    assert (
        tree["log_likelihood"]["x"].dims == tree["sample_stats"]["log_weight"].dims == ("chain", "draw", "observation")
    )
    assert tree["observed_data"]["x"].dims == ("observation", *elements)
    np.testing.assert_array_equal(tree["observed_data"]["x"], x)
    for coordinate in (*elements, "observation"):
        np.testing.assert_array_equal(tree["observed_data"][coordinate], range(tree["observed_data"].sizes[coordinate]))


def test_the_tree_is_that_of_the_installed_arviz():
    tree = to_arviz(small_vae(), images(3), num_draws=4)
    assert type(tree).__name__ == ("InferenceData" if BEFORE_1 else "DataTree")


def test_conditions_and_what_is_passed_are_constant_data():
    tree = to_arviz(small_conditional(), images(4), labels(4), num_draws=4, constant_data={"word": list("abcd")})
    assert tree["constant_data"]["y"].values.tolist() == [0, 1, 2, 0]
    assert tree["constant_data"]["word"].values.tolist() == list("abcd")
    assert list(tree["observed_data"].data_vars) == ["x"]


def test_values_that_are_missing_are_nan_in_the_observed_data():
    story = stories.MissingValuesVAE(
        priors.StandardNormal(2),
        likelihoods.Normal(loc=mlp(2, 8, 5), scale=1.0),
        posteriors.DiagonalNormal(mlp(10, 8, 4)),
        fill=7.0,
    )
    mask = torch.arange(5) != torch.arange(6)[:, None]
    tree = to_arviz(story, torch.where(mask, rows(6), -99.0), mask, num_draws=4)
    expected = torch.where(mask, rows(6), torch.nan)
    np.testing.assert_array_equal(tree["observed_data"]["x"], expected)
    np.testing.assert_array_equal(tree["constant_data"]["mask"], mask)
    assert np.isfinite(tree["posterior_predictive"]["x"]).all()


def test_attributes_say_what_was_done():
    tree = to_arviz(linear_gaussian(4, 2), torch.randn(5, 4), num_draws=20, seed=3)
    for attributes in (tree.attrs, tree["posterior"].attrs):
        assert attributes["inference_library"] == "pyro"
        assert (attributes["story"], attributes["seed"], attributes["units"]) == ("VAE", 3, "nats")
        assert (attributes["resampled"], attributes["num_particles"], attributes["distinct_draws"]) == (0, 20, 20)
        assert all(
            isinstance(value, str | int | float) and not isinstance(value, bool) for value in attributes.values()
        )


def test_without_predictive_draws_their_groups_are_left_out():
    tree = to_arviz(small_vae(), images(3), num_draws=4, num_predictive=0)
    assert not {"posterior_predictive", "prior_predictive"} & set(tree.groups() if BEFORE_1 else tree.children)
    assert tree["posterior"]["z"].sizes["draw"] == tree["prior"]["z"].sizes["draw"] == 4


class OddNames(nn.Module):
    """Sites whose names are those of dimensions, or paths."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("draw", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("scope/z", dist.Normal(0.0, 1.0))
            pyro.sample("draw__dim_0", dist.Normal(0.0, 1.0))
            pyro.sample("observation", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("draw", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("scope/z", dist.Normal(0.0, 1.0))
            pyro.sample("draw__dim_0", dist.Normal(0.0, 1.0))


def test_names_that_are_taken_are_changed_and_noted(tmp_path):
    tree = to_arviz(OddNames(), torch.zeros(3), num_draws=4)
    assert tree["posterior"]["draw_"].dims == ("chain", "draw", "observation", "draw__dim_0")
    assert {name: array.attrs.get("site") for name, array in tree["posterior"].data_vars.items()} == {
        "draw_": "draw",
        "scope_z": "scope/z",
        "draw__dim_0_": "draw__dim_0",
    }
    assert list(tree["observed_data"].data_vars) == ["observation_"]
    tree.to_netcdf(tmp_path / "tree.nc")


# What is scored


def test_each_site_scores_given_the_sites_before_it(float64):
    x = torch.linspace(-2, 3, 12).reshape(4, 3)
    tree = to_arviz(HierarchicalNormal(), x, num_draws=6)
    top, bottom = values(tree, "posterior", "top"), values(tree, "posterior", "bottom")
    log_top = scipy.stats.norm.logpdf(top)
    log_bottom = scipy.stats.norm.logpdf(bottom, 0.8 * top + 0.5, 0.6)
    log_x = scipy.stats.norm.logpdf(x, bottom[..., None] * np.array(HierarchicalNormal.loadings), 0.7).sum(-1)
    np.testing.assert_allclose(values(tree, "log_prior", "top"), log_top, rtol=1e-10)
    np.testing.assert_allclose(values(tree, "log_prior", "bottom"), log_bottom, rtol=1e-10)
    np.testing.assert_allclose(values(tree, "log_likelihood", "x"), log_x, rtol=1e-10)
    np.testing.assert_allclose(values(tree, "sample_stats", "lp"), log_top + log_bottom + log_x, rtol=1e-10)
    precision = 1 + np.square(HierarchicalNormal.loadings).sum() / 0.7**2
    loc = (0.5 + x.numpy() @ np.array(HierarchicalNormal.loadings) / 0.7**2) / precision
    log_q = scipy.stats.norm.logpdf(bottom, loc, 1.3 / precision**0.5)
    log_q = log_q + scipy.stats.norm.logpdf(top, 0.8 * (bottom - 0.5), 1.3 * 0.6)
    log_w = log_top + log_bottom + log_x - log_q
    np.testing.assert_allclose(values(tree, "sample_stats", "log_weight"), log_w, rtol=1e-9, atol=1e-9)


def test_elements_score_by_themselves(float64):
    x = torch.linspace(-2, 3, 12).reshape(4, 3)
    tree = to_arviz(HierarchicalNormal(), x, num_draws=6, num_predictive=5, elementwise=True)
    bottom = values(tree, "posterior", "bottom")[:5]
    expected = scipy.stats.norm.logpdf(x, bottom[..., None] * np.array(HierarchicalNormal.loadings), 0.7)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "observation", "x_dim_0")
    np.testing.assert_allclose(values(tree, "log_likelihood", "x"), expected, rtol=1e-10)


def test_elements_of_every_kind_of_column_sum_to_its_log_prob():
    p = Columns([dist.Poisson(torch.ones(7)), dist.Normal(torch.zeros(7, 2), 1.0).to_event(1)])
    x = p.sample()
    elements = log_prob_of_elements(p, x)
    assert elements.shape == x.shape
    torch.testing.assert_close(elements.sum(1), p.log_prob(x))
    torch.testing.assert_close(elements[:, 0], dist.Poisson(1.0).log_prob(x[:, 0]))


def test_masked_sites_score_nothing_by_element():
    class Masked(nn.Module):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.poutine.mask(mask=torch.arange(len(x)) != 1):
                    pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("observations", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    tree = to_arviz(Masked(), torch.ones(2, 2), num_draws=1, elementwise=True)
    assert (values(tree, "log_likelihood", "x") == 0).all(axis=(0, 2)).tolist() == [False, True]


def test_a_latent_that_is_summed_out_is_summed_out_of_the_score_and_drawn_from_its_conditional(float64):
    story, x = TwoClusters(), torch.linspace(-2, 3, 8)
    with torch.no_grad():
        story.logits.copy_(torch.tensor([0.3, -0.4]))
    tree = to_arviz(story, x, num_draws=500)
    z, cluster = values(tree, "posterior", "z"), values(tree, "posterior", "cluster")
    log_pi = story.logits.log_softmax(0).detach().numpy()
    joint = log_pi + scipy.stats.norm.logpdf(z[..., None], story.loc.detach().numpy(), 1.0)
    log_z = scipy.special.logsumexp(joint, axis=-1)
    np.testing.assert_allclose(values(tree, "log_prior", "z"), log_z, rtol=1e-10)
    np.testing.assert_allclose(values(tree, "log_likelihood", "x"), scipy.stats.norm.logpdf(x, z, 0.5), rtol=1e-10)
    second = np.exp(joint[..., 1] - log_z)  # given z, x says nothing of the cluster
    z_score = (cluster - second).sum() / np.sqrt((second * (1 - second)).sum())
    assert abs(z_score) < 4
    assert abs(0.5 - second).mean() > 0.1  # so that even odds would fail


class Labelled(nn.Module):
    """Two kinds, even a priori, of which x shows plainly which one it is; z has nothing to do with it."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(10.0 * kind, 0.1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))


def test_new_observations_are_of_the_kind_of_the_data():
    x = torch.tensor([0.0, 10.0, 10.0, 0.0])
    tree = to_arviz(Labelled(), x, num_draws=50)
    np.testing.assert_allclose(values(tree, "posterior_predictive", "x"), np.broadcast_to(x, (50, 4)), atol=0.6)
    assert set(values(tree, "prior", "kind")[:, 0].tolist()) == {0, 1}  # a priori it is of either


def test_scores_of_several_observed_sites_add_up(float64):
    story = stories.SemiSupervisedVAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(WithLabels(mlp(2 + 3, 8, (1, 6, 5)), num_labels=3)),
        posteriors.DiagonalNormal(mlp((1, 6, 5), 8, 4)),
        num_labels=3,
    )
    x, y = images(12).double(), torch.where(torch.arange(12) < 6, labels(12), -1)
    tree = to_arviz(story, x, y, num_draws=5)
    parts = [values(tree, "log_likelihood", name) for name in ("y", "x")] + [values(tree, "log_prior", "z")]
    np.testing.assert_allclose(sum(parts), values(tree, "sample_stats", "lp"), rtol=1e-10)
    np.testing.assert_allclose(parts[0][:, :6], -math.log(3), rtol=1e-10)  # a known label, from the even prior
    np.testing.assert_allclose(parts[0][:, 6:], 0, atol=1e-12)
    assert (values(tree, "posterior", "c")[:, :6] == y[:6].numpy()).all()


def test_an_exact_guide_has_constant_weights(float64):
    story = linear_gaussian(num_features=4, latent_dim=2)
    tree = to_arviz(story, torch.randn(5, 4), num_draws=100)
    assert np.isneginf(tree["sample_stats"]["pareto_k"]).all()
    np.testing.assert_allclose(tree["sample_stats"]["ess"], 100)
    assert tree.attrs["share_above_threshold"] == 0


# What is drawn


def test_draws_have_the_moments_of_their_distributions(float64):
    story = linear_gaussian(num_features=3, latent_dim=2)
    x = story.model(num_observations=2).detach()
    tree = to_arviz(story, x, num_draws=3000, num_predictive=3000)
    weight, bias = story.decoder.loc.weight.detach().numpy(), story.decoder.loc.bias.detach().numpy()
    posterior = story.encoder(x)
    mean, covariance = posterior.mean.detach().numpy(), posterior.covariance_matrix[0].detach().numpy()
    for group, z_mean, z_covariance in (("posterior", mean, covariance), ("prior", np.zeros((2, 2)), np.eye(2))):
        x_mean = z_mean @ weight.T + bias
        x_covariance = weight @ z_covariance @ weight.T + 0.25 * np.eye(3)
        for found, expected, variances in (
            (values(tree, group, "z"), z_mean, np.diag(z_covariance)),
            (values(tree, f"{group}_predictive", "x"), x_mean, np.diag(x_covariance)),
        ):
            assert distance(found, expected, variances).max() < 4
            squares = (found - expected) ** 2
            assert distance(squares, variances, 2 * variances**2).max() < 4


def test_prior_draws_are_those_given_the_condition():
    x, y = torch.zeros(3), torch.tensor([-3.0, 0.0, 5.0])
    tree = to_arviz(ShiftedNormal(), x, y, num_draws=500, num_predictive=500)
    assert distance(values(tree, "prior_predictive", "x"), y.numpy(), 1.25).max() < 4


@pytest.mark.parametrize(("make", "columns"), STORIES.values(), ids=STORIES)
def test_predictive_draws_are_not_the_data(make, columns):
    tree = to_arviz(make(), *columns(), num_draws=2)
    for group in ("posterior_predictive", "prior_predictive"):
        assert (
            not (values(tree, group, "x") == columns()[0].numpy())
            .all(axis=tuple(range(2, columns()[0].dim() + 1)))
            .any()
        )


def test_resampling_moves_the_draws_to_the_posterior(float64):
    story = linear_gaussian(num_features=3, latent_dim=2, widened=1.8)
    x = story.model(num_observations=64).detach()
    posterior = story.encoder(x)
    variance = posterior.covariance_matrix[0].diagonal().detach().numpy() / 1.8**2
    plain, resampled = (to_arviz(story, x, num_draws=100, num_predictive=0, resample=again) for again in (False, True))
    for tree, expected in ((plain, 1.8**2), (resampled, 1.0)):
        squares = (values(tree, "posterior", "z") - posterior.mean.detach().numpy()) ** 2 / variance / expected
        by_observation = squares.mean(axis=(0, 2))  # draws of an observation that were chosen twice are no two draws
        assert abs(by_observation.mean() - 1) < 4 * by_observation.std(ddof=1) / 8
    assert resampled.attrs["resampled"] == 1 and resampled.attrs["num_particles"] == 1000
    distinct = [len(np.unique(values(resampled, "posterior", "z")[:, n, 0])) for n in range(64)]
    assert tree["sample_stats"]["distinct_draws"].values.tolist() == distinct
    assert resampled.attrs["distinct_draws"] == np.mean(distinct) < 100


def test_one_draw_with_all_the_weight_is_taken_always():
    weights = torch.full((50, 2), -100.0)
    weights[7, 0] = weights[9, 1] = 0.0
    assert conversion._choose(weights, 20).tolist() == [[7, 9]] * 20


def test_draws_depend_on_the_seed_and_the_position_of_an_observation_alone():
    story, x = small_vae(), images(40)
    before = torch.random.get_rng_state()
    tree, again = to_arviz(story, x, num_draws=10), to_arviz(story, x[:32], num_draws=10)
    other = to_arviz(story, x, num_draws=10, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for group, name in (("posterior", "z"), ("prior", "z"), ("posterior_predictive", "x"), ("prior_predictive", "x")):
        np.testing.assert_array_equal(values(tree, group, name)[:, :32], values(again, group, name))
        assert not np.array_equal(values(tree, group, name), values(other, group, name))


# name -> (makes the story, its columns)
DRAWN = {
    "normal, Bernoulli": (small_vae, lambda: (images(96),)),
    "gamma, Poisson": (GammaPoisson, lambda: (torch.arange(96.0) % 8,)),
    "summed out": (TwoClusters, lambda: (torch.linspace(-2, 3, 96),)),
}


@pytest.mark.parametrize(("make", "columns"), DRAWN.values(), ids=DRAWN)
def test_captured_programs_make_the_same_draws_bit_for_bit(make, columns, monkeypatch, caplog):
    story = make()
    plain = to_arviz(story, *columns(), num_draws=6, num_predictive=6)
    monkeypatch.setattr(conversion, "CALLS_TO_CAPTURE", 0)
    monkeypatch.setattr(replays, "CALLS_BEFORE_CAPTURE", 1)
    with caplog.at_level("INFO", "ppl_vae"):
        captured = to_arviz(story, *columns(), num_draws=6, num_predictive=6)
    assert "as it is" not in caplog.text  # all of them were captured
    for group, name in (("posterior", None), ("prior", None), ("posterior_predictive", "x"), ("prior_predictive", "x")):
        for variable in plain[group].data_vars if name is None else [name]:
            np.testing.assert_array_equal(values(captured, group, variable), values(plain, group, variable))


# ArviZ


def test_pareto_k_and_ess_of_the_weights_equal_arviz(float64):
    x = torch.linspace(-2, 3, 12).reshape(4, 3)
    tree = to_arviz(HierarchicalNormal(), x, num_draws=400)
    log_weights = values(tree, "sample_stats", "log_weight")
    np.testing.assert_allclose(tree["sample_stats"]["pareto_k"], arviz_pareto_k(log_weights), atol=1e-6)
    w = np.exp(log_weights - log_weights.max(0))
    np.testing.assert_allclose(tree["sample_stats"]["ess"], w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9)


def test_arviz_summarizes_the_tree():
    tree = to_arviz(small_vae(), images(3), num_draws=500)
    table = az.summary(tree, **({} if BEFORE_1 else {"round_to": "none"}))
    assert list(table.index) == [f"z[{n}, {k}]" for n in range(3) for k in range(2)]
    means = values(tree, "posterior", "z").mean(0).flatten()
    np.testing.assert_allclose(np.asarray(table["mean"], dtype=float), means, atol=2e-3)
    ess = az.ess(tree)
    ess = ess["posterior"] if "posterior" in getattr(ess, "children", {}) else ess
    assert ess["z"].shape == (3, 2) and (ess["z"] > 250).all()  # independent draws


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")
@pytest.mark.parametrize("plot", PLOTS)
def test_arviz_draws_the_tree(plot):
    matplotlib.use("Agg")
    tree = to_arviz(linear_gaussian(3, 2), torch.randn(2, 3), num_draws=120, num_predictive=120)
    try:
        assert getattr(az, plot)(tree) is not None
    finally:
        matplotlib.pyplot.close("all")


def test_a_file_opens_with_the_same_content(tmp_path):
    story = stories.MissingValuesVAE(
        priors.StandardNormal(2),
        likelihoods.Normal(loc=mlp(2, 8, 5), scale=1.0),
        posteriors.DiagonalNormal(mlp(10, 8, 4)),
    )
    constant = {"word": list("abcdef"), "label": torch.arange(6)}
    tree = to_arviz(story, rows(6), rows(6) > -1, num_draws=40, resample=True, constant_data=constant)
    tree.to_netcdf(str(tmp_path / "tree.nc"))
    read = az.from_netcdf(str(tmp_path / "tree.nc"))
    groups = tree.groups() if BEFORE_1 else tree.children
    for group in groups:
        for name, array in tree[group].data_vars.items():
            xr.testing.assert_equal(read[group][name].astype(array.dtype), array)
    assert {name: read.attrs[name] for name in tree.attrs} == tree.attrs
    with h5netcdf.File(tmp_path / "tree.nc", "r") as file:  # the layout that both lines of ArviZ write and read
        assert list(file.groups) == [group for group in conversion.ORDER if group in file.groups]
        assert list(file.groups) == list(groups)
        assert set(file["posterior"].variables) == {"z", "chain", "draw", "observation", "z_dim_0"}
        assert file.attrs["seed"] == 0


# Refusals


def test_a_tree_beyond_the_budget_is_refused_with_the_bytes_that_it_needs():
    latents, pixels = 10 * 5 * 2 * 4, 4 * 5 * 30 * 4  # draws, observations, elements, bytes
    needed = 2 * latents + 3 * pixels
    options = {"num_draws": 10, "num_predictive": 4, "elementwise": True}
    to_arviz(small_vae(), images(5), **options, memory_budget=needed)
    with pytest.raises(
        ValueError, match=rf"needs {needed:,} bytes .*log_likelihood {pixels:,}.*memory_budget = {needed - 1:,}"
    ):
        to_arviz(small_vae(), images(5), **options, memory_budget=needed - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"num_predictive": -1}, "num_predictive must be 0 or more"),
        ({"num_particles": 500}, "say resample=True"),
        ({"num_particles": 50, "resample": True}, "cannot be chosen well among 50"),
        ({"num_predictive": 0, "elementwise": True}, "found 0 of them"),
        ({"constant_data": {"y": [0, 1, 2]}}, "columns of the story"),
        ({"constant_data": {"age": [0, 1]}}, r"shape \(2,\).* 3 observations"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_arviz(small_conditional(), images(3), labels(3), **options)


def test_a_likelihood_without_elements_is_refused_by_element():
    with pytest.raises(ValueError, match="Multinomial has no log probability for each element"):
        to_arviz(DirichletMultinomial(), torch.tensor([[2.0, 2, 8]]), num_draws=4, elementwise=True)


def test_discrete_latents_of_the_guide_are_whole_numbers():
    tree = to_arviz(ThreeKinds(), torch.linspace(-2, 4, 8), num_draws=20)
    kind = values(tree, "posterior", "kind")
    assert kind.dtype == np.int64
    np.testing.assert_allclose(values(tree, "log_prior", "kind"), np.log(np.array(ThreeKinds.probs))[kind], rtol=1e-6)


def test_the_story_is_left_as_it_was():
    story = small_vae()
    story.encoder.eval()
    pyro.param("mine", torch.ones(1))
    to_arviz(story, images(3), num_draws=4)
    assert story.training and not story.encoder.training and list(pyro.get_param_store()) == ["mine"]
    assert traces.device_and_dtype(story)[1] == torch.float32


def test_a_single_draw_of_a_single_observation_is_enough():
    tree = to_arviz(small_vae(), images(1), num_draws=1)
    assert tree["posterior"]["z"].shape == (1, 1, 1, 2) and tree["posterior_predictive"]["x"].shape == (
        1,
        1,
        1,
        1,
        6,
        5,
    )
    assert np.isfinite(tree["sample_stats"]["lp"]).all()
