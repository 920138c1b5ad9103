r"""Laplace proposals: the modes of log p(x_n, u) over u, the curvature there, and heavy-tailed normals around them.

Tierney & Kadane 1986, Accurate approximations for posterior moments and marginal densities,
https://doi.org/10.1080/01621459.1986.10478240. A decoder made of linear pieces has a mode that says little about its
surroundings, so a proposal may be refined: gradient and curvature averaged over its own draws instead of taken at one
point, the fixed point of which is the closest normal in the sense of the ELBO (Opper & Archambeau 2009, The variational
Gaussian approximation revisited, https://doi.org/10.1162/neco.2008.08-07-592).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl_vae.evidence.joint import Joint
from ppl_vae.memory import is_out_of_memory
from ppl_vae.traces import Columns

GUIDE_STARTS = 64
# Draws of the prior, and how many places of the best ones the search starts from. In few dimensions a posterior often
# has modes that the guide does not know; in many, draws of the prior find none of them.
FEW_DIMENSIONS = 4
PRIOR_STARTS = {"few": (512, 6), "many": (128, 1)}
APART = 0.4  # prior standard deviations between two places
MAX_STEPS, USUAL_STEPS = 40, 10
GRADIENT = 2  # a gradient takes as long as two evaluations
SETTLED = 1e-2  # nats that a Newton step still promises
REFINING_PAIRS, REFINING_RATE, LONGEST_SHIFT = 4, 0.5, 0.5
FIRST_DAMPING = 1e-2
SMALLEST_PRECISION = 0.1  # in prior standard deviations: no proposal is wider than three of them
SAME_MODE = 1.0  # distance between modes, in their standard deviations, per square root of a dimension
NEGLIGIBLE_MODE = 8.0  # nats below the best one
WIDENED = 1.5


@dataclass(frozen=True)
class StudentMixture:
    r"""For each observation a mixture of multivariate Student-t, :math:`\sum_j a_j\, t_\nu(m_j, L_j L_j')`.

    Infinite degrees of freedom make them normal.

    Attributes:
        loc: shape (N, J, K).
        scale_tril: lower triangular, shape (N, J, K, K).
        log_weights: normalized, shape (N, J).
    """

    loc: Tensor
    scale_tril: Tensor
    log_weights: Tensor
    degrees_of_freedom: float

    def sample(self, num_particles: int) -> Tensor:
        """Draws, shape (S, N, K)."""
        size, _, dim = self.loc.shape
        component = torch.distributions.Categorical(logits=self.log_weights).sample((num_particles,))
        noise = torch.randn(num_particles, size, dim).to(self.loc)
        if math.isfinite(nu := self.degrees_of_freedom):
            chi_squared = torch.distributions.Chi2(torch.tensor(nu, dtype=self.loc.dtype)).sample((num_particles, size))
            noise = noise * (nu / chi_squared.to(self.loc)).sqrt().unsqueeze(-1)
        rows = torch.arange(size, device=self.loc.device)
        loc, scale_tril = self.loc[rows, component], self.scale_tril[rows, component]
        return loc + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density at points of shape (S, N, K); shape (S, N)."""
        dim, nu = u.shape[-1], self.degrees_of_freedom
        shift = u.unsqueeze(2) - self.loc
        standard = torch.einsum("njkl,snjl->snjk", self._inverse, shift)
        squares = standard.square().sum(-1)
        if math.isfinite(nu):
            constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi)
            log_p = constant - (nu + dim) / 2 * torch.log1p(squares / nu)
        else:
            log_p = -dim / 2 * math.log(2 * math.pi) - squares / 2
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (log_p - log_volume + self.log_weights).logsumexp(-1)

    def at(self, rows: Tensor) -> "StudentMixture":
        """The same for some of the observations."""
        return replace(self, loc=self.loc[rows], scale_tril=self.scale_tril[rows], log_weights=self.log_weights[rows])

    @property
    def _inverse(self) -> Tensor:
        unit = torch.eye(self.loc.shape[-1]).to(self.loc)
        return torch.linalg.solve_triangular(self.scale_tril, unit.expand_as(self.scale_tril), upper=False)


