"""How good a guide is: exact ones are called exact, narrow ones are caught, and the pictures show where."""

import math

import matplotlib.pyplot
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from example_stories import (
    closed_form_log_evidence,
    images,
    labels,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from torch import nn

from ppl_vae import log_evidence
from ppl_vae.diagnostics.guide import guide_quality, pareto_k_threshold
from ppl_vae.plots.guide import guide_quality as draw_guide_quality
from ppl_vae.plots.guide import worst_observations
from ppl_vae.plots.images import tile


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    assert matplotlib.pyplot.get_fignums() == []


def quality_of(latent_dim, widened, num_observations=100, num_particles=1000, guide=None):
    """The quality of a linear-Gaussian story's guide on data of its own, and the true log p of these."""
    story = linear_gaussian(10, latent_dim, widened=widened)
    x = story.model(num_observations=num_observations).detach()
    story.encoder = guide or story.encoder
    return guide_quality(story, x, num_particles=num_particles), closed_form_log_evidence(story, x).numpy()


def test_an_exact_guide_is_called_exact(float64):
    quality, truth = quality_of(latent_dim=3, widened=1.0)
    assert (quality["verdict"] == "exact").all() and np.isneginf(quality["pareto_k"]).all()
    np.testing.assert_allclose(quality["log_evidence"], truth, rtol=1e-10)
    np.testing.assert_allclose(quality["elbo"], truth, rtol=1e-10)
    np.testing.assert_allclose(quality["gap"], 0, atol=1e-10)
    np.testing.assert_allclose(quality["relative_ess"], 1)
    about = quality.attrs
    assert (about["num_exact"], about["share_above_threshold"], about["share_below_good"]) == (100, 0.0, 1.0)


@pytest.mark.parametrize("narrowed", [0.5, 0.7])
def test_k_hat_of_a_narrow_guide_is_that_of_theory(float64, narrowed):
    """In one dimension k = 1 - s^2; the fit of a finite tail has an error of its own, which shrinks it to a half."""
    quality, truth = quality_of(latent_dim=1, widened=narrowed, num_particles=4000)
    pareto_k = quality["pareto_k"].values
    assert abs(pareto_k.mean() - (1 - narrowed**2)) < 4 * pareto_k.std(ddof=1) / 10 + 0.05
    missing = truth - quality["elbo"].values  # KL(q, posterior)
    expected = (narrowed**2 - 1) / 2 - math.log(narrowed)
    assert abs(missing.mean() - expected) < 4 * missing.std(ddof=1) / 10


def test_a_narrowed_guide_is_caught_and_a_widened_one_is_not(float64):
    narrow, wide = (quality_of(latent_dim=6, widened=factor)[0] for factor in (0.7, 1.2))
    assert narrow.attrs["share_above_threshold"] > 0.2 and narrow.attrs["share_below_good"] < 0.2
    assert wide.attrs["share_above_threshold"] == 0.0 and wide.attrs["share_below_good"] > 0.9
    assert wide.attrs["median_ess"] > 2 * narrow.attrs["median_ess"]


class Ignorant(nn.Module):
    """q(z | x) = p(z)."""

    def forward(self, x):
        return dist.Normal(torch.zeros(len(x), 6), 1.0).to_event(1)


def test_a_guide_equal_to_the_prior_is_caught(float64):
    quality, truth = quality_of(latent_dim=6, widened=1.0, guide=Ignorant())
    assert quality.attrs["share_above_threshold"] > 0.9 and quality.attrs["median_ess"] < 10
    assert (truth - quality["log_evidence"].values).mean() > 1  # and its evidence is too low


def test_the_evidence_is_that_of_importance_sampling():
    story, columns = small_conditional(), (images(), labels())
    quality = guide_quality(story, *columns, num_particles=300, seed=2)
    evidence = log_evidence(story, *columns, method="importance", num_particles=300, seed=2)
    for name, theirs in (("log_evidence", "estimate"), ("log_evidence_error", "standard_error"), ("ess", "ess")):
        np.testing.assert_allclose(quality[name], evidence[theirs], rtol=1e-6)
    np.testing.assert_allclose(quality["pareto_k"], evidence["pareto_k"], rtol=1e-6)
    elbo = log_evidence(story, *columns, method="elbo", num_particles=300, seed=2)
    np.testing.assert_allclose(quality["elbo"], elbo["estimate"], rtol=1e-6)
    np.testing.assert_allclose(quality["gap"], evidence["estimate"] - elbo["estimate"], atol=1e-4)


def test_shares_are_those_of_the_observations(float64):
    quality, _ = quality_of(latent_dim=2, widened=0.7)
    pareto_k, about = quality["pareto_k"].values, quality.attrs
    assert about["threshold"] == pytest.approx(2 / 3)
    assert about["share_above_threshold"] == sum(k > 2 / 3 for k in pareto_k) / 100
    assert about["share_below_good"] == sum(k < 0.4 for k in pareto_k) / 100
    expected = ["good" if k < 0.4 else "fair" if k < 0.7 else "poor" for k in pareto_k]
    assert quality["verdict"].values.tolist() == expected
    assert about["median_ess"] == np.median(quality["ess"])
    assert about["mean_gap_error"] == pytest.approx(quality["gap"].values.std(ddof=1) / 10)


@pytest.mark.parametrize(("num_draws", "threshold"), [(100, 0.5), (1000, 2 / 3), (2200, 0.7008), (10_000, 0.7)])
def test_the_threshold_is_the_published_one(num_draws, threshold):
    assert pareto_k_threshold(num_draws) == pytest.approx(min(threshold, 0.7), abs=1e-3)


class Coin(nn.Module):
    """A latent of two values, of which x says which one it is."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(20 * side, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("side", dist.Bernoulli((x > 10).float() * 0.9998 + 0.0001))


def test_equal_weights_of_a_discrete_guide_do_not_prove_it_exact():
    quality = guide_quality(Coin(), torch.tensor([0.0, 20.0]), num_particles=100)
    assert np.isneginf(quality["pareto_k"]).all()
    assert quality["verdict"].values.tolist() == ["good", "good"] and quality.attrs["num_exact"] == 0


def test_a_single_particle_is_refused():
    with pytest.raises(ValueError, match="num_particles must be at least 2; found 1"):
        guide_quality(small_vae(), images(), num_particles=1)


def test_quality_is_kept_in_a_file(tmp_path):
    quality = guide_quality(small_vae(), images(), num_particles=50)
    quality.to_netcdf(tmp_path / "quality.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "quality.nc", engine="h5netcdf") as read:
        xr.testing.assert_equal(read.assign(verdict=read["verdict"].astype(quality["verdict"].dtype)), quality)
        assert dict(read.attrs) == quality.attrs


# Pictures


def known(pareto_k):
    k = np.array(pareto_k)
    verdict = np.select([np.isneginf(k), k < 0.4, k < 0.7], ["exact", "good", "fair"], "poor")
    variables = {"pareto_k": k, "ess": 1000 / (1 + np.exp(k)), "verdict": verdict}
    about = {"num_particles": 1000, "threshold": 2 / 3, "good": 0.4, "median_ess": 500.0}
    about["share_above_threshold"] = float((k > 2 / 3).mean())
    return xr.Dataset({name: ("observation", values) for name, values in variables.items()}, attrs=about)


def test_every_observation_is_drawn_under_its_verdict():
    figure = draw_guide_quality(known([0.1, 0.3, 0.5, 0.9, 1.7, -math.inf, math.inf]))
    left, right = figure.axes
    assert sum(bar.get_height() for bar in left.patches) == 7
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["exact 1", "good 2", "fair 1", "poor 3", "good below 0.40", "too few draws above 0.67"]
    poor = right.collections[-1].get_offsets()
    np.testing.assert_allclose(poor[:, 0], [0.9, 1.7, 1.7])  # infinity lies at the edge
    assert [line.get_xdata()[0] for line in left.lines] == [0.4, 2 / 3]
    assert left.get_title() == "43% of 7 observations above 0.67"


@pytest.mark.parametrize("pareto_k", [[-math.inf] * 3, [math.inf] * 3])
def test_a_picture_without_a_finite_k_hat_can_be_drawn(pareto_k):
    left, _ = draw_guide_quality(known(pareto_k)).axes
    assert sum(bar.get_height() for bar in left.patches) == 3


def test_the_worst_observations_come_first_under_their_k_hat():
    x = images(5)
    figure = worst_observations(known([0.1, 2.0, -math.inf, 0.5, math.inf]), x, torch.arange(5) * 10, num=3)
    assert [axes.get_title() for axes in figure.axes] == ["inf  (40)", "2.00  (10)", "0.50  (30)"]
    for axes, number in zip(figure.axes, (4, 1, 3), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), tile(x[number : number + 1], 1))


def test_what_is_no_image_is_not_drawn():
    with pytest.raises(ValueError, match=r"x has \(3, 5\)"):
        worst_observations(known([0.1, 0.2, 0.3]), rows(3))
    with pytest.raises(ValueError, match="about 3 observations; x has 4"):
        worst_observations(known([0.1, 0.2, 0.3]), images(4))
