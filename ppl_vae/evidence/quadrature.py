r"""log p(x) by quadrature: the integral over one or two latent dimensions, on a grid that is refined where it matters.

All latents of an observation are taken together in unconstrained coordinates u (:mod:`ppl_vae.evidence.joint`). The
trapezoid rule on a smooth integrand that vanishes at the border converges faster than any power of the step (Trefethen
& Weideman 2014, https://doi.org/10.1137/130932132), so halving the step tells the error.

Observations with equal conditions share the decoded grid: log p(x_n | z_g) for all n and g is one matrix product for
the likelihoods that :func:`ppl_vae.evidence.sharing.cross_log_prob` knows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae import traces
from ppl_vae.discrete import tell
from ppl_vae.evidence import sharing
from ppl_vae.evidence.joint import Joint
from ppl_vae.traces import Columns, sample_sites

TOLERANCE = 2.5e-3  # nats
FIRST_STEP, HALVINGS = 0.1, 5
HALF_WIDTHS = (7.0, 14.0, 28.0)
RESOLVED = 2 * math.sqrt(math.pi)  # effective points per dimension on a normal whose standard deviation is the step
NEGLIGIBLE = (
    2.5e-4  # share of a cell that is not refined, in tolerances; together these move the sum by less than a tenth
)
POINTS_AT_ONCE, OBSERVATIONS_AT_ONCE = 4096, 1024


def quadrature(
    joint: Joint, columns: Columns, tolerance: float = TOLERANCE, progress: bool | None = None
) -> tuple[Tensor, Tensor]:
    """log p(x) of each observation and its error, in nats and float64, both of shape ``(N,)``.

    The error is how much the last halving of the step changed the estimate, or a quarter of what the one before did if
    that is more; infinite where the grid is too coarse or too small. Refinement stops where it is below ``tolerance``.

    Raises:
        ValueError: when the story has no continuous latent, or more than two latent dimensions.
    """
    estimate = torch.empty(len(columns[0]), dtype=torch.float64)
    error = torch.empty_like(estimate)
    scored = sharing.scored_columns(joint.story, columns)
    for members in groups(columns, scored):
        estimate[members], error[members] = of_group(joint, columns, scored, members, tolerance, progress)
    return estimate, error


def groups(columns: Columns, scored: dict[str, int]) -> list[Tensor]:
    """Row numbers of observations with equal conditions, a bounded number in each group."""
    together = sharing.rows_with_equal_conditions(columns, scored)
    return [members.cpu() for rows in together for members in rows.split(OBSERVATIONS_AT_ONCE)]


def of_group(
    joint: Joint, columns: Columns, scored: dict[str, int], members: Tensor, tolerance: float, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """What :func:`quadrature` gives for the observations of one group.

    Raises:
        ValueError: when the story has no continuous latent, or more than two latent dimensions.
    """
    refuse(joint)
    some = traces.to_story(joint.story, tuple(column[members] for column in columns))
    return _integrate(_SharedJoint(joint, some, scored, progress), tolerance)


def refuse(joint: Joint) -> None:
    """Raises ValueError for a story that quadrature cannot integrate."""
    joint.require_space("quadrature")
    if joint.dim > 2:
        raise ValueError(f"Quadrature is for one or two latent dimensions; this story has {joint.dim}.")


# The grid. Its points are whole multiples of the step, called cells.


def _integrate(joint: "_SharedJoint", tolerance: float) -> tuple[Tensor, Tensor]:
    """Halves the step until the estimate of every observation stands still."""
    dim, step, active = joint.joint.dim, FIRST_STEP, torch.arange(joint.num_observations)
    cells, sums, share, escaped = _first_grid(joint, active, tolerance)
    estimate = sums + dim * math.log(step)
    change, error = (torch.full_like(estimate, math.inf) for _ in range(2))
    for _ in range(HALVINGS):
        step, cells = step / 2, _halved(cells[share > math.log(NEGLIGIBLE * tolerance)])
        previous = estimate[active]
        sums, share, num_points = _scan(joint, active, cells * step, previous - dim * math.log(step))
        estimate[active] = sums + dim * math.log(step)
        # Two grids may agree by chance: they count where the step resolves the posterior, and where the halving
        # before already promised it (the error of a rule of second order falls to a quarter).
        promised, change[active] = change[active] / 4, (estimate[active] - previous).abs()
        resolved = num_points > RESOLVED**dim
        error[active] = torch.where(resolved, torch.maximum(change[active], promised), math.inf)
        active = active[error[active] >= tolerance]
        if not len(active):
            break
    if escaped:
        error[:] = math.inf
    return estimate, error


def _first_grid(joint: "_SharedJoint", active: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, bool]:
    """A coarse grid, widened while mass is left at its border: cells, sums, shares, and whether some is left still."""
    cells, sums, share, escaped = torch.empty(0), torch.empty(0), torch.empty(0), True
    for half_width in HALF_WIDTHS:
        last = round(half_width / FIRST_STEP)
        line = torch.arange(-last, last + 1)
        cells = torch.cartesian_prod(*[line] * joint.joint.dim).reshape(-1, joint.joint.dim)
        sums, _, _ = _scan(joint, active, cells * FIRST_STEP)
        _, share, _ = _scan(joint, active, cells * FIRST_STEP, sums)
        escaped = bool(share[(cells.abs() == last).any(1)].max() > math.log(NEGLIGIBLE * tolerance))
        if not escaped:
            break
    return cells, sums, share, escaped


def _halved(cells: Tensor) -> Tensor:
    """The cells of half the step that lie on these cells or beside them."""
    dim = cells.shape[1]
    around = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * dim).reshape(-1, dim)
    within = torch.cartesian_prod(*[torch.tensor([0, 1])] * dim).reshape(-1, dim)
    wider = (cells[:, None] + around).flatten(0, 1).unique(dim=0)
    return (2 * wider[:, None] + within).flatten(0, 1)


def _scan(
    joint: "_SharedJoint", active: Tensor, points: Tensor, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums p(x_n, u_g) over points.

    Returns the log of the sum, shape (N,); the log of each point's largest share of it, shape (G,), measured against
    ``expected``, the sums of another scan; and the effective number of points that share it, shape (N,).
    """
    sums = torch.full((len(active),), -math.inf, dtype=torch.float64)
    squares, shares = sums.clone(), []
    hidden = None if joint.progress is None else not joint.progress
    for some in tqdm(points.split(POINTS_AT_ONCE), desc="quadrature", unit="chunk", leave=False, disable=hidden):
        (log_p,) = joint.joint.chunks.map(lambda points: (joint.log_prob(points, active).T,), some)
        log_p = log_p.T.double().cpu()
        sums = torch.logaddexp(sums, log_p.logsumexp(1))
        squares = torch.logaddexp(squares, (2 * log_p).logsumexp(1))
        if expected is not None:
            shares.append((log_p - expected[:, None]).amax(0))
    return sums, torch.cat(shares) if shares else torch.empty(0), torch.exp(2 * sums - squares)


