"""Mixed precision against the same operations with inputs rounded by hand."""

from functools import partial

import pytest
import torch
from example_stories import convolutional_vae, images, rows, small_vae
from pyro.infer import Trace_ELBO
from torch import nn
from torch.nn import functional

from ppl_vae import fit, traces
from ppl_vae.precision import matrix_products_in

X = rows(40)
IMAGES = X.reshape(10, 1, 4, 5)
WEIGHT = rows(7)
KERNEL = rows(18)[:, :4].reshape(2, 1, 6, 6)[..., :3, :3]
VALUES = torch.tensor([0.1, 0.2])


def rounded(*tensors):
    return tuple(tensor.bfloat16() for tensor in tensors)


HEAVY = {
    "linear": (functional.linear, (X, WEIGHT, WEIGHT[:, 0])),
    "linear without bias": (functional.linear, (X, WEIGHT)),
    "convolution": (functional.conv2d, (IMAGES, KERNEL, VALUES)),
    "transposed convolution": (functional.conv_transpose2d, (IMAGES, KERNEL.transpose(0, 1))),
    "bilinear": (functional.bilinear, (X, X, WEIGHT[:, None] * WEIGHT[:, :, None])),
}


@pytest.mark.parametrize(("function", "tensors"), HEAVY.values(), ids=HEAVY.keys())
def test_what_is_heavy_is_computed_of_rounded_inputs_and_comes_back_in_the_storys_dtype(function, tensors):
    with matrix_products_in(torch.bfloat16):
        result = function(*tensors)
    assert result.dtype == torch.float32
    assert torch.equal(result, function(*rounded(*tensors)).float())
    assert not torch.equal(result, function(*tensors))


def test_named_arguments_are_rounded_too():
    with matrix_products_in(torch.bfloat16):
        result = functional.conv2d(IMAGES, weight=KERNEL, bias=VALUES, stride=2)
    assert torch.equal(result, functional.conv2d(*rounded(IMAGES, KERNEL, VALUES), stride=2).float())


LIGHT = {
    "matrix product": lambda: X.t() @ X,
    "softplus": lambda: functional.softplus(X),
    "sum": lambda: (X / 3).exp().sum(),
    "normalization": lambda: functional.layer_norm(X, (5,)),
    "density": lambda: torch.distributions.Normal(X, 0.3).log_prob(X.flip(0)),
}


@pytest.mark.parametrize("compute", LIGHT.values(), ids=LIGHT.keys())
def test_everything_else_is_exactly_what_it_was(compute):
    before = compute()
    with matrix_products_in(torch.bfloat16):
        assert torch.equal(compute(), before)


def test_a_gradient_comes_back_in_the_parameters_dtype_and_is_that_of_the_rounded_product():
    layer = nn.Linear(5, 3)
    with matrix_products_in(torch.bfloat16):
        layer(X).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(layer.weight.grad, X.sum(0).expand(3, 5), rtol=0.02, atol=0.05)


def test_no_dtype_leaves_products_as_they_are():
    before = functional.linear(X, WEIGHT)
    with matrix_products_in(None):
        assert torch.equal(functional.linear(X, WEIGHT), before)


def test_outside_nothing_changes_not_even_after_an_error():
    before = functional.linear(X, WEIGHT)
    with pytest.raises(ZeroDivisionError), matrix_products_in(torch.bfloat16):
        raise ZeroDivisionError
    assert torch.equal(functional.linear(X, WEIGHT), before)


def test_densities_and_latents_stay_in_the_storys_dtype():
    story = small_vae()
    with matrix_products_in(torch.bfloat16):
        for trace in traces.run(story, images()):
            trace.compute_log_prob()
            sites = traces.sample_sites(trace).values()
            assert {site[key].dtype for site in sites for key in ("value", "log_prob")} == {torch.float32}


@pytest.mark.parametrize("make", [small_vae, convolutional_vae])
def test_the_elbo_is_the_same_within_one_percent_and_not_exactly(make):
    story = make()

    def loss():
        torch.manual_seed(1)
        return Trace_ELBO().loss(story.model, story.guide, images(400))

    exact = loss()
    with matrix_products_in(torch.bfloat16):
        assert 0 < abs(loss() - exact) < 0.01 * abs(exact)


@pytest.mark.parametrize("engine", ["svi", "captured"])
def test_training_in_mixed_precision_follows_training_in_full(engine):
    elbos = []
    for mixed_precision in (False, True):
        torch.manual_seed(0)
        story = small_vae()
        optimizer = partial(torch.optim.Adam, lr=1e-2, fused=True)
        arguments = {"epochs": 12, "batch_size": 16, "optimizer": optimizer, "engine": engine}
        history = fit(story, images(), mixed_precision=mixed_precision, **arguments)
        assert {parameter.dtype for parameter in story.parameters()} == {torch.float32}
        assert history.engine == engine
        elbos.append(history["train_elbo"])
    full, mixed = elbos
    assert mixed == pytest.approx(full, rel=0.01) and (mixed != full).all()
    assert mixed[-5:].mean() > mixed[:5].mean() + 1
