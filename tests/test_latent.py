"""Latent space: places, labels, posteriors and paths are those of closed forms; pictures show what was computed."""

import io
import math

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
    HierarchicalNormal,
    ThreeKinds,
    TwoClusters,
    TwoLatents,
    closed_form_log_evidence,
    images,
    labels,
    linear_gaussian,
    rows,
    small_conditional,
    small_vae,
)
from scipy.spatial import geometric_slerp
from torch import nn

from ppl_vae import VAE, likelihoods, priors, stories
from ppl_vae.diagnostics.latent import atlas, great_circle, interpolation, landscape, traversals
from ppl_vae.plots import latent as pictures

SCALE = 0.4
norm = scipy.stats.norm


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    assert matplotlib.pyplot.get_fignums() == []


class Around(nn.Module):
    """q(z | x) = N(x, 0.4^2 I)."""

    def forward(self, x, *conditions):
        return dist.Normal(x, SCALE).to_event(1)


def plain_story(latent_dim=2, prior=None):
    """Decodes z to itself and encodes x as itself."""
    decoder = likelihoods.Normal(nn.Identity(), scale=0.5)
    return VAE(prior or priors.StandardNormal(latent_dim), decoder, Around())


def points(num_observations=6, latent_dim=2):
    return torch.randn(num_observations, latent_dim, generator=torch.Generator().manual_seed(3))


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


# The atlas ------------------------------------------------------------------------------------------------------------


def test_the_grid_lies_at_prior_quantiles_and_is_decoded():
    seen = atlas(plain_story(), points(), size=4)
    middles = norm.ppf((np.arange(4) + 0.5) / 4)
    expected = np.stack(np.meshgrid(middles, middles[::-1]), axis=-1)
    np.testing.assert_allclose(seen["z"], expected, atol=1e-5)
    np.testing.assert_allclose(seen["decoded"], expected, atol=1e-5)
    np.testing.assert_allclose(seen["log_prior"], norm.logpdf(expected).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        [seen["row"], seen["column"]], [[0.875, 0.625, 0.375, 0.125], [0.125, 0.375, 0.625, 0.875]]
    )
    assert seen["latent"].values.tolist() == ["z[0]", "z[1]"]


def test_observations_lie_at_the_quantiles_of_their_encodings():
    x = points()
    seen = atlas(plain_story(), x, size=3)
    np.testing.assert_allclose(seen["encoding"], x, rtol=1e-6)
    np.testing.assert_allclose(seen["place"], norm.cdf(x), rtol=1e-5)


def test_labels_follow_from_bayes_rule_with_the_densities_of_the_guide(float64):
    x, y = points(7), torch.tensor([4, 4, 9, 9, 9, 0, 4])
    seen = atlas(plain_story().double(), x.double(), labels=y, size=5)
    log_q = norm.logpdf(seen["z"].values[..., None, :], x.double().numpy(), SCALE).sum(-1)
    by_label = np.stack([np.exp(log_q[..., y.numpy() == name]).sum(-1) for name in (0, 4, 9)], axis=-1)
    expected = by_label / by_label.sum(-1, keepdims=True)
    assert seen["label"].values.tolist() == [0, 4, 9]
    np.testing.assert_allclose(seen["probability"], expected, atol=1e-10)
    np.testing.assert_allclose(seen["log_aggregate"], scipy.special.logsumexp(log_q, axis=-1) - math.log(7))
    np.testing.assert_allclose(seen["entropy"], scipy.stats.entropy(expected, axis=-1), atol=1e-10)
    np.testing.assert_allclose(seen["entropy_bits"], scipy.stats.entropy(expected, base=2, axis=-1), atol=1e-10)


def test_more_observations_than_a_block_make_one_aggregate(float64):
    x = points(70).double()
    seen = atlas(plain_story().double(), x, size=3)
    log_q = norm.logpdf(seen["z"].values[..., None, :], x.numpy(), SCALE).sum(-1)
    np.testing.assert_allclose(seen["log_aggregate"], scipy.special.logsumexp(log_q, axis=-1) - math.log(70))


