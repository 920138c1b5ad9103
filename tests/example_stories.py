"""Stories that several tests tell: some whose evidence is known, and some as a user would write them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import scipy.stats
import torch
from torch import Tensor, nn

from ppl_vae import VAE, likelihoods, networks, posteriors, priors, stories
from ppl_vae.networks import WithLabels, mlp


class ExactPosterior(nn.Module):
    """The posterior of a linear-Gaussian story, its covariance widened by a factor in every standard deviation."""

    def __init__(self, decoder: likelihoods.Normal, widened: float = 1.0) -> None:
        super().__init__()
        self.decoder = decoder
        self.widened = widened

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        weight, bias, scale = self.decoder.loc.weight, self.decoder.loc.bias, self.decoder.scale()
        precision = weight.T @ weight / scale**2 + torch.eye(weight.shape[1])
        loc = torch.linalg.solve(precision, ((x - bias) / scale**2 @ weight).T).T
        return dist.MultivariateNormal(loc, precision_matrix=precision / self.widened**2)


def linear_gaussian(num_features: int, latent_dim: int, scale: float = 0.5, widened: float = 1.0, seed: int = 0) -> VAE:
    """z ~ N(0, I), x ~ N(W z + b, scale^2 I), with the exact posterior (or a widened one) as its guide."""
    generator = torch.Generator().manual_seed(seed)
    loc = nn.Linear(latent_dim, num_features)
    with torch.no_grad():
        loc.weight.copy_(torch.randn(loc.weight.shape, generator=generator))
        loc.bias.copy_(torch.randn(loc.bias.shape, generator=generator))
    decoder = likelihoods.Normal(loc, scale=scale)
    return VAE(priors.StandardNormal(latent_dim), decoder, ExactPosterior(decoder, widened))


def closed_form_log_evidence(story: VAE, x: Tensor) -> Tensor:
    """log N(x; b, W W' + sigma^2 I), by torch.distributions."""
    weight, bias, scale = story.decoder.loc.weight, story.decoder.loc.bias, story.decoder.scale()
    covariance = weight @ weight.T + scale**2 * torch.eye(len(weight))
    return torch.distributions.MultivariateNormal(bias, covariance).log_prob(x).detach()


class TwoLatents(nn.Module):
    """A user's own story, a plain module: a cluster-free factor model whose second latent is each row's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.loadings = nn.Linear(2, 5)
        self.guess = nn.Linear(5, 6)

    def model(self, x: Tensor | None = None, *, num_observations: int = 1) -> Tensor:
        with pyro.plate("observations", num_observations if x is None else len(x)):
            factors = pyro.sample("factors", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(0.0, 0.5))
            return pyro.sample("x", dist.Normal(self.loadings(factors), size.unsqueeze(-1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.guess(x).chunk(2, dim=-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("factors", dist.Normal(loc[..., :2], log_scale[..., :2].exp()).to_event(1))
            pyro.sample("size", dist.LogNormal(loc[..., 2], log_scale[..., 2].exp()))


def small_vae() -> VAE:
    """A VAE of 6 x 5 binary images."""
    return VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(mlp(2, 16, (1, 6, 5))),
        encoder=posteriors.DiagonalNormal(mlp((1, 6, 5), 16, 4)),
    )


def convolutional_vae() -> VAE:
    """A VAE of 6 x 5 images with convolutions and heteroscedastic normals."""
    image = partial(networks.convolutional_decoder, 2, 8, 4, image=(1, 6, 5))
    return VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(loc=image(), scale=image()),
        encoder=posteriors.DiagonalNormal(networks.convolutional_encoder((1, 6, 5), 4, 8, output=4)),
    )


def small_conditional() -> stories.ConditionalVAE:
    """A conditional VAE of 6 x 5 binary images with three labels."""
    return stories.ConditionalVAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(WithLabels(mlp(2 + 3, 16, (1, 6, 5)), num_labels=3)),
        encoder=posteriors.DiagonalNormal(WithLabels(mlp(30 + 3, 16, 4), num_labels=3)),
    )


def images(num_observations: int = 40) -> Tensor:
    """Binary 6 x 5 images of two kinds: a dark left or a dark right half, with some noise."""
    generator = torch.Generator().manual_seed(1)
    side = torch.rand(num_observations, 1, 1, 1, generator=generator) < 0.5
    left = torch.arange(5).expand(num_observations, 1, 6, 5) < 2
    return torch.bernoulli(torch.where(side == left, 0.9, 0.1), generator=generator)


def labels(num_observations: int = 40) -> Tensor:
    """Labels 0, 1, 2 in turn."""
    return torch.arange(num_observations) % 3


def rows(num_observations: int = 40) -> Tensor:
    """Rows of five correlated numbers."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(2, 5, generator=generator)
    return torch.randn(num_observations, 2, generator=generator) @ mixing


# name -> (makes the story, its columns)
STORIES = {
    "VAE": (small_vae, lambda: (images(),)),
    "convolutional": (convolutional_vae, lambda: (images() - rows(40 * 6).reshape(40, 1, 6, 5) / 10,)),
    "conditional": (small_conditional, lambda: (images(), labels())),
    "plain": (TwoLatents, lambda: (rows(),)),
}


class Fragile(nn.Module):
    """x ~ N(z + shift, 1), where a row that holds 99 makes the guide's location NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.guess = nn.Parameter(torch.zeros(()))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(torch.where(x == 99, torch.nan, x + self.guess), 1.0))


class TwoClusters(nn.Module):
    """A user's own story with a discrete latent that the model sums out and the guide leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.logits = nn.Parameter(torch.zeros(2))
        self.guess = nn.Linear(1, 2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            cluster = pyro.sample("cluster", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.loc[cluster], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.guess(x[:, None]).unbind(-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


class ClustersInGuide(TwoClusters):
    """The same story, told with a guide that draws the discrete latent as well."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            cluster = pyro.sample("cluster", dist.Categorical(logits=torch.stack([-x, x], -1)))
            pyro.sample("z", dist.Normal((4 * x + self.loc[cluster]) / 5, 0.6))


class HierarchicalNormal(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(0.8 z2 + 0.5, 0.6^2), x ~ N(a z1, 0.7^2 I); the guide guesses upwards, a little too wide."""

    loadings = (1.0, -0.5, 0.3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            bottom = pyro.sample("bottom", dist.Normal(0.8 * top + 0.5, 0.6))
            pyro.sample("x", dist.Normal(bottom[..., None] * torch.tensor(self.loadings), 0.7).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loadings = torch.tensor(self.loadings)
        precision = 1 + loadings.square().sum() / 0.7**2  # a priori, bottom ~ N(0.5, 1)
        with pyro.plate("observations", len(x)):
            loc = (0.5 + x @ loadings / 0.7**2) / precision
            bottom = pyro.sample("bottom", dist.Normal(loc, 1.3 / precision.sqrt()))
            pyro.sample("top", dist.Normal(0.8 * (bottom - 0.5), 1.3 * 0.6))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log N(x; 0.5 a, a a' + 0.7^2 I)."""
        loadings = torch.tensor(self.loadings)
        covariance = loadings[:, None] * loadings + 0.7**2 * torch.eye(3)
        return torch.distributions.MultivariateNormal(0.5 * loadings, covariance).log_prob(x)


class GammaPoisson(nn.Module):
    """rate ~ Gamma(2, 0.5), x ~ Poisson(rate); the guide is the posterior with its parameters multiplied by 0.6."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("rate", dist.Gamma(0.6 * (2 + x), 0.6 * 1.5))

    def log_evidence(self, x: Tensor) -> Tensor:
        """The log probability of a negative binomial."""
        return torch.as_tensor(scipy.stats.nbinom.logpmf(x, 2, 0.5 / 1.5))


class DirichletMultinomial(nn.Module):
    """shares ~ Dirichlet(2, 3, 4), x ~ Multinomial(12, shares); the guide is the posterior, times 0.7."""

    concentration = (2.0, 3.0, 4.0)

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(torch.tensor(self.concentration)))
            pyro.sample("x", dist.Multinomial(12, shares), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("shares", dist.Dirichlet(0.7 * (torch.tensor(self.concentration) + x)))

    def log_evidence(self, x: Tensor) -> Tensor:
        """The log probability of a Dirichlet-multinomial."""
        return torch.as_tensor(scipy.stats.dirichlet_multinomial.logpmf(x.numpy(), self.concentration, 12))


class ThreeKinds(nn.Module):
    """kind ~ Categorical(0.5, 0.3, 0.2), x ~ N(kind, 0.8^2): a story with nothing but a discrete latent."""

    probs = (0.5, 0.3, 0.2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor(self.probs)))
            pyro.sample("x", dist.Normal(kind.to(x), 0.8), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("kind", dist.Categorical(logits=-((x[..., None] - torch.arange(3)) ** 2)))

    def log_evidence(self, x: Tensor) -> Tensor:
        """By enumeration."""
        density = sum(p * scipy.stats.norm.pdf(x, kind, 0.8) for kind, p in enumerate(self.probs))
        return torch.as_tensor(density).log()


class ShiftedNormal(nn.Module):
    """Of x given y: z ~ N(0, 1), x ~ N(z + y, 0.5^2); the guide is a little too wide."""

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("observations", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + y, 0.5), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("observations", len(y)):
            pyro.sample("z", dist.Normal((x - y) / 1.25, 0.6))

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        """log N(x; y, 1.25)."""
        return torch.as_tensor(scipy.stats.norm.logpdf(x, y, 1.25**0.5))


class SquaredNormal(nn.Module):
    """z ~ N(0, 1), x ~ N(z^2, 0.3^2): the posterior has two modes, and the guide knows of one."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(x.clamp(min=0.1).sqrt(), 0.3 / x.clamp(min=0.1).sqrt()))


def two_clusters_log_evidence(story: TwoClusters, x: Tensor) -> Tensor:
    """The log density of a mixture of normals."""
    component = torch.distributions.Normal(story.loc, 1.25**0.5)
    return (component.log_prob(x[:, None]) + story.logits.log_softmax(0)).logsumexp(1).detach()


def two_latents_log_evidence(story: TwoLatents, x: Tensor) -> Tensor:
    """Given the size x is normal: one integral, over the log of the size, is left to a grid."""
    log_size = torch.linspace(-5, 5, 4001)
    weight, bias = story.loadings.weight.detach(), story.loadings.bias.detach()
    covariance = weight @ weight.T + torch.exp(2 * log_size)[:, None, None] * torch.eye(5)
    given_size = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x[:, None])
    prior = torch.distributions.Normal(0.0, 0.5).log_prob(log_size)
    return (given_size + prior).logsumexp(1) + math.log(10 / 4000)


# name -> (makes a story whose evidence is known, its columns, log p of them)
ORACLES: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "hierarchical": (
        HierarchicalNormal,
        lambda: (torch.linspace(-2, 3, 24).reshape(8, 3),),
        HierarchicalNormal.log_evidence,
    ),
    "gamma": (GammaPoisson, lambda: (torch.arange(8.0),), GammaPoisson.log_evidence),
    "log-normal": (TwoLatents, lambda: (rows(8),), two_latents_log_evidence),
    "dirichlet": (
        DirichletMultinomial,
        lambda: (torch.tensor([[2.0, 2, 8], [1, 3, 8], [6, 5, 1], [4, 4, 4]]),),
        DirichletMultinomial.log_evidence,
    ),
    "discrete": (ThreeKinds, lambda: (torch.linspace(-2, 4, 8),), ThreeKinds.log_evidence),
    "summed out": (TwoClusters, lambda: (torch.linspace(-2, 3, 8),), two_clusters_log_evidence),
    "discrete in guide": (ClustersInGuide, lambda: (torch.linspace(-2, 3, 8),), two_clusters_log_evidence),
    "conditional": (
        ShiftedNormal,
        lambda: (torch.linspace(-2, 3, 8), torch.arange(8.0) % 3),
        ShiftedNormal.log_evidence,
    ),
}
