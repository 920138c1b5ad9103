r"""The ELBO's distance from log p(x) in two: what the guide's family cannot express, and what amortization loses.

Cremer, Li & Duvenaud 2018, Inference suboptimality in variational autoencoders, https://arxiv.org/abs/1801.03558.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from ppl_vae import checks, noise, traces
from ppl_vae.evidence.estimators import fingerprint, log_evidence
from ppl_vae.evidence.joint import Joint, joint_of
from ppl_vae.evidence.proposals import OBSERVATIONS_PER_UNIT, PARTICLES_PER_UNIT, Block, blocks
from ppl_vae.evidence.result import Evidence, standard_error_of_mean
from ppl_vae.traces import Columns, Site, Story, sample_sites

PAIRS = 4  # of draws, one on either side, behind each gradient
RATE = 0.1  # of Adam at the first step, in the guide's standard deviations; it falls to 0 on a line
# Nats per standard deviation. Steps along smaller gradients are proportional to them, those along larger ones alike:
# near the best normals, where the curvature is about 1, Adam alone would go back and forth.
SMALL_GRADIENT = 0.2
JUDGING = 256  # draws on which start and end are compared
SETTLED = 0.01  # nats that a Newton step still promises
LAST = 1 / 3  # of the steps, from which the promise is taken
# What estimates log p(x) without leaning on the guide alone.
INDEPENDENT = ("exact", "quadrature", "laplace", "mixture", "annealed")
UNAVAILABLE = "The gaps are unavailable for this story"
STEPS, JUDGE, REPORT = range(3)  # what a unit of noise is for


def gaps(
    story: Story,
    *columns: Tensor,
    num_steps: int = 200,
    num_particles: int = 1000,
    evidence: Evidence | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Approximation gap and amortization gap of each observation, in nats.

    With :math:`\mathcal{L}[q] = E_q[\log p(x_n, z) - \log q(z)]`, the guide's own :math:`q_n`, and :math:`q_n^*` the
    best member of its family for this one observation,

    .. math:: \log p(x_n) - \mathcal{L}[q_n] = \underbrace{\log p(x_n) - \mathcal{L}[q_n^*]}_{\text{approximation}}
              + \underbrace{\mathcal{L}[q_n^*] - \mathcal{L}[q_n]}_{\text{amortization}}.

    A large approximation gap asks for a richer family (``posteriors.FullNormal``, ``posteriors.Flow``), a large
    amortization gap for a better encoder or longer training. The family must be normal: for each observation locations
    and scales of one's own, diagonal or full. Locations and scales follow the gradient of the ELBO through
    reparameterized draws (Roeder, Wu & Duvenaud 2017, https://arxiv.org/abs/1703.09194) by Adam, from the guide's own.
    Where other draws show the end two errors below the start, the start counts. Both ELBOs are then measured on fresh
    draws, the same for both.

    Cremer, Li & Duvenaud 2018, https://arxiv.org/abs/1801.03558.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation, N.
        num_steps: of the search for :math:`q_n^*`.
        num_particles: fresh draws behind each ELBO.
        evidence: of the same observations, if it is known already; None computes it with ``method="auto"``. Where it
            comes from draws of the guide or the prior alone, it is computed anew with ``method="mixture"``.
        seed: the noise is a function of it and of the position of an observation.
        progress: show bars; None means when standard error is a terminal.

    Returns:
        A dataset over observation, in nats: ``elbo``, ``best_elbo`` (of :math:`q_n^*`), ``log_evidence``,
        ``approximation_gap`` and ``amortization_gap``, each with its Monte Carlo standard error (``elbo_error``, ...);
        ``verdict`` of the evidence; ``converged``, 1 where a further Newton step promises less than 0.01 nats.
        Attributes: the mean of each quantity (``mean_elbo``, ...), its Monte Carlo error (``mean_elbo_error``) and its
        test sampling error (``mean_elbo_sampling_error``); ``share_converged``, ``share_trusted`` (verdicts "exact"
        and "good"), ``family`` and the settings.

    Raises:
        ValueError: when the guide's family is not normal, the model has no gradient, a setting is out of range, or the
            evidence is of other observations.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> of_ten = gaps(vae, torch.ones(10, 5), num_steps=20, num_particles=100)
    >>> of_ten["amortization_gap"].shape
    (10,)
    """
    for name, value, smallest in (("num_steps", num_steps, 2), ("num_particles", num_particles, 2)):
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}; found {value}.")
    checks.dry_run(story, *columns)
    hidden = None if progress is None else not progress
    with traces.scoring(story):
        joint = joint_of(story, columns)
        family = _refuse_other_families(joint, columns)
        parts = blocks(joint, columns, seed, progress=False)
        total = math.ceil(len(columns[0]) / OBSERVATIONS_PER_UNIT)
        bar = tqdm(parts, total=total, desc="gaps", unit="block", disable=hidden)
        of_blocks = [_elbos(part, num_steps, num_particles) for part in bar]
    elbos = {name: np.concatenate([part[name] for part in of_blocks]) for name in of_blocks[0]}
    known = _independent(evidence, story, columns, seed, progress)
    table = _table(elbos, known)
    about = {"unit": "nats", "family": family, "num_steps": num_steps, "num_particles": num_particles, "seed": seed}
    return table.assign_attrs(about | _means(table))


