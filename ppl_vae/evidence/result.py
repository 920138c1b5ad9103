"""Evidence: log p(x) of each observation with its error, diagnosis and verdict, and what that means for a data set."""

import math
from dataclasses import dataclass

import xarray as xr

NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class EvidenceSummary:
    """The evidence of a data set, its three sources of doubt apart. Nats per observation unless said otherwise.

    Attributes:
        mean: average of the estimates.
        monte_carlo_error: standard error of ``mean`` that more particles would shrink.
        bias: expected error of ``mean`` to first order; negative, because the log of an average is too low.
        test_sampling_error: standard error of ``mean`` as the expectation over the population of observations.
        bits_per_dimension: ``-mean`` in bits, divided by the number of scored values of an observation.
        trusted: share of observations with the verdict "exact" or "good".
        median_ess: median effective sample size.
    """

    method: str
    num_observations: int
    num_particles: int
    mean: float
    monte_carlo_error: float
    bias: float
    test_sampling_error: float
    bits_per_dimension: float
    trusted: float
    median_ess: float

    def __str__(self) -> str:
        drawn = f", {self.num_particles} particles each" if self.num_particles else ""
        lines = [
            f"{self.method}, {self.num_observations} observations{drawn}",
            f"  mean                 {self.mean:10.3f} nats  ({self.bits_per_dimension:.4f} bits per dimension)",
        ]
        if self.num_particles:
            lines.append(f"  Monte Carlo error    {self.monte_carlo_error:10.3f}")
            lines.append(f"  Monte Carlo bias     {self.bias:10.3f}")
            lines.append(f"  median ESS           {self.median_ess:10.1f}")
        lines.append(f"  test sampling error  {self.test_sampling_error:10.3f}")
        lines.append("  a lower bound" if self.method == "elbo" else f"  trusted              {self.trusted:10.0%}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Evidence:
    """Evidence of each observation, a table over the dimension ``observation``.

    Variables: ``estimate`` (nats), ``standard_error`` (nats), ``bias`` (nats), ``ess``, ``pareto_k``, ``verdict``,
    ``method``, ``num_particles`` (0 where nothing was drawn). ``evidence["estimate"]`` is short for
    ``evidence.dataset["estimate"]``.

    The verdict speaks of the raw estimate and its standard error: "exact" (constant weights, or a grid that stands
    still), "good" (k-hat below 0.4), "fair" (below 0.7), "poor", and "bound" for an ELBO. It comes from a pilot run
    that is not part of the estimate: a verdict taken from the draws that it judges calls an estimate good because the
    large weight was not drawn.
    """

    dataset: xr.Dataset

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.dataset[name]

    def summary(self) -> EvidenceSummary:
        """The evidence of the data set as a whole."""
        table = self.dataset
        size = table.sizes["observation"]
        estimate = table["estimate"].values
        mean = float(estimate.mean())
        return EvidenceSummary(
            method=" + ".join(dict.fromkeys(table["method"].values.tolist())),
            num_observations=size,
            num_particles=int(table["num_particles"].max()),
            mean=mean,
            monte_carlo_error=float((table["standard_error"] ** 2).sum(skipna=False) ** 0.5) / size,
            bias=float(table["bias"].mean(skipna=False)),
            test_sampling_error=float(estimate.std(ddof=1)) / math.sqrt(size) if size > 1 else math.nan,
            bits_per_dimension=-mean / table.attrs["num_dimensions"] / NATS_PER_BIT,
            trusted=float(table["verdict"].isin(["exact", "good"]).mean()),
            median_ess=float(table["ess"].median()),
        )

    def __str__(self) -> str:
        return str(self.summary())
