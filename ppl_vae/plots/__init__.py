"""Pictures of stories and results. Every function returns a matplotlib ``Figure``; nothing is shown or written here."""

from ppl_vae.plots.images import are_images, center, image_panels, reconstructions, samples, tile
from ppl_vae.plots.latent import latent_atlas
from ppl_vae.plots.results import comparison, convergence, learning_curve

__all__ = [
    "are_images",
    "center",
    "comparison",
    "convergence",
    "image_panels",
    "latent_atlas",
    "learning_curve",
    "reconstructions",
    "samples",
    "tile",
]