# The family


@dataclass(frozen=True)
class Normals:
    """A normal for each observation, in unconstrained coordinates.

    Attributes:
        loc: shape (N, K).
        scale_tril: lower triangular, shape (N, K, K).
        free: which entries of ``scale_tril`` the family lets differ from 0, shape (K, K).
    """

    loc: Tensor
    scale_tril: Tensor
    free: Tensor

    def points(self, standard: Tensor) -> Tensor:
        """Draws made of standard normal numbers of shape (S, N, K)."""
        return self.loc + torch.einsum("nkl,snl->snk", self.scale_tril, standard)

    def log_prob(self, standard: Tensor) -> Tensor:
        """Log density of the points made of these numbers, shape (S, N)."""
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -standard.square().sum(-1) / 2 - log_volume - standard.shape[-1] / 2 * math.log(2 * math.pi)

    def slope(self, standard: Tensor) -> Tensor:
        """Gradient of the log density at these points, shape (S, N, K)."""
        columns = standard.permute(1, 2, 0)
        return -torch.linalg.solve_triangular(self.scale_tril.mT, columns, upper=True).permute(2, 0, 1)

    def where(self, chosen: Tensor, other: "Normals") -> "Normals":
        """These where ``chosen``, of shape (N,), else the others."""
        loc = torch.where(chosen[:, None], self.loc, other.loc)
        return replace(self, loc=loc, scale_tril=torch.where(chosen[:, None, None], self.scale_tril, other.scale_tril))


def normals_of(joint: Joint, columns: Columns) -> Normals:
    """The guide of some observations, on the story's device.

    Raises:
        ValueError: when it is not normal with its own location and scale for each observation, and why.
    """
    space = joint.space
    if space is None or joint.guide_is_discrete:
        raise ValueError(f"{UNAVAILABLE}: they are of guides that draw continuous latents, and no others.")
    first, again = (sample_sites(poutine.trace(joint.story.guide).get_trace(*columns)) for _ in range(2))
    locs, scales = zip(*(_loc_and_scale(name, first[name]) for name in space.event_shapes), strict=True)
    for name, *found in zip(space.event_shapes, locs, scales, strict=True):
        if not all(map(torch.equal, found, _loc_and_scale(name, again[name]))):
            raise ValueError(
                f"{UNAVAILABLE}: the guide's normal at site {name!r} depends on what it drew at another site."
            )
    free = torch.block_diag(*(_free(first[name]) for name in space.event_shapes)).to(space.loc.device)
    scale_tril = torch.stack([torch.block_diag(*parts) for parts in zip(*scales, strict=True)])
    return Normals((torch.cat(locs, dim=1) - space.loc) / space.scale, scale_tril / space.scale[:, None], free)


def _base(site: Site) -> Any:
    base = site["fn"]
    while isinstance(base, dist.Independent):
        base = base.base_dist
    return base


def _loc_and_scale(name: str, site: Site) -> tuple[Tensor, Tensor]:
    """Of a normal site, shapes (N, K) and (N, K, K)."""
    base, size = _base(site), site["fn"].event_shape.numel()
    if isinstance(base, torch.distributions.Normal):
        loc, scale = (t.expand(site["value"].shape).reshape(-1, size) for t in (base.loc, base.scale))
        return loc, torch.diag_embed(scale)
    if isinstance(base, torch.distributions.MultivariateNormal) and base.event_shape == site["fn"].event_shape:
        loc = base.loc.expand(site["value"].shape)
        return loc, base.scale_tril.expand(*loc.shape, size)
    raise ValueError(
        f"{UNAVAILABLE}: the guide's site {name!r} is a {type(base).__name__}, and the best member of its family is "
        "searched for among normals only (posteriors.DiagonalNormal, posteriors.FullNormal, or your own)."
    )


def _free(site: Site) -> Tensor:
    """Which entries of a site's scale the family lets differ from 0, shape (K, K)."""
    size = site["fn"].event_shape.numel()
    full = isinstance(_base(site), torch.distributions.MultivariateNormal)
    return torch.ones(size, size).tril().bool() if full else torch.eye(size).bool()


