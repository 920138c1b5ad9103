"""Published tables, on small files in MNIST's layout: what is trained, kept, gone on with, and printed."""

import gzip
import importlib
import json
import math
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.special import logit

from ppl_vae import VAE, fit, likelihoods, posteriors, priors
from ppl_vae.networks import mlp

ROOT = Path(__file__).parents[1]
MEBIBYTE = 2**20
QUICK = ("--test-limit", "2", "--annealed", "0")


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("reproduce")


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root, num_train=60, num_test=12):
    """Small files as torchvision keeps them; grey bytes of the training and the test images."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    chance, columns = np.random.default_rng(1), []
    for part, count in (("train", num_train), ("t10k", num_test)):
        images = chance.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = chance.integers(0, 10, count, dtype=np.uint8)
        for stem, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (raw / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
        columns.append(images)
    return columns


def options_of(root, *more):
    return ("--data-root", str(root / "data"), "--out", str(root / "out"), *QUICK, *more)


def line_of(printed, label):
    return next(line for line in printed.splitlines() if line.startswith(f"| {label} |")).split(" | ")


# The command ----------------------------------------------------------------------------------------------------------


def test_a_table_runs_from_files_to_print_and_is_printed_again_without_data(reproduce, tmp_path, capsys):
    write_mnist(tmp_path / "data")
    assert reproduce.main(["static", "--budget", "0.004", *options_of(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for label, name, published in (("N(0, I)", "normal", "-89.78"), ("VampPrior 500", "vamp", "-85.57")):
        record = json.loads((tmp_path / "out" / "static" / f"{name}.json").read_text())
        mean = np.mean(record["scores"]["best"]["estimate"])
        cells = line_of(printed, label)
        assert cells[1] == published and cells[-1] == "2 of 500 |"
        assert float(cells[4].split(" ± ")[0]) == pytest.approx(mean, abs=0.006)
        assert record["scores"]["encoder"]["num_particles"] == 5000
    assert "encoder with 200 draws as published" in printed
    shutil.rmtree(tmp_path / "data")
    for folder in (tmp_path / "out" / "static").glob("*/"):
        shutil.rmtree(folder)
    assert reproduce.main(["static", "--print", *options_of(tmp_path)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_some_images_are_annealed_too(reproduce, tmp_path, capsys):
    write_mnist(tmp_path / "data")
    command = ["iwae", "--row", "k1", "--budget", "0.0006", *options_of(tmp_path), "--annealed", "1"]
    assert reproduce.main(command) == 0
    scores = json.loads((tmp_path / "out" / "iwae" / "k1.json").read_text())["scores"]
    assert [len(scores[name]["estimate"]) for name in ("encoder", "best", "annealed")] == [2, 2, 1]
    assert scores["annealed"]["estimate"][0] == pytest.approx(scores["best"]["estimate"][0], abs=1.0)
    assert "annealed - mixture on 1 of the images" in capsys.readouterr().out


def test_interrupted_and_gone_on_with_it_ends_with_the_same_bits(reproduce, tmp_path, capsys):
    write_mnist(tmp_path / "data")
    command = ["static", "--row", "normal", "--budget", "0.004", *options_of(tmp_path)]
    assert reproduce.main(command) == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    interruptions = 0
    while reproduce.main([*command, "--minutes", "0"]) == reproduce.UNFINISHED:
        assert "the same command goes on" in capsys.readouterr().err
        interruptions += 1
        assert interruptions < 10
    assert interruptions > 2
    weights, whole = (
        safetensors.torch.load_file(folder / "static" / "normal" / "story.safetensors")
        for folder in (tmp_path / "out", tmp_path / "whole")
    )
    assert weights.keys() == whole.keys() and all(torch.equal(weights[name], whole[name]) for name in whole)
    there, here = (json.loads((tmp_path / name / "static" / "normal.json").read_text()) for name in ("whole", "out"))
    assert there["scores"] == here["scores"] and there["training"]["epochs"] == here["training"]["epochs"] == 2


def test_checkpoints_of_the_largest_story_are_small(reproduce, tmp_path, capsys):
    write_mnist(tmp_path / "data", num_train=600)
    command = ["dynamic", "--row", "vamp", "--budget", "0.001", *options_of(tmp_path), "--minutes", "0"]
    assert reproduce.main(command) == reproduce.UNFINISHED
    row = tmp_path / "out" / "dynamic" / "vamp"
    sizes = [file.stat().st_size for file in row.glob("step-*.safetensors")]
    assert sizes and max(sizes) < 64 * MEBIBYTE
    assert not (row / "story.safetensors").exists()


def test_what_was_done_with_other_settings_is_refused(reproduce, tmp_path, capsys):
    write_mnist(tmp_path / "data")
    command = ["iwae", "--row", "k1", *options_of(tmp_path)]
    assert reproduce.main([*command, "--budget", "0.0003"]) == 0
    assert reproduce.main([*command, "--budget", "0.0006"]) == 1
    assert "begun with budget 0.0003" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["statik"],
        [],
        ["static", "--row", "k5"],
        ["static", "--budget", "0"],
        ["static", "--budget", "1.5"],
        ["static", "--test-limit", "1"],
        ["static", "--annealed", "-1"],
    ],
)
def test_wrong_words_end_with_status_2(reproduce, arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        reproduce.main(arguments)
    assert ending.value.code == 2 and "usage:" in capsys.readouterr().err


def test_missing_rows_are_printed_as_not_run(reproduce, tmp_path, capsys):
    assert reproduce.main(["iwae", "--print", "--out", str(tmp_path)]) == 0
    assert line_of(capsys.readouterr().out, "k = 50")[1:3] == ["-84.78", "not run"]


# What is printed ------------------------------------------------------------------------------------------------------


def record_of(estimates, errors, encoder, **settings):
    """A finished row of two images."""
    scored = {"method": "mixture", "num_particles": 1000, "verdict": ["good", "poor"]}
    common = {"budget": 0.5, "seed": 0, "estimator": "mixture", "annealed": 0, "images": [6, 2, 2], "scored": 2}
    return {
        "settings": common | {"binarization": "once", "fingerprint": "a"} | settings,
        "training": {
            "epochs": 3,
            "epochs_published": 6,
            "best_epoch": 2,
            "validation_elbo": None,
            "minutes": 0.1,
        },
        "scores": {
            "best": scored | {"estimate": estimates, "standard_error": errors},
            "encoder": scored | {"estimate": encoder, "standard_error": [0.4, 0.3]},
        },
    }


def keep(out, **records):
    (out / "dynamic").mkdir(parents=True)
    for name, record in records.items():
        (out / "dynamic" / f"{name}.json").write_text(json.dumps(record))


def test_means_errors_and_differences_are_those_of_a_hand(reproduce, tmp_path):
    keep(
        tmp_path,
        normal=record_of([-90.0, -80.0], [0.06, 0.08], [-93.0, -81.0]),
        vamp=record_of([-88.0, -79.0], [0.06, 0.08], [-93.0, -81.0]),
    )
    printed = reproduce.printed("dynamic", tmp_path)
    cells = line_of(printed, "N(0, I)")
    assert cells[2] == "-87.00 ± 0.25"  # sqrt(0.4^2 + 0.3^2) / 2
    assert cells[4] == "-85.00 ± 0.05"
    assert cells[5] == "good 50.0%, poor 50.0%"
    assert cells[6] == f"+2.00 ± {math.hypot(0.25, 0.05):.2f}"
    assert cells[7] == "5.00"  # the standard deviation of -90 and -80 is sqrt(50)
    assert cells[8] == "3 of 6 |"
    assert (
        "VampPrior 500 - N(0, I), paired over the images: +1.50 ± 0.50 nats, +3.0 standard errors (published: +2.02)"
        in printed
    )
    assert "between +2.00 and +3.50 nats" in reproduce.page(tmp_path)


def test_rows_with_different_settings_are_not_compared(reproduce, tmp_path):
    row = [-90.0, -80.0], [0.1, 0.1], [-93.0, -81.0]
    keep(tmp_path, normal=record_of(*row), vamp=record_of(*row, budget=0.25))
    with pytest.raises(ValueError, match="differ in their settings"):
        reproduce.printed("dynamic", tmp_path)


def test_a_row_that_is_half_scored_is_not_printed(reproduce, tmp_path):
    record = record_of([-90.0, -80.0], [0.1, 0.1], [-93.0])
    keep(tmp_path, normal=record)
    assert line_of(reproduce.printed("dynamic", tmp_path), "N(0, I)")[2] == "not run"


def test_the_committed_page_is_the_prose_with_its_tables(reproduce):
    committed = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    between = map(re.escape, re.split(r"\{tables\}|\{in_all\}", reproduce.PAGE))
    assert re.fullmatch(".+?".join(between), committed, re.DOTALL)


# Protocols ------------------------------------------------------------------------------------------------------------


def test_held_out_images_are_numpys_draws_in_the_official_order(reproduce, tmp_path):
    train, test = write_mnist(tmp_path)
    chance = np.random.RandomState(777)
    validation, held_out = (chance.binomial(1, (grey / 255).astype(np.float32)) for grey in (train[50:], test))
    x = reproduce.dynamic_mnist(tmp_path)
    assert np.array_equal(x.validation[:, 0].numpy(), validation) and np.array_equal(x.test[:, 0].numpy(), held_out)
    assert np.allclose(x.train[:, 0].numpy(), train[:50] / 255)


def test_the_fixed_split_is_read_bit_by_bit(reproduce, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 784), dtype=np.uint8)
    packed = dict(zip(("train", "valid", "test"), np.packbits(bits, axis=2), strict=True))
    np.savez(tmp_path / "static_mnist.npz", **packed)
    x = reproduce.static_mnist(tmp_path)
    for images, expected in zip(x[:3], bits, strict=True):
        assert images.shape == (5, 1, 28, 28) and images.is_contiguous()
        assert np.array_equal(images.flatten(1).numpy(), expected)


def test_the_stages_of_the_learning_rate_are_those_of_the_paper(reproduce):
    """Burda et al., section 5: 3^i epochs at 0.001 * 10^(-i/7), i from 0 to 7; 3,280 epochs in all."""
    rates, optimizer = [], torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = reproduce.eight_stages(1.0)(optimizer)
    for _ in range(reproduce.TABLES["iwae"].epochs):
        rates.append(round(optimizer.param_groups[0]["lr"], 7))
        optimizer.step()
        schedule.step()
    expected = [(round(1e-3 * 10 ** (-i / 7), 5), 3**i) for i in range(8)]
    assert [(rate, rates.count(rate)) for rate in dict.fromkeys(rates)] == expected


def test_a_tenth_of_the_budget_changes_rates_ten_times_sooner(reproduce):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = reproduce.steps_down(0.1)(optimizer), []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0] * 20 + [10**-0.2] * 15 + [10**-0.4] * 15)


def test_gated_layers_multiply_by_a_sigmoid_and_bounds_hold(reproduce):
    vae = reproduce.gated_vae(torch.rand(20, 1, 28, 28), vamp=True)
    x = torch.rand(3, 784)
    first, gate = vae.encoder.network[1], vae.encoder.network[2]
    h, g = first(x).chunk(2, dim=-1)
    assert torch.allclose(gate(first(x)), h * torch.sigmoid(g))
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / 784), rel=0.01)
    scale = vae.encoder(50 * torch.randn(100, 1, 28, 28)).base_dist.scale
    assert scale.min().item() == pytest.approx(math.exp(-3)) and scale.max().item() == pytest.approx(math.exp(1))
    probs = vae.decoder(50 * torch.randn(100, 40)).base_dist.probs
    assert probs.min().item() == pytest.approx(1e-5, rel=1e-3) and 1 - probs.max().item() == pytest.approx(
        1e-5, rel=0.01
    )


def test_the_tanh_story_starts_at_the_mean_of_the_pixels(reproduce):
    x = torch.rand(30, 1, 28, 28)
    vae = reproduce.tanh_vae(x)
    assert np.allclose(vae.decoder.logits[-2].bias.detach(), logit(x.mean(0).flatten().numpy()), atol=1e-5)


# The optimizer --------------------------------------------------------------------------------------------------------


def test_normalized_steps_do_not_know_the_size_of_a_gradient(reproduce):
    moved = []
    for size in (1.0, 1000.0):
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = reproduce.NormalizedAdam([parameter], lr=0.1)
        for gradient in ([3.0, 4.0], [-1.0, 0.5]):
            parameter.grad = size * torch.tensor(gradient)
            optimizer.step()
        moved.append(parameter.detach())
    assert torch.allclose(*moved)
    by_hand = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.Adam([by_hand], lr=0.1)
    for gradient in ([0.6, 0.8], [-1 / math.sqrt(1.25), 0.5 / math.sqrt(1.25)]):
        by_hand.grad = torch.tensor(gradient)
        adam.step()
    assert torch.allclose(moved[0], by_hand.detach())


def test_normalized_steps_are_captured_and_are_those_of_svi(reproduce):
    weights = []
    for engine in ("captured", "svi"):
        torch.manual_seed(0)
        vae = VAE(
            priors.StandardNormal(2),
            likelihoods.Bernoulli(mlp(2, 8, 6)),
            posteriors.DiagonalNormal(mlp(6, 8, 4)),
        )
        x = torch.ones(40, 6)
        history = fit(vae, x, epochs=2, batch_size=10, optimizer=reproduce.TABLES["dynamic"].optimizer, engine=engine)
        assert history.engine == engine
        weights.append(torch.cat([parameter.detach().flatten() for parameter in vae.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)
