"""Pictures of latent space, of what :mod:`ppl_vae.diagnostics.latent` computes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.diagnostics import latent
from ppl_vae.plots.images import INK, are_images, brightest, tile
from ppl_vae.traces import Story

SHOWN = 7.0  # nats below the highest place that a landscape still shows
HEAT = "viridis"
INSET = 0.22  # of the axes' width
LEVELS = (0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the highest density
SPAN = 30.0  # nats of log likelihood


def latent_atlas(story: Story, x: Tensor, labels: Tensor | None = None, size: int = 20) -> Figure:
    """The plane of z: what it decodes to, and where the guide puts observations, coloured by label.

    It draws what :func:`ppl_vae.diagnostics.latent.atlas` computes, by :func:`atlas`.

    Args:
        story: one with two latent dimensions whose observations are images.
        x: observations, shape ``(N, colours, height, width)``.
        labels: whole numbers, shape ``(N,)``; None draws all in one colour.
        size: images along each side of the grid.

    Raises:
        ValueError: when z does not have two dimensions.
    """
    return atlas(latent.atlas(story, x, labels=labels, size=size, progress=False))


def atlas(computed: xr.Dataset) -> Figure:
    """The decoded plane of two latents, and the observations in it, from :func:`ppl_vae.diagnostics.latent.atlas`.

    Both panels have one coordinate for each latent dimension that is uniform under its prior, so that equal areas hold
    equal prior probability where the dimensions are independent, and a place in one panel is the same place in the
    other; the ticks say z.

    Raises:
        ValueError: when observations are not images.
    """
    decoded = torch.as_tensor(computed["decoded"].values).flatten(0, 1)
    if not are_images(decoded):
        raise ValueError(
            f"The atlas draws images, one colour or three; these observations have the shape {tuple(decoded.shape[1:])}"
            ". Draw plots.entropy_map or plots.traversals."
        )
    figure = Figure(figsize=(15, 7.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    size = computed.sizes["column"]
    left.imshow(tile(decoded / brightest(decoded), size), extent=(0, 1, 0, 1), **INK)
    left.set_title(f"mean of p(x | z) on a {size} x {size} grid of prior quantiles")
    _scatter_by_label(right, computed)
    right.set_title(f"encoder's mean of z for {computed.sizes['observation']} observations")
    for axes in (left, right):
        _in_quantiles(axes, computed)
    return figure


def entropy_map(computed: xr.Dataset) -> Figure:
    """How sure the label is at each place of the plane, from :func:`ppl_vae.diagnostics.latent.atlas` with labels.

    Colour is the entropy of p(label | z) in bits, lines are borders between regions of different likeliest labels, and
    places where nobody lives are grey.

    Raises:
        ValueError: when the atlas was computed without labels.
    """
    if "probability" not in computed:
        raise ValueError("The entropy map needs labels: atlas(story, x, labels=labels).")
    figure = Figure(figsize=(8.6, 7.4), layout="constrained")
    axes = figure.subplots()
    bits = computed["entropy_bits"].where(computed["inhabited"] == 1)
    axes.set_facecolor("lightgray")
    drawn = axes.imshow(bits.values, extent=(0, 1, 0, 1), cmap=HEAT, vmin=0, vmax=max(1.0, float(bits.max())))
    figure.colorbar(drawn, ax=axes, label="entropy of p(label | z) (bits); grey: hardly any observation", shrink=0.85)
    _regions(axes, computed)
    axes.set_title(f"which label, and how surely, for {computed.sizes['observation']} observations")
    _in_quantiles(axes, computed)
    return figure


def landscape(computed: xr.Dataset) -> Figure:
    """The posterior of one observation and the guide's guess, from :func:`ppl_vae.diagnostics.latent.landscape`.

    Left p(z | x), as filled contours of its share of the highest density, with the guide's ellipses of one and two
    standard deviations and, where it is an image, the observation. Right log p(x | z).
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown, about = _shown(computed), computed.attrs
    plane = shown["across"].values, shown["up"].values
    log_posterior = shown["log_posterior"].values
    height = np.exp(log_posterior - log_posterior.max())
    filled = left.contourf(*plane, height, levels=LEVELS, cmap="Blues")
    figure.colorbar(filled, ax=left, label="p(z | x), share of its maximum", shrink=0.85)
    _ellipses(left, computed["guide_mean"].values, computed["guide_covariance"].values)
    left.set_title(
        f"posterior of observation {about['observation']} and guide: KL {about['kl']:.3f} nats, "
        f"total variation {about['total_variation']:.2f}",
        fontsize=10,
    )
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    log_likelihood = shown["log_likelihood"].values
    levels = MaxNLocator(12).tick_values(max(log_likelihood.min(), log_likelihood.max() - SPAN), log_likelihood.max())
    filled = right.contourf(*plane, log_likelihood, levels=levels, cmap=HEAT, extend="min")
    figure.colorbar(filled, ax=right, label="log p(x | z) (nats)", shrink=0.85)
    right.contour(*plane, height, levels=[math.exp(-2), math.exp(-0.5)], colors="white", linewidths=0.8)
    right.set_title("log likelihood; white: where p(z | x) is $e^{-1/2}$ and $e^{-2}$ of its maximum", fontsize=10)
    first, second = computed["latent"].values.tolist()
    for axes in (left, right):
        axes.set(xlabel=first, ylabel=second, xlim=plane[0][[0, -1]], ylim=plane[1][[0, -1]])
    _inset(left, shown)
    return figure


