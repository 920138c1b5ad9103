"""Priors: modules that return p(z), the distribution of one observation's latent."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    r"""The standard normal prior, :math:`p(z) = \mathcal{N}(z; 0, I)`.

    Args:
        latent_dim: K, the size of z.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    >>> StandardNormal(2)().event_shape
    torch.Size([2])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1; found {latent_dim}.")
        # Buffers, so that the prior follows the story to its device and dtype.
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)
