"""A reference posterior by Hamiltonian Monte Carlo, for all observations at once, and the guide held against it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import arviz as az
import numpy as np
import pyro.infer
import torch
import xarray as xr
from scipy.stats import wasserstein_distance
from torch import Tensor
from tqdm import tqdm

from ppl_vae import checks, noise, traces
from ppl_vae.evidence import hamiltonian
from ppl_vae.evidence.hamiltonian import Impulse
from ppl_vae.evidence.joint import Joint, LatentSpace, joint_of
from ppl_vae.evidence.laplace import laplace
from ppl_vae.evidence.proposals import OBSERVATIONS_PER_UNIT, PARTICLES_PER_UNIT, Block, blocks
from ppl_vae.traces import Columns, Story

RHAT, ESS = 1.01, 400  # what draws must reach to be a reference
CONVERGENCE = "rhat", "ess_bulk", "ess_tail"
CHAIN_ROWS_AT_ONCE = 8192  # chains times observations
MOVES_PER_UNIT = 32
TRAJECTORY = 1.5  # a quarter of a turn in whitened coordinates: where a trajectory ends says least of where it began
ACCEPTED = 0.8
# The warm-up's windows, as shares of it, and whether the scale is learned from their draws.
WINDOWS = (0.15, False), (0.25, True), (0.4, True), (0.2, False)
SHORTEST_WARMUP = 20
PRIOR_WEIGHT = 5  # draws per dimension that the old scale counts for beside the new ones
WIDENED = 2.0
GUIDE_POINTS = 64
DIVERGENT = 1000.0  # nats that a trajectory loses
STARTS, MOVES, GUIDE, NUTS = range(4)  # what a unit of noise is for


def reference_posterior(
    story: Story,
    *columns: Tensor,
    num_chains: int = 4,
    num_draws: int = 2000,
    num_warmup: int = 500,
    num_leapfrog: int = 4,
    thinning: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Draws of the posterior :math:`p(z \mid x_n)` of each observation by Hamiltonian Monte Carlo, batched.

    All chains of all observations move together, in unconstrained coordinates and with discrete latents summed out.
    Each observation has a step size and a scale of its own: the curvature at its best mode, then the covariance
    within the chains. Both are learned in the warm-up and frozen after it. Chains start apart: around the modes that
    were found, at a draw of the widened guide, at a draw of the prior, in turn.

    Neal 2011, MCMC using Hamiltonian dynamics, https://arxiv.org/abs/1206.1901; the step size by dual averaging,
    Hoffman & Gelman 2014, https://arxiv.org/abs/1111.4246; rank-normalised :math:`\hat R` and effective sample sizes,
    Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, https://arxiv.org/abs/1903.08008.

    The draws are held in memory, :math:`C D N K` numbers; 8,192 chains move at once.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation, N.
        num_chains: C, at least 2.
        num_draws: kept draws of each chain, D.
        num_warmup: moves of each chain before them, at least 20.
        num_leapfrog: gradients of a move. More of them let the steps be shorter: raise it where ``acceptance`` is low
            or chains diverge.
        thinning: moves for each draw that is kept.
        seed: the noise is a function of it and of the position of an observation.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset with the draws of each continuous latent by its name, over (chain, draw, observation) and its own
        dimensions (``z_dim_0``, ...), in its own space. Over (observation, coordinate) ``rhat``, ``ess_bulk`` and
        ``ess_tail``, computed by ArviZ; a coordinate is one number of one latent, such as ``z[0]``. Over (chain,
        observation) ``acceptance`` and ``divergences``, trajectories whose energy error exceeds 1,000 nats; over
        observation ``step_size``, in whitened coordinates, and ``converged``, 1 where every coordinate has
        :math:`\hat R < 1.01` and both effective sample sizes above 400.
        Attributes: ``share_rhat``, ``share_ess`` and ``share_converged`` (of observations), ``num_divergences`` and
        the settings. Chains that agree may all have missed a mode.

    Raises:
        ValueError: when a setting is out of range, a latent has no unconstrained coordinates, all are discrete, or
            the model's density has no gradient.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> reference = reference_posterior(vae, torch.ones(3, 5), num_draws=50, num_warmup=20)
    >>> reference["z"].dims, reference["z"].shape
    (('chain', 'draw', 'observation', 'z_dim_0'), (4, 50, 3, 2))
    """
    checks.check_at_least(2, num_chains=num_chains)
    checks.check_at_least(1, num_leapfrog=num_leapfrog, thinning=thinning)
    checks.check_at_least(4, num_draws=num_draws)
    checks.check_at_least(SHORTEST_WARMUP, num_warmup=num_warmup)
    checks.dry_run(story, *columns)
    settings = _Settings(num_chains, num_draws, num_warmup, num_leapfrog, thinning)
    with traces.scoring(story):
        joint = joint_of(story, columns)
        space = _moving_space(joint, columns)
        groups = list(_groups(joint, columns, num_chains, seed))
        hidden = None if progress is None else not progress
        with tqdm(total=len(groups) * settings.num_moves, desc="reference", unit="move", disable=hidden) as bar:
            parts = [_sample(group, settings, bar) for group in groups]
    whole = xr.concat([_own_space(space, part) for part in parts], dim="observation", coords="minimal")
    whole = whole.assign_coords(observation=np.arange(len(columns[0])))
    about = {"sampler": "batched Hamiltonian Monte Carlo", "seed": seed} | vars(settings)
    return with_convergence(whole).assign_attrs(about)


