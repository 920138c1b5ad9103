"""The captured engine: a training step is traced once through Pyro, then replayed for every batch.

A step gathers the batch, transforms it, runs Pyro's loss and its gradient, averages and clips, and moves parameters.
Compiled, several steps are one call; on CUDA a step is one launch of a CUDA graph.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import noise, traces
from ppl_vae.capture import CaptureError, Program, capture, clones, first_line
from ppl_vae.memory import keep_what_is_freed
from ppl_vae.traces import Story
from ppl_vae.training.optimizers import LongRows, frozen_numbers, held_by, held_in, is_fused, tensors_in, traced_step
from ppl_vae.training.steps import Tally, Task, average_and_clip, gradients_of
from ppl_vae.training.supply import Batch, Part, Supply, are_stored, supply
from ppl_vae.work import Work, counted

log = logging.getLogger("ppl_vae")

Step = Callable[..., tuple[Tensor, ...]]  # (*state, *columns, factor, *rates, rows) -> loss, norm of the gradient

MOST_STEPS_PER_CALL = 8
LARGE_STEP = 1e8  # in floating point operations: the calls between them do not matter then
SEEDS_AT_ONCE = 64
STEPS_UNTIL_READ = 50  # on CUDA, where reading a number waits for the device
LARGEST_DIFFERENCE = 1e-3

# What compilation costs and saves on two cores, rounded to its disadvantage (docs/performance.md).
SECONDS_TO_COMPILE = 30.0
SECONDS_TO_COMPILE_EACH = 0.1  # operation, where there are many
SECONDS_SAVED_PER_STEP = 2.5e-4
SECONDS_SAVED_PER_NUMBER = 2e-10


class Replaying:
    """What an engine that captures knows of itself, and tells one that goes on for it.

    Args:
        task: what to do.
        total_steps: of the whole training.
        compiled: compile with inductor; None does where ``total_steps`` are enough to win.
    """

    def __init__(self, task: Task, total_steps: int, compiled: bool | None) -> None:
        self.task = task
        self.total_steps = total_steps
        self.compiled = compiled
        self.has_compiled = False
        self.started = False
        self.work = Work()
        self.frozen: Any = None  # what was captured would be wrong if this changed; None until something is
        keep_what_is_freed()

    @property
    def name(self) -> str:
        """The engine, and whether it compiled."""
        return "captured, compiled" if self.has_compiled else "captured"

    @property
    def learned(self) -> dict[str, float | int]:
        """The work of a step, whether one was taken, and whether it is compiled (-1 where that is open)."""
        compiled = -1 if self.frozen is None else int(self.has_compiled)
        return {"started": int(self.started), **vars(self.work), "compiled": compiled}

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Takes the same steps as the engine that learned this, unless it was said whether to compile."""
        self.started = bool(learned["started"])
        self.work = Work(int(learned["flops"]), int(learned.get("numbers", 0)))  # older files have no numbers
        if self.compiled is None and learned["compiled"] >= 0:
            self.compiled = bool(learned["compiled"])

    def start(self, batch: Batch) -> float:
        """One eager step, for real: it makes the optimizer's state, and counts the work. Returns its loss."""
        with counted() as self.work:
            loss, self.started = eager_step(self.task, batch)
        return loss


