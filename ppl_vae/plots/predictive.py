"""Pictures of predictive checks: replicated statistics, reliability of probabilities, coverage of intervals."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

REPLICATED, OBSERVED = "tab:blue", "tab:red"
COLORS = {"draw": "tab:blue", "mean": "tab:orange", "mixture": "tab:orange"}
NAMES = {"draw": "single draws of z", "mean": "mean over z", "mixture": "mixture over z"}
IDEAL = {"color": "gray", "lw": 0.8, "ls": "--"}


def predictive_check(checked: xr.Dataset) -> Figure:
    """Statistics of replicated data against the observed ones, from
    :func:`ppl_vae.diagnostics.predictive.predictive_check`.

    A row for each statistic. Left the replicated data sets, with the observed one as a line. In the middle quantiles of
    the statistic over observations, with a band of 90 % of the replicated data sets. Right where single observations
    lie among their own replications: evenly spread for the prior; for a posterior that knows its x, more often in the
    middle; heaps at the ends are observations that the story cannot make.
    """
    names = checked["statistic"].values.tolist()
    figure = Figure(figsize=(11, 0.6 + 2.7 * len(names)), layout="constrained")
    figure.suptitle(f"{checked.attrs['group']} predictive check, {checked.attrs['num_draws']} replicated data sets")
    for (left, middle, right), name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        one = checked.sel(statistic=name)
        _replicated(left, one, name)
        if bool(one["observed_quantile"].isnull().any()):  # of the data set as a whole
            middle.set_axis_off()
            right.set_axis_off()
            continue
        _quantiles(middle, one, name)
        _tail_probabilities(right, one)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _replicated(axes: Axes, one: xr.Dataset, name: str) -> None:
    axes.hist(one["replicated"].values, bins="auto", color=REPLICATED, alpha=0.6, label="replicated")
    axes.axvline(one["observed"].item(), color=OBSERVED, label="observed")
    axes.set_title(f"{one['effect_size'].item():+.1f} sd, p = {one['p_value'].item():.2g}", fontsize=10)
    whole = bool(one["observed_quantile"].isnull().any())
    axes.set(xlabel=name if whole else f"{name}, average of all observations", ylabel="data sets")
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize="small")


def _quantiles(axes: Axes, one: xr.Dataset, name: str) -> None:
    replicated, observed = one["replicated_quantile"].values, one["observed_quantile"].values
    axes.fill_between(replicated, one["lower_quantile"], one["upper_quantile"], color=REPLICATED, alpha=0.25, lw=0)
    axes.plot(replicated, observed, color=OBSERVED, marker=".", ms=3, lw=0)
    ends = [replicated.min(), replicated.max()]
    axes.plot(ends, ends, **IDEAL)
    axes.set_title(f"difference {one['standardized_difference'].item():+.2f} sd", fontsize=10)
    axes.set(xlabel=f"replicated quantiles of {name}", ylabel="observed quantiles")


def _tail_probabilities(axes: Axes, one: xr.Dataset) -> None:
    tail = one["observation_tail_probability"].values
    axes.hist(tail, bins=20, range=(0, 1), color=REPLICATED, alpha=0.6)
    axes.axhline(len(tail) / 20, **IDEAL)
    axes.set_title(f"{np.mean(np.abs(tail - 0.5) > 0.475):.0%} in the outer 5 %", fontsize=10)
    axes.set(xlabel="P(replicated > observed) of each", ylabel="observations")


def pixel_calibration(reliability: xr.Dataset) -> Figure:
    """Observed frequencies against predicted probabilities, from
    :func:`ppl_vae.diagnostics.predictive.pixel_calibration`; bars are two standard errors.

    The dashed diagonal is what single draws of z follow when story and guide are right. The mean over z has seen the
    pixel that it predicts, and is steeper.
    """
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    left.plot([0, 1], [0, 1], **IDEAL)
    width = 1 / reliability.sizes["bin"]
    for name in reversed(reliability["forecast"].values.tolist()):
        one = reliability.sel(forecast=name)
        error = {"yerr": 2 * one["standard_error"], "capsize": 2, "elinewidth": 1}
        size, floor = one["expected_calibration_error"].item(), one["noise_floor"].item()
        label = f"{NAMES[name]}\nerror {size:.4f} (calibrated: about {floor:.4f})"
        left.errorbar(one["predicted"], one["observed"], **error, fmt=".-", lw=1, color=COLORS[name], label=label)
        right.stairs(np.maximum(one["weight"], 0), np.arange(reliability.sizes["bin"] + 1) * width, color=COLORS[name])
    left.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(-0.02, 1.02))
    left.legend(frameon=False, fontsize="small", loc="upper left", reverse=True)
    right.set(xlabel="predicted probability", ylabel="share of pixels", yscale="log", xlim=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def coverage(held: xr.Dataset) -> Figure:
    """Coverage of central predictive intervals, from :func:`ppl_vae.diagnostics.predictive.coverage`.

    Left against the nominal level, with bands of two standard errors. In the middle where the observed numbers lie in
    their predictive distributions: heaped at both ends, predictions are too narrow; in the middle, too wide. Right the
    coverage of single features, as a map where they are the pixels of an image; the shaded band holds 95 % of the
    features of a calibrated story.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([0, 1], [0, 1], **IDEAL)
    middle.axhline(1, **IDEAL)
    edges = np.arange(held.sizes["bin"] + 1) / held.sizes["bin"]
    for name in held["forecast"].values.tolist():
        one, color = held.sel(forecast=name), COLORS[name]
        level, covered, error = (one[of].values for of in ("level", "coverage", "standard_error"))
        left.plot(level, covered, color=color, marker=".", label=NAMES[name])
        left.fill_between(level, covered - 2 * error, covered + 2 * error, color=color, alpha=0.2, lw=0)
        middle.stairs(one["pit_density"], edges, color=color, label=NAMES[name])
        middle.errorbar(one["bin"], one["pit_density"], yerr=2 * one["pit_error"], fmt="none", ecolor=color, lw=1)
    left.set(xlabel="nominal level", ylabel="observed coverage", xlim=(0, 1), ylim=(0, 1.02))
    left.legend(frameon=False)
    about = held.attrs
    left.set_title(
        f"mean error {about['calibration_error']:.3f} (calibrated: about {about['noise_floor']:.3f})", fontsize=10
    )
    middle.set(xlabel="probability integral transform", ylabel="density", xlim=(0, 1), ylim=(0, None))
    _features(right, held)
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _features(axes: Axes, held: xr.Dataset) -> None:
    """The coverage of each feature at one level."""
    level = held.attrs["feature_level"]
    one = held.sel(level=level)
    covered, error = one["feature_coverage"].values, one["feature_error"].values
    shape = np.atleast_1d(held.attrs["event_shape"])
    title = f"{level:.0%} intervals: {held.attrs['num_features_off']} of {held.attrs['num_features']} features off"
    axes.set_title(title, fontsize=10)
    if len(shape) == 3:
        image = covered.reshape(shape).mean(0)
        lowest = min(2 * level - 1, float(np.nanmin(image)) - 1e-9)
        drawn = axes.imshow(image, cmap="RdBu", norm=TwoSlopeNorm(level, lowest, 1), interpolation="nearest")
        axes.figure.colorbar(drawn, ax=axes, label=f"coverage of {level:.0%} intervals")
        axes.set(xlabel="pixel column", ylabel="pixel row")
        return
    number = one["feature"].values
    axes.axhline(level, **IDEAL)
    axes.fill_between(number, level - 2 * error, level + 2 * error, color="gray", alpha=0.2, lw=0, step="mid")
    axes.plot(number, covered, ".", color=COLORS[held["forecast"].values[0]])
    axes.set(xlabel="feature", ylabel=f"coverage of {level:.0%} intervals")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