def laplace(
    joint: Joint, columns: Columns, degrees_of_freedom: float, refinements: int = 0
) -> tuple[StudentMixture, Tensor]:
    """A Student-t at every mode found of each observation's posterior, and where that failed, shape (N,).

    The search starts from the guide's middle, its best draw, and the best draws of the prior that lie apart. Where no
    mode with finite curvature is found, the guide's draws are matched by one Student-t, widened by half.
    """
    guide = joint.guide_points(columns, GUIDE_STARTS)
    widened = _matched(guide, degrees_of_freedom)
    starts = _starts(joint, columns, guide)
    size, num_starts, dim = starts.shape
    rows = tuple(column.repeat_interleave(num_starts, dim=0) for column in columns)
    try:
        loc, log_p, hessian = climb(joint, rows, starts.flatten(0, 1))
    except RuntimeError as error:  # torch has no derivative of something in the user's model
        if is_out_of_memory(error):
            raise
        return widened, torch.ones(size, dtype=torch.bool, device=guide.device)
    scale_tril, log_determinant = _scale_of(hessian)
    log_mass = log_p + log_determinant + dim / 2 * math.log(2 * math.pi)
    loc, scale_tril, log_mass = (t.unflatten(0, (size, num_starts)) for t in (loc, scale_tril, log_mass))
    log_weights = _weights(loc, scale_tril, log_mass)
    failed = ~(log_weights > -math.inf).any(1)
    loc[failed], scale_tril[failed], log_weights[failed] = widened.loc[failed], widened.scale_tril[failed], -math.inf
    log_weights[failed, 0] = 0.0
    students = _without_idle_components(StudentMixture(loc, scale_tril, log_weights, degrees_of_freedom))
    for _ in range(refinements):
        students = _refined(joint, columns, students)
    return students, failed


def cost_of_modes(dim: int, refinements: int) -> int:
    """About how many evaluations of log p(x, u) the search takes for an observation of K = ``dim`` coordinates."""
    hessian = 1 + GRADIENT * (dim + 1)
    draws, places = _prior_starts(dim)
    return GUIDE_STARTS + 2 * draws + ((2 + places) * USUAL_STEPS + 2 * REFINING_PAIRS * refinements) * hessian


def _prior_starts(dim: int) -> tuple[int, int]:
    """How many draws of the prior are looked at, and how many of them are climbed from."""
    return PRIOR_STARTS["few" if dim <= FEW_DIMENSIONS else "many"]


def _refined(joint: Joint, columns: Columns, students: StudentMixture) -> StudentMixture:
    """Every component moved towards the normal whose draws have no gradient and its precision as curvature, on average.

    Draws come in pairs, one on either side, so that a quadratic density leaves a fitting component where it is.
    """
    size, num_components, dim = students.loc.shape
    loc, scale = students.loc.flatten(0, 1), students.scale_tril.flatten(0, 1)
    standard = torch.randn(REFINING_PAIRS, len(loc), dim).to(loc)
    points = loc + torch.einsum("rkl,srl->srk", scale, torch.cat([standard, -standard]))
    rows = tuple(column.repeat_interleave(num_components, dim=0) for column in columns)
    _, slope, hessian = joint.with_hessian(rows, points.flatten(0, 1))
    slope, hessian = (t.unflatten(0, points.shape[:2]).mean(0) for t in (slope, hessian))
    precision = (1 - REFINING_RATE) * torch.cholesky_inverse(scale) - REFINING_RATE * hessian
    refined, log_determinant = _scale_of(-precision)
    shift = torch.einsum("rlk,rl->rk", refined, slope)
    shift = shift * (LONGEST_SHIFT * dim**0.5 / shift.norm(dim=1, keepdim=True)).clamp(max=1.0)
    moved = loc + REFINING_RATE * torch.einsum("rkl,rl->rk", refined, shift)
    sound = log_determinant.isfinite() & moved.isfinite().all(-1)
    loc = torch.where(sound[:, None], moved, loc).unflatten(0, (size, num_components))
    scale = torch.where(sound[:, None, None], refined, scale).unflatten(0, (size, num_components))
    return replace(students, loc=loc, scale_tril=scale)


def _matched(points: Tensor, degrees_of_freedom: float) -> StudentMixture:
    """One Student-t with the mean and the widened covariance of points of shape (S, N, K)."""
    loc = points.mean(0)
    shift = points - loc
    covariance = torch.einsum("snk,snl->nkl", shift, shift) / (len(points) - 1)
    covariance = (covariance + torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))) / 2  # few draws, many entries
    scale_tril = WIDENED * torch.linalg.cholesky(covariance + 1e-6 * torch.eye(loc.shape[-1]).to(loc))
    nothing = torch.zeros(len(loc), 1).to(loc)
    return StudentMixture(loc.unsqueeze(1), scale_tril.unsqueeze(1), nothing, degrees_of_freedom)


def _starts(joint: Joint, columns: Columns, guide: Tensor) -> Tensor:
    """Where the search begins, shape (N, starts, K): the guide's middle, its best draw, the best draws of the prior."""
    draws, places = _prior_starts(joint.dim)
    middle, prior = guide.mean(0, keepdim=True), joint.prior_points(columns, draws)
    return torch.cat([middle, _best(joint, columns, guide, 1), _best(joint, columns, prior, places)]).transpose(0, 1)


