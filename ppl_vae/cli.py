"""The command line, ``ppl-vae COMMAND``. Only this file prints.

Options are made from the typed configurations. Nothing heavy is imported before the arguments are known to be right.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import Field, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ppl_vae import configuration
from ppl_vae.configuration import (
    CHOICES,
    SPLITS,
    STORY_SLOTS,
    ComparisonConfiguration,
    DataConfiguration,
    DiagnosisConfiguration,
    EvidenceConfiguration,
    StoryConfiguration,
    StoryFile,
    TrainingConfiguration,
    hyphened,
)

EXPECTED_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for an expected error (one line on standard error), 130 or 143 when interrupted."""
    options = _parser().parse_args(arguments)
    # Threads that wait should soon sleep: where other programs want the cores, spinning makes a step 10 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    with _one_voice() as name:
        try:
            options.command(options)
        except EXPECTED_ERRORS as error:
            print(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            return 1
        except Interrupted as interruption:
            print(f"{name}: {interruption}", file=sys.stderr)
            return interruption.status
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
    return 0


@contextmanager
def _one_voice() -> Iterator[str]:
    """Inside, only the first process of a ``torchrun`` prints results; gives the name under which errors are told."""
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    if rank == "0":
        yield "ppl-vae"
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield f"ppl-vae, process {rank}"


class Interrupted(BaseException):
    """A command that a signal ended, with the exit status of that signal."""

    def __init__(self, how_to_go_on: str, status: int) -> None:
        super().__init__(how_to_go_on)
        self.status = status


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="ppl-vae", description="Variational autoencoders told as Pyro programs, with log p(x) you can believe."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="train a story and judge it on held-out data", description=_train.__doc__)
    train.set_defaults(command=_train)
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/<time>)")
    train.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with an interrupted run, or with more --epochs in all; its other settings are its own",
    )
    _add_output_options(train)
    _add_options(train.add_argument_group("data"), DataConfiguration)
    story = train.add_argument_group("story")
    story.add_argument("--story", metavar="FILE.py:CLASS", help="a story of your own, from a file, which is run")
    _add_options(story, StoryConfiguration)
    _add_choices(story, STORY_SLOTS)
    training = train.add_argument_group("training and evidence")
    _add_options(training, TrainingConfiguration)
    _add_choices(training, ("objective",))

    evidence = commands.add_parser(
        "evidence", help="log p(x) of the data of a run, with its error and a verdict", description=_evidence.__doc__
    )
    evidence.set_defaults(command=_evidence)
    evidence.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    evidence.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        default=["test"],
        metavar="SPLIT",
        help=f"of {', '.join(SPLITS)} (default: test)",
    )
    evidence.add_argument("--out", type=Path, help="a new file .nc or .csv for the table of a single split")
    _add_evidence_options(evidence, EvidenceConfiguration)

    compare = commands.add_parser(
        "compare", help="rank runs by log p(x) of the same observations", description=_compare.__doc__
    )
    compare.set_defaults(command=_compare)
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of at least two runs")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="a new picture .png of the paired differences")
    _add_evidence_options(compare, ComparisonConfiguration)

    diagnose = commands.add_parser(
        "diagnose", help="did inference work, and where not? on test observations", description=_diagnose.__doc__
    )
    diagnose.set_defaults(command=_diagnose)
    diagnose.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    _add_own_stories(diagnose)
    _add_output_options(diagnose)
    _add_options(diagnose.add_argument_group("diagnosis"), DiagnosisConfiguration)

    report = commands.add_parser(
        "report", help="write one page that tells all about a run", description=_write_report.__doc__
    )
    report.set_defaults(command=_write_report)
    report.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    report.add_argument("--out", type=Path, help="a file .html (default: RUN/report.html)")
    _add_own_stories(report)
    _add_output_options(report)

    sample = commands.add_parser("sample", help="draw new observations from a run", description=_sample.__doc__)
    sample.set_defaults(command=_sample)
    sample.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    sample.add_argument("--num-observations", type=int, default=64, help="how many (default: 64)")
    sample.add_argument("--seed", type=int, default=0, help="rules the draws (default: 0)")
    sample.add_argument("--out", type=Path, help="files without their suffix (default: RUN/new-<seed>)")
    _add_own_stories(sample)
    _add_output_options(sample)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_own_stories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--story",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="the story of your own that a run was trained with; may be given for several",
    )


