"""Checkpoints of a training: all that it takes to go on from the middle of an epoch as if nothing had happened.

Noise and order are functions of the seed and the number of a batch, so no generator is kept.
"""

import copy
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ppl_vae import checkpoint
from ppl_vae.training.best import Best
from ppl_vae.training.history import History, Row, rows_of
from ppl_vae.training.optimizers import held_by
from ppl_vae.training.steps import Tally, Task

OPTIMIZER, BEST = "optimizer/", "best/"
NAME = re.compile(r"step-(\d+)\.safetensors")
KEPT = 2
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError)


class Engines(Protocol):
    """Takes the steps of epochs, and knows what an engine that goes on needs."""

    @property
    def name(self) -> str: ...
    @property
    def learned(self) -> dict[str, float | int]: ...
    def recall(self, learned: Mapping[str, Any]) -> None: ...
    def take_epoch(self, tally: Tally) -> str: ...


@dataclass
class Training:
    """What a checkpoint is of.

    Attributes:
        asked: what was asked for, words and numbers; a training goes on with the same.
        engine: what takes the steps; it may be exchanged for another on the way.
    """

    task: Task
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    history: History
    best: Best
    engine: Engines
    asked: dict[str, Any]


# Writing


class Checkpoints:
    """Keeps the last two checkpoints of a training in a folder, and ends it between two steps where that is wanted.

    Args:
        folder: made if it is not there.
        every: seconds from one checkpoint to the next.
    """

    def __init__(self, folder: Path, every: float, training: Training) -> None:
        self.folder = folder
        self.every = every
        self.training = training
        self.written = time.monotonic()
        self.signal: int | None = None  # that this process has heard
        self.agreed: int | None = None  # after which all processes end
        self.ranks = training.task.ranks
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*") if self.ranks.is_first else ():  # by a process that was killed
            left.unlink(missing_ok=True)

    @property
    def are_due(self) -> bool:
        """Whether it is time for one; all processes find so after the same step."""
        is_late = time.monotonic() - self.written >= self.every
        if self.ranks.size == 1:
            self.agreed = self.signal
            return is_late or self.agreed is not None
        notice = self.training.task.notice
        wanted, interrupted, terminated = notice.of_all
        own = is_late and self.ranks.is_first, self.signal == signal.SIGINT, self.signal == signal.SIGTERM
        notice.own = [float(wish) for wish in own]
        if interrupted or terminated:
            self.signal = self.agreed = signal.SIGINT if interrupted else signal.SIGTERM
        return wanted > 0 or self.agreed is not None

    def write(self, tally: Tally) -> None:
        """Writes where the training is, and drops all but the last two; then ends the training if a signal said so.

        One that comes meanwhile is for after the next step: the other processes do not know of it yet.

        Raises:
            OSError: when the file cannot be written; those before it are as they were.
        """
        if self.ranks.is_first:
            tensors, about = _state(self.training, tally)
            checkpoint.write(self.folder / f"step-{tally.step:010d}.safetensors", tensors, about)
            for old in files_in(self.folder)[KEPT:]:
                old.unlink(missing_ok=True)
        self.written = time.monotonic()
        self.training.task.notice.own = [0.0, 0.0, 0.0]
        if self.agreed is not None:
            self.ranks.wait()  # a process that ends may take the others with it
            raise KeyboardInterrupt if self.agreed == signal.SIGINT else SystemExit(128 + self.agreed)

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM wait for the end of the step and a checkpoint; the second one does not wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal = number


def _state(training: Training, tally: Tally) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A training between two steps, as tensors, and as words and numbers."""
    tensors, about = checkpoint.of_story(training.task.story)
    tensors |= {BEST + name: tensor for name, tensor in (training.best.weights or {}).items()}
    numbers: dict[str, dict[str, Any]] = {}
    state = training.task.optimizer.state_dict()
    for index, remembered in state["state"].items():
        for name, value in remembered.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    about["training"] = {
        "tally": tally.as_table(),
        "history": training.history.rows,
        "best": {"epoch": training.best.epoch, "elbo": training.best.elbo},
        "optimizer": {"groups": [_without_parameters(group) for group in state["param_groups"]], "numbers": numbers},
        "schedule": None if training.scheduler is None else training.scheduler.state_dict(),
        "engine": {"name": training.engine.name} | training.engine.learned,
        "asked": training.asked,
        "environment": environment(training.task),
    }
    return tensors, about


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def environment(task: Task) -> dict[str, str]:
    """What bits depend on beside the training itself."""
    device = task.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return checkpoint.versions() | {
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
        "shards": str(task.shards),
        "processes": str(task.ranks.size),
    }


# What training was before it could be shared.
ALONE = {"shards": "1", "processes": "1"}


# Reading


def files_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest first."""
    found = {file: NAME.fullmatch(file.name) for file in folder.glob("step-*.safetensors")}
    return sorted((file for file, match in found.items() if match), key=lambda file: file.name, reverse=True)


