"""A story as mathematics: what depends on what is found by running it."""

import pytest
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

from ppl_vae import VAE, likelihoods, networks, posteriors, priors
from ppl_vae.report.equations import equations


def lines(story, *columns):
    model, guide = equations(story, *columns)
    return [str(equation) for equation in model], [str(equation) for equation in guide]


def test_a_plain_story_reads_as_on_the_whiteboard():
    model, guide = lines(small_vae(), images())
    assert model == ["z ~ Normal(loc = 0, scale = 1)", "x | z ~ Bernoulli(logits = f(z))"]
    assert guide == ["z | x ~ Normal(loc = f(x), scale = f(x))"]


def test_a_condition_is_given_and_the_data_are_not():
    model, guide = lines(small_conditional(), images(), labels())
    assert model[1] == "x | z, y ~ Bernoulli(logits = f(z, y))"
    assert guide == ["z | x, y ~ Normal(loc = f(x, y), scale = f(x, y))"]


def test_each_parameter_depends_on_its_own_latents():
    model, _ = lines(TwoLatents(), rows())
    assert model == [
        "factors ~ Normal(loc = 0, scale = 1)",
        "size ~ LogNormal(loc = 0, scale = 0.5)",
        "x | factors, size ~ Normal(loc = f(factors), scale = f(size))",
    ]


def test_numbers_that_are_trained_are_called_learned():
    story = VAE(
        prior=priors.Normal(3),
        decoder=likelihoods.Normal(loc=networks.mlp(3, 5), scale=likelihoods.learned(torch.ones(5))),
        encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    )
    model, _ = lines(story, rows())
    assert model == ["z ~ Normal(loc = learned, scale = learned)", "x | z ~ Normal(loc = f(z), scale = learned)"]


def test_a_scale_that_is_fixed_is_a_number():
    assert lines(linear_gaussian(5, 2, scale=0.25), rows())[0][1] == "x | z ~ Normal(loc = f(z), scale = 0.25)"


def test_sizes_and_what_is_observed_are_told():
    model, _ = equations(small_vae(), images())
    assert [(equation.size, equation.observed) for equation in model] == [(2, False), (30, True)]


@pytest.mark.parametrize("size", [2, 3, 40])
def test_few_rows_are_enough(size):
    model, _ = lines(GammaPoisson(), torch.arange(size).float())
    assert model == ["rate ~ Gamma(concentration = 2, rate = 0.5)", "x | rate ~ Poisson(rate = f(rate))"]
