"""Every story, ready-made or a user's own, passes the same tests: check, fit, log_evidence, save, load."""

import pytest
import torch
from example_stories import STORIES

from ppl_vae import check, fit, load, log_evidence, save

each_story = pytest.mark.parametrize(("make", "columns"), STORIES.values(), ids=STORIES)


@each_story
def test_check_accepts_the_story(make, columns):
    check(make(), *columns())


@each_story
def test_fit_improves_the_objective(make, columns):
    history = fit(make(), *columns(), epochs=40, batch_size=16)
    assert history["train_elbo"][-5:].mean() > history["train_elbo"][:3].mean() + 0.5
    assert history["skipped_steps"].sum() == 0


@each_story
def test_fit_moves_every_parameter(make, columns):
    story = make()
    before = {name: parameter.detach().clone() for name, parameter in story.named_parameters()}
    fit(story, *columns(), epochs=1)
    unmoved = [name for name, parameter in story.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


@each_story
def test_importance_sampling_agrees_with_pyros_own_sampler(make, columns):
    story = make()
    fit(story, *columns(), epochs=20, batch_size=16)
    few = tuple(column[:4] for column in columns())
    ours = log_evidence(story, *few, num_particles=2000)
    pyros = log_evidence(story, *few, method="pyro", num_particles=500)
    error = (ours["standard_error"] ** 2 + pyros["standard_error"] ** 2) ** 0.5
    assert (abs(ours["estimate"] - pyros["estimate"]) < 4 * error).all()


@each_story
def test_elbo_is_below_the_importance_estimate(make, columns):
    story = make()
    elbo = log_evidence(story, *columns(), method="elbo", num_particles=200)
    importance = log_evidence(story, *columns(), num_particles=200)
    assert elbo.summary().mean < importance.summary().mean


@each_story
def test_a_saved_story_gives_the_same_evidence_bit_for_bit(make, columns, tmp_path):
    story = make()
    fit(story, *columns(), epochs=2)
    save(story, tmp_path / "story.safetensors")
    loaded = load(tmp_path / "story.safetensors", story=make())
    before = log_evidence(story, *columns(), num_particles=10)["estimate"]
    after = log_evidence(loaded, *columns(), num_particles=10)["estimate"]
    assert before.equals(after)


@each_story
def test_the_story_works_in_double_precision(make, columns):
    story = make().double()
    history = fit(story, *columns(), epochs=1)
    assert all(parameter.dtype == torch.float64 for parameter in story.parameters())
    assert log_evidence(story, *columns(), num_particles=5)["estimate"].shape == (40,)
    assert history["train_elbo"].dtype.kind == "f"


def test_labels_help_the_conditional_story():
    make, columns = STORIES["conditional"]
    x, _ = columns()
    y = (x[:, 0, :, :2].mean((1, 2)) > 0.5).long()  # which half is dark
    informed, misled = make(), make()
    fit(informed, x, y, epochs=60, batch_size=16)
    fit(misled, x, torch.zeros_like(y), epochs=60, batch_size=16)
    held = log_evidence(informed, x, y).summary().mean, log_evidence(informed, x, 1 - y).summary().mean
    assert held[0] > held[1] + 5
    assert log_evidence(informed, x, y).summary().mean > log_evidence(misled, x, torch.zeros_like(y)).summary().mean