def with_convergence(draws: xr.Dataset) -> xr.Dataset:
    """Draws with what ArviZ says of their convergence: see :func:`reference_posterior`."""
    latents = draws[latent_names(draws)]
    _, labels = by_coordinate(latents.isel(chain=0, draw=0))
    measures = {
        "rhat": az.rhat(latents),
        "ess_bulk": az.ess(latents, method="bulk"),
        "ess_tail": az.ess(latents, method="tail"),
    }
    flat = {name: (("observation", "coordinate"), by_coordinate(values)[0]) for name, values in measures.items()}
    draws = draws.assign(flat).assign_coords(coordinate=labels)
    mixed = (draws["rhat"] < RHAT).all("coordinate")
    many = ((draws["ess_bulk"] > ESS) & (draws["ess_tail"] > ESS)).all("coordinate")
    shares = {"share_rhat": mixed, "share_ess": many, "share_converged": mixed & many}
    attributes = {name: float(share.mean()) for name, share in shares.items()}
    attributes |= {"num_divergences": int(draws["divergences"].sum())}
    return draws.assign(converged=(mixed & many).astype(int)).assign_attrs(attributes)


def latent_names(draws: xr.Dataset) -> list[str]:
    """The latents of a dataset of draws."""
    return [str(name) for name, values in draws.data_vars.items() if {"draw", "observation"} <= set(values.dims)]


def by_coordinate(latents: xr.Dataset) -> tuple[np.ndarray, list[str]]:
    """Latents side by side, their own dimensions flattened; and the name of each coordinate, such as ``z[0]``.

    The result has the dimensions in front of the latents' own, then the coordinates.
    """
    parts, labels = [], []
    for name, values in latents.data_vars.items():
        own = [dim for dim in values.dims if str(dim).startswith(f"{name}_dim_")]
        shape = tuple(values.sizes[dim] for dim in own)
        array = values.transpose(..., *own).values
        parts.append(array.reshape(*array.shape[: array.ndim - len(own)], -1))
        labels += [f"{name}[{','.join(map(str, place))}]" if place else str(name) for place in np.ndindex(shape)]
    return np.concatenate(parts, axis=-1), labels


# The sampler


@dataclass(frozen=True)
class _Settings:
    num_chains: int
    num_draws: int
    num_warmup: int
    num_leapfrog: int
    thinning: int

    @property
    def num_moves(self) -> int:
        return self.num_warmup + self.num_draws * self.thinning


@dataclass(frozen=True)
class _Point:
    """Where the chains are, shape (C, N, K), with log p(x, u) and its gradient there."""

    u: Tensor
    log_joint: Tensor
    joint_slope: Tensor


