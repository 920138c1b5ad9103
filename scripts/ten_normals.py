"""Ten normals for ten clusters, or one normal sent through a transform g? Both explain the data equally well.

    python scripts/ten_normals.py --out ten_normals.png

Observations come from ten separated clusters in a plane of z, seen through a linear map and noise. A mixture of
normals as the prior, with a linear decoder, is how they were made. One normal does as well where a flow g makes the
prior of it; the decoder may hold g, too. Without any g it does not. Evidence is by quadrature, and the truth is the
density that the data were drawn from. It takes about five minutes.
"""

import argparse
from functools import partial
from pathlib import Path

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ppl_vae import VAE, compare, fit, likelihoods, networks, posteriors, priors, traces
from ppl_vae.evidence import Comparison

FEATURES, NOISE, SPREAD = 5, 0.3, 0.25


def truth(weight: Tensor) -> dist.TorchDistribution:
    """The distribution of x: two rows of five normals in the plane of z, mapped to x, plus the noise."""
    centers = torch.cartesian_prod(torch.linspace(-3, 3, 5), torch.tensor([-1.0, 1.0]))
    covariance = SPREAD**2 * weight @ weight.T + NOISE**2 * torch.eye(FEATURES)
    clusters = dist.MultivariateNormal(centers @ weight.T, covariance)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(centers))), clusters)


def story(prior: nn.Module, decoder: nn.Module) -> VAE:
    family = posteriors.FullNormal
    encoder = family(networks.mlp(FEATURES, 128, 128, family.num_parameters(2)))
    return VAE(prior, likelihoods.Normal(decoder, scale=likelihoods.learned(0.5)), encoder)


def stories() -> dict[str, VAE]:
    splines = priors.splines(2, num_layers=4, hidden_dims=(32, 32), bins=16, bound=4.0)
    return {
        "a mixture of normals": story(priors.MixtureOfNormals(2, components=50), nn.Linear(2, FEATURES)),
        "one normal through splines": story(priors.Flow(2, splines), nn.Linear(2, FEATURES)),
        "one normal, deep decoder": story(priors.StandardNormal(2), networks.mlp(2, 128, 128, FEATURES)),
        "one normal": story(priors.StandardNormal(2), nn.Linear(2, FEATURES)),
    }


def picture(compared: Comparison, trained: dict[str, VAE], true_mean: float) -> Figure:
    """Draws of each prior, and the evidence of its story against the truth."""
    figure = Figure(figsize=(3.2 * len(trained), 3.8), layout="constrained")
    for axes, (name, made) in zip(figure.subplots(1, len(trained)), trained.items(), strict=True):
        z = traces.draws(traces.prior_predictive(made, 3000))["z"]
        axes.scatter(*z.T.numpy(), s=1, color="tab:blue", alpha=0.4)
        difference = compared["mean"].sel(story=name).item() - true_mean
        axes.set(title=f"{name}\n{difference:+.3f} nats to the truth", xticks=[], yticks=[], xlabel="z ~ p(z)")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=10_000, help="observations to learn from")
    parser.add_argument("--test", type=int, default=1000, help="observations to judge by")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("ten_normals.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    distribution = truth(torch.randn(FEATURES, 2))
    train, test = distribution.sample((options.train,)), distribution.sample((options.test,))
    true_mean = distribution.log_prob(test).mean().item()

    trained = stories()
    for made in trained.values():
        fit(
            made,
            train,
            epochs=options.epochs,
            batch_size=100,
            optimizer=partial(torch.optim.Adam, lr=4e-3, fused=True),
            schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
            clip=100.0,
        )
    compared = compare(trained, test, method="auto")
    print(compared)
    print(f"the truth: {true_mean:.3f} nats")
    picture(compared, trained, true_mean).savefig(options.out, dpi=110)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
