"""Estimators of log p(x): draw particles in fixed units of noise, weigh them, keep one column per observation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import pyro.infer
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from ppl_vae import checks, noise, traces
from ppl_vae.evidence import quadrature
from ppl_vae.evidence.result import Evidence
from ppl_vae.evidence.weights import NonFiniteWeightsError, WeightSums
from ppl_vae.traces import Columns, Layout, Story

# A unit of noise: so many observations times so many particles, whatever the chunk, the machine or the number of ranks.
OBSERVATIONS_PER_UNIT = 32
PARTICLES_PER_UNIT = 64
PILOT_PARTICLES = 500

Method = Literal["importance", "prior", "elbo", "pyro", "quadrature"]
LogWeights = Callable[[Story, Columns, int, Layout], Tensor]


def log_evidence(
    story: Story,
    *columns: Tensor,
    method: Method = "importance",
    num_particles: int = 1000,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Evidence:
    r"""Evidence of each observation, :math:`\log p(x_n) = \log \int p(x_n \mid z)\, p(z)\, dz`, in nats.

    Columns that the story scores at a site are data, the others are conditions: ``log_evidence(conditional, x, y)`` is
    log p(x | y). The story runs in eval mode and is left as it was.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation.
        method: ``"importance"`` weighs draws of the guide by p(x, z) / q(z | x) (Burda, Grosse & Salakhutdinov 2016,
            https://arxiv.org/abs/1509.00519); ``"prior"`` averages p(x | z) over draws of the prior, naive Monte Carlo;
            ``"elbo"`` is the mean log weight, a lower bound; ``"pyro"`` is ``pyro.infer.Importance`` run on one
            observation at a time, the slow reference; ``"quadrature"`` integrates one or two latent dimensions on a
            refined grid, without chance (its ``standard_error`` is what the last refinement changed).
        num_particles: draws per observation.
        seed: the noise is a function of it and of the position of an observation.
        device: where to compute; None is where the story is.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        An :class:`Evidence`. For importance estimates ``standard_error`` and ``bias`` are those of the delta
        method, :math:`\sqrt{v}` and :math:`-v/2` with :math:`v = \mathrm{Var}(w) / (S \bar w^2)`; believe them as far
        as ``verdict`` says.

    Raises:
        ValueError: when the story or the data are not what :func:`ppl_vae.check` expects, when there are no particles,
            or when a weight is NaN or infinite, naming the observations.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> evidence = log_evidence(vae, torch.ones(10, 5), num_particles=100)
    >>> evidence["estimate"].shape
    (10,)
    """
    if method not in get_args(Method):
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, get_args(Method)))}.")
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1; found {num_particles}.")
    if device is not None:
        story.to(device)
    event_shapes = checks.dry_run(story, *columns)
    with traces.scoring(story):
        if method == "quadrature":
            dataset = _integrate(story, traces.to_story(story, columns))
        else:
            sampler = _Sampler(story, method, _layout(story, columns), seed)
            dataset = _sample(sampler, columns, num_particles, progress)
    num_dimensions = sum(shape.numel() for shape in event_shapes.values())
    return Evidence(dataset.assign_attrs(unit="nats", seed=seed, num_dimensions=num_dimensions))


@dataclass(frozen=True)
class _Sampler:
    """Draws and weighs the particles of a block of observations, one unit of noise after another."""

    story: Story
    method: Method
    layout: Layout
    seed: int

    def draw(self, rows: Columns, first: int, num_particles: int, purpose: noise.Purpose) -> WeightSums:
        """The weights of a block that starts at observation number ``first``."""
        sums = WeightSums(len(rows[0]), num_particles)
        for start in range(0, num_particles, PARTICLES_PER_UNIT):
            size = min(PARTICLES_PER_UNIT, num_particles - start)
            indices = first // OBSERVATIONS_PER_UNIT, start // PARTICLES_PER_UNIT
            with noise.unit(rows[0].device, self.seed, purpose, *indices):
                log_weights = PROPOSALS[self.method](self.story, rows, size, self.layout)
            try:
                sums.update(log_weights)
            except NonFiniteWeightsError as error:
                raise ValueError(
                    f"Log weights are NaN or infinite for the observations {[first + row for row in error.rows]}. The "
                    "model or the guide has a degenerate distribution there; look at their scales."
                ) from None
        return sums


def _layout(story: Story, columns: Columns) -> Layout:
    two_rows = traces.to_story(story, tuple(column[torch.arange(2) % len(column)] for column in columns))
    with noise.unit(two_rows[0].device, 0, noise.Purpose.CHECK):
        return traces.fastest_layout(story, two_rows)


def _sample(sampler: _Sampler, columns: Columns, num_particles: int, progress: bool | None) -> xr.Dataset:
    """Evidence by weighted draws, one block of observations after another."""
    parts = []
    blocks = range(0, len(columns[0]), OBSERVATIONS_PER_UNIT)
    for first in tqdm(blocks, desc="evidence", unit="block", disable=None if progress is None else not progress):
        rows = tuple(column[first : first + OBSERVATIONS_PER_UNIT] for column in columns)
        parts.append(_estimate(sampler, traces.to_story(sampler.story, rows), first, num_particles))
    return cast(xr.Dataset, xr.concat(parts, dim="observation"))


def _integrate(story: Story, columns: Columns) -> xr.Dataset:
    """Evidence without chance: nothing is drawn, so there are no weights to diagnose."""
    estimate, error = quadrature.quadrature(story, columns)
    size = len(estimate)
    nothing = np.full(size, np.nan)
    table = {
        "estimate": estimate,
        "standard_error": error,
        "bias": np.zeros(size),
        "ess": nothing,
        "pareto_k": nothing,
        "pilot_pareto_k": nothing,
        "verdict": np.where(error < quadrature.TOLERANCE, "exact", "poor"),
    }
    return _table(table, 0, "quadrature", num_particles=0)


def _table(columns: dict[str, Any], first: int, method: Method, num_particles: int) -> xr.Dataset:
    """One row per observation, numbered from ``first``."""
    size = len(columns["estimate"])
    columns = columns | {"method": [method] * size, "num_particles": [num_particles] * size}
    variables = {name: ("observation", np.asarray(column)) for name, column in columns.items()}
    return xr.Dataset(variables, coords={"observation": np.arange(first, first + size)})


def _estimate(sampler: _Sampler, rows: Columns, first: int, num_particles: int) -> xr.Dataset:
    """The evidence of one block of observations."""
    size = len(rows[0])
    sums = sampler.draw(rows, first, num_particles, noise.Purpose.EVIDENCE)
    if sampler.method == "elbo":
        estimate, standard_error, bias = sums.mean, sums.standard_error_of_mean, torch.zeros(size)
        pilot_k, verdict = torch.full((size,), torch.nan), ["bound"] * size
    else:
        pilot = sampler.draw(rows, first, PILOT_PARTICLES, noise.Purpose.PILOT)
        estimate, standard_error, bias = sums.log_mean, sums.relative_variance.sqrt(), -sums.relative_variance / 2
        pilot_k, verdict = pilot.pareto_k, pilot.verdicts()
    columns = {
        "estimate": estimate,
        "standard_error": standard_error,
        "bias": bias,
        "ess": sums.ess,
        "pareto_k": sums.pareto_k,
        "pilot_pareto_k": pilot_k,
        "verdict": verdict,
    }
    return _table(columns, first, sampler.method, num_particles)


def _pyro_log_weights(story: Story, columns: Columns, num_particles: int, layout: Layout) -> Tensor:
    """Log weights of ``pyro.infer.Importance``, one observation at a time; shape (S, N)."""
    weights = []
    for row in range(len(columns[0])):
        sampler = pyro.infer.Importance(traces.scored_model(story), story.guide, num_samples=num_particles)
        sampler.run(*(column[row : row + 1] for column in columns))
        weights.append(torch.stack(cast(list[Tensor], sampler.log_weights)))
    return torch.stack(weights, dim=1)


PROPOSALS: dict[str, LogWeights] = {
    "importance": traces.importance_log_weights,
    "prior": traces.prior_log_weights,
    "elbo": traces.importance_log_weights,
    "pyro": _pyro_log_weights,
}
