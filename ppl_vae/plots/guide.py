"""Pictures of how good a guide is: k-hat and effective sample size of its weights, and where it is worst."""

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.plots.images import INK, LARGEST_GREY, are_images, tile

VERDICT_COLORS = {"exact": "tab:blue", "good": "tab:green", "fair": "tab:orange", "poor": "tab:red"}


def guide_quality(quality: xr.Dataset) -> Figure:
    """How k-hat is spread over observations, and effective sample size against it; see
    :func:`ppl_vae.diagnostics.guide_quality`.

    Lines stand at 0.4, below which an importance sampling estimate and its error are to be trusted, and at the
    threshold above which the draws are too few. An infinite k-hat lies at the edge: on the left that of an exact guide,
    whose weights are constant, on the right that of a tail too short to tell.

    >>> variables = {"pareto_k": [0.1, 0.9], "ess": [800.0, 20.0], "verdict": ["good", "poor"]}
    >>> about = {"threshold": 0.67, "good": 0.4, "num_particles": 1000, "share_above_threshold": 0.5, "median_ess": 410}
    >>> quality = xr.Dataset({name: ("observation", values) for name, values in variables.items()}, attrs=about)
    >>> guide_quality(quality).axes[0].get_title()
    '50% of 2 observations above 0.67'
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pareto_k, ess = quality["pareto_k"].values, quality["ess"].values.clip(min=1)  # 0 where every weight is zero
    finite = pareto_k[np.isfinite(pareto_k)]
    low, high = finite.min(initial=0.0), finite.max(initial=1.0)
    shown = np.clip(pareto_k, low, high)
    chosen = {name: quality["verdict"].values == name for name in VERDICT_COLORS}
    chosen = {name: rows for name, rows in chosen.items() if rows.any()}
    colors = [VERDICT_COLORS[name] for name in chosen]
    bins = np.linspace(low, high, 31).tolist()
    left.hist([shown[rows] for rows in chosen.values()], bins=bins, stacked=True, color=colors, alpha=0.8)
    for color, (name, rows) in zip(colors, chosen.items(), strict=True):
        right.scatter(shown[rows], ess[rows], s=12, color=color, alpha=0.6, linewidths=0, label=f"{name} {rows.sum()}")
    about = quality.attrs
    good, threshold = about["good"], about["threshold"]
    above = f"{about['share_above_threshold']:.0%} of {len(pareto_k)} observations above {threshold:.2f}"
    left.set(ylabel="observations", title=above)
    right.set(yscale="log", ylabel="effective sample size", ylim=(0.8, 1.4 * about["num_particles"]))
    right.set_title(f"median {about['median_ess']:.0f} of {about['num_particles']} draws")
    margin = 0.03 * (high - low)
    for axes in (left, right):
        axes.axvline(good, color="black", lw=0.9, ls=":", label=f"good below {good:.2f}")
        axes.axvline(threshold, color="black", lw=0.9, ls="--", label=f"too few draws above {threshold:.2f}")
        axes.set(xlabel=r"Pareto $\hat k$ of the importance weights", xlim=(low - margin, high + margin))
        axes.spines[["top", "right"]].set_visible(False)
    handles, words = right.get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=len(words), frameon=False, markerscale=2)
    return figure


def worst_observations(quality: xr.Dataset, x: Tensor, labels: Tensor | None = None, num: int = 24) -> Figure:
    """The images whose guide is worst, the worst first, each with its k-hat, and its label where there are labels.

    Args:
        quality: from :func:`ppl_vae.diagnostics.guide_quality`.
        x: the same observations, shape ``(N, colours, height, width)``.
        labels: shape ``(N,)``.
        num: how many are shown, at most.

    Raises:
        ValueError: when x are no images, or not as many as the observations of ``quality``.
    """
    if not are_images(x):
        raise ValueError(f"Images have the shape (N, 1 or 3, height, width); x has {tuple(x.shape)}.")
    pareto_k = quality["pareto_k"].values
    if len(x) != len(pareto_k):
        raise ValueError(f"quality is about {len(pareto_k)} observations; x has {len(x)}.")
    worst = np.argsort(-pareto_k, kind="stable")[:num]
    images = x[torch.from_numpy(worst).to(x.device)]
    most = float(images.max()) if float(images.max()) > LARGEST_GREY else 1.0
    columns = min(8, len(worst))
    rows = -(-len(worst) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows + 0.4), layout="constrained")
    figure.suptitle(r"worst observations: Pareto $\hat k$ of the guide's weights", fontsize=11)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(worst):
            number = int(worst[place])
            axes.imshow(tile(images[place : place + 1] / most, 1), **INK)
            label = "" if labels is None else f"  ({labels[number].item()})"
            axes.set_title(f"{pareto_k[number]:.2f}{label}", fontsize=9)
    return figure
