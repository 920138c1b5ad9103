"""Stories that several tests tell: one with a closed form, and one as a user would write it."""

from functools import partial

import pyro
import pyro.distributions as dist
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
