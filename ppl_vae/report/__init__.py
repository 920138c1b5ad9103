"""The report of a story: one self-contained page that is read from top to bottom and needs no network."""

from ppl_vae.report.equations import Equation, equations
from ppl_vae.report.page import Account, page

__all__ = ["Account", "Equation", "equations", "page"]