def _add_evidence_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Which observations of a run are scored, and how."""
    _add_own_stories(parser)
    _add_output_options(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="a named data set or a path to .npy, .npz, .csv (default: the data of the run)")
    data.add_argument("--data-root", help="folder of downloaded data sets (default: that of the run)")
    data.add_argument(
        "--stream", action="store_true", help="leave the .npy, or the folder of them, given by --data on disk"
    )
    _add_options(parser.add_argument_group("evidence"), kind)


def _add_options(group: Any, kind: type) -> None:
    """An option for each field that :func:`configuration.option` made."""
    for item in fields(kind):
        if item.type is bool:
            word = hyphened(item.name)
            group.add_argument(
                f"--{word}", dest=word, action="store_true", default=argparse.SUPPRESS, help=item.metadata["help"]
            )
        elif "help" in item.metadata:
            _add_option(group, {"": item}, f"--{hyphened(item.name)}", item.metadata["help"])


def _add_choices(group: Any, slots: Sequence[str]) -> None:
    """``--prior NAME`` chooses a prior, ``--prior.FIELD`` sets a field of the chosen one; likewise the other parts."""
    for slot in slots:
        choices = CHOICES[slot]
        default = next(iter(choices))
        about = "; ".join(f"{word}: {kind.__doc__}" for word, kind in choices.items()).replace("%", "%%")
        group.add_argument(
            f"--{slot}",
            choices=choices,
            default=argparse.SUPPRESS,
            metavar="NAME",
            help=f"{about} (default: {default})",
        )
        for name in dict.fromkeys(item.name for kind in choices.values() for item in fields(kind)):
            owners = {word: item for word, kind in choices.items() for item in fields(kind) if item.name == name}
            meanings = dict.fromkeys(item.metadata["help"] for item in owners.values())
            text = f"of {', '.join(owners)}: {'; or '.join(meanings)}"
            _add_option(group, owners, f"--{slot}.{hyphened(name)}", text)


def _add_option(group: Any, owners: Mapping[str, Field[Any]], flag: str, text: str) -> None:
    """An option that sets a field, of one configuration or of several whose defaults may differ."""
    item, *_ = owners.values()
    defaults = {word: _shown(owner.default) for word, owner in owners.items()}
    if len(set(defaults.values())) > 1:
        text += f" (default: {', '.join(f'{shown} for {word}' for word, shown in defaults.items())})"
    elif shown := next(iter(defaults.values())):
        text += f" (default: {shown})"
    parse, word = item.metadata["parse"], item.name.upper()
    dest = flag.removeprefix("--")
    group.add_argument(flag, dest=dest, type=parse, default=argparse.SUPPRESS, metavar=word, help=text)


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)


def _values(options: argparse.Namespace, kind: type, prefix: str = "") -> dict[str, Any]:
    """What was said of the fields of a configuration."""
    said = vars(options)
    return {item.name: said[key] for item in fields(kind) if (key := prefix + hyphened(item.name)) in said}


def _part(options: argparse.Namespace, slot: str) -> Any:
    """The configuration chosen for a slot of the story; ValueError for an option of another choice."""
    word = getattr(options, slot, next(iter(CHOICES[slot])))
    kind = CHOICES[slot][word]
    known = {f"{slot}.{hyphened(item.name)}" for item in fields(kind)}
    if strangers := sorted(key for key in vars(options) if key.startswith(f"{slot}.") and key not in known):
        raise ValueError(f"--{strangers[0]} does not belong to --{slot} {word}.")
    return kind(**_values(options, kind, f"{slot}."))


def _train(options: argparse.Namespace) -> None:
    """Trains a variational autoencoder and reports log p(x) of held-out data. With no option: two latent dimensions,
    the 5,000 MNIST digits that come with the installation, under two minutes. --story trains one of your own instead;
    the other options of that group are then not used."""
    say = print if not options.json else partial(print, file=sys.stderr)
    if options.resume is not None:
        _resume(options, say)
        return
    chosen = {slot: _part(options, slot) for slot in CHOICES}
    objective = {"objective": chosen.pop("objective")}
    training = TrainingConfiguration(**(_values(options, TrainingConfiguration) | objective))
    data = DataConfiguration(**_values(options, DataConfiguration))
    source = None if options.story is None else StoryFile.parse(options.story)
    folder = options.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    from ppl_vae import ranks, runs  # imports torch, seconds

    folder = Path(ranks.here().said_by_first(str(folder)))
    runs.refuse_used(folder)
    if source is not None:
        dataset = runs.load_data(data, "grey", training.seed)
        story = configuration.OwnStory(str(source.file.resolve()), source.name, tuple(dataset.event_shape))
    else:
        dataset = runs.load_data(data, chosen["likelihood"].pixels, training.seed)
        event_shape = tuple(dataset.event_shape)
        story = StoryConfiguration(event_shape=event_shape, **(_values(options, StoryConfiguration) | chosen))
    wanted = configuration.RunConfiguration(data, story, training)
    with _telling_how_to_go_on(folder):
        results = runs.train(wanted, dataset, folder, options.device, say)
    print(runs.as_json(results) if options.json else _report(results))


# What may be said beside --resume.
WITH_RESUME = ("command", "resume", "epochs", "device", "json", "story")


def _resume(options: argparse.Namespace, say: Callable[..., None]) -> None:
    """Goes on with a run."""
    if others := [name for name, value in vars(options).items() if name not in WITH_RESUME and value is not None]:
        raise ValueError(f"--{others[0]} does not go with --resume: the run keeps its settings, but for --epochs.")
    epochs = getattr(options, "epochs", None)
    if epochs is not None:
        TrainingConfiguration(epochs=epochs)
    typed = [] if options.story is None else [StoryFile.parse(options.story)]

    from ppl_vae import runs  # imports torch, seconds

    with _telling_how_to_go_on(options.resume):
        results = runs.resume(options.resume, epochs, options.device, typed, say)
    print(runs.as_json(results) if options.json else _report(results))


@contextmanager
def _telling_how_to_go_on(run: Path) -> Iterator[None]:
    """Where training is interrupted by a signal, says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else int(error.code or 0)
        how = f"interrupted; go on with: ppl-vae train --resume {shlex.quote(str(run))}"
        raise Interrupted(how, status) from None


