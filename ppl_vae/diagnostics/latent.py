r"""Latent space, looked at: what its places decode to, who lives where, and the posterior of one observation.

Places are named by the values of the latents, one coordinate for each number: ``z[0]``, ``z[1]``, or ``size``. A latent
whose numbers bind each other (a simplex) is given in unconstrained coordinates. Discrete latents are summed out.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from matplotlib.ticker import MaxNLocator
from pyro import poutine
from scipy.spatial import KDTree
from scipy.special import entr
from torch import Tensor
from torch.distributions import transforms

from ppl_vae import checks, noise, traces
from ppl_vae.diagnostics.collapse import ACTIVE
from ppl_vae.discrete import Assignments, tell
from ppl_vae.evidence import sharing
from ppl_vae.evidence.joint import Joint, LatentSpace, coordinate_names, joint_of
from ppl_vae.evidence.proposals import blocks
from ppl_vae.evidence.quadrature import RESOLVED
from ppl_vae.traces import Columns, Site, Story

PRIOR_DRAWS = 20_000
DRAWS_AT_ONCE = 1000
ENCODING_DRAWS = 256
POINTS_AT_ONCE = 1024
ROWS_COMPARED = 2  # of every value of the discrete latents; a prior that is the same for all depends on no latent

PROBES = (0.158655254, 0.5, 0.841344746)  # a standard deviation below, the middle, and one above
INHABITED = 0.05  # of the density that the prior has there
AMBIGUOUS = 0.5  # bits

FIRST_HALF_WIDTH = 7.0  # prior standard deviations
FIRST_SIZE, ZOOM_SIZE, MOST_ZOOMS = 121, 61, 12
SETTLED = 0.8  # of the width before
NEGLIGIBLE = 14.0  # nats below the highest place: 1e-6 of a normal in the plane lies beyond
SMALL_ANGLE = 1e-4


# Public diagnostics


def atlas(
    story: Story,
    *columns: Tensor,
    labels: Tensor | None = None,
    size: int = 20,
    num_nearest: int = 3,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""The plane of two latent dimensions: what it decodes to, who lives where, and which label is likely there.

    The grid lies at the middles of ``size`` equal steps of each coordinate's prior quantiles, so that cells hold equal
    prior probability where the dimensions are independent. Labels follow from Bayes' rule under the aggregate posterior
    of the columns,

    .. math:: q(z, y) = \frac1N \sum_n q(z \mid x_n)\, [y_n = y], \qquad p(y \mid z) = \frac{q(z, y)}{q(z)},

    with the guide's own densities; where its entropy is high, an observation may become one of another label by a small
    step. Where q(z) / p(z) is small nobody lives, whatever is decoded there: a hole of the aggregate posterior (Rosca,
    Lakshminarayanan & Mohamed 2018, https://arxiv.org/abs/1802.06847).

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, of two latent dimensions.
        columns: as for :func:`ppl_vae.log_evidence`. The grid is decoded with the conditions of the first observation.
        labels: whole numbers, shape ``(N,)``; the story need not know them.
        size: cells along each side of the grid.
        num_nearest: so many observations are named for each cell.
        seed: rules draws of prior, guide and likelihood, where quantiles and means have no closed form.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset over (row, column), the rows from the top, with the coordinates ``row`` and ``column`` in quantiles:

        ``decoded`` (and the event), the mean of p(x | z), the mode where x is a class; ``z`` (and latent);
        ``log_prior`` and ``log_aggregate``, log p(z) and log q(z) in nats; ``density``, q(z) / p(z), the density of
        the aggregate posterior where that of the prior is 1; ``inhabited``, 1 where that is at least 0.05, else 0;
        ``nearest`` (and rank), numbers of the observations whose encodings are nearest in prior quantiles, and
        ``nearest_distance``, how far they are; ``prior_mass``, the cell's share of the prior's probability.

        Over observation: ``encoding`` (and latent), the mean of q(z | x), and ``place``, its prior quantiles.

        With labels: ``probability`` (and label), p(y | z); ``entropy`` in nats and ``entropy_bits``; ``confusion``
        (label, other), the mean of p(y | z) p(y' | z) under q(z); and ``labels`` (observation).

        ``tick_value`` (latent, tick) are round values of each coordinate, ``tick_quantile`` their prior quantiles.

        Attributes: ``num_observations``, ``size``, ``seed``, ``share_inhabited`` of the prior's probability (where
        observations are fewer than cells, much is empty because they are few), ``exact_quantiles`` (1 where the prior's
        quantiles are in closed form); with labels ``num_labels``, ``share_ambiguous`` (of what is inhabited, where the
        label is open by more than half a bit), ``mean_entropy`` (nats, under q(z) on the grid), and ``most_confused``,
        the two labels that share most.

    Raises:
        ValueError: when the story does not have two continuous latent dimensions or is not scored against one site,
            labels are not one number for each observation, or an argument is out of range.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> computed = atlas(vae, torch.ones(6, 5), labels=torch.tensor([0, 1, 0, 1, 0, 1]), size=4)
    >>> computed["probability"].dims, computed["probability"].shape
    (('row', 'column', 'label'), (4, 4, 2))
    """
    checks.check_that_it_runs(story, *columns)
    checks.check_at_least(2, size=size)
    checks.check_at_least(1, num_nearest=num_nearest)
    numbers = None if labels is None else _check_labels(labels, len(columns[0]))
    with traces.scoring(story):
        view = _view(story, columns, "The atlas")
        _refuse_other_than_two(view, "The atlas")
        sides = marginals(view, seed)
        middles = (np.arange(size) + 0.5) / size
        first, second = (side.icdf(torch.tensor(middles).to(view.space.loc)) for side in sides)
        up, right = torch.meshgrid(second.flip(0), first, indexing="ij")
        z = torch.stack([right, up], dim=-1).flatten(0, 1)
        table = _on_grid(view, z, numbers, columns, seed, progress)
        encoded = encodings(view, columns, seed, progress)
        place = torch.stack([side.cdf(own) for side, own in zip(sides, encoded.T, strict=True)], dim=1)
    square = {"row": size, "column": size}
    dataset = xr.Dataset(
        {name: ((*square, *dims), _numpy(part.unflatten(0, (size, size)))) for name, (dims, part) in table.items()}
        | {
            "encoding": (("observation", "latent"), _numpy(encoded)),
            "place": (("observation", "latent"), _numpy(place)),
        },
        {
            "row": middles[::-1],
            "column": middles,
            "latent": view.names,
            "observation": np.arange(len(encoded)),
        },
        {
            "num_observations": len(encoded),
            "size": size,
            "seed": seed,
            "exact_quantiles": int(all(isinstance(side, ClosedForm) for side in sides)),
        },
    )
    dataset = _with_prior_mass(_with_ticks(dataset, sides, z), sides, z)
    dataset = _with_nearest(_with_density(dataset), num_nearest)
    return dataset if numbers is None else _with_labels(dataset, numbers)


