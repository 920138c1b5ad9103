"""Posterior draws by this package and by Pyro's NUTS: milliseconds per effective draw.

    python scripts/benchmark_reference.py --rounds 5 --threads 1

Both sides draw from the posterior of the same story on the CPU, and take turns: a round is a call of each, with another
seed. What a call cost is divided by the effective draws that it brought: the bulk effective sample size (ArviZ) of the
observation's worst coordinate, summed over observations. Warm-up, tracing and the effective sample sizes
themselves are in the time. The ratio is to the first side in the same round (median, quartiles
over rounds).

- batched: ``ppl_vae.diagnostics.reference.reference_posterior``, all observations and four chains at once.
- NUTS: ``pyro.infer.NUTS`` as ``ppl_vae.diagnostics.reference.nuts`` calls it, two chains of one observation, the next
  one in each round.

"R-hat" is the largest of the last round, over observations and coordinates.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from benchmarking import in_turn, machine, print_table, summarize, write_json
from torch import Tensor, nn

from ppl_vae import VAE, likelihoods, networks, posteriors, priors
from ppl_vae.diagnostics.reference import nuts, reference_posterior


def linear_gaussian() -> VAE:
    """z ~ N(0, I) in three dimensions, x ~ N(W z + b, 0.5^2 I) in ten."""
    return VAE(
        prior=priors.StandardNormal(3),
        decoder=likelihoods.Normal(nn.Linear(3, 10), scale=0.5),
        encoder=posteriors.DiagonalNormal(networks.mlp(10, 6)),
    )


def bernoulli() -> VAE:
    """A VAE of 30 pixels with two latent dimensions."""
    return VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(networks.mlp(2, 16, 30)),
        encoder=posteriors.DiagonalNormal(networks.mlp(30, 16, 4)),
    )


STORIES: dict[str, Callable[[], VAE]] = {"linear-Gaussian": linear_gaussian, "Bernoulli": bernoulli}


@dataclass
class Side:
    """A sampler that is called with a new seed in each round, and what came of it."""

    sample: Callable[[int], xr.Dataset]
    effective: list[float] = field(default_factory=list)
    rhat: float = 0.0

    def __call__(self) -> None:
        draws = self.sample(len(self.effective))
        self.effective.append(float(draws["ess_bulk"].min("coordinate").sum()))
        self.rhat = float(draws["rhat"].max())


def sides_of(story: VAE, x: Tensor, num_draws: int, nuts_draws: int, warmup: int) -> dict[str, Side]:
    """Both sides, with the same warm-up."""

    def batched(seed: int) -> xr.Dataset:
        return reference_posterior(story, x, num_draws=num_draws, num_warmup=warmup, seed=seed, progress=False)

    def one_by_one(seed: int) -> xr.Dataset:
        return nuts(
            story, x, observation=seed % len(x), num_chains=2, num_draws=nuts_draws, num_warmup=warmup, seed=seed
        )

    return {"batched": Side(batched), "NUTS": Side(one_by_one)}


def compare(
    name: str, num_observations: int, num_draws: int, nuts_draws: int, warmup: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds per effective draw of each side, and the largest R-hat of its last round."""
    torch.manual_seed(0)
    story = STORIES[name]()
    x = story.model(num_observations=num_observations).detach()
    sides = sides_of(story, x, num_draws, nuts_draws, warmup)
    seconds = in_turn(sides, rounds)
    costs = {
        side: [1e3 * value / effective for value, effective in zip(values, sides[side].effective, strict=True)]
        for side, values in seconds.items()
    }
    return {
        side: {
            "cost": summary,
            "seconds": seconds[side],
            "effective_draws": sides[side].effective,
            "rhat": sides[side].rhat,
        }
        for side, summary in summarize(costs).items()
    }


def print_costs(name: str, sides: dict[str, dict[str, Any]]) -> None:
    def row(side: str, found: dict[str, Any]) -> list[str]:
        cost, (low, high) = found["cost"], found["cost"].quartiles
        spread = f"{min(cost.seconds):.4f} to {max(cost.seconds):.4f}"
        seconds, effective = (sum(found[key]) / len(found[key]) for key in ("seconds", "effective_draws"))
        numbers = f"{cost.median:.4f}", spread, f"{cost.ratio:.1f}", f"{low:.1f} to {high:.1f}"
        return [side, *numbers, f"{seconds:.1f}", f"{effective:.0f}", f"{found['rhat']:.3f}"]

    header = [name, "ms/effective draw", "range", "ratio", "quartiles", "s", "effective draws", "R-hat"]
    print_table(header, [row(*side) for side in sides.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", nargs="+", choices=STORIES, default=list(STORIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--observations", type=int, default=100)
    parser.add_argument("--draws", type=int, default=2000, help="of each chain and observation, batched")
    parser.add_argument("--nuts-draws", type=int, default=400, help="of each chain")
    parser.add_argument("--warmup", type=int, default=300, help="moves of each chain, on both sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    record: dict[str, Any] = machine("torch", "pyro-ppl", "arviz") | {"threads": options.threads}
    print(f"{options.observations} observations, {options.threads} threads\n")
    for name in options.stories:
        draws = options.draws, options.nuts_draws, options.warmup
        record[name] = compare(name, options.observations, *draws, options.rounds)
        print_costs(name, record[name])
        print()
        write_json(options.json, record)


if __name__ == "__main__":
    main()
