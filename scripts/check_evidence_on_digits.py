"""The estimators of log p(x) on real digits, against each other, against quadrature, and against bounds.

    python scripts/check_evidence_on_digits.py --data mnist --data-root DIR --out docs/evidence_on_digits.md

Trains a 50-dimensional and a 2-dimensional story on MNIST and writes Markdown tables:

- 50 dimensions, test images: importance, mixture and annealed side by side; verdicts against a reference, the mixture
  with 100,000 particles averaged with annealing from Laplace (32 chains, 200 temperatures);
- bounds on images that the story made;
- 2 dimensions: quadrature against a grid twice as fine, and every other method against quadrature.

Evidence tables are kept in ``--cache`` and not computed again.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ppl_vae import VAE, data, fit, likelihoods, load, log_evidence, posteriors, priors, save
from ppl_vae.evidence import Annealed, Evidence, evidence_bounds
from ppl_vae.networks import mlp

GOOD = ("exact", "good")
STEP, HALF_WIDTH = 0.00625, 6.5
WORST, ZOOM = 40, 0.5


def story(latent_dim: int) -> VAE:
    """A Bernoulli VAE, 784-200-200-K."""
    return VAE(
        prior=priors.StandardNormal(latent_dim),
        decoder=likelihoods.Bernoulli(mlp(latent_dim, 200, 200, (1, 28, 28))),
        encoder=posteriors.DiagonalNormal(mlp((1, 28, 28), 200, 200, 2 * latent_dim)),
    )


def trained(latent_dim: int, digits: data.Dataset, epochs: int, cache: Path) -> VAE:
    path = cache / f"story-{latent_dim}.safetensors"
    torch.manual_seed(0)
    fresh = story(latent_dim)
    if path.exists():
        load(path, story=fresh)
        return fresh
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    fit(fresh, digits.train.x, epochs=epochs, batch_size=100, optimizer=adam, transform=torch.bernoulli)
    save(fresh, path)
    return fresh


def cached(path: Path, compute: Callable[[], Evidence]) -> Evidence:
    """The evidence in a file, or computed and put there, with the seconds it took."""
    if not path.exists():
        started = time.perf_counter()
        evidence = compute()
        Evidence(evidence.dataset.assign_attrs(seconds=time.perf_counter() - started)).save(path)
    return Evidence.load(path)


def averaged(first: Evidence, second: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """log of the mean of two estimates of p(x), and its standard error, in nats."""
    logs = np.stack([first["estimate"].values, second["estimate"].values])
    estimate = np.logaddexp(*logs) - np.log(2)
    shares = np.exp(logs - estimate) / 2
    errors = np.stack([first["standard_error"].values, second["standard_error"].values])
    return estimate, np.sqrt((shares**2 * errors**2).sum(0))


def verdicts_on(evidence: Evidence, truth: np.ndarray, truth_error: np.ndarray) -> dict[str, float]:
    """How honest the verdicts are."""
    difference = np.abs(evidence["estimate"].values - truth)
    joint = np.hypot(evidence["standard_error"].values, truth_error)
    good = np.isin(evidence["verdict"].values, GOOD)
    wrong, far = (difference > 3 * joint) & (difference > 0.02), difference > 0.5
    return {
        "good": good.mean(),
        "good rows off": (good & wrong).sum() / max(good.sum(), 1),
        "rows off by 0.5": far.sum(),
        "of them flagged": (far & ~good).sum() / far.sum() if far.any() else np.nan,
    }


def row(name: str, evidence: Evidence, honesty: dict[str, float]) -> str:
    summary = evidence.summary()
    cells = [
        name,
        f"{summary.mean:.3f}",
        f"{summary.monte_carlo_error:.4f}",
        f"{summary.bias:+.4f}",
        f"{summary.median_ess:.0f}",
        f"{honesty['good']:.0%}",
        f"{honesty['good rows off']:.1%}",
        f"{honesty['rows off by 0.5']:.0f}",
        f"{honesty['of them flagged']:.0%}" if honesty["rows off by 0.5"] else "-",
        f"{evidence.dataset.attrs['seconds'] / summary.num_observations:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| method | mean | Monte Carlo error | bias | median ESS | good | good, but off | off by > 0.5 nats "
    "| of them flagged | s / image |\n|" + " --- |" * 10
)


def fifty_dimensions(digits: data.Dataset, options: argparse.Namespace) -> list[str]:
    subject = trained(50, digits, options.epochs, options.cache)
    x = digits.test.x[: options.num_images]

    def score(name: str, **arguments) -> Evidence:
        return cached(options.cache / f"50-{name}.nc", lambda: log_evidence(subject, x, **arguments))

    rows = {
        "importance, K = 5000": score("importance", method="importance", num_particles=5000),
        "mixture, K = 1000": score("mixture-1000", method="mixture"),
        "mixture, K = 5000": score("mixture", method="mixture", num_particles=5000),
        "annealed, 16 chains": score("annealed", method="annealed", num_particles=16),
        "auto": score("auto"),
    }
    slow = Annealed(num_temperatures=200)
    many = score("reference-mixture", method="mixture", num_particles=options.reference_particles, seed=1)
    chains = score("reference-annealed", method=slow, num_particles=32, seed=1)
    truth, truth_error = averaged(many, chains)
    encoder, mixture = rows["importance, K = 5000"], rows["mixture, K = 5000"]
    flagged = encoder["pareto_k"].values > 0.7
    ess = [np.median(evidence["ess"].values[flagged]) for evidence in (encoder, mixture)]
    difference = mixture["estimate"].values - rows["annealed, 16 chains"]["estimate"].values
    joint = np.hypot(mixture.summary().monte_carlo_error, rows["annealed, 16 chains"].summary().monte_carlo_error)
    lines = [
        f"## 50 dimensions, {len(x)} test images",
        f"Reference: mean {truth.mean():.3f} nats, error {np.sqrt((truth_error**2).sum()) / len(x):.4f} (mixture with "
        f"{options.reference_particles} particles {many.summary().mean:.3f}, annealed {chains.summary().mean:.3f}).",
        "\n".join([HEAD, *(row(name, e, verdicts_on(e, truth, truth_error)) for name, e in rows.items())]),
        f"Mixture minus annealed: {difference.mean():+.4f} nats, joint error {joint:.4f}. Where k-hat flags the "
        f"encoder ({flagged.mean():.0%} of the images) the median ESS of 5,000 is {ess[0]:.0f} with the encoder and "
        f"{ess[1]:.0f} with the mixture.",
    ]
    gaps = [
        evidence_bounds(subject, num_observations=options.num_simulated, method=method, num_particles=particles)
        for method, particles in (("importance", 5000), ("mixture", 5000), ("annealed", 16))
    ]
    table = ["| bounds | lower | upper | gap |\n| --- | --- | --- | --- |"]
    for bounds in gaps:
        ends = [f"{float(bounds[side].mean()):.3f}" for side in ("lower", "upper")]
        table.append(
            f"| {bounds.dataset.attrs['method']} | {' | '.join(ends)} | {bounds.gap[0]:.3f} +- {bounds.gap[1]:.3f} |"
        )
    return [*lines, f"Bounds on {options.num_simulated} images that the story made:", "\n".join(table)]


def two_dimensions(digits: data.Dataset, options: argparse.Namespace) -> list[str]:
    subject = trained(2, digits, options.epochs, options.cache)
    x = digits.test.x[: options.num_grid_images]

    def score(name: str, **arguments) -> Evidence:
        return cached(options.cache / f"2-{name}.nc", lambda: log_evidence(subject, x, **arguments))

    grid = score("quadrature", method="quadrature")
    fine, finer = brute_force(subject, x, options.cache / "2-grid.npz")
    worst = np.maximum(np.abs(finer - fine), np.abs(finer - grid["estimate"].values)).argsort()[-WORST:]
    truth, truth_error = finer.copy(), np.abs(finer - fine) / 3
    if not (zoom := options.cache / "2-zoom.npy").exists():
        np.save(zoom, zoomed(subject, x[worst]))
    truth[worst], truth_error[worst] = np.load(zoom), 0.0
    change = np.abs(grid["estimate"].values - truth)
    rows = {
        "quadrature": grid,
        "auto": score("auto"),
        "importance, K = 5000": score("importance", method="importance", num_particles=5000),
        "laplace": score("laplace", method="laplace"),
        "mixture": score("mixture", method="mixture"),
        "annealed, 25 temperatures": score("annealed", method=Annealed(num_temperatures=25)),
        "prior, K = 20000": score("prior", method="prior", num_particles=20_000),
    }
    return [
        f"## 2 dimensions, {len(x)} test images",
        f"Quadrature against a hand-written uniform grid of step {STEP} (and of {STEP / 4} around the mode, for the "
        f"{WORST} images where these differ most): largest difference {change.max():.5f} nats, mean "
        f"{change.mean():.6f}.",
        "\n".join([HEAD, *(row(name, e, verdicts_on(e, truth, truth_error)) for name, e in rows.items())]),
    ]


@torch.no_grad()
def brute_force(subject: VAE, x: torch.Tensor, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """log p(x) by the trapezoid rule on uniform grids of step 2 * STEP and STEP, written out; nothing of evidence/."""
    if not path.exists():
        half = round(HALF_WIDTH / STEP)
        line = torch.arange(-half, half + 1)
        network, pixels = subject.get_submodule("decoder.logits"), x.flatten(1)
        sums = torch.full((2, len(x)), -torch.inf, dtype=torch.float64)
        for first in line:
            z = torch.stack([first.expand_as(line), line], 1) * STEP
            logits = network(z).flatten(1)
            log_p = pixels @ logits.T - torch.nn.functional.softplus(logits).sum(1)
            log_p = log_p.double() - z.double().square().sum(1) / 2 - np.log(2 * np.pi)
            if first % 2 == 0:
                sums[0] = torch.logaddexp(sums[0], log_p[:, (line % 2 == 0)].logsumexp(1))
            sums[1] = torch.logaddexp(sums[1], log_p.logsumexp(1))
        steps = torch.tensor([[2 * STEP], [STEP]], dtype=torch.float64)
        np.savez(path, log_p=(sums + 2 * steps.log()).numpy())
    fine, finer = np.load(path)["log_p"]
    return fine, finer


@torch.no_grad()
def zoomed(subject: VAE, x: torch.Tensor) -> np.ndarray:
    """log p(x) of a few images by the trapezoid rule of step STEP / 4 on a square around the mode."""
    coarse = torch.cartesian_prod(*[torch.arange(-HALF_WIDTH, HALF_WIDTH, 0.025)] * 2)
    step = STEP / 4
    network = subject.get_submodule("decoder.logits")
    window = torch.arange(-round(ZOOM / step), round(ZOOM / step) + 1) * step

    def log_joint(z: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        logits = network(z).flatten(1)
        log_p = logits @ image.flatten() - torch.nn.functional.softplus(logits).sum(1)
        return log_p.double() - z.double().square().sum(1) / 2 - np.log(2 * np.pi)

    sums = []
    for image in x:
        mode = coarse[torch.cat([log_joint(z, image) for z in coarse.split(4096)]).argmax()]
        points = torch.cartesian_prod(window, window) + mode
        sums.append(torch.cat([log_joint(z, image) for z in points.split(4096)]).logsumexp(0) + 2 * np.log(step))
    return torch.stack(sums).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--latent-dims", type=int, nargs="+", choices=(50, 2), default=(50, 2))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--num-grid-images", type=int, default=1000)
    parser.add_argument("--num-simulated", type=int, default=200)
    parser.add_argument("--reference-particles", type=int, default=100_000)
    parser.add_argument("--cache", type=Path, default=Path("runs/evidence-on-digits"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    options.cache.mkdir(parents=True, exist_ok=True)
    digits = data.load(options.data, root=options.data_root)
    sections = {50: fifty_dimensions, 2: two_dimensions}
    parts = [part for dim in options.latent_dims for part in sections[dim](digits, options)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