def _best(joint: Joint, columns: Columns, points: Tensor, count: int) -> Tensor:
    """The most probable of points of shape (S, N, K) that lie apart from each other, shape (count, N, K)."""
    _, log_p = joint.log_prob(columns, points.flatten(0, 1))
    log_p = log_p.nan_to_num(-math.inf).reshape(points.shape[:2])
    rows, chosen = torch.arange(points.shape[1], device=points.device), []
    for _ in range(count):
        chosen.append(points[log_p.argmax(0), rows])
        near = (points - chosen[-1]).square().sum(-1) < APART**2
        log_p = torch.where(near, -math.inf, log_p)
    return torch.stack(chosen)


def climb(joint: Joint, rows: Columns, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's method with Levenberg-Marquardt damping, row by row, from points of shape (R, K).

    Returns the points reached, log p(x, u) there, and its Hessian, shapes (R, K), (R,) and (R, K, K).
    """
    u = u.clone()
    log_p, slope, hessian = joint.with_hessian(rows, u)
    damping = torch.full_like(log_p, FIRST_DAMPING)
    active = torch.arange(len(u), device=u.device)
    for _ in range(MAX_STEPS):
        step, solvable = _damped_step(-hessian[active], slope[active], damping[active])
        promised = (step * slope[active]).sum(1) / 2
        trial = u[active] + step
        some = tuple(row[active] for row in rows)
        reached = joint.log_prob(some, trial)[1]
        better = solvable & (reached > log_p[active])
        damping[active] = torch.where(better, damping[active] / 10, damping[active] * 10)
        moved = active[better]
        u[moved] = trial[better]
        settled = (solvable & (promised < SETTLED)) | (damping[active] > 1e8)
        if len(moved):
            log_p[moved], slope[moved], hessian[moved] = joint.with_hessian(tuple(row[moved] for row in rows), u[moved])
        active = active[~settled]
        if not len(active):
            break
    return u, log_p, hessian


def _damped_step(precision: Tensor, slope: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The Newton step with a multiple of the identity added, and where it exists."""
    unit = torch.eye(slope.shape[1]).to(slope)
    factor, failed = torch.linalg.cholesky_ex(precision + damping[:, None, None] * unit)
    solvable = (failed == 0) & factor.isfinite().all(-1).all(-1)
    step = torch.cholesky_solve(slope.unsqueeze(-1), torch.where(solvable[:, None, None], factor, unit)).squeeze(-1)
    return step.nan_to_num(0.0), solvable & step.isfinite().all(-1)


def _scale_of(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular scale of the normal of this curvature, and its log determinant; NaN where there is none."""
    precision = -(hessian + hessian.mT) / 2
    finite = precision.isfinite().all(-1).all(-1)
    unit = torch.eye(hessian.shape[-1]).to(hessian)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], precision, unit).double())
    values = values.abs().clamp(min=SMALLEST_PRECISION)
    covariance = vectors @ (vectors / values.unsqueeze(-2)).mT
    scale_tril = torch.linalg.cholesky(covariance).to(hessian)
    log_determinant = (-values.log().sum(-1) / 2).to(hessian)
    return scale_tril, torch.where(finite, log_determinant, torch.nan)


def _weights(loc: Tensor, scale_tril: Tensor, log_mass: Tensor) -> Tensor:
    """Normalized log weights of modes; minus infinity for repeated, failed and negligible ones. Shape (N, J)."""
    log_mass = torch.where(log_mass.isfinite() & loc.isfinite().all(-1), log_mass, -math.inf)
    order = log_mass.argsort(dim=1, descending=True)
    kept = torch.full_like(log_mass, -math.inf)
    rows = torch.arange(len(loc), device=loc.device)
    for place in range(loc.shape[1]):
        mode = order[:, place]
        shift = loc[rows, mode].unsqueeze(1) - loc
        standard = torch.linalg.solve_triangular(scale_tril, shift.unsqueeze(-1), upper=False).squeeze(-1)
        near = standard.square().mean(-1) < SAME_MODE**2
        repeated = (near & (kept > -math.inf)).any(1)
        kept[rows, mode] = torch.where(repeated, -math.inf, log_mass[rows, mode])
    best = kept.amax(1, keepdim=True)
    kept = torch.where(kept < best - NEGLIGIBLE_MODE, -math.inf, kept)
    return torch.where(best > -math.inf, (kept / 2).log_softmax(1), -math.inf)  # halved: a guess of mass, not a measure


def _without_idle_components(mixture: StudentMixture) -> StudentMixture:
    """The same mixture with as few components as the observation that needs most of them."""
    order = mixture.log_weights.argsort(dim=1, descending=True, stable=True)
    order = order[:, : max(1, int((mixture.log_weights > -math.inf).sum(1).max()))]
    rows = torch.arange(len(order), device=order.device).unsqueeze(1)
    return StudentMixture(
        mixture.loc[rows, order],
        mixture.scale_tril[rows, order],
        mixture.log_weights[rows, order],
        mixture.degrees_of_freedom,
    )
