"""Networks know shapes and leave leading dimensions alone."""

import pytest
import torch
from torch import nn

from ppl_vae.networks import WithLabels, as_shape, convolutional_decoder, convolutional_encoder, mlp


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
@pytest.mark.parametrize(
    ("network", "event", "out"),
    [
        (mlp(5, 3), (5,), (3,)),
        (mlp((2, 3), 8, 8, (1, 4, 4)), (2, 3), (1, 4, 4)),
        (convolutional_encoder((1, 28, 28), 4, 8, output=6), (1, 28, 28), (6,)),
        (convolutional_encoder((3, 27, 30), 4, output=6), (3, 27, 30), (6,)),
        (convolutional_decoder(6, 8, 4, image=(3, 27, 30)), (6,), (3, 27, 30)),
        (convolutional_decoder(6, 4, image=(1, 1, 7)), (6,), (1, 1, 7)),
    ],
)
def test_events_are_mapped_whatever_stands_to_the_left(network, event, out, batch):
    assert network(torch.randn(*batch, *event)).shape == (*batch, *out)


def test_each_row_is_mapped_by_itself():
    network, x = convolutional_encoder((1, 8, 8), 4, output=3), torch.randn(6, 1, 8, 8)
    one_by_one = torch.stack([network(row) for row in x])
    assert torch.allclose(network(x), one_by_one, atol=1e-6)
    assert torch.allclose(network(x.reshape(2, 3, 1, 8, 8)).flatten(0, 1), one_by_one, atol=1e-6)


def test_mlp_is_linear_layers_with_activations_between():
    kinds = [type(layer) for layer in mlp((2, 2), 8, 8, (1, 3), activation=nn.Tanh)]
    assert kinds == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear, nn.Unflatten]


def test_labels_reach_the_network_as_one_hot():
    network = WithLabels(nn.Identity(), num_labels=3)
    assert network(torch.full((2, 1, 1), 7.0), torch.tensor([2, 0])).tolist() == [[7, 0, 0, 1], [7, 1, 0, 0]]


@pytest.mark.parametrize("size", [2**50, 2**62], ids=["more than memory", "more than 64 bits"])
def test_layers_beyond_memory_are_refused(size):
    with pytest.raises(MemoryError, match=f"The weights from 4 to {size} numbers do not fit in memory"):
        mlp(4, size, 2)


@pytest.mark.parametrize("shape", [0, (), (3, -1)])
def test_shapes_hold_positive_sizes(shape):
    with pytest.raises(ValueError, match="positive sizes"):
        as_shape(shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(3), "input and its output"),
        (lambda: convolutional_encoder((28, 28), 4, output=2), "an image"),
        (lambda: convolutional_encoder((1, 28, 28), output=2), "at least one channel"),
        (lambda: convolutional_decoder(2, image=(1, 28, 28)), "at least one channel"),
    ],
)
def test_wrong_shapes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
