"""Discrete latents, summed out: their joint values, and log p with the story told once for each of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae import noise, traces
from ppl_vae.traces import Columns, Site, Story, sample_sites

MAX_ASSIGNMENTS = 4096


def summed_out(model_trace: Trace, guide_trace: Trace) -> dict[str, Site]:
    """The latents that the model marks ``infer={"enumerate": "parallel"}`` and the guide leaves alone, by name."""
    return {
        name: site
        for name, site in sample_sites(model_trace).items()
        if site["infer"].get("enumerate") == "parallel"
        and not site["is_observed"]
        and name not in traces.nodes(guide_trace)
    }


@dataclass(frozen=True)
class Assignments:
    """Every joint value of some discrete sites: ``values[name]`` has shape (A, *event)."""

    values: dict[str, Tensor] = field(default_factory=dict)
    size: int = 1


def assignments(sites: dict[str, Site]) -> Assignments:
    """The joint values of discrete sites with finite support.

    Raises:
        ValueError: when a support is infinite, differs between observations, or there are more than
            ``MAX_ASSIGNMENTS`` joint values.
    """
    if not sites:
        return Assignments()
    supports = [_support_values(name, site["fn"]) for name, site in sites.items()]
    size = math.prod(map(len, supports))
    if size > MAX_ASSIGNMENTS:
        raise ValueError(
            f"The discrete sites {list(sites)} have {size} joint values, more than {MAX_ASSIGNMENTS} to sum over. Let "
            "the guide draw some of them instead of marking them for enumeration."
        )
    return Assignments(dict(zip(sites, _product(supports), strict=True)), size)


def _support_values(name: str, fn: Any) -> Tensor:
    """The values that a discrete site can take, shape (values, *event)."""
    base = fn
    while isinstance(base, dist.Independent):
        base = base.base_dist
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(f"Site {name!r} cannot be summed out: {error}") from None
    values = values.reshape(len(values), *base.event_shape)
    if base is fn:
        return values
    elements = fn.event_shape.numel() // base.event_shape.numel()
    if len(values) ** elements > MAX_ASSIGNMENTS:
        raise ValueError(
            f"Site {name!r} has {len(values)}^{elements} values, more than {MAX_ASSIGNMENTS} to sum over; let the "
            "guide draw it instead."
        )
    return torch.stack(_product([values] * elements), dim=1).reshape(-1, *fn.event_shape)


def _product(sets: list[Tensor]) -> list[Tensor]:
    """Every combination of the rows of some tensors, each on its own device: as many tensors of equal length."""
    lengths = [len(rows) for rows in sets]
    return [
        rows.repeat_interleave(math.prod(lengths[position + 1 :]), dim=0).repeat(
            math.prod(lengths[:position]), *(1 for _ in rows.shape[1:])
        )
        for position, rows in enumerate(sets)
    ]


def tell(program: Callable[..., Any], rows: Columns, latents: dict[str, Tensor]) -> Trace:
    """The trace of a model or a guide in which these latents have these values, one for each row."""
    return poutine.trace(poutine.condition(program, data=latents)).get_trace(*rows)


def log_densities(
    program: Callable[..., Any], rows: Columns, latents: dict[str, Tensor], summed: Assignments
) -> tuple[Tensor, Tensor]:
    """log p(latents) and log p(latents, x) of each row, shapes (R,), with the sites in ``summed`` summed out."""
    num_rows = len(rows[0])
    repeated = {name: value.repeat(summed.size, *(1 for _ in value.shape[1:])) for name, value in latents.items()}
    assigned = {name: value.repeat_interleave(num_rows, dim=0) for name, value in summed.values.items()}
    told = repeated | assigned
    trace = tell(program, traces.as_rows(rows, summed.size), told)
    sites = sample_sites(trace)
    log_prior = traces.log_prob(trace, {name: site for name, site in sites.items() if name in told})
    log_likelihood = traces.log_prob(trace, {name: site for name, site in sites.items() if name not in told})
    return tuple(  # pyright: ignore[reportReturnType]
        log_p.expand(summed.size * num_rows).reshape(summed.size, num_rows).logsumexp(0)
        for log_p in (log_prior, log_prior + log_likelihood)
    )


def draw_given(
    program: Callable[..., Any], rows: Columns, latents: dict[str, Tensor], marked: Assignments
) -> dict[str, Tensor]:
    """A draw of p(marked | x, latents) for each row, by site name; nothing where no site is marked."""
    if not marked.values:
        return {}
    each = [
        Assignments({name: values[number : number + 1] for name, values in marked.values.items()})
        for number in range(marked.size)
    ]
    log_joint = torch.stack([log_densities(program, rows, latents, one)[1] for one in each], dim=1)
    chosen = dist.Categorical(logits=log_joint).sample()
    return {name: values[chosen] for name, values in marked.values.items()}


def posterior_predictive(story: Story, *columns: Tensor, seed: int = 0) -> Trace:
    """The model told again with latents guessed for each row: new observations, the data are not seen again.

    Latents that the model sums out are drawn given x and what the guide drew.
    """
    with noise.unit(columns[0].device, seed, noise.Purpose.PREDICTIVE), traces.scoring(story):
        model_trace, guide_trace = traces.run(story, *columns)
        latents = traces.draws(guide_trace)
        latents |= draw_given(story.model, columns, latents, assignments(summed_out(model_trace, guide_trace)))
        return traces.retell(story.model, columns, latents)
