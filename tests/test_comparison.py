"""Comparisons of stories: paired differences against SciPy and closed forms, what is refused, and what is printed."""

import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from example_stories import closed_form_log_evidence, images, linear_gaussian, small_vae
from test_result import scored

from ppl_vae import VAE, likelihoods, log_evidence, posteriors, priors
from ppl_vae.evidence.comparison import Comparison, compare
from ppl_vae.networks import mlp


def pair(comparison: Comparison, name: str, story: str = "a", other: str = "b") -> float:
    return float(comparison[name].sel(story=story, other=other))


@pytest.fixture
def estimates() -> tuple[np.ndarray, np.ndarray]:
    """Two stories of 200 observations that are hard for both where they are hard for one."""
    generator = np.random.default_rng(0)
    common = 10 * generator.normal(size=200)
    return common + generator.normal(size=200), common + 0.3 + generator.normal(size=200)


# Ranks and differences


def test_the_best_story_comes_first():
    comparison = compare({"low": scored([-3, -3]), "high": scored([-1, -2]), "middle": scored([-2, -2])})
    assert comparison["story"].values.tolist() == comparison["other"].values.tolist() == ["high", "middle", "low"]
    assert comparison["mean"].values.tolist() == [-1.5, -2, -3]
    assert comparison.best == "high" and list(comparison.evidence) == ["high", "middle", "low"]


def test_differences_and_their_errors_are_those_of_a_paired_t_test(estimates):
    a, b = estimates
    comparison = compare({"a": scored(a), "b": scored(b)})
    test = scipy.stats.ttest_rel(a, b)
    assert pair(comparison, "difference") == pytest.approx(a.mean() - b.mean())
    assert pair(comparison, "difference") / pair(comparison, "standard_error") == pytest.approx(test.statistic)


def test_the_error_of_unpaired_means_would_hide_the_difference(estimates):
    a, b = estimates
    comparison = compare({"a": scored(a), "b": scored(b)})
    unpaired = math.hypot(*comparison["test_sampling_error"].values)
    assert abs(pair(comparison, "difference")) < unpaired
    assert pair(comparison, "standard_error") < 0.2 * unpaired


def test_pairing_the_wrong_rows_gives_another_error(estimates):
    a, b = estimates
    right, wrong = compare({"a": scored(a), "b": scored(b)}), compare({"a": scored(a), "b": scored(b[::-1])})
    assert pair(wrong, "standard_error") > 5 * pair(right, "standard_error")


def test_a_difference_changes_its_sign_and_keeps_its_error_with_the_order(estimates):
    a, b = estimates
    comparison = compare({"a": scored(a), "b": scored(b), "c": scored(2 * a, bias=-0.1)})
    for name in ("difference", "difference_bias"):
        table = comparison[name].values
        np.testing.assert_allclose(table, -table.T, atol=1e-12)
    for name in ("standard_error", "difference_monte_carlo_error"):
        table = comparison[name].values
        np.testing.assert_allclose(table, table.T)
        assert (np.diag(table) == 0).all()


def test_the_order_of_the_entries_changes_nothing(estimates):
    a, b = estimates
    here, there = compare({"a": scored(a), "b": scored(b)}), compare({"b": scored(b), "a": scored(a)})
    assert here.dataset.identical(there.dataset)


def test_monte_carlo_errors_of_two_stories_add_in_squares_and_their_biases_subtract():
    a = scored([-1, -2], standard_error=0.3 * math.sqrt(2), bias=-0.3)
    b = scored([-3, -5], standard_error=0.4 * math.sqrt(2), bias=-0.1)
    comparison = compare({"a": a, "b": b})
    np.testing.assert_allclose(comparison["monte_carlo_error"], [0.3, 0.4])
    assert pair(comparison, "difference_monte_carlo_error") == pytest.approx(0.5)
    assert pair(comparison, "difference_bias") == pytest.approx(-0.2)


