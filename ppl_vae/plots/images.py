"""Pictures of images: drawn, reconstructed, tiled."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae import discrete, traces
from ppl_vae.diagnostics.latent import center
from ppl_vae.traces import Story

LARGEST_GREY = 2.0  # beyond it pixels are counts

INK = {"cmap": "gray_r", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}


def samples(story: Story, num_observations: int = 64, seed: int = 0) -> Figure:
    """New images: the mean of p(x | z) for draws z of the prior, and a draw x from each."""
    if num_observations < 1:
        raise ValueError(f"num_observations must be at least 1; found {num_observations}.")
    site = traces.nodes(traces.prior_predictive(story, num_observations, seed=seed))["x"]
    return image_panels({"mean of p(x | z), z ~ p(z)": center(site["fn"]), "x ~ p(x | z)": site["value"]})


def reconstructions(story: Story, x: Tensor, *conditions: Tensor, seed: int = 0) -> Figure:
    """Images, the mean of p(x | z) for one z ~ q(z | x) of each, and an image drawn from it."""
    site = traces.nodes(discrete.posterior_predictive(story, x, *conditions, seed=seed))["x"]
    panels = {"x": x, "mean of p(x | z), z ~ q(z | x)": center(site["fn"]), "x ~ p(x | z)": site["value"]}
    return image_panels(panels, columns=4)


def are_images(x: Tensor) -> bool:
    """Whether observations can be shown as pictures: ``(N, colours, height, width)`` with one colour or three."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


def image_panels(panels: dict[str, Tensor], columns: int = 8) -> Figure:
    """Sets of images ``(N, colours, height, width)`` side by side, each under its title; 1 is black, or the most."""
    most = brightest(*panels.values())
    figure = Figure(figsize=(4 * len(panels), 4.3), layout="constrained")
    for axes, (title, images) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.imshow(tile(images / most, columns), **INK)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return figure


def brightest(*sets: Tensor) -> float:
    """What is shown as black: 1 for grey levels, the largest value for counts."""
    if not all(images.numel() for images in sets):
        raise ValueError("There are no images to show.")
    most = max(float(images.max()) for images in sets)
    return most if most > LARGEST_GREY else 1.0


def tile(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """Images laid out row by row, with a thin white gap; shape ``(height, width)``, or ``(height, width, 3)``.

    >>> tile(torch.zeros(10, 1, 28, 28), columns=5).shape
    (58, 145)
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1; found {columns}.")
    padded = torch.nn.functional.pad(images.detach().float().cpu().clamp(0, 1), (0, gap, 0, gap))
    missing = -len(padded) % columns
    padded = torch.cat([padded, padded.new_zeros(missing, *padded.shape[1:])])
    rows = padded.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return rows.squeeze(-1).numpy()
