"""A story of one's own: a factor model whose every row has a scale of its own, against one where all rows share it.

    python scripts/factors_story.py --factors 4 --epochs 200

The data are 569 tumours in 30 measurements (scikit-learn's breast cancer table, in standard deviations). Both stories
are plain modules with a model and a guide. They are trained on three quarters of the rows and compared by log p(x) of
the others; scikit-learn's factor analysis, in closed form, says what the story without the scale should reach.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import FactorAnalysis
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import compare, fit, log_evidence
from ppl_vae.networks import mlp


class Factors(nn.Module):
    """f ~ N(0, I), x ~ N(W f + b, s^2): each measurement has a standard deviation s."""

    def __init__(self, num_measurements: int, num_factors: int) -> None:
        super().__init__()
        self.num_factors = num_factors
        self.loadings = nn.Linear(num_factors, num_measurements)
        self.noise = nn.Parameter(torch.zeros(num_measurements))
        self.guess = mlp(num_measurements, 64, 2 * num_factors)

    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        with pyro.plate("observations", num_observations if x is None else len(x)):
            f = pyro.sample("f", dist.Normal(torch.zeros(self.num_factors), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.loadings(f), softplus(self.noise)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, scale = self.guess(x).chunk(2, dim=-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("f", dist.Normal(loc, softplus(scale)).to_event(1))


class ScaledFactors(nn.Module):
    """The same with x ~ N(W f + b, t^2 s^2), where each row has its own t ~ LogNormal(0, spread)."""

    def __init__(self, num_measurements: int, num_factors: int) -> None:
        super().__init__()
        self.num_factors = num_factors
        self.loadings = nn.Linear(num_factors, num_measurements)
        self.noise = nn.Parameter(torch.zeros(num_measurements))
        self.spread = nn.Parameter(torch.zeros(()))
        self.guess = mlp(num_measurements, 64, 2 * (num_factors + 1))

    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        with pyro.plate("observations", num_observations if x is None else len(x)):
            f = pyro.sample("f", dist.Normal(torch.zeros(self.num_factors), 1.0).to_event(1))
            t = pyro.sample("t", dist.LogNormal(0.0, softplus(self.spread)))
            scale = t.unsqueeze(-1) * softplus(self.noise)
            return pyro.sample("x", dist.Normal(self.loadings(f), scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, scale = self.guess(x).chunk(2, dim=-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("f", dist.Normal(loc[..., :-1], softplus(scale[..., :-1])).to_event(1))
            pyro.sample("t", dist.LogNormal(loc[..., -1], softplus(scale[..., -1])))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--particles", type=int, default=1000, help="draws behind each log p(x)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    measurements, _ = load_breast_cancer(return_X_y=True)
    table = torch.as_tensor(np.asarray(measurements), dtype=torch.float32)
    table = table[torch.randperm(len(table))]
    size = 3 * len(table) // 4
    mean, scale = table[:size].mean(0), table[:size].std(0)
    train, test = ((table - mean) / scale).split([size, len(table) - size])

    stories = {"one scale": Factors(30, options.factors), "a scale for each row": ScaledFactors(30, options.factors)}
    for name, story in stories.items():
        adam = partial(torch.optim.Adam, lr=5e-3)
        history = fit(story, train, epochs=options.epochs, optimizer=adam, seed=options.seed)
        print(f"{name}: {len(history)} epochs, train ELBO {history['train_elbo'][-1]:.2f}")

    scored = {
        name: log_evidence(story, test, method="mixture", num_particles=options.particles)
        for name, story in stories.items()
    }
    closed_form = FactorAnalysis(options.factors).fit(train.numpy()).score(test.numpy())
    print(f"\nfactor analysis in closed form: {closed_form:.2f} nats\n\n{compare(scored)}")
    print(f"\nspread of the rows' scales: {softplus(stories['a scale for each row'].spread):.2f}")


if __name__ == "__main__":
    main()
