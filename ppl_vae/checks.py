"""A dry run that explains what is wrong with a story, or with its data, before any training.

Pyro warns of some of these mistakes and broadcasts over others; here each is an error that says what was expected, what
came, and what to do.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.zero_inflated import ZeroInflatedDistribution
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import MixtureSameFamily, constraints

from ppl_vae import noise, traces
from ppl_vae.distributions import Columns, Columnwise, Levels, OpenInterval
from ppl_vae.stored import pieces
from ppl_vae.traces import Site, Story, observed_sites, sample_sites

PLATE = "observations"
ROWS_AT_ONCE = 4096

Transform = Callable[[Tensor], Tensor]

MIXTURE = "a mixture of "

_NO_COUNTS = (
    "Numbers that are negative or not whole are no counts: use likelihoods.Normal, Laplace or StudentT (real numbers), "
    "or LogNormal (above 0)."
)
REMEDIES = {
    "Bernoulli": (
        "Binarize (transform=torch.bernoulli, or binarization='static'), or use likelihoods.ContinuousBernoulli or "
        "DiscretizedLogistic (grey levels from 0 to 1), Binomial or Poisson (counts), or Normal (real numbers)."
    ),
    "ContinuousBernoulli": (
        "Divide by the largest value that there can be, or use likelihoods.Poisson (counts), LogNormal (above 0), or "
        "Normal, Laplace or StudentT (real numbers)."
    ),
    "Beta": (
        "Use likelihoods.ContinuousBernoulli where there are exact zeros or ones; beyond them LogNormal (above 0), or "
        "Normal (real numbers)."
    ),
    "LogNormal": (
        "Use likelihoods.Poisson or NegativeBinomial where zeros are counts, else Normal, Laplace or StudentT (real "
        "numbers)."
    ),
    "Binomial": (
        "Raise total_count, or use likelihoods.Poisson or NegativeBinomial (counts without a largest one), "
        "ContinuousBernoulli (from 0 to 1), or Normal (real numbers)."
    ),
    "Categorical": (
        "Number the classes from 0 on and let the network return a logit for each, or use likelihoods.Poisson "
        "(counts), or Normal (real numbers)."
    ),
    "Poisson": _NO_COUNTS,
    "NegativeBinomial": _NO_COUNTS,
    "ZeroInflatedPoisson": _NO_COUNTS,
    "ZeroInflatedNegativeBinomial": _NO_COUNTS,
    "DiscretizedLogistic": (
        "Divide whole grey levels by the largest one, levels - 1, or use likelihoods.ContinuousBernoulli (all numbers "
        "from 0 to 1), or Normal (real numbers)."
    ),
}


def check(story: Story, *columns: Tensor, transform: Transform | None = None) -> None:
    """Runs the story once on two rows, and looks at all the data; raises when either is not what it should be.

    The story must sample everything inside ``pyro.plate("observations", ...)`` at dim -1, its guide must draw the
    latents that its model has, with the same support, and every parameter must receive a gradient. The data must be
    finite (positions that a boolean column of the same shape marks False may hold anything), of equal length, and in
    the support of the sites that score them. No buffer, mode or generator moves.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: what follows the story in a call goes to the story; each tensor's first dimension is the observation.
        transform: applied to the first column before the story sees it, as in :func:`ppl_vae.fit`.

    Raises:
        ValueError: with what was expected, what came, and what to do.
        TypeError: when a column is not a tensor, or the model does not take so many of them.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> check(vae, torch.linspace(0, 0.9, 50).reshape(10, 5))
    Traceback (most recent call last):
        ...
    ValueError: x has values between 0 and 0.9; Bernoulli is a distribution over 0 and 1 (the first outside is in row 0,
    column 1). Binarize (transform=torch.bernoulli, or binarization='static'), or use likelihoods.ContinuousBernoulli or
    DiscretizedLogistic (grey levels from 0 to 1), Binomial or Poisson (counts), or Normal (real numbers).
    """
    dry_run(story, *columns, transform=transform, gradients=True)


def dry_run(
    story: Story, *columns: Tensor, transform: Transform | None = None, gradients: bool = False
) -> dict[str, torch.Size]:
    """What :func:`check` does, gradients on request; returns the event shape of each observed site."""
    names = _names_of(story, columns)
    rows = traces.to_story(story, _two_rows(columns))
    with _as_it_scores(story):
        if transform is not None:
            rows = (_transformed(transform, names[0], rows[0]), *rows[1:])
        with torch.set_grad_enabled(gradients):
            model_trace, guide_trace = _run(story, names, rows)
            # Before scoring: a class that has no logit is an index out of bounds, from which CUDA does not recover.
            _check_support_of_data(story, model_trace, dict(zip(names, columns, strict=True)), rows, transform)
            _score(model_trace, guide_trace, names, rows)
            for first_and_last in _numbers_at_their_ends(columns):
                _run(story, names, traces.to_story(story, first_and_last))
            _check_traces(story, model_trace, guide_trace)
            _check_finite_log_probs(model_trace, guide_trace)
            if gradients:
                _check_gradients(story, model_trace, guide_trace)
    return {name: site["fn"].event_shape for name, site in observed_sites(model_trace).items()}


def check_that_it_runs(story: Story, *columns: Tensor) -> None:
    """Raises ValueError where a story does not run on data, which are encoded and not scored: they may be grey."""
    names = _names_of(story, columns)
    with _as_it_scores(story), torch.no_grad():
        for some in (_two_rows(columns), *_numbers_at_their_ends(columns)):
            _run(story, names, traces.to_story(story, some))


def _names_of(story: Story, columns: Sequence[Tensor]) -> list[str]:
    names = column_names(story, columns)
    check_columns(names, columns)
    refuse_half_precision(story)
    return names


def _two_rows(columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(column[torch.arange(2) % len(column)] for column in columns)


@contextmanager
def _as_it_scores(story: Story) -> Iterator[None]:
    """Inside, the story has the modes and noise of a check; afterwards nothing has moved."""
    device, _ = traces.device_and_dtype(story)
    with noise.unit(device, 0, noise.Purpose.CHECK), traces.scoring(story), kept_buffers(story):
        yield


def _numbers_at_their_ends(columns: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each column of labels, one whole number a row, the rows of its least and its greatest: tables have ends."""
    for labels in filter(_are_labels, columns):
        found = [numbers[[int(some.argmin()), int(some.argmax())]] for numbers, (some,) in pieces(labels)]
        candidates = torch.cat(found)
        values = labels[candidates]
        ends = candidates[[int(values.argmin()), int(values.argmax())]]
        yield tuple(column[ends] for column in columns)


