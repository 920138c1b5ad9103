"""One step of training: what is learned from which data, and what happens to a gradient before it moves anything."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self, cast

import pyro
import torch
from pyro.infer import ELBO
from pyro.nn import PyroModule, pyro_method
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppl_vae import noise, objectives, traces
from ppl_vae.checks import Transform
from ppl_vae.noise import Purpose
from ppl_vae.precision import matrix_products_in
from ppl_vae.ranks import Ranks
from ppl_vae.traces import Columns, Story

SKIPPED_STEPS_ALLOWED = 10

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Tempering(Messenger):
    """Multiplies log p(z) and log q(z | x) of a latent by ``factor`` and by its beta, and leaves log p(x | z) alone.

    A factor that grows to 1 is a warm-up: Bowman et al. 2016, https://arxiv.org/abs/1511.06349. A beta stays: Higgins
    et al. 2017, https://openreview.net/forum?id=Sy2fzU9gl. In training only: what is scaled is not a bound on log p(x).

    Args:
        beta: for all latents, or by site name (then 1 for the others).
    """

    def __init__(self, beta: float | Mapping[str, float] = 1.0) -> None:
        super().__init__()
        self.beta = beta
        self.factor: float | Tensor = 1.0

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            beta = objectives.number_of(msg["name"], self.beta, 1.0)
            msg["scale"] = msg["scale"] * (self.factor if beta == 1 else self.factor * beta)


@dataclass(frozen=True)
class Task:
    """What an engine does for an epoch: which story learns from which batches, by which loss and optimizer.

    Attributes:
        warms_up: whether the factor of ``tempering`` ever differs from 1.
        precision: dtype of matrix products; None is the story's.
        shards: parts of each batch, whose gradients are added up.
        ranks: the processes that take these parts.
        notice: what the processes tell each other with every step.
    """

    story: Story
    columns: Columns
    batch_size: int
    loss: ELBO
    optimizer: torch.optim.Optimizer
    clip: float | None
    transform: Transform | None
    tempering: Tempering
    warms_up: bool
    precision: torch.dtype | None
    seed: int
    shards: int = 1
    ranks: Ranks = field(default_factory=Ranks)
    notice: "Notice" = field(default_factory=lambda: Notice())

    @property
    def is_shared(self) -> bool:
        """Whether a step is put together from parts."""
        return self.shards > 1 or self.ranks.size > 1

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.columns[0].device

    @property
    def batches_in_epoch(self) -> int:
        """How many batches the data make."""
        return math.ceil(len(self.columns[0]) / self.batch_size)

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The row numbers of each batch of an epoch, in its own random order."""
        order = noise.permutation(len(self.columns[0]), self.seed, epoch).to(self.device)
        return order.split(self.batch_size)

    def parts(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        """The row numbers of each part of a batch that is not empty, and which part it is."""
        return [(shard, some) for shard, some in enumerate(rows.tensor_split(self.shards)) if len(some)]

    def reseed(self, epoch: int, number: int, shard: int = 0) -> None:
        """Starts the noise of a batch, or of a part of it."""
        noise.start(self.device, self.unit_seed(epoch, number, shard))

    def unit_seed(self, epoch: int, number: int, shard: int = 0) -> int:
        """The seed of the noise of a batch, or of a part of it."""
        part = (shard,) if self.shards > 1 else ()
        return noise.unit_seed(self.seed, Purpose.TRAINING, epoch, number, *part)

    def batch(self, columns: Columns, rows: Tensor) -> Columns:
        """These rows, the first column transformed."""
        batch = tuple(column.index_select(0, rows) for column in columns)
        return batch if self.transform is None else (self.transform(batch[0]), *batch[1:])

    def programs(self, tempered: bool = True) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The story's model and guide as ``SVI`` wants them: tempered, and with their parameters in the store."""
        model, guide = self.story.model, self.story.guide
        if tempered:
            model, guide = self.tempering(model), self.tempering(guide)
        return self._register(model), self._register(guide)

    def _register(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """The program with its parameters in the store; a PyroModule's methods need not be ``pyro_method``s."""
        if isinstance(self.story, PyroModule):
            return partial(pyro_method(lambda story, *columns: program(*columns)), self.story)

        def with_parameters(*columns: Tensor) -> Any:
            pyro.module("story", cast(nn.Module, self.story))
            return program(*columns)

        return with_parameters

    def loss_and_grads(self, *batch: Tensor) -> Any:
        """Pyro's loss of a batch; its gradient is added to the parameters'."""
        with matrix_products_in(self.precision):
            return cast(Any, self.loss).loss_and_grads(*self.programs(), *batch)

    def add_up(self, loss: float) -> float:
        """The loss of a batch from those of each process's parts of it; the same is done with the gradients.

        A parameter that no process has a gradient for has none afterwards either.
        """
        if self.ranks.size == 1:
            return loss
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        known = [float(p.grad is not None) for p in parameters]
        kinds = {gradient.dtype for gradient in gradients} & {torch.float32, torch.float64}  # sent as one with these
        kind = next(iter(kinds), torch.float32)
        numbers = torch.tensor([loss, *self.notice.own, *known], dtype=kind, device=self.device)
        *gradients, numbers = self.ranks.sums([*gradients, numbers])
        loss, *told = numbers.tolist()
        self.notice.of_all = told[: len(self.notice.own)]
        for parameter, gradient, times in zip(parameters, gradients, told[len(self.notice.own) :], strict=True):
            parameter.grad = gradient if times else None
        return loss

    def lost_parameter(self) -> str | None:
        """The first parameter that is not finite, which only a damaged checkpoint or a huge step leaves behind."""
        parameters = self.story.named_parameters()
        return next((name for name, parameter in parameters if not bool(parameter.isfinite().all())), None)

    def explain_non_finite(self, epoch: int, number: int) -> str:
        """Names the first parameter that is not finite, else the first site of a batch whose log probability is not."""
        if lost := self.lost_parameter():
            return f"The parameter {lost!r} is not finite: no batch of epoch {epoch} has a finite loss."
        where = "none: only the gradient overflows; try a smaller learning rate, or clip"
        for shard, rows in reversed(self.parts(self.batches(epoch)[number])):
            self.reseed(epoch, number, shard)
            with torch.no_grad():
                model_trace, guide_trace = traces.run(self.story, *self.batch(self.columns, rows))
            for trace, part in ((model_trace, "model"), (guide_trace, "guide")):
                trace.compute_log_prob()
                for name, site in reversed(traces.sample_sites(trace).items()):
                    if not bool(torch.isfinite(site["log_prob"]).all()):
                        where = f"site {name!r} of the {part}"
        return (
            f"The loss or its gradient was not finite for {SKIPPED_STEPS_ALLOWED} batches in a row (epoch {epoch}, "
            f"batch {number}, seed {self.seed}); none of these steps was taken. First site that is not finite: {where}."
        )


class Notice:
    """What the processes of a training tell each other with every step; each number is added up.

    Attributes:
        own: what this process has to say.
        of_all: what all together said with the last step.
    """

    def __init__(self) -> None:
        self.own = [0.0, 0.0, 0.0]
        self.of_all = [0.0, 0.0, 0.0]


def average_and_clip(
    parameters: Iterable[Tensor], num_observations: int, clip: float | None, together: bool = True
) -> Tensor:
    """Makes gradients those of the mean loss per observation, no longer than ``clip``; returns their norm before that.

    Averaged first, so that clipping does not depend on the batch size. ``together`` computes all norms in one
    operation, which inductor does not know.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = gradients_of(parameters)
    if gradients and num_observations > 1:
        torch._foreach_div_(gradients, num_observations)  # pyright: ignore[reportPrivateImportUsage]
    norm = nn.utils.get_total_norm(gradients, foreach=together)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=together)
    return norm


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


TALLIED = {"epoch": int, "number": int, "total": float, "observations": int, "skipped": int, "skipped_in_a_row": int}


class Keeper(Protocol):
    """Writes checkpoints."""

    @property
    def are_due(self) -> bool: ...

    def write(self, tally: "Tally") -> None: ...


class Tally:
    """Adds up what the steps of an epoch report, and gives up after ten in a row that could not be taken.

    Attributes:
        number: of the next batch.
        checkpoints: what to look after between steps; None where nothing is kept.
    """

    def __init__(self, task: Task, epoch: int, skipped_in_a_row: int = 0) -> None:
        self.task = task
        self.epoch = epoch
        self.number = 0
        self.total = 0.0
        self.observations = 0
        self.skipped = 0
        self.skipped_in_a_row = skipped_in_a_row
        self.checkpoints: Keeper | None = None

    @property
    def step(self) -> int:
        """Batches since the beginning of the training."""
        return (self.epoch - 1) * self.task.batches_in_epoch + self.number

    def rest(self, read: Callable[[], None] = lambda: None) -> None:
        """Between two steps: a checkpoint, if it is time for one, after ``read`` has handed in every result."""
        if self.checkpoints is not None and self.checkpoints.are_due:
            read()
            self.checkpoints.write(self)

    def as_table(self) -> dict[str, float | int]:
        """What :meth:`from_table` needs."""
        return {name: getattr(self, name) for name in TALLIED}

    @classmethod
    def from_table(cls, task: Task, table: Mapping[str, float | int]) -> Self:
        """The tally that was written down; OverflowError when a number is beyond 64 bits."""
        tally = cls(task, int(table["epoch"]))
        for name, kind in TALLIED.items():
            value = kind(table[name])
            if kind is int and value.bit_length() > 63:
                raise OverflowError(f"{name} has more than 64 bits")
            setattr(tally, name, value)
        return tally

    def add(self, loss: float, was_taken: bool, num_observations: int) -> None:
        """The next step: its summed loss, and whether the gradient was finite and it was taken.

        Raises:
            FloatingPointError: after ten steps in a row that were not.
        """
        self.number += 1
        if was_taken:
            self.total, self.observations = self.total - loss, self.observations + num_observations
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == SKIPPED_STEPS_ALLOWED:
            raise FloatingPointError(self.task.explain_non_finite(self.epoch, self.number - 1))

    @property
    def row(self) -> dict[str, float | int | str]:
        """The columns of the history that an engine fills."""
        mean = self.total / self.observations if self.observations else float("nan")
        return {"train_elbo": mean, "skipped_steps": self.skipped}


class Engine(Protocol):
    """Takes the steps of an epoch."""

    @property
    def name(self) -> str: ...

    @property
    def learned(self) -> dict[str, float | int]:
        """What it knows of the task, for an engine that goes on with it."""
        ...

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Goes on with what another engine knew."""
        ...

    def epoch(self, tally: Tally) -> None:
        """Takes every batch that the tally has not seen."""
        ...
