"""Densities and draws, asked for many thousand times: captured after some calls, compiled where that was wanted."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ppl_vae import noise
from ppl_vae.capture import CaptureError, Program, capture
from ppl_vae.memory import keep_what_is_freed
from ppl_vae.work import Work

log = logging.getLogger("ppl_vae")

# Tracing takes a tenth of a second or more and saves a few milliseconds per call: calls that were many will be more.
CALLS_BEFORE_CAPTURE = 20
ROWS_TO_COMPILE = 2048  # half a unit of noise: as many as the density of a model is asked for at once

# What compilation costs and saves on two cores, rounded to its disadvantage (docs/performance.md).
SECONDS_TO_COMPILE = 10.0
SECONDS_SAVED_PER_FLOP = 1e-12
SECONDS_SAVED_PER_NUMBER = 5e-10

Function = Callable[..., tuple[Tensor, ...]]


def pays(draws: int, each: Work) -> bool:
    """Whether compiling a density, of which so many draws are wanted, saves more time than it takes."""
    seconds = each.flops * SECONDS_SAVED_PER_FLOP + each.numbers * SECONDS_SAVED_PER_NUMBER
    return draws * seconds > SECONDS_TO_COMPILE


class Replays:
    """Calls functions of tensors; what was called often with tensors of the same shapes is replayed without Python.

    Args:
        compiled: compile what is captured, if it has rows enough. Results then agree to rounding.
        patience: how many calls of a function come before it is captured; None is ``CALLS_BEFORE_CAPTURE``, and
            infinity never captures.
    """

    def __init__(self, compiled: bool = False, patience: float | None = None) -> None:
        self.compiled = compiled
        self.patience = patience
        self.calls: Counter[Any] = Counter()
        self.programs: dict[Any, Function] = {}
        self.forms: dict[Any, TreeSpec] = {}  # of what functions return
        keep_what_is_freed()

    def call(
        self, name: Any, function: Callable[..., Any], *tensors: Tensor, num_kept: int = 0, rows: int | None = None
    ) -> Any:
        """``function(*tensors)``: tensors, in tuples and dictionaries. Functions of the same name are the same.

        One that draws random numbers draws them from torch's generators, and its replay draws the same numbers. What
        is to be compiled is so from its first call on, and values do not depend on how many calls were before.

        Args:
            num_kept: so many of the first tensors are the same objects in many calls, and are not written to. What a
                captured function computes of them alone is computed when others come.
            rows: how many rows are computed, if that is not the length of any tensor.
        """
        key = (name, *((tensor.shape, tensor.dtype) for tensor in tensors))

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            values, self.forms[key] = tree_flatten(function(*tensors))
            return tuple(values)

        if key in self.programs:
            values = self.programs[key](*tensors)
        else:
            compiles = self.compiled and (rows or max(len(tensor) for tensor in tensors)) >= ROWS_TO_COMPILE
            values = self._call(key, flat, tensors, num_kept, compiles)
        return tree_unflatten(values, self.forms[key])

    def _call(
        self, key: Any, function: Function, tensors: tuple[Tensor, ...], num_kept: int, compiles: bool
    ) -> tuple[Tensor, ...]:
        """Calls a function that was not captured yet, and captures it when it is due."""
        patience = 1 if compiles else self.patience
        due = self.calls[key] + 1 == (CALLS_BEFORE_CAPTURE if patience is None else patience)
        start = _generators(tensors[0].device) if due else ()
        values = function(*tensors)
        self.calls[key] += 1
        if due:
            build = partial(_fastest, key[0], tensors=tensors, num_kept=num_kept, compiles=compiles)
            self.programs[key], values = self._replayable(key[0], function, build, tensors, values, start)
        return values

    def _replayable(
        self,
        name: Any,
        function: Function,
        build: Callable[[Program], Function],
        tensors: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        start: tuple[Tensor, ...],
    ) -> tuple[Function, tuple[Tensor, ...]]:
        """The captured function if it gives these values from generators at ``start``, else the function as it is.

        With it come the values of whichever it is.
        """
        device = tensors[0].device
        end = _generators(device)
        try:
            program = build(capture(function, *tensors))
            with noise.forked(device):
                _set_generators(device, start)
                replayed = program(*tensors)
                agrees = _equal(_generators(device), end)
        except CaptureError as error:
            log.info("%s is evaluated as it is, because it cannot be captured: %s", name, error)
            return function, values
        if agrees and all(_agree(*pair) for pair in zip(replayed, values, strict=True)):
            return program, replayed
        log.info("%s is evaluated as it is, because its replay gave other values.", name)
        return function, values


class _Staged:
    """A program whose first part is run again when other tensors come first, and the rest every time."""

    def __init__(self, first: Function, rest: Function, num_kept: int) -> None:
        self.first, self.rest, self.num_kept = first, rest, num_kept
        self.kept: tuple[Tensor, ...] = ()
        self.known: tuple[Tensor, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        kept = tensors[: self.num_kept]
        if not self.kept or any(tensor is not before for tensor, before in zip(kept, self.kept, strict=True)):
            self.kept, self.known = kept, self.first(*kept)
        return self.rest(*self.known, *tensors)


def _fastest(name: Any, program: Program, tensors: tuple[Tensor, ...], num_kept: int, compiles: bool) -> Function:
    """The program in two stages, where there is a first; compiled where that is wanted and possible."""
    stages = program.split(num_kept) if num_kept else None
    if stages is None:
        return _compiled(name, program, tensors) if compiles else program
    first, rest = stages
    known = first(*tensors[:num_kept])
    return _Staged(first, _compiled(name, rest, (*known, *tensors)) if compiles else rest, num_kept)


def _compiled(name: Any, program: Program, tensors: tuple[Tensor, ...]) -> Function:
    try:
        return program.compiled(*tensors, frozen=True)
    except CaptureError as error:
        log.info("%s is captured but not compiled: %s", name, error)
        return program


def _generators(device: torch.device) -> tuple[Tensor, ...]:
    """Where torch's generators stand, that of the CPU and that of ``device``."""
    on_cuda = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return torch.random.get_rng_state(), *on_cuda


def _set_generators(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.random.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _equal(states: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(states, others, strict=True))


def _agree(replayed: Tensor, value: Tensor) -> bool:
    if not value.is_floating_point():
        return torch.equal(replayed, value)
    return torch.allclose(replayed, value, rtol=1e-4, atol=1e-5, equal_nan=True)
