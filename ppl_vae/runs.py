"""A run: train the story of a configuration, judge it on held-out data, and leave a folder that tells all of it.

The folder holds ``config.json`` (what was asked for, and which data), ``metrics.jsonl`` (one line per epoch),
``story.safetensors`` (the trained story), ``evidence-test.nc`` (log p(x) of each test observation), ``results.json``,
and pictures. Runs are scored again, and compared, on the data that they recorded.
"""

import inspect
import io
import json
import math
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure

import ppl_vae
from ppl_vae import checks, configuration, data, likelihoods, own, plots, traces
from ppl_vae.checkpoint import load, save, write_atomically
from ppl_vae.configuration import DiagnosisConfiguration, EvidenceConfiguration, RunConfiguration, StoryFile
from ppl_vae.data import Dataset, Split
from ppl_vae.diagnostics import Diagnosis, diagnosis, findings
from ppl_vae.diagnostics.latent import center
from ppl_vae.evidence import Evidence, comparison, log_evidence
from ppl_vae.evidence.comparison import Comparison
from ppl_vae.evidence.estimators import fingerprint
from ppl_vae.locks import claimed, refuse_held
from ppl_vae.ranks import apart, here
from ppl_vae.report import Account, page
from ppl_vae.stored import Stored, row_slices
from ppl_vae.traces import Story
from ppl_vae.training import History, fit
from ppl_vae.training.checkpoints import files_in, rows_in
from ppl_vae.training.history import Row, rows_of
from ppl_vae.vae import VAE

FORMAT = "ppl_vae/run/0"
CONFIGURATION, METRICS, STORY, RESULTS = "config.json", "metrics.jsonl", "story.safetensors", "results.json"
DIAGNOSIS, CHECKPOINTS, REPORT = "diagnosis", "checkpoints", "report.html"
REPORTED = (
    "epochs",
    "best_epoch",
    "engine",
    "training_seconds",
    "test_elbo",
    "scale_floor",
    "share_of_scales_on_floor",
)
ELBO_PARTICLES = 64
PICTURED = 32

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A folder that :func:`train` left.

    Attributes:
        folder: where it is.
        wanted: what was asked for.
        record: what was noted of its data.
        story: as it was trained.
    """

    folder: Path
    wanted: RunConfiguration
    record: dict[str, Any]
    story: Story

    @property
    def seed(self) -> int:
        """What splits, binarization and training were drawn from."""
        return self.wanted.training.seed

    def columns(self, split: Split, limit: int | None = None) -> tuple[torch.Tensor, ...]:
        """What the story is given of a split."""
        return columns_of(self.wanted.data, split, limit)


@dataclass(frozen=True)
class Scored:
    """The evidence of a split of some data, and the file that holds its table, if one does."""

    split: str
    source: str
    evidence: Evidence
    file: Path | None = None

    def __str__(self) -> str:
        saved = [] if self.file is None else [f"saved in {self.file}"]
        return "\n".join([f"log p(x) of the {self.split} split of {self.source}", str(self.evidence), *saved])

    def table(self) -> dict[str, Any]:
        """Its summary, fit for JSON."""
        return asdict(self.evidence.summary()) | {"file": None if self.file is None else str(self.file)}


def load_data(wanted: configuration.DataConfiguration, pixels: configuration.Pixels, seed: int) -> Dataset:
    """The data set of a configuration; with binarization "auto", its likelihood decides what grey levels become."""
    automatic = "dynamic" if pixels == "coins" else "none"
    binarization = cast(data.Binarization, automatic if wanted.binarization == "auto" else wanted.binarization)
    return data.load(
        wanted.data,
        binarization=binarization,
        counts=pixels == "counts" and binarization == "none",
        standardize="real" if wanted.standardize == ("real",) else wanted.standardize,
        seed=seed,
        root=wanted.data_root,
        download=wanted.download,
        stream=wanted.stream,
    )


def pixels_of(story: configuration.StoryConfiguration | configuration.OwnStory) -> configuration.Pixels:
    """What a story takes grey levels for."""
    return "grey" if isinstance(story, configuration.OwnStory) else story.likelihood.pixels


def columns_of(
    wanted: configuration.DataConfiguration, split: Split, limit: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Observations, and labels where they are wanted; the first so many of them."""
    if not wanted.with_labels:
        return (split.x[:limit],)
    if split.labels is None:
        raise ValueError(f"{wanted.data!r} has no labels; leave --with-labels out.")
    return split.x[:limit], split.labels[:limit]


