"""Ten normals for ten clusters, or one normal sent through a transform g? Both explain the data equally well.

    python scripts/ten_normals.py --out ten_normals.png

Observations come from ten separated clusters in a plane of z, seen through a linear map and noise. All stories here
have such a linear decoder, so that only the prior can be rich: a mixture of normals, flows g of one normal, and the
normal itself, which is not enough. Evidence is by quadrature; the truth is the density that the data were drawn from.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ppl_vae import VAE, compare, fit, likelihoods, networks, posteriors, priors, traces
from ppl_vae.evidence import Comparison

CLUSTERS, FEATURES, NOISE, SPREAD, RADIUS = 10, 5, 0.3, 0.25, 4.0


def cluster_centers() -> Tensor:
    angles = 2 * math.pi * torch.arange(CLUSTERS) / CLUSTERS
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def truth(weight: Tensor) -> dist.TorchDistribution:
    """The distribution of x: ten normals with the covariance of a cluster, mapped, plus the noise."""
    covariance = SPREAD**2 * weight @ weight.T + NOISE**2 * torch.eye(FEATURES)
    components = dist.MultivariateNormal(cluster_centers() @ weight.T, covariance)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(CLUSTERS)), components)


def stories() -> dict[str, VAE]:
    made: dict[str, nn.Module] = {
        "ten normals": priors.MixtureOfNormals(2, 2 * CLUSTERS),
        "one normal through splines": priors.Flow(2, priors.splines(2, num_layers=6, bins=16, bound=6.0)),
        "one normal through couplings": priors.Flow(2, priors.realnvp(2, num_layers=10)),
        "one normal": priors.Normal(2),
    }
    family = posteriors.DiagonalNormal
    return {
        name: VAE(
            prior=prior,
            decoder=likelihoods.Normal(nn.Linear(2, FEATURES), scale=likelihoods.learned(1.0)),
            encoder=family(networks.mlp(FEATURES, 128, 128, family.num_parameters(2))),
        )
        for name, prior in made.items()
    }


def picture(compared: Comparison, trained: dict[str, VAE], true_mean: float) -> Figure:
    """What each prior looks like, and what its story says of the test data, below the truth."""
    figure = Figure(figsize=(3.2 * len(trained), 3.9), layout="constrained")
    for axes, (name, story) in zip(figure.subplots(1, len(trained)), trained.items(), strict=True):
        z = traces.draws(traces.prior_predictive(story, 3000))["z"].numpy()
        middle, half = np.median(z, axis=0), 1.1 * np.quantile(abs(z - np.median(z, axis=0)), 0.999)
        axes.scatter(*z.T, s=1, color="tab:blue", alpha=0.4)
        mean = compared["mean"].sel(story=name).item()
        axes.set(title=f"{name}\n{mean - true_mean:+.3f} nats to the truth", xticks=[], yticks=[], aspect="equal")
        axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=10_000, help="observations to learn from")
    parser.add_argument("--test", type=int, default=2000, help="observations to judge by")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("ten_normals.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    distribution = truth(torch.randn(FEATURES, 2))
    train, test = distribution.sample((options.train + options.test,)).split([options.train, options.test])
    true_mean = distribution.log_prob(test).mean().item()

    trained = stories()
    for name, story in trained.items():
        history = fit(
            story,
            train,
            epochs=options.epochs,
            batch_size=100,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3, fused=True),
            schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
        )
        print(f"{name}: trained by {history.engine}, ELBO {history['train_elbo'][-1]:.3f}")
    compared = compare(trained, test, method="auto")
    print(compared)
    print(f"the truth: {true_mean:.3f}")
    picture(compared, trained, true_mean).savefig(options.out, dpi=110)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
