"""The page: what is known of a story and its run, put in order, with pictures and sentences, and written as HTML."""

import base64
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata, resources
from typing import Any

import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ppl_vae import plots
from ppl_vae.diagnostics import Diagnosis, Finding, findings
from ppl_vae.diagnostics.findings import of_diagnosis
from ppl_vae.evidence import Evidence
from ppl_vae.report.equations import Equation, equations
from ppl_vae.report.living_atlas import living_atlas
from ppl_vae.traces import Columns, Story
from ppl_vae.training import History

DPI = 100
PACKAGES = ("ppl-vae", "torch", "pyro-ppl", "arviz", "xarray", "numpy")
LEVELS = {"good": "As it should be", "note": "Worth a look", "warning": "Wrong", "": "Not judged"}


@dataclass(frozen=True)
class Account:
    """What a report tells of.

    Attributes:
        title: of the page.
        story: an ``nn.Module`` with ``model`` and ``guide``.
        columns: the observations that were diagnosed, and their conditions.
        diagnosis: from :func:`ppl_vae.diagnostics.diagnose`; it may be empty.
        history: of the training, if it is known.
        label_names: what the labels are called; a number that is not here is called by itself.
        data: facts about the data, in words.
        training: facts about the training, in words.
        versions: of packages at the time of the training, in words; those of now are added.
        commands: that repeat all of it.
    """

    title: str
    story: Story
    columns: Columns
    diagnosis: Diagnosis
    history: History | None = None
    label_names: Mapping[int, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture, as the base64 of a PNG."""

    png: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: by which links find it.
        level: the worst of its findings: "good", "note", "warning", or "" where nothing is judged.
        missing: why there is nothing.
        atlas: the data of the living atlas.
    """

    name: str
    title: str
    question: str = ""
    findings: Sequence[Finding] = ()
    figures: Sequence[Picture] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    equations: Sequence[tuple[str, Sequence[Equation]]] = ()
    missing: str = ""
    atlas: Mapping[str, Any] | None = None
    commands: Sequence[str] = ()

    @property
    def level(self) -> str:
        found = [finding.level for finding in self.findings]
        return next((level for level in ("warning", "note", "good") if level in found), "")


def page(account: Account) -> str:
    """The report, as HTML."""
    sections = [
        _story(account),
        _data(account),
        _training(account),
        *(_diagnosed(account, name) for name in QUESTIONS),
        _versions(account),
    ]
    found = [finding for section in sections for finding in section.findings]
    environment = Environment(
        loader=PackageLoader("ppl_vae", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=account.title,
        lead=f"{len(account.columns[0])} held-out observations; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        sections=sections,
        findings=sorted(found, key=lambda finding: list(LEVELS).index(finding.level), reverse=True),
        words=LEVELS,
        style=_own("style.css"),
        atlas_script=_own("atlas.js"),
    )


def _own(name: str) -> Markup:
    """A file of this package, which needs no escaping."""
    content = resources.files("ppl_vae.report").joinpath(name).read_text(encoding="utf-8")
    return Markup(content)  # noqa: S704 (the package's own)


def picture(figure: Figure, caption: str) -> Picture:
    """A figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return Picture(base64.b64encode(file.getvalue()).decode(), caption)


# Sections, from the top to the bottom


def _story(account: Account) -> Section:
    model, guide = equations(account.story, *account.columns)
    parameters: dict[str, int] = {}
    for name, parameter in account.story.named_parameters():
        part = name.split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    counts = ", ".join(f"{part} {number:,}" for part, number in parameters.items())
    return Section(
        "story",
        "The story",
        "How is an observation made, and how is its latent guessed? Of each observation n, independently:",
        equations=(("model", model), ("guide", guide)),
        facts={"numbers that were learned": counts},
    )


def _data(account: Account) -> Section:
    x, *_ = account.columns
    shown = ()
    if plots.are_images(x):
        shown = (picture(plots.image_panels({"held-out observations": x[:40]}), "The first of them."),)
    return Section("data", "The data", "What is the story about?", facts=account.data, figures=shown)


def _training(account: Account) -> Section:
    if account.history is None:
        return Section(
            "training", "Training", missing="How the story was trained is not known.", facts=account.training
        )
    figure = picture(
        plots.learning_curve(account.history),
        "The ELBO by epoch. Where validation falls while training rises, the story learns its data by heart.",
    )
    return Section("training", "Training", "Did it settle?", figures=(figure,), facts=account.training)


def _versions(account: Account) -> Section:
    now = {name: metadata.version(name) for name in PACKAGES} | {"Python": platform.python_version()}
    facts = {f"{name}, at the time of the training": version for name, version in account.versions.items()} | now
    return Section("repeat", "How to repeat it", facts=facts, commands=account.commands)


def _diagnosed(account: Account, name: str) -> Section:
    """A section of the diagnosis, and what belongs to it."""
    title, question = QUESTIONS[name]
    if name not in account.diagnosis:
        missing = account.diagnosis.unavailable.get(name, "Not computed.")
        return Section(name, title, question, missing=missing)
    table = account.diagnosis[name]
    own = findings(Diagnosis({name: table}, {}))
    with of_diagnosis(name):
        drawn = [(draw(account, table), caption) for draw, caption in PICTURES[name]]
        figures = [picture(figure, caption) for figure, caption in drawn if figure is not None]
        atlas = _living(account, table) if name == "atlas" else None
        facts = _evidence_facts(table) if name == "evidence" else {}
    return Section(name, title, question, findings=own, figures=figures, atlas=atlas, facts=facts)


def _living(account: Account, table: xr.Dataset) -> dict[str, Any] | None:
    x = account.columns[0]
    return living_atlas(table, x, account.label_names) if plots.are_images(x) else None


def _evidence_facts(table: xr.Dataset) -> dict[str, str]:
    summary = Evidence(table).summary()
    return {
        "mean": f"{summary.mean:.3f} nats ({summary.bits_per_dimension:.4f} bits per dimension)",
        "Monte Carlo error, bias": f"{summary.monte_carlo_error:.4f}, {summary.bias:.4f} nats",
        "test sampling error": f"{summary.test_sampling_error:.3f} nats",
        "methods": ", ".join(f"{method} {number}" for method, number in summary.methods.items()),
        "verdicts": ", ".join(f"{verdict} {number}" for verdict, number in summary.verdicts.items()),
    }


# Section: title, and what it asks.
QUESTIONS = {
    "evidence": ("Evidence", "How probable are the held-out observations, and how far can each number be believed?"),
    "guide": ("The guide as a proposal", "Do its draws cover the posterior, observation by observation?"),
    "calibration": ("Calibration", "Are the guide's intervals right, on observations whose latent is known?"),
    "collapse": ("Collapse", "Which latents are used, and does the aggregate posterior fill the prior?"),
    "gaps": ("Gaps", "What the ELBO lacks of log p(x): is it the guide's family, or its encoder?"),
    "reference": ("Against Markov chains", "How far is the guide from the posterior itself?"),
    "predictive": ("Posterior predictive checks", "Do observations made from the guessed latents look like the data?"),
    "prior-predictive": ("Prior predictive checks", "Do new observations look like the data?"),
    "reliability": ("Reliability", "Of the numbers that are predicted with probability p, is a share p observed?"),
    "coverage": ("Coverage", "Do predictive intervals hold as much as they say?"),
    "outliers": ("Outliers", "Which observations are not like the others, and which are too good to be true?"),
    "atlas": ("The latent plane", "What does each place decode to, and who lives there?"),
    "landscape": ("One posterior", "Where could one observation come from, and where does the guide look?"),
    "traversals": ("Traversals", "What does each latent do?"),
}

# Draws a table of an account; None where there is nothing to draw.
Draw = Callable[[Account, xr.Dataset], Figure | None]


def _of_table(draw: Callable[[xr.Dataset], Figure]) -> Draw:
    return lambda account, table: draw(table)


def _worst(account: Account, table: xr.Dataset) -> Figure | None:
    x = account.columns[0]
    return plots.worst_observations(table, x) if plots.are_images(x) else None


def _atlas(account: Account, table: xr.Dataset) -> Figure | None:
    return plots.atlas(table) if plots.are_images(account.columns[0]) else None


def _entropy_map(account: Account, table: xr.Dataset) -> Figure | None:
    return plots.entropy_map(table) if "entropy" in table else None


def _outliers(account: Account, table: xr.Dataset) -> Figure:
    return plots.outliers(table, account.columns[0])


PICTURES: dict[str, list[tuple[Draw, str]]] = {
    "evidence": [(_of_table(plots.evidence), "log p(x) of the observations, by verdict; the mean and its error.")],
    "guide": [
        (
            _of_table(plots.guide_quality),
            "k-hat is the shape of the weights' tail. Beyond the right line there are too few draws to believe.",
        ),
        (_worst, "The observations that the guide serves worst, with their k-hat."),
    ],
    "calibration": [
        (
            _of_table(plots.calibration),
            "A line that leaves its band fails. A hump on the left and a dip on the right is a guide that is too "
            "narrow; the mirror image one that is too wide; one hump a shift.",
        )
    ],
    "collapse": [
        (_of_table(plots.collapse), "KL and activity of each unit, and the aggregate posterior against the prior.")
    ],
    "gaps": [(_of_table(plots.gaps), "What the ELBO lacks, in two parts: of each observation, and on average.")],
    "reference": [
        (_of_table(plots.guide_against_reference), "Each dot is a latent coordinate of an observation."),
        (_of_table(plots.reference_convergence), "Whether the Markov chains can be believed."),
    ],
    "predictive": [(_of_table(plots.predictive_check), "The line is what was observed, the rest are replications.")],
    "prior-predictive": [
        (_of_table(plots.predictive_check), "The line is what was observed, the rest are replications.")
    ],
    "reliability": [(_of_table(plots.pixel_calibration), "On the diagonal, probabilities are what they say.")],
    "coverage": [(_of_table(plots.coverage), "On the diagonal, intervals hold what they say.")],
    "outliers": [(_outliers, "log p(x) of the data against that of simulated observations; the oddest on the right.")],
    "atlas": [
        (_atlas, "The same, still. Left what is decoded, right where observations are encoded."),
        (_entropy_map, "Where the label is open, an observation may become one of another kind."),
    ],
    "landscape": [(_of_table(plots.landscape), "Filled: the posterior, by quadrature. Ellipses: the guide.")],
    "traversals": [(_of_table(plots.traversals), "One latent at a time, the most active first.")],
}
