"""Mixtures: what the prior's and the posterior's mixture share, around the mixture of torch."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to

from ppl_vae.distributions import SampleShape


@biject_to.register(constraints.MixtureSameFamilyConstraint)
@transform_to.register(constraints.MixtureSameFamilyConstraint)
def _to_mixture(constraint: Any) -> Any:
    """A mixture is supported where its components are; torch says so, but has no map to there."""
    return biject_to(constraint.base_constraint)


def normals(logits: Tensor, loc: Tensor, scale: Tensor) -> "MixtureOfNormals":
    """C independent normals of K dimensions, mixed.

    Args:
        logits: log weights up to a constant, shape ``(*batch, C)``.
        loc: shape ``(*batch, C, K)``.
        scale: standard deviations, of the same shape.
    """
    return MixtureOfNormals(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


class MixtureOfNormals(dist.MixtureSameFamily):
    r"""A mixture of normals with independent dimensions, whose draws have gradients.

    With F the distribution functions of each coordinate given those before it, F(z) has the same distribution for all
    parameters :math:`\phi`, so a draw moves by

    .. math:: \frac{dz}{d\phi} = - \left(\frac{\partial F}{\partial z}\right)^{-1} \frac{\partial F}{\partial \phi}

    (implicit reparameterization: Figurnov, Mohamed & Mnih 2018, https://arxiv.org/abs/1805.08498). Pyro's
    ``MixtureOfDiagNormals`` has such gradients, too, but multiplies the densities of all dimensions, which leaves the
    range of single precision for some tens of them; and it draws wrongly where a batch meets a sample shape.
    """

    has_rsample = True

    def rsample(self, sample_shape: SampleShape = ()) -> Tensor:
        z = self.sample(sample_shape)
        return z if not torch.is_grad_enabled() else self._with_gradient(z)

    def _with_gradient(self, z: Tensor) -> Tensor:
        """The same numbers, with the gradient of draws."""
        normal = self.component_distribution.base_dist  # pyright: ignore[reportAttributeAccessIssue]
        points = z.unsqueeze(-2)
        log_density, cdf = normal.log_prob(points), normal.cdf(points)
        before = log_density.cumsum(-1) - log_density
        weights = (self.mixture_distribution.logits.unsqueeze(-1) + before).softmax(-2)  # given the coordinates before
        value = (weights * cdf).sum(-2)
        with torch.no_grad():
            slope = (normal.loc - points) / normal.scale.square()
            below = torch.einsum("...ck,...cj->...kj", weights * (cdf - value.unsqueeze(-2)), slope).tril(-1)
            jacobian = below + (weights * log_density.exp()).sum(-2).diag_embed()
        change = (value - value.detach()).unsqueeze(-1)  # zero, but for its gradient
        return z - torch.linalg.solve_triangular(jacobian, change, upper=False).squeeze(-1)