def _refuse_other_families(joint: Joint, columns: Columns) -> str:
    """The name of the guide's family.

    Raises:
        ValueError: when the gaps are unavailable.
    """
    row = traces.to_story(joint.story, tuple(column[:1] for column in columns))
    with noise.unit(row[0].device, 0, noise.Purpose.CHECK):
        free = normals_of(joint, row).free
    if not joint.can_move:
        raise ValueError(f"{UNAVAILABLE}: the model's discrete latents have infinitely or too many values to sum over.")
    if not joint.is_differentiable(row):
        raise ValueError(f"{UNAVAILABLE}: the search follows gradients, and the model has parts without.")
    return "full normal" if int(free.sum()) > len(free) else "diagonal normal"


# The ELBOs of a block


def _elbos(part: Block, num_steps: int, num_particles: int) -> dict[str, np.ndarray]:
    """ELBOs of the guide and of the best normals, with their errors, and whether the search converged."""
    with part.noise(noise.Purpose.GAPS, STEPS):
        own = normals_of(part.joint, part.columns)
        end, promised = _climb(part, own, num_steps)
    with part.noise(noise.Purpose.GAPS, JUDGE):
        standard = torch.randn(JUDGING, *own.loc.shape).to(own.loc)
        gain, error = _mean_and_error(_log_weight(part, end, standard) - _log_weight(part, own, standard))
    best = end.where(torch.from_numpy(gain > -2 * error).to(own.loc.device), own)
    weights = _log_weights(part, (own, best), num_particles)
    elbo, best_elbo, gain = (_mean_and_error(w) for w in (*weights, weights[1] - weights[0]))
    return {
        "elbo": elbo[0],
        "elbo_error": elbo[1],
        "best_elbo": best_elbo[0],
        "best_elbo_error": best_elbo[1],
        "amortization_gap": gain[0],
        "amortization_gap_error": gain[1],
        "converged": (promised < SETTLED).int().cpu().numpy(),
    }


def _climb(part: Block, start: Normals, num_steps: int) -> tuple[Normals, Tensor]:
    """Where Adam leads from the guide's own normals, and the nats that a Newton step promises there, shape (N,).

    Locations move in units of the present scale. The promise is a product of two mean gradients, of every other step
    near the end, so that noise adds nothing to it.
    """
    q, shift = start, torch.zeros_like(start.loc)
    log_size = start.scale_tril.diagonal(dim1=-2, dim2=-1).log()
    below = (start.scale_tril / log_size.exp().unsqueeze(-1)).tril(-1)
    parameters = [tensor.clone().requires_grad_() for tensor in (shift, log_size, below)]
    optimizer = torch.optim.Adam(parameters, RATE, eps=SMALL_GRADIENT)
    looked_at = 2 * math.ceil(num_steps * LAST / 2)
    gradients = torch.zeros(2, 2, *shift.shape).to(shift)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / num_steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            _loss(part, _moved(q, *parameters)).backward()
        if step >= num_steps - looked_at:
            by_loc, by_size = (parameter.grad for parameter in parameters[:2])
            assert by_loc is not None and by_size is not None
            gradients[step % 2] += torch.stack([by_loc, by_size]) / (looked_at / 2)
        optimizer.step()
        q = _moved(q, *(parameter.detach() for parameter in parameters))
        parameters[0].zero_()
    by_loc, by_size = gradients.prod(0).sum(-1)
    return q, by_loc / 2 + by_size / 4


def _moved(q: Normals, shift: Tensor, log_size: Tensor, below: Tensor) -> Normals:
    """Another scale, and locations shifted in units of what was the scale's diagonal."""
    unit = torch.eye(shift.shape[-1]).to(shift) + below.tril(-1) * q.free
    loc = q.loc + q.scale_tril.diagonal(dim1=-2, dim2=-1) * shift
    return replace(q, loc=loc, scale_tril=log_size.exp().unsqueeze(-1) * unit)


def _loss(part: Block, q: Normals) -> Tensor:
    """A number whose gradient is that of minus the ELBOs, without the part that has mean 0: the score of q."""
    standard = _pairs(PAIRS, q.loc)
    points = q.points(standard)
    pull = _pull(part, replace(q, scale_tril=q.scale_tril.detach()), points.detach(), standard)
    return -(pull * points).sum() / len(standard)


def _pull(part: Block, q: Normals, points: Tensor, standard: Tensor) -> Tensor:
    """The gradient of log p(x, u) - log q(u) at draws of q, shape (S, N, K): 0 everywhere if q is the posterior."""
    *_, slope = part.joint.with_gradients(part.columns, points.flatten(0, 1))
    return (slope.reshape(points.shape) - q.slope(standard)).nan_to_num(0.0, 0.0, 0.0)


