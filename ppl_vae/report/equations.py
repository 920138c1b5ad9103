"""A story as mathematics: one line for each random variable of the model and of the guide, found by running them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae import checks, noise, traces
from ppl_vae.discrete import tell
from ppl_vae.traces import Columns, Site, Story

ROWS = 8


@dataclass(frozen=True)
class Equation:
    """``name | given ~ family(parameters)``.

    Attributes:
        name: of the site.
        given: the sites and arguments that its distribution depends on.
        family: the distribution.
        parameters: what each parameter is: a number, "learned", "fixed", or a function of what is given.
        size: how many numbers an observation has of it.
        observed: whether it is scored against data.
    """

    name: str
    given: tuple[str, ...]
    family: str
    parameters: dict[str, str]
    size: int
    observed: bool

    def __str__(self) -> str:
        left = " | ".join(filter(None, (self.name, ", ".join(self.given))))
        return f"{left} ~ {self.family}({', '.join(f'{name} = {value}' for name, value in self.parameters.items())})"


def equations(story: Story, *columns: Tensor) -> tuple[list[Equation], list[Equation]]:
    """The random variables of the model, and those of the guide.

    A site depends on what changes its distribution when it is exchanged between observations, all else left alone.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> model, guide = equations(vae, torch.eye(5))
    >>> print(*model, *guide, sep="; ")
    z ~ Normal(loc = 0, scale = 1); x | z ~ Bernoulli(logits = f(z)); z | x ~ Normal(loc = f(x), scale = f(x))
    """
    checks.check_columns(checks.column_names(story, columns), columns)
    numbers = torch.linspace(0, len(columns[0]) - 1, ROWS).round().long()
    rows = traces.to_story(story, tuple(column[numbers] for column in columns))
    with traces.scoring(story), noise.unit(rows[0].device, 0, noise.Purpose.CHECK), torch.enable_grad():
        model_trace, guide_trace = traces.run(story, *rows)
        latents = {name: site for name, site in traces.sample_sites(model_trace).items() if not site["is_observed"]}
        return _equations(story.model, rows, latents), _equations(story.guide, rows, traces.sample_sites(guide_trace))


def _equations(program: Callable[..., Any], rows: Columns, latents: dict[str, Site]) -> list[Equation]:
    """One for each random variable, in the order of the program."""
    values = {name: site["value"].detach() for name, site in latents.items()}
    sites = traces.sample_sites(tell(program, rows, values))
    exchanged = {name: (rows, values | {name: value.roll(1, 0)}) for name, value in values.items()}
    for position, argument in enumerate(_arguments(program, len(rows))):
        moved = tuple(column.roll(1, 0) if number == position else column for number, column in enumerate(rows))
        exchanged[argument] = moved, values
    retold = {name: traces.sample_sites(tell(program, *told)) for name, told in exchanged.items()}
    return [
        _equation(name, site, name in values, {other: told[name] for other, told in retold.items() if other != name})
        for name, site in sites.items()
    ]


def _equation(name: str, site: Site, latent: bool, retold: dict[str, Site]) -> Equation:
    value = site["value"]
    given = tuple(
        other for other, told in retold.items() if not _same(site["fn"].log_prob(value), told["fn"].log_prob(value))
    )
    base = _base(site["fn"])
    parameters = {
        parameter: _described(tensor, [other for other in given if not _same(tensor, _of(retold[other], parameter))])
        for parameter, tensor in _parameters(base).items()
    }
    return Equation(name, given, type(base).__name__, parameters, site["fn"].event_shape.numel(), not latent)


def _described(parameter: Tensor, given: list[str]) -> str:
    """A parameter in a few letters."""
    if given:
        return f"f({', '.join(given)})"
    if parameter.requires_grad:
        return "learned"
    return f"{parameter.flatten()[0].item():g}" if bool((parameter == parameter.flatten()[0]).all()) else "fixed"


def _base(distribution: Any) -> Any:
    """A distribution without what repeats or masks it."""
    while hasattr(distribution, "base_dist") and not hasattr(distribution, "transforms"):
        distribution = distribution.base_dist
    return distribution


def _parameters(base: Any) -> dict[str, Tensor]:
    """The tensors that a distribution was made of; not their other forms, such as probs beside logits."""
    names = [name for name in base.arg_constraints if name in vars(base)] or list(base.arg_constraints)
    return {name: tensor for name in names if isinstance(tensor := getattr(base, name), Tensor)}


def _of(site: Site, parameter: str) -> Tensor:
    return _parameters(_base(site["fn"]))[parameter]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def _arguments(program: Callable[..., Any], number: int) -> list[str]:
    """What the program calls its columns."""
    named = [
        name
        for name, argument in inspect.signature(program).parameters.items()
        if argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
    ]
    return [named[position] if position < len(named) else f"column {position + 1}" for position in range(number)]
