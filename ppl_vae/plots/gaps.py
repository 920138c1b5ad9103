"""Pictures of the ELBO's distance from log p(x)."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

PARTS = (("approximation", "tab:blue"), ("amortization", "tab:orange"))


def gaps(table: xr.Dataset) -> Figure:
    """How far the ELBO lies below log p(x), in two parts: of each observation, and on average.

    Left a bar for each observation, the smallest distance first; a cross says that the search for the best member of
    the family has not converged there, a star that the evidence is not to be trusted. Right the means with intervals
    of two standard errors over observations.

    Args:
        table: of :func:`ppl_vae.diagnostics.gaps.gaps`.
    """
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 2))
    distance = (table["log_evidence"] - table["elbo"]).values
    order = distance.argsort()
    places, bottom = np.arange(len(order)), np.zeros(len(order))
    for name, color in PARTS:
        heights = table[f"{name}_gap"].values[order]
        left.bar(places, heights, width=1.0, bottom=bottom, color=color, label=name)
        bottom = bottom + heights
    for flagged, marker, label in (
        (table["converged"].values == 0, "x", "search not converged"),
        (~table["verdict"].isin(["exact", "good"]).values, "*", "evidence not trusted"),
    ):
        if flagged.any():
            shown = flagged[order]
            left.scatter(places[shown], bottom[shown], marker=marker, color="black", s=18, label=label, zorder=3)
    left.axhline(0, color="gray", lw=0.8)
    left.set(xlabel="observations, from the smallest distance to the largest", ylabel="log p(x) - ELBO (nats)")
    left.set_xlim(-0.5, len(order) - 0.5)
    left.legend(frameon=False, loc="upper left")
    for place, (name, color) in enumerate(PARTS):
        mean = table.attrs[f"mean_{name}_gap"]
        error = 2 * np.nan_to_num(table.attrs[f"mean_{name}_gap_sampling_error"])
        right.bar(place, mean, color=color, width=0.6, yerr=error, capsize=4)
        right.annotate(f"{mean:.3f}", (place, max(mean, 0) + error), (0, 4), textcoords="offset points", ha="center")
    right.axhline(0, color="gray", lw=0.8)
    right.set_xticks(range(len(PARTS)), [name for name, _ in PARTS])
    right.set(ylabel="mean (nats)", xlim=(-0.6, 1.6))
    right.margins(y=0.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