def _are_labels(column: Tensor) -> bool:
    return column.dim() == 1 and not (column.is_floating_point() or column.is_complex() or column.dtype == torch.bool)


def refuse_half_precision(story: Story) -> None:
    """Raises ValueError for a story in 16 bits: sums over pixels and log densities lose their digits there."""
    _, dtype = traces.device_and_dtype(story)
    if dtype.itemsize < torch.float32.itemsize:
        raise ValueError(
            f"The story is in {dtype}, too coarse for densities: use story.float(), and fit(mixed_precision=True) or "
            "log_evidence(model_dtype=torch.bfloat16) for its networks alone."
        )


@contextmanager
def kept_buffers(story: Story) -> Iterator[None]:
    """Inside, a run may move buffers; afterwards they hold what they held."""
    before = {name: buffer.clone() for name, buffer in story.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in story.named_buffers():
            buffer.copy_(before[name])


# The data


def column_names(story: Story, columns: Sequence[Tensor]) -> list[str]:
    """What the story's model calls its columns, for messages; TypeError when it does not take them."""
    for position, column in enumerate(columns):
        if not isinstance(column, Tensor):
            remedy = "This data has no labels: pass split.x." if column is None else "Pass torch.as_tensor(column)."
            raise TypeError(f"Column {position} must be a tensor; found {type(column).__name__}. {remedy}")
    signature = inspect.signature(story.model)
    try:
        bound = signature.bind(*columns)
    except TypeError as error:
        raise TypeError(f"The model takes {signature} and is given {len(columns)} columns: {error}.") from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        names += [f"{name}[{i}]" for i in range(len(value))] if isinstance(value, tuple) else [name]
    return names


def check_at_least(least: int, **arguments: int) -> None:
    """Raises ValueError naming the argument that is smaller."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; found {value}.")


def check_columns(names: Sequence[str], columns: Sequence[Tensor]) -> None:
    """Raises ValueError unless there are columns, of one length, not empty, with finite values."""
    if not columns:
        raise ValueError("Expected at least one column of data; found none.")
    if sparse := [name for name, column in zip(names, columns, strict=True) if column.layout != torch.strided]:
        raise ValueError(f"{sparse[0]} is a sparse tensor; pass {sparse[0]}.to_dense().")
    if scalars := [name for name, column in zip(names, columns, strict=True) if not column.dim()]:
        raise ValueError(f"A column's first dimension is the observation; {scalars[0]} is a single number.")
    lengths = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Every column holds one entry per observation; found the lengths {lengths}.")
    if not columns[0].numel():
        shape = tuple(columns[0].shape)
        raise ValueError(
            f"Expected at least one observation, of at least one number; {names[0]} has the shape {shape}."
        )
    for name, column in zip(names, columns, strict=True):
        if column.is_floating_point():
            masks = [mask for mask in columns if mask.dtype == torch.bool and mask.shape == column.shape]
            _check_finite(name, column, masks)


def _check_finite(name: str, column: Tensor, masks: list[Tensor]) -> None:
    first, num_rows = "", 0
    for numbers, (values, *known) in pieces(column, *masks):
        bad = ~torch.isfinite(values)
        for mask in known:
            bad &= mask.to(bad.device)
        if bad.any():
            first = first or f"{values[bad][0].item()} in {_first_place(bad, numbers)}"
            num_rows += int(bad.reshape(len(bad), -1).any(1).sum())
    if num_rows:
        raise ValueError(
            f"{name} is {first} ({num_rows} of {len(column)} rows are not finite). Remove these rows, or tell a story "
            "that reads a mask column which values are missing."
        )


def _first_place(bad: Tensor, numbers: Tensor, first_column: int = 0) -> str:
    """Row, by its number, and column of the first True, in words."""
    row, *position = bad.nonzero()[0].tolist()
    position[:1] = [first_column + column for column in position[:1]]
    return f"row {numbers[row]}" + (f", column {', '.join(map(str, position))}" if position else "")


def _transformed(transform: Transform, name: str, column: Tensor) -> Tensor:
    try:
        return transform(column)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"transform fails on {name}, with values between {column.min():.3g} and {column.max():.3g}: "
            f"{_reason(error)}. Scale {name} to what the transform takes (torch.bernoulli: 0 to 1), or leave it out."
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _check_support_of_data(
    story: Story, model_trace: Trace, columns: dict[str, Tensor], rows: Sequence[Tensor], transform: Transform | None
) -> None:
    """All of a column where a site scores it as it is, otherwise the two rows that the story made of it."""
    for name, site in observed_sites(model_trace).items():
        if site["fn"].shape() != site["value"].shape:
            continue  # for _check_observation
        scored = [position for position, value in enumerate(rows) if value is site["value"]]
        wholes = [(part, _whole_column_constraint(part.distribution)) for part in _parts(site["fn"])]
        for part, whole in wholes:
            if not scored or whole is None:
                _check_values(name, part, part.distribution.support, site["value"], torch.arange(2))
        if not scored:
            continue
        column_name, column = list(columns.items())[scored[0]]
        change = transform if scored[0] == 0 else None
        shown = column_name if change is None else f"transform({column_name})"
        for numbers, values in pieces(column, most_rows=ROWS_AT_ONCE):
            (chunk,) = traces.to_story(story, values)
            if change is not None:
                chunk = _transformed(change, column_name, chunk)
            for part, whole in wholes:
                if whole is not None:
                    _check_values(shown, part, whole, chunk, numbers)


@dataclass(frozen=True)
class _Part:
    """What one distribution scores: an observation, or so many columns of a table from the first one on."""

    distribution: Any
    first_column: int = 0
    num_columns: int = 0

    def of(self, values: Tensor) -> Tensor:
        """What of some observations it scores."""
        if not self.num_columns:
            return values
        columns = values.narrow(-1, self.first_column, self.num_columns)
        return columns if self.distribution.event_dim else columns.squeeze(-1)

    def __str__(self) -> str:
        if not self.num_columns:
            return ""
        last = self.first_column + self.num_columns - 1
        return f" in column {last}" if self.num_columns == 1 else f" in columns {self.first_column} to {last}"


def _parts(distribution: Any) -> list[_Part]:
    """Those that stand side by side in a table; else the distribution itself."""
    joint = _unwrapped(distribution)
    if not isinstance(joint, Columns):
        return [_Part(distribution)]
    ends = zip(joint.parts, joint.widths, accumulate(joint.widths), strict=True)
    return [_Part(part, end - width, width) for part, width, end in ends]


def _whole_column_constraint(distribution: dist.TorchDistribution) -> Any:
    """A support that is the same for every row, to check any number of rows with; None if it depends on the row."""
    constraint = copy(_base_constraint(distribution.support))
    for name, bound in vars(constraint).items():
        if isinstance(bound, Tensor):
            if len(bound.unique()) == 1:
                bound = bound.flatten()
            elif bound.dim() != 1 + distribution.event_dim or not bool((bound == bound[:1]).all()):
                return None
            setattr(constraint, name, bound[0])
    return constraint


def _check_values(name: str, part: _Part, support: Any, values: Tensor, numbers: Tensor) -> None:
    if bool((bad := ~torch.isfinite(values)).any()):
        raise ValueError(
            f"{name} is {values[bad][0].item()} in {_first_place(bad, numbers)}, where the model scores it. Fill "
            "missing values (torch.where) before the distribution and mask after it: a mask alone leaves NaN gradients."
        )
    values = part.of(values)
    if bool((bad := ~support.check(values)).any()):
        family, place = _family(part.distribution), _first_place(bad, numbers, part.first_column)
        remedy = REMEDIES.get(family.removeprefix(MIXTURE), "Use a likelihood with the support of the data.")
        raise ValueError(
            f"{name} has values between {values.min():.3g} and {values.max():.3g}{part}; {family} is a distribution "
            f"over {_numbers(support)} (the first outside is in {place}). {remedy}"
        )


# The story


def _run(story: Story, names: Sequence[str], rows: tuple[Tensor, ...]) -> tuple[Trace, Trace]:
    try:
        return traces.run(story, *rows)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _does_not_run(names, rows, error) from error


def _score(model_trace: Trace, guide_trace: Trace, names: Sequence[str], rows: tuple[Tensor, ...]) -> None:
    try:
        for trace in (model_trace, guide_trace):
            trace.compute_log_prob()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _does_not_run(names, rows, error) from error


def _does_not_run(names: Sequence[str], rows: tuple[Tensor, ...], error: Exception) -> ValueError:
    shown = [row.tolist() if _are_labels(row) else tuple(row.shape) for row in rows]
    shapes = ", ".join(f"{name} {what}" for name, what in zip(names, shown, strict=True))
    return ValueError(
        f"The story does not run on two rows ({shapes}): {_reason(error)}. Compare the shapes that its networks "
        f'take with those of the data; pyro.plate("{PLATE}", len(x)) is as long as the columns, and not '
        "subsampled; inner dimensions are declared with .to_event."
    )


def _check_traces(story: Story, model_trace: Trace, guide_trace: Trace) -> None:
    _check_sites(model_trace, guide_trace)
    for trace in (model_trace, guide_trace):
        _check_parameters_are_owned(story, trace)
        for name, site in sample_sites(trace).items():
            traces.refuse_scale(name, site)
            _check_plate(name, site)
    for name, site in observed_sites(model_trace).items():
        _check_observation(name, site)
    for name, site in sample_sites(guide_trace).items():
        _check_same_support(name, traces.nodes(model_trace)[name]["fn"], site["fn"])


def _check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    latent = {name for name, site in sample_sites(model_trace).items() if not site["is_observed"]}
    summed_out = {name for name in latent if traces.nodes(model_trace)[name]["infer"].get("enumerate") == "parallel"}
    guessed = set(sample_sites(guide_trace))
    remedy = "Sites of the model and its guide match by name."
    if not observed_sites(model_trace):
        raise ValueError(f"The model scores no data: none of its sites {sorted(latent)} has obs=. Pass obs=x to one.")
    if missing := latent - guessed - summed_out:
        raise ValueError(f"The model draws {sorted(missing)}; the guide draws only {sorted(guessed)}. {remedy}")
    if extra := guessed - latent:
        raise ValueError(f"The guide draws {sorted(extra)}; the model draws only {sorted(latent)}. {remedy}")


def _check_parameters_are_owned(story: Story, trace: Trace) -> None:
    owned = {id(parameter) for _, parameter in story.named_parameters()}
    for name, site in traces.nodes(trace).items():
        if site["type"] != "param":
            continue
        if id(_stored(site)) not in owned:
            raise ValueError(
                f"pyro.param({name!r}) does not belong to the story and would not be saved with it. Make it an "
                "nn.Parameter, or a PyroParam of a PyroModule, that the story holds."
            )
        meant = site["args"][-1]
        if id(meant) in owned and meant is not _stored(site):
            raise ValueError(
                f"Two parameters of the story share the name {name!r} in Pyro's store, where the second would never "
                "train. Make the parts plain nn.Modules, or the story a PyroModule, so that each has a name of its own."
            )


def _stored(param_site: Site) -> Tensor:
    """The tensor that Pyro's store holds for a parameter."""
    return param_site["value"].unconstrained()


def _check_plate(name: str, site: Site) -> None:
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    if PLATE not in frames:
        found = f"in the plates {sorted(frames)}" if frames else "in no plate"
        raise ValueError(
            f"Site {name!r} lies {found}, not in {PLATE!r}: one value for the whole data set. log p(x) is per "
            f'observation: draw it inside pyro.plate("{PLATE}", len(x)), or make an unknown constant a parameter.'
        )
    if frames[PLATE].dim != -1 or len(frames) > 1:
        raise ValueError(
            f"Site {name!r} lies in the plates {sorted(frames)}, with {PLATE!r} at dim {frames[PLATE].dim}: it must be "
            "the only plate, at dim -1. Declare inner structure with .to_event."
        )
    batch_shape = tuple(site["fn"].batch_shape)
    if batch_shape != (2,) or site["log_prob"].shape != (2,):
        raise ValueError(
            f"Site {name!r} has the batch shape {batch_shape} on two rows; expected (2,). The plate {PLATE!r} is as "
            "long as the columns, and every other dimension is declared with .to_event."
        )


def _check_finite_log_probs(model_trace: Trace, guide_trace: Trace) -> None:
    for trace, part in ((model_trace, "model"), (guide_trace, "guide")):
        for name, site in sample_sites(trace).items():
            if not bool(torch.isfinite(site["log_prob"]).all()):
                found = site["log_prob"].detach().tolist()
                raise ValueError(
                    f"Site {name!r} of the {part} has the log probabilities {found} on two rows; expected finite "
                    "numbers. Look for a scale of zero, a logarithm of zero, or data outside the support."
                )


def _check_observation(name: str, site: Site) -> None:
    expected, found = tuple(site["fn"].shape()), tuple(site["value"].shape)
    if expected != found:
        raise ValueError(
            f"Site {name!r} makes observations of shape {expected} and is given {found} on two rows. The likelihood's "
            "network must return the shape of the data."
        )


def _check_same_support(name: str, prior: dist.TorchDistribution, guide: dist.TorchDistribution) -> None:
    if tuple(prior.event_shape) != tuple(guide.event_shape):
        raise ValueError(
            f"The model draws {name!r} with the event shape {tuple(prior.event_shape)}, the guide with "
            f"{tuple(guide.event_shape)}. They must be the same."
        )
    if _region(prior.support) != _region(guide.support):
        raise ValueError(
            f"The model draws {name!r} from {_family(prior)} over {_numbers(prior.support)}, the guide from "
            f"{_family(guide)} over {_numbers(guide.support)}. The guide must cover what the prior covers, and "
            "no more: choose a family with that support, or transform one."
        )


def _check_gradients(story: Story, model_trace: Trace, guide_trace: Trace) -> None:
    log_p = sum((site["log_prob"].sum() for site in sample_sites(model_trace).values()), torch.zeros(()))
    log_q = sum((site["log_prob"].sum() for site in sample_sites(guide_trace).values()), torch.zeros(()))
    total = log_p - log_q
    _check_leaves_are_owned(story, total)
    trained = {name: parameter for name, parameter in story.named_parameters() if parameter.requires_grad}
    if trained and total.requires_grad:
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    else:
        gradients = (None,) * len(trained)
    if idle := [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        raise ValueError(
            f"{len(idle)} of {len(trained)} parameters receive no gradient, {idle[0]!r} first. Use it in the model or "
            "the guide, remove it, or call requires_grad_(False)."
        )


def _check_leaves_are_owned(story: Story, total: Tensor) -> None:
    """What the log probabilities have gradients for are parameters of the story."""
    owned = {id(parameter) for _, parameter in story.named_parameters()}
    seen: set[Any] = {None}
    waiting: list[Any] = [total.grad_fn]
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None and id(leaf) not in owned:
            raise ValueError(
                f"The story uses a trainable tensor of shape {tuple(leaf.shape)} that is none of its parameters: "
                "it would never train. A plain function hides the network it holds; make it an nn.Module."
            )


# Names for distributions and their supports


def _unwrapped(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist") and isinstance(
        distribution, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution
    ):
        distribution = distribution.base_dist
    return distribution


def _family(distribution: Any) -> str:
    distribution = _unwrapped(distribution)
    if isinstance(distribution, MixtureSameFamily):
        return MIXTURE + _family(distribution.component_distribution)
    if isinstance(distribution, ZeroInflatedDistribution):
        return "ZeroInflated" + _family(distribution.base_dist)
    return type(distribution).__name__


def _base_constraint(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent | constraints.MixtureSameFamilyConstraint):
        constraint = constraint.base_constraint
    return constraint


def _bounds(constraint: Any) -> tuple[list[float], list[float]] | None:
    """The lower and the upper ends of an interval, more than one where they differ by row; None for other regions."""
    if not (hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound")):
        return None
    ends = getattr(constraint, "lower_bound", -torch.inf), getattr(constraint, "upper_bound", torch.inf)
    low, high = (torch.as_tensor(end, dtype=torch.float64).unique().tolist() for end in ends)
    return low, high


def _region(constraint: Any) -> object:
    """Equal for two constraints that admit the same numbers; bounds are compared, open or closed ends are not."""
    constraint = _base_constraint(constraint)
    if isinstance(constraint, Levels):
        return constraint.levels
    if isinstance(constraint, Columnwise):
        return tuple(map(_region, constraint.supports)), tuple(constraint.widths)
    return constraint.is_discrete, _bounds(constraint) or type(constraint).__name__.removesuffix("_vector")


def _numbers(constraint: Any) -> str:
    """What a constraint admits, in words."""
    constraint = _base_constraint(constraint)
    if isinstance(constraint, type(constraints.boolean)):
        return "0 and 1"
    if isinstance(constraint, Levels):
        return f"the {constraint.levels} numbers k / {constraint.levels - 1} from 0 to 1"
    if isinstance(constraint, OpenInterval):
        return f"the numbers between {constraint.lower_bound:g} and {constraint.upper_bound:g}, not these two"
    kind = "whole numbers" if constraint.is_discrete else "numbers"
    if bounds := _bounds(constraint):
        if isinstance(constraint, constraints.greater_than):
            return f"numbers above {bounds[0][0]:g}"
        return f"{kind} from {bounds[0][0]:g} to {bounds[1][-1]:g}"
    return f"{type(constraint).__name__.strip('_').lower()} {kind}"
