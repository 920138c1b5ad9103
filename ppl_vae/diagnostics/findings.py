"""What the diagnostics say, in words: what is as it should be, what is not, and what to try."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from ppl_vae.capture import first_line
from ppl_vae.diagnostics.diagnosis import Diagnosis
from ppl_vae.evidence import Evidence

Level = Literal["good", "note", "warning"]

# From the first number on an effect is worth a look, from the second on it is wrong.
SHARE = (0.05, 0.25)  # of observations, units or cells
GAP = (0.5, 2.0)  # nats
EFFECT = (0.15, 0.4)  # posterior standard deviations, or a ratio's distance from 1
ACCURACY = (0.55, 0.7)  # of a classifier between two samples
RELIABILITY = (0.02, 0.1)  # probability
SDS = (0.1, 0.5)  # standard deviations over observations, between what is observed and what is replicated
MOST_DOUBTFUL = 0.25

RICHER_GUIDE = "Train longer, or give the guide a richer family (full-normal, inverse-autoregressive)."


@dataclass(frozen=True)
class Finding:
    """A sentence about a section, how bad it is, and what to try.

    Attributes:
        level: "good" (as it should be), "note" (worth a look), "warning" (wrong).
    """

    section: str
    level: Level
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.section}: {self.text} {self.advice}".rstrip()


# Level, sentence, advice.
Said = tuple[Level, str, str]


def findings(diagnosis: Diagnosis) -> list[Finding]:
    """What a diagnosis says, section by section; ValueError where a table is not one of :func:`diagnose`."""
    return [
        Finding(section, level, text, "" if level == "good" else advice)
        for section, table in diagnosis.items()
        if section in SENTENCES
        for level, text, advice in _said(section, table)
    ]


def _said(section: str, table: xr.Dataset) -> list[Said]:
    with of_diagnosis(section):
        return SENTENCES[section](table)


@contextmanager
def of_diagnosis(section: str) -> Iterator[None]:
    """Inside, whatever a table lacks is a ValueError that names its section: somebody else wrote it."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"The table of {section!r} is not what diagnose writes: {first_line(error)}") from error


def _level(value: float, bounds: tuple[float, float]) -> Level:
    if value < bounds[0]:
        return "good"
    return "note" if value < bounds[1] else "warning"


def _worse(*levels: Level) -> Level:
    return max(levels, key=("good", "note", "warning").index)


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def _evidence(table: xr.Dataset) -> list[Said]:
    summary = Evidence(table).summary()
    said = (
        f"log p(x) is {summary.mean:.2f} nats on average (Monte Carlo error {summary.monte_carlo_error:.3f}, test "
        f"sampling error {summary.test_sampling_error:.2f}). {summary.trusted:.0%} of the estimates can be trusted one "
        "by one."
    )
    return [(_level(1 - summary.trusted, SHARE), said, " ".join(summary.doubts))]