def train(
    wanted: RunConfiguration, dataset: Dataset, folder: Path, device: str | None = None, say: Say = print
) -> dict[str, Any]:
    """Trains, judges and pictures one story; returns the results that ``results.json`` holds.

    Under ``torchrun`` every process calls this; the first one writes the folder, which all of them can read.

    Raises:
        FileExistsError: when the folder already holds something.
        ValueError: when story and data do not fit; the folder is then not made.
    """
    ranks = here()
    refuse_used(folder)
    story = _new_story(wanted).to(traces.device_named(device))
    _check_data(story, wanted.data, dataset, _transform(dataset))
    ranks.wait()  # until all have looked at the folder
    folder.mkdir(parents=True, exist_ok=True)
    with _claimed_by_first(folder):
        if ranks.is_first:
            _begin(folder, wanted, dataset)
        say(str(dataset))
        return _train_and_judge(story, wanted, dataset, folder, say)


@contextmanager
def _claimed_by_first(folder: Path) -> Iterator[None]:
    """Inside, the folder is that of the processes that train together."""
    with claimed(folder) if here().is_first else nullcontext():
        yield


def resume(
    run: Path,
    epochs: int | None = None,
    device: str | None = None,
    typed: Sequence[StoryFile] = (),
    say: Say = print,
) -> dict[str, Any]:
    """Goes on with a run that was interrupted, or trains one for more epochs; returns its results.

    Args:
        run: its folder, or one of its checkpoints, to go on with that one.
        epochs: how many in all; None is as many as were asked for.
        device: where to train.
        typed: classes of stories of one's own.
        say: is told what happens.

    Raises:
        FileNotFoundError: when there is no run.
        BlockingIOError: when another process is at it.
        ValueError: when the run is damaged, or its data have changed.
    """
    folder, start = (run.parent.parent, run) if run.suffix == ".safetensors" else (run, run / CHECKPOINTS)
    wanted, record = _read_configuration(folder / CONFIGURATION)
    if epochs is not None:
        wanted = replace(wanted, training=replace(wanted.training, epochs=epochs))
    ranks = here()
    with _claimed_by_first(folder):
        dataset = load_data(wanted.data, pixels_of(wanted.story), wanted.training.seed)
        _refuse_changed(folder, wanted, record, dataset)
        files = [start] if start.is_file() else files_in(start)
        rows = rows_in(start) if files else []
        story = _story_to_resume(wanted, folder, typed, files).to(traces.device_named(device))
        if ranks.is_first:
            _begin(folder, wanted, dataset)
            _write_metrics(folder, rows)
        say(f"going on after {len(rows)} epochs" if files else "no checkpoint was reached: starting anew")
        return _train_and_judge(story, wanted, dataset, folder, say, start if files else None)


def _story_to_resume(wanted: RunConfiguration, folder: Path, typed: Sequence[StoryFile], files: list[Path]) -> Any:
    """The story of a checkpoint: rebuilt from it, the sizes in a stranger's ``config.json`` cost no memory."""
    if isinstance(wanted.story, configuration.OwnStory) or not files:
        return _story_of(wanted, folder, typed)
    story = load(files[0])
    if story.configuration != wanted.story:
        raise ValueError(f"{str(files[0])!r} holds another story than {CONFIGURATION}.")
    return story


