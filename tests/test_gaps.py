"""The two gaps are the Kullback-Leibler divergences that they should be, and refuse guides that have none."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import (
    ClustersInGuide,
    ExactPosterior,
    GammaPoisson,
    HierarchicalNormal,
    ShiftedNormal,
    ThreeKinds,
    TwoClusters,
    closed_form_log_evidence,
    images,
    labels,
    linear_gaussian,
    small_conditional,
    small_vae,
    two_clusters_log_evidence,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae import VAE, likelihoods, log_evidence, networks, posteriors, priors
from ppl_vae.diagnostics.gaps import gaps
from ppl_vae.evidence import Evidence
from ppl_vae.plots.gaps import gaps as picture

QUICK = {"num_steps": 150, "num_particles": 500, "progress": False}


class Altered(ExactPosterior):
    """A linear-Gaussian story's posterior, shifted by a number of marginal sds, narrowed, and without correlations."""

    def __init__(self, decoder, shift=0.0, widened=1.0, diagonal=False):
        super().__init__(decoder, widened)
        self.shift, self.diagonal = shift, diagonal

    def forward(self, x: Tensor):
        q = super().forward(x)
        sd = q.variance.sqrt()
        loc = q.mean + self.shift * sd
        if self.diagonal:
            return dist.Normal(loc, sd).to_event(1)
        return dist.MultivariateNormal(loc, scale_tril=q.scale_tril)


def altered(latent_dim, num_observations=32, **how):
    story = linear_gaussian(num_features=6, latent_dim=latent_dim)
    x = story.model(num_observations=num_observations).detach()
    return VAE(story.prior, story.decoder, Altered(story.decoder, **how)), x


def divergences(story, x):
    """KL(q || p) of the guide, and the smallest one of independent normals, in closed form; shapes (N,)."""
    posterior = ExactPosterior(story.decoder)(x)
    own = story.encoder(x)
    q = (
        own
        if isinstance(own, dist.MultivariateNormal)
        else torch.distributions.MultivariateNormal(own.mean, torch.diag_embed(own.variance))
    )
    precision = posterior.precision_matrix
    smallest = (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - precision.logdet()) / 2
    return kl_divergence(q, posterior).detach().numpy(), smallest.detach().expand(len(x)).numpy()


def agrees(table, name, truth, errors=5.0, systematic=0.01):
    """Whether each value lies within its errors of the truth, and the mean within its own."""
    shift = abs(table[f"{name}_gap"].values - truth)
    mean = abs(table.attrs[f"mean_{name}_gap"] - np.mean(truth))
    each = (shift < errors * table[f"{name}_gap_error"].values + systematic).all()
    return bool(each and mean < errors * table.attrs[f"mean_{name}_gap_error"] + systematic)


@pytest.mark.parametrize("how", [{}, {"diagonal": True}])
def test_an_exact_guide_has_no_gaps(float64, how):
    story, x = altered(1, **how)
    table = gaps(story, x, **QUICK)
    assert abs(table["amortization_gap"]).max() < 1e-4
    assert abs(table["approximation_gap"]).max() < 1e-4
    assert table.attrs["share_converged"] == 1
    np.testing.assert_allclose(table["elbo"], closed_form_log_evidence(story, x), atol=1e-6)


@pytest.mark.parametrize("how", [{"widened": 0.7}, {"shift": 0.5}, {"shift": -1.0, "widened": 1.5}])
def test_what_a_full_normal_misses_is_amortization(float64, how):
    story, x = altered(2, **how)
    table = gaps(story, x, **QUICK)
    own, _ = divergences(story, x)
    assert own.min() > 0.1
    assert agrees(table, "amortization", own) and agrees(table, "approximation", 0.0)
    assert table.attrs["family"] == "full normal" and table.attrs["share_converged"] == 1


@pytest.mark.parametrize("how", [{"widened": 0.7}, {"shift": 0.5}])
def test_a_diagonal_guide_of_a_correlated_posterior_has_both_gaps(float64, how):
    story, x = altered(3, diagonal=True, **how)
    table = gaps(story, x, **QUICK)
    own, smallest = divergences(story, x)
    assert smallest.min() > 0.05 and (own - smallest).min() > 0.05
    assert agrees(table, "approximation", smallest) and agrees(table, "amortization", own - smallest)
    assert table.attrs["family"] == "diagonal normal" and table.attrs["share_converged"] == 1


