r"""log p(x_n, u): any story's joint density, every continuous latent of an observation in one unconstrained vector u.

A site supported on part of the line is mapped to all of it (``biject_to``), and coordinates are measured in prior
standard deviations. Discrete latents are summed out, by telling the story once for each of their joint values.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints

from ppl_vae import noise, traces
from ppl_vae.discrete import Assignments, assignments, log_densities, summed_out
from ppl_vae.evidence.replays import Replays
from ppl_vae.memory import is_out_of_memory, within_memory
from ppl_vae.precision import matrix_products_in
from ppl_vae.traces import Columns, Layout, Site, Story, sample_sites
from ppl_vae.work import Work, counted

PRIOR_DRAWS = 1000
ONE_SIGMA = torch.tensor([0.1587, 0.5, 0.8413])
ROWS_AT_ONCE = 8192
# What a model computes in between stays in a processor's cache, of so many rows or numbers in a tensor.
ROWS_IN_CACHE = 2048
NUMBERS_IN_CACHE = 4_000_000
FEW_ROWS = 13  # few dimensions of a network are multiples of it


# Rows in chunks


@dataclass
class Chunks:
    """How many rows are evaluated at once. Where memory runs out the number is halved; the values stay the same."""

    rows: int = ROWS_AT_ONCE

    def map(self, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """``function`` of tensors whose first dimension are rows; its results have rows first, too.

        Raises:
            MemoryError: when a single row does not fit.
        """
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        while start < len(tensors[0]):
            size = self.rows
            try:
                parts.append(function(*(tensor[start : start + size] for tensor in tensors)))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
                continue
            start += size
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    def _halve(self, error: RuntimeError) -> None:
        if self.rows == 1:
            raise MemoryError("The story does not fit in memory with one particle of one observation.") from error
        self.rows //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# Unconstrained coordinates


@dataclass(frozen=True)
class LatentSpace:
    """All continuous latents of an observation as one vector u, unconstrained and in prior standard deviations."""

    event_shapes: dict[str, torch.Size]
    transforms: dict[str, Any]
    loc: Tensor
    scale: Tensor

    @property
    def dim(self) -> int:
        """The number of coordinates, K."""
        return len(self.loc)

    def latents(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents at points of shape (R, K), by site name, and the log of their volume element, shape (R,)."""
        unconstrained = self.loc + self.scale * u.to(self.loc)
        sizes = [shape.numel() for shape in self.event_shapes.values()]
        values, log_volume = {}, self.scale.log().sum().expand(len(u))
        for (name, shape), part in zip(self.event_shapes.items(), unconstrained.split(sizes, dim=1), strict=True):
            part = part.reshape(len(u), *shape)
            values[name] = self.transforms[name](part)
            element = self.transforms[name].log_abs_det_jacobian(part, values[name])
            log_volume = log_volume + element.reshape(len(u), -1).sum(1)
        return values, log_volume

    def coordinates(self, latents: dict[str, Tensor]) -> Tensor:
        """The points of latents whose first dimension are rows, shape (R, K); ValueError where one was not drawn."""
        if missing := self.event_shapes.keys() - latents.keys():
            raise ValueError(f"The guide does not draw {sorted(missing)}, which the model does.")
        parts = [self.transforms[name].inv(latents[name]) for name in self.event_shapes]
        return (torch.cat([part.reshape(len(part), -1) for part in parts], dim=1) - self.loc) / self.scale


def coordinate_names(event_shapes: dict[str, torch.Size]) -> list[str]:
    """A name for each number in these sites, in the order of their unconstrained coordinates.

    >>> coordinate_names({"z": torch.Size([2]), "size": torch.Size([])})
    ['z[0]', 'z[1]', 'size']
    """
    return [
        f"{site}[{', '.join(map(str, place))}]" if place else site
        for site, shape in event_shapes.items()
        for place in np.ndindex(*shape)
    ]


