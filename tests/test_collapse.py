"""KLs, information and active units are what closed forms say; an aggregate that is not the prior is found out."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from example_stories import (
    ORACLES,
    Fragile,
    GammaPoisson,
    HierarchicalNormal,
    ThreeKinds,
    TwoClusters,
    TwoLatents,
    linear_gaussian,
    rows,
)
from matplotlib.colors import to_rgba
from scipy import integrate, stats
from torch import nn

from ppl_vae import VAE, likelihoods, priors, stories, traces
from ppl_vae.diagnostics.collapse import collapse
from ppl_vae.plots.collapse import collapse as draw


def simulated(story, num_observations, seed=0):
    return traces.draws(traces.prior_predictive(story, num_observations, seed=seed))["x"]


class Guide(nn.Module):
    """q(z | x) = N(slope x, scale^2), coordinate by coordinate."""

    def __init__(self, slope, scale):
        super().__init__()
        self.slope, self.scale = torch.tensor(slope), torch.tensor(scale)

    def forward(self, x):
        return dist.Normal(x[..., : len(self.slope)] * self.slope, self.scale).to_event(1)


def known_guide(slope, scale, prior=None):
    """A story whose guide is known; what it decodes to does not matter here."""
    latent_dim = len(slope)
    decoder = likelihoods.Normal(nn.Linear(latent_dim, 5), scale=1.0)
    return VAE(prior or priors.StandardNormal(latent_dim), decoder, Guide(slope, scale))


# KL -------------------------------------------------------------------------------------------------------------------


def test_the_kl_of_independent_normals_is_exact_by_unit(float64):
    slope, scale = [0.8, -0.3, 0.0], [0.5, 0.9, 1.0]
    of_units = collapse(known_guide(slope, scale), rows())
    mean, sd = rows()[:, :3].numpy() * slope, np.array(scale)
    truth = 0.5 * (mean**2 + sd**2 - 1 - np.log(sd**2)).mean(0)
    np.testing.assert_allclose(of_units["kl"], truth, atol=1e-12)
    assert of_units.attrs["kl"] == pytest.approx(truth.sum())
    assert (of_units["kl_method"].item(), of_units["kl_level"].item()) == ("analytic", "unit")
    assert of_units.attrs["kl_error"] == 0


def test_a_guide_that_correlates_units_has_a_kl_by_site():
    story = linear_gaussian(6, 2)
    x = simulated(story, 100)
    of_units = collapse(story, x)
    with torch.no_grad():
        prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        truth = torch.distributions.kl_divergence(story.encoder(x), prior).mean().item()
    assert of_units["kl"].isnull().all() and of_units["kl_level"].item() == "site"
    assert of_units["kl_method"].item() == "Monte Carlo"
    assert abs(of_units["site_kl"].item() - truth) < 4 * of_units["site_kl_error"].item()


def test_a_kl_without_closed_form_is_estimated_by_unit(float64):
    story = known_guide([0.7, 0.0], [0.4, 1.0], priors.StudentT(2, df=5.0))
    of_units = collapse(story, rows(), num_draws=200)
    assert (of_units["kl_method"].item(), of_units["kl_level"].item()) == ("Monte Carlo", "unit")

    def truth(loc, scale):
        q, p = stats.norm(loc, scale), stats.t(5)
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), loc - 9 * scale, loc + 9 * scale)[0]

    expected = [np.mean([truth(loc, 0.4) for loc in (0.7 * rows()[:, 0]).tolist()]), truth(0.0, 1.0)]
    assert (abs(of_units["kl"] - expected) < 4 * of_units["kl_error"]).all()


def test_layers_that_are_guessed_in_the_other_order_have_the_kl_of_the_joint(float64):
    """Given a draw from the layer above, KL(q(bottom | x), p(bottom | top)) is not this site's share."""
    x = torch.linspace(-2, 3, 24).reshape(8, 3)
    of_units = collapse(HierarchicalNormal(), x, num_draws=500)
    loadings = torch.tensor(HierarchicalNormal.loadings)
    precision = 1 + loadings.square().sum() / 0.7**2
    variance, above = 1.3**2 / precision, (1.3 * 0.6) ** 2
    loc = (0.5 + x @ loadings / 0.7**2) / precision
    covariance = torch.tensor([[variance, 0.8 * variance], [0.8 * variance, 0.64 * variance + above]])
    q = torch.distributions.MultivariateNormal(torch.stack([loc, 0.8 * (loc - 0.5)], 1), covariance)
    prior_covariance = torch.tensor([[0.64 + 0.36, 0.8], [0.8, 1.0]])
    p = torch.distributions.MultivariateNormal(torch.tensor([0.5, 0.0]), prior_covariance)
    truth = torch.distributions.kl_divergence(q, p).mean().item()
    assert set(of_units["kl_method"].values) == {"Monte Carlo"}
    assert abs(of_units.attrs["kl"] - truth) < 4 * of_units.attrs["kl_error"]
    assert of_units["site_kl"].sum().item() == pytest.approx(of_units.attrs["kl"])
    assert of_units.attrs["kl_error"] < 0.03 * truth


