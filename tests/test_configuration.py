"""Configurations go to JSON and come back the same, strictly checked; every word builds a right story."""

import inspect
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import ELBO

from ppl_vae import check, configuration, data, load, log_evidence, objectives, save
from ppl_vae.configuration import (
    CHOICES,
    LARGEST,
    POSITIVE,
    STORY_SLOTS,
    Bernoulli,
    Beta,
    ByColumn,
    ComparisonConfiguration,
    Convolutional,
    DataConfiguration,
    DiagonalNormal,
    EvidenceConfiguration,
    ImportanceWeighted,
    MixturePrior,
    Mlp,
    Normal,
    OwnStory,
    Renyi,
    RunConfiguration,
    StandardNormal,
    StoryConfiguration,
    TrainingConfiguration,
    UniformPrior,
    Vamp,
    ZeroInflatedPoisson,
    build,
    choice,
    from_json,
    to_json,
)
from ppl_vae.evidence.comparison import compare
from ppl_vae.evidence.estimators import Correction, MethodName

EVERY_CHOICE = [(slot, word) for slot in STORY_SLOTS for word in CHOICES[slot]]
TABLE = ByColumn(("2*normal", "categorical:3", "poisson", "binomial:4"))


def chosen(slot, word):
    if word == "by-column":
        return StoryConfiguration(event_shape=(5,), likelihood=TABLE)
    part = Vamp(components=7) if word == "vamp" else CHOICES[slot][word]()
    return StoryConfiguration(event_shape=(1, 6, 5), **{slot: part})


def through_json(table):
    return json.loads(json.dumps(table, allow_nan=False))


def run_configuration(story):
    return RunConfiguration(DataConfiguration(), story, TrainingConfiguration())


# To JSON and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "word"), EVERY_CHOICE)
def test_every_choice_comes_back_from_json(slot, word):
    story = chosen(slot, word)
    table = through_json(to_json(story))
    assert table[slot]["name"] == word
    assert from_json(table) == story


def test_a_run_comes_back_from_json():
    wanted = run_configuration(replace(chosen("network", "mlp"), likelihood=Normal(scale=0.1, floor=1e-2)))
    assert from_json(through_json(to_json(wanted)), RunConfiguration) == wanted


def test_a_field_left_out_has_its_default():
    assert from_json({"event_shape": [5]}) == StoryConfiguration(event_shape=(5,))


def test_whole_number_stands_for_a_real_one():
    story = StoryConfiguration(event_shape=(5,), likelihood=Normal(scale=1, floor=1e-3))
    restored = from_json(through_json(to_json(story)))
    assert restored == story
    assert type(restored.likelihood.scale) is float


sizes = st.lists(st.integers(1, 10_000), min_size=1, max_size=4).map(tuple)
positive = st.floats(1e-6, 1e6)
stories = st.builds(
    StoryConfiguration,
    event_shape=sizes,
    latent_dim=st.integers(1, 1000),
    prior=st.builds(StandardNormal) | st.builds(MixturePrior, components=st.integers(1, 99)),
    likelihood=st.builds(Bernoulli)
    | st.builds(Normal, scale=positive | st.sampled_from(POSITIVE), initial=positive, floor=positive),
    posterior=st.builds(DiagonalNormal, floor=positive),
    network=st.builds(Mlp, hidden_dims=sizes | st.just(())) | st.builds(Convolutional, channels=sizes),
)
runs = st.builds(
    RunConfiguration,
    data=st.builds(
        DataConfiguration,
        data=st.text(),
        data_root=st.none() | st.text(),
        download=st.booleans(),
        binarization=st.sampled_from(["auto", "none", "static", "dynamic"]),
    ),
    story=stories,
    training=st.builds(TrainingConfiguration, free_bits=positive)
    | st.builds(
        TrainingConfiguration,
        epochs=st.integers(1, LARGEST),
        batch_size=st.integers(1, LARGEST),
        learning_rate=positive,
        beta=positive,
        objective=st.builds(ImportanceWeighted, particles=st.integers(1, 99))
        | st.builds(Renyi, alpha=st.floats(0, 0.9)),
        kl_warmup=st.integers(0, LARGEST),
        patience=st.integers(0, LARGEST),
        num_particles=st.integers(1, LARGEST),
        seed=st.integers(0, LARGEST),
    ),
)


