"""Variational autoencoders told as Pyro programs, with log p(x) you can believe."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_vae import (
        checks,
        configuration,
        data,
        diagnostics,
        evidence,
        likelihoods,
        networks,
        noise,
        objectives,
        plots,
        posteriors,
        priors,
        report,
        stories,
        traces,
        training,
    )
    from ppl_vae.checkpoint import load, save
    from ppl_vae.checks import check
    from ppl_vae.diagnostics.conversion import to_arviz
    from ppl_vae.evidence import Evidence, compare, evidence_bounds, log_evidence
    from ppl_vae.training import History, fit
    from ppl_vae.vae import VAE

__version__ = "0.1.0"

# Where each name lives. Importing the package costs nothing; a name is imported when it is first asked for.
_HOME = {
    "VAE": "vae",
    "Evidence": "evidence",
    "History": "training",
    "check": "checks",
    "compare": "evidence",
    "evidence_bounds": "evidence",
    "fit": "training",
    "load": "checkpoint",
    "log_evidence": "evidence",
    "save": "checkpoint",
    "to_arviz": "diagnostics.conversion",
}
_MODULES = [
    "checks",
    "configuration",
    "data",
    "diagnostics",
    "evidence",
    "likelihoods",
    "networks",
    "noise",
    "objectives",
    "plots",
    "posteriors",
    "priors",
    "report",
    "stories",
    "traces",
    "training",
]

__all__ = [
    "VAE",
    "Evidence",
    "History",
    "check",
    "checks",
    "compare",
    "configuration",
    "data",
    "diagnostics",
    "evidence",
    "evidence_bounds",
    "fit",
    "likelihoods",
    "load",
    "log_evidence",
    "networks",
    "noise",
    "objectives",
    "plots",
    "posteriors",
    "priors",
    "report",
    "save",
    "stories",
    "to_arviz",
    "traces",
    "training",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"ppl_vae.{name}")
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ppl_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
