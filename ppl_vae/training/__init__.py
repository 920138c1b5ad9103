"""Training a story by stochastic variational inference."""

from ppl_vae.training.history import History
from ppl_vae.training.loop import fit

__all__ = ["History", "fit"]
