"""Published tables of log p(x), again: their protocols, their estimator, and beside it the best one of this package.

    python scripts/reproduce.py static --budget 0.1 --test-limit 1000 --data-root DIR
    python scripts/reproduce.py dynamic --row vamp --device cuda --minutes 10
    python scripts/reproduce.py all --print --write docs/reproduction.md

A row is a story, trained and scored. What is known of it stands in ``OUT/TABLE/ROW.json``, its weights and checkpoints
in the folder ``OUT/TABLE/ROW``: what is done is not done again, and rows can be done one by one. With ``--minutes`` the
script stops in time, after an epoch or after some images, with the exit status 75; the same command goes on from there.
``--budget`` is a fraction of the published schedule: epochs, warm-up and steps of the learning rate shrink alike.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ppl_vae import VAE, data, fit, likelihoods, load, log_evidence, networks, noise, objectives, priors, save
from ppl_vae.checkpoint import fingerprint, write_atomically
from ppl_vae.traces import Story

IMAGE = (1, 28, 28)
COMPONENTS = 500
DRAWS = 5000  # of the encoder for each image, as published
IMAGES_AT_ONCE = 250
UNFINISHED = 75
STORY, CHECKPOINTS = "story.safetensors", "step-*.safetensors"
Record = dict[str, Any]


# Stories --------------------------------------------------------------------------------------------------------------


class NormalOfLogScale(nn.Module):
    r"""Independent normals as the publications write them, :math:`q(z \mid x) = \mathcal{N}(\mu(x), e^{2 c h(x)})`.

    Args:
        network: maps an image to mu and h, K numbers each.
        power: c; 1/2 where h is a log variance, 1 where it is a log scale.
        low: smallest h.
        high: largest h.
    """

    def __init__(self, network: nn.Module, power: float = 0.5, low: float = -math.inf, high: float = math.inf) -> None:
        super().__init__()
        self.network = network
        self.power = power
        self.bounds = low, high

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        loc, h = self.network(x).chunk(2, dim=-1)
        return dist.Normal(loc, (self.power * h.clamp(*self.bounds)).exp()).to_event(1)


def plain_vae(x: Tensor, vamp: bool) -> VAE:
    """784-400-40 and back, with ReLU."""
    encoder = NormalOfLogScale(networks.mlp(IMAGE, 400, 2 * 40))
    decoder = likelihoods.Bernoulli(networks.mlp(40, 400, IMAGE))
    return VAE(prior_of(encoder, x, vamp), decoder, encoder)


def gated_vae(x: Tensor, vamp: bool) -> VAE:
    """784-300-300-40 and back, with gated layers; probabilities between 1e-5 and 1 - 1e-5."""
    largest = math.log(1e5 - 1)
    up = [nn.Linear(784, 600), nn.GLU(), nn.Linear(300, 600), nn.GLU(), nn.Linear(300, 2 * 40)]
    down = [nn.Linear(40, 600), nn.GLU(), nn.Linear(300, 600), nn.GLU(), nn.Linear(300, 784)]
    encoder = NormalOfLogScale(nn.Sequential(nn.Flatten(-3), *up), low=-6.0, high=2.0)
    logits = nn.Sequential(*down, nn.Hardtanh(-largest, largest), nn.Unflatten(-1, IMAGE))
    for layer in (*up, *down):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    return VAE(prior_of(encoder, x, vamp), likelihoods.Bernoulli(logits), encoder)


def prior_of(encoder: nn.Module, x: Tensor, vamp: bool) -> nn.Module:
    """N(0, I), or a VampPrior whose pseudo-inputs start near the first training images."""
    if not vamp:
        return priors.StandardNormal(40)
    first = x[:COMPONENTS]
    return priors.VampPrior(encoder, (first + 0.01 * torch.randn_like(first)).clamp(0, 1), low=0.0, high=1.0)


def tanh_vae(x: Tensor) -> VAE:
    """784-200-200-50 and back, with tanh; it starts at the mean of the pixels."""
    up = networks.mlp(IMAGE, 200, 200, 2 * 50, activation=nn.Tanh)
    down = networks.mlp(50, 200, 200, IMAGE, activation=nn.Tanh)
    layers = [layer for layer in (*up, *down) if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    layers[-1].bias.data.copy_(x.mean(0).flatten().clamp(0.001, 0.999).logit())
    return VAE(priors.StandardNormal(50), likelihoods.Bernoulli(down), NormalOfLogScale(up, power=1.0))


# Training as published ------------------------------------------------------------------------------------------------


class NormalizedAdam(torch.optim.Adam):
    """Adam after the gradient of every parameter was divided by its own norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(parameter.grad.norm() + 1e-7)
        self.grad_scale = None  # what a gradient would be divided by; this one has no scale any more
        return super().step(closure)


