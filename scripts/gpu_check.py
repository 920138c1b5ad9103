"""Everything that a GPU should show, in one call of some minutes, as JSON.

    python scripts/gpu_check.py --json gpu.json

- steps: the captured training step (one CUDA graph) against a hand-written step replayed as a CUDA graph, in turn; and
  steps per second of 784-200-200-50 at batch 100.
- evidence: seconds of importance sampling for 10,000 images of 784 pixels with 5,000 particles each.
- agreement: the same density, gradient and quadrature on CPU and GPU; and SVI and the captured engine on the GPU with
  the same seed.

``--device cpu --quick`` runs the same code, without graphs and with little work, where there is no GPU.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_training import HandWritten, Networks, vae
from benchmarking import machine, seconds_of, write_json
from torch import Tensor

from ppl_vae import fit, log_evidence, traces
from ppl_vae.evidence.joint import joint_of

MLP = Networks.of_layers((784,), 400, 400, latent_dim=50, steps=400)
SMALLER = Networks.of_layers((784,), 200, 200, latent_dim=50, steps=400)
PLANE = Networks.of_layers((784,), 200, latent_dim=2, steps=400)


def pixels(size: int, device: torch.device) -> Tensor:
    """Zeros and ones."""
    return torch.bernoulli(torch.full((size, 784), 0.3)).to(device)


def by_hand(networks: Networks, x: Tensor, batch_size: int) -> Callable[[], None]:
    """An epoch of hand-written steps; on CUDA each is one replay of a graph."""
    story = HandWritten(networks).to(x.device)
    on_cuda = x.device.type == "cuda"
    optimizer = torch.optim.Adam(story.parameters(), lr=1e-3, fused=True, capturable=on_cuda)
    rows = torch.arange(batch_size, device=x.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        story(x.index_select(0, rows)).backward()
        optimizer.step()

    replay = step
    if on_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay

    def epoch() -> None:
        for batch in torch.randperm(len(x), device=x.device).split(batch_size):
            rows.copy_(batch)
            replay()
        _wait(x.device)

    return epoch


def seconds_per_step(networks: Networks, x: Tensor, batch_size: int, epochs: int, engine: Any) -> float:
    """The fastest epoch of ``fit``, divided by its steps."""
    story = vae(networks).to(x.device)
    history = fit(story, x, epochs=epochs, batch_size=batch_size, engine=engine, progress=False)
    return float(min(history["seconds"])) * batch_size / len(x)


def steps(device: torch.device, quick: bool) -> dict[str, Any]:
    """Milliseconds of a step, each side in turn, and steps per second."""
    count, rounds = (8, 2) if quick else (400, 9)
    x = pixels(128 * count, device)
    # fit traces again in each call; its own clock tells the epochs after that.
    hand = by_hand(MLP, x, 128)
    hand()
    ratios, ours = [], []
    for _ in range(rounds):
        seconds = seconds_of(hand) / count
        ours.append(seconds_per_step(MLP, x, 128, 3, "captured"))
        ratios.append(ours[-1] / seconds)
    smaller = seconds_per_step(SMALLER, x[: 100 * count], 100, 5, "captured")
    svi = seconds_per_step(MLP, x, 128, 2, "svi")
    return {
        "captured_ms": 1e3 * sorted(ours)[rounds // 2],
        "captured_over_hand_written_graph": sorted(ratios)[rounds // 2],
        "svi_over_captured": svi / sorted(ours)[rounds // 2],
        "steps_per_second_784_200_200_50_at_100": 1 / smaller,
    }


def evidence(device: torch.device, quick: bool) -> dict[str, Any]:
    """Seconds of importance sampling, pilot included."""
    size, particles = (64, 500) if quick else (10_000, 5_000)
    story, x = vae(MLP).to(device), pixels(size, device)
    log_evidence(story, x[:64], method="importance", num_particles=100, progress=False)
    _wait(device)
    started = time.perf_counter()
    log_evidence(story, x, method="importance", num_particles=particles, progress=False)
    return {"images": size, "particles": particles, "seconds": time.perf_counter() - started}


def agreement(device: torch.device, quick: bool) -> dict[str, Any]:
    """Largest differences between CPU and GPU, and between the engines on the GPU."""
    story, x = vae(PLANE), pixels(32, torch.device("cpu"))
    moved = copy.deepcopy(story).to(device)
    u = torch.randn(32 * 8, 2)
    with traces.scoring(story):
        here = joint_of(story, (x,)).with_gradients((x,), u)
    with traces.scoring(moved):
        there = joint_of(moved, (x,)).with_gradients((x.to(device),), u.to(device))
    integrals = [log_evidence(s, x, method="quadrature", progress=False)["estimate"] for s in (story, moved)]
    trained, data = {}, pixels(2_000, device)
    for engine in ("svi", "captured"):
        trained[engine] = copy.deepcopy(moved)
        fit(trained[engine], data, epochs=2, engine=engine, seed=1, progress=False)
    pairs = zip(trained["svi"].parameters(), trained["captured"].parameters(), strict=True)
    return {
        "density_and_gradient": max(float((a - b.cpu()).abs().max()) for a, b in zip(here, there, strict=True)),
        "quadrature_nats": float(abs(integrals[0] - integrals[1]).max()),
        "svi_against_captured": max(float((a - b).detach().abs().max()) for a, b in pairs),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="little work, to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the script")
    torch.manual_seed(0)
    record: dict[str, Any] = {"machine": machine("torch", "pyro-ppl"), "device": str(device)}
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    for part in (agreement, steps, evidence):
        started = time.perf_counter()
        record[part.__name__] = part(device, options.quick) | {"took": time.perf_counter() - started}
    print(json.dumps(record, indent=1))
    write_json(options.json, record)


if __name__ == "__main__":
    main()