def test_particles_shared_by_all_observations_add_to_the_error_of_a_difference():
    a, b = scored([-1, -2], attrs={"monte_carlo_error": 0.3}), scored([-3, -5], attrs={"monte_carlo_error": 0.4})
    comparison = compare({"a": a, "b": b})
    assert pair(comparison, "difference_monte_carlo_error") == pytest.approx(0.7)
    assert pair(comparison, "standard_error") == pytest.approx(math.hypot(scipy.stats.sem([2, 3]), 0.7))


@pytest.mark.parametrize(("shared", "covers"), [(True, True), (False, False)], ids=["told", "untold"])
def test_intervals_of_differences_cover_the_truth_if_shared_particles_are_told(shared, covers):
    generator = np.random.default_rng(0)
    attrs = {"monte_carlo_error": 0.2} if shared else {}
    hits = []
    for _ in range(200):
        rows = generator.normal(size=(2, 50))
        moved = rows + 0.2 * generator.normal(size=(2, 1))
        comparison = compare({"a": scored(moved[0], attrs), "b": scored(moved[1], attrs)})
        hits.append(abs(pair(comparison, "difference")) < 1.96 * pair(comparison, "standard_error"))
    assert (np.mean(hits) >= 0.93) == covers


def test_one_observation_has_a_difference_without_a_sampling_error():
    comparison = compare({"a": scored([-1]), "b": scored([-3])})
    assert pair(comparison, "difference") == 2 and math.isnan(pair(comparison, "standard_error"))
    assert pair(comparison, "difference_monte_carlo_error") == pytest.approx(math.hypot(0.1, 0.1))
    assert "nan" in str(comparison)


def test_a_story_that_calls_an_observation_impossible_is_infinitely_worse():
    impossible = scored([-1, -np.inf], standard_error=[0.1, np.inf], bias=[0, -np.inf], verdict=["good", "poor"])
    comparison = compare({"never": impossible, "maybe": scored([-1000, -1000])})
    assert comparison.best == "maybe" and comparison["mean"].values.tolist() == [-1000, -math.inf]
    assert pair(comparison, "difference", "maybe", "never") == math.inf
    assert pair(comparison, "difference", "never", "maybe") == -math.inf
    assert math.isnan(pair(comparison, "standard_error", "never", "maybe"))
    assert "-inf" in str(comparison)


@pytest.mark.parametrize("other", [[-1, -np.inf], [-np.inf, -1]], ids=["same", "another"])
def test_of_two_stories_that_each_call_an_observation_impossible_none_is_better(other):
    comparison = compare({"a": scored([-1, -np.inf]), "b": scored(other)})
    assert math.isnan(pair(comparison, "difference"))
    assert str(comparison)


# Whole stories


def test_the_difference_of_two_stories_is_that_of_their_closed_forms(float64):
    a = linear_gaussian(num_features=6, latent_dim=2, widened=1.3)
    b = linear_gaussian(num_features=6, latent_dim=3, widened=1.3, seed=1)
    x = a.model(num_observations=96).detach()
    comparison = compare({"a": a, "b": b}, x, method="importance", num_particles=1000)
    truth = (closed_form_log_evidence(a, x) - closed_form_log_evidence(b, x)).numpy()
    error = abs(pair(comparison, "difference") - truth.mean())
    assert error < 4 * pair(comparison, "difference_monte_carlo_error") + abs(pair(comparison, "difference_bias"))
    assert pair(comparison, "standard_error") == pytest.approx(scipy.stats.sem(truth), rel=0.1)


def test_exact_guides_make_the_difference_exact(float64):
    a, b = linear_gaussian(6, 2), linear_gaussian(6, 3, seed=1)
    x = a.model(num_observations=40).detach()
    comparison = compare({"a": a, "b": b}, x, method="importance", num_particles=20)
    truth = (closed_form_log_evidence(a, x) - closed_form_log_evidence(b, x)).mean()
    assert pair(comparison, "difference") == pytest.approx(float(truth), abs=1e-9)


