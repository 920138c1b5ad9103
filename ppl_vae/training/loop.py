"""fit: stochastic variational inference from the first epoch to the best weights."""

import copy
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor
from tqdm import tqdm

from ppl_vae import checkpoint, checks, discrete, noise, objectives, traces
from ppl_vae.capture import CaptureError, first_line
from ppl_vae.checks import Transform
from ppl_vae.memory import within_memory
from ppl_vae.noise import Purpose
from ppl_vae.objectives import FreeBitsELBO, SummedOutELBO
from ppl_vae.ranks import here as ranks_here
from ppl_vae.stored import Stored
from ppl_vae.traces import Columns, Story, sample_sites
from ppl_vae.training.best import Best
from ppl_vae.training.captured import CapturedEngine
from ppl_vae.training.checkpoints import Checkpoints, Training, restore, shards_in
from ppl_vae.training.history import History, Row
from ppl_vae.training.shared import SharedEngine
from ppl_vae.training.steps import Engine, Optimizer, Tally, Task, Tempering
from ppl_vae.training.svi import SVIEngine

log = logging.getLogger("ppl_vae")

VALIDATION_ROWS = 1024
ROWS_COMPARED = 4096

ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)

Callback = Callable[[Story, Row], None]
Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def fit(
    story: Story,
    *columns: Tensor,
    epochs: int,
    validation: Tensor | Sequence[Tensor] | None = None,
    batch_size: int = 128,
    optimizer: Optimizer = ADAM,
    loss: ELBO | None = None,
    transform: Transform | None = None,
    engine: Literal["auto", "svi", "captured"] = "auto",
    compile: bool | None = None,
    mixed_precision: bool = False,
    kl_warmup: int = 0,
    beta: float | Mapping[str, float] = 1.0,
    free_bits: float | Mapping[str, float] | None = None,
    schedule: Schedule | None = None,
    clip: float | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    shards: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    resume: str | os.PathLike[str] | None = None,
) -> History:
    """Trains a story by stochastic variational inference and returns its history.

    Hoffman, Blei, Wang & Paisley 2013, https://arxiv.org/abs/1206.7055. The story and the data are checked first. With
    ``validation`` the story ends with the weights of its best epoch on those data, also when it is interrupted. The
    user's parameter store and generators are left as they were; a batch's noise depends on seed and number alone.

    Under ``torchrun`` every process calls this with the same arguments, takes its share of each batch, and ends with
    the same story. The first one writes the checkpoints; the story starts as it is there.

    Args:
        story: an ``nn.Module`` with ``model`` and ``guide``; trained in place.
        columns: tensors whose first dimension is the observation, handed to model and guide batch by batch.
        epochs: passes over the data.
        validation: held-out data with the same columns (one tensor, or a tuple).
        batch_size: observations per step.
        optimizer: makes a torch optimizer of the story's parameters.
        loss: a Pyro ELBO, or one of :mod:`ppl_vae.objectives`. None is a new ``Trace_ELBO()``, or ``SummedOutELBO()``
            where the model marks latents ``infer={"enumerate": "parallel"}`` that the guide does not draw.
        transform: applied to each batch's first column on the device, for instance ``torch.bernoulli`` (dynamic
            binarization). Validation data are taken as they are.
        engine: ``"svi"`` is ``pyro.infer.SVI``, the reference. ``"captured"`` traces its step once and replays it,
            which is faster and takes the same steps; Python in story and transform then runs only while tracing.
            ``"auto"`` captures where that is possible, and logs why where it is not.
        compile: compile the captured step by inductor, which needs a C++ compiler and some 10 to 25 seconds. Several
            small steps are then one call, with noise of its own. None does so where the training is long enough to win.
        mixed_precision: matrix products and convolutions in bfloat16, densities and loss in the story's dtype.
        kl_warmup: epochs over which the latent terms grow from 1/kl_warmup to their full weight. Patience counts
            after them.
        beta: multiplies the latent terms, log p(z) and log q(z | x), in training: a number, or one by site name (then
            1 for the others). Above 1 latents are held to their prior; validation and evidence never see it.
        free_bits: nats per observation that a latent may cost before it is held to its prior: a number for each, or by
            site name (then 0 for the others). The loss is then :class:`ppl_vae.objectives.FreeBitsELBO`, but for
            validation.
        schedule: makes a torch learning rate scheduler of the optimizer, stepped after each epoch.
        clip: largest norm of the gradient of the mean loss per observation.
        patience: stop after so many epochs without a better validation ELBO.
        callbacks: called with the story and the row of each epoch, in every process.
        shards: cut each batch into so many parts, and add up their gradients: processes take the parts between them,
            and one process takes one after the other, for a batch that does not fit in memory. Each part has noise of
            its own, so that the result depends on ``shards``, and on the number of processes by rounding alone. None is
            the number of processes.
        seed: rules order, noise and transform.
        device: moves the story there first; None is where it is. Data follow the story, whole.
        progress: show a bar; None means when standard error is a terminal.
        checkpoints: a folder for the last two checkpoints. SIGINT and SIGTERM then wait for the end of the step and
            for a checkpoint; a second one does not.
        checkpoint_every: seconds between them; the end of the training leaves one, too.
        resume: a folder of checkpoints, or one of them, to go on with, in the middle of an epoch if need be. Story,
            data and settings must be those of the interrupted training, but for ``epochs``, which is the total, and the
            result is the same bit for bit on the same device, versions, and numbers of threads, shards and processes.
            Another number of processes keeps the shards where there are enough. The callbacks' own state is not kept.

    Returns:
        The :class:`History`.

    Raises:
        ValueError: when an argument, the story or the data are not what they should be, before the first step; when a
            checkpoint is damaged, or of another training.
        FileNotFoundError: when there is no checkpoint to resume from.
        OSError: when a checkpoint cannot be written.
        MemoryError: when a batch does not fit.
        CaptureError: when ``engine="captured"`` was asked for and the story cannot be captured.
        FloatingPointError: when loss or gradient are not finite for ten batches in a row, or no validation ELBO is.
        RuntimeError: when another process of the same ``torchrun`` has died, or its parameters differ.

    >>> from ppl_vae import VAE, likelihoods, networks, posteriors, priors
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=likelihoods.Bernoulli(networks.mlp(2, 5)),
    ...     encoder=posteriors.DiagonalNormal(networks.mlp(5, 4)),
    ... )
    >>> history = fit(vae, torch.ones(100, 5), epochs=3, batch_size=10)
    >>> history["epoch"].tolist(), bool(history["train_elbo"][0] < history["train_elbo"][2])
    ([1, 2, 3], True)
    """
    held_out = () if validation is None else (validation,) if isinstance(validation, Tensor) else tuple(validation)
    _check_arguments(columns, held_out, epochs, batch_size, kl_warmup, clip, patience, engine, compile, shards)
    _check_objective(loss, beta, free_bits)
    ranks = ranks_here()
    if device is not None:
        story.to(traces.device_named(device))
    checks.check(story, *columns, transform=transform)
    if held_out:
        checks.dry_run(story, *held_out)
    columns, held_out = traces.to_story(story, columns), traces.to_story(story, held_out)
    ranks.copy_from_first(_tensors_of(story))
    device, _ = traces.device_and_dtype(story)
    drawn, summed_out = _latents(story, columns, transform)
    objectives.check_names("beta", beta, drawn)
    objectives.check_names("free_bits", free_bits or {}, drawn)
    elbo, held_out_elbo = _losses(loss, free_bits, sums_out=bool(summed_out))

    torch_optimizer = optimizer([parameter for _, parameter in story.named_parameters() if parameter.requires_grad])
    torch_optimizer.zero_grad()
    scheduler = schedule(torch_optimizer) if schedule else None
    tempering, dtype = Tempering(beta), torch.bfloat16 if mixed_precision else None
    shards = shards or max(ranks.size, 1 if resume is None else shards_in(Path(resume)))
    how = (tempering, bool(kl_warmup), dtype, seed, shards, ranks)
    task = Task(story, columns, batch_size, elbo, torch_optimizer, clip, transform, *how)
    engines = _Engines(task, engine, compile, epochs * task.batches_in_epoch)
    history, best = History(engine=engines.name), Best(story, patience, kl_warmup)
    asked = {"clip": clip, "kl_warmup": kl_warmup, "patience": patience, "engine": engine}
    asked |= {"beta": _plain(beta), "free_bits": _plain(free_bits), "validation": len(held_out[0]) if held_out else 0}
    kept = checkpoints is not None or resume is not None
    training = Training(task, scheduler, history, best, engines, _settings(task) | asked if kept else {})
    sizes = {"epochs": epochs, "batch_size": batch_size, "observations": len(columns[0]), "shards": shards}
    ranks.refuse_different("training", json.dumps(asked | sizes | {"seed": seed}))
    tally = Tally(task, 1) if resume is None else restore(Path(resume), training)
    keeper = None if checkpoints is None else Checkpoints(Path(checkpoints), checkpoint_every, training)
    validate = partial(_validate, task, held_out_elbo, held_out) if held_out else None

    hidden = not ranks.is_first or (None if progress is None else not progress)
    bar = tqdm(total=epochs, initial=len(history), desc="training", unit="epoch", disable=hidden)
    with bar, best, _training(story, device), nullcontext() if keeper is None else keeper.finishing_steps():
        while tally.epoch <= epochs and not best.is_over(tally.epoch - 1):
            tempering.factor = min(1.0, tally.epoch / kl_warmup) if kl_warmup else 1.0
            tally.checkpoints = keeper
            row = _take_epoch(training, tally, validate)
            for callback in callbacks:
                callback(story, row)
            bar.update()
            bar.set_postfix({key: f"{row[key]:.2f}" for key in ("train_elbo", "validation_elbo") if key in row})
            tally = Tally(task, tally.epoch + 1, tally.skipped_in_a_row)
        if keeper is not None:
            keeper.write(tally)
    if held_out and best.weights is None:
        raise FloatingPointError("No epoch had a finite validation ELBO. Try a smaller learning rate, or clip.")
    return history


