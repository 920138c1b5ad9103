"""ArviZ data of a story: draws of its guide and its prior, new observations, and what each draw scores.

The tree is the same for ArviZ 0.23, whose ``InferenceData`` it becomes there, and for 1.x, which takes xarray's
``DataTree``; netCDF files of either open in both.
"""

import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

import ppl_vae
from ppl_vae import checkpoint, checks, distributions, noise, traces
from ppl_vae.diagnostics.guide import pareto_k_threshold
from ppl_vae.discrete import tell
from ppl_vae.evidence import sharing
from ppl_vae.evidence.joint import Joint, joint_of
from ppl_vae.evidence.proposals import OBSERVATIONS_PER_UNIT, PARTICLES_PER_UNIT, Block, block_numbers, block_of
from ppl_vae.evidence.replays import Replays
from ppl_vae.evidence.sampling import draw
from ppl_vae.ranks import here as ranks_here
from ppl_vae.shares import Shares, Table
from ppl_vae.stored import Stored, row_slices
from ppl_vae.traces import Columns, Site, Story, observed_sites, sample_sites

if TYPE_CHECKING:
    from arviz import InferenceData

# A unit of noise is a block of observations times so many draws: a convolutional decoder takes so many rows at once.
DRAWS_PER_UNIT = 32
PREDICTIVE_DRAWS = 50
LEAST_PARTICLES, PARTICLES_PER_DRAW = 1000, 10
MEMORY_BUDGET = 4e9
ROWS_AT_ONCE = 1024
CALLS_TO_CAPTURE = 1500  # the first capture of a process takes two seconds, and a replay saves two milliseconds

Name = tuple[str, str]  # group, variable
Draws = dict[Name, Tensor]
Latents = dict[str, Tensor]

SAMPLE_DIMS = ("chain", "draw", "observation")
ORDER = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)
WITHOUT_DRAWS = [("sample_stats", name) for name in ("pareto_k", "ess", "distinct_draws")]
PREDICTIVE = ("posterior_predictive", "prior_predictive")


class _Part(IntEnum):
    """What a unit of noise is for, beside the guide's own."""

    CHOICE = 0
    STORY = 1
    PRIOR = 2


