"""Running a story: its traces, per-observation log p and log q, log weights, and predictive draws.

A story is any module with ``model(*columns)`` and ``guide(*columns)``. Running it here leaves Pyro's global parameter
store, the module's modes and buffers as they were.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, cast

import pyro
import pyro.settings
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_vae import noise
from ppl_vae.memory import within_memory

Site = dict[str, Any]
Columns = tuple[Tensor, ...]
Layout = Literal["rows", "plate"]


class Story(Protocol):
    """A model and its guide, what the whole package works on: any ``nn.Module`` with these two methods."""

    @property
    def model(self) -> Callable[..., Any]: ...
    @property
    def guide(self) -> Callable[..., Any]: ...
    @property
    def modules(self) -> Callable[[], Iterator[nn.Module]]: ...
    @property
    def named_parameters(self) -> Callable[[], Iterator[tuple[str, nn.Parameter]]]: ...
    @property
    def named_buffers(self) -> Callable[[], Iterator[tuple[str, Tensor]]]: ...
    @property
    def state_dict(self) -> Callable[[], dict[str, Any]]: ...
    @property
    def load_state_dict(self) -> Callable[[dict[str, Any]], Any]: ...
    @property
    def train(self) -> Callable[[bool], Any]: ...
    @property
    def to(self) -> Callable[..., Any]: ...


@contextmanager
def own_parameter_store() -> Iterator[None]:
    """Inside, Pyro's parameter store is empty and ours; afterwards it is the user's again, as it was."""
    with pyro.get_param_store().scope(), pyro.settings.context(module_local_params=False):
        yield


@contextmanager
def evaluating(story: Story) -> Iterator[None]:
    """Inside, the story is in eval mode and records no gradients; afterwards each module is in its mode again."""
    modes = {module: module.training for module in story.modules()}
    story.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def scoring(story: Story) -> Iterator[None]:
    """What surrounds every evaluation: eval mode, our own parameter store, and no repeated validation of arguments."""
    with ExitStack() as stack:
        for context in (evaluating(story), own_parameter_store(), pyro.validation_enabled(False)):
            stack.enter_context(context)
        yield


def device_and_dtype(story: Story) -> tuple[torch.device, torch.dtype]:
    """Where a story is, and the dtype of its floating parameters and buffers."""
    for _, tensor in (*story.named_parameters(), *story.named_buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def device_named(name: torch.device | str | None) -> torch.device:
    """The device of this name, the CPU for None; ValueError when it is not there."""
    try:
        device = torch.device(name or "cpu")
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"The device {str(name)!r} is not there ({reason}). Use cpu, or cuda where there is one."
        ) from None
    return device


def to_story(story: Story, columns: Columns) -> Columns:
    """Columns on the story's device, floating ones in its dtype."""
    device, dtype = device_and_dtype(story)
    return tuple(column.to(device, dtype if column.is_floating_point() else None) for column in columns)


def run(story: Story, *columns: Tensor) -> tuple[Trace, Trace]:
    """Runs the guide, then the model on the guide's latents; returns the model's and the guide's trace."""
    guide_trace = poutine.trace(story.guide).get_trace(*columns)
    model_trace = poutine.trace(poutine.replay(story.model, trace=guide_trace)).get_trace(*columns)
    return model_trace, guide_trace


def nodes(trace: Trace) -> dict[str, Site]:
    """Everything that a trace recorded, by name."""
    return cast(dict[str, Site], trace.nodes)


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The random variables of a trace by name, without plates and ``pyro.deterministic`` values."""
    return {name: site for name, site in nodes(trace).items() if site["type"] == "sample" and _is_random(site)}


def _is_random(site: Site) -> bool:
    return not site_is_subsample(cast(Any, site)) and not site["infer"].get("_deterministic")


def observed_sites(trace: Trace) -> dict[str, Site]:
    """The sites that are scored against data."""
    return {name: site for name, site in sample_sites(trace).items() if site["is_observed"]}


def log_prob(trace: Trace, sites: dict[str, Site]) -> Tensor:
    """Sum over sites of the unscaled log probability of each row, shape ``(rows,)``, in nats.

    Raises:
        ValueError: when a site is scaled (by ``poutine.scale`` or a subsampled plate), or sites differ in their number
            of rows: such a number is not the log probability of an observation.
    """
    if not sites:  # a guide whose model sums out every latent
        return torch.zeros(())
    trace.compute_log_prob(site_filter=lambda name, _: name in sites)
    shapes = {name: tuple(site["log_prob"].shape) for name, site in sites.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Expected one log probability per observation at every site; found the shapes {shapes}.")
    for name, site in sites.items():
        refuse_scale(name, site)
    return torch.stack([site["log_prob"] for site in sites.values()]).sum(0)


def refuse_scale(name: str, site: Site) -> None:
    """Raises ValueError when the site's log probability is multiplied by something."""
    scale = torch.as_tensor(site["scale"])
    if not bool((scale == 1).all()):
        raise ValueError(
            f"The log probability of site {name!r} is scaled by {scale.max():g}: log p(x) is unscaled. Remove "
            "poutine.scale, and subsample_size or subsample from the plate; fit draws the batches itself."
        )


