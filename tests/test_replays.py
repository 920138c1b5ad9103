"""Densities that are replayed: the same values as evaluated plainly, and a fallback where they cannot be captured."""

import logging
import math

import numpy as np
import pytest
import torch
from example_stories import ORACLES, linear_gaussian

from ppl_vae import VAE, likelihoods, log_evidence, networks, noise, posteriors, priors, traces
from ppl_vae.capture import Program
from ppl_vae.evidence import estimators, joint, replays
from ppl_vae.evidence.joint import work_of_a_draw
from ppl_vae.evidence.replays import Replays
from ppl_vae.work import Work


@pytest.mark.parametrize("method", ["importance", "laplace", "mixture", "annealed"])
def test_captured_densities_change_no_estimate(float64, method, monkeypatch):
    story = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x = story.model(num_observations=40).detach()
    captured = log_evidence(story, x, method=method)
    monkeypatch.setattr(replays, "CALLS_BEFORE_CAPTURE", math.inf)
    plain = log_evidence(story, x, method=method)
    np.testing.assert_allclose(captured["estimate"], plain["estimate"], rtol=1e-12)


@pytest.mark.parametrize("name", ORACLES)
def test_every_story_is_estimated_as_without_capture(float64, name, monkeypatch):
    make, data, _ = ORACLES[name]
    story, columns = make(), data()
    monkeypatch.setattr(replays, "CALLS_BEFORE_CAPTURE", 1)
    captured = log_evidence(story, *columns, method="importance", num_particles=300)
    monkeypatch.setattr(replays, "CALLS_BEFORE_CAPTURE", math.inf)
    plain = log_evidence(story, *columns, method="importance", num_particles=300)
    np.testing.assert_allclose(captured["estimate"], plain["estimate"], rtol=1e-10)


def test_a_function_is_called_until_it_was_called_often_and_then_no_more():
    calls, density = [], Replays()

    def function(x):
        calls.append(len(x))
        return (x.square(),)

    for _ in range(50):
        assert torch.equal(density.call("square", function, torch.arange(3.0))[0], torch.tensor([0.0, 1.0, 4.0]))
    density.call("square", function, torch.arange(4.0))  # another shape
    assert calls == [3] * (replays.CALLS_BEFORE_CAPTURE + 1) + [4]  # once more, to be traced


def test_what_cannot_be_captured_is_evaluated_as_it_is(caplog):
    density = Replays()

    def function(x):
        return (x if x.sum() > 0 else -x,)

    with caplog.at_level(logging.INFO, "ppl_vae"):
        for sign in [1.0, -1.0] * 30:
            assert density.call("size", function, torch.full((3,), sign))[0].sum() == 3
    assert len([record for record in caplog.records if "cannot be captured" in record.message]) == 1


def test_what_replays_other_values_is_evaluated_as_it_is(caplog):
    density, numbers = Replays(), iter(range(100))
    with caplog.at_level(logging.INFO, "ppl_vae"):
        values = [float(density.call("count", lambda x: (x + next(numbers),), torch.zeros(2))[0][0]) for _ in range(40)]
    assert len(set(values)) == 40 and "gave other values" in caplog.text


def test_decoding_in_bfloat16_is_labelled_and_close():
    story = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x = story.model(num_observations=40).detach()
    rounded = log_evidence(story, x, method="importance", model_dtype=torch.bfloat16)
    plain = log_evidence(story, x, method="importance")
    assert set(rounded["method"].values) == {"importance in bfloat16"}
    assert rounded.dataset.attrs["model_dtype"] == "bfloat16" and plain.dataset.attrs["model_dtype"] == ""
    difference = abs(rounded["estimate"] - plain["estimate"])
    assert 0 < difference.max() < 0.5


@pytest.mark.slow
def test_compiled_densities_agree_to_rounding():
    story = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x = story.model(num_observations=32).detach()
    compiled = log_evidence(story, x, method="importance", num_particles=2000, compile=True)
    plain = log_evidence(story, x, method="importance", num_particles=2000, compile=False)
    np.testing.assert_allclose(compiled["estimate"], plain["estimate"], rtol=1e-5)


def drawn(density, story, x, calls):
    """What a guide draws, each time from a unit of noise of its own."""
    values = []
    for number in range(calls):
        with noise.unit(x.device, 0, noise.Purpose.DRAWS, number), traces.scoring(story):
            values += density.call("guide", lambda x: (traces.draws(traces.run(story, x)[1])["z"],), x)
    return torch.stack(values)


def test_a_replay_draws_what_the_program_draws():
    story, x = linear_gaussian(num_features=6, latent_dim=3), torch.randn(5, 6)
    plain = drawn(Replays(patience=math.inf), story, x, 6)
    density = Replays(patience=3)
    assert torch.equal(drawn(density, story, x, 6), plain)
    (program,) = density.programs.values()
    assert isinstance(program, Program)
    assert len(plain.unique()) == plain.numel()


def test_capturing_leaves_the_generator_where_the_program_does():
    density = Replays(patience=1)
    torch.manual_seed(0)
    density.call("draw", lambda x: (x + torch.randn(3),), torch.zeros(3))
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_whole_numbers_that_are_drawn_are_replayed():
    density = Replays(patience=1)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        (value,) = density.call("draw", lambda x: (torch.randint(100, (50,)) + x,), torch.zeros(50, dtype=torch.long))
        torch.manual_seed(seed)
        assert torch.equal(value, torch.randint(100, (50,)))
    assert isinstance(next(iter(density.programs.values())), Program)


