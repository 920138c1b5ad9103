"""The command line: what its options do, what it prints, and one line for everything that is wrong, nothing left."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from ppl_vae import Evidence, load, runs, tables
from ppl_vae.cli import main
from ppl_vae.configuration import (
    CHOICES,
    ComparisonConfiguration,
    DataConfiguration,
    EvidenceConfiguration,
    RunConfiguration,
    TrainingConfiguration,
    from_json,
)

SMALL = ("--epochs", "1", "--network.hidden-dims", "4", "--num-particles", "5")


def flag(name):
    return "--" + name.replace("_", "-")


EVERY_OPTION = [
    "--out",
    "--resume",
    "--device",
    "--json",
    "--latent-dim",
    *(flag(item.name) for kind in (DataConfiguration, TrainingConfiguration) for item in fields(kind)),
    *(f"--{slot}" for slot in CHOICES),
    *(
        f"--{slot}.{flag(item.name)[2:]}"
        for slot, kinds in CHOICES.items()
        for k in kinds.values()
        for item in fields(k)
    ),
]


EVIDENCE_OPTIONS = {
    "evidence": ["RUN", "--splits", "--out", "--data", "--data-root", "--device", "--json"]
    + [flag(item.name) for item in fields(EvidenceConfiguration)],
    "compare": ["RUN", "--data", "--data-root", "--device", "--json"]
    + [flag(item.name) for item in fields(ComparisonConfiguration)],
}


@pytest.fixture
def out(tmp_path):
    """Where a run goes; nothing is there yet."""
    return tmp_path / "run"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small data files by name, some of them bad."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    grey = generator.random((40, 4)).astype(np.float32)
    with_hole = grey.tolist()
    with_hole[17][2] = "nan"
    negative = grey.copy()
    negative[23, 1] = -1

    np.save(folder / "grey.npy", grey)
    np.save(folder / "binary.npy", grey.round())
    np.save(folder / "negative.npy", negative)
    np.save(folder / "images.npy", generator.random((40, 1, 4, 4)).astype(np.float32).round())
    np.save(folder / "three rows.npy", grey[:3])
    np.save(folder / "pickled.npy", np.array([{}, []], dtype=object))
    np.save(folder / "empty.npy", grey[:0])
    np.savez(folder / "lengths.npz", x=grey, labels=np.arange(39))
    (folder / "table.csv").write_text("a,b,c,d\n" + "\n".join(",".join(map(str, row)) for row in grey.tolist()))
    (folder / "hole.csv").write_text("a,b,c,d\n" + "\n".join(",".join(map(str, row)) for row in with_hole))
    (folder / "words.csv").write_text("a,b\n1,2\n3,four\n")
    (folder / "ragged.csv").write_text("1,2\n3\n")
    (folder / "truncated.npy").write_bytes((folder / "grey.npy").read_bytes()[:200])
    (folder / "text.npy").write_text("not an array")
    (folder / "notes.txt").write_text("1 2 3")
    return folder


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """Small runs by name; nobody writes into them."""
    folder = tmp_path_factory.mktemp("trained")
    options = {
        "plane": ["--data", files / "binary.npy"],
        "deep": ["--data", files / "binary.npy", "--latent-dim", 20],
        "seeded": ["--data", files / "binary.npy", "--seed", 1],
        "density": ["--data", files / "binary.npy", "--binarization", "none", "--likelihood", "normal"],
        "static": ["--data", files / "grey.npy", "--binarization", "static"],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        for name, said in options.items():
            assert main([str(word) for word in ("train", *said, "--out", folder / name, *SMALL)]) == 0
    return {name: folder / name for name in options}


@pytest.fixture
def run(trained, out):
    """A copy of a small run with two latent dimensions."""
    return shutil.copytree(trained["plane"], out)


def says(capsys, *arguments):
    """Runs a command that succeeds; returns what it printed."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def refusal(capsys, *arguments):
    """Runs a command that fails; returns its one line on standard error."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr()
    assert isinstance(status, int) and status != 0
    assert printed.out == ""
    assert printed.err.endswith("\n") and printed.err.count("\n") == 1
    assert printed.err.startswith("ppl-vae")
    return printed.err


def strict_json(text):
    """JSON as machines read it: without NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


# What is printed ------------------------------------------------------------------------------------------------------


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    words = capsys.readouterr().out.split()
    assert left.value.code == 0
    assert [option for option in EVERY_OPTION if option not in words] == []


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    printed = capsys.readouterr()
    assert left.value.code == 0
    assert all(command in printed.out for command in ("train", "evidence", "compare", "sample"))