Schedule = Callable[[torch.optim.Optimizer], LRScheduler]


def steps_down(budget: float) -> Schedule:
    """The rate divided by 10^(1/5) at the epochs 200 and 350 of 500."""
    milestones = 200 * budget, 350 * budget
    return partial(LambdaLR, lr_lambda=lambda epoch: 10 ** (-sum(epoch >= end for end in milestones) / 5))


def eight_stages(budget: float) -> Schedule:
    """Stages of 3^i epochs, i from 0 to 7, at 10^(1 - i/7) times the last one's rate, to one decimal."""
    ends = [(3 ** (i + 1) - 1) / 2 * budget for i in range(7)]
    return partial(LambdaLR, lr_lambda=lambda epoch: round(10 ** (1 - sum(epoch >= end for end in ends) / 7), 1))


# Data as published ----------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Training images, validation images if a protocol has some, and test images, of shape (N, 1, 28, 28)."""

    train: Tensor
    validation: Tensor | None
    test: Tensor
    binarization: str


def official(root: Path | None) -> tuple[Tensor, Tensor]:
    """MNIST's training and test images, grey and in the official order."""
    digits = data.load("mnist", binarization="none", validation=1, root=root, download=True)
    order = torch.cat([digits.indices[name] for name in digits.splits]).argsort()
    x = torch.cat([split.x for split in digits.splits.values()])[order]
    return x[: -len(digits.test.x)], x[-len(digits.test.x) :]


