"""What the page needs to bring the atlas to life: sheets of small pictures, and numbers for each place of the plane."""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import matplotlib.image
import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_vae.plots.images import brightest, tile

# How many observations are looked up; their encodings are drawn as points.
SHOWN = 2000
DIGITS = 4


def living_atlas(atlas: xr.Dataset, x: Tensor, label_names: Mapping[int, str]) -> dict[str, Any]:
    """The data of the living atlas, fit for JSON.

    Args:
        atlas: from :func:`ppl_vae.diagnostics.atlas`.
        x: the observations that it was made of, shape ``(N, colours, height, width)``.
        label_names: what the labels of the atlas are called.
    """
    size = atlas.sizes["row"]
    nearest = atlas["nearest"].values.reshape(size * size, -1)
    named = np.unique(nearest)
    across = math.ceil(math.sqrt(len(named)))
    decoded = torch.from_numpy(atlas["decoded"].values).flatten(0, 1)
    with_labels = "probability" in atlas
    return {
        "size": size,
        "tile": list(x.shape[-2:]),
        "z": _rounded(atlas["z"].values.reshape(size * size, -1)),
        "decoded": sheet(decoded, size),
        "observations": sheet(x[torch.from_numpy(named)], across),
        "across": across,
        "shown": {int(number): place for place, number in enumerate(named)},
        "nearest": nearest.tolist(),
        "observation": [str(number) for number in atlas["observation"].values],
        "inhabited": atlas["inhabited"].values.astype(bool).reshape(-1).tolist(),
        "places": _rounded(atlas["place"].values[:SHOWN]),
        "labels": np.searchsorted(atlas["label"].values, atlas["labels"].values).tolist() if with_labels else [],
        "label_names": [label_names[label] for label in atlas["label"].values] if with_labels else [],
        "probability": _rounded(atlas["probability"].values.reshape(size * size, -1)) if with_labels else [],
        "entropy": _rounded(atlas["entropy"].values.reshape(-1)) if with_labels else [],
    }


def sheet(images: Tensor, across: int) -> str:
    """Images side by side, so many to a row, as the address of a PNG that carries its data."""
    pixels = tile(images / brightest(images), across, gap=0)
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels if pixels.ndim == 3 else 1 - pixels, format="png", cmap="gray", vmin=0, vmax=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values.astype(float), DIGITS).tolist()
