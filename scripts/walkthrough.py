"""Why log p(x) is not the average of p(x | z) over the prior: a walk, on real digits, against exact quadrature.

    python scripts/walkthrough.py --out docs

Nine sections, each a function that draws one figure and returns the numbers that the prose quotes. The prose is
``walkthrough_template.md`` beside this script; filled in, it becomes ``walkthrough.md`` in the folder, and the figures
lie in ``walkthrough/`` there. Text and numbers come from the same run. The story of sections 1 to 6 is a VAE of 28 x 28
digits with a latent in the plane, so that log p(x), the posterior and what every estimator is worth are sums over a
grid.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ppl_vae import (
    VAE,
    data,
    diagnostics,
    fit,
    likelihoods,
    log_evidence,
    networks,
    noise,
    plots,
    posteriors,
    priors,
    stories,
)
from ppl_vae.evidence import Evidence
from ppl_vae.evidence.sharing import cross_log_prob
from ppl_vae.plots.images import INK

TEMPLATE = Path(__file__).with_name("walkthrough_template.md")
IMAGE = (1, 28, 28)
POINTS_AT_ONCE = 4096
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    train: int = 3500
    observations: int = 200
    hidden: int = 200
    epochs: int = 60
    epochs_of_sigma: int = 20
    latent_dims: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50)
    budget: int = 10_000
    prior_draws: int = 1_000_000
    encoder_draws: int = 2000
    plane: int = 401
    atlas: int = 15
    sigmas: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
    floors: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003, 0.001)


QUICK = Sizes(
    train=300,
    observations=12,
    hidden=16,
    epochs=2,
    epochs_of_sigma=1,
    latent_dims=(1, 2, 3),
    budget=2000,
    prior_draws=10_000,
    encoder_draws=1000,
    plane=81,
    atlas=6,
    sigmas=(0.2, 0.5),
    floors=(0.1, 0.01),
)


# The story, and a plane of z to look at it ----------------------------------------------------------------------------


def digit_story(latent_dim: int, hidden: int, prior: nn.Module | None = None) -> VAE:
    """A VAE of black and white digits."""
    return VAE(
        prior=prior or priors.StandardNormal(latent_dim),
        decoder=likelihoods.Bernoulli(networks.mlp(latent_dim, hidden, hidden, IMAGE)),
        encoder=digit_encoder(latent_dim, hidden),
    )


def grey_story(hidden: int, scale: likelihoods.Positive, floor: float = 1e-3) -> VAE:
    """A VAE of grey levels with a normal likelihood and a latent in the plane."""
    loc = networks.mlp(2, hidden, hidden, IMAGE)
    return VAE(priors.StandardNormal(2), likelihoods.Normal(loc, scale, floor), digit_encoder(2, hidden))


def digit_encoder(latent_dim: int, hidden: int) -> nn.Module:
    return posteriors.DiagonalNormal(networks.mlp(IMAGE, hidden, hidden, 2 * latent_dim))


def train(
    story: Any,
    x: Tensor,
    validation: Tensor | None,
    epochs: int,
    transform: Callable[[Tensor], Tensor] | None = torch.bernoulli,
    **options: Any,
) -> Any:
    """The story, trained: Adam whose learning rate falls to zero along a cosine."""
    adam = partial(torch.optim.Adam, lr=3e-3, fused=True)

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    fit(
        story,
        x,
        validation=validation,
        epochs=epochs,
        optimizer=adam,
        schedule=cosine,
        transform=transform,
        progress=False,
        **options,
    )
    return story


@torch.no_grad()
def log_likelihoods(story: Any, x: Tensor, z: Tensor) -> Tensor:
    """log p(x_n | z_g) of all observations at all places, shape (N, G); each place is decoded once."""
    return torch.cat([cross_log_prob(story.decoder(some), x, 0) for some in z.split(POINTS_AT_ONCE)], dim=1)


@dataclass(frozen=True)
class Plane:
    """A square grid over the plane of z, decoded once.

    Attributes:
        line: its coordinates, shape (side,).
        z: its places, shape (G, 2).
        log_prior: log p(z_g), shape (G,).
        log_likelihood: log p(x_n | z_g), shape (N, G).
    """

    line: Tensor
    z: Tensor
    log_prior: Tensor
    log_likelihood: Tensor

    @property
    def log_cell(self) -> float:
        """The log of a cell's area."""
        return 2 * math.log(self.line[1] - self.line[0])

    def log_evidence(self, n: int) -> float:
        """log p(x_n), the sum over the grid."""
        return (self.log_likelihood[n] + self.log_prior).double().logsumexp(0).item() + self.log_cell

    def log_posterior(self, n: int) -> Tensor:
        """log p(z_g | x_n), shape (G,), in float64."""
        return (self.log_likelihood[n] + self.log_prior).double() - self.log_evidence(n)

    def square(self, values: Tensor) -> np.ndarray:
        """Values at the places as an image, rows by the second coordinate."""
        return values.reshape(len(self.line), -1).T.numpy()


def plane_of(story: Any, x: Tensor, size: int) -> Plane:
    line = torch.linspace(-5, 5, size)
    z = torch.cartesian_prod(line, line)
    return Plane(line, z, story.prior().log_prob(z), log_likelihoods(story, x, z))


