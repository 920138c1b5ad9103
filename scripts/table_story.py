"""A VAE of a table whose columns differ in kind, and a choice between two likelihoods for one of them.

    python scripts/table_story.py --latent-dim 3 --epochs 300

The table is scikit-learn's diabetes data, 442 patients: sex (0 or 1), age, body mass index, blood pressure and blood
sugar (real numbers), five other blood values (positive ones), and the progression of the disease a year later (a whole
number from 25 to 346). Two stories are trained, with a Poisson and with a negative binomial for the progression, and
compared by log p(row) of patients that neither has seen. The better one then makes patients of its own.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from ppl_vae import VAE, compare, fit, posteriors, priors
from ppl_vae.likelihoods import Bernoulli, ByColumn, LogNormal, NegativeBinomial, Normal, Poisson, learned
from ppl_vae.networks import mlp

FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
COLUMNS = ("sex", "age", "bmi", "bp", "s6", "s1", "s2", "s3", "s4", "s5", "progression")
REAL, POSITIVE = slice(1, 5), slice(5, 10)


def table(generator: torch.Generator) -> Tensor:
    """Patients in random order, shape (442, 11): real columns in standard deviations, positive ones over their mean."""
    features, progression = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    columns = dict(zip(FEATURES, features.T, strict=True))
    columns |= {"sex": columns["sex"] - 1, "progression": progression}
    x = torch.as_tensor(np.stack([columns[name] for name in COLUMNS], axis=1), dtype=torch.float32)
    x[:, REAL] = (x[:, REAL] - x[:, REAL].mean(0)) / x[:, REAL].std(0)
    x[:, POSITIVE] /= x[:, POSITIVE].mean(0)
    return x[torch.randperm(len(x), generator=generator)]


class Standardized(nn.Module):
    """A network of the table, with the progression brought to the size of the other columns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.cat([x[..., :-1], x[..., -1:] / 100], dim=-1))


def story(latent_dim: int, progression: nn.Module) -> VAE:
    """A VAE whose columns hang on one hidden layer of 32 numbers."""
    return VAE(
        prior=priors.StandardNormal(latent_dim),
        decoder=ByColumn(
            Bernoulli(nn.Linear(32, 1)),
            Normal(nn.Linear(32, 4), scale=learned(torch.ones(4))),
            LogNormal(nn.Linear(32, 5), scale=learned(torch.full((5,), 0.3))),
            progression,
            trunk=nn.Sequential(mlp(latent_dim, 32), nn.ReLU()),
        ),
        encoder=posteriors.DiagonalNormal(Standardized(mlp(len(COLUMNS), 32, 2 * latent_dim))),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-dim", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--particles", type=int, default=1000, help="draws behind each log p(row)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    train, validation, test = table(torch.Generator().manual_seed(0)).split([272, 70, 100])
    stories = {
        "Poisson": story(options.latent_dim, Poisson(nn.Linear(32, 1))),
        "negative binomial": story(options.latent_dim, NegativeBinomial(nn.Linear(32, 1), dispersion=learned(0.3))),
    }
    for name, vae in stories.items():
        adam = partial(torch.optim.Adam, lr=3e-3)
        history = fit(vae, train, validation=validation, epochs=options.epochs, optimizer=adam, batch_size=32)
        print(f"{name}: best validation ELBO {history['validation_elbo'].max():.2f}")
    comparison = compare(stories, test, method="auto", num_particles=options.particles)
    print(f"\n{comparison}\n\nmean, standard deviation; correlation with progression ({comparison.best})")
    made = stories[comparison.best].model(num_observations=100_000).detach()
    for number, name in enumerate(COLUMNS):
        print(f"{name:>12}:  patients {in_words(test, number)}   story {in_words(made, number)}")


def in_words(x: Tensor, number: int) -> str:
    """Mean, standard deviation and correlation with the last column, of one column."""
    correlation = torch.corrcoef(x[:, [number, -1]].T)[0, 1]
    return f"{x[:, number].mean():7.2f} {x[:, number].std():7.2f}; {correlation:5.2f}"


if __name__ == "__main__":
    main()