def traversals(computed: xr.Dataset, num_units: int = 10) -> Figure:
    """What the most active latent dimensions do, one in each row, from :func:`ppl_vae.diagnostics.latent.traversals`.

    Images are drawn as they are, other observations as columns of a heat map, one for each step.
    """
    shown = computed.isel(latent=slice(num_units))
    rows, steps = shown.sizes["latent"], shown.sizes["step"]
    decoded = torch.as_tensor(shown["decoded"].values)
    start = (
        "the prior's median" if computed.attrs["observation"] < 0 else f"observation {computed.attrs['observation']}"
    )
    title = f"mean of p(x | z) from {start}, one latent at a time; {computed.attrs['num_active']} of "
    title += f"{computed.attrs['num_latents']} units are active"
    names = [
        f"{name}\nactivity {activity:.2g}"
        for name, activity in zip(shown["latent"].values, shown["activity"].values, strict=True)
    ]
    figure = Figure(figsize=(2.2 + 0.95 * steps, 1.0 + 1.05 * rows), layout="constrained")
    _strips(figure, decoded, names, [f"{100 * step:.0f}%" for step in shown["step"].values])
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("prior quantile of the latent that moves", fontsize=10)
    return figure


def interpolation(computed: xr.Dataset) -> Figure:
    """The way from one encoding to another, from :func:`ppl_vae.diagnostics.latent.interpolation`.

    Above what it decodes to, below how likely each place is under the prior, and how well it explains either end.
    """
    decoded = torch.as_tensor(computed["decoded"].values)
    paths, steps = decoded.shape[:2]
    figure = Figure(figsize=(max(9.0, 0.95 * steps), 1.1 * paths + 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1 * paths + 0.6, 3.6], squeeze=False)[:, 0]
    names = computed["path"].values.tolist()
    _strips(above, decoded, names, [f"{step:.2g}" for step in computed["step"].values])
    first, second = computed.attrs["first"], computed.attrs["second"]
    above.suptitle(f"mean of p(x | z) on the way from observation {first} to observation {second}", fontsize=11)
    left, right = below.subplots(1, 2)
    for name, style in zip(names, ("-", "--"), strict=False):
        way = computed.sel(path=name)
        left.plot(way["step"], way["log_prior"], style, color="tab:gray", marker=".", label=name)
        for end, number, color in (("first", first, "tab:blue"), ("second", second, "tab:orange")):
            label = f"observation {number}, {name}"
            right.plot(way["step"], way["log_likelihood"].sel(end=end), style, color=color, marker=".", label=label)
    left.set(xlabel="share of the way", ylabel="log p(z) (nats)")
    right.set(xlabel="share of the way", ylabel="log p(x | z) of an end (nats)")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# Parts of pictures


def _in_quantiles(axes: Axes, computed: xr.Dataset) -> None:
    """Axes from 0 to 1 whose ticks say z."""
    names = computed["latent"].values.tolist()
    for axis, name in zip((axes.xaxis, axes.yaxis), names, strict=True):
        ticks = computed[["tick_value", "tick_quantile"]].sel(latent=name).dropna("tick")
        axis.set_ticks(ticks["tick_quantile"].values, [f"{tick:g}" for tick in ticks["tick_value"].values.tolist()])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=names[0], ylabel=names[1], aspect="equal")


def _scatter_by_label(axes: Axes, computed: xr.Dataset) -> None:
    places = computed["place"].values
    if "labels" not in computed:
        axes.scatter(*places.T, s=8, color="tab:blue", alpha=0.7)
        return
    for word in computed["label"].values.tolist():
        chosen = places[computed["labels"].values == word]
        axes.scatter(*chosen.T, s=10, color=f"C{word % 10}", alpha=0.8, linewidths=0, label=str(word))
        x, y = np.median(chosen, axis=0).tolist()
        axes.text(x, y, str(word), fontsize=16, weight="bold", ha="center", va="center")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="label", markerscale=2)


