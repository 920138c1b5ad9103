"""Posterior families: modules that return q(z | x), the guide's guess of the latent behind an observation."""

import pyro.distributions as dist
from torch import nn
from torch.nn.functional import softplus


class DiagonalNormal(nn.Module):
    r"""Independent normals, :math:`q(z \mid x) = \prod_k \mathcal{N}(z_k; \mu_k(x), \sigma_k(x)^2)`.

    The scale is ``softplus`` of the network's second half plus a floor, so that it stays positive and finite.

    Args:
        network: maps an observation (and whatever conditions the story hands on) to ``num_parameters(K)`` numbers:
            locations first, then unconstrained scales.
        floor: smallest standard deviation.

    Returns (when called with ``x`` of shape ``(N, *event)``):
        a distribution with batch shape ``(N,)`` and event shape ``(K,)``.

    >>> import torch
    >>> from ppl_vae.networks import mlp
    >>> encoder = DiagonalNormal(mlp((1, 28, 28), 64, DiagonalNormal.num_parameters(2)))
    >>> q = encoder(torch.zeros(7, 1, 28, 28))
    >>> q.batch_shape, q.event_shape
    (torch.Size([7]), torch.Size([2]))
    """

    def __init__(self, network: nn.Module, floor: float = 1e-4) -> None:
        super().__init__()
        self.network = network
        self.floor = floor

    @staticmethod
    def num_parameters(latent_dim: int) -> int:
        """Numbers that the network must return for a latent of this size."""
        return 2 * latent_dim

    def forward(self, *x: object) -> dist.TorchDistribution:
        loc, unconstrained = self.network(*x).chunk(2, dim=-1)
        return dist.Normal(loc, self.floor + softplus(unconstrained)).to_event(1)
