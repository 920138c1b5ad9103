"""What a second process is worth: the same work by one process and by several, each on a core of its own.

    python scripts/benchmark_scaling.py                       # 1 and 2 processes, in turn
    python scripts/benchmark_scaling.py --processes 1 2 4 --device cuda

Data-parallel training of a 784-400-400-50 VAE at batch 1024, importance evidence with 1,000 draws, and the same
training with its observations on disk. Times are taken inside, after a first round that traces and warms up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import benchmarking
import numpy as np
import torch
from torch import Tensor

from ppl_vae import VAE, data, fit, likelihoods, log_evidence, networks, posteriors, priors
from ppl_vae.ranks import here

OBSERVATIONS, BATCH = 8192, 1024
SCORED, DRAWS = 1024, 1000
EPOCHS = 5


def story() -> VAE:
    """An untrained 784-400-400-50 story."""
    torch.manual_seed(0)
    return VAE(
        prior=priors.StandardNormal(50),
        decoder=likelihoods.Bernoulli(networks.mlp(50, 400, 400, 784)),
        encoder=posteriors.DiagonalNormal(networks.mlp(784, 400, 400, 100)),
    )


def images() -> Tensor:
    """Binary images without meaning, shape (8192, 784)."""
    return torch.bernoulli(torch.full((OBSERVATIONS, 784), 0.2), generator=torch.Generator().manual_seed(0))


def training(x: Tensor, device: str) -> float:
    """Median seconds of an epoch, but for the first, which traces."""
    history = fit(story(), x, epochs=EPOCHS, batch_size=BATCH, device=device, compile=False, progress=False)
    return median(history["seconds"][1:])


def evidence(x: Tensor, device: str) -> float:
    """Seconds of importance evidence, after that of a few observations."""
    mine = story().to(device)

    def score(number: int) -> object:
        return log_evidence(mine, x[:number], method="importance", num_particles=DRAWS, compile=False, progress=False)

    score(SCORED // 8)
    return benchmarking.seconds_of(lambda: score(SCORED))


def from_disk(x: Tensor, device: str) -> float:
    """Like training, with the observations in a file."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "x.npy"), x.numpy())
        return training(data.stored(Path(folder, "x.npy")), device)


TASKS: dict[str, Callable[[Tensor, str], float]] = {
    "training, batch 1024": training,
    "training from disk": from_disk,
    "evidence, 1,024 x 1,000": evidence,
}


def work(task: str, device: str) -> None:
    """One of several processes, or the only one; the first prints its seconds."""
    ranks = here()
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[ranks.number % len(cores)]})
    torch.set_num_threads(1)
    seconds = TASKS[task](images(), device)
    if ranks.is_first:
        print(json.dumps(seconds))


def seconds_by(number: int, task: str, device: str) -> float:
    """What so many processes need."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    command = [sys.executable, *torchrun, __file__, "--work", task, "--device", device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many; the first is the baseline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.device)
        return
    rows = []
    for task in TASKS:
        seconds: dict[str, list[float]] = {str(number): [] for number in options.processes}
        for turn in range(options.rounds):
            for number in options.processes if turn % 2 else reversed(options.processes):
                seconds[str(number)].append(seconds_by(number, task, options.device))
        for number, summary in benchmarking.summarize(seconds).items():
            low, high = summary.quartiles
            rows.append(
                [task, number, f"{summary.median:.3f}", f"{1 / summary.ratio:.2f}", f"{1 / high:.2f} to {1 / low:.2f}"]
            )
    benchmarking.print_table(["task", "processes", "seconds", "times as fast", "quartiles"], rows)


if __name__ == "__main__":
    main()
