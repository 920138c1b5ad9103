"""log p(x) by this package, by hand, by Pyro and by others: microseconds per draw and image, and what grows with what.

    python scripts/benchmark_evidence.py --models small mlp --rounds 11 --threads 2 --plot scaling.png

All sides have the same networks, a Bernoulli likelihood, random zeros and ones as images, and the CPU. They take turns:
a round is some thousand draws by each; the ratio is to the first side in the same round (median, quartiles over
rounds), and "share" is its inverse, the part of the matrix products' speed that is reached.

speed: importance sampling from the encoder, the steady cost of a draw. "Set-up" is what comes before: looking at the
story, tracing, compiling into an empty cache (the compiler's own first start is printed apart), without any draws.

- matrix products: the decoder's weights times batches of 2,048 latents in float32; no biases, no activations.
- captured, compiled, compiled bfloat16, not captured: the draws of ``log_evidence(..., method="importance")`` and all
  that it keeps of their weights; in float32, but for the decoder of the third; the fourth runs Pyro at every call.
- hand-written: the log weights written out in PyTorch, 2,048 rows at once, under a running log-sum-exp.
- vectorized_importance_weights: of ``pyro.infer.importance``, one image at a time, 1,000 draws at once.
- pyro.infer.Importance: one image at a time, few draws, since each is a run of model and guide.
- pythae: ``VAE.get_nll`` with its default batches, where installed (``pip install 'ppl-vae[benchmark]'``).

naive: ``log_evidence(..., method="prior")``, whose draws all images share, against its matrix products alone: the
decoder's, and images times logits.

scaling: wall time of ``log_evidence(..., method="importance")``, its pilot of 1,000 draws included, and the memory that
it needs besides story and images, each point in a process of its own (on Linux).
"""

import argparse
import math
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pyro
import torch
from benchmark_training import MODELS, HandWritten, Networks, pythae_trainer, set_up, vae
from benchmarking import Round, Summary, in_turn, machine, print_table, seconds_of, summarize, write_json
from pyro.infer import Importance
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ppl_vae import log_evidence, noise, traces
from ppl_vae.evidence import replays
from ppl_vae.evidence.joint import joint_of
from ppl_vae.evidence.naive import PARTICLES_PER_UNIT as SHARED_AT_ONCE
from ppl_vae.evidence.proposals import OBSERVATIONS_PER_UNIT, PARTICLES_PER_UNIT, blocks
from ppl_vae.evidence.sampling import METHODS, PILOT_PARTICLES, draw

ROWS_AT_ONCE = 2048
DRAWS_BEFORE = (replays.CALLS_BEFORE_CAPTURE + 5) * PARTICLES_PER_UNIT  # of each image, until all is captured
DRAWS_OF_IMPORTANCE, DRAWS_VECTORIZED, IMAGES_OF_OTHERS = 50, 1000, 8
SIZES = (100, 250, 500, 750, 1000), 1000  # observations, at so many draws
DRAWS = 200, (500, 1000, 2000, 3500, 5000)


@dataclass(frozen=True)
class Side:
    """The work of a round and how many draws it is, all images together; and how many were made in building it."""

    work: Round
    draws: int
    draws_before: int = 0


# Speed: sides of so many draws for a block of images


def layers_of(decoder: nn.Module) -> list[Tensor]:
    """The weights of its linear layers."""
    return [layer.weight.detach() for layer in decoder.modules() if isinstance(layer, nn.Linear)]


def multiply(weights: list[Tensor], inputs: list[Tensor]) -> None:
    for weight, rows in zip(weights, inputs, strict=True):
        torch.mm(rows, weight.T)


def matrix_products(networks: Networks, x: Tensor, num_particles: int) -> Side:
    weights = layers_of(networks.decoder())
    inputs = [torch.randn(ROWS_AT_ONCE, weight.shape[1]) for weight in weights]
    times = math.ceil(num_particles * len(x) / ROWS_AT_ONCE)
    return Side(lambda: [multiply(weights, inputs) for _ in range(times)], times * ROWS_AT_ONCE)


