"""The reference engine: pyro.infer.SVI, one step after another."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim

from ppl_vae.precision import matrix_products_in
from ppl_vae.training.optimizers import held_by
from ppl_vae.training.steps import Tally, Task, average_and_clip
from ppl_vae.training.supply import Batch, supply

Program = Callable[..., Any]


class WholeStoryOptimizer(PyroOptim):
    """One torch optimizer over all parameters, where Pyro would keep one for each; SVI accepts it as its own.

    A gradient that is not finite moves nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer
        self.parameters = held_by(optimizer)
        self.clip = clip
        self.num_observations = 1
        self.moved = True

    def __call__(self, params: object, *args: object, **kwargs: object) -> None:
        norm = average_and_clip(self.parameters, self.num_observations, self.clip)
        self.moved = bool(norm.isfinite())
        if self.moved:
            self.optimizer.step()
        self.optimizer.zero_grad()


class SVIEngine:
    """Runs model and guide for every step, as they are."""

    name = "svi"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.optimizer = WholeStoryOptimizer(task.optimizer, task.clip)
        self.svi = SVI(*task.programs(), self.optimizer, cast(Any, task.loss).loss, self._loss_and_grads)

    @property
    def learned(self) -> dict[str, float | int]:
        """Nothing."""
        return {}

    def recall(self, learned: Mapping[str, Any]) -> None:
        """There is nothing to know."""

    def epoch(self, tally: Tally) -> None:
        """Takes every batch that the tally has not seen."""
        with supply(self.task, tally.epoch) as batches:
            while tally.number < len(batches):
                batch = batches[tally.number]
                self.optimizer.num_observations = batch.size
                with matrix_products_in(self.task.precision):
                    loss = cast(float, self.svi.step(batch))
                tally.add(loss, self.optimizer.moved, batch.size)
                tally.rest()

    def _loss_and_grads(self, model: Program, guide: Program, batch: Batch) -> float:
        """Pyro's loss of a batch: the sum over its parts, here and in other processes."""
        loss = 0.0
        for part in batch.parts:
            self.task.reseed(batch.epoch, batch.number, part.shard)
            rows = self.task.batch(part.columns, part.rows)
            loss += float(cast(Any, self.task.loss).loss_and_grads(model, guide, *rows))
        return self.task.add_up(loss)
