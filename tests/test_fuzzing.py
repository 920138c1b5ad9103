"""Odd arguments, hostile files and hostile words: an answer that is right, or an exception that the docstrings know."""

import contextlib
import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppl_vae import (
    Evidence,
    check,
    checkpoint,
    configuration,
    data,
    evidence_bounds,
    fit,
    likelihoods,
    load,
    log_evidence,
    networks,
    priors,
    save,
)
from ppl_vae.cli import main
from ppl_vae.configuration import CHOICES, DataConfiguration, Mlp, StoryConfiguration, TrainingConfiguration
from ppl_vae.evidence.result import VERDICTS

DOCUMENTED = (ValueError, TypeError, FloatingPointError, MemoryError, OSError)

SMALL = ("--epochs", "1", "--network.hidden-dims", "4", "--num-particles", "5", "--engine", "svi")

FEW = settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=1000)

# What JSON can hold, and what Python reads beyond it.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=4,
)
REAL = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 1e-45, -0.0, 3e38])
NAMES = st.sampled_from(["", " ", "-1", "0", "nan", "inf", "9" * 30, "two", "../..", "/dev/null", "é\udcff", "x" * 300])


def outcome(call):
    """What a call returns, or the documented exception that it raises; any other one goes through."""
    try:
        return call()
    except DOCUMENTED as error:
        return error


def is_refusal(found):
    return isinstance(found, DOCUMENTED)