def by_the_package(
    networks: Networks,
    x: Tensor,
    num_particles: int,
    compiled: bool = False,
    captured: bool = True,
    model_dtype: torch.dtype | None = None,
) -> Side:
    """What ``log_evidence`` does for a block of observations."""
    story = vae(networks)
    with traces.scoring(story):
        joint = joint_of(story, (x,), compiled=compiled, model_dtype=model_dtype)
        (block,) = blocks(joint, (x,), seed=0, progress=False)
        proposal = METHODS["importance"].prepare(block)

    def work(num_particles: int = num_particles) -> None:
        with ExitStack() as stack:
            stack.enter_context(traces.scoring(story))
            if not captured:
                stack.enter_context(patch.object(replays, "CALLS_BEFORE_CAPTURE", math.inf))
            draw(block, proposal, num_particles, noise.Purpose.EVIDENCE)

    work(DRAWS_BEFORE)
    return Side(work, num_particles * len(x), DRAWS_BEFORE * len(x))


def by_hand(networks: Networks, x: Tensor, num_particles: int) -> Side:
    story = HandWritten(networks)
    at_once = ROWS_AT_ONCE // len(x)

    def log_weights(loc: Tensor, scale: Tensor) -> Tensor:
        noise = torch.randn(at_once, *loc.shape)
        z = loc + scale * noise
        logits = story.decoder(z)
        log_likelihood = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return log_likelihood + (noise.square() / 2 + scale.log() - z.square() / 2).sum(-1)

    @torch.no_grad()
    def work() -> Tensor:
        loc, unconstrained = story.encoder(x).chunk(2, dim=-1)
        scale = softplus(unconstrained) + 1e-4
        log_sum = torch.full((len(x),), -math.inf)
        for _ in range(num_particles // at_once):
            log_sum = torch.logaddexp(log_sum, log_weights(loc, scale).logsumexp(0))
        return log_sum - math.log(num_particles)

    return Side(work, num_particles // at_once * at_once * len(x))


def by_pyro_vectorized(networks: Networks, x: Tensor, num_particles: int) -> Side:
    story = vae(networks)
    images = x[:IMAGES_OF_OTHERS].split(1)

    @torch.no_grad()
    def work() -> list[Tensor]:
        estimates = []
        for image in images:
            log_weights, _, _ = vectorized_importance_weights(
                story.model, story.guide, image, num_samples=DRAWS_VECTORIZED, max_plate_nesting=1
            )
            estimates.append(torch.as_tensor(log_weights).logsumexp(0) - math.log(DRAWS_VECTORIZED))
        return estimates

    return Side(work, DRAWS_VECTORIZED * len(images))


def by_pyro(networks: Networks, x: Tensor, num_particles: int) -> Side:
    story = vae(networks)
    sampler = Importance(story.model, story.guide, num_samples=DRAWS_OF_IMPORTANCE)
    return Side(lambda: sampler.run(x[:1]), DRAWS_OF_IMPORTANCE)


def by_pythae(networks: Networks, x: Tensor, num_particles: int) -> Side:
    model, images = pythae_trainer(networks, x).model.eval(), x[:IMAGES_OF_OTHERS]
    estimate = torch.no_grad()(partial(model.get_nll, images, n_samples=DRAWS_VECTORIZED))
    return Side(estimate, DRAWS_VECTORIZED * len(images))


SIDES: dict[str, Callable[[Networks, Tensor, int], Side]] = {
    "matrix products": matrix_products,
    "captured": by_the_package,
    "compiled": partial(by_the_package, compiled=True),
    "compiled bfloat16": partial(by_the_package, compiled=True, model_dtype=torch.bfloat16),
    "not captured": partial(by_the_package, captured=False),
    "hand-written": by_hand,
    "vectorized_importance_weights": by_pyro_vectorized,
    "pyro.infer.Importance": by_pyro,
} | ({"pythae": by_pythae} if find_spec("pythae") else {})


def speed(networks: Networks, num_particles: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Each side's summary in microseconds per draw and image, and the seconds of its set-up."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = torch.rand(OBSERVATIONS_PER_UNIT, *networks.event).round()
    sides: dict[str, Side] = {}
    building = {name: seconds_of(partial(_build, sides, name, networks, x, num_particles)) for name in SIDES}
    for side in sides.values():
        side.work()
    seconds = in_turn({name: side.work for name, side in sides.items()}, rounds)
    costs = {name: [1e6 * value / sides[name].draws for value in values] for name, values in seconds.items()}
    summaries = summarize(costs)
    before = {name: 1e-6 * summaries[name].median * side.draws_before for name, side in sides.items()}
    return {
        name: {"summary": cost, "setup_seconds": building[name] - before[name] if before[name] else 0.0}
        for name, cost in summaries.items()
    }


def _build(sides: dict[str, Side], name: str, networks: Networks, x: Tensor, num_particles: int) -> None:
    torch.manual_seed(0)
    sides[name] = SIDES[name](networks, x, num_particles)


def print_speed(model: str, sides: dict[str, dict[str, Any]]) -> None:
    def row(name: str, summary: Summary, setup_seconds: float) -> list[str]:
        low, high = summary.quartiles
        cells = [f"{summary.median:.3f}", f"{summary.ratio:.2f}", f"{low:.2f} to {high:.2f}"]
        return [name, *cells, f"{1 / summary.ratio:.1%}", f"{setup_seconds:.1f}" if setup_seconds >= 0.05 else ""]

    rows = [row(name, **side) for name, side in sides.items()]
    print_table([model, "us/draw", "ratio", "quartiles", "share", "set-up s"], rows)


# Naive Monte Carlo


def naive(networks: Networks, num_images: int, num_particles: int, rounds: int) -> dict[str, Summary]:
    """Seconds of a whole call, and of its matrix products."""
    torch.manual_seed(0)
    story, x = vae(networks), torch.rand(num_images, *networks.event).round()
    weights = layers_of(cast(nn.Module, story.decoder))
    inputs = [torch.randn(SHARED_AT_ONCE, weight.shape[1]) for weight in weights]
    logits = torch.randn(SHARED_AT_ONCE, x.shape[1])

    def products() -> None:
        for _ in range(math.ceil(num_particles / SHARED_AT_ONCE)):
            multiply(weights, inputs)
            torch.mm(x, logits.T)

    ours = partial(log_evidence, story, x, method="prior", num_particles=num_particles, progress=False)
    products()
    return summarize(in_turn({"matrix products": products, 'log_evidence, method="prior"': ours}, rounds))


def print_naive(title: str, sides: dict[str, Summary]) -> None:
    rows = [
        [name, f"{cost.median:.1f}", f"{cost.ratio:.2f}", f"{cost.quartiles[0]:.2f} to {cost.quartiles[1]:.2f}"]
        for name, cost in sides.items()
    ]
    print_table([title, "s", "ratio", "quartiles"], rows)


# Time and memory against observations and draws


def cost_of(model: str, num_images: int, num_particles: int, threads: int) -> dict[str, float]:
    """Seconds of a call in this process, and the MiB that it needed besides what was there.

    A call for few images comes first, so that what it loads (code for tracing, above all) is counted on its own.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    story, x = vae(MODELS[model]), torch.rand(num_images, *MODELS[model].event).round()
    estimate = partial(log_evidence, story, method="importance", compile=False, progress=False)
    before = _mebibytes("VmRSS")
    estimate(x[:OBSERVATIONS_PER_UNIT], num_particles=2 * DRAWS_BEFORE)
    loaded = _mebibytes("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _mebibytes("VmRSS")
    seconds = seconds_of(partial(estimate, x, num_particles=num_particles))
    extra = _mebibytes("VmHWM") - before
    return {
        "images": num_images,
        "particles": num_particles,
        "seconds": seconds,
        "extra_mebibytes": extra,
        "loaded_mebibytes": loaded,
    }


def _mebibytes(field: str) -> float:
    """This process's own memory. What ``resource.getrusage`` calls the peak begins with that of the parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kibibytes) / 1024


def scaling(model: str, threads: int) -> list[dict[str, float]]:
    """First with more and more observations, then with more and more draws; run in random order, as machines drift."""
    points = [(size, SIZES[1]) for size in SIZES[0]] + [(DRAWS[0], draws) for draws in DRAWS[1]]
    order = random.Random(0).sample(range(len(points)), len(points))
    arguments = zip(*((model, *points[number], threads) for number in order), strict=True)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        costs = dict(zip(order, fresh.map(cost_of, *arguments), strict=True))
    return [costs[number] for number in range(len(points))]


def print_scaling(points: list[dict[str, float]]) -> None:
    def row(point: dict[str, float]) -> list[str]:
        cost = 1e6 * point["seconds"] / _draws(point)
        memory = f"{point['extra_mebibytes']:.0f}", f"{point['loaded_mebibytes']:.0f}"
        numbers = f"{point['seconds']:.2f}", f"{cost:.2f}", *memory
        return [f"{point['images']} images", f"{point['particles']}", *numbers]

    rows = [row(point) for point in points]
    print_table(["scaling", "draws each", "s", "us/draw", "extra MiB", "loaded before MiB"], rows)


def _draws(point: dict[str, float]) -> float:
    """Of a call, its pilot included."""
    return point["images"] * (point["particles"] + PILOT_PARTICLES)


def plot_scaling(points: list[dict[str, float]], path: Path) -> None:
    """Seconds and memory against all draws of a call, in two panels."""
    from matplotlib.figure import Figure  # half a second of imports, for those who plot

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    quantities = {
        "seconds": lambda point: point["seconds"],
        "MiB, with the code for tracing": lambda point: point["loaded_mebibytes"] + point["extra_mebibytes"],
    }
    for panel, (unit, quantity) in zip(panels, quantities.items(), strict=True):
        for series, label, marker in (
            (points[: len(SIZES[0])], f"{SIZES[0][0]} to {SIZES[0][-1]} images, K = {SIZES[1]}", "o-"),
            (points[len(SIZES[0]) :], f"{DRAWS[0]} images, K = {DRAWS[1][0]} to {DRAWS[1][-1]}", "s--"),
        ):
            panel.plot([_draws(p) / 1e6 for p in series], [quantity(p) for p in series], marker, label=label)
        panel.set(xlabel=f"millions of draws, N (K + {PILOT_PARTICLES})", ylabel=unit, xlim=(0, None))
        panel.set_ylim(0, 1.3 * max(quantity(point) for point in points))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("speed", "naive", "scaling"), default=["speed", "naive", "scaling"]
    )
    parser.add_argument("--models", nargs="+", choices=("small", "mlp"), default=["small", "mlp"])
    parser.add_argument("--rounds", type=int, default=11, help="of speed")
    parser.add_argument("--particles", type=int, default=2048, help="of each image in a round of speed")
    parser.add_argument("--naive-rounds", type=int, default=3)
    parser.add_argument("--naive-images", type=int, default=10_000)
    parser.add_argument("--naive-particles", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of scaling")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    record: dict[str, Any] = machine("torch", "pyro-ppl", "pythae") | {"threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        set_up(options.threads, folder)
        if "speed" in options.parts:
            record["compiler_start_seconds"] = seconds_of(lambda: torch.compile(torch.sin)(torch.zeros(8)))
            print(f"{options.threads} threads; the compiler's first start, in no set-up below, took", end=" ")
            print(f"{record['compiler_start_seconds']:.1f} s\n")
            record["speed"] = {}
            for model in options.models:
                record["speed"][model] = speed(MODELS[model], options.particles, options.rounds)
                print_speed(model, record["speed"][model])
                print()
                write_json(options.json, record)
        if "naive" in options.parts:
            images, particles = options.naive_images, options.naive_particles
            sides = naive(MODELS["mlp"], images, particles, options.naive_rounds)
            record["naive"] = {"images": images, "particles": particles, "sides": sides}
            print_naive(f"{images} images, {particles} shared draws", sides)
            print()
            write_json(options.json, record)
        if "scaling" in options.parts:
            record["scaling"] = scaling("mlp", options.threads)
            print_scaling(record["scaling"])
            write_json(options.json, record)
            if options.plot is not None:
                plot_scaling(record["scaling"], options.plot)


if __name__ == "__main__":
    main()