def _take_epoch(training: Training, tally: Tally, validate: Callable[[], float] | None) -> Row:
    """The rest of an epoch, judged and written into the history."""
    started, task, rate = time.perf_counter(), training.task, training.task.optimizer.param_groups[0]["lr"]
    try:
        training.history.engine = training.engine.take_epoch(tally)
    except (RuntimeError, ValueError) as error:
        if (lost := task.lost_parameter()) is None:
            raise
        raise FloatingPointError(f"The parameter {lost!r} is not finite, which fails ({first_line(error)}).") from error
    _keep_equal(task)
    row: Row = {"epoch": tally.epoch, "step": tally.epoch * task.batches_in_epoch} | tally.row
    row |= {"kl_factor": cast(float, task.tempering.factor), "learning_rate": rate}
    if training.scheduler is not None:
        training.scheduler.step()
    if validate is not None:
        row["validation_elbo"] = validate()
    row["seconds"] = round(time.perf_counter() - started, 4)
    training.history.rows.append(row)
    training.best.seen(row)
    return row


def _keep_equal(task: Task) -> None:
    """Gives every process the first one's buffers; raises RuntimeError when parameters are not equal by themselves."""
    ranks = task.ranks
    if ranks.size == 1:
        return
    ranks.copy_from_first([buffer for _, buffer in task.story.named_buffers()])
    sums = ranks.gather(
        json.dumps([_sum_of_bits(parameter) for _, parameter in task.story.named_parameters()]).encode()
    )
    if len(set(sums)) > 1:
        strangers = [number for number, other in enumerate(sums) if other != sums[0]]
        raise RuntimeError(f"The parameters of the processes {strangers} differ from those of the first.")