def _report(results: dict[str, Any]) -> str:
    gap = results["test_log_evidence"] - results["test_elbo"]
    lines = [f"test ELBO {results['test_elbo']:.3f} nats, a lower bound: {gap:.3f} below log p(x)"]
    if "scale_floor" in results:
        share = results["share_of_scales_on_floor"]
        lines.append(f"{share:.1%} of the scales sit on their floor of {results['scale_floor']:g}")
    return "\n".join([*lines, f"all of it is in {results['run']}"])


def _evidence(options: argparse.Namespace) -> None:
    """Reports log p(x) of the observations of a run: of those held out for testing, or of any split (train is then
    binarized once). Saves the table of each whole split as RUN/evidence-SPLIT.nc, in place of an older one; with --data
    or --limit only where --out says."""
    asked = EvidenceConfiguration(**_values(options, EvidenceConfiguration))
    splits = list(dict.fromkeys(options.splits))
    typed = [StoryFile.parse(text) for text in options.story]
    if options.out is not None:
        _refuse_out(options.out, splits)

    from ppl_vae import runs  # imports torch, seconds

    tables = {}
    source = runs.Source(options.data, options.data_root, options.stream)
    for scored in runs.score(options.run, splits, asked, source, options.out, options.device, typed):
        tables[scored.split] = scored.table()
        if not options.json:
            print(scored)
    if options.json:
        print(runs.as_json({"run": str(options.run), "evidence": tables}))


