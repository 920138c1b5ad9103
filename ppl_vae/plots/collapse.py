"""Pictures of posterior collapse, and of the aggregate posterior against the prior."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_NAMES = 20
SMALLEST = 1e-5
NINETY, FIFTY = (0.05, 0.95), (0.25, 0.75)


def collapse(of_units: xr.Dataset) -> Figure:
    """KL and activity by unit, aggregate posterior against prior, and the pair that differs most from the prior.

    Units stand in the order of their KL, or of the variance of their posterior mean where guide and prior do not
    factorise. Intervals hold 50 and 90 % of the draws.

    Args:
        of_units: from :func:`ppl_vae.diagnostics.collapse`.
    """
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    (divergence, activity), (margins, pair) = figure.subplots(2, 2)
    order = np.argsort(-np.nan_to_num(of_units["kl"].values, nan=-1.0), kind="stable")
    if of_units["kl"].isnull().any():
        order = np.argsort(-of_units["mean_variance"].values, kind="stable")
    units = of_units.isel(unit=order)
    _divergence(divergence, of_units, units)
    _activity(activity, units)
    _margins(margins, units)
    _pair(pair, of_units)
    for axes in (divergence, activity, margins, pair):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _divergence(axes: Axes, of_units: xr.Dataset, units: xr.Dataset) -> None:
    """Bars of units; of sites where there are no numbers for units."""
    if of_units["kl"].isnull().any():
        names, kl, error = (of_units[name].values for name in ("site", "site_kl", "site_kl_error"))
        axes.bar(range(len(names)), kl, 0.5, yerr=2 * error, color="tab:blue", ecolor="gray")
        axes.set_xticks(range(len(names)), [str(name) for name in names])
        axes.set(xlabel="site (guide and prior do not factorise over units)", xlim=(-1, len(names)))
    else:
        active = units["active"].values == 1
        places = np.arange(len(active))
        for chosen, color, label in ((active, "tab:blue", "active"), (~active, "lightgray", "not active")):
            some = units.isel(unit=chosen)
            if chosen.any():
                bars = {"color": color, "label": label, "yerr": 2 * some["kl_error"].values, "ecolor": "gray"}
                axes.bar(places[chosen], some["kl"].values, **bars)
        _name_units(axes, units)
        axes.legend(frameon=False)
    said = of_units.attrs
    axes.set_ylabel("KL(q(z | x), p(z)) (nats)")
    information, marginal = (
        f"{said[name]:.2f} $\\pm$ {said[f'{name}_error']:.2f}" for name in ("mutual_information", "marginal_kl")
    )
    cap = " (at its cap)" if said["information_is_capped"] else ""
    parts = f"information {information}{cap} + KL(q(z), p(z)) {marginal}"
    axes.set_title(f"KL {said['kl']:.2f} nats $\\approx$ {parts}", fontsize=10)


def _activity(axes: Axes, units: xr.Dataset) -> None:
    active = units["active"].values == 1
    variance = units["mean_variance"].values.clip(min=SMALLEST)
    for chosen, color in ((active, "tab:blue"), (~active, "gray")):
        axes.plot(np.flatnonzero(chosen), variance[chosen], "o", color=color, ms=5)
    axes.axhline(0.01, color="black", lw=0.8, ls="--")
    axes.set(yscale="log", ylim=(SMALLEST / 2, max(2.0, 2 * variance.max())), ylabel="variance of posterior mean")
    axes.set_title(f"{active.sum()} of {len(active)} units are active (above 0.01, in prior variances)", fontsize=10)
    _name_units(axes, units)


def _margins(axes: Axes, units: xr.Dataset) -> None:
    """Central intervals of each unit: bars for the prior, lines for the aggregate posterior."""
    places = np.arange(units.sizes["unit"])
    prior, posterior = (units[name].transpose("draw", "unit").values for name in ("prior_draw", "posterior_draw"))
    thick = float(np.clip(120 / len(places), 2, 6))
    for shares, color, width in ((NINETY, "gainsboro", 1.0), (FIFTY, "silver", thick)):
        low, high = np.quantile(prior, shares, axis=0)
        axes.bar(places, high - low, 0.9, bottom=low, color=color, label="prior" if shares == FIFTY else "")
        low, high = np.quantile(posterior, shares, axis=0)
        label = "aggregate posterior" if shares == FIFTY else ""
        axes.vlines(places, low, high, color="tab:blue", lw=width, label=label, zorder=2)
    axes.plot(places, np.median(posterior, axis=0), "o", color="white", markeredgecolor="tab:blue", ms=thick)
    said = units.attrs
    axes.set_title(
        f"a classifier tells them apart with accuracy {said['classifier_accuracy']:.2f} "
        f"(p = {said['classifier_p_value']:.2g})",
        fontsize=10,
    )
    axes.set(ylabel="unit in prior sd")
    axes.use_sticky_edges = False  # bars stand on nothing here
    axes.margins(y=0.2)
    axes.legend(frameon=False, loc="upper right", ncols=2)
    _name_units(axes, units)


def _pair(axes: Axes, of_units: xr.Dataset) -> None:
    """The draws of the pair of units whose correlation differs most from the prior's."""
    said = of_units.attrs
    if "worst_pair_first" not in said:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no pair of units", transform=axes.transAxes, ha="center", va="center", color="dimgray")
        return
    first, second = said["worst_pair_first"], said["worst_pair_second"]
    for name, label, color in (("prior_draw", "prior", "gray"), ("posterior_draw", "aggregate posterior", "tab:blue")):
        draws = of_units[name]
        axes.scatter(
            draws.sel(unit=first), draws.sel(unit=second), s=6, color=color, alpha=0.4, linewidths=0, label=label
        )
    axes.set(xlabel=f"{first} in prior sd", ylabel=f"{second} in prior sd")
    axes.set_title(
        f"correlation {said['worst_pair_correlation']:.2f}, in the prior {said['worst_pair_prior_correlation']:.2f} "
        f"(p = {said['worst_pair_p_value']:.2g})",
        fontsize=10,
    )
    axes.legend(frameon=False, loc="upper right", markerscale=2)


def _name_units(axes: Axes, units: xr.Dataset) -> None:
    """Names of units where there is room for them."""
    names = [str(name) for name in units["unit"].values]
    shown = np.linspace(0, len(names) - 1, min(len(names), MOST_NAMES)).round().astype(int)
    axes.set_xticks(shown, [names[place] for place in shown], rotation=90 if len(names) > 6 else 0)
    axes.set(xlabel="unit", xlim=(-0.7, len(names) - 0.3))
