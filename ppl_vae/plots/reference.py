"""Pictures of a reference posterior, and of the guide beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.diagnostics.reference import ESS, RHAT, by_coordinate, latent_names

# Variable, label of its axis, where a perfect guide stands, and whether the axis is logarithmic.
PANELS = (
    ("mean_shift", "shift of the mean (posterior sd)", 0.0, False),
    ("sd_ratio", "guide's sd / posterior sd", 1.0, True),
    ("wasserstein", "Wasserstein distance (posterior sd)", 0.0, False),
)
MOST_LABELS = 30  # coordinates that are named one by one
SPREAD = 0.3  # of the dots of a coordinate, so that they do not hide each other
POINTS = 2000
# Ratios to be written on an axis that reaches less far than so.
TICKS = (1.6, (1.2, 1.5)), (2.5, (1.5, 2)), (12, (2, 5, 10)), (np.inf, (10, 100, 1000))


def guide_against_reference(table: xr.Dataset) -> Figure:
    """Means, standard deviations and distances of the guide's marginals, a dot for each observation and coordinate.

    The dashed line of the distances is the median of what noise alone makes. Hollow dots are observations whose
    reference has not converged.

    Args:
        table: of :func:`ppl_vae.diagnostics.reference.against_guide`.
    """
    num_coordinates = table.sizes["coordinate"]
    figure = Figure(figsize=(11, 2.2 + 0.3 * min(num_coordinates, MOST_LABELS)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    trusted = table["trusted"].values == 1
    offset = np.linspace(-SPREAD, SPREAD, table.sizes["observation"])
    for axes, (name, label, perfect, logarithmic) in zip(panels, PANELS, strict=True):
        values = table[name].values
        places = np.arange(num_coordinates) + offset[:, None]
        axes.axvline(perfect, color="gray", lw=0.8)
        axes.scatter(values[trusted], places[trusted], s=10, color="tab:blue", alpha=0.7, linewidths=0)
        if not trusted.all():
            hollow = {"facecolors": "none", "edgecolors": "tab:orange", "label": "reference not converged"}
            axes.scatter(values[~trusted], places[~trusted], s=14, linewidths=0.8, **hollow)
        if logarithmic:
            _ratio_axis(axes, values)
        axes.set(xlabel=label, ylim=(num_coordinates - 0.5, -0.5))
        axes.spines[["top", "right"]].set_visible(False)
    floor = float(table["wasserstein_floor"].median())
    panels[2].axvline(floor, color="gray", lw=0.8, ls="--", label="noise alone")
    panels[2].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    shown = np.arange(0, num_coordinates, -(-num_coordinates // MOST_LABELS))
    panels[0].set_yticks(shown, table["coordinate"].values[shown])
    return figure


def _ratio_axis(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis around 1, with plain numbers."""
    farthest = max(1.3, np.exp(abs(np.log(values[np.isfinite(values) & (values > 0)])).max(initial=0)) * 1.1)
    axes.set(xscale="log", xlim=(1 / farthest, farthest))
    steps = next(steps for most, steps in TICKS if farthest < most)
    ticks = [1 / step for step in reversed(steps)] + [1.0, *steps]
    axes.set_xticks([tick for tick in ticks if 1 / farthest <= tick <= farthest])
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:.3g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")


def reference_convergence(table: xr.Dataset) -> Figure:
    """Which share of observations has a worst R-hat, and smallest effective sample sizes, up to a value.

    The dashed lines are what a reference must reach: R-hat below 1.01, effective sample sizes above 400.

    Args:
        table: of :func:`ppl_vae.diagnostics.reference.reference_posterior`, or of what was compared with it.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _cumulative(left, table["rhat"].max("coordinate").values, "tab:blue")
    left.axvline(RHAT, color="gray", lw=0.8, ls="--", label=f"limit {RHAT}")
    left.set(xlabel="largest R-hat of an observation", ylabel="share of observations", ylim=(0, 1.05))
    left.ticklabel_format(axis="x", useOffset=False)
    for name, label, color in (("ess_bulk", "bulk", "tab:blue"), ("ess_tail", "tail", "tab:orange")):
        _cumulative(right, table[name].min("coordinate").values, color, label)
    right.axvline(ESS, color="gray", lw=0.8, ls="--", label=f"limit {ESS}")
    right.set(xlabel="smallest effective sample size of an observation", xlim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _cumulative(axes: Axes, values: np.ndarray, color: str, label: str | None = None) -> None:
    """The share of values up to each value."""
    shares = np.arange(1, len(values) + 1) / len(values)
    axes.plot(np.sort(values), shares, color=color, label=label, drawstyle="steps-post", marker=".")


def posterior_pair(
    reference: xr.Dataset, guide: xr.Dataset, *, observation: int = 0, coordinates: Sequence[str] = ()
) -> Figure:
    """Draws of the reference posterior and of the guide for one observation, in two of its coordinates.

    Args:
        reference: of :func:`ppl_vae.diagnostics.reference.reference_posterior` or
            :func:`ppl_vae.diagnostics.reference.nuts`.
        guide: of :func:`ppl_vae.diagnostics.reference.guide_draws`.
        observation: its number.
        coordinates: the names of two, such as ``("z[0]", "z[1]")``; the first two if left out.

    Raises:
        ValueError: when there is no such observation or coordinate, or only one coordinate.
    """
    for table in (reference, guide):
        if observation not in table["observation"].values:
            raise ValueError(f"No observation {observation}; there are {table['observation'].values.tolist()}.")
    of_reference, labels = _draws(reference, observation)
    of_guide, _ = _draws(guide, observation)
    coordinates = coordinates or labels[:2]
    if len(coordinates) != 2:
        raise ValueError(f"A pair shows two coordinates; there are {', '.join(coordinates)}.")
    for name in coordinates:
        if name not in labels:
            raise ValueError(f"No coordinate {name!r}; there are {', '.join(labels)}.")
    columns = [labels.index(name) for name in coordinates]
    figure = Figure(figsize=(5.4, 5), layout="constrained")
    axes = figure.subplots()
    dots: dict[str, Any] = {"s": 6, "alpha": 0.4, "linewidths": 0}
    axes.scatter(*_some(of_reference)[:, columns].T, color="tab:gray", label=str(reference.attrs["sampler"]), **dots)
    axes.scatter(*_some(of_guide)[:, columns].T, color="tab:blue", label="guide", **dots)
    convinced = int(reference["converged"].sel(observation=observation)) == 1
    axes.set(xlabel=coordinates[0], ylabel=coordinates[1])
    axes.set_title(f"observation {observation}" + ("" if convinced else ": reference not converged"))
    figure.legend(frameon=False, markerscale=3, loc="outside lower center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draws(table: xr.Dataset, observation: int) -> tuple[np.ndarray, list[str]]:
    """Draws of an observation, chains one after the other, shape (S, K), and the names of the coordinates."""
    latents = table[latent_names(table)].sel(observation=observation)
    leading = [dim for dim in ("chain", "draw") if dim in latents.dims]
    values, labels = by_coordinate(latents.transpose(*leading, ...))
    return values.reshape(-1, values.shape[-1]), labels


def _some(values: np.ndarray) -> np.ndarray:
    """At most ``POINTS`` rows, evenly spread."""
    return values[:: max(1, -(-len(values) // POINTS))]
