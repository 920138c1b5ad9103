"""Random calls of everything public, and of the command line: right answers, or exceptions that are documented.

    python scripts/fuzz.py --calls 10000 --seed 0        # one line for each outcome, then whatever was not expected
    python scripts/fuzz.py --seed 0 --call 1234          # one of these calls again, its exception let through

Every call is a function of the seed and its number. It is made in an empty folder, with a clock that stops it, little
memory, and temporary files where they are seen. Shapes, dtypes, sizes and values are odd on purpose (NaN, infinite,
subnormal, huge, of another type), files are damaged, and files without a checksum are forged as well.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import safetensors
import safetensors.torch
import torch
import xarray as xr
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae import (
    VAE,
    Evidence,
    check,
    checkpoint,
    cli,
    configuration,
    data,
    diagnostics,
    evidence,
    evidence_bounds,
    fit,
    likelihoods,
    load,
    log_evidence,
    networks,
    noise,
    objectives,
    plots,
    posteriors,
    priors,
    report,
    save,
    stories,
    to_arviz,
    traces,
)
from ppl_vae.configuration import CHOICES, METHODS, StoryConfiguration
from ppl_vae.evidence.result import VERDICTS
from ppl_vae.training import History

# Of these the docstrings speak; CaptureError is one of fit's, KeyboardInterrupt the user's own.
DOCUMENTED = (ValueError, TypeError, FloatingPointError, MemoryError, OSError, ImportError)
STATUSES = (0, 1, 2, 130)
MOST_MEMORY = 3 * 2**30
SLOWEST = 30

WHOLE = (0, 1, 2, 3, 5, -1, -7, 2**31, 2**63, -(2**63), 10**30, 10**400)
REAL = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e-320, 3e38, -1e308, math.nan, math.inf, -math.inf)
ODD: tuple[Any, ...] = (None, "", "two", True, 2.5, (), [], {}, b"x", np.int64(3), np.float32(0.5), np.nan, "é\0\n")
JSON_ODD = (None, True, "", "two", -1, 0, 1, 2.5, 10**400, -1e308, math.nan, math.inf, [], {}, [[[]]], {"name": "elbo"})
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
NEAR = (1, 2, 3, 4, 5)


class WrongAnswerError(Exception):
    """An answer that is none."""


class Hang(BaseException):
    """A call that took too long."""


def expect(condition: object, what: str) -> None:
    """Raises WrongAnswerError unless the condition holds."""
    if not bool(condition):
        raise WrongAnswerError(what)


@dataclass
class Draw:
    """The odd things that one call is made of."""

    random: random.Random
    folder: Path
    prepared: Path

    def one(self, *things: Any) -> Any:
        """One of some things."""
        return self.random.choice(things)

    def often(self, usual: Callable[[], Any], odd: Sequence[Any], share: float = 0.25) -> Any:
        """Mostly something usual, else one of the odd things, which may be of any type."""
        if self.random.random() >= share:
            return usual()
        return self.random.choice(odd)

    def whole(self, *usual: int, share: float = 0.2) -> Any:
        """Mostly one of these whole numbers."""
        return self.often(lambda: self.random.choice(usual or NEAR), (*WHOLE, *WHOLE, *ODD), share)

    def real(self, *usual: float, share: float = 0.2) -> Any:
        """Mostly one of these real numbers."""
        return self.often(lambda: self.random.choice(usual or (0.1, 0.5, 1.0, 2.0)), (*REAL, *REAL, "two", None), share)

    def some(self, options: dict[str, Callable[[], Any]], share: float = 0.3) -> dict[str, Any]:
        """Some of these options, each drawn."""
        return {name: make() for name, make in options.items() if self.random.random() < share}

    def generator(self) -> torch.Generator:
        """A stream of its own."""
        return torch.Generator().manual_seed(self.random.getrandbits(40))

    def tensor(self, *shape: int) -> Tensor:
        """Numbers of this shape with something odd about them."""
        x = torch.randn(shape, generator=self.generator()) * self.one(1.0, 1.0, 1e-40, 1e30, 0.0)
        if x.numel():
            place = self.random.randrange(x.numel())
            x.view(-1)[place] = self.random.choice((*REAL[:8], math.nan, math.inf, -math.inf, 0.0))
        x = x.to(self.one(*DTYPES, torch.float32, torch.float32, torch.complex64))
        return self.one(x, x, x, x[:0], x.t() if x.dim() == 2 else x, x.unsqueeze(0), x.sum(), x.to_sparse())

    def shape(self) -> tuple[int, ...]:
        """The shape of an observation."""
        return self.one((), (1,), (3,), (4,), (4,), (1, 2, 2), (1, 4, 4), (2, 3), (0,), (3, 0))

    def seed(self) -> Any:
        """A seed, mostly."""
        return self.often(lambda: self.random.randrange(5), (-1, 2**63, 10**30, 2.5, "seed", None), 0.1)


# Stories and their data -----------------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "categorical": {"classes": 3},
    "discretized-logistic": {"levels": 4},
    "mixture-of-discretized-logistics": {"levels": 4, "components": 2},
    "binomial": {"total_count": 3},
    "by-column": {"columns": ["2*normal", "poisson", "categorical:3"]},
    "mixture": {"components": 2},
    "vamp": {"components": 3},
    "per-class": {"num_labels": 2},
    "realnvp": {"num_layers": 2, "hidden_dims": [4]},
    "splines": {"num_layers": 1, "hidden_dims": [4]},
    "inverse-autoregressive": {"num_layers": 1, "context_dim": 2},
    "autoregressive-splines": {"num_layers": 1, "context_dim": 2},
    "mlp": {"hidden_dims": [4]},
    "convolutional": {"channels": [2]},
}


def small(word: str) -> dict[str, Any]:
    """A part of a story, of a size that costs little."""
    return {"name": word} | SMALL.get(word, {})


def table_of_story(draw: Draw) -> dict[str, Any]:
    """The configuration of a story, as JSON; all of them fit together but for a few."""
    parts = {slot: draw.one(*CHOICES[slot]) for slot in ("prior", "likelihood", "posterior")}
    if draw.random.random() < 0.5:
        parts |= {"prior": "standard-normal", "posterior": "diagonal-normal"}
    event = [4] if parts["likelihood"] == "by-column" else draw.one([4], [4], [1, 4, 4], [3])
    network = "convolutional" if len(event) == 3 and draw.random.random() < 0.5 else "mlp"
    table: dict[str, Any] = {slot: small(word) for slot, word in (parts | {"network": network}).items()}
    return table | {"event_shape": event, "latent_dim": draw.one(1, 2, 2, 3)}


def fitting(draw: Draw, table: dict[str, Any], rows: int) -> Tensor:
    """Observations in the support of a story's likelihood."""
    u = torch.rand(rows, *table["event_shape"], generator=draw.generator()).clamp(0.01, 0.99)
    word = table["likelihood"]["name"]
    if word == "by-column":
        return torch.stack([u[:, 0], u[:, 1], *(u[:, 2:] * 3).floor().unbind(1)], 1)
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "bernoulli": torch.round,
        "continuous-bernoulli": lambda u: u,
        "beta": lambda u: u,
        "log-normal": lambda u: u * 3,
        "discretized-logistic": lambda u: (u * 3).round() / 3,
        "mixture-of-discretized-logistics": lambda u: (u * 3).round() / 3,
        "categorical": lambda u: (u * 3).floor(),
        "binomial": lambda u: (u * 3).round(),
    }
    counts = any(part in word for part in ("poisson", "negative"))
    return made.get(word, lambda u: (u * 5).floor() if counts else u.logit())(u)


