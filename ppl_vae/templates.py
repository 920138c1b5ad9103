"""Objects of Pyro's as parts of a story: copies of a distribution or a transform whose tensors follow the story."""

from collections.abc import Callable, Set
from types import MethodType
from typing import Any, cast

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Distribution, ExpTransform, Transform

Kind = Distribution | Transform | ConditionalTransform
Inverse: Any = type(ExpTransform().inv)


class Template(nn.Module):
    """Makes a new copy of a distribution or a transform at every call.

    Pyro's transforms remember the last point that they mapped, by identity, until the next one: also when their
    parameters have moved since. And tensors that they or a distribution hold need not be parameters or buffers (the
    order of ``Permute``), so that they would stay behind when the story moves. A copy remembers nothing, shares every
    parameter and every network with the original, and has this module's buffers in the place of all other tensors.

    Args:
        original: a distribution, a transform, or a conditional transform. What it trains lies in modules.

    Returns (when called):
        the copy.

    Raises:
        ValueError: when a tensor requires a gradient and no module holds it, or a module lies inside an object that is
            none: these would not train.

    >>> from pyro.distributions.transforms import Permute
    >>> permute = Template(Permute(torch.tensor([1, 0])))
    >>> dict(permute.state_dict())
    {'permutation': tensor([1, 0])}
    >>> permute()(torch.tensor([0.5, 2.0]))
    tensor([2.0000, 0.5000])
    """

    def __init__(self, original: Kind) -> None:
        super().__init__()
        trained = set(original.modules()) if isinstance(original, nn.Module) else set()
        held = _Copying(self._hold, trained).copy(original)  # never run, so that it holds what it holds now
        self.original = held if isinstance(held, nn.Module) else _Shared(held)

    def _hold(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.requires_grad:
            raise ValueError(
                f"{name!r} requires a gradient, and no module holds it: it would not train. Write a module that has it "
                "as an nn.Parameter and returns the distribution when it is called, or detach it."
            )
        # In memory of its own: what is expanded cannot be loaded into.
        self.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))
        return tensor

    def forward(self) -> Any:
        original = self.original.value if isinstance(self.original, _Shared) else self.original
        return _Copying(lambda _, name: getattr(self, name)).copy(original)


class _Shared:
    """What never changes, and is the same in a copy of the story: torch's inverse transforms do not survive one."""

    def __init__(self, value: Kind) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class _Copying:
    """Copies an object, and all distributions and transforms in it, with other tensors; everything else is shared.

    Args:
        as_tensor: the tensor that takes the place of another with such a name.
        trained: modules that may be met; None for any.
    """

    def __init__(self, as_tensor: Callable[[Tensor, str], Tensor], trained: Set[nn.Module] | None = None) -> None:
        self.as_tensor = as_tensor
        self.trained = trained
        self.done: dict[int, Any] = {}

    def copy(self, thing: Any, *path: str) -> Any:
        """The copy of what lies at the end of a path of attributes; of what was met before, the same."""
        if self.trained is not None and isinstance(thing, nn.Module) and thing not in self.trained:
            raise ValueError(
                f"{'.'.join(path)} is a module, inside an object that is none: it would not train. Give priors.Flow "
                "the transforms one by one."
            )
        if id(thing) in self.done:
            return self.done[id(thing)]
        if isinstance(thing, Tensor):
            self.done[id(thing)] = self.as_tensor(thing, "_".join(path).lstrip("_"))
            return self.done[id(thing)]
        if isinstance(thing, Kind):
            self.done[id(thing)] = copied = cast(Any, object.__new__(type(thing)))
            vars(copied).update({name: self.copy(part, *path, name) for name, part in _without_memory(thing).items()})
            return copied
        if isinstance(thing, list):
            return [self.copy(part, *path, str(number)) for number, part in enumerate(thing)]
        if isinstance(thing, dict) and path[-1] == "_modules":
            return {name: self.copy(part, *path[:-1], name) for name, part in thing.items()}
        if isinstance(thing, MethodType):
            return MethodType(thing.__func__, self.copy(thing.__self__, *path))
        return thing


def _without_memory(thing: Kind) -> dict[str, Any]:
    """The attributes of an object, without the points that a transform remembers.

    Nor the methods that its class has anyway, nor whether arguments were to be checked: that is asked again.
    """
    attributes = {
        name: value
        for name, value in vars(thing).items()
        if not (isinstance(value, MethodType) and value.__name__ == name) and not (name == "_validate_args" and value)
    }
    if isinstance(thing, Transform):
        remembered = [name for name in attributes if name.startswith("_cache") and name != "_cache_size"]
        attributes |= {name: (None, None) if name == "_cached_x_y" else None for name in remembered}
        if not isinstance(thing, Inverse):
            attributes["_inv"] = None
    return attributes