def test_halfway_between_two_labels_there_is_one_bit():
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    seen = atlas(plain_story(), x, labels=torch.tensor([3, 8]), size=5)
    np.testing.assert_allclose(seen["entropy"].isel(column=2), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(seen["entropy_bits"].isel(column=2), 1, rtol=1e-6)
    assert (seen["entropy"].isel(column=[0, 4]) < 0.01).all()
    assert seen.attrs["most_confused"] == [3, 8]


def test_confusion_names_the_labels_that_lie_together():
    x = torch.tensor([[-1.0, -1.0], [-0.8, -1.0], [1.5, 1.5]])
    seen = atlas(plain_story(), x, labels=torch.tensor([7, 1, 5]), size=6)
    assert seen.attrs["most_confused"] == [1, 7]


class Nothing(nn.Module):
    """q(z | x) = p(z)."""

    def forward(self, x):
        return dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)


def test_a_guide_that_is_the_prior_lives_everywhere_alike():
    story = plain_story()
    story.encoder = Nothing()
    seen = atlas(story, points(), labels=torch.tensor([0, 1, 1, 0, 1, 0]), size=5)
    np.testing.assert_allclose(seen["density"], 1, rtol=1e-5)
    assert seen.attrs["share_inhabited"] == pytest.approx(1)
    assert seen.attrs["mean_entropy"] == pytest.approx(math.log(2))
    assert seen.attrs["share_ambiguous"] == pytest.approx(1)


def test_places_far_from_every_observation_are_not_inhabited():
    seen = atlas(plain_story(), torch.ones(20, 2), size=4)
    assert seen["inhabited"].values[0, -1] == 1 and seen["inhabited"].values[-1, 0] == 0
    expected = np.exp(norm.logpdf(seen["z"], 1, SCALE).sum(-1) - norm.logpdf(seen["z"]).sum(-1)) >= 0.05
    assert np.array_equal(seen["inhabited"], expected)
    assert seen.attrs["share_inhabited"] == pytest.approx(expected.mean())


@pytest.mark.parametrize("num_nearest", [1, 5])
def test_the_nearest_observations_are_nearest_in_prior_quantiles(num_nearest):
    x = points(30)
    seen = atlas(plain_story(), x, size=4, num_nearest=num_nearest)
    cells = np.stack(np.meshgrid(seen["column"], seen["row"]), axis=-1)
    distance = np.linalg.norm(cells[:, :, None] - norm.cdf(x), axis=-1)
    assert np.array_equal(seen["nearest"], distance.argsort(-1)[..., :num_nearest])
    np.testing.assert_allclose(seen["nearest_distance"], np.sort(distance)[..., :num_nearest], atol=1e-6)


class Shown(nn.Module):
    """A mean that is the condition."""

    def forward(self, z, y):
        return y.to(z).unsqueeze(-1).expand(*z.shape[:-1], 3)


def test_the_grid_is_decoded_with_the_conditions_of_the_first_observation():
    story = stories.ConditionalVAE(
        priors.StandardNormal(2), likelihoods.Normal(Shown(), scale=1.0), small_conditional().encoder
    )
    story.encoder = Around2()
    seen = atlas(story, rows(4)[:, :3], torch.tensor([5, 1, 2, 3]), size=3)
    assert (seen["decoded"] == 5).all()


class Around2(nn.Module):
    """q(z | x, y) = N(first two numbers of x, 0.4^2 I)."""

    def forward(self, x, y=None):
        return dist.Normal(x[..., :2], SCALE).to_event(1)