def _sum_of_bits(tensor: Tensor) -> int:
    """A number that changes with any bit of a tensor, the sign of a zero included."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))


def _tensors_of(story: Story) -> list[Tensor]:
    """Parameters and buffers, to be written to."""
    parameters = [parameter.detach() for _, parameter in story.named_parameters()]
    return [*parameters, *(buffer for _, buffer in story.named_buffers())]


def _plain(weights: float | Mapping[str, float] | None) -> float | dict[str, float] | None:
    return dict(weights) if isinstance(weights, Mapping) else weights


def _settings(task: Task) -> dict[str, Any]:
    """What must be the same where a training goes on."""
    transform = task.transform
    return {
        "seed": task.seed,
        "batch_size": task.batch_size,
        "data": checkpoint.fingerprint(_some_rows(column) for column in task.columns),
        "loss": type(task.loss).__name__,
        "optimizer": type(task.optimizer).__name__,
        "transform": getattr(transform, "__name__", type(transform).__name__),
        "precision": str(task.precision),
    }


def _some_rows(column: Tensor) -> Tensor:
    """A column, or rows from all over it where it lies on disk."""
    if not isinstance(column, Stored):
        return column
    return column[torch.linspace(0, len(column) - 1, min(len(column), ROWS_COMPARED)).long()]


class _Engines:
    """The engine that was asked for; with "auto" the captured one for as long as it works, then SVI."""

    def __init__(
        self, task: Task, wanted: Literal["auto", "svi", "captured"], compiled: bool | None, total_steps: int
    ) -> None:
        self.task = task
        self.may_change = wanted == "auto"
        captured = SharedEngine if task.is_shared else CapturedEngine
        self.current: Engine = SVIEngine(task) if wanted == "svi" else captured(task, total_steps, compiled)

    @property
    def name(self) -> str:
        """Of the one at work."""
        return self.current.name

    @property
    def learned(self) -> dict[str, float | int]:
        """What the one at work knows."""
        return self.current.learned

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Goes on with the engine that was at work."""
        if self.may_change and learned["name"] == SVIEngine.name:
            self.current = SVIEngine(self.task)
        self.current.recall(learned)

    def take_epoch(self, tally: Tally) -> str:
        """Takes every batch of the tally's epoch; returns the name of the engine that did.

        Raises:
            CaptureError: when the captured engine was asked for by name and the story cannot be captured.
        """
        try:
            with within_memory(f"A batch of {self.task.batch_size} observations and its gradient"):
                self.current.epoch(tally)
        except CaptureError as error:
            if not self.may_change:
                raise CaptureError(f"The story cannot be captured: {error}. Use engine='svi'.") from error
            log.info("training by svi, because the story cannot be captured: %s", error)
            self.current = SVIEngine(self.task)
            self.current.epoch(tally)
        return self.current.name


