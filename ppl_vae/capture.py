"""A program of tensors, traced once through Pyro and replayed without it.

What is captured is what Pyro computed: the operations on tensors, forward and backward, as they were called. Python
runs only while tracing, so its numbers and branches are frozen; whatever changes later must be a tensor handed in.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyro.util
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ppl_vae import lowering

aten = torch.ops.aten


class CaptureError(RuntimeError):
    """A program cannot be captured; the message says why, in words that end a sentence."""


@dataclass(frozen=True)
class Program:
    """Operations on tensors that were traced once.

    Attributes:
        graph: the operations.
        constants: tensors that the traced function reached without being handed them.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        """Replays the operations on other tensors of the same shapes, dtypes and device; records no gradients."""
        with torch.no_grad():
            return self.graph.forward(*tensors)

    def split(self, num_first: int) -> tuple["Program", "Program"] | None:
        """What can be computed from the first tensors alone, and the rest, which takes its results before all tensors.

        What has more rows than these tensors, and more numbers, would take memory and is left to the rest. None where
        nothing else is there.
        """
        *nodes, output = self.graph.graph.nodes
        handed_in = [node for node in nodes if node.op == "placeholder"]
        constant, early = _computable(nodes, handed_in[:num_first])
        passed = tuple(node for node in early if any(user not in early for user in node.users))
        if not passed:
            return None
        late = [node for node in nodes if node not in early and node not in handed_in]
        first = _subgraph(self.graph, handed_in[:num_first], [*constant, *early], passed)
        rest = _subgraph(self.graph, [*passed, *handed_in], late, output.args[0])
        return Program(first, self.constants), Program(rest, self.constants)

    def compiled(self, *tensors: Tensor, many_small: bool = False, frozen: bool = False) -> Callable[..., Any]:
        """The same operations, fused and compiled by inductor; random numbers are torch's own, the same as before.

        Args:
            tensors: an example of what it will be called with.
            many_small: call the operations from C++, which takes longer to build, and saves microseconds for each.
            frozen: the tensors that are not handed in stay what they are now, so that matrices are packed beforehand.

        Raises:
            CaptureError: when inductor cannot, for instance where there is no C++ compiler.
        """
        from torch._inductor.compile_fx import compile_fx  # a second of imports, for those who compile

        try:
            options = {
                "cpp_wrapper": many_small and tensors[0].device.type == "cpu",
                "freezing": frozen,
                "fallback_random": True,
                "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
                # Sizes are part of what a program is captured for.
                "size_asserts": False,
                "alignment_asserts": False,
                "scalar_asserts": False,
            }
            instead = lowering.decompositions(with_products=not many_small)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's, of itself
                program = compile_fx(self.graph, list(tensors), config_patches=options, decompositions=instead)
                return _without_gradients(cast(Any, program))
        except Exception as error:  # the compiler's, the linker's, or inductor's own
            raise CaptureError(f"it could not be compiled ({first_line(error)})") from error


def capture(function: Callable[..., Any], *tensors: Tensor) -> Program:
    """Traces ``function(*tensors)``, which returns a tuple of tensors, without computing anything.

    Args:
        function: may run Pyro programs and call ``backward``; it draws its random numbers from torch.
        tensors: of the shapes, dtypes and device that the program will have.

    Raises:
        CaptureError: when Python needs to know a tensor's value, or an operation cannot be traced.

    >>> double = capture(lambda x: (x + x,), torch.zeros(3))
    >>> double(torch.arange(3.0))
    (tensor([0., 2., 4.]),)
    """
    try:
        with _pyro_keeps_tensors():
            traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    except Exception as error:  # whatever a user's program raises when its tensors have no values
        raise CaptureError(_reason(error)) from error
    constants = tuple(
        value for node in traced.graph.nodes if node.op == "get_attr" for value in [getattr(traced, node.target)]
    )
    traced.graph.set_codegen(CodeGen())
    _simplify(traced.graph)
    _mark_movable(traced.graph)
    _call_directly(traced.graph)
    traced.recompile()
    return Program(traced, constants)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _reason(error: Exception) -> str:
    data_dependent = ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShapeException")
    cause: BaseException | None = error
    while cause and type(cause).__name__ not in data_dependent:
        cause = cause.__context__  # torch and Pyro add to an error's message, and some of their versions fail at it
    if cause:
        return f"Python's control flow, or a shape, depends on the data ({first_line(cause)})"
    return first_line(error)


