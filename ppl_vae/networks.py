"""Networks: tensors to tensors. They know shapes, and leave every leading dimension alone.

An event shape such as ``(1, 28, 28)`` is what one observation looks like; ``20`` is short for ``(20,)``. Whatever
stands to the left of the event (observations, particles) comes out as it went in.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from ppl_vae.memory import within_memory

Shape = int | Sequence[int]


def as_shape(shape: Shape) -> tuple[int, ...]:
    """An event shape as a tuple: ``20`` means ``(20,)``."""
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    if not dims or any(size < 1 for size in dims):
        raise ValueError(f"An event shape holds positive sizes, such as 20 or (1, 28, 28); found {shape!r}.")
    return dims


def mlp(*shapes: Shape, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A multilayer perceptron from the first shape to the last; the shapes between are hidden layers.

    Args:
        shapes: event shape of the input, of each hidden layer, and of the output.
        activation: makes the nonlinearity that follows every layer but the last.

    Returns:
        A module mapping ``(*batch, *first)`` to ``(*batch, *last)``.

    Raises:
        ValueError: with fewer than two shapes, or a size below one.
        MemoryError: when the weights of a layer do not fit in memory.

    >>> mlp((1, 28, 28), 400, 20)(torch.zeros(7, 1, 28, 28)).shape
    torch.Size([7, 20])
    >>> mlp(20, 400, (1, 28, 28))(torch.zeros(5, 7, 20)).shape
    torch.Size([5, 7, 1, 28, 28])
    """
    if len(shapes) < 2:
        raise ValueError(f"mlp needs the shapes of its input and its output; found {shapes!r}.")
    dims = [as_shape(shape) for shape in shapes]
    layers: list[nn.Module] = []
    for before, after in pairwise(prod(shape) for shape in dims):
        with within_memory(f"The weights from {before} to {after} numbers"):
            layers += [nn.Linear(before, after), activation()]
    layers.pop()
    if len(dims[0]) > 1:
        layers.insert(0, nn.Flatten(-len(dims[0])))
    if len(dims[-1]) > 1:
        layers.append(nn.Unflatten(-1, dims[-1]))
    return nn.Sequential(*layers)


def convolutional_encoder(
    image: Sequence[int], *channels: int, output: int, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Module:
    """Strided 3 x 3 convolutions that halve an image once for each number of channels, then a linear layer.

    Args:
        image: ``(colours, height, width)`` of the input; any height and width.
        channels: channels after each halving.
        output: size of the output.
        activation: makes the nonlinearity.

    Returns:
        A module mapping ``(*batch, *image)`` to ``(*batch, output)``.

    >>> convolutional_encoder((1, 28, 28), 16, 32, output=4)(torch.zeros(5, 7, 1, 28, 28)).shape
    torch.Size([5, 7, 4])
    """
    as_shape((*image, *channels, output))
    sizes = _halvings(image, len(channels))
    layers: list[nn.Module] = []
    for before, after in pairwise((image[0], *channels)):
        layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), activation()]
    features = prod((channels[-1], *sizes[-1]))
    return OverBatch(nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, output)), event_dim=3)


def convolutional_decoder(
    latent_dim: int, *channels: int, image: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Module:
    """The mirror of :func:`convolutional_encoder`: a linear layer, then transposed convolutions up to the image.

    Args:
        latent_dim: size of the input.
        channels: channels before each doubling.
        image: ``(colours, height, width)`` of the output; any height and width.
        activation: makes the nonlinearity.

    Returns:
        A module mapping ``(*batch, latent_dim)`` to ``(*batch, *image)``.

    >>> convolutional_decoder(2, 32, 16, image=(3, 27, 30))(torch.zeros(5, 7, 2)).shape
    torch.Size([5, 7, 3, 27, 30])
    """
    as_shape((latent_dim, *channels, *image))
    sizes = _halvings(image, len(channels))[::-1]
    start = (channels[0], *sizes[0])
    layers: list[nn.Module] = [nn.Linear(latent_dim, prod(start)), nn.Unflatten(-1, start)]
    for (before, after), small, large in zip(pairwise((*channels, image[0])), sizes, sizes[1:], strict=False):
        # A size of 4 comes from 7 or from 8: the padding says which.
        odd_or_even = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
        layers += [activation(), nn.ConvTranspose2d(before, after, 3, 2, padding=1, output_padding=odd_or_even)]
    return OverBatch(nn.Sequential(*layers), event_dim=1)


def _halvings(image: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Height and width of an image before and after each of so many halvings, rounded up."""
    if len(image) != 3 or times < 1:
        raise ValueError(f"Expected an image (colours, height, width) and at least one channel count; found {image!r}.")
    sizes = [(image[1], image[2])]
    for _ in range(times):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


class OverBatch(nn.Module):
    """Runs a network that accepts one batch dimension only (a convolution, say) over any number of them."""

    def __init__(self, network: nn.Module, event_dim: int) -> None:
        super().__init__()
        self.network = network
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        batch, event = x.shape[: -self.event_dim], x.shape[-self.event_dim :]
        y: Tensor = self.network(x.reshape(-1, *event))
        return y.reshape(*batch, *y.shape[1:])


class WithLabels(nn.Module):
    """A network of a tensor and a label, both in one flat row: ``network(cat([x.flatten(1), one_hot(y)], -1))``.

    Args:
        network: a module that takes rows of ``features + num_labels`` numbers.
        num_labels: labels are the integers from 0 to ``num_labels - 1``.

    >>> network = WithLabels(mlp(2 + 10, 64, (1, 28, 28)), num_labels=10)
    >>> network(torch.zeros(7, 2), torch.arange(7)).shape
    torch.Size([7, 1, 28, 28])
    """

    def __init__(self, network: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.network = network
        self.num_labels = num_labels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(y, self.num_labels).to(x.dtype)
        return self.network(torch.cat([x.flatten(1), one_hot], dim=-1))
