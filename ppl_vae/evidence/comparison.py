"""Comparing stories by their evidence of the same observations: paired differences, ranks, and reasons to refuse."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_vae.evidence.estimators import DEFAULT_BUDGET, Correction, MethodName, log_evidence
from ppl_vae.evidence.result import FLAGGED, Evidence, monte_carlo_error, remedy_for, standard_error_of_mean
from ppl_vae.evidence.sampling import Method
from ppl_vae.traces import Story

# A list of observations in print ends after so many.
LISTED = 10

# A bias that does not show in print is no reason for doubt.
SMALLEST_BIAS = 0.0005

MEASURES = {"counting": "a probability (counting measure)", "Lebesgue": "a density (Lebesgue measure)"}


@dataclass(frozen=True)
class Comparison:
    r"""Stories ranked by their mean evidence, a table over the dimensions ``story`` (best first) and ``other``.

    Of each story, in nats per observation: ``mean``, ``monte_carlo_error``, ``bias`` and ``test_sampling_error`` as in
    :class:`EvidenceSummary`; ``num_particles``, ``num_flagged`` (fair, poor or unresolved) and ``num_unresolved``.

    Of each pair, with :math:`d_n = \hat\ell_n^{\,\mathrm{story}} - \hat\ell_n^{\,\mathrm{other}}`, in nats:

    ``difference``
        :math:`\bar d = \frac1N \sum_n d_n`, positive where ``story`` is the better one.
    ``standard_error``
        :math:`\sqrt{\mathrm{sd}_n(d_n)^2 / N + m^2}`, the whole random error of :math:`\bar d` for the population that
        the observations come from. The paired first term is far smaller than the test sampling error of either mean, as
        an observation that is hard for one story is hard for the other. It already holds the Monte Carlo error of
        particles that are independent between observations, so :math:`m = 0` for these. Particles that all observations
        share move every :math:`d_n` together, unseen by the first term: there :math:`m = m_\mathrm{story} +
        m_\mathrm{other}`, the sum because both stories may have met the same draws. NaN for a single observation.
    ``difference_monte_carlo_error``
        the part of it that more particles would shrink, :math:`\sqrt{m_\mathrm{story}^2 + m_\mathrm{other}^2}`, or
        their sum for shared particles.
    ``difference_bias``
        the difference of the two biases. It is no part of ``standard_error``: it does not shrink with N.

    A story that gives an observation probability zero has the mean minus infinity; its difference to a story that does
    not is infinite, with the error NaN, and undefined (NaN) between two such stories.

    ``comparison["difference"]`` is short for ``comparison.dataset["difference"]``; ``comparison.evidence`` holds the
    :class:`Evidence` of each story by name, the best first.
    """

    dataset: xr.Dataset
    evidence: Mapping[str, Evidence]

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.dataset[name]

    @property
    def best(self) -> str:
        """Name of the story with the largest mean evidence."""
        return next(iter(self.evidence))

    @property
    def unresolved(self) -> dict[str, np.ndarray]:
        """For each story, the numbers of the observations whose tolerance the budget did not reach."""
        return {name: evidence.unresolved for name, evidence in self.evidence.items()}

    @property
    def flagged(self) -> dict[str, np.ndarray]:
        """For each story, the numbers of the observations whose estimate is fair, poor or unresolved."""
        return {name: evidence.flagged for name, evidence in self.evidence.items()}

    def __str__(self) -> str:
        return "\n".join([self._heading(), *self._ranks(), *self._doubtful_rows(), *self._doubts()])

    def _heading(self) -> str:
        attrs = self.dataset.attrs
        corrected = f" corrected by {attrs['correction']}" if attrs["correction"] else ""
        bound = ", lower bounds" if attrs["method"] == "elbo" else ""
        return f"{attrs['method']}{corrected}{bound}, {attrs['num_observations']} observations, nats per observation"

    def _ranks(self) -> list[str]:
        names = [_printable(name) for name in self.evidence]
        width = max(map(len, [*names, "story"]))
        lines = [f"  {'story':{width}}  {'mean':>10}  {'to the best':>11}    {'error':>7}  {'bias':>7}  {'flagged':>7}"]
        for rank, name in enumerate(names):
            row = {key: array.item() for key, array in self.dataset.isel(story=rank, other=0).items()}
            shown = f"{row['difference']:z11.3f} +- {row['standard_error']:z7.3f}  {row['difference_bias']:z7.3f}"
            shown = shown if rank else " " * len(shown)
            lines.append(f"  {name:{width}}  {row['mean']:z10.3f}  {shown}  {row['num_flagged']:7}")
        return lines

    def _doubtful_rows(self) -> list[str]:
        lines = []
        for (name, evidence), verdict in product(self.evidence.items(), reversed(FLAGGED)):
            numbers = evidence["observation"].values[(evidence["verdict"] == verdict).values]
            if len(numbers):
                shown = ", ".join(map(str, numbers[:LISTED])) + (", ..." if len(numbers) > LISTED else "")
                lines.append(f"{_printable(name)}: {len(numbers)} observations are {verdict}: {shown}")
        return lines

    def _doubts(self) -> list[str]:
        method, verdicts = self.dataset.attrs["method"], self._verdicts()
        doubts = []
        if "poor" in verdicts:
            doubts.append(
                f"Poor estimates may be off, mostly too low, by more than any error here says. {remedy_for(method)}"
            )
        if "unresolved" in verdicts:
            doubts.append("Unresolved estimates missed their tolerance within the budget. Raise budget or tolerance.")
        if (abs(self["difference_bias"]) > self["standard_error"] + SMALLEST_BIAS).any():
            doubts.append("The bias of a difference is larger than its error. Raise num_particles.")
        if method == "elbo":
            doubts.append("A difference of lower bounds is not a difference of evidence. Use method='mixture'.")
        if method not in ("auto", "elbo") and len(set(self["num_particles"].values.tolist())) > 1:
            told = zip(map(_printable, self.evidence), self["num_particles"].values.tolist(), strict=True)
            numbers = ", ".join(f"{name} {number}" for name, number in told)
            doubts.append(f"Fewer particles are biased lower, and their numbers differ: {numbers}.")
        return [*doubts, "One seed each compares these trained stories, not the families they come from."]

    def _verdicts(self) -> set[str]:
        return {verdict for evidence in self.evidence.values() for verdict in evidence["verdict"].values.tolist()}


def compare(
    stories: Mapping[str, Story | Evidence],
    *columns: Tensor,
    method: MethodName | Method = "mixture",
    num_particles: int | None = None,
    tolerance: float | None = None,
    budget: int = DEFAULT_BUDGET,
    correction: Correction | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Comparison:
    r"""Ranks stories by the evidence of the same observations, :math:`\frac1N \sum_n \log p(x_n)`, in nats.

    The differences are paired: :math:`\bar d = \frac1N \sum_n d_n` with :math:`d_n = \log\hat p_a(x_n) -
    \log\hat p_b(x_n)` has the standard error :math:`\mathrm{sd}_n(d_n) / \sqrt N`, usually several times smaller than
    those of the two means.

    Stories are compared by the same method. ``"mixture"`` is the default, because a weak encoder otherwise makes a good
    story look bad. Probabilities and densities have no common unit and are refused, as are data that differ after
    preprocessing: of densities in other units, a difference would say nothing but the units.

    Args:
        stories: at least two, by name. A story is scored by :func:`log_evidence`; :class:`Evidence` is taken as it is.
        columns: what stories are scored on, tensors whose first dimension is the observation. Not needed for Evidence.
        method: how stories are scored; that of the given Evidence.
        num_particles, tolerance, budget, correction: as in :func:`log_evidence`, the same for each story.
        seed: rules the noise, the same for each story.
        device: where to compute; None is where each story is.
        progress: show a bar; None means when standard error is a terminal.

    Returns:
        A :class:`Comparison`, the best story first.

    Raises:
        ValueError: when there are fewer than two stories, or they cannot be compared: other data, another method or
            correction, a bound beside an estimate, a probability beside a density. It names two stories that differ.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> def vae(latent_dim):
    ...     return VAE(
    ...         prior=priors.StandardNormal(latent_dim),
    ...         decoder=likelihoods.Bernoulli(networks.mlp(latent_dim, 5)),
    ...         encoder=posteriors.DiagonalNormal(networks.mlp(5, 2 * latent_dim)),
    ...     )
    >>> comparison = compare({"two": vae(2), "three": vae(3)}, torch.ones(10, 5), method="importance", num_particles=99)
    >>> comparison["difference"].sel(story="two", other="three").shape
    ()
    >>> sorted(comparison.evidence)
    ['three', 'two']
    """
    if not isinstance(stories, Mapping) or len(stories) < 2:
        raise ValueError("compare takes at least two stories by name: compare({'a': story, 'b': other}, x).")
    given = {name: entry for name, entry in stories.items() if isinstance(entry, Evidence)}
    told = {name: entry for name, entry in stories.items() if not isinstance(entry, Evidence)}
    if told and not columns:
        raise ValueError(f"{next(iter(told))!r} is a story to be scored: add the columns, compare({{...}}, x).")
    methods = {name: _attribute(name, evidence, "method") for name, evidence in given.items()}
    _refuse_other_methods(methods | dict.fromkeys(told, method if isinstance(method, str) else method.name))
    corrections = {name: _attribute(name, evidence, "correction") for name, evidence in given.items()}
    _refuse_other_corrections(corrections | dict.fromkeys(told, correction or ""))
    _refuse_other_data(given)
    for name, story in told.items():
        given[name] = log_evidence(
            story,
            *columns,
            method=method,
            num_particles=num_particles,
            tolerance=tolerance,
            budget=budget,
            correction=correction,
            seed=seed,
            device=device,
            progress=progress,
        )
        _refuse_other_data(given)
    return _rank({name: given[name] for name in stories})


def _attribute(name: str, evidence: Evidence, attribute: str) -> Any:
    if attribute not in evidence.dataset.attrs:
        raise ValueError(f"The evidence {name!r} does not say its {attribute}. Score it again with log_evidence.")
    return evidence.dataset.attrs[attribute]


def _refuse_other_methods(methods: dict[str, str]) -> None:
    (first, asked), *others = methods.items()
    for name, method in others:
        if method != asked:
            bound = " An ELBO is a lower bound, the other an estimate." if "elbo" in (method, asked) else ""
            raise ValueError(
                f"{first!r} is scored with method={asked!r} and {name!r} with method={method!r}.{bound} Score all "
                "stories by the same method; method='mixture' does not depend on a good encoder."
            )


def _refuse_other_corrections(corrections: dict[str, str]) -> None:
    (first, asked), *others = corrections.items()
    for name, correction in others:
        if correction != asked:
            raise ValueError(
                f"{first!r} has the correction {asked or 'none'} and {name!r} has {correction or 'none'}. Score all "
                "stories by the same method."
            )


def _refuse_other_data(evidence: Mapping[str, Evidence]) -> None:
    """Checks each pair: numbers of observations, base measures, data, in this order."""
    for (first, a), (second, b) in combinations(evidence.items(), 2):
        names = f"{first!r} and {second!r}"
        sizes = a.dataset.sizes["observation"], b.dataset.sizes["observation"]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{names} are of {sizes[0]} and {sizes[1]} observations. Score both on the same rows.")
        _refuse_other_measure(first, a, second, b)
        prints = _attribute(first, a, "fingerprint"), _attribute(second, b, "fingerprint")
        if prints[0] != prints[1] or not a["observation"].equals(b["observation"]):
            found = f" (fingerprints {prints[0][:8]} and {prints[1][:8]})" if prints[0] != prints[1] else ""
            raise ValueError(
                f"{names} were not computed on the same data after preprocessing{found}. Score both on the same "
                "columns: the same rows in the same order, binarization, units and mask."
            )


def _refuse_other_measure(first: str, a: Evidence, second: str, b: Evidence) -> None:
    measures = json.loads(_attribute(first, a, "base_measure")), json.loads(_attribute(second, b, "base_measure"))
    for site in measures[0].keys() & measures[1].keys():
        if measures[0][site] != measures[1][site]:
            words = [MEASURES.get(measure[site], measure[site]) for measure in measures]
            raise ValueError(
                f"{first!r} gives the site {site!r} {words[0]} and {second!r} {words[1]}. They have no common unit: a "
                "density changes with the unit of its data, a probability does not. Compare stories whose "
                "likelihoods are of one kind."
            )
    if sorted(measures[0].values()) != sorted(measures[1].values()):
        raise ValueError(
            f"{first!r} scores {_sites(measures[0])} and {second!r} scores {_sites(measures[1])}. Compare stories that "
            "score the same data in the same way: a probability and a density have no common unit."
        )


def _sites(measures: dict[str, str]) -> str:
    return ", ".join(f"{site!r} ({measure})" for site, measure in measures.items())


def _rank(evidence: Mapping[str, Evidence]) -> Comparison:
    """The table of comparable evidence."""
    means = {name: float(scored["estimate"].mean()) for name, scored in evidence.items()}
    ranked = {name: evidence[name] for name in sorted(means, key=means.__getitem__, reverse=True)}
    rows = [_of_story(scored) for scored in ranked.values()]
    pairs = [_of_pair(a, b) for a, b in product(ranked.values(), repeat=2)]
    names = list(ranked)
    square = (len(names), len(names))
    variables: dict[str, Any] = {key: ("story", [row[key] for row in rows]) for key in rows[0]}
    variables |= {key: (("story", "other"), np.reshape([pair[key] for pair in pairs], square)) for key in pairs[0]}
    first = next(iter(ranked.values())).dataset
    kept = ("method", "correction", "fingerprint", "base_measure")
    attrs = {"unit": "nats", "num_observations": first.sizes["observation"]} | {k: first.attrs[k] for k in kept}
    return Comparison(xr.Dataset(variables, coords={"story": names, "other": names}, attrs=attrs), ranked)


def _of_story(evidence: Evidence) -> dict[str, float]:
    summary = evidence.summary()
    return {
        "mean": summary.mean,
        "monte_carlo_error": summary.monte_carlo_error,
        "bias": summary.bias,
        "test_sampling_error": summary.test_sampling_error,
        "num_particles": summary.num_particles,
        "num_flagged": len(evidence.flagged),
        "num_unresolved": len(evidence.unresolved),
    }


def _of_pair(a: Evidence, b: Evidence) -> dict[str, float]:
    if a is b:
        return dict.fromkeys(["difference", "standard_error", "difference_monte_carlo_error", "difference_bias"], 0.0)
    tables = a.dataset, b.dataset
    shared = sum(monte_carlo_error(table) for table in tables if "monte_carlo_error" in table.attrs)
    own = [monte_carlo_error(table) for table in tables if "monte_carlo_error" not in table.attrs]
    # Minus infinity less minus infinity is NaN: of two impossible observations none is the less possible one.
    with np.errstate(invalid="ignore"):
        differences = a["estimate"].values - b["estimate"].values
        difference = float(differences.mean())
    return {
        "difference": difference,
        "standard_error": math.hypot(standard_error_of_mean(differences), shared),
        "difference_monte_carlo_error": math.hypot(shared, *own),
        "difference_bias": float(a["bias"].mean(skipna=False)) - float(b["bias"].mean(skipna=False)),
    }


def _printable(name: str) -> str:
    """A name on one line."""
    return name if name and name.isprintable() else repr(name)