def test_a_latent_that_the_model_sums_out_is_summed_out_of_the_kl(float64):
    story, x = TwoClusters(), torch.linspace(-2, 3, 8)
    of_units = collapse(story, x, num_draws=300)
    with torch.no_grad():
        locs, log_scales = story.guess(x[:, None]).unbind(-1)

    def truth(loc, scale):
        q = stats.norm(loc, scale)

        def log_p(z):
            return np.logaddexp(stats.norm.logpdf(z, -1, 1), stats.norm.logpdf(z, 1, 1)) - math.log(2)

        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - log_p(z)), loc - 8 * scale, loc + 8 * scale)[0]

    expected = np.mean([truth(*pair) for pair in zip(locs.tolist(), log_scales.exp().tolist(), strict=True)])
    assert abs(of_units.attrs["kl"] - expected) < 4 * of_units.attrs["kl_error"]
    np.testing.assert_allclose(of_units["kl"], [of_units.attrs["kl"]])


def test_gammas_have_a_kl_in_closed_form_whatever_their_coordinates(float64):
    x = torch.arange(8.0)
    of_units = collapse(GammaPoisson(), x)
    q = torch.distributions.Gamma(0.6 * (2 + x), 0.6 * 1.5)
    truth = torch.distributions.kl_divergence(q, torch.distributions.Gamma(2.0, 0.5)).mean().item()
    assert of_units["kl"].item() == pytest.approx(truth)


# Collapse -------------------------------------------------------------------------------------------------------------


def test_the_prior_as_guide_is_collapsed_altogether():
    of_units = collapse(known_guide([0.0, 0.0], [1.0, 1.0]), rows(200))
    said = of_units.attrs
    np.testing.assert_allclose(of_units["kl"], 0, atol=1e-6)
    assert said["num_active"] == 0
    assert said["mutual_information"] == pytest.approx(0, abs=1e-5)
    assert said["marginal_kl"] == pytest.approx(0, abs=1e-5)
    assert said["worst_marginal_p_value"] > 0.01 and said["classifier_p_value"] > 0.01


def test_units_that_the_decoder_ignores_are_found(float64):
    story = linear_gaussian(8, 5)
    ignored = [1, 4]
    with torch.no_grad():
        story.decoder.loc.weight[:, ignored] = 0
    of_units = collapse(story, simulated(story, 300))
    assert np.flatnonzero(of_units["active"].values == 0).tolist() == ignored
    assert of_units.attrs["num_active"] == 3