def story_and_columns(draw: Draw) -> tuple[Any, tuple[Any, ...]]:
    """A story with data that mostly suit it; a story that is no good now and then."""
    rows = draw.one(2, 3, 4, 5)
    table = table_of_story(draw)
    if draw.random.random() < 0.1:
        story: Any = draw.one(Plain, NoPlate, NoGuideSite, WideGuide)()
        columns: tuple[Any, ...] = (torch.randn(rows, generator=draw.generator()),)
    else:
        story = configuration.build(configuration.from_json(table), draw.random.randrange(100))
        columns = (fitting(draw, table, rows),)
    if draw.random.random() < 0.08:
        columns = (draw.tensor(rows, *draw.shape()),)
    if draw.random.random() < 0.05:
        columns = draw.one((), (*columns, *columns), (None,), ([[1.0]],), (columns[0], torch.arange(rows)))
    if draw.random.random() < 0.05:
        story = story.to(draw.one(torch.float64, torch.bfloat16, torch.float16))
    return story, columns


class Plain(nn.Module):
    """z ~ Normal(0, 1), x ~ Normal(z, 1): a story of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))


class NoPlate(Plain):
    """It forgets the plate."""

    def model(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, self.scale), obs=x)


class NoGuideSite(Plain):
    """Its guide draws nothing."""

    def guide(self, x: Tensor) -> None:
        pass


class WideGuide(Plain):
    """The scale of its guide is infinite where x is large, and zero where it is small."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.exp(200 * x)))


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged(draw: Draw, content: bytes) -> bytes:
    """The content of a file after something happened to it."""
    place = draw.random.randrange(len(content) + 1)
    length = draw.one(1, 4, 64, 1000)
    noise_of = draw.random.randbytes(length)
    kinds: dict[str, Callable[[], bytes]] = {
        "flip": lambda: flipped(content, place, draw.random.randrange(8)),
        "cut": lambda: content[:place],
        "behead": lambda: content[place:],
        "append": lambda: content + noise_of,
        "overwrite": lambda: content[:place] + noise_of + content[place + length :],
        "insert": lambda: content[:place] + noise_of + content[place:],
        "zero": lambda: content[:place] + bytes(length) + content[place + length :],
        "ones": lambda: content[:place] + b"\xff" * length + content[place + length :],
        "empty": lambda: b"",
        "noise": lambda: noise_of,
        "nested": lambda: b"[" * 100_000,
        "twice": lambda: content + content,
    }
    return kinds[draw.one(*kinds, "flip", "flip", "overwrite")]()


def flipped(content: bytes, place: int, bit: int) -> bytes:
    """The content with one bit turned over."""
    if place >= len(content):
        return content
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def forged(draw: Draw, tree: Any) -> Any:
    """JSON with something else at one place."""
    tree = copy.deepcopy(tree)
    holder, key = None, None
    node: Any = tree
    while isinstance(node, dict | list) and node and (holder is None or draw.random.random() < 0.8):
        holder, key = node, draw.random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[cast(Any, key)]
    if holder is None:
        return draw.one(*JSON_ODD)
    kind = draw.random.random()
    if kind < 0.2:
        del holder[cast(Any, key)]
    elif kind < 0.3 and isinstance(holder, dict):
        holder[draw.one("name", "file", "__class__", "x" * 50, "")] = node
    else:
        holder[cast(Any, key)] = draw.one(*JSON_ODD)
    return tree


def text_of(tree: Any) -> str:
    """JSON, or what Python takes for it."""
    return json.dumps(tree)


def forge_table(draw: Draw, path: Path) -> None:
    """A netCDF table with a variable or an attribute that is missing, or is another."""
    with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
        table = file.load().drop_encoding()
    names = [*table.variables]
    attrs = list(table.attrs)
    kind = draw.random.randrange(5)
    if kind == 0 and names:
        table = table.drop_vars(draw.one(*names))
    elif kind == 1 and attrs:
        table.attrs.pop(draw.one(*attrs))
    elif kind == 2 and attrs:
        table.attrs[draw.one(*attrs)] = draw.one("two", -1, 0, math.nan, "é", 2.5, [1, 2, 3], "[" * 5000)
    elif kind == 3 and names:
        name = draw.one(*names)
        other: Any = draw.one(np.nan, "two", -1, np.inf)
        table = table.assign({name: (table[name].dims, np.full(table[name].shape, other))})
    elif table.sizes:
        table = table.isel({draw.one(*table.sizes): slice(0, draw.one(0, 1))})
    table.to_netcdf(path, engine="h5netcdf")


def forge_checkpoint(draw: Draw, path: Path) -> None:
    """A checkpoint whose words, or tensors, are others, under a checksum that is right."""
    with safetensors.safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {})["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if draw.random.random() < 0.6:
        said = forged(draw, said)
    elif tensors:
        name = draw.one(*tensors)
        other = [torch.zeros(0), torch.tensor(math.nan), torch.ones(2, 2), tensors[name].double() * math.inf]
        tensors[draw.one(name, "story/other", "optimizer/0/other", "optimizer/x", "best/y")] = draw.one(*other)
    if isinstance(said, dict):
        said["sha256"] = checkpoint.BLANK
        said = {"sha256": said.pop("sha256"), **said}
    content = safetensors.torch.save(tensors, {"about": text_of(said)})
    path.write_bytes(checkpoint.sealed(content) if checkpoint.BEFORE_CHECKSUM in content else content)


# What is called: parts of stories -------------------------------------------------------------------------------------


def distribution_of(made: Any, *arguments: Any) -> Tensor:
    """The log density of a draw; both are numbers."""
    p = made(*arguments)
    draws = p.sample()
    log_prob = p.log_prob(draws)
    expect(not log_prob.isnan().any(), "the log density of a draw is NaN")
    expect(log_prob.shape == p.batch_shape, "a log density of another shape than the batch")
    return log_prob.detach()


def call_prior(draw: Draw) -> object:
    dim = draw.whole(1, 2, 3)
    floor = draw.some({"floor": lambda: draw.real(1e-3, 0.0, 0.5)})
    encoder = posteriors.DiagonalNormal(networks.mlp(4, 4))
    kinds: dict[str, Callable[[], Any]] = {
        "StandardNormal": lambda: priors.StandardNormal(dim),
        "Normal": lambda: priors.Normal(dim, **floor),
        "Laplace": lambda: priors.Laplace(dim),
        "StudentT": lambda: priors.StudentT(dim, draw.real(0.5, 3.0, 100.0)),
        "Uniform": lambda: priors.Uniform(dim, draw.real(-1.0, 0.0), draw.real(1.0, 2.0)),
        "MixtureOfNormals": lambda: priors.MixtureOfNormals(dim, draw.whole(1, 3), **floor),
        "PerClass": lambda: priors.PerClass(dim, draw.whole(1, 3), **floor),
        "VampPrior": lambda: priors.VampPrior(
            encoder, draw.often(lambda: torch.rand(3, 4), (draw.tensor(3, 4),)), *draw.one((), (0.0, 1.0), (1.0, 0.0))
        ),
        "realnvp": lambda: priors.Flow(dim, priors.realnvp(dim, draw.one(1, 2, 0, -1), (4,))),
        "splines": lambda: priors.Flow(dim, priors.splines(dim, 1, (4,), draw.whole(2, 4), draw.real(3.0))),
        "Fixed": lambda: priors.Fixed(
            draw.one(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.distributions.Normal(0.0, 1.0), None)
        ),
    }
    return distribution_of(kinds[draw.one(*kinds)]())


def parameter(draw: Draw, network: Callable[[], nn.Module]) -> Any:
    """A parameter of a likelihood: fixed, learned or predicted."""
    return draw.one(
        draw.real(0.3, 1.0, share=0.4),
        lambda: likelihoods.learned(draw.real(0.3, 1.0)),
        lambda: torch.rand(4, generator=draw.generator()) + 0.1,
        network,
    )


def call_likelihood(draw: Draw) -> object:
    def network(*last: int) -> nn.Module:
        return networks.mlp(2, (4, *last) if last else 4)

    def value() -> Any:
        made = parameter(draw, network)
        return made() if callable(made) else made

    floor = draw.some({"floor": lambda: draw.real(1e-3, 0.1)}, 0.2)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "Bernoulli": lambda: likelihoods.Bernoulli(network()),
        "Normal": lambda: likelihoods.Normal(network(), value(), **floor),
        "Laplace": lambda: likelihoods.Laplace(network(), value(), **floor),
        "StudentT": lambda: likelihoods.StudentT(network(), value(), draw.real(2.0, 5.0), **floor),
        "LogNormal": lambda: likelihoods.LogNormal(network(), value(), **floor),
        "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(network(), **floor),
        "Beta": lambda: likelihoods.Beta(network(), value(), **floor),
        "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(network(), value(), draw.whole(2, 16)),
        "Mixture": lambda: likelihoods.MixtureOfDiscretizedLogistics(network(2), network(2), 0.1, draw.whole(2, 16)),
        "Binomial": lambda: likelihoods.Binomial(network(), draw.whole(1, 3)),
        "Categorical": lambda: likelihoods.Categorical(network(3)),
        "Poisson": lambda: likelihoods.Poisson(network()),
        "NegativeBinomial": lambda: likelihoods.NegativeBinomial(network(), value(), **floor),
        "ZeroInflatedPoisson": lambda: likelihoods.ZeroInflatedPoisson(network(), draw.real(0.1, 0.5, share=0.5)),
        "ZeroInflatedNegativeBinomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(network(), 0.5, value()),
        "ByColumn": lambda: likelihoods.ByColumn(
            *draw.one((), (likelihoods.Poisson(network()),), (likelihoods.Normal(networks.mlp(2, 1), 0.1),) * 2)
        ),
    }
    made = kinds[draw.one(*kinds)]()
    return distribution_of(made, torch.randn(3, 2, generator=draw.generator()) * draw.one(1.0, 100.0))