def _regions(axes: Axes, computed: xr.Dataset) -> None:
    """Borders between cells of different likeliest labels, and each label once, in the middle of its cells."""
    words, size = computed["label"].values, computed.sizes["row"]
    likeliest = computed["probability"].values.argmax(-1)
    inhabited = computed["inhabited"].values == 1
    likeliest[~inhabited] = -1
    edges = np.linspace(0, 1, size + 1)
    upright = [((edges[c + 1], 1 - edges[r]), (edges[c + 1], 1 - edges[r + 1])) for r, c in _differ(likeliest, axis=1)]
    level = [((edges[c], 1 - edges[r + 1]), (edges[c + 1], 1 - edges[r + 1])) for r, c in _differ(likeliest, axis=0)]
    axes.add_collection(LineCollection(upright + level, colors="white", linewidths=1.2))
    right, up = np.meshgrid(computed["column"].values, computed["row"].values)
    for number in np.unique(likeliest[inhabited]):
        region = np.column_stack([right[likeliest == number], up[likeliest == number]])
        middle = region[np.square(region - np.median(region, axis=0)).sum(1).argmin()]
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.15"}
        x, y = middle.tolist()
        axes.text(x, y, str(words[number]), fontsize=13, weight="bold", ha="center", va="center", bbox=box)


def _differ(likeliest: np.ndarray, axis: int) -> np.ndarray:
    """Rows and columns of cells whose label is another one than the next cell's along an axis, shape (B, 2)."""
    this, following = np.delete(likeliest, -1, axis), np.delete(likeliest, 0, axis)
    return np.argwhere((this != following) & (this >= 0) & (following >= 0))


def _ellipses(axes: Axes, mean: np.ndarray, covariance: np.ndarray) -> None:
    """One and two standard deviations of a normal in the plane."""
    variances, directions = np.linalg.eigh(covariance)
    turned = math.degrees(math.atan2(directions[1, 1], directions[0, 1]))
    for number, style in ((1, "-"), (2, "--")):
        short, long = 2 * number * np.sqrt(variances)
        label = f"guide, {number} standard deviation{'s' if number > 1 else ''}"
        ellipse = Ellipse(
            (mean[0], mean[1]), long, short, angle=turned, fill=False, ec="tab:red", lw=1.5, ls=style, label=label
        )
        axes.add_patch(ellipse)
    axes.plot(*mean, "+", color="tab:red")


def _shown(computed: xr.Dataset) -> xr.Dataset:
    """The part of the plane with all places within ``SHOWN`` nats of the highest one of posterior or guide."""
    high = [computed[name] > computed[name].max() - SHOWN for name in ("log_posterior", "log_guide")]
    either = high[0] | high[1]
    return computed.isel(across=_span(either.any("up")), up=_span(either.any("across")))


def _span(high: xr.DataArray) -> slice:
    places = np.flatnonzero(high.values)
    return slice(int(places[0]), int(places[-1]) + 1)


def _inset(axes: Axes, shown: xr.Dataset) -> None:
    """The observation, if it is an image, in the corner that holds least of the posterior."""
    image = torch.as_tensor(shown["x"].values)[None]
    if not are_images(image):
        return
    posterior = np.exp(shown["log_posterior"].values)
    up, across = (round(INSET * length) for length in posterior.shape)
    ends = (
        {0.01: slice(None, across), 0.99 - INSET: slice(-across, None)},
        {
            0.01: slice(None, up),
            0.99 - INSET: slice(-up, None),
        },
    )
    mass = {(x, y): posterior[ends[1][y], ends[0][x]].sum() for x in ends[0] for y in ends[1]}
    corner = axes.inset_axes((*min(mass, key=lambda place: mass[place]), INSET, INSET))
    corner.imshow(tile(image / brightest(image), 1), **INK)
    corner.set(xticks=[], yticks=[])


def _strips(figure: FigureBase, decoded: Tensor, names: Sequence[str], steps: Sequence[str]) -> None:
    """Rows of decoded means, one step beside another, labelled below the last row; a heat map where x is no image."""
    num_steps, heat = len(steps), Normalize(float(decoded.min()), float(decoded.max()))
    rows = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axes, strip, name in zip(rows, decoded, names, strict=True):
        if are_images(strip):
            tiles = tile(strip / brightest(decoded), num_steps)
            axes.imshow(tiles, extent=(0, num_steps, 0, num_steps * tiles.shape[0] / tiles.shape[1]), **INK)
            axes.set_yticks([])
        else:
            x = strip.reshape(num_steps, -1).T.numpy()
            axes.imshow(x, extent=(0, num_steps, len(x) - 0.5, -0.5), aspect="auto", cmap=HEAT, norm=heat)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=4 if are_images(strip) else 20)
        axes.set_xticks([])
    rows[-1].set_xticks(np.arange(num_steps) + 0.5, steps)
    if not are_images(decoded[0]):
        figure.colorbar(ScalarMappable(heat, HEAT), ax=list(rows), label="mean of x, a row for each dimension")