class TwoKinds(nn.Module):
    """c ~ Bernoulli(0.3), summed out; z ~ N(c, I); x ~ N(z + 10 c, 1)."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("where", dist.Normal(c[..., None].expand(*c.shape, 2), 1.0).to_event(1))
            pyro.sample("seen", dist.Normal(z + 10 * c[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("where", dist.Normal(x, 1.0).to_event(1))


def test_discrete_latents_are_summed_out_of_what_is_decoded(float64):
    seen = atlas(TwoKinds(), points().double(), size=4)
    z = seen["z"].values
    parts = [share * np.exp(norm.logpdf(z, c).sum(-1)) for c, share in enumerate((0.7, 0.3))]
    of_one = parts[1] / sum(parts)
    np.testing.assert_allclose(seen["decoded"], z + 10 * of_one[..., None], rtol=1e-6)
    np.testing.assert_allclose(seen["log_prior"], np.log(sum(parts)), rtol=1e-6)
    assert seen["latent"].values.tolist() == ["where[0]", "where[1]"]


def test_quantiles_of_a_prior_with_kinds_are_those_of_its_draws(float64):
    x = points().double()
    seen = atlas(TwoKinds(), x, size=4)
    expected = 0.7 * norm.cdf(x) + 0.3 * norm.cdf(x, 1)
    assert seen.attrs["exact_quantiles"] == 0
    assert (np.abs(seen["place"] - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 20_000)).all()


def test_quantiles_of_a_learned_normal_are_exact():
    prior = priors.Normal(2)
    with torch.no_grad():
        prior.normal.loc.copy_(torch.tensor([1.0, -2.0]))
    loc, scale = (tensor.detach().numpy() for tensor in (prior().mean, prior().stddev))
    x = points()
    seen = atlas(plain_story(prior=prior), x, size=3)
    np.testing.assert_allclose(seen["place"], norm.cdf(x, loc, scale), rtol=1e-5, atol=1e-7)
    assert seen.attrs["exact_quantiles"] == 1


def correlated(correlation=0.8):
    return dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, correlation], [correlation, 1.0]]))


def test_quantiles_of_a_dependent_prior_are_those_of_its_draws():
    x = points()
    seen = atlas(plain_story(prior=correlated()), x, size=4)
    expected = norm.cdf(x)
    assert seen.attrs["exact_quantiles"] == 0
    assert (np.abs(seen["place"] - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 20_000)).all()


def test_cells_of_a_dependent_prior_weigh_as_much_as_the_prior_puts_there():
    seen = atlas(plain_story(prior=correlated()), points(), size=4)
    middles = (np.arange(4) + 0.5) / 4
    width = norm.ppf(middles + 0.1) - norm.ppf(middles - 0.1)
    expected = np.exp(correlated().log_prob(torch.as_tensor(seen["z"].values)).numpy()) * np.outer(width, width)
    error = np.sqrt(2 * 0.8 / (0.2 * 20_000))  # relative, of two spacings of 4000 draws each
    np.testing.assert_allclose(seen["prior_mass"], expected / expected.sum(), rtol=5 * error)
    even = np.full((4, 4), 1 / 16)
    assert np.abs(seen["prior_mass"] / even - 1).max() > 0.5  # and that is not even


def test_a_guide_of_two_sites_is_seen_by_the_mean_of_its_draws(float64):
    x = torch.linspace(-2, 3, 24).reshape(8, 3)
    seen = atlas(HierarchicalNormal(), x, size=3)
    loadings, precision = np.array(HierarchicalNormal.loadings), 1 + np.square(HierarchicalNormal.loadings).sum() / 0.49
    bottom = (0.5 + x.numpy() @ loadings / 0.49) / precision
    top = 0.8 * (bottom - 0.5)
    spread = np.hypot(0.78, 0.8 * 1.3 / np.sqrt(precision)), 1.3 / np.sqrt(precision)
    assert seen["latent"].values.tolist() == ["top", "bottom"]
    assert (np.abs(seen["encoding"] - np.stack([top, bottom], axis=1)) < 4.5 * np.array(spread) / 16).all()


class Counted(nn.Module):
    """An encoder that counts the rows it is given."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.num_rows = 0

    def forward(self, x, y):
        self.num_rows += len(x)
        return self.encoder(x, y)


def test_a_conditional_guide_encodes_each_observation_and_not_each_cell():
    story, x, y = small_conditional(), images(), labels()
    expected = atlas(story, x, y, size=10)
    with torch.no_grad():
        log_q = story.encoder(x, y).log_prob(torch.tensor(expected["z"].values)[:, :, None])
    np.testing.assert_allclose(expected["log_aggregate"], log_q.logsumexp(-1) - math.log(40), rtol=1e-4, atol=1e-4)
    story.encoder = Counted(story.encoder)
    atlas(story, x, y, size=10)
    assert story.encoder.num_rows < 40 * 10


# The landscape --------------------------------------------------------------------------------------------------------


def closed_form(story, x):
    posterior = story.encoder(x)
    return posterior.mean.detach().numpy(), posterior.covariance_matrix.detach().numpy() / story.encoder.widened**2