def test_help_names_the_options_of_sample(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    words = capsys.readouterr().out.split()
    assert all(option in words for option in ("RUN", "--num-observations", "--seed", "--out", "--device", "--json"))


@pytest.mark.parametrize("command", EVIDENCE_OPTIONS)
def test_help_names_the_options_of_evidence_and_compare(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = capsys.readouterr().out.split()
    assert [option for option in EVIDENCE_OPTIONS[command] if option not in words] == []


def test_the_report_says_evidence_elbo_and_folder(capsys, files, out):
    printed = says(capsys, "train", "--data", files / "binary.npy", "--out", out, *SMALL)
    results = json.loads((out / "results.json").read_text())
    assert "Dataset('binary.npy': train 28, validation 4, test 8" in printed.out
    assert f"log p(x) of the test split of binary.npy\n{Evidence.load(out / 'evidence-test.nc')}\n" in printed.out
    assert "quadrature 8" in printed.out and "k-hat" not in printed.out
    gap = results["test_log_evidence"] - results["test_elbo"]
    assert f"test ELBO {results['test_elbo']:.3f} nats, a lower bound: {gap:.3f} below log p(x)" in printed.out
    assert printed.out.endswith(f"all of it is in {out}\n")
    assert printed.err == ""


def test_json_alone_is_on_standard_output(capsys, files, out):
    printed = says(capsys, "train", "--data", files / "binary.npy", "--out", out, "--json", *SMALL)
    results = strict_json(printed.out)
    assert results == {"run": str(out)} | strict_json((out / "results.json").read_text())
    assert "Dataset('binary.npy'" in printed.err


def test_a_number_that_is_not_known_is_null_in_json(capsys, files, out):
    results = strict_json(says(capsys, "train", "--data", files / "binary.npy", "--out", out, "--json", *SMALL).out)
    assert results["median_ess"] is None  # nothing was drawn
    assert results["test_elbo"] < 0


def test_sample_prints_its_files(capsys, files, out):
    says(capsys, "train", "--data", files / "images.npy", "--out", out, *SMALL)
    expected = [str(out / "new-3.npz"), str(out / "new-3.png")]
    assert json.loads(says(capsys, "sample", out, "--seed", 3, "--json").out) == {"files": expected}
    assert says(capsys, "sample", out, "--seed", 3).out == f"wrote {expected[0]} and {expected[1]}\n"


# What options do ------------------------------------------------------------------------------------------------------


def test_every_option_reaches_the_configuration(capsys, files, out):
    options = {
        "--data": files / "images.npy",
        "--data-root": out.parent,
        "--binarization": "static",
        "--latent-dim": 3,
        "--likelihood": "normal",
        "--likelihood.scale": "per-dimension",
        "--likelihood.initial": 0.4,
        "--likelihood.floor": 0.01,
        "--prior": "mixture",
        "--prior.components": 3,
        "--posterior.floor": 0.02,
        "--objective": "importance-weighted",
        "--objective.particles": 3,
        "--beta": 0.5,
        "--network": "convolutional",
        "--network.channels": "2,3",
        "--epochs": 2,
        "--batch-size": 10,
        "--learning-rate": 0.5,
        "--kl-warmup": 4,
        "--patience": 9,
        "--num-particles": 7,
        "--engine": "svi",
        "--seed": 5,
    }
    says(capsys, "train", "--out", out, "--download", *(word for pair in options.items() for word in pair))
    table = json.loads((out / "config.json").read_text())
    wanted = from_json({part: table[part] for part in ("data", "story", "training")}, RunConfiguration)
    assert wanted.data == DataConfiguration(str(files / "images.npy"), str(out.parent), True, "static")
    objective = CHOICES["objective"]["importance-weighted"](3)
    assert wanted.training == TrainingConfiguration(
        2, 10, 0.5, 4, 0.5, None, 9, 7, engine="svi", objective=objective, seed=5
    )
    assert wanted.story.prior == CHOICES["prior"]["mixture"](3)
    assert (wanted.story.event_shape, wanted.story.latent_dim) == ((1, 4, 4), 3)
    assert wanted.story.likelihood == CHOICES["likelihood"]["normal"]("per-dimension", 0.4, 0.01)
    assert wanted.story.posterior.floor == 0.02
    assert wanted.story.network.channels == (2, 3)


def test_training_options_rule_the_training(capsys, files, out):
    arguments = ("--data", files / "binary.npy", "--out", out, *SMALL, "--epochs", 3)
    arguments = (*arguments, "--latent-dim", 3)  # nothing is drawn in one or two dimensions
    says(capsys, "train", *arguments, "--batch-size", 10, "--learning-rate", 0.25, "--kl-warmup", 2)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9]  # 28 rows in batches of 10
    assert [row["learning_rate"] for row in rows] == [0.25] * 3
    assert [row["kl_factor"] for row in rows] == [0.5, 1.0, 1.0]
    results = json.loads((out / "results.json").read_text())
    assert (results["epochs"], results["num_particles"], results["num_test_observations"]) == (3, 5, 8)


def test_patience_of_zero_never_stops_early(capsys, files, out):
    arguments = ("--data", files / "binary.npy", "--out", out, *SMALL, "--epochs", 12, "--patience", 0)
    says(capsys, "train", *arguments, "--learning-rate", 0.5)
    assert json.loads((out / "results.json").read_text())["epochs"] == 12


def test_without_out_a_run_goes_to_a_fresh_folder(capsys, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = says(capsys, "train", "--data", files / "binary.npy", "--json", *SMALL)
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads(printed.out)["run"] == os.path.join("runs", folder.name)
    assert (folder / "results.json").exists()


def test_an_empty_folder_may_hold_the_run(capsys, files, out):
    out.mkdir()
    says(capsys, "train", "--data", files / "binary.npy", "--out", out, *SMALL)
    assert (out / "results.json").exists()


# What is wrong with the options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--unknown", "1"], ["unrecognized arguments: --unknown", "--help"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--epochs", "-1"], ["epochs must be at least 1; found -1"]),
        (["--epochs", "0"], ["epochs must be at least 1; found 0"]),
        (["--batch-size", "0"], ["batch_size must be at least 1"]),
        (["--num-particles", "0"], ["num_particles must be at least 1"]),
        (["--patience", "-1"], ["patience must be at least 0"]),
        (["--kl-warmup", "-1"], ["kl_warmup must be at least 0"]),
        (["--seed", "-1"], ["seed must be at least 0"]),
        (["--learning-rate", "0"], ["learning_rate must be positive"]),
        (["--learning-rate", "nan"], ["learning_rate must be positive"]),
        (["--latent-dim", "0"], ["latent_dim must be at least 1"]),
        (["--latent-dim", str(10**14)], ["cannot be built"]),
        (["--network.hidden-dims", "0"], ["found 0"]),
        (["--network.hidden-dims", "4,x"], ["--network.hidden-dims", "'4,x'"]),
        (["--prior", "vampire"], ["--prior", "'vampire'", "standard-normal"]),
        (["--likelihood", "fish"], ["--likelihood", "'fish'", "bernoulli", "normal"]),
        (["--objective", "loss"], ["--objective", "'loss'", "elbo", "importance-weighted"]),
        (["--objective.particles", "3"], ["--objective.particles does not belong to --objective elbo"]),
        (["--prior", "mixture", "--prior.components", "0"], ["components must be at least 1"]),
        (["--likelihood", "by-column", "--likelihood.columns", "fish"], ["Unknown likelihood 'fish'"]),
        (["--story", "Mine"], ["--story takes path/to/file.py:Class; found 'Mine'"]),
        (["--story", "nowhere.py:Mine"], ["There is no file", "nowhere.py"]),
        (["--standardize", "bmi"], ["there is no column 'bmi' to standardize"]),
        (["--beta", "0"], ["beta must be positive"]),
        (["--beta", "1e13"], ["beta and free_bits must be at most 1e+12"]),
        (["--free-bits", "1e13"], ["beta and free_bits must be at most 1e+12"]),
        (["--free-bits", "1", "--objective", "renyi"], ["free_bits is an objective of its own"]),
        (["--likelihood.scale", "0.1"], ["--likelihood.scale does not belong to --likelihood bernoulli"]),
        (["--network.channels", "4"], ["--network.channels does not belong to --network mlp"]),
        (["--likelihood", "normal", "--likelihood.scale", "-1"], ["scale must be positive"]),
        (["--likelihood", "normal", "--likelihood.scale", "wide"], ["--likelihood.scale", "'wide'"]),
        (["--likelihood", "normal", "--likelihood.floor", "2"], ["must start above its floor 2"]),
        (["--binarization", "some"], ["auto, none, static", "'some'"]),
        (["--device", "abacus"], ["device 'abacus' is not there", "Use cpu"]),
        (["--device", "cuda:99"], ["device 'cuda:99' is not there", "Use cpu"]),
        (["--device", "meta"], ["device 'meta' is not there"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_a_wrong_option_is_one_line_and_no_folder(arguments, words, capsys, files, out):
    line = refusal(capsys, "train", "--data", files / "binary.npy", "--out", out, *arguments)
    assert [word for word in words if word not in line] == []
    assert not out.exists()


def test_no_command_is_one_line(capsys):
    assert "COMMAND" in refusal(capsys)


def test_an_unknown_command_is_one_line(capsys):
    assert "'bake'" in refusal(capsys, "bake")


# What is wrong with the data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        ("missing.npy", [], ["no file or folder", "missing.npy"]),
        ("pickled.npy", [], ["pickled.npy"]),
        ("truncated.npy", [], ["truncated.npy"]),
        ("text.npy", [], ["text.npy", "not a .npy array"]),
        ("notes.txt", [], ["notes.txt", "unknown format '.txt'"]),
        ("empty.npy", [], ["no observations"]),
        ("lengths.npz", [], ["has length 39 and x has length 40"]),
        ("words.csv", ["--likelihood", "normal"], ["words.csv", "line 3", "'four'"]),
        ("ragged.csv", ["--likelihood", "normal"], ["ragged.csv", "line 2", "1 cells, expected 2"]),
        ("hole.csv", ["--likelihood", "normal"], ["x is nan in row 17, column 2", "1 of 40 rows"]),
        ("hole.csv", [], ["x is NaN in row 17, column 2"]),
        ("grey.npy", ["--binarization", "none"], ["x has values between", "Bernoulli", "0 and 1", "Binarize"]),
        ("negative.npy", [], ["x has values between -1 and", "between 0 and 1"]),
        ("negative.npy", ["--binarization", "none"], ["x has values between -1 and", "Bernoulli"]),
        ("three rows.npy", ["--likelihood", "normal"], ["at least two observations"]),
        ("binary.npy", ["--network", "convolutional"], ["Expected an image", "(4,)"]),
    ],
)
@pytest.mark.parametrize("json_wanted", [[], ["--json"]], ids=["words", "json"])
def test_bad_data_are_one_line_and_no_folder(file, options, words, json_wanted, capsys, files, out):
    line = refusal(capsys, "train", "--data", files / file, "--out", out, *options, *json_wanted)
    assert [word for word in words if word not in line] == []
    assert not out.exists()


@pytest.mark.parametrize("row", range(0, 40, 13))
def test_a_bad_row_has_its_number_in_the_file_whatever_split_it_falls_into(row, capsys, tmp_path, out):
    x = np.ones((40, 3), dtype=np.float32)
    x[row, 1] = 0.5
    np.save(tmp_path / "x.npy", x)
    line = refusal(capsys, "train", "--data", tmp_path / "x.npy", "--out", out, "--binarization", "none")
    assert f"row {row}, column 1" in line


def test_an_unknown_data_set_suggests_a_near_name(capsys, out):
    line = refusal(capsys, "train", "--data", "minst-5k", "--out", out)
    assert "unknown data set 'minst-5k'; did you mean 'mnist-5k'?" in line
    assert not out.exists()


def test_a_data_set_that_was_not_downloaded_says_how(capsys, out, tmp_path):
    line = refusal(capsys, "train", "--data", "mnist", "--data-root", tmp_path / "nothing", "--out", out)
    assert "download" in line
    assert not out.exists()


# What is wrong with the folder ----------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_left_as_it_is(capsys, files, out):
    out.mkdir()
    (out / "config.json").write_text("{}")
    line = refusal(capsys, "train", "--data", files / "binary.npy", "--out", out, *SMALL)
    assert "already holds a run. Choose another --out" in line
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "{}"


def test_a_folder_that_holds_something_else_is_left_as_it_is(capsys, files, out):
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert "is not an empty folder" in refusal(capsys, "train", "--data", files / "binary.npy", "--out", out)
    assert [file.name for file in out.iterdir()] == ["letter.txt"]


def test_a_file_in_the_place_of_the_folder_is_left_as_it_is(capsys, files, out):
    out.write_text("dear")
    assert "is not an empty folder" in refusal(capsys, "train", "--data", files / "binary.npy", "--out", out)
    assert out.read_text() == "dear"


def test_a_folder_that_cannot_be_made_is_one_line(capsys, files, tmp_path):
    (tmp_path / "file").write_text("")
    refusal(capsys, "train", "--data", files / "binary.npy", "--out", tmp_path / "file" / "run")


def test_a_used_folder_is_refused_before_the_data_are_read(capsys, out):
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "already holds a run" in refusal(capsys, "train", "--data", "nowhere.npy", "--out", out)


# Evidence and comparison ----------------------------------------------------------------------------------------------


def test_evidence_prints_each_split_under_its_heading_and_saves_it(capsys, run):
    printed = says(capsys, "evidence", run, "--splits", "train", "test", "--method", "importance")
    files = {split: run / f"evidence-{split}.nc" for split in ("train", "test")}
    expected = [
        f"log p(x) of the {split} split of binary.npy\n{Evidence.load(file)}\nsaved in {file}\n"
        for split, file in files.items()
    ]
    assert printed.out == "".join(expected)
    assert printed.err == ""


def test_evidence_in_json_is_one_object_with_the_summary_and_file_of_each_split(capsys, run):
    table = strict_json(says(capsys, "evidence", run, "--splits", "test", "validation", "--json").out)
    assert table["run"] == str(run)
    for split in ("test", "validation"):
        file = run / f"evidence-{split}.nc"
        summary = asdict(Evidence.load(file).summary())
        expected = summary | {"file": str(file), "median_ess": None, "doubts": []}
        assert table["evidence"][split] == expected
    assert table["evidence"]["test"]["methods"] == {"quadrature": 8}
    assert table["evidence"]["test"]["verdicts"] == {"exact": 8}


def test_options_of_evidence_reach_the_table(capsys, run):
    options = ("--num-particles", 7, "--tolerance", 0.5, "--budget", 9999, "--correction", "jackknife", "--seed", 5)
    says(capsys, "evidence", run, "--method", "mixture", *options)
    evidence = Evidence.load(run / "evidence-test.nc")
    attrs = evidence.dataset.attrs
    found = [attrs[name] for name in ("method", "tolerance", "budget", "correction", "seed")]
    assert found == ["mixture", 0.5, 9999, "jackknife", 5]
    assert (evidence["num_particles"] >= 7).all()


def test_a_table_in_the_run_gives_way_to_a_newer_one(capsys, run):
    says(capsys, "evidence", run, "--method", "elbo")
    assert Evidence.load(run / "evidence-test.nc").dataset.attrs["method"] == "elbo"


@pytest.mark.parametrize("partial", [["--limit", "3"], ["--data", "binary.npy"]], ids=["limit", "other data"])
def test_evidence_of_part_of_a_split_or_of_other_data_is_saved_only_where_told(partial, capsys, run, files):
    before = (run / "evidence-test.nc").read_bytes()
    partial = [word if word != "binary.npy" else files / word for word in partial]
    assert "saved" not in says(capsys, "evidence", run, "--method", "elbo", *partial).out
    assert (run / "evidence-test.nc").read_bytes() == before
    says(capsys, "evidence", run, "--method", "elbo", *partial, "--out", run.parent / "some.nc")
    assert Evidence.load(run.parent / "some.nc").dataset.sizes["observation"] == (3 if "3" in partial else 8)


def test_out_with_the_suffix_csv_is_a_table_with_a_line_for_each_observation(capsys, run):
    file = run.parent / "some.csv"
    assert f"saved in {file}\n" in says(capsys, "evidence", run, "--out", file).out
    assert len(file.read_text().splitlines()) == 1 + 8


def test_a_file_that_out_names_is_not_overwritten(capsys, run):
    file = run.parent / "some.nc"
    file.write_text("dear")
    assert "is there already. Choose another --out" in refusal(capsys, "evidence", run, "--out", file)
    assert file.read_text() == "dear"


def test_compare_prints_the_ranks_of_runs_by_the_names_of_their_folders(capsys, trained):
    printed = says(capsys, "compare", trained["plane"], trained["deep"], "--num-particles", 50)
    assert printed.out.startswith("mixture, 8 observations, nats per observation\n")
    assert {line.split()[0] for line in printed.out.splitlines()[2:4]} == {"plane", "deep"}
    assert printed.err == ""


def test_compare_in_json_has_a_row_for_each_story_and_each_pair(capsys, trained):
    runs = [trained["plane"], trained["deep"]]
    table = strict_json(says(capsys, "compare", *runs, "--method", "importance", "--limit", 5, "--json").out)
    assert (table["method"], table["num_observations"]) == ("importance", 5)
    best, other = table["stories"]
    assert {best, other} == {"plane", "deep"}
    assert table["stories"]["deep"]["run"] == str(trained["deep"])
    (pair,) = table["pairs"]
    assert (pair["story"], pair["other"]) == (best, other)
    means = [table["stories"][name]["mean"] for name in (best, other)]
    assert 0 <= pair["difference"] == pytest.approx(means[0] - means[1])
    assert pair["standard_error"] > 0


def test_runs_whose_folders_have_the_same_name_go_by_their_paths(capsys, trained, tmp_path):
    copies = [shutil.copytree(trained[name], tmp_path / name / "run") for name in ("plane", "deep")]
    runs = [*copies, trained["plane"]]
    table = strict_json(says(capsys, "compare", *runs, "--method", "importance", "--json").out)
    assert set(table["stories"]) == {*map(str, copies), "plane"}


def test_a_run_in_the_current_folder_has_the_name_of_that_folder(capsys, trained, monkeypatch):
    monkeypatch.chdir(trained["plane"])
    table = strict_json(says(capsys, "compare", ".", "../deep", "--method", "importance", "--json").out)
    assert set(table["stories"]) == {"plane", "deep"}


# What is wrong with evidence and compare ------------------------------------------------------------------------------

WRONG_WAYS_TO_SCORE = [
    (["--limit", "0"], ["limit must be at least 1; found 0"]),
    (["--tolerance", "-1"], ["tolerance must be positive", "-1"]),
    (["--tolerance", "nan"], ["tolerance must be positive"]),
    (["--num-particles", "0"], ["num_particles must be at least 1; found 0"]),
    (["--budget", "0"], ["budget must be at least 1; found 0"]),
    (["--seed", "-1"], ["seed must be at least 0; found -1"]),
    (["--method", "magic"], ["Unknown method 'magic'", "auto, importance, mixture", "exact"]),
    (["--correction", "magic"], ["Unknown correction 'magic'", "jackknife, jackknife-2, pareto"]),
    (["--method", "exact"], ["method='exact' sums over discrete latents"]),
    (["--method", "elbo", "--tolerance", "1"], ["'elbo' takes no tolerance"]),
    (["--device", "cuda:99"], ["device 'cuda:99' is not there"]),
    (["--data", "nowhere.npy"], ["no file or folder", "nowhere.npy"]),
    (["--data", "digits"], ["'digits' have the shape (1, 8, 8), those of", "(4,)"]),
    (["--data", "mnist", "--data-root", "nothing-there"], ["nothing-there"]),
]


def unchanged(run, refuse):
    """What a call returns that is to leave a run as it is."""
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = refuse()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    return result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *WRONG_WAYS_TO_SCORE,
        (["--splits", "dev"], ["--splits", "'dev'", "train", "validation", "test"]),
        (["--splits"], ["--splits"]),
        (["--out", "table.txt"], [".nc", ".csv", "table.txt"]),
        (["--out", "nowhere/table.nc"], ["no folder 'nowhere'"]),
        (["--out", "table.nc", "--splits", "train", "test"], ["--out is for the table of one split"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_a_wrong_option_of_evidence_is_one_line_and_no_file(arguments, words, capsys, trained):
    line = unchanged(trained["plane"], lambda: refusal(capsys, "evidence", trained["plane"], *arguments))
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(("arguments", "words"), WRONG_WAYS_TO_SCORE, ids=lambda value: " ".join(value))
def test_a_wrong_option_of_compare_is_one_line(arguments, words, capsys, trained):
    line = refusal(capsys, "compare", trained["plane"], trained["deep"], *arguments)
    assert [word for word in words if word not in line] == []


def test_quadrature_of_many_dimensions_is_one_line_and_no_file(capsys, trained):
    run = trained["deep"]
    line = unchanged(run, lambda: refusal(capsys, "evidence", run, "--method", "quadrature"))
    assert "Quadrature is for one or two latent dimensions; this story has 20" in line


@pytest.mark.parametrize("command", ["evidence", "compare"])
def test_a_run_that_is_not_there_is_one_line(command, capsys, trained, tmp_path):
    others = [trained["plane"]] if command == "compare" else []
    for missing in (tmp_path / "nowhere", tmp_path):
        assert f"There is no run '{missing}'" in refusal(capsys, command, missing, *others)
    assert list(tmp_path.iterdir()) == []


def test_evidence_of_a_run_without_story_is_one_line_and_no_file(capsys, run):
    (run / "story.safetensors").unlink()
    assert "There is no checkpoint" in unchanged(run, lambda: refusal(capsys, "evidence", run))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "ppl_vae/run/0"}', "[" * 100_000, "\0"])
def test_a_damaged_configuration_of_a_run_is_one_line(text, capsys, run):
    (run / "config.json").write_text(text)
    line = unchanged(run, lambda: refusal(capsys, "evidence", run))
    assert "config.json" in line and ("damaged" in line or "ppl_vae/run/0" in line)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("[1]", "damaged"),
        ('{"epoch": 1}', "no number train_elbo"),
        ('{"train_elbo": -9.0}', "no number epoch"),
        ('{"epoch": "one", "train_elbo": -9.0}', "no number epoch"),
        ('{"epoch": Infinity, "train_elbo": -9.0}', "inf is no epoch"),
        (
            '{"epoch": 1, "train_elbo": 0, "validation_elbo": 0}\n{"epoch": 2, "train_elbo": 0}',
            "no number validation_elbo",
        ),
    ],
)
def test_a_forged_history_is_one_line(rows, reason, capsys, run):
    (run / "metrics.jsonl").write_text(rows)
    line = unchanged(run, lambda: refusal(capsys, "report", run))
    assert "metrics.jsonl" in line and reason in line


def test_compare_of_one_run_is_one_line(capsys, trained):
    assert "at least two runs" in refusal(capsys, "compare", trained["plane"])
    twice = (trained["plane"], trained["plane"].parent / "deep" / ".." / "plane")
    assert "given twice" in refusal(capsys, "compare", *twice)


@pytest.mark.parametrize(
    ("name", "words"), [("static", "grey.npy, binarization static, seed 0"), ("seeded", "binarization dynamic, seed 1")]
)
def test_runs_that_hold_out_other_observations_are_refused_in_one_line(name, words, capsys, trained):
    line = refusal(capsys, "compare", trained["plane"], trained[name])
    assert "The test observations differ between" in line
    assert "plane' (binary.npy, binarization dynamic, seed 0)" in line and words in line


def test_a_probability_beside_a_density_is_refused_in_one_line(capsys, trained):
    line = refusal(capsys, "compare", trained["plane"], trained["density"], "--method", "elbo")
    assert "probability" in line and "density" in line


# What is wrong with sample --------------------------------------------------------------------------------------------


def test_sample_of_a_folder_without_a_run_is_one_line(capsys, tmp_path):
    assert "There is no run" in refusal(capsys, "sample", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sample_of_a_damaged_checkpoint_is_one_line(capsys, run):
    before = sorted(run.iterdir())
    (run / runs.STORY).write_bytes(b"\0" * 100)
    assert "is not a whole checkpoint" in refusal(capsys, "sample", run)
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--num-observations", "0"], "--num-observations must be at least 1; found 0"),
        (["--num-observations", "999999999999"], "999,999,999,999 new observations do not fit in memory"),
        (["--num-observations", str(2**63)], "9,223,372,036,854,775,808 new observations do not fit in memory"),
        (["--seed", "-1"], "seed must be a whole number from 0 up; found -1"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--shape", "3"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_of_sample_is_one_line_and_no_file(arguments, word, capsys, files, out, tmp_path):
    says(capsys, "train", "--data", files / "binary.npy", "--out", out, *SMALL)
    before = sorted(out.iterdir())
    assert word in refusal(capsys, "sample", out, *arguments)
    assert sorted(out.iterdir()) == before


# Swapping parts -------------------------------------------------------------------------------------------------------


def test_digits_are_counts_for_a_binomial(capsys, out):
    said = ("--data", "digits", "--likelihood", "binomial", "--likelihood.total-count", 16, *SMALL)
    assert "values in [0, 16]" in says(capsys, "train", "--out", out, *said).out
    assert "bits per dimension" in says(capsys, "evidence", out, "--method", "prior", "--limit", 20).out
    says(capsys, "sample", out, "--num-observations", 4)
    drawn = np.load(out / "new-0.npz")["x"]
    assert drawn.shape == (4, 1, 8, 8) and set(np.unique(drawn)) <= set(range(17))


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory):
    """A public table whose columns differ: age in years, sex, and eight measurements."""
    table = load_diabetes(scaled=False).data
    table[:, 1] -= 1
    file = tmp_path_factory.mktemp("tables") / "diabetes.csv"
    np.savetxt(file, table[:120], delimiter=",", header="age,sex,bmi,bp,s1,s2,s3,s4,s5,s6", comments="")
    return file


TABLE = ("--standardize", "bmi,bp,s1,s2,s3,s4,s5,s6", "--likelihood", "by-column", "--likelihood.columns")


def test_a_table_of_mixed_columns_trains_is_scored_and_compared(capsys, diabetes, tmp_path):
    swaps = {"normal": "poisson,bernoulli,8*normal", "student": "negative-binomial,categorical:2,8*student-t"}
    for name, columns in swaps.items():
        says(capsys, "train", "--data", diabetes, *TABLE, columns, "--out", tmp_path / name, *SMALL)
    says(capsys, "evidence", tmp_path / "normal", "--method", "importance", "--num-particles", 5)
    names = [tmp_path / name for name in swaps]
    few = ("--method", "importance", "--num-particles", 5)
    shown = says(capsys, "compare", *names, *few, "--plot", tmp_path / "differences.png").out
    assert "normal" in shown and "student" in shown
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_columns_that_do_not_fit_their_likelihood_are_named(capsys, diabetes, out):
    refused = refusal(capsys, "train", "--data", diabetes, *TABLE, "9*poisson,normal", "--out", out)
    assert "in columns 0 to 8; Poisson is a distribution over whole numbers" in refused
    assert not out.exists()


def test_pictures_of_comparisons_go_to_new_png_files(capsys, trained, tmp_path):
    compared = ("compare", trained["plane"], trained["deep"])
    assert "--plot is a file .png" in refusal(capsys, *compared, "--plot", tmp_path / "differences.pdf")
    (tmp_path / "there.png").touch()
    assert "is there already. Choose another --plot" in refusal(capsys, *compared, "--plot", tmp_path / "there.png")


OWN = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, event_shape):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, *event_shape), nn.Linear(*event_shape, 2)

    def model(self, x=None, *, num_observations=1):
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample("depth", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("observations", len(x)):
            pyro.sample("depth", dist.Normal(loc, scale.exp()).to_event(1))

class Labelled(Mine):
    def model(self, x, y):
        super().model(x)

    def guide(self, x, y):
        super().guide(x)

class Fails(nn.Module):
    def __init__(self):
        raise RuntimeError("no luck")

class NoStory:
    pass
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return file


def test_a_story_of_ones_own_trains_and_is_scored_by_whoever_names_its_file(capsys, files, own, out):
    story = ("--story", f"{own}:Mine")
    says(capsys, "train", *story, "--data", files / "binary.npy", "--out", out, *SMALL)
    assert "log p(x) of the test split" in says(capsys, "evidence", out, *story).out
    says(capsys, "sample", out, *story, "--num-observations", 3)
    assert np.load(out / "new-0.npz")["depth"].shape == (3, 1)


def test_a_run_never_says_which_file_is_run(capsys, files, own, out):
    says(capsys, "train", "--story", f"{own}:Mine", "--data", files / "binary.npy", "--out", out, *SMALL)
    own.write_text("raise SystemExit('this file was run')")
    for command in ("evidence", "sample"):
        assert "say where it is, --story FILE.py:Mine" in refusal(capsys, command, out)


def test_labels_are_a_column_of_ones_own_story_on_request(capsys, files, own, out):
    x = np.load(files / "binary.npy")
    np.savez(own.parent / "labelled.npz", x=x, labels=np.arange(len(x)) % 3)
    said = ("train", "--story", f"{own}:Labelled", "--data", own.parent / "labelled.npz", "--out", out, *SMALL)
    assert "is given 1 columns" in refusal(capsys, *said)
    says(capsys, *said, "--with-labels")
    assert "has no labels; leave --with-labels out" in refusal(
        capsys, "train", "--data", files / "binary.npy", "--with-labels", "--out", own.parent / "other"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nobody", "has no class 'Nobody'"),
        ("Fails", "Fails() in"),
        ("Fails", "RuntimeError: no luck"),
        ("NoStory", "is no nn.Module with the methods model and guide"),
    ],
)
def test_a_file_without_a_story_is_one_line(capsys, files, own, out, name, words):
    refused = refusal(capsys, "train", "--story", f"{own}:{name}", "--data", files / "binary.npy", "--out", out)
    assert words in refused and not out.exists()