def relative_variance(log_posterior: Tensor, log_q: Tensor, log_cell: float) -> float:
    r"""Variance of w / mean(w) for draws of q: :math:`\int p(z|x)^2 / q(z)\, dz - 1`. K draws have an error of its
    root over :math:`\sqrt K`, in nats of log p(x).
    """
    return torch.expm1((2 * log_posterior - log_q).logsumexp(0) + log_cell).clamp(min=1e-9).item()


# What the sections share ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """The data, the story of the plane, and its truths."""

    sizes: Sizes
    seed: int
    folder: Path
    digits: data.Dataset
    vae: Any
    x: Tensor
    labels: Tensor
    evidence: Evidence
    plane: Plane

    @property
    def exact(self) -> np.ndarray:
        """log p(x_n) by quadrature, in nats."""
        return self.evidence["estimate"].values

    def draw(self, figure: Figure, name: str) -> None:
        """Writes a figure in 256 colours, so that it stays small."""
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=80)
        few = Image.open(drawn).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
        few.save(self.folder / f"{name}.png", optimize=True)

    @torch.no_grad()
    def guides(self) -> Tensor:
        """log q(z_g | x_n) on the plane, shape (N, G)."""
        q = self.vae.encoder(self.x)
        loc, scale = q.base_dist.loc, q.base_dist.scale
        by_side = dist.Normal(loc.T[..., None], scale.T[..., None]).log_prob(self.plane.line)
        return (by_side[0][:, :, None] + by_side[1][:, None, :]).flatten(1)