def test_the_variance_of_the_posterior_mean_is_not_that_of_its_draws():
    """Without the correction 32 draws of a collapsed unit have a variance of 1 / 32, above the threshold."""
    x = rows(400)
    of_units = collapse(known_guide([0.0, 0.15], [1.0, 1.0]), x)
    truth = 0.15**2 * x[:, 1].var().item()
    scale = (1 / 32) * (2 / 400) ** 0.5 + 2 * (truth / 32 / 400) ** 0.5
    np.testing.assert_allclose(of_units["mean_variance"], [0, truth], atol=5 * scale)
    assert of_units["active"].values.tolist() == [0, int(truth > 0.01)]


def test_a_guide_that_repeats_the_prior_of_a_label_is_collapsed():
    story = stories.PerClassVAE(
        prior=priors.PerClass(2, num_labels=3),
        decoder=likelihoods.Normal(nn.Linear(2, 5), scale=1.0),
        encoder=Guide([0.0, 0.0], [1.0, 1.0]),
    )
    labels = torch.arange(60) % 3
    story.guide = lambda x, y: _guess_by_label(story, y)
    of_units = collapse(story, rows(60), labels)
    said = of_units.attrs
    assert said["num_groups"] == 3
    assert said["mutual_information_cap"] == pytest.approx(math.log(20))
    np.testing.assert_allclose([said["kl"], said["mutual_information"], said["marginal_kl"]], 0, atol=1e-4)
    assert said["num_active"] == 0


def test_labels_in_turn_are_noticed_at_every_number_of_observations():
    """766 rows in 256 even steps would all have the same one of three labels."""
    prior = priors.PerClass(1, num_labels=3)
    story = stories.PerClassVAE(prior, likelihoods.Normal(nn.Linear(1, 5), scale=1.0), Guide([0.5], [0.9]))
    with torch.no_grad():
        prior.normals.loc.copy_(torch.tensor([[-2.0], [0.0], [2.0]]))
    said = collapse(story, rows(766), torch.arange(766) % 3, num_draws=2).attrs
    assert said["num_groups"] == 3


def _guess_by_label(story, y):
    with pyro.plate("observations", len(y)):
        pyro.sample("z", story.prior(y))


# Information ----------------------------------------------------------------------------------------------------------


def test_the_information_of_an_exact_guide_is_that_of_the_story(float64):
    story = linear_gaussian(3, 1, scale=1.0)
    weight = story.decoder.loc.weight.detach()
    truth = 0.5 * math.log(1 + weight.square().sum().item())
    said = collapse(story, simulated(story, 2000)).attrs
    assert abs(said["mutual_information"] - truth) < 4 * said["mutual_information_error"]
    assert said["mutual_information_error"] < 0.1 * truth
    assert said["num_points"] == 1000 and said["information_is_capped"] == 0
    assert abs(said["marginal_kl"]) < 4 * said["marginal_kl_error"]


def test_the_parts_of_the_kl_are_those_of_the_mixture_over_observations(float64):
    slope, scale, x = [0.8, -0.3], [0.5, 0.9], rows(60)
    said = collapse(known_guide(slope, scale), x).attrs
    components = torch.distributions.Independent(
        torch.distributions.Normal(x[:, :2] * torch.tensor(slope), torch.tensor(scale).expand(60, 2)), 1
    )
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(60)), components)
    z = components.sample((500,))
    log_own, log_mixture = components.log_prob(z), mixture.log_prob(z)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    for name, truth in (("mutual_information", log_own - log_mixture), ("marginal_kl", log_mixture - log_prior)):
        assert abs(said[name] - truth.mean().item()) < 4 * said[f"{name}_error"]
    both = math.hypot(said["mutual_information_error"], said["marginal_kl_error"])
    assert abs(said["kl"] - said["mutual_information"] - said["marginal_kl"]) < 4 * both


def test_the_information_is_at_most_log_n_and_says_so():
    said = collapse(known_guide([1.0, 1.0], [1e-4, 1e-4]), rows(40)).attrs
    assert said["mutual_information"] == pytest.approx(math.log(40), abs=1e-3)
    assert said["mutual_information_cap"] == pytest.approx(math.log(40))
    assert said["information_is_capped"] == 1