@dataclass(frozen=True)
class _Group:
    """Blocks of observations whose chains move together; their posterior is the target."""

    parts: tuple[Block, ...]
    columns: Columns

    def at(self, u: Tensor) -> _Point:
        _, log_joint, _, slope = self.parts[0].joint.with_gradients(self.columns, u.flatten(0, 1))
        return _Point(u, log_joint.reshape(u.shape[:2]), slope.reshape(u.shape))

    def log_prob(self, point: _Point) -> Tensor:
        return point.log_joint.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def slope(self, point: _Point) -> Tensor:
        return point.joint_slope.nan_to_num(0.0, 0.0, 0.0)

    def impulses(self, num_chains: int, start: int, stop: int) -> Iterator[Impulse]:
        """The chance of the moves from ``start`` on and before ``stop``, which begin and end a unit of noise or all."""
        for first in range(start, stop, MOVES_PER_UNIT):
            together = [self._unit(part, num_chains, first) for part in self.parts]
            unit = [torch.cat(tensors, dim=2) for tensors in zip(*(vars(i).values() for i in together), strict=True)]
            for one in zip(*unit, strict=True):
                if first < stop:
                    yield Impulse(*one)
                first += 1

    def _unit(self, part: Block, num_chains: int, first: int) -> Impulse:
        shape = MOVES_PER_UNIT, num_chains, part.size, part.joint.dim
        device, dtype = traces.device_and_dtype(part.joint.story)
        with part.noise(noise.Purpose.REFERENCE, MOVES, first):
            return Impulse.like(torch.empty(shape, device=device, dtype=dtype))


@dataclass(frozen=True)
class _Sampled:
    """What the chains of a group came to: points of shape (D, C, N, K), and counts of shape (C, N)."""

    u: Tensor
    acceptance: Tensor
    divergences: Tensor
    step_size: Tensor


