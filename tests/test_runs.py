"""A run: what its folder holds, that results are a function of the seed, and what sample draws from it."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ppl_vae import Evidence, check, configuration, data, fit, load, log_evidence, runs, traces
from ppl_vae.cli import main
from ppl_vae.configuration import (
    ComparisonConfiguration,
    DataConfiguration,
    EvidenceConfiguration,
    Mlp,
    Normal,
    RunConfiguration,
    StoryConfiguration,
)
from ppl_vae.configuration import TrainingConfiguration as Training
from ppl_vae.locks import claimed

DIGITS = ("--data", "digits", "--epochs", "2", "--network.hidden-dims", "16", "--num-particles", "20")
PNG = b"\x89PNG\r\n\x1a\n"


def printed(*arguments):
    """Runs a command that succeeds; returns its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def numbers(results):
    """Results without what differs from run to run."""
    return {name: value for name, value in results.items() if name not in ("run", "training_seconds")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run on 8 x 8 digits; nobody writes into it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    printed("train", *DIGITS, "--out", folder)
    return folder


def read(file):
    return json.loads(file.read_text())


def wanted(run):
    """The configuration in a run's config.json."""
    table = read(run / "config.json")
    return configuration.from_json({part: table[part] for part in ("data", "story", "training")}, RunConfiguration)


# The folder -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_all_that_is_documented(run):
    assert sorted(file.name for file in run.iterdir()) == [
        "atlas.png",
        "checkpoints",
        "config.json",
        "evidence-test.nc",
        "learning_curve.png",
        "metrics.jsonl",
        "reconstructions.png",
        "report.html",
        "results.json",
        "samples.png",
        "story.safetensors",
    ]


def test_the_pictures_are_pictures(run):
    assert all(file.read_bytes()[:8] == PNG for file in run.glob("*.png"))


def test_the_configuration_comes_back_from_the_folder(run):
    assert wanted(run) == RunConfiguration(
        data=DataConfiguration(data="digits"),
        story=StoryConfiguration(event_shape=(1, 8, 8), network=Mlp(hidden_dims=(16,))),
        training=Training(epochs=2, num_particles=20),
    )


def test_the_folder_says_which_data_it_saw(run):
    assert read(run / "config.json")["dataset"] == data.load("digits").record


def test_metrics_have_a_row_for_each_epoch(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["step"] == 2 * rows[0]["step"]
    assert rows[1]["validation_elbo"] > rows[0]["validation_elbo"]
    assert all(row["skipped_steps"] == 0 for row in rows)


def test_results_are_those_of_the_saved_story(run):
    story, results = load(run / "story.safetensors"), read(run / "results.json")
    summary = log_evidence(story, data.load("digits").test.x, num_particles=20).summary()
    assert results["test_log_evidence"] == pytest.approx(summary.mean, abs=1e-5)
    assert results["monte_carlo_error"] == pytest.approx(summary.monte_carlo_error, rel=1e-4)
    assert results["bits_per_dimension"] == pytest.approx(-summary.mean / 64 / np.log(2), rel=1e-6)
    assert results["trusted_share"] == summary.trusted
    assert (results["methods"], results["verdicts"]) == (summary.methods, summary.verdicts)
    assert results["num_test_observations"] == 359


def test_the_table_of_the_test_observations_is_what_the_results_sum_up(run):
    evidence, results = Evidence.load(run / "evidence-test.nc"), read(run / "results.json")
    assert evidence.summary().mean == results["test_log_evidence"]
    assert evidence.dataset.sizes["observation"] == results["num_test_observations"]


def test_log_p_of_two_latent_dimensions_is_integrated(run):
    results = read(run / "results.json")
    assert (results["methods"], results["verdicts"]) == ({"quadrature": 359}, {"exact": 359})
    assert (results["num_particles"], results["median_ess"]) == (0, None)


def test_the_elbo_is_below_the_evidence(run):
    results = read(run / "results.json")
    assert results["test_elbo"] < results["test_log_evidence"] < 0


def test_the_saved_story_passes_its_check(run):
    check(load(run / "story.safetensors"), data.load("digits").test.x)


# The same seed --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_story_and_numbers_in_a_fresh_process(run, tmp_path):
    command = [sys.executable, "-m", "ppl_vae", "train", *DIGITS, "--out", str(tmp_path / "again"), "--json"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert numbers(json.loads(again.stdout)) == numbers(read(run / "results.json"))
    for file in ("story.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (run / file).read_bytes()


def test_the_same_seed_gives_the_same_numbers_again_in_this_process(run, tmp_path):
    torch.rand(7)
    again = json.loads(printed("train", *DIGITS, "--out", tmp_path / "again", "--json"))
    assert numbers(again) == numbers(read(run / "results.json"))


def test_another_seed_gives_other_numbers(run, tmp_path):
    other = json.loads(printed("train", *DIGITS, "--out", tmp_path / "other", "--json", "--seed", 1))
    assert other["test_log_evidence"] != read(run / "results.json")["test_log_evidence"]


# Stories other than of images -----------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A file of 60 correlated rows with a header."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 2)) @ generator.normal(size=(2, 3)) + 0.1 * generator.normal(size=(60, 3))
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",", header="height,weight,age", comments="")
    return tmp_path / "table.csv"


@pytest.mark.parametrize("scale", ["learned", "per-dimension", "network", "0.3"])
def test_a_table_trains_under_a_normal_likelihood_and_is_sampled_without_a_picture(scale, table, tmp_path):
    out = tmp_path / "run"
    options = ("--likelihood", "normal", "--likelihood.scale", scale, "--network.hidden-dims", 8, "--epochs", 2)
    printed("train", "--data", table, *options, "--num-particles", 10, "--out", out)
    assert sorted(file.name for file in out.glob("*.png")) == ["learning_curve.png"]
    files = json.loads(printed("sample", out, "--num-observations", 5, "--json"))["files"]
    assert files == [str(out / "new-0.npz")]
    assert np.load(files[0])["x"].shape == (5, 3)


def test_scales_on_their_floor_are_reported(table, tmp_path):
    options = ("--likelihood", "normal", "--likelihood.floor", 0.3, "--likelihood.initial", 0.301, "--epochs", 1)
    arguments = ("train", "--data", table, *options, "--network.hidden-dims", 4, "--num-particles", 5)
    text = printed(*arguments, "--out", tmp_path / "run")
    results = read(tmp_path / "run" / "results.json")
    assert (results["scale_floor"], results["share_of_scales_on_floor"]) == (0.3, 1.0)
    assert "100.0% of the scales sit on their floor of 0.3" in text


@pytest.mark.parametrize(
    ("channels", "latent_dim", "pictures"),
    [
        (1, 2, ["atlas", "learning_curve", "reconstructions", "samples"]),
        (3, 3, ["learning_curve", "reconstructions", "samples"]),
        (2, 2, ["learning_curve"]),  # nobody can look at two colours
    ],
)
def test_pictures_are_those_that_can_be_drawn(channels, latent_dim, pictures, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, channels, 4, 4)).round().astype(np.float32))
    options = ("--latent-dim", latent_dim, "--network.hidden-dims", 4, "--epochs", 1, "--num-particles", 5)
    printed("train", "--data", tmp_path / "x.npy", *options, "--out", tmp_path / "run")
    assert sorted(file.stem for file in (tmp_path / "run").glob("*.png")) == pictures
    files = json.loads(printed("sample", tmp_path / "run", "--json"))["files"]
    assert [file[-4:] for file in files] == ([".npz", ".png"] if "samples" in pictures else [".npz"])


@pytest.fixture
def dataset():
    """Forty rows of three numbers."""
    return data.load(np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))


