"""Further stories, each a readable file to start from."""

from ppl_vae.stories.components import responsibilities
from ppl_vae.stories.conditional import ConditionalVAE
from ppl_vae.stories.denoising import DenoisingVAE
from ppl_vae.stories.hierarchical import HierarchicalVAE
from ppl_vae.stories.missing import MissingValuesVAE
from ppl_vae.stories.mixture import MixtureVAE
from ppl_vae.stories.per_class import PerClassVAE
from ppl_vae.stories.semi_supervised import SemiSupervisedVAE

__all__ = [
    "ConditionalVAE",
    "DenoisingVAE",
    "HierarchicalVAE",
    "MissingValuesVAE",
    "MixtureVAE",
    "PerClassVAE",
    "SemiSupervisedVAE",
    "responsibilities",
]
