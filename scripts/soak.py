"""Does a long life leak? Many training steps and many estimates in one process, and how its memory grows meanwhile.

    python scripts/soak.py --steps 20000 --calls 2000

Printed is the resident memory along the way, and by how many per cent it has grown at the end of each part since its
warm-up, the first fifth, in which allocators and caches fill. The story is tiny, so that what leaks is not lost beside
it. At the end the time of writing a checkpoint of the story that ``ppl-vae train`` trains by default is compared with
the minute that lies between two of them.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ppl_vae import VAE, checkpoint, configuration, fit, likelihoods, log_evidence, posteriors, priors
from ppl_vae.evidence.estimators import MethodName
from ppl_vae.networks import mlp
from ppl_vae.training.checkpoints import files_in

EngineName = Literal["auto", "svi", "captured"]

FEATURES, ROWS, BATCH_SIZE, SCORED = 12, 1600, 16, 8
METHODS: tuple[MethodName, ...] = ("importance", "auto", "elbo", "mixture")
MEASUREMENTS, WARM_UP = 20, 0.2
MEGABYTE = 2**20
MOST_GROWTH = 2.0  # per cent
SECONDS_BETWEEN_CHECKPOINTS = 60.0


def story() -> VAE:
    """A tiny story."""
    return VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(mlp(2, 16, FEATURES)),
        encoder=posteriors.DiagonalNormal(mlp(FEATURES, 16, 4)),
    )


def observations(number: int) -> Tensor:
    """Rows of zeros and ones."""
    return torch.bernoulli(torch.full((number, FEATURES), 0.5), generator=torch.Generator().manual_seed(0))


def resident() -> float:
    """The resident memory of this process in megabytes, after a collection of garbage."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


class Memory:
    """What is measured while something is done again and again."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.done = 0
        self.measured: list[float] = []

    def tick(self) -> None:
        """One more time."""
        self.done += 1
        if self.done % max(1, self.times // MEASUREMENTS) == 0:
            self.measured.append(resident())

    @property
    def growth(self) -> float:
        """Megabytes, from the end of the warm-up to the end."""
        return self.measured[-1] - self._warm

    @property
    def growth_in_per_cent(self) -> float:
        return 100 * self.growth / self._warm

    @property
    def _warm(self) -> float:
        return self.measured[int(WARM_UP * len(self.measured))]


def training(steps: int, engine: EngineName) -> Memory:
    """One training of so many steps, with checkpoints now and then."""
    epochs = max(1, steps * BATCH_SIZE // ROWS)
    memory = Memory(epochs)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            story(),
            observations(ROWS),
            validation=observations(100),
            epochs=epochs,
            batch_size=BATCH_SIZE,
            engine=engine,
            callbacks=[lambda _, row: memory.tick()],
            checkpoints=folder,
            checkpoint_every=1.0,
            progress=False,
        )
    return memory


def estimates(calls: int) -> Memory:
    """So many estimates, by several methods in turn."""
    memory, judged, x = Memory(calls), story(), observations(SCORED)
    for call in range(calls):
        log_evidence(judged, x, method=METHODS[call % len(METHODS)], num_particles=64, seed=call, progress=False)
        memory.tick()
    return memory


def trainings(calls: int) -> Memory:
    """So many short trainings, each by the captured engine."""
    memory, x = Memory(calls), observations(32)
    for seed in range(calls):
        fit(story(), x, epochs=2, batch_size=16, engine="captured", seed=seed, progress=False)
        memory.tick()
    return memory


def told(name: str, part: Callable[[], Memory]) -> float:
    """Does a part and prints what was measured; returns the growth in per cent."""
    started = time.perf_counter()
    memory = part()
    print(f"{name}, {time.perf_counter() - started:.0f} s")
    print("  megabytes:", " ".join(f"{measured:.1f}" for measured in memory.measured))
    print(f"  after the warm-up: {memory.growth:+.1f} MB, {memory.growth_in_per_cent:+.2f} %", flush=True)
    return memory.growth_in_per_cent


def cost_of_checkpoints(rounds: int = 20) -> str:
    """The time of writing a checkpoint of the default story, beside the time between two of them."""
    made = configuration.build(configuration.StoryConfiguration(event_shape=(1, 28, 28)))
    x = torch.bernoulli(torch.full((200, 1, 28, 28), 0.5))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit(made, x, validation=x, epochs=1, batch_size=100, engine="svi", checkpoints=folder, progress=False)
        (file,) = files_in(folder)
        about, tensors = checkpoint.read(file)
        size = file.stat().st_size / MEGABYTE
        seconds = statistics.median(_seconds(lambda: checkpoint.write(file, tensors, about)) for _ in range(rounds))
    share = 100 * seconds / SECONDS_BETWEEN_CHECKPOINTS
    return f"a checkpoint of the default story: {size:.1f} MB in {1000 * seconds:.0f} ms, {share:.2f} % of a minute"


def _seconds(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--calls", type=int, default=2_000, help="of log_evidence")
    parser.add_argument("--trainings", type=int, default=0, help="short ones, one after the other")
    parser.add_argument("--engine", choices=get_args(EngineName), default="auto")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    growths = [
        told(f"{options.steps} training steps", lambda: training(options.steps, options.engine)),
        told(f"{options.calls} estimates", lambda: estimates(options.calls)),
    ]
    if options.trainings:
        growths.append(told(f"{options.trainings} trainings", lambda: trainings(options.trainings)))
    print(cost_of_checkpoints())
    sys.exit(0 if max(growths) <= MOST_GROWTH else f"memory grew by more than {MOST_GROWTH:g} %")


if __name__ == "__main__":
    main()