def _train_and_judge(
    story: Any,
    wanted: RunConfiguration,
    dataset: Dataset,
    folder: Path,
    say: Say,
    start: Path | None = None,
) -> dict[str, Any]:
    """Trains a story, from a checkpoint if there is one, then judges and pictures it."""
    training, columns, is_first = wanted.training, partial(columns_of, wanted.data), here().is_first
    try:
        history = fit(
            story,
            *columns(dataset.train),
            validation=columns(dataset.validation),
            epochs=training.epochs,
            batch_size=training.batch_size,
            optimizer=partial(torch.optim.Adam, lr=training.learning_rate, fused=True),
            loss=training.objective.build(),
            transform=_transform(dataset),
            kl_warmup=training.kl_warmup,
            beta=training.beta,
            free_bits=training.free_bits,
            patience=training.patience or None,
            engine=cast(Any, training.engine),
            callbacks=[partial(_append_metrics, folder)] if is_first else [],
            shards=training.shards,
            seed=training.seed,
            checkpoints=folder / CHECKPOINTS,
            resume=start,
        )
    except (KeyboardInterrupt, SystemExit):
        if is_first:
            save(story, folder / STORY)
        raise
    seconds = float(history["seconds"].sum())
    if is_first:
        save(story, folder / STORY)
    say(f"trained {len(history)} epochs in {seconds:.0f} s; the weights of epoch {history.best_epoch} were best")

    test = columns(dataset.test)
    elbo = log_evidence(story, *test, method="elbo", num_particles=ELBO_PARTICLES, seed=training.seed)
    file = _evidence_file(folder, "test")
    evidence = _estimated(file, story, test, {"num_particles": training.num_particles, "seed": training.seed})
    say(str(Scored("test", dataset.name, evidence)))
    results = _results(history, seconds, elbo, evidence) | _floor(story, dataset)
    if is_first:
        _write_json(folder / RESULTS, results)
        for name, figure in _pictures(story, history, dataset.test, test).items():
            _save_picture(figure, folder / name)
        with apart():
            about = _account(Run(folder, wanted, dataset.record, story), dataset, history)
            write_atomically(folder / REPORT, page(about).encode())
    return {"run": str(folder)} | results


def _estimated(
    file: Path | None, story: Story, columns: tuple[torch.Tensor, ...], settings: Mapping[str, Any]
) -> Evidence:
    """The evidence of some observations, saved in a file; blocks of it lie beside the file until all are there."""
    if file is None:
        return log_evidence(story, *columns, **settings)
    unfinished = file.with_suffix(".blocks")
    evidence = log_evidence(story, *columns, **settings, folder=unfinished)
    if here().is_first:
        evidence.save(file)
        shutil.rmtree(unfinished)
    return evidence


def _transform(dataset: Dataset) -> checks.Transform | None:
    """What is done to a batch of training data."""
    return torch.bernoulli if dataset.binarization == "dynamic" else None


def open_run(folder: Path, device: str | None = None, typed: Sequence[StoryFile] = ()) -> Run:
    """Reads a run.

    Args:
        folder: of the run.
        device: where its story goes.
        typed: classes of stories of one's own, one of which was trained here if its story was no ``VAE``.

    Raises:
        FileNotFoundError: when there is no run, or it has no story yet.
        ValueError: when a file of it is damaged, its own story was not typed, or the device is not there.
    """
    wanted, record = _read_configuration(folder / CONFIGURATION)
    story = _story_of(wanted, folder, typed) if isinstance(wanted.story, configuration.OwnStory) else None
    return Run(folder, wanted, record, load(folder / STORY, story=story, device=traces.device_named(device)))