def test_the_parts_add_up_to_the_distance():
    table = gaps(small_vae(), images(), **QUICK)
    distance = table["log_evidence"] - table["elbo"]
    np.testing.assert_allclose(table["approximation_gap"] + table["amortization_gap"], distance, atol=1e-5)
    for name in ("elbo", "approximation_gap"):
        assert table.attrs[f"mean_{name}"] == pytest.approx(float(table[name].mean()))
        of_mean = np.sqrt((table[f"{name}_error"] ** 2).sum()) / 40
        assert table.attrs[f"mean_{name}_error"] == pytest.approx(float(of_mean))


def test_the_elbo_is_that_of_the_package():
    story, x = small_vae(), images()
    table, own = gaps(story, x, **QUICK), log_evidence(story, x, method="elbo", num_particles=1000)
    error = np.hypot(table["elbo_error"].values, own["standard_error"].values)
    assert (abs(table["elbo"].values - own["estimate"].values) < 5 * error).all()


def test_the_evidence_does_not_lean_on_the_guide_alone(float64):
    """A guide far too narrow has weights that look good now and then; log p(x) comes from elsewhere."""
    story, x = altered(2, widened=0.3)
    table = gaps(story, x, **QUICK, evidence=log_evidence(story, x, method="importance", num_particles=100))
    assert (abs(table["log_evidence"] - closed_form_log_evidence(story, x).numpy()) < 0.05).all()


def test_a_search_that_was_too_short_says_so(float64):
    story, x = altered(2, shift=20.0)
    table = gaps(story, x, num_steps=3, num_particles=100, progress=False)
    assert table.attrs["share_converged"] == 0


def test_the_best_is_never_much_worse_than_the_guide():
    """With two far too long steps the end is worse than the start, which then counts."""
    story, x = altered(2)
    table = gaps(story, x, num_steps=2, num_particles=200, progress=False)
    assert table["amortization_gap"].min() > -5 * table["amortization_gap_error"].max() - 1e-4


# Stories


def test_conditions_are_given_to_model_and_guide(float64):
    columns = torch.linspace(-2, 3, 8), torch.arange(8.0) % 3
    table = gaps(ShiftedNormal(), *columns, **QUICK)
    x, y = columns
    loc, variance = 0.8 * (x - y), 0.2
    own = kl_divergence(torch.distributions.Normal((x - y) / 1.25, 0.6), torch.distributions.Normal(loc, variance**0.5))
    assert agrees(table, "amortization", own.numpy()) and agrees(table, "approximation", 0.0)
    assert gaps(small_conditional(), images(), labels(), **QUICK).sizes["observation"] == 40