def test_a_file_that_does_not_run_is_one_line(capsys, files, own, out):
    own.write_text("1 / 0")
    said = ("train", "--story", f"{own}:Mine", "--data", files / "binary.npy", "--out", out)
    assert "does not run (ZeroDivisionError: division by zero)" in refusal(capsys, *said)


# Leaving and starting -------------------------------------------------------------------------------------------------


def test_an_interrupt_is_one_line_and_status_130(capsys, files, out, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", interrupted)
    assert main(["train", "--data", str(files / "binary.npy"), "--out", str(out)]) == 130
    assert capsys.readouterr().err == f"ppl-vae: interrupted; go on with: ppl-vae train --resume {out}\n"


# Going on, diagnosing, reporting --------------------------------------------------------------------------------------


def test_a_run_goes_on_for_more_epochs_as_if_it_had_never_ended(capsys, files, tmp_path):
    data = ["--data", files / "binary.npy", *SMALL[2:]]
    says(capsys, "train", *data, "--epochs", "3", "--out", tmp_path / "whole")
    says(capsys, "train", *data, "--epochs", "1", "--out", tmp_path / "part")
    says(capsys, "train", "--resume", tmp_path / "part", "--epochs", "3")
    whole, part = (load(tmp_path / name / "story.safetensors").state_dict() for name in ("whole", "part"))
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "part")]
    rows = [[json.loads(line)["epoch"] for line in log] for log in logs]
    assert rows == [[1, 2, 3]] * 2
    assert json.loads((tmp_path / "part" / "config.json").read_text())["training"]["epochs"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--latent-dim", "3"], ["--latent-dim does not go with --resume"]),
        (["--prior", "vamp"], ["--prior does not go with --resume"]),
        (["--out", "elsewhere"], ["--out does not go with --resume"]),
        (["--epochs", "0"], ["epochs must be at least 1"]),
    ],
    ids=lambda value: value[0],
)
def test_what_does_not_go_with_resume_is_one_line(arguments, words, capsys, trained):
    line = unchanged(trained["plane"], lambda: refusal(capsys, "train", "--resume", trained["plane"], *arguments))
    assert [word for word in words if word not in line] == []