def _guide(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    share, number = about["share_above_threshold"], about["num_particles"]
    if about["num_exact"] == table.sizes["observation"]:
        return [("good", "The guide is the exact posterior of every observation: its weights are constant.", "")]
    said = (
        f"As a proposal the guide fails for {share:.0%} of the observations: k-hat is above {about['threshold']:.2f}, "
        f"more than {number} draws allow. The median effective sample size is {about['median_ess']:.0f} of {number}."
    )
    advice = f"Importance sampling with this guide gives too low a log p(x) there; use the mixture. {RICHER_GUIDE}"
    return [(_level(share, SHARE), said, advice)]


def _calibration(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    of_story = f"on {about['num_observations']} observations that the story made"
    if about["num_failed"] == 0:
        said = (
            f"The guide is calibrated {of_story}: none of {about['num_quantities']} quantities leaves its band, as "
            f"happens to an exact guide in {1 - about['family_wise_error']:.0%} of all cases."
        )
        return [("good", said, "")]
    said = (
        f"{about['num_failed']} of {about['num_quantities']} quantities are not calibrated {of_story}, "
        f"{about['worst_quantity']} the least ({_p(about['smallest_p_value'])}). Expected coverage is off by up to "
        f"{about['largest_coverage_gap']:.1%}."
    )
    level: Level = "warning"
    if "largest_shift" in about:
        shift, ratio = about["largest_shift"], about["largest_width_ratio"]
        level = _worse("note", _level(max(abs(shift), ratio - 1, 1 - about["smallest_width_ratio"]), EFFECT))
        said += (
            f" By how much: the guide is shifted by up to {shift:+.2f} of its standard deviations "
            f"({about['largest_shift_quantity']}), and its errors are {about['smallest_width_ratio']:.2f} to "
            f"{ratio:.2f} times as wide as it says."
        )
    return [(level, said, f"Do not read the guide's intervals as posterior intervals. {RICHER_GUIDE}")]


def _collapse(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    units, active = about["num_units"], about["num_active"]
    idle = units - active
    used = f"{active} of {units} latent units are active; the KL is {about['kl']:.2f} nats"
    information = f"{about['mutual_information']:.2f} +- {about['mutual_information_error']:.2f}"
    if about["information_is_capped"]:
        used += (
            f". Of the information in z only {about['mutual_information_cap']:.2f} nats can show in so few "
            "observations, and they do: how far the aggregate posterior is from the prior takes more of them to tell."
        )
    else:
        used += (
            f", of which {information} tell observations apart (at most {about['mutual_information_cap']:.2f} can) and "
            f"{about['marginal_kl']:.2f} +- {about['marginal_kl_error']:.2f} are the distance of the aggregate "
            "posterior from the prior."
        )
    advice = (
        "Idle units cost nothing and say nothing: fewer dimensions would do, unless training stopped them early (try "
        "KL warm-up or free bits)."
    )
    level: Level = "good" if not idle else "note" if active else "warning"
    return [(level, used, advice), _aggregate(table)]


def _aggregate(table: xr.Dataset) -> Said:
    about = table.attrs
    said = (
        f"A classifier tells draws of the aggregate posterior from draws of the prior in "
        f"{about['classifier_accuracy']:.0%} of all cases ({_p(about['classifier_p_value'])}; 50 % is chance); the "
        f"margin that differs most is {about['worst_marginal']} (Kolmogorov-Smirnov distance "
        f"{about['worst_marginal_ks']:.2f}, {_p(about['worst_marginal_p_value'])})."
    )
    advice = (
        "New observations come from places that no data taught the decoder. Try a learned prior (vamp, mixture, flow)."
    )
    return _level(about["classifier_accuracy"], ACCURACY), said, advice


def _gaps(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    parts = {
        "amortization": "The encoder does less than its family could: train longer, widen it, or, where it is small "
        "on training data, give it more of these.",
        "approximation": "The family of the guide is too small for these posteriors: try full-normal or a flow.",
    }
    return [
        (
            _level(about[f"mean_{name}_gap"], GAP),
            f"The {name} gap is {about[f'mean_{name}_gap']:.2f} +- {about[f'mean_{name}_gap_error']:.2f} nats.",
            advice,
        )
        for name, advice in parts.items()
    ]


def _reference(table: xr.Dataset) -> list[Said]:
    about, size = table.attrs, table.sizes["observation"]
    if about["share_trusted"] == 0:
        return [("note", f"The Markov chains of {size} observations have not converged.", "Draw longer chains.")]
    trusted = table.isel(observation=table["trusted"].values == 1)
    shift = float(np.abs(trusted["mean_shift"].values).max(1).mean())
    off = np.abs(np.log(trusted["sd_ratio"].values))
    ratio = float(np.exp(np.log(np.take_along_axis(trusted["sd_ratio"].values, off.argmax(1)[:, None], 1)).mean()))
    said = (
        f"Against Markov chains for {size} observations ({about['share_trusted']:.0%} converged): in the coordinate "
        f"where it is worst, the guide's mean is {shift:.2f} posterior standard deviations away and its width "
        f"{ratio:.2f} times the posterior's, on average over observations (noise alone makes about "
        f"{_noise(trusted):.2f})."
    )
    return [(_level(max(shift, abs(math.log(ratio))) - _noise(trusted), EFFECT), said, RICHER_GUIDE)]


def _noise(table: xr.Dataset) -> float:
    """How large the largest shift of K coordinates is where there is none: of normal errors of this size."""
    error, size = float(table["mean_shift_error"].mean()), table.sizes["coordinate"]
    return error * math.sqrt(2 * math.log(2 * size))


def _predictive(table: xr.Dataset) -> list[Said]:
    group = table.attrs["group"]
    sizes = np.nan_to_num(np.abs(table["standardized_difference"].values))
    worst = table.isel(statistic=int(sizes.argmax()))
    said = (
        f"Of {table.sizes['statistic']} statistics of the data, {worst['statistic'].item()!r} differs most from what "
        f"the {group} predictive makes: {float(worst['observed']):.4g} observed against "
        f"{float(worst['replicated'].mean()):.4g}, {float(worst['standardized_difference']):+.2f} standard deviations "
        f"of single observations ({_p(float(worst['p_value']))})."
    )
    advice = "Something that the data do, the story does not: look at the panel, and choose the likelihood by it."
    return [(_level(float(sizes.max()), SDS), said, advice)]


def _reliability(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    error = about["expected_calibration_error"]
    said = (
        f"Predicted probabilities of single numbers are off by {error:.3f} on average (expected calibration error; "
        f"noise alone makes {about['noise_floor']:.3f})."
    )
    return [(_level(error - about["noise_floor"], RELIABILITY), said, "The decoder is too sure, or not sure enough.")]


def _coverage(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    wide = "wide" if about["mean_deviation"] > 0 else "narrow"
    said = (
        f"Predictive intervals hold what they promise to within {about['calibration_error']:.3f} on average (noise "
        f"alone makes {about['noise_floor']:.3f}); {about['num_features_off']} of {about['num_features']} single "
        "numbers do not."
    )
    advice = f"Intervals are too {wide}: learn the scale, or make it a function of z."
    return [(_level(about["calibration_error"] - about["noise_floor"], RELIABILITY), said, advice)]


def _outliers(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    said = (
        f"{about['num_unlikely']} of {about['num_observations']} observations are less likely than what the story "
        f"makes, {about['num_too_likely']} are suspiciously likely (false discovery rate "
        f"{about['false_discovery_rate']:.0%}). On average log p(x) of the data lies {about['mean_distance']:+.2f} "
        f"standard deviations from that of simulated observations (Kolmogorov-Smirnov distance "
        f"{about['ks_distance']:.2f})."
    )
    if about["num_simulated_doubtful"] > MOST_DOUBTFUL * about["num_simulated"]:
        said += f" {about['num_simulated_doubtful']} of {about['num_simulated']} simulated ones are estimated badly."
    if about["num_flagged_doubtful"]:
        said += f" {about['num_flagged_doubtful']} of the flagged have an estimate that is itself in doubt."
    return [(_level(about["share_flagged"], SHARE), said, "Look at them: errors in the data, or a kind that it lacks.")]


def _atlas(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    empty = 1 - about["share_inhabited"]
    enough = about["num_observations"] >= about["size"] ** 2  # few observations leave most of any plane empty
    said: list[Said] = [
        (
            _level(empty, SHARE) if enough else "good",
            f"{empty:.0%} of the plane's prior probability is deserted: the aggregate posterior hardly reaches there.",
            "New observations drawn from there look like none of the data. Try a learned prior.",
        )
    ]
    if "share_ambiguous" in about:
        text = (
            f"In {about['share_ambiguous']:.0%} of the inhabited plane the label is open by more than half a bit; "
            f"{' and '.join(map(str, np.ravel(about['most_confused'])))} are mixed up most."
        )
        said.append((_level(about["share_ambiguous"], (0.25, 0.6)), text, "More latent dimensions keep kinds apart."))
    return said


def _landscape(table: xr.Dataset) -> list[Said]:
    about = table.attrs
    said = (
        f"Of observation {about['observation']} the guide misses the posterior by {about['kl']:.2f} nats; they share "
        f"{1 - about['total_variation']:.0%} of their mass."
    )
    return [(_level(about["kl"], GAP), said, RICHER_GUIDE)]


SENTENCES: dict[str, Callable[[xr.Dataset], list[Said]]] = {
    "evidence": _evidence,
    "guide": _guide,
    "calibration": _calibration,
    "collapse": _collapse,
    "gaps": _gaps,
    "reference": _reference,
    "predictive": _predictive,
    "prior-predictive": _predictive,
    "reliability": _reliability,
    "coverage": _coverage,
    "outliers": _outliers,
    "atlas": _atlas,
    "landscape": _landscape,
}

MARKS: dict[Level, str] = {"good": "ok", "note": "look", "warning": "WRONG"}


def as_text(diagnosis: Diagnosis) -> str:
    """What a diagnosis says, a line or two for each finding, and which sections do not apply."""
    lines = [f"{MARKS[finding.level]:5}  {finding}" for finding in findings(diagnosis)]
    lines += [f"-      {section}: {why}" for section, why in diagnosis.unavailable.items()]
    return "\n".join(lines)
