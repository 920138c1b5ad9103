"""Densities that are evaluated many thousand times: captured after some calls, compiled where that was asked for."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture import CaptureError, Program, capture

log = logging.getLogger("ppl_vae")

# Tracing takes a tenth of a second or more and saves a few milliseconds per call: calls that were many will be more.
CALLS_BEFORE_CAPTURE = 20
ROWS_TO_COMPILE = 1024

Function = Callable[..., tuple[Tensor, ...]]


class Replays:
    """Calls functions of tensors; what was called often with tensors of the same shapes is replayed without Python.

    Args:
        compiled: compile what is captured, if it has rows enough. Results then agree to rounding only.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.calls: Counter[Any] = Counter()
        self.programs: dict[Any, Function] = {}

    def call(self, name: Any, function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``function(*tensors)``. Functions of the same name are the same; their results are floating tensors."""
        key = (name, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key in self.programs:
            return self.programs[key](*tensors)
        values = function(*tensors)
        self.calls[key] += 1
        if self.calls[key] == CALLS_BEFORE_CAPTURE:
            self.programs[key] = self._replayable(name, function, tensors, values)
        return values

    def _replayable(
        self, name: Any, function: Function, tensors: tuple[Tensor, ...], values: tuple[Tensor, ...]
    ) -> Function:
        """The captured function if it gives these values, else the function as it is."""
        try:
            program = self._fastest(name, capture(function, *tensors), tensors)
            replayed = program(*tensors)
        except CaptureError as error:
            log.info("%s is evaluated as it is, because it cannot be captured: %s", name, error)
            return function
        if all(_agree(*pair) for pair in zip(replayed, values, strict=True)):
            return program
        log.info("%s is evaluated as it is, because its replay gave other values.", name)
        return function

    def _fastest(self, name: Any, program: Program, tensors: tuple[Tensor, ...]) -> Function:
        """The program, compiled where that is wanted and possible."""
        if not self.compiled or max(len(tensor) for tensor in tensors) < ROWS_TO_COMPILE:
            return program
        try:
            return program.compiled(*tensors, frozen=True)
        except CaptureError as error:
            log.info("%s is captured but not compiled: %s", name, error)
            return program


def _agree(replayed: Tensor, value: Tensor) -> bool:
    return torch.allclose(replayed, value, rtol=1e-4, atol=1e-5, equal_nan=True)
