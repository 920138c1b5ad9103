"""Evidence: log p(x) of each observation with its error, diagnosis and verdict, and what that means for a data set."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import xarray as xr

from ppl_vae import tables
from ppl_vae.checkpoint import write_atomically
from ppl_vae.evidence.weights import FAIR, GOOD

NATS_PER_BIT = math.log(2)

# In the order of a table: what is to be believed first.
VERDICTS = ("exact", "good", "fair", "poor", "unresolved", "bound")
TRUSTED = ("exact", "good")
FLAGGED = ("fair", "poor", "unresolved")

# What every table of evidence holds.
VARIABLES = ("estimate", "standard_error", "bias", "ess", "pareto_k", "verdict", "method", "num_particles")

# What to do about the rows that a method is not good at. "auto" has tried the others, within its budget.
USE_MIXTURE = "Use method='mixture'."
REMEDIES = {
    "prior": USE_MIXTURE,
    "importance": USE_MIXTURE,
    "pyro": USE_MIXTURE,
    "laplace": USE_MIXTURE,
    "quadrature": USE_MIXTURE,
    "mixture": "Use method='annealed'.",
    "annealed": "Raise num_temperatures.",
    "auto": "Raise budget.",
}


@dataclass(frozen=True)
class EvidenceSummary:
    """The evidence of a data set, its three sources of doubt apart. Nats per observation unless said otherwise.

    Attributes:
        method: the method asked for.
        correction: ``"jackknife"``, ``"jackknife-2"``, ``"pareto"``, or ``""`` for the estimator itself. A corrected
            estimate is not a bound.
        methods: the methods used, and for how many observations.
        verdicts: the verdicts, and of how many observations; the best first.
        num_particles: the largest number of particles behind an estimate.
        mean: average of the estimates.
        monte_carlo_error: standard error of ``mean`` that more particles would shrink.
        bias: expected error of ``mean`` to first order; negative, because the log of an average is too low. NaN where
            it is not known, as of smoothed weights.
        test_sampling_error: standard error of ``mean`` as the expectation over the population of observations.
        bits_per_dimension: ``-mean`` in bits, divided by the number of scored values of an observation.
        trusted: share of observations with the verdict "exact" or "good".
        unresolved: number of observations whose tolerance the budget did not reach.
        median_ess: median effective sample size.
        doubts: what is not to be believed, of how many observations, and a remedy, a sentence or two each.
    """

    method: str
    correction: str
    num_observations: int
    num_particles: int
    methods: dict[str, int]
    verdicts: dict[str, int]
    mean: float
    monte_carlo_error: float
    bias: float
    test_sampling_error: float
    bits_per_dimension: float
    trusted: float
    unresolved: int
    median_ess: float
    doubts: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.method}, {self.num_observations} observations{self._drawn()}"]
        if list(self.methods) != [self.method]:
            lines.append(f"  methods              {_counts(self.methods)}")
        lines.append(
            f"  mean                 {self.mean:z10.3f} nats  ({self.bits_per_dimension:.4f} bits per dimension)"
        )
        if self.num_particles:
            lines.append(f"  Monte Carlo error    {self.monte_carlo_error:z10.3f}")
            lines.append(f"  Monte Carlo bias     {self.bias:z10.3f}")
            lines.append(f"  median ESS           {self.median_ess:z10.1f}")
        lines.append(f"  test sampling error  {self.test_sampling_error:z10.3f}")
        if "bound" in self.verdicts:
            lines.append("  a lower bound on log p(x), not an estimate of it")
        else:
            lines.append(f"  trusted              {self.trusted:10.0%}  ({_counts(self.verdicts)})")
        if self.correction:
            lines.append(f"  corrected by {self.correction}: not a bound")
        return "\n".join([*lines, *self.doubts])

    def _drawn(self) -> str:
        if not self.num_particles:
            return ""
        return f", {'up to ' if len(self.methods) > 1 else ''}{self.num_particles} particles each"


@dataclass(frozen=True)
class Evidence:
    """Evidence of each observation, a table over the dimension ``observation``.

    Variables: ``estimate`` (nats), ``standard_error`` (nats), ``bias`` (nats), ``ess``, ``pareto_k``,
    ``pilot_pareto_k``, ``verdict``, ``method``, ``num_particles`` (0 where nothing was drawn). ``evidence["estimate"]``
    is short for ``evidence.dataset["estimate"]``. The attributes say what was scored and how: ``unit``, ``seed``,
    ``num_dimensions``, ``method`` (the one asked for), ``correction``, ``fingerprint`` (of the data after
    preprocessing), ``base_measure`` (of each scored site), ``tolerance``, ``budget``, and ``monte_carlo_error`` (of the
    mean) where all observations share their particles.

    The verdict speaks of the raw estimate and its standard error: "exact" (constant weights, or a grid that stands
    still), "good" (k-hat below 0.4), "fair" (below 0.7), "poor", "unresolved" (a tolerance that the budget did not
    reach), and "bound" for an ELBO. It comes from a pilot run that is not part of the estimate: a verdict taken from
    the draws that it judges calls an estimate good because the large weight was not drawn.
    """

    dataset: xr.Dataset

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.dataset[name]

    @property
    def bits_per_dimension(self) -> xr.DataArray:
        r"""Evidence in bits per scored value, :math:`-\log_2 p(x_n) / D`, shape (N,); smaller is better."""
        bits = -self.dataset["estimate"] / self.dataset.attrs["num_dimensions"] / NATS_PER_BIT
        return bits.rename("bits_per_dimension").assign_attrs(unit="bits per dimension")

    @property
    def unresolved(self) -> np.ndarray:
        """Numbers of the observations whose tolerance the budget did not reach."""
        return self._numbers("unresolved")

    @property
    def flagged(self) -> np.ndarray:
        """Numbers of the observations whose estimate is fair, poor or unresolved."""
        return self._numbers(*FLAGGED)

    def _numbers(self, *verdicts: str) -> np.ndarray:
        return self.dataset["observation"].values[self.dataset["verdict"].isin(verdicts).values]

    def summary(self) -> EvidenceSummary:
        r"""The evidence of the data set as a whole.

        With estimates :math:`\hat\ell_n`, standard errors :math:`s_n` and independent particles, the mean
        :math:`\frac1N \sum_n \hat\ell_n` has the Monte Carlo error :math:`\sqrt{\sum_n s_n^2} / N`, the Monte Carlo
        bias :math:`\frac1N \sum_n b_n` and the test sampling error :math:`\mathrm{sd}_n(\hat\ell_n) / \sqrt N` (NaN for
        one observation, or where an estimate is infinite). Particles shared by all observations correlate them; the
        Monte Carlo error is then the attribute ``monte_carlo_error``.
        """
        table = self.dataset
        mean = float(table["estimate"].mean())
        methods = _count(table["method"])
        return EvidenceSummary(
            method=table.attrs.get("method", " + ".join(methods)),
            correction=table.attrs.get("correction", ""),
            num_observations=table.sizes["observation"],
            num_particles=int(table["num_particles"].max()),
            methods=methods,
            verdicts=_count(table["verdict"], VERDICTS),
            mean=mean,
            monte_carlo_error=monte_carlo_error(table),
            bias=float(table["bias"].mean(skipna=False)),
            test_sampling_error=standard_error_of_mean(table["estimate"].values),
            bits_per_dimension=-mean / table.attrs["num_dimensions"] / NATS_PER_BIT,
            trusted=float(table["verdict"].isin(TRUSTED).mean()),
            unresolved=len(self.unresolved),
            median_ess=float(table["ess"].median()),
            doubts=tuple(_doubts(table)),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table; the file appears whole or not at all.

        Args:
            path: with the suffix ``.nc`` a netCDF file, which :meth:`load` reads back. With ``.csv`` one line per
                observation, for other programs: the attributes (seed, fingerprint, base measure, ...) are lost.

        Raises:
            ValueError: for another suffix.
            OSError: when the file cannot be written.

        >>> import tempfile
        >>> import torch
        >>> from ppl_vae import VAE, likelihoods, log_evidence, networks, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
        ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
        ... )
        >>> evidence = log_evidence(vae, torch.ones(10, 5), method="importance", num_particles=100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     evidence.save(f"{folder}/evidence.nc")
        ...     Evidence.load(f"{folder}/evidence.nc").dataset.equals(evidence.dataset)
        True
        """
        path = Path(path)
        if path.suffix not in (".nc", ".csv"):
            raise ValueError(f"Evidence is saved as .nc (netCDF, to be loaded again) or .csv; found {str(path)!r}.")
        if path.suffix == ".nc":
            tables.save(self.dataset, path)
        else:
            write_atomically(path, _csv(self.dataset))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads evidence that was saved as netCDF: numbers and words, nothing that could run.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no netCDF file, or one without evidence.
        """
        path = Path(path)
        if path.suffix == ".csv":
            raise ValueError(f"{str(path)!r} has lost its attributes. Save evidence as .nc to load it again.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no evidence {str(path)!r}.")
        dataset = tables.load(path)
        if missing := [name for name in VARIABLES if name not in dataset or dataset[name].dims != ("observation",)]:
            raise ValueError(f"{str(path)!r} holds no evidence: it has no {', '.join(missing)} over observation.")
        if dataset["num_particles"].dtype.kind not in "iu":
            raise ValueError(f"{str(path)!r} holds no evidence: its num_particles are no whole numbers.")
        if not isinstance(number := dataset.attrs.get("num_dimensions"), int | np.integer) or number < 1:
            raise ValueError(f"{str(path)!r} holds no evidence: its attribute num_dimensions is {number!r}.")
        return cls(dataset)

    def __str__(self) -> str:
        return str(self.summary())


def standard_error_of_mean(values: np.ndarray) -> float:
    r""":math:`\mathrm{sd}(v) / \sqrt N`; NaN for a single value, and where a value is infinite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def monte_carlo_error(table: xr.Dataset) -> float:
    """Standard error of the mean estimate that more particles would shrink, in nats."""
    if "monte_carlo_error" in table.attrs:
        return float(table.attrs["monte_carlo_error"])
    return float((table["standard_error"] ** 2).sum(skipna=False) ** 0.5) / table.sizes["observation"]


