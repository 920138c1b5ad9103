"""One step of training: how Pyro's SVI meets one torch optimizer, and how the latent terms are warmed up."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import nn

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class KLWarmup(Messenger):
    """Multiplies log p(z) and log q(z | x) by ``factor``, and leaves log p(x | z) alone.

    Bowman et al. 2016, https://arxiv.org/abs/1511.06349. In training only: what is scaled is not a bound on log p(x).
    """

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.factor


class WholeStoryOptimizer(PyroOptim):
    """One torch optimizer over all parameters, where Pyro would keep one for each; SVI accepts it as its own.

    The gradient is that of the mean loss per observation, so that clipping does not depend on the batch size. A
    gradient that is not finite moves nothing.

    Args:
        optimizer: a torch optimizer over the story's parameters.
        clip: largest norm of the gradient; None does not clip.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.clip = clip
        self.num_observations = 1
        self.skipped_in_a_row = 0

    def __call__(self, params: object, *args: object, **kwargs: object) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient /= self.num_observations
        norm = nn.utils.get_total_norm(gradients)
        if bool(norm.isfinite()):
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad()
