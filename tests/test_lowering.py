"""What a compiled program computes by other operations than were traced."""

from itertools import product

import numpy as np
import pytest
import torch
from gradient_laws import assert_compiled_gradient_is_the_captured_one

from ppl_vae import VAE, likelihoods, lowering, posteriors, priors, products
from ppl_vae.capture import capture
from ppl_vae.networks import convolutional_decoder, convolutional_encoder

EDGES = [0.0, -0.0, -1.0, -2.0, torch.inf, -torch.inf, torch.nan]


def numbers(dtype):
    """From all scales, both signs, and next to where the logarithm is infinite or the sum rounds to one."""
    info = torch.finfo(dtype)
    largest = np.log10(info.max) - 1
    sizes = torch.logspace(np.log10(info.tiny), largest, 20_000, dtype=torch.float64)
    below = -torch.linspace(0, 1, 20_000, dtype=torch.float64)[:-1]
    near = torch.tensor([1.0, -1.0], dtype=torch.float64) * info.eps * torch.linspace(0.01, 8, 4000).double()[:, None]
    return torch.cat([sizes, -sizes[sizes < 1], below, near.flatten(), near.flatten() - 1]).to(dtype)


def units_in_the_last_place(ours, exact):
    return np.abs(ours.double().numpy() - exact) / np.spacing(np.abs(exact).astype(ours.numpy().dtype)).astype(float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_is_right_to_a_few_units_in_the_last_place(dtype):
    x = numbers(dtype)
    x = x[x > -1]
    exact = np.log1p(x.numpy().astype(np.longdouble))
    assert units_in_the_last_place(lowering.log1p(x), exact).max() < 4
    assert units_in_the_last_place((1 + x).log(), exact).max() > 1e6  # what it must not be


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_at_the_edges_is_torchs(dtype):
    x = torch.tensor(EDGES, dtype=dtype)
    ours, theirs = lowering.log1p(x), torch.log1p(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert torch.equal(ours[:2].signbit(), theirs[:2].signbit())


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_log1p_of_other_kinds_is_left_to_inductor(kind):
    assert lowering.log1p(torch.ones(3, **kind)) is NotImplemented


@pytest.mark.parametrize("x", [0.0, 1.0, 0.3])
def test_the_density_of_a_bernoulli_is_right_to_a_few_roundings_of_value_and_logit(x):
    sizes = torch.cat([torch.linspace(0, 20, 20_001), torch.logspace(-30, 1.9, 5000)])
    logits = torch.cat([sizes, -sizes])
    exact = logits.numpy().astype(np.longdouble)
    last, others = np.log1p(np.exp(-abs(exact))), (1 - np.longdouble(np.float32(x))) * exact - np.minimum(exact, 0)
    ours = lowering._bernoulli_nll(logits, torch.full_like(logits, x), reduction=0).double().numpy()
    of_logit = abs(exact) * np.exp(-abs(exact)) / (1 + np.exp(-abs(exact)))  # a rounded logit moves the last so much
    scale = np.maximum(np.maximum(last, abs(others)) + of_logit, np.finfo(np.float32).tiny)
    assert (abs(ours - (others + last)) / scale).max() < 4 * np.finfo(np.float32).eps
    assert (abs((1 + (-logits.abs()).exp()).log().double().numpy() - last) / last).max() > 1e-3  # what it must not be


def test_the_density_of_a_bernoulli_at_the_edges_is_torchs():
    logits, x = torch.tensor([e for e in EDGES for _ in (0, 1)]), torch.tensor([0.0, 1.0] * len(EDGES))
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    ours = lowering._bernoulli_nll(logits, x, None, None, 0)
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours.nan_to_num(7.0), theirs.nan_to_num(7.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("weights", [(None, None), (torch.rand(3), None), (None, torch.rand(3)), (torch.rand(3),) * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cross_entropy_of_other_kinds_is_inductors(dtype, weights, reduction):
    logits, x = torch.randn(5, 3, dtype=dtype), torch.rand(5, 3, dtype=dtype)
    theirs = torch.ops.aten.binary_cross_entropy_with_logits(logits, x, *weights, reduction)
    torch.testing.assert_close(lowering._bernoulli_nll(logits, x, *weights, reduction), theirs)


def transposed_convolutions():
    """Settings that torch accepts: size of the kernel, stride, padding, padding of the output, channels, height."""
    for size, stride, padding, more, channels, height in product(
        (1, 2, 3, 4, 5), (2, 3), (0, 1, 2), (0, 1), (1, 3), (1, 4)
    ):
        if padding <= size and (height - 1) * stride - 2 * padding + size + more > 0:
            yield size, stride, padding, more, channels, height


def test_transposed_convolutions_to_few_channels_are_torchs(float64):
    taken_apart = 0
    for size, stride, padding, more, channels, height in transposed_convolutions():
        x, weight = torch.randn(2, 6, height, 5), torch.randn(6, channels, size, size + 1)
        settings = ([stride, stride + 1], [padding, min(padding, 1)], [1, 1], True, [more, 0], 1)
        for bias in (torch.randn(channels), None):
            ours = lowering._convolution(x, weight, bias, *settings)
            if ours is not NotImplemented:
                torch.testing.assert_close(ours, torch.ops.aten.convolution(x, weight, bias, *settings))
                taken_apart += 1
    assert taken_apart > 200


@pytest.mark.parametrize(
    "change",
    [{"transposed": False}, {"channels": 8}, {"stride": [1, 2]}, {"dilation": [1, 2]}, {"groups": 2}],
    ids=lambda change: next(iter(change)),
)
def test_other_convolutions_are_left_to_inductor(change):
    asked = {"stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "transposed": True} | change
    channels, groups = asked.pop("channels", 1), asked.pop("groups", 1)
    settings = (asked["stride"], asked["padding"], asked["dilation"], asked["transposed"], [0, 0], groups)
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, channels, 3, 3)
    assert lowering._convolution(x, weight, None, *settings) is NotImplemented


@pytest.mark.slow
def test_the_compiled_gradient_of_a_convolutional_story_is_the_captured_one():
    image = (3, 14, 13)
    encoder = posteriors.DiagonalNormal(convolutional_encoder(image, 8, 16, output=4))
    decoder = likelihoods.Bernoulli(convolutional_decoder(2, 16, 8, image=image))
    story = VAE(priors.StandardNormal(2), decoder, encoder)
    assert_compiled_gradient_is_the_captured_one(story, torch.rand(16, *image).round())


@pytest.mark.slow
def test_compiled_softplus_keeps_its_digits_where_it_is_small():
    x = torch.linspace(-80, 20, 4096)
    program = capture(lambda x: (torch.nn.functional.softplus(x), torch.nn.functional.logsigmoid(x)), x).compiled(x)
    softplus, logsigmoid = program(x)
    exact = np.logaddexp(0, x.double().numpy())
    np.testing.assert_allclose(softplus, exact, rtol=1e-6)
    np.testing.assert_allclose(logsigmoid, -np.logaddexp(0, -x.double().numpy()), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_compiled_program_multiplies_as_products_do(monkeypatch):
    monkeypatch.setattr(products, "_has_more_than_mkl_uses", lambda: True)
    x, weight, bias = torch.randn(300, 200), torch.randn(250, 200), torch.randn(250)

    def layer_and_gradient(x, weight, bias):
        y = torch.addmm(bias, x, weight.T).relu()
        return y, y @ weight, y.T @ x

    program = capture(layer_and_gradient, x, weight, bias).compiled(x, weight, bias)
    y = products.product(x, weight.T, bias).relu()
    for ours, theirs in zip(
        program(x, weight, bias), (y, products.product(y, weight), products.product(y.T, x)), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.abs().max() > 0