@settings(deadline=None)
@given(runs)
def test_any_run_comes_back_from_json(wanted):
    assert from_json(through_json(to_json(wanted)), RunConfiguration) == wanted


@settings(deadline=None)
@given(stories, st.data())
def test_a_field_of_another_name_is_refused_wherever_it_stands(story, data):
    table = to_json(story)
    place = data.draw(st.sampled_from([table, *(table[slot] for slot in STORY_SLOTS)]))
    place["strange"] = 1
    with pytest.raises(ValueError, match=r"Unknown fields \['strange'\] of \w+; known are"):
        from_json(table)


# Strictness -----------------------------------------------------------------------------------------------------------


def changed(**values):
    return to_json(StoryConfiguration(event_shape=(1, 6, 5))) | values


@pytest.mark.parametrize("table", [None, 3, "VAE", [1, 2], [["event_shape", [5]]]], ids=repr)
def test_what_is_no_mapping_is_refused(table):
    with pytest.raises(ValueError, match="Expected the fields of StoryConfiguration; found"):
        from_json(table)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"Incomplete fields of StoryConfiguration: .*event_shape"):
        from_json({"latent_dim": 2})


@pytest.mark.parametrize("slot", STORY_SLOTS)
@pytest.mark.parametrize("word", ["os.system", "ppl_vae.priors.StandardNormal", "StandardNormal", "", None, 3, [], {}])
def test_a_word_outside_the_tables_is_refused(slot, word):
    with pytest.raises(ValueError, match=f"Unknown {slot} .*; choose one of {next(iter(CHOICES[slot]))}"):
        from_json(changed(**{slot: {"name": word}}))


@pytest.mark.parametrize("slot", STORY_SLOTS)
def test_a_choice_without_a_word_is_refused(slot):
    with pytest.raises(ValueError, match=f"Unknown {slot} None"):
        from_json(changed(**{slot: {}}))


@pytest.mark.parametrize("slot", STORY_SLOTS)
def test_a_choice_that_is_no_mapping_is_refused(slot):
    with pytest.raises(ValueError, match=f"(?i){slot}|fields of"):
        from_json(changed(**{slot: next(iter(CHOICES[slot]))}))


def test_a_field_of_another_choice_is_refused():
    with pytest.raises(ValueError, match=r"Unknown fields \['channels'\] of Mlp; known are \['hidden_dims'\]"):
        from_json(changed(network={"name": "mlp", "channels": [4]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent_dim", "2"),
        ("latent_dim", 2.0),
        ("latent_dim", True),
        ("latent_dim", None),
        ("event_shape", 5),
        ("event_shape", "5"),
        ("event_shape", [5.0]),
        ("event_shape", [True]),
        ("event_shape", [-5]),
        ("event_shape", [0]),
        ("event_shape", {"0": 5}),
        ("event_shape", [1] * 1001),
    ],
)
def test_a_value_of_another_type_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        from_json(changed(**{field: value}))


@pytest.mark.parametrize("value", [True, None, [0.1], {"value": 0.1}])
def test_a_scale_that_is_neither_word_nor_number_is_refused(value):
    with pytest.raises(ValueError, match="scale must be of type"):
        from_json(changed(likelihood={"name": "normal", "scale": value}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: StoryConfiguration(event_shape=(5,), latent_dim=0),
        lambda: TrainingConfiguration(epochs=-1),
        lambda: TrainingConfiguration(batch_size=0),
        lambda: TrainingConfiguration(num_particles=0),
        lambda: TrainingConfiguration(seed=-1),
        lambda: TrainingConfiguration(kl_warmup=-1),
        lambda: TrainingConfiguration(patience=-1),
        lambda: EvidenceConfiguration(num_particles=0),
        lambda: EvidenceConfiguration(budget=0),
        lambda: EvidenceConfiguration(limit=0),
        lambda: EvidenceConfiguration(seed=-1),
    ],
)
def test_a_number_below_its_least_is_refused(make):
    with pytest.raises(ValueError, match=r"\w+ must be at least [01]; found (0|-1)\."):
        make()


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (TrainingConfiguration, "learning_rate"),
        (EvidenceConfiguration, "tolerance"),
        (Normal, "scale"),
        (Normal, "floor"),
        (Normal, "initial"),
        (DiagonalNormal, "floor"),
    ],
)
def test_a_number_that_is_not_positive_and_finite_is_refused(kind, field, value):
    with pytest.raises(ValueError, match=f"{field} must be positive and finite; found {value}"):
        kind(**{field: value})


