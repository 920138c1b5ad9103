"""A run: train the story of a configuration, judge it on held-out data, and leave a folder that tells all of it.

The folder holds ``config.json`` (what was asked for, and which data), ``metrics.jsonl`` (one line per epoch),
``story.safetensors`` (the trained story), ``results.json``, and pictures.
"""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure

import ppl_vae
from ppl_vae import checks, configuration, data, likelihoods, plots, traces
from ppl_vae.checkpoint import load, save, write_atomically
from ppl_vae.configuration import RunConfiguration
from ppl_vae.data import Dataset
from ppl_vae.evidence import Evidence, log_evidence
from ppl_vae.training import History, fit
from ppl_vae.training.history import Row
from ppl_vae.vae import VAE

FORMAT = "ppl_vae/run/0"
CONFIGURATION, METRICS, STORY, RESULTS = "config.json", "metrics.jsonl", "story.safetensors", "results.json"
ELBO_PARTICLES = 64
PICTURED = 32

Say = Callable[[str], None]


def load_data(wanted: configuration.DataConfiguration, binarized: bool, seed: int) -> Dataset:
    """The data set of a configuration; with binarization "auto", ``binarized`` decides between dynamic and none."""
    automatic = "dynamic" if binarized else "none"
    binarization = cast(data.Binarization, automatic if wanted.binarization == "auto" else wanted.binarization)
    return data.load(wanted.data, binarization=binarization, seed=seed, root=wanted.data_root, download=wanted.download)


def train(
    wanted: RunConfiguration, dataset: Dataset, folder: Path, device: str | None = None, say: Say = print
) -> dict[str, Any]:
    """Trains, judges and pictures one story; returns the results that ``results.json`` holds.

    Raises:
        FileExistsError: when the folder already holds something.
        ValueError: when story and data do not fit; the folder is then not made.
    """
    refuse_used(folder)
    training, transform = wanted.training, torch.bernoulli if dataset.binarization == "dynamic" else None
    story = configuration.build(wanted.story, training.seed).to(torch_device(device))
    _check_data(story, dataset, transform)
    _begin(folder, wanted, dataset)
    say(str(dataset))

    started = time.perf_counter()
    history = fit(
        story,
        dataset.train.x,
        validation=dataset.validation.x,
        epochs=training.epochs,
        batch_size=training.batch_size,
        optimizer=partial(torch.optim.Adam, lr=training.learning_rate, fused=True),
        transform=transform,
        kl_warmup=training.kl_warmup,
        patience=training.patience or None,
        callbacks=[partial(_append_metrics, folder)],
        seed=training.seed,
    )
    seconds = time.perf_counter() - started
    save(story, folder / STORY)
    say(f"trained {len(history)} epochs in {seconds:.0f} s; the weights of epoch {history.best_epoch} were best")

    elbo = log_evidence(story, dataset.test.x, method="elbo", num_particles=ELBO_PARTICLES, seed=training.seed)
    evidence = log_evidence(story, dataset.test.x, num_particles=training.num_particles, seed=training.seed)
    results = _results(history, seconds, elbo, evidence) | _floor(story, dataset)
    _write_json(folder / RESULTS, results)
    for name, figure in _pictures(story, history, dataset).items():
        figure.savefig(folder / name, dpi=110)
    return {"run": str(folder)} | results