def _read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint, or the latest in a folder; where it is damaged, the one before it is named."""
    files = files_in(path) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"There is no checkpoint in {str(path)!r}.")
    try:
        return files[0], *checkpoint.read(files[0])
    except ValueError as error:
        before = f" The one before it is {str(files[1])!r}." if len(files) > 1 else ""
        raise ValueError(f"{error}{before}") from None


def rows_in(path: Path) -> list[Row]:
    """The epochs that a checkpoint, or the latest in a folder, has behind it."""
    file, about, _ = _read(path)
    try:
        return rows_of(about["training"]["history"])
    except MALFORMED:
        raise ValueError(f"{str(file)!r} holds a story and no training to go on with.") from None


def shards_in(path: Path) -> int:
    """Into how many parts batches were cut in the training of a checkpoint, or of the latest in a folder."""
    file, about, _ = _read(path)
    try:
        return int((ALONE | about["training"]["environment"])["shards"])
    except MALFORMED:
        raise ValueError(f"{str(file)!r} holds a story and no training to go on with.") from None


def restore(path: Path, training: Training) -> Tally:
    """Puts a training where a checkpoint is, and returns the tally of the epoch that was under way.

    Args:
        path: a checkpoint, or a folder of them, of which the latest is taken.
        training: a new one, of the same story, data and settings.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, naming the one before it, or is of another training.

    Warns:
        UserWarning: when versions, device or threads are others, so that bits may differ.
    """
    file, about, tensors = _read(path)
    kept = about.get("training")
    if not isinstance(kept, dict):
        raise ValueError(f"{str(file)!r} holds a story and no training to go on with.")
    _refuse_other(file, kept.get("asked"), training.asked)
    _warn_of_other(kept.get("environment"), environment(training.task))
    try:
        return _put_back(file, about, tensors, kept, training)
    except MALFORMED as error:
        raise ValueError(f"{str(file)!r} is of another training, or malformed: {error}") from None


def _refuse_other(file: Path, there: Any, here: dict[str, Any]) -> None:
    """Raises ValueError when what was asked for there differs."""
    there = there if isinstance(there, dict) else {}
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differing:
        said = ", ".join(f"{name} {there.get(name)!r:.40} there and {here.get(name)!r:.40} here" for name in differing)
        raise ValueError(f"{str(file)!r} is of another training: {said}.")


def _warn_of_other(there: Any, here: dict[str, str]) -> None:
    there = ALONE | (there if isinstance(there, dict) else {})
    differing = [
        f"{name} {there.get(name)!s:.40} there and {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if differing:
        warnings.warn(f"The training goes on, but not bit for bit: {', '.join(differing)}.", stacklevel=4)


def _put_back(
    file: Path, about: dict[str, Any], tensors: dict[str, Tensor], kept: dict[str, Any], training: Training
) -> Tally:
    task, device = training.task, training.task.device
    checkpoint.fill(file, task.story, checkpoint.weights_of_story(file, about, tensors))
    best = {name.removeprefix(BEST): t.to(device) for name, t in tensors.items() if name.startswith(BEST)}
    if best and _kinds(best) != _kinds(task.story.state_dict()):
        raise ValueError("its best weights are those of another story")
    training.best.put_back(int(kept["best"]["epoch"]), float(kept["best"]["elbo"]), best or None)
    _put_back_optimizer(task.optimizer, kept["optimizer"], tensors)
    if training.scheduler is not None:
        training.scheduler.load_state_dict(kept["schedule"])
    training.history.rows[:] = rows_of(kept["history"])
    training.engine.recall(kept["engine"])
    return Tally.from_table(task, kept["tally"])


def _kinds(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def _put_back_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    own = optimizer.state_dict()
    groups = [
        {name: _like(value, given.get(name, value)) for name, value in group.items()}
        for group, given in zip(own["param_groups"], kept["groups"], strict=True)
    ]
    state: dict[int, dict[str, Any]] = {int(index): dict(numbers) for index, numbers in kept["numbers"].items()}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            index, _, remembered = name.removeprefix(OPTIMIZER).partition("/")
            state.setdefault(int(index), {})[remembered] = tensor
    shapes = _remembered_shapes(optimizer)
    for index, remembered in state.items():
        if not 0 <= index < len(shapes):
            raise ValueError(f"the optimizer has no parameter {index}")
        found = _shapes(remembered)
        if found != shapes[index]:
            raise ValueError(f"the optimizer remembers {found} of parameter {index}, and not {shapes[index]}")
    optimizer.load_state_dict(cast(Any, {"state": state, "param_groups": groups}))


def _like(own: Any, value: Any) -> Any:
    """A number of an optimizer, which JSON has made a list where it was a tuple; how it works is not told by a file."""
    if own is None or isinstance(own, bool):
        return own
    return tuple(value) if isinstance(own, tuple) else value


def _remembered_shapes(optimizer: torch.optim.Optimizer) -> list[dict[str, tuple[int, ...]]]:
    """What an optimizer remembers of each parameter after a step; fused ones write to it without a look at its size."""
    twin = copy.deepcopy(optimizer)
    for parameter in held_by(twin):
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return [_shapes(twin.state[parameter]) for parameter in held_by(twin)]


def _shapes(remembered: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in remembered.items() if isinstance(value, Tensor)}
