"""A story of the user's own, from the Python file that the person at the command line names.

That file is run. Its name comes from what was typed, never from a file that is being loaded.
"""

import importlib.util
import inspect
from typing import Any

import torch
from torch import nn

from ppl_vae import noise
from ppl_vae.configuration import StoryFile
from ppl_vae.traces import Story


def make(source: StoryFile, arguments: dict[str, Any], seed: int) -> Story:
    """Runs the file and makes its story, with initial weights that are a function of the seed.

    Args:
        source: file and class.
        arguments: what may be known of the data, by name; the class is given those that its constructor names.
        seed: of the initial weights.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file fails, has no such class, or the class makes no story from these arguments.
    """
    kind = _class(source)
    with noise.unit(torch.device("cpu"), seed, noise.Purpose.INITIAL_WEIGHTS):
        try:
            known = inspect.signature(kind).parameters
            story = kind(**{name: value for name, value in arguments.items() if name in known})
        except Exception as error:  # whatever the user's constructor raises
            raise ValueError(
                f"{source.name}() in {str(source.file)!r} fails ({type(error).__name__}: {error}). It is given "
                f"{', '.join(arguments)} where its constructor names them, and nothing else."
            ) from error
    if not isinstance(story, nn.Module) or not (hasattr(story, "model") and hasattr(story, "guide")):
        raise ValueError(f"{source.name} in {str(source.file)!r} is no nn.Module with the methods model and guide.")
    return story  # pyright: ignore[reportReturnType]


def _class(source: StoryFile) -> Any:
    if not source.file.is_file():
        raise FileNotFoundError(f"There is no file {str(source.file)!r} with a story in it.")
    spec = importlib.util.spec_from_file_location(source.file.stem, source.file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with the user's file
        raise ValueError(f"{str(source.file)!r} does not run ({type(error).__name__}: {error}).") from error
    if not inspect.isclass(found := getattr(module, source.name, None)):
        raise ValueError(f"{str(source.file)!r} has no class {source.name!r}.")
    return found
