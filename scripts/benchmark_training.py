"""A training step, by hand, by Pyro, by this package and by others: milliseconds at batch 128 in float32 on the CPU.

    python scripts/benchmark_training.py --models small mlp conv --rounds 15 --threads 2

Every side trains the same networks with a Bernoulli likelihood and Adam (1e-3) on the same random zeros and ones in
memory, gathers its batches by index, and reads the loss after each step. Sides take turns: a round is one pass over
the data by each. The ratio is to the first side in the same round (median, quartiles over rounds), "build" is what the
first round took longer than a later one (tracing, compiling), and "loss" (nats per observation, last round) shows
that all have learned the same.

- hand-written: the ELBO written out in PyTorch, one sample of z, with fused Adam, with torch's default Adam, and with
  torch.compile around the loss (fused Adam).
- pyro.infer.SVI: as in Pyro's VAE example: pyro.module in model and guide, pyro.optim.Adam, Trace_ELBO, validation on.
- svi, captured, captured compiled: the engines of ``ppl_vae.fit``, with its default optimizer; a round is an epoch.
- pythae: ``BaseTrainer.train_step`` without its progress bar: torch's default Adam, binary cross-entropy of sigmoids,
  and the KL divergence in closed form, where all others use one sample.
- NumPyro: ``SVI.update`` in a jitted ``lax.scan`` over 50 steps.

pythae and NumPyro take part when installed (``pip install 'ppl-vae[benchmark]'``). Compilers start from an empty cache.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from benchmarking import Round, Summary, in_turn, machine, print_table, seconds_of, summarize, write_json
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ppl_vae import VAE, likelihoods, posteriors, priors
from ppl_vae.checks import Transform
from ppl_vae.networks import convolutional_decoder, convolutional_encoder, mlp
from ppl_vae.training.captured import CapturedEngine
from ppl_vae.training.loop import ADAM, _training
from ppl_vae.training.steps import Engine, Tally, Task, Tempering
from ppl_vae.training.svi import SVIEngine

BATCH_SIZE, LEARNING_RATE, FLOOR, STEPS_PER_SCAN = 128, 1e-3, 1e-4, 50


@dataclass(frozen=True)
class Networks:
    """An encoder from observations to 2 K numbers, a decoder from K numbers to logits, and the steps of a round."""

    event: tuple[int, ...]
    latent_dim: int
    encoder: Callable[[], nn.Module]
    decoder: Callable[[], nn.Module]
    steps: int
    hidden: tuple[int, ...] = ()

    @classmethod
    def of_layers(cls, event: tuple[int, ...], *hidden: int, latent_dim: int, steps: int) -> "Networks":
        """Multilayer perceptrons, mirror images of each other."""
        encoder = partial(mlp, event, *hidden, 2 * latent_dim)
        return cls(event, latent_dim, encoder, partial(mlp, latent_dim, *reversed(hidden), event), steps, hidden)


MODELS = {
    "small": Networks.of_layers((64,), 64, latent_dim=2, steps=200),
    "mlp": Networks.of_layers((784,), 400, 400, latent_dim=50, steps=100),
    "conv": Networks(
        (1, 28, 28),
        20,
        partial(convolutional_encoder, (1, 28, 28), 32, 64, output=2 * 20),
        partial(convolutional_decoder, 20, 64, 32, image=(1, 28, 28)),
        steps=20,
    ),
}


def batches(x: Tensor) -> Iterator[Tensor]:
    """One pass over the data in a random order."""
    return (x.index_select(0, rows) for rows in torch.randperm(len(x)).split(BATCH_SIZE))


class HandWritten(nn.Module):
    """A VAE without Pyro."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.encoder = networks.encoder()
        self.decoder = networks.decoder()

    def forward(self, x: Tensor) -> Tensor:
        """The negative ELBO per observation, by one sample."""
        loc, unconstrained = self.encoder(x).chunk(2, dim=-1)
        scale = softplus(unconstrained) + FLOOR
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        log_likelihood = -binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return -(log_likelihood + (noise.square() / 2 + scale.log() - z.square() / 2).sum()) / len(x)


def by_hand(networks: Networks, x: Tensor, fused: bool | None, compiled: bool = False) -> Round:
    story = HandWritten(networks)
    loss_of = torch.compile(story) if compiled else story
    optimizer = torch.optim.Adam(story.parameters(), lr=LEARNING_RATE, fused=fused)

    def epoch() -> float:
        total = 0.0
        for batch in batches(x):
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        return total / len(x)

    return epoch


