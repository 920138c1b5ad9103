r"""Lower and upper bounds on log p(x) for observations that the story itself made, where an exact latent is known.

For simulated :math:`(x, z^*) \sim p(x, z)` the latent is an exact draw of the posterior, and that turns a lower bound
around: with :math:`z_1, \dots, z_K \sim q`,

.. math::

    E \log \frac1K \sum_k w(z_k) \;\le\; \log p(x) \;\le\; E \log \frac1{K+1} \Big[w(z^*) + \sum_k w(z_k)\Big].

Grosse, Ancha & Roy 2016, https://arxiv.org/abs/1606.02275 (bidirectional annealing); Burda, Grosse & Salakhutdinov
2015, https://arxiv.org/abs/1412.8566. Nothing is said about real observations: how wide the gap is for them is unknown.
"""

import inspect
import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from ppl_vae import checks, noise, traces
from ppl_vae.evidence import sharing
from ppl_vae.evidence.annealing import Annealed
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import Block, FromDensity, Importance, Laplace, Mixture, blocks
from ppl_vae.evidence.sampling import draw
from ppl_vae.traces import Columns, Story

BoundsMethod = Importance | Laplace | Mixture | Annealed
METHODS: dict[str, BoundsMethod] = {method.name: method for method in (Importance(), Laplace(), Mixture(), Annealed())}


@dataclass(frozen=True)
class EvidenceBounds:
    """Bounds in expectation on log p(x) of simulated observations, in nats.

    Attributes:
        dataset: ``lower`` and ``upper`` over ``observation``; a single observation may have them the wrong way round.
        columns: the simulated data and their conditions, as the story takes them.
    """

    dataset: xr.Dataset
    columns: Columns

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.dataset[name]

    @property
    def gap(self) -> tuple[float, float]:
        """Mean of upper minus lower bound, and its standard error, in nats."""
        return _mean_and_error((self.dataset["upper"] - self.dataset["lower"]).values)

    def __str__(self) -> str:
        rows = {name: _mean_and_error(self.dataset[name].values) for name in ("lower", "upper")} | {"gap": self.gap}
        about = self.dataset.attrs
        lines = [
            f"{about['method']}, {self.dataset.sizes['observation']} simulated observations, "
            f"{about['num_particles']} particles each"
        ]
        lines += [f"  {name:6} {mean:10.3f} +- {error:.3f} nats" for name, (mean, error) in rows.items()]
        return "\n".join([*lines, "  of observations that the story made; real ones may be harder"])


def evidence_bounds(
    story: Story,
    *columns: Tensor,
    num_observations: int = 100,
    method: str | BoundsMethod = "mixture",
    num_particles: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> EvidenceBounds:
    r"""Lower and upper bound, in expectation, on log p(x) of observations simulated from the story.

    The sandwich holds for simulated observations only. There it tells how far an estimator can be off: the truth lies
    in between, so the mean gap bounds its bias.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, whose latents are continuous or can be summed out.
        columns: what the model is called with, from which conditions are taken, the first row again after the last; the
            data among them are replaced by simulated ones. May be left out where the model names its arguments like the
            sites that score them and needs no condition.
        num_observations: how many are simulated, N.
        method: ``"importance"``, ``"laplace"``, ``"mixture"`` (importance sandwich) or ``"annealed"`` (bidirectional
            annealing), or one of these methods configured.
        num_particles: draws or chains for each observation; None is the method's default.
        seed: the observations and the noise are a function of it.
        device: where to compute; None is where the story is.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        An :class:`EvidenceBounds`.

    Raises:
        ValueError: when the method is unknown or does not apply, or the model does more with its data than score them.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> bounds = evidence_bounds(vae, num_observations=20, num_particles=100)
    >>> bounds["upper"].shape
    (20,)
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
    checks.check_at_least(1, num_observations=num_observations)
    chosen = METHODS[method] if isinstance(method, str) else method
    if num_particles is not None and num_particles < 1:
        raise ValueError(f"num_particles must be at least 1; found {num_particles}.")
    num_particles = num_particles or chosen.default_particles
    if device is not None:
        story.to(traces.device_named(device))
    simulated, latents = simulate(story, columns, num_observations, seed)
    checks.dry_run(story, *simulated)
    with traces.scoring(story):
        joint = joint_of(story, simulated)
        joint.require_space(chosen.name)
        assert joint.space is not None
        truth = joint.space.coordinates(latents)
        both = []
        for block in blocks(joint, simulated, seed, progress):
            own = truth[block.first : block.first + block.size]
            sandwich = _bidirectional if isinstance(chosen, Annealed) else _sandwich
            both.append(sandwich(block, chosen, own, num_particles))
    lower, upper = (torch.cat(parts).numpy() for parts in zip(*both, strict=True))
    attributes = {"unit": "nats", "method": chosen.name, "num_particles": num_particles, "seed": seed}
    variables = {"lower": ("observation", lower), "upper": ("observation", upper)}
    coordinates = {"observation": np.arange(num_observations)}
    return EvidenceBounds(xr.Dataset(variables, coordinates, attributes), simulated)


def simulate(story: Story, columns: Columns, num_observations: int, seed: int) -> tuple[Columns, dict[str, Tensor]]:
    """New data, with conditions from the columns, and the latents that made them, by site name."""
    checks.refuse_half_precision(story)
    if not columns:
        trace = traces.prior_predictive(story, num_observations, seed=seed)
        values = traces.draws(trace)
        names = [name for name, argument in inspect.signature(story.model).parameters.items() if _is_column(argument)]
        if not names or any(name not in values for name in names):
            raise ValueError(
                f"The model takes {names}, its sites are {list(values)}: pass the columns, as to log_evidence."
            )
        return tuple(values[name] for name in names), {name: v for name, v in values.items() if name not in names}
    checks.dry_run(story, *columns)
    with traces.scoring(story):
        scored = sharing.scored_columns(story, traces.to_story(story, columns))
        if not scored:
            raise ValueError("The model does more with its data than score them at sites; they cannot be simulated.")
        rows = tuple(column[torch.arange(num_observations) % len(column)] for column in columns)
        rows = traces.to_story(story, rows)
        with noise.unit(rows[0].device, seed, noise.Purpose.PREDICTIVE):
            values = traces.draws(poutine.trace(poutine.uncondition(story.model)).get_trace(*rows))
    data = {position: values[name] for name, position in scored.items()}
    simulated = tuple(data.get(position, row) for position, row in enumerate(rows))
    return simulated, {name: value for name, value in values.items() if name not in scored}


def _is_column(argument: inspect.Parameter) -> bool:
    return argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)


def _sandwich(block: Block, method: BoundsMethod, truth: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """Importance sampling below; the same draws and the exact latent above."""
    assert not isinstance(method, Annealed)
    proposal = FromDensity(block, method.density(block))
    sums = draw(block, proposal, num_particles, noise.Purpose.EVIDENCE)
    exact = proposal.log_weights_at(truth.unsqueeze(0))[0].double().cpu()
    return sums.log_mean, torch.logaddexp(exact, sums.log_sum) - math.log(num_particles + 1)


def _bidirectional(block: Block, method: BoundsMethod, truth: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """Chains to the posterior below; chains from the exact latent back to the proposal above."""
    assert isinstance(method, Annealed)
    annealing = method.prepare(block)
    sums = draw(block, annealing, num_particles, noise.Purpose.EVIDENCE)
    with block.noise(noise.Purpose.BACKWARD):
        backward = annealing.log_weights_backward(truth.expand(num_particles, -1, -1)).double().cpu()
    return sums.log_mean, math.log(num_particles) - (-backward).logsumexp(0)


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
