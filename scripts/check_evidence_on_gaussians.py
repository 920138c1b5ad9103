"""Every estimator of log p(x) against the closed form of linear-Gaussian stories: are verdicts and intervals honest?

    python scripts/check_evidence_on_gaussians.py --rows 192

The guide is the exact posterior with its standard deviations multiplied by a width. Printed for every method, dimension
and width: the share of observations with each verdict; the share of 95 % intervals (estimate plus or minus 1.96
standard errors) that contain the truth, where the verdict is good and where it is fair; the mean error in nats; and the
mean of p-hat / p where the verdict is good, which is 1 for an estimator whose verdict does not depend on its own draws.
"""

import argparse
import time
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae import VAE, likelihoods, log_evidence, priors
from ppl_vae.evidence.estimators import MethodName

FROM_MODES = ("laplace", "annealed")  # the guide only helps to find the modes: one width is enough
COLUMNS = (
    *("method", "dim", "width", "exact", "good", "fair", "poor"),
    *("coverage of good", "of fair", "mean error", "mean p-hat/p, good"),
)


class WidenedPosterior(nn.Module):
    """The posterior of a linear-Gaussian story, its standard deviations multiplied by a width."""

    def __init__(self, decoder: likelihoods.Normal, linear: nn.Linear, width: float) -> None:
        super().__init__()
        self.decoder, self.linear, self.width = decoder, linear, width

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        weight, scale = self.linear.weight, self.decoder.scale()
        precision = weight.T @ weight / scale**2 + torch.eye(weight.shape[1])
        loc = torch.linalg.solve(precision, ((x - self.linear.bias) / scale**2 @ weight).T).T
        return dist.MultivariateNormal(loc, precision_matrix=precision / self.width**2)


def linear_gaussian(dim: int, width: float, num_features: int = 20) -> VAE:
    """z ~ N(0, I), x ~ N(W z + b, 0.25 I), with the same random W and b for all widths."""
    torch.manual_seed(dim)
    linear = nn.Linear(dim, num_features)
    nn.init.normal_(linear.weight)
    decoder = likelihoods.Normal(linear, scale=0.5)
    return VAE(priors.StandardNormal(dim), decoder, WidenedPosterior(decoder, linear, width))


def closed_form(story: VAE, x: Tensor) -> np.ndarray:
    """log N(x; b, W W' + 0.25 I)."""
    linear = story.get_submodule("encoder.linear")
    weight, bias = (parameter.detach() for parameter in linear.parameters())
    covariance = weight @ weight.T + 0.25 * torch.eye(len(bias))
    return torch.distributions.MultivariateNormal(bias, covariance).log_prob(x).numpy()


@dataclass(frozen=True)
class Scores:
    """Verdicts, errors and standard errors of some observations, shape (N,)."""

    verdict: np.ndarray
    error: np.ndarray
    standard_error: np.ndarray

    def share(self, verdict: str) -> str:
        return f"{np.mean(self.verdict == verdict):.0%}"

    def coverage(self, verdict: str) -> str:
        """The share of intervals that contain the truth, and of how many."""
        chosen = self.verdict == verdict
        covered = abs(self.error[chosen]) < 1.96 * self.standard_error[chosen]
        return f"{covered.mean():.1%} of {chosen.sum()}" if chosen.any() else ""

    @property
    def ratio(self) -> str:
        """The mean of p-hat / p where the verdict is good, and its standard error."""
        ratios = np.exp(self.error[self.verdict == "good"])
        return f"{ratios.mean():.4f} ± {ratios.std(ddof=1) / len(ratios) ** 0.5:.4f}" if len(ratios) > 1 else ""

    def line(self, *labels: object) -> str:
        shares = [self.share(verdict) for verdict in ("exact", "good", "fair", "poor")]
        coverages = [self.coverage(verdict) for verdict in ("good", "fair")]
        return row(*labels, *shares, *coverages, f"{self.error.mean():+.4f}", self.ratio)


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def score(method: MethodName, dim: int, width: float, rows: int, seed: int) -> Scores:
    """Observations simulated from the story, judged by one method."""
    story = linear_gaussian(dim, width)
    torch.manual_seed(seed)
    x = story.model(num_observations=rows).detach()
    evidence = log_evidence(story, x, method=method, seed=seed, progress=False)
    error = evidence["estimate"].values - closed_form(story, x)
    return Scores(evidence["verdict"].values, error, evidence["standard_error"].values)


def together(scores: list[Scores]) -> Scores:
    """All observations of several runs."""
    return Scores(*(np.concatenate(parts) for parts in zip(*(vars(s).values() for s in scores), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192, help="observations for each line of the table")
    parser.add_argument("--dims", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--widths", type=float, nargs="+", default=[0.7, 1.0, 1.2, 1.5])
    methods = ["importance", "laplace", "mixture", "annealed", "auto"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=get_args(MethodName))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_default_dtype(torch.float64)
    started = time.perf_counter()
    print(row(*COLUMNS) + "\n" + row(*["---"] * len(COLUMNS)))
    for method in options.methods:
        scores = []
        for dim in options.dims:
            for width in options.widths[:1] if method in FROM_MODES else options.widths:
                scores.append(score(method, dim, width, options.rows, options.seed + len(scores)))
                print(scores[-1].line(method, dim, width), flush=True)
        print(together(scores).line(f"**{method}**", "all", "all"), flush=True)
    print(f"\n{options.rows} observations a line, {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
