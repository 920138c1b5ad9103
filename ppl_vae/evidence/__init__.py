"""log p(x), one value per observation: estimators, what they are worth, bounds, and comparisons of stories."""

from ppl_vae.evidence.annealing import Annealed
from ppl_vae.evidence.bounds import EvidenceBounds, evidence_bounds
from ppl_vae.evidence.comparison import Comparison, compare
from ppl_vae.evidence.convergence import convergence
from ppl_vae.evidence.estimators import log_evidence
from ppl_vae.evidence.proposals import Importance, Laplace, Mixture
from ppl_vae.evidence.result import Evidence, EvidenceSummary

__all__ = [
    "Annealed",
    "Comparison",
    "Evidence",
    "EvidenceBounds",
    "EvidenceSummary",
    "Importance",
    "Laplace",
    "Mixture",
    "compare",
    "convergence",
    "evidence_bounds",
    "log_evidence",
]
