"""Kills a training again and again, at random moments, and asks whether what is left goes on bit for bit.

    python scripts/kill_training.py --kills 200

A child trains a small story and writes a checkpoint after every step. It is killed (SIGKILL, which no program can
catch) at a random moment, as often as not while it writes. After every kill the training is resumed and taken to its
end, and its weights, its optimizer's memory and its history are compared with those of a training that nobody
disturbed, bit for bit; then another child goes on in the same folder from where the killed one was.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import VAE, checkpoint, fit, likelihoods, posteriors, priors
from ppl_vae.networks import mlp
from ppl_vae.training.checkpoints import files_in

FEATURES, ROWS, BATCH_SIZE, EPOCHS = 12, 400, 16, 8
LONGEST_LIFE = 0.5  # seconds: the latest moment of a kill


def story() -> VAE:
    """A small story, always with the same initial weights."""
    torch.manual_seed(0)
    return VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(mlp(2, 32, FEATURES)),
        encoder=posteriors.DiagonalNormal(mlp(FEATURES, 32, 4)),
    )


def observations() -> Tensor:
    """Rows of zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.bernoulli(torch.rand(1, FEATURES, generator=generator).expand(ROWS, FEATURES), generator=generator)


def train(resume: Path | None, keep: Path, every: float = 0.0) -> None:
    """Trains to the end, with a checkpoint at the end and every so many seconds."""
    fit(
        story(),
        observations(),
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        engine="svi",
        progress=False,
        resume=resume,
        checkpoints=keep,
        checkpoint_every=every,
    )


def end_of(resume: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The last checkpoint of a training that is taken to its end elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        train(resume, Path(folder), every=float("inf"))
        return checkpoint.read(files_in(Path(folder))[0])


def same(end: tuple[dict[str, Any], dict[str, Tensor]], other: tuple[dict[str, Any], dict[str, Tensor]]) -> bool:
    """Whether two trainings ended with the same tensors, bit for bit, and the same history but for seconds."""
    (about, tensors), (abouts, others) = end, other
    return (
        tensors.keys() == others.keys()
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
        and rows_of(about) == rows_of(abouts)
    )


def rows_of(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in about["training"]["history"]]


def lives(folder: Path, moment: float) -> bool:
    """Whether a child that goes on in a folder was still at it at this moment, counted from its first checkpoint."""
    before = files_in(folder)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder if before else None, folder)
            status = 0
        finally:
            os._exit(status)
    while files_in(folder) == before and not ended(child):
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("A child failed by itself.")
    return os.WIFSIGNALED(status)


def ended(child: int) -> bool:
    """Whether a child is over; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_again_and_again(kills: int, seed: int, whole: tuple[dict[str, Any], dict[str, Tensor]]) -> Counter[str]:
    """Kills so many children, and counts what was left of their trainings."""
    moments, counted = random.Random(seed), Counter[str]()
    folder = tempfile.TemporaryDirectory()
    while counted["kills"] < kills:
        here = Path(folder.name)
        if not lives(here, moments.uniform(0, LONGEST_LIFE)):
            counted["ends"] += 1
            counted["ends, bit for bit"] += same(checkpoint.read(files_in(here)[0]), whole)
            folder.cleanup()
            folder = tempfile.TemporaryDirectory()
            continue
        counted["kills"] += 1
        counted["while writing"] += any(here.glob(".step-*"))
        try:
            end = end_of(here)
        except (ValueError, OSError) as error:
            print(f"kill {counted['kills']}: {error}", file=sys.stderr)
            continue
        counted["resumable"] += 1
        counted["bit for bit"] += same(end, whole)
    folder.cleanup()
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with more of them does not fork well
    started = time.perf_counter()
    counted = kill_again_and_again(options.kills, options.seed, end_of(None))
    print(f"killed                  {counted['kills']} (while a file was being written: {counted['while writing']})")
    print(f"resumable               {counted['resumable']} of {counted['kills']}")
    print(f"same bits at the end    {counted['bit for bit']} of {counted['kills']}")
    print(f"trainings that ended    {counted['ends']}, with the same bits {counted['ends, bit for bit']}")
    print(f"in {time.perf_counter() - started:.0f} seconds")
    sys.exit(0 if counted["bit for bit"] == counted["kills"] and counted["ends, bit for bit"] == counted["ends"] else 1)


if __name__ == "__main__":
    main()