def _story_of(wanted: RunConfiguration, folder: Path, typed: Sequence[StoryFile]) -> Any:
    """An untrained story of a run; its class, where it is of one's own, is among those that were typed."""
    if not isinstance(wanted.story, configuration.OwnStory):
        return _new_story(wanted)
    sources = {source.name: source for source in typed}
    if wanted.story.name not in sources:
        raise ValueError(
            f"{str(folder)!r} holds a story of your own: say where it is, --story FILE.py:{wanted.story.name}."
        )
    return _own_story(sources[wanted.story.name], wanted)


def _new_story(wanted: RunConfiguration) -> Any:
    """An untrained story of what was asked for at this command line."""
    if isinstance(wanted.story, configuration.OwnStory):
        return _own_story(StoryFile(Path(wanted.story.file), wanted.story.name), wanted)
    return configuration.build(wanted.story, wanted.training.seed)


def _own_story(source: StoryFile, wanted: RunConfiguration) -> Any:
    return own.make(source, {"event_shape": wanted.story.event_shape}, wanted.training.seed)


@dataclass(frozen=True)
class Source:
    """Data other than those of a run, or the same from elsewhere.

    Attributes:
        data: another named data set or file, with observations of the same shape; None is that of the run.
        root: another folder of downloaded data sets.
        stream: leave other data on disk. Those of a run are on disk if they were in training.
    """

    data: str | None = None
    root: str | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.stream and self.data is None:
            raise ValueError("--stream goes with --data; a run's own data are left on disk if they were in training.")

    def instead_of(self, wanted: configuration.DataConfiguration) -> configuration.DataConfiguration:
        """What to read in place of a run's data."""
        return replace(
            wanted,
            data=wanted.data if self.data is None else self.data,
            data_root=wanted.data_root if self.root is None else self.root,
            stream=wanted.stream if self.data is None else self.stream,
        )


SAME = Source()


def data_of(run: Run, source: Source = SAME) -> Dataset:
    """The data that a run was trained on, or another source; none of it is left to be binarized in every batch.

    Args:
        run: rules the seed and the binarization. Dynamic binarization becomes static: held-out pixels are the same, and
            those of train are drawn once.
        source: where they are read from.

    Raises:
        ValueError: when the run's data have changed since, or another source does not fit the story.
    """
    wanted = source.instead_of(run.wanted.data)
    pixels = pixels_of(run.wanted.story)
    dataset = load_data(wanted, pixels, run.seed)
    if source.data is None:
        _refuse_changed(run.folder, run.wanted, run.record, dataset)
    _refuse_other_shape(run, dataset)
    if dataset.binarization != "dynamic":
        return dataset
    return load_data(replace(wanted, binarization="static"), pixels, run.seed)


def score(
    folder: Path,
    splits: Sequence[str],
    asked: EvidenceConfiguration,
    source: Source = SAME,
    out: Path | None = None,
    device: str | None = None,
    typed: Sequence[StoryFile] = (),
) -> Iterator[Scored]:
    """Evidence of some splits of a run's data, or of another source, one after the other.

    The table of a whole split of the run's own data is saved in the folder of the run, in place of an older one; that
    of anything else only if ``out`` says where.

    Raises:
        FileNotFoundError: when there is no run.
        ValueError: when data, story and method do not fit.
        OSError: when a table could not be saved; before anything is computed.
    """
    run = open_run(folder, device, typed)
    dataset = data_of(run, source)
    whole = source.data is None and asked.limit is None
    files = {split: out or (_evidence_file(folder, split) if whole else None) for split in splits}
    for file in filter(None, files.values()):
        tempfile.TemporaryFile(dir=file.parent).close()  # can a file be written there?
    for split, file in files.items():
        columns = run.columns(dataset.splits[split], asked.limit)
        evidence = _estimated(file, run.story, columns, _settings(asked, run))
        yield Scored(split, dataset.name, evidence, file)


