"""The dry run: each planted defect is explained before any training, a right story passes, nothing is left behind."""

import random
import re
from functools import partial
from types import MethodType

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from ppl_vae import VAE, check, checks, likelihoods, posteriors, priors, stories
from ppl_vae.distributions import Beta, Columns
from ppl_vae.networks import WithLabels, mlp

FAR = checks.ROWS_AT_ONCE + 100


def right_model(self, x):
    with pyro.plate("observations", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)


def right_guide(self, x):
    loc, log_scale = self.encode(x).chunk(2, dim=-1)
    with pyro.plate("observations", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Told(nn.Module):
    """A plain story of rows of five numbers; a defect is another model, another guide or another part."""

    def __init__(self, model=right_model, guide=right_guide, **parts):
        super().__init__()
        for name, part in ({"decode": nn.Linear(2, 5), "encode": nn.Linear(5, 4)} | parts).items():
            setattr(self, name, part)
        self.model, self.guide = MethodType(model, self), MethodType(guide, self)


def vae(network=(1, 4, 4), likelihood=likelihoods.Bernoulli):
    return VAE(priors.StandardNormal(2), likelihood(mlp(2, 8, network)), posteriors.DiagonalNormal(mlp(network, 8, 4)))


def refusal(story, *columns, error=ValueError, **options):
    """The message with which check refuses: one line."""
    with pytest.raises(error) as refused:
        check(story, *columns, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def assert_says(message, *words):
    assert not (missing := [word for word in words if word not in message]), f"{missing} not in: {message}"


@pytest.fixture
def x():
    return torch.randn(10, 5)


@pytest.fixture
def binary():
    return torch.bernoulli(torch.full((FAR + 50, 5), 0.5))


# What passes ----------------------------------------------------------------------------------------------------------


def test_vae_passes():
    check(vae(), torch.bernoulli(torch.rand(10, 1, 4, 4)))


def test_grey_images_pass_where_the_transform_binarizes_them():
    check(vae(), torch.rand(10, 1, 4, 4), transform=torch.bernoulli)


def conditional():
    return stories.ConditionalVAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(WithLabels(mlp(2 + 3, 8, 5), num_labels=3)),
        encoder=posteriors.DiagonalNormal(WithLabels(mlp(5 + 3, 8, 4), num_labels=3)),
    )


def test_conditional_vae_passes():
    check(conditional(), torch.bernoulli(torch.rand(10, 5)), torch.arange(10) % 3)


@pytest.mark.parametrize(("label", "shown"), [(3, "y [0, 3]"), (-1, "y [-1, 2]")])
def test_a_label_that_the_story_has_not_is_found_in_any_row(label, shown):
    labels = torch.arange(10) % 3
    labels[7] = label
    assert_says(refusal(conditional(), torch.bernoulli(torch.rand(10, 5)), labels), "does not run on two rows", shown)


def test_plain_story_with_two_latents_passes(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            size = pyro.sample("size", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(self.decode(z), size.unsqueeze(-1)).to_event(1), obs=x)

    def guide(self, x):
        loc, log_scale = self.encode(x).chunk(2, dim=-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("size", dist.LogNormal(self.size(x).squeeze(-1), 1.0))

    check(Told(model, guide, size=nn.Linear(5, 1)), x)


def mixture_model(self, x):
    with pyro.plate("observations", len(x)):
        kind = pyro.sample("kind", dist.Categorical(logits=self.weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(self.centres[kind], 1.0).to_event(1), obs=x)


def mixture(model=mixture_model, guide=lambda self, x: None):
    parts = {"weights": nn.Parameter(torch.zeros(3)), "centres": nn.Parameter(torch.randn(3, 5))}
    return Told(model, guide, decode=None, encode=None, **parts)


def test_story_whose_only_latent_is_summed_out_passes_with_an_empty_guide(x):
    check(mixture(), x)


def test_discrete_latent_to_be_summed_out_may_be_absent_from_the_guide(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            kind = pyro.sample("kind", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            loc = self.decode(z) + self.shift[kind]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    check(Told(model, logits=nn.Parameter(torch.zeros(3)), shift=nn.Parameter(torch.randn(3, 5))), x)


def test_single_observation_passes():
    check(vae(), torch.ones(1, 1, 4, 4))


def test_double_precision_story_takes_single_precision_data(x):
    check(Told().double(), x)


def test_single_precision_story_takes_double_precision_data(x):
    check(Told(), x.double())


def test_missing_values_pass_where_a_mask_column_says_so(x):
    observed = torch.ones(10, 5, dtype=torch.bool)
    observed[[0, 7], [1, 4]] = False
    check(masked_story(), torch.where(observed, x, torch.nan), observed)


def test_uniform_guide_covers_a_beta_prior(x):
    check(unit_interval_story(lambda loc: dist.Uniform(torch.zeros_like(loc), 1.0)), x)


def test_logit_normal_guide_covers_a_beta_prior(x):
    to_unit = torch.distributions.transforms.SigmoidTransform()
    check(unit_interval_story(lambda loc: dist.TransformedDistribution(dist.Normal(loc, 1.0), [to_unit])), x)


def test_parameters_of_pyro_modules_and_frozen_ones_need_no_remark(x):
    class Scaled(PyroModule):
        def __init__(self):
            super().__init__()
            self.decode, self.encode = nn.Linear(2, 5), nn.Linear(5, 4)
            self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

        @pyro.nn.pyro_method
        def model(self, x):
            with pyro.plate("observations", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decode(z), self.scale).to_event(1), obs=x)

        @pyro.nn.pyro_method
        def guide(self, x):
            right_guide(self, x)

    check(Scaled(), x)


def unit_interval_story(family):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Beta(torch.full((2,), 2.0), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", family(self.encode(x)).to_event(1))

    story = Told(model, guide, encode=nn.Linear(5, 2))
    return story.requires_grad_(False)


def masked_story(fill=lambda x, observed: torch.where(observed, x, 0.0)):
    def model(self, x, observed):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            likelihood = dist.Normal(self.decode(z), 1.0).mask(observed).to_event(1)
            pyro.sample("x", likelihood, obs=fill(x, observed))

    def guide(self, x, observed):
        right_guide(self, torch.where(observed, x, 0.0))

    return Told(model, guide)


# Nothing is left behind -----------------------------------------------------------------------------------------------


def restless_story():
    """A story whose buffers move whenever it runs, in any mode."""

    def model(self, x):
        self.runs += 1
        right_model(self, x)

    story = Told(model, encode=nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4)))
    story.register_buffer("runs", torch.tensor(0))
    return story


@pytest.mark.parametrize("passes", [True, False], ids=["passing", "refused"])
def test_nothing_moves(passes, x):
    story = restless_story()
    story.encode[1].eval()
    story.decode.weight.grad = torch.ones(5, 2)
    pyro.param("mine", torch.ones(2))
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state = {name: value.clone() for name, value in story.state_dict().items()}
    modes = [module.training for module in story.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    flags = torch.is_grad_enabled(), poutine.util.is_validation_enabled(), dist.is_validation_enabled()

    if passes:
        check(story, x, transform=lambda x: x + torch.randn_like(x))
    else:
        refusal(story, x, transform=lambda x: x + torch.randn_like(x) * torch.nan)

    assert all(torch.equal(value, state[name]) for name, value in story.state_dict().items())
    assert [module.training for module in story.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(pyro.param("mine"), store["mine"])
    assert torch.equal(story.decode.weight.grad, torch.ones(5, 2))
    assert [name for name, parameter in story.named_parameters() if parameter.grad is not None] == ["decode.weight"]
    assert flags == (torch.is_grad_enabled(), poutine.util.is_validation_enabled(), dist.is_validation_enabled())


def test_check_says_the_same_whatever_the_users_parameter_store_holds(x):
    pyro.param("story$$$decode.weight", torch.zeros(1))
    pyro.param("weight", torch.zeros(1))
    check(Told(), x)


# Sites of model and guide ---------------------------------------------------------------------------------------------


def guide_drawing(*names):
    def guide(self, x):
        loc, log_scale = self.encode(x).chunk(2, dim=-1)
        with pyro.plate("observations", len(x)):
            for name in names:
                pyro.sample(name, dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


def test_latent_missing_from_the_guide_is_named(x):
    assert_says(refusal(Told(guide=guide_drawing("w")), x), "model draws ['z']", "guide draws only ['w']", "by name")


def test_latent_missing_from_the_model_is_named(x):
    message = refusal(Told(guide=guide_drawing("z", "w")), x)
    assert_says(message, "guide draws ['w']", "model draws only ['z']", "by name")


def test_discrete_latent_absent_from_the_guide_must_be_marked_for_enumeration(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=self.weights))
            pyro.sample("x", dist.Normal(self.centres[kind], 1.0).to_event(1), obs=x)

    assert_says(refusal(mixture(model), x), "model draws ['kind']", "guide draws only []")


def test_model_that_scores_no_data_is_refused(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return self.decode(z)

    assert_says(refusal(Told(model), x), "scores no data", "['z']", "obs=x")


# Plates ---------------------------------------------------------------------------------------------------------------


def test_global_latent_is_refused(x):
    def model(self, x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), scale).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("scale", dist.LogNormal(self.scale, 1.0))
        right_guide(self, x)

    message = refusal(Told(model, guide, scale=nn.Parameter(torch.zeros(()))), x)
    assert_says(message, "'scale'", "in no plate", "whole data set", 'pyro.plate("observations"', "a parameter")


def test_observation_outside_the_plate_is_refused(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(2), obs=x)

    assert_says(refusal(Told(model), x), "'x'", "in no plate", "'observations'", "observation")


def test_guide_outside_the_plate_is_refused(x):
    def guide(self, x):
        loc, log_scale = self.encode(x).chunk(2, dim=-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    assert_says(refusal(Told(guide=guide), x), "'z'", "in no plate", "'observations'")


def told_in_plates(*plates):
    """A story in these plates, each made from the number of rows."""

    def model(self, x):
        def told(self, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

        in_plates(told, self, x)

    def guide(self, x):
        def told(self, x):
            loc, log_scale = self.encode(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        in_plates(told, self, x)

    def in_plates(program, self, x, rest=plates):
        if not rest:
            return program(self, x)
        with rest[0](len(x)):
            in_plates(program, self, x, rest[1:])

    return Told(model, guide)


def test_plate_of_another_name_is_refused(x):
    message = refusal(told_in_plates(partial(pyro.plate, "data")), x)
    assert_says(message, "'z'", "in the plates ['data']", "not in 'observations'", 'pyro.plate("observations", len(x))')


def test_plate_at_another_dim_is_refused(x):
    message = refusal(told_in_plates(partial(pyro.plate, "observations", dim=-2)), x)
    assert_says(message, "'observations' at dim -2", "at dim -1", ".to_event")


def test_second_plate_is_refused(x):
    pixels = lambda rows: pyro.plate("pixels", 3, dim=-2)  # noqa: E731
    message = refusal(told_in_plates(partial(pyro.plate, "observations", dim=-1), pixels), x)
    assert_says(message, "['observations', 'pixels']", "the only plate", ".to_event")


@pytest.mark.parametrize("size", [1, 10], ids=["too short", "too long"])
def test_plate_of_a_fixed_size_is_refused(size, x):
    message = refusal(told_in_plates(lambda rows: pyro.plate("observations", size)), x)
    assert_says(message, "two rows", "as long as the columns")


def test_one_latent_for_all_rows_inside_the_plate_is_refused(x):
    def model(self, x):
        with pyro.plate("observations", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", 1):
            pyro.sample("z", dist.Normal(self.encode(x.mean(0, keepdim=True))[:, :2], 1.0).to_event(1))

    assert_says(refusal(Told(model, guide), x), "'z'", "batch shape (1,) on two rows", "expected (2,)")


@pytest.mark.parametrize("num_latents", [1, 2, 3])
def test_latent_with_undeclared_event_dims_is_refused(num_latents, x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(num_latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 1.0))

    story = Told(model, guide, decode=nn.Linear(num_latents, 5), encode=nn.Linear(5, num_latents))
    assert_says(refusal(story, x), "two rows", ".to_event")


@pytest.mark.parametrize("num_features", [1, 2, 5])
def test_observation_with_undeclared_event_dims_is_refused(num_features):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0), obs=x)

    story = Told(model, decode=nn.Linear(2, num_features), encode=nn.Linear(num_features, 4))
    assert_says(refusal(story, torch.randn(10, num_features)), "two rows", ".to_event")


# Scaled log probabilities ---------------------------------------------------------------------------------------------


def test_scaled_model_is_refused(x):
    def model(self, x):
        with poutine.scale(scale=0.1):
            right_model(self, x)

    assert_says(refusal(Told(model), x), "scaled by 0.1", "log p(x) is unscaled", "Remove poutine.scale")


def test_scaled_guide_is_refused(x):
    def guide(self, x):
        with poutine.scale(scale=7.0):
            right_guide(self, x)

    assert_says(refusal(Told(guide=guide), x), "'z'", "scaled by 7", "Remove poutine.scale")


def test_batch_declared_as_a_subsample_of_the_data_is_refused(x):
    def subsampled(rows):
        return pyro.plate("observations", 1000, subsample=torch.arange(rows))

    assert_says(refusal(told_in_plates(subsampled), x), "scaled by 500", "subsample", "fit draws the batches itself")


def test_plate_that_draws_a_subsample_is_refused(x):
    def model(self, x):
        with pyro.plate("observations", len(x), subsample_size=1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x[rows])

    def guide(self, x):
        with pyro.plate("observations", len(x), subsample_size=1) as rows:
            pyro.sample("z", dist.Normal(self.encode(x[rows])[:, :2], 1.0).to_event(1))

    assert_says(refusal(Told(model, guide), x), "scaled by 2", "subsample_size")


def test_plate_that_draws_a_subsample_of_many_rows_is_refused(x):
    subsampled = partial(pyro.plate, "observations", subsample_size=32)
    assert_says(refusal(told_in_plates(subsampled), x), "two rows", "not subsampled")


# Observations ---------------------------------------------------------------------------------------------------------


def test_observation_that_would_broadcast_over_an_event_of_size_one_is_refused():
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    story = Told(model, decode=nn.Linear(2, 1), encode=nn.Linear(3, 4))
    message = refusal(story, torch.randn(4, 3))
    assert_says(message, "'x'", "makes observations of shape (2, 1)", "given (2, 3)", "shape of the data")


def test_observation_without_the_channel_of_the_likelihood_is_refused():
    story = VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(mlp(2, (1, 4, 4))),
        posteriors.DiagonalNormal(mlp((4, 4), 4)),
    )
    assert_says(refusal(story, torch.ones(10, 4, 4)), "(2, 1, 4, 4)", "(2, 4, 4)", "shape of the data")


def test_network_of_the_wrong_input_size_is_explained_with_the_shapes(x):
    message = refusal(Told(encode=nn.Linear(6, 4)), x)
    assert_says(message, "does not run on two rows", "x (2, 5)", "shapes that its networks take")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_story_in_half_precision_is_refused_with_the_remedy(dtype, x):
    assert_says(refusal(Told().to(dtype), x), f"The story is in {dtype}", "mixed_precision=True", "model_dtype=")


def test_whole_numbers_under_a_network_of_real_ones_are_refused():
    assert_says(refusal(Told(), torch.ones(10, 5, dtype=torch.int64)), "does not run on two rows", "x (2, 5)")


# Support of the data --------------------------------------------------------------------------------------------------


def bernoulli_story():
    return vae(network=5)


@pytest.mark.parametrize("row", [0, 2, FAR])
def test_grey_level_under_a_bernoulli_is_found_in_any_row(row, binary):
    binary[row, 3] = 0.25
    message = refusal(bernoulli_story(), binary)
    assert_says(message, "x has values between 0 and 1; Bernoulli", "over 0 and 1", f"row {row}, column 3", "Binarize")


def test_grey_level_of_an_image_is_named_by_row_and_pixel():
    images = torch.ones(10, 1, 4, 4)
    images[7, 0, 2, 3] = 0.5
    assert_says(refusal(vae(), images), "row 7, column 0, 2, 3")


def positive_story(family):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", family(self.decode(z)).to_event(1), obs=x)

    return Told(model)


@pytest.mark.parametrize("row", [0, FAR])
def test_negative_number_under_a_gamma_is_found_in_any_row(row, binary):
    story = positive_story(lambda loc: dist.Gamma(loc.exp(), 1.0))
    check(story, binary + 0.5)
    binary[row, 2] = -3
    assert_says(refusal(story, binary + 0.5), "between -2.5 and", "Gamma", "from 0 to inf", f"row {row}, column 2")


@pytest.mark.parametrize("row", [1, FAR])
def test_count_above_the_total_is_found_in_any_row(row, binary):
    story = positive_story(lambda loc: dist.Binomial(3, logits=loc))
    check(story, binary * 3)
    binary[row, 4] = 4
    assert_says(refusal(story, binary), "between 0 and 4", "Binomial", "from 0 to 3", f"row {row}, column 4")


def test_scored_label_outside_its_classes_is_found(x):
    def model(self, x, y):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Categorical(logits=self.classify(z)), obs=y)

    story = Told(model, lambda self, x, y: right_guide(self, x), classify=nn.Linear(2, 3))
    y = torch.arange(10) % 3
    check(story, x, y)
    y[6] = 3
    assert_says(refusal(story, x, y), "y has values between 0 and 3", "Categorical", "row 6")


def test_support_is_looked_at_after_the_transform(binary):
    story = bernoulli_story()
    check(story, binary / 4, transform=torch.ceil)
    binary[FAR, 0] = 5
    message = refusal(story, binary / 4, transform=torch.ceil)
    assert_says(message, "transform(x) has values between 0 and 2", "Bernoulli", f"row {FAR}, column 0")


@pytest.mark.parametrize("row", [1, FAR])
def test_grey_level_that_the_transform_does_not_take_is_explained(row, binary):
    binary[row, 0] = 1.5
    message = refusal(bernoulli_story(), binary, transform=torch.bernoulli)
    assert_says(message, "transform fails on x", "and 1.5", "0 to 1")


def test_observation_that_the_story_makes_itself_is_checked_on_two_rows(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x / 2)

    assert_says(refusal(Told(model), torch.ones(10, 5)), "Bernoulli", "over 0 and 1", "row 0")


def decode(*sizes):
    return mlp(2, (5, *sizes))


# A likelihood, data that it takes, an entry that it does not take, and words of the refusal.
OUTSIDE = {
    "Bernoulli": (lambda: likelihoods.Bernoulli(decode()), 1, 0.5, ["over 0 and 1", "ContinuousBernoulli", "Normal"]),
    "ContinuousBernoulli": (
        lambda: likelihoods.ContinuousBernoulli(decode()),
        1,
        1.25,
        ["numbers from 0 to 1 (", "Divide by the largest", "Poisson", "LogNormal", "Normal"],
    ),
    "Beta": (
        lambda: likelihoods.Beta(decode(), 0.5),
        0.5,
        0,
        ["numbers between 0 and 1, not these two", "ContinuousBernoulli", "exact zeros", "LogNormal"],
    ),
    "LogNormal": (
        lambda: likelihoods.LogNormal(decode(), 0.5),
        3,
        0,
        ["numbers above 0", "Poisson or NegativeBinomial", "zeros", "Laplace"],
    ),
    "Binomial": (
        lambda: likelihoods.Binomial(decode(), 3),
        3,
        4,
        ["whole numbers from 0 to 3", "Raise total_count", "Poisson", "ContinuousBernoulli"],
    ),
    "Categorical": (
        lambda: likelihoods.Categorical(decode(3)),
        2,
        3,
        ["whole numbers from 0 to 2", "Number the classes from 0", "Poisson"],
    ),
    "Poisson": (
        lambda: likelihoods.Poisson(decode()),
        3,
        -1,
        ["whole numbers from 0 to inf", "negative or not whole", "Normal", "LogNormal"],
    ),
    "NegativeBinomial": (lambda: likelihoods.NegativeBinomial(decode(), 0.5), 3, 0.5, ["not whole", "StudentT"]),
    "ZeroInflatedPoisson": (lambda: likelihoods.ZeroInflatedPoisson(decode(), 0.5), 3, -2, ["negative", "StudentT"]),
    "ZeroInflatedNegativeBinomial": (
        lambda: likelihoods.ZeroInflatedNegativeBinomial(decode(), 0.5, 0.5),
        3,
        0.5,
        ["not whole", "Laplace"],
    ),
    "DiscretizedLogistic": (
        lambda: likelihoods.DiscretizedLogistic(decode(), 0.5),
        200 / 255,
        200.5 / 255,
        ["the 256 numbers k / 255 from 0 to 1", "Divide whole grey levels", "ContinuousBernoulli"],
    ),
    "a mixture of DiscretizedLogistic": (
        lambda: likelihoods.MixtureOfDiscretizedLogistics(decode(4), decode(4), 0.5, levels=16),
        1 / 15,
        15,
        ["the 16 numbers k / 15 from 0 to 1", "Divide whole grey levels"],
    ),
}


@pytest.mark.parametrize("row", [1, FAR])
@pytest.mark.parametrize("family", OUTSIDE)
def test_data_outside_of_a_likelihood_are_refused_with_those_that_fit(family, row):
    make, inside, outside, words = OUTSIDE[family]
    story = VAE(priors.StandardNormal(2), make(), posteriors.DiagonalNormal(mlp(5, 4)))
    x = torch.full((FAR + 50, 5), float(inside))
    check(story, x)
    x[row, 3] = outside
    found = f"between {min(inside, outside):.3g} and {max(inside, outside):.3g}; {family} is a distribution over"
    message = refusal(story, x)
    assert_says(message, f"x has values {found}", f"row {row}, column 3", "likelihoods.", *words)


def test_every_likelihood_that_refuses_anything_says_what_to_use():
    refusing = set(checks.REMEDIES)
    assert refusing == {family.removeprefix("a mixture of ") for family in OUTSIDE}
    named = set(re.findall(r"\b[A-Z][a-z]+[A-Z]?\w*", " ".join(checks.REMEDIES.values())))
    words = {"Binarize", "Divide", "Number", "Numbers", "Raise", "Use"}
    assert all(hasattr(likelihoods, name) for name in named - words)


def table_story(trunk=None):
    size = 2 if trunk is None else 8
    columns = likelihoods.ByColumn(
        likelihoods.Normal(nn.Linear(size, 2), 1.0),
        likelihoods.Poisson(nn.Linear(size, 1)),
        likelihoods.Categorical(nn.Linear(size, 3)),
        likelihoods.Beta(nn.Linear(size, 2), 0.5),
        trunk=trunk,
    )
    return VAE(priors.StandardNormal(2), columns, posteriors.DiagonalNormal(mlp(6, 4)))


def table():
    x = torch.full((FAR + 50, 6), 0.5)
    x[:, 2], x[:, 3] = 7, torch.arange(FAR + 50) % 3
    return x


@pytest.mark.parametrize("row", [1, FAR])
@pytest.mark.parametrize(
    ("column", "outside", "words"),
    [
        (2, -1, ["between -1 and 7 in column 2; Poisson is", "StudentT"]),
        (3, 3, ["between 0 and 3 in column 3; Categorical is", "from 0 to 2", "Number the classes"]),
        (5, 1, ["between 0.5 and 1 in columns 4 to 5; Beta is", "column 5)", "ContinuousBernoulli"]),
    ],
    ids=["count", "class", "share"],
)
def test_the_column_of_a_table_that_refuses_is_named_with_its_family(column, outside, words, row):
    story, x = table_story(mlp(2, 8)), table()
    check(story, x)
    x[row, column] = outside
    assert_says(refusal(story, x), "x has values", f"the first outside is in row {row}", *words)


def test_columns_are_counted_after_the_transform():
    x = table()
    x[FAR, 2] = 7.5
    check(table_story(), x, transform=lambda x: torch.cat([x[:, :2], x[:, 2:3].floor(), x[:, 3:]], 1))
    message = refusal(table_story(), x, transform=lambda x: x + 0)
    assert_says(message, "transform(x) has values between 7 and 7.5 in column 2; Poisson is", f"row {FAR}")


def test_number_that_is_not_finite_in_a_table_is_named_by_its_column():
    def transform(x):
        return torch.where(torch.arange(6) == 4, torch.nan, x)

    assert_says(refusal(table_story(), table(), transform=transform), "is nan in row 0, column 4, where")


def test_bounds_that_differ_by_column_are_checked_in_every_row(binary):
    total = torch.tensor([1, 2, 3, 4, 5])
    story = VAE(priors.StandardNormal(2), likelihoods.Binomial(decode(), total), posteriors.DiagonalNormal(mlp(5, 4)))
    check(story, binary * total)
    binary[FAR, 1] = 3
    assert_says(refusal(story, binary), "Binomial", "from 0 to 5", f"row {FAR}, column 1")


def test_bounds_that_differ_by_row_are_checked_against_their_own_row_of_a_table():
    def model(self, x, total):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = self.decode(z)
            parts = [dist.Binomial(total, logits=logits[:, 0]), dist.Normal(logits[:, 1:], 1.0).to_event(1)]
            pyro.sample("x", Columns(parts), obs=x)

    story = Told(model, lambda self, x, total: right_guide(self, x))
    total = torch.tensor([2.0, 9.0, 9.0])
    x = torch.cat([total.unsqueeze(-1), torch.randn(3, 4)], 1)
    check(story, x, total)
    assert_says(refusal(story, x.flip(0), total), "between 9 and 9 in column 0; Binomial", "row 0")


def test_bounds_that_differ_by_row_are_checked_against_their_own_row():
    def model(self, x, total):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(total.unsqueeze(-1), logits=self.decode(z)).to_event(1), obs=x)

    story = Told(model, lambda self, x, total: right_guide(self, x))
    total = torch.tensor([2.0, 9.0, 9.0])
    check(story, total.unsqueeze(-1).expand(3, 5), total)
    assert_says(refusal(story, total.flip(0).unsqueeze(-1).expand(3, 5), total), "between 9 and 9", "Binomial", "row 0")


# Priors and guides ----------------------------------------------------------------------------------------------------


def test_normal_guide_for_a_gamma_prior_is_refused(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):  # far enough from zero to draw positive numbers
            pyro.sample("z", dist.Normal(50 + self.encode(x)[:, :2], 1.0).to_event(1))

    message = refusal(Told(model, guide), x)
    assert_says(message, "from Gamma over numbers from 0 to inf", "the guide from Normal over real", "that support")


def test_gamma_guide_for_a_normal_prior_is_refused(x):
    def guide(self, x):
        concentration, rate = self.encode(x).exp().chunk(2, dim=-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Gamma(concentration, rate).to_event(1))

    assert_says(refusal(Told(guide=guide), x), "'z' from Normal over real numbers", "the guide from Gamma", "cover")


def test_guide_on_a_wider_interval_than_its_prior_is_refused(x):
    message = refusal(unit_interval_story(lambda loc: dist.Uniform(torch.zeros_like(loc), 2.0)), x)
    assert_says(message, "Beta over numbers from 0 to 1", "Uniform over numbers from 0 to 2", "with that support")


def test_guide_of_other_columns_than_its_prior_is_refused(x):
    def story(*kinds):
        def model(self, x):
            with pyro.plate("observations", len(x)):
                parts = [dist.Normal(torch.zeros(len(x)), 1.0), dist.LogNormal(torch.zeros(len(x)), 1.0)]
                z = pyro.sample("z", Columns(parts))
                pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            loc = self.encode(x)
            with pyro.plate("observations", len(x)):
                pyro.sample("z", Columns([kind(loc[:, i], 1.0) for i, kind in enumerate(kinds)]))

        return Told(model, guide, encode=nn.Linear(5, 2))

    check(story(dist.Laplace, dist.LogNormal), x)
    assert_says(refusal(story(dist.LogNormal, dist.LogNormal), x), "Columns", "with that support")


def test_guide_over_a_closed_interval_covers_a_prior_over_an_open_one(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", Beta(torch.full((2,), 2.0), torch.tensor(2.0)).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Beta(*self.encode(x).exp().chunk(2, -1)).to_event(1))

    check(Told(model, guide), x)


def test_guide_of_another_event_shape_is_refused(x):
    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x)[:, :1], 1.0).to_event(1))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z.sum(-1, keepdim=True)), 1.0).to_event(1), obs=x)

    story = Told(model, guide, decode=nn.Linear(1, 5), encode=nn.Linear(5, 1))
    assert_says(refusal(story, x), "'z' with the event shape (3,)", "the guide with (1,)", "must be the same")