def test_an_unknown_word_for_a_scale_names_the_words():
    with pytest.raises(ValueError, match="Unknown scale 'wide'; choose one of learned, per-dimension, network"):
        Normal(scale="wide")


def test_an_unknown_binarization_names_the_words():
    with pytest.raises(ValueError, match="auto, none, static and dynamic; found 'some'"):
        DataConfiguration(binarization="some")


def test_an_unknown_method_or_correction_names_the_words():
    with pytest.raises(ValueError, match=r"Unknown method 'magic'; choose one of auto, .*, exact"):
        EvidenceConfiguration(method="magic")
    with pytest.raises(ValueError, match="Unknown correction 'magic'; choose one of jackknife, jackknife-2, pareto"):
        EvidenceConfiguration(correction="magic")


def test_the_words_of_the_command_line_are_those_of_the_package():
    assert get_args(MethodName) == configuration.METHODS
    assert get_args(Correction) == configuration.CORRECTIONS
    assert tuple(data.load(torch.rand(10, 3)).splits) == configuration.SPLITS


@pytest.mark.parametrize(
    ("kind", "function"), [(EvidenceConfiguration, log_evidence), (ComparisonConfiguration, compare)]
)
def test_estimates_at_the_command_line_have_the_defaults_of_the_package(kind, function):
    parameters = inspect.signature(function).parameters
    said = {item.name: item.default for item in fields(kind) if item.name not in ("limit", "seed")}
    assert said == {name: parameters[name].default for name in said}


def test_choice_looks_words_up_in_its_own_table_only():
    assert choice("likelihood", "normal") is Normal
    with pytest.raises(ValueError, match="Unknown prior 'bernoulli'; choose one of standard-normal"):
        choice("prior", "bernoulli")


def test_a_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        StoryConfiguration(event_shape=(5,)).latent_dim = 3


