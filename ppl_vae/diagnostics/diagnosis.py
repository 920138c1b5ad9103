"""All diagnostics of a story in one call; each is kept as soon as it is there, so that an interruption loses one."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

import ppl_vae
from ppl_vae import checkpoint, checks, tables, traces
from ppl_vae.diagnostics.calibration import calibration
from ppl_vae.diagnostics.collapse import collapse
from ppl_vae.diagnostics.gaps import gaps
from ppl_vae.diagnostics.guide import guide_quality
from ppl_vae.diagnostics.latent import atlas, landscape, traversals
from ppl_vae.diagnostics.outliers import outliers
from ppl_vae.diagnostics.predictive import coverage, pixel_calibration, predictive_check
from ppl_vae.diagnostics.reference import against_guide, reference_posterior
from ppl_vae.evidence import Evidence, log_evidence
from ppl_vae.evidence.estimators import fingerprint
from ppl_vae.ranks import Ranks, apart, here
from ppl_vae.traces import Columns, Story

# What costs gradients is computed for some observations only, spread evenly over all.
GAPS_OBSERVATIONS = 64
REFERENCE_OBSERVATIONS, REFERENCE_DRAWS = 16, 1000
CALIBRATION_OBSERVATIONS = 1000

# Why a section is missing, in the attributes of an empty table.
UNAVAILABLE = "unavailable"
OUT_OF_DATE = "Out of date: computed for other weights or observations. Diagnose again."

Section = Callable[["Subject"], xr.Dataset]


@dataclass(frozen=True)
class Subject:
    """What is diagnosed, and the noise that it is diagnosed with."""

    story: Story
    columns: Columns
    labels: Tensor | None = None
    seed: int = 0
    progress: bool | None = None
    evidence: Evidence | None = None

    @property
    def size(self) -> int:
        """The number of observations, N."""
        return len(self.columns[0])

    def some(self, number: int) -> tuple[np.ndarray, Columns]:
        """The numbers of at most so many observations, spread evenly, and their columns."""
        numbers = np.unique(np.linspace(0, self.size - 1, min(number, self.size)).round().astype(int))
        return numbers, tuple(column[torch.from_numpy(numbers)] for column in self.columns)


def _on_all(diagnostic: Callable[..., xr.Dataset], **options: Any) -> Section:
    """A diagnostic of all observations."""

    def section(subject: Subject) -> xr.Dataset:
        return diagnostic(subject.story, *subject.columns, seed=subject.seed, progress=subject.progress, **options)

    return section


def _on_some(diagnostic: Callable[..., xr.Dataset], number: int) -> Section:
    """A diagnostic of some observations, which keep their numbers."""

    def section(subject: Subject) -> xr.Dataset:
        numbers, columns = subject.some(number)
        found = diagnostic(subject.story, *columns, seed=subject.seed, progress=subject.progress)
        return found.assign_coords(observation=numbers)

    return section


def _evidence(subject: Subject) -> xr.Dataset:
    known = subject.evidence or log_evidence(
        subject.story, *subject.columns, seed=subject.seed, progress=subject.progress
    )
    return known.dataset


def _reference(story: Story, *columns: Tensor, seed: int, progress: bool | None) -> xr.Dataset:
    reference = reference_posterior(story, *columns, num_draws=REFERENCE_DRAWS, seed=seed, progress=progress)
    return against_guide(reference, story, *columns, seed=seed)


def _outliers(subject: Subject) -> xr.Dataset:
    return _on_all(outliers, evidence=subject.evidence)(subject)


def _atlas(subject: Subject) -> xr.Dataset:
    return atlas(subject.story, *subject.columns, labels=subject.labels, seed=subject.seed)


def _landscape(subject: Subject) -> xr.Dataset:
    return landscape(subject.story, *subject.columns)


def _traversals(subject: Subject) -> xr.Dataset:
    return traversals(subject.story, *subject.columns)


# In the order in which a report is read.
SECTIONS: dict[str, Section] = {
    "evidence": _evidence,
    "guide": _on_all(guide_quality),
    "calibration": _on_all(calibration, num_observations=CALIBRATION_OBSERVATIONS),
    "collapse": _on_all(collapse),
    "gaps": _on_some(gaps, GAPS_OBSERVATIONS),
    "reference": _on_some(_reference, REFERENCE_OBSERVATIONS),
    "predictive": _on_all(predictive_check),
    "prior-predictive": _on_all(predictive_check, group="prior"),
    "reliability": _on_all(pixel_calibration),
    "coverage": _on_all(coverage),
    "outliers": _outliers,
    "atlas": _atlas,
    "landscape": _landscape,
    "traversals": _traversals,
}


@dataclass(frozen=True)
class Diagnosis(Mapping[str, xr.Dataset]):
    """The tables of the diagnostics that apply to a story, by section, in the order in which a report is read.

    Attributes:
        tables: a table for each section.
        unavailable: sections that do not apply, and why.
    """

    tables: dict[str, xr.Dataset]
    unavailable: dict[str, str]

    def __getitem__(self, section: str) -> xr.Dataset:
        return self.tables[section]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)


def diagnose(
    story: Story,
    *columns: Tensor,
    labels: Tensor | None = None,
    evidence: Evidence | None = None,
    sections: Sequence[str] = tuple(SECTIONS),
    folder: Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Diagnosis:
    """Runs the diagnostics of a story that apply to it.

    Gaps are measured on 64 observations and compared with Markov chains on 16, spread evenly; calibration on 1,000
    that the story makes; all else on all observations. Under ``torchrun`` every process calls this with the same
    arguments: they share out the observations of the evidence, and the other sections, and each ends with all.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: held-out observations and their conditions, as for ``log_evidence``.
        labels: classes of the observations, shape ``(N,)``, for the atlas; the story need not know them.
        evidence: of these observations, if it is known already.
        sections: which diagnostics, by name: the keys of ``SECTIONS``.
        folder: where each table is written as soon as it is there, as ``<section>.nc``. Tables that are there already,
            of the same story, data, seed and version, are read instead of computed.
        seed: the noise is a function of it.
        progress: show bars; None means when standard error is a terminal.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        ValueError: for an unknown section, or when the story or the data are not what :func:`ppl_vae.check` expects.
        OSError: when a table cannot be written.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(3),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(3, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 6)),
    ... )
    >>> diagnosis = diagnose(vae, torch.ones(10, 5), sections=["guide"])
    >>> list(diagnosis)
    ['guide']
    """
    if unknown := set(sections) - set(SECTIONS):
        raise ValueError(f"Unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}.")
    checks.dry_run(story, *columns)
    subject = Subject(story, columns, labels, seed, progress, evidence)
    ranks, wanted = here(), [section for section in SECTIONS if section in sections]
    desk = _Desk(folder, _asked(subject), checkpoint.fingerprint(story.state_dict().values()))
    ranks.refuse_different("diagnose", f"{desk.asked} {wanted}")
    found = {section: table for section in wanted if (table := desk.known(section)) is not None}
    ranks.wait()  # until all have looked, nobody writes
    if "evidence" in wanted and "evidence" not in found:
        found["evidence"] = desk.table("evidence", subject, writes=ranks.is_first)
    if "evidence" in found and UNAVAILABLE not in found["evidence"].attrs:
        subject = replace(subject, evidence=Evidence(found["evidence"]))
    rest = ranks.mine([section for section in wanted if section not in found])
    hidden = not ranks.is_first or (None if progress is None else not progress)
    with apart():
        own = {
            section: desk.table(section, subject)
            for section in tqdm(rest, desc="diagnosis", unit="section", disable=hidden)
        }
    found |= own | _of_others(ranks, own)
    return _sorted_out({section: found[section] for section in wanted})


@dataclass(frozen=True)
class _Desk:
    """Where tables of a story with some weights, asked for in the same way, are kept."""

    folder: Path | None
    asked: str
    weights: str

    def known(self, section: str) -> xr.Dataset | None:
        """A table that is there already, and was asked for in the same way."""
        file = None if self.folder is None else self.folder / f"{section}.nc"
        if file is None or not file.exists():
            return None
        try:
            table = tables.load(file)
        except ValueError:
            return None
        return table if table.attrs.get("asked") == self.asked else None

    def table(self, section: str, subject: Subject, writes: bool = True) -> xr.Dataset:
        """Computes a section, and keeps it."""
        about = {"asked": self.asked, "weights": self.weights, "num_diagnosed": subject.size}
        table = _computed(section, subject).assign_attrs(about)
        if self.folder is not None and writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            tables.save(table, self.folder / f"{section}.nc")
        return table


def _of_others(ranks: Ranks, own: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """The tables that other processes computed, for those that this one did."""
    if ranks.size == 1:
        return {}
    content = safetensors.torch.save(
        {
            section: torch.frombuffer(bytearray(tables.to_bytes(table)), dtype=torch.uint8)
            for section, table in own.items()
        }
    )
    handed_in = [part for number, part in enumerate(ranks.gather(content)) if number != ranks.number]
    return {
        section: tables.from_bytes(packed.numpy().tobytes())
        for part in handed_in
        for section, packed in safetensors.torch.load(part).items()
    }


def read(folder: Path, story: Story) -> Diagnosis:
    """The tables that :func:`diagnose` left of a story in a folder; those of a run that was interrupted, too.

    A table of other weights, or of other observations than the latest, is out of date: it counts as unavailable.

    Raises:
        ValueError: when a table is damaged.
    """
    files = {section: file for section in SECTIONS if (file := folder / f"{section}.nc").exists()}
    found = {section: tables.load(file) for section, file in files.items()}
    weights = checkpoint.fingerprint(story.state_dict().values())
    current = [section for section, table in found.items() if table.attrs.get("weights") == weights]
    latest = max(current, key=lambda section: files[section].stat().st_mtime_ns, default=None)
    for section, table in found.items():
        asked = None if latest is None else found[latest].attrs.get("asked")
        if asked is None or table.attrs.get("asked") != asked or section not in current:
            found[section] = xr.Dataset(attrs={UNAVAILABLE: OUT_OF_DATE})
    return _sorted_out(found)


def _computed(section: str, subject: Subject) -> xr.Dataset:
    """The table of a section; where it does not apply, an empty one that says why."""
    started = time.perf_counter()
    try:
        table = SECTIONS[section](subject)
    except (ValueError, NotImplementedError) as error:
        table = xr.Dataset(attrs={UNAVAILABLE: str(error)})
    return table.assign_attrs(seconds=round(time.perf_counter() - started, 2))


def _asked(subject: Subject) -> str:
    """A hash of the story's weights, the data, the seed and the version."""
    with traces.scoring(subject.story):
        data = fingerprint(subject.story, subject.columns)
    tensors = [*subject.story.state_dict().values(), *([] if subject.labels is None else [subject.labels])]
    words = f"{ppl_vae.__version__} {subject.seed} {data} {checkpoint.fingerprint(tensors)}"
    return hashlib.sha256(words.encode()).hexdigest()


def _sorted_out(found: dict[str, xr.Dataset]) -> Diagnosis:
    unavailable = {section: table.attrs[UNAVAILABLE] for section, table in found.items() if UNAVAILABLE in table.attrs}
    return Diagnosis({section: table for section, table in found.items() if section not in unavailable}, unavailable)
