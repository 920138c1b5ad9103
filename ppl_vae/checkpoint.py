"""One pickle-free file that holds a story: safetensors for the numbers, JSON for what they belong to, and a checksum.

Reading a file never runs anything from it: no pickle, no import path. A story made from a configuration is rebuilt from
the words in the file; any other story is filled.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import ppl_vae
from ppl_vae import configuration, traces
from ppl_vae.stored import row_slices
from ppl_vae.traces import Story

FORMAT = "ppl_vae/checkpoint/1"

# The checksum stands in the header, at the beginning of its JSON, and is that of the file with zeros in its place.
BEFORE_CHECKSUM = rb"{\"sha256\": \""
BLANK = "0" * 64
BYTES_AT_ONCE = 2**20

OF_STORY = "story/"

S = TypeVar("S", bound=Story)


def save(story: Story, path: str | os.PathLike[str]) -> None:
    """Writes a story's parameters and buffers, and its configuration if it has one.

    The file appears whole or not at all. Tensors that the story shares between modules are written once.

    Raises:
        OSError: when the file cannot be written.
    """
    tensors, about = of_story(story)
    write(Path(path), tensors, about)


def of_story(story: Story) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds of a story: its tensors, each once, and which are tied, and its configuration."""
    weights = story.state_dict()
    ties = _ties(weights)
    about: dict[str, Any] = {"ties": ties}
    if (made_from := getattr(story, "configuration", None)) is not None:
        about["configuration"] = configuration.to_json(made_from)
    return {OF_STORY + name: tensor for name, tensor in weights.items() if name not in ties}, about


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes tensors and what they belong to, words and numbers, under a checksum; all of it or nothing.

    Raises:
        OSError: when the file cannot be written.
        TypeError: when something is neither a word nor a number, nor made of them.
    """
    # Copies, because safetensors refuses tensors that are parts of one another.
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    said = {"sha256": BLANK, "format": FORMAT, "versions": versions(), **about}
    write_atomically(path, sealed(safetensors.torch.save(whole, {"about": json.dumps(said)})))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for rows in [tensor] if not tensor.dim() else (tensor[part] for part in row_slices(tensor)):
            # A copy: one number may have strides of its own, of which no bytes can be seen.
            whole = rows.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
            digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a file was written with."""
    return {
        "ppl_vae": ppl_vae.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro-ppl": metadata.version("pyro-ppl"),
    }


def sealed(content: bytes) -> bytes:
    """The content of a file with its checksum in the place that was left for it."""
    place = content.index(BEFORE_CHECKSUM) + len(BEFORE_CHECKSUM)
    checksum = hashlib.sha256(content).hexdigest().encode()
    return b"".join([memoryview(content)[:place], checksum, memoryview(content)[place + len(BLANK) :]])


def _refuse_damaged(path: Path, checksum: object) -> None:
    """Raises ValueError when a file is not the one that the checksum in it was made of."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(BYTES_AT_ONCE + len(BEFORE_CHECKSUM) + len(BLANK))
        place = head.find(BEFORE_CHECKSUM) + len(BEFORE_CHECKSUM)
        digest.update(head[:place] + BLANK.encode() + head[place + len(BLANK) :])
        while more := file.read(BYTES_AT_ONCE):
            digest.update(more)
    if digest.hexdigest() != checksum:
        raise ValueError(f"{str(path)!r} is damaged: its checksum is not that of its content.")


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
    about, tensors = read(Path(path))
    weights = weights_of_story(path, about, tensors)
    filled: Any = _rebuild(path, about) if story is None else story
    fill(path, filled, weights, assign=story is None)
    return filled if device is None else filled.to(traces.device_named(device))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that, whatever happens, ``path`` holds either its old content or all of the new."""
    try:
        _replace(path, content)
    except OSError as error:  # that of write() names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _replace(path: Path, content: bytes) -> None:
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


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file holds: words and numbers, and tensors by name.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is of another format, or not whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a whole checkpoint: {error}.") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ValueError(f"{str(path)!r} has the format {found!r}; this version reads {FORMAT!r}.")
    _refuse_damaged(path, about.get("sha256"))
    return about, tensors


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


def weights_of_story(
    path: str | os.PathLike[str], about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the story in a file by their own names, tied ones under each of theirs."""
    weights = {name.removeprefix(OF_STORY): tensor for name, tensor in tensors.items() if name.startswith(OF_STORY)}
    for name, kept in _words(about.get("ties", {})).items():
        if kept not in weights:
            raise ValueError(f"{str(path)!r} ties {name!r} to {kept!r}, which it does not hold.")
        weights[name] = weights[kept]
    return weights


def fill(path: str | os.PathLike[str], story: Any, weights: dict[str, Tensor], assign: bool = False) -> None:
    """Puts weights into a story that has the same; ValueError where it has others.

    Args:
        assign: the weights take the place of the story's, with their dtype, which is one for all real numbers.
    """
    if assign:
        _refuse_mixed_dtypes(path, story.state_dict(), weights)
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


def _refuse_mixed_dtypes(path: str | os.PathLike[str], own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    reals = {str(tensor.dtype) for tensor in weights.values() if tensor.is_floating_point()}
    if len(reals) > 1:
        raise ValueError(f"{str(path)!r} belongs to no story: its weights are {' and '.join(sorted(reals))}.")
    for name in sorted(own.keys() & weights.keys()):
        ours, theirs = own[name], weights[name]
        both_real = ours.is_floating_point() and theirs.is_floating_point()
        if not both_real and ours.dtype != theirs.dtype:
            raise ValueError(
                f"{str(path)!r} belongs to another story: {name!r} is {theirs.dtype} in the file and {ours.dtype} in "
                "the story."
            )