def test_the_landscape_of_a_linear_story_is_its_normal_posterior(float64):
    story = linear_gaussian(6, 2)
    x = story.model(num_observations=4).detach()
    seen = landscape(story, x, observation=2)
    loc, covariance = (part[0] for part in (closed_form(story, x[2:3])[0], closed_form(story, x[2:3])[1][None]))
    covariance = covariance.reshape(2, 2)
    plane = np.stack(np.meshgrid(seen["across"], seen["up"]), axis=-1)
    expected = scipy.stats.multivariate_normal(loc, covariance).logpdf(plane)
    np.testing.assert_allclose(seen["log_posterior"], expected, atol=1e-5)
    np.testing.assert_allclose(seen["log_guide"], expected, atol=1e-5)
    for name in ("posterior", "guide"):
        np.testing.assert_allclose(seen[f"{name}_mean"], loc, atol=1e-5)
        np.testing.assert_allclose(seen[f"{name}_covariance"], covariance, rtol=1e-3, atol=1e-6)
    area = np.diff(seen["across"])[0] * np.diff(seen["up"])[0]
    assert np.exp(seen["log_posterior"]).sum() * area == pytest.approx(1)
    assert seen.attrs["log_evidence"] == pytest.approx(closed_form_log_evidence(story, x)[2].item(), abs=1e-5)
    assert seen.attrs["kl"] == pytest.approx(0, abs=1e-5) and seen.attrs["total_variation"] < 1e-5
    np.testing.assert_allclose(seen["x"], x[2])
    mean = plane @ story.decoder.loc.weight.detach().numpy().T + story.decoder.loc.bias.detach().numpy()
    np.testing.assert_allclose(seen["log_likelihood"], norm.logpdf(x[2].numpy(), mean, 0.5).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(seen["log_prior"], norm.logpdf(plane).sum(-1), rtol=1e-6)


def test_a_guide_twice_too_wide_is_off_by_what_theory_says(float64):
    story = linear_gaussian(6, 2, widened=2.0)
    seen = landscape(story, rows(4)[:, [0, 1, 2, 3, 4, 0]].double())
    assert seen.attrs["kl"] == pytest.approx(3 - math.log(4), abs=1e-3)
    assert seen.attrs["total_variation"] == pytest.approx(4 ** (-1 / 3) - 4 ** (-4 / 3), abs=1e-3)
    assert seen.attrs["distance_of_means"] == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(seen["guide_covariance"], 4 * seen["posterior_covariance"], rtol=1e-3, atol=1e-6)


class Shifted(nn.Module):
    """The encoder of a linear story, moved by (1, 0)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        exact = self.encoder(x)
        return dist.MultivariateNormal(exact.mean + torch.tensor([1.0, 0.0]), exact.covariance_matrix)


def test_a_guide_beside_the_posterior_is_as_far_as_its_mean(float64):
    story = linear_gaussian(6, 2)
    _, covariance = closed_form(story, torch.zeros(1, 6))
    distance = math.sqrt(np.linalg.inv(covariance.reshape(2, 2))[0, 0])
    story.encoder = Shifted(story.encoder)
    seen = landscape(story, rows(4)[:, [0, 1, 2, 3, 4, 0]].double(), observation=1)
    assert seen.attrs["distance_of_means"] == pytest.approx(distance, rel=1e-3)
    assert seen.attrs["kl"] == pytest.approx(distance**2 / 2, rel=1e-3)
    assert seen.attrs["total_variation"] == pytest.approx(2 * norm.cdf(distance / 2) - 1, abs=1e-3)


class Sizes(nn.Module):
    """Two sizes, LogNormal(0, 1) each, whose logs are seen with noise of 0.5; the guide is the prior."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            sizes = pyro.sample("sizes", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(sizes.log(), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("sizes", dist.LogNormal(torch.zeros(len(x), 2), 1.0).to_event(1))


def test_constrained_latents_are_seen_in_unconstrained_coordinates(float64):
    x = torch.tensor([[0.5, -1.0]])
    seen = landscape(Sizes(), x)
    assert seen["latent"].values.tolist() == ["sizes[0] (unconstrained)", "sizes[1] (unconstrained)"]
    np.testing.assert_allclose(seen["posterior_mean"], x[0] / 1.25, atol=1e-4)
    np.testing.assert_allclose(seen["posterior_covariance"], np.eye(2) * 0.2, atol=1e-4)
    np.testing.assert_allclose(seen["guide_covariance"], np.eye(2), atol=1e-3)
    assert seen.attrs["log_evidence"] == pytest.approx(norm.logpdf(x, 0, math.sqrt(1.25)).sum(), abs=1e-5)


class Squares(nn.Module):
    """x ~ N((z0^2, z1), 0.3^2): a posterior of two modes, of which the guide knows the right one."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.stack([z[..., 0] ** 2, z[..., 1]], dim=-1)
            pyro.sample("x", dist.Normal(mean, 0.3).to_event(1), obs=x)

    def guide(self, x):
        loc = torch.stack([x[:, 0].sqrt(), x[:, 1] / 1.09], dim=-1)
        scale = torch.stack([0.15 / x[:, 0].sqrt(), torch.full_like(x[:, 1], 0.3 / math.sqrt(1.09))], dim=-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def test_a_guide_that_knows_one_of_two_modes_misses_half(float64):
    seen = landscape(Squares(), torch.tensor([[2.0, 0.5]]))
    np.testing.assert_allclose(seen["posterior_mean"], [0, 0.5 / 1.09], atol=1e-5)
    assert 0.5 < seen.attrs["total_variation"] < 0.55
    assert math.log(2) < seen.attrs["kl"] < math.log(2) + 0.05


def test_a_grid_too_coarse_for_the_guide_is_doubted(float64):
    story = linear_gaussian(6, 2, widened=0.003)
    with pytest.warns(UserWarning, match="Raise size"):
        landscape(story, torch.zeros(1, 6), size=21)


# Traversals -----------------------------------------------------------------------------------------------------------


def test_a_traversal_moves_one_unit_over_its_prior_quantiles():
    x = points(20, latent_dim=3)
    seen = traversals(plain_story(3), x, observation=7, num_steps=5, reach=0.8)
    quantiles = [0.1, 0.3, 0.5, 0.7, 0.9]
    np.testing.assert_allclose(seen["step"], quantiles)
    for place, number in enumerate(seen["number"].values):
        expected = np.tile(x[7], (5, 1))
        expected[:, number] = norm.ppf(quantiles)
        np.testing.assert_allclose(seen["decoded"][place], expected, atol=1e-5)
        np.testing.assert_allclose(seen["value"][place], norm.ppf(quantiles), atol=1e-5)
    np.testing.assert_allclose(seen["center"], x[7], rtol=1e-6)
    np.testing.assert_allclose(seen["effect"], norm.ppf(quantiles).std() / math.sqrt(3), rtol=1e-5)


def test_units_come_by_the_variance_of_their_posterior_means():
    x = points(20, latent_dim=3) * torch.tensor([0.01, 2.0, 1.0])
    seen = traversals(plain_story(3), x)
    assert seen["latent"].values.tolist() == ["z[1]", "z[2]", "z[0]"]
    np.testing.assert_allclose(seen["activity"], x.numpy().var(0)[[1, 2, 0]], rtol=1e-4)
    assert (seen.attrs["num_active"], seen.attrs["num_latents"]) == (2, 3)


def test_activity_is_measured_against_the_prior():
    prior = dist.Normal(torch.zeros(2), torch.tensor([5.0, 0.1])).to_event(1)
    x = points(20)
    seen = traversals(plain_story(prior=prior), x)
    np.testing.assert_allclose(seen["activity"], x.numpy().var(0)[[1, 0]] / np.square([0.1, 5.0]), rtol=1e-4)


class First(nn.Module):
    """Looks at the first latent alone."""

    def forward(self, z):
        return z[..., :1]


def test_a_unit_that_the_decoder_ignores_has_no_effect():
    story = plain_story(3)
    story.decoder, story.encoder = likelihoods.Normal(First(), scale=1.0), Widened()
    seen = traversals(story, points(9, latent_dim=1)).sortby("number")
    assert seen["effect"].values[0] > 1 and (seen["effect"].values[1:] == 0).all()


class Widened(nn.Module):
    def forward(self, x):
        return dist.Normal(x.expand(*x.shape[:-1], 3), SCALE).to_event(1)


def test_without_an_observation_traversals_depart_from_the_priors_median():
    seen = traversals(plain_story(3), points(5, 3), observation=None, units=[2])
    np.testing.assert_allclose(seen["decoded"][0, :, :2], 0, atol=1e-6)
    np.testing.assert_allclose(seen["center"], 0, atol=1e-6)
    assert seen.attrs["observation"] == -1 and seen["number"].values.tolist() == [2] and "x" not in seen


def test_a_users_own_story_of_several_sites_is_traversed():
    seen = traversals(TwoLatents(), rows(), num_steps=3, reach=0.9)
    assert sorted(seen["latent"].values.tolist()) == ["factors[0]", "factors[1]", "size"]
    of_size = seen["value"].sel(latent="size")
    np.testing.assert_allclose(of_size, scipy.stats.lognorm(s=0.5).ppf([0.05, 0.5, 0.95]), rtol=1e-4)


# Interpolation --------------------------------------------------------------------------------------------------------


def test_the_ends_of_every_path_are_the_reconstructions_of_the_ends():
    story = small_vae()
    seen = interpolation(story, images(), first=3, second=11)
    with torch.no_grad():
        expected = story.decoder(story.encoder(images()[[3, 11]]).mean).mean
    for path in ("line", "sphere"):
        np.testing.assert_allclose(seen["decoded"].sel(path=path)[[0, -1]], expected, atol=1e-5)
    assert np.array_equal(seen["x"], images()[[3, 11]])


def test_paths_have_the_densities_of_their_places(float64):
    x = points(5, 3).double()
    seen = interpolation(plain_story(3).double(), x, first=1, second=4, num_steps=6)
    z = seen["z"].values
    np.testing.assert_allclose(z[0], np.linspace(x[1].numpy(), x[4].numpy(), 6), atol=1e-10)
    np.testing.assert_allclose(seen["log_prior"], norm.logpdf(z).sum(-1), rtol=1e-8)
    for end, number in (("first", 1), ("second", 4)):
        expected = norm.logpdf(x[number].numpy(), z, 0.5).sum(-1)
        np.testing.assert_allclose(seen["log_likelihood"].sel(end=end), expected, rtol=1e-6)
    np.testing.assert_allclose(seen["norm"], np.linalg.norm(z, axis=-1), rtol=1e-6)


def test_the_great_circle_is_that_of_scipy(float64):
    first, second = (end / end.norm() for end in points(2, 5).double())
    share = torch.linspace(0, 1, 7)
    expected = geometric_slerp(first.numpy(), second.numpy(), share.numpy())
    np.testing.assert_allclose(great_circle(first, second, share[:, None]), expected, atol=1e-12)


def test_the_great_circle_keeps_its_distance_and_the_line_does_not():
    x = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    seen = interpolation(plain_story(), x, first=0, second=1, num_steps=9)
    np.testing.assert_allclose(seen["norm"].sel(path="sphere"), 3, rtol=1e-5)
    assert seen["norm"].sel(path="line").min() == pytest.approx(3 / math.sqrt(2), rel=1e-5)
    assert seen.attrs["angle"] == pytest.approx(90, abs=1e-3)


@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0])
def test_ends_without_a_great_circle_between_them_are_joined_by_the_line(factor):
    first = torch.tensor([1.0, 2.0])
    path = great_circle(first, factor * first, torch.tensor([[0.0], [0.5], [1.0]]))
    np.testing.assert_allclose(path[1], (1 + factor) / 2 * first, atol=1e-6)


def test_the_great_circle_is_measured_in_prior_standard_deviations():
    loc, scale = torch.tensor([5.0, -5.0]), torch.tensor([10.0, 0.1])
    x = loc + scale * torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    seen = interpolation(plain_story(prior=dist.Normal(loc, scale).to_event(1)), x, first=0, second=1, num_steps=5)
    standardized = (seen["z"].sel(path="sphere").values - loc.numpy()) / scale.numpy()
    np.testing.assert_allclose(np.linalg.norm(standardized, axis=1), 2, rtol=1e-4)


@pytest.mark.parametrize("prior", [correlated(), priors.StandardNormal(1)])
def test_without_independent_normals_there_is_the_line_alone(prior):
    dim = prior.event_shape.numel() if isinstance(prior, dist.MultivariateNormal) else 1
    seen = interpolation(plain_story(prior=prior), points(3, dim), first=0, second=2)
    assert seen["path"].values.tolist() == ["line"]


def test_each_end_is_scored_with_its_own_conditions():
    story, x, y = small_conditional(), images(), labels()
    seen = interpolation(story, x, y, first=0, second=2)
    with torch.no_grad():
        z = torch.as_tensor(seen["z"].values[0])
        expected = story.decoder(z, y[2].expand(len(z))).log_prob(x[2].expand(len(z), 1, 6, 5))
        decoded = story.decoder(z, y[0].expand(len(z))).mean
    np.testing.assert_allclose(seen["log_likelihood"].sel(path="line", end="second"), expected, rtol=1e-4)
    np.testing.assert_allclose(seen["decoded"].sel(path="line"), decoded, atol=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    "three dimensions": (
        lambda: atlas(plain_story(3), points(4, 3)),
        "atlas shows two latent dimensions; this .* 3",
    ),
    "several sites": (
        lambda: landscape(TwoLatents(), rows()),
        "landscape shows two latent dimensions; this .* 3",
    ),
    "one dimension": (lambda: atlas(TwoClusters(), torch.linspace(-1, 1, 4)), "this story has 1"),
    "discrete latents": (
        lambda: atlas(ThreeKinds(), torch.linspace(-1, 1, 4)),
        "all latents of this story are disc",
    ),
    "discrete traversal": (lambda: traversals(ThreeKinds(), torch.zeros(4)), "A traversal needs continuous latents"),
    "labels of another length": (lambda: atlas(plain_story(), points(), labels=torch.arange(3)), "one whole number"),
    "labels that are not whole": (lambda: atlas(plain_story(), points(), labels=torch.rand(6)), "one whole number"),
    "size": (lambda: atlas(plain_story(), points(), size=1), "size must be at least 2"),
    "num_nearest": (lambda: atlas(plain_story(), points(), num_nearest=0), "num_nearest must be at least 1"),
    "no such observation": (lambda: landscape(plain_story(), points(), observation=6), "from 0 to 5; found 6"),
    "counted from the end": (lambda: traversals(plain_story(), points(), observation=-1), "from 0 to 5; found -1"),
    "no such end": (lambda: interpolation(plain_story(), points(), first=0, second=9), "from 0 to 5; found 9"),
    "no such unit": (lambda: traversals(plain_story(), points(), units=[2]), "from 0 to 1; found"),
    "reach": (lambda: traversals(plain_story(), points(), reach=1.0), "reach is a share"),
    "steps": (lambda: interpolation(plain_story(), points(), first=0, second=1, num_steps=1), "num_steps"),
    "a map without labels": (lambda: pictures.entropy_map(atlas(plain_story(), points())), "needs labels"),
    "an atlas of no images": (lambda: pictures.atlas(atlas(plain_story(), points())), "The atlas draws images"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_apply_is_refused_in_the_callers_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class TwoScored(TwoKinds):
    """Scores two sites, neither of which is a column as it is."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("where", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for number in range(2):
                pyro.sample(f"x{number}", dist.Normal(z[..., number], 1.0), obs=x[:, number])


def test_a_story_with_two_sites_to_decode_is_refused():
    with pytest.raises(ValueError, match="decodes the site that scores the first column"):
        atlas(TwoScored(), points())


# What is left alone ---------------------------------------------------------------------------------------------------

COMPUTED = {
    "atlas": lambda story: atlas(story, images(6), labels=labels(6), size=3),
    "landscape": lambda story: landscape(story, images(6), observation=2, size=41),
    "traversals": lambda story: traversals(story, images(6), num_steps=3),
    "interpolation": lambda story: interpolation(story, images(6), first=0, second=1, num_steps=3),
}
DRAWN = {
    "atlas": pictures.atlas,
    "landscape": pictures.landscape,
    "traversals": pictures.traversals,
    "interpolation": pictures.interpolation,
    "entropy_map": pictures.entropy_map,
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_generator_and_modes_are_left_alone_and_results_come_again(compute):
    story = small_vae()
    story.encoder.eval()
    modes = [module.training for module in story.modules()]
    state = torch.get_rng_state()
    first = compute(story)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in story.modules()] == modes
    torch.rand(3)
    assert compute(story).identical(first)


class Squashed(nn.Module):
    """x = sigmoid(N(z, 0.1^2)), whose mean has no closed form."""

    def forward(self, z):
        to_unit_interval = torch.distributions.transforms.SigmoidTransform()
        return dist.TransformedDistribution(dist.Normal(z, 0.1), to_unit_interval).to_event(1)


def test_means_without_a_closed_form_are_those_of_draws_in_their_own_unit_of_noise():
    story, x = plain_story(), points().sigmoid()
    story.decoder = Squashed()
    state = torch.get_rng_state()
    seen, again, other = (atlas(story, x, size=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert seen.identical(again) and not seen["decoded"].equals(other["decoded"])
    assert np.abs(seen["decoded"].values - scipy.special.expit(seen["z"].values)).max() < 0.1 / 4 * 5 / 8


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_double_precision_story_gives_the_same_numbers(compute):
    torch.manual_seed(0)
    story = small_vae()
    single = compute(story)
    double = compute(story.double())
    for name in ("decoded", "log_posterior", "log_prior"):
        if name in single and "up" not in single.dims:  # a landscape's grid moves with the rounding of its prior
            np.testing.assert_allclose(single[name], double[name], rtol=1e-3, atol=1e-4)
    for name in ("kl", "log_evidence", "share_inhabited", "num_active"):
        if name in single.attrs:
            assert single.attrs[name] == pytest.approx(double.attrs[name], rel=1e-3)


@pytest.mark.parametrize("draw", DRAWN)
def test_what_is_read_from_a_file_is_what_was_saved_and_becomes_a_picture(draw, tmp_path):
    computed = COMPUTED["atlas" if draw == "entropy_map" else draw](small_vae())
    computed.to_netcdf(tmp_path / "table.nc", engine="h5netcdf")
    again = xr.load_dataset(tmp_path / "table.nc", engine="h5netcdf")
    xr.testing.assert_equal(again, computed)
    assert png(DRAWN[draw](again)).startswith(b"\x89PNG\r\n\x1a\n")


# The pictures ---------------------------------------------------------------------------------------------------------


def test_ellipses_are_one_and_two_standard_deviations_of_the_guide(float64):
    computed = landscape(linear_gaussian(6, 2), rows(4)[:, [0, 1, 2, 3, 4, 0]].double(), size=41)
    left = pictures.landscape(computed).axes[0]
    root = np.linalg.inv(np.linalg.cholesky(computed["guide_covariance"].values))
    assert len(left.patches) == 2
    for ellipse, distance in zip(left.patches, (1, 2), strict=True):
        outline = ellipse.get_patch_transform().transform(ellipse.get_path().vertices[:-1:3])
        away = (outline - computed["guide_mean"].values) @ root.T
        np.testing.assert_allclose(np.linalg.norm(away, axis=1), distance, rtol=1e-3)
    assert (left.get_xlabel(), left.get_ylabel()) == ("z[0]", "z[1]")


def test_the_entropy_map_names_each_region_once_and_leaves_empty_places_out():
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(30, 1)
    computed = atlas(plain_story(), x, labels=torch.tensor([3, 8]).repeat(30), size=10)
    axes = pictures.entropy_map(computed).axes[0]
    names = {text.get_text(): text.get_position() for text in axes.texts}
    assert list(names) == ["3", "8"] and names["3"][0] < 0.5 < names["8"][0]
    assert np.array_equal(axes.images[0].get_array().mask, computed["inhabited"].values == 0)
    (borders,) = axes.collections
    assert all(np.allclose(segment[:, 0], 0.5) for segment in borders.get_segments())
    assert len(borders.get_segments()) == int(computed["inhabited"].values[:, 4:6].all(1).sum())


def test_each_traversal_is_a_row_of_its_decoded_images():
    computed = traversals(small_vae(), images(6), num_steps=4)
    figure = pictures.traversals(computed)
    assert len(figure.axes) == 2
    for axes, name, strip in zip(figure.axes, computed["latent"].values, computed["decoded"].values, strict=True):
        assert axes.get_ylabel().startswith(name)
        np.testing.assert_allclose(axes.images[0].get_array()[:6, 6:11], strip[1, 0], atol=1e-6)
    assert len(pictures.traversals(computed, num_units=1).axes) == 1


def test_observations_that_are_no_images_are_drawn_as_heat():
    computed = traversals(plain_story(3), points(9, 3), num_steps=4)
    for axes, strip in zip(pictures.traversals(computed).axes, computed["decoded"].values, strict=False):
        np.testing.assert_allclose(axes.images[0].get_array(), strip.T)
    of_path = pictures.interpolation(interpolation(plain_story(3), points(9, 3), first=0, second=1)).axes[0]
    assert of_path.images[0].get_array().shape == (3, 10)


def test_interpolation_draws_the_densities_along_each_path():
    computed = interpolation(small_vae(), images(6), first=0, second=1, num_steps=4)
    *_, prior, likelihood = pictures.interpolation(computed).axes
    for line, path in zip(prior.lines, ("line", "sphere"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), computed["log_prior"].sel(path=path))
    assert len(likelihood.lines) == 4