def landscape(
    story: Story,
    *columns: Tensor,
    observation: int = 0,
    size: int = 101,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""The posterior of one observation in a plane, by quadrature, and the guide's guess at it on the same grid.

    .. math:: p(z \mid x) = \frac{p(x \mid z)\, p(z)}{\int p(x \mid z)\, p(z)\, dz}

    The grid covers every place where log p(z | x) or log q(z | x) is within 14 nats of its maximum, and is found by
    zooming in from seven prior standard deviations; sums over it are integrals by the trapezoid rule.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, of two latent dimensions.
        columns: as for :func:`ppl_vae.log_evidence`.
        observation: the number of the row that is looked at.
        size: points along each side of the grid.
        seed: rules the draws of the guide that help to find the place.
        progress: accepted as by every diagnostic; there is nothing to wait for.

    Returns:
        A dataset over (up, across), whose coordinates are values of the second and the first latent, unconstrained
        (their own values, if any real number may be): ``log_posterior``, ``log_likelihood``, ``log_prior`` and
        ``log_guide``, in nats. Over latent ``posterior_mean`` and ``guide_mean``, over (latent, other)
        ``posterior_covariance`` and ``guide_covariance``, all moments of the densities on the grid; and ``x``.

        Attributes: ``observation``, ``size``, ``seed``, ``unit`` ("nats"), ``log_evidence`` (log p(x)), ``kl``
        (KL(q || p(z | x)), what the ELBO lacks of it), ``total_variation`` (half the integral of |q - p(z | x)|, from 0
        to 1), ``distance_of_means`` in posterior standard deviations (Mahalanobis), ``num_effective_points``.

    Raises:
        ValueError: when the story does not have two continuous latent dimensions, there is no such observation, or the
            story or the data are not what :func:`ppl_vae.check` expects.

    Warns:
        UserWarning: when the grid is too coarse for one of the two densities.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> seen = landscape(vae, torch.ones(6, 5), observation=2, size=41)
    >>> seen["log_posterior"].dims, 0 <= seen.attrs["total_variation"] <= 1
    (('up', 'across'), True)
    """
    checks.dry_run(story, *columns)
    checks.check_at_least(11, size=size)
    row = _row(columns, observation)
    with traces.scoring(story):
        view = _view(story, columns, "The landscape", row)
        _refuse_other_than_two(view, "The landscape")
        u = _grid(*_where_it_lives(view, seed), size)
        log_prior, log_joint = view.joint.log_prob(view.row, u)
        log_guide = _log_guide(view, u)
        log_volume = view.space.scale.log().sum()  # of prior standard deviations, in the units of the axes
        axes = _numpy((view.space.loc + view.space.scale * u).double()).reshape(size, size, 2)
    logs = {
        "log_posterior": log_joint - log_volume,
        "log_likelihood": log_joint - log_prior,
        "log_prior": log_prior - log_volume,
        "log_guide": log_guide - log_volume,
    }
    dataset = xr.Dataset(
        {name: (("up", "across"), _numpy(log.double()).reshape(size, size)) for name, log in logs.items()},
        {"up": axes[:, 0, 1], "across": axes[0, :, 0], "latent": view.unconstrained_names},
        {"observation": observation, "size": size, "seed": seed, "unit": "nats"},
    )
    area = _cell_area(dataset)
    log_evidence = float(np.logaddexp.reduce(dataset["log_posterior"].values, axis=None)) + math.log(area)
    dataset["log_posterior"] = dataset["log_posterior"] - log_evidence
    return _with_moments(dataset.assign(x=_observed(view)).assign_attrs(log_evidence=log_evidence))


def traversals(
    story: Story,
    *columns: Tensor,
    observation: int | None = 0,
    units: Sequence[int] | None = None,
    num_steps: int = 9,
    reach: float = 0.98,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""What each latent dimension does: decoded means while one runs over its prior quantiles and the others stay.

    Units are ordered by activity, the variance over the columns of the posterior mean, :math:`\mathrm{Var}_n
    E_{q(z \mid x_n)} z_k`, divided by the prior's; above 0.01 a unit counts as active (Burda, Grosse & Salakhutdinov
    2016, https://arxiv.org/abs/1509.00519).

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, of any number of latent dimensions.
        columns: as for :func:`ppl_vae.log_evidence`.
        observation: the number of the row from whose encoding the traversals depart, with its conditions; None departs
            from the prior's median, with the conditions of the first row.
        units: numbers of the latent dimensions; None takes all of them.
        num_steps: places along each traversal, at equal steps of the prior's quantiles.
        reach: the central share of the prior that is run over.
        seed: rules draws of prior, guide and likelihood, where quantiles and means have no closed form.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset over latent, the most active first, and step, whose coordinate is the quantile: ``decoded`` (and the
        event), the mean of p(x | z), the mode where x is a class; ``value`` of the unit (latent, step); ``start``
        (latent), its value at the point of departure; ``number`` (latent); ``activity`` (latent); ``effect`` (latent),
        the root mean square change of ``decoded`` along the traversal, around its mean over steps, in units of x; and
        ``center``, what the point of departure decodes to. With an observation, ``x``.

        Attributes: ``observation`` (-1 for the prior's median), ``num_observations``, ``num_latents``, ``num_active``
        (of all units), ``reach``, ``seed``.

    Raises:
        ValueError: when the story has no continuous latent or is not scored against one site, there is no such unit or
            observation, or an argument is out of range.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> traversals(vae, torch.ones(6, 5), num_steps=7)["decoded"].shape
    (3, 7, 5)
    """
    checks.check_that_it_runs(story, *columns)
    checks.check_at_least(2, num_steps=num_steps)
    if not 0 < reach < 1:
        raise ValueError(f"reach is a share of the prior between 0 and 1; found {reach:g}.")
    row = _row(columns, observation or 0)
    with traces.scoring(story):
        view = _view(story, columns, "A traversal", row)
        encoded = encodings(view, columns, seed, progress)
        sides = marginals(view, seed)
        quantiles = np.linspace((1 - reach) / 2, (1 + reach) / 2, num_steps)
        steps = torch.as_tensor(quantiles).to(encoded)
        middle, spread = _middle_and_spread(sides, encoded)
        activity = encoded.var(0, unbiased=False) / spread**2
        chosen = _order(activity, units)
        start = middle if observation is None else encoded[observation]
        values = torch.stack([sides[number].icdf(steps) for number in chosen])
        points = start.repeat(len(chosen), num_steps, 1)
        for place, number in enumerate(chosen):
            points[place, :, number] = values[place]
        decoded = decode(view, torch.cat([points.flatten(0, 1), start[None]]), seed)
    center_of_all, decoded = decoded[-1], decoded[:-1].unflatten(0, (len(chosen), num_steps))
    effect = (decoded - decoded.mean(1, keepdim=True)).square().flatten(1).mean(1).sqrt()
    event = _event_dims(center_of_all)
    dataset = xr.Dataset(
        {
            "decoded": (("latent", "step", *event), _numpy(decoded)),
            "value": (("latent", "step"), _numpy(values)),
            "start": ("latent", _numpy(start[chosen])),
            "number": ("latent", np.array(chosen)),
            "activity": ("latent", _numpy(activity[chosen])),
            "effect": ("latent", _numpy(effect)),
            "center": (event, _numpy(center_of_all)),
        },
        {"latent": [view.names[number] for number in chosen], "step": quantiles},
        {
            "observation": -1 if observation is None else observation,
            "num_observations": len(encoded),
            "num_latents": len(activity),
            "num_active": int((activity > ACTIVE).sum()),
            "reach": reach,
            "seed": seed,
        },
    )
    return dataset if observation is None else dataset.assign(x=_observed(view))


def interpolation(
    story: Story,
    *columns: Tensor,
    first: int,
    second: int,
    num_steps: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Decoded means on the way from one encoding to another: straight, and along a great circle for normal priors.

    The straight line passes nearer to the prior's middle than draws of a prior of many dimensions ever come; the great
    circle, with :math:`\Omega` the angle between the ends in prior standard deviations, keeps their distance from it:

    .. math:: z(t) = \frac{\sin (1-t)\Omega}{\sin \Omega}\, z_1 + \frac{\sin t\Omega}{\sin \Omega}\, z_2

    White 2016, Sampling generative networks, https://arxiv.org/abs/1609.04468.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: as for :func:`ppl_vae.log_evidence`. All is decoded with the conditions of the first end.
        first: the number of the row where the path begins.
        second: the number of the row where it ends.
        num_steps: places along the path, both ends included.
        seed: rules draws of guide and likelihood, where their means have no closed form.
        progress: accepted as by every diagnostic; there is nothing to wait for.

    Returns:
        A dataset over path ("line", and "sphere" where the prior is a normal with independent dimensions, two or more)
        and step, from 0 to 1: ``decoded`` (and the event), the mean of p(x | z), the mode where x is a class; ``z``
        (and latent); ``log_prior``, log p(z) in nats; ``log_likelihood`` (and end, "first" and "second"), log p(x | z)
        of each end's observation with its own conditions, in nats; ``norm``, the distance from the prior's median in
        prior standard deviations. Over end (and the event) ``x``. Constrained latents move in unconstrained
        coordinates, so that no path leaves their support.

        Attributes: ``first``, ``second``, ``unit`` ("nats"), ``seed``, ``angle`` (between the ends, in degrees).

    Raises:
        ValueError: when the story has no continuous latent or is not scored against one site, there is no such
            observation, or the story or the data are not what :func:`ppl_vae.check` expects.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> interpolation(vae, torch.eye(5), first=0, second=4, num_steps=7)["log_prior"].shape
    (2, 7)
    """
    checks.dry_run(story, *columns)
    checks.check_at_least(2, num_steps=num_steps)
    ends = [_row(columns, number) for number in (first, second)]
    both = tuple(torch.cat(pair) for pair in zip(*ends, strict=True))
    with traces.scoring(story):
        view = _view(story, columns, "An interpolation", ends[0])
        encoded = encodings(view, both, seed, progress=False)
        sides = marginals(view, seed)
        middle, spread = _middle_and_spread(sides, encoded)
        standardized = (encoded - middle) / spread
        share = torch.linspace(0, 1, num_steps).to(encoded)[:, None]
        begin, end = view.points(encoded)
        paths = {"line": view.values(torch.lerp(begin, end, share))}
        if len(sides) > 1 and _are_normal(sides):
            paths["sphere"] = middle + spread * great_circle(standardized[0], standardized[1], share)
        z = torch.stack(list(paths.values()))
        u = view.points(z.flatten(0, 1))
        log_prior, log_joint = zip(*(view.joint.log_prob(traces.to_story(story, end), u) for end in ends), strict=True)
        decoded = decode(view, z.flatten(0, 1), seed)
        log_volume = view.log_volume(u)
    shape = (len(paths), num_steps)
    log_likelihood = torch.stack([joint - prior for joint, prior in zip(log_joint, log_prior, strict=True)], dim=-1)
    cosine = torch.cosine_similarity(standardized[0], standardized[1], dim=0).clamp(-1, 1)
    event = _event_dims(decoded[0])
    x = both[view.position]
    return xr.Dataset(
        {
            "decoded": (("path", "step", *event), _numpy(decoded.unflatten(0, shape))),
            "z": (("path", "step", "latent"), _numpy(z)),
            "log_prior": (("path", "step"), _numpy((log_prior[0] - log_volume).unflatten(0, shape))),
            "log_likelihood": (("path", "step", "end"), _numpy(log_likelihood.unflatten(0, shape))),
            "norm": (("path", "step"), _numpy(((z - middle) / spread).norm(dim=-1))),
            "x": (("end", *_event_dims(x[0])), _numpy(x)),
        },
        {"path": list(paths), "step": _numpy(share.flatten()), "latent": view.names, "end": ["first", "second"]},
        {"first": first, "second": second, "unit": "nats", "seed": seed, "angle": math.degrees(math.acos(cosine))},
    )


def great_circle(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Points between two of shape (K,), at shares of shape (T, 1), by White's formula; shape (T, K).

    On the straight line where the two point the same way, or opposite ways: there no great circle is singled out.

    >>> great_circle(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([[0.5]]))
    tensor([[1.4142, 1.4142]])
    """
    angle = torch.cosine_similarity(first, second, dim=0).clamp(-1, 1).acos()
    if not SMALL_ANGLE < angle < math.pi - SMALL_ANGLE:
        return torch.lerp(first, second, share)
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()


def center(distribution: Any) -> Tensor:
    """The mean of a distribution, that of 64 draws where it has none in closed form, or the mode of classes.

    >>> center(torch.distributions.Normal(torch.tensor([3.0]), 1.0))
    tensor([3.])
    """
    try:
        mean = distribution.mean
    except NotImplementedError:
        return distribution.sample((64,)).mean(0)
    return distribution.mode if mean.isnan().all() else mean


# The story's latents as rows of numbers


@dataclass(frozen=True)
class View:
    """A story's latents as rows of K values, and what they decode to.

    Attributes:
        row: the columns of one observation, whose conditions hold wherever something is decoded.
        site: the observed site that is decoded.
        position: of the column that it scores.
    """

    joint: Joint
    row: Columns
    site: str
    position: int

    @property
    def space(self) -> LatentSpace:
        assert self.joint.space is not None
        return self.joint.space

    @property
    def names(self) -> list[str]:
        """One for each coordinate: ``z[0]``, ``z[1]``, or ``size``; marked where the value is an unconstrained one."""
        return self._marked_unless(_is_elementwise)

    @property
    def unconstrained_names(self) -> list[str]:
        """The same for unconstrained coordinates, marked where these are others than the latent's own."""
        return self._marked_unless(_is_identity)

    def _marked_unless(self, own: Callable[[Any], bool]) -> list[str]:
        shapes = self.space.event_shapes
        marks = [
            "" if own(self.space.transforms[site]) else " (unconstrained)"
            for site, shape in shapes.items()
            for _ in range(shape.numel())
        ]
        return [name + mark for name, mark in zip(coordinate_names(shapes), marks, strict=True)]

    def values_of(self, latents: dict[str, Tensor]) -> Tensor:
        """Rows of values from latents by site name, shape (R, K)."""
        parts = []
        for name, transform in self.space.transforms.items():
            value = latents[name] if _is_elementwise(transform) else transform.inv(latents[name])
            parts.append(value.reshape(len(value), -1))
        return torch.cat(parts, dim=1)

    def latents_of(self, values: Tensor) -> dict[str, Tensor]:
        """Latents by site name from rows of values, shape (R, K)."""
        shapes = self.space.event_shapes
        latents = {}
        for name, part in zip(shapes, values.split([shape.numel() for shape in shapes.values()], dim=1), strict=True):
            transform, part = self.space.transforms[name], part.reshape(len(part), *shapes[name])
            latents[name] = part if _is_elementwise(transform) else transform(part)
        return latents

    def values(self, u: Tensor) -> Tensor:
        """Rows of values at unconstrained points, both of shape (R, K)."""
        return self.values_of(self.space.latents(u)[0])

    def points(self, values: Tensor) -> Tensor:
        """Unconstrained points of rows of values, both of shape (R, K)."""
        return self.space.coordinates(self.latents_of(values))

    def log_volume(self, u: Tensor) -> Tensor:
        """log of the volume of latents that a unit of volume of u holds, shape (R,)."""
        return self.space.latents(u)[1]


def _view(story: Story, columns: Columns, what: str, row: Columns | None = None) -> View:
    joint = joint_of(story, columns)
    if joint.space is None:
        why = joint.why_no_space.partition(";")[0] or "all latents of this story are discrete"
        raise ValueError(f"{what} needs continuous latents with unconstrained coordinates: {why}.")
    if not joint.can_move:
        raise ValueError(f"{what} sums out discrete latents, and those of this story have too many values.")
    scored = sharing.columns_at_sites(story, columns)
    sites = [name for name, position in scored.items() if position == 0] or list(sharing.observed_in(story, columns))
    if len(sites) != 1:
        raise ValueError(
            f"{what} decodes the site that scores the first column, or the only one that is scored; found {sites}."
        )
    row = traces.to_story(story, row or tuple(column[:1] for column in columns))
    return View(joint, row, sites[0], scored.get(sites[0], 0))


def _is_elementwise(transform: Any) -> bool:
    """Whether a bijection maps each number by itself."""
    return _elements(transform).domain.event_dim == 0 and _elements(transform).codomain.event_dim == 0


def _is_identity(transform: Any) -> bool:
    """Whether it leaves each number as it is."""
    return _elements(transform) == transforms.identity_transform


def _elements(transform: Any) -> Any:
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    return transform


def decode(view: View, values: Tensor, seed: int = 0) -> Tensor:
    r"""The mean of p(x | z) at rows of values of shape (R, K), shape (R, \*event); classes have modes.

    Discrete latents c are summed out: :math:`E[x \mid z] = \sum_c p(c \mid z)\, E[x \mid z, c]`. The seed rules the
    draws behind a mean that has no closed form.
    """
    discrete = view.joint.discrete or Assignments()

    def means(values: Tensor) -> tuple[Tensor]:
        latents = {name: _repeat(value, discrete.size) for name, value in view.latents_of(values).items()}
        assigned = {name: value.repeat_interleave(len(values), dim=0) for name, value in discrete.values.items()}
        rows = traces.as_rows(view.row, discrete.size * len(values))
        trace = tell(view.joint.model, rows, latents | assigned)
        mean = center(traces.nodes(trace)[view.site]["fn"])
        if discrete.size == 1:
            return (mean,)
        sites = traces.sample_sites(trace)
        log_prior = traces.log_prob(trace, {name: sites[name] for name in (*latents, *assigned)})
        weights = log_prior.expand(len(mean)).reshape(discrete.size, -1).softmax(0)
        mean = mean.unflatten(0, (discrete.size, -1))
        return ((weights.reshape(*weights.shape, *(1 for _ in mean.shape[2:])) * mean).sum(0),)

    with noise.unit(values.device, seed, noise.Purpose.PREDICTIVE):
        return view.joint.chunks.map(means, values)[0]


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat(times, *(1 for _ in tensor.shape[1:]))


def encodings(view: View, columns: Columns, seed: int = 0, progress: bool | None = None) -> Tensor:
    """The mean of q(z | x_n) for each observation, in values, shape (N, K).

    Where the guide draws one site it is that of its distribution, else of ``ENCODING_DRAWS`` draws.
    """
    parts = []
    for block in blocks(view.joint, columns, seed, progress, what="encodings"):
        with block.noise(noise.Purpose.PREDICTIVE):
            trace = poutine.trace(view.joint.story.guide).get_trace(*block.columns)
            sites = traces.sample_sites(trace)
            if set(sites) == set(view.space.event_shapes) and len(sites) == 1:
                parts.append(view.values_of({name: center(site["fn"]) for name, site in sites.items()}))
                continue
            u = view.joint.guide_points(block.columns, ENCODING_DRAWS)
            parts.append(view.values(u.flatten(0, 1)).reshape(u.shape).mean(0))
    return torch.cat(parts)


# The prior, one coordinate at a time


class Marginal(Protocol):
    """One coordinate of a prior: its distribution function and the inverse, of tensors of shape (R,)."""

    def cdf(self, z: Tensor) -> Tensor: ...
    def icdf(self, share: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClosedForm:
    """One of the numbers of a site whose distribution is the same in every row."""

    distribution: Any
    number: int

    def cdf(self, z: Tensor) -> Tensor:
        return self.every(self.distribution.cdf, z)[:, 0, self.number]

    def icdf(self, share: Tensor) -> Tensor:
        return self.every(self.distribution.icdf, share)[:, 0, self.number]

    def every(self, function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        """Of all rows and numbers of the site, shape (R, rows, numbers)."""
        rows, *_ = shape = self.distribution.batch_shape
        return function(at.reshape(-1, *(1 for _ in shape))).reshape(len(at), rows, -1)


@dataclass(frozen=True)
class Empirical:
    """Of sorted draws."""

    draws: Tensor

    def cdf(self, z: Tensor) -> Tensor:
        return torch.searchsorted(self.draws, z.contiguous()).to(self.draws) / len(self.draws)

    def icdf(self, share: Tensor) -> Tensor:
        return self.draws[(share * len(self.draws)).long().clamp(max=len(self.draws) - 1)]


def marginals(view: View, seed: int = 0) -> list[Marginal]:
    """The prior of each coordinate given the view's conditions.

    In closed form where a latent depends on no other one and its family has quantiles, else of ``PRIOR_DRAWS`` draws.
    """
    discrete = view.joint.discrete or Assignments()
    assigned = {name: value.repeat_interleave(ROWS_COMPARED, dim=0) for name, value in discrete.values.items()}
    with noise.unit(view.space.loc.device, 0, noise.Purpose.CHECK):
        rows = traces.as_rows(view.row, ROWS_COMPARED * discrete.size)
        sites = traces.sample_sites(tell(view.joint.story.model, rows, assigned))
    known = [
        marginal
        for name, shape in view.space.event_shapes.items()
        for marginal in _closed_forms(sites[name], shape, _is_elementwise(view.space.transforms[name]))
    ]
    if None not in known:
        return [marginal for marginal in known if marginal]
    draws = _prior_draws(view, seed).T.sort().values
    return [marginal or Empirical(own.contiguous()) for marginal, own in zip(known, draws, strict=True)]


def _closed_forms(site: Site, shape: torch.Size, elementwise: bool) -> Sequence[ClosedForm | None]:
    """For each number of a site; None where there is none."""
    base = site["fn"]
    while isinstance(base, dist.Independent | dist.MaskedDistribution):
        base = base.base_dist
    if not elementwise or base.event_shape or base.batch_shape != site["value"].shape:
        return [None] * shape.numel()
    closed = [ClosedForm(base, number) for number in range(shape.numel())]
    try:
        quantiles = closed[0].every(base.icdf, torch.tensor(PROBES).to(site["value"]))
    except NotImplementedError:
        return [None] * shape.numel()
    return closed if bool((quantiles == quantiles[:, :1]).all()) else [None] * shape.numel()


def _prior_draws(view: View, seed: int) -> Tensor:
    """Draws of the prior given the view's conditions, in values, shape (R, K)."""
    parts = []
    for number in range(PRIOR_DRAWS // DRAWS_AT_ONCE):
        with noise.unit(view.space.loc.device, seed, noise.Purpose.PREDICTIVE, 0, number):
            parts.append(view.values(view.joint.prior_points(view.row, DRAWS_AT_ONCE).flatten(0, 1)))
    return torch.cat(parts)


def _middle_and_spread(sides: Sequence[Marginal], like: Tensor) -> tuple[Tensor, Tensor]:
    """The medians, and half the distances between the quantiles a standard deviation below and above; shapes (K,)."""
    low, middle, high = torch.stack([side.icdf(torch.tensor(PROBES).to(like)) for side in sides], dim=1)
    return middle, (high - low) / 2


def _are_normal(sides: Sequence[Marginal]) -> bool:
    return all(isinstance(side, ClosedForm) and isinstance(side.distribution, dist.Normal) for side in sides)


# The atlas


def _on_grid(
    view: View, z: Tensor, labels: np.ndarray | None, columns: Columns, seed: int, progress: bool | None
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """What the atlas says of each of G places of shape (G, 2): name -> (further dimensions, values)."""
    u = view.points(z)
    classes = np.zeros(len(columns[0]), int) if labels is None else np.unique(labels, return_inverse=True)[1]
    log_sums = _log_guide_by_class(view, u, torch.as_tensor(classes), columns, seed, progress)
    log_prior, _ = view.joint.log_prob(view.row, u)
    log_volume = view.log_volume(u)
    decoded = decode(view, z, seed)
    table = {
        "decoded": (_event_dims(decoded[0]), decoded),
        "z": (("latent",), z),
        "log_prior": ((), log_prior - log_volume),
        "log_aggregate": ((), log_sums.logsumexp(1) - math.log(len(classes)) - log_volume),
    }
    return table if labels is None else table | {"probability": (("label",), log_sums.softmax(1))}


def _with_prior_mass(dataset: xr.Dataset, sides: Sequence[Marginal], like: Tensor) -> xr.Dataset:
    """Adds each cell's share of the prior's probability: even where the two coordinates are independent."""
    size = dataset.sizes["row"]
    if all(isinstance(side, ClosedForm) for side in sides):
        return dataset.assign(prior_mass=(("row", "column"), np.full((size, size), size**-2)))
    log_mass = dataset["log_prior"]
    for side, name in zip(sides, ("column", "row"), strict=True):
        middles = torch.from_numpy(dataset[name].values.copy()).to(like)
        width = side.icdf(middles + 0.4 / size) - side.icdf(middles - 0.4 / size)
        log_mass = log_mass + xr.DataArray(_numpy(width.log()), dims=name)
    mass = np.exp(log_mass - log_mass.max())
    return dataset.assign(prior_mass=mass / mass.sum())


def _log_guide_by_class(
    view: View, u: Tensor, classes: Tensor, columns: Columns, seed: int, progress: bool | None
) -> Tensor:
    """The log of the sum of q(u_g | x_n) over the observations of each class, shape (G, C)."""
    sums = torch.full((len(u), int(classes.max()) + 1), -math.inf).to(u)
    joint = _encoding_once(view.joint, columns)
    for block in blocks(joint, columns, seed, progress, what="aggregate posterior"):
        is_other = classes[block.first : block.first + block.size, None] != torch.arange(sums.shape[1])
        penalty = torch.zeros(is_other.shape).masked_fill(is_other, -math.inf).to(u)
        log_q = torch.cat(
            [
                joint.log_guide(block.columns, some.unsqueeze(1).expand(-1, block.size, -1))
                for some in u.split(POINTS_AT_ONCE)
            ]
        )
        sums = torch.logaddexp(sums, (log_q.unsqueeze(2) + penalty).logsumexp(1))
    return sums


def _encoding_once(joint: Joint, columns: Columns) -> Joint:
    """With a guide that runs once for all places where it broadcasts, even where the model does not."""
    rows = traces.to_story(joint.story, tuple(column[torch.arange(2) % len(column)] for column in columns))
    with noise.unit(rows[0].device, 0, noise.Purpose.CHECK):
        u = replace(joint, layout="rows").guide_points(rows, 2)
    once = replace(joint, layout="plate")
    try:
        log_q = once.log_guide(rows, u)
    except Exception:  # whatever a user's guide raises when it is broadcast
        return joint
    return once if torch.allclose(log_q, replace(joint, layout="rows").log_guide(rows, u), rtol=1e-4) else joint


def _check_labels(labels: Tensor, num_observations: int) -> np.ndarray:
    if labels.shape != (num_observations,) or labels.is_floating_point():
        raise ValueError(
            f"labels are one whole number for each of {num_observations} observations; found the shape "
            f"{tuple(labels.shape)} and {labels.dtype}."
        )
    return labels.cpu().numpy()


def _with_density(dataset: xr.Dataset) -> xr.Dataset:
    """Adds where the columns live, measured against the prior."""
    density = np.exp(dataset["log_aggregate"] - dataset["log_prior"])
    dataset = dataset.assign(density=density, inhabited=(density >= INHABITED).astype(int))
    return dataset.assign_attrs(share_inhabited=float((dataset["inhabited"] * dataset["prior_mass"]).sum()))


def _with_nearest(dataset: xr.Dataset, num_nearest: int) -> xr.Dataset:
    """Adds the observations whose encodings lie nearest to each cell, in prior quantiles."""
    cells = np.stack(np.meshgrid(dataset["column"], dataset["row"]), axis=-1)
    found = KDTree(dataset["place"].values).query(cells, min(num_nearest, dataset.sizes["observation"]))
    distance, number = (np.reshape(part, (*cells.shape[:2], -1)) for part in found)
    dims = ("row", "column", "rank")
    return dataset.assign(nearest=(dims, number), nearest_distance=(dims, distance))


def _with_ticks(dataset: xr.Dataset, sides: Sequence[Marginal], like: Tensor) -> xr.Dataset:
    """Adds round values of each coordinate, from its second to its 98th percentile, and their quantiles."""
    ticks, places, round_numbers = [], [], MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    for side in sides:
        low, high = side.icdf(torch.tensor([0.02, 0.98]).to(like)).tolist()
        ticks.append([float(tick) for tick in round_numbers.tick_values(low, high) if low <= tick <= high])
        places.append(side.cdf(torch.tensor(ticks[-1]).to(like)).tolist())
    dims = ("latent", "tick")
    return dataset.assign(tick_value=(dims, _padded(ticks)), tick_quantile=(dims, _padded(places)))


def _padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of numbers, the shorter ones ending in NaN."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def _with_labels(dataset: xr.Dataset, labels: np.ndarray) -> xr.Dataset:
    """Adds how sure p(y | z) is, and which labels it confuses."""
    names = np.unique(labels)
    dataset = dataset.assign_coords(label=names, other=names).assign(labels=("observation", labels))
    entropy = xr.apply_ufunc(entr, dataset["probability"]).sum("label")
    bits = entropy / math.log(2)
    inhabited = dataset["prior_mass"] * dataset["inhabited"]
    aggregate = dataset["prior_mass"] * dataset["density"]
    probability = dataset["probability"]
    confusion = (probability * probability.rename(label="other")).weighted(aggregate).mean(("row", "column"))
    between = confusion.values * (1 - np.eye(len(names)))
    most = np.unravel_index(between.argmax(), between.shape)
    return dataset.assign(entropy=entropy, entropy_bits=bits, confusion=confusion).assign_attrs(
        num_labels=len(names),
        mean_entropy=float(entropy.weighted(aggregate).mean()),
        share_ambiguous=float((bits > AMBIGUOUS).weighted(inhabited).mean()),
        most_confused=names[list(most)].tolist(),
    )


# The landscape


def _log_guide(view: View, u: Tensor) -> Tensor:
    """log q(u | x) for the view's observation, shape (R,)."""
    return torch.cat([view.joint.log_guide(view.row, some.unsqueeze(1))[:, 0] for some in u.split(POINTS_AT_ONCE)])


def _grid(low: Tensor, high: Tensor, size: int) -> Tensor:
    """A grid of the plane between two corners, the second coordinate slowest, shape (size * size, 2)."""
    lines = [torch.linspace(first, last, size) for first, last in zip(low.tolist(), high.tolist(), strict=True)]
    up, right = torch.meshgrid(lines[1], lines[0], indexing="ij")
    return torch.stack([right, up], dim=-1).flatten(0, 1).to(low)


def _where_it_lives(view: View, seed: int) -> tuple[Tensor, Tensor]:
    """Two corners, between which lies all that is not negligible of p(u | x) and of q(u | x)."""
    with noise.unit(view.space.loc.device, seed, noise.Purpose.PREDICTIVE):
        draws = view.joint.guide_points(view.row, ENCODING_DRAWS)[:, 0]
    low, high = draws.amin(0).clamp(max=-FIRST_HALF_WIDTH), draws.amax(0).clamp(min=FIRST_HALF_WIDTH)
    size = FIRST_SIZE
    for _ in range(MOST_ZOOMS):
        u, step = _grid(low, high, size), (high - low) / (size - 1)
        log_p, log_q = view.joint.log_prob(view.row, u)[1], _log_guide(view, u)
        here = u[(log_p > log_p.max() - NEGLIGIBLE) | (log_q > log_q.max() - NEGLIGIBLE)]
        nearer = here.amin(0) - step, here.amax(0) + step
        is_settled = ((nearer[1] - nearer[0]) > SETTLED * (high - low)).all()
        (low, high), size = nearer, ZOOM_SIZE
        if is_settled:
            break
    return low, high


def _cell_area(dataset: xr.Dataset) -> float:
    return math.prod(float(np.ptp(dataset[name].values)) / (dataset.sizes[name] - 1) for name in ("across", "up"))


def _with_moments(dataset: xr.Dataset) -> xr.Dataset:
    """Adds means and covariances of posterior and guide, and how far one is from the other."""
    area = _cell_area(dataset)
    right, up = np.meshgrid(dataset["across"], dataset["up"])
    points = np.stack([right, up], axis=-1).reshape(-1, 2)
    shares, num_points = {}, []
    for name in ("posterior", "guide"):
        share = np.exp(dataset[f"log_{name}"].values.ravel()) * area
        num_points.append(float(share.sum() ** 2 / (share**2).sum()))
        shares[name] = share
        mean = np.average(points, axis=0, weights=share)
        covariance = np.cov(points.T, aweights=share, bias=True)
        dataset[f"{name}_mean"] = ("latent", mean)
        dataset[f"{name}_covariance"] = (("latent", "other"), covariance)
    if min(num_points) < RESOLVED**2:
        warnings.warn(
            f"One of p(z | x) and q(z | x) covers {min(num_points):.1f} points of the grid: too few for its moments. "
            "Raise size.",
            stacklevel=3,
        )
    log_ratio = (dataset["log_guide"] - dataset["log_posterior"]).values.ravel()
    apart = dataset["guide_mean"].values - dataset["posterior_mean"].values
    return dataset.assign_attrs(
        kl=float((shares["guide"] * np.where(shares["guide"] > 0, log_ratio, 0)).sum()),
        total_variation=float(np.abs(shares["guide"] - shares["posterior"]).sum() / 2),
        distance_of_means=float(np.sqrt(apart @ np.linalg.solve(dataset["posterior_covariance"].values, apart))),
        num_effective_points=min(num_points),
    )


# Arguments and results


def _refuse_other_than_two(view: View, what: str) -> None:
    if view.joint.dim != 2:
        raise ValueError(f"{what} shows two latent dimensions; this story has {view.joint.dim}.")


def _row(columns: Columns, observation: int) -> Columns:
    if not 0 <= observation < len(columns[0]):
        raise ValueError(f"Observations are numbered from 0 to {len(columns[0]) - 1}; found {observation}.")
    return tuple(column[observation : observation + 1] for column in columns)


def _order(activity: Tensor, units: Sequence[int] | None) -> list[int]:
    """Numbers of the units, the most active first."""
    wanted = list(range(len(activity))) if units is None else list(units)
    if not wanted or any(not 0 <= unit < len(activity) for unit in wanted):
        raise ValueError(f"units are numbers of latent dimensions from 0 to {len(activity) - 1}; found {wanted}.")
    return sorted(wanted, key=lambda unit: -float(activity[unit]))


def _event_dims(x: Tensor) -> tuple[str, ...]:
    return tuple(f"x_dim_{number}" for number in range(x.dim()))


def _observed(view: View) -> tuple[tuple[str, ...], np.ndarray]:
    """The view's observation, as a variable."""
    x = view.row[view.position][0]
    return _event_dims(x), _numpy(x)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
