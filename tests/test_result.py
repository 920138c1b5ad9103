"""Evidence as a result: what its summary says of a data set, its doubts, and its files."""

import csv
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from example_stories import images, small_vae

from ppl_vae import Evidence, log_evidence


def scored(estimate: Any, attrs: dict[str, Any] | None = None, **variables: Any) -> Evidence:
    """Evidence with these estimates, as ``log_evidence`` writes it; a number or word stands for all rows."""
    estimate = np.asarray(estimate, dtype=float)
    row = {
        "estimate": estimate,
        "standard_error": 0.1,
        "bias": -0.005,
        "ess": 100.0,
        "pareto_k": 0.2,
        "pilot_pareto_k": 0.1,
        "verdict": "good",
        "method": "mixture",
        "num_particles": 1000,
    }
    table = {
        name: ("observation", np.broadcast_to(np.asarray(value), estimate.shape).copy())
        for name, value in (row | variables).items()
    }
    about = {
        "unit": "nats",
        "seed": 0,
        "num_dimensions": 10,
        "method": "mixture",
        "correction": "",
        "fingerprint": "0123456789abcdef",
        "base_measure": '{"x": "counting"}',
        "tolerance": math.nan,
        "budget": 100_000,
    }
    return Evidence(xr.Dataset(table, {"observation": np.arange(len(estimate))}, about | (attrs or {})))


# The data set as a whole


def test_the_error_of_the_mean_is_that_of_a_mean_of_independent_estimates():
    summary = scored([-1, -2, -3, -6], standard_error=[0.1, 0.2, 0.2, 0.4], bias=[-0.1, -0.2, -0.3, -0.4]).summary()
    assert summary.mean == -3
    assert summary.monte_carlo_error == pytest.approx(0.5 / 4)
    assert summary.bias == pytest.approx(-0.25)
    assert summary.test_sampling_error == pytest.approx(scipy.stats.sem([-1, -2, -3, -6]))


def test_observations_that_share_their_particles_have_the_error_that_was_measured_for_their_mean():
    assert scored([-1, -2, -3], attrs={"monte_carlo_error": 0.7}).summary().monte_carlo_error == 0.7


def test_a_fair_coin_per_dimension_costs_one_bit_per_dimension():
    evidence = scored([10 * math.log(0.5), 20 * math.log(0.5)])
    np.testing.assert_allclose(evidence.bits_per_dimension, [1, 2])
    assert evidence.bits_per_dimension.attrs == {"unit": "bits per dimension"}
    assert evidence.summary().bits_per_dimension == pytest.approx(1.5)


def test_the_summary_counts_methods_and_verdicts():
    evidence = scored(
        [-1, -2, -3, -4],
        attrs={"method": "auto"},
        method=["importance", "mixture", "mixture", "annealed"],
        verdict=["poor", "good", "unresolved", "exact"],
        num_particles=[1000, 5000, 5000, 8],
    )
    summary = evidence.summary()
    assert summary.methods == {"mixture": 2, "annealed": 1, "importance": 1}
    assert list(summary.verdicts) == ["exact", "good", "poor", "unresolved"]
    assert (summary.method, summary.unresolved, summary.trusted) == ("auto", 1, 0.5)
    assert "auto, 4 observations, up to 5000 particles each" in str(evidence)
    assert "mixture 2, annealed 1, importance 1" in str(evidence)


def test_the_summary_prints_as_a_small_table():
    text = str(scored([-7, -8], standard_error=[0.3, 0.4], bias=-0.002))
    assert text.splitlines() == [
        "mixture, 2 observations, 1000 particles each",
        "  mean                     -7.500 nats  (1.0820 bits per dimension)",
        "  Monte Carlo error         0.250",
        "  Monte Carlo bias         -0.002",
        "  median ESS                100.0",
        "  test sampling error       0.500",
        "  trusted                    100%  (good 2)",
    ]


