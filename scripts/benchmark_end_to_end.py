"""Training from images in memory to the last step of an epoch: images per second, with everything in between.

    python scripts/benchmark_end_to_end.py --rounds 5 --threads 2 --data FOLDER

All sides train a 784-400-20 VAE with a Bernoulli likelihood, batch 128, Adam (1e-3), on grey images of MNIST's size
and number (MNIST itself from FOLDER), on the CPU. Sides take turns: a round is an epoch by each; "first epoch" is what
the first round took, with tracing and compiling, but without the compiler's own start.

- fit, anew: a whole call of ``ppl_vae.fit`` for one epoch with its defaults, checks and capture included.
- fit: an epoch of it later on, captured; and captured and compiled. Images are binarized anew for each batch.
- Pyro's tutorial: torchvision's MNIST (here over the images in memory), ToTensor for each image, a DataLoader with one
  worker, as there, and with none; pyro.infer.SVI with pyro.optim.Adam. It trains on grey levels, without binarizing.
- pythae: ``BaseTrainer.train_step`` with its own DataLoader, without its progress bar; on grey levels as well.
"""

import argparse
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmark_training import BATCH_SIZE, Networks, by_the_package, pyro_svi, pythae_trainer, set_up, vae
from benchmarking import Round, Summary, in_turn, machine, print_table, seconds_of, summarize, write_json
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST, VisionDataset
from torchvision.transforms import ToTensor

from ppl_vae import data, fit

NETWORKS = Networks.of_layers((1, 28, 28), 400, latent_dim=20, steps=469)


class MNISTInMemory(MNIST):
    """torchvision's MNIST with images that are there already; its ``__getitem__`` is the original."""

    def __init__(self, images: Tensor) -> None:
        VisionDataset.__init__(self, root="", transform=ToTensor())
        self.data = images
        self.targets = torch.zeros(len(images), dtype=torch.int64)


def fit_anew(x: Tensor) -> Round:
    return lambda: fit(vae(NETWORKS), x, epochs=1, batch_size=BATCH_SIZE, transform=torch.bernoulli, progress=False)


def pyro_tutorial(x: Tensor, workers: int) -> Round:
    images = MNISTInMemory((255 * x).round().to(torch.uint8).flatten(0, 1))
    loader = DataLoader(images, batch_size=BATCH_SIZE, shuffle=True, num_workers=workers)
    svi = pyro_svi(NETWORKS)
    return lambda: sum(float(svi.step(batch)) for batch, _ in loader)  # pyright: ignore[reportArgumentType]


def pythae(x: Tensor) -> Round:
    trainer = pythae_trainer(NETWORKS, x)
    return lambda: trainer.train_step(1)


def sides_of(x: Tensor) -> dict[str, Round]:
    epochs = partial(by_the_package, NETWORKS, x, engine="captured", transform=torch.bernoulli)
    sides = {
        "Pyro's tutorial": pyro_tutorial(x, workers=1),
        "Pyro's tutorial, no worker": pyro_tutorial(x, workers=0),
        "fit, anew": fit_anew(x),
        "fit, captured": epochs(),
        "fit, captured, compiled": epochs(compiled=True),
    }
    return sides | ({"pythae": pythae(x)} if find_spec("pythae") else {})


def _row(name: str, summary: Summary, first: float, num_images: int) -> list[str]:
    low, high = summary.quartiles
    return [
        name,
        f"{num_images / summary.median:.0f}",
        f"{1 / summary.ratio:.2f}",
        f"{1 / high:.2f} to {1 / low:.2f}",
        f"{first:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", help="where MNIST is; without it the images are random")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    torch.manual_seed(0)
    x = torch.rand(options.images, 1, 28, 28)
    if options.data is not None:
        x = data.load("mnist", root=options.data, binarization="dynamic", validation=1).train.x[: options.images]
    with tempfile.TemporaryDirectory() as folder:
        set_up(options.threads, folder)
        torch.compile(torch.sin)(torch.zeros(8))
        sides = sides_of(x)
        first = {name: seconds_of(side) for name, side in sides.items()}
        summaries = summarize(in_turn(sides, options.rounds))

    print(f"{len(x)} images, {options.threads} threads; images per second, and as a multiple of Pyro's tutorial")
    rows = [_row(name, summary, first[name], len(x)) for name, summary in summaries.items()]
    print_table(["side", "images/s", "multiple", "quartiles", "first epoch s"], rows)
    record: dict[str, Any] = machine("torch", "torchvision", "pyro-ppl", "pythae")
    record |= {"threads": options.threads, "images": len(x), "mnist": options.data is not None}
    write_json(options.json, record | {"sides": summaries, "first_epoch_seconds": first})


if __name__ == "__main__":
    main()