# Log probabilities and gradients --------------------------------------------------------------------------------------


def test_scale_of_zero_in_the_guide_is_refused(x):
    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x)[:, :2], torch.zeros(())).to_event(1))

    assert_says(refusal(Told(guide=guide), x), "'z' of the guide", "expected finite", "scale of zero")


def test_scale_of_zero_in_the_model_is_refused(x):
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), self.decode(z) * 0).to_event(1), obs=x)

    assert_says(refusal(Told(model), x), "'x' of the model", "expected finite", "scale of zero")


def test_parameters_without_gradient_are_named(x):
    message = refusal(Told(unused=nn.Linear(3, 3)), x)
    assert_says(message, "2 of 6 parameters receive no gradient", "'unused.weight'", "requires_grad_(False)")


def test_model_detached_from_its_parameters_is_refused(x):
    def model(self, x):
        with torch.no_grad():
            right_model(self, x)

    assert_says(refusal(Told(model), x), "2 of 4 parameters", "'decode.weight'")


def test_story_detached_from_all_its_parameters_is_refused(x):
    def guide(self, x):
        with torch.no_grad():
            right_guide(self, x)

    def model(self, x):
        with torch.no_grad():
            right_model(self, x)

    assert_says(refusal(Told(model, guide), x), "4 of 4 parameters receive no gradient")