def call_posterior(draw: Draw) -> object:
    dim, floor = draw.one(1, 2, 3), draw.some({"floor": lambda: draw.real(1e-4, 0.1, share=0.3)}, 0.2)
    width, components = draw.one(*NEAR, 6, 8), draw.one(1, 2, 3)
    net = networks.mlp(4, width)
    layers = draw.one(0, 1, 2)
    kinds: dict[str, Callable[[], Any]] = {
        "DiagonalNormal": lambda: posteriors.DiagonalNormal(networks.mlp(4, 2 * dim), **floor),
        "FullNormal": lambda: posteriors.FullNormal(net, **floor),
        "MixtureOfNormals": lambda: posteriors.MixtureOfNormals(net, draw.whole(1, 2), **floor),
        "right mixture": lambda: posteriors.MixtureOfNormals(networks.mlp(4, components * (1 + 2 * dim)), components),
        "Flow": lambda: posteriors.Flow(
            networks.mlp(4, 2 * dim + 2), dim, posteriors.inverse_autoregressive(dim, 2, layers, (draw.whole(4),))
        ),
        "splines": lambda: posteriors.Flow(
            networks.mlp(4, 2 * dim + 2), dim, posteriors.splines(dim, 2, layers, (4,), draw.whole(2, 4), draw.real())
        ),
        "Box": lambda: posteriors.Box(
            posteriors.DiagonalNormal(networks.mlp(4, 2 * dim)), draw.real(-1.0), draw.real(1.0)
        ),
    }
    x = torch.randn(3, 4, generator=draw.generator()) * draw.one(1.0, 1.0, 1e3)
    return distribution_of(kinds[draw.one(*kinds)](), x)


def call_network(draw: Draw) -> object:
    shape = draw.often(lambda: draw.one(4, (1, 4, 4), (2, 3)), (0, -1, (), (0,), "two", 2.5, (1, 2.5), [4], 10**30))
    kind = draw.one("mlp", "encoder", "decoder", "labels", "shape")
    if kind == "mlp":
        network = networks.mlp(shape, draw.whole(4), draw.whole(2))
    elif kind == "encoder":
        network = networks.convolutional_encoder(shape, *draw.one((), (2,), (2, 3), (0,), (-1,)), output=draw.whole(2))
    elif kind == "decoder":
        network = networks.convolutional_decoder(draw.whole(2), *draw.one((), (2,), (2, 3), (0,)), image=shape)
        first = cast(nn.Linear, network.get_submodule("network.0"))
        return network(torch.zeros(2, first.in_features)).shape
    elif kind == "labels":
        network = networks.WithLabels(networks.mlp(4 + 3, 2), 3)
        return network(torch.zeros(2, 4), torch.tensor(draw.one([0, 2], [0, 1], [1, 1]))).shape
    else:
        return networks.as_shape(shape)
    event = (shape,) if isinstance(shape, int) else tuple(shape)
    return network(torch.zeros(2, *event)).shape


def call_story_part(draw: Draw) -> object:
    def encoder(width: int = 4) -> nn.Module:
        return posteriors.DiagonalNormal(networks.mlp(width, 4))

    prior, decoder = priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, 4))
    labelled = likelihoods.Bernoulli(networks.WithLabels(networks.mlp(2 + 3, 4), 3))
    x = torch.ones(3, 4)
    kinds: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
        "VAE": lambda: (VAE(draw.one(prior, dist.Normal(torch.zeros(2), 1.0).to_event(1)), decoder, encoder()), (x,)),
        "ConditionalVAE": lambda: (
            stories.ConditionalVAE(
                prior, labelled, posteriors.DiagonalNormal(networks.WithLabels(networks.mlp(4 + 3, 4), 3))
            ),
            (x, draw.often(lambda: torch.tensor([0, 1, 2]), (torch.tensor([0, 1, 3]), torch.tensor([0.5, 1, 2])))),
        ),
        "DenoisingVAE": lambda: (stories.DenoisingVAE(prior, decoder, encoder(), torch.neg), (x,)),
        "HierarchicalVAE": lambda: (
            stories.HierarchicalVAE(
                prior,
                [posteriors.DiagonalNormal(networks.mlp(2, 4))] * draw.one(0, 1),
                decoder,
                [encoder(), encoder(2)],
            ),
            (x,),
        ),
        "MissingValuesVAE": lambda: (
            stories.MissingValuesVAE(prior, decoder, encoder(), draw.real(0.0)),
            (torch.where(x.cumsum(0) > 2, torch.nan, x), x.cumsum(0) <= draw.one(2, 2, 3)),
        ),
        "PerClassVAE": lambda: (
            stories.PerClassVAE(
                priors.PerClass(2, 3),
                decoder,
                posteriors.DiagonalNormal(networks.WithLabels(networks.mlp(4 + 3, 4), 3)),
            ),
            (x, torch.tensor([0, 1, draw.one(2, 2, 3, -1)])),
        ),
    }
    story, columns = kinds[draw.one(*kinds)]()
    check(story, *columns)
    found = log_evidence(story, *columns, method="importance", num_particles=5, compile=False)
    expect(np.isfinite(found["estimate"].values).all(), "evidence that is not finite")
    return found["estimate"].values


def call_objective(draw: Draw) -> object:
    particles = {"num_particles": draw.whole(1, 2)}
    kinds: dict[str, Callable[[], Any]] = {
        "free bits": lambda: objectives.FreeBitsELBO(draw.real(0.1, 0.0), **draw.one({}, particles)),
        "importance": lambda: objectives.ImportanceWeightedELBO(**particles),
        "Renyi": lambda: objectives.RenyiELBO(draw.real(0.5, 0.0), **particles),
        "summed": lambda: objectives.SummedOutELBO(**draw.one({}, particles)),
    }
    loss = kinds[draw.one(*kinds)]()
    story, x = Plain(), torch.tensor([0.0, 1.0])
    value = loss.loss(story.model, story.guide, x)
    expect(math.isfinite(value), f"a loss of {value}")
    return value


def call_noise(draw: Draw) -> object:
    seed = draw.seed()
    number = noise.unit_seed(seed, noise.Purpose.CHECK, draw.often(lambda: draw.random.randrange(9), (0, 2**40), 0.1))
    expect(0 <= number < 2**64, "a seed outside of its range")
    return noise.permutation(draw.one(0, 1, 9), seed).tolist()


# What is called: configurations and files -----------------------------------------------------------------------------