def asked_for(**training):
    """A small run on such rows."""
    story = StoryConfiguration(event_shape=(3,), likelihood=Normal(), network=Mlp((4,)))
    return RunConfiguration(DataConfiguration("x"), story, Training(num_particles=5, **training))


def test_a_run_is_a_story_built_and_fitted_with_one_seed(dataset, tmp_path):
    asked = asked_for(epochs=3, batch_size=10, learning_rate=0.01, kl_warmup=2, seed=3)
    runs.train(asked, dataset, tmp_path / "run", say=lambda text: None)
    story = configuration.build(asked.story, seed=3)
    fit(
        story,
        dataset.train.x,
        validation=dataset.validation.x,
        epochs=3,
        batch_size=10,
        optimizer=partial(torch.optim.Adam, lr=0.01, fused=True),
        kl_warmup=2,
        seed=3,
    )
    saved = load(tmp_path / "run" / "story.safetensors").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in story.state_dict().items())


def test_a_used_folder_is_refused_and_left_as_it_is(dataset, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        runs.train(asked_for(epochs=1), dataset, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_run_that_cannot_begin_leaves_no_folder(dataset, tmp_path):
    asked = RunConfiguration(DataConfiguration("x"), StoryConfiguration(event_shape=(3,)), Training(epochs=1))
    with pytest.raises(ValueError, match="Bernoulli is a distribution over 0 and 1"):
        runs.train(asked, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_says_what_happens_and_returns_what_it_writes(dataset, tmp_path):
    said = []
    results = runs.train(asked_for(epochs=2), dataset, tmp_path / "run", say=said.append)
    assert json.loads(runs.as_json(results)) == {"run": str(tmp_path / "run")} | read(tmp_path / "run" / "results.json")
    assert said[0] == str(dataset)
    assert said[1].startswith("trained 2 epochs in ")


# Scoring a run again --------------------------------------------------------------------------------------------------

IMPORTANCE = EvidenceConfiguration(method="importance", num_particles=10)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the small run, to be written into."""
    return shutil.copytree(run, tmp_path / "copy")


def rewrite(run, change):
    """Changes the configuration of a run."""
    table = read(run / "config.json")
    change(table)
    (run / "config.json").write_text(json.dumps(table))


def score(run, *splits, asked=IMPORTANCE, **options):
    return {scored.split: scored for scored in runs.score(run, splits, asked, **options)}


def test_the_test_split_of_a_run_has_the_evidence_that_train_reported(copy):
    before = Evidence.load(copy / "evidence-test.nc")
    scored = score(copy, "test", asked=EvidenceConfiguration(num_particles=20))["test"]
    np.testing.assert_allclose(scored.evidence["estimate"], before["estimate"], rtol=1e-6)
    assert scored.evidence.dataset.attrs["fingerprint"] == before.dataset.attrs["fingerprint"]


def test_dynamically_binarized_training_data_are_drawn_once_for_their_evidence(run):
    scored = score(run, "train", "validation", asked=replace(IMPORTANCE, limit=50))
    once = data.load("digits", binarization="static")
    story = load(run / "story.safetensors")
    for name in ("train", "validation"):
        expected = log_evidence(story, once.splits[name].x[:50], method="importance", num_particles=10)
        assert scored[name].evidence.dataset.equals(expected.dataset)


def test_the_noise_is_ruled_by_the_seed_of_the_run_unless_told_otherwise(dataset, tmp_path):
    asked = asked_for(epochs=1, seed=3)
    np.save(tmp_path / "x.npy", torch.cat([split.x for split in dataset.splits.values()]).numpy())
    wanted = RunConfiguration(DataConfiguration(str(tmp_path / "x.npy")), asked.story, asked.training)
    loaded = runs.load_data(wanted.data, "grey", seed=3)
    runs.train(wanted, loaded, tmp_path / "run", say=lambda text: None)
    found = {
        seed: score(tmp_path / "run", "test", asked=replace(IMPORTANCE, seed=seed))["test"].evidence
        for seed in (None, 3, 4)
    }
    assert found[None].dataset.equals(found[3].dataset)
    assert not found[None].dataset.equals(found[4].dataset)


def test_a_limit_takes_the_first_observations(run, copy):
    whole = score(copy, "test")["test"].evidence
    part = score(run, "test", asked=replace(IMPORTANCE, limit=32))["test"]
    np.testing.assert_allclose(part.evidence["estimate"], whole["estimate"][:32], rtol=1e-5)
    assert part.file is None


def test_data_that_changed_since_a_run_are_refused_unless_named(copy):
    rewrite(copy, lambda table: table["dataset"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"'digits' is not what .*copy' was trained on any more.*Give --data"):
        score(copy, "test")
    assert score(copy, "test", source=runs.Source("digits"))["test"].evidence.dataset.sizes["observation"] == 359


def test_other_data_are_split_and_binarized_like_those_of_the_run(run, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((30, 1, 8, 8)).astype(np.float32))
    loaded = runs.data_of(runs.open_run(run), runs.Source(str(tmp_path / "x.npy")))
    expected = data.load(tmp_path / "x.npy", binarization="static", seed=0)
    assert loaded.fingerprint == expected.fingerprint


def test_other_data_are_scored_from_disk_as_from_memory(run, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 2, (30, 1, 8, 8)).astype(np.float32))
    sources = [runs.Source(str(tmp_path / "x.npy"), stream=stream) for stream in (False, True)]
    kinds = [type(runs.data_of(runs.open_run(run), source).test.x).__name__ for source in sources]
    assert kinds == ["Tensor", "Stored"]
    in_memory, from_disk = (score(run, "test", source=source)["test"].evidence.dataset for source in sources)
    assert in_memory["estimate"].equals(from_disk["estimate"])


def test_only_other_data_can_be_left_on_disk_when_a_run_was_trained_in_memory(run):
    with pytest.raises(ValueError, match="--stream goes with --data"):
        score(run, "test", source=runs.Source(stream=True))


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_computed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "log_evidence", lambda *columns, **settings: pytest.fail("computed"))
    with pytest.raises(OSError):
        score(run, "test", out=tmp_path / "nowhere" / "table.nc")


def with_seed(run, folder, seed):
    """A copy of a run as if another seed had drawn its splits."""
    record = data.load("digits", seed=seed).record
    rewrite(shutil.copytree(run, folder), lambda table: table.update(dataset=record))
    rewrite(folder, lambda table: table["training"].update(seed=seed))
    return folder


def compare(*folders, asked=None, **options):
    asked = asked or ComparisonConfiguration("importance", 10)
    return runs.compare({folder.name: folder for folder in folders}, asked, **options)


def test_a_comparison_is_that_of_the_evidence_of_the_runs(run, copy):
    compared = compare(run, copy)
    expected = score(copy, "test")["test"].evidence
    assert compared.evidence["digits"].dataset.equals(expected.dataset)
    assert compared["difference"].sel(story="digits", other="copy") == 0


def test_runs_of_two_seeds_are_compared_on_observations_that_neither_has_seen(run, tmp_path):
    other = with_seed(run, tmp_path / "other", 1)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((30, 1, 8, 8)).astype(np.float32))
    compared = compare(run, other, source=runs.Source(str(tmp_path / "x.npy")))
    assert compared["difference"].sel(story="digits", other="other") == 0


def test_observations_that_a_run_was_trained_on_are_no_test(run, tmp_path):
    other = with_seed(run, tmp_path / "other", 1)
    with pytest.raises(ValueError, match="test observations differ"):
        compare(run, other)
    with pytest.raises(ValueError, match="other' was trained on some test observations: its seed 1 splits 'digits'"):
        compare(run, other, source=runs.Source("digits"))


# New observations -----------------------------------------------------------------------------------------------------


def sampled(run, out, *arguments):
    """The arrays and the files of a sample."""
    files = json.loads(printed("sample", run, "--out", out, "--json", *arguments))["files"]
    with np.load(files[0], allow_pickle=False) as arrays:
        return dict(arrays), files


def test_sample_writes_latents_observations_and_a_picture(run, tmp_path):
    arrays, files = sampled(run, tmp_path / "new", "--num-observations", 5)
    assert files == [str(tmp_path / "new.npz"), str(tmp_path / "new.png")]
    assert {name: array.shape for name, array in arrays.items()} == {"x": (5, 1, 8, 8), "z": (5, 2)}
    assert set(np.unique(arrays["x"])) == {0, 1}
    assert (tmp_path / "new.png").read_bytes()[:8] == PNG


def test_latents_are_drawn_from_the_prior_and_observations_from_the_decoder(run, tmp_path):
    arrays, _ = sampled(run, tmp_path / "new", "--num-observations", 4000)
    z, x = arrays["z"], arrays["x"]
    assert np.abs(z.mean(0)).max() < 5 / np.sqrt(4000)
    assert np.abs(np.cov(z.T) - np.eye(2)).max() < 5 * np.sqrt(2 / 4000)
    with torch.no_grad():
        mean = load(run / "story.safetensors").decoder(torch.from_numpy(z)).mean.numpy()
    assert np.abs((x - mean).sum(0) / np.sqrt((mean * (1 - mean)).sum(0))).max() < 5


def test_draws_are_a_function_of_the_seed(run, tmp_path):
    first, _ = sampled(run, tmp_path / "first", "--seed", 4)
    again, _ = sampled(run, tmp_path / "again", "--seed", 4)
    other, _ = sampled(run, tmp_path / "other", "--seed", 5)
    assert np.array_equal(first["x"], again["x"]) and np.array_equal(first["z"], again["z"])
    assert not np.array_equal(first["z"], other["z"])


def test_sample_makes_the_folder_it_is_to_write_into(run, tmp_path):
    _, files = sampled(run, tmp_path / "a" / "b" / "new")
    assert files[0] == str(tmp_path / "a" / "b" / "new.npz")


# Devices and JSON -----------------------------------------------------------------------------------------------------


def test_no_name_is_the_cpu():
    assert traces.device_named(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", "xpu:7"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"The device '{name}' is not there") as refused:
        traces.device_named(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_null(number):
    assert runs.as_json({"a": number, "b": 1.5, "c": "NaN"}) == '{"a": null, "b": 1.5, "c": "NaN"}'


def test_a_run_that_has_just_begun_names_its_process(tmp_path):
    with claimed(tmp_path), pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"):
        runs.refuse_used(tmp_path)
    (tmp_path / "lock").write_text("somebody's own")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        runs.refuse_used(tmp_path)
    assert (tmp_path / "lock").read_text() == "somebody's own"