# Aggregate posterior against prior ------------------------------------------------------------------------------------


def test_observations_of_the_story_give_back_its_prior():
    story = linear_gaussian(4, 3)
    said = collapse(story, simulated(story, 1000)).attrs
    assert said["worst_marginal_p_value"] > 0.01
    assert said["worst_pair_p_value"] > 0.01
    assert said["classifier_p_value"] > 0.01


def test_shifted_observations_do_not():
    story = linear_gaussian(4, 2)
    of_units = collapse(story, simulated(story, 1000) + 3 * story.decoder.loc.weight[:, 1].detach())
    said = of_units.attrs
    assert said["worst_marginal"] == "z[1]" and said["worst_marginal_p_value"] < 1e-6
    assert said["largest_marginal_shift_unit"] == "z[1]" and said["largest_marginal_shift"] > 2
    assert said["classifier_accuracy"] > 0.8 and said["classifier_p_value"] < 1e-6


def test_the_pair_that_the_guide_correlates_is_found():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(3))
    x[:, 2] = x[:, 0]
    of_units = collapse(known_guide([0.9, 0.9, 0.9], [0.4, 0.4, 0.4]), x)
    said = of_units.attrs
    assert (said["worst_pair_first"], said["worst_pair_second"]) == ("z[0]", "z[2]")
    truth = 0.81 / (0.81 + 0.16)
    assert said["worst_pair_correlation"] == pytest.approx(truth, abs=4 * (1 - truth**2) / 1000**0.5)
    assert said["worst_pair_p_value"] < 1e-6 and said["classifier_p_value"] < 1e-3


def test_distances_are_those_of_scipy():
    of_units = collapse(known_guide([0.5, 1.0], [0.7, 0.7]), rows(100))
    for number in range(2):
        pair = of_units["posterior_draw"].values[:, number], of_units["prior_draw"].values[:, number]
        assert of_units["ks"].values[number] == pytest.approx(stats.ks_2samp(*pair).statistic)
        assert of_units["wasserstein"].values[number] == pytest.approx(stats.wasserstein_distance(*pair))
        q, p = pair
        assert of_units["marginal_sd_ratio"].values[number] == pytest.approx(q.std() / p.std())
        assert of_units["marginal_shift"].values[number] == pytest.approx((q.mean() - p.mean()) / p.std(ddof=1))


@pytest.mark.slow
def test_p_values_are_honest_where_the_aggregate_is_the_prior():
    story = linear_gaussian(4, 2)
    said = [collapse(story, simulated(story, 200, seed), seed=seed, num_draws=2).attrs for seed in range(200)]
    for name in ("worst_marginal_p_value", "worst_pair_p_value", "classifier_p_value"):
        alarms = sum(one[name] < 0.05 for one in said)
        assert stats.binomtest(alarms, len(said), 0.05, alternative="greater").pvalue > 1e-3, name


# Other stories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: priors.MixtureOfNormals(2, components=3),
        lambda: priors.Flow(2, priors.realnvp(2, num_layers=2, hidden_dims=(4,))),
        lambda: priors.Laplace(2),
    ],
    ids=["mixture", "flow", "laplace"],
)
def test_the_kl_has_the_parts_it_has_under_any_prior(make):
    prior = make()
    of_units = collapse(known_guide([0.8, -0.3], [0.5, 0.9], prior), rows(200))
    said = of_units.attrs
    both = math.hypot(said["mutual_information_error"], said["marginal_kl_error"], said["kl_error"])
    assert abs(said["kl"] - said["mutual_information"] - said["marginal_kl"]) < 4 * both
    by_site = not isinstance(prior, priors.Laplace)
    assert of_units["kl_level"].item() == ("site" if by_site else "unit")
    assert of_units["kl"].isnull().all() == by_site