def test_evidence_without_draws_has_no_monte_carlo_error_to_print():
    evidence = scored(
        [-1, -2], method="quadrature", attrs={"method": "quadrature"}, verdict="exact", ess=np.nan, num_particles=0
    )
    assert math.isnan(evidence.summary().median_ess)
    assert "Monte Carlo" not in str(evidence) and "particles" not in str(evidence)


def test_one_observation_has_no_sampling_error():
    assert math.isnan(scored([-1]).summary().test_sampling_error)


def test_an_impossible_observation_makes_the_mean_minus_infinity_and_says_so():
    evidence = scored([-1, -np.inf], standard_error=[0.1, np.inf], bias=[0, -np.inf], verdict=["good", "poor"])
    summary = evidence.summary()
    assert summary.mean == summary.bias == -math.inf and summary.bits_per_dimension == math.inf
    assert math.isnan(summary.test_sampling_error)
    assert "every weight is zero for 1 of 2 observations" in str(evidence)


def test_an_elbo_is_called_a_lower_bound():
    text = str(scored([-1, -2], method="elbo", attrs={"method": "elbo"}, verdict="bound"))
    assert "a lower bound" in text and "trusted" not in text


def test_a_corrected_estimate_is_not_called_a_bound():
    evidence = scored([-1, -2], attrs={"correction": "jackknife-2"})
    assert "corrected by jackknife-2: not a bound" in str(evidence)
    assert evidence.summary().correction == "jackknife-2"


# Doubts


@pytest.mark.parametrize(
    ("asked", "used", "verdict", "doubt"),
    [
        (
            "importance",
            "importance",
            "poor",
            "pareto_k of the pilot exceeds 0.7 for 3 of 8 observations; their log evidence is probably too low. "
            "Use method='mixture'.",
        ),
        ("mixture", "mixture", "poor", "probably too low. Use method='annealed'."),
        ("prior", "prior", "fair", "between 0.4 and 0.7 for 3 of 8 observations; their 95 % intervals cover only"),
        ("auto", "mixture", "poor", "pareto_k of the pilot exceeds 0.7 for 3 of 8 observations"),
        ("auto", "mixture", "poor", "Raise budget."),
        ("auto", "annealed", "fair", "the annealed chains of the pilot spread too far for 3 of 8 observations"),
        ("annealed", "annealed", "poor", "Raise num_temperatures."),
        ("quadrature", "quadrature", "poor", "the finest grid has not settled for 3 of 8 observations"),
        (
            "auto",
            "annealed",
            "unresolved",
            "the tolerance of 0.05 nats within a budget of 100000 evaluations is not reached for 3 of 8 observations; "
            "raise budget or tolerance.",
        ),
    ],
)
def test_doubt_comes_with_a_number_and_a_remedy(asked, used, verdict, doubt):
    verdicts = ["good", verdict, "good", verdict, "good", verdict, "good", "good"]
    evidence = scored([-1.0] * 8, attrs={"method": asked, "tolerance": 0.05}, method=used, verdict=verdicts)
    assert doubt in str(evidence)
    assert len(evidence.summary().doubts) == 1


def test_trusted_evidence_raises_no_doubt():
    assert scored([-1, -2, -3], verdict=["good", "exact", "good"]).summary().doubts == ()


def test_flagged_observations_keep_their_numbers():
    evidence = scored([-1] * 5, verdict=["poor", "good", "unresolved", "fair", "exact"])
    later = Evidence(evidence.dataset.isel(observation=slice(1, None)))
    assert evidence.flagged.tolist() == [0, 2, 3] and later.flagged.tolist() == [2, 3]
    assert evidence.unresolved.tolist() == later.unresolved.tolist() == [2]


# Files


def types(evidence: Evidence) -> dict[str, Any]:
    attrs: dict[str, Any] = {name: type(value) for name, value in evidence.dataset.attrs.items()}
    return attrs | {str(name): array.dtype for name, array in evidence.dataset.variables.items()}


