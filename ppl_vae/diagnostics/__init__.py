"""Diagnostics: did variational inference work here, and where not? Each returns xarray data, which ``plots`` draws."""

from ppl_vae.diagnostics.calibration import calibration
from ppl_vae.diagnostics.collapse import collapse
from ppl_vae.diagnostics.conversion import to_arviz
from ppl_vae.diagnostics.diagnosis import Diagnosis, diagnose
from ppl_vae.diagnostics.findings import Finding, findings
from ppl_vae.diagnostics.gaps import gaps
from ppl_vae.diagnostics.guide import guide_quality
from ppl_vae.diagnostics.latent import atlas, interpolation, landscape, traversals
from ppl_vae.diagnostics.outliers import outliers
from ppl_vae.diagnostics.predictive import coverage, pixel_calibration, predictive_check
from ppl_vae.diagnostics.reference import against_guide, nuts, reference_posterior

__all__ = [
    "Diagnosis",
    "Finding",
    "against_guide",
    "atlas",
    "calibration",
    "collapse",
    "coverage",
    "diagnose",
    "findings",
    "gaps",
    "guide_quality",
    "interpolation",
    "landscape",
    "nuts",
    "outliers",
    "pixel_calibration",
    "predictive_check",
    "reference_posterior",
    "to_arviz",
    "traversals",
]
