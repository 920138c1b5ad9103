"""Every prior, likelihood and posterior of the package, once in each of its forms: what the laws are tested on.

A public class of ``ppl_vae.priors``, ``likelihoods`` or ``posteriors`` that is missing here fails a test.
"""

from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from torch import nn

from ppl_vae import likelihoods, posteriors, priors
from ppl_vae.likelihoods import learned
from ppl_vae.networks import mlp

Make = Callable[[], nn.Module]

LATENT_DIM = 2
EVENT = (2, 3)


def decode(*sizes: int) -> nn.Module:
    """A network from the latent to an observation, or to so many numbers for each of its dimensions."""
    return mlp(LATENT_DIM, 8, (*EVENT, *sizes))


def columns() -> list[nn.Module]:
    """A table of six columns, one of them counted and one of classes."""
    measured = likelihoods.LogNormal(nn.Linear(8, 2), learned(0.3)), likelihoods.Beta(nn.Linear(8, 2), 0.3)
    return [*measured, likelihoods.Binomial(nn.Linear(8, 1), 10), likelihoods.Categorical(nn.Linear(8, 3))]


def vamp_prior(make_encoder: Make) -> nn.Module:
    """With pseudo-inputs that are no bounded data."""
    return priors.VampPrior(make_encoder(), torch.randn(3, *EVENT))


def encode(num_parameters: int) -> nn.Module:
    """A network from an observation to so many numbers."""
    return mlp(EVENT, 8, num_parameters)


# Of observations of shape EVENT.
POSTERIORS: dict[str, Make] = {
    "DiagonalNormal": lambda: posteriors.DiagonalNormal(encode(4)),
    "FullNormal": lambda: posteriors.FullNormal(encode(5)),
    "MixtureOfNormals": lambda: posteriors.MixtureOfNormals(encode(15), components=3),
    "Flow, inverse autoregressive": lambda: posteriors.Flow(
        encode(4 + 3), LATENT_DIM, posteriors.inverse_autoregressive(LATENT_DIM, context_dim=3, hidden_dims=(8,))
    ),
    "Flow, splines": lambda: posteriors.Flow(
        encode(4 + 3), LATENT_DIM, posteriors.splines(LATENT_DIM, context_dim=3, hidden_dims=(8,), bins=4)
    ),
    "Flow, Pyro's own": lambda: posteriors.Flow(
        encode(4), LATENT_DIM, [transforms.affine_coupling(LATENT_DIM, [8]), transforms.Permute(torch.tensor([1, 0]))]
    ),
    "Box": lambda: posteriors.Box(posteriors.DiagonalNormal(encode(4), floor=1.0), low=-1.0, high=1.5),
}

PRIORS: dict[str, Make] = {
    "StandardNormal": lambda: priors.StandardNormal(LATENT_DIM),
    "Normal": lambda: priors.Normal(LATENT_DIM),
    "Laplace": lambda: priors.Laplace(LATENT_DIM),
    "StudentT": lambda: priors.StudentT(LATENT_DIM, df=5),
    "Uniform": lambda: priors.Uniform(LATENT_DIM, low=-1.0, high=1.5),
    "Uniform, a box": lambda: priors.Uniform(LATENT_DIM, low=-1.0, high=torch.tensor([1.0, 2.0])),
    "MixtureOfNormals": lambda: priors.MixtureOfNormals(LATENT_DIM, components=3),
    "PerClass": lambda: priors.PerClass(LATENT_DIM, num_labels=3),
    "VampPrior, bounded": lambda: priors.VampPrior(POSTERIORS["DiagonalNormal"](), torch.rand(3, *EVENT), 0.0, 1.0),
    "Flow, realnvp": lambda: priors.Flow(LATENT_DIM, priors.realnvp(LATENT_DIM, num_layers=3, hidden_dims=(8,))),
    "Flow, splines": lambda: priors.Flow(LATENT_DIM, priors.splines(LATENT_DIM, hidden_dims=(8,), bins=4)),
    "Flow, Pyro's own": lambda: priors.Flow(
        LATENT_DIM, [transforms.affine_coupling(LATENT_DIM, [8]), transforms.Permute(torch.tensor([1, 0]))]
    ),
    "Fixed, independent": lambda: priors.Fixed(dist.Normal(torch.zeros(LATENT_DIM), 0.7).to_event(1)),
    "Fixed, expanded": lambda: priors.Fixed(dist.Laplace(0.1, 0.7).expand([LATENT_DIM]).to_event(1)),
    "Fixed, mixture": lambda: priors.Fixed(
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.eye(2), 0.7).to_event(1))
    ),
    "Fixed, transformed": lambda: priors.Fixed(
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0).to_event(1), [transforms.AffineTransform(torch.tensor([0.1, -0.2]), 0.7)]
        )
    ),
} | {f"VampPrior of {name}": partial(vamp_prior, make) for name, make in POSTERIORS.items()}

