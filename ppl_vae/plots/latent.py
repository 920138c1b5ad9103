"""Pictures of latent space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae import noise, traces
from ppl_vae.plots.images import INK, center, tile
from ppl_vae.priors import StandardNormal
from ppl_vae.vae import VAE

PRIOR_DRAWS = 20_000


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
