"""Data made by a known story are explained best by its own family: paired, by more than three standard errors."""

import numpy as np
import pytest
import torch
from torch import nn

from ppl_vae import VAE, fit, likelihoods, log_evidence, posteriors, priors, stories
from ppl_vae.networks import mlp
from ppl_vae.noise import Purpose, unit

pytestmark = pytest.mark.slow

LATENT_DIM, FEATURES, TRAIN, TEST = 2, 4, 2000, 500


def story(decoder, prior=None):
    encoder = posteriors.FullNormal(mlp(FEATURES, 64, 64, posteriors.FullNormal.num_parameters(LATENT_DIM)))
    return VAE(prior or priors.StandardNormal(LATENT_DIM), decoder, encoder)


def linear(scale=1.0, shift=0.0, features=FEATURES):
    """A linear network of z with large weights, so that the latent matters."""
    layer = nn.Linear(LATENT_DIM, features)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(features, LATENT_DIM))
        layer.bias.fill_(shift)
    return layer


def made_by(teacher, *conditions):
    """Observations of a story that nobody trained."""
    with torch.no_grad(), unit(torch.device("cpu"), 1, Purpose.PREDICTIVE):
        x = teacher.model(None, *conditions) if conditions else teacher.model(num_observations=TRAIN + TEST)
    return x.float()


def evidence_of(student, *columns, epochs=50):
    """log p of the test rows, after training on the others; by quadrature, which no guide misleads."""
    train, test = zip(*(column.split([TRAIN, TEST]) for column in columns), strict=True)
    torch.manual_seed(0)
    fit(student, *train, epochs=epochs, batch_size=100, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3, fused=True))
    return log_evidence(student, *test, method="auto", num_particles=2000)["estimate"].values


def assert_best(true, *wrong):
    for other in wrong:
        difference = true - other
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        assert difference.mean() > 3 * error, (difference.mean(), error)


def test_a_mixture_prior_is_recovered():
    prior = priors.MixtureOfNormals(LATENT_DIM, 5)
    with torch.no_grad():
        angles = 2 * torch.pi * torch.arange(5) / 5
        prior.normals.loc.copy_(4 * torch.stack([angles.cos(), angles.sin()], 1))
    x = made_by(story(likelihoods.Normal(linear(), 0.5), prior))
    evidence = [
        evidence_of(story(likelihoods.Normal(nn.Linear(LATENT_DIM, FEATURES), likelihoods.learned(1.0)), prior), x)
        for prior in (priors.MixtureOfNormals(LATENT_DIM, 8), None, priors.Laplace(LATENT_DIM))
    ]
    assert_best(*evidence)


def test_a_scale_that_depends_on_z_is_recovered():
    x = made_by(story(likelihoods.Normal(linear(2.0), scale=linear(1.5, -1.0))))
    network = lambda: nn.Linear(LATENT_DIM, FEATURES)  # noqa: E731
    decoders = [
        likelihoods.Normal(network(), scale=network()),
        likelihoods.Normal(network(), scale=likelihoods.learned(torch.ones(FEATURES))),
        likelihoods.Laplace(network(), scale=likelihoods.learned(torch.ones(FEATURES))),
    ]
    assert_best(*(evidence_of(story(decoder), x, epochs=150) for decoder in decoders))


def test_a_negative_binomial_is_recovered():
    x = made_by(story(likelihoods.NegativeBinomial(linear(0.7, 2.0), dispersion=0.6)))
    network = lambda: nn.Linear(LATENT_DIM, FEATURES)  # noqa: E731
    decoders = [
        likelihoods.NegativeBinomial(network(), dispersion=likelihoods.learned(1.0)),
        likelihoods.Poisson(network()),
        likelihoods.ZeroInflatedPoisson(network(), gate=likelihoods.learned(0.2)),
    ]
    assert_best(*(evidence_of(story(decoder), x) for decoder in decoders))


def test_a_discretized_logistic_is_recovered():
    """The two wrong families give probabilities of the same 16 outcomes, numbered instead of scaled."""
    levels = 16
    x = made_by(story(likelihoods.DiscretizedLogistic(linear(0.2, 0.5), scale=0.03, levels=levels)))
    network = lambda: nn.Linear(LATENT_DIM, FEATURES)  # noqa: E731
    true = likelihoods.DiscretizedLogistic(network(), scale=likelihoods.learned(0.1), levels=levels)
    counts = (x * (levels - 1)).round()
    wrong = [
        likelihoods.Binomial(network(), total_count=levels - 1),
        likelihoods.NegativeBinomial(network(), dispersion=likelihoods.learned(0.5)),
    ]
    assert_best(evidence_of(story(true), x), *(evidence_of(story(decoder), counts) for decoder in wrong))


class WithoutLabels(VAE):
    """A VAE that is told the labels and does not look."""

    def model(self, x, y):
        return super().model(x)

    def guide(self, x, y):
        return super().guide(x)


def test_a_normal_for_each_class_is_recovered():
    prior = priors.PerClass(LATENT_DIM, 4)
    with torch.no_grad():
        prior.normals.loc.copy_(torch.tensor([[3.0, 0], [-3, 0], [0, 3], [0, -3]]))
    labels = torch.arange(TRAIN + TEST) % 4
    teacher = stories.PerClassVAE(prior, likelihoods.Normal(linear(), 0.5), nn.Identity())
    x = made_by(teacher, labels)

    def per_class():
        plain = story(likelihoods.Normal(nn.Linear(LATENT_DIM, FEATURES), likelihoods.learned(1.0)))
        return stories.PerClassVAE(priors.PerClass(LATENT_DIM, 4), plain.decoder, plain.encoder)

    ignorant = story(likelihoods.Normal(nn.Linear(LATENT_DIM, FEATURES), likelihoods.learned(1.0)))
    ignorant = WithoutLabels(ignorant.prior, ignorant.decoder, ignorant.encoder)
    shuffled = labels[torch.randperm(len(labels))]
    assert_best(
        evidence_of(per_class(), x, labels), evidence_of(ignorant, x, labels), evidence_of(per_class(), x, shuffled)
    )
