"""fit against Pyro and hand-written loops, against the optimum of probabilistic PCA, and its promises."""

import copy
import hashlib
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import (
    STORIES,
    Fragile,
    TwoClusters,
    TwoLatents,
    closed_form_log_evidence,
    images,
    linear_gaussian,
    rows,
    small_vae,
)
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from ppl_vae import VAE, fit, likelihoods, log_evidence, noise, posteriors, priors
from ppl_vae.objectives import FreeBitsELBO, ImportanceWeightedELBO, RenyiELBO, SummedOutELBO


def weights(story: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in story.parameters()])


# What is trained


def test_fit_takes_the_steps_of_a_hand_written_loop():
    ours, theirs = small_vae(), small_vae()
    theirs.load_state_dict(ours.state_dict())
    x = images(50)
    fit(ours, x, epochs=2, batch_size=16, seed=3)

    optimizer, elbo = torch.optim.Adam(theirs.parameters(), lr=1e-3), Trace_ELBO()
    for epoch in (1, 2):
        for number, batch in enumerate(noise.permutation(50, 3, epoch).split(16)):
            noise.reseed(torch.device("cpu"), 3, noise.Purpose.TRAINING, epoch, number)
            optimizer.zero_grad()
            (elbo.differentiable_loss(theirs.model, theirs.guide, x[batch]) / len(batch)).backward()
            optimizer.step()
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-7)


