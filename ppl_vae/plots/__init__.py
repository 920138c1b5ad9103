"""Pictures of stories and results. Every function returns a matplotlib ``Figure``; nothing is shown or written here."""

from ppl_vae.plots.calibration import calibration
from ppl_vae.plots.collapse import collapse
from ppl_vae.plots.gaps import gaps
from ppl_vae.plots.guide import guide_quality, worst_observations
from ppl_vae.plots.images import are_images, image_panels, reconstructions, samples, tile
from ppl_vae.plots.latent import atlas, entropy_map, interpolation, landscape, latent_atlas, traversals
from ppl_vae.plots.outliers import outliers
from ppl_vae.plots.predictive import coverage, pixel_calibration, predictive_check
from ppl_vae.plots.reference import guide_against_reference, posterior_pair, reference_convergence
from ppl_vae.plots.results import comparison, convergence, evidence, learning_curve

__all__ = [
    "are_images",
    "atlas",
    "calibration",
    "collapse",
    "comparison",
    "convergence",
    "coverage",
    "entropy_map",
    "evidence",
    "gaps",
    "guide_against_reference",
    "guide_quality",
    "image_panels",
    "interpolation",
    "landscape",
    "latent_atlas",
    "learning_curve",
    "outliers",
    "pixel_calibration",
    "posterior_pair",
    "predictive_check",
    "reconstructions",
    "reference_convergence",
    "samples",
    "tile",
    "traversals",
    "worst_observations",
]