class PyroExample(nn.Module):
    """Model and guide in the manner of Pyro's VAE example."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.encoder = networks.encoder()
        self.decoder = networks.decoder()
        self.latent_dim = networks.latent_dim

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(x.shape[0], self.latent_dim)
            z_scale = x.new_ones(x.shape[0], self.latent_dim)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(x.dim() - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, unconstrained = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(z_loc, softplus(unconstrained) + FLOOR).to_event(1))


def pyro_svi(networks: Networks) -> SVI:
    """Pyro's example, ready to step."""
    pyro.clear_param_store()
    story = PyroExample(networks)
    return SVI(story.model, story.guide, Adam({"lr": LEARNING_RATE}), loss=Trace_ELBO())


def by_pyro(networks: Networks, x: Tensor) -> Round:
    svi = pyro_svi(networks)

    def epoch() -> float:
        return sum(float(svi.step(batch)) for batch in batches(x)) / len(x)  # pyright: ignore[reportArgumentType]

    return epoch


def vae(networks: Networks) -> VAE:
    """The same networks as a story of this package."""
    return VAE(
        encoder=posteriors.DiagonalNormal(networks.encoder(), floor=FLOOR),  # first, so that all start from one draw
        decoder=likelihoods.Bernoulli(networks.decoder()),
        prior=priors.StandardNormal(networks.latent_dim),
    )


def by_the_package(
    networks: Networks, x: Tensor, engine: str, compiled: bool = False, transform: Transform | None = None
) -> Round:
    """Epochs as ``fit`` takes them, one per call, so that others can have their turn between two of them."""
    story = vae(networks)
    optimizer = ADAM(story.parameters())
    task = Task(
        story=story,
        columns=(x,),
        batch_size=BATCH_SIZE,
        loss=Trace_ELBO(),
        optimizer=optimizer,
        clip=None,
        transform=transform,
        tempering=Tempering(),
        warms_up=False,
        precision=None,
        seed=0,
    )
    chosen: Engine = SVIEngine(task) if engine == "svi" else CapturedEngine(task, total_steps=0, compiled=compiled)
    epochs = iter(range(1, 1_000_000))

    def epoch() -> float:
        tally = Tally(task, next(epochs))
        with _training(story, x.device):
            chosen.epoch(tally)
        return -float(tally.row["train_elbo"])

    return epoch


class _Loader:
    """What pythae's trainer asks of a loader, over batches gathered by index."""

    def __init__(self, x: Tensor) -> None:
        self.dataset = x

    def __len__(self) -> int:
        return len(self.dataset) // BATCH_SIZE

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"data": batch} for batch in batches(self.dataset))


