"""Pictures of stories and results. Every function returns a matplotlib ``Figure``; nothing is shown or written here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae import noise, traces
from ppl_vae.evidence import Comparison
from ppl_vae.priors import StandardNormal
from ppl_vae.traces import Story
from ppl_vae.training import History
from ppl_vae.vae import VAE

PRIOR_DRAWS = 20_000
LARGEST_GREY = 2.0  # beyond it pixels are counts

INK = {"cmap": "gray_r", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}


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


def center(distribution: Any) -> Tensor:
    """The mean of a distribution, that of 64 draws where it has none in closed form, or the mode of classes."""
    try:
        mean = distribution.mean
    except NotImplementedError:
        return distribution.sample((64,)).mean(0)
    return distribution.mode if mean.isnan().all() else mean


def samples(story: Story, num_observations: int = 64, seed: int = 0) -> Figure:
    """New images: the mean of p(x | z) for draws z of the prior, and a draw x from each."""
    site = traces.nodes(traces.prior_predictive(story, num_observations, seed=seed))["x"]
    return image_panels({"mean of p(x | z), z ~ p(z)": center(site["fn"]), "x ~ p(x | z)": site["value"]})


def reconstructions(story: Story, x: Tensor, *conditions: Tensor, seed: int = 0) -> Figure:
    """Images, the mean of p(x | z) for one z ~ q(z | x) of each, and an image drawn from it."""
    site = traces.nodes(traces.posterior_predictive(story, x, *conditions, seed=seed))["x"]
    panels = {"x": x, "mean of p(x | z), z ~ q(z | x)": center(site["fn"]), "x ~ p(x | z)": site["value"]}
    return image_panels(panels, columns=4)


def are_images(x: Tensor) -> bool:
    """Whether observations can be shown as pictures: ``(N, colours, height, width)`` with one colour or three."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


def image_panels(panels: dict[str, Tensor], columns: int = 8) -> Figure:
    """Sets of images ``(N, colours, height, width)`` side by side, each under its title; 1 is black, or the most."""
    most = max(float(images.max()) for images in panels.values())
    most = most if most > LARGEST_GREY else 1.0
    figure = Figure(figsize=(4 * len(panels), 4.3), layout="constrained")
    for axes, (title, images) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.imshow(tile(images / most, columns), **INK)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return figure


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images laid out row by row, with a thin white gap; shape ``(height, width)``, or ``(height, width, 3)``.

    >>> tile(torch.zeros(10, 1, 28, 28), columns=5).shape
    (58, 145)
    """
    padded = torch.nn.functional.pad(images.detach().float().cpu().clamp(0, 1), (0, 1, 0, 1))
    missing = -len(padded) % columns
    padded = torch.cat([padded, padded.new_zeros(missing, *padded.shape[1:])])
    rows = padded.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return rows.squeeze(-1).numpy()


def latent_atlas(story: VAE, x: Tensor, labels: Tensor | None = None, size: int = 20) -> Figure:
    """The plane of z: what it decodes to, and where the encoder puts observations, coloured by label.

    Both panels have one coordinate for each latent dimension that is uniform under its prior, so that equal areas hold
    equal prior probability where the dimensions are independent, and a place in one panel is the same place in the
    other; the ticks say z.

    Args:
        story: a VAE with two latent dimensions whose observations are images.
        x: observations, shape ``(N, colours, height, width)``.
        labels: whole numbers, shape ``(N,)``; None draws all in one colour.
        size: images along each side of the grid.

    Raises:
        ValueError: when z does not have two dimensions.
    """
    device, dtype = traces.device_and_dtype(story)
    quantiles = (torch.arange(size, device=device, dtype=dtype) + 0.5) / size
    with noise.unit(device, 0, noise.Purpose.PREDICTIVE), traces.scoring(story):
        if (latent_dim := cast(Any, story.prior)().event_shape.numel()) != 2:
            raise ValueError(f"The atlas shows two latent dimensions; this story has {latent_dim}.")
        marginals = [_marginal(story.prior, number, device, dtype) for number in range(2)]
        right_of, above = (marginal.icdf(quantiles) for marginal in marginals)
        down, across = torch.meshgrid(above.flip(0), right_of, indexing="ij")
        decoded = center(story.decoder(torch.stack([across, down], dim=-1).flatten(0, 1)))
        z = center(story.encoder(x.to(device, dtype)))
        places = torch.stack([marginal.cdf(z[:, k]) for k, marginal in enumerate(marginals)], dim=1).cpu().numpy()

    figure = Figure(figsize=(15, 7.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(tile(decoded, size), extent=(0, 1, 0, 1), **INK)
    left.set_title(f"mean of p(x | z) on a {size} x {size} grid of prior quantiles")
    _scatter_by_label(right, places, labels)
    right.set_title(f"encoder's mean of z for {len(x)} observations")
    for axes in (left, right):
        for axis, marginal in zip((axes.xaxis, axes.yaxis), marginals, strict=True):
            positions = marginal.cdf(marginal.ticks.to(device, dtype)).cpu().numpy()
            axis.set_ticks(positions, [f"{tick:g}" for tick in marginal.ticks.tolist()])
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="$z_0$", ylabel="$z_1$", aspect="equal")
    return figure


@dataclass(frozen=True)
class _Marginal:
    """One coordinate of a prior: its distribution function, the inverse, and values to write on an axis."""

    cdf: Callable[[Tensor], Tensor]
    icdf: Callable[[Tensor], Tensor]
    ticks: Tensor


def _marginal(prior: Any, number: int, device: torch.device, dtype: torch.dtype) -> _Marginal:
    """Exact for N(0, I), and of so many draws for any other prior."""
    if isinstance(prior, StandardNormal):
        normal = torch.distributions.Normal(torch.zeros((), device=device, dtype=dtype), 1.0)
        return _Marginal(normal.cdf, normal.icdf, torch.tensor([-2, -1, -0.5, 0, 0.5, 1, 2]))
    draws = prior().sample((PRIOR_DRAWS,))[:, number].sort().values
    low, high = (draws[int(share * PRIOR_DRAWS)].item() for share in (0.02, 0.98))
    ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    return _Marginal(
        cdf=lambda z: torch.searchsorted(draws, z.contiguous()).to(dtype) / PRIOR_DRAWS,
        icdf=lambda share: draws[(share * PRIOR_DRAWS).long()],
        ticks=torch.tensor(ticks),
    )


def _scatter_by_label(axes, places: np.ndarray, labels: Tensor | None) -> None:
    if labels is None:
        axes.scatter(*places.T, s=8, color="tab:blue", alpha=0.7)
        return
    words: Sequence[int] = sorted(set(labels.tolist()))
    for word in words:
        chosen = places[labels.cpu().numpy() == word]
        axes.scatter(*chosen.T, s=10, color=f"C{word % 10}", alpha=0.8, linewidths=0, label=str(word))
        axes.text(*np.median(chosen, axis=0), str(word), fontsize=16, weight="bold", ha="center", va="center")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="label", markerscale=2)