def test_the_pseudo_inputs_of_a_vamp_prior_are_what_its_aggregate_should_be():
    """With the data as pseudo-inputs the prior is the aggregate posterior."""
    x = rows(30)
    encoder = Guide([0.9, 0.9], [0.3, 0.3])
    prior = priors.VampPrior(encoder, x)
    story = VAE(prior, likelihoods.Normal(nn.Linear(2, 5), scale=1.0), encoder)
    said = collapse(story, x).attrs
    assert said["marginal_kl"] == pytest.approx(0, abs=1e-3)
    assert said["mutual_information"] > 1


@pytest.mark.parametrize("name", sorted(set(ORACLES) - {"discrete"}))
def test_every_story_with_a_continuous_latent_has_finite_numbers(name):
    make, columns, _ = ORACLES[name]
    of_units = collapse(make(), *columns())
    for field in ("site_kl", "mean_variance", "ks", "wasserstein"):
        assert np.isfinite(of_units[field]).all()
    assert all(np.isfinite(value) for value in of_units.attrs.values() if not isinstance(value, str))


# What is left, and what is refused ------------------------------------------------------------------------------------


def test_results_follow_the_seed_and_leave_the_generator_alone():
    story = TwoLatents()
    before = torch.get_rng_state()
    first, again, other = (collapse(story, rows(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first.identical(again)
    assert not first["posterior_draw"].equals(other["posterior_draw"])


def test_a_dataset_comes_back_from_its_file(tmp_path):
    of_units = collapse(TwoLatents(), rows())
    of_units.to_netcdf(tmp_path / "units.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "units.nc", engine="h5netcdf") as read:
        xr.testing.assert_equal(read.load(), of_units)
        assert dict(read.attrs) == of_units.attrs


@pytest.mark.parametrize(
    ("story", "columns", "arguments", "message"),
    [
        (ThreeKinds, (torch.zeros(5),), {}, "all latents of this story are discrete"),
        (TwoLatents, (torch.zeros(1, 5),), {}, "two observations or more"),
        (TwoLatents, (torch.zeros(4, 5),), {"num_draws": 1}, "num_draws must be at least 2"),
    ],
)
def test_what_does_not_apply_is_refused(story, columns, arguments, message):
    with pytest.raises(ValueError, match=message):
        collapse(story(), *columns, **arguments)


def test_an_observation_with_a_degenerate_guide_is_named():
    x = torch.zeros(8)
    x[5] = 99
    with pytest.raises(ValueError, match=r"not finite for the observations \[5\]"):
        collapse(Fragile(), x)


# The picture ----------------------------------------------------------------------------------------------------------


def test_the_picture_sorts_units_by_kl_and_marks_active_ones():
    of_units = collapse(known_guide([0.0, 0.9, 0.4], [1.0, 0.3, 0.9]), rows(100))
    divergence, activity, margins, pair = draw(of_units).axes
    heights = [patch.get_height() for patch in divergence.patches]
    np.testing.assert_allclose(heights, sorted(of_units["kl"].values, reverse=True), atol=1e-7)
    assert [text.get_text() for text in divergence.get_xticklabels()] == ["z[1]", "z[2]", "z[0]"]
    colors = [patch.get_facecolor() for patch in divergence.patches]
    assert colors == [to_rgba("tab:blue")] * of_units.attrs["num_active"] + [to_rgba("lightgray")] * (
        3 - of_units.attrs["num_active"]
    )
    assert activity.get_title().startswith(f"{of_units.attrs['num_active']} of 3 units are active")
    assert "classifier" in margins.get_title()
    assert pair.get_xlabel() == f"{of_units.attrs['worst_pair_first']} in prior sd"


def test_sites_are_drawn_where_units_have_no_kl():
    story = linear_gaussian(6, 1)
    for one in (story, linear_gaussian(6, 3)):
        of_units = collapse(one, simulated(one, 50))
        divergence, *_, pair = draw(of_units).axes
        assert ("do not factorise" in divergence.get_xlabel()) == bool(of_units["kl"].isnull().any())
        assert pair.axison == ("worst_pair_first" in of_units.attrs)
