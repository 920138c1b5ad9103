"""What happened in a training run, one row per epoch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = dict[str, float | int | str]


@dataclass
class History:
    """The rows of ``metrics.jsonl``, one per epoch, and the engine that made them.

    Columns: ``epoch`` (from 1), ``step`` (batches so far), ``train_elbo`` (nats per observation, as trained: with
    warm-up, beta and free bits), ``validation_elbo`` (nats per observation, without them), ``kl_factor``,
    ``learning_rate``, ``skipped_steps`` and ``seconds``. An ELBO is minus the loss that was passed to ``fit``.

    >>> history = History("svi", [{"epoch": 1, "train_elbo": -9.0}, {"epoch": 2, "train_elbo": -8.0}])
    >>> history["train_elbo"]
    array([-9., -8.])
    """

    engine: str
    rows: list[Row] = field(default_factory=list)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights the story holds: the best on validation data, otherwise the last."""
        if "validation_elbo" not in self.rows[0]:
            return int(self["epoch"][-1])
        return int(self["epoch"][np.nanargmax(self["validation_elbo"])])


def rows_of(history: Any) -> list[Row]:
    """What a file tells of epochs; ValueError where that is no history of a training."""
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError("its history is no list of epochs")
    judged = {"validation_elbo"} if any("validation_elbo" in row for row in history) else set()
    for row in history:
        for name in sorted({"epoch", "train_elbo"} | judged):
            if not isinstance(row.get(name), int | float):
                raise ValueError(f"an epoch of its history has no number {name}")
        if not float(row["epoch"]).is_integer():
            raise ValueError(f"{row['epoch']} is no epoch")
    return history