def _latents(story: Story, columns: Columns, transform: Transform | None) -> tuple[list[str], list[str]]:
    """The latents that the guide draws, and those that are summed out of the model, by name."""
    rows = tuple(column[:2] for column in columns)
    device, _ = traces.device_and_dtype(story)
    with noise.unit(device, 0, Purpose.CHECK), traces.scoring(story), checks.kept_buffers(story):
        rows = rows if transform is None else (transform(rows[0]), *rows[1:])
        model_trace, guide_trace = traces.run(story, *rows)
    return list(sample_sites(guide_trace)), list(discrete.summed_out(model_trace, guide_trace))


def _losses(loss: ELBO | None, free_bits: float | Mapping[str, float] | None, sums_out: bool) -> tuple[ELBO, ELBO]:
    """The loss to train by, and the one of held-out data, which has no free bits."""
    elbo = SummedOutELBO() if sums_out else Trace_ELBO()
    if free_bits is not None:
        return FreeBitsELBO(free_bits), elbo
    if loss is None:
        return elbo, elbo
    ours = copy.copy(loss)
    return ours, elbo if isinstance(loss, FreeBitsELBO) else ours


def _validate(task: Task, elbo: ELBO, held_out: Columns) -> float:
    """The objective on held-out data in eval mode, its latent terms unscaled, with the same noise every time."""
    size = math.ceil(VALIDATION_ROWS / elbo.num_particles)
    starts = range(0, len(held_out[0]), size)
    losses = torch.zeros(len(starts), dtype=torch.float64, device=task.device)
    with traces.evaluating(task.story):
        for number in task.ranks.mine(range(len(starts))):
            noise.reseed(task.device, task.seed, Purpose.VALIDATION, starts[number])
            rows = (column[starts[number] : starts[number] + size] for column in held_out)
            losses[number] = float(cast(Any, elbo).loss(*task.programs(tempered=False), *rows))
    (losses,) = task.ranks.sums([losses])
    return -sum(losses.tolist()) / len(held_out[0])


@contextmanager
def _training(story: Story, device: torch.device) -> Iterator[None]:
    """What surrounds training: train mode, our own parameter store and generators, no repeated validation."""
    modes = {module: module.training for module in story.modules()}
    with ExitStack() as stack:
        for context in (noise.forked(device), traces.own_parameter_store(), pyro.validation_enabled(False)):
            stack.enter_context(context)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Encountered NaN")  # such a step is not taken, and counted
        warnings.filterwarnings("ignore", ".*was not registered in the param store")  # frozen on purpose
        story.train(True)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _check_objective(
    loss: ELBO | None, beta: float | Mapping[str, float], free_bits: float | Mapping[str, float] | None
) -> None:
    objectives.check_numbers("beta", beta)
    objectives.check_numbers("free_bits", free_bits or 0.0)
    if loss is not None and free_bits is not None:
        raise ValueError(
            f"free_bits is an objective of its own, and so is loss={type(loss).__name__}(...); pass one of them."
        )


def _check_arguments(
    columns: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    epochs: int,
    batch_size: int,
    kl_warmup: int,
    clip: float | None,
    patience: int | None,
    engine: str,
    compile: bool | None,
    shards: int | None,
) -> None:
    if shards is not None:
        checks.check_at_least(1, shards=shards)
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("kl_warmup", kl_warmup, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; found {value}.")
    if batch_size >= 2**63:
        raise ValueError(f"batch_size must be a number of 64 bits; found {batch_size}.")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is a gradient norm and must be positive; found {clip}.")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1 epoch; found {patience}.")
    if patience is not None and not held_out:
        raise ValueError("patience counts epochs without a better validation ELBO; pass validation=.")
    if held_out and len(held_out) != len(columns):
        raise ValueError(
            f"validation must have the {len(columns)} columns of the training data; found {len(held_out)}."
        )
    if engine not in ("auto", "svi", "captured"):
        raise ValueError(f"Unknown engine {engine!r}; choose 'auto', 'svi' or 'captured'.")
    if engine == "svi" and compile:
        raise ValueError("Only a captured step can be compiled; use engine='auto' or 'captured'.")
    if columns and isinstance(columns[0], Tensor) and columns[0].dim() and len(columns[0]) == 1:
        raise ValueError("Training needs at least two observations; found one.")
