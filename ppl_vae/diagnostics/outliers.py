"""Observations that the story finds odd: log p(x) too low, or too high, for something that the story made."""

import math
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import scipy.stats
import torch
import xarray as xr
from torch import Tensor

from ppl_vae import checks, discrete, noise, traces
from ppl_vae.evidence import sharing
from ppl_vae.evidence.bounds import simulate
from ppl_vae.evidence.estimators import MethodName, fingerprint, log_evidence
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import Block, blocks
from ppl_vae.evidence.result import TRUSTED, Evidence
from ppl_vae.traces import Columns, Story

TYPICAL, UNLIKELY, TOO_LIKELY = "typical", "unlikely", "too likely"

GUIDE_DRAWS = 32

# Beyond this share of the simulated, on either side, a generalized Pareto distribution stands for the tail.
TAIL_SHARE = 0.2
SMALLEST_TAIL = 20

# So many simulated observations with the same conditions make a distribution of their own.
SMALLEST_GROUP = 100

NO_PARTICLES = ("auto", "quadrature", "exact")

# A normal distribution's median absolute deviation is so many standard deviations.
NORMAL_QUARTILE = 0.6745

# Evaluations of log p(x, z) for each observation: enough for a mixture proposal, not for chains.
DEFAULT_BUDGET = 20_000


