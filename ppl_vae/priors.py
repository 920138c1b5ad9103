"""Priors: modules that return p(z), the distribution of one observation's latent.

Any Pyro distribution is a prior as well, ``VAE(prior=dist.Normal(torch.zeros(2), 1.0).to_event(1), ...)``, and so is
any callable that returns one.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import softplus

from ppl_vae import distributions, flows, mixtures
from ppl_vae.distributions import LARGEST_SCALE, SMALLEST_DF_OF_DRAWS
from ppl_vae.templates import Template

FLOOR = 1e-3
LARGEST_PSEUDO_INPUT = 1e12  # squares of what an encoder makes of larger ones overflow


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
        _check_at_least_one(latent_dim=latent_dim)
        # Buffers, so that the prior follows the story to its device and dtype.
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class Normal(nn.Module):
    r"""Independent normals with learned locations and scales, :math:`p(z) = \prod_k \mathcal{N}(z_k; m_k, s_k^2)`.

    It starts as the standard normal. The scale is ``softplus`` of a parameter plus a floor.

    Args:
        latent_dim: K, the size of z.
        floor: smallest standard deviation.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    >>> Normal(2)().event_shape
    torch.Size([2])
    """

    def __init__(self, latent_dim: int, floor: float = FLOOR) -> None:
        super().__init__()
        _check_at_least_one(latent_dim=latent_dim)
        self.normal = _LearnedNormals(torch.zeros(latent_dim), floor)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.normal.loc, self.normal.scale).to_event(1)


class Laplace(nn.Module):
    r"""Independent Laplace distributions, :math:`p(z) = \prod_k \tfrac{1}{2} e^{-|z_k|}`.

    Args:
        latent_dim: K, the size of z.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    >>> Laplace(2)().event_shape
    torch.Size([2])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        _check_at_least_one(latent_dim=latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    def forward(self) -> dist.TorchDistribution:
        return dist.Laplace(self.loc, self.scale).to_event(1)


class StudentT(nn.Module):
    r"""Independent Student-t distributions, :math:`p(z) \propto \prod_k (1 + z_k^2 / \nu)^{-(\nu + 1) / 2}`.

    Args:
        latent_dim: K, the size of z.
        df: degrees of freedom, :math:`\nu`.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    Raises:
        ValueError: when there are less than 0.2 degrees of freedom, whose draws single precision does not hold, or
            infinitely many.

    >>> StudentT(2, df=5)().event_shape
    torch.Size([2])
    """

    df: Tensor

    def __init__(self, latent_dim: int, df: float) -> None:
        super().__init__()
        _check_at_least_one(latent_dim=latent_dim)
        if not SMALLEST_DF_OF_DRAWS <= df <= LARGEST_SCALE:
            limits = f"lie between {SMALLEST_DF_OF_DRAWS} and {LARGEST_SCALE:g}"
            raise ValueError(f"df, the degrees of freedom, must {limits}; found {df}.")
        self.register_buffer("df", torch.full((latent_dim,), float(df)))

    def forward(self) -> dist.TorchDistribution:
        return distributions.StudentT(self.df).to_event(1)


class Uniform(nn.Module):
    r"""The uniform distribution on a box, :math:`p(z) = \prod_k 1 / (b_k - a_k)` where :math:`a_k \le z_k < b_k`.

    The guide must live on the same box: :class:`ppl_vae.posteriors.Box` takes any posterior there.

    Args:
        latent_dim: K, the size of z.
        low: a, a number or a tensor of shape ``(K,)``.
        high: b, likewise.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    Raises:
        ValueError: when the box is empty.

    >>> Uniform(2, low=-1.0, high=torch.tensor([1.0, 2.0]))().log_prob(torch.zeros(2)).exp()
    tensor(0.1667)
    """

    low: Tensor
    high: Tensor

    def __init__(self, latent_dim: int, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__()
        _check_at_least_one(latent_dim=latent_dim)
        for name, end in zip(("low", "high"), flows.ends(low, high), strict=True):
            self.register_buffer(name, end.expand(latent_dim).clone())

    def forward(self) -> dist.TorchDistribution:
        return dist.Uniform(self.low, self.high).to_event(1)


class MixtureOfNormals(nn.Module):
    r"""A learned mixture, :math:`p(z) = \sum_c \pi_c \prod_k \mathcal{N}(z_k; m_{ck}, s_{ck}^2)`.

    Weights start even, scales at 1, and locations at draws from the standard normal, so that components differ.

    Args:
        latent_dim: K, the size of z.
        components: C, how many there are.
        floor: smallest standard deviation.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    >>> MixtureOfNormals(2, components=5)().event_shape
    torch.Size([2])
    """

    def __init__(self, latent_dim: int, components: int, floor: float = FLOOR) -> None:
        super().__init__()
        _check_at_least_one(latent_dim=latent_dim, components=components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.normals = _LearnedNormals(torch.randn(components, latent_dim), floor)

    def forward(self) -> dist.TorchDistribution:
        return mixtures.normals(self.logits, self.normals.loc, self.normals.scale)


class PerClass(nn.Module):
    r"""A learned normal for each label, :math:`p(z \mid y) = \prod_k \mathcal{N}(z_k; m_{yk}, s_{yk}^2)`.

    Without labels it is their even mixture, :math:`p(z) = \frac{1}{L} \sum_y p(z \mid y)`.

    Args:
        latent_dim: K, the size of z.
        num_labels: L; labels are the integers from 0 to L - 1.
        floor: smallest standard deviation.

    Returns (when called with nothing, or with labels of shape ``(N,)``):
        a distribution with event shape ``(K,)``, and batch shape ``(N,)`` where there are labels.

    >>> prior = PerClass(2, num_labels=10)
    >>> prior().batch_shape, prior(torch.tensor([3, 1, 4])).batch_shape
    (torch.Size([]), torch.Size([3]))
    """

    even: Tensor

    def __init__(self, latent_dim: int, num_labels: int, floor: float = FLOOR) -> None:
        super().__init__()
        _check_at_least_one(latent_dim=latent_dim, num_labels=num_labels)
        self.register_buffer("even", torch.zeros(num_labels))
        self.normals = _LearnedNormals(torch.randn(num_labels, latent_dim), floor)

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        if y is None:
            return mixtures.normals(self.even, self.normals.loc, self.normals.scale)
        return dist.Normal(self.normals.loc[y], self.normals.scale[y]).to_event(1)


class VampPrior(nn.Module):
    r"""The even mixture of guesses, :math:`p(z) = \frac{1}{C} \sum_c q(z \mid u_c)`, at learned pseudo-inputs u.

    Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120. It holds the story's own encoder: what trains the one
    trains the other, and a saved story comes back with both tied.

    Args:
        encoder: ``encoder(u)`` returns q(z | u).
        pseudo_inputs: where they start, shape ``(C, *event)``: some observations, or noise that looks like them.
        low: smallest value of a pseudo-input; None for no bounds.
        high: largest value. Pseudo-inputs come near their bounds and do not reach them; those that start closer than
            1 % of the range are moved that far inside.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    Raises:
        ValueError: when the bounds are no interval, or a pseudo-input starts outside of it, is no real number, or not
            what the encoder takes.

    >>> from ppl_vae import posteriors
    >>> from ppl_vae.networks import mlp
    >>> encoder = posteriors.DiagonalNormal(mlp((1, 28, 28), 64, 4))
    >>> prior = VampPrior(encoder, torch.rand(50, 1, 28, 28), low=0.0, high=1.0)
    >>> prior().event_shape
    torch.Size([2])
    """

    even: Tensor

    def __init__(
        self, encoder: nn.Module, pseudo_inputs: Tensor, low: float | None = None, high: float | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bounds = None if low is None or high is None else (low, high)
        if (low, high) != (None, None) and not (self.bounds and self.bounds[0] < self.bounds[1]):
            raise ValueError(f"Pseudo-inputs lie between two bounds, or have none; found low={low} and high={high}.")
        if not pseudo_inputs.is_floating_point() or pseudo_inputs.layout is not torch.strided:
            found = f"{pseudo_inputs.dtype}, {pseudo_inputs.layout}"
            raise ValueError(f"Pseudo-inputs are learned, so they are real numbers, each of them there; found {found}.")
        if not pseudo_inputs.is_meta and not bool((pseudo_inputs.abs() <= LARGEST_PSEUDO_INPUT).all()):
            raise ValueError(f"Pseudo-inputs are numbers up to {LARGEST_PSEUDO_INPUT:g}; found others.")
        self.unbounded = nn.Parameter(
            self._to_unbounded(pseudo_inputs.detach().clone(memory_format=torch.contiguous_format))
        )
        self.register_buffer("even", torch.zeros(len(pseudo_inputs)))
        if not pseudo_inputs.is_meta:
            self._refuse_misfit()

    def _refuse_misfit(self) -> None:
        modes = {module: module.training for module in self.encoder.modules()}
        try:
            with torch.no_grad():
                self.encoder.eval()(self.pseudo_inputs[:1])
        except RuntimeError as error:
            found = f"{self.unbounded.dtype} of the shape {tuple(self.unbounded.shape)}"
            raise ValueError(f"The encoder does not take the pseudo-inputs, {found}: {error}") from error
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs, shape ``(C, *event)``."""
        if self.bounds is None:
            return self.unbounded
        low, high = self.bounds
        return low + (high - low) * self.unbounded.sigmoid()

    def _to_unbounded(self, pseudo_inputs: Tensor) -> Tensor:
        if self.bounds is None:
            return pseudo_inputs
        low, high = self.bounds
        if not pseudo_inputs.is_meta and not bool(((low <= pseudo_inputs) & (pseudo_inputs <= high)).all()):
            found = f"between {pseudo_inputs.min():g} and {pseudo_inputs.max():g}"
            raise ValueError(f"Pseudo-inputs start within their bounds, {low:g} and {high:g}; found values {found}.")
        return ((pseudo_inputs - low) / (high - low)).logit(eps=0.01)

    def forward(self) -> dist.TorchDistribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=self.even), self.encoder(self.pseudo_inputs))


class Flow(nn.Module):
    r"""A normalizing flow, :math:`z = g(u)` with :math:`u \sim \mathcal{N}(0, I)`, so that
    :math:`\log p(z) = \log \mathcal{N}(u; 0, I) - \log |\det \partial g / \partial u|`.

    Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770.

    Args:
        latent_dim: K, the size of z.
        transforms: what g is composed of, first to last: those of :func:`realnvp` or :func:`splines`, or any of
            ``pyro.distributions.transforms`` that map K numbers to K numbers and have an inverse.

    Returns (when called):
        a distribution with event shape ``(K,)``.

    >>> prior = Flow(2, realnvp(2, num_layers=4, hidden_dims=(64, 64)))
    >>> prior().sample((3,)).shape
    torch.Size([3, 2])
    """

    def __init__(self, latent_dim: int, transforms: Sequence[Transform]) -> None:
        super().__init__()
        self.base = StandardNormal(latent_dim)
        self.transforms = nn.ModuleList(Template(transform) for transform in transforms)

    def forward(self) -> dist.TorchDistribution:
        return flows.Transformed(self.base(), [transform() for transform in self.transforms])


def realnvp(latent_dim: int, num_layers: int = 4, hidden_dims: Sequence[int] = (64, 64)) -> list[Transform]:
    """Affine couplings: half of the coordinates are shifted and scaled by a network of the others, in turn.

    Dinh, Sohl-Dickstein & Bengio 2017, https://arxiv.org/abs/1605.08803.

    Args:
        latent_dim: K, at least 2.
        num_layers: how many couplings.
        hidden_dims: sizes of the hidden layers of each network.

    Raises:
        ValueError: when there is no other coordinate.

    >>> len(realnvp(2, num_layers=4))  # with the order of the coordinates reversed in between
    7
    """
    if latent_dim < 2:
        raise ValueError(f"realnvp needs two coordinates or more, to couple them; found {latent_dim}. Use splines.")
    _check_at_least_one(num_layers=num_layers)
    return flows.flipped_between(
        [flows.affine_coupling(latent_dim, hidden_dims) for _ in range(num_layers)], latent_dim
    )


def splines(
    latent_dim: int, num_layers: int = 2, hidden_dims: Sequence[int] = (64, 64), bins: int = 8, bound: float = 3.0
) -> list[Transform]:
    """Spline couplings: a monotonic rational spline for each coordinate, of half of them given the others, in turn.

    Durkan, Bekasov, Murray & Papamakarios 2019, https://arxiv.org/abs/1906.04032; of linear over linear functions, as
    in Dolatabadi, Erfani & Leckie 2020, https://arxiv.org/abs/2001.05168. A single coordinate has splines of its own.

    Args:
        latent_dim: K.
        num_layers: how many couplings.
        hidden_dims: sizes of the hidden layers of each network.
        bins: pieces of a spline.
        bound: outside of ``[-bound, bound]`` a spline is the identity.

    >>> len(splines(2, num_layers=2)), len(splines(1, num_layers=2))
    (3, 2)
    """
    _check_at_least_one(latent_dim=latent_dim, num_layers=num_layers)
    if latent_dim == 1:
        return [flows.spline(1, bins, bound) for _ in range(num_layers)]
    layers = [flows.spline_coupling(latent_dim, hidden_dims, bins, bound) for _ in range(num_layers)]
    return flows.flipped_between(layers, latent_dim)


class Fixed(nn.Module):
    r"""Any Pyro distribution as a prior that does not learn. ``VAE`` makes one of a distribution that it is given.

    The tensors of the distribution become buffers, whatever it is nested in, and a copy with them is made at each call.

    Args:
        distribution: p(z); its batch shape is ``()``.

    Returns (when called):
        the distribution.

    Raises:
        TypeError: for a distribution that is not Pyro's.
        ValueError: when a tensor of it requires a gradient, or it holds a module: those would not train.

    >>> prior = Fixed(dist.LogNormal(torch.zeros(2), 0.5).to_event(1)).double()
    >>> prior().sample()
    tensor([...], dtype=torch.float64)
    """

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        super().__init__()
        if not isinstance(distribution, TorchDistributionMixin):
            name = type(distribution).__name__
            raise TypeError(f"A prior is a distribution of Pyro's; found torch's. Use pyro.distributions.{name}.")
        self.template = Template(distribution)

    def forward(self) -> dist.TorchDistribution:
        return self.template()


class _LearnedNormals(nn.Module):
    """Locations that start at given values, and scales that start at 1."""

    def __init__(self, loc: Tensor, floor: float) -> None:
        super().__init__()
        if not 0 <= floor < 1:
            raise ValueError(f"The floor of a scale that starts at 1 lies below that; found {floor}.")
        self.floor = floor
        self.loc = nn.Parameter(loc)
        excess = torch.full_like(loc, 1 - floor)
        self.unconstrained_scale = nn.Parameter(excess + torch.log(-torch.expm1(-excess)))  # the inverse of softplus

    @property
    def scale(self) -> Tensor:
        """Standard deviations."""
        return self.floor + softplus(self.unconstrained_scale)


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1; found {number}.")