def compare(
    folders: Mapping[str, Path],
    asked: EvidenceConfiguration,
    source: Source = SAME,
    device: str | None = None,
    typed: Sequence[StoryFile] = (),
) -> Comparison:
    """Ranks runs, by name, by the evidence of their test observations, or of those of another source.

    Another source is split and binarized by the seed of the first run.

    Raises:
        FileNotFoundError: when a run is not there.
        ValueError: when test observations differ between runs, when a run was trained on some of them, or when
            probabilities and densities would be compared.
    """
    opened = {name: open_run(folder, device, typed) for name, folder in folders.items()}
    first, *others = opened.values()
    dataset = data_of(first, source)
    for run in others:
        mine = data_of(run, source)
        if run.wanted.data.with_labels != first.wanted.data.with_labels:
            raise ValueError("Some of these runs were given labels and some were not: log p(x | y) and log p(x).")
        if source.data is None:
            _refuse_other_test(first, dataset, run, mine)
        else:
            _refuse_trained_on(run, dataset, mine)
    stories = {name: run.story for name, run in opened.items()}
    return comparison.compare(stories, *first.columns(dataset.test, asked.limit), **_settings(asked, first))


def picture(compared: Comparison, file: Path) -> None:
    """Draws a comparison into a .png file."""
    _save_picture(plots.comparison(compared), file)


def comparison_table(compared: Comparison, folders: Mapping[str, Path]) -> dict[str, Any]:
    """A comparison, fit for JSON: each story, the best first, and each pair of them."""
    table = compared.dataset
    of_story = [name for name, column in table.items() if column.dims == ("story",)]
    of_pair = [name for name, column in table.items() if column.dims == ("story", "other")]
    names = list(compared.evidence)
    stories = {name: {column: table[column].sel(story=name).item() for column in of_story} for name in names}
    pairs = [
        {"story": a, "other": b} | {column: table[column].sel(story=a, other=b).item() for column in of_pair}
        for a, b in combinations(names, 2)
    ]
    return {
        "method": table.attrs["method"],
        "num_observations": table.attrs["num_observations"],
        "stories": {name: {"run": str(folders[name])} | row for name, row in stories.items()},
        "pairs": pairs,
    }


def diagnose(
    folder: Path, asked: DiagnosisConfiguration, device: str | None = None, typed: Sequence[StoryFile] = ()
) -> Diagnosis:
    """Diagnoses a run on its test observations; the folder ``diagnosis`` in it keeps each table once it is there.

    Raises:
        FileNotFoundError: when there is no run.
        ValueError: when the run is damaged, its data have changed, or a section is unknown.
    """
    run = open_run(folder, device, typed)
    test = data_of(run).test
    columns = run.columns(test, asked.limit)
    return diagnosis.diagnose(
        run.story,
        *columns,
        labels=None if test.labels is None else test.labels[: asked.limit],
        evidence=_known_evidence(run, run.columns(test), asked.limit),
        sections=asked.sections or tuple(diagnosis.SECTIONS),
        folder=folder / DIAGNOSIS,
        seed=run.seed if asked.seed is None else asked.seed,
    )


def _known_evidence(run: Run, columns: traces.Columns, limit: int | None = None) -> Evidence | None:
    """The saved evidence of the first test observations, if the best method for each estimated it."""
    file = _evidence_file(run.folder, "test")
    if not file.exists():
        return None
    table = Evidence.load(file).dataset
    with traces.scoring(run.story):
        known = table.attrs.get("fingerprint") == fingerprint(run.story, columns)
        if not known or table.attrs.get("method") != "auto":
            return None
        first = tuple(column[:limit] for column in columns)
        return Evidence(table.isel(observation=slice(limit)).assign_attrs(fingerprint=fingerprint(run.story, first)))


def diagnosis_table(found: Diagnosis, folder: Path) -> dict[str, Any]:
    """A diagnosis, fit for JSON: what was found in words, and the numbers of each section that are not tables."""
    return {
        "run": str(folder),
        "findings": [asdict(finding) for finding in findings(found)],
        "sections": {section: dict(table.attrs) for section, table in found.items()},
        "unavailable": found.unavailable,
    }