class TwoNormals(nn.Module):
    """Independent latents a and b, each seen through noise: a full normal of one site, a diagonal one of the other."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(1.0, 2.0))
            pyro.sample(
                "x", dist.Normal(torch.cat([a, b[..., None]], -1), torch.tensor([1.0, 0.5, 2.0])).to_event(1), obs=x
            )

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("a", dist.MultivariateNormal(torch.zeros(len(x), 2), 0.5 * torch.eye(2)))


def test_sites_of_different_families_are_searched_together(float64):
    x = torch.linspace(-2, 2, 24).reshape(8, 3)
    table = gaps(TwoNormals(), x, **QUICK)
    prior_sd, noise_sd, prior_loc = torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 0.5, 2]), torch.tensor([0.0, 0, 1])
    variance = 1 / (prior_sd**-2 + noise_sd**-2)
    posterior = torch.distributions.Normal(variance * (prior_loc / prior_sd**2 + x / noise_sd**2), variance.sqrt())
    q = torch.distributions.Normal(torch.zeros(3), torch.tensor([0.5**0.5, 0.5**0.5, 1.0]))
    assert agrees(table, "amortization", kl_divergence(q, posterior).sum(-1).numpy())
    assert agrees(table, "approximation", 0.0)


def test_marked_discrete_latents_are_summed_out(float64):
    story, x = TwoClusters(), torch.linspace(-2, 3, 8)
    table = gaps(story, x, **QUICK)
    np.testing.assert_allclose(table["log_evidence"], two_clusters_log_evidence(story, x), atol=1e-3)
    assert (table["approximation_gap"] > -5 * table["approximation_gap_error"]).all()
    assert (table["approximation_gap"] < np.log(2) + 0.05).all()  # that of the likelier of two normals is no larger
    assert table["amortization_gap"].max() > 5


def flow_vae():
    encoder = posteriors.Flow(
        networks.mlp(5, 12), 2, posteriors.inverse_autoregressive(2, context_dim=8, hidden_dims=(8,))
    )
    return VAE(priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, 5)), encoder)


@pytest.mark.parametrize(
    ("story", "x", "message"),
    [
        (GammaPoisson(), torch.arange(4.0), "site 'rate' is a Gamma"),
        (HierarchicalNormal(), torch.zeros(4, 3), "site 'top' depends on what it drew at another site"),
        (ThreeKinds(), torch.zeros(4), "guides that draw continuous latents"),
        (ClustersInGuide(), torch.zeros(4), "guides that draw continuous latents"),
        (flow_vae(), torch.ones(4, 5), "searched for among normals only"),
    ],
)
def test_guides_without_gaps_are_refused(story, x, message):
    with pytest.raises(ValueError, match="The gaps are unavailable for this story") as error:
        gaps(story, x)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["num_steps", "num_particles"])
def test_wrong_numbers_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        gaps(small_vae(), images(4), **{name: 0})


def test_evidence_of_other_data_is_refused():
    story, x = small_vae(), images(6)
    evidence = log_evidence(story, x, method="importance", num_particles=50)
    with pytest.raises(ValueError, match="The evidence is of 6 observations; the columns have 4 rows"):
        gaps(story, x[:4], evidence=evidence)
    with pytest.raises(ValueError, match="other data: its fingerprint"):
        gaps(story, 1 - x, evidence=evidence)


def test_known_evidence_is_taken_as_it_is():
    story, x = small_vae(), images(6)
    evidence = log_evidence(story, x, method="quadrature")
    table = gaps(story, x, evidence=evidence, **QUICK)
    np.testing.assert_array_equal(table["log_evidence"], evidence["estimate"])
    assert set(table["verdict"].values) == {"exact"}


def test_only_rows_of_the_guide_alone_are_estimated_anew():
    story, x = small_vae(), images(6)
    exact = log_evidence(story, x, method="quadrature").dataset
    mixed = exact.assign(method=("observation", np.array(["quadrature", "importance", "quadrature"] * 2)))
    mixed = mixed.assign(verdict=("observation", np.array(["good"] * 6)), estimate=exact["estimate"] + [0, 50] * 3)
    table = gaps(story, x, evidence=Evidence(mixed.assign_attrs(exact.attrs)), **QUICK)
    anew = np.array([False, True, False] * 2)
    np.testing.assert_array_equal(table["log_evidence"].values[~anew], mixed["estimate"].values[~anew])
    np.testing.assert_allclose(table["log_evidence"].values[anew], exact["estimate"].values[anew], atol=0.1)


# Noise


def test_the_seed_rules_and_generator_modes_and_gradients_are_left_alone():
    story, x = small_vae(), images(34)
    state = torch.get_rng_state()
    first, again, other = (
        gaps(story, x, num_steps=5, num_particles=150, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert story.training and all(parameter.grad is None for parameter in story.parameters())
    assert first.equals(again)
    assert not np.allclose(first["elbo"], other["elbo"])


def test_an_observation_does_not_depend_on_other_blocks():
    story, x = small_vae(), images(40)
    settings = {"num_steps": 10, "num_particles": 100, "progress": False}
    together, alone = (gaps(story, part, **settings)["best_elbo"].values for part in (x, x[:32]))
    np.testing.assert_allclose(together[:32], alone, atol=1e-3)


def test_a_table_becomes_netcdf(tmp_path):
    table = gaps(small_vae(), images(4), num_steps=3, num_particles=20, progress=False)
    table.to_netcdf(tmp_path / "gaps.nc", engine="h5netcdf")
    assert (tmp_path / "gaps.nc").stat().st_size > 0


# The picture


def test_the_picture_stacks_the_parts_up_to_the_distance():
    table = gaps(small_vae(), images(7), num_steps=20, num_particles=100, progress=False)
    table["converged"][:] = 1
    figure = picture(table)
    assert isinstance(figure, Figure)
    left, right = figure.axes
    bars = left.patches
    tops = [bar.get_y() + bar.get_height() for bar in bars[7:]]
    np.testing.assert_allclose(tops, np.sort(table["log_evidence"] - table["elbo"]), atol=1e-5)
    means = [bar.get_height() for bar in right.patches]
    np.testing.assert_allclose(means, [table.attrs[f"mean_{name}_gap"] for name in ("approximation", "amortization")])
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["approximation", "amortization"]


def test_the_picture_marks_what_is_not_to_be_believed():
    table = gaps(small_vae(), images(7), num_steps=20, num_particles=100, progress=False)
    table["converged"][3], table["verdict"][5] = 0, "poor"
    (left, _) = picture(table).axes
    words = [text.get_text() for text in left.get_legend().get_texts()]
    assert {"search not converged", "evidence not trusted"} < set(words)
