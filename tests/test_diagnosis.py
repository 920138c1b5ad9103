"""All diagnostics together: they are kept, resumed, and said in words that follow the numbers."""

import numpy as np
import pytest
import torch
from example_stories import GammaPoisson, images, labels, linear_gaussian, rows, small_vae

from ppl_vae import diagnostics, tables
from ppl_vae.diagnostics import diagnosis
from ppl_vae.diagnostics.findings import as_text

QUICK = ("guide", "calibration", "collapse")


def observed(story, size=60):
    with torch.no_grad():
        torch.manual_seed(3)
        return story.model(num_observations=size)


def levels(found):
    return {finding.section: finding.level for finding in diagnostics.findings(found)}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def diagnosed(widened, sections):
    story = linear_gaussian(5, 1, widened=widened)
    return diagnostics.diagnose(story, observed(story), sections=sections, progress=False)


def test_of_an_exact_guide_all_is_good(float64):
    found = diagnosed(1.0, ("evidence", "guide", "calibration", "gaps"))
    assert set(levels(found).values()) == {"good"}
    assert "exact posterior" in as_text(found)


@pytest.mark.parametrize("widened", [0.5, 2.0])
def test_a_guide_of_another_width_is_told_by_how_much(widened, float64):
    found = diagnosed(widened, ("calibration",))
    assert levels(found)["calibration"] == "warning"
    ratio = found["calibration"].attrs["largest_width_ratio"]
    assert ratio == pytest.approx(1 / widened, rel=0.15)
    assert f"to {ratio:.2f} times as wide as it says" in as_text(found)


def test_a_narrow_guide_has_an_amortization_gap_and_no_other(float64):
    found = diagnosed(0.5, ("gaps",))
    texts = {finding.text.split(" gap")[0]: finding.level for finding in diagnostics.findings(found)}
    exact_gap = -np.log(0.5) + (0.25 - 1) / 2  # KL(N(0, 0.25), N(0, 1))
    assert found["gaps"].attrs["mean_amortization_gap"] == pytest.approx(exact_gap, abs=0.02)
    assert texts == {"The amortization": "good" if exact_gap < 0.5 else "note", "The approximation": "good"}


def test_the_numbers_in_the_sentences_are_those_of_the_tables():
    found = diagnostics.diagnose(small_vae(), images(), labels=labels(), sections=(*QUICK, "atlas"), progress=False)
    said = as_text(found)
    share = float((found["guide"]["pareto_k"] > found["guide"].attrs["threshold"]).mean())
    active = int((found["collapse"]["mean_variance"] > 0.01).sum())
    assert f"fails for {share:.0%} of the observations" in said
    assert f"{active} of {found['collapse'].sizes['unit']} latent units are active" in said
    assert f"{1 - found['atlas'].attrs['share_inhabited']:.0%} of the plane's prior probability" in said


def test_what_does_not_apply_is_unavailable_with_its_reason():
    found = diagnostics.diagnose(
        GammaPoisson(), torch.arange(30.0), sections=("gaps", "atlas", "guide"), progress=False
    )
    assert list(found) == ["guide"]
    assert "normal" in found.unavailable["gaps"]
    assert "two" in found.unavailable["atlas"]


def test_unknown_sections_are_refused():
    with pytest.raises(ValueError, match=r"Unknown sections \['luck'\]; there are evidence"):
        diagnostics.diagnose(small_vae(), images(), sections=("luck",))


# On disk


def test_sections_come_back_as_they_were(tmp_path):
    story = small_vae()
    found = diagnostics.diagnose(story, images(), sections=QUICK, folder=tmp_path, progress=False)
    again = diagnosis.read(tmp_path, story)
    assert list(again) == list(found) == list(QUICK)
    assert all(again[section].equals(found[section]) for section in QUICK)
    assert as_text(again) == as_text(found)


def test_an_interrupted_diagnosis_goes_on_where_it_stopped(tmp_path, monkeypatch):
    story = small_vae()

    def interrupt(subject):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(diagnosis.SECTIONS, "calibration", interrupt)
        with pytest.raises(KeyboardInterrupt):
            diagnostics.diagnose(story, images(), sections=QUICK, folder=tmp_path, progress=False)
    assert list(diagnosis.read(tmp_path, story)) == ["guide"]
    monkeypatch.setitem(diagnosis.SECTIONS, "guide", interrupt)  # is not computed again
    found = diagnostics.diagnose(story, images(), sections=QUICK, folder=tmp_path, progress=False)
    assert list(found) == list(QUICK)


@pytest.mark.parametrize("change", ["weights", "data", "seed"])
def test_tables_of_something_else_are_computed_again(change, tmp_path):
    story, x = small_vae(), images()
    before = diagnostics.diagnose(story, x, sections=("guide",), folder=tmp_path, progress=False)["guide"]
    if change == "weights":
        with torch.no_grad():
            next(story.parameters()).add_(0.1)
    x, seed = (1 - x if change == "data" else x), int(change == "seed")
    after = diagnostics.diagnose(story, x, sections=("guide",), folder=tmp_path, seed=seed, progress=False)["guide"]
    assert not np.array_equal(before["elbo"], after["elbo"])


def test_tables_of_other_weights_or_observations_are_out_of_date(tmp_path):
    story, x = small_vae(), images()
    diagnostics.diagnose(story, x, sections=("guide",), folder=tmp_path, progress=False)
    diagnostics.diagnose(story, x[:20], sections=("collapse",), folder=tmp_path, progress=False)
    latest = diagnosis.read(tmp_path, story)
    assert list(latest) == ["collapse"]
    assert "Out of date" in latest.unavailable["guide"]
    with torch.no_grad():
        next(story.parameters()).add_(0.1)
    assert list(diagnosis.read(tmp_path, story)) == []


def test_a_table_that_does_not_say_of_what_it_is_counts_as_out_of_date(tmp_path):
    story, x = small_vae(), images()
    diagnostics.diagnose(story, x, sections=("guide",), folder=tmp_path, progress=False)
    table = tables.load(tmp_path / "guide.nc")
    del table.attrs["asked"]
    table.to_netcdf(tmp_path / "guide.nc", engine="h5netcdf")
    assert "Out of date" in diagnosis.read(tmp_path, story).unavailable["guide"]


def test_a_damaged_table_is_computed_again_and_refused_by_readers(tmp_path):
    story = small_vae()
    found = diagnostics.diagnose(story, images(), sections=("guide",), folder=tmp_path, progress=False)
    file = tmp_path / "guide.nc"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole netCDF file"):
        diagnosis.read(tmp_path, story)
    again = diagnostics.diagnose(story, images(), sections=("guide",), folder=tmp_path, progress=False)
    assert again["guide"]["elbo"].equals(found["guide"]["elbo"])
    assert tables.load(file)["elbo"].equals(found["guide"]["elbo"])


@pytest.mark.slow
def test_every_section_speaks_of_a_story_with_columns_of_numbers(float64):
    story = linear_gaussian(5, 2)
    found = diagnostics.diagnose(story, rows(), progress=False)
    assert set(found.unavailable) == {"reliability"}
    assert {finding.section for finding in diagnostics.findings(found)} >= {"coverage", "reference", "outliers"}