def test_a_users_own_svi_trains_the_vae():
    story, x = small_vae(), images(200)
    svi = SVI(story.model, story.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    before = weights(story)
    losses = [svi.step(x) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert (weights(story) != before).float().mean() > 0.9


@pytest.mark.slow
def test_fit_reaches_the_optimum_of_probabilistic_pca(float64):
    truth = linear_gaussian(num_features=6, latent_dim=2, scale=0.7, seed=5)
    x = truth.model(num_observations=1000).detach()
    decoder = likelihoods.Normal(nn.Linear(2, 6), scale=likelihoods.learned(1.0))
    story = VAE(priors.StandardNormal(2), decoder, posteriors.DiagonalNormal(nn.Linear(6, 4)))
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.995)
    fit(story, x, epochs=1000, batch_size=100, optimizer=partial(torch.optim.Adam, lr=2e-2), schedule=decay)

    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise_variance = eigenvalues[2:].mean()
    # Tipping & Bishop 1999, equation 8: the largest likelihood of any W, b and sigma.
    log_determinant = eigenvalues[:2].log().sum() + 4 * noise_variance.log()
    optimum = -(6 * math.log(2 * math.pi) + log_determinant + 6) / 2
    reached = closed_form_log_evidence(story, x).mean()
    assert optimum - 1e-2 < reached <= optimum + 1e-9


LOSSES = {
    "mean field": TraceMeanField_ELBO(),
    "Pyro's Renyi": pyro.infer.RenyiELBO(alpha=0, num_particles=2),
    "importance weighted": ImportanceWeightedELBO(num_particles=2),
    "Renyi": RenyiELBO(alpha=0.5, num_particles=2),
    "free bits": FreeBitsELBO(0.5),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_any_pyro_elbo_may_be_passed(loss):
    story = small_vae()
    history = fit(story, images(), epochs=20, batch_size=8, loss=loss)
    assert history["train_elbo"][-3:].mean() > history["train_elbo"][:3].mean()


def two_heaps():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(200, generator=generator) + 3 * (torch.rand(200, generator=generator) > 0.3)


@pytest.mark.parametrize("loss", [None, TraceEnum_ELBO(max_plate_nesting=1)], ids=["default", "Pyro"])
def test_a_discrete_latent_is_summed_out(loss):
    story, x = TwoClusters(), two_heaps()
    history = fit(story, x, epochs=30, loss=loss, optimizer=partial(torch.optim.Adam, lr=1e-2), kl_warmup=3)
    assert history["train_elbo"][-1] > history["train_elbo"][3] + 5


def test_marked_latents_are_summed_out_by_default_and_captured(float64):
    def trained(**arguments):
        story = TwoClusters()
        torch.nn.init.constant_(story.guess.weight, 0.3)
        torch.nn.init.constant_(story.guess.bias, -0.1)
        history = fit(story, two_heaps(), validation=two_heaps()[:50], epochs=3, **arguments)
        return history, weights(story)

    (history, ours), (summed, same), (_, theirs) = (
        trained(),
        trained(loss=SummedOutELBO()),
        trained(loss=TraceEnum_ELBO(max_plate_nesting=1), engine="svi"),
    )
    assert history.engine == summed.engine == "captured"
    assert torch.equal(ours, same)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


class Undecorated(PyroModule):
    """A PyroModule whose methods are no ``pyro_method``s: by itself it puts no parameter into the store."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(self, x=None, *, num_observations=1):
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            return pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


@pytest.mark.parametrize("engine", ["svi", "captured"])
def test_a_pyro_module_without_pyro_methods_is_trained(engine):
    story = Undecorated()
    before = [parameter.detach().clone() for parameter in story.parameters()]
    fit(story, torch.randn(64, 3), epochs=1, engine=engine)
    assert all((old != new).any() for old, new in zip(before, story.parameters(), strict=True))


def test_the_loss_instance_is_not_used_up_by_a_story():
    loss = Trace_ELBO()
    fit(small_vae(), images(), epochs=1, loss=loss)
    assert vars(loss) == vars(Trace_ELBO())


def test_transform_is_applied_to_training_batches_and_not_to_validation():
    seen = []

    def transform(x):
        seen.append(len(x))
        return torch.bernoulli(x)

    grey = images(40) * 0.5 + 0.25
    fit(small_vae(), grey, validation=images(24), epochs=2, batch_size=16, transform=transform, engine="svi")
    assert seen[-6:] == [16, 16, 8, 16, 16, 8]


def test_dynamic_binarization_draws_every_batch_anew():
    batches = []

    def transform(x):
        batches.append(torch.bernoulli(x))
        return batches[-1]

    fit(small_vae(), torch.full((16, 1, 6, 5), 0.5), epochs=2, batch_size=16, transform=transform, engine="svi")
    assert not torch.equal(batches[-1], batches[-2])


def test_floating_columns_take_the_storys_dtype():
    story = small_vae()
    fit(story, images().double(), epochs=1)
    assert {parameter.dtype for parameter in story.parameters()} == {torch.float32}


# Betas and free bits


FROZEN = partial(torch.optim.SGD, lr=1e-300)


def one_epoch(story, x, **arguments):
    """What an epoch in which nothing moves says of all the data at once, in training and in validation."""
    row = fit(story, x, validation=x, epochs=1, batch_size=len(x), optimizer=FROZEN, **arguments).rows[0]
    return row["train_elbo"], row["validation_elbo"]


def test_a_beta_scales_the_latent_terms_in_training_alone(float64):
    story = linear_gaussian(num_features=4, latent_dim=2, widened=1.5)
    x = story.model(num_observations=5000).detach()
    (plain, validated), (scaled, again) = one_epoch(story, x), one_epoch(story, x, beta=4.0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    divergence = torch.distributions.kl_divergence(story.encoder(x), prior).mean().item()
    assert plain - scaled == pytest.approx(3 * divergence, rel=0.05)
    assert validated == again


def test_betas_by_site_multiply_the_warm_up():
    story = TwoLatents()
    warming = [one_epoch(story, rows(), beta=beta, kl_warmup=2)[0] for beta in ({"factors": 3.0}, 3.0, 1.0)]
    halved = [one_epoch(story, rows(), beta=beta)[0] for beta in ({"factors": 1.5, "size": 0.5}, 1.5, 0.5)]
    assert warming == pytest.approx(halved, rel=1e-5)
    assert len({round(elbo, 3) for elbo in warming}) == 3


def test_free_bits_are_paid_in_training_alone():
    story, x = small_vae(), images()
    plain, validated = one_epoch(story, x)
    free, again = one_epoch(story, x, free_bits=50.0)
    given, once_more = one_epoch(story, x, loss=FreeBitsELBO(50.0))
    assert free < plain - 40 and free == given
    assert validated == again == once_more


def test_evidence_after_training_with_beta_and_free_bits_is_that_of_the_weights():
    story, twin = small_vae(), small_vae()
    fit(story, images(), epochs=1, beta=0.1, free_bits=1.0)
    twin.load_state_dict(story.state_dict())
    found = [log_evidence(each, images(10), method="importance", num_particles=100) for each in (story, twin)]
    assert (found[0]["estimate"] == found[1]["estimate"]).all()


def test_free_bits_keep_a_latent_that_a_beta_would_collapse(float64):
    truth = linear_gaussian(num_features=4, latent_dim=1, scale=1.0, seed=2)
    x, prior = truth.model(num_observations=400).detach(), torch.distributions.Normal(0.0, 1.0)
    costs = []
    for free_bits in (None, 1.0):
        encoder = posteriors.DiagonalNormal(nn.Linear(4, 2))
        story = VAE(priors.StandardNormal(1), likelihoods.Normal(nn.Linear(1, 4), 1.0), encoder)
        fit(story, x, epochs=60, beta=5.0, free_bits=free_bits, optimizer=partial(torch.optim.Adam, lr=2e-2))
        costs.append(torch.distributions.kl_divergence(encoder(x).base_dist, prior).mean().item())
    assert costs[0] < 0.1 and 0.5 < costs[1] < 1.2


# Warm-up, validation, patience


def test_warm_up_grows_the_latent_terms_and_then_leaves_them():
    history = fit(small_vae(), images(), epochs=5, kl_warmup=4)
    assert history["kl_factor"].tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warm_up_scales_the_divergence_alone(float64):
    story = linear_gaussian(num_features=4, latent_dim=2, widened=1.5)
    x = story.model(num_observations=5000).detach()
    frozen = partial(torch.optim.SGD, lr=1e-300)
    warming = fit(story, x, epochs=1, kl_warmup=10, optimizer=frozen, batch_size=5000)["train_elbo"][0]
    full = fit(story, x, epochs=1, optimizer=frozen, batch_size=5000)["train_elbo"][0]
    posterior = story.encoder(x)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    divergence = torch.distributions.kl_divergence(posterior, prior).mean().item()
    assert warming - full == pytest.approx(0.9 * divergence, rel=0.05)


def test_validation_is_at_factor_one_during_warm_up(float64):
    story = linear_gaussian(num_features=4, latent_dim=2, widened=1.5)
    x = story.model(num_observations=2000).detach()
    frozen = partial(torch.optim.SGD, lr=1e-300)
    history = fit(story, x, validation=x, epochs=1, kl_warmup=10, optimizer=frozen)
    assert history["kl_factor"][0] == 0.1
    elbo = log_evidence(story, x, method="elbo", num_particles=50)
    assert history["validation_elbo"][0] == pytest.approx(elbo.summary().mean, abs=0.15)


def test_the_story_ends_with_its_best_validation_weights():
    story, kept = small_vae(), []
    history = fit(
        story,
        images(16),
        validation=images(60)[20:],
        epochs=60,
        optimizer=partial(torch.optim.Adam, lr=3e-2),
        callbacks=[lambda story, row: kept.append(weights(story))],
    )
    assert history.best_epoch < 60  # sixteen images are soon learned by heart
    assert torch.equal(weights(story), kept[history.best_epoch - 1])


def test_patience_stops_and_counts_after_the_warm_up():
    frozen = partial(torch.optim.SGD, lr=1e-300)
    assert len(fit(small_vae(), images(), validation=images(), epochs=50, patience=3, optimizer=frozen)) == 4
    arguments = {"validation": images(), "epochs": 50, "patience": 3, "kl_warmup": 10, "optimizer": frozen}
    assert len(fit(small_vae(), images(), **arguments)) == 13


def test_an_interrupted_run_keeps_its_best_weights():
    story, kept = small_vae(), []

    def interrupt(story, row):
        kept.append(weights(story))
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    uphill = partial(torch.optim.SGD, lr=1e-2, maximize=True)
    with pytest.raises(KeyboardInterrupt):
        fit(story, images(), validation=images(), epochs=9, callbacks=[interrupt], optimizer=uphill)
    assert torch.equal(weights(story), kept[0]) and not torch.equal(kept[0], kept[2])


def test_schedule_and_clip_do_what_they_say():
    story = small_vae()
    before = weights(story)
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    history = fit(story, images(), epochs=1, batch_size=40, clip=0.1, optimizer=partial(torch.optim.SGD, lr=1.0))
    assert (weights(story) - before).norm() == pytest.approx(0.1, rel=1e-3)
    history = fit(story, images(), epochs=3, schedule=halve)
    assert history["learning_rate"].tolist() == [1e-3, 5e-4, 2.5e-4]


def test_batch_norm_and_dropout_train_in_fit_and_rest_outside():
    encoder = nn.Sequential(nn.Flatten(-3), nn.Linear(30, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    story = VAE(priors.StandardNormal(2), small_vae().decoder, posteriors.DiagonalNormal(encoder)).eval()
    fit(story, images(), validation=images(), epochs=1, batch_size=10)
    assert int(encoder[2].num_batches_tracked) == 4  # the dry run and validation moved nothing
    assert not any(module.training for module in story.modules())


# Faults


def test_a_step_that_is_not_finite_is_not_taken():
    story, x = Fragile(), torch.zeros(40)
    x[7] = 99.0
    history = fit(story, x, epochs=3, batch_size=10)
    assert history["skipped_steps"].tolist() == [1, 1, 1]
    assert torch.isfinite(weights(story)).all()
    assert np.isfinite(history["train_elbo"]).all()


def test_ten_bad_batches_in_a_row_stop_training_and_name_the_site():
    story, x = Fragile(), torch.full((40,), 99.0)
    x[:2] = 0.0  # the dry run looks at these
    with pytest.raises(FloatingPointError, match=r"epoch \d+, batch \d+, seed 5.*'z' of the guide"):
        fit(story, x, epochs=9, batch_size=4, seed=5)
    assert torch.isfinite(weights(story)).all()


def test_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        fit(small_vae(), images(), validation=images(), epochs=3, optimizer=partial(torch.optim.SGD, lr=1e30))


def test_a_frozen_parameter_stays_and_needs_no_warning():
    story = TwoLatents()
    story.loadings.bias.requires_grad_(False)
    before = story.loadings.bias.clone()
    fit(story, rows(), epochs=1)
    assert torch.equal(story.loadings.bias, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"kl_warmup": -1}, "kl_warmup must be at least 0"),
        ({"clip": 0.0}, "clip is a gradient norm"),
        ({"beta": -1.0}, "beta must be at least 0, and at most 1e.12; found -1"),
        ({"beta": {"w": 2.0}}, r"beta names \['w'\]; the latents that the guide draws are \['z'\]"),
        ({"free_bits": math.inf}, "free_bits must be at least 0, and at most 1e.12; found inf"),
        ({"free_bits": {"z": 0.1, "x": 2.0}}, r"free_bits names \['x'\]; the latents that the guide draws are \['z'\]"),
        ({"free_bits": 1.0, "loss": Trace_ELBO()}, r"so is loss=Trace_ELBO\(\.\.\.\); pass one of them"),
        ({"patience": 3}, "pass validation="),
        ({"patience": 0, "validation": images()}, "patience must be at least 1"),
        ({"validation": (images(), images())}, "the 1 columns of the training data; found 2"),
        ({"validation": images() / 2}, "between 0 and 0.5"),
        ({"engine": "magic"}, "Unknown engine 'magic'"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_arguments_are_named_before_anything_moves(arguments, message):
    story = small_vae()
    before = weights(story)
    with pytest.raises(ValueError, match=message):
        fit(story, images(), **({"epochs": 1} | arguments))
    assert torch.equal(weights(story), before)


def test_one_observation_is_not_enough_to_train():
    with pytest.raises(ValueError, match="at least two observations"):
        fit(small_vae(), images(1), epochs=1)


# Isolation


def fingerprint(story: nn.Module) -> str:
    return hashlib.sha256(weights(story).numpy().tobytes()).hexdigest()


FRESH = """
import torch
from example_stories import STORIES
from test_training import fingerprint
from ppl_vae import fit
torch.manual_seed(4)
make, columns = STORIES[{name!r}]
story = make()
fit(story, *columns(), epochs=3, batch_size=16, seed=4)
print(fingerprint(story))
"""


@pytest.mark.parametrize("name", ["VAE", pytest.param("conditional", marks=pytest.mark.slow), "plain"])
def test_a_second_story_trains_as_in_a_fresh_process_bit_for_bit(name):
    fit(small_vae(), images(), epochs=1)  # the first story
    make, columns = STORIES[name]
    torch.manual_seed(4)
    story = make()
    fit(story, *columns(), epochs=3, batch_size=16, seed=4)
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + FRESH.format(name=name)
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == fingerprint(story)


def test_stories_trained_in_turn_equal_the_stories_trained_apart():
    def pair():
        torch.manual_seed(1)
        return [small_vae(), small_vae()]

    (first, second), (alone, other) = pair(), pair()
    fit(alone, images(), epochs=2)
    fit(other, images(), epochs=2)
    fit(first, images(), epochs=2, callbacks=[lambda *_: fit(second, images(), epochs=2)])
    assert torch.equal(weights(first), weights(alone))
    fresh = copy.deepcopy(pair()[1])
    fit(fresh, images(), epochs=2)
    fit(fresh, images(), epochs=2)
    assert torch.equal(weights(second), weights(fresh))


@pytest.mark.parametrize("make", [small_vae, TwoLatents])
def test_the_users_generators_and_parameter_store_are_left_as_they_were(make):
    story, columns = make(), images() if make is small_vae else rows()
    pyro.param("mine", torch.ones(1))
    before = torch.random.get_rng_state()
    fit(story, columns, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert list(pyro.get_param_store()) == ["mine"]


def test_module_local_parameters_do_not_disturb():
    with pyro.settings.context(module_local_params=True):
        story = small_vae()
        before = weights(story)
        fit(story, images(), epochs=1)
    assert not torch.equal(before, weights(story))


def test_the_result_does_not_depend_on_the_users_seed():
    stories = []
    for seed in (1, 2):
        torch.manual_seed(0)
        stories.append(small_vae())
        torch.manual_seed(seed)
        fit(stories[-1], images(), epochs=1)
    assert torch.equal(*map(weights, stories))


def test_history_holds_a_row_per_epoch_and_the_engine():
    history = fit(small_vae(), images(40), validation=images(), epochs=3, batch_size=16, engine="svi")
    assert history.engine == "svi" and len(history) == 3
    assert history["epoch"].tolist() == [1, 2, 3] and history["step"].tolist() == [3, 6, 9]
    assert all(set(row) == set(history.rows[0]) for row in history)