def report(folder: Path, out: Path, device: str | None = None, typed: Sequence[StoryFile] = ()) -> None:
    """Writes the report of a run, as far as it has been trained and diagnosed.

    Raises:
        FileNotFoundError: when there is no run.
        ValueError: when a file of the run is damaged.
    """
    run = open_run(folder, device, typed)
    write_atomically(out, page(_account(run, data_of(run), _history(folder))).encode())


def _account(run: Run, dataset: Dataset, history: History | None) -> Account:
    """What a report tells of a run: without a diagnosis at least the evidence that training left."""
    found = diagnosis.read(run.folder / DIAGNOSIS, run.story)
    table = next(iter(found.values()), None)
    limit = DiagnosisConfiguration().limit if table is None else int(table.attrs["num_diagnosed"])
    if "evidence" not in found and (known := _known_evidence(run, run.columns(dataset.test))) is not None:
        found = replace(found, tables={"evidence": known.dataset} | found.tables)
    results, about = _table_in(run.folder / RESULTS), _table_in(run.folder / CONFIGURATION)
    names = dataset.label_names or ()
    arguments = shlex.join(["ppl-vae", "train", *configuration.to_arguments(run.wanted)])
    return Account(
        title=run.folder.resolve().name,
        story=run.story,
        columns=run.columns(dataset.test, limit),
        diagnosis=found,
        history=history,
        label_names=dict(enumerate(names)),
        data={name.replace("_", " "): _in_words(value) for name, value in dataset.record.items()},
        training={name.replace("_", " "): str(value) for name, value in results.items() if name in REPORTED},
        versions={name: str(about[name]) for name in ("ppl_vae", "torch") if name in about},
        commands=[arguments, "ppl-vae diagnose RUN", "ppl-vae report RUN"],
    )


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _history(folder: Path) -> History | None:
    """What ``metrics.jsonl`` tells of the training; None where nothing does."""
    file = folder / METRICS
    if not file.exists():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = rows_of([{name: _number(value) for name, value in row.items()} for row in rows])
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}.") from None
    return History("", rows) if rows else None


def _number(value: Any) -> float | str:
    """A value of a row of the history; what JSON has no word for was written as null."""
    return math.nan if value is None else value if isinstance(value, str) else float(value)


def _table_in(file: Path) -> dict[str, Any]:
    """A table of words and numbers; an empty one where there is no such file."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}.") from None
    if not isinstance(table, dict):
        raise ValueError(f"{str(file)!r} is damaged: it holds no table.")
    return table


def as_json(table: dict[str, Any], indent: int | None = None) -> str:
    """A table as JSON, in which there is no NaN or infinity: null stands for them.

    >>> as_json({"test_elbo": -44.5, "test_sampling_error": float("nan"), "methods": {"quadrature": 3}})
    '{"test_elbo": -44.5, "test_sampling_error": null, "methods": {"quadrature": 3}}'
    """
    return json.dumps(_finite(table), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sample(
    run: Path, out: Path, num_observations: int, seed: int, device: str | None = None, typed: Sequence[StoryFile] = ()
) -> list[Path]:
    """Draws new observations from a run's story into ``out``.npz, and .png if they are images; returns the files.

    Raises:
        FileNotFoundError: when there is no run.
        ValueError: when the run is damaged, or its story does not draw a number of observations by itself.
    """
    story = open_run(run, device, typed).story
    if not _draws_alone(story):
        raise ValueError("This story draws nothing by itself: its model takes no num_observations.")
    draws = traces.draws(traces.prior_predictive(story, num_observations, seed=seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_suffix(".npz")]
    arrays: dict[str, Any] = {name: draw.cpu().numpy() for name, draw in draws.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(files[0], content.getvalue())
    if plots.are_images(draws["x"]):
        files.append(out.with_suffix(".png"))
        _save_picture(plots.samples(story, num_observations, seed), files[1])
    return files


def refuse_used(folder: Path) -> None:
    """Raises FileExistsError when a folder holds something, BlockingIOError when a process has just begun there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / CONFIGURATION).exists():
            refuse_held(folder)
        what = "already holds a run" if (folder / CONFIGURATION).exists() else "is not an empty folder"
        raise FileExistsError(f"{str(folder)!r} {what}. Choose another --out, or leave it out for a fresh folder.")