def pythae_trainer(networks: Networks, x: Tensor) -> Any:
    """pythae's trainer of these networks, without its progress bar, its log and its folder."""
    logging.disable(logging.INFO)
    models, nets = import_module("pythae.models"), import_module("pythae.models.nn")
    output = import_module("pythae.models.base.base_utils").ModelOutput
    trainers = import_module("pythae.trainers")

    class Encoder(nets.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.encoder()

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.network(x).chunk(2, dim=-1)
            return output(embedding=loc, log_covariance=log_variance)

    class Decoder(nets.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.decoder()

        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=self.network(z).sigmoid())

    configuration = models.VAEConfig(
        input_dim=networks.event, latent_dim=networks.latent_dim, reconstruction_loss="bce"
    )
    trainer = trainers.BaseTrainer(
        models.VAE(configuration, Encoder(), Decoder()),
        import_module("pythae.data.datasets").BaseDataset(x, torch.zeros(len(x))),
        training_config=trainers.BaseTrainerConfig(
            per_device_train_batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, no_cuda=True
        ),
    )
    trainer.set_optimizer()
    trainer.callback_handler = import_module("pythae.trainers.training_callbacks").CallbackHandler([], trainer.model)
    return trainer


def by_pythae(networks: Networks, x: Tensor) -> Round:
    trainer = pythae_trainer(networks, x)
    trainer.train_loader = _Loader(x)
    return lambda: trainer.train_step(1)


def by_numpyro(networks: Networks, x: Tensor) -> Round:
    jax, numpyro = import_module("jax"), import_module("numpyro")
    stax, infer = import_module("jax.example_libraries.stax"), import_module("numpyro.infer")
    distributions, optimizers = import_module("numpyro.distributions"), import_module("numpyro.optim")
    (features,), latent_dim = networks.event, networks.latent_dim

    def network(*sizes: int) -> Any:
        return stax.serial(*[layer for size in sizes for layer in (stax.Dense(size), stax.Relu)][:-1])

    def model(x: Any) -> None:
        decoder = numpyro.module("decoder", network(*reversed(networks.hidden), features), (BATCH_SIZE, latent_dim))
        with numpyro.plate("data", x.shape[0]):
            prior = distributions.Normal(jax.numpy.zeros((x.shape[0], latent_dim)), 1.0)
            z = numpyro.sample("latent", prior.to_event(1))
            numpyro.sample("obs", distributions.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encoder = numpyro.module("encoder", network(*networks.hidden, 2 * latent_dim), (BATCH_SIZE, features))
        with numpyro.plate("data", x.shape[0]):
            loc, unconstrained = jax.numpy.split(encoder(x), 2, axis=-1)
            scale = jax.nn.softplus(unconstrained) + FLOOR
            numpyro.sample("latent", distributions.Normal(loc, scale).to_event(1))

    svi = infer.SVI(model, guide, optimizers.Adam(LEARNING_RATE), infer.Trace_ELBO())

    @jax.jit
    def steps(state: Any, data: Any, rows: Any) -> Any:
        return jax.lax.scan(lambda state, batch: svi.update(state, data[batch]), state, rows)

    data = jax.numpy.asarray(x.numpy())
    state = svi.init(jax.random.PRNGKey(0), data[:BATCH_SIZE])
    generator = np.random.default_rng(0)

    def epoch() -> float:
        nonlocal state
        total = 0.0
        for rows in generator.permutation(len(x)).reshape(-1, STEPS_PER_SCAN, BATCH_SIZE):
            state, losses = steps(state, data, rows)
            total += float(losses.sum())
        return total / len(x)

    return epoch


SIDES: dict[str, Callable[[Networks, Tensor], Round]] = {
    "hand-written": partial(by_hand, fused=True),
    "hand-written, default Adam": partial(by_hand, fused=None),
    "hand-written, torch.compile": partial(by_hand, fused=True, compiled=True),
    "pyro.infer.SVI": by_pyro,
    "svi": partial(by_the_package, engine="svi"),
    "captured": partial(by_the_package, engine="captured"),
    "captured, compiled": partial(by_the_package, engine="captured", compiled=True),
    "pythae": by_pythae,
    "NumPyro": by_numpyro,
}


def takes_part(side: str, networks: Networks) -> bool:
    """Whether what a side needs is installed, and it has these networks."""
    return {
        "pythae": find_spec("pythae") is not None,
        "NumPyro": find_spec("numpyro") is not None and bool(networks.hidden),
    }.get(side, True)


def measure(networks: Networks, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Each side's summary, what its first round took longer than the others, and its loss in the last one."""
    torch.manual_seed(0)
    x = torch.rand(networks.steps * BATCH_SIZE, *networks.event).round()
    losses: dict[str, object] = {}
    sides: dict[str, Round] = {}
    for name in names:
        torch.manual_seed(0)
        sides[name] = partial(_noting_loss, name, SIDES[name](networks, x), losses)
    first = {name: seconds_of(side) for name, side in sides.items()}
    summaries = summarize(in_turn(sides, rounds))
    return {
        name: {"summary": summary, "build_seconds": first[name] - summary.median, "loss": losses[name]}
        for name, summary in summaries.items()
    }


def _noting_loss(name: str, side: Round, losses: dict[str, object]) -> None:
    losses[name] = side()


def _row(name: str, summary: Summary, build_seconds: float, loss: float, steps: int) -> list[str]:
    low, high = summary.quartiles
    return [
        name,
        f"{1e3 * summary.median / steps:.3f}",
        f"{summary.ratio:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{build_seconds:.1f}" if build_seconds >= 0.05 else "",
        f"{loss:.1f}",
    ]


def set_up(threads: int, folder: str) -> None:
    """Threads of torch and JAX, the CPU for both, and an empty cache for inductor; before JAX is imported."""
    torch.set_num_threads(threads)
    os.environ |= {"NPROC": str(threads), "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_CACHE_DIR": folder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="besides the hand-written one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    record: dict[str, Any] = machine("torch", "pyro-ppl", "pythae", "numpyro", "jax")
    record |= {"threads": options.threads, "rounds": options.rounds, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        set_up(options.threads, folder)
        start = record["compiler_start_seconds"] = seconds_of(lambda: torch.compile(torch.sin)(torch.zeros(8)))
        print(f"{options.threads} threads; the compiler itself started in {start:.1f} s, counted in no build")
        for model in options.models:
            networks = MODELS[model]
            wanted = [name for name in SIDES if name == next(iter(SIDES)) or name in options.sides]
            names = [name for name in wanted if takes_part(name, networks)]
            sides = measure(networks, names, options.rounds)
            record["models"][model] = {"steps_per_round": networks.steps, "sides": sides}
            print()
            rows = [_row(name, **side, steps=networks.steps) for name, side in sides.items()]
            print_table([model, "ms/step", "ratio", "quartiles", "build s", "loss"], rows)
            if absent := [name for name in wanted if name not in names]:
                print(f"without {', '.join(absent)}")
            write_json(options.json, record)


if __name__ == "__main__":
    main()