class CapturedEngine(Replaying):
    """Replays the traced step; on CUDA as a graph."""

    def __init__(self, task: Task, total_steps: int, compiled: bool | None) -> None:
        super().__init__(task, total_steps, compiled)
        self.steps: dict[int, Step] = {}
        self.group: Step | None = None
        self.steps_in_group = min(MOST_STEPS_PER_CALL, len(task.columns[0]) // task.batch_size)
        self.snapshot: list[Tensor] = []
        self.on_cuda = task.device.type == "cuda"

    def epoch(self, tally: Tally) -> None:
        """Takes every batch that the tally has not seen.

        Raises:
            CaptureError: saying why the step cannot be captured; the tally counts the batches that were taken.
        """
        with supply(self.task, tally.epoch) as batches:
            while not self.started and tally.number < len(batches):
                self._start(tally, batches[tally.number])
            if self.started:
                if (now := frozen(self.task)) != self.frozen:
                    self._capture(batches)
                    self.frozen = now
                self._take(tally, batches)

    def _take(self, tally: Tally, batches: Supply) -> None:
        """Takes every step that is left."""
        state, settings = state_of(self.task), settings_of(self.task)
        unread = _Unread(tally, STEPS_UNTIL_READ if self.on_cuda else 1)
        whole = sum(len(rows) == self.task.batch_size for rows in batches.rows)
        stride = self.steps_in_group if self.group else 1
        number = tally.number
        seeds: dict[int, int] = {}
        while number < len(batches):
            if number not in seeds:
                ahead = range(number, min(number + SEEDS_AT_ONCE * stride, len(batches)), stride)
                seeds = {number: self.task.unit_seed(tally.epoch, number) for number in ahead}
            noise.start(self.task.device, seeds[number])
            if self.group and number + self.steps_in_group <= whole:
                unread.read()
                rows = torch.stack(tuple(batches.rows[number : number + self.steps_in_group]))
                unread.add(*self._several([*state, *self.task.columns, *settings], rows), rows.shape[1])
                number += self.steps_in_group
            else:
                (part,) = batches[number].parts
                loss, norm = self.steps[len(part.rows)](*state, *part.columns, *settings, part.rows)
                unread.add(loss.reshape(1), norm.reshape(1), len(part.rows))
                number += 1
            tally.rest(unread.read)
        unread.read()

    def _start(self, tally: Tally, batch: Batch) -> None:
        """One eager step, for real: it makes the optimizer's state, and counts the work."""
        if self.on_cuda:
            for group in self.task.optimizer.param_groups:
                group.update({"capturable": True} if "capturable" in group else {})
        tally.add(self.start(batch), self.started, batch.size)

    def _capture(self, batches: Supply) -> None:
        """Traces a step of each batch size, and compares its first replay with an eager step."""
        self.steps, self.group, self.has_compiled = {}, None, False
        operations = 0
        examples = {len(batches.rows[number]): batches[number] for number in (-1, 0)}
        for size, batch in examples.items():
            inputs = inputs_of(self.task, batch.parts[0])
            step, operations = _captured(self.task, inputs)
            self.task.reseed(batch.epoch, batch.number)
            with _unchanged(self.task) as before:
                loss, _ = step(*inputs)
                replayed = [loss, *clones(state_of(self.task))]
            with _unchanged(self.task):
                loss, _ = eager_step(self.task, batch)
                compare(replayed, [torch.tensor(loss), *state_of(self.task)], [torch.zeros(()), *before])
            self.steps[size] = step
        if self.on_cuda:
            self.steps = {size: self._graphed(size, batch.parts[0]) for size, batch in examples.items()}
        elif self.compiled or (self.compiled is None and pays(self.total_steps, self.work, operations)):
            self._compile(examples[len(batches.rows[0])].parts[0])

    def _several(self, inputs: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Several steps in one compiled call; one by one, if that met a gradient that is not finite."""
        assert self.group is not None
        state = inputs[: len(self.snapshot)]
        _copy(state, self.snapshot)
        losses, norm = self.group(*inputs, rows)
        if math.isfinite(float(norm)):
            return losses, torch.zeros_like(losses)
        _copy(self.snapshot, state)
        losses, norms = zip(*(self.steps[len(batch)](*inputs, batch) for batch in rows), strict=True)
        return torch.stack(losses), torch.stack(norms)

    def _compile(self, part: Part) -> None:
        """Several small steps in one compiled call, or one large step but for its optimizer, which is fused already.

        Rows that are read from disk come batch by batch, so their steps are compiled one by one.
        """
        try:
            if self.work.flops < LARGE_STEP and self.steps_in_group and not are_stored(self.task.columns):
                self.group = self._compiled_group(part)
            else:
                function, inputs = StepFunction(self.task, "outside", compiled=True), inputs_of(self.task, part)
                program = trainable(capture(function, *inputs)).compiled(*inputs)
                with _unchanged(self.task):
                    program(*inputs)  # what is compiled late, is compiled now
                self.steps[len(part.rows)] = _with_optimizer(self.task, program, function.trained, inputs)
            self.has_compiled = True
        except CaptureError as error:
            if self.compiled:
                raise
            log.info("training is captured but not compiled: %s", error)

    def _compiled_group(self, part: Part) -> Step:
        """Steps that are taken without a look at their gradients.

        One that is not finite leaves its trace in the parameters or in what the optimizer remembers, whose sum is
        returned with the losses.
        """
        task, story = self.task, self.task.story
        function = StepFunction(task, "outside", compiled=True)
        capture(function, *inputs_of(task, part))  # which parameters have a gradient
        long_rows = LongRows(task.optimizer, function.trained)
        self.snapshot = clones(state_of(task))
        parameters = [parameter for _, parameter in story.named_parameters()]
        first, last = len(parameters) + sum(1 for _ in story.named_buffers()), len(self.snapshot)
        first_rate = last + len(task.columns) + 1

        def several(*flat: Tensor) -> tuple[Tensor, Tensor]:
            *inputs, rows = flat
            given = dict(zip(parameters, inputs, strict=False))
            held = held_in(task.optimizer, given, inputs[first:last])
            moving, losses = long_rows.gather(held), []
            for batch in rows:
                moved = held | long_rows.spread(moving)
                now = [moved[parameter, ""] for parameter in parameters]
                loss, _, *gradients = function(*now, *inputs[len(now) :], batch)
                losses.append(loss)
                long_rows.move(moving, dict(zip(function.trained, gradients, strict=True)), inputs[first_rate:])
            for place, tensor in long_rows.spread(moving).items():
                if tensor is not held[place]:
                    held[place].copy_(tensor)
            sums = [tensor.sum() for row in moving for tensor in row.values() if tensor.is_floating_point()]
            return torch.stack(losses), torch.stack([part.to(losses[0]) for part in sums]).sum()

        inputs = [*inputs_of(task, part)[:-1], torch.stack([part.rows] * self.steps_in_group)]
        group = capture(several, *inputs).compiled(*inputs, many_small=True)
        with _unchanged(self.task):
            group(*inputs)
        return group

    def _graphed(self, size: int, part: Part) -> Step:
        """A step as one CUDA graph; columns that are read from disk are other tensors each time."""
        columns = () if are_stored(self.task.columns) else self.task.columns
        num_constant = len(state_of(self.task)) + len(columns)
        with _unchanged(self.task):
            try:
                return _CudaGraph(self.steps[size], inputs_of(self.task, part), num_constant)
            except RuntimeError as error:  # for instance a shape that depends on the data
                raise CaptureError(f"CUDA cannot record its step ({first_line(error)})") from error


# A step


def eager_step(task: Task, batch: Batch) -> tuple[float, bool]:
    """A step as Pyro and torch take it; returns the loss and whether the gradient was finite, so that it was taken."""
    loss = 0.0
    for part in batch.parts:
        task.reseed(batch.epoch, batch.number, part.shard)
        loss += float(task.loss_and_grads(*task.batch(part.columns, part.rows)))
    return move(task, loss, batch.size)


def move(task: Task, loss: float, num_observations: int) -> tuple[float, bool]:
    """Moves the parameters by the gradients of all processes; returns what :func:`eager_step` does."""
    loss = task.add_up(loss)
    norm = average_and_clip(held_by(task.optimizer), num_observations, task.clip)
    if taken := bool(norm.isfinite()):
        task.optimizer.step()
    task.optimizer.zero_grad()
    return loss, taken


def pays(total_steps: int, work: Work, operations: int) -> bool:
    """Whether compiling a step of so many operations, which do so much work, saves more time than it takes."""
    seconds = SECONDS_SAVED_PER_STEP + SECONDS_SAVED_PER_NUMBER * work.numbers
    return total_steps * seconds > max(SECONDS_TO_COMPILE, SECONDS_TO_COMPILE_EACH * operations)


def inputs_of(task: Task, part: Part) -> list[Tensor]:
    """What a captured step is handed."""
    return [*state_of(task), *part.columns, *settings_of(task), part.rows]


def settings_of(task: Task) -> list[Tensor]:
    """What changes between epochs: the factor of a warm-up, and the learning rate of each group of parameters."""
    factor = torch.tensor(task.tempering.factor, dtype=torch.float64)  # as precise as Python's own
    kind = torch.float32 if task.device.type == "cuda" else torch.float64  # what fused optimizers read there
    rates = [torch.tensor(float(group["lr"]), dtype=kind) for group in task.optimizer.param_groups]
    return [number.to(task.device) for number in (factor, *rates)]


def state_of(task: Task) -> list[Tensor]:
    """Every tensor that a step reads and writes: parameters, buffers, and what the optimizer remembers."""
    parameters = [parameter.detach() for _, parameter in task.story.named_parameters()]
    buffers = [buffer for _, buffer in task.story.named_buffers()]
    return [*parameters, *buffers, *tensors_in(task.optimizer)]


class StepFunction:
    """A training step as a function of tensors alone, for tracing: ``(*state, *columns, factor, *rates, rows)``.

    Returns the loss and the norm of the gradient, both of shape ``()``. With the optimizer "outside" the averaged and
    clipped gradients follow, and nothing has moved; "after others" they are summed over the rows, to be added to those
    of other parts of the batch.

    Attributes:
        optimizer: inside the step, "fused" or "guarded" (in single operations), both staying put where the gradient is
            not finite; or "outside" of it; or "after others".
        trained: parameters that have a gradient; known after a trace.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Literal["fused", "guarded", "outside", "after others"],
        compiled: bool = False,
    ) -> None:
        self.task = task
        self.compiled = compiled
        self.optimizer = optimizer
        self.trained: list[nn.Parameter] = []

    def __call__(self, *flat: Tensor) -> tuple[Tensor, ...]:
        story, groups = self.task.story, self.task.optimizer.param_groups
        *others, rows = flat
        given = iter(others)
        parameters = {parameter: next(given) for _, parameter in story.named_parameters()}
        held = set(held_by(self.task.optimizer))
        leaves = {
            name: parameters[parameter].detach().requires_grad_(parameter.requires_grad and parameter in held)
            for name, parameter in story.named_parameters()
        }
        buffers = {name: next(given) for name, _ in story.named_buffers()}
        remembered = [next(given) for _ in tensors_in(self.task.optimizer)]
        columns = tuple(next(given) for _ in self.task.columns)
        factor, rates = next(given), [next(given) for _ in groups]

        loss = self._loss_and_grads(leaves, buffers, self.task.batch(columns, rows), factor)
        size, clip = (1, None) if self.optimizer == "after others" else (len(rows), self.task.clip)
        divided_later = size if self.optimizer == "fused" and clip is None else 1
        norm = average_and_clip(leaves.values(), size // divided_later, clip, together=not self.compiled)
        self.trained = [p for p, leaf in zip(parameters, leaves.values(), strict=True) if leaf.grad is not None]
        gradients = gradients_of(leaves.values())
        if self.optimizer in ("outside", "after others"):
            return loss.detach(), norm, *gradients
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameters[parameter].grad = gradient
        fused = self.optimizer == "fused"
        traced_step(self.task.optimizer, parameters, remembered, rates, (norm - norm) == 0, fused, divided_later)
        return loss.detach(), norm

    def _loss_and_grads(
        self, leaves: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, ...], factor: Tensor
    ) -> Tensor:
        """Pyro's loss with other tensors in the place of the story's; their gradients are theirs."""
        task, known = self.task, {id(leaf) for leaf in leaves.values()}
        originals = dict(task.story.named_parameters()) | dict(task.story.named_buffers())
        instead = {id(originals[name]): tensor for name, tensor in (leaves | buffers).items()}
        tensors = {f"story.{name}": instead[id(tensor)] for name, tensor in _places(task.story)}
        given, task.tempering.factor = task.tempering.factor, factor if task.warms_up else 1.0
        try:
            with traces.own_parameter_store(), poutine.trace(param_only=True) as touched:
                loss = torch.func.functional_call(
                    _Around(task.story), tensors, (task.loss_and_grads, *batch), tie_weights=False
                )
        finally:
            task.tempering.factor = given
        for name, site in traces.nodes(touched.trace).items():
            if site["type"] == "param" and id(_unconstrained(site["value"])) not in known:
                raise CaptureError(f"the parameter {name!r} is not the story's own (a bare pyro.param)")
        return torch.as_tensor(loss)


def _places(story: Story) -> Iterator[tuple[str, Tensor]]:
    """Where tensors are, each place once under one name. A tied tensor has several places; a shared module's are one.

    (``functional_call`` itself puts the wrong tensors back into shared modules.)
    """
    for prefix, module in cast(nn.Module, story).named_modules():
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for name, tensor in tensors:
                yield (f"{prefix}.{name}" if prefix else name), tensor


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    torch._foreach_copy_(target, source)  # pyright: ignore[reportPrivateImportUsage]


def _unconstrained(value: Any) -> Tensor:
    """The tensor that is trained behind a parameter in Pyro's store."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


class _Around(nn.Module):
    """Calls a function while ``functional_call`` has put other tensors in the place of the story's."""

    def __init__(self, story: Any) -> None:
        super().__init__()
        self.story = story

    def forward(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        return function(*arguments)


def _captured(task: Task, inputs: Sequence[Tensor]) -> tuple[Step, int]:
    """A replayable step, and its number of operations; the optimizer is inside where it is fused, or CUDA allows it."""
    for optimizer in _inside(task):
        try:
            program = trainable(capture(StepFunction(task, optimizer), *inputs))
            return program, len(program.graph.graph.nodes)
        except CaptureError as error:
            log.debug("the optimizer stays outside the captured step: %s", error)
    function = StepFunction(task, "outside")
    program = trainable(capture(function, *inputs))
    return _with_eager_optimizer(program, function.trained, task.optimizer), len(program.graph.graph.nodes)


def _inside(task: Task) -> Sequence[Literal["fused", "guarded"]]:
    if is_fused(task.optimizer):
        return ("fused",)
    return ("guarded",) if task.device.type == "cuda" else ()


def trainable(program: Program) -> Program:
    """The program, if it reaches no parameter but the story's, which are handed in."""
    if any(constant.requires_grad for constant in program.constants):
        raise CaptureError("it trains a tensor that is no parameter of the story")
    return program


def _with_optimizer(
    task: Task, program: Callable[..., Any], trained: Sequence[nn.Parameter], inputs: Sequence[Tensor]
) -> Step:
    """The step of a program that returns loss, norm and gradients; a fused optimizer is replayed, too."""
    if not is_fused(task.optimizer):
        return _with_eager_optimizer(program, trained, task.optimizer)
    parameters, optimizer = [parameter for _, parameter in task.story.named_parameters()], task.optimizer
    first, last = len(parameters) + sum(1 for _ in task.story.named_buffers()), len(state_of(task))
    first_rate = last + len(task.columns) + 1

    def moving(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*tensors[: len(parameters)], *tensors[first:last], *tensors[first_rate:-1]]

    def move(*flat: Tensor) -> tuple[Tensor]:
        given = iter(flat)
        moved = {parameter: next(given) for parameter in parameters}
        remembered, rates = ([next(given) for _ in some] for some in (tensors_in(optimizer), optimizer.param_groups))
        norm, *gradients = given
        for parameter, gradient in zip(trained, gradients, strict=True):
            moved[parameter].grad = gradient
        traced_step(optimizer, moved, remembered, rates, (norm - norm) == 0, fused=True)
        return (norm,)

    example = [torch.zeros(()), *(torch.zeros_like(parameter) for parameter in trained)]
    replayed = capture(move, *moving(inputs), *example)

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        loss, *rest = program(*tensors)
        (norm,) = replayed(*moving(tensors), *rest)
        return loss, norm

    return step


def _with_eager_optimizer(
    program: Callable[..., Any], trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> Step:
    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        loss, norm, *gradients = program(*tensors)
        if math.isfinite(float(norm)):
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        return loss, norm

    return step


# What is frozen, and whether the replay is right


def frozen(task: Task) -> Any:
    """What a trace freezes and a user may change between epochs: a trace belongs to one value of it."""
    internal = vars(nn.Module()).keys()
    numbers = [
        (name, module.training, {key: _identity(value) for key, value in vars(module).items() if key not in internal})
        for name, module in cast(nn.Module, task.story).named_modules()
    ]
    trained = [(name, id(parameter), parameter.requires_grad) for name, parameter in task.story.named_parameters()]
    return numbers, trained, frozen_numbers(task.optimizer)


def _identity(value: Any) -> Any:
    """What tells that an attribute changed: numbers and words by value, tensors and all else by which object it is."""
    return value if isinstance(value, bool | int | float | str | None) else id(value)


@contextmanager
def _unchanged(task: Task) -> Iterator[list[Tensor]]:
    """Inside, steps may be tried out; afterwards story and optimizer are as they were. Gives the state before."""
    before = clones(state_of(task))
    numbers = {
        parameter: {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for parameter, state in task.optimizer.state.items()
    }
    try:
        yield before
    finally:
        for tensor, value in zip(state_of(task), before, strict=True):
            tensor.copy_(value)
        for parameter, state in numbers.items():
            task.optimizer.state[parameter].update(state)


def compare(replayed: Sequence[Tensor], eager: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Raises CaptureError when a replay did not do what an eager step with the same noise does.

    Differences are measured in units of the change: rounding may turn the sign of an entry that is zero but for it.
    """
    for number, tensors in enumerate(zip(replayed, eager, before, strict=True)):
        ours, theirs, start = (tensor.detach().double().cpu() for tensor in tensors)
        if not theirs.isfinite().all() and not ours.isfinite().all():
            continue
        if not (ours - theirs).norm() <= LARGEST_DIFFERENCE * (theirs - start).norm():
            where = f"a tensor of shape {tuple(theirs.shape)}" if number else f"the loss, {ours:g} for {theirs:g}"
            raise CaptureError(
                f"its first replay differs from an eager step with the same seed in {where}; does it draw random "
                "numbers outside torch, or count its calls?"
            )


class _Unread:
    """Results of steps that were taken and not looked at yet, because looking waits for the device."""

    def __init__(self, tally: Tally, at_once: int) -> None:
        self.tally = tally
        self.at_once = at_once
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.sizes: list[int] = []

    def add(self, losses: Tensor, norms: Tensor, num_observations: int) -> None:
        """Steps with batches of one size; losses and norms have shape (steps,)."""
        self.losses.append(losses)
        self.norms.append(norms)
        self.sizes += [num_observations] * len(losses)
        if len(self.sizes) >= self.at_once:
            self.read()

    def read(self) -> None:
        """Hands everything to the tally."""
        if self.sizes:
            losses, norms = torch.cat(self.losses).tolist(), torch.cat(self.norms).tolist()
            sizes, self.losses, self.norms, self.sizes = self.sizes, [], [], []
            for loss, norm, size in zip(losses, norms, sizes, strict=True):
                self.tally.add(loss, math.isfinite(norm), size)


class _CudaGraph:
    """A step recorded as one CUDA graph; what it writes, it writes in place.

    Args:
        step: what to record.
        tensors: what it is called with; the first ``num_constant`` stay where they are, the others are copied in.
    """

    def __init__(self, step: Step, tensors: Sequence[Tensor], num_constant: int) -> None:
        self.num_constant = num_constant
        self.tensors = [*tensors[:num_constant], *clones(tensors[num_constant:])]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate their work space before recording
                step(*self.tensors)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step(*self.tensors)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        for place, tensor in zip(self.tensors[self.num_constant :], tensors[self.num_constant :], strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        loss, norm = self.results
        return loss.clone(), norm.clone()