def call_from_json(draw: Draw) -> object:
    run = json.loads((draw.prepared / "plane" / "config.json").read_text())
    run = {part: run[part] for part in ("data", "story", "training")}
    tables = {
        StoryConfiguration: table_of_story(draw),
        configuration.RunConfiguration: run,
        configuration.TrainingConfiguration: run["training"],
        configuration.DataConfiguration: run["data"],
        configuration.EvidenceConfiguration: {"method": "auto", "tolerance": 0.1, "limit": 3},
        configuration.DiagnosisConfiguration: {"limit": 3, "sections": ["guide"]},
    }
    kind = draw.one(*tables)
    table = tables[kind]
    for _ in range(draw.one(0, 1, 1, 2)):
        table = forged(draw, table)
    made = configuration.from_json(table, kind)
    expect(repr(configuration.from_json(configuration.to_json(made), kind)) == repr(made), "it does not come back")
    configuration.to_arguments(made)
    return repr(made)


def call_build(draw: Draw) -> object:
    table = table_of_story(draw)
    for _ in range(draw.one(0, 1, 2)):
        table = forged(draw, table)
    story = configuration.build(configuration.from_json(table), draw.seed())
    x = traces.draws(traces.prior_predictive(story, 2))["x"]
    expect(tuple(x.shape) == (2, *table["event_shape"]), "draws of another shape than the event")
    return x.detach()


def saved_story(draw: Draw) -> tuple[Any, Path]:
    story = configuration.build(configuration.from_json(table_of_story(draw)))
    path = draw.folder / draw.one("story", "a b.safetensors", ".hidden", "é")
    save(story, path)
    return story, path


def call_checkpoint(draw: Draw) -> object:
    story, path = saved_story(draw)
    before = {name: tensor.clone() for name, tensor in story.state_dict().items()}
    kind = draw.one("whole", "damaged", "damaged", "forged", "forged", "elsewhere")
    if kind == "damaged":
        content = path.read_bytes()
        path.write_bytes(other := damaged(draw, content))
        kind = "whole" if other == content else kind
    if kind == "forged":
        forge_checkpoint(draw, path)
    if kind == "elsewhere":
        path = draw.one(draw.folder, draw.folder / "none", draw.folder / "none" / "none", path / "x")
    back = load(path, **draw.one({}, {"story": story}, {"story": Plain()}, {"device": "cpu"}))
    if kind != "forged":
        expect(kind == "whole", "a damaged checkpoint was loaded")
        state = back.state_dict()
        expect(all(torch.equal(state[name], t) for name, t in before.items()), "other weights came back")
    return list(back.state_dict())


def call_save(draw: Draw) -> object:
    story, _ = saved_story(draw)
    path = draw.one(draw.folder, draw.folder / "none" / "x", draw.folder / ("x" * 300), draw.folder / "fine")
    save(story, path)
    return [torch.equal(a, b) for a, b in zip(load(path).parameters(), story.parameters(), strict=True)]


def call_data_of_arrays(draw: Draw) -> object:
    rows = draw.one(0, 1, 2, 3, 10, 20)
    x: Any = draw.often(lambda: torch.rand(rows, *draw.shape(), generator=draw.generator()), (draw.tensor(rows, 3),))
    x = x() if callable(x) else x
    if isinstance(x, Tensor) and not x.is_sparse and x.dtype != torch.bfloat16 and draw.random.random() < 0.5:
        x = x.numpy().astype(draw.one("f4", "f8", "u1", "i8", "f2", "O", "U", "c16", ">f8", "longdouble"))
    labels = draw.often(lambda: np.arange(rows) % 3, (np.ones((rows, 2)), ["a"] * rows, [1.5] * rows, [None] * rows))
    made = data.load(draw.one(x, (x, labels)), **options_of_data(draw))
    return the_data(made)


def options_of_data(draw: Draw) -> dict[str, Any]:
    return draw.some(
        {
            "binarization": lambda: draw.one("none", "static", "dynamic", "maybe", None),
            "counts": lambda: draw.one(True, False),
            "standardize": lambda: draw.often(lambda: "real", ((0,), (-1, "b"), (10**30,), ("a",), (math.nan,)), 0.7),
            "seed": draw.seed,
            "validation": lambda: draw.one(1, 2, 0.1, 0.5, 0, -1, math.nan, 1.0, 10**30, True, "1"),
            "test": lambda: draw.one(1, 2, 0.1, 0.5, 0, -1, math.inf, 1.5, 10**30, np.int64(1)),
            "label_column": lambda: draw.one("label", 0, -1, 99, 10**30, ""),
        },
        0.15,
    )


def the_data(made: data.Dataset) -> object:
    """What a data set is; a WrongAnswerError where its splits do not fit together."""
    sizes = [len(split.x) for split in made.splits.values()]
    expect(min(sizes) > 0, "a split is empty")
    order = torch.cat(list(made.indices.values())).sort().values
    expect(torch.equal(order, torch.arange(sum(sizes))), "rows are missing, or there twice")
    expect(all(split.x.dtype in (torch.float32, torch.float64) for split in made.splits.values()), "another dtype")
    return repr(made), made.fingerprint, text_of(made.record)


def call_data_of_files(draw: Draw) -> object:
    rows = draw.one(3, 12)
    x = np.random.default_rng(draw.random.getrandbits(32)).random((rows, 3)).astype(draw.one("f4", "f8", "i2"))
    kind = draw.one("npy", "npz", "csv", "parquet", "images", "idx")
    path = draw.folder / f"x.{kind}"
    options = options_of_data(draw)
    if kind == "npy":
        np.save(path, x.astype(draw.one(x.dtype, ">f8", "f2", "U", "c8", "?")))
    elif kind == "npz":
        np.savez(path, **draw.one({"x": x}, {"x": x, "labels": np.arange(rows)}, {"y": x}, {"x": x, "labels": x}))
    elif kind == "csv":
        lines = [",".join(map(str, row)) for row in x.tolist()]
        path.write_text("\n".join([draw.one("a,b,label", "a,b,c", ",b,c", "1,2,3", ""), *lines]))
    elif kind == "parquet":
        write_parquet(path, x)
    elif kind == "images":
        path = images_in(draw)
    else:
        return the_data(data.load("mnist", root=official(draw), validation=3, binarization="none"))
    if path.is_file() and draw.random.random() < 0.8:
        path.write_bytes(damaged(draw, path.read_bytes()))
    return the_data(data.load(draw.one(path, str(path)), **options))


def write_parquet(path: Path, x: np.ndarray) -> None:
    import pandas as pd

    pd.DataFrame(x, columns=["a", "b", "label"]).to_parquet(path)


def images_in(draw: Draw) -> Path:
    """A folder of images, some of which are not what they were."""
    from PIL import Image

    folder = draw.folder / "images"
    for number in range(5):
        inside = folder / draw.one("", "a", "b") if draw.random.random() < 0.1 else folder / str(number % 2)
        inside.mkdir(parents=True, exist_ok=True)
        size = (4, 4) if draw.random.random() < 0.95 else draw.one((4, 5), (1, 1))
        image = Image.new(draw.one(*["L"] * 20, "RGB", "1", "I;16", "RGBA", "P"), size)
        file = inside / f"{number}.{draw.one('png', 'png', 'bmp', 'jpg', 'tif') if image.mode != 'RGBA' else 'png'}"
        with contextlib.suppress(OSError):
            image.save(file)
            if draw.random.random() < 0.1:
                file.write_bytes(damaged(draw, file.read_bytes()))
    if draw.random.random() < 0.1:
        (folder / "link.png").symlink_to("/etc/hostname")
    return folder


def official(draw: Draw) -> Path:
    """The four files of MNIST, smaller, one of them damaged; the folder that holds them."""
    root = draw.folder / "root"
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, rows in (("train", 30), ("t10k", 10)):
        images = struct.pack(">iiii", 0x803, rows, 4, 4) + bytes(rows * 16)
        classes = struct.pack(">ii", 0x801, rows) + bytes(number % 10 for number in range(rows))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(classes)
    file = draw.one(*sorted(raw.iterdir()))
    file.write_bytes(damaged(draw, file.read_bytes()))
    return root