def story():
    """A story of four bits, the same every time."""
    return configuration.build(StoryConfiguration(event_shape=(4,), network=Mlp((3,))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small story in its file; nobody writes there."""
    path = tmp_path_factory.mktemp("saved") / "story.safetensors"
    save(story(), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run, beside its data; nobody writes there."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "binary.npy", np.random.default_rng(0).random((40, 4)).round().astype(np.float32))
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--data", str(folder / "binary.npy"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder / "run"


# Damage ---------------------------------------------------------------------------------------------------------------


@st.composite
def damages(draw):
    """Something that happens to the content of a file."""
    place, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))
    kind, junk = draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "behead"])), draw(st.binary(max_size=64))

    def damage(content):
        at = int(place * len(content))
        return {
            "flip": content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :],
            "cut": content[:at],
            "insert": content[:at] + junk + content[at:],
            "overwrite": content[:at] + junk + content[at + len(junk) :],
            "behead": content[at:],
        }[kind]

    return damage


@st.composite
def forgeries(draw):
    """A change of one place in a JSON tree."""
    path, value, drops = draw(st.lists(st.integers(0, 30), max_size=4)), draw(JSON), draw(st.booleans())

    def forge(tree):
        tree = json.loads(json.dumps(tree))
        holder, key, node = {"tree": tree}, "tree", tree
        root = holder
        for step in path:
            if not isinstance(node, dict | list) or not node:
                break
            holder, key = node, (list(node) if isinstance(node, dict) else range(len(node)))[step % len(node)]
            node = holder[key]
        if drops and holder is not root:
            del holder[key]
        else:
            holder[key] = value
        return root["tree"]

    return forge


def assert_nothing_temporary(folder):
    assert [path.name for path in folder.rglob(".*.*")] == []
    assert [path.name for path in folder.rglob("lock")] == []


def a_new_one(folder, name):
    """A path in an empty folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder / name


# Files ----------------------------------------------------------------------------------------------------------------


def refuses_damage(damage, saved, folder):
    path, content = a_new_one(folder, "story.safetensors"), saved.read_bytes()
    path.write_bytes(damage(content))
    if path.read_bytes() != content:
        with pytest.raises(ValueError):
            load(path)


@given(damages())
@FEW
def test_no_damaged_checkpoint_loads(saved, tmp_path, damage):
    refuses_damage(damage, saved, tmp_path / "new")


@pytest.mark.slow
@given(damages())
@MANY
def test_no_checkpoint_loads_however_it_is_damaged(saved, tmp_path, damage):
    refuses_damage(damage, saved, tmp_path / "new")


def loads_or_refuses_forged_words(forge, saved, folder):
    path = a_new_one(folder, "story.safetensors")
    with safetensors.safe_open(saved, framework="pt") as file:
        said = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    said.pop("sha256")
    said = forge(said)
    words = json.dumps({"sha256": checkpoint.BLANK} | said if isinstance(said, dict) else said)
    content = safetensors.torch.save(tensors, {"about": words})
    path.write_bytes(checkpoint.sealed(content) if checkpoint.BEFORE_CHECKSUM in content else content)
    found = outcome(lambda: load(path))
    assert is_refusal(found) or torch.isfinite(found.model(num_observations=2)).all()


@given(forgeries())
@FEW
def test_a_checkpoint_with_forged_words_is_refused_or_makes_a_story(saved, tmp_path, forge):
    loads_or_refuses_forged_words(forge, saved, tmp_path / "new")


@pytest.mark.slow
@given(forgeries())
@MANY
def test_a_checkpoint_is_refused_or_makes_a_story_whatever_its_words(saved, tmp_path, forge):
    loads_or_refuses_forged_words(forge, saved, tmp_path / "new")


@given(damages())
@FEW
def test_a_damaged_table_of_evidence_is_refused_or_can_be_printed(trained, tmp_path, damage):
    path = a_new_one(tmp_path / "new", "evidence.nc")
    path.write_bytes(damage((trained / "evidence-test.nc").read_bytes()))
    found = outcome(lambda: Evidence.load(path))
    assert is_refusal(found) or isinstance(outcome(lambda: str(found)), str | ValueError)


def write_data(path, x):
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, x=x, labels=np.arange(len(x)) % 2)
    else:
        path.write_text("\n".join(["a,b,label", *(",".join(map(str, row)) for row in x.tolist())]))


def reads_or_refuses_data(damage, suffix, folder):
    path = a_new_one(folder, f"x{suffix}")
    write_data(path, np.linspace(0, 1, 36).reshape(12, 3))
    path.write_bytes(damage(path.read_bytes()))
    found = outcome(lambda: data.load(path))
    assert is_refusal(found) or torch.cat(list(found.indices.values())).sort().values.tolist() == list(
        range(sum(len(split.x) for split in found.splits.values()))
    )


@given(damages(), st.sampled_from([".npy", ".npz", ".csv"]))
@FEW
def test_a_damaged_data_file_is_refused_or_splits_into_all_its_rows(tmp_path, damage, suffix):
    reads_or_refuses_data(damage, suffix, tmp_path / "new")


@pytest.mark.slow
@given(damages(), st.sampled_from([".npy", ".npz", ".csv"]))
@MANY
def test_a_data_file_is_refused_or_splits_into_all_its_rows_however_damaged(tmp_path, damage, suffix):
    reads_or_refuses_data(damage, suffix, tmp_path / "new")


# Configurations -------------------------------------------------------------------------------------------------------

TABLES = {
    StoryConfiguration: configuration.to_json(
        StoryConfiguration((4,), prior=configuration.StudentTPrior(), likelihood=configuration.StudentT())
    ),
    TrainingConfiguration: configuration.to_json(TrainingConfiguration()),
    DataConfiguration: configuration.to_json(DataConfiguration()),
}


@given(st.sampled_from(list(TABLES)), forgeries(), forgeries())
@settings(FEW, max_examples=300)
def test_a_forged_configuration_is_refused_or_comes_back_the_same(kind, forge, again):
    found = outcome(lambda: configuration.from_json(again(forge(TABLES[kind])), kind))
    assert is_refusal(found) or configuration.from_json(configuration.to_json(found), kind) == found


@given(st.sampled_from(list(CHOICES["likelihood"])), st.integers(309, 400))
@settings(FEW, max_examples=10)
def test_a_number_that_no_float_holds_is_refused(word, digits):
    table = TABLES[StoryConfiguration] | {"prior": {"name": "student-t", "df": 10**digits}}
    with pytest.raises(ValueError):
        configuration.from_json(table | {"likelihood": {"name": word}})


# Arguments ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["Normal", "Laplace", "LogNormal"]), REAL)
@FEW
def test_a_fixed_scale_is_refused_or_gives_draws_a_density(family, scale):
    def log_density():
        p = getattr(likelihoods, family)(networks.mlp(2, 4), scale)(torch.zeros(3, 2))
        return p.log_prob(p.sample())

    found = outcome(log_density)
    assert is_refusal(found) or not found.isnan().any()


@given(st.integers(-2, 3), REAL)
@FEW
def test_a_prior_is_refused_or_gives_draws_a_density(latent_dim, df):
    def log_density():
        p = priors.StudentT(latent_dim, df)()
        return p.log_prob(p.sample())

    found = outcome(log_density)
    assert is_refusal(found) or not 0.01 < df < 1e30 or not found.isnan().any()


@given(
    st.lists(st.integers(-1, 5), max_size=3),
    REAL,
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]),
)
@FEW
def test_only_rows_of_bits_pass_the_check(shape, value, dtype):
    x = outcome(lambda: torch.full([max(0, size) for size in shape], value).nan_to_num(value).to(dtype))
    found = outcome(lambda: check(story(), x))
    fits = len(shape) == 2 and shape[0] > 0 and shape[1] == 4
    assert is_refusal(found) or (fits and set(x.float().unique().tolist()) <= {0.0, 1.0})


@given(
    st.sampled_from(["importance", "prior", "elbo", "exact", "none", ""]),
    st.integers(-1, 6),
    st.sampled_from([None, None, None, 0.5, 0.0, math.nan, -1.0]),
    st.sampled_from([None, None, None, "pareto", "jackknife", "none"]),
    st.integers(-1, 2**65),
)
@settings(FEW, max_examples=20)
def test_evidence_is_refused_or_a_number_for_each_observation(method, num_particles, tolerance, correction, seed):
    settings_ = {"num_particles": num_particles, "tolerance": tolerance, "correction": correction, "budget": 2000}
    found = outcome(lambda: log_evidence(story(), torch.eye(4), method=method, seed=seed, **settings_))
    assert is_refusal(found) or (found["estimate"].shape == (4,) and np.isfinite(found["estimate"].values).all())
    assert is_refusal(found) or set(found["verdict"].values) <= set(VERDICTS)