def dynamic_mnist(root: Path | None) -> Images:
    """The last sixth of the training images validates. Held-out images are binarized once, validation first."""
    x, test = official(root)
    train, validation = x.split([len(x) - len(x) // 6, len(x) // 6])
    chance = np.random.RandomState(777)
    validation, test = (torch.from_numpy(chance.binomial(1, grey.numpy())).float() for grey in (validation, test))
    return Images(train, validation, test, "anew for every batch; validation and test once, by numpy's seed 777")


def burda_mnist(root: Path | None) -> Images:
    """All training images but the last 400; the test images are those of :func:`dynamic_mnist`."""
    x, _ = official(root)
    images = dynamic_mnist(root)
    return Images(x[: len(x) - len(x) // 150], None, images.test, images.binarization)


def static_mnist(root: Path | None) -> Images:
    """The fixed split of ``static_mnist.npz``, packed bits; where it is not there, binarized once by a seed."""
    file = None if root is None else root / "static_mnist.npz"
    if file is not None and file.is_file():
        with np.load(file) as packed:
            splits = [np.unpackbits(packed[name], axis=1, count=784) for name in ("train", "valid", "test")]
        train, validation, test = (
            torch.from_numpy(np.ascontiguousarray(split)).float().reshape(-1, *IMAGE) for split in splits
        )
        return Images(train, validation, test, "once, as in static_mnist.npz")
    x, test = (
        torch.from_numpy(np.random.RandomState(777).binomial(1, grey.numpy())).float() for grey in official(root)
    )
    train, validation = x.split([len(x) - len(x) // 6, len(x) // 6])
    return Images(train, validation, test, "once, by numpy's seed 777, for want of static_mnist.npz")


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A story and the figure published for it.

    Attributes:
        label: as the table prints it.
        published: mean log p(x) of the test images, in nats.
        source: who published it, and for what if that is not quite this story.
        story: made from the training images.
        loss: None is the evidence lower bound.
        draws: of the encoder behind the published figure.
    """

    label: str
    published: float
    source: str
    story: Callable[[Tensor], VAE]
    loss: ELBO | None = None
    draws: int = DRAWS


@dataclass(frozen=True)
class Protocol:
    """A table: what its rows share.

    Attributes:
        images: reads them, from a folder.
        schedule: of the learning rate, for a fraction of the epochs.
        transform: of each batch.
    """

    title: str
    images: Callable[[Path | None], Images]
    rows: Mapping[str, Row]
    epochs: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[float], Schedule] | None = None
    warmup: int = 0
    patience: int | None = None
    transform: Callable[[Tensor], Tensor] | None = torch.bernoulli


TOMCZAK = "Tomczak & Welling 2018"
NOROUZI = "Norouzi, Fleet & Norouzi 2020"
BURDA = "Burda et al. 2016"

TABLES: Mapping[str, Protocol] = {
    "static": Protocol(
        title="Static MNIST, 784-400-40",
        images=static_mnist,
        rows={
            "normal": Row("N(0, I)", -89.78, "Pythae", partial(plain_vae, vamp=False), draws=200),
            "vamp": Row("VampPrior 500", -85.57, f"{TOMCZAK}, gated 784-300-300-40", partial(plain_vae, vamp=True)),
        },
        epochs=500,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=1e-4, fused=True),
        schedule=steps_down,
        transform=None,
    ),
    "dynamic": Protocol(
        title="Dynamic MNIST, gated 784-300-300-40",
        images=dynamic_mnist,
        rows={
            "normal": Row("N(0, I)", -84.45, NOROUZI, partial(gated_vae, vamp=False)),
            "vamp": Row("VampPrior 500", -82.43, NOROUZI, partial(gated_vae, vamp=True)),
        },
        epochs=2000,
        batch_size=100,
        optimizer=partial(NormalizedAdam, lr=5e-4, fused=True),
        warmup=100,
        patience=50,
    ),
    "iwae": Protocol(
        title="Importance-weighted, 784-200-200-50",
        images=burda_mnist,
        rows={
            f"k{k}": Row(
                f"k = {k}",
                published,
                BURDA,
                tanh_vae,
                objectives.ImportanceWeightedELBO(k, doubly_reparameterized=False),
            )
            for k, published in ((1, -86.76), (5, -85.54), (50, -84.78))
        },
        epochs=3280,
        batch_size=20,
        # Published for the sum over a batch; fit's gradient is that of the mean.
        optimizer=partial(torch.optim.Adam, lr=1e-4, eps=1e-4 / 20, fused=True),
        schedule=eight_stages,
    ),
}


# A row: trained, then scored -----------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    """The minutes are over, and what was done is kept."""


class Clock:
    """Minutes to work; as a callback of ``fit`` it ends the training after the epoch in which they are over."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.end

    def __call__(self, story: Story, row: Mapping[str, Any]) -> None:
        if self.is_over:
            signal.raise_signal(signal.SIGINT)  # for which fit writes a checkpoint


def trained(table: Protocol, row: Row, x: Images, options: argparse.Namespace, folder: Path, clock: Clock) -> Record:
    """Trains a row's story and saves it in the folder; says how.

    Raises:
        OutOfTimeError: when the clock is over; there is a checkpoint in the folder then.
    """
    story, epochs = new_story(row, x, options.seed), max(1, round(table.epochs * options.budget))
    try:
        history = fit(
            story,
            x.train,
            validation=x.validation,
            epochs=epochs,
            batch_size=table.batch_size,
            optimizer=table.optimizer,
            loss=row.loss,
            transform=table.transform,
            kl_warmup=round(table.warmup * options.budget),
            schedule=table.schedule(options.budget) if table.schedule else None,
            patience=table.patience,
            callbacks=[clock],
            seed=options.seed,
            device=options.device,
            checkpoints=folder,
            resume=folder if any(folder.glob(CHECKPOINTS)) else None,
        )
    except KeyboardInterrupt:
        if clock.is_over:
            raise OutOfTimeError from None
        raise
    save(story, folder / STORY)
    return {
        "epochs": len(history),
        "epochs_asked": epochs,
        "epochs_published": table.epochs,
        "best_epoch": history.best_epoch,
        "validation_elbo": None if x.validation is None else float(history["validation_elbo"].max()),
        "engine": history.engine,
        "minutes": round(float(history["seconds"].sum()) / 60, 1),
    }


def new_story(row: Row, x: Images, seed: int) -> VAE:
    """A row's story, with the initial weights of a seed."""
    with noise.unit(torch.device("cpu"), seed, noise.Purpose.INITIAL_WEIGHTS):
        return row.story(x.train)


class Estimator(NamedTuple):
    """How log p(x) is estimated, and for how many of the scored images."""

    method: Any
    num_particles: int | None
    num_images: int


def estimators_of(row: Row, options: argparse.Namespace, num_images: int) -> dict[str, Estimator]:
    """The published one, that with the number of draws of the published figure if it is another, and better ones."""
    found = {
        "encoder": Estimator("importance", DRAWS, num_images),
        "best": Estimator(options.estimator, None, num_images),
        "annealed": Estimator("annealed", None, min(options.annealed, num_images)),
    }
    if row.draws != DRAWS:
        found["as published"] = Estimator("importance", row.draws, num_images)
    return {name: estimator for name, estimator in found.items() if estimator.num_images}


def score(story: VAE, x: Tensor, estimator: Estimator, seeds: Sequence[int], scored: Record) -> Iterator[None]:
    """Fills in the estimates that are missing, some images at a time."""
    if not scored:
        scored |= {"method": estimator.method, "estimate": [], "standard_error": [], "verdict": [], "num_particles": 0}
    while (start := len(scored["estimate"])) < estimator.num_images:
        evidence = log_evidence(
            story,
            x[start : min(start + IMAGES_AT_ONCE, estimator.num_images)],
            method=estimator.method,
            num_particles=estimator.num_particles,
            seed=noise.unit_seed(seeds[0], noise.Purpose.EVIDENCE, *seeds[1:], start),
        )
        for name in ("estimate", "standard_error"):
            scored[name] += [round(value, 5) for value in evidence[name].values.tolist()]
        scored["verdict"] += evidence["verdict"].values.tolist()
        scored["num_particles"] = int(evidence["num_particles"].max())
        yield


def complete(name: str, row_name: str, x: Images, options: argparse.Namespace, clock: Clock) -> None:
    """Does what a row still lacks, and keeps it.

    Raises:
        OutOfTimeError: when the clock is over before the end.
        ValueError: when the row was begun with other settings.
    """
    table, row = TABLES[name], TABLES[name].rows[row_name]
    folder = options.out / name / row_name
    folder.mkdir(parents=True, exist_ok=True)
    test = evenly(x.test, options.test_limit)
    record = begun(folder.with_suffix(".json"), settings_of(x, test, options))
    if "training" not in record:
        record["training"] = trained(table, row, x, options, folder, clock)
        write(folder.with_suffix(".json"), record)
    for left in folder.glob(CHECKPOINTS):
        left.unlink()
    story = load(folder / STORY, story=new_story(row, x, options.seed), device=options.device)
    for number, (estimator_name, estimator) in enumerate(estimators_of(row, options, len(test)).items()):
        scored = record["scores"].setdefault(estimator_name, {})
        for _ in score(story, test, estimator, (options.seed, number), scored):
            write(folder.with_suffix(".json"), record)
            if clock.is_over:
                raise OutOfTimeError


def evenly(x: Tensor, limit: int | None) -> Tensor:
    """As many images as are wanted, evenly spaced."""
    return x if limit is None or limit >= len(x) else x[:: len(x) // limit][:limit]


def settings_of(x: Images, test: Tensor, options: argparse.Namespace) -> Record:
    """What must be the same for all rows of a table."""
    return {
        "budget": options.budget,
        "seed": options.seed,
        "estimator": options.estimator,
        "annealed": options.annealed,
        "images": [len(x.train), 0 if x.validation is None else len(x.validation), len(x.test)],
        "scored": len(test),
        "binarization": x.binarization,
        "fingerprint": fingerprint([test]),
    }


def begun(path: Path, settings: Record) -> Record:
    """The record of a row, or a new one."""
    if not path.exists():
        return {"settings": settings, "scores": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key, value in settings.items() if record["settings"].get(key) != value]
    if differing:
        there = ", ".join(f"{key} {record['settings'].get(key)!r:.40}" for key in differing)
        raise ValueError(f"{str(path)!r} was begun with {there}. Ask for the same, or choose another --out.")
    return record


def write(path: Path, record: Record) -> None:
    write_atomically(path, json.dumps(record).encode())


# What is known, in print ----------------------------------------------------------------------------------------------


def records_of(name: str, out: Path) -> dict[str, Record]:
    """The finished rows of a table.

    Raises:
        ValueError: when they differ in their settings, and are not to be compared.
    """
    records = {}
    for row_name, row in TABLES[name].rows.items():
        path = out / name / f"{row_name}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "training" in record and is_complete(record, row):
            records[row_name] = record
    if len({json.dumps(record["settings"]) for record in records.values()}) > 1:
        raise ValueError(f"The rows in {str(out / name)!r} differ in their settings. Run them with the same options.")
    return records


def is_complete(record: Record, row: Row) -> bool:
    """Whether every estimate is there."""
    options = argparse.Namespace(**record["settings"])
    wanted = estimators_of(row, options, options.scored)
    lengths = {name: len(scored.get("estimate", ())) for name, scored in record["scores"].items()}
    return all(lengths.get(name) == estimator.num_images for name, estimator in wanted.items())


def mean(scored: Record) -> tuple[float, float]:
    """Mean estimate and its Monte Carlo error, in nats."""
    errors = np.array(scored["standard_error"])
    return float(np.mean(scored["estimate"])), float(np.sqrt((errors**2).sum())) / len(errors)


def error_of_mean(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def verdicts(scored: Record) -> str:
    """Shares of verdicts, the best first."""
    counts = [(word, scored["verdict"].count(word)) for word in ("exact", "good", "fair", "poor", "unresolved")]
    return ", ".join(f"{word} {count / len(scored['verdict']):.1%}" for word, count in counts if count)


def with_error(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.2f} ± {error:.2f}" if error >= 0.01 else f"{value:{sign}.3f} ± {error:.3f}"


def gain(record: Record) -> tuple[float, float]:
    """Best estimate minus the published estimator, and the joint Monte Carlo error."""
    (best, best_error), (encoder, encoder_error) = (mean(record["scores"][name]) for name in ("best", "encoder"))
    return best - encoder, math.hypot(best_error, encoder_error)


HEADER = (
    "story",
    "published",
    f"encoder, {DRAWS:,} draws",
    "its verdicts",
    "best estimate",
    "its verdicts",
    "best - encoder",
    "test-sampling error",
    "epochs",
)


def cells(row: Row, record: Record | None) -> list[str]:
    """A line of the table."""
    if record is None:
        return [row.label, f"{row.published:.2f}", "not run", *[""] * (len(HEADER) - 3)]
    scores, training = record["scores"], record["training"]
    return [
        row.label,
        f"{row.published:.2f}",
        with_error(*mean(scores["encoder"])),
        verdicts(scores["encoder"]),
        with_error(*mean(scores["best"])),
        verdicts(scores["best"]),
        with_error(*gain(record), sign="+"),
        f"{error_of_mean(np.array(scores['best']['estimate'])):.2f}",
        f"{training['epochs']} of {training['epochs_published']}",
    ]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    header, *others = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *others))


def printed(name: str, out: Path) -> str:
    """A table with its heading, and what else its numbers say."""
    table, records = TABLES[name], records_of(name, out)
    lines = [
        f"## {table.title}",
        markdown([HEADER, *(cells(row, records.get(key)) for key, row in table.rows.items())]),
    ]
    facts = [published_figures(table), *(facts_of(table, records) if records else ())]
    return "\n\n".join([*lines, "\n".join(f"- {fact}" for fact in facts)])


def published_figures(table: Protocol) -> str:
    """Who published what."""
    rows = [f"{row.label} by {row.source}, {row.draws:,} draws" for row in table.rows.values()]
    return f"Published: {'; '.join(rows)}."


def facts_of(table: Protocol, records: Mapping[str, Record]) -> Iterator[str]:
    """What was run, and what the finished rows say beside their means."""
    settings = next(iter(records.values()))["settings"]
    train, validation, test = settings["images"]
    yield (
        f"Run: {100 * settings['budget']:.3g} % of the published epochs, seed {settings['seed']}; {train:,} training, "
        f"{validation:,} validation and {settings['scored']:,} of {test:,} test images, binarized "
        f"{settings['binarization']}."
    )
    best = next(iter(records.values()))["scores"]["best"]
    yield f"Best estimate: method={best['method']!r}, up to {best['num_particles']:,} draws for each image."
    for key, record in records.items():
        yield f"{table.rows[key].label}: {'; '.join(details(table.rows[key], record))}."
    (first, base), *others = records.items()
    for key, record in others:
        yield paired(table.rows[key], record, table.rows[first], base)


def details(row: Row, record: Record) -> Iterator[str]:
    """Of one row: its training, and estimates for which the table has no column."""
    training, scores = record["training"], record["scores"]
    yield f"weights of epoch {training['best_epoch']}"
    if training["validation_elbo"] is not None:
        yield f"validation ELBO {training['validation_elbo']:.2f}"
    if "as published" in scores:
        yield f"encoder with {row.draws} draws as published {with_error(*mean(scores['as published']))}"
    if "annealed" in scores:
        size = len(scores["annealed"]["estimate"])
        best = {name: scores["best"][name][:size] for name in ("estimate", "standard_error")}
        (value, error), (other, other_error) = mean(scores["annealed"]), mean(best)
        difference = with_error(value - other, math.hypot(error, other_error), sign="+")
        yield f"annealed - {scores['best']['method']} on {size} of the images {difference}"
        yield f"annealed is {verdicts(scores['annealed'])}"


def paired(row: Row, record: Record, other: Row, base: Record) -> str:
    """The difference of two stories by their best estimates of the same images."""
    differences = np.subtract(record["scores"]["best"]["estimate"], base["scores"]["best"]["estimate"])
    value, error = float(differences.mean()), error_of_mean(differences)
    published = f" (published: {row.published - other.published:+.2f})" if row.source == other.source else ""
    return (
        f"{row.label} - {other.label}, paired over the images: {with_error(value, error, sign='+')} nats, "
        f"{value / error:+.1f} standard errors{published}."
    )


def in_all(out: Path) -> str:
    """What all finished rows say of the published estimator."""
    gains = [gain(record) for name in TABLES for record in records_of(name, out).values()]
    if not gains:
        return "No row was run yet."
    values, ratios = [value for value, _ in gains], [value / error for value, error in gains]
    return (
        f"In the rows that were run ({len(gains)}) the best estimate minus the published estimator lies between "
        f"{min(values):+.2f} and {max(values):+.2f} nats, and between {min(ratios):+.0f} and {max(ratios):+.0f} of its "
        "joint Monte Carlo errors."
    )


def page(out: Path) -> str:
    """The document: its prose, with the tables and what they say together."""
    tables = "\n\n".join(printed(name, out) for name in TABLES)
    return PAGE.replace("{tables}", tables).replace("{in_all}", in_all(out))


PAGE = """\
# Published tables, again

Published figures of log p(x) of MNIST digits, beside the same stories told in this package and trained as published.
Each row has three numbers: the published one; the published estimator, run again (importance sampling with 5,000 draws
of the encoder for each image); and the best estimate that was affordable. All are means over test images, in nats;
higher is better.

The lines under a table say what part of the published schedule was run. With a small part a row is far from its
published figure, and says nothing about it. What can be compared then are rows of one table, which had the same number
of epochs, the same seed and the same images; and each row with itself, estimated better. One seed each compares trained
stories, not families. A row that was "not run" waits in the script.

{in_all}
Both are estimates of the same quantity for the same trained story, so what lies between them is the error of the
published estimator, of which its own Monte Carlo error says little.

After ± stands the Monte Carlo error of a mean. The test-sampling error is how far another sample of as many test images
would move it; it is the one to keep in mind beside a published figure. Verdicts are shares of the images
([evidence.md](evidence.md#reading-the-table)): where one is poor the estimate is probably too low, whatever its error.

{tables}

## What was published, and what differs

- Static MNIST: the script of [Pythae](https://github.com/clementchadebec/benchmark_VAE). 784-400-40 and back, ReLU,
  batches of 100, Adam at 1e-4, divided by 10^(1/5) at the epochs 200 and 350 of 500, the weights of the best validation
  epoch. Its -89.78 comes from 200 draws, and stands for the -89.9 of
  [Rezende & Mohamed 2015](https://arxiv.org/abs/1505.05770). The VampPrior has the same schedule here; no figure is
  known to us for it with this network. The -85.57 of [Tomczak & Welling 2018](https://arxiv.org/abs/1705.07120) is that
  of the gated network of the next table.
- Dynamic MNIST: the code of Tomczak & Welling, the figures of
  [Norouzi, Fleet & Norouzi 2020](https://arxiv.org/abs/2004.04795), printed there with the errors 0.12 and 0.06.
  784-300-300-40 and back with gated layers, log variances between -6 and 2, probabilities between 1e-5 and 1 - 1e-5, He
  initialization, batches of 100, the gradient of every parameter divided by its norm before Adam at 5e-4, a warm-up of
  100 epochs, at most 2,000, ended by 50 without a better validation ELBO. Training digits are binarized anew for every
  batch, held-out ones once.
- Both VampPriors have 500 pseudo-inputs that start near the first 500 training images, an option of the published code
  (by default they start near 0.05). A sigmoid keeps them between 0 and 1; in the published code they are cut there.
- Importance-weighted: [Burda, Grosse & Salakhutdinov 2016](https://arxiv.org/abs/1509.00519). 784-200-200-50 and back,
  tanh, Glorot initialization, an output bias at the logit of the mean of each pixel, batches of 20, Adam with an
  epsilon of 1e-4 for the gradient of a batch's sum, and eight stages of 3^i epochs at rates from 1e-3 down to 1e-4. The
  gradient is the plain one. Test images are binarized once, as in the table before; there they were while they were
  scored.

`--budget` scales a schedule as a whole: its epochs, its warm-up, and the epochs at which rates change. Patience stays.

## Going on

Rows are kept one by one, a training goes on from its checkpoint, and scored images stay scored. Where a machine is lent
for ten minutes at a time, the same command is given again until its exit status is 0:

```sh
python scripts/reproduce.py dynamic --device cuda --minutes 9 --out runs/full
python scripts/reproduce.py dynamic --out runs/full --print
```

The same question about a story of your own, in small:

```python
import torch
from ppl_vae import VAE, compare, data, fit, likelihoods, posteriors, priors
from ppl_vae.networks import mlp

digits = data.load("digits")

def story(vamp):
    encoder = posteriors.DiagonalNormal(mlp((1, 8, 8), 64, 20))
    prior = priors.VampPrior(encoder, digits.train.x[:50], low=0.0, high=1.0) if vamp else priors.StandardNormal(10)
    return VAE(prior, likelihoods.Bernoulli(mlp(10, 64, (1, 8, 8))), encoder)

stories = {"N(0, I)": story(vamp=False), "VampPrior": story(vamp=True)}
for each in stories.values():
    fit(each, digits.train.x, validation=digits.validation.x, epochs=5, transform=torch.bernoulli)

x = digits.test.x[:32]
print(compare(stories, x, method="importance", num_particles=1000))   # as it is usually done
print(compare(stories, x))                                            # by the mixture
```
"""


# The command ----------------------------------------------------------------------------------------------------------


def run(name: str, options: argparse.Namespace, clock: Clock) -> None:
    """Does what the wanted rows of a table lack."""
    x = TABLES[name].images(options.data_root)
    for row_name in options.row or TABLES[name].rows:
        complete(name, row_name, x, options, clock)


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a fraction of the published schedule, above 0 and at most 1; found {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} up; found {text}")
        return int(text)

    return number


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--row", nargs="+", help="some rows only: normal, vamp; k1, k5, k50")
    parser.add_argument("--budget", type=fraction, default=1.0, help="fraction of the published schedule (all of it)")
    parser.add_argument("--test-limit", type=at_least(2), help="so many test images, evenly spaced (all)")
    parser.add_argument("--estimator", choices=("mixture", "auto", "annealed"), default="mixture", help="the best one")
    parser.add_argument(
        "--annealed", type=at_least(0), default=100, help="images that are also scored by annealing (100)"
    )
    parser.add_argument("--minutes", type=float, help="stop in time, to go on later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--data-root", type=Path, help="folder with MNIST/raw, and perhaps static_mnist.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--print", action="store_true", help="print what there is, without any work")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write all tables, with their prose")
    options = parser.parse_args(arguments)
    known = {row for name, table in TABLES.items() if options.table in (name, "all") for row in table.rows}
    if unknown := set(options.row or ()) - known:
        parser.error(f"{options.table} has no row {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    names, clock = list(TABLES) if options.table == "all" else [options.table], Clock(options.minutes)
    try:
        for name in () if options.print else names:
            run(name, options, clock)
        print("\n\n".join(printed(name, options.out) for name in names))
        if options.write:
            write_atomically(options.write, page(options.out).encode())
    except OutOfTimeError:
        print("reproduce: the time is over, and what was done is kept; the same command goes on", file=sys.stderr)
        return UNFINISHED
    except (ValueError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