def prepare(sizes: Sizes, seed: int, folder: Path) -> Walk:
    digits = data.load("mnist-5k", seed=seed)
    vae = digit_story(2, sizes.hidden)
    train(vae, digits.train.x[: sizes.train], digits.validation.x, sizes.epochs, seed=seed)
    assert digits.test.labels is not None
    x, labels = digits.test.x[: sizes.observations], digits.test.labels[: sizes.observations]
    evidence = log_evidence(vae, x, method="quadrature", progress=False)
    return Walk(sizes, seed, folder, digits, vae, x, labels, evidence, plane_of(vae, x, sizes.plane))


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(*all_axes: Axes) -> None:
    """No lines where nothing is."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)


# 1. The story forwards ------------------------------------------------------------------------------------------------


def forwards(walk: Walk) -> Numbers:
    """Draws z, f(z), and several x of the same z; and which label is likely where."""
    seen = diagnostics.atlas(walk.vae, *walk.digits.test[:1], labels=walk.digits.test.labels, size=30, progress=False)
    p = seen["probability"].where(seen["inhabited"] == 1, 0.0).values.reshape(-1, seen.sizes["label"])
    places = torch.tensor(seen["z"].values.reshape(-1, 2), dtype=torch.float32)
    mixed = np.where(p[:, 3] > 1.5 * p[:, 8], p[:, 3] * p[:, 8], -1).argmax()
    chosen = torch.stack([places[p[:, 0].argmax()], places[p[:, 7].argmax()], places[mixed]])
    with torch.no_grad(), noise.unit(torch.device("cpu"), walk.seed, noise.Purpose.PREDICTIVE):
        made = walk.vae.decoder(chosen)
        x = made.sample((1000,))
    means = made.base_dist.probs
    called = nearest_labels(walk.digits.train, x[:, 2])
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    rows = torch.cat([means[:, None], x[:5].transpose(0, 1)], dim=1).flatten(0, 1)
    left.imshow(plots.tile(rows, 6), extent=(0, 6, 0, 3), **INK)
    left.set_xticks([0.5, 3.5], ["f(z)", "five draws x of p(x | z), the same z"])
    left.set_yticks(
        [2.5, 1.5, 0.5], [f"{name}: z =\n({a:.2f}, {b:.2f})" for name, (a, b) in zip("ABC", chosen, strict=True)]
    )
    left.tick_params(length=0)
    left.axvline(1, color="tab:red", lw=1)
    inhabited = seen["inhabited"].values == 1
    bits, likeliest = np.where(inhabited, seen["entropy_bits"], np.nan), seen["probability"].values.argmax(-1)
    right.set_facecolor("lightgray")
    drawn = right.imshow(bits, extent=(0, 1, 0, 1), cmap="viridis")
    figure.colorbar(drawn, ax=right, label="entropy of p(label | z) (bits); grey: no digits", shrink=0.9)
    for row in range(1, 30, 3):
        for column in range(1, 30, 3):
            word = str(likeliest[row, column]) if inhabited[row, column] else ""
            right.text(*middle_of(row, column, 30), word, color="white", ha="center", va="center", fontsize=9)
    for name, z in zip("ABC", dist.Normal(0.0, 1.0).cdf(chosen).tolist(), strict=True):
        right.annotate(name, z, (6, -16), textcoords="offset points", color="red", weight="bold", fontsize=14)
        right.plot(*z, "o", color="red", markersize=5)
    right.set(xlabel="prior quantile of z[0]", ylabel="prior quantile of z[1]", title="likeliest label of each place")
    walk.draw(figure, "story")
    return {
        "mixed_z": f"({chosen[2, 0]:.2f}, {chosen[2, 1]:.2f})",
        "mixed_three": p[mixed, 3],
        "mixed_eight": p[mixed, 8],
        "mixed_bits": bits.reshape(-1)[mixed],
        "called_three": (called == 3).double().mean().item(),
        "called_eight": (called == 8).double().mean().item(),
        "num_test": len(walk.digits.test.x),
    }


def middle_of(row: int, column: int, size: int) -> tuple[float, float]:
    """Where a cell of the atlas lies, in quantiles."""
    return (column + 0.5) / size, 1 - (row + 0.5) / size


def nearest_labels(split: data.Split, x: Tensor, neighbours: int = 5) -> Tensor:
    """What a nearest neighbours classifier calls images: the commonest label of the nearest ones of a split."""
    assert split.labels is not None
    near = torch.cdist(x.flatten(1), split.x.flatten(1)).topk(neighbours, largest=False).indices
    return one_hot(split.labels[near], 10).sum(1).argmax(1)


# 2. One z for the data, or one for each observation -------------------------------------------------------------------


def one_z_or_many(walk: Walk) -> Numbers:
    """log p(X) with a z for each observation, and the mistaken joint estimator with a single z for all."""
    size = len(walk.x)
    counts = sorted({*(round(10 ** (k / 8)) for k in range(int(8 * math.log10(size)) + 1)), size})
    draws = min(10_000, walk.sizes.prior_draws)
    log_p = log_likelihoods(walk.vae, walk.x, prior_draws(walk, draws)).double()
    each = log_p.logsumexp(1) - math.log(draws)
    lines = {
        "a z for each digit, exact": [walk.exact[:n].mean() for n in counts],
        f"a z for each digit, {draws:,} draws of the prior": [each[:n].mean().item() for n in counts],
        "one z for all, the best there is": [
            walk.plane.log_likelihood[:n].double().sum(0).max().item() / n for n in counts
        ],
        f"one z for all, mean of the product over {draws:,} draws": [joint_mean(log_p[:n]) / n for n in counts],
        "one z for all, mean of the product over 100 draws": [joint_mean(log_p[:n, :100]) / n for n in counts],
    }
    pixels = walk.digits.train.x.mean(0).clamp(1e-3, 1 - 1e-3)
    without = dist.Bernoulli(pixels).log_prob(walk.x).flatten(1).sum(1).mean().item()

    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = [("tab:blue", "-"), ("tab:cyan", "--"), ("tab:orange", "-"), ("tab:red", "--"), ("tab:red", ":")]
    for (name, values), (color, style) in zip(lines.items(), styles, strict=True):
        axes.plot(counts, values, style, color=color, label=name, marker=".")
    axes.axhline(without, color="gray", lw=1, label="no z at all: the mean of every pixel")
    axes.set(xscale="log", xlabel="digits in the data set X", ylabel="log p(X) / number of digits (nats)")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    plain(axes)
    walk.draw(figure, "one_z")
    exact, naive, best, joint, few = (values[-1] for values in lines.values())
    return {
        "each_exact": exact,
        "each_naive": naive,
        "each_total": size * exact,
        "all_best": best,
        "all_joint": joint,
        "all_few": few,
        "all_total": size * joint,
        "without": without,
        "joint_draws": draws,
        "joint_short": size * (best - joint),
    }


def joint_mean(log_p: Tensor) -> float:
    """The mistake: log of the mean over draws of the product over observations of p(x_n | z_s); log_p is (N, S)."""
    return log_p.sum(0).logsumexp(0).item() - math.log(log_p.shape[1])


def prior_draws(walk: Walk, number: int) -> Tensor:
    with torch.no_grad(), noise.unit(torch.device("cpu"), walk.seed, noise.Purpose.DRAWS):
        return walk.vae.prior().sample((number,))


# 3. Naive Monte Carlo -------------------------------------------------------------------------------------------------


def naive_monte_carlo(walk: Walk) -> Numbers:
    """The average of p(x | z) over more and more draws of the prior, for an easy, a middling and a hard digit."""
    variances = naive_variances(walk)
    order = np.argsort(variances)
    chosen = [int(order[round(share * (len(order) - 1))]) for share in (0.02, 0.5, 0.98)]
    names = ["easy", "middling", "hard"]
    total = walk.sizes.prior_draws
    log_w = log_likelihoods(walk.vae, walk.x[chosen], prior_draws(walk, total)).double()
    exponents = np.arange(2, 2 * round(math.log10(total)) + 1)
    counts = [round(10 ** (k / 2)) for k in exponents]
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    *panels, last = figure.subplots(1, 4)
    rows = []
    for axes, name, n, logs in zip(panels, names, chosen, log_w, strict=True):
        low, middle, high = zip(*(quantiles_of_estimates(logs, count) for count in counts), strict=True)
        axes.axhline(walk.exact[n], color="black", lw=1, label="exact, by quadrature")
        axes.plot(counts, middle, color="tab:red", marker=".", label="median of repeats")
        axes.fill_between(counts, low, high, color="tab:red", alpha=0.2, lw=0, label="80% of repeats")
        span = walk.exact[n] - low[0]
        axes.set(xscale="log", xlabel="draws of the prior", title=f"{name}", ylim=(low[0] - 0.1 * span, None))
        axes.set_ylim(top=walk.exact[n] + 0.3 * span)
        inset = axes.inset_axes((0.68, 0.05, 0.3, 0.3))
        inset.imshow(plots.tile(walk.x[[n]], 1), **INK)
        inset.set(xticks=[], yticks=[])
        shares = torch.exp(logs - logs.logsumexp(0)).sort(descending=True).values.cumsum(0)
        matter = int((shares < 0.99).sum()) + 1
        ess = torch.exp(2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).item()
        ranks = np.unique(np.geomspace(1, total, 300).astype(int))
        last.plot(ranks / total, shares.numpy()[ranks - 1], label=name)
        off = abs(logs.logsumexp(0).item() - math.log(total) - walk.exact[n])
        rows.append(
            [
                name,
                f"{walk.exact[n]:.2f}",
                f"{kl_to_prior(walk, n):.1f}",
                f"{low[0] - walk.exact[n]:.0f}",
                f"{matter / total:.3%}",
                f"{ess:,.0f}",
                f"{off:.3f}",
                f"{100 * variances[n]:,.0f}",
            ]
        )
    panels[0].set_ylabel("estimate of log p(x) (nats)")
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    last.set(
        xscale="log",
        xlabel="share of the draws, heaviest first",
        ylabel="their share of the sum",
        title="who carries the sum",
    )
    last.legend(frameon=False, fontsize=9, loc="lower right")
    plain(*panels, last)
    walk.draw(figure, "naive")
    header = [
        "digit",
        "log p(x)",
        "KL(posterior, prior)",
        "with 10 draws, lowest tenth off by",
        "draws with 99% of the sum",
    ]
    header += [f"ESS of {total:,}", "error of their estimate", "draws for an error of 0.1"]
    return {
        "naive_table": table(header, rows),
        "naive_draws": total,
        "naive_median_needed": 100 * float(np.median(variances)),
        "naive_hard_needed": 100 * float(variances[chosen[2]]),
        "naive_kl": float(np.mean([kl_to_prior(walk, n) for n in range(len(walk.x))])),
    }


def naive_variances(walk: Walk) -> np.ndarray:
    """What one draw of the prior is worth, for each observation: the variance of p(x | z) / p(x)."""
    plane = walk.plane
    return np.array(
        [
            relative_variance(plane.log_posterior(n), plane.log_prior.double(), plane.log_cell)
            for n in range(len(walk.x))
        ]
    )


def quantiles_of_estimates(log_w: Tensor, count: int, most: int = 1000) -> tuple[float, float, float]:
    """Tenth, half and nine tenths of repeated estimates of log p(x), each the mean of ``count`` weights."""
    repeats = min(most, len(log_w) // count)
    estimates = log_w[: repeats * count].reshape(repeats, count).logsumexp(1) - math.log(count)
    low, middle, high = np.quantile(estimates.numpy(), [0.1, 0.5, 0.9])
    return low, middle, high


def kl_to_prior(walk: Walk, n: int) -> float:
    """KL(p(z | x_n), p(z)) by the grid, in nats."""
    log_posterior = walk.plane.log_posterior(n)
    mass = torch.exp(log_posterior + walk.plane.log_cell)
    return (mass * (log_posterior - walk.plane.log_prior)).sum().item()


# 4. Which places explain an observation -------------------------------------------------------------------------------


def places_of_an_observation(walk: Walk) -> Numbers:
    """p(x | z) over the whole plane, p(z | x) from near, and the encoder's ellipse: for two observations."""
    guides = walk.guides()
    gaps = np.array([gap(walk, n, guides[n]) for n in range(len(walk.x))])
    order = np.argsort(gaps)
    chosen = [int(order[len(order) // 2]), int(order[-1])]
    figure = Figure(figsize=(12.5, 8), layout="constrained")
    numbers: Numbers = {}
    for (image, whole, near), n, name in zip(
        figure.subplots(2, 3, width_ratios=[0.55, 1, 1]), chosen, ["typical", "worst"], strict=True
    ):
        image.imshow(plots.tile(walk.x[[n]], 1), **INK)
        image.set_axis_off()
        image.set_title(f"a {walk.labels[n].item()}; log p(x) = {walk.exact[n]:.1f} nats", fontsize=10)
        draw_whole_plane(figure, whole, walk, n)
        seen = diagnostics.landscape(walk.vae, walk.x, observation=n, progress=False)
        draw_near(near, seen)
        near.set_title(f"p(z | x), and the encoder's guess; KL(q, p) {gaps[n]:.2f} nats", fontsize=10)
        near.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        numbers |= {
            f"{name}_label": walk.labels[n].item(),
            f"{name}_gap": gaps[n],
            f"{name}_region": region_of(walk, n),
        }
    walk.draw(figure, "places")
    regions = [region_of(walk, n) for n in range(len(walk.x))]
    return numbers | {"median_region": float(np.median(regions)), "mean_gap": float(gaps.mean())}


def gap(walk: Walk, n: int, log_q: Tensor) -> float:
    """KL(q(z | x), p(z | x)) by the grid: log p(x) minus the ELBO, in nats."""
    mass = torch.softmax(log_q.double(), dim=0)
    return (mass * (mass.clamp(min=1e-300).log() - walk.plane.log_cell - walk.plane.log_posterior(n))).sum().item()


def region_of(walk: Walk, n: int, share: float = 0.99) -> float:
    """The prior probability of the smallest region with this share of the posterior."""
    mass, order = torch.exp(walk.plane.log_posterior(n) + walk.plane.log_cell).sort(descending=True)
    inside = order[: int((mass.cumsum(0) < share).sum()) + 1]
    return torch.exp(walk.plane.log_prior[inside] + walk.plane.log_cell).sum().item()


def draw_whole_plane(figure: Figure, axes: Axes, walk: Walk, n: int) -> None:
    """log p(x | z) wherever the prior goes; contours hold 99 % of the posterior's mass."""
    plane = walk.plane
    log_p = plane.square(plane.log_likelihood[n])
    line = plane.line.tolist()
    drawn = axes.imshow(
        log_p, origin="lower", extent=(line[0], line[-1], line[0], line[-1]), vmin=log_p.max() - 200, cmap="viridis"
    )
    figure.colorbar(drawn, ax=axes, label="log p(x | z) (nats)", extend="min", shrink=0.9)
    mass = torch.exp(plane.log_posterior(n) + plane.log_cell)
    ordered = mass.sort(descending=True).values
    level = ordered[int((ordered.cumsum(0) < 0.99).sum())].item()
    axes.contour(line, line, plane.square(mass), levels=[level], colors="red", linewidths=1.2)
    for radius in (1, 2, 3):
        axes.add_patch(Ellipse((0, 0), 2 * radius, 2 * radius, fill=False, ec="white", lw=0.8, ls="--"))
    axes.set(xlim=(-4, 4), ylim=(-4, 4), xlabel="z[0]", ylabel="z[1]")
    axes.set_title("log p(x | z); red: 99% of p(z | x); white: 1, 2, 3 prior sd", fontsize=10)


def draw_near(axes: Axes, seen: Any) -> None:
    """The posterior as filled contours, the encoder's normal as ellipses."""
    high = seen["log_posterior"].where(seen["log_posterior"] > seen["log_posterior"].max() - 7)
    height = np.exp(high.fillna(-np.inf).values - float(high.max()))
    axes.contourf(seen["across"], seen["up"], height, levels=[0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0], cmap="Blues")
    mean, sides = seen["guide_mean"].values, np.sqrt(np.diag(seen["guide_covariance"].values))
    for number, style in ((1, "-"), (2, "--")):
        width, height = 2 * number * sides
        label = f"encoder, {number} sd"
        axes.add_patch(Ellipse(mean, width, height, fill=False, ec="tab:red", lw=1.5, ls=style, label=label))
    spots = np.argwhere(high.notnull().values)
    for set_limits, coordinate, found, k in (
        (axes.set_ylim, seen["up"], spots[:, 0], 1),
        (axes.set_xlim, seen["across"], spots[:, 1], 0),
    ):
        ends = coordinate.values[[found.min(), found.max()]]
        set_limits(min(ends[0], mean[k] - 2.2 * sides[k]), max(ends[1], mean[k] + 2.2 * sides[k]))
    axes.set(xlabel="z[0]", ylabel="z[1]")


# 5. Jensen ------------------------------------------------------------------------------------------------------------


def jensen(walk: Walk) -> Numbers:
    """ELBO, importance weighted bounds and log p(x); and what a draw of the encoder is worth in draws of the prior."""
    log_w = encoder_log_weights(walk).double().T
    draws = prior_draws(walk, min(100_000, walk.sizes.prior_draws))
    log_p = log_likelihoods(walk.vae, walk.x, draws).double()
    ks = [k for k in (1, 10, 100, 1000) if k <= log_w.shape[1]]
    bounds = [estimates(log_w, k).mean().item() for k in ks]
    encoder, naive = errors(walk, log_w), errors(walk, log_p)
    mixture = log_evidence(walk.vae, walk.x, method="mixture", num_particles=1000, progress=False)["estimate"].values
    exact, off = walk.exact.mean(), np.abs(mixture - walk.exact)

    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(exact, color="black", lw=1, label="log p(x), by quadrature")
    left.plot(ks, bounds, marker="o", color="tab:blue", label="bound, mean over digits")
    for k, value in zip([1, *ks], [exact, *bounds], strict=True):
        left.annotate(f"{value:.2f}", (k, value), (5, -13), textcoords="offset points", fontsize=9)
    left.set(xscale="log", xlabel="k, draws of the encoder in each bound (k = 1: the ELBO)", ylabel="nats")
    left.legend(frameon=False, loc="lower right")
    left.margins(x=0.14, y=0.15)
    for of, name, color in ((naive, "the prior", "tab:red"), (encoder, "the encoder", "tab:blue")):
        means, medians = zip(*((by_digit.mean(), np.median(by_digit)) for by_digit in of.values()), strict=True)
        right.loglog(list(of), means, marker=".", color=color, label=f"draws of {name}, mean over digits")
        right.loglog(list(of), medians, "--", color=color, label=f"draws of {name}, median digit")
    right.loglog(1000, off.mean(), "*", markersize=13, color="tab:green", label="mixture of proposals, mean")
    right.set(xlabel="draws for each digit", ylabel="absolute error of log p(x) (nats)")
    right.legend(frameon=False, fontsize=8)
    plain(left, right)
    walk.draw(figure, "jensen")
    equal = {k: draws_for(naive, encoder[k], np.median) for k in ks}
    header = ["", *(f"k = {k:,}" + (" (ELBO)" if k == 1 else "") for k in ks), "log p(x)"]
    rows = [
        ["bound, mean over digits, nats", *(f"{value:.2f}" for value in bounds), f"{exact:.2f}"],
        ["absolute error of one estimate, mean over digits", *(f"{encoder[k].mean():.2f}" for k in ks), ""],
        ["the same for the median digit", *(f"{np.median(encoder[k]):.2f}" for k in ks), ""],
        ["draws of the prior that do as well for the median digit", *(f"{equal[k]:,.0f}" for k in ks), ""],
        ["and in the mean over digits", *(f"{draws_for(naive, encoder[k], np.mean):,.0f}" for k in ks), ""],
    ]
    return {
        "bounds_table": table(header, rows),
        "elbo": bounds[0],
        "gap_of_elbo": exact - bounds[0],
        "last_k": ks[-1],
        "last_bound": bounds[-1],
        "last_gap": exact - bounds[-1],
        "exact_mean": exact,
        "equal_ten": equal[10],
        "equal_last": equal[ks[-1]],
        "share_overlooked": float((encoder[ks[-1]] > 1).mean()),
        "mixture_error": off.mean(),
    }


def estimates(log_w: Tensor, k: int) -> Tensor:
    r"""Estimates :math:`\log \frac1k \sum_k w`, for each group of k draws; log_w is (N, S), they (N, S // k)."""
    groups = log_w.shape[1] // k
    return log_w[:, : groups * k].unflatten(1, (groups, k)).logsumexp(2) - math.log(k)


def errors(walk: Walk, log_w: Tensor) -> dict[int, np.ndarray]:
    """Mean absolute error of repeated estimates of log p(x), by digit, for each number of draws."""
    exact = torch.as_tensor(walk.exact)[:, None]
    counts = [10 ** (k // 2) * (1, 3)[k % 2] for k in range(12)]
    most = max(log_w.shape[1] // 2, 1000)
    return {k: (estimates(log_w, k) - exact).abs().mean(1).numpy() for k in counts if k <= most}


def draws_for(errors_of: Mapping[int, np.ndarray], wanted: np.ndarray, summary: Callable[..., Any]) -> float:
    """Draws whose error, summed up over digits, is the wanted one; between those tried, logarithms lie on a line."""
    falling = [-math.log(summary(by_digit)) for by_digit in errors_of.values()]
    return float(np.exp(np.interp(-math.log(summary(wanted)), falling, np.log(list(errors_of)))))


@torch.no_grad()
def encoder_log_weights(walk: Walk, at_once: int = 50) -> Tensor:
    """log p(x, z) - log q(z | x) for draws of the encoder, shape (draws, N)."""
    q, parts = walk.vae.encoder(walk.x), []
    with noise.unit(torch.device("cpu"), walk.seed, noise.Purpose.EVIDENCE):
        for _ in range(0, walk.sizes.encoder_draws, at_once):
            z = q.sample((at_once,))
            joint = walk.vae.prior().log_prob(z) + walk.vae.decoder(z).log_prob(walk.x)
            parts.append(joint - q.log_prob(z))
    return torch.cat(parts)


# 6. How the plane is cleaved, and whether a plane is enough -----------------------------------------------------------


def atlas_and_dimensions(walk: Walk) -> Numbers:
    """What is where in the plane; and evidence against the number of latent dimensions."""
    found = {k: evidence_with(walk, k) for k in walk.sizes.latent_dims}
    seen = diagnostics.atlas(
        walk.vae, *walk.digits.test[:1], labels=walk.digits.test.labels, size=walk.sizes.atlas, progress=False
    )
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    decoded = torch.as_tensor(seen["decoded"].values).flatten(0, 1)
    left.imshow(plots.tile(decoded, walk.sizes.atlas), extent=(0, 1, 0, 1), **INK)
    left.set_title("f(z) over the plane")
    draw_by_label(middle, seen["place"].values, walk.digits.test.labels)
    middle.set(title="where the encoder puts test digits", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for axes in (left, middle):
        axes.set(xlabel="prior quantile of z[0]", ylabel="prior quantile of z[1]")
    dims = list(found)
    exact, lower = zip(*((evidence, elbo) for evidence, elbo, _ in found.values()), strict=True)
    for name, tables, color in (("log p(x)", exact, "tab:blue"), ("ELBO", lower, "tab:gray")):
        means = [table["estimate"].mean().item() for table in tables]
        right.plot(dims, means, marker="o", color=color, label=name)
    right.set(xscale="log", xlabel="latent dimensions", ylabel="mean over test digits (nats)")
    right.set_xticks(dims, list(map(str, dims)), minor=False)
    right.minorticks_off()
    right.legend(frameon=False)
    plain(right)
    walk.draw(figure, "dimensions")
    rows = []
    for k, (evidence, elbo, kl) in found.items():
        summary, lower = evidence.summary(), elbo["estimate"].mean().item()
        words = ", ".join(f"{number} {word}" for word, number in summary.verdicts.items())
        rows.append(
            [k, f"{summary.mean:.2f}", f"{nan_to(summary.monte_carlo_error):.2f}", words, f"{lower:.2f}", f"{kl:.1f}"]
        )
    means = {k: evidence["estimate"].mean().item() for k, (evidence, _, _) in found.items()}
    best = max(means, key=lambda k: means[k])
    header = ["latent dimensions", "log p(x)", "Monte Carlo error", "verdicts", "ELBO", "KL(q, prior)"]
    return {
        "dimension_table": table(header, rows),
        "best_dim": best,
        "best_evidence": means[best],
        "plane_evidence": means[2],
        "plane_lacks": means[best] - means[2],
        "largest_dim": dims[-1],
        "largest_kl": found[dims[-1]][2],
        "largest_poor": int((exact[-1]["verdict"] == "poor").sum()),
        "best_kl": found[best][2],
        "confused": " and ".join(map(str, seen.attrs["most_confused"])),
        "mean_bits": seen.attrs["mean_entropy"] / math.log(2),
    }


def nan_to(value: float) -> float:
    """A number, 0 where there is none to speak of."""
    return 0.0 if math.isnan(value) else value


def evidence_with(walk: Walk, latent_dim: int) -> tuple[Evidence, Evidence, float]:
    """A story of so many latent dimensions: its evidence, its ELBO, and the mean KL(q(z | x), p(z)) in nats."""
    vae, evidence = walk.vae, walk.evidence
    if latent_dim != 2:
        vae = digit_story(latent_dim, walk.sizes.hidden)
        train(vae, walk.digits.train.x[: walk.sizes.train], walk.digits.validation.x, walk.sizes.epochs, seed=walk.seed)
        evidence = log_evidence(vae, walk.x, budget=walk.sizes.budget, progress=False)
    elbo = log_evidence(vae, walk.x, method="elbo", num_particles=100, progress=False)
    with torch.no_grad():
        q = vae.encoder(walk.x).base_dist
        kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)).sum(1).mean().item()
    return evidence, elbo, kl


# 7. Ten normals, or one and a transform -------------------------------------------------------------------------------


def ten_normals_or_one(walk: Walk) -> Numbers:
    """The same story with ten learned normals as its prior: where its digits are, and whether it explains more."""
    sizes = walk.sizes
    mixture: Any = digit_story(2, sizes.hidden, priors.MixtureOfNormals(2, components=10))
    train(mixture, walk.digits.train.x[: sizes.train], walk.digits.validation.x, sizes.epochs, seed=walk.seed)
    ten = log_evidence(mixture, walk.x, method="quadrature", progress=False)["estimate"].values
    difference = ten - walk.exact

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, story, name in ((left, walk.vae, "one normal"), (middle, mixture, "ten normals, learned")):
        with torch.no_grad(), noise.unit(torch.device("cpu"), walk.seed, noise.Purpose.DRAWS):
            draws, means = story.prior().sample((3000,)), story.encoder(walk.digits.test.x).mean
        axes.plot(*draws.T.numpy(), ".", color="lightgray", markersize=2)
        draw_by_label(axes, means.numpy(), walk.digits.test.labels)
        axes.set(title=f"{name}: draws (grey), test digits", xlabel="z[0]", ylabel="z[1]")
    right.plot(walk.exact, ten, ".", color="tab:blue", label="a test digit")
    right.axline((walk.exact.mean(), walk.exact.mean()), slope=1, color="gray", lw=0.8, label="equal")
    right.set(xlabel="log p(x) with one normal (nats)", ylabel="log p(x) with ten normals (nats)")
    right.legend(frameon=False)
    plain(right)
    walk.draw(figure, "ten_normals")
    return {
        "digits_ten": ten.mean(),
        "digits_one": walk.exact.mean(),
        "digits_difference": difference.mean(),
        "digits_error": difference.std(ddof=1) / math.sqrt(len(difference)),
    }


def draw_by_label(axes: Axes, places: np.ndarray, labels: Tensor | None) -> None:
    """Places coloured by label, each label written where half of its own lie on either side."""
    assert labels is not None
    for word in labels.unique().tolist():
        own = places[labels.numpy() == word]
        axes.plot(*own.T, ".", markersize=3, color=f"C{word}")
        x, y = np.median(own, axis=0).tolist()
        axes.text(x, y, str(word), fontsize=15, weight="bold", ha="center", va="center")


# 8. Sigma -------------------------------------------------------------------------------------------------------------


def sigma(walk: Walk) -> Numbers:
    """Evidence of grey digits as a fixed sigma grows, with sigma learned, and with a sigma for each pixel and z."""
    sizes = walk.sizes
    grey = data.load("mnist-5k", seed=walk.seed, binarization="none")
    x = grey.train.x[: sizes.train]
    test = grey.test.x[: min(100, sizes.observations)]

    def trained(scale: likelihoods.Positive, floor: float = 1e-3) -> Any:
        story = grey_story(sizes.hidden, scale, floor)
        return train(story, x, grey.validation.x, sizes.epochs_of_sigma, None, clip=1e4, seed=walk.seed)

    def score(story: Any, method: Any = "auto") -> Evidence:
        return log_evidence(story, test, method=method, budget=sizes.budget, progress=False)

    fixed = {scale: score(trained(scale)) for scale in sizes.sigmas}
    free = trained(likelihoods.learned(0.3))
    learned_sigma, learned = free.decoder.scale(torch.zeros(1, 2)).item(), score(free)
    by_floor, on_floor = {}, {}
    for floor in sizes.floors:
        story = trained(networks.mlp(2, sizes.hidden, IMAGE), floor)
        by_floor[floor] = score(story, "elbo")["estimate"].mean().item()
        with torch.no_grad():
            on_floor[floor] = likelihoods.share_on_floor(story.decoder, story.encoder(test).mean)

    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = {scale: evidence["estimate"].mean().item() for scale, evidence in fixed.items()}
    left.plot(*zip(*means.items(), strict=True), marker="o", color="tab:blue", label="sigma fixed")
    top = learned["estimate"].mean().item()
    left.plot(learned_sigma, top, "*", markersize=16, color="tab:red", label="sigma learned")
    left.set(xscale="log", xlabel="sigma (grey levels run from 0 to 1)", ylabel="mean log p(x) (nats)")
    left.legend(frameon=False)
    right.plot(*zip(*by_floor.items(), strict=True), marker="o", color="tab:purple")
    right.axhline(top, color="tab:red", lw=1, ls="--", label="one sigma, learned: log p(x)")
    right.set(xscale="log", xlabel="smallest sigma allowed (floor)", ylabel="mean ELBO (nats)")
    right.set_title("a sigma for each pixel and z", fontsize=10)
    right.invert_xaxis()
    right.legend(frameon=False)
    plain(left, right)
    walk.draw(figure, "sigma")
    best = max(means, key=lambda scale: means[scale])
    sigmas = [[f"{scale:g}", f"{mean:,.0f}"] for scale, mean in means.items()]
    floors = [[f"{floor:g}", f"{value:,.0f}", f"{on_floor[floor]:.0%}"] for floor, value in by_floor.items()]
    first, final = max(by_floor), min(by_floor)
    white = (x == 0).flatten(1).all(0).sum().item()
    return {
        "sigma_observations": len(test),
        "sigma_table": table(["sigma", "log p(x)"], [*sigmas, [f"learned: {learned_sigma:.3f}", f"{top:,.0f}"]]),
        "floor_table": table(["floor", "ELBO", "sigmas on the floor"], floors),
        "best_sigma": best,
        "best_sigma_evidence": means[best],
        "small_sigma": sizes.sigmas[0],
        "small_sigma_evidence": means[sizes.sigmas[0]],
        "large_sigma": sizes.sigmas[-1],
        "large_sigma_evidence": means[sizes.sigmas[-1]],
        "learned_sigma": learned_sigma,
        "learned_sigma_evidence": top,
        "first_floor": first,
        "final_floor": final,
        "floor_gain": by_floor[final] - by_floor[first],
        "always_white": white,
        "white_gain": white * math.log(first / final),
    }


# 9. Denoising ---------------------------------------------------------------------------------------------------------


def flipped(x: Tensor) -> Tensor:
    """Each pixel turned over with probability 0.15."""
    return torch.where(torch.rand_like(x) < 0.15, 1 - x, x)


def denoising(walk: Walk) -> Numbers:
    """The same story with a guide that learned from noisy digits: its evidence, and what it makes of noise."""
    sizes = walk.sizes
    parts = digit_story(2, sizes.hidden)
    story: Any = stories.DenoisingVAE(*parts.children(), corrupt=flipped)
    train(story, walk.digits.train.x[: sizes.train], walk.digits.validation.x, sizes.epochs, seed=walk.seed)
    evidence = log_evidence(story, walk.x, method="quadrature", progress=False)["estimate"].values
    elbo = log_evidence(story, walk.x, method="elbo", num_particles=100, progress=False)["estimate"].values
    with torch.no_grad(), noise.unit(torch.device("cpu"), walk.seed, noise.Purpose.PREDICTIVE):
        noisy = flipped(walk.x)
        seen = {
            "x": walk.x,
            "x with noise": noisy,
            "f(z), encoder trained\non clean digits": walk.vae.decoder(walk.vae.encoder(noisy).mean).base_dist.probs,
            "f(z), encoder trained\non noisy digits": story.decoder(story.encoder(noisy).mean).base_dist.probs,
        }
        explained = [explanation(made, noisy, walk.x) for made in (walk.vae, story)]
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots()
    shown = min(12, len(walk.x))
    axes.imshow(plots.tile(torch.cat([images[:shown] for images in seen.values()]), shown), **INK)
    axes.set_yticks([29 * row + 14 for row in range(len(seen))], list(seen))
    axes.set_xticks([])
    axes.tick_params(length=0)
    walk.draw(figure, "denoising")
    return {
        "denoising_evidence": evidence.mean(),
        "denoising_gap": (evidence - elbo).mean(),
        "plain_gap": (walk.exact - log_evidence_elbo(walk)).mean(),
        "plain_explains": explained[0],
        "denoising_explains": explained[1],
    }


def explanation(story: Any, seen: Tensor, x: Tensor, draws: int = 50) -> float:
    """Mean over observations of log p(x | z), z drawn from the guide of what is seen; nats."""
    return story.decoder(story.encoder(seen).sample((draws,))).log_prob(x).mean().item()


def log_evidence_elbo(walk: Walk) -> np.ndarray:
    return log_evidence(walk.vae, walk.x, method="elbo", num_particles=100, progress=False)["estimate"].values


# The page -------------------------------------------------------------------------------------------------------------

SECTIONS: Mapping[str, Callable[[Walk], Numbers]] = {
    "the story forwards": forwards,
    "one z or many": one_z_or_many,
    "naive Monte Carlo": naive_monte_carlo,
    "the places of an observation": places_of_an_observation,
    "Jensen": jensen,
    "atlas and dimensions": atlas_and_dimensions,
    "ten normals or one": ten_normals_or_one,
    "sigma": sigma,
    "denoising": denoising,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of walkthrough.md and walkthrough/")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that all runs; the numbers mean nothing"
    )
    parser.add_argument("--epochs", type=int, help="for each story of black and white digits")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    sizes = QUICK if options.quick else Sizes()
    if options.epochs is not None:
        sizes = replace(sizes, epochs=options.epochs)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    folder = options.out / "walkthrough"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    walk = prepare(sizes, options.seed, folder)
    numbers: Numbers = {
        name: getattr(sizes, name) for name in ("observations", "train", "epochs", "epochs_of_sigma", "budget")
    }
    print(f"{'a story to look at':30} {time.process_time() - started:6.0f} s")
    for name, section in SECTIONS.items():
        torch.manual_seed(options.seed)
        numbers |= section(walk)
        print(f"{name:30} {time.process_time() - started:6.0f} s")
    numbers["minutes"] = (time.process_time() - started) / 60
    page = TEMPLATE.read_text(encoding="utf-8").format_map(numbers)
    (options.out / "walkthrough.md").write_text(page, encoding="utf-8")
    print(f"wrote {options.out / 'walkthrough.md'}")


if __name__ == "__main__":
    main()