def test_resuming_what_is_no_run_is_one_line(capsys, tmp_path):
    assert "There is no run" in refusal(capsys, "train", "--resume", tmp_path)


def test_a_diagnosis_is_kept_section_by_section_and_reported(capsys, trained, tmp_path):
    run = shutil.copytree(trained["plane"], tmp_path / "run")
    said = says(capsys, "diagnose", run, "--sections", "guide,collapse").out
    assert "guide: " in said and "collapse: " in said
    assert sorted(file.name for file in (run / "diagnosis").iterdir()) == ["collapse.nc", "guide.nc"]
    table = json.loads(says(capsys, "diagnose", run, "--sections", "guide", "--json").out)
    assert {finding["section"] for finding in table["findings"]} == {"guide"}
    says(capsys, "report", run, "--out", run / "again.html")
    assert "As a proposal the guide" in (run / "again.html").read_text(encoding="utf-8")


def test_a_diagnosis_goes_on_with_what_is_there(capsys, trained, tmp_path):
    run = shutil.copytree(trained["plane"], tmp_path / "run")
    says(capsys, "diagnose", run, "--sections", "guide")
    before = tables.load(run / "diagnosis" / "guide.nc")
    says(capsys, "diagnose", run, "--sections", "guide,collapse")
    assert tables.load(run / "diagnosis" / "guide.nc").attrs["seconds"] == before.attrs["seconds"]
    says(capsys, "diagnose", run, "--sections", "guide", "--seed", "5")
    assert not tables.load(run / "diagnosis" / "guide.nc").equals(before)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["diagnose", "--sections", "luck"], "Unknown sections ['luck']"),
        (["diagnose", "--limit", "1"], "limit must be at least 2"),
        (["report", "--out", "report.txt"], "--out is a file .html"),
        (["report", "--out", "nowhere/report.html"], "There is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_of_diagnose_and_report_is_one_line(arguments, word, capsys, trained):
    command, *options = arguments
    assert word in refusal(capsys, command, trained["plane"], *options)


def test_a_mistake_of_ours_keeps_its_traceback(files, out, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda *arguments: {}["nothing"])
    with pytest.raises(KeyError), contextlib.redirect_stderr(io.StringIO()):
        main(["train", "--data", str(files / "binary.npy"), "--out", str(out)])


def test_the_command_line_starts_without_heavy_imports():
    program = "import sys, ppl_vae.cli; print(sorted({'torch', 'numpy', 'pyro', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["train", "--epochs", "-1"],
        ["sample", "--help"],
        ["evidence", "--help"],
        ["evidence", "run", "--method", "magic"],
        ["evidence", "run", "--out", "table.txt"],
        ["evidence", "run", "--limit", "0"],
        ["compare", "--help"],
        ["compare", "run"],
        ["compare", "run", "other", "--correction", "magic"],
        ["evidence", "run", "--story", "Mine"],
        ["train", "--prior", "mixture", "--prior.components", "0"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_options_answer_without_heavy_imports(arguments):
    program = f"""
import sys
from ppl_vae.cli import main
try:
    main({arguments})
except SystemExit:
    pass
sys.exit(1 if {{"torch", "numpy", "pyro", "matplotlib"}} & set(sys.modules) else 0)
"""
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "ppl_vae", "train", "--epochs", "-1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "ppl-vae: epochs must be at least 1; found -1.\n"


def test_a_fresh_process_says_one_line_too(files, out):
    command = [sys.executable, "-m", "ppl_vae", "train", "--data", str(files / "negative.npy"), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("ppl-vae: x has values between -1 and") and result.stderr.count("\n") == 1
