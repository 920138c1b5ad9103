"""A torch optimizer's step as a function of tensors, so that it can be traced like everything else."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ppl_vae.capture import CaptureError


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is one fused operation, which can be told to leave everything as it was."""
    return all(group.get("fused") for group in optimizer.param_groups)


def held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def tensors_in(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer remembers of its parameters."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def frozen_numbers(optimizer: torch.optim.Optimizer) -> Any:
    """The numbers that a traced step freezes: every hyperparameter but the learning rate."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]


def traced_step(
    optimizer: torch.optim.Optimizer,
    parameters: dict[nn.Parameter, Tensor],
    remembered: Sequence[Tensor],
    rates: Sequence[Tensor],
    is_finite: Tensor | None,
    fused: bool,
    divisor: int = 1,
) -> None:
    """Moves tensors in the place of parameters, in place, as ``optimizer.step()`` would move the parameters.

    Args:
        optimizer: whose step it is; it is not touched.
        parameters: the tensor that stands for each parameter, with its gradient.
        remembered: tensors that stand for :func:`tensors_in`, in this order.
        rates: learning rate of each group of parameters, shape ``()``.
        is_finite: whether to move, shape ``()``; where it is not, everything stays as it was. None always moves.
        fused: by the optimizer's fused operation; otherwise in single operations, for a compiler to fuse.
        divisor: of the gradients; 1 unless fused.

    Raises:
        CaptureError: when the optimizer holds a parameter that is not the story's, or remembers more than tensors.
    """
    if any(held not in parameters for held in held_by(optimizer)):
        raise CaptureError("the optimizer holds a parameter that is not the story's")
    ways: dict[str, Any] = {} if fused else {"fused": False, "foreach": False, "capturable": True}
    twin: Any = copy.copy(optimizer)
    twin.param_groups = [
        {name: ways.get(name, value) for name, value in group.items()}
        | {"params": [parameters[held] for held in group["params"]], "lr": rate}
        for group, rate in zip(optimizer.param_groups, rates, strict=True)
    ]
    twin.state = defaultdict(dict)
    given = iter(remembered)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor | None):
                raise CaptureError(f"{type(optimizer).__name__} remembers {name!r}, which is not a tensor")
            twin.state[parameters[cast(nn.Parameter, parameter)]][name] = None if value is None else next(given)
    with torch.no_grad():
        if fused:
            if divisor > 1:
                twin.grad_scale = torch.full((), divisor, dtype=torch.float32, device=rates[0].device)
            twin.found_inf = None if is_finite is None else is_finite.logical_not().to(torch.float32)
            twin.step()
        else:
            _step_where(is_finite, twin, list(parameters.values()), remembered)


def _step_where(
    is_finite: Tensor | None, twin: Any, parameters: Sequence[Tensor], remembered: Sequence[Tensor]
) -> None:
    """Takes a step in single operations, then puts everything back where the gradient is not finite."""
    places = [(held, name) for held, state in twin.state.items() for name, value in state.items() if value is not None]
    before = [] if is_finite is None else [tensor.clone() for tensor in (*parameters, *remembered)]
    with patch.object(torch.compiler, "_is_compiling_flag", True):  # numbers of the optimizer then stay tensors
        twin.step()
    after = [*parameters, *(twin.state[held][name] for held, name in places)]
    for number, (tensor, new) in enumerate(zip((*parameters, *remembered), after, strict=True)):
        if is_finite is not None:
            tensor.copy_(torch.where(is_finite, new, before[number]))
        elif new is not tensor:
            tensor.copy_(new)
