"""Further stories, each a readable file to start from."""

from ppl_vae.stories.conditional import ConditionalVAE

__all__ = ["ConditionalVAE"]
