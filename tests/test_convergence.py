"""Estimates looked at while they settle are those of fewer particles."""

import numpy as np
import pytest
from example_stories import closed_form_log_evidence, images, linear_gaussian, small_vae

from ppl_vae import log_evidence
from ppl_vae.evidence import convergence


def test_the_last_look_is_the_estimate():
    story, x = small_vae(), images(40)
    settling = convergence(story, x, num_particles=400)
    evidence = log_evidence(story, x, method="importance", num_particles=400)
    assert settling["num_particles"].values.tolist() == [128, 256, 400]
    for name in ("estimate", "standard_error"):
        np.testing.assert_allclose(settling[name].isel(num_particles=-1), evidence[name], rtol=1e-12)


def test_every_look_is_the_estimate_of_so_many_particles():
    story, x = small_vae(), images(40)
    settling = convergence(story, x, num_particles=512)
    few = log_evidence(story, x, method="importance", num_particles=128)
    np.testing.assert_allclose(settling["estimate"].sel(num_particles=128), few["estimate"], rtol=1e-12)


def test_the_mean_rises_to_the_truth(float64):
    story = linear_gaussian(num_features=6, latent_dim=4, widened=2.5)
    x = story.model(num_observations=200).detach()
    settling = convergence(story, x, num_particles=4096)
    gap = closed_form_log_evidence(story, x).mean().item() - settling["mean"].values
    assert gap[0] > 10 * abs(gap[-1])
    assert abs(gap[-1]) < 4 * settling["monte_carlo_error"].values[-1] + 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "quadrature"}, "Unknown method"), ({"num_particles": 0}, "num_particles must be at least 1")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        convergence(small_vae(), images(4), **arguments)
