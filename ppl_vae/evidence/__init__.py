"""log p(x), one value per observation: estimators, what they are worth, and results."""

from ppl_vae.evidence.estimators import log_evidence
from ppl_vae.evidence.result import Evidence, EvidenceSummary

__all__ = ["Evidence", "EvidenceSummary", "log_evidence"]