def _draws_alone(story: Story) -> bool:
    return "num_observations" in inspect.signature(story.model).parameters


def _check_data(
    story: Story, wanted: configuration.DataConfiguration, dataset: Dataset, transform: checks.Transform | None
) -> None:
    """Everything that could be wrong with the data is found here, before there is a folder."""
    if len(dataset.train.x) < 2:
        raise ValueError(f"Training needs at least two observations; the splits of {dataset.name} leave one.")
    # In the order of the source, so that a row has the number that the user knows it by.
    order = torch.cat([dataset.indices[name] for name in dataset.splits]).argsort()
    parts = zip(*(columns_of(wanted, split) for split in dataset.splits.values()), strict=True)
    columns = [part[0].all_rows() if isinstance(part[0], Stored) else torch.cat(part)[order] for part in parts]
    try:
        checks.check(story, *columns, transform=transform)
    except TypeError as error:  # another number of columns
        raise ValueError(f"{error} --with-labels hands the labels to the story as a second column.") from None


def _begin(folder: Path, wanted: RunConfiguration, dataset: Dataset) -> None:
    about = {"format": FORMAT, "ppl_vae": ppl_vae.__version__, "torch": str(torch.__version__)}
    _write_json(folder / CONFIGURATION, about | configuration.to_json(wanted) | {"dataset": dataset.record})


