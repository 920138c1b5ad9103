"""log p(x) of each observation: one function, many estimators, and the table that they fill."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import ppl_vae
from ppl_vae import checkpoint, checks, noise, traces
from ppl_vae.discrete import log_densities
from ppl_vae.distributions import Columnwise
from ppl_vae.evidence import escalation, naive, quadrature, replays, sharing
from ppl_vae.evidence.annealing import Annealing
from ppl_vae.evidence.escalation import Planned, Settings
from ppl_vae.evidence.joint import Joint, joint_of, work_of_a_draw
from ppl_vae.evidence.naive import SharedParticles
from ppl_vae.evidence.proposals import Block, FromDensity, FromGuide, FromPyro, block_numbers, block_of, without_mode
from ppl_vae.evidence.result import Evidence
from ppl_vae.evidence.sampling import METHODS, PILOT_PARTICLES, Method, draw
from ppl_vae.evidence.weights import JACKKNIFE_POWERS, WeightSums
from ppl_vae.ranks import here as ranks_here
from ppl_vae.shares import Shares, Table
from ppl_vae.stored import row_slices
from ppl_vae.traces import Columns, Story

Columnar = dict[str, Any]  # of arrays or tensors

MethodName = Literal[
    "auto", "importance", "mixture", "annealed", "laplace", "prior", "elbo", "pyro", "quadrature", "exact"
]
Correction = Literal["jackknife", "jackknife-2", "pareto"]

DEFAULT_BUDGET = 60_000
UNLIMITED = 2**62
COLUMNS = (
    "observation",
    "estimate",
    "standard_error",
    "bias",
    "ess",
    "pareto_k",
    "pilot_pareto_k",
    "verdict",
    "method",
    "num_particles",
)
GRID_POINTS = {1: 1_000, 2: 60_000}  # about how many a grid needs until it stands still


def log_evidence(
    story: Story,
    *columns: Tensor,
    method: MethodName | Method = "auto",
    num_particles: int | None = None,
    tolerance: float | None = None,
    budget: int = DEFAULT_BUDGET,
    correction: Correction | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    compile: bool | None = None,
    model_dtype: torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Evidence:
    r"""Evidence of each observation, :math:`\log p(x_n) = \log \int p(x_n \mid z)\, p(z)\, dz`, in nats.

    Columns that the story scores at a site are data, the others are conditions: ``log_evidence(conditional, x, y)`` is
    log p(x | y). The story runs in eval mode and is left as it was.

    Under ``torchrun`` every process calls this with the same arguments and computes its share; each ends with all, the
    same numbers that one process gives, bit for bit where threads are as many.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: tensors whose first dimension is the observation.
        method: a name, or a configured method such as ``Annealed(num_temperatures=200)``.

            ``"auto"`` takes quadrature or enumeration where the story allows it and that is cheaper; else, for each
            observation, the first of importance, mixture and annealed whose pilot run is good.
            ``"importance"`` weighs draws of the guide by p(x, z) / q(z | x) (Burda, Grosse & Salakhutdinov 2016,
            https://arxiv.org/abs/1509.00519).
            ``"laplace"`` weighs draws of Student-t distributions at the posterior's modes; ``"mixture"`` those of
            prior, guide and refined Laplace together; both move through all continuous latents, and sum out discrete
            ones. ``"annealed"`` runs chains from there to the posterior (Neal 2001,
            https://doi.org/10.1023/A:1008923215028).
            ``"prior"`` averages p(x | z) over draws of the prior, naive Monte Carlo, shared by all observations where
            the model allows it. ``"elbo"`` is the mean log weight, a lower bound. ``"pyro"`` is
            ``pyro.infer.Importance``, one observation at a time, the slow reference.
            ``"quadrature"`` integrates one or two latent dimensions on a refined grid, and ``"exact"`` sums over finite
            discrete latents; both without chance.
        num_particles: draws (chains, if annealed) for each observation; None is the method's default.
        tolerance: standard error wanted of every observation, in nats: pilots choose the number of particles, and the
            verdict is "unresolved" where ``budget`` does not reach it.
        budget: evaluations of log p(x, z) for each observation that "auto" or a tolerance may spend, pilots included;
            a gradient counts as two.
        correction: ``"jackknife"`` or ``"jackknife-2"`` take out the bias of first, or first and second, order (Nowozin
            2018, https://openreview.net/forum?id=HyZoi-WRb); ``"pareto"`` smooths the largest weights (Vehtari et al.
            2024, https://arxiv.org/abs/1507.02646). Corrected estimates are bounds of nothing.
        seed: the noise is a function of it and of the position of an observation.
        device: where to compute; None is where the story is.
        progress: show a bar; None means when standard error is a terminal.
        compile: compile the model's density by inductor, which needs a C++ compiler and some 3 to 25 seconds; None
            does so on a CPU where there are draws enough to win.
        model_dtype: compute the model's linear layers and convolutions in this dtype. ``torch.bfloat16`` is faster
            where the processor knows it, and moves each estimate by some hundredths of a nat, which no error tells;
            the column ``method`` says so.
        folder: where blocks of observations are written down as they are finished, every half minute; the same call
            goes on with what it finds there, to the same numbers. Its files may be deleted afterwards.

    Returns:
        An :class:`Evidence`. For weighted draws ``standard_error`` and ``bias`` are those of the delta method,
        :math:`\sqrt{v}` and :math:`-v/2` with :math:`v = \mathrm{Var}(w) / (S \bar w^2)`; for quadrature
        ``standard_error`` is what the last refinement changed. Believe them as far as ``verdict`` says.

    Raises:
        ValueError: when the story or the data are not what :func:`ppl_vae.check` expects, when a method does not apply
            to the story, or when a weight is NaN or infinite, naming the observations; when a file in ``folder`` is
            damaged.
        MemoryError: when one particle of one observation does not fit.
        OSError: when a finished block cannot be written down.
        RuntimeError: when another process of the same ``torchrun`` has died.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> evidence = log_evidence(vae, torch.ones(10, 5), num_particles=100)
    >>> evidence["estimate"].shape
    (10,)
    """
    name = _refuse_nonsense(method, num_particles, tolerance, budget, correction)
    if device is not None:
        story.to(traces.device_named(device))
    event_shapes = checks.dry_run(story, *columns)
    with traces.scoring(story):
        work = work_of_a_draw(story, columns)
        if compile is None:
            wanted = num_particles or (METHODS["importance"].default_particles if method != "elbo" else 0)
            on_cpu = traces.device_and_dtype(story)[0].type == "cpu"
            compile = on_cpu and replays.pays(wanted * len(columns[0]), work)
        if name != "auto" and tolerance is None:
            budget = UNLIMITED
        settings, data_fingerprint = Settings(num_particles, tolerance, budget), fingerprint(story, columns)
        words = f"{ppl_vae.__version__} {method} {settings} {correction} {seed} {model_dtype} {data_fingerprint}"
        shares = Shares(progress=progress)
        if folder is not None:
            shares = Shares(Path(folder), _asked(words, story, columns), progress)
        ranks_here().refuse_different("log_evidence", f"{words} {len(columns[0])} observations")
        joint = joint_of(story, columns, compiled=compile, model_dtype=model_dtype, work=work)
        estimation = _Estimation(joint, columns, settings, correction, seed, shares)
        parts, extra = estimation.run(method)
        measures = _base_measures(story, columns)
    attributes = {
        "unit": "nats",
        "seed": seed,
        "num_dimensions": sum(shape.numel() for shape in event_shapes.values()),
        "method": name,
        "correction": correction or "",
        "tolerance": math.nan if tolerance is None else tolerance,
        "budget": budget if budget < UNLIMITED else 0,
        "base_measure": json.dumps(measures),
        "fingerprint": data_fingerprint,
        "model_dtype": str(model_dtype or "").removeprefix("torch."),
    }
    dataset = _dataset(parts)
    if model_dtype is not None:
        names = dataset["method"]
        dataset["method"] = names.copy(data=np.char.add(names.values, f" in {attributes['model_dtype']}"))
    return Evidence(dataset.assign_attrs(attributes | extra))


def _refuse_nonsense(
    method: MethodName | Method,
    num_particles: int | None,
    tolerance: float | None,
    budget: int,
    correction: Correction | None,
) -> str:
    """Raises ValueError for arguments that mean nothing; returns the method's name."""
    name = method if isinstance(method, str) else method.name
    if isinstance(method, str) and method not in get_args(MethodName):
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(map(repr, get_args(MethodName)))}.")
    if num_particles is not None and num_particles < 1:
        raise ValueError(f"num_particles must be at least 1; found {num_particles}.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in nats; found {tolerance}.")
    if tolerance is not None and name in ("elbo", "exact", "prior"):
        raise ValueError(f"method={name!r} takes no tolerance; choose num_particles, or another method.")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 evaluation per observation; found {budget}.")
    if correction is not None and correction not in get_args(Correction):
        raise ValueError(f"Unknown correction {correction!r}; choose one of {', '.join(get_args(Correction))}.")
    if correction is not None and name in ("elbo", "quadrature", "exact"):
        raise ValueError(f"A correction is for averages of weights; method={name!r} has none.")
    return name


@dataclass(frozen=True)
class _Estimation:
    """One call of :func:`log_evidence`."""

    joint: Joint
    columns: Columns
    settings: Settings
    correction: Correction | None
    seed: int
    shares: Shares

    def run(self, method: str | Method) -> tuple[list[Table], dict[str, Any]]:
        """The rows of the table, in parts, and what is to be said of all of them together."""
        if not isinstance(method, str):
            return self._by_pilot((method,)), {}
        if method == "auto":
            return self._auto(), {}
        if method == "quadrature":
            return [self._integrate()], {}
        if method == "exact":
            return self._enumerate(), {}
        if method == "elbo":
            return self._in_blocks(self._elbo), {}
        if method == "prior" and (scored := sharing.scored_columns(self.joint.story, self.columns)):
            return self._share(scored)
        return self._by_pilot((METHODS[method],)), {}

    # Without chance

    def _integrate(self) -> Table:
        tolerance = self.settings.tolerance
        wanted = min(quadrature.TOLERANCE, tolerance or quadrature.TOLERANCE)
        scored = sharing.scored_columns(self.joint.story, self.columns)
        groups = quadrature.groups(self.columns, scored)

        def of_group(number: int) -> Table:
            members = groups[number]
            estimate, error = quadrature.of_group(
                self.joint, self.columns, scored, members, wanted, self.shares.progress
            )
            verdict = np.where(error < quadrature.TOLERANCE, "exact", "poor").astype(object)
            if tolerance is not None:
                verdict[error.numpy() > tolerance] = "unresolved"
            return _without_chance(members.numpy(), "quadrature", estimate, error, verdict)

        return _joined([table for _, table in self.shares.out(range(len(groups)), of_group, "quadrature", "group")])

    def _enumerate(self) -> list[Table]:
        discrete = self.joint.discrete
        if self.joint.dim or self.joint.why_no_space or discrete is None:
            raise ValueError("method='exact' sums over discrete latents with few joint values; this story has others.")

        def of_block(block: Block) -> Table:
            densities = self.joint.chunks.map(
                lambda *rows: log_densities(self.joint.story.model, rows, {}, discrete), *block.columns
            )
            nothing = torch.zeros(block.size)
            return _without_chance(block.numbers, "exact", densities[1], nothing, np.full(block.size, "exact", object))

        return self._in_blocks(of_block)

    # By weighted draws

    def _by_pilot(self, methods: tuple[Method, ...], rows: Tensor | None = None) -> list[Table]:
        """The first good and affordable one of some methods, for all observations or for these rows."""

        def of_block(block: Block) -> Table:
            plans = escalation.plan(block, methods, self.settings)
            return _joined([self._draw(block.at(planned.rows), planned) for planned in plans])

        return self._in_blocks(of_block, rows)

    def _draw(self, block: Block, planned: Planned) -> Columnar:
        """The evidence of observations that are drawn in the same way."""
        sums = draw(block, planned.proposal, planned.num_particles, noise.Purpose.EVIDENCE, self._num_powers)
        table = _of_weights(sums, self.correction)
        table |= {
            "observation": block.numbers,
            "pilot_pareto_k": planned.judgement.pareto_k,
            "verdict": np.array(planned.judgement.verdicts, dtype=object),
            "method": _names(planned),
        }
        if isinstance(planned.proposal, FromGuide | FromPyro) and self.joint.guide_is_discrete:
            _allow_for_unseen(table, sums)
        if planned.judgement.pareto_k.isnan().all():  # chains: k-hat of so few means nothing
            table["pareto_k"] = planned.judgement.pareto_k
        if (tolerance := self.settings.tolerance) is not None:
            reached = planned.judgement.trusted & (table["standard_error"] <= tolerance)
            table["verdict"][~reached.numpy()] = "unresolved"
        return table

    def _elbo(self, block: Block) -> Table:
        num_particles = self.settings.num_particles or METHODS["importance"].default_particles
        sums = draw(block, FromGuide(block), num_particles, noise.Purpose.EVIDENCE)
        bound = {"estimate": sums.mean, "standard_error": sums.standard_error_of_mean, "bias": sums.mean * 0}
        words = {"verdict": np.full(block.size, "bound", object), "method": np.full(block.size, "elbo", object)}
        nothing = torch.full_like(sums.mean, math.nan)
        return _joined(
            [_of_weights(sums, None) | bound | words | {"observation": block.numbers, "pilot_pareto_k": nothing}]
        )

    def _share(self, scored: dict[str, int]) -> tuple[list[Table], dict[str, Any]]:
        """Naive Monte Carlo with the same draws for all observations."""
        num_particles = self.settings.num_particles or METHODS["prior"].default_particles
        particles = SharedParticles(self.joint, self.columns, scored, self.seed)
        groups = particles.groups()

        def of_group(number: int) -> Table:
            rows = groups[number]
            pilot, _ = particles.draw(rows, PILOT_PARTICLES, noise.Purpose.PILOT)
            sums, batches = particles.draw(rows, num_particles, noise.Purpose.EVIDENCE, self._num_powers)
            words = {
                "verdict": np.array(pilot.verdicts(), dtype=object),
                "method": np.full(len(rows), "prior", object),
            }
            own = {"observation": rows.numpy(), "pilot_pareto_k": pilot.pareto_k}
            return _joined([_of_weights(sums, self.correction) | words | own]) | {"batches": batches.numpy()}

        tables = dict(self.shares.out(range(len(groups)), of_group, "evidence", "group"))
        batches = sum(torch.from_numpy(tables[number]["batches"]) for number in sorted(tables))
        return list(tables.values()), {
            "monte_carlo_error": naive.error_of_mean(torch.as_tensor(batches), len(self.columns[0]))
        }

    # Whatever is best

    def _auto(self) -> list[Table]:
        """Enumeration or quadrature where they apply and are cheaper; else, and for what they leave, by pilot."""
        if self.joint.dim == 0 and not self.joint.why_no_space and self.joint.discrete is not None:
            return self._enumerate()
        if not self._quadrature_is_cheap():
            return self._by_pilot(self._ladder())
        table = self._integrate()
        solved = table["verdict"] == "exact"
        rows = torch.from_numpy(np.sort(table["observation"][~solved]))
        rest = self._by_pilot(self._ladder(), rows) if len(rows) else []
        return [{name: column[solved] for name, column in table.items()}, *rest]

    def _ladder(self) -> tuple[Method, ...]:
        """The methods that apply to the story, in the order in which they are tried."""
        if not self.joint.can_move:
            return escalation.LADDER[:1]
        first = traces.to_story(self.joint.story, tuple(column[:1] for column in self.columns))
        return escalation.LADDER if self.joint.is_differentiable(first) else escalation.LADDER[:2]

    def _quadrature_is_cheap(self) -> bool:
        if not self.joint.can_move or self.joint.dim not in GRID_POINTS:
            return False
        scored = sharing.scored_columns(self.joint.story, self.columns)
        groups = sharing.rows_with_equal_conditions(self.columns, scored)
        cost = sum(1 for _ in groups) * GRID_POINTS[self.joint.dim]
        return cost < self.settings.budget * len(self.columns[0])

    @property
    def _num_powers(self) -> int:
        return JACKKNIFE_POWERS if (self.correction or "").startswith("jackknife") else 2

    # The observations

    def _in_blocks(self, compute: Callable[[Block], Table], rows: Tensor | None = None) -> list[Table]:
        """What is computed of each block of all observations, or of these rows."""

        def of_number(number: int) -> Table:
            return compute(block_of(self.joint, self.columns, self.seed, number, rows))

        numbers = block_numbers(len(self.columns[0]), rows)
        return [table for _, table in self.shares.out(numbers, of_number, "evidence")]


# The table


def _of_weights(sums: WeightSums, correction: Correction | None) -> Columnar:
    """What the weights of some observations say, as columns."""
    variance = sums.relative_variance
    estimate, bias = sums.log_mean, -variance / 2
    if correction is not None:
        corrected = {"jackknife": lambda: sums.jackknife(1), "jackknife-2": lambda: sums.jackknife(2)}
        estimate = corrected.get(correction, lambda: sums.pareto_smoothed)()
        bias = torch.zeros_like(bias) if correction in corrected else torch.full_like(bias, math.nan)
    return {
        "estimate": estimate,
        "standard_error": variance.sqrt(),
        "bias": bias,
        "ess": sums.ess,
        "pareto_k": sums.pareto_k,
        "num_particles": np.full(len(estimate), sums.count),
    }


def _allow_for_unseen(table: Columnar, sums: WeightSums) -> None:
    """Where a discrete guide drew a single value, equal weights do not prove it exact; in place.

    The values that were not drawn have a probability of about 1 / (S + 1) (Laplace's rule of succession), and so has
    the relative error where their weights are of the size of the others.
    """
    at_least = torch.where(sums.constant, 1 / (sums.count + 1), 0.0)
    table["standard_error"] = table["standard_error"].maximum(at_least)
    table["verdict"][table["verdict"] == "exact"] = "good"


def _names(planned: Planned) -> np.ndarray:
    """The method of each observation, and whether the widened guide stood in for its mode."""
    name, proposal = planned.method.name, planned.proposal
    lacking = None
    if isinstance(proposal, FromDensity | Annealing):
        lacking = without_mode(proposal.density)
    if lacking is None:
        lacking = torch.zeros(len(planned.rows), dtype=torch.bool)
    return np.where(lacking.cpu().numpy(), f"{name} (widened guide, no mode)", name).astype(object)


def _without_chance(numbers: np.ndarray, method: str, estimate: Tensor, error: Tensor, verdict: np.ndarray) -> Table:
    """Columns of an estimate for which nothing was drawn."""
    size = len(estimate)
    nothing = np.full(size, np.nan)
    return {
        "observation": numbers,
        "estimate": estimate.double().cpu().numpy(),
        "standard_error": error.double().cpu().numpy(),
        "bias": np.zeros(size),
        "ess": nothing,
        "pareto_k": nothing,
        "pilot_pareto_k": nothing,
        "verdict": verdict,
        "method": np.full(size, method, object),
        "num_particles": np.zeros(size, int),
    }


def _joined(parts: Sequence[Mapping[str, Any]]) -> Table:
    """Tables one below the other."""
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in COLUMNS}


def _dataset(parts: list[Table]) -> xr.Dataset:
    """One row per observation, in order."""
    table = _joined(parts)
    table |= {name: table[name].astype(str) for name in ("verdict", "method")}
    order = table["observation"].argsort()
    variables = {name: ("observation", table[name][order]) for name in COLUMNS if name != "observation"}
    return xr.Dataset(variables, coords={"observation": table["observation"][order]})


# What the numbers are of


def _base_measures(story: Story, columns: Columns) -> dict[str, str]:
    """For each scored site, whether its log probabilities are of probabilities or of densities."""
    return {name: _base_measure(site["fn"].support) for name, site in sharing.observed_in(story, columns).items()}


def _base_measure(support: Any) -> str:
    """The measure of each number; where columns of a table differ, of so many of them, in their order."""
    if not isinstance(support, Columnwise):
        return "counting" if support.is_discrete else "Lebesgue"
    parts = zip(support.supports, support.widths, strict=True)
    runs = [(name, len(list(run))) for name, run in groupby(_base_measure(part) for part, n in parts for _ in range(n))]
    return runs[0][0] if len(runs) == 1 else "by column " + ", ".join(f"{number} {name}" for name, number in runs)


def fingerprint(story: Story, columns: Columns) -> str:
    """A hash of the scored columns as they are; of all columns where the model scores something made from them."""
    at_sites = sharing.columns_at_sites(story, columns)
    as_they_are = set(at_sites) == set(sharing.observed_in(story, columns))
    scored = [columns[position] for position in sorted(set(at_sites.values()))] if as_they_are else columns
    digest = hashlib.sha256()
    for column in scored:
        digest.update(repr(tuple(column.shape)).encode())
        for rows in row_slices(column):
            digest.update(column[rows].detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _asked(words: str, story: Story, columns: Columns) -> str:
    """A hash of all that the evidence depends on."""
    digest = hashlib.sha256(words.encode())
    for tensors in (story.state_dict().values(), columns):
        digest.update(checkpoint.fingerprint(tensors).encode())
    return digest.hexdigest()