def to_arviz(
    story: Story,
    *columns: Tensor,
    num_draws: int = 100,
    num_predictive: int = PREDICTIVE_DRAWS,
    resample: bool = False,
    num_particles: int | None = None,
    elementwise: bool = False,
    constant_data: Mapping[str, Any] | None = None,
    memory_budget: float = MEMORY_BUDGET,
    seed: int = 0,
    progress: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> "InferenceData | xr.DataTree":
    r"""A story's draws as ArviZ knows them; ``az.summary``, ``az.plot_trace`` and ``az.ess`` take them unchanged.

    The posterior is the guide :math:`q(z \mid x_n)`, S draws for each observation; with ``resample=True`` they are
    chosen among more draws of the guide with probabilities proportional to :math:`p(x_n, z) / q(z \mid x_n)`, which
    moves them towards the true posterior (sampling importance resampling: Smith & Gelfand 1992,
    https://doi.org/10.1080/00031305.1992.10475856), as far as the guide reaches it: ``pareto_k`` tells.

    Under ``torchrun`` every process calls this with the same arguments, computes its share, and ends with the same
    tree, which is what one process makes.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation.
        num_draws: S.
        num_predictive: P, for how many of the S draws new observations are made; with none of them the predictive
            groups are left out.
        resample: weigh draws of the guide and choose among them.
        num_particles: how many draws are resampled, for each observation; None is 10 for each of the ``num_draws``,
            and at least 1000.
        elementwise: ``log_likelihood`` has one value for each element of an observation (pixel, column), for the first
            P draws, in the place of their sum, for all.
        constant_data: further things known of the observations, such as labels: name -> N values or rows of values.
        memory_budget: in bytes. With N observations of D elements and K latent coordinates, b bytes to a number, the
            tree takes about :math:`b N (2 S K + 2 P D + 4 S)` bytes, and :math:`b N P D` more elementwise: 340 MB for
            1,000 images of 784 pixels with 25 latent coordinates and all else left as it is, and 490 MB elementwise.
        seed: the noise is a function of it and of the position of an observation.
        progress: show a bar; None means when standard error is a terminal.
        folder: where blocks of observations are written down as they are finished, every half minute; the same call
            goes on with what it finds there.

    Returns:
        An ``InferenceData`` (ArviZ 0.23) or a ``DataTree`` (1.x), with one chain. Variables have the names of sites
        and the dimensions (chain, draw, observation, z_dim_0, ...). Log probabilities are in nats.

        ``posterior``: latents. One that the model sums out is drawn from its exact conditional given the others and x.
        ``prior``: latents, given each observation's conditions.
        ``posterior_predictive``, ``prior_predictive``: new observations, for the first P draws of these two. The data
        are not seen again, except by a model that does more with x than score it.
        ``log_likelihood``, ``log_prior``: log p of each site given the sites before it, shape (chain, draw,
        observation); sites that are summed out are summed out here, for each element by itself. ``az.loo`` of these
        means nothing: the posterior of a latent that belongs to one observation goes away with that observation.
        ``sample_stats``: ``lp`` is log p(x, z), ``log_weight`` is log p(x, z) - log q(z | x), which resampling has used
        up: then draws count alike. For each observation ``pareto_k`` and ``ess`` of the weights of all draws of the
        guide, and ``distinct_draws``, how many different ones the posterior holds.
        ``observed_data``: what the sites score; NaN where a boolean column of the same shape says that it is missing.
        ``constant_data``: the columns that are conditions, by the names of the model's arguments, and what was passed.

        Attributes, of the tree and of every group: ``created_at``, ``creation_library`` and ``inference_library`` with
        their versions, ``story``, ``seed``, ``units``, ``resampled`` (0 or 1), ``num_particles``,
        ``pareto_k_threshold``, ``share_above_threshold`` (of the observations) and ``distinct_draws`` (mean).

    Raises:
        ValueError: when the story or the data are not what :func:`ppl_vae.check` expects, when a number makes no sense,
            when the tree would exceed ``memory_budget``, naming the bytes that it needs, or when a likelihood has no
            elements.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> tree = to_arviz(vae, torch.ones(10, 5), num_draws=20, constant_data={"label": torch.arange(10)})
    >>> dict(tree["posterior"].sizes)
    {'chain': 1, 'draw': 20, 'observation': 10, 'z_dim_0': 3}
    >>> tree["posterior_predictive"]["x"].dims
    ('chain', 'draw', 'observation', 'x_dim_0')
    """
    plan = _planned(num_draws, num_predictive, num_particles, resample, elementwise)
    checks.dry_run(story, *columns)
    with traces.scoring(story):
        sites = _sites(story, columns)
        _refuse_size(sites, len(columns[0]), plan, memory_budget)
        known = _known(story, columns, constant_data or {})
        replays = Replays(patience=None if plan.num_calls(len(columns[0])) > CALLS_TO_CAPTURE else math.inf)
        narrator = _Narrator(replace(joint_of(story, columns), replays=replays), sites, plan)
        shares = Shares(progress=progress)
        if folder is not None:
            words = f"{ppl_vae.__version__} {plan} {seed}"
            tensors = [*story.state_dict().values(), *columns]
            shares = Shares(Path(folder), f"{words} {checkpoint.fingerprint(tensors)}", progress)
        arrays = _Arrays(len(columns[0]), plan)
        ranks_here().refuse_different("to_arviz", f"{plan} {seed} {len(columns[0])} observations")

        def of_block(number: int) -> Table:
            return narrator.table(block_of(narrator.joint, columns, seed, number))

        for number, table in shares.out(block_numbers(len(columns[0])), of_block, "draws"):
            arrays.put(number * OBSERVATIONS_PER_UNIT, table)
    attributes = _attributes(story, seed) | _summary(arrays.values, plan)
    return _for_this_arviz(_tree(arrays.values | known, attributes))


@dataclass(frozen=True)
class _Plan:
    """What was asked for: S draws, P of them with new observations, chosen among so many particles."""

    num_draws: int
    num_predictive: int
    num_particles: int
    resample: bool
    elementwise: bool

    def length(self, group: str) -> int:
        """How many draws a group has."""
        predictive = group in PREDICTIVE or (group == "log_likelihood" and self.elementwise)
        return self.num_predictive if predictive else self.num_draws

    @property
    def units(self) -> list[slice]:
        """The draws in units of noise, those with new observations first."""
        return [*_even(0, self.num_predictive), *_even(self.num_predictive, self.num_draws)]

    def num_calls(self, num_observations: int) -> int:
        """How often programs are run: for each block two of the guide's units, and two of each unit of draws."""
        num_units = math.ceil(self.num_particles / PARTICLES_PER_UNIT) + len(self.units)
        return 2 * num_units * math.ceil(num_observations / OBSERVATIONS_PER_UNIT)


def _even(start: int, stop: int) -> Iterator[slice]:
    """Equal parts, none longer than a unit, so that few programs of different shapes are told; the last may be less."""
    if stop > start:
        size = math.ceil((stop - start) / math.ceil((stop - start) / DRAWS_PER_UNIT))
        yield from (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _planned(
    num_draws: int, num_predictive: int, num_particles: int | None, resample: bool, elementwise: bool
) -> _Plan:
    """Raises ValueError for arguments that mean nothing."""
    checks.check_at_least(1, num_draws=num_draws)
    if num_predictive < 0:
        raise ValueError(f"num_predictive must be 0 or more; found {num_predictive}.")
    if num_particles is not None and not resample:
        raise ValueError("num_particles is how many draws are resampled; say resample=True as well.")
    if num_particles is not None and num_particles < num_draws:
        raise ValueError(
            f"{num_draws} draws cannot be chosen well among {num_particles}; give num_particles at least as large as "
            "num_draws, better ten times."
        )
    if elementwise and not num_predictive:
        raise ValueError("The elementwise log likelihood is that of the num_predictive first draws; found 0 of them.")
    if num_particles is None:
        num_particles = max(LEAST_PARTICLES, PARTICLES_PER_DRAW * num_draws) if resample else num_draws
    return _Plan(num_draws, min(num_predictive, num_draws), num_particles, resample, elementwise)


# What a story holds


@dataclass(frozen=True)
class _Sites:
    """The sites of a story, as two rows of it look: values by name, first dimension 2.

    Attributes:
        latent: drawn by the guide.
        summed: summed out by the model.
        observed: scored against data.
    """

    latent: dict[str, Tensor]
    summed: dict[str, Tensor]
    observed: dict[str, Tensor]


def _sites(story: Story, columns: Columns) -> _Sites:
    rows = traces.to_story(story, tuple(column[torch.arange(2) % len(column)] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        model_trace, guide_trace = traces.run(story, *rows)
    values, latent = traces.draws(model_trace), traces.draws(guide_trace)
    observed = {name: values[name] for name in observed_sites(model_trace)}
    summed = {name: value for name, value in values.items() if name not in observed and name not in latent}
    return _Sites(latent, summed, observed)


def _refuse_size(sites: _Sites, num_observations: int, plan: _Plan, memory_budget: float) -> None:
    """Raises ValueError when the tree would be larger than the budget."""
    latents, elements = (
        num_observations * sum(value[0].numel() * value.element_size() for value in values.values())
        for values in (sites.latent | sites.summed, sites.observed)
    )
    sizes = {group: plan.length(group) * latents for group in ("posterior", "prior")}
    of_elements = (*PREDICTIVE, "log_likelihood") if plan.elementwise else PREDICTIVE
    sizes |= {group: plan.length(group) * elements for group in of_elements}
    if (needed := sum(sizes.values())) > memory_budget:
        parts = ", ".join(f"{group} {size:,}" for group, size in sizes.items() if size)
        raise ValueError(
            f"The tree needs {needed:,} bytes ({parts}), more than memory_budget = {memory_budget:,.0f}. Take fewer "
            "observations, num_draws or num_predictive, or raise the budget."
        )


# Draws


@dataclass
class _Narrator:
    """Tells a story again and again, block by block; programs that are told often are replayed without Pyro."""

    joint: Joint
    sites: _Sites
    plan: _Plan

    def table(self, block: Block) -> Table:
        """What :meth:`tell` says of a block; in arrays whose first dimension is the observation."""
        arrays = _Arrays(block.size, self.plan)
        for draws, values in self.tell(block):
            arrays.fill(draws, values)
        return {
            "/".join(name): array if name in WITHOUT_DRAWS else array.swapaxes(0, 1)
            for name, array in arrays.values.items()
        }

    def tell(self, block: Block) -> Iterator[tuple[slice | None, Draws]]:
        """Everything that is known of a block, in parts: which draws, and their values of shape (draws, N, *event).

        What belongs to no draw has shape (N,).
        """
        plan, guide = self.plan, _Guide(block, tuple(self.sites.latent))
        sums = draw(block, guide, plan.num_particles, noise.Purpose.DRAWS)
        latents, log_weights = guide.draws()
        distinct = torch.full((block.size,), plan.num_draws)
        if plan.resample:
            with block.noise(noise.Purpose.DRAWS, _Part.CHOICE, 0):
                chosen = _choose(log_weights, plan.num_draws)
            latents = {name: _take(value, chosen) for name, value in latents.items()}
            log_weights, distinct = _take(log_weights, chosen), _count_distinct(chosen)
        statistics = {"pareto_k": sums.pareto_k, "ess": sums.ess, "distinct_draws": distinct}
        yield None, {("sample_stats", name): value for name, value in statistics.items()}
        posterior: Draws = {("posterior", name): value for name, value in latents.items()}
        yield slice(0, plan.num_draws), posterior | {("sample_stats", "log_weight"): log_weights}
        for number, draws in enumerate(plan.units):
            predictive = draws.stop <= plan.num_predictive
            own = {name: value[draws].flatten(0, 1) for name, value in latents.items()}
            with block.noise(noise.Purpose.DRAWS, _Part.STORY, number):
                told = self._call(self._posterior, block, own, draws, predictive)
            with block.noise(noise.Purpose.DRAWS, _Part.PRIOR, number):
                told |= self._call(self._prior, block, {}, draws, predictive)
            yield draws, told

    def _call(
        self, program: Callable[..., Draws], block: Block, latents: Latents, draws: slice, predictive: bool
    ) -> Draws:
        """What a program of rows and latents returns, as draws of shape (S, N, *event)."""
        size, num_columns = draws.stop - draws.start, len(block.columns)
        key = (program.__name__, size, predictive)

        def of_tensors(*tensors: Tensor) -> Draws:
            rows = traces.as_rows(tensors[:num_columns], size)
            return program(rows, dict(zip(latents, tensors[num_columns:], strict=True)), predictive)

        told = self.joint.replays.call(key, of_tensors, *block.columns, *latents.values())
        return {name: value.unflatten(0, (size, -1)) for name, value in told.items()}

    def _posterior(self, rows: Columns, latents: Latents, predictive: bool) -> Draws:
        """The score of given latents, the latents that were summed out, and new observations."""
        story, summed = self.joint.story, self.joint.marked
        scores, given = self._scores(rows, latents, predictive)
        if self.sites.summed:
            least = torch.finfo(given.dtype).min  # where x is impossible, no value is more likely than another
            value = dist.Categorical(logits=given.T.clamp(min=least)).sample()
            own = {name: values[value] for name, values in summed.values.items()}
            scores |= {("posterior", name): values for name, values in own.items()}
            latents = latents | own
        if predictive:
            told = traces.draws(traces.retell(story.model, rows, latents))
            scores |= {("posterior_predictive", name): told[name] for name in self.sites.observed}
        return scores

    def _scores(self, rows: Columns, latents: Latents, predictive: bool) -> tuple[Draws, Tensor]:
        r"""log p of each site given those before it, and log p(x, z, c) for each value c that is summed over.

        In the order in which the model tells them, :math:`p(s_i \mid s_{<i}) = \sum_c p(c \mid s_{<i})\, p(s_i \mid
        s_{<i}, c)`: what is summed out and told later than a site does not change its sum.
        """
        summed, num_rows = self.joint.marked, len(rows[0])
        repeated = {name: value.repeat(summed.size, *(1 for _ in value.shape[1:])) for name, value in latents.items()}
        assigned = {name: values.repeat_interleave(num_rows, dim=0) for name, values in summed.values.items()}
        trace = tell(self.joint.story.model, traces.as_rows(rows, summed.size), repeated | assigned)
        sites = sample_sites(trace)
        log_p = {name: self._by_value(traces.log_prob(trace, {name: site})) for name, site in sites.items()}
        so_far = sum((log_p[name] for name in assigned), torch.zeros_like(next(iter(log_p.values()))))
        scores: Draws = {}
        for name in (name for name in sites if name not in assigned):
            log_given, score = so_far.log_softmax(0).nan_to_num(nan=0.0), log_p[name]
            so_far = so_far + score
            if name in self.sites.latent:
                scores["log_prior", name] = (log_given + score).logsumexp(0)
            elif not self.plan.elementwise:
                scores["log_likelihood", name] = (log_given + score).logsumexp(0)
            elif predictive:
                elements = self._by_value(_elements(sites[name]))
                log_given = log_given.reshape(log_given.shape + (1,) * (elements.dim() - 2))
                scores["log_likelihood", name] = (log_given + elements).logsumexp(0)
        return scores | {("sample_stats", "lp"): so_far.logsumexp(0)}, so_far

    def _by_value(self, log_p: Tensor) -> Tensor:
        """Rows of every value that is summed over, shape (C, rows, ...)."""
        return log_p.unflatten(0, (self.joint.marked.size, -1))

    def _prior(self, rows: Columns, latents: Latents, predictive: bool) -> Draws:
        """Draws of the prior, and the observations that they make."""
        told = traces.draws(traces.retell(self.joint.story.model, rows, latents))
        drawn = {("prior", name): told[name] for name in (*self.sites.latent, *self.sites.summed)}
        if predictive:
            drawn |= {("prior_predictive", name): told[name] for name in self.sites.observed}
        return drawn


@dataclass(frozen=True)
class _Guide:
    """Weighs draws of the guide, and keeps them."""

    block: Block
    names: tuple[str, ...]
    kept: list[tuple[Latents, Tensor]] = field(default_factory=list)

    def log_weights(self, num_particles: int) -> Tensor:
        """Log weights of new draws, shape (S, N)."""
        joint, columns = self.block.joint, self.block.columns
        latents, log_q = joint.guide_latents(columns, num_particles)
        latents = {name: latents[name] for name in self.names}
        log_weights = joint.log_prob_of_latents(columns, latents, num_particles).reshape(log_q.shape) - log_q
        self.kept.append(({name: value.unflatten(0, log_q.shape) for name, value in latents.items()}, log_weights))
        return log_weights

    def at(self, rows: Tensor) -> Self:
        """The same for some of the observations."""
        return replace(self, block=self.block.at(rows), kept=[])

    def draws(self) -> tuple[Latents, Tensor]:
        """All draws so far, shape (S, N, *event), and their log weights, shape (S, N)."""
        latents, log_weights = zip(*self.kept, strict=True)
        return {name: torch.cat([part[name] for part in latents]) for name in latents[0]}, torch.cat(log_weights)


def _choose(log_weights: Tensor, num_draws: int) -> Tensor:
    """Which draws are taken, with replacement, each with its weight as probability; shape (num_draws, N)."""
    weights = log_weights.double().softmax(0).nan_to_num(nan=1.0)  # where all are zero, none is better than another
    return torch.multinomial(weights.T, num_draws, replacement=True).T


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    return values[chosen, torch.arange(chosen.shape[1], device=values.device)]


def _count_distinct(chosen: Tensor) -> Tensor:
    """How many different draws were taken for each observation, shape (N,)."""
    return (chosen.sort(0).values.diff(dim=0) != 0).sum(0) + 1


def _elements(site: Site) -> Tensor:
    """log p of each element of what a site scores, zero where ``poutine.mask`` leaves it out."""
    elements = log_prob_of_elements(site["fn"], site["value"])
    if site["mask"] is None:
        return elements
    mask = torch.as_tensor(site["mask"], device=elements.device)
    return elements.where(mask.reshape(mask.shape + (1,) * (elements.dim() - mask.dim())), 0.0)


@singledispatch
def log_prob_of_elements(distribution: Any, value: Tensor) -> Tensor:
    """log p of each element of an observation, of the value's shape; their sum is log p of the observation.

    Raises:
        ValueError: when the elements are not independent.

    >>> log_prob_of_elements(dist.Normal(torch.zeros(7, 3), 1.0).to_event(1), torch.zeros(7, 3)).shape
    torch.Size([7, 3])
    """
    if distribution.event_dim:
        raise ValueError(
            f"{type(distribution).__name__} has no log probability for each element of an observation; leave out "
            "elementwise=True."
        )
    return distribution.log_prob(value)


@log_prob_of_elements.register
def _(distribution: dist.Independent, value: Tensor) -> Tensor:
    return log_prob_of_elements(distribution.base_dist, value)


@log_prob_of_elements.register
def _(distribution: distributions.Columns, value: Tensor) -> Tensor:
    columns = zip(distribution.parts, value.split(distribution.widths, -1), strict=True)
    return torch.cat(
        [
            log_prob_of_elements(part, x) if part.event_dim else part.log_prob(x.squeeze(-1)).unsqueeze(-1)
            for part, x in columns
        ],
        -1,
    )


# The tree


@dataclass(frozen=True)
class _Arrays:
    """What was drawn, by group and variable: shape (draws, observations, *event), or (observations,)."""

    num_observations: int
    plan: _Plan
    values: dict[Name, np.ndarray] = field(default_factory=dict)

    def fill(self, draws: slice | None, drawn: Draws) -> None:
        """Puts draws of all observations in their places."""
        for name, tensor in drawn.items():
            array = tensor.cpu().numpy()
            if draws is None:
                self.values[name] = array
            else:
                length = self.plan.length(name[0])
                self.values.setdefault(name, np.empty((length, *array.shape[1:]), array.dtype))[draws] = array

    def put(self, first: int, table: Table) -> None:
        """Puts what is known of some observations, from number ``first`` on, in its place."""
        for key, column in table.items():
            group, _, variable = key.partition("/")
            name, leading = (group, variable), () if (group, variable) in WITHOUT_DRAWS else (slice(None),)
            array = column.swapaxes(0, len(leading))
            if name not in self.values:
                shape = (*array.shape[: len(leading)], self.num_observations, *array.shape[len(leading) + 1 :])
                self.values[name] = np.empty(shape, array.dtype)
            self.values[name][*leading, first : first + len(column)] = array


def _known(story: Story, columns: Columns, constant_data: Mapping[str, Any]) -> dict[Name, np.ndarray]:
    """What the sites score, the columns that are conditions, and what else was passed."""
    names = checks.column_names(story, columns)
    scored = sharing.columns_at_sites(story, columns)
    arrays = {("observed_data", name): _numpy(columns[position]) for name, position in scored.items()}
    if set(sharing.observed_in(story, columns)) - set(scored):
        arrays |= _computed(story, columns, scored)
    conditions = {name: columns[place] for place, name in enumerate(names) if place not in scored.values()}
    for name, values in arrays.items():
        for mask in conditions.values():
            if mask.dtype == torch.bool and mask.shape == values.shape:
                arrays[name] = np.where(mask.cpu().numpy(), values, np.nan)
    if clashes := sorted(conditions.keys() & constant_data.keys()):
        raise ValueError(f"constant_data has {clashes}, which are columns of the story as well; take other names.")
    for name, values in (conditions | dict(constant_data)).items():
        array = _numpy(values)
        if not array.ndim or len(array) != len(columns[0]):
            raise ValueError(
                f"constant_data[{name!r}] has the shape {array.shape}; expected one entry for each of the "
                f"{len(columns[0])} observations."
            )
        arrays["constant_data", name] = array
    return arrays


def _computed(story: Story, columns: Columns, scored: dict[str, int]) -> dict[Name, np.ndarray]:
    """The values of sites that score something made from the columns."""
    parts: list[dict[str, np.ndarray]] = []
    for part in row_slices(*columns, most_rows=ROWS_AT_ONCE):
        rows = traces.to_story(story, tuple(column[part] for column in columns))
        with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
            model_trace, _ = traces.run(story, *rows)
        parts.append({name: _numpy(site["value"]) for name, site in observed_sites(model_trace).items()})
    return {
        ("observed_data", name): np.concatenate([part[name] for part in parts])
        for name in parts[0]
        if name not in scored
    }


def _numpy(values: Any) -> np.ndarray:
    """Numbers or words; truth values as 0 and 1."""
    values = values[0 : len(values)] if isinstance(values, Stored) else values
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(np.int8) if array.dtype == bool else array


def _tree(arrays: Mapping[Name, np.ndarray], attributes: dict[str, Any]) -> xr.DataTree:
    groups = {group: {name: array for (of, name), array in arrays.items() if of == group} for group in ORDER}
    datasets = {group: _dataset(group, variables, attributes) for group, variables in groups.items() if variables}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes)} | datasets)


def _dataset(group: str, variables: dict[str, np.ndarray], attributes: dict[str, Any]) -> xr.Dataset:
    """The variables of a group, their dimensions named and numbered as ArviZ does."""
    by_name: dict[str, xr.DataArray] = {}
    for site, array in variables.items():
        name = _variable_name(site, by_name)
        if has_draws := group not in ("observed_data", "constant_data") and (group, site) not in WITHOUT_DRAWS:
            array = array[np.newaxis]
        leading = SAMPLE_DIMS if has_draws else SAMPLE_DIMS[-1:]
        dims = (*leading, *(f"{name}_dim_{place}" for place in range(array.ndim - len(leading))))
        coordinates = {dim: np.arange(size) for dim, size in zip(dims, array.shape, strict=True)}
        by_name[name] = xr.DataArray(array, coordinates, dims, attrs={} if name == site else {"site": site})
    return xr.Dataset(by_name, attrs=attributes)


def _variable_name(site: str, taken: Mapping[str, Any]) -> str:
    """The name of a site, changed where it has a slash, as no path may, or is a dimension's or another variable's."""
    name = site.replace("/", "_")
    while name in taken or name in SAMPLE_DIMS or any(name in array.dims for array in taken.values()):
        name += "_"
    return name


def _attributes(story: Story, seed: int) -> dict[str, Any]:
    """What ArviZ says of its data, and what made them."""
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "ppl_vae",
        "creation_library_version": ppl_vae.__version__,
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "story": type(story).__name__,
        "seed": seed,
        "units": "nats",
    }


def _summary(arrays: Mapping[Name, np.ndarray], plan: _Plan) -> dict[str, Any]:
    """What is said of the guide's draws together."""
    threshold = pareto_k_threshold(plan.num_particles)
    return {
        "resampled": int(plan.resample),
        "num_particles": plan.num_particles,
        "pareto_k_threshold": threshold,
        "share_above_threshold": float((arrays["sample_stats", "pareto_k"] > threshold).mean()),
        "distinct_draws": float(arrays["sample_stats", "distinct_draws"].mean()),
    }


def _for_this_arviz(tree: xr.DataTree) -> "InferenceData | xr.DataTree":
    """``InferenceData`` before ArviZ 1.0; later versions take the tree as it is."""
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData.from_datatree(tree)
    return tree