def _read_configuration(file: Path) -> tuple[RunConfiguration, dict[str, Any]]:
    """What a run was asked for, and what it noted of its data."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"There is no run {str(file.parent)!r}: it has no {file.name}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}.") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("dataset"), dict):
        raise ValueError(f"{str(file)!r} is not what this version writes for a run; it reads the format {FORMAT!r}.")
    parts = {part: table[part] for part in ("data", "story", "training") if part in table}
    return configuration.from_json(parts, RunConfiguration), table["dataset"]


def _evidence_file(folder: Path, split: str) -> Path:
    return folder / f"evidence-{split}.nc"


def _settings(asked: EvidenceConfiguration, run: Run) -> dict[str, Any]:
    """The arguments of ``log_evidence`` and ``compare``."""
    settings = {name: value for name, value in asdict(asked).items() if name != "limit"}
    return settings | {"seed": run.seed if asked.seed is None else asked.seed}


def _refuse_other_shape(run: Run, dataset: Dataset) -> None:
    expected, found = run.wanted.story.event_shape, tuple(dataset.event_shape)
    if found != expected:
        raise ValueError(
            f"The observations of {dataset.name!r} have the shape {found}, those of {str(run.folder)!r} {expected}."
        )


def _refuse_other_test(first: Run, dataset: Dataset, other: Run, own: Dataset) -> None:
    """Raises ValueError when two runs hold out other observations; before anything is computed."""
    x, y = dataset.test.x, own.test.x
    alike = x.dtype == y.dtype and x.shape == y.shape
    if not alike or not all(torch.equal(x[rows], y[rows]) for rows in row_slices(x, y)):
        found = " and ".join(f"{str(run.folder)!r} ({_provenance(run)})" for run in (first, other))
        raise ValueError(
            f"The test observations differ between {found}. Train both with the same --data, --binarization and "
            "--seed, or compare on another set with --data."
        )


def _refuse_changed(folder: Path, wanted: RunConfiguration, record: Mapping[str, Any], dataset: Dataset) -> None:
    """Raises ValueError when the data of a run are others by now."""
    if dataset.fingerprint != record.get("sha256"):
        raise ValueError(
            f"{wanted.data.data!r} is not what {str(folder)!r} was trained on any more: its fingerprint has changed. "
            "Give --data to score what is there now."
        )


def _provenance(run: Run) -> str:
    return f"{run.record.get('name')}, binarization {run.record.get('binarization')}, seed {run.seed}"


def _refuse_trained_on(run: Run, dataset: Dataset, own: Dataset) -> None:
    """Raises ValueError when test observations are among those that a run, by its own seed, was trained on."""
    if (own.name, own.record["sizes"]) != (run.record.get("name"), run.record.get("sizes")):
        return
    seen = torch.cat([own.indices["train"], own.indices["validation"]])
    if torch.isin(dataset.indices["test"], seen).any():
        raise ValueError(
            f"{str(run.folder)!r} was trained on some test observations: its seed {run.seed} splits {own.name!r} "
            f"otherwise than seed {dataset.seed}. Give --data with observations that no run has seen."
        )


def _write_metrics(folder: Path, rows: Sequence[Row]) -> None:
    """The epochs that a checkpoint knows: those after it are trained again."""
    write_atomically(folder / METRICS, "".join(as_json(row) + "\n" for row in rows).encode())


def _append_metrics(folder: Path, story: object, row: Row) -> None:
    path = folder / METRICS
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(as_json(row) + "\n")
    except OSError as error:  # of write() names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _results(history: History, seconds: float, elbo: Evidence, evidence: Evidence) -> dict[str, Any]:
    summary = evidence.summary()
    return {
        "test_elbo": elbo.summary().mean,
        "test_log_evidence": summary.mean,
        "monte_carlo_error": summary.monte_carlo_error,
        "monte_carlo_bias": summary.bias,
        "test_sampling_error": summary.test_sampling_error,
        "bits_per_dimension": summary.bits_per_dimension,
        "methods": summary.methods,
        "verdicts": summary.verdicts,
        "trusted_share": summary.trusted,
        "median_ess": summary.median_ess,
        "num_particles": summary.num_particles,
        "num_test_observations": summary.num_observations,
        "epochs": len(history),
        "best_epoch": history.best_epoch,
        "engine": history.engine,
        "training_seconds": round(seconds, 2),
    }


def _floor(story: Any, dataset: Dataset) -> dict[str, Any]:
    """For a likelihood whose scale has a floor: its floor, and the share of held-out scales that sit on it."""
    if not (isinstance(story, VAE) and isinstance(story.decoder, likelihoods.WithFloor)):
        return {}
    (x,) = traces.to_story(story, (dataset.test.x[:1000],))
    with traces.scoring(story):
        share = likelihoods.share_on_floor(story.decoder, center(story.encoder(x)))
    return {"scale_floor": story.decoder.floor, "share_of_scales_on_floor": share}


def _pictures(story: Any, history: History, test: Split, columns: tuple[torch.Tensor, ...]) -> dict[str, Figure]:
    figures = {"learning_curve.png": plots.learning_curve(history)}
    x, *conditions = traces.to_story(story, columns)
    if plots.are_images(x):
        if _draws_alone(story):
            figures["samples.png"] = plots.samples(story)
        few = (condition[:PICTURED] for condition in conditions)
        figures["reconstructions.png"] = plots.reconstructions(story, x[:PICTURED], *few)
        if isinstance(story, VAE) and story.configuration.latent_dim == 2:
            figures["atlas.png"] = plots.latent_atlas(story, x, test.labels)
    return figures


def _save_picture(figure: Figure, file: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomically(file, content.getvalue())


def _write_json(path: Path, table: dict[str, Any]) -> None:
    write_atomically(path, (as_json(table, indent=2) + "\n").encode())