def scored_model(story: Story) -> Callable[..., Any]:
    """The model, its sites marked ``infer={"enumerate": "parallel"}`` hidden from traces.

    The guide does not draw them; drawn from the prior by the model itself, they cancel in a weight p / q.
    """

    def summed_out(message: Any) -> bool:
        return message["infer"].get("enumerate") == "parallel"

    return poutine.block(story.model, hide_fn=summed_out)


def as_rows(columns: Columns, num_particles: int) -> Columns:
    """Particles are rows: the columns repeated, so that particle s of observation n is row ``s * N + n``."""
    return tuple(column.repeat(num_particles, *(1 for _ in column.shape[1:])) for column in columns)


def run_particles(program: Callable[..., Any], columns: Columns, num_particles: int, layout: Layout) -> Trace:
    """Runs a model or a guide with S particles for each of N observations.

    In the layout "rows", the definition, the program sees S * N observations; it works for every story. Under "plate"
    it sees the N observations once, inside a plate of particles at dim -2, and broadcasts: an encoder runs N times.
    """
    if layout == "rows":
        return poutine.trace(program).get_trace(*as_rows(columns, num_particles))
    with pyro.plate("particles", num_particles, dim=-2):
        return poutine.trace(program).get_trace(*columns)


def fastest_layout(story: Story, rows: Columns) -> Layout:
    """The layout "plate" where a run of two particles shows that it tells the same story as "rows", else "rows"."""
    try:
        guide_trace = run_particles(story.guide, rows, 2, "plate")
        model_trace = run_particles(poutine.replay(story.model, trace=guide_trace), rows, 2, "plate")
        in_plate = [log_prob(trace, sample_sites(trace)) for trace in (guide_trace, model_trace)]
        latents = Trace()
        for name, site in sample_sites(guide_trace).items():
            latents.add_node(name, **site | {"value": site["value"].flatten(0, 1)})
        programs = [poutine.replay(program, trace=latents) for program in (story.guide, story.model)]
        in_rows = [run_particles(program, rows, 2, "rows") for program in programs]
        as_defined = [log_prob(trace, sample_sites(trace)).reshape(in_plate[0].shape) for trace in in_rows]
    except Exception:  # whatever a user's program raises when it is broadcast, as rows it is defined
        return "rows"
    same = all(torch.allclose(p, q, rtol=1e-4) for p, q in zip(in_plate, as_defined, strict=True))
    return "plate" if same else "rows"


def draws(trace: Trace) -> dict[str, Tensor]:
    """The value of each random variable, by site name."""
    return {name: site["value"] for name, site in sample_sites(trace).items()}


def prior_predictive(story: Story, num_observations: int, *, seed: int = 0) -> Trace:
    """The model told without data: latents from the prior and new observations.

    Raises:
        MemoryError: when so many do not fit.
    """
    device, _ = device_and_dtype(story)
    told = within_memory(f"{num_observations:,} new observations")
    with noise.unit(device, seed, noise.Purpose.PREDICTIVE), scoring(story), told:
        return poutine.trace(story.model).get_trace(num_observations=num_observations)


def retell(program: Callable[..., Any], rows: Columns, latents: dict[str, Tensor]) -> Trace:
    """A model told again with these latents, one of each for each row; all else is drawn, what was data as well.

    With no latents this is the prior predictive given each row's conditions. The rows are only what the program
    computes with them: a model that scores x and looks at it no further never sees it.
    """
    told = Trace()
    for name, value in latents.items():
        told.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return poutine.trace(poutine.uncondition(poutine.replay(program, trace=told))).get_trace(*rows)
