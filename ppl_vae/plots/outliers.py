"""Pictures of outliers: log p(x) against what the story makes, and the oddest observations."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.plots.images import INK, LARGEST_GREY, are_images, tile

COLORS = {"typical": "tab:gray", "unlikely": "tab:red", "too likely": "tab:blue"}
SHOWN_SDS = 6
LINEAR_SDS = 3
NAMED = 5
PAPER = {"color": "white", "pad": 0.5, "lw": 0}


def outliers(found: xr.Dataset, x: Tensor | None = None) -> Figure:
    """log p(x) of observations against that of simulated ones, from :func:`ppl_vae.diagnostics.outliers.outliers`.

    Left both distributions, flagged observations as ticks below. In the middle the terms of log p(x) apart, each from
    its typical value: far down are observations that no latent makes, far right those whose latent the prior does not
    expect. Right the least and the most likely observations: as pictures where x holds images, else in their order.

    Args:
        found: the dataset.
        x: the observations, shape ``(N, *event)``, for their pictures.
    """
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _histogram(left, found)
    _terms(middle, found)
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)
    if x is not None and are_images(x):
        _pictures(right, found, x)
    else:
        _in_order(right, found)
    return figure


def _histogram(axes: Axes, found: xr.Dataset) -> None:
    about, log_p = found.attrs, found["log_p"].values
    low, high = (about["typical_log_p"] + side * SHOWN_SDS * about["typical_sd"] for side in (-1, 1))
    bins = np.linspace(low, high, 60).tolist()
    axes.hist(found["simulated_log_p"], bins, density=True, color="tab:orange", alpha=0.4, label="simulated")
    axes.hist(log_p, bins, density=True, histtype="step", color="black", label="observed")
    for kind in ("unlikely", "too likely"):
        own = log_p[found["kind"].values == kind]
        if len(own):
            label = f"{kind} ({len(own)})"
            axes.plot(own.clip(low, high), np.full(len(own), -0.03), "|", ms=9, color=COLORS[kind], label=label,
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    beyond = [(int((log_p < low).sum()), 0.01, "left", "lower"), (int((log_p > high).sum()), 0.99, "right", "higher")]
    for number, place, side, word in beyond:
        if number:
            axes.text(place, 0.5, f"{number} {word}", transform=axes.transAxes, ha=side, fontsize="small")
    axes.set_title(f"KS distance {about['ks_distance']:.3f}", fontsize=10)
    axes.set(xlabel="log p(x) (nats)", ylabel="density", xlim=(low, high))
    axes.tick_params(axis="x", pad=9)
    axes.legend(frameon=False, fontsize="small")


def _terms(axes: Axes, found: xr.Dataset) -> None:
    for kind, color in COLORS.items():
        own = found.isel(observation=(found["kind"] == kind).values.nonzero()[0])
        label = kind if own.sizes["observation"] else None
        axes.plot(own["kl_distance"], own["reconstruction_distance"], ".", color=color, alpha=0.7, label=label)
    _symmetric_log(axes, "x")
    _symmetric_log(axes, "y")
    axes.axhline(0, color="gray", lw=0.8, ls="--")
    axes.axvline(0, color="gray", lw=0.8, ls="--")
    axes.set(
        xlabel="KL from the prior, from its typical value (sds)",
        ylabel="reconstruction, from its typical value (sds)",
    )
    axes.legend(frameon=False, fontsize="small", title="log p(x) is", loc="best")


def _symmetric_log(axes: Axes, axis: str) -> None:
    """Linear around 0, logarithmic far out; ticks that stand apart."""
    setting = {"linthresh": LINEAR_SDS, "linscale": 1.5}
    if axis == "x":
        axes.set_xscale("symlog", **setting)
        ticks = _ticks(axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        axes.set_yscale("symlog", **setting)
        ticks = _ticks(axes.get_ylim())
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _ticks(limits: Sequence[float]) -> list[float]:
    """Some of 0, 1, 3 and powers of ten, with their signs, between the limits."""
    powers = [10.0**power for power in range(1, 16)]
    reach = max(map(abs, limits))
    kept = [1.0, 3.0] + [power for power in powers if power <= reach]
    far = kept if len(kept) < 6 else [3.0, *kept[2::2]]
    return [tick for tick in (*(-size for size in reversed(far)), 0.0, *far) if limits[0] <= tick <= limits[1]]


def _pictures(axes: Axes, found: xr.Dataset, x: Tensor) -> None:
    """The least above the most likely observations; numbers are coloured where they are flagged."""
    numbers = [np.atleast_1d(found.attrs[which]).tolist() for which in ("most_unlikely", "most_likely")]
    images = torch.cat([_padded(x, of, len(numbers[0])) for of in numbers])
    most = float(images.max())
    axes.imshow(tile(images / (most if most > LARGEST_GREY else 1.0), columns=4), **INK)
    height, width = x.shape[-2] + 1, x.shape[-1] + 1
    rows = -(-len(numbers[0]) // 4)
    kinds = found["kind"].values.tolist()
    for block, of in enumerate(numbers):
        for place, number in enumerate(of):
            top, left = (block * rows + place // 4) * height, place % 4 * width
            axes.text(left, top, str(number), fontsize=8, color=COLORS[kinds[number]], va="top", bbox=PAPER)
    axes.axhline(rows * height - 1, color="black", lw=1)
    axes.set_title("the least likely (above), the most likely (below)", fontsize=10)
    axes.set_axis_off()


def _padded(x: Tensor, numbers: list[int], at_least: int) -> Tensor:
    """Some observations, in whole rows of four."""
    chosen = x[numbers].detach().cpu().float()
    missing = -(-max(len(numbers), at_least) // 4) * 4 - len(numbers)
    return torch.cat([chosen, chosen.new_zeros(missing, *chosen.shape[1:])])


def _in_order(axes: Axes, found: xr.Dataset) -> None:
    """Distances from the typical log p in the order of log p; the oddest with their numbers."""
    distance, rank, kind = (found[name].values for name in ("distance", "rank", "kind"))
    for name, color in COLORS.items():
        own = kind == name
        axes.plot(rank[own], distance[own], ".", color=color)
    _symmetric_log(axes, "y")
    axes.axhline(0, color="gray", lw=0.8, ls="--")
    for which, side in (("most_unlikely", "left"), ("most_likely", "right")):
        numbers = np.atleast_1d(found.attrs[which]).tolist()
        shift = (30, 0) if side == "left" else (-30, 0)
        place = (rank[numbers[0]], distance[numbers[0]])
        words = ", ".join(map(str, numbers[:NAMED]))
        axes.annotate(words, place, shift, textcoords="offset points", ha=side, va="center", fontsize=8)
    axes.set(xlabel="observations, from the least to the most likely", ylabel="log p(x), from its typical value (sds)")
    axes.spines[["top", "right"]].set_visible(False)
