"""Pictures of simulation-based calibration."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

COLORS = {"log p(x | z)": "tab:blue", "log p(x, z)": "tab:purple", "distance to reference": "tab:green"}
SMALLEST_SHIFT_SHOWN, SMALLEST_RATIO_SHOWN = 0.3, 1.5  # what is smaller should look small


def calibration(ranks: xr.Dataset) -> Figure:
    """Rank ECDFs in their band, expected coverage, and effect sizes, from :func:`ppl_vae.diagnostics.calibration`.

    Left every quantity's ECDF minus the diagonal: a line that leaves the band fails. A hump above zero on the left and
    below it on the right is a guide that is too narrow, the mirror image one that is too wide; one hump is a shift.
    Latent coordinates are gray, and red where they fail. In the middle expected coverage, above the diagonal where the
    guide is too wide. Right, each latent coordinate's shift and width ratio with two standard errors.

    Args:
        ranks: from ``diagnostics.calibration``.
    """
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _ecdfs(left, ranks)
    _coverage(middle, ranks)
    _effects(right, ranks)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ecdfs(axes: Axes, ranks: xr.Dataset) -> None:
    fraction = ranks["fraction"].values
    sure = f"{100 * (1 - ranks.attrs['family_wise_error']):g} % band"
    axes.fill_between(fraction, ranks["band_lower"], ranks["band_upper"], color="lightgray", lw=0, label=sure)
    latent = np.isin(ranks["kind"], ["coordinate", "discrete"])
    fails = ranks["verdict"].values == "fails"
    for chosen, color, verdict in ((latent & ~fails, "gray", "passes"), (latent & fails, "tab:red", "fails")):
        if chosen.any():
            lines = axes.plot(fraction, ranks["ecdf_difference"].values[chosen].T, color=color, lw=0.8, alpha=0.8)
            lines[0].set_label(f"latent coordinate that {verdict} ({chosen.sum()})")
    for name, failed, difference in zip(
        ranks["quantity"].values[~latent], fails[~latent], ranks["ecdf_difference"].values[~latent], strict=True
    ):
        label = f"{name} fails" if failed else name
        axes.plot(fraction, difference, color=COLORS[name], lw=1.8, label=label)
    axes.axhline(0, color="black", lw=0.8, ls="--")
    counted = f"{ranks.attrs['num_failed']} of {ranks.attrs['num_quantities']} quantities fail"
    axes.set(xlabel="rank of the truth / number of draws", ylabel="ECDF minus uniform", title=f"ranks: {counted}")
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _coverage(axes: Axes, ranks: xr.Dataset) -> None:
    credibility = ranks["credibility"].values
    axes.fill_between(credibility, ranks["coverage_lower"], ranks["coverage_upper"], color="lightgray", lw=0)
    axes.plot([0, 1], [0, 1], color="black", lw=0.8, ls="--")
    axes.plot(credibility, ranks["coverage"], color=COLORS["distance to reference"], lw=1.8)
    places = {"guide too wide": (0.04, 0.96, "left", "top"), "guide too narrow": (0.96, 0.04, "right", "bottom")}
    for words, (across, up, ha, va) in places.items():
        axes.text(across, up, words, transform=axes.transAxes, ha=ha, va=va, color="dimgray")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="credibility", ylabel="expected coverage")
    axes.set_title(f"coverage: {ranks.attrs['coverage_verdict']}")


def _effects(axes: Axes, ranks: xr.Dataset) -> None:
    latent = ranks.isel(quantity=(ranks["kind"] == "coordinate").values)
    latent = latent.isel(quantity=np.isfinite(latent["width_ratio"].values))
    shift, ratio = latent["shift"].values, latent["width_ratio"].values
    across, up = (2 * latent[f"{effect}_error"].values for effect in ("shift", "width_ratio"))
    axes.axhline(1, color="black", lw=0.8, ls="--")
    axes.axvline(0, color="black", lw=0.8, ls="--")
    axes.errorbar(shift, ratio, yerr=up, xerr=across, fmt="none", ecolor="lightgray", elinewidth=0.8)
    fails = latent["verdict"].values == "fails"
    for chosen, color, label in ((~fails, "gray", "passes"), (fails, "tab:red", "fails")):
        axes.plot(shift[chosen], ratio[chosen], "o", color=color, ms=4, label=label if chosen.any() else None)
    _name_extremes(axes, ranks)
    most = max(SMALLEST_SHIFT_SHOWN, 1.3 * np.abs(shift).max(initial=0))
    factor = max(SMALLEST_RATIO_SHOWN, np.exp(1.3 * np.abs(np.log(ratio)).max(initial=0)))
    axes.set(xlim=(-most, most), ylim=(1 / factor, factor), yscale="log", title="effect sizes by latent coordinate")
    axes.set(xlabel="shift: mean of (truth - guide's mean) / guide's sd", ylabel="width ratio: sd of the same")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    if len(shift):
        axes.legend(frameon=False, fontsize="small", loc="upper left")
    axes.text(0.98, 0.98, "guide too narrow", transform=axes.transAxes, ha="right", va="top", color="dimgray")
    axes.text(0.98, 0.02, "guide too wide", transform=axes.transAxes, ha="right", va="bottom", color="dimgray")


def _name_extremes(axes: Axes, ranks: xr.Dataset) -> None:
    """The names of the coordinates with the largest shift, and with the largest and the smallest width ratio."""
    extremes = {"largest_width_ratio": (0, 12), "smallest_width_ratio": (0, -12), "largest_shift": (20, 0)}
    named = {ranks.attrs[f"{which}_quantity"]: offset for which, offset in extremes.items() if which in ranks.attrs}
    for name, offset in named.items():
        one = ranks.sel(quantity=name)
        place = one["shift"].item(), one["width_ratio"].item()
        axes.annotate(
            name, place, xytext=offset, textcoords="offset points", fontsize="small", ha="center", va="center"
        )