def test_what_draws_outside_of_torch_is_evaluated_as_it_is(caplog):
    density, generator = Replays(patience=2), np.random.default_rng(0)
    with caplog.at_level(logging.INFO, "ppl_vae"):
        values = {float(density.call("draw", lambda x: (x + generator.random(),), torch.zeros(1))[0]) for _ in range(9)}
    assert len(values) == 9 and "gave other values" in caplog.text


def test_what_a_replay_returns_has_the_form_of_what_the_function_returns():
    density = Replays(patience=2)

    def function(x):
        return {"twice": 2 * x, ("a", "name"): (x + 1, x - 1)}, x.sum()

    for _ in range(4):
        values, total = density.call("forms", function, torch.arange(3.0))
        assert list(values) == ["twice", ("a", "name")] and total == 3
        assert torch.equal(values["a", "name"][1], torch.tensor([-1.0, 0.0, 1.0]))


def test_what_is_kept_is_computed_once_for_each_of_the_tensors_that_come_first():
    density, weight = Replays(patience=1), torch.randn(4, 4)

    def function(x, y):
        return ((x @ weight).sum() * y,)

    ys = [torch.full((2,), float(number)) for number in range(5)]
    for x in (torch.randn(3, 4), torch.randn(3, 4)):
        for y in ys:
            torch.testing.assert_close(density.call("kept", function, x, y, num_kept=1)[0], function(x, y)[0])
    (staged,) = density.programs.values()
    times = []
    staged.first, first = lambda x: times.append(x) or first(x), staged.first
    others = torch.randn(3, 4), torch.randn(3, 4)
    for x in others:
        for y in ys:
            torch.testing.assert_close(density.call("kept", function, x, y, num_kept=1)[0], function(x, y)[0])
    assert [x is other for x, other in zip(times, others, strict=True)] == [True, True]


def test_the_guide_encodes_a_block_once(monkeypatch):
    story = linear_gaussian(num_features=6, latent_dim=3, widened=1.3)
    x, encoded = story.model(num_observations=40).detach(), []
    made = replays._Staged.__init__

    def counting(self, first, rest, num_kept):
        made(self, lambda *kept: encoded.append(kept) or first(*kept), rest, num_kept)

    monkeypatch.setattr(replays._Staged, "__init__", counting)
    monkeypatch.setattr(replays, "CALLS_BEFORE_CAPTURE", 1)
    log_evidence(story, x, method="importance", num_particles=1280, compile=False)
    guides = [kept for kept in encoded if len(kept) == 1]
    assert 2 <= len(guides) <= 6  # two blocks, of 32 and 8 observations, by guide and by model, and once when captured


def test_the_work_of_a_draw_is_that_of_its_own_rows():
    decoder = likelihoods.Bernoulli(networks.mlp(3, 10, 20))
    encoder = posteriors.DiagonalNormal(networks.mlp(20, 6))
    work = {}
    for name, prior in {"one": priors.StandardNormal(3), "many": priors.VampPrior(encoder, torch.rand(50, 20))}.items():
        story = VAE(prior, decoder, encoder)
        with traces.scoring(story):
            work[name] = work_of_a_draw(story, (torch.ones(5, 20),))
    assert work["one"].flops == work["many"].flops == 2 * (3 * 10 + 10 * 20)  # pseudo-inputs are encoded for all rows
    assert 20 + 10 < work["one"].numbers < 5 * (20 + 10 + 3)
    assert work["many"].numbers - work["one"].numbers > 4 * 50 * 3  # but every row is compared with all of them
    assert work["one"].widest == 20 and work["many"].widest == 50 * 3


def test_of_wide_rows_fewer_are_evaluated_at_once(monkeypatch):
    encoder = posteriors.DiagonalNormal(networks.mlp(20, 6))
    story = VAE(priors.VampPrior(encoder, torch.rand(50, 20)), likelihoods.Bernoulli(networks.mlp(3, 10, 20)), encoder)
    x, evidence = torch.rand(8, 20).round(), []
    for numbers, rows in ((joint.NUMBERS_IN_CACHE, joint.ROWS_IN_CACHE), (50 * 3 * 40, 40)):
        monkeypatch.setattr(joint, "NUMBERS_IN_CACHE", numbers)
        with traces.scoring(story):
            assert joint.joint_of(story, (x,)).rows_together == rows
        evidence.append(log_evidence(story, x, method="importance", num_particles=300)["estimate"])
    np.testing.assert_allclose(*evidence, rtol=1e-5)


def test_a_density_is_compiled_where_there_is_enough_to_do(monkeypatch):
    for draws, work in ((10**8, Work(10**6, 10)), (10**6, Work(10, 10**5))):
        assert replays.pays(draws, work) and not replays.pays(draws // 100, work)
    story, asked = linear_gaussian(num_features=6, latent_dim=3), []
    x = story.model(num_observations=5).detach()

    def joint_of(*arguments, compiled, **settings):
        asked.append(compiled)
        return joint.joint_of(*arguments, **settings)

    monkeypatch.setattr(estimators, "joint_of", joint_of)
    for seconds in (0.0, 1.0):
        monkeypatch.setattr(replays, "SECONDS_TO_COMPILE", seconds)
        log_evidence(story, x, method="importance", num_particles=100)
    assert asked == [True, False]


@pytest.mark.slow
def test_what_draws_draws_the_same_when_it_is_compiled():
    density, x = Replays(compiled=True), torch.randn(replays.ROWS_TO_COMPILE, 3)
    for seed in range(4):
        torch.manual_seed(seed)
        (ours,) = density.call("draw", lambda x: (x + torch.randn(len(x), 3).exp() + torch.rand(3),), x)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, x + torch.randn(len(x), 3).exp() + torch.rand(3))
    assert not isinstance(next(iter(density.programs.values())), Program)