LIKELIHOODS: dict[str, Make] = {
    "Bernoulli": lambda: likelihoods.Bernoulli(decode()),
    "Normal, fixed scale": lambda: likelihoods.Normal(decode(), scale=0.3),
    "Normal, fixed scale per dimension": lambda: likelihoods.Normal(decode(), scale=torch.rand(EVENT) + 0.1),
    "Normal, learned scale": lambda: likelihoods.Normal(decode(), learned(0.3)),
    "Normal, scale per dimension": lambda: likelihoods.Normal(decode(), learned(torch.ones(EVENT))),
    "Normal, scale by a network": lambda: likelihoods.Normal(decode(), scale=decode()),
    "Laplace, learned scale": lambda: likelihoods.Laplace(decode(), learned(0.3)),
    "StudentT, fixed": lambda: likelihoods.StudentT(decode(), scale=0.3, df=2.5),
    "StudentT, learned": lambda: likelihoods.StudentT(decode(), learned(0.3), learned(torch.full(EVENT, 5.0))),
    "StudentT, by networks": lambda: likelihoods.StudentT(decode(), decode(), decode()),
    "LogNormal, learned scale": lambda: likelihoods.LogNormal(decode(), learned(0.3)),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(decode()),
    "Beta, fixed scale": lambda: likelihoods.Beta(decode(), scale=0.3),
    "Beta, scale by a network": lambda: likelihoods.Beta(decode(), scale=decode()),
    "DiscretizedLogistic, learned scale": lambda: likelihoods.DiscretizedLogistic(decode(), learned(0.1)),
    "DiscretizedLogistic, 16 levels": lambda: likelihoods.DiscretizedLogistic(decode(), decode(), levels=16),
    "MixtureOfDiscretizedLogistics": lambda: likelihoods.MixtureOfDiscretizedLogistics(decode(4), decode(4), decode(4)),
    "Binomial": lambda: likelihoods.Binomial(decode(), total_count=10),
    "Binomial, total per dimension": lambda: likelihoods.Binomial(decode(), 1 + torch.arange(6).reshape(EVENT)),
    "Categorical": lambda: likelihoods.Categorical(decode(4)),
    "Poisson": lambda: likelihoods.Poisson(decode()),
    "NegativeBinomial, learned dispersion": lambda: likelihoods.NegativeBinomial(decode(), learned(0.5)),
    "NegativeBinomial, dispersion by a network": lambda: likelihoods.NegativeBinomial(decode(), decode()),
    "ZeroInflatedPoisson, fixed gate": lambda: likelihoods.ZeroInflatedPoisson(decode(), gate=0.3),
    "ZeroInflatedPoisson, learned gate": lambda: likelihoods.ZeroInflatedPoisson(decode(), learned(torch.rand(EVENT))),
    "ZeroInflatedNegativeBinomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(decode(), learned(0.5), decode()),
    "ByColumn": lambda: likelihoods.ByColumn(likelihoods.Normal(mlp(2, 8, 2), 0.3), likelihoods.Poisson(mlp(2, 1))),
    "ByColumn, with a trunk": lambda: likelihoods.ByColumn(*columns(), trunk=nn.Sequential(mlp(2, 8), nn.ReLU())),
}
