"""Two-dimensional quadrature: what densities, expectations and gradients are held to."""

import inspect
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributions import constraints

# Bounded functions of a point (..., 2) whose means tell distributions apart: their characteristic functions.
FREQUENCIES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -2.0], [2.5, 0.5]])


def waves(z: Tensor) -> Tensor:
    """Shape (..., 10)."""
    phases = z @ FREQUENCIES.to(z)[:, : z.shape[-1]].T
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def grid(distribution, points: int) -> tuple[Tensor, Tensor]:
    """Points over the support of a distribution of K coordinates, shape (G, K), and the volume of each, shape (G,)."""
    support = distribution.support
    while not hasattr(support, "lower_bound") and hasattr(support, "base_constraint"):
        support = support.base_constraint
    lines = []
    for k in range(distribution.event_shape[0]):
        if isinstance(support, constraints.interval):
            low, high = (
                torch.as_tensor(end).flatten()[-distribution.event_shape[0] :] for end in vars(support).values()
            )
            step = (high.expand(2)[k] - low.expand(2)[k]) / points
            lines.append((low.expand(2)[k] + step * (torch.arange(points) + 0.5), step.expand(points)))
        else:  # z = sinh(t), to 27 on both sides: heavy tails are inside, and the middle is fine
            t = torch.linspace(-4, 4, points)
            lines.append((t.sinh(), t.cosh() * 8 / (points - 1)))
    z, volume = (torch.cartesian_prod(*parts).reshape(-1, len(lines)) for parts in zip(*lines, strict=True))
    return z, volume.prod(1)


def integral(distribution, points: int, function=lambda z: torch.ones(len(z), 1)) -> Tensor:
    """The mean of a function of z, (G, K) to (G, M), by quadrature; shape (*batch, M)."""
    z, volume = grid(distribution, points)
    density = distribution.log_prob(z.reshape(-1, *[1] * len(distribution.batch_shape), z.shape[1])).exp()
    return torch.einsum("g...,g,gm->...m", density, volume, function(z))


def quadrature(distribution, function=lambda z: torch.ones(len(z), 1), points: int = 240) -> tuple[Tensor, Tensor]:
    """The same, and an error: how much it changes when the grid is half as fine."""
    fine, coarse = integral(distribution, points, function), integral(distribution, points // 2, function)
    return fine, (fine - coarse).abs()


def assert_density_integrates_to_one(distribution, points: int = 240) -> None:
    total, error = quadrature(distribution, points=points)
    assert error.max() < 1e-2
    assert (total - 1).abs().max() < 2 * error.max() + 1e-5


def assert_samples_match_density(distribution, num_draws: int = 20_000) -> None:
    expected, error = quadrature(distribution, waves)
    draws = waves(distribution.sample((num_draws,)))
    standard_error = draws.std(0) / num_draws**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * standard_error + 2 * error).all()


def moved(part: nn.Module) -> nn.Module:
    """A part whose parameters are not where they start."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return part


def missing_classes(module: ModuleType, parts: dict) -> set[str]:
    """Public modules of a file that no part is an instance of."""
    tested = {type(make()) for make in parts.values()}
    classes = inspect.getmembers(module, inspect.isclass)
    return {
        name
        for name, kind in classes
        if issubclass(kind, nn.Module) and kind.__module__ == module.__name__ and name[0] != "_" and kind not in tested
    }
