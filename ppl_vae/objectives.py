r"""Objectives of training: losses for ``fit(loss=...)`` and for ``pyro.infer.SVI``, one number per observation.

Particles are rows: S particles are the columns S times, so every story can have them. Latents that the model marks
``infer={"enumerate": "parallel"}`` and that the guide does not draw are summed out exactly.

Notation: :math:`w_{sn} = p(x_n, z_{sn}) / q(z_{sn} \mid x_n)` is the weight of particle s of observation n, z all its
latents. Where something scales the latent terms, a warm-up or a beta, :math:`w = p(x \mid z) (p(z) / q(z \mid
x))^\beta`; and with several latents each has its own factor. Pyro's analytic divergence, ``TraceMeanField_ELBO``, is
another loss that ``fit`` takes.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

from ppl_vae import discrete, traces
from ppl_vae.traces import Columns, Site, observed_sites, sample_sites

Program = Callable[..., Any]

LARGEST_NUMBER = 1e12  # of nats, or of times that a divergence counts
LARGEST_ORDER = 1e6  # of a Renyi bound; powers of weights beyond it overflow


class PerObservation(ELBO):
    """A Pyro loss: minus the sum, over observations, of what :meth:`bounds` says of each.

    Everything positional that the loss is handed is a column, a tensor whose first dimension is the observation.

    Args:
        num_particles: S, draws of the guide for each observation.

    Raises:
        ValueError: when there is no particle; later, when the story is not one that the objective is for.
    """

    def __init__(self, num_particles: int) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1; found {num_particles}.")
        super().__init__(num_particles=num_particles)

    @abstractmethod
    def bounds(self, model: Program, guide: Program, *columns: Tensor) -> Tensor:
        """What each observation adds to the objective, shape (N,), in nats; its gradient is the one to train by."""

    def differentiable_loss(self, model: Program, guide: Program, *columns: Tensor) -> Tensor:
        """The loss of a batch, with its gradient."""
        return -self.bounds(model, guide, *columns).sum()

    def loss(self, model: Program, guide: Program, *columns: Tensor) -> float:
        """The loss of a batch."""
        with torch.no_grad():
            loss: Any = torch_item(self.differentiable_loss(model, guide, *columns))
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Program, guide: Program, *columns: Tensor) -> float:
        """The loss of a batch; its gradient is added to the parameters'."""
        differentiable = self.differentiable_loss(model, guide, *columns)
        if differentiable.requires_grad:
            differentiable.backward(retain_graph=self.retain_graph)
        loss: Any = torch_item(differentiable)
        warn_if_nan(loss, "loss")
        return loss

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return model_trace, guide_trace

    def _told(self, model: Program, guide: Program, columns: Columns) -> "_Told":
        """Tells the story with all its particles.

        Raises:
            ValueError: when the latents of model and guide do not match, or a site has no log probability per row.
        """
        factors, shape = _Factors(), (self.num_particles, len(columns[0]))
        rows = columns if self.num_particles == 1 else traces.as_rows(columns, self.num_particles)
        model, guide = factors(model), factors(guide)
        model_trace, guide_trace = self._get_trace(model, guide, rows, {})
        summed = discrete.summed_out(model_trace, guide_trace)
        _check_latents(model_trace, guide_trace, summed)
        if summed:
            log_likelihood, terms = _with_sums(model, rows, guide_trace, summed, factors, shape)
        else:
            log_likelihood, terms = _site_by_site(model_trace, guide_trace, factors, shape)
        return _Told(log_likelihood, terms, sample_sites(guide_trace))


# Objectives


class SummedOutELBO(PerObservation):
    r"""The evidence lower bound, :math:`\frac{1}{S} \sum_s \log w_{sn}`, with marked discrete latents summed out.

    It is ``pyro.infer.TraceEnum_ELBO`` in value and gradient for latents that the model marks
    ``infer={"enumerate": "parallel"}`` and that the guide leaves alone. The model is told once for each of their joint
    values, as rows, so that a step can be captured, and convolutions and ``torch.cat`` work. A beta or a warm-up scales
    log p(z) and log q(z | x) of the latents that are left. Latents that have no gradient of draws learn by their score.

    Args:
        num_particles: S, draws of the guide for each observation.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("observations", len(x)):
    ...         kind = pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    ...         pyro.sample("x", dist.Normal(2 * kind, 1.0), obs=x)
    >>> x = torch.tensor([0.0, 1.0])
    >>> SummedOutELBO().bounds(model, lambda x: None, x)
    tensor([-1.4852, -1.4189])
    """

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(num_particles)

    def bounds(self, model: Program, guide: Program, *columns: Tensor) -> Tensor:
        told = self._told(model, guide, columns)
        return told.mean_over_particles(told.log_weights)