def test_reading_a_configuration_imports_nothing():
    program = """
import json, sys
from ppl_vae.configuration import from_json
before = set(sys.modules)
words = ["antigravity", "this.s", "os:system", "ppl_vae.vae.VAE", "__import__('antigravity')", "!!python/name:this.s"]
table = {"event_shape": [5], "prior": {"name": "standard-normal"}}
from_json(table)
for word in words:
    for bad in (table | {"prior": {"name": word}}, table | {"prior": word}, table | {word: 1}, {"class_path": word},
                table | {"prior": {"name": "standard-normal", "class_path": word, "__class__": word}}, word):
        try:
            from_json(bad)
        except ValueError:
            continue
        raise SystemExit(f"{bad} was accepted")
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("gaussian",), "Unknown likelihood 'gaussian'; choose one of bernoulli"),
        (("normal:3",), "such as 4\\*normal, poisson or categorical:3; found 'normal:3'"),
        (("x*normal",), "found 'x\\*normal'"),
        (("0*normal",), "found '0\\*normal'"),
        (("categorical:many",), "a whole number after the colon; found 'categorical:many'"),
        (("categorical:1",), "classes must be at least 2"),
        (("by-column",), "found 'by-column'"),
    ],
)
def test_a_column_that_stands_for_no_likelihood_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        ByColumn(columns)


@pytest.mark.parametrize(
    ("columns", "message"), [((), "needs likelihood.columns"), (("normal",), "speaks of 1 columns")]
)
def test_columns_are_as_many_as_the_table_has(columns, message):
    with pytest.raises(ValueError, match=message):
        build(StoryConfiguration(event_shape=(5,), likelihood=ByColumn(columns)))


def test_numbers_that_make_no_part_are_refused():
    with pytest.raises(ValueError, match=r"prior\.low must lie below prior\.high; found 1\.0 and -1\.0"):
        UniformPrior(low=1.0, high=-1.0)
    with pytest.raises(ValueError, match=r"gate is a probability below 1; found 1\.5"):
        ZeroInflatedPoisson(gate=1.5)
    with pytest.raises(ValueError, match=r"objective\.alpha is a finite number other than 1; found 1"):
        Renyi(alpha=1.0)


def test_a_part_of_another_slot_is_refused():
    with pytest.raises(ValueError, match=r"prior is one of StandardNormal, .*; found Beta"):
        StoryConfiguration(event_shape=(5,), prior=Beta())


def test_the_story_of_ones_own_is_remembered_by_name_and_not_built_from_it():
    wanted = RunConfiguration(DataConfiguration(), OwnStory("a/b.py", "Mine", (5,)), TrainingConfiguration())
    assert from_json(through_json(to_json(wanted)), RunConfiguration) == wanted


@pytest.mark.parametrize("word", CHOICES["objective"])
def test_every_objective_comes_back_from_json_and_is_a_loss_of_pyros(word):
    training = TrainingConfiguration(objective=CHOICES["objective"][word]())
    assert from_json(through_json(to_json(training)), TrainingConfiguration) == training
    assert training.objective.build() is None or isinstance(training.objective.build(), ELBO)


# What the words build -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "word"), EVERY_CHOICE)
def test_every_choice_builds_a_story_that_passes_its_check(slot, word):
    wanted = chosen(slot, word)
    story = build(wanted)
    assert story.configuration is wanted
    check(story, story.model(num_observations=10).detach().float())


@pytest.mark.parametrize(("slot", "word"), EVERY_CHOICE)
def test_every_choice_comes_back_from_its_file_with_the_same_evidence(slot, word, tmp_path):
    story = build(chosen(slot, word))
    x = story.model(num_observations=4).detach().float()
    save(story, tmp_path / "story.safetensors")
    evidence, again = (
        log_evidence(told, x, method="importance", num_particles=10)
        for told in (story, load(tmp_path / "story.safetensors"))
    )
    assert evidence.dataset.equals(again.dataset)


@pytest.mark.parametrize("scale", [*POSITIVE, 0.3])
def test_every_scale_of_a_normal_builds_a_story_that_passes_its_check(scale):
    story = build(StoryConfiguration(event_shape=(5,), likelihood=Normal(scale=scale), network=Mlp((8,))))
    check(story, torch.randn(10, 5))


def test_sizes_are_those_of_the_networks():
    network = Mlp(hidden_dims=(7, 6))
    story = build(StoryConfiguration(event_shape=(1, 6, 5), latent_dim=3, network=network))
    shapes = {name: tuple(value.shape) for name, value in story.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [(6, 3), (7, 6), (30, 7), (7, 30), (6, 7), (6, 6)]
    assert story.model(num_observations=4).shape == (4, 1, 6, 5)


@pytest.mark.parametrize(("scale", "found"), [(0.3, 0.3), ("learned", 0.2), ("per-dimension", 0.2)])
def test_the_scale_of_a_normal_is_the_one_asked_for(scale, found):
    likelihood = Normal(scale=scale, initial=0.2)
    story = build(StoryConfiguration(event_shape=(5,), likelihood=likelihood, network=Mlp(())))
    assert torch.allclose(story.decoder(torch.zeros(1, 2)).stddev, torch.full((1, 5), found))


def test_initial_weights_are_a_function_of_the_seed():
    wanted = StoryConfiguration(event_shape=(5,), network=Mlp((8,)))

    def weights(seed):
        return torch.cat([parameter.flatten() for parameter in build(wanted, seed).parameters()])

    first = weights(3)
    torch.rand(5)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_building_leaves_the_generator_alone():
    before = torch.get_rng_state()
    build(StoryConfiguration(event_shape=(5,)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wanted",
    [
        StoryConfiguration(event_shape=(5,), network=Mlp((2**60,))),
        StoryConfiguration(event_shape=(5,), latent_dim=10**18),
        StoryConfiguration(event_shape=(10**10, 10**10, 10**10)),
    ],
    ids=["memory", "integer", "product"],
)
def test_a_story_beyond_all_memory_is_refused_in_one_line(wanted):
    with pytest.raises(ValueError, match="A story of these sizes cannot be built") as refused:
        build(wanted)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kind",
    [
        DataConfiguration,
        TrainingConfiguration,
        EvidenceConfiguration,
        *(k for w in CHOICES.values() for k in w.values()),
    ],
)
def test_every_field_is_an_option_with_a_help_text(kind):
    assert all(item.metadata["help"] for item in fields(kind) if item.name not in CHOICES)


def test_the_largest_weight_is_that_of_objectives():
    assert configuration.LARGEST_WEIGHT == objectives.LARGEST_NUMBER