def _count(words: xr.DataArray, order: tuple[str, ...] = ()) -> dict[str, int]:
    """How often each word occurs, in the given order; words without a place in it follow, the most frequent first."""
    found, counts = np.unique(words.values.astype(str), return_counts=True)
    frequent = sorted(zip(found.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
    return dict(sorted(frequent, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{word} {count}" for word, count in counts.items())


def _doubts(table: xr.Dataset) -> list[str]:
    """What is not to be believed, of how many observations, and what to do about it."""
    verdict, method = table["verdict"].values, table["method"].values
    grid, chains = method == "quadrature", method == "annealed"
    weighed, doubtful = ~(grid | chains), np.isin(verdict, ["fair", "poor"])
    remedy = remedy_for(table.attrs.get("method", method[0]))
    too_low = f"their log evidence is probably too low. {remedy}"
    too_narrow = f"their 95 % intervals cover only 82 to 92 %. {remedy}"
    doubts = [
        (weighed & (verdict == "poor"), f"pareto_k of the pilot exceeds {FAIR}", too_low),
        (weighed & (verdict == "fair"), f"pareto_k of the pilot lies between {GOOD} and {FAIR}", too_narrow),
        (chains & doubtful, "the annealed chains of the pilot spread too far", too_low),
        (grid & np.isin(verdict, FLAGGED), "the finest grid has not settled", f"see standard_error. {remedy}"),
        (~grid & (verdict == "unresolved"), f"{_tolerance(table)} is not reached", "raise budget or tolerance."),
        (np.isneginf(table["estimate"].values), "every weight is zero", "the mean is minus infinity."),
    ]
    return [f"{what} for {rows.sum()} of {len(rows)} observations; {so}" for rows, what, so in doubts if rows.any()]


def remedy_for(asked: str) -> str:
    """What to do where the method asked for is not to be trusted."""
    return REMEDIES.get(asked, "Raise num_particles.")


def _tolerance(table: xr.Dataset) -> str:
    tolerance = table.attrs.get("tolerance", math.nan)
    size = "the tolerance" if math.isnan(tolerance) else f"the tolerance of {tolerance:g} nats"
    return f"{size} within a budget of {table.attrs['budget']} evaluations" if "budget" in table.attrs else size


def _csv(dataset: xr.Dataset) -> bytes:
    return cast(str, dataset.to_dataframe().to_csv(na_rep="nan", lineterminator="\n")).encode()