def model_of_parts(self, x):
    with pyro.plate("observations", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)


def guide_of_parts(self, x):
    with pyro.plate("observations", len(x)):
        pyro.sample("z", dist.Normal(self.encode(x), 1.0).to_event(1))


def test_pyro_module_parts_that_collide_in_a_plain_story_are_refused(x):
    class Part(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 5)

        def forward(self, x):
            return self.net(x)

    message = refusal(Told(model_of_parts, guide_of_parts, decode=Part(), encode=Part()), x)
    assert_says(message, "'net$$$weight'", "share the name", "never train", "plain nn.Modules")


def test_pyro_modules_that_share_a_name_directly_are_refused(x):
    parts = {name: PyroModule[nn.Linear](5, 5) for name in ("decode", "encode")}
    assert_says(
        refusal(Told(model_of_parts, guide_of_parts, **parts), x), "share the name 'weight'", "plain nn.Modules"
    )


def test_one_layer_in_two_places_is_no_collision(x):
    shared = nn.Linear(5, 5)

    class Part(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = shared

        def forward(self, x):
            return self.net(x)

    check(Told(model_of_parts, guide_of_parts, decode=Part(), encode=Part()), x)


def test_pyro_param_that_the_story_does_not_hold_is_refused(x):
    def guide(self, x):
        with pyro.plate("observations", len(x)):
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("z", dist.Normal(self.encode(x)[:, :2] + loc, 1.0).to_event(1))

    message = refusal(Told(guide=guide), x)
    assert_says(message, "pyro.param('loc')", "does not belong to the story", "nn.Parameter")


# Columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_number_that_is_not_finite_is_named_by_row_and_column(value, x):
    x[[4, 8], [2, 0]] = value
    assert_says(refusal(Told(), x), f"x is {value} in row 4, column 2", "2 of 10 rows", "Remove these rows", "mask")


def test_nan_in_a_condition_is_named_too(x):
    def model(self, x, age):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z) + age.unsqueeze(-1), 1.0).to_event(1), obs=x)

    story = Told(model, lambda self, x, age: right_guide(self, x))
    age = torch.ones(10)
    age[3] = torch.nan
    assert_says(refusal(story, x, age), "age is nan in row 3 (1 of 10 rows")