@pytest.mark.parametrize(
    "evidence",
    [
        scored([-1.5, -np.inf, 1 / 3], verdict=["exact", "poor", "unresolved"], pareto_k=[-np.inf, np.inf, np.nan]),
        scored([-1]),
        scored([-1, -2], attrs={"monte_carlo_error": 0.1, "base_measure": '{"ä\\n": "Lebesgue"}', "seed": 2**64 - 1}),
        Evidence(scored(range(9), verdict="good").dataset.isel(observation=[7, 3])),
    ],
    ids=["infinite", "one", "attributes", "selected"],
)
def test_evidence_comes_back_from_netcdf_as_it_was(evidence, tmp_path):
    evidence.save(tmp_path / "evidence.nc")
    loaded = Evidence.load(tmp_path / "evidence.nc")
    xr.testing.assert_identical(loaded.dataset, evidence.dataset)
    assert types(loaded) == types(evidence)
    assert str(loaded) == str(evidence)


def test_what_log_evidence_returns_can_be_saved_and_loaded(tmp_path):
    evidence = log_evidence(small_vae(), images(5), method="importance", num_particles=20)
    evidence.save(str(tmp_path / "evidence.nc"))
    xr.testing.assert_identical(Evidence.load(str(tmp_path / "evidence.nc")).dataset, evidence.dataset)


def test_loaded_evidence_can_be_saved_again(tmp_path):
    scored([-1, -2]).save(tmp_path / "a.nc")
    Evidence.load(tmp_path / "a.nc").save(tmp_path / "b.nc")
    xr.testing.assert_identical(Evidence.load(tmp_path / "b.nc").dataset, scored([-1, -2]).dataset)


def test_a_csv_has_a_line_per_observation_and_every_digit(tmp_path):
    scored([-1 / 3, -np.inf], pareto_k=[np.nan, 0.5], verdict=["good", "poor"]).save(tmp_path / "evidence.csv")
    with (tmp_path / "evidence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["observation"] for row in rows] == ["0", "1"]
    assert [float(row["estimate"]) for row in rows] == [-1 / 3, -math.inf]
    assert (rows[0]["pareto_k"], rows[0]["verdict"], rows[1]["verdict"]) == ("nan", "good", "poor")


@pytest.mark.parametrize("name", ["evidence", "evidence.json", "evidence.nc.gz", "evidence.pkl"])
def test_another_suffix_is_refused_with_the_two_choices(name, tmp_path):
    with pytest.raises(ValueError, match=r"\.nc .* or \.csv"):
        scored([-1]).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nc", ".csv"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"evidence{suffix}"
    scored([-1]).save(path)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        scored([-2]).save(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no evidence '.*nothing\.nc'"):
        Evidence.load(tmp_path / "nothing.nc")


def test_a_csv_is_not_loaded(tmp_path):
    scored([-1]).save(tmp_path / "evidence.csv")
    with pytest.raises(ValueError, match=r"Save evidence as \.nc"):
        Evidence.load(tmp_path / "evidence.csv")


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "evidence.nc"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="not a whole netCDF file"):
        Evidence.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_part_of_a_file_is_refused(tmp_path):
    path = tmp_path / "evidence.nc"
    scored([-1, -2]).save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole netCDF file"):
            Evidence.load(path)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda table: table.drop_vars(["verdict", "ess"]), "it has no ess, verdict over observation"),
        (lambda table: table.rename(observation="row"), "it has no estimate, standard_error"),
        (lambda table: table.drop_attrs(), "its attribute num_dimensions is None"),
        (lambda table: table.assign(num_particles=table["num_particles"] * float("inf")), "num_particles are no whole"),
        (lambda table: table.assign_attrs(num_dimensions=0), "its attribute num_dimensions is 0"),
        (lambda table: table.assign_attrs(num_dimensions="ten"), "its attribute num_dimensions is 'ten'"),
    ],
)
def test_a_netcdf_file_of_something_else_is_refused(change, missing, tmp_path):
    path = tmp_path / "other.nc"
    change(scored([-1, -2]).dataset).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=re.escape(missing)):
        Evidence.load(path)