@given(st.integers(-1, 4), st.integers(-1, 4), st.integers(-1, 2**70))
@settings(FEW, max_examples=15)
def test_bounds_are_refused_or_made_for_each_observation(num_observations, num_particles, seed):
    def bounds():
        sizes = {"num_observations": num_observations, "num_particles": num_particles}
        return evidence_bounds(story(), method="importance", seed=seed, **sizes)

    found = outcome(bounds)
    assert is_refusal(found) == (num_observations < 1 or num_particles < 1 or not 0 <= seed < 2**64)


@given(
    st.integers(-1, 2), st.integers(-1, 2**65), REAL, st.integers(-1, 2), st.sampled_from([None, 1.0, 0.0, math.nan]),
    st.sampled_from(["svi", "svi", "none"]),
)  # fmt: skip
@settings(FEW, max_examples=15)
def test_training_is_refused_or_leaves_finite_weights(epochs, batch_size, beta, kl_warmup, clip, engine):
    mine = story()
    options = {"beta": beta, "kl_warmup": kl_warmup, "clip": clip, "engine": engine}
    found = outcome(lambda: fit(mine, torch.eye(4), epochs=epochs, batch_size=batch_size, **options))
    assert is_refusal(found) or len(found) == epochs
    assert all(parameter.isfinite().all() for parameter in mine.parameters())


# The command line -----------------------------------------------------------------------------------------------------


def command(*arguments):
    """The status of a command, and what it said on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as left:
            status = left.code
    return status, said.getvalue()


def assert_answers_or_says_why(status, line):
    assert status in (0, 1, 2)
    assert status == 0 or (line.startswith("ppl-vae") and line.endswith("\n") and line.count("\n") == 1)


OPTIONS = [
    "--latent-dim", "--prior", "--likelihood", "--likelihood.scale", "--posterior", "--network.hidden-dims",
    "--batch-size", "--learning-rate", "--kl-warmup", "--beta", "--free-bits", "--patience", "--engine", "--seed",
    "--data", "--binarization", "--standardize", "--device", "--story", "--resume", "--objective", "--none",
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), NAMES), min_size=2, max_size=3))
@settings(FEW, max_examples=15)
def test_a_training_that_is_refused_leaves_no_folder(trained, tmp_path, said):
    out = a_new_one(tmp_path / "new", "out")
    data_file = ["--data", trained.parent / "binary.npy"]
    status, line = command("train", *SMALL, *data_file, *(word for pair in said for word in pair), "--out", out)
    assert_answers_or_says_why(status, line)
    assert status == 0 or not out.exists()
    assert_nothing_temporary(tmp_path)


COMMANDS = {
    "evidence": ("evidence", "--method", "importance", "--num-particles", "5"),
    "diagnose": ("diagnose", "--sections", "guide", "--limit", "3"),
    "report": ("report",),
    "sample": ("sample", "--num-observations", "2"),
}


def survives_a_hostile_run(damage, forge, name, words, trained, folder):
    run = a_new_one(folder, "run")
    shutil.copytree(trained, run)
    file = sorted(file for file in run.rglob("*") if file.suffix in (".json", ".jsonl", ".nc", ".safetensors"))
    file = file[name % len(file)]
    if file.suffix == ".json":
        file.write_text(json.dumps(forge(json.loads(file.read_text()))))
    else:
        file.write_bytes(damage(file.read_bytes()))
    command_name, *options = words
    assert_answers_or_says_why(*command(command_name, run, *options))
    assert_nothing_temporary(folder)


@given(damages(), forgeries(), st.integers(0, 30), st.sampled_from(["evidence", "sample", "diagnose"]))
@settings(FEW, max_examples=15)
def test_every_command_survives_a_hostile_run(trained, tmp_path, damage, forge, name, command_name):
    survives_a_hostile_run(damage, forge, name, COMMANDS[command_name], trained, tmp_path / "new")


@pytest.mark.slow
@given(damages(), forgeries(), st.integers(0, 30), st.sampled_from(list(COMMANDS)))
@settings(FEW, max_examples=300)
def test_every_command_survives_many_hostile_runs(trained, tmp_path, damage, forge, name, command_name):
    survives_a_hostile_run(damage, forge, name, COMMANDS[command_name], trained, tmp_path / "new")


@pytest.mark.parametrize("option", ["--seed", "--batch-size"])
def test_a_whole_number_beyond_64_bits_is_refused_before_there_is_a_folder(trained, tmp_path, option):
    out, data_file = tmp_path / "out", trained.parent / "binary.npy"
    status, line = command("train", *SMALL, "--data", data_file, "--out", out, option, 10**30)
    assert status == 1
    assert_answers_or_says_why(status, line)
    assert not out.exists()


@pytest.mark.parametrize("file", ["results.json", "metrics.jsonl", "config.json"])
def test_deeply_nested_json_is_refused_in_one_line(trained, tmp_path, file):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / file).write_text("[" * (sys.getrecursionlimit() * 100))
    status, line = command("report", run)
    assert status == 1
    assert_answers_or_says_why(status, line)