def _refuse_out(out: Path, splits: Sequence[str]) -> None:
    """Finds before anything is computed that a table could not be saved there."""
    if out.suffix not in (".nc", ".csv"):
        raise ValueError(f"--out is a file .nc (netCDF, to be loaded again) or .csv; found {str(out)!r}.")
    if len(splits) > 1:
        raise ValueError("--out is for the table of one split. Without it, each goes to RUN/evidence-SPLIT.nc.")
    _refuse_place(out, "--out")


def _refuse_picture(plot: Path) -> None:
    if plot.suffix != ".png":
        raise ValueError(f"--plot is a file .png; found {str(plot)!r}.")
    _refuse_place(plot, "--plot")


def _refuse_place(file: Path, option: str) -> None:
    if file.exists():
        raise FileExistsError(f"{str(file)!r} is there already. Choose another {option}.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(file.parent)!r} for {option}.")


def _compare(options: argparse.Namespace) -> None:
    """Ranks runs by log p(x) of the test observations, which must be the same for all; of another source with --data,
    split and binarized by the seed of the first run. Differences are paired."""
    asked = ComparisonConfiguration(**_values(options, ComparisonConfiguration))
    folders = _named(options.runs)
    typed = [StoryFile.parse(text) for text in options.story]
    if options.plot is not None:
        _refuse_picture(options.plot)

    from ppl_vae import runs  # imports torch, seconds

    source = runs.Source(options.data, options.data_root, options.stream)
    comparison = runs.compare(folders, asked, source, options.device, typed)
    if options.plot is not None:
        runs.picture(comparison, options.plot)
    print(runs.as_json(runs.comparison_table(comparison, folders)) if options.json else comparison)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders; by their paths, where two have the same name."""
    if len(folders) < 2:
        raise ValueError("compare takes at least two runs: ppl-vae compare RUN RUN.")
    found = [folder.resolve() for folder in folders]
    if len(set(found)) < len(found):
        raise ValueError("The same run is given twice; compare takes different runs.")
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    return {str(folder) if names.count(name) > 1 else name: folder for name, folder in zip(names, folders, strict=True)}


def _diagnose(options: argparse.Namespace) -> None:
    """Diagnoses the inference of a run on its test observations: quality of the guide, calibration, collapse, gaps,
    predictive checks, outliers and the latent space. Each table is kept in RUN/diagnosis once it is there; what an
    interrupted diagnosis left is not computed again. Read it with: ppl-vae report RUN."""
    asked = DiagnosisConfiguration(**_values(options, DiagnosisConfiguration))
    typed = [StoryFile.parse(text) for text in options.story]

    from ppl_vae import runs  # imports torch, seconds
    from ppl_vae.diagnostics.findings import as_text

    found = runs.diagnose(options.run, asked, options.device, typed)
    print(runs.as_json(runs.diagnosis_table(found, options.run)) if options.json else as_text(found))


def _write_report(options: argparse.Namespace) -> None:
    """Writes one self-contained page about a run: its story, data, training, log p(x), and what the diagnosis found, as
    far as there is one. It needs no network."""
    typed = [StoryFile.parse(text) for text in options.story]
    out = options.out or options.run / "report.html"
    if out.suffix != ".html":
        raise ValueError(f"--out is a file .html; found {str(out)!r}.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(out.parent)!r} for --out.")

    from ppl_vae import runs  # imports torch, seconds

    runs.report(options.run, out, options.device, typed)
    print(json.dumps({"file": str(out)}) if options.json else f"wrote {out}")


def _sample(options: argparse.Namespace) -> None:
    """Draws new observations from the story of a run, to .npz and, if they are images, to .png."""
    if options.num_observations < 1:
        raise ValueError(f"--num-observations must be at least 1; found {options.num_observations}.")
    typed = [StoryFile.parse(text) for text in options.story]
    out = options.out or options.run / f"new-{options.seed}"

    from ppl_vae import runs  # imports torch, seconds

    files = runs.sample(options.run, out, options.num_observations, options.seed, options.device, typed)
    names = [str(file) for file in files]
    print(json.dumps({"files": names}) if options.json else f"wrote {' and '.join(names)}")
