"""Outliers: what was planted is found, and little else is flagged."""

import numpy as np
import pytest
import scipy.stats
import torch
from example_stories import (
    ClustersInGuide,
    ShiftedNormal,
    TwoClusters,
    TwoLatents,
    closed_form_log_evidence,
    images,
    linear_gaussian,
    rows,
    small_vae,
)

from ppl_vae import likelihoods, log_evidence, networks, posteriors, priors, stories, traces
from ppl_vae.diagnostics.outliers import outliers, two_sided_p_value
from ppl_vae.evidence.bounds import simulate
from ppl_vae.plots.outliers import outliers as drawn

FEW = {"method": "importance", "num_particles": 4, "num_simulated": 200}


def made_by(story, num_observations=100, seed=7):
    return traces.draws(traces.prior_predictive(story, num_observations, seed=seed))["x"]


@pytest.fixture(scope="module")
def planted():
    """100 observations of a story with D = 50; the first three far away, the next three at the mode of p(x)."""
    torch.set_default_dtype(torch.float64)
    story = linear_gaussian(50, 3)
    x = made_by(story)
    x[:3] += 20
    x[3:6] = story.decoder.loc.bias.detach()
    found = outliers(story, x, **FEW)
    torch.set_default_dtype(torch.float32)
    return story, x, found


# What is found --------------------------------------------------------------------------------------------------------


def test_observations_far_away_are_unlikely(planted):
    assert set(planted[2]["kind"].values[:3]) == {"unlikely"}
    assert set(planted[2].attrs["most_unlikely"][:3]) == {0, 1, 2}


def test_observations_at_the_mode_of_many_dimensions_are_too_likely(planted):
    assert set(planted[2]["kind"].values[3:6]) == {"too likely"}
    assert set(planted[2].attrs["most_likely"][:3]) == {3, 4, 5}


def test_what_was_not_planted_is_typical(planted):
    found = planted[2]
    assert (found["kind"].values[6:] != "typical").sum() <= 1
    assert found.attrs["num_unlikely"] + found.attrs["num_too_likely"] == (found["kind"] != "typical").sum()


def test_the_typical_value_is_minus_the_entropy(planted):
    story, _, found = planted
    weight = story.decoder.loc.weight.detach()
    covariance = weight @ weight.T + 0.5**2 * torch.eye(50, dtype=torch.float64)
    entropy = torch.distributions.MultivariateNormal(torch.zeros(50, dtype=torch.float64), covariance).entropy().item()
    about = found.attrs
    assert abs(about["typical_log_p"] + entropy) < 4 * np.sqrt(25 / 200)  # Var log p = D / 2
    assert about["typical_sd"] == pytest.approx(5, rel=4 * np.sqrt(0.7 / 200))
    mode = found["log_p"].values[3]
    assert found["distance"].values[3] == pytest.approx((mode - about["typical_log_p"]) / about["typical_sd"])


def test_the_terms_tell_what_is_odd(planted):
    """Far from what any latent makes; and with a latent of zero, where the prior is densest."""
    found = planted[2]
    assert (found["reconstruction_distance"].values[:3] < -100).all()
    assert (found["kl_distance"].values[3:6] < 0).all()


def test_an_exact_guide_divides_log_p_into_its_terms(planted):
    story, x, found = planted
    torch.set_default_dtype(torch.float64)
    truth = closed_form_log_evidence(story, x).numpy()
    torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(found["log_p"], truth, rtol=1e-9)
    np.testing.assert_allclose(found["reconstruction"] - found["kl"], truth, rtol=1e-9)


def test_the_kl_is_that_of_the_closed_form(float64):
    story = linear_gaussian(5, 2)
    x = made_by(story, 40)
    found = outliers(story, x, **FEW)
    q = story.encoder(x)
    p = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    truth = torch.distributions.kl_divergence(q, p).detach().numpy()
    # Of 32 draws the log ratio has the variance of K / 2 and of a linear term, at most 2 KL.
    assert np.abs(found["kl"] - truth).max() < 4.5 * np.sqrt((2 / 2 + 2 * truth.max()) / 32)


