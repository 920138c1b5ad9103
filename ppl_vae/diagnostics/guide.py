"""How good the guide is as a proposal: k-hat, effective sample size and gap of its weights, per observation."""

import math

import numpy as np
import xarray as xr
from torch import Tensor

from ppl_vae import checks, noise, traces
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import Block, FromGuide, blocks
from ppl_vae.evidence.sampling import draw
from ppl_vae.evidence.weights import GOOD
from ppl_vae.traces import Story


def guide_quality(
    story: Story, *columns: Tensor, num_particles: int = 1000, seed: int = 0, progress: bool | None = None
) -> xr.Dataset:
    r"""How far the guide :math:`q(z \mid x_n)` is from the posterior, by its importance weights.

    With :math:`w_s = p(x_n, z_s) / q(z_s \mid x_n)` for draws of the guide, :math:`\hat k` is the shape of the tail of
    the weights: the variance of w is finite below 0.5, and averages of w can be trusted below
    :math:`\min(1 - 1 / \log_{10} S, 0.7)`. Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed importance
    sampling, https://arxiv.org/abs/1507.02646; as a judge of variational inference Yao, Vehtari, Simpson & Gelman 2018,
    https://arxiv.org/abs/1802.02538. An exact guide has constant weights: no tail, the best case.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation.
        num_particles: S, draws of the guide for each observation.
        seed: the noise is a function of it and of the position of an observation; the draws are those of
            ``log_evidence(..., method="importance")``.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset over ``observation``:

        ``pareto_k``: k-hat; minus infinity where the weights are constant, infinity where the tail is too short.
        ``ess``, ``relative_ess``: effective sample size :math:`(\sum w)^2 / \sum w^2`, and divided by S.
        ``elbo``, ``elbo_error``: mean log weight and its standard error, in nats.
        ``log_evidence``, ``log_evidence_error``: log of the mean weight and its standard error, in nats; too low where
        k-hat is large.
        ``gap``: log_evidence - elbo, in nats, an estimate of :math:`KL(q(z \mid x_n), p(z \mid x_n))`.
        ``verdict``: "exact" (constant weights), "good" (k-hat below 0.4), "fair" (below 0.7) or "poor", of these draws.

        Attributes: ``num_particles``, ``seed``, ``unit``, ``threshold`` (on k-hat, for S draws), ``good`` (0.4),
        ``share_above_threshold``, ``share_below_good``, ``num_exact``, ``median_pareto_k``, ``median_ess``,
        ``median_relative_ess``, ``mean_gap`` and its standard error over observations, ``mean_gap_error``.

    Raises:
        ValueError: when the story or the data are not what :func:`ppl_vae.check` expects, or a weight is NaN or
            infinite, naming the observations.

    >>> import torch
    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> quality = guide_quality(vae, torch.ones(10, 5), num_particles=100)
    >>> quality["pareto_k"].shape, quality.attrs["threshold"]
    ((10,), 0.5)
    """
    checks.check_at_least(2, num_particles=num_particles)
    checks.dry_run(story, *columns)
    with traces.scoring(story):
        joint = joint_of(story, columns)
        parts = [_quality(block, num_particles) for block in blocks(joint, columns, seed, progress, what="guide")]
    table = xr.concat(parts, dim="observation").assign_coords(observation=np.arange(len(columns[0])))
    return table.assign_attrs(_summary(table, num_particles), num_particles=num_particles, seed=seed, unit="nats")


def pareto_k_threshold(num_draws: int) -> float:
    r"""The k-hat above which S weights are too few, :math:`\min(1 - 1 / \log_{10} S, 0.7)`.

    Vehtari, Simpson, Gelman, Yao & Gabry 2024, https://arxiv.org/abs/1507.02646, section 3.2.3.

    >>> [round(pareto_k_threshold(num_draws), 2) for num_draws in (100, 1000, 10_000)]
    [0.5, 0.67, 0.7]
    """
    return min(1 - 1 / math.log10(num_draws), 0.7) if num_draws > 1 else -math.inf


def _quality(block: Block, num_particles: int) -> xr.Dataset:
    """The weights of a block."""
    sums = draw(block, FromGuide(block), num_particles, noise.Purpose.EVIDENCE)
    verdicts = sums.verdicts()
    if block.joint.guide_is_discrete:  # equal weights of a single value that was drawn prove nothing
        verdicts = ["good" if verdict == "exact" else verdict for verdict in verdicts]
    variables = {
        "pareto_k": sums.pareto_k,
        "ess": sums.ess,
        "relative_ess": sums.ess / num_particles,
        "elbo": sums.mean,
        "elbo_error": sums.standard_error_of_mean,
        "log_evidence": sums.log_mean,
        "log_evidence_error": sums.relative_variance.sqrt(),
        "gap": sums.log_mean - sums.mean,
    }
    columns = {name: ("observation", values.numpy()) for name, values in variables.items()}
    return xr.Dataset(columns | {"verdict": ("observation", np.array(verdicts, dtype=str))})


def _summary(table: xr.Dataset, num_particles: int) -> dict[str, float | int]:
    """What is said of all observations together."""
    threshold, pareto_k, gap = pareto_k_threshold(num_particles), table["pareto_k"].values, table["gap"].values
    return {
        "threshold": threshold,
        "good": GOOD,
        "share_above_threshold": float((pareto_k > threshold).mean()),
        "share_below_good": float((pareto_k < GOOD).mean()),
        "num_exact": int((table["verdict"] == "exact").sum()),
        "median_pareto_k": float(np.median(pareto_k)),
        "median_ess": float(table["ess"].median()),
        "median_relative_ess": float(table["relative_ess"].median()),
        "mean_gap": float(gap.mean()),
        "mean_gap_error": float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.nan,
    }
