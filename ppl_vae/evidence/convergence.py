"""How an estimate of log p(x) settles: the same draws, looked at while they arrive."""

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_vae import checks, noise, traces
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.proposals import PARTICLES_PER_UNIT, Block, blocks
from ppl_vae.evidence.sampling import METHODS, Method, running_sums
from ppl_vae.traces import Story


def convergence(
    story: Story,
    *columns: Tensor,
    method: str | Method = "importance",
    num_particles: int = 8192,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Estimates of log p(x) against the number of particles behind them; draw it with ``plots.convergence``.

    A bound that rises with every doubling has not arrived, whatever its error says: that is how the estimates of a
    guide that misses part of the posterior look.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: as for :func:`ppl_vae.log_evidence`.
        method: ``"importance"``, ``"mixture"``, ``"laplace"``, ``"annealed"``, ``"prior"`` or ``"pyro"``, or one of
            these configured.
        num_particles: the largest number. Estimates are taken at 128, 256, 512 and so on, and at this number.
        seed: the noise is a function of it.
        device: where to compute; None is where the story is.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A dataset with ``estimate`` and ``standard_error`` over (num_particles, observation), and over num_particles
        ``mean`` and ``monte_carlo_error`` of all observations; nats.

    Raises:
        ValueError: when the method is unknown, or does not apply to the story.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
    checks.check_at_least(1, num_particles=num_particles)
    chosen = METHODS[method] if isinstance(method, str) else method
    if device is not None:
        story.to(traces.device_named(device))
    checks.dry_run(story, *columns)
    with traces.scoring(story):
        joint = joint_of(story, columns)
        parts = [_settling(block, chosen, num_particles) for block in blocks(joint, columns, seed, progress)]
    table = xr.concat(parts, dim="observation").assign_coords(observation=np.arange(len(columns[0])))
    error = (table["standard_error"] ** 2).sum("observation", skipna=False) ** 0.5 / len(columns[0])
    overall = {"mean": table["estimate"].mean("observation"), "monte_carlo_error": error}
    return table.assign(overall).assign_attrs(unit="nats", method=chosen.name, seed=seed)


def _settling(block: Block, method: Method, num_particles: int) -> xr.Dataset:
    """The estimates of a block whenever the number of particles has doubled."""
    looks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for sums in running_sums(block, method.prepare(block), num_particles, noise.Purpose.EVIDENCE):
        doubled = (sums.count // PARTICLES_PER_UNIT).bit_count() == 1 and sums.count % PARTICLES_PER_UNIT == 0
        if doubled or sums.count == num_particles:
            looks[sums.count] = sums.log_mean.numpy(), sums.relative_variance.sqrt().numpy()
    estimate, error = (np.stack(values) for values in zip(*looks.values(), strict=True))
    dims = ("num_particles", "observation")
    return xr.Dataset({"estimate": (dims, estimate), "standard_error": (dims, error)}, {"num_particles": list(looks)})
