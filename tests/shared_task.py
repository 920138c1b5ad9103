"""What the tests of shared work compute, alone or in several processes: ``python tests/shared_task.py TASK FOLDER``.

``everything``: the first process writes what was found to ``FOLDER/found.safetensors``, and every process the hash of
it to ``FOLDER/<its number>.txt``. ``endless``: trains, with a checkpoint after every step.
"""

import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from example_stories import small_vae
from torch import Tensor

from ppl_vae import VAE, checkpoint, diagnostics, fit, likelihoods, log_evidence, networks, posteriors, priors, to_arviz
from ppl_vae.evidence.annealing import Annealed
from ppl_vae.ranks import Ranks, here

METHODS = {
    "importance": {"method": "importance", "num_particles": 300},
    "auto": {},
    "prior": {"method": "prior", "num_particles": 500},
    "elbo": {"method": "elbo", "num_particles": 20},
    "annealed": {"method": Annealed(num_temperatures=10), "num_particles": 4},
    "tolerance": {"method": "mixture", "tolerance": 0.1},
}


def binary_images(num_observations: int = 150) -> Tensor:
    """Rows of zeros and ones that depend on one another, shape (N, 20), float64."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_observations, 3, generator=generator, dtype=torch.float64)
    weights = 2 * torch.randn(3, 20, generator=generator, dtype=torch.float64)
    return torch.bernoulli(torch.sigmoid(z @ weights), generator=generator)


def story_of(latent_dim: int) -> VAE:
    """An untrained story in float64."""
    torch.manual_seed(1)
    return VAE(
        prior=priors.StandardNormal(latent_dim),
        decoder=likelihoods.Bernoulli(networks.mlp(latent_dim, 16, 20)),
        encoder=posteriors.DiagonalNormal(networks.mlp(20, 16, 2 * latent_dim)),
    ).double()


def trained(engine: str, **settings: object) -> tuple[VAE, Tensor]:
    """A story after some 100 steps, and its history."""
    story, x = story_of(3), binary_images(400)
    arguments = {"validation": x[:60], "epochs": 25, "batch_size": 100, "shards": 4, "progress": False} | settings
    history = fit(story, x, engine=engine, **arguments)
    return story, torch.tensor([history["train_elbo"].tolist(), history["validation_elbo"].tolist()])


def everything() -> dict[str, Tensor]:
    """All results, by name."""
    found = {}
    for engine in ("svi", "captured"):
        story, found[f"history {engine}"] = trained(engine)
        found |= {f"weights {engine} {name}": value for name, value in story.state_dict().items()}
    x, plane = binary_images(), small_vae()
    torch.manual_seed(2)
    story = story_of(3)
    for name, settings in METHODS.items():
        dataset = log_evidence(story, x, progress=False, **settings).dataset
        found |= {f"evidence {name} {c}": torch.from_numpy(dataset[c].values) for c in dataset if c not in WORDS}
    found["evidence quadrature"] = torch.from_numpy(
        log_evidence(plane, torch.rand(70, 1, 6, 5).round(), method="quadrature", progress=False)["estimate"].values
    )
    tree = to_arviz(story, x, num_draws=7, num_predictive=3, resample=True, num_particles=50, progress=False)
    for group in ("posterior", "log_likelihood", "posterior_predictive", "sample_stats"):
        found |= {f"tree {group} {name}": torch.from_numpy(array.values.copy()) for name, array in tree[group].items()}
    diagnosis = diagnostics.diagnose(story, x, sections=("evidence", "guide", "collapse"), progress=False)
    for section, table in diagnosis.items():
        numbers = {name: array for name, array in table.items() if array.dtype.kind in "fiu"}
        found |= {f"{section} {name}": torch.from_numpy(array.values.copy()) for name, array in numbers.items()}
    return found


WORDS = ("verdict", "method")


def different_seeds(ranks: Ranks) -> str:
    """What a process is told whose seed is not that of the others."""
    try:
        fit(story_of(3), binary_images(), epochs=1, seed=ranks.number, progress=False)
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, folder, ranks = sys.argv[1], Path(sys.argv[2]), here()
    (folder / f"{ranks.number}.pid").write_text(str(os.getpid()))
    if task == "endless":
        trained("svi", epochs=10**9, checkpoints=folder / "checkpoints", checkpoint_every=0.0)
    found = everything()
    trained("captured", epochs=12, checkpoints=folder / "checkpoints")
    (folder / f"{ranks.number}.txt").write_text(checkpoint.fingerprint(found.values()))
    (folder / f"{ranks.number}.refusal").write_text(different_seeds(ranks))
    if ranks.is_first:
        contiguous = {name: tensor.contiguous() for name, tensor in found.items()}
        safetensors.torch.save_file(contiguous, folder / "found.safetensors")