# The joint density


@dataclass(frozen=True)
class _SharedJoint:
    """log p(x_n, u_g) of observations that share their conditions."""

    joint: Joint
    columns: Columns
    scored: dict[str, int]
    progress: bool | None

    @property
    def num_observations(self) -> int:
        return len(self.columns[0])

    def log_prob(self, points: Tensor, active: Tensor) -> Tensor:
        """The log joint density of the active observations at points of shape (G, dim); shape (N, G)."""
        assert self.joint.space and self.joint.discrete
        latents, log_volume = self.joint.space.latents(points)
        assigned = self.joint.discrete
        log_p = torch.tensor(-math.inf).to(log_volume)
        for number in range(assigned.size):
            chosen = {
                name: values[number].expand(len(points), *values.shape[1:]) for name, values in assigned.values.items()
            }
            log_p = torch.logaddexp(log_p, self._log_prob(latents | chosen, active))
        return log_p + log_volume

    def _log_prob(self, latents: dict[str, Tensor], active: Tensor) -> Tensor:
        """log p(x_n, latents_g), shape (N, G)."""
        size = len(next(iter(latents.values())))
        first_row = tuple(column[:1].expand(size, *column.shape[1:]) for column in self.columns)
        trace = tell(self.joint.story.model, first_row, latents)
        sites = sample_sites(trace)
        not_shared = {name: site for name, site in sites.items() if name not in self.scored}
        log_p = traces.log_prob(trace, not_shared).unsqueeze(0)
        for name, position in self.scored.items():
            traces.refuse_scale(name, sites[name])
            x = self.columns[position][active.to(log_p.device)]
            log_p = log_p + sharing.cross_log_prob(sites[name]["fn"], x, 0)
        return log_p.expand(len(active), -1)
