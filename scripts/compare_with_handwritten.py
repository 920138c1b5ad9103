"""The package against hand-written PyTorch: the same network, schedule and data, each judged by its own code.

    python scripts/compare_with_handwritten.py --data-root DIR --epochs 20 --seeds 3

Both sides train a 784-400-400-20 Bernoulli VAE on MNIST, binarized anew for every batch, and report the test ELBO and
log p(x) by importance sampling with the encoder. The hand-written side uses nothing of the package but the data.
"""

import argparse
import json
import math
import time
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ppl_vae import VAE, data, fit, likelihoods, log_evidence, posteriors, priors
from ppl_vae.networks import mlp

LATENT_DIM, HIDDEN, BATCH_SIZE, LEARNING_RATE = 20, 400, 128, 1e-3


class HandWritten(nn.Module):
    """A VAE without Pyro: an encoder, a decoder, and the ELBO written out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT_DIM)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT_DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784)
        )

    def log_weights(self, x: Tensor, num_particles: int = 1) -> Tensor:
        """log p(x, z) - log q(z | x), shape (particles, observations)."""
        loc, unconstrained = self.encoder(x).chunk(2, dim=-1)
        scale = softplus(unconstrained) + 1e-4
        noise = torch.randn(num_particles, *loc.shape)
        z = loc + scale * noise
        logits = self.decoder(z)
        log_likelihood = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        log_prior = -z.square().sum(-1) / 2
        log_q = -(noise.square() / 2 + scale.log()).sum(-1)
        return log_likelihood + log_prior - log_q


def train_by_hand(train: Tensor, epochs: int) -> HandWritten:
    story = HandWritten()
    optimizer = torch.optim.Adam(story.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(BATCH_SIZE):
            optimizer.zero_grad()
            (-story.log_weights(torch.bernoulli(train[rows])).mean()).backward()
            optimizer.step()
    return story


@torch.no_grad()
def judge_by_hand(story: HandWritten, test: Tensor, num_scored: int, num_particles: int) -> tuple[float, float]:
    elbo = torch.cat([story.log_weights(x, 10).mean(0) for x in test.split(100)])
    log_weights = [story.log_weights(x, num_particles) for x in test[:num_scored].split(10)]
    log_p = torch.cat([w.logsumexp(0) - math.log(num_particles) for w in log_weights])
    return elbo.mean().item(), log_p.mean().item()


def with_the_package(train: Tensor, test: Tensor, epochs: int, seed: int, num_scored: int, num_particles: int):
    story = VAE(
        prior=priors.StandardNormal(LATENT_DIM),
        decoder=likelihoods.Bernoulli(mlp(LATENT_DIM, HIDDEN, HIDDEN, (1, 28, 28))),
        encoder=posteriors.DiagonalNormal(mlp((1, 28, 28), HIDDEN, HIDDEN, 2 * LATENT_DIM)),
    )
    started = time.perf_counter()
    fit(story, train, epochs=epochs, batch_size=BATCH_SIZE, transform=torch.bernoulli, seed=seed)
    seconds = time.perf_counter() - started
    elbo = log_evidence(story, test, method="elbo", num_particles=10, seed=seed).summary().mean
    evidence = log_evidence(story, test[:num_scored], num_particles=num_particles, seed=seed).summary()
    return elbo, evidence.mean, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-scored", type=int, default=1000, help="test images whose log p(x) is estimated")
    parser.add_argument("--num-particles", type=int, default=500)
    options = parser.parse_args()

    digits = data.load(options.data, root=options.data_root, validation=1)
    train, test = digits.train.x, digits.test.x
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        ours = with_the_package(train, test, options.epochs, seed, options.num_scored, options.num_particles)
        started = time.perf_counter()
        story = train_by_hand(train.flatten(1), options.epochs)
        seconds = time.perf_counter() - started
        theirs = judge_by_hand(story, test.flatten(1), options.num_scored, options.num_particles)
        rows.append({"package": ours, "hand-written": (*theirs, seconds)})
        print(json.dumps({"seed": seed} | rows[-1]), flush=True)

    print(f"\n{len(train)} training images, {options.epochs} epochs, {options.seeds} seeds (mean, spread over seeds)")
    for side in ("package", "hand-written"):
        elbos, log_ps, seconds = zip(*(row[side] for row in rows), strict=True)
        spread = [stdev(values) if len(values) > 1 else math.nan for values in (elbos, log_ps)]
        print(
            f"{side:13} test ELBO {mean(elbos):8.3f} ({spread[0]:.3f})   log p(x) {mean(log_ps):8.3f} ({spread[1]:.3f})"
            f"   training {mean(seconds):6.1f} s"
        )


if __name__ == "__main__":
    main()