def test_a_story_and_its_evidence_compare_alike():
    torch.manual_seed(0)
    a, b, x = small_vae(), small_vae(), images()
    settings = {"method": "importance", "num_particles": 50, "seed": 3}
    stories = compare({"a": a, "b": b}, x, **settings)
    mixed = compare({"a": log_evidence(a, x, **settings), "b": b}, x, **settings)
    evidence = compare({"a": log_evidence(a, x, **settings), "b": log_evidence(b, x, **settings)})
    assert stories.dataset.identical(mixed.dataset) and stories.dataset.identical(evidence.dataset)


# Refusals


class Untouchable(torch.nn.Module):
    """A story that must not be run."""

    def model(self, x=None, *, num_observations=1):
        raise AssertionError("scored before the refusal")

    guide = model


@pytest.mark.parametrize("stories", [{}, {"a": scored([-1])}, [scored([-1]), scored([-2])]], ids=["0", "1", "list"])
def test_fewer_than_two_named_stories_are_refused(stories):
    with pytest.raises(ValueError, match="at least two stories by name"):
        compare(stories)


def test_a_story_without_columns_is_refused_by_name():
    with pytest.raises(ValueError, match="'b' is a story to be scored: add the columns"):
        compare({"a": scored([-1]), "b": small_vae()})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (scored([-1, -2]), scored([-1]), "'a' and 'b' are of 2 and 1 observations"),
        (
            scored([-1], {"fingerprint": "aaaaaaaaaaaa"}),
            scored([-1], {"fingerprint": "bbbbbbbbbbbb"}),
            "'a' and 'b' were not computed on the same data after preprocessing (fingerprints aaaaaaaa and bbbbbbbb)",
        ),
        (
            scored([-1], {"base_measure": '{"x": "counting"}'}),
            scored([-1], {"base_measure": '{"x": "Lebesgue"}'}),
            "'a' gives the site 'x' a probability (counting measure) and 'b' a density (Lebesgue measure). They have "
            "no common unit",
        ),
        (
            scored([-1], {"base_measure": '{"x": "counting"}'}),
            scored([-1], {"base_measure": '{"pixels": "Lebesgue"}'}),
            "'a' scores 'x' (counting) and 'b' scores 'pixels' (Lebesgue)",
        ),
        (
            scored([-1], {"base_measure": '{"x": "counting", "y": "Lebesgue"}'}),
            scored([-1], {"base_measure": '{"x": "Lebesgue", "y": "counting"}'}),
            "They have no common unit",
        ),
        (
            scored([-1], {"method": "importance"}),
            scored([-1]),
            "'a' is scored with method='importance' and 'b' with method='mixture'",
        ),
        (scored([-1], {"method": "elbo"}), scored([-1]), "An ELBO is a lower bound, the other an estimate."),
        (
            scored([-1]),
            scored([-1], {"correction": "pareto"}),
            "'a' has the correction none and 'b' has pareto",
        ),
    ],
    ids=["sizes", "data", "measure", "sites", "swapped", "methods", "bound", "corrections"],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(a, b, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare({"a": a, "b": b})
    with pytest.raises(ValueError):
        compare({"b": b, "between": b, "a": a})


def test_another_selection_of_the_same_rows_is_refused():
    table = scored([-1, -2, -3]).dataset
    first, last = (type(scored([-1]))(table.isel(observation=rows)) for rows in ([0, 1], [1, 2]))
    with pytest.raises(ValueError, match="not computed on the same data"):
        compare({"a": first, "b": last})


@pytest.mark.parametrize("attribute", ["fingerprint", "base_measure", "method", "correction"])
def test_evidence_that_does_not_say_what_it_is_of_is_refused(attribute):
    bare = scored([-1])
    del bare.dataset.attrs[attribute]
    with pytest.raises(ValueError, match=f"'bare' does not say its {attribute}"):
        compare({"a": scored([-1]), "bare": bare})


def test_what_can_be_refused_at_once_is_refused_before_anything_is_scored():
    with pytest.raises(ValueError, match="by the same method"):
        compare({"a": scored([-1]), "b": Untouchable()}, torch.zeros(1), method="importance")
    with pytest.raises(ValueError, match="has pareto"):
        compare({"a": scored([-1]), "b": Untouchable()}, torch.zeros(1), correction="pareto")
    with pytest.raises(ValueError, match="not computed on the same data"):
        compare({"a": scored([-1]), "b": scored([-1], {"fingerprint": "f"}), "c": Untouchable()}, torch.zeros(1))


def test_data_and_likelihoods_of_another_kind_are_found_in_the_stories_themselves():
    binary, x = small_vae(), images(8)
    settings = {"method": "importance", "num_particles": 20}
    normal = VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(mlp(2, 16, (1, 6, 5)), scale=0.5),
        encoder=posteriors.DiagonalNormal(mlp((1, 6, 5), 16, 4)),
    )
    with pytest.raises(ValueError, match="no common unit"):
        compare({"binary": binary, "normal": normal}, x, **settings)
    with pytest.raises(ValueError, match="not computed on the same data"):
        compare({"here": log_evidence(binary, x, **settings), "there": binary}, 1 - x, **settings)
    with pytest.raises(ValueError, match="not computed on the same data"):
        compare({"here": log_evidence(normal, x, **settings), "there": normal}, x * 255, **settings)


