"""Pictures of training and of log p(x): learning curves, how estimates settle, paired differences."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.evidence import Comparison, Evidence
from ppl_vae.evidence.result import VERDICTS
from ppl_vae.training import History

HISTOGRAM_BINS = 40

VERDICT_COLORS = {
    "exact": "tab:blue",
    "good": "tab:green",
    "fair": "gold",
    "poor": "tab:red",
    "unresolved": "tab:purple",
    "bound": "tab:gray",
}


def learning_curve(history: History) -> Figure:
    """The ELBO of each epoch, in training and on validation data, with the epoch whose weights were kept.

    >>> history = History("svi", [{"epoch": e, "train_elbo": -9.0 / e, "validation_elbo": -9.5 / e} for e in (1, 2)])
    >>> learning_curve(history).axes[0].get_ylabel()
    'ELBO (nats per observation)'
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = history["epoch"]
    axes.plot(epochs, history["train_elbo"], label="training", color="tab:blue")
    shown = history["train_elbo"]
    if "validation_elbo" in history.rows[0]:
        axes.plot(epochs, history["validation_elbo"], label="validation", color="tab:orange")
        axes.axvline(
            history.best_epoch, color="gray", lw=0.8, ls="--", label=f"weights kept (epoch {history.best_epoch})"
        )
        shown = np.concatenate([shown, history["validation_elbo"]])
    finite = shown[np.isfinite(shown)]  # an epoch that took no step has none
    if len(history) > 4 and (low := np.quantile(finite, 0.05)) < (high := finite.max()):
        axes.set_ylim(low, high + 0.05 * (high - low))  # the first epochs would flatten all that follows
    axes.set(xlabel="epoch", ylabel="ELBO (nats per observation)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def convergence(settling: xr.Dataset, num_observations: int = 8) -> Figure:
    """Estimates of log p(x) against the particles behind them, from :func:`ppl_vae.evidence.convergence`.

    Left the mean over observations, right single observations from the smallest to the largest final error, measured
    from where they end. Bands are two standard errors, and worth as much as the verdict says.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    particles = settling["num_particles"].values
    _with_band(left, particles, settling["mean"].values, settling["monte_carlo_error"].values, "tab:blue")
    left.set(ylabel="mean log p(x) (nats)", title=f"all {settling.sizes['observation']} observations")
    order = settling["standard_error"].isel(num_particles=-1).values.argsort()
    shown = order[np.linspace(0, len(order) - 1, min(num_observations, len(order))).round().astype(int)]
    for place, number in enumerate(dict.fromkeys(shown.tolist())):
        one = settling.isel(observation=number)
        shift = one["estimate"].values - one["estimate"].values[-1]
        name = str(one["observation"].item())
        _with_band(right, particles, shift, one["standard_error"].values, f"C{place}", label=name)
    right.set(ylabel="log p(x) minus its last estimate (nats)", title="single observations")
    right.legend(frameon=False, title="observation", fontsize="small", ncols=2)
    for axes in (left, right):
        axes.set(xlabel="particles", xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _with_band(
    axes: Axes, x: np.ndarray, y: np.ndarray, error: np.ndarray, color: str, label: str | None = None
) -> None:
    """A line with a band of two errors around it."""
    axes.plot(x, y, color=color, marker=".", label=label)
    axes.fill_between(x, y - 2 * error, y + 2 * error, color=color, alpha=0.15, lw=0)


def evidence(table: xr.Dataset) -> Figure:
    """log p(x) of observations, stacked by verdict, with the mean and two test sampling errors of it.

    Args:
        table: the dataset of an :class:`ppl_vae.Evidence`.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    estimate, verdict = table["estimate"].values, table["verdict"].values
    finite = np.isfinite(estimate)
    words = [word for word in VERDICTS if (verdict[finite] == word).any()]
    edges = np.histogram_bin_edges(estimate[finite], bins=HISTOGRAM_BINS).tolist()
    colors = [VERDICT_COLORS[word] for word in words]
    if words:
        shares = [estimate[finite & (verdict == word)] for word in words]
        axes.hist(shares, edges, stacked=True, label=words, color=colors)
    summary = Evidence(table).summary()
    axes.axvline(summary.mean, color="black", lw=1, label="mean")
    error = 2 * np.nan_to_num(summary.test_sampling_error)
    axes.axvspan(summary.mean - error, summary.mean + error, color="black", alpha=0.15, lw=0)
    axes.set(xlabel="log p(x) (nats)", ylabel="observations")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def comparison(compared: Comparison) -> Figure:
    """Paired differences of log p(x) to the best story, with intervals of two standard errors.

    Stories stand from the best to the last. The wide, pale bars are two test sampling errors of each mean by itself,
    around the same places: what the pairing takes away.

    """
    names = list(compared.evidence)
    places = np.arange(len(names))
    difference = np.array([compared["difference"].sel(story=name, other=names[0]).item() for name in names])
    error = np.nan_to_num([compared["standard_error"].sel(story=name, other=names[0]).item() for name in names])
    unpaired = [compared.evidence[name].summary().test_sampling_error for name in names]
    figure = Figure(figsize=(7, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(difference, places, xerr=2 * np.nan_to_num(unpaired), fmt="none", ecolor="lightgray", elinewidth=6)
    axes.errorbar(difference, places, xerr=2 * error, fmt="o", color="tab:blue", capsize=4)
    axes.axvline(0, color="gray", lw=0.8, ls="--")
    axes.set_yticks(places, [f"{name}  {compared['mean'].sel(story=name).item():.2f}" for name in names])
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=f"log p(x) minus that of {names[0]} (nats per observation, paired)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