def test_all_data_that_are_odd_alike_stand_apart_as_a_whole(float64):
    story = linear_gaussian(50, 3)
    x = story.decoder.loc.bias.detach() + 0.3 * (made_by(story) - story.decoder.loc.bias.detach())
    found = outliers(story, x, **FEW)
    assert found.attrs["ks_distance"] > 0.9 and found.attrs["mean_distance"] > 2
    assert found.attrs["num_too_likely"] > 90
    assert abs(np.median(found["peer_distance"])) < 1e-12


# How often something is flagged ---------------------------------------------------------------------------------------


def test_p_values_of_the_same_distribution_are_those_of_a_uniform():
    generator = np.random.default_rng(0)
    found = np.concatenate([two_sided_p_value(*generator.gamma(5.0, size=(2, 500))) for _ in range(20)])
    for level in (0.01, 0.05, 0.2, 0.5):  # 500 p-values share a reference of 500: their number varies twice as much
        assert np.mean(found <= level) <= level + 4 * np.sqrt(2 * level * (1 - level) / len(found))
    assert np.mean(found <= 0.5) >= 0.5 - 4 * np.sqrt(2 * 0.25 / len(found))


def test_clean_data_are_rarely_flagged():
    """The false discovery rate: the chance that anything at all is flagged where nothing is odd."""
    generator = np.random.default_rng(1)
    flagged = []
    for _ in range(40):
        adjusted = scipy.stats.false_discovery_control(two_sided_p_value(*generator.gamma(5.0, size=(2, 400))))
        flagged.append((adjusted <= 0.05).any())
    assert np.mean(flagged) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 40)


def test_a_lone_outlier_is_found_beyond_the_smallest_rank():
    """Its rank can say no less than 2 / 501, which 500 tests adjust away."""
    generator = np.random.default_rng(2)
    values, reference = generator.gamma(5.0, size=(2, 500))
    values[0] = 40.0
    adjusted = scipy.stats.false_discovery_control(two_sided_p_value(values, reference))
    assert adjusted[0] < 0.01 < 500 * 2 / 501


def test_p_values_in_the_tail_are_near_the_truth():
    generator = np.random.default_rng(3)
    places = scipy.stats.expon.isf([1e-2, 1e-3, 1e-4])
    fitted = [two_sided_p_value(places, generator.exponential(size=1000)) for _ in range(20)]
    truth = np.log([2e-2, 2e-3, 2e-4])
    np.testing.assert_allclose(np.mean(np.log(fitted), axis=0), truth, atol=0.7)


def test_minus_infinity_is_possible_and_unlikely():
    reference = np.random.default_rng(0).normal(size=200)
    assert two_sided_p_value(np.array([-np.inf]), reference).item() == 0


def test_equal_values_are_not_odd():
    assert two_sided_p_value(np.ones(3), np.ones(100)).tolist() == [1, 1, 1]


# Evidence -------------------------------------------------------------------------------------------------------------


def test_evidence_that_is_known_is_not_estimated_again(float64):
    story = linear_gaussian(5, 2, widened=1.3)
    x = made_by(story, 40)
    evidence = log_evidence(story, x, method="laplace", num_particles=20, seed=5)
    found = outliers(story, x, evidence=evidence, num_simulated=60)
    assert np.array_equal(found["log_p"], evidence["estimate"])
    simulated, _ = simulate(story, (x,), 60, 0)
    again = log_evidence(story, *simulated, method="laplace", num_particles=20, seed=0)
    assert np.array_equal(found["simulated_log_p"], again["estimate"])
    assert (found.attrs["method"], found.attrs["num_particles"]) == ("laplace", 20)


def test_evidence_of_other_data_is_refused(float64):
    story = linear_gaussian(5, 2)
    x = made_by(story, 40)
    evidence = log_evidence(story, x + 1, method="importance", num_particles=2)
    for other in (x, x[:10]):
        with pytest.raises(ValueError, match="Expected evidence of these"):
            outliers(story, other, evidence=evidence)


