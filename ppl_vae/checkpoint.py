"""One pickle-free file that holds a story: safetensors for the numbers, JSON for what they belong to.

Reading a file never runs anything from it: no pickle, no import path. A story made from a configuration is rebuilt from
the words in the file; any other story is filled.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import ppl_vae
from ppl_vae import configuration
from ppl_vae.traces import Story

FORMAT = "ppl_vae/checkpoint/0"

S = TypeVar("S", bound=Story)


def save(story: Story, path: str | os.PathLike[str]) -> None:
    """Writes a story's parameters and buffers, and its configuration if it has one.

    The file appears whole or not at all. Tensors that the story shares between modules are written once.

    Raises:
        OSError: when the file cannot be written.
    """
    # Copies, because safetensors refuses tensors that are parts of one another.
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in story.state_dict().items()
    }
    ties = _ties(story.state_dict())
    about: dict[str, Any] = {"format": FORMAT, "ppl_vae": ppl_vae.__version__, "ties": ties}
    if (made_from := getattr(story, "configuration", None)) is not None:
        about["configuration"] = configuration.to_json(made_from)
    kept = {name: tensor for name, tensor in weights.items() if name not in ties}
    write_atomically(Path(path), safetensors.torch.save(kept, {"about": json.dumps(about)}))


def load(path: str | os.PathLike[str], story: S | None = None, device: torch.device | str | None = None) -> S | Any:
    """Reads a story.

    Args:
        path: a file written by :func:`save`.
        story: the story to fill, in place; None rebuilds a story made from a configuration.
        device: where the story goes; None is the CPU, or where ``story`` is.

    Returns:
        The story.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no checkpoint, belongs to another story, or holds no configuration to rebuild from.
    """
    about, weights = _read(Path(path))
    filled: Any = _rebuild(path, about) if story is None else story
    _fill(path, filled, weights, assign=story is None)
    return filled if device is None else filled.to(device)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that, whatever happens, ``path`` holds either its old content or all of the new."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _ties(weights: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another name's tensor: modules that hold the same parameter."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if (kept := first.setdefault(place, name)) != name:
            ties[name] = kept
    return ties


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a whole checkpoint: {error}.") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ValueError(f"{str(path)!r} has the format {found!r}; this version reads {FORMAT!r}.")
    for name, kept in _words(about.get("ties", {})).items():
        if kept not in weights:
            raise ValueError(f"{str(path)!r} ties {name!r} to {kept!r}, which it does not hold.")
        weights[name] = weights[kept]
    return about, weights


def _words(ties: Any) -> dict[str, str]:
    if not isinstance(ties, dict) or not all(isinstance(word, str) for pair in ties.items() for word in pair):
        raise ValueError(f"The ties of a checkpoint are pairs of names; found {ties!r}.")
    return ties


def _rebuild(path: str | os.PathLike[str], about: dict[str, Any]) -> Any:
    if "configuration" not in about:
        raise ValueError(f"{str(path)!r} holds a story of your own: make it, and pass load(path, story=mine).")
    # On the meta device nothing is allocated: the sizes in a hostile configuration cost nothing.
    with torch.device("meta"):
        return configuration.build(configuration.from_json(about["configuration"]))


def _fill(path: str | os.PathLike[str], story: Any, weights: dict[str, Tensor], assign: bool) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in story.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{str(path)!r} belongs to another story: {name!r} has the shape {found.get(name, 'none')} in the file "
                f"and {expected.get(name, 'none')} in the story."
            )
    try:
        story.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} does not fit its story: {' '.join(str(error).split())}") from error
