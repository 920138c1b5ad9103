"""The captured engine where a batch is cut into parts: to share it among processes, or for less memory.

The gradient of a part is captured and replayed, gradients are added up over parts and processes, and every process
takes the same step of the optimizer: parameters that were equal once stay equal without being sent.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.capture import CaptureError, capture
from ppl_vae.checks import kept_buffers
from ppl_vae.training.captured import Replaying, StepFunction, compare, frozen, inputs_of, move, pays, trainable
from ppl_vae.training.steps import Tally, Task
from ppl_vae.training.supply import Batch, Part, Supply, supply

log = logging.getLogger("ppl_vae")


class SharedEngine(Replaying):
    """Replays the traced gradient of each part of a batch; the optimizer's step is taken as it is."""

    def __init__(self, task: Task, total_steps: int, compiled: bool | None) -> None:
        super().__init__(task, total_steps, compiled)
        self.gradients: dict[int, _Gradient] = {}

    def epoch(self, tally: Tally) -> None:
        """Takes every batch that the tally has not seen.

        Raises:
            CaptureError: saying why the gradient cannot be captured; the tally counts the batches that were taken.
        """
        with supply(self.task, tally.epoch) as batches:
            is_known = False
            while tally.number < len(batches):
                batch = batches[tally.number]
                if self.started and not is_known:
                    self._know(batches)
                    is_known = True
                loss, taken = self._replayed(batch) if self.started else (self.start(batch), self.started)
                tally.add(loss, taken, batch.size)
                tally.rest()

    def _know(self, batches: Supply) -> None:
        """Traces anew where what is frozen has changed since the last epoch."""
        if (now := frozen(self.task)) != self.frozen:
            self._capture(batches)
            self.frozen = now

    def _replayed(self, batch: Batch) -> tuple[float, bool]:
        loss = 0.0
        for part in batch.parts:
            self.task.reseed(batch.epoch, batch.number, part.shard)
            loss += self.gradients[len(part.rows)].add(part)
        return move(self.task, loss, batch.size)

    def _capture(self, batches: Supply) -> None:
        """Traces the gradient of parts of each size; nothing is sent meanwhile, as each process has its own parts."""
        self.gradients, self.has_compiled = {}, False
        examples = {len(part.rows): (batches[number], part) for number in (-1, 0) for part in batches[number].parts}
        for size, (batch, part) in examples.items():
            self.gradients[size] = _Gradient(self.task, part)
            self.gradients[size].compare(batch, part)
        operations = max((gradient.num_operations for gradient in self.gradients.values()), default=0)
        if self.compiled or (self.compiled is None and pays(self.total_steps, self.work, operations)):
            self._compile(examples)

    def _compile(self, examples: Mapping[int, tuple[Batch, Part]]) -> None:
        try:
            for size, (_, part) in examples.items():
                self.gradients[size].compile(part)
            self.has_compiled = True
        except CaptureError as error:
            if self.compiled:
                raise
            log.info("training is captured but not compiled: %s", error)


class _Gradient:
    """Loss and gradient of a part of some size, summed over its rows, as a captured program."""

    def __init__(self, task: Task, part: Part) -> None:
        self.task = task
        inputs = inputs_of(task, part)
        function = StepFunction(task, "after others")
        program = trainable(capture(function, *inputs))
        self.num_operations = len(program.graph.graph.nodes)
        self.trained: list[nn.Parameter] = function.trained
        self.program: Callable[..., Any] = program

    def add(self, part: Part) -> float:
        """Adds the gradient of a part to the parameters' own; returns its loss."""
        loss, _, *gradients = self.program(*inputs_of(self.task, part))
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return float(loss)

    def compare(self, batch: Batch, part: Part) -> None:
        """Raises CaptureError when a replay does not give what Pyro does with the same noise."""
        with kept_buffers(self.task.story):
            self.task.reseed(batch.epoch, batch.number, part.shard)
            replayed = [torch.tensor(self.add(part)), *self._taken()]
        with kept_buffers(self.task.story):
            self.task.reseed(batch.epoch, batch.number, part.shard)
            loss = float(self.task.loss_and_grads(*self.task.batch(part.columns, part.rows)))
            eager = [torch.tensor(loss), *self._taken()]
        compare(replayed, eager, [torch.zeros_like(tensor) for tensor in eager])

    def _taken(self) -> list[Tensor]:
        """The gradients, which the parameters are left without."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        self.task.optimizer.zero_grad()
        return gradients

    def compile(self, part: Part) -> None:
        """Fuses the operations; raises CaptureError when inductor cannot."""
        inputs, function = inputs_of(self.task, part), StepFunction(self.task, "after others", compiled=True)
        program = trainable(capture(function, *inputs)).compiled(*inputs)
        with kept_buffers(self.task.story):
            program(*inputs)  # what is compiled late, is compiled now
        self.trained, self.program = function.trained, program