def outliers(
    story: Story,
    *columns: Tensor,
    evidence: Evidence | None = None,
    method: MethodName = "auto",
    num_particles: int | None = None,
    budget: int = DEFAULT_BUDGET,
    num_simulated: int = 500,
    false_discovery_rate: float = 0.05,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Ranks observations by log p(x), with its typicality; draw it with ``plots.outliers``.

    In many dimensions the observations that a story makes do not have the highest density: their :math:`\log p(x)`
    lies around minus the entropy, and an observation far above is as odd as one far below (Nalisnick et al. 2019,
    https://arxiv.org/abs/1906.02994; 2018, https://arxiv.org/abs/1810.09136). So :math:`\log p(x_n)` is held against
    that of M observations simulated from the story under the same conditions, all by one estimator. The two-sided
    p-value is :math:`2 \min(r, M + 2 - r) / (M + 1)` of the rank r among the simulated; in the outer fifth on either
    side a generalized Pareto distribution that is fitted to the simulated takes its place (Knijnenburg et al. 2009,
    https://doi.org/10.1093/bioinformatics/btp211), with a tail not lighter than exponential. Observations are flagged
    by the procedure of Benjamini & Hochberg (``scipy.stats.false_discovery_control``): of those that are flagged, in
    expectation at most ``false_discovery_rate`` are like what the story makes. That is so for ranks (Bates et al. 2023,
    https://arxiv.org/abs/2104.08279), and beyond them as far as the tail is right.

    Data may be odd as a whole, as images are whose story makes them with independent noise: most of them are then too
    likely, and ``ks_distance`` and ``mean_distance`` say so. ``peer_distance`` tells which stand out among themselves.

    An estimate that is not to be trusted is probably too low. ``doubtful`` says where, and an "unlikely" row that is
    doubtful may only be one whose posterior the estimator misses: give evidence by a better method to find out.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``, whose data can be simulated.
        columns: as for :func:`ppl_vae.log_evidence`.
        evidence: of these observations, if it is known already; the simulated are then estimated in the same way.
        method: an estimator of :func:`ppl_vae.log_evidence`, where no evidence is given.
        num_particles: draws for each observation, where no evidence is given; None is the method's default.
        budget: evaluations for each observation that "auto" may spend, where no evidence is given.
        num_simulated: observations that the story makes, M. The conditions are those of the first rows, in turn.
        false_discovery_rate: between 0 and 1.
        seed: the noise is a function of it.
        progress: show bars; None means when standard error is a terminal.

    Returns:
        A dataset over observation: ``log_p`` (nats) and its ``standard_error``, ``verdict`` and ``doubtful`` (1 or 0);
        ``rank`` (0 is the least likely); ``tail_probability`` (of a smaller log p, mid-rank among the simulated),
        ``p_value``, ``adjusted_p_value`` and ``kind`` ("typical", "unlikely" or "too likely"); ``distance`` (from the
        mean of the simulated log p, the typical value, in their standard deviations) and ``peer_distance`` (from the
        median of the observed, in their median absolute deviations times 1.48). ``reconstruction``
        :math:`E_q \log p(x \mid z)` and ``kl`` :math:`E_q \log q(z \mid x) / p(z)`, in nats and of 32 draws, tell
        oddities apart: an x that no latent makes from one whose latent is far out in the prior;
        ``reconstruction_distance`` and ``kl_distance`` are in standard deviations of the simulated. Over simulated:
        ``simulated_log_p``, ``simulated_doubtful``, ``simulated_reconstruction``, ``simulated_kl``.

        Attributes: ``num_observations``, ``num_simulated``, ``num_unlikely``, ``num_too_likely``, ``share_flagged``,
        ``num_flagged_doubtful``, ``num_simulated_doubtful``, ``false_discovery_rate``; ``typical_log_p`` (minus the
        entropy) with ``typical_error``, and ``typical_sd``, nats; ``mean_difference`` (observed minus simulated, nats),
        ``mean_distance`` (the same in sds), ``ks_distance`` with ``ks_p_value``; ``most_unlikely`` and ``most_likely``
        (up to 8 numbers each, the oddest first, flagged or not); ``compared_within`` ("conditions" where there are 100
        simulated observations or more for each of them, else "all"); ``method``, ``num_particles``, ``seed``.

    Raises:
        ValueError: when the data cannot be simulated (the model does more with them than score them), the evidence
            given is of other observations, or an argument is out of its range.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Normal(networks.mlp(2, 5), scale=1.0),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> x = torch.cat([torch.randn(20, 5), torch.full((1, 5), 30.0)])
    >>> found = outliers(vae, x, num_particles=50, num_simulated=200)
    >>> found["kind"].values[-1].item(), found.attrs["most_unlikely"][0]
    ('unlikely', 20)
    """
    if not 0 < false_discovery_rate < 1:
        raise ValueError(f"false_discovery_rate lies between 0 and 1; found {false_discovery_rate}.")
    checks.check_at_least(2 * SMALLEST_TAIL, num_simulated=num_simulated)
    checks.dry_run(story, *columns)
    if evidence is not None:
        _refuse_other_data(story, columns, evidence)
    simulated, _ = simulate(story, columns, num_simulated, seed)
    settings = _settings(evidence, method, num_particles, budget)
    if evidence is None:
        evidence = log_evidence(story, *columns, seed=seed, progress=progress, **settings)
    of_simulated = log_evidence(story, *simulated, seed=seed, progress=progress, **settings)
    scores = _scores(story, columns, evidence, seed, progress)
    simulated_scores = _scores(story, simulated, of_simulated, seed, progress)
    groups = _groups(story, columns, simulated)
    variables = scores | _oddness(scores, simulated_scores, groups, false_discovery_rate)
    variables |= {
        "standard_error": evidence["standard_error"].values,
        "verdict": evidence["verdict"].values.astype(str),
        "rank": scipy.stats.rankdata(scores["log_p"], method="ordinal") - 1,
        "peer_distance": _peer_distance(scores["log_p"]),
    }
    table = xr.Dataset(
        {name: ("observation", values) for name, values in variables.items()}
        | {f"simulated_{name}": ("simulated", values) for name, values in simulated_scores.items()},
        coords={"observation": np.arange(len(columns[0])), "simulated": np.arange(num_simulated)},
    )
    attributes = {
        "unit": "nats",
        "method": evidence.dataset.attrs["method"],
        "num_particles": int(evidence["num_particles"].max()),
        "false_discovery_rate": false_discovery_rate,
        "compared_within": "conditions" if len(groups) > 1 else "all",
        "seed": seed,
    }
    return table.assign_attrs(attributes | _summary(table))


def _refuse_other_data(story: Story, columns: Columns, evidence: Evidence) -> None:
    size = evidence.dataset.sizes["observation"]
    with traces.scoring(story):
        same = evidence.dataset.attrs.get("fingerprint") == fingerprint(story, columns)
    if size != len(columns[0]) or not same:
        raise ValueError(
            f"Expected evidence of these {len(columns[0])} observations; it is of {size}, or of other values. Leave "
            "out evidence to have it estimated."
        )


def _settings(evidence: Evidence | None, method: MethodName, num_particles: int | None, budget: int) -> dict[str, Any]:
    """How log p is estimated, as arguments of ``log_evidence``: as the evidence was, where there is one."""
    if evidence is None:
        return {"method": method, "num_particles": num_particles, "budget": budget}
    about = evidence.dataset.attrs
    if about["method"] not in get_args(MethodName):
        raise ValueError(f"log_evidence has no method {about['method']!r}; leave out evidence to have it estimated.")
    dtype = about.get("model_dtype", "")
    settings = {
        "method": about["method"],
        "correction": about.get("correction") or None,
        "model_dtype": getattr(torch, dtype) if dtype else None,
    }
    if not math.isnan(tolerance := about.get("tolerance", math.nan)):
        settings["tolerance"] = tolerance
    elif about["method"] not in NO_PARTICLES:
        settings["num_particles"] = int(evidence["num_particles"].max())
    return settings | ({"budget": about["budget"]} if about.get("budget") else {})


def _peer_distance(log_p: np.ndarray) -> np.ndarray:
    """From the median of the others, in standard deviations that outliers do not move."""
    spread = scipy.stats.median_abs_deviation(log_p, scale=NORMAL_QUARTILE)
    return (log_p - np.median(log_p)) / (spread if spread > 0 else math.nan)


def _scores(
    story: Story, columns: Columns, evidence: Evidence, seed: int, progress: bool | None
) -> dict[str, np.ndarray]:
    """What is known of each observation, shapes (N,)."""
    with traces.scoring(story):
        joint = joint_of(story, columns)
        terms = [_terms(block) for block in blocks(joint, columns, seed, progress, what="outliers")]
    reconstruction, kl = (torch.cat(parts).double().cpu().numpy() for parts in zip(*terms, strict=True))
    doubtful = (~evidence["verdict"].isin(TRUSTED).values).astype(int)
    return {
        "log_p": evidence["estimate"].values,
        "reconstruction": reconstruction,
        "kl": kl,
        "doubtful": doubtful,
    }


def _terms(block: Block) -> tuple[Tensor, Tensor]:
    """The two terms of the ELBO of each observation, shapes (N,), nats."""
    joint = block.joint
    with block.noise(noise.Purpose.PREDICTIVE):
        latents, log_q = joint.guide_latents(block.columns, GUIDE_DRAWS)
    names = tuple(latents)

    def densities(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        rows, values = tensors[: len(block.columns)], dict(zip(names, tensors[len(block.columns) :], strict=True))
        return discrete.log_densities(joint.model, rows, values, joint.marked)

    rows = traces.as_rows(block.columns, GUIDE_DRAWS)
    log_prior, log_joint = (
        log_p.reshape(log_q.shape) for log_p in joint.chunks.map(densities, *rows, *latents.values())
    )
    return (log_joint - log_prior).mean(0), (log_q - log_prior).mean(0)


# What is compared with what


@dataclass(frozen=True)
class _Group:
    """Numbers of observations, and of the simulated ones that they are compared with."""

    observed: np.ndarray
    simulated: np.ndarray


def _groups(story: Story, columns: Columns, simulated: Columns) -> list[_Group]:
    """Those with equal conditions, where there are enough of each; else all."""
    num_observed, num_simulated = len(columns[0]), len(simulated[0])
    everything = [_Group(np.arange(num_observed), np.arange(num_simulated))]
    both = tuple(torch.cat(pair) for pair in zip(traces.to_story(story, columns), simulated, strict=True))
    with traces.scoring(story):
        scored = sharing.scored_columns(story, traces.to_story(story, columns))
    if set(scored.values()) == set(range(len(columns))):
        return everything
    groups = []
    for rows in sharing.rows_with_equal_conditions(both, scored):
        numbers = rows.cpu().numpy()
        groups.append(_Group(numbers[numbers < num_observed], numbers[numbers >= num_observed] - num_observed))
        if len(groups[-1].observed) and len(groups[-1].simulated) < SMALLEST_GROUP:
            return everything
    return [group for group in groups if len(group.observed)]


def _oddness(
    observed: dict[str, np.ndarray], simulated: dict[str, np.ndarray], groups: list[_Group], rate: float
) -> dict[str, np.ndarray]:
    """How odd each observation is among the simulated ones of its group."""
    size = len(observed["log_p"])
    tail, p_value = np.empty(size), np.empty(size)
    distances = {name: np.empty(size) for name in ("log_p", "reconstruction", "kl")}
    for group in groups:
        own, others = observed["log_p"][group.observed], simulated["log_p"][group.simulated]
        tail[group.observed] = _mid_rank(own, others)
        p_value[group.observed] = two_sided_p_value(own, others)
        for name, distance in distances.items():
            reference = simulated[name][group.simulated]
            distance[group.observed] = (observed[name][group.observed] - reference.mean()) / reference.std(ddof=1)
    adjusted = scipy.stats.false_discovery_control(p_value)
    kind = np.where(adjusted > rate, TYPICAL, np.where(tail < 0.5, UNLIKELY, TOO_LIKELY))
    return {
        "tail_probability": tail,
        "p_value": p_value,
        "adjusted_p_value": adjusted,
        "kind": kind,
        "distance": distances["log_p"],
        "reconstruction_distance": distances["reconstruction"],
        "kl_distance": distances["kl"],
    }


def _mid_rank(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The share of smaller reference values, with half of the equal ones."""
    below, up_to = (np.searchsorted(np.sort(reference), values, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(reference))


def two_sided_p_value(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """p-values of "not larger and not smaller than draws of the reference", with fitted tails.

    Args:
        values: shape ``(N,)``; minus infinity is allowed.
        reference: draws of the distribution under the null hypothesis, shape ``(M,)``.

    Returns:
        Shape ``(N,)``.

    >>> reference = np.random.default_rng(0).normal(size=1000)
    >>> middle, tail = two_sided_p_value(np.array([0.0, -6.0]), reference)
    >>> bool(middle > 0.9), bool(tail < 2 / 1001)
    (True, True)
    """
    return np.minimum(1, 2 * np.minimum(_lower_tail(values, reference), _lower_tail(-values, -reference)))


def _lower_tail(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The probability of a value as small as this, from its rank or, among the smallest, from a fitted tail."""
    reference = np.sort(reference)
    rank = (1 + np.searchsorted(reference, values, side="right")) / (len(reference) + 1)
    in_tail = max(SMALLEST_TAIL, int(TAIL_SHARE * len(reference)))
    threshold = reference[in_tail]
    beyond = threshold - reference[:in_tail]
    if not beyond.max() > 0:
        return rank
    shape, _, scale = cast(tuple[float, ...], scipy.stats.genpareto.fit(beyond, floc=0))
    if shape < 0:  # it would end: nothing is impossible that was not seen
        shape, scale = 0.0, beyond.mean()
    fitted = in_tail / len(reference) * scipy.stats.genpareto.sf(threshold - values, shape, scale=scale)
    return np.where(values < threshold, fitted, rank)


# All together


def _summary(table: xr.Dataset) -> dict[str, Any]:
    observed, simulated = table["log_p"].values, table["simulated_log_p"].values
    kind, flagged = table["kind"].values, table["kind"].values != TYPICAL
    apart: Any = scipy.stats.ks_2samp(observed, simulated)
    order, sd = observed.argsort(kind="stable"), float(simulated.std(ddof=1))
    return {
        "num_observations": len(observed),
        "num_simulated": len(simulated),
        "num_unlikely": int((kind == UNLIKELY).sum()),
        "num_too_likely": int((kind == TOO_LIKELY).sum()),
        "share_flagged": float(flagged.mean()),
        "num_flagged_doubtful": int((flagged & (table["doubtful"].values == 1)).sum()),
        "num_simulated_doubtful": int(table["simulated_doubtful"].sum()),
        "typical_log_p": float(simulated.mean()),
        "typical_error": sd / math.sqrt(len(simulated)),
        "typical_sd": sd,
        "mean_difference": float(observed.mean() - simulated.mean()),
        "mean_distance": float((observed.mean() - simulated.mean()) / sd),
        "ks_distance": float(apart.statistic),
        "ks_p_value": float(apart.pvalue),
        "most_unlikely": order[:8].tolist(),
        "most_likely": order[::-1][:8].tolist(),
    }