def test_what_is_badly_estimated_is_said_to_be(float64):
    found = outliers(linear_gaussian(10, 5, widened=0.2), made_by(linear_gaussian(10, 5), 40), **FEW)
    assert (found["doubtful"].values == ~found["verdict"].isin(["exact", "good"])).all()
    assert found["doubtful"].mean() > 0.5 and found.attrs["num_simulated_doubtful"] > 50


# Stories --------------------------------------------------------------------------------------------------------------


def test_an_observation_is_compared_with_those_under_its_condition(float64):
    """Given y the story makes x around y: 2 is odd under 0, and would not be among all."""
    y = torch.arange(60.0) % 2 * 10
    x = y + 0.5 * torch.randn(60)
    x[0] = 10.0
    found = outliers(ShiftedNormal(), x, y, method="importance", num_particles=50, num_simulated=240)
    assert found["kind"].values[0] == "unlikely" and found.attrs["num_unlikely"] == 1
    assert found.attrs["compared_within"] == "conditions"


def test_many_conditions_are_compared_together(float64):
    y = torch.linspace(-1, 1, 50)
    found = outliers(ShiftedNormal(), y + torch.randn(50), y, **FEW)
    assert found.attrs["compared_within"] == "all"


@pytest.mark.parametrize("story", [TwoClusters, ClustersInGuide])
def test_discrete_latents_are_summed_out_or_drawn(story):
    x = torch.cat([torch.tensor([60.0]), torch.linspace(-2, 2, 30)])
    found = outliers(story(), x, method="importance", num_particles=50, num_simulated=100)
    assert found["kind"].values[0] == "unlikely"
    assert np.isfinite(found["kl"]).all()


def test_data_that_cannot_be_simulated_are_refused():
    class Reader(TwoLatents):
        def model(self, x):
            return super().model(x + 0)

    with pytest.raises(ValueError, match="cannot be simulated"):
        outliers(Reader(), rows())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_discovery_rate": 1.0}, "false_discovery_rate lies between 0 and 1"),
        ({"num_simulated": 10}, "num_simulated must be at least 40"),
        ({"method": "guess"}, "Unknown method 'guess'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        outliers(TwoLatents(), rows(), **arguments)


# The table and its picture --------------------------------------------------------------------------------------------


def test_the_table_is_kept(planted, tmp_path):
    planted[2].to_netcdf(tmp_path / "outliers.nc", engine="h5netcdf")


def test_generators_and_modes_are_left_alone():
    story = small_vae()
    state = torch.get_rng_state()
    outliers(story, images(), method="importance", num_particles=10, num_simulated=40)
    assert torch.equal(state, torch.get_rng_state()) and story.training


def test_the_picture_marks_what_is_flagged(planted, tmp_path):
    figure = drawn(planted[2])
    figure.savefig(tmp_path / "outliers.png")
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "too likely (3)" in words and any(word.startswith("unlikely") for word in words)
    assert any(text.get_text() == "3 lower" for text in figure.axes[0].texts)
    named = [text.get_text() for text in figure.axes[2].texts]
    assert set(named[0].split(", ")[:3]) == {"0", "1", "2"}
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_the_oddest_images_are_shown():
    x = images()
    found = outliers(small_vae(), x, method="importance", num_particles=10, num_simulated=40)
    figure = drawn(found, x)
    shown = figure.axes[2].images[0].get_array()
    first, last = (found.attrs[name][0] for name in ("most_unlikely", "most_likely"))
    assert np.array_equal(shown[:6, :5], x[first, 0]) and np.array_equal(shown[14:20, :5], x[last, 0])


def test_a_story_that_reads_a_mask_is_refused():
    story = stories.MissingValuesVAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(networks.mlp(2, 5), scale=1.0),
        encoder=posteriors.DiagonalNormal(networks.mlp(10, 4)),
    )
    with pytest.raises(ValueError, match="cannot be simulated"):
        outliers(story, rows(), torch.ones(40, 5, dtype=torch.bool))