def test_nan_where_the_mask_says_observed_is_refused(x):
    observed = torch.ones(10, 5, dtype=torch.bool)
    observed[7, 4] = False
    x[7, 4] = x[9, 1] = torch.nan
    assert_says(refusal(masked_story(), x, observed), "x is nan in row 9, column 1")


@pytest.mark.parametrize("row", [0, 9])
def test_missing_value_that_is_masked_but_not_filled_is_refused(row, x):
    observed = torch.ones(10, 5, dtype=torch.bool)
    observed[row, 1] = False
    x[row, 1] = torch.nan
    message = refusal(masked_story(fill=lambda x, observed: x), x, observed)
    assert_says(message, f"x is nan in row {row}, column 1", "torch.where", "NaN gradients")


def test_columns_of_different_length_are_refused(x):
    story = Told(lambda self, x, y: right_model(self, x), lambda self, x, y: right_guide(self, x))
    assert_says(refusal(story, x, torch.zeros(9)), "one entry per observation", "'x': 10", "'y': 9")


def test_empty_column_is_refused():
    assert_says(refusal(Told(), torch.zeros(0, 5)), "at least one observation", "x has the shape (0, 5)")
    assert_says(refusal(Told(), torch.zeros(5, 0)), "of at least one number", "x has the shape (5, 0)")


