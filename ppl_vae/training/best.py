"""The weights of the best epoch on validation data, and when to stop looking for better ones."""

import math

from torch import Tensor

from ppl_vae.traces import Story
from ppl_vae.training.history import Row


class Best:
    """Remembers the weights of the best validation epoch, puts them back at the end, and knows when to stop."""

    def __init__(self, story: Story, patience: int | None, kl_warmup: int) -> None:
        self.story = story
        self.patience = patience
        self.kl_warmup = kl_warmup
        self.elbo = -math.inf
        self.epoch = 0
        self.weights: dict[str, Tensor] | None = None

    def put_back(self, epoch: int, elbo: float, weights: dict[str, Tensor] | None) -> None:
        """What was the best when the training was interrupted."""
        self.epoch, self.elbo, self.weights = epoch, elbo, weights

    def seen(self, row: Row) -> bool:
        """Takes in an epoch; True when patience is at its end."""
        elbo, epoch = float(row.get("validation_elbo", -math.inf)), int(row["epoch"])
        if elbo > self.elbo:
            self.elbo, self.epoch = elbo, epoch
            self.weights = {name: value.detach().clone() for name, value in self.story.state_dict().items()}
        return self.is_over(epoch)

    def is_over(self, epoch: int) -> bool:
        """Whether patience is at its end after so many epochs."""
        return self.patience is not None and epoch - max(self.epoch, self.kl_warmup) >= self.patience

    def __enter__(self) -> "Best":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.weights is not None:
            self.story.load_state_dict(self.weights)