class FreeBitsELBO(PerObservation):
    r"""The evidence lower bound where a latent may cost some nats before it is held to its prior.

    .. math:: \frac{1}{S} \sum_s \log p(x_n \mid z_{sn}) - \sum_j \max(\lambda_j, \operatorname{KL}_j)

    with one :math:`\operatorname{KL}_j`, the mean of :math:`\log q(z_j \mid x) - \log p(z_j)` over particles and the
    whole batch, for each latent j. Below its threshold it has no gradient, so that a latent need not collapse early in
    training. Kingma et al. 2016, https://arxiv.org/abs/1606.04934, appendix C.8. Not more than the evidence lower
    bound, and for training only: ``fit`` validates without it.

    Args:
        free_bits: :math:`\lambda` in nats per observation, for all latents or by site name (then 0 for the others).
            Latents whose prior cannot be told apart, since a site before them is summed out, add up theirs.
        num_particles: S, draws of the guide for each observation.

    Raises:
        ValueError: when a threshold is negative; later, when a name is that of no latent.

    >>> FreeBitsELBO({"z": 2.0}).free_bits
    {'z': 2.0}
    """

    def __init__(self, free_bits: float | Mapping[str, float], num_particles: int = 1) -> None:
        super().__init__(num_particles)
        check_numbers("free_bits", free_bits)
        self.free_bits = free_bits

    def bounds(self, model: Program, guide: Program, *columns: Tensor) -> Tensor:
        told = self._told(model, guide, columns)
        check_names("free_bits", self.free_bits, list(told.drawn))
        log_weights = told.log_likelihood
        for term in told.terms:
            threshold = sum(number_of(name, self.free_bits, 0.0) for name in term.names)
            divergence = term.log_q - term.log_p
            log_weights = log_weights - term.factor * divergence.masked_fill(divergence.mean() <= threshold, threshold)
        return told.mean_over_particles(log_weights)


class ImportanceWeightedELBO(PerObservation):
    r"""The importance-weighted bound, :math:`\log \frac{1}{S} \sum_s w_{sn}`, tighter with every particle.

    Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519. With :math:`\tilde w_s = w_s / \sum_r w_r`,
    its plain gradient tells the guide less and less as particles become many. The doubly reparameterized one (Tucker,
    Lawson, Gu & Maddison 2019, https://arxiv.org/abs/1810.04152) has the same mean and less noise:

    .. math::
        \sum_s \tilde w_s \nabla_\theta \log p_\theta(x, z_s)
        + \sum_s \tilde w_s^2 \, \frac{\partial \log w_s}{\partial z_s} \nabla_\phi z_s(\phi)

    The squares belong to the path through z alone. Parameters of prior and likelihood have the plain weights, also
    those that the guide shares: a VampPrior holds the encoder. Where a factor :math:`\beta` scales the latent terms,
    :math:`\tilde w_s - \beta \tilde w_s (1 - \tilde w_s)` is in the place of the squares.

    Args:
        num_particles: S, draws of the guide for each observation; 1 is the evidence lower bound.
        doubly_reparameterized: False for the plain gradient. It needs no density of the guide at given points, which a
            guide with flows may compute slowly, or not at all.

    Raises:
        ValueError: later, when the guide draws a latent without a gradient of draws.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("observations", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("observations", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # exact, so that every weight is p(x)
    >>> ImportanceWeightedELBO(num_particles=3).bounds(model, guide, torch.tensor([0.0, 1.0])).detach()
    tensor([-1.2655, -1.5155])
    """

    def __init__(self, num_particles: int, doubly_reparameterized: bool = True) -> None:
        super().__init__(num_particles)
        self.doubly_reparameterized = doubly_reparameterized

    def bounds(self, model: Program, guide: Program, *columns: Tensor) -> Tensor:
        if self.doubly_reparameterized and torch.is_grad_enabled():
            return self._doubly_reparameterized(model, guide, columns)
        told = self._told(model, guide, columns)
        told.require_reparameterized()
        return _log_mean_exp(told.log_weights)

    def _doubly_reparameterized(self, model: Program, guide: Program, columns: Columns) -> Tensor:
        """The bounds; what their gradient knows of the guide's density is its slope in z."""
        path = _Path()
        with path:
            told = self._told(model, guide, columns)
        told.require_reparameterized()
        log_weights = told.log_weights
        weights = log_weights.detach().softmax(0)
        gains = path.gains((weights * log_weights).sum())
        surrogate = weights * told.log_model
        for name, draw in path.draws.items():
            share = 1 - told.factor(name) * (1 - weights)
            surrogate = surrogate + share * (gains[name] * draw).reshape(*weights.shape, -1).sum(-1)
        surrogate = surrogate.sum(0)
        return _log_mean_exp(log_weights.detach()) + surrogate - surrogate.detach()