def latent_space(story: Story, columns: Columns) -> LatentSpace | None:
    """Where the prior puts the continuous latents, from draws of it given the first conditions in turn.

    None where all latents are discrete.

    Raises:
        ValueError: when a latent has no unconstrained coordinates.
    """
    rows = traces.to_story(story, tuple(column[torch.arange(PRIOR_DRAWS) % len(column)] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        trace = poutine.trace(story.model).get_trace(*rows)
    sites = {name: site for name, site in latent_sites(trace).items() if not site["fn"].support.is_discrete}
    if not sites:
        return None
    transforms = {name: _to_support(name, site) for name, site in sites.items()}
    draws = {name: transforms[name].inv(site["value"]) for name, site in sites.items()}
    together = torch.cat([draw.reshape(PRIOR_DRAWS, -1) for draw in draws.values()], dim=1)
    low, middle, high = together.quantile(ONE_SIGMA.to(together), dim=0)  # heavy tails have no standard deviation
    shapes = {name: draw.shape[1:] for name, draw in draws.items()}
    return LatentSpace(shapes, transforms, middle, (high - low) / 2)


def _to_support(name: str, site: Site) -> Any:
    """The map from the whole space to the support of a site."""
    if isinstance(site["fn"], dist.VonMises):
        raise ValueError(f"Site {name!r} lives on a circle, which has no unconstrained coordinates; use 'importance'.")
    try:
        return biject_to(_of_any_row(name, site["fn"].support))
    except NotImplementedError:
        raise ValueError(
            f"Site {name!r} is supported on {site['fn'].support}, which has no unconstrained coordinates; use "
            "method='importance'."
        ) from None


def _of_any_row(name: str, support: Any, event_dim: int = 0) -> Any:
    """The support of one observation, where it is the same for all; its coordinates may have bounds of their own."""
    if isinstance(support, constraints.independent):
        base = _of_any_row(name, support.base_constraint, event_dim + support.reinterpreted_batch_ndims)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    support = copy(support)
    for attribute, bound in list(vars(support).items()):
        if isinstance(bound, Tensor) and bound.dim() > event_dim:
            if not bool((bound == bound[:1]).all()):
                raise ValueError(
                    f"The support of site {name!r} differs between observations. Draw it on a fixed support and "
                    "transform it in the model, or use method='importance'."
                )
            setattr(support, attribute, bound[0])
    return support


def latent_sites(trace: Trace) -> dict[str, Site]:
    """The random variables of a trace that are not scored against data."""
    return {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}


# The joint density


@dataclass(frozen=True)
class Joint:
    """A story's densities at chosen latents, row by row.

    Attributes:
        marked: discrete sites that the model sums out (marked ``infer={"enumerate": "parallel"}``).
        discrete: all discrete sites of the model.
        discrete_in_guide: all discrete sites of the guide.
        rows_together: how many rows a density is best asked for at once.
        model_dtype: of the model's matrix products; None is the story's.
    """

    story: Story
    space: LatentSpace | None
    marked: Assignments
    discrete: Assignments | None
    discrete_in_guide: Assignments | None
    chunks: Chunks
    layout: Layout
    replays: Replays
    rows_together: int
    model_dtype: torch.dtype | None = None
    why_no_space: str = ""

    @property
    def dim(self) -> int:
        """The number of continuous coordinates; 0 where all latents are discrete."""
        return self.space.dim if self.space else 0

    @property
    def guide_is_discrete(self) -> bool:
        """Whether the guide draws a discrete latent."""
        return self.discrete_in_guide is None or bool(self.discrete_in_guide.values)

    def log_prob_of_latents(self, columns: Columns, latents: dict[str, Tensor], num_particles: int) -> Tensor:
        """log p(x, latents) with latents of the guide in their own space and marked sites summed out, shape (S * N,).

        Here and below columns have N rows and latents S * N, particle by particle.
        """
        names = tuple(latents)

        def density(rows: Columns, *tensors: Tensor) -> tuple[Tensor]:
            values = dict(zip(names, tensors, strict=True))
            return (log_densities(self.model, rows, values, self.marked)[1],)

        name = ("log p(x, z)", names, num_particles)
        return self._map(name, density, columns, *latents.values(), num_particles=num_particles)[0]

    def log_prob(self, columns: Columns, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x, u) at points of shape (S * N, K), all discrete latents summed out; shapes (S * N,)."""
        num_particles = len(u) // len(columns[0])
        log_prior, log_joint = self._map("log p(x, u)", self._densities, columns, u, num_particles=num_particles)
        return log_prior, log_joint

    def with_gradients(self, columns: Columns, u: Tensor) -> tuple[Tensor, ...]:
        """log p(u), log p(x, u), and their gradients at points of shape (S * N, K); the gradients have its shape."""

        def densities_and_gradients(rows: Columns, u: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                u = u.detach().requires_grad_()
                log_ps = self._densities(rows, u)
                slopes = [torch.autograd.grad(log_p.sum(), u, retain_graph=True)[0] for log_p in log_ps]
            return (*(log_p.detach() for log_p in log_ps), *slopes)

        num_particles = len(u) // len(columns[0])
        return self._map(
            "the gradient of log p(x, u)", densities_and_gradients, columns, u, num_particles=num_particles
        )

    def with_hessian(self, columns: Columns, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x, u), its gradient and its Hessian, shapes (S * N,), (S * N, K) and (S * N, K, K)."""

        def derivatives(rows: Columns, u: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                u = u.detach().requires_grad_()
                log_p = self._densities(rows, u)[1]
                (slope,) = torch.autograd.grad(log_p.sum(), u, create_graph=True)
                hessian = torch.stack([_gradient(part, u) for part in slope.sum(0)], dim=1)
            return log_p.detach(), slope.detach(), hessian

        log_p, slope, hessian = self._in_chunks(derivatives, columns, u)
        return log_p, slope, hessian

    def _map(
        self,
        name: Any,
        function: Callable[..., tuple[Tensor, ...]],
        columns: Columns,
        *tensors: Tensor,
        num_particles: int,
    ) -> tuple[Tensor, ...]:
        """``function(rows, *tensors)`` of columns repeated for every particle; captured once it was called often."""

        def repeated(*flat: Tensor) -> tuple[Tensor, ...]:
            some = flat[len(columns) :]
            particles = len(some[0]) // size if some else num_particles
            return function(traces.as_rows(flat[: len(columns)], particles), *some)

        size = len(columns[0])
        rows = size * num_particles
        together = size * min(num_particles, max(1, self.rows_together // size))
        if together <= self.chunks.rows:
            try:
                parts = list(zip(*(tensor.split(together) for tensor in tensors), strict=True)) or [()]
                kept = len(columns)
                found = [self.replays.call(name, repeated, *columns, *part, num_kept=kept, rows=rows) for part in parts]
                return tuple(torch.cat(values) for values in zip(*found, strict=True))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        return self._in_chunks(function, columns, *tensors)

    def _in_chunks(
        self, function: Callable[..., tuple[Tensor, ...]], columns: Columns, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """``function(rows, *tensors)`` in chunks that fit into memory, with the rows of :func:`traces.as_rows`."""

        def of_rows(number: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            return function(tuple(column[number % len(column)] for column in columns), *parts)

        return self.chunks.map(of_rows, torch.arange(len(tensors[0]), device=columns[0].device), *tensors)

    def model(self, *rows: Tensor) -> Any:
        """The story's model, its matrix products in ``model_dtype``."""
        with matrix_products_in(self.model_dtype):
            return self.story.model(*rows)

    def _densities(self, rows: Columns, u: Tensor) -> tuple[Tensor, Tensor]:
        latents, log_volume = self._space.latents(u)
        log_prior, log_joint = log_densities(self.model, rows, latents, self._discrete)
        return log_prior + log_volume, log_joint + log_volume

    def log_guide(self, columns: Columns, u: Tensor) -> Tensor:
        """log q(u | x_n) of particles of shape (S, N, K), discrete latents summed out; shape (S, N)."""
        num_particles, num_observations, _ = u.shape
        summed = self.discrete_in_guide or Assignments()
        if self.layout == "plate" and summed.size == 1:
            latents, log_volume = self._space.latents(u.flatten(0, 1))
            latents = {name: value.unflatten(0, u.shape[:2]) for name, value in latents.items()}
            program = poutine.condition(self.story.guide, data=latents)
            trace = traces.run_particles(program, columns, num_particles, "plate")
            return traces.log_prob(trace, sample_sites(trace)) + log_volume.reshape(u.shape[:2])

        def density(u: Tensor, *rows: Tensor) -> tuple[Tensor]:
            latents, log_volume = self._space.latents(u)
            return (log_densities(self.story.guide, rows, latents, summed)[0] + log_volume,)

        rows = traces.as_rows(columns, num_particles)
        return self.chunks.map(density, u.flatten(0, 1), *rows)[0].reshape(num_particles, num_observations)

    def guide_latents(self, columns: Columns, num_particles: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the guide, by site name and of shape (S * N, *event), and their log density, shape (S, N)."""

        def drawn(*columns: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            trace = traces.run_particles(self.story.guide, columns, num_particles, self.layout)
            log_q = traces.log_prob(trace, sample_sites(trace)).reshape(-1)
            latents = traces.draws(trace)
            if self.layout == "plate":
                latents = {name: value.flatten(0, 1) for name, value in latents.items()}
            return latents, log_q.expand(num_particles * len(columns[0])).reshape(num_particles, -1)

        with within_memory(f"{num_particles} draws of the guide for each of {len(columns[0])} observations"):
            name = ("draws of the guide", self.layout, num_particles)
            rows = num_particles * len(columns[0])
            return self.replays.call(name, drawn, *columns, num_kept=len(columns), rows=rows)

    def guide_points(self, columns: Columns, num_particles: int) -> Tensor:
        """Draws of the guide, the continuous ones, shape (S, N, K)."""
        latents, _ = self.guide_latents(columns, num_particles)
        return self._space.coordinates(latents).reshape(num_particles, len(columns[0]), -1)

    def prior_points(self, columns: Columns, num_particles: int) -> Tensor:
        """Draws of the prior given each observation's conditions, the continuous ones, shape (S, N, K)."""
        with within_memory(f"{num_particles} draws of the prior for each of {len(columns[0])} observations"):
            trace = poutine.trace(self.story.model).get_trace(*traces.as_rows(columns, num_particles))
            return self._space.coordinates(traces.draws(trace)).reshape(num_particles, len(columns[0]), -1)

    def require_space(self, method: str) -> None:
        """Raises ValueError when there are no continuous latents to move through, or others that cannot be summed."""
        if self.space is None:
            raise ValueError(
                self.why_no_space or f"method={method!r} needs a continuous latent; use 'exact' for discrete ones."
            )
        if not self.can_move:
            raise ValueError(
                f"method={method!r} sums out discrete latents, and these have infinitely or too many values; "
                "use 'importance'."
            )

    def is_differentiable(self, columns: Columns) -> bool:
        """Whether torch has a derivative of everything in the model, tried on the first observation."""
        try:
            self.with_gradients(tuple(column[:1] for column in columns), torch.zeros(1, self.dim))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return False
        return True

    @property
    def can_move(self) -> bool:
        """Whether there are continuous latents, and all discrete ones can be summed out."""
        return self.space is not None and self.discrete is not None and self.discrete_in_guide is not None

    @property
    def _space(self) -> LatentSpace:
        assert self.space is not None
        return self.space

    @property
    def _discrete(self) -> Assignments:
        assert self.discrete is not None
        return self.discrete


def _gradient(part: Tensor, u: Tensor) -> Tensor:
    """Gradient of one component; zero where it does not depend on u."""
    if not part.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad(part, u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def joint_of(
    story: Story,
    columns: Columns,
    layout: Layout | None = None,
    compiled: bool = False,
    model_dtype: torch.dtype | None = None,
    work: Work | None = None,
) -> Joint:
    """The densities of a story that has passed its dry run.

    The layout of its guide is the fastest, and the work that of a draw, if they are not given.
    """
    rows = traces.to_story(story, tuple(column[torch.arange(2) % len(column)] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        model_trace, guide_trace = traces.run(story, *rows)
        layout = layout or traces.fastest_layout(story, rows)
    in_model, in_guide = (_discrete(latent_sites(trace)) for trace in (model_trace, guide_trace))
    marked = assignments(summed_out(model_trace, guide_trace))
    try:
        space, why_not = latent_space(story, columns), ""
    except ValueError as error:  # importance sampling does without it
        space, why_not = None, str(error)
    except RuntimeError as error:  # a model that runs on the guide's latents need not run on its own
        if is_out_of_memory(error):
            raise MemoryError("The story does not fit in memory with the draws that look at its prior.") from error
        space, why_not = None, f"The model fails on draws of its own prior: {str(error).splitlines()[0]}"
    work = work or work_of_a_draw(story, columns)
    on_cpu = rows[0].device.type == "cpu"
    return Joint(
        story=story,
        space=space,
        marked=marked,
        discrete=_assignments_if_finite(in_model),
        discrete_in_guide=_assignments_if_finite(in_guide),
        chunks=Chunks(),
        layout=layout,
        replays=Replays(compiled),
        rows_together=min(ROWS_IN_CACHE, max(1, NUMBERS_IN_CACHE // (work.widest or 1))) if on_cpu else ROWS_AT_ONCE,
        model_dtype=model_dtype,
        why_no_space=why_not,
    )


def work_of_a_draw(story: Story, columns: Columns) -> Work:
    """What a model's density takes for one draw more."""
    few, more = (_work(story, columns, rows) for rows in (FEW_ROWS, 2 * FEW_ROWS))
    return Work((more.flops - few.flops) // FEW_ROWS, (more.numbers - few.numbers) // FEW_ROWS, few.widest)


def _work(story: Story, columns: Columns, num_rows: int) -> Work:
    rows = traces.to_story(story, tuple(column[:1].expand(num_rows, *column.shape[1:]) for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        guide_trace = poutine.trace(story.guide).get_trace(*rows)
        with counted(num_rows) as work:
            poutine.trace(poutine.replay(story.model, trace=guide_trace)).get_trace(*rows).compute_log_prob()
    return work


def _discrete(sites: dict[str, Site]) -> dict[str, Site]:
    return {name: site for name, site in sites.items() if site["fn"].support.is_discrete}


def _assignments_if_finite(sites: dict[str, Site]) -> Assignments | None:
    try:
        return assignments(sites)
    except ValueError:
        return None