def test_single_number_as_column_is_refused():
    assert_says(refusal(Told(), torch.tensor(3.0)), "first dimension is the observation", "x is a single number")


def test_no_column_is_refused():
    assert_says(refusal(vae()), "at least one column")


def test_none_as_column_is_refused_with_the_remedy(x):
    story = Told(lambda self, x, y: right_model(self, x), lambda self, x, y: right_guide(self, x))
    assert_says(refusal(story, x, None, error=TypeError), "Column 1 must be a tensor", "NoneType", "pass split.x")


def test_array_as_column_is_refused_with_the_remedy(x):
    assert_says(refusal(Told(), x.numpy(), error=TypeError), "Column 0", "ndarray", "torch.as_tensor")


def test_more_columns_than_the_model_takes_are_refused(x):
    assert_says(refusal(Told(), x, x, error=TypeError), "The model takes (x)", "2 columns", "too many")


def test_fewer_columns_than_the_model_takes_are_refused(x):
    story = Told(lambda self, x, y: right_model(self, x), lambda self, x, y: right_guide(self, x))
    assert_says(refusal(story, x, error=TypeError), "The model takes (x, y)", "1 columns", "'y'")


def test_columns_of_a_model_that_takes_any_number_are_numbered(x):
    story = Told(lambda self, *data: right_model(self, data[0]), lambda self, *data: right_guide(self, data[0]))
    check(story, x, x)
    bad = x.clone()
    bad[3, 3] = torch.nan
    assert_says(refusal(story, x, bad), "data[1] is nan in row 3, column 3")


def test_a_network_that_a_plain_function_hides_is_found():
    hidden = nn.Linear(2, 3)
    story = VAE(
        prior=priors.StandardNormal(2),
        decoder=lambda z: dist.Normal(hidden(z), 1.0).to_event(1),
        encoder=posteriors.DiagonalNormal(mlp(3, 4)),
    )
    with pytest.raises(ValueError, match=r"a trainable tensor of shape \(3(, 2)?,?\) that is none of its parameters"):
        check(story, torch.randn(10, 3))
    for parameter in hidden.parameters():
        parameter.requires_grad_(False)
    check(story, torch.randn(10, 3))