class RenyiELBO(PerObservation):
    r"""The variational Renyi bound, :math:`\frac{1}{1 - \alpha} \log \frac{1}{S} \sum_s w_{sn}^{1 - \alpha}`.

    Li & Turner 2016, https://arxiv.org/abs/1602.02311. Order 0 is the importance-weighted bound; towards 1 it falls to
    the evidence lower bound, and beyond that below it. Orders below 0 bound nothing. ``pyro.infer.RenyiELBO`` has a
    weight for each observation only where every site lies in the one data plate; this one always has.

    Args:
        alpha: the order, not 1.
        num_particles: S, draws of the guide for each observation.

    Raises:
        ValueError: when the order is 1; later, when the guide draws a latent without a gradient of draws.

    >>> RenyiELBO(alpha=1.0, num_particles=2)
    Traceback (most recent call last):
        ...
    ValueError: At alpha = 1 the Renyi bound is the evidence lower bound: use pyro.infer.Trace_ELBO.
    """

    def __init__(self, alpha: float, num_particles: int) -> None:
        super().__init__(num_particles)
        if alpha == 1:
            raise ValueError("At alpha = 1 the Renyi bound is the evidence lower bound: use pyro.infer.Trace_ELBO.")
        if not abs(alpha) <= LARGEST_ORDER:
            raise ValueError(f"alpha must lie between -{LARGEST_ORDER:g} and {LARGEST_ORDER:g}; found {alpha}.")
        self.alpha = alpha

    def bounds(self, model: Program, guide: Program, *columns: Tensor) -> Tensor:
        told = self._told(model, guide, columns)
        told.require_reparameterized()
        return _log_mean_exp((1 - self.alpha) * told.log_weights) / (1 - self.alpha)


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


# A number for every latent


def check_numbers(argument: str, numbers: float | Mapping[str, float]) -> None:
    """Raises ValueError unless the number, or the number of every site, is not negative, and no sum of it overflows."""
    for number in numbers.values() if isinstance(numbers, Mapping) else [numbers]:
        if not 0 <= number <= LARGEST_NUMBER:
            raise ValueError(f"{argument} must be at least 0, and at most {LARGEST_NUMBER:g}; found {number}.")


def check_names(argument: str, numbers: float | Mapping[str, float], latents: Sequence[str]) -> None:
    """Raises ValueError when a name is that of no latent."""
    if isinstance(numbers, Mapping) and (unknown := sorted(set(numbers) - set(latents))):
        raise ValueError(f"{argument} names {unknown}; the latents that the guide draws are {sorted(latents)}.")


def number_of(site: str, numbers: float | Mapping[str, float], otherwise: float) -> float:
    """The number of a site; ``otherwise`` where others are named and this one is not."""
    return numbers.get(site, otherwise) if isinstance(numbers, Mapping) else numbers


# What the story says of its particles


@dataclass(frozen=True)
class _Term:
    """log p(z) and log q(z | x) of a latent, shapes (S, N), and what scales both.

    More latents than one have a common term where a site is summed out: their prior is a sum over its values.
    """

    names: tuple[str, ...]
    log_p: Tensor
    log_q: Tensor
    factor: float | Tensor


@dataclass(frozen=True)
class _Told:
    """Densities of S particles of N observations.

    Attributes:
        log_likelihood: log p(x | z), shape (S, N).
        terms: of the latents.
        drawn: the guide's sites.
    """

    log_likelihood: Tensor
    terms: list[_Term]
    drawn: dict[str, Site]

    @property
    def log_model(self) -> Tensor:
        """log p(x, z), its latent terms scaled; shape (S, N)."""
        return sum((term.factor * term.log_p for term in self.terms), self.log_likelihood)

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), latent terms scaled; shape (S, N)."""
        return self.log_model - sum(term.factor * term.log_q for term in self.terms)

    def factor(self, name: str) -> float | Tensor:
        """What scales the terms of a latent."""
        return next(term.factor for term in self.terms if name in term.names)

    def mean_over_particles(self, values: Tensor) -> Tensor:
        """The mean of values of shape (S, N), and the gradient of their expectation: draws without one have a score."""
        scores = [site["log_prob"] for site in self.drawn.values() if not _moves(site)]
        if scores:
            score = torch.stack(scores).sum(0).reshape(values.shape)
            values = values + values.detach() * (score - score.detach())
        return values.mean(0)

    def require_reparameterized(self) -> None:
        """Raises ValueError when a draw has no gradient."""
        for name, site in self.drawn.items():
            if not _moves(site):
                raise ValueError(
                    f"The guide draws {name!r} from {type(site['fn']).__name__}, whose draws have no gradient. Sum it "
                    "out (infer={'enumerate': 'parallel'} in the model, and not in the guide), or train by Trace_ELBO."
                )


class _Factors(Messenger):
    """Takes what scales the latent terms out of a program, and keeps it by site name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, float | Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            self.of[msg["name"]] = msg["scale"]
            msg["scale"] = 1.0


