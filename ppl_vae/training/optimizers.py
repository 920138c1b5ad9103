"""A torch optimizer's step as a function of tensors, so that it can be traced like everything else."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    return [value for state in optimizer.state.values() for value in _tensors(state).values()]


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


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


Held = dict[tuple[nn.Parameter, str], Tensor]  # by name: "" is the parameter, all else what is remembered of it


def held_in(
    optimizer: torch.optim.Optimizer, parameters: dict[nn.Parameter, Tensor], remembered: Iterable[Tensor]
) -> Held:
    """Tensors in the place of parameters and of :func:`tensors_in`, by what they stand for."""
    names = [(parameter, name) for parameter, state in optimizer.state.items() for name in _tensors(state)]
    pairs = zip(cast(Any, names), remembered, strict=True)
    return {(parameter, ""): tensor for parameter, tensor in parameters.items()} | dict(pairs)


class LongRows:
    """An optimizer of the same kind that moves few long rows in the place of many parameters.

    An optimizer with a fused step treats each number by itself: its parameters come into one row that share their
    group, their dtype and their number of steps. Those of any other optimizer stay alone, in their own shape.

    Args:
        optimizer: is not touched.
        trained: the parameters that have a gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter]) -> None:
        self.rows: dict[Any, list[nn.Parameter]] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in [p for p in group["params"] if any(p is one for one in trained)]:
                state = optimizer.state.get(parameter, {})
                alike = (parameter.dtype, float(state.get("step", 0)), *_tensors(state))
                alike = alike if is_fused(optimizer) else id(parameter)
                self.rows.setdefault((number, alike), []).append(parameter)
        self.optimizer: Any = copy.copy(optimizer)
        self.optimizer.param_groups, self.optimizer.state = [], defaultdict(dict)
        parameters = {p: p.detach() for p in held_by(optimizer)}
        rows = self.gather(held_in(optimizer, parameters, tensors_in(optimizer)))
        for ((number, _), (first, *_)), row in zip(self.rows.items(), rows, strict=True):
            stand_in = nn.Parameter(row.pop(""))
            self.optimizer.param_groups.append(optimizer.param_groups[number] | {"params": [stand_in]})
            self.optimizer.state[stand_in] = optimizer.state.get(first, {}) | row
        self.of_group = [number for number, _ in self.rows]

    def gather(self, held: Held) -> list[dict[str, Tensor]]:
        """For each row the long parameter, and what is remembered of it; a single parameter is handed on as it is."""
        rows = []
        for members in self.rows.values():
            names = [name for parameter, name in held if parameter is members[0]]
            rows.append({name: _in_a_row(name, [held[parameter, name] for parameter in members]) for name in names})
        return rows

    def spread(self, rows: Sequence[dict[str, Tensor]]) -> Held:
        """What :meth:`gather` gathered, as views."""
        return {
            (parameter, name): part
            for members, row in zip(self.rows.values(), rows, strict=True)
            for name, long in row.items()
            for parameter, part in zip(members, _parts(name, long, members), strict=True)
        }

    def move(
        self, rows: Sequence[dict[str, Tensor]], gradients: dict[nn.Parameter, Tensor], rates: Sequence[Tensor]
    ) -> None:
        """One step of the optimizer, in place; learning rates are those of the groups of the original."""
        remembered = [tensor for row in rows for name, tensor in row.items() if name]
        parameters = {}
        for stand_in, members, row in zip(held_by(self.optimizer), self.rows.values(), rows, strict=True):
            row[""].grad = _in_a_row("", [gradients[parameter] for parameter in members])
            parameters[stand_in] = row[""]
        traced_step(self.optimizer, parameters, remembered, [rates[n] for n in self.of_group], None, fused=False)


def _in_a_row(name: str, tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1 or name == "step":
        return tensors[0]
    return torch.cat([tensor.flatten() for tensor in tensors])


def _parts(name: str, long: Tensor, members: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    if len(members) == 1 or name == "step":
        return [long] * len(members)
    parts = long.split([member.numel() for member in members])
    return [part.view(member.shape) for part, member in zip(parts, members, strict=True)]


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