def _groups(joint: Joint, columns: Columns, num_chains: int, seed: int) -> Iterator[_Group]:
    """As many blocks together as ``CHAIN_ROWS_AT_ONCE`` allows, one at least."""
    parts = list(blocks(joint, columns, seed, progress=False))
    at_once = max(1, CHAIN_ROWS_AT_ONCE // (num_chains * OBSERVATIONS_PER_UNIT))
    for first in range(0, len(parts), at_once):
        some = tuple(parts[first : first + at_once])
        yield _Group(some, tuple(torch.cat(pieces) for pieces in zip(*(part.columns for part in some), strict=True)))


def _sample(group: _Group, settings: _Settings, bar: tqdm) -> _Sampled:
    """Warm-up, then draws with everything that was learned frozen."""
    starts, scales = zip(*(_start(part, settings.num_chains) for part in group.parts), strict=True)
    point, whitening = group.at(torch.cat(starts, dim=1)), torch.cat(scales)
    point, whitening, step_size = _warmed_up(group, point, whitening, settings, bar)
    kept, acceptance, divergences = [], torch.zeros_like(point.log_joint), torch.zeros_like(point.log_joint)
    impulses = group.impulses(settings.num_chains, settings.num_warmup, settings.num_moves)
    for number, impulse in enumerate(impulses, start=1):
        moved = hamiltonian.move(group, point, impulse, whitening, step_size, settings.num_leapfrog)
        point = moved.point
        acceptance += moved.change.exp().clamp(max=1)
        divergences += moved.change < -DIVERGENT
        if number % settings.thinning == 0:
            kept.append(point.u)
        bar.update()
    return _Sampled(torch.stack(kept), acceptance / (settings.num_draws * settings.thinning), divergences, step_size)


def _start(part: Block, num_chains: int) -> tuple[Tensor, Tensor]:
    """Points that lie apart, shape (C, N, K), and the scale at the best mode, shape (N, K, K)."""
    joint, columns = part.joint, part.columns
    with part.noise(noise.Purpose.REFERENCE, STARTS):
        students, _ = laplace(joint, columns, math.inf)
        guide = joint.guide_points(columns, GUIDE_POINTS)
        prior = joint.prior_points(columns, num_chains)
        standard = torch.randn_like(prior)
    num_modes = (students.log_weights > -math.inf).sum(1)
    rows = torch.arange(part.size, device=prior.device)
    starts = []
    for chain in range(num_chains):
        mode = (chain // 3) % num_modes
        around = students.scale_tril[rows, mode] @ standard[chain].unsqueeze(-1)
        near_mode = students.loc[rows, mode] + WIDENED * around.squeeze(-1)
        middle = guide.mean(0)
        near_guide = middle + WIDENED * (guide[chain % GUIDE_POINTS] - middle)
        starts.append((near_mode, near_guide, prior[chain])[chain % 3])
    return torch.stack(starts), students.scale_tril[:, 0]


def _warmed_up(
    group: _Group, point: _Point, whitening: Tensor, settings: _Settings, bar: tqdm
) -> tuple[_Point, Tensor, Tensor]:
    """Where the chains are after the warm-up, and what they learned: scales and step sizes."""
    longest = TRAJECTORY / settings.num_leapfrog
    steps = StepSizes(torch.full_like(point.log_joint[0], longest / 2), longest)
    ends = [round(share * settings.num_warmup) for share in np.cumsum([share for share, _ in WINDOWS])]
    visited: list[Tensor] = []
    learns = {end: learns for end, (_, learns) in zip(ends, WINDOWS, strict=True)}
    for number, impulse in enumerate(group.impulses(settings.num_chains, 0, settings.num_warmup), start=1):
        moved = hamiltonian.move(group, point, impulse, whitening, steps.size, settings.num_leapfrog)
        point = moved.point
        steps.update(moved.change.exp().clamp(max=1).mean(0))
        visited.append(point.u)
        if number in learns:
            if learns[number]:
                whitening = _scale_within_chains(torch.stack(visited), whitening)
                steps = StepSizes(steps.average, longest)
            visited = []
        bar.update()
    return point, whitening, steps.average


@dataclass
class StepSizes:
    """Dual averaging of the step size of each observation (Hoffman & Gelman 2014, section 3.2).

    Attributes:
        size: the step sizes to try next, shape (N,).
        longest: the largest that is allowed.
    """

    size: Tensor
    longest: float
    count: int = 0
    lag: Tensor = field(init=False)
    log_average: Tensor = field(init=False)
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lag = torch.zeros_like(self.size)
        self.log_average = self.size.log()
        self.anchor = (10 * self.size).clamp(max=self.longest).log()

    def update(self, acceptance: Tensor) -> None:
        """Takes in how often the last trajectories were accepted, shape (N,)."""
        self.count += 1
        share = 1 / (self.count + 10)
        self.lag = (1 - share) * self.lag + share * (ACCEPTED - acceptance)
        log_size = (self.anchor - math.sqrt(self.count) / 0.05 * self.lag).clamp(max=math.log(self.longest))
        rate = self.count**-0.75
        self.log_average = rate * log_size + (1 - rate) * self.log_average
        self.size = log_size.exp()

    @property
    def average(self) -> Tensor:
        """What the step sizes settle on, shape (N,)."""
        return self.log_average.exp()


def _scale_within_chains(u: Tensor, whitening: Tensor) -> Tensor:
    """A factor of the covariance of points of shape (T, C, N, K) around the means of their chains, shape (N, K, K).

    Shrunk towards the scale that there is, which stays where the covariance has no factor.
    """
    shift = (u - u.mean(0)).double()
    covariance = torch.einsum("tcnk,tcnl->nkl", shift, shift) / (max(1, len(u) - 1) * u.shape[1])
    number = len(u) * u.shape[1]
    share = number / (number + PRIOR_WEIGHT * u.shape[-1])
    old = whitening.double()
    factor, failed = torch.linalg.cholesky_ex(share * covariance + (1 - share) * old @ old.mT)
    sound = (failed == 0) & factor.isfinite().all(-1).all(-1)
    return torch.where(sound[:, None, None], factor.to(whitening), whitening)


def _own_space(space: LatentSpace, part: _Sampled) -> xr.Dataset:
    """The draws of a group as latents in their own space."""
    num_draws, num_chains, num_observations, _ = part.u.shape
    chains = [space.latents(part.u[:, chain].flatten(0, 1))[0] for chain in range(num_chains)]
    variables: dict[str, Any] = {}
    for name in space.event_shapes:
        values = torch.stack([latents[name].unflatten(0, (num_draws, num_observations)) for latents in chains])
        variables[name] = _variable(name, values, "chain", "draw", "observation")
    per_chain = {"acceptance": part.acceptance, "divergences": part.divergences.int()}
    variables |= {name: (("chain", "observation"), values.cpu().numpy()) for name, values in per_chain.items()}
    variables |= {"step_size": ("observation", part.step_size.cpu().numpy())}
    return xr.Dataset(variables, {"chain": np.arange(num_chains), "draw": np.arange(num_draws)})


def _variable(name: str, values: Tensor, *dims: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Draws of a latent over these dimensions and its own."""
    own = (f"{name}_dim_{number}" for number in range(values.dim() - len(dims)))
    return (*dims, *own), values.cpu().numpy()


# Pyro's own sampler


def nuts(
    story: Story,
    *columns: Tensor,
    observation: int = 0,
    num_chains: int = 4,
    num_draws: int = 1000,
    num_warmup: int = 500,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    """Draws of the posterior of one observation by ``pyro.infer.NUTS``, a slow cross-check.

    Only the model is shared with :func:`reference_posterior`: unconstrained coordinates, gradients and adaptation are
    Pyro's own. Chains run one after the other, in this process.

    Hoffman & Gelman 2014, The no-U-turn sampler, https://arxiv.org/abs/1111.4246.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation.
        observation: the number of the one that is looked at.
        num_chains: C, at least 2.
        num_draws: draws of each chain, D.
        num_warmup: moves of each chain before them.
        seed: the noise is a function of it, the observation and the chain.
        progress: show Pyro's bars; None means no.

    Returns:
        A dataset like that of :func:`reference_posterior`, of one observation.

    Raises:
        ValueError: when there is no such observation, a setting is out of range, or the story has a discrete latent or
            no gradient.
    """
    checks.check_at_least(2, num_chains=num_chains)
    checks.check_at_least(1, num_warmup=num_warmup)
    checks.check_at_least(4, num_draws=num_draws)
    checks.dry_run(story, *columns)
    if not 0 <= observation < len(columns[0]):
        raise ValueError(f"observation must be between 0 and {len(columns[0]) - 1}; found {observation}.")
    with traces.scoring(story):
        joint = joint_of(story, columns)
        space = _moving_space(joint, columns)
        if joint.discrete and joint.discrete.values:
            raise ValueError("nuts does not sum out discrete latents in good time; reference_posterior does.")
        row = traces.to_story(story, tuple(column[observation : observation + 1] for column in columns))
        indices = [(NUTS, observation, chain) for chain in range(num_chains)]
        chains = []
        for index in indices:
            with noise.unit(row[0].device, seed, noise.Purpose.REFERENCE, *index):
                chains.append(_nuts_chain(story, row, space, num_draws, num_warmup, bool(progress)))
    whole = xr.concat(chains, dim="chain").assign_coords(chain=np.arange(num_chains), observation=[observation])
    whole = whole.assign(step_size=whole["step_size"].mean("chain"))
    about = {"sampler": "pyro.infer.NUTS", "seed": seed}
    about |= {"num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup}
    return with_convergence(whole).assign_attrs(about)


def _nuts_chain(
    story: Story, row: Columns, space: LatentSpace, num_draws: int, num_warmup: int, progress: bool
) -> xr.Dataset:
    kernel = pyro.infer.NUTS(story.model, jit_compile=False, max_plate_nesting=1)
    chain = pyro.infer.MCMC(kernel, num_draws, warmup_steps=num_warmup, disable_progbar=not progress)
    with torch.enable_grad():
        chain.run(*row)
    draws = chain.get_samples()
    said = chain.diagnostics()
    variables: dict[str, Any] = {
        name: _variable(name, draws[name], "draw", "observation") for name in space.event_shapes
    }
    variables |= {
        "acceptance": ("observation", [float(said["acceptance rate"]["chain 0"])]),
        "divergences": ("observation", [len(said["divergences"]["chain 0"])]),
        "step_size": ("observation", [float(kernel.step_size)]),
    }
    return xr.Dataset(variables, {"draw": np.arange(num_draws)})


# The guide against the reference


def guide_draws(
    story: Story, *columns: Tensor, num_draws: int = 2000, seed: int = 0, progress: bool | None = None
) -> xr.Dataset:
    """Draws of the guide q(z | x_n), in the form of a reference posterior without chains.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation, N.
        num_draws: S.
        seed: the noise is a function of it and of the position of an observation.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset with the draws of each continuous latent by its name, over (draw, observation) and its own dimensions.

    Raises:
        ValueError: when the number of draws is out of range, or no latent is continuous.
    """
    checks.check_at_least(2, num_draws=num_draws)
    checks.dry_run(story, *columns)
    with traces.scoring(story):
        joint = joint_of(story, columns)
        parts = [_of_guide(part, num_draws) for part in blocks(joint, columns, seed, progress)]
    return xr.concat(parts, dim="observation").assign_attrs(num_draws=num_draws, seed=seed)


def _of_guide(part: Block, num_draws: int) -> xr.Dataset:
    """Draws of the guide for a block."""
    space = _space(part.joint)
    units: list[dict[str, Tensor]] = []
    for number, first in enumerate(range(0, num_draws, PARTICLES_PER_UNIT)):
        with part.noise(noise.Purpose.REFERENCE, GUIDE, number):
            units.append(part.joint.guide_latents(part.columns, min(PARTICLES_PER_UNIT, num_draws - first))[0])
    variables = {}
    for name in space.event_shapes:
        values = torch.cat([unit[name].unflatten(0, (-1, part.size)) for unit in units])
        variables[name] = _variable(name, values, "draw", "observation")
    return xr.Dataset(variables, {"draw": np.arange(num_draws), "observation": part.numbers})


def against_guide(
    reference: xr.Dataset,
    story: Story,
    *columns: Tensor,
    num_draws: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""The guide's marginals against those of the reference posterior, by observation and coordinate.

    With means :math:`\mu_q, \mu_p` and standard deviations :math:`\sigma_q, \sigma_p` of a coordinate's draws,

    .. math:: \frac{\mu_q - \mu_p}{\sigma_p}, \qquad \frac{\sigma_q}{\sigma_p}, \qquad
              \frac{1}{\sigma_p} \int_0^1 |F_q^{-1}(t) - F_p^{-1}(t)|\, dt,

    the last the Wasserstein distance of order 1. A coordinate is measured in its latent's own space.

    Args:
        reference: of :func:`reference_posterior` or :func:`nuts`.
        story: whose guide is looked at.
        columns: those that the reference was made from.
        num_draws: draws of the guide for each observation.
        seed: the noise is a function of it and of the position of an observation.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset with ``mean_shift``, ``sd_ratio`` and ``wasserstein`` over (observation, coordinate), in posterior
        standard deviations. ``mean_shift_error`` and ``sd_ratio_error`` are Monte Carlo standard errors, of normal
        draws; ``wasserstein_floor`` is the distance between the first and the second half of the reference's chains,
        the size that noise alone has. ``trusted`` over observation is 0 where the reference has not converged: there
        the rest says nothing of the guide. Its ``rhat``, ``ess_bulk`` and ``ess_tail`` stand beside.
        Attributes, over trusted observations and NaN if there are none: ``median_absolute_mean_shift``,
        ``median_sd_ratio``, ``median_wasserstein``, ``largest_wasserstein`` and its
        ``largest_wasserstein_observation`` (-1 if there are none); ``share_trusted``; and of the reference
        ``sampler``, ``share_rhat``, ``share_ess`` and ``num_divergences``.

    Raises:
        ValueError: when the reference has other observations or latents than the columns and the story.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> reference = reference_posterior(vae, torch.ones(3, 5), num_draws=50, num_warmup=20)
    >>> against_guide(reference, vae, torch.ones(3, 5))["sd_ratio"].dims
    ('observation', 'coordinate')
    """
    numbers = reference["observation"].values
    if numbers.max() >= len(columns[0]):
        raise ValueError(f"The reference has observation {numbers.max()}; the columns have {len(columns[0])} rows.")
    names = latent_names(reference)
    some = tuple(column[torch.tensor(numbers, device=column.device)] for column in columns)
    guide = guide_draws(story, *some, num_draws=num_draws, seed=seed, progress=progress)
    if names != list(guide.data_vars):
        raise ValueError(f"The reference is of the latents {names}; the story has {list(guide.data_vars)}.")
    q, labels = by_coordinate(guide)
    p, _ = by_coordinate(reference[names].transpose("chain", "draw", "observation", ...))
    variables = _compared(p.astype(float), q.astype(float), reference["ess_bulk"].values)
    dims = "observation", "coordinate"
    table = xr.Dataset(
        {name: (dims, values) for name, values in variables.items()}, {"observation": numbers, "coordinate": labels}
    ).assign({"trusted": reference["converged"]} | {name: reference[name] for name in CONVERGENCE})
    about = {name: reference.attrs[name] for name in ("sampler", "share_rhat", "share_ess", "num_divergences")}
    about |= {"num_draws": num_draws, "seed": seed, "unit": "posterior standard deviations"}
    return table.assign_attrs(about | _of_trusted(table))


def _compared(p: np.ndarray, q: np.ndarray, ess: np.ndarray) -> dict[str, np.ndarray]:
    """Draws of the reference, shape (C, D, N, K), and of the guide, shape (S, N, K)."""
    pooled = p.reshape(-1, *p.shape[2:])
    sd = pooled.std(0, ddof=1)
    ratio = q.std(0, ddof=1) / sd
    halves = [half.reshape(-1, *p.shape[2:]) for half in np.array_split(p, 2)]
    return {
        "mean_shift": (q.mean(0) - pooled.mean(0)) / sd,
        "mean_shift_error": np.sqrt(ratio**2 / len(q) + 1 / ess),
        "sd_ratio": ratio,
        "sd_ratio_error": ratio * np.sqrt(0.5 / len(q) + 0.5 / ess),
        "wasserstein": _wasserstein(pooled, q) / sd,
        "wasserstein_floor": _wasserstein(*halves) / sd,
    }


def _wasserstein(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of each coordinate of each observation: from (D, N, K) and (S, N, K) to (N, K)."""
    places = np.ndindex(first.shape[1:])
    distances = [wasserstein_distance(first[:, *place], second[:, *place]) for place in places]
    return np.reshape(distances, first.shape[1:])


def _of_trusted(table: xr.Dataset) -> dict[str, float | int]:
    """What the attributes say of trusted observations."""
    trusted = table.isel(observation=table["trusted"].values == 1)
    attributes: dict[str, float | int] = {"share_trusted": float(table["trusted"].mean())}
    if not trusted.sizes["observation"]:
        names = "median_absolute_mean_shift", "median_sd_ratio", "median_wasserstein", "largest_wasserstein"
        return attributes | dict.fromkeys(names, math.nan) | {"largest_wasserstein_observation": -1}
    farthest = trusted["wasserstein"].max("coordinate").values
    return attributes | {
        "median_absolute_mean_shift": float(abs(trusted["mean_shift"]).median()),
        "median_sd_ratio": float(trusted["sd_ratio"].median()),
        "median_wasserstein": float(trusted["wasserstein"].median()),
        "largest_wasserstein": float(farthest.max()),
        "largest_wasserstein_observation": int(trusted["observation"].values[farthest.argmax()]),
    }


# What does not apply


def _space(joint: Joint) -> LatentSpace:
    """The continuous latents of a story."""
    if joint.space is None:
        raise ValueError(
            joint.why_no_space
            or "All latents of this story are discrete: their posterior is a finite sum, and there is nothing to draw."
        )
    return joint.space


def _moving_space(joint: Joint, columns: Columns) -> LatentSpace:
    """The continuous latents, where Hamiltonian Monte Carlo can move through them."""
    space = _space(joint)
    if not joint.can_move:
        raise ValueError(
            "Hamiltonian Monte Carlo sums out discrete latents, and this story's have infinitely or too many values."
        )
    if not joint.is_differentiable(traces.to_story(joint.story, tuple(column[:1] for column in columns))):
        raise ValueError("Hamiltonian Monte Carlo moves along gradients, and the model has parts without.")
    return space