def test_sites_of_another_name_but_the_same_kind_are_compared():
    a, b = scored([-1], {"base_measure": '{"x": "counting"}'}), scored([-2], {"base_measure": '{"pixels": "counting"}'})
    assert compare({"a": a, "b": b}).best == "a"


# What is printed


def test_the_ranking_prints_as_a_table():
    text = str(compare({"plain": scored([-2, -4], bias=-0.25), "vamp": scored([-1, -2])}))
    assert text.splitlines() == [
        "mixture, 2 observations, nats per observation",
        "  story        mean  to the best      error     bias  flagged",
        "  vamp       -1.500                                         0",
        "  plain      -3.000       -1.500 +-   0.500   -0.245        0",
        "One seed each compares these trained stories, not the families they come from.",
    ]


def test_unresolved_and_flagged_observations_are_listed_by_number():
    verdicts = ["good"] * 20
    verdicts[3] = verdicts[17] = "unresolved"
    verdicts[5:17] = ["poor"] * 12
    attrs = {"method": "auto", "tolerance": 0.05}
    comparison = compare({"a": scored([-1] * 20, attrs, verdict=verdicts), "b": scored([-2] * 20, attrs)})
    assert {name: rows.tolist() for name, rows in comparison.unresolved.items()} == {"a": [3, 17], "b": []}
    assert comparison.flagged["a"].tolist() == [3, *range(5, 18)]
    assert comparison["num_unresolved"].values.tolist() == [2, 0]
    assert comparison["num_flagged"].values.tolist() == [14, 0]
    text = str(comparison)
    assert "a: 2 observations are unresolved: 3, 17\n" in text
    assert "a: 12 observations are poor: 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, ...\n" in text
    assert "Raise budget" in text


@pytest.mark.parametrize("name", ["a\nb", "", "\x1b[2J", "ünï", "a" * 80, "{mean}", "%s"])
def test_any_name_stands_on_one_line(name):
    lines = str(compare({name: scored([-1]), "other": scored([-2])})).splitlines()
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    assert name in lines[2] or repr(name) in lines[2]


def test_a_comparison_of_bounds_says_so():
    attrs = {"method": "elbo"}
    text = str(compare({"a": scored([-1], attrs, verdict="bound"), "b": scored([-2], attrs, verdict="bound")}))
    assert "elbo, lower bounds" in text
    assert "A difference of lower bounds is not a difference of evidence." in text


def test_a_comparison_of_corrected_estimates_says_so():
    attrs = {"correction": "jackknife"}
    assert "mixture corrected by jackknife," in str(compare({"a": scored([-1], attrs), "b": scored([-2], attrs)}))


def test_a_bias_larger_than_the_error_is_pointed_out():
    a, b = scored([-1, -2, -3]), scored([-2, -3.01, -4], bias=-0.5)
    assert "The bias of a difference is larger than its error." in str(compare({"a": a, "b": b}))


def test_other_numbers_of_particles_are_pointed_out():
    text = str(compare({"a": scored([-1]), "b": scored([-2], num_particles=10)}))
    assert "their numbers differ: a 1000, b 10." in text
