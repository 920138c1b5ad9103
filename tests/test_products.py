"""Matrix products by oneDNN."""

import pytest
import torch

from ppl_vae import products
from ppl_vae.products import product

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

LAYOUTS = {
    "as they are": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).T,
    "every other column": lambda rows, columns: torch.randn(rows, 2 * columns)[:, ::2],
    "one row for all": lambda rows, columns: torch.randn(1, columns).expand(rows, columns),
}


@pytest.fixture
def as_if_wide(monkeypatch):
    """A processor on which oneDNN gains."""
    monkeypatch.setattr(products, "_has_more_than_mkl_uses", lambda: True)


def error(ours, left, right, bias):
    """The largest, relative to the rounding that a sum of so many products may have."""
    exact = left.double() @ right.double() + bias.double()
    scale = left.double().abs() @ right.double().abs() + bias.double().abs()
    return float(((ours - exact).abs() / scale).max()) / torch.finfo(torch.float32).eps


@has_onednn
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_products_by_onednn_are_right_for_any_layout(as_if_wide, first, second):
    left, right, bias = LAYOUTS[first](200, 150), LAYOUTS[second](150, 160), torch.randn(160)
    assert products.gains(left, right)
    assert error(product(left, right, bias), left, right, bias) < 32
    assert error(product(left, right), left, right, torch.zeros(160)) < 32


@has_onednn
def test_the_bias_is_added_to_every_row(as_if_wide):
    left, right, bias = torch.zeros(300, 200), torch.zeros(200, 100), torch.arange(100.0)
    assert torch.equal(product(left, right, bias), bias.expand(300, 100))


def test_small_products_are_torchs_own(as_if_wide):
    left, right, bias = torch.randn(20, 30), torch.randn(30, 40), torch.randn(40)
    assert not products.gains(left, right)
    assert torch.equal(product(left, right, bias), torch.addmm(bias, left, right))
    assert torch.equal(product(left, right), left @ right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(as_if_wide, dtype):
    left, right = torch.randn(200, 200, dtype=dtype), torch.randn(200, 200, dtype=dtype)
    assert not products.gains(left, right)
    assert torch.equal(product(left, right), left @ right)


def test_elsewhere_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "_has_more_than_mkl_uses", lambda: False)
    left, right = torch.randn(200, 200), torch.randn(200, 200)
    assert torch.equal(product(left, right), left @ right)


def test_a_shape_is_known_without_computing(as_if_wide):
    left, right = torch.empty(3000, 2000, device="meta"), torch.empty(2000, 100, device="meta")
    assert torch.ops.ppl_vae.product(left, right, None).shape == (3000, 100)