def call_evidence_file(draw: Draw) -> object:
    path = draw.folder / "evidence.nc"
    shutil.copy(draw.prepared / "plane" / "evidence-test.nc", path)
    if draw.random.random() < 0.5:
        path.write_bytes(damaged(draw, path.read_bytes()))
    else:
        forge_table(draw, path)
    found = Evidence.load(path)
    found.save(draw.folder / draw.one("again.nc", "again.csv", "again.txt"))
    return str(found), repr(found.bits_per_dimension.dtype), found.flagged.tolist()


# What is called: training, evidence, diagnostics ----------------------------------------------------------------------


def call_check(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    check(story, *columns, **draw.some({"transform": lambda: draw.one(torch.bernoulli, torch.log, torch.sum)}, 0.2))
    return None


def call_fit(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    folder = draw.folder / "checkpoints"
    options: dict[str, Any] = draw.some(
        {
            "validation": lambda: draw.one(columns, columns, columns[:1], torch.zeros(2, 9), ()),
            "batch_size": lambda: draw.whole(1, 2, 3),
            "loss": lambda: draw.one(None, objectives.RenyiELBO(0.5, 2), TraceMeanField_ELBO()),
            "optimizer": lambda: partial(torch.optim.Adam, lr=draw.one(1e-3, 1e-3, 1e30, 0.0, math.nan, -1.0)),
            "transform": lambda: draw.one(torch.bernoulli, torch.neg, torch.log),
            "mixed_precision": lambda: draw.one(True, False),
            "kl_warmup": lambda: draw.whole(0, 1, 2),
            "beta": lambda: draw.one(draw.real(), {"z": 0.5}, {"y": 1.0}),
            "free_bits": lambda: draw.one(draw.real(), {"z": 0.5}, None),
            "schedule": lambda: partial(torch.optim.lr_scheduler.StepLR, step_size=1),
            "clip": lambda: draw.real(1.0, 10.0),
            "patience": lambda: draw.one(1, 1, 0, -1, 10**30),
            "seed": draw.seed,
            "device": lambda: draw.one("cpu", "nowhere", "cuda:99", "meta"),
            "checkpoints": lambda: draw.one(folder, folder, draw.folder / "none" / "x" / "y"),
            "checkpoint_every": lambda: draw.one(0.0, 60.0, math.nan, -1.0),
            "resume": lambda: draw.one(folder, draw.folder / "none"),
        },
        0.12,
    )
    engine = draw.one(*["svi", "auto", "captured"] * 5, "none")
    history = fit(
        story, *columns, epochs=draw.often(lambda: draw.one(1, 2), (0, -1, 2.5, None), 0.05), engine=engine, **options
    )
    expect(isinstance(history, History) and len(history) > 0, "no history")
    expect(all(parameter.isfinite().all() for parameter in story.parameters()), "weights that are not finite")
    return history["train_elbo"], [parameter.detach().clone() for parameter in story.parameters()]


def call_resume(draw: Draw) -> object:
    """Goes on with a checkpoint after something happened to it."""
    folder = draw.folder / "checkpoints"
    story, x = (
        configuration.build(
            configuration.from_json(
                table_of_story(draw) | {"event_shape": [4], "network": small("mlp"), "likelihood": small("normal")}
            )
        ),
        torch.linspace(-1, 1, 16),
    )
    x = x.reshape(4, 4)
    settings: dict[str, Any] = {"engine": draw.one("svi", "captured"), "batch_size": 2, "validation": (x,)}
    settings |= draw.some({"schedule": lambda: partial(torch.optim.lr_scheduler.StepLR, step_size=1)})
    fit(story, x, epochs=1, checkpoints=folder, checkpoint_every=draw.one(0.0, 60.0), **settings)
    for file in folder.iterdir():
        if (kind := draw.random.random()) < 0.2:
            file.write_bytes(damaged(draw, file.read_bytes()))
        elif kind < 0.9:
            forge_checkpoint(draw, file)
    history = fit(story, x, epochs=draw.one(1, 2, 3), resume=draw.one(folder, *folder.iterdir()), **settings)
    return len(history), history.best_epoch


def call_log_evidence(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    methods: list[Any] = [*METHODS, "none", evidence.Annealed(num_temperatures=3), evidence.Annealed(0, start="prior")]
    method = draw.one(*methods, *["importance"] * 6, "elbo", "prior")
    if method == "annealed":
        method = evidence.Annealed(num_temperatures=draw.one(2, 5), num_leapfrog=draw.one(1, 2))
    options = draw.some(
        {
            "tolerance": lambda: draw.real(0.1, 1.0),
            "correction": lambda: draw.one("jackknife", "jackknife-2", "pareto", "none", ""),
            "seed": draw.seed,
            "device": lambda: draw.one("cpu", "nowhere", "cuda:99"),
            "model_dtype": lambda: draw.one(torch.bfloat16, torch.float16, torch.int64),
        },
        0.12,
    )
    num_particles = draw.one(
        1, 2, 5, 50, 5, 50, 0, -1, None if method in ("auto", "quadrature", "exact", "elbo") else 7
    )
    settings: dict[str, Any] = {"num_particles": num_particles, "budget": draw.one(2000, 20_000, 1, 0)} | options
    found = log_evidence(story, *columns, method=method, compile=False, **settings)
    return the_evidence(found, len(columns[0]))


def the_evidence(found: Evidence, rows: int) -> object:
    """The estimates; a WrongAnswerError where the table is none."""
    estimate, error = found["estimate"].values, found["standard_error"].values
    expect(estimate.shape == (rows,), "not one estimate for each observation")
    expect((np.isfinite(estimate) | np.isneginf(estimate)).all(), f"estimates of {estimate}")
    expect((np.isnan(error) | (error >= 0)).all(), f"errors of {error}")
    expect(set(found["verdict"].values) <= set(VERDICTS), "an unknown verdict")
    expect(isinstance(str(found), str), "nothing to print")
    return estimate


def call_bounds(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    annealed = evidence.Annealed(num_temperatures=2, num_leapfrog=1)
    method = draw.one("importance", "importance", "laplace", "mixture", annealed, "none", "prior")
    number = draw.often(lambda: draw.one(1, 3), (0, -1))
    made = evidence_bounds(
        story,
        *draw.one((), columns),
        num_observations=number,
        method=method,
        num_particles=draw.one(1, 5, 5, 5, 0),
        seed=draw.seed(),
    )
    expect(made["lower"].shape == (number,) and str(made), "no bounds")
    return made["lower"].values, made["upper"].values


def call_compare(draw: Draw) -> object:
    table = table_of_story(draw)
    story, other = (configuration.build(configuration.from_json(table), seed) for seed in (0, 1))
    columns = (fitting(draw, table, 3),) if draw.random.random() < 0.8 else story_and_columns(draw)[1]
    named = draw.one({"a": story, "b": other}, {"a": story, "b": other}, {"a": story, "b": Plain()}, {"a": story})
    method = draw.one("importance", "prior", "elbo", "quadrature", "none")
    compared = evidence.compare(named, *columns, method=method, num_particles=draw.one(1, 5, 20), seed=draw.seed())
    expect(str(compared), "nothing to print")
    return compared["mean"].values


def call_convergence(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    method = draw.one("importance", "prior", "none", "laplace")
    table = evidence.convergence(story, *columns, method=method, num_particles=draw.one(1, 200, 0))
    return table["estimate"].values


def call_diagnostic(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    few = {"seed": draw.seed()} if draw.random.random() < 0.3 else {}
    draws = draw.often(lambda: draw.one(2, 3, 8), (0, 1, -1))
    kinds: dict[str, Callable[[], Any]] = {
        "calibration": lambda: diagnostics.calibration(
            story, *columns, num_observations=draw.one(1, 5, 20, 0), num_draws=draws, max_coordinates=draw.one(1, 5, 0)
        ),
        "collapse": lambda: diagnostics.collapse(story, *columns, num_draws=draws, **few),
        "gaps": lambda: diagnostics.gaps(
            story, *columns, num_steps=draw.one(1, 2, 0), num_particles=draw.one(1, 5, 0), **few
        ),
        "guide_quality": lambda: diagnostics.guide_quality(
            story, *columns, num_particles=draw.one(1, 5, 60, 0, -1), **few
        ),
        "atlas": lambda: diagnostics.atlas(
            story,
            *columns,
            labels=draw.one(None, torch.arange(len(columns[0]))) if columns else None,
            size=draw.one(1, 2, 3, 0),
            num_nearest=draw.one(1, 3, 0, 99),
        ),
        "landscape": lambda: diagnostics.landscape(
            story, *columns, observation=draw.one(0, 0, -1, 99), size=draw.one(11, 11, 11, 1)
        ),
        "traversals": lambda: diagnostics.traversals(
            story,
            *columns,
            observation=draw.one(0, None, 99),
            units=draw.one(None, [0], [99], []),
            num_steps=draw.one(2, 3, 1),
            reach=draw.real(0.5, 0.98),
        ),
        "interpolation": lambda: diagnostics.interpolation(
            story, *columns, first=draw.one(0, 0, 99), second=draw.one(1, 1, -1), num_steps=draw.one(2, 3, 0)
        ),
        "outliers": lambda: diagnostics.outliers(
            story,
            *columns,
            method="importance",
            num_particles=draw.one(1, 5),
            num_simulated=draw.one(40, 40, 1),
            false_discovery_rate=draw.real(0.05, 0.5),
        ),
        "predictive_check": lambda: diagnostics.predictive_check(
            story, *columns, num_draws=draws, group=draw.one("prior", "posterior", "none"), site=draw.one("x", "x", "y")
        ),
        "pixel_calibration": lambda: diagnostics.pixel_calibration(
            story, *columns, num_draws=draws, num_bins=draw.one(1, 5, 0)
        ),
        "coverage": lambda: diagnostics.coverage(
            story, *columns, num_draws=draws, levels=draw.one((0.5,), (), (0.0, 1.0), (math.nan,), (2.0,))
        ),
        "reference_posterior": lambda: diagnostics.reference_posterior(
            story,
            *columns,
            num_chains=draw.one(2, 2, 0),
            num_draws=draw.one(4, 8, 0),
            num_warmup=draw.one(20, 20, 0),
            num_leapfrog=draw.one(1, 0),
            thinning=draw.one(1, 1, 0),
        ),
        "to_arviz": lambda: to_arviz(
            story,
            *columns,
            num_draws=draws,
            num_predictive=draw.one(0, 1, 3),
            resample=draw.one(False, False, True),
            elementwise=draw.one(True, False),
            memory_budget=draw.one(1e9, 0.0, 1e3, math.nan),
        ),
    }
    kind = draw.one(*kinds)
    made = kinds[kind]()
    if isinstance(made, xr.Dataset) and (drawn := getattr(plots, kind, None)) is not None:
        expect(isinstance(drawn(made), Figure), "no figure")
    return tuple(made.data_vars.values()) if isinstance(made, xr.Dataset) else type(made).__name__


def call_nuts(draw: Draw) -> object:
    x = torch.tensor([0.0, 1.0])
    found = diagnostics.nuts(
        Plain(),
        x,
        observation=draw.one(0, 1, 9),
        num_chains=draw.one(2, 2, 1, 0),
        num_draws=draw.one(4, 5),
        num_warmup=draw.one(20, 2),
    )
    return tuple(found.data_vars.values())


def call_diagnose(draw: Draw) -> object:
    story, columns = story_and_columns(draw)
    sections = draw.one(
        ("guide",), ("collapse",), ("reliability", "coverage"), ("atlas",), (), ("none",), ("traversals",)
    )
    labels = draw.one(None, None, torch.arange(len(columns[0]))) if columns else None
    found = diagnostics.diagnose(story, *columns, sections=sections, labels=labels, folder=draw.one(None, draw.folder))
    diagnostics.findings(found)
    return list(found), list(found.unavailable)


def call_picture(draw: Draw) -> object:
    """A picture of a table or of rows after something happened to them."""
    rows = [{"epoch": 1, "train_elbo": -3.0, "validation_elbo": math.nan}, {"epoch": 2, "train_elbo": math.inf}]
    found = Evidence.load(draw.prepared / "plane" / "evidence-test.nc")
    kinds: dict[str, Callable[[], Any]] = {
        "curve": lambda: plots.learning_curve(History("svi", draw.one(rows[:1], [{"epoch": 1, "train_elbo": -3.0}]))),
        "evidence": lambda: plots.evidence(found.dataset.isel(observation=slice(draw.one(1, 2, None)))),
        "tile": lambda: plots.tile(torch.rand(draw.one(0, 1, 5), draw.one(1, 3, 2), 4, 4), draw.one(1, 3, 0, -1)),
        "panels": lambda: plots.image_panels({"x": torch.rand(draw.one(0, 1, 9), 1, 4, 4)}, draw.one(1, 8, 0)),
        "are": lambda: plots.are_images(draw.tensor(2, *draw.shape())),
        "samples": lambda: plots.samples(
            configuration.build(configuration.from_json(table_of_story(draw) | {"event_shape": [1, 4, 4]})),
            draw.one(1, 5, 0, -1),
        ),
        "equations": lambda: report.equations(Plain(), draw.one(torch.ones(2), torch.ones(0), torch.ones(2, 2))),
    }
    return type(kinds[draw.one(*kinds)]()).__name__


# The command line -----------------------------------------------------------------------------------------------------

HOSTILE = (
    *("", " ", "-1", "0", "nan", "inf", "-inf", "1e999", "two", "9" * 30, "1" * 5000, "../..", "/dev/null", "{}"),
    *("é\udcff", "a,b,,", "1,2", "-", "%s%n", "<b>", "'; --", "/proc/self/mem", "x" * 300, "\n", "0x10"),
)
# Values that cost little; where an option is not named here, its type says.
PLAUSIBLE: dict[str, tuple[str, ...]] = {
    "epochs": ("1", "1", "2", "0", "-1", "two", "nan"),
    "num_observations": ("1", "5", "0", "-3", "9" * 12, "9" * 30, "two"),
    "num-particles": ("1", "5", "0", "-1", "two"),
    "particles": ("1", "3", "0"),
    "data": ("binary.npy", "grey.npy", "table.csv", "labelled.npz", "negative.npy", "hole.csv", "none.npy", "digit"),
    "engine": ("svi", "svi", "auto", "captured", "none"),
    "device": ("cpu", "cuda", "cuda:7", "meta", "gpu", "-1"),
    "limit": ("2", "3", "1", "0", "9" * 30),
    "budget": ("1000", "1", "0", "two"),
    "sections": ("guide", "collapse", "guide,coverage", "none", ","),
    "binarization": ("none", "static", "dynamic", "auto", "maybe"),
    "standardize": ("real", "a", "a,b", "z"),
    "scale": ("learned", "network", "per-dimension", "0.5", "0", "nan", "two"),
    "columns": ("4*normal", "2*normal,poisson,categorical:3", "normal", "0*normal", "9999999999*normal", "by-column"),
    "hidden-dims": ("4", "4,4", "0", "-4", "", "99999999999", "9" * 30),
    "channels": ("2", "2,3", "0", "99999999999"),
    "latent-dim": ("1", "2", "3", "0", "99999999", "9" * 30),
    "tolerance": ("0.5", "1", "0", "nan", "inf"),
    "method": ("importance", "elbo", "prior", "quadrature", "laplace", "none"),
    "story": ("none.py:A", "x", "story.py:Mine", "story.py:Nobody", "story.py:wrong name"),
    "out": ("new", "new/below", "new.nc", "new.csv", "new.html", "taken", "/proc/none/x", "new\n", "x" * 300),
    "plot": ("new.png", "new.jpg", "none/new.png"),
    "resume": ("run", "none", "run/checkpoints", "run/story.safetensors"),
    "data_root": ("root", "none"),
    "run": ("run", "run", "run", "run", "none", "taken", "run/config.json", "binary.npy"),
    "runs": ("run", "other", "run", "none"),
    "seed": ("0", "1", "-1", "9" * 30, "two"),
}
INTEGERS, REALS = ("1", "2", "3", "0", "-1", "9" * 30), ("0.5", "1", "0", "-1", "nan", "inf", "1e-320", "1e308")
DEAR = ("auto", "exact", "annealed", "mixture")


def words_of(draw: Draw, parser: argparse.ArgumentParser, share: float) -> list[str]:
    """Options of a real parser, with values that are right, wrong or hostile."""
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        if action.option_strings and draw.random.random() >= share:
            continue
        if action.option_strings:
            words.append(action.option_strings[0])
        if action.nargs != 0:
            many = 1 if action.nargs is None else draw.one(1, 2, 2)
            words += [value_of(draw, action) for _ in range(many)]
    return words


def value_of(draw: Draw, action: argparse.Action) -> str:
    """A value for an option."""
    if draw.random.random() < 0.05 and action.dest not in ("epochs", "num-particles", "run"):
        return draw.one(*HOSTILE)
    name = action.dest.rpartition(".")[2]
    if action.dest in PLAUSIBLE or name in PLAUSIBLE:
        return draw.one(*PLAUSIBLE.get(action.dest, PLAUSIBLE.get(name, ())))
    if action.choices:
        return draw.one(*action.choices, *action.choices, "none")
    kinds: dict[Any, tuple[str, ...]] = {int: INTEGERS, float: REALS, configuration.whole_numbers: ("4", "4,4", "-1")}
    return draw.one(*kinds.get(action.type, HOSTILE))


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands."""
    actions = cli._parser()._actions
    return next(cast(Any, action.choices) for action in actions if isinstance(action, argparse._SubParsersAction))


CHEAP = {
    "train": ["--epochs", "1", "--network.hidden-dims", "4", "--num-particles", "5", "--engine", "svi"],
    "evidence": ["--method", "importance", "--num-particles", "5"],
    "compare": ["--method", "importance", "--num-particles", "5"],
    "diagnose": ["--sections", "guide", "--limit", "3"],
}


def call_command_line(draw: Draw) -> object:
    parsers = commands()
    command = draw.one(*parsers, "train", "evidence", "report")
    arguments = words_of(draw, parsers[command], draw.one(0.02, 0.05, 0.1))
    before = CHEAP.get(command, [])
    if command == "train" and "--data" not in arguments:
        before = [*before, "--data", draw.one("binary.npy", "binary.npy", "images.npy", "grey.npy")]
    arguments = [command, *before, *arguments]
    for name in ("binary.npy", "grey.npy", "images.npy", "table.csv", "labelled.npz", "negative.npy", "hole.csv"):
        shutil.copy(draw.prepared / name, name)
    shutil.copy(draw.prepared / "story.py", "story.py")
    Path("taken").write_text("")
    if command != "train" or "--resume" in arguments:
        shutil.copytree(draw.prepared / draw.one("plane", "plane", "images", "real"), "run")
        shutil.copytree(draw.prepared / "deep", "other")
        if draw.random.random() < 0.7:
            tamper(draw, Path("run"))
    if draw.random.random() < 0.02:
        arguments = draw.one([], ["none"], [command, "--help"], ["--help"], [draw.one(*HOSTILE)])
    return run_command(draw, arguments)


def tamper(draw: Draw, run: Path) -> None:
    """Damages or forges one file of a run, or takes it away."""
    files = [file for file in sorted(run.rglob("*")) if file.suffix in (".json", ".jsonl", ".nc", ".safetensors")]
    file, kind = draw.one(*files), draw.random.random()
    if kind < 0.1:
        file.unlink()
    elif kind < 0.15:
        file.unlink()
        draw.one(file.mkdir, lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file))()
    elif kind < 0.4:
        file.write_bytes(damaged(draw, file.read_bytes()))
    elif file.suffix == ".nc":
        forge_table(draw, file)
    elif file.suffix == ".safetensors":
        forge_checkpoint(draw, file)
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("\n".join(text_of(row) for row in forged(draw, rows) or []))
    else:
        file.write_text(text_of(forged(draw, json.loads(file.read_text()))))


def run_command(draw: Draw, arguments: list[str]) -> object:
    """The status of a command, which left nothing half done."""
    already = {path for path in Path.cwd().rglob("*")}
    said, complained = io.StringIO(), io.StringIO()
    interrupted = arguments[:1] != [] and draw.random.random() < 0.03
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            with interruption(draw.random.uniform(0.01, 0.5) if interrupted else None):
                status = cli.main(arguments)
        except SystemExit as left:
            status = left.code
    line = complained.getvalue()
    shown = f"{arguments}\n{line}"
    expect(status in STATUSES, f"the status {status} of {shown}")
    expect("Traceback" not in line, f"a traceback of {shown}")
    if status in (1, 2):
        expect(line.startswith("ppl-vae") and line.endswith("\n") and line.count("\n") == 1, f"not one line of {shown}")
    new = {path for path in Path.cwd().rglob("*")} - already
    expect(status == 0 or not new or interrupted or began(arguments, line), f"left {sorted(map(str, new))}: {shown}")
    for path in new:
        whole(path)
    return None if interrupted else status


def began(arguments: list[str], line: str) -> bool:
    """Whether it is a command that leaves tables one by one, or a training of which nothing is worth keeping."""
    return arguments[:1] in (["diagnose"], ["evidence"]) or "No epoch had a finite validation ELBO" in line


def whole(path: Path) -> None:
    """Raises WrongAnswerError where a new file is not whole."""
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".nc": lambda path: xr.open_dataset(path, engine="h5netcdf").close(),
        ".safetensors": checkpoint.read,
        ".npz": lambda path: [np.load(path)[name] for name in np.load(path)],
        ".html": lambda path: expect("</html>" in path.read_text(), "no end"),
    }
    if path.is_file() and not path.is_symlink() and path.suffix in readers:
        try:
            readers[path.suffix](path)
        except Exception as error:
            raise WrongAnswerError(f"{path} is not whole: {error}") from error


@contextlib.contextmanager
def interruption(after: float | None) -> Iterator[None]:
    """Inside, the user gives up after some seconds."""
    if after is None:
        yield
        return
    handler = signal.signal(signal.SIGVTALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_VIRTUAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


# name -> (how often, what)
CALLS: dict[str, tuple[int, Callable[[Draw], object]]] = {
    "priors": (6, call_prior),
    "likelihoods": (6, call_likelihood),
    "posteriors": (5, call_posterior),
    "networks": (4, call_network),
    "stories": (3, call_story_part),
    "objectives": (2, call_objective),
    "noise": (1, call_noise),
    "from_json": (6, call_from_json),
    "build": (5, call_build),
    "save and load": (8, call_checkpoint),
    "save": (2, call_save),
    "data.load of arrays": (6, call_data_of_arrays),
    "data.load of files": (10, call_data_of_files),
    "Evidence.load": (5, call_evidence_file),
    "check": (4, call_check),
    "fit": (7, call_fit),
    "fit, resumed": (4, call_resume),
    "log_evidence": (7, call_log_evidence),
    "evidence_bounds": (2, call_bounds),
    "compare": (2, call_compare),
    "convergence": (1, call_convergence),
    "diagnostics": (8, call_diagnostic),
    "nuts": (1, call_nuts),
    "diagnose": (2, call_diagnose),
    "plots and report": (3, call_picture),
    "command line": (15, call_command_line),
}


# One call after another -----------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What came of all calls.

    Attributes:
        outcomes: how often each outcome came, by what was called.
        surprises: what was not expected, by where it happened: the first call, how it looked, and how often.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    surprises: dict[str, list[Any]] = field(default_factory=dict)
    warned: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int, str] = (0.0, 0, "")
    seconds: Counter[str] = field(default_factory=Counter)

    def surprise(self, number: int, name: str, where: str, text: str) -> None:
        """Notes what was not expected."""
        self.surprises.setdefault(f"{name}: {where}", [number, text[-1500:], 0])[2] += 1

    def __str__(self) -> str:
        columns = ["right", *sorted({kind for found in self.outcomes.values() for kind in found} - {"right"})]
        lines = [f"{sum(found.total() for found in self.outcomes.values())} calls"]
        for name, found in sorted(self.outcomes.items()):
            lines.append(
                f"  {name:22}  {self.seconds[name]:6.1f} s"
                + "".join(f"  {kind} {found[kind]}" for kind in columns if found[kind])
            )
        total = sum(self.outcomes.values(), Counter[str]())
        lines.append(f"  {'all':22}" + "".join(f"  {kind} {total[kind]}" for kind in columns))
        lines.append(f"slowest: {self.slowest[0]:.1f} s, call {self.slowest[1]} ({self.slowest[2]})")
        lines += [f"warned {count}: {text}" for text, count in self.warned.most_common(20)]
        lines.append(f"{len(self.surprises)} surprises")
        for where, (number, text, count) in sorted(self.surprises.items()):
            lines += [f"--- {where}: {count}, first in call {number}", text]
        return "\n".join(lines)


def run_call(number: int, seed: int, prepared: Path, only: Sequence[str], entropy: int = 0) -> tuple[str, object]:
    """One call, in a folder of its own; returns what was called and what came of it."""
    draw_of = random.Random(f"{seed} {number}")
    names = [name for name in CALLS if not only or name in only]
    name = draw_of.choices(names, [CALLS[name][0] for name in names])[0]
    torch.manual_seed(number)
    with tempfile.TemporaryDirectory() as folder:
        here, inside = Path.cwd(), Path(folder) / "here"
        for below in ("here", "tmp"):
            (Path(folder) / below).mkdir()
        os.chdir(inside)
        tempfile.tempdir = str(Path(folder) / "tmp")
        signal.setitimer(signal.ITIMER_PROF, SLOWEST)
        signal.alarm(10 * SLOWEST)
        try:
            answer = CALLS[name][1](Draw(draw_of, inside, prepared))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            tempfile.tempdir = None
            os.chdir(here)
            left = [path.name for path in Path(folder).rglob("*") if is_leftover(path, Path(folder))]
        expect(not left, f"left {left}")
    return name, answer


def is_leftover(path: Path, folder: Path) -> bool:
    """Whether it is a temporary file or a lock that nobody removed."""
    return (
        (path.name.startswith(".") and path.name.count(".") > 1)
        or path.name == "lock"
        or (path.parent == folder / "tmp")
    )


def name_of_call(number: int, seed: int, only: Sequence[str]) -> str:
    """What is called."""
    names = [name for name in CALLS if not only or name in only]
    return random.Random(f"{seed} {number}").choices(names, [CALLS[name][0] for name in names])[0]


def where_it_was(error: BaseException) -> str:
    """The last place in the package, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "ppl_vae/" in frame.filename and "scripts" not in frame.filename]
    last = inside[-1] if inside else frames[-1]
    return f"{type(error).__name__} in {'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} ({last.name})"


def attempt(number: int, options: argparse.Namespace, prepared: Path, record: Record) -> None:
    """One call, and what came of it in the record."""
    name = name_of_call(number, options.seed, options.only)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            _, answer = run_call(number, options.seed, prepared, options.only)
            outcome = "right" if name != "command line" else f"status {answer}"
            if options.twice and number % options.twice == 0:
                torch.manual_seed(number + 1)
                _, again = run_call(number, options.seed, prepared, options.only)
                expect(same(answer, again), f"first {answer}, then {again}")
        except DOCUMENTED as error:
            outcome = kind_of(error)
            if options.verbose:
                print(number, name, outcome, " ".join(str(error).split())[:150])
            if name == "command line":
                outcome = "not expected"
                record.surprise(number, name, where_it_was(error), text_of_error(error))
        except (Exception, Hang, KeyboardInterrupt) as error:
            outcome = "hang" if isinstance(error, Hang) else "not expected"
            if name != "command line" and is_lack_of_memory(error):
                outcome = "no memory"
            else:
                record.surprise(number, name, where_it_was(error), text_of_error(error))
    record.outcomes[name][outcome] += 1
    for text in {f"{w.category.__name__}: {str(w.message).splitlines()[0][:90]}" for w in warned}:
        record.warned[f"{name}: {text}"] += 1
    record.seconds[name] += (took := time.perf_counter() - started)  # pyright: ignore[reportArgumentType]
    record.slowest = max(record.slowest, (took, number, name))


def text_of_error(error: BaseException) -> str:
    """Its last places, and the beginning of what it says."""
    *places, said = traceback.format_exception(error)
    return "".join([*places[-3:], said[:600]])


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether it is torch's way to say MemoryError."""
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def kind_of(error: BaseException) -> str:
    """The documented exception that it is one of."""
    return next(kind.__name__ for kind in DOCUMENTED if isinstance(error, kind))


def same(a: Any, b: Any) -> bool:
    """Whether two answers are the same, bit for bit, and NaN where NaN was."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, np.ndarray | xr.DataArray):
        x, y = np.asarray(a), np.asarray(b)
        return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
    return bool(a == b)


def prepare(folder: Path) -> None:
    """Small data, and small runs on them."""
    draw = np.random.default_rng(0)
    grey = draw.random((40, 4)).astype(np.float32)
    hole = grey.copy()
    hole[3, 1] = np.nan
    np.save(folder / "grey.npy", grey)
    np.save(folder / "binary.npy", grey.round())
    np.save(folder / "negative.npy", -grey)
    np.save(folder / "images.npy", draw.random((40, 1, 4, 4)).round().astype(np.float32))
    np.savez(folder / "labelled.npz", x=grey.round(), labels=np.arange(40) % 3)
    for name, rows in (("table.csv", grey), ("hole.csv", hole)):
        lines = [",".join(map(str, row)) for row in rows.tolist()]
        (folder / name).write_text("\n".join(["a,b,c,d", *lines]))
    (folder / "story.py").write_text(STORY)
    said = {
        "plane": ["--data", "binary.npy"],
        "deep": ["--data", "binary.npy", "--latent-dim", "3"],
        "images": ["--data", "images.npy"],
        "real": ["--data", "grey.npy", "--likelihood", "normal"],
    }
    here = Path.cwd()
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, words in said.items():
            expect(cli.main(["train", *words, "--out", name, *CHEAP["train"][:-2]]) == 0, "the runs are not there")
        cli.main(["diagnose", "plane", "--limit", "5"])
        cli.main(["diagnose", "images", "--limit", "5", "--sections", "guide,collapse,atlas"])
    os.chdir(here)


STORY = """
import pyro, torch
import pyro.distributions as dist
from torch import nn


class Mine(nn.Module):
    def __init__(self, event_shape):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(event_shape))

    def model(self, x=None, *, num_observations=1):
        with pyro.plate("observations", num_observations if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(self.loc + z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.5))
"""


def too_long(number: int, frame: FrameType | None) -> None:
    """What the clock does."""
    raise Hang(f"after {SLOWEST} s")


def main() -> int:
    """Makes the calls; 1 if anything was not expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--call", type=int, help="only this one, and its exception is let through")
    parser.add_argument("--only", action="append", default=[], choices=CALLS, help="only calls of this")
    parser.add_argument("--twice", type=int, default=10, help="every so many calls are made twice and must agree")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no call is begun after so many")
    parser.add_argument("--verbose", action="store_true", help="print what each exception says")
    options = parser.parse_args()
    for number in (signal.SIGPROF, signal.SIGALRM):  # seconds of the processor, and ten times as many on the wall
        signal.signal(number, too_long)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))
        if options.call is not None:
            print(run_call(options.call, options.seed, Path(folder), options.only))
            return 0
        record, started = Record(), time.monotonic()
        for number in range(options.first, options.first + options.calls):
            if time.monotonic() - started < options.seconds:
                attempt(number, options, Path(folder), record)
    print(record)
    return bool(record.surprises)


if __name__ == "__main__":
    sys.exit(main())