class _Path(Messenger):
    """Cuts the guide's draws from what follows: densities, and later draws, see the draw's value as a leaf's.

    Attributes:
        draws: by site name, with their gradient in the guide's parameters and in the leaves before.
        leaves: by site name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if not msg["is_observed"] and name not in self.draws and _moves(msg):
            self.draws[name] = msg["value"]
            self.leaves[name] = leaf = msg["value"].detach().requires_grad_()
            msg["value"] = leaf.view_as(leaf)  # torch's trackers of modules refuse leaves

    def gains(self, objective: Tensor) -> dict[str, Tensor]:
        """The gradient of an objective of shape () in each draw, through all that is drawn from it in turn."""
        names, leaves = list(self.leaves), list(self.leaves.values())
        gains = dict(zip(names, _gradients(objective, leaves), strict=True))
        for number in reversed(range(1, len(names))):
            last = names[number]
            changes = _gradients(self.draws[last], leaves[:number], gains[last])
            gains |= {name: gains[name] + change for name, change in zip(names, changes, strict=False)}
        return gains


def _gradients(of: Tensor, leaves: list[Tensor], weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients in leaves; zero where there is none."""
    if not leaves or not of.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(of, leaves, weights, retain_graph=True, materialize_grads=True)


def _moves(site: Any) -> bool:
    """Whether draws move with the parameters of their distribution, by a gradient."""
    return getattr(site["fn"], "has_rsample", False)


def _check_latents(model_trace: Trace, guide_trace: Trace, summed: dict[str, Site]) -> None:
    latents = sample_sites(model_trace).keys() - observed_sites(model_trace).keys() - summed.keys()
    drawn = sample_sites(guide_trace).keys()
    if missing := sorted(latents - drawn):
        raise ValueError(
            f"The model draws {missing}; the guide draws only {sorted(drawn)}. Draw the same sites in the guide, or "
            "sum discrete ones out: mark them infer={'enumerate': 'parallel'} in the model."
        )
    if extra := sorted(drawn - latents):
        raise ValueError(f"The guide draws {extra}; the model draws only {sorted(latents)}.")


def _site_by_site(
    model_trace: Trace, guide_trace: Trace, factors: _Factors, shape: tuple[int, int]
) -> tuple[Tensor, list[_Term]]:
    """log p(x | z), and a term for each latent."""
    in_model, in_guide = sample_sites(model_trace), sample_sites(guide_trace)
    terms = [
        _Term(
            names=(name,),
            log_p=_log_prob(model_trace, {name: in_model[name]}, shape),
            log_q=_log_prob(guide_trace, {name: in_guide[name]}, shape),
            factor=factors.of[name],
        )
        for name in in_guide
    ]
    return _log_prob(model_trace, observed_sites(model_trace), shape), terms


def _with_sums(
    model: Program,
    rows: Columns,
    guide_trace: Trace,
    summed: dict[str, Site],
    factors: _Factors,
    shape: tuple[int, int],
) -> tuple[Tensor, list[_Term]]:
    """log p(x | z), and one term for all latents that the guide draws, with other sites summed out of both."""
    latents = traces.draws(guide_trace)
    log_densities = discrete.log_densities(model, rows, latents, discrete.assignments(summed))
    log_prior, log_joint = (log_density.reshape(shape) for log_density in log_densities)
    if not latents:
        return log_joint, []
    if len({factor for name in latents if isinstance(factor := factors.of[name], float)}) > 1:
        raise ValueError(
            f"The latents {sorted(latents)} have one prior together, because {sorted(summed)} are summed out; scale "
            "their terms by one number, not each by its own."
        )
    log_q = _log_prob(guide_trace, sample_sites(guide_trace), shape)
    return log_joint - log_prior, [_Term(tuple(latents), log_prior, log_q, factors.of[next(iter(latents))])]


def _log_prob(trace: Trace, sites: dict[str, Site], shape: tuple[int, int]) -> Tensor:
    """The log probability of some sites, shape (S, N)."""
    log_prob = traces.log_prob(trace, sites)
    if log_prob.shape != (math.prod(shape),):
        raise ValueError(
            f"The sites {sorted(sites)} have log probabilities of shape {tuple(log_prob.shape)} on {math.prod(shape)} "
            "rows; expected one for each. Sample them in a plate as long as the columns, and declare inner dimensions "
            "with .to_event."
        )
    return log_prob.reshape(shape)