def as_json(table: dict[str, Any], indent: int | None = None) -> str:
    """A table as JSON, in which there is no NaN or infinity: null stands for them.

    >>> as_json({"test_elbo": -44.5, "test_sampling_error": float("nan")})
    '{"test_elbo": -44.5, "test_sampling_error": null}'
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in table.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)


def sample(run: Path, out: Path, num_observations: int, seed: int, device: str | None = None) -> list[Path]:
    """Draws new observations from a run's story into ``out``.npz, and .png if they are images; returns the files."""
    story = load(run / STORY, device=torch_device(device))
    draws = traces.draws(traces.prior_predictive(story, num_observations, seed=seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_suffix(".npz")]
    arrays: dict[str, Any] = {name: draw.cpu().numpy() for name, draw in draws.items()}
    np.savez_compressed(files[0], **arrays)
    if plots.are_images(draws["x"]):
        files.append(out.with_suffix(".png"))
        plots.samples(story, num_observations, seed).savefig(files[1], dpi=110)
    return files


def torch_device(name: str | None) -> torch.device:
    """The device of this name, the CPU for None; ValueError when it is not there."""
    try:
        device = torch.device(name or "cpu")
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"The device {name!r} is not there ({reason}). Use cpu, or cuda where there is one.") from None
    return device


def refuse_used(folder: Path) -> None:
    """Raises FileExistsError when a folder already holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "already holds a run" if (folder / CONFIGURATION).exists() else "is not an empty folder"
        raise FileExistsError(f"{str(folder)!r} {what}. Choose another --out, or leave it out for a fresh folder.")


def _check_data(story: VAE, dataset: Dataset, transform: checks.Transform | None) -> None:
    """Everything that could be wrong with the data is found here, before there is a folder."""
    if len(dataset.train.x) < 2:
        raise ValueError(f"Training needs at least two observations; the splits of {dataset.name} leave one.")
    # In the order of the source, so that a row has the number that the user knows it by.
    order = torch.cat([dataset.indices[name] for name in dataset.splits]).argsort()
    x = torch.cat([split.x for split in dataset.splits.values()])[order]
    checks.check(story, x, transform=transform)


def _begin(folder: Path, wanted: RunConfiguration, dataset: Dataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "ppl_vae": ppl_vae.__version__, "torch": str(torch.__version__)}
    _write_json(folder / CONFIGURATION, about | configuration.to_json(wanted) | {"dataset": dataset.record})


def _append_metrics(folder: Path, story: object, row: Row) -> None:
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(as_json(row) + "\n")


def _results(history: History, seconds: float, elbo: Evidence, evidence: Evidence) -> dict[str, Any]:
    summary = evidence.summary()
    return {
        "test_elbo": elbo.summary().mean,
        "test_log_evidence": summary.mean,
        "monte_carlo_error": summary.monte_carlo_error,
        "monte_carlo_bias": summary.bias,
        "test_sampling_error": summary.test_sampling_error,
        "bits_per_dimension": summary.bits_per_dimension,
        "trusted_share": summary.trusted,
        "median_ess": summary.median_ess,
        "num_particles": summary.num_particles,
        "num_test_observations": summary.num_observations,
        "epochs": len(history),
        "best_epoch": history.best_epoch,
        "engine": history.engine,
        "training_seconds": round(seconds, 2),
    }


def _floor(story: VAE, dataset: Dataset) -> dict[str, Any]:
    """For a normal likelihood: its floor, and the share of scales that sit on it for held-out observations."""
    if not isinstance(story.decoder, likelihoods.Normal):
        return {}
    (x,) = traces.to_story(story, (dataset.test.x[:1000],))
    with traces.scoring(story):
        share = likelihoods.share_on_floor(story.decoder, story.encoder(x).mean)
    return {"scale_floor": story.decoder.floor, "share_of_scales_on_floor": share}


def _pictures(story: VAE, history: History, dataset: Dataset) -> dict[str, Figure]:
    figures = {"learning_curve.png": plots.learning_curve(history)}
    (x,) = traces.to_story(story, (dataset.test.x,))
    if plots.are_images(x):
        figures["samples.png"] = plots.samples(story)
        figures["reconstructions.png"] = plots.reconstructions(story, x[:PICTURED])
        if story.configuration.latent_dim == 2:
            figures["atlas.png"] = plots.latent_atlas(story, x, dataset.test.labels)
    return figures


def _write_json(path: Path, table: dict[str, Any]) -> None:
    write_atomically(path, (as_json(table, indent=2) + "\n").encode())