def _pairs(number: int, like: Tensor) -> Tensor:
    """Standard normal numbers and their negatives, shape (2 * number, N, K)."""
    half = torch.randn(number, *like.shape).to(like)
    return torch.cat([half, -half])


def _log_weights(part: Block, guides: tuple[Normals, ...], num_particles: int) -> list[Tensor]:
    """log p(x, u) - log q(u) of fresh draws, made of the same noise for each guide; shapes (S, N), in float64."""
    units: list[list[Tensor]] = []
    for number, first in enumerate(range(0, num_particles, PARTICLES_PER_UNIT)):
        with part.noise(noise.Purpose.GAPS, REPORT, number):
            shape = min(PARTICLES_PER_UNIT, num_particles - first), *guides[0].loc.shape
            standard = torch.randn(shape).to(guides[0].loc)
        units.append([_log_weight(part, q, standard).double().cpu() for q in guides])
    return [torch.cat(weights) for weights in zip(*units, strict=True)]


def _log_weight(part: Block, q: Normals, standard: Tensor) -> Tensor:
    """log p(x, u) - log q(u) at the points made of standard normal numbers, shape (S, N)."""
    _, log_joint = part.joint.log_prob(part.columns, q.points(standard).flatten(0, 1))
    return log_joint.reshape(standard.shape[:2]) - q.log_prob(standard)


def _mean_and_error(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = values.double().cpu()
    return values.mean(0).numpy(), (values.std(0) / math.sqrt(len(values))).numpy()


# The evidence


def _independent(
    evidence: Evidence | None, story: Story, columns: Columns, seed: int, progress: bool | None
) -> xr.Dataset:
    """``estimate``, ``standard_error`` and ``verdict`` of each observation, none from the guide alone."""
    if evidence is None:
        evidence = log_evidence(story, *columns, seed=seed, progress=progress)
    else:
        _refuse_other_data(evidence, story, columns)
    known = evidence.dataset[["estimate", "standard_error", "verdict", "method"]].load().copy(deep=True)
    first_words = [str(method).split()[0] for method in known["method"].values]
    doubtful = ~np.isin(first_words, INDEPENDENT) & (known["verdict"].values != "exact")  # of constant weights
    if doubtful.any():
        rows = torch.from_numpy(doubtful.nonzero()[0])
        some = tuple(column[rows.to(column.device)] for column in columns)
        anew = log_evidence(story, *some, method="mixture", seed=seed, progress=progress)
        for name in known.data_vars:
            known[name] = ("observation", np.concatenate([known[name].values[~doubtful], anew[str(name)].values]))
        order = np.argsort(np.concatenate([(~doubtful).nonzero()[0], rows.numpy()]))
        known = known.isel(observation=order)
    return known


def _refuse_other_data(evidence: Evidence, story: Story, columns: Columns) -> None:
    if evidence.dataset.sizes["observation"] != len(columns[0]):
        raise ValueError(
            f"The evidence is of {evidence.dataset.sizes['observation']} observations; the columns have "
            f"{len(columns[0])} rows."
        )
    with traces.scoring(story):
        found = fingerprint(story, columns)
    if evidence.dataset.attrs.get("fingerprint", found) != found:
        raise ValueError("The evidence is of other data: its fingerprint is not that of the columns.")


# The table


def _table(elbos: dict[str, np.ndarray], known: xr.Dataset) -> xr.Dataset:
    estimate, error = known["estimate"].values, known["standard_error"].values
    columns = {
        **elbos,
        "log_evidence": estimate,
        "log_evidence_error": error,
        "approximation_gap": estimate - elbos["best_elbo"],
        "approximation_gap_error": np.hypot(error, elbos["best_elbo_error"]),
        "verdict": known["verdict"].values.astype(str),
    }
    variables = {name: ("observation", values) for name, values in columns.items()}
    return xr.Dataset(variables, {"observation": np.arange(len(estimate))})


def _means(table: xr.Dataset) -> dict[str, float]:
    """The mean of each quantity with its errors, and what the means are worth."""
    attributes = {}
    for name in ("elbo", "best_elbo", "log_evidence", "amortization_gap", "approximation_gap"):
        attributes[f"mean_{name}"] = float(table[name].mean())
        attributes[f"mean_{name}_error"] = float(np.linalg.norm(table[f"{name}_error"])) / table.sizes["observation"]
        attributes[f"mean_{name}_sampling_error"] = standard_error_of_mean(table[name].values)
    return attributes | {
        "share_converged": float(table["converged"].mean()),
        "share_trusted": float(table["verdict"].isin(["exact", "good"]).mean()),
    }