def _without_gradients(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        with torch.no_grad():
            return compiled(*tensors)

    return call


# Tracing


class _ItemsStayTensors(TorchFunctionMode):
    """``tensor.item()`` is a tensor with the value. Pyro's losses take numbers out only to add them up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach().clone() if func is Tensor.item else func(*args, **(kwargs or {}))


@contextmanager
def _pyro_keeps_tensors() -> Iterator[None]:
    """Inside, Pyro's losses return tensors, and do not look whether they are NaN."""
    looks = pyro.util.torch_isnan
    pyro.util.torch_isnan = cast(Any, lambda value: False)
    try:
        with _ItemsStayTensors():
            yield
    finally:
        pyro.util.torch_isnan = looks


# What a tracer writes down without need


def _simplify(graph: fx.Graph) -> None:
    """Leaves out what changes nothing and computes once what is written twice; the values stay the same, bit for bit.

    Random numbers are drawn as before, also those that nobody uses.
    """
    computed: dict[Any, fx.Node] = {}
    written = _written_memory(graph)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _writes(node.target):
            computed.clear()  # what was read before may read differently now
        same = _same_as(node)
        if same is None and (copied := _copied(node)) is not None and not (_memory(node) | _memory(copied)) & written:
            same = copied
        if same is None and _is_pure(node.target) and not _fresh_memory(node) & written:
            same = computed.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and _is_pure(node.target):
            graph.erase_node(node)


def _same_as(node: fx.Node) -> fx.Node | None:
    """An earlier node with the same value, where the operation does nothing."""
    if not node.args or not isinstance(before := node.args[0], fx.Node):
        return None
    if node.target in (aten.alias.default, aten.detach.default):
        return before
    if node.target is aten.t.default and before.target is aten.t.default:
        return cast(fx.Node, before.args[0])
    if node.target in (aten.view.default, aten.expand.default, aten._unsafe_view.default):
        return before if node.meta["val"].shape == before.meta["val"].shape else None
    return None


def _copied(node: fx.Node) -> fx.Node | None:
    """An earlier node with the same value in other memory."""
    neutral: dict[Any, Any] = {
        aten.clone.default: None,
        aten.add.Tensor: 0,
        aten.div.Tensor: 1,
        aten.pow.Tensor_Scalar: 1,
    }
    if node.target not in neutral or not isinstance(before := node.args[0], fx.Node):
        return None
    if node.args[1:] not in ((), (neutral[node.target],)) or (node.kwargs and node.target is not aten.clone.default):
        return None
    old, new = before.meta["val"], node.meta["val"]
    return before if (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()) else None


def _writes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _is_pure(target: Any) -> bool:
    """Whether an operation has a value and no effect: it writes nowhere and draws nothing."""
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or _writes(target):
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _written(node: fx.Node) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for position, argument in enumerate(cast(Any, node.target)._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)


def _written_memory(graph: fx.Graph) -> set[int]:
    return {
        place for node in graph.nodes if _writes(node.target) for given in _written(node) for place in _memory(given)
    }


def _memory(nodes: Any) -> set[int]:
    """Where the values of nodes are stored."""
    values = [node.meta.get("val") for node in tree_leaves(nodes) if isinstance(node, fx.Node)]
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


def _fresh_memory(node: fx.Node) -> set[int]:
    """Memory that an operation makes, where it is no view: written to later, it must not be another's as well."""
    return _memory(node) - _memory(node.all_input_nodes)


# Two stages


def _mark_movable(graph: fx.Graph) -> None:
    """Notes of operations that they may as well be called earlier: they only compute, in memory that nobody writes."""
    written = _written_memory(graph)
    for node in graph.nodes:
        movable = node.op == "call_function" and _is_pure(node.target) and not _memory(node) & written
        node.meta["movable"] = movable


def _computable(nodes: Sequence[fx.Node], known: Sequence[fx.Node]) -> tuple[dict[fx.Node, None], dict[fx.Node, None]]:
    """What needs nothing but constants, and what needs nothing but these and what is known; in order."""
    constant: dict[fx.Node, None] = {}
    early: dict[fx.Node, None] = {}
    for node in nodes:
        needs = [need for need in node.all_input_nodes if need not in constant]
        if node.op == "get_attr":
            constant[node] = None
        elif node.meta.get("movable") and all(need in early or need in known for need in needs):
            (early if needs else constant)[node] = None
    rows, numbers = (max(size(node.meta["val"]) for node in known) for size in (_rows, Tensor.numel))
    computable = {*known, *constant}

    def stays_late(node: fx.Node) -> bool:
        if not all(need in early or need in computable for need in node.all_input_nodes):
            return True
        values = [value for value in tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]
        is_large = any(_rows(value) > rows and value.numel() > numbers for value in values)
        return is_large and any(user not in early for user in node.users)

    while late := [node for node in early if stays_late(node)]:
        for node in late:
            del early[node]
    return constant, early


def _rows(value: Tensor) -> int:
    return len(value) if value.dim() else 1


def _subgraph(
    whole: fx.GraphModule, inputs: Sequence[fx.Node], operations: Iterable[fx.Node], outputs: Any
) -> fx.GraphModule:
    """Some operations, in their order, between values that are handed in and others that are returned."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in operations:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(outputs, copies.__getitem__))
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.meta.get("movable")):
            graph.erase_node(node)
    return fx.GraphModule(whole, graph)


# fmt: off
_FREQUENT = (
    "add", "sub", "mul", "div", "neg", "exp", "log", "log1p", "expm1", "abs", "pow", "sigmoid", "tanh", "relu", "where",
    "t", "mm", "addmm", "bmm", "view", "expand", "unsqueeze", "squeeze", "transpose", "permute", "cat", "select",
    "index_select", "clamp", "sqrt", "rsqrt", "reciprocal", "square", "sign", "isfinite",
)
# fmt: on
_SAME_BY_A_SHORTER_WAY: dict[Any, Callable[..., Any]] = {
    getattr(aten, name): getattr(torch, name, None) or getattr(Tensor, name) for name in _FREQUENT
}


def _call_directly(graph: fx.Graph) -> None:
    """Python's own bindings of frequent operations cost half as much per call as the overloads they stand for."""
    for node in graph.nodes:
        if node.target is aten._foreach_add_.Scalar and all(one.meta["val"].is_cpu for one in node.args[0]):
            node.target = _add_number
        elif isinstance(node.target, OpOverload):
            node.target = _SAME_BY_A_SHORTER_WAY.get(node.target.overloadpacket, node.target)


def _add_number(tensors: list[Tensor], number: float) -> None:
    """Adds a number to many small tensors. torch would make a tensor of the number for each of them."""
    torch._foreach_add_(tensors, torch.tensor(number))  # pyright: ignore[reportPrivateImportUsage]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that share nothing with the originals."""
    return [tensor.detach().clone() for tensor in tensors]
